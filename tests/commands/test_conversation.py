"""`transllm chat`: its commands, what goes into a pipe, and a real terminal with Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import MARKERS, Script, chain_tokenizer, chat_of

from transllm_jax.commands.chat import Session, show
from transllm_jax.commands.conversation import COMMANDS, Talk, typed
from transllm_jax.generation.answer import answer_of
from transllm_jax.progress import plain_console
from transllm_jax.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
DOG, CAT = "<EN>Who is it?<RESPONSE>A dog.<TH>หมา", "<EN>And then?<RESPONSE>A cat.<TH>แมว"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chain_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Heard:
    """A conversation with a scripted model, and what was printed."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *texts: str,
        original: tuple[str, ...] | None = None,
        terminal: bool = True,
        in_chains: bool = True,
    ) -> None:
        self.script = Script(tokenizer, *texts)
        other = None if original is None else Script(tokenizer, *original)
        self.session = Session(
            "a model",
            chat_of(self.script),
            tokenizer,
            original=None if other is None else (lambda: chat_of(other)),
            in_chains=in_chains,
        )
        self.file = io.StringIO()
        console = plain_console(file=self.file, width=60, force_terminal=terminal, color_system=None)
        self.talk = Talk(self.session, console)

    def say(self, *lines: str | None) -> str:
        """What is printed when these lines are typed."""
        before = len(self.file.getvalue())
        self.prompts: list[str] = []

        def read(prompt: Callable[[], str]) -> Iterator[str | None]:
            for line in lines:
                self.prompts.append(prompt())
                yield line

        self.talk.run(read)
        return self.file.getvalue()[before:].replace("…\r\x1b[2K", "")


def test_the_chain_is_shown_and_hidden(tokenizer: Tokenizer) -> None:
    heard = Heard(tokenizer, DOG, CAT, DOG)
    said = heard.say("ใคร", "/chain", "อะไร", "/chain", "ใคร")
    assert said.splitlines() == [
        "a model; /help lists the commands, /quit ends",
        "หมา",
        "the English steps are shown from now on",
        "<EN>And then?",
        "<RESPONSE>A cat.",
        "<TH>แมว",
        "the English steps are hidden from now on",
        "หมา",
        "",
    ]


def test_steps_in_english_are_dim() -> None:
    dim, plain = "\x1b[2m", "\x1b[0m"
    steps = f"{dim}<EN>Who?{plain}\n{dim}<RESPONSE>A dog.{plain}\n{dim}<TH>{plain}หมา\n"
    for text, shown in ((DOG.replace(" is it", ""), steps), ("<RESPONSE>A dog.", f"{dim}<RESPONSE>{plain}A dog.\n")):
        file = io.StringIO()
        console = plain_console(file=file, width=60, force_terminal=True, color_system="standard")
        show(console, iter([answer_of(text, MARKERS)]), show_chain=True)
        assert file.getvalue().split("\x1b[2K")[1] == shown


def test_the_original_answers_once_or_until_it_is_told_not_to(tokenizer: Tokenizer) -> None:
    heard = Heard(tokenizer, DOG, CAT, original=("A cow.", "A pig.", "A hen."))
    said = heard.say("ใคร", "/base Who?", "/base", "Who else?", "And?", "/base", "อะไร")
    order = ["หมา", "A cow.", "the original model answers", "A pig.", "A hen.", "a model answers", "แมว"]
    assert [line for line in said.splitlines() if line in order] == order
    assert heard.prompts == ["> ", "> ", "> ", "base> ", "base> ", "base> ", "> "]
    assert [message["content"] for message in heard.session.history][1::2] == [
        "A dog.",
        "A cow.",
        "A pig.",
        "A hen.",
        "A cat.",
    ]
    assert "there is no original model beside a model" in Heard(tokenizer).say("/base")


def test_the_original_writes_the_english_answers_until_it_is_told_not_to(tokenizer: Tokenizer) -> None:
    heard = Heard(tokenizer, "<EN>Who is it?<RESPONSE>", "หมู", "<RESPONSE>", DOG, original=("A pig.", "A hen."))
    said = heard.say("/english", "ใคร", "Who else?", "/english", "ใคร")
    order = [
        "the original model writes the English answers",
        "หมู",
        "A hen.",
        "a model writes the English answers",
        "หมา",
    ]
    assert [line for line in said.splitlines() if line in order] == order
    assert [message["content"] for message in heard.session.history][1::2] == ["A pig.", "A hen.", "A dog."]
    assert "there is no original model beside a model" in Heard(tokenizer).say("/english")
    assert "does not answer in chains" in Heard(tokenizer, original=(), in_chains=False).say("/english")


