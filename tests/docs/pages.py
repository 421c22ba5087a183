"""The pages of the documentation, their code blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The first line of a block that only runs elsewhere: `# needs a TPU`.
NEEDS = "# needs "
# What an indented block of code is called, in place of the language that a fence names.
INDENTED = "indented"

_FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})\s*(.*?)\s*$")
_COMMENT = re.compile(r"(^|\s)#(\s.*)?$")
_VARIABLE = re.compile(r"\$\([^)]*\)|\$\{\w+\}|\$\w+")
_SEPARATORS = ("&&", "||", "|", ";", "&", "(", ")")
_ASSIGNMENT = re.compile(r"^[A-Za-z_]\w*=")
_PROMPT = re.compile(r"^(\$ )?(\.venv/bin/|\.?/)?")
# The first words of a line that is a command. `make` is also a verb, so its target has to be the last word.
_COMMAND_LINE = re.compile(
    r"^((transllm|python3?|pip|pytest|git|bench/\S+|launch/\S+|docker|gcloud|kubectl|sbatch|vllm)\s+\S|make [\w-]+$)"
)


class PageError(AssertionError):
    """What is wrong in a page; the message begins with the page and the line."""


@dataclass(frozen=True)
class Block:
    """A block of code. line: the number of its first line in the page. language: what the fence names."""

    page: str
    line: int
    language: str
    lines: tuple[str, ...]

    @property
    def needs(self) -> str | None:
        """What the block needs that is not here, such as "a TPU"; None if it runs."""
        first = self.lines[0] if self.lines else ""
        return first.removeprefix(NEEDS) if first.startswith(NEEDS) else None

    def error(self, line: int, problem: str) -> PageError:
        """An error at a line of the page."""
        return PageError(f"{self.page}:{line}: {problem}")


@dataclass(frozen=True)
class Command:
    """A command of a block. line: its number in the page. words: the program and its arguments.

    variables: what `NAME=value` before it or `export` sets.
    """

    block: Block
    line: int
    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def program(self) -> str:
        """The program's name; `.venv/bin/` in front of it is left out."""
        return self.words[0].removeprefix(".venv/bin/") if self.words else ""

    def error(self, problem: str) -> PageError:
        """An error that names the command."""
        return self.block.error(self.line, f"{problem}: {shlex.join(self.words)}")


def all_pages() -> list[str]:
    """README.md and the pages below docs/, without what Sphinx writes there, relative to the repository."""
    found = (path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", *sorted(str(path) for path in found if not any(part[0] in "._" for part in path.parts))]


def read_page(page: str) -> list[Block]:
    """The blocks of a page of the repository."""
    return list(blocks(page, (ROOT / page).read_text(encoding="utf-8").splitlines()))


def blocks(page: str, lines: list[str], first: int = 1) -> Iterator[Block]:
    """The blocks of Markdown, in order; those inside a directive of MyST (```{note}), too.

    first: the number of the first of these lines.
    """
    place = 0
    while place < len(lines):
        opened = _FENCE.match(lines[place])
        if opened is None:
            end = place
            while end < len(lines) and lines[end].startswith("    "):
                end += 1
            if end > place:
                yield Block(page, first + place, INDENTED, tuple(line[4:] for line in lines[place:end]))
            place = max(end, place + 1)
            continue
        indent, fence, language = len(opened[1]), opened[2], opened[3]
        closing = re.compile(rf"^\s*{re.escape(fence[0])}{{{len(fence)},}}\s*$")
        end = next((n for n in range(place + 1, len(lines)) if closing.match(lines[n])), None)
        if end is None:
            raise PageError(f"{page}:{first + place}: this block is not closed")
        inside = [line[min(indent, len(line) - len(line.lstrip())) :] for line in lines[place + 1 : end]]
        if language.startswith("{") and not language.startswith("{code"):
            yield from blocks(page, inside, first + place + 1)
        else:
            yield Block(page, first + place + 1, language, tuple(inside))
        place = end + 1


def hidden_commands(block: Block) -> Iterator[PageError]:
    """An error for each line that looks like a command, in a block where no test would run it.

    A synopsis or what a command prints is in a block `text`; commands in other languages are part of something else.
    """
    if block.language in (INDENTED, "") or re.match(r"bash|shell|console|zsh|\{code", block.language):
        for number, line in enumerate(block.lines):
            if _COMMAND_LINE.match(_PROMPT.sub("", line.strip())):
                fences = "commands are in ```sh blocks, a synopsis or an output in ```text"
                yield block.error(block.line + number, f"{fences}: {line.strip()}")


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block `sh`, in order. Raises PageError for a line that cannot be read."""
    for line, text in _logical_lines(block):
        if block.needs is not None:
            text = _VARIABLE.sub("1", text)
        elif _VARIABLE.search(text):
            raise block.error(line, f"variables are not replaced here; write what is meant: {text}")
        for words in _simple_commands(text):
            set_here = []
            exported = words[0] == "export"
            rest = words[1:] if exported else words
            while rest and _ASSIGNMENT.match(rest[0]):
                name, _, value = rest.pop(0).partition("=")
                set_here.append((name, value))
            if block.needs is None and any(word in ("<", ">", ">>") for word in rest):
                raise block.error(line, f"redirections are not run here: {text}")
            yield Command(block, line, tuple(rest), tuple(set_here))


def _logical_lines(block: Block) -> Iterator[tuple[int, str]]:
    """The lines without comments, and each line that ends in a backslash or inside quotes joined with the next."""
    begun: str | None = None
    start = block.line
    for number, raw in enumerate(block.lines, block.line):
        if begun is None:
            begun, start = "", number
        text = begun + raw.strip()
        if text.endswith("\\"):
            begun = text[:-1].rstrip() + " "
            continue
        text = _COMMENT.sub("", text)
        try:
            shlex.split(text)
        except ValueError:
            begun = text + "\n"
            continue
        begun = None
        if text.strip():
            yield start, text
    if begun is not None:
        raise block.error(start, "this command does not end")


def _simple_commands(text: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in _SEPARATORS:
            if words:
                yield words
            words = []
        else:
            words.append(word)
