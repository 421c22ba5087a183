"""The commands of the documentation: each that can run here runs, in order, page by page, on a tiny model.

A page has a directory of its own, with the files of `make_sandbox`. A block whose first line is `# needs ...` is not
run, but its commands, options, config keys, extras and targets have to exist.
"""

from __future__ import annotations

import ast
import configparser
import gzip
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from conftest import EXAMPLES, call, tiny_run, write_config
from pages import ROOT, Block, Command, PageError, all_pages, blocks, commands, hidden_commands, read_page
from tiny_sentencepiece import write_sentencepiece_model
from world_text import TEXT, on_world_text, write_world

from transllm_jax.cli import main as cli
from transllm_jax.config import load_config
from transllm_jax.errors import UserError

# Commands that are only parsed, and why.
PARSED = {"preflight": "it compiles for minutes; tests/preflight runs it"}
# A command's words as they are run: what a tiny model and a few hundred kilobytes of text allow.
SMALLER = (
    (re.compile(r"^(\w+)\.(steps|epochs)=.*$"), r"\1.steps=2"),
    (re.compile(r"^vocabulary\.size=\d+$"), "vocabulary.size=140"),
    (re.compile(r"^\d+(,\d+)+$"), "160,200"),
)
# The same for the value of an option; and options that are added.
SMALLER_OPTIONS = {"--size": "160", "--max-new-tokens": "8"}
ADDED = {"chat": ("--max-new-tokens", "8"), "evaluate": ("--limit", "2")}
# A config of the reader's own, on all pages.
MINE = "mine.yaml"
# What is typed into a conversation.
TYPED = "ผึ้งผลิตอะไร\n/quit\n"

PAGES = all_pages()


def make_sandbox(directory: Path, finished: Path) -> None:
    """The files that pages name. `finished` is the work directory of a finished run.

    configs/*.yaml           the tiny run of tests/conftest.py under the names of the repository's configs
    configs/models/*.json    as in the repository
    examples/                as in the repository
    runs/text/               the text of the world, which configs/world.yaml reads
    mine.yaml                the tiny run, as a config of the reader's own
    runs/demo runs/mine      the finished runs of configs/demo.yaml and mine.yaml
    my-llama-chat/           the tiny chat model, with a byte-level tokenizer
    llama-2-chat/            another, with a SentencePiece tokenizer
    text/*.txt               Thai text, in two files
    thai/*.txt.gz            the same
    english.txt heldout.txt  English text, and Thai text that is not in the others
    pairs.tsv                translation pairs
    instructions.jsonl       instructions in English and Thai
    """
    model = finished.parent / "model"
    for path in (ROOT / "configs").glob("*.yaml"):
        write_config(directory / "configs" / path.name, tiny_run(model, Path("runs") / path.stem))
    write_world(directory / TEXT)
    write_config(directory / "configs/world.yaml", on_world_text(tiny_run(model, Path("runs/world-${language.code}"))))
    write_config(directory / MINE, tiny_run(model, Path("runs/mine")))
    shutil.copytree(ROOT / "configs" / "models", directory / "configs" / "models")
    shutil.copytree(EXAMPLES.parent, directory / "examples")
    shutil.copytree(finished, directory / "runs" / "demo")
    shutil.copytree(finished, directory / "runs" / "mine")
    shutil.copytree(model, directory / "my-llama-chat")
    write_sentencepiece_model(directory / "llama-2-chat")
    documents = (EXAMPLES / "text.train.txt").read_text(encoding="utf-8").split("\n\n")
    for number, part in enumerate((documents[::2], documents[1::2]), 1):
        text = "\n\n".join(part)
        for path in (directory / "text" / f"part{number}.txt", directory / "thai" / f"part{number}.txt.gz"):
            path.parent.mkdir(exist_ok=True)
            data = text.encode()
            path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    for name, source in {
        "english.txt": "english.train.txt",
        "heldout.txt": "text.heldout.txt",
        "pairs.tsv": "pairs.train.tsv",
        "instructions.jsonl": "instructions.train.jsonl",
    }.items():
        shutil.copy(EXAMPLES / source, directory / name)


