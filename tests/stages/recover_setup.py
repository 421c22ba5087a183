"""Stage `recover` of a tiny run beside a server that answers as the run's base model does: for tests only.

The fixtures are for the modules that name them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import copy_run, tiny_run
from openai_server import Server, openai_server

from transllm_jax.config import load_config
from transllm_jax.generation import endpoint as client
from transllm_jax.generation.engine import Engine
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import recover
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.chat import encode_prompt
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.tokenizer import Tokenizer

LIMIT, NEW = 10, 6
ANSWERS, CHAINS = "answers.jsonl", "chains.jsonl"


@pytest.fixture(scope="module")
def config(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done up to `translate`; instructions are translated by a file, answers by the model."""
    here = tmp_path_factory.mktemp("endpoint")
    copy_run(finished_run, here, ("base", "vocabulary", "pretrain", "translate"))
    tree: dict[str, Any] = tiny_run(finished_run.parent / "model", here / "run")
    tree["recover"] |= {"max_instructions": LIMIT, "max_new_tokens": NEW}
    (here / "config.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return here / "config.yaml"


@pytest.fixture(scope="module")
def translated(config: Path) -> Path:
    """A work directory after stage `translate`."""
    return Path(load_config(config).workdir)


@pytest.fixture(scope="module")
def own(config: Path, translated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage's directory by the run's own engine."""
    directory = tmp_path_factory.mktemp("own")
    recover.run_stage(Run(load_config(config), translated, Progress(quiet=True), Interrupt()), directory)
    return directory


@pytest.fixture(scope="module")
def table(config: Path, translated: Path, own: Path) -> dict[str, tuple[str, str]]:
    """What the original model answers to each instruction, as a server gives it."""
    run = Run(load_config(config), translated, Progress(quiet=True), Interrupt())
    tokenizer = run.models.tokenizer("base")
    asked = [json.loads(line)["instruction"] for line in (own / ANSWERS).read_text(encoding="utf-8").splitlines()]
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    answers = Engine(run.models.split("base"), run.models.config).generate(
        prompts, max_new_tokens=NEW, stop=end_ids(tokenizer)
    )
    return {
        text: (tokenizer.decode(ids, skip_special_tokens=True), "length" if len(ids) == NEW else "stop")
        for text, ids in zip(asked, answers, strict=True)
    }


@pytest.fixture(scope="module")
def tokenizer(translated: Path) -> Tokenizer:
    return Tokenizer.load(translated / "base", model=translated / "base")


@pytest.fixture
def server(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, tuple[str, str]], tokenizer: Tokenizer
) -> Iterator[Server]:
    """A server of the run's own base model, by the table."""
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    with openai_server() as state:
        state.answer = lambda body: table[body["messages"][-1]["content"]]
        state.tokens = lambda messages: len(encode_prompt(tokenizer, messages))  # type: ignore[arg-type]
        yield state


class Said(Progress):
    """Keeps what is printed."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, message: Any, *, style: str | None = None) -> None:
        self.lines.append(str(message))


Go = Callable[..., dict[str, Any]]


@pytest.fixture
def go(config: Path, translated: Path, tmp_path: Path) -> Go:
    """Runs the stage in tmp_path/run/recover with changes of the config; gives its summary."""
    shutil.copytree(translated, tmp_path / "run")

    def run_it(*changes: str, interrupt: Interrupt | None = None, progress: Progress | None = None) -> dict[str, Any]:
        run = Run(
            load_config(config, changes),
            tmp_path / "run",
            progress or Progress(quiet=True),
            interrupt or Interrupt(),
        )
        directory = tmp_path / "run" / "recover"
        directory.mkdir(exist_ok=True)
        recover.check(run)
        return dict(recover.run_stage(run, directory))

    return run_it


def teacher(server: Server, more: str = "") -> str:
    return f"recover.teacher={{endpoint: '{server.url}', model: small{more}}}"
