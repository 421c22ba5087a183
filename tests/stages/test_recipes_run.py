"""The configs of the project, made small, on tiny files of the data sets that they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command
from tiny_recipes import FILES, write_llama2
from world_text import TEXT, write_world

from transllm_jax.config import Config, load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# What makes any of the configs small enough for a test.
SMALL = [
    "model.sha256=null",
    "model.shape=null",
    "model.dtype=float32",
    "vocabulary.size=240",
    "lora.rank=4",
    *(
        f"{stage}.{key}"
        for stage in ("pretrain", "translate", "transfer")
        for key in ("epochs=null", "steps=2", "batch_size=2", "accumulate=1", "length=192", "remat=none")
    ),
    "recover.max_new_tokens=6",
    "recover.batch_size=4",
    *(f"evaluation.{key}=2" for key in ("max_documents", "max_pairs", "max_chats", "max_questions", "batch_size")),
    "evaluation.length=64",
    "evaluation.max_new_tokens=6",
    "evaluation.max_answer_tokens=6",
    "evaluation.max_chain_tokens=8",
]


@pytest.fixture(scope="module")
def world_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("text"))


@pytest.fixture
def recipe(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    world_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Config, list[str]]:
    """A config in a directory that has its files; the config, and the arguments of a small run of it."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / TEXT).parent.mkdir()
    (tmp_path / TEXT).symlink_to(world_text)
    for name, write in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    path: Path = request.param
    config, changes = load_config(path), list(SMALL)
    if config.model.source.startswith("llama-2"):
        write_llama2(Path(config.model.source))
    else:
        changes.append(f"model.source={tiny_model}")
    if path.stem == "world":
        # A random model's states do not tell its short sentences apart by language; the demo's longer English they do.
        changes.append("vocabulary.initial_rows=mean")
    return config, [f"configs/{path.name}", *changes]


each_config = pytest.mark.parametrize("recipe", CONFIGS, ids=lambda path: path.stem, indirect=True)


@pytest.mark.slow
@each_config
def test_a_config_runs_to_its_first_stage(recipe: tuple[Config, list[str]], transllm: Command) -> None:
    config, arguments = recipe
    code, printed = transllm("run", *arguments, "--until", "vocabulary")
    assert code == 0, printed
    report = json.loads((Path(config.workdir) / "vocabulary" / "report.json").read_text(encoding="utf-8"))
    assert report["new_tokens"] == 240 and report["never_produced"] == 0
    assert report["table"]["new_rows"] % config.vocabulary.pad_to_multiple_of == 0


@pytest.mark.slow
@pytest.mark.full
@each_config
def test_a_dry_run_reads_all_files_of_a_config(recipe: tuple[Config, list[str]], transllm: Command) -> None:
    _, arguments = recipe
    code, printed = transllm("run", *arguments, "--dry-run")
    assert code == 0, printed
    for stage in ("pretrain", "translate", "transfer"):
        assert f"\n{stage}\n" in printed