def test_a_conversation_is_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "talk [b].json"
    heard = Heard(tokenizer, DOG, "<RESPONSE>Yes.", CAT, original=("A cow.",))
    said = heard.say("ใคร", f"/save {path}", "Really?", "/base Who?", f"/save {path}", "/save", f"/save {path}/x.json")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["messages"][:2] == [{"role": "user", "content": "ใคร"}, {"role": "assistant", "content": "หมา"}]
    assert [turn["how"] for turn in saved["turns"]] == ["chain", "english", "plain"]
    assert [turn["by"] for turn in saved["turns"]] == ["model", "model", "original"]
    assert saved["turns"][0] == {
        "question": "ใคร",
        "question_en": "Who is it?",
        "answer_en": "A dog.",
        "answer": "หมา",
        "how": "chain",
        "complete": True,
        "raw": DOG,
        "by": "model",
    }
    assert f"3 turns are in {path}" in said.replace("\n", "") and "/save needs a file" in said
    assert "x.json cannot be written" in said.replace("\n", " ") and "1 turn is in" in said
    # A file that was there before is kept.
    said = Heard(tokenizer, DOG).say("ใคร", f"/save {path}")
    assert "exists; give another name" in said.replace("\n", " ")
    assert json.loads(path.read_text(encoding="utf-8")) == saved


def test_a_conversation_is_forgotten(tokenizer: Tokenizer) -> None:
    heard = Heard(tokenizer, DOG, CAT, "<RESPONSE>Yes.")
    heard.say("ใคร", "/reset", "อะไร", "/new", "Really?")
    assert [message["content"] for message in heard.session.history] == ["Really?", "Yes."]
    assert "Who is it?" not in tokenizer.decode(heard.script.calls[1][0])


def test_help_names_all_commands_and_another_is_refused(tokenizer: Tokenizer) -> None:
    heard = Heard(tokenizer, DOG, DOG)
    said = heard.say("/help", "/foo bar", "/quit", "never asked")
    assert all(command in said for command in COMMANDS) and "there is no command /foo" in said
    assert not heard.script.calls
    # Questions that begin with a slash.
    heard.say("/etc/passwd คืออะไร", " /help")
    assert [tokenizer.decode(call[0]).count("/") for call in heard.script.calls] == [2, 1]


def test_empty_lines_and_bad_questions_do_no_harm(tokenizer: Tokenizer) -> None:
    heard = Heard(tokenizer, DOG)
    said = heard.say("", "  ", "a\x1b[A", "<TH>x", "caf\udce9", None, "ใคร")
    for line in ("the control character U+001B", "the special token <TH>", "not UTF-8", "/quit or Ctrl-D ends", "หมา"):
        assert line in said
    assert len(heard.script.calls) == 1


def test_turns_that_no_longer_fit_are_named(tokenizer: Tokenizer) -> None:
    heard = Heard(tokenizer, "word " * 40, "word " * 40, DOG)
    heard.say("Go on")
    heard.script.config = SimpleNamespace(context=len(heard.script.calls[0][0]) + 150)
    assert "the context is full: the oldest turns are forgotten" in heard.say("Go on").replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<EN>Who is it?<RESPONSE>A dog.<TH>", "the answer is empty; /chain shows the English steps"),
        ("", "the answer is empty"),
        ("<RESPONSE>A dog." + " A dog." * 30, "the answer was cut off; --max-new-tokens sets the limit"),
        ("<EN>Who?<TH>หมา", "the chain is broken: this is what could be read of it"),
    ],
)
def test_what_is_wrong_with_an_answer_is_said(tokenizer: Tokenizer, text: str, said: str) -> None:
    assert said in Heard(tokenizer, text, "").say("ใคร")


