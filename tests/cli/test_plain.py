"""What a user wrote is printed as it is: `[ab]`, `[/bold]`, `[red]` and `:smile:` in paths, titles and texts."""

from __future__ import annotations

import ast
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import EXAMPLES, Command
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.cli import main as cli
from transllm_jax.commands import chat, dry_run
from transllm_jax.commands.conversation import Talk
from transllm_jax.errors import UserError
from transllm_jax.evaluation.token_cost import TokenCost, cost_table
from transllm_jax.generation.answer import Answer
from transllm_jax.hosts.site import Site
from transllm_jax.progress import Phases, Progress, plain_console
from transllm_jax.stages.training import part_of
from transllm_jax.storage import open_workdir
from transllm_jax.tokenizer.chain import MARKERS

ROOT = Path(__file__).parents[2]
ODD = "[ab] [/bold] [red] :smile: 12"
# Of a file: without a slash.
NAME = "[ab] [bold] [red] :smile:"


class Voice(Progress):
    """A voice and what it said."""

    def __init__(self, *, terminal: bool = False) -> None:
        self.heard = io.StringIO()
        super().__init__(plain_console(file=self.heard, width=300, force_terminal=terminal, color_system=None))

    @property
    def said(self) -> str:
        return self.heard.getvalue()


def test_lines_and_tables() -> None:
    voice = Voice()
    voice.say(ODD)
    voice.say(ODD, style="yellow")
    voice.say(Text.assemble((ODD, "bold"), ODD))
    table = Table(ODD, title=ODD, caption=ODD)
    table.add_row(ODD)
    voice.say(table)
    assert voice.said.count(ODD) == 8


def test_a_style_is_beside_the_text() -> None:
    heard = io.StringIO()
    Progress(plain_console(file=heard, force_terminal=True, color_system="standard")).say(ODD, style="yellow")
    assert heard.getvalue().count("\x1b") == 2 and ODD in heard.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_bars(terminal: bool) -> None:
    with Voice(terminal=terminal) as voice:
        with voice.task(ODD, total=2) as bar:
            bar.update(2, ODD)
            if voice.live is not None:
                voice.live.refresh()
        with Phases(voice) as tell:
            tell(ODD, 0.5)
            if voice.live is not None:
                voice.live.refresh()
    assert voice.said.count(ODD) >= 2


def test_what_a_source_is_called() -> None:
    voice: Any = Voice()
    run: Any = SimpleNamespace(progress=voice)
    rows: Any = SimpleNamespace(counts={"items": 3, "too short": 1})
    source: Any = SimpleNamespace(path=ODD)
    part_of(run, "pretrain", "1 text", source, rows, None)
    summary = {"items": 1, "tokens": 2, "rows": 3, "padded_fraction": 0.5}
    batches = SimpleNamespace(epoch=lambda steps: {ODD: 1.0}, shares={ODD: 1.0})
    config = SimpleNamespace(optimizer=SimpleNamespace(steps=1))
    job: Any = SimpleNamespace(
        parts=[SimpleNamespace(name=ODD, summary=summary, rows=SimpleNamespace(row_length=4))],
        batches=batches,
        config=config,
    )
    voice.console.print(dry_run._sources(job))
    assert voice.said.count(ODD) == 2


def test_goals_and_a_conversation(tmp_path: Path) -> None:
    goal = {"name": ODD, "measured": ODD, "wanted": ODD}
    talk = {"question": ODD, "chain": None, "raw": ODD, "visible": ODD, "base": ODD}
    found = {"title": ODD, "goals": [{**goal, "met": met} for met in (True, False, None)], "conversations": [talk]}
    (tmp_path / NAME / "evaluation").mkdir(parents=True)
    (tmp_path / NAME / "evaluation" / "results.json").write_text(json.dumps({"points": {}, **found}))
    (tmp_path / NAME / "report.html").touch()
    voice = Voice()
    cli._show_results(voice.console, Site.of(tmp_path / NAME))
    assert voice.said.count(ODD) == 1 + 9 + 4 and voice.said.count(NAME) == 3


def test_an_answer() -> None:
    voice = Voice()
    answer = Answer(raw=ODD, visible=ODD, chain=None, continued=False)
    for show_chain in (True, False):
        chat.show(voice.console, iter([answer]), show_chain=show_chain)
    assert voice.said == f"{ODD}\n" * 2