@pytest.fixture(scope="session")
def sandbox(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that pages name; do not change them: each page gets a copy."""
    directory = tmp_path_factory.mktemp("sandbox") / "files"
    directory.mkdir()
    make_sandbox(directory, finished_run)
    return directory


def sh_blocks(page: str) -> list[Block]:
    return [block for block in read_page(page) if block.language == "sh"]


# --- what exists -------------------------------------------------------------------------------------------------


def parse(command: Command) -> str:
    """The name of a `transllm` command that is there, such as "convert to-hf". Raises PageError, also for an option."""
    found, words, name = typer.main.get_command(cli.app), list(command.words[1:]), []
    while hasattr(found, "commands") and words and not words[0].startswith("-"):
        # A group may have a default command, whose name is left out.
        default = getattr(found, "default", None) if words[0] not in found.commands else None
        name.append(default or words.pop(0))
        if name[-1] not in found.commands:
            raise command.error(f"there is no command {' '.join(name)}")
        found = found.commands[name[-1]]
    if not {"-h", "--help", "--version"} & set(words):
        try:
            found.make_context(" ".join(name), words)
        except Exception as error:  # typer has several kinds, each with a message
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            raise command.error(message) from None
    return " ".join(name)


def check_config(command: Command) -> None:
    """Raises PageError if a config of the repository does not take the keys that are given."""
    given = [word for word in command.words[2:] if re.match(r"^[a-z][\w.]*=", word)]
    path = ROOT / command.words[2] if len(command.words) > 2 else ROOT
    if path.is_file() and path.suffix == ".yaml":
        try:
            load_config(path, given)
        except UserError as error:
            raise command.error(str(error)) from None


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, flags=re.MULTILINE))


def extras() -> set[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return set(setup["options.extras_require"])


def options_of(script: Path) -> set[str]:
    """The options that a script's source names."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {text for text in strings if isinstance(text, str) and re.match(r"^--[a-z][\w-]*$", text)} | {"--help"}


def check(command: Command) -> None:
    """Raises PageError if what a command names is not there. Programs that are not ours are passed over."""
    words, program = command.words, command.program
    if program == "transllm":
        name = parse(command)
        if name in ("run", "preflight"):
            check_config(command)
    elif program == "make":
        for target in words[1:]:
            if "=" not in target and target not in targets():
                raise command.error(f"the Makefile has no target {target}")
    elif program == "pip" or (program.startswith("python") and words[1:3] == ("-m", "pip")):
        for package in words:
            named = re.match(r"^(?:transllm-jax|\.)\[([\w,-]+)\]", package)
            for extra in named[1].split(",") if named else ():
                if extra not in extras():
                    raise command.error(f"setup.cfg has no extra {extra}")
    elif program.startswith("python") and len(words) > 1 and words[1].startswith(("bench/", "examples/")):
        if not (ROOT / words[1]).is_file():
            raise command.error("there is no such script")
        for word in words[2:]:
            if word.startswith("--") and word.partition("=")[0] not in options_of(ROOT / words[1]):
                raise command.error(f"{words[1]} has no option {word}")
    elif program.startswith("launch/"):
        if not (ROOT / program).is_file():
            raise command.error("there is no such script")
    elif program == "pytest":
        for word in words[1:]:
            if word.startswith("tests") and not list(ROOT.glob(word.partition("::")[0])):
                raise command.error(f"there is no {word}")
    elif program and command.block.needs is None:
        raise command.error("only our own commands are run here; the block's first line is `# needs ...`")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_in_a_block_that_is_tested(page: str) -> None:
    problems = [str(problem) for block in read_page(page) for problem in hidden_commands(block)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    problems = []
    for block in sh_blocks(page):
        try:
            for command in commands(block):
                try:
                    check(command)
                except PageError as error:
                    problems.append(str(error))
        except PageError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)


# --- what runs ----------------------------------------------------------------------------------------------------


def runs(command: Command) -> bool:
    ours = command.program == "transllm" and not (len(command.words) > 1 and command.words[1] in PARSED)
    return command.block.needs is None and (ours or writes_text(command))


def writes_text(command: Command) -> bool:
    return command.program.startswith("python") and "examples/world/make.py" in command.words[1:2]


def made_smaller(words: tuple[str, ...]) -> list[str]:
    """The arguments with which a command is run here."""
    found = list(words[1:])
    for place, word in enumerate(found):
        before = found[place - 1] if place else ""
        for pattern, smaller in SMALLER:
            word = pattern.sub(smaller, word)
        found[place] = SMALLER_OPTIONS.get(before, word)
    added = ADDED.get(found[0], ()) if found and found[1:2] != ["sheets"] else ()
    return found if added and added[0] in found else [*found, *added]


class Reader:
    """Does what a page says, in a copy of the sandbox's files.

    `init` writes a config for a real model; the tiny one takes its place. Its run is there already, so it is not made
    again for each page: it comes when the page runs its config.
    """

    def __init__(self, files: Path, here: Path) -> None:
        self.files = files
        shutil.copytree(files, here)

    def does(self, command: Command) -> int:
        """Runs a command in the current directory; gives its exit code."""
        if writes_text(command):
            return subprocess.run([sys.executable, *command.words[1:]]).returncode
        words = made_smaller(command.words)
        if words[0] == "init":
            return self._writes(Path(words[1]), words, command)
        if words == ["run", words[1]] and Path(words[1]).name == MINE and not Path("runs/mine/export").exists():
            shutil.rmtree("runs/mine", ignore_errors=True)
            shutil.copytree(self.files / "runs" / "mine", "runs/mine")
        return call(*words)

    def _writes(self, config: Path, words: list[str], command: Command) -> int:
        if config.name != MINE:
            raise command.error(f"a config of the reader's own is called {MINE} on these pages")
        config.unlink(missing_ok=True)
        code = call(*words)
        if code == 0:
            load_config(config)
            shutil.copy(self.files / MINE, config)
            shutil.rmtree("runs/mine")
        return code


PAGES_THAT_RUN = [
    page for page in PAGES if any(runs(command) for block in sh_blocks(page) for command in commands(block))
]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_the_commands_of_a_page_run(
    page: str, sandbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader = Reader(sandbox, tmp_path / "page")
    monkeypatch.chdir(tmp_path / "page")
    monkeypatch.setenv("COLUMNS", "300")
    for command in (command for block in sh_blocks(page) for command in commands(block)):
        for name, value in command.variables if command.block.needs is None else ():
            monkeypatch.setenv(name, value)
        if not runs(command):
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO(TYPED))
        capfd.readouterr()
        code = reader.does(command)
        printed = "".join(capfd.readouterr())
        if code != 0:
            raise command.error(f"it ends with {code}, and prints {printed[-2000:]}")
        assert "Traceback" not in printed


# --- the tests of these tests -------------------------------------------------------------------------------------


def page_of(*lines: str) -> list[Block]:
    return list(blocks("page.md", list(lines)))


def commands_of(*lines: str) -> Iterator[Command]:
    for block in page_of("```sh", *lines, "```"):
        yield from commands(block)


def test_commands_are_read_as_a_shell_reads_them() -> None:
    found = list(
        commands_of(
            "# a comment",
            "transllm run configs/demo.yaml \\",
            "    'vocabulary={adapter: x}' --workdir runs/a  # another",
            "NAME=1 make test && .venv/bin/transllm chat runs/demo 'two words'",
            "export A=b",
        )
    )
    assert [command.words for command in found] == [
        ("transllm", "run", "configs/demo.yaml", "vocabulary={adapter: x}", "--workdir", "runs/a"),
        ("make", "test"),
        (".venv/bin/transllm", "chat", "runs/demo", "two words"),
        (),
    ]
    assert [command.line for command in found] == [3, 5, 5, 6]
    assert (
        found[1].variables == (("NAME", "1"),)
        and found[2].program == "transllm"
        and found[3].variables == (("A", "b"),)
    )


def test_blocks_of_directives_lists_and_indented_ones() -> None:
    found = page_of(
        *("Text", "", "    transllm status a", "", "- item", "  ```sh", "  make test", "  ```"),
        *("````{note}", "```sh", "# needs a TPU", "transllm status b", "```", "````", "```", "make quick", "```"),
    )
    assert [(block.language, block.line, block.lines[-1]) for block in found] == [
        ("indented", 3, "transllm status a"),
        ("sh", 7, "make test"),
        ("sh", 11, "transllm status b"),
        ("", 16, "make quick"),
    ]
    assert [block.needs for block in found] == [None, None, "a TPU", None]
    assert [str(error).split(": ")[0] for block in found for error in hidden_commands(block)] == [
        "page.md:3",
        "page.md:16",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("transllm nothing", "no command nothing"),
        ("transllm convert nothing a b", "no command convert nothing"),
        ("transllm run configs/demo.yaml --nothing", "--nothing"),
        ("transllm run configs/demo.yaml --profile many", "many"),
        ("transllm run configs/demo.yaml pretrain.stepz=4", "pretrain.stepz: unknown key"),
        ("transllm status", "Missing argument 'workdir'"),
        ("make nothing", "no target nothing"),
        ("pip install 'transllm-jax[tpu,nothing]'", "no extra nothing"),
        ("python bench/nothing.py", "no such script"),
        ("python bench/data.py my-llama-chat --nothing 3", "no option --nothing"),
        ("python examples/world/nothing.py", "no such script"),
        ("python examples/world/make.py th runs/text/th --nothing 3", "no option --nothing"),
        ("launch/nothing.sh", "no such script"),
        ("pytest -q tests/nothing.py", "no tests/nothing.py"),
        ("vllm serve runs/demo/export", "only our own commands"),
        ("transllm status $WORKDIR", "variables"),
        ("transllm status runs/demo > status.txt", "redirections"),
    ],
)
def test_what_is_not_there_is_found(line: str, problem: str) -> None:
    with pytest.raises(PageError, match=rf"^page\.md:2: .*{re.escape(problem)}"):
        for command in commands_of(line):
            check(command)


