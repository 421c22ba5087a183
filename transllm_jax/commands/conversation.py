"""`transllm chat`: questions and commands are read, answers are printed as they grow.

In a terminal there are a prompt, colours and notes. Otherwise (a pipe, a file) only answers are printed, as they are,
with an empty line between two of them, and what is to be said about them goes to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from transllm_jax.commands.chat import Session, show
from transllm_jax.commands.lines import Lines
from transllm_jax.disk import write_text
from transllm_jax.errors import UserError
from transllm_jax.generation.answer import Answer

COMMANDS = {
    "/chain": "show or hide the English steps of the answers",
    "/base": "the original model answers, until /base is given again; /base QUESTION asks it once",
    "/english": "the original model writes the English answers, until /english is given again",
    "/save FILE": "write the conversation to a new file of JSON",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "end (or Ctrl-D)",
}


class Talk:
    """A conversation at the keyboard, or from a pipe."""

    def __init__(self, session: Session, console: Console, *, show_chain: bool = False) -> None:
        self._session, self._console, self._show_chain = session, console, show_chain
        self._by_original = False
        # Whether answers were printed since something else was.
        self._printed = False
        self._turns: list[dict[str, Any]] = []
        self._saved: Path | None = None

    @property
    def prompt(self) -> str:
        """What stands before a question."""
        return "base> " if self._by_original else "> "

    def run(self, lines: Callable[[Callable[[], str]], Iterator[str | None]]) -> None:
        """Answer until the input ends, or /quit.

        lines: given the function that makes the prompt, the lines that are typed; None where Ctrl-C was typed instead.
        """
        if self._console.is_terminal:
            self._note(f"{self._session.name}; /help lists the commands, /quit ends")
        for line in lines(lambda: self.prompt):
            if line is None:
                self._note("/quit or Ctrl-D ends")
                continue
            try:
                if not self._take(line):
                    return
            except UserError as error:
                self._note(str(error), "red")
            except KeyboardInterrupt:
                if not self._console.is_terminal:
                    raise
                self._console.print()
                self._note("stopped; this turn is not remembered")
        if self._console.is_terminal:
            self._console.print()

    def _take(self, line: str) -> bool:
        """Do what a line says; False if it ends the conversation."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        # A question may begin with a slash: with a path, or after a space.
        if not (name.startswith("/") and name[1:].isalpha() and name.isascii()):
            if line.strip():
                self._ask(line.strip(), self._by_original)
            return True
        if name in ("/quit", "/exit"):
            return False
        if name == "/help":
            for command, meaning in COMMANDS.items():
                self._note(f"{command:12}{meaning}")
            self._note("A question that begins like a command: put a space before it.")
        elif name == "/chain":
            self._show_chain = not self._show_chain
            self._note(f"the English steps are {'shown' if self._show_chain else 'hidden'} from now on")
        elif name == "/base":
            self._base(rest)
        elif name == "/english":
            self._english()
        elif name == "/save":
            self._save(rest)
        elif name in ("/reset", "/new"):
            self._session.reset()
            self._turns.clear()
            self._note("the conversation is forgotten")
        else:
            raise UserError(f"there is no command {name}; /help lists them")
        return True

    def _ask(self, question: str, original: bool) -> None:
        session = self._session
        forgotten = session.forgotten
        answers = session.ask(question, original=original)
        if self._printed and not self._console.is_terminal:
            first = next(answers)  # so that nothing is printed before a refusal
            self._console.print()
            answers = _after(first, answers)
        answer = show(self._console, answers, show_chain=self._show_chain, markers=session.chat.markers)
        self._printed = True
        if answer is None:
            return
        by = "original" if original else "model"
        self._turns.append({"question": question, **_parts(answer), "by": by})
        for remark in remarks(answer, show_chain=self._show_chain):
            self._note(remark)
        if session.forgotten > forgotten:
            self._note("the context is full: the oldest turns are forgotten")

    def _base(self, question: str) -> None:
        self._session.require_original()
        if question:
            self._ask(question, True)
            return
        self._by_original = not self._by_original
        self._note("the original model answers" if self._by_original else f"{self._session.name} answers")

    def _english(self) -> None:
        session = self._session
        session.set_english("original" if session.english == "model" else "model")
        by = "the original model" if session.english == "original" else session.name
        self._note(f"{by} writes the English answers")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs a file, such as /save talk.json")
        try:
            path = Path(name).expanduser()
            exists = path.exists()
        except (OSError, RuntimeError) as error:
            raise UserError(f"{name} cannot be written ({error}); give another name") from None
        if exists and path != self._saved:
            raise UserError(f"{path} exists; give another name")
        saved = {
            "model": self._session.name,
            "messages": [
                {"role": role, "content": turn[key]}
                for turn in self._turns
                for role, key in (("user", "question"), ("assistant", "answer"))
            ],
            "turns": self._turns,
        }
        try:
            write_text(path, json.dumps(saved, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); give another name") from None
        self._saved = path
        count = len(self._turns)
        self._note(f"{count} turn{'s are' if count != 1 else ' is'} in {path}")

    def _note(self, text: str, style: str = "dim") -> None:
        if self._console.is_terminal:
            lines = Lines(self._console)
            lines.write(text, style)
            lines.end()
        else:
            print(text, file=sys.stderr)


def remarks(answer: Answer, *, show_chain: bool) -> list[str]:
    """What to say about an answer that is not as it should be."""
    found = []
    if not answer.visible:
        hint = "; /chain shows the English steps" if answer.answer_en and not show_chain else ""
        found.append(f"the answer is empty{hint}")
    if answer.cut_off:
        found.append("the answer was cut off; --max-new-tokens sets the limit")
    elif answer.how == "broken" and answer.visible:
        found.append("the chain is broken: this is what could be read of it")
    return found


def _parts(answer: Answer) -> dict[str, Any]:
    names = ("question_en", "answer_en", "answer", "how", "complete", "raw")
    return {name: getattr(answer, name) for name in names}


def _after(first: Answer, answers: Iterator[Answer]) -> Iterator[Answer]:
    yield first
    yield from answers


def typed(stdin: TextIO, *, prompted: bool) -> Callable[[Callable[[], str]], Iterator[str | None]]:
    """The lines of an input: as they are, or, if `prompted`, after a prompt, with editing and a history."""

    def lines(prompt: Callable[[], str]) -> Iterator[str | None]:
        if prompted:
            with suppress(ImportError):  # not in every Python
                import readline  # noqa: F401 (input() uses it then)
        while True:
            try:
                line = input(prompt()) if prompted else stdin.readline()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not prompted:
                    raise
                print()
                yield None
                continue
            if not prompted and not line:
                return
            yield line.rstrip("\r\n")

    return lines