def test_a_conversation_by_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(question: str, *, original: bool) -> Iterator[Answer]:
        raise UserError(question)

    session: Any = SimpleNamespace(name=ODD, ask=refused, forgotten=0, chat=SimpleNamespace(markers=MARKERS))
    voice = Voice(terminal=True)
    Talk(session, voice.console).run(lambda prompt: iter([ODD, "/quit"]))
    assert voice.said.count(ODD) == 2
    # From a pipe, only answers are printed; what was refused is said on stderr.
    monkeypatch.setattr(chat, "open_session", lambda *_, **__: session)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ODD}\n/quit\n"))
    cli.chat("model")
    assert capsys.readouterr() == ("", f"{ODD}\n")


def test_commands(tmp_path: Path, tiny_model: Path, transllm: Command) -> None:
    (tmp_path / NAME).mkdir()
    made = tmp_path / NAME / NAME
    code, printed = transllm("convert", "from-hf", tiny_model, made)
    assert code == 0 and str(made) in printed
    text = tmp_path / f"{NAME}.txt"
    text.write_text((EXAMPLES / "text.train.txt").read_text(encoding="utf-8")[:12000], encoding="utf-8")
    tokenizer = build_tiny_tokenizer(tmp_path / f"{NAME} tokenizer")
    code, printed = transllm("tokenizer", "report", tokenizer, text)
    assert code == 0 and f"{NAME}.txt" in printed and f"{NAME} tokenizer" in printed
    code, printed = transllm("tokenizer", "expand", tokenizer, text, made / "out", "--size", 120, "--language", "th")
    assert code == 0 and str(made / "out") in printed
    (tmp_path / NAME / "run.yaml").touch()
    step = tmp_path / NAME / "base"
    step.mkdir()
    summary = {"seconds": 1.0, "text": ODD}
    (step / "manifest.json").write_text(json.dumps({"state": "done", "inputs": {}, "summary": summary}))
    code, printed = transllm("status", tmp_path / NAME)
    assert code == 0 and ODD in printed
    for wrong in (("status", tmp_path / ODD), ("chat", ODD), (ODD,), ("run", ODD, f"--{ODD}"), ("status", "--", ODD)):
        code, printed = transllm(*wrong)
        assert code == 2 and ODD in printed


@pytest.mark.parametrize("name", [b"\xff", b"\x1b[31m\x07\x01", b"a\r\nb", b"x" * 200], ids=ascii)
def test_a_name_that_is_hard_to_print(tmp_path: Path, tiny_model: Path, transllm: Command, name: bytes) -> None:
    made = tmp_path / os.fsdecode(name)
    code, printed = transllm("convert", "from-hf", tiny_model, made)
    # What keeps weights and checkpoints takes UTF-8 only.
    assert code == (2 if name == b"\xff" else 0) and ("not UTF-8" in printed) == bool(code)
    with nullcontext() if name != b"\xff" else pytest.raises(UserError, match="not UTF-8"):
        open_workdir(str(made))
    made.mkdir(exist_ok=True)
    (made / "run.yaml").touch()
    assert transllm("status", made)[0] == 0
    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer")
    text = tmp_path / os.fsdecode(name + b".txt")
    text.write_bytes((EXAMPLES / "text.heldout.txt").read_bytes())
    assert transllm("tokenizer", "report", tokenizer, text)[0] == 0
    # One line, whatever is in it.
    assert transllm("status", text)[0] == 2


def test_a_cost() -> None:
    voice = Voice()
    cost = TokenCost(1, 1, 1, 1)
    voice.say(cost_table([(ODD, ODD, cost, cost)]))
    assert voice.said.count(ODD) == 2


FILES = [path for package in ("transllm_jax", "conversion") for path in (ROOT / package).rglob("*.py")]


def test_there_is_one_kind_of_console() -> None:
    """Whatever is printed later is printed as it is, too: only `plain_console` makes one, and none reads markup."""
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            console = name.endswith("Console") and path.name != "progress.py"
            reads = given.get("markup", "False") != "False" or given.get("emoji", "False") != "False"
            column = name.endswith("TextColumn") and given.get("markup") != "False"
            if console or reads or column or name.endswith(("from_markup", "rich.print", "Prompt.ask")):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
        # A tag that would now be seen.
        wrong += [f"{path.relative_to(ROOT)}: {text}" for text in _strings(path) if _TAG.search(text)]
    assert not wrong


_TAG = re.compile(r"\[/?(bold|dim|red|green|yellow|cyan)\]")


def _strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_a_plain_console_is_one() -> None:
    console = plain_console(file=io.StringIO(), width=80)
    assert isinstance(console, Console) and not (console._markup or console._emoji)