def test_what_a_block_needs_is_not_run_but_its_options_are_checked() -> None:
    *good, bad = commands_of("# needs vllm", "vllm serve $OUT", "transllm status $OUT", "transllm run $OUT --nothing")
    for command in good:
        check(command)
        assert not runs(command)
    with pytest.raises(PageError, match=r"^page\.md:5: .*--nothing"):
        check(bad)


def test_commands_are_made_smaller() -> None:
    def smaller(line: str) -> str:
        return shlex.join(made_smaller(tuple(shlex.split(line))))

    assert smaller("transllm run c.yaml pretrain.steps=500 translate.epochs=2") == (
        "run c.yaml pretrain.steps=2 translate.steps=2"
    )
    assert smaller("transllm tokenizer expand a b c --size 4000 --language th") == (
        "tokenizer expand a b c --size 160 --language th"
    )
    assert smaller("transllm chat runs/demo") == "chat runs/demo --max-new-tokens 8"


@pytest.mark.slow
def test_the_text_of_a_language_is_written_and_read(
    sandbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(sandbox, tmp_path / "page")
    monkeypatch.chdir(tmp_path / "page")
    lines = ("python examples/world/make.py hi runs/text/hi", "transllm run configs/world.yaml language.code=hi")
    assert [(runs(command), reader.does(command)) for command in commands_of(*lines)] == [(True, 0), (True, 0)]
    assert Path("runs/world-hi/export").is_dir()