def test_only_answers_go_into_a_pipe(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    long = "<RESPONSE>" + "A dog and [b] a cat. " * 5
    heard = Heard(tokenizer, DOG, long, CAT, terminal=False)
    said = heard.say("ใคร", "\x07", "/chain", "/chain", "Who?", "", "อะไร")
    assert said == f"หมา\n\n{long[10:].strip()}\n\nแมว\n"
    assert "U+0007" in capsys.readouterr().err


def test_lines_are_read_until_the_input_ends() -> None:
    assert list(typed(io.StringIO("a\n\nb\r\nc"), prompted=False)(lambda: "never")) == ["a", "", "b", "c"]


# --- as a command -------------------------------------------------------------------------------------------------

# A process in which `transllm chat` opens a scripted model. Its first answer never comes to its end.
COMMAND = """
import sys, time
sys.path[:0] = [{tests!r}]
from pathlib import Path
from scripted import Growing, Script, chain_tokenizer, chat_of
from transllm_jax.cli import main
from transllm_jax.commands import chat

tokenizer = chain_tokenizer(Path({directory!r}))

class Slow(Script):
    def stream(self, prompt, **options):
        (ids,) = self.generate([prompt], **options)
        print(len(tokenizer.decode(prompt).split("<|im_start|>")), file=sys.stderr)
        for size in range(1, len(ids) + 1):
            yield Growing(ids[:size])
        while {hangs} and len(self.calls) == 1:
            time.sleep(0.05)

def opened(*_, **__):
    return chat.Session("a model", chat_of(Slow(tokenizer, *{texts!r})), tokenizer)

chat.open_session = opened
sys.argv = ["transllm", "chat", "model", *sys.argv[1:]]
main.main()
"""


def command(directory: Path, *texts: str, hangs: bool = False) -> list[str]:
    code = COMMAND.format(tests=str(ROOT / "tests"), directory=str(directory), texts=texts, hangs=hangs)
    return [sys.executable, "-c", code]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    return kept | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "PYTHONUTF8": "1", "JAX_PLATFORMS": "cpu"}


class Terminal:
    """A pseudo-terminal, in which a command runs."""

    def __init__(self, arguments: list[str]) -> None:
        import pty

        self.errors, write = os.pipe()
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.dup2(write, 2)
            os.execvpe(arguments[0], arguments, environment())
        os.close(write)
        self.said, self._read = b"", 0

    def until(self, text: str, seconds: float = 60) -> None:
        """Wait for a text behind the one that was last waited for."""
        end = time.monotonic() + seconds
        while (found := self._plain.find(text, self._read)) < 0:
            assert time.monotonic() < end, f"{text!r} has not come in {self.said!r}"
            if select.select([self.terminal], [], [], 0.5)[0]:
                self.said += os.read(self.terminal, 65536)
        self._read = found + len(text)

    @property
    def _plain(self) -> str:
        """What was said, without styles and with the bytes of half a character at its end as they are."""
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", self.said.decode(errors="surrogateescape"))

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C at a prompt, until a text comes: Python's readline misses a signal between the prompt and its wait."""
        for _ in range(10):
            self.type("\x03")
            try:
                return self.until(text, seconds=6)
            except AssertionError:
                continue
        raise AssertionError(f"{text!r} has not come in {self.said!r}")

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def end(self) -> int:
        """The exit code."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.slow
def test_a_terminal(tmp_path: Path) -> None:
    texts = ("<EN>Who is it?<RESPONSE>A dog.<TH>น้ำผึ้ง มาจากผึ้ง และดอกไม้ด้วย", CAT)
    terminal = Terminal(command(tmp_path, *texts, hangs=True))
    terminal.until("> ")
    terminal.type("ใคร\n")
    terminal.until("น้ำผึ้ง")
    terminal.type("\x03")  # Ctrl-C in the middle of an answer
    terminal.until("this turn is not remembered")
    terminal.until("> ")
    terminal.type("อะไร\n")
    terminal.until("แมว")
    terminal.until("> ")
    terminal.interrupt_until("/quit or Ctrl-D ends")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    # The model never saw the stopped turn: its second prompt has as many messages as the first.
    first, second = os.read(terminal.errors, 1000).decode().split()
    assert first == second
    assert b"Traceback" not in terminal.said and "…".encode() in terminal.said and b"\x1b[2m" in terminal.said


@pytest.mark.slow
def test_a_pipe(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, DOG, CAT),
        input="ใคร\n".encode() + b"caf\xe9\n" + "อะไร".encode(),
        capture_output=True,
        env=environment(),
    )
    assert (done.returncode, done.stdout.decode()) == (0, "หมา\n\nแมว\n")
    assert [line for line in done.stderr.decode().splitlines() if not line.isdigit()] == [
        "the question is not UTF-8; use a UTF-8 terminal and locale, such as LANG=C.UTF-8"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("question", [["Who?"], []])
def test_a_pipe_that_is_interrupted(tmp_path: Path, question: list[str]) -> None:
    arguments = [*command(tmp_path, DOG, hangs=True), *question]
    pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, env=environment(), **pipe) as process:
        process.stdin.write(b"Who?\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        assert process.stderr.readline().strip().isdigit()  # type: ignore[union-attr]
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and errors.endswith(b"stopped\n") and b"Traceback" not in errors
