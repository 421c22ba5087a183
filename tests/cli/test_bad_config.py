"""A wrong config or command: exit code 2, and one line with what, where and how to fix it."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import Command
from refusals import Refused, refusing, says, small_run, write

from transllm_jax.cli import main as cli
from transllm_jax.config import load_config
from transllm_jax.data.read.files import resolve
from transllm_jax.errors import UserError
from transllm_jax.storage import open_workdir
from transllm_jax.training.arrays import save_arrays


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    return refusing(capfd)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    """The config file of a run that has not begun."""
    return write(tmp_path / "config.yaml", small_run(tiny_model, tmp_path / "run"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("a config is a mapping", "configs/demo.yaml")),
        (b"- title\n", ("a config is a mapping",)),
        (b"title: [1, 2\nseed: 3\n", ("not YAML", "at line 2, column 5", "correct it")),
        (b"title: caf\xe9\n", ("not UTF-8 at byte 10", "save it as UTF-8")),
        (b"title: a\nseed: 1\ntitle: b\n", ("line 3: the key 'title' is given twice", "remove one")),
        (b"model: {source: a, source: b}\n", ("line 1: the key 'source' is given twice",)),
        (b"title: !!python/object/apply:os.system [ls]\n", ("not YAML",)),
    ],
)
def test_a_file_is_not_a_config(refused: Refused, tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    says(refused("run", path), str(path), *words)


def test_stderr_of_the_command_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    """In a process of its own, so that a warning of a library would be seen."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "model.safetensors").write_bytes(b"")
    config = write(tmp_path / "config.yaml", small_run(model, tmp_path / "run"))
    command = [sys.executable, "-m", "transllm_jax.cli.main", "run", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    says(done.stderr, "model.safetensors is truncated", "fetch it again")


def test_no_such_device(config: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "transllm_jax.cli.main", "run", str(config)],
        env={**os.environ, "JAX_PLATFORMS": "abacus"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    says(done.stderr, "jax finds no device", "abacus", "correct JAX_PLATFORMS")
    assert "Traceback" not in done.stderr


def test_letters_that_the_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(cli, "app", lambda: print("ภาษาไทย: done"))
    cli.main()
    assert terminal.buffer.getvalue() == "ภาษาไทย: done\n".encode("ascii", "backslashreplace")  # type: ignore[attr-defined]


def test_no_config_file(refused: Refused, tmp_path: Path) -> None:
    says(refused("run", tmp_path / "nowhere.yaml"), "nowhere.yaml: no such config file", "transllm init")
    says(refused("run", tmp_path), "this is a directory; give a config file")
    (tmp_path / "mine.yaml").touch()
    says(refused("run", tmp_path / "mine.yml"), "no such config file; did you mean", "mine.yaml?")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.yaml").touch()
    says(refused("run", run), "this is a run's directory; transllm run", "--workdir")
    says(refused("run", tmp_path / "mine.yaml", "--workdir", ""), "--workdir has no value")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # Unknown keys, with the one that was probably meant.
        (["sead=1"], ("sead: unknown key", "did you mean 'seed'?")),
        (["pretrain.lerning_rate=1"], ("pretrain.lerning_rate: unknown key", "did you mean 'learning_rate'?")),
        (["pretrain.zzz=1"], ("pretrain.zzz: unknown key", "the keys here are steps, epochs, batch_size")),
        (["translate.sources=[{path: a, wieght: 1}]"], ("translate.sources.0.wieght", "did you mean 'weight'?")),
        (["vocabulary.corpus=[{path: a, formt: text}]"], ("vocabulary.corpus.0.formt", "did you mean 'format'?")),
        (["transfer.pairs.max_itms=3"], ("transfer.pairs.max_itms", "did you mean 'max_items'?")),
        # A key of earlier versions, whose unit depended on the format.
        (["pretrain.sources=[{path: a, limit: 9}]"], ("pretrain.sources.0: limit counted bytes of text", "max_bytes")),
        (["transfer.pairs={path: a, format: pairs, limit: 9}"], ("transfer.pairs: limit counted pairs", "max_items")),
        (["transfer.pairs={path: a, format: pairs, max_bytes: 9}"], ("max_bytes is for text", "max_items")),
        (["recover.limit=9"], ("recover: limit counted instructions", "max_instructions")),
        # Missing values, and values of a wrong type or size.
        (["model={}"], ("model.source: missing; add it",)),
        (["pretrain.steps=many"], ("pretrain.steps: Input should be a valid integer", "'many'")),
        (["pretrain.steps=1.5"], ("pretrain.steps", "integer")),
        (["pretrain.steps=yes"], ("pretrain: steps cannot be true",)),
        (["pretrain.batch_size=0"], ("pretrain.batch_size: Input should be greater than 0",)),
        (["transfer.learning_rate=-1e-3"], ("transfer.learning_rate: Input should be greater than 0", "-0.001")),
        (["transfer.learning_rate=.inf"], ("transfer.learning_rate: Input should be a finite number",)),
        (["pretrain.length=4"], ("pretrain.length", "greater than or equal to 16")),
        (["evaluation.length=1"], ("evaluation.length", "greater than or equal to 16")),
        (["lora.dropout=1"], ("lora.dropout", "less than 1")),
        (["embeddings=some"], ("embeddings: Input should be 'new', 'all' or 'none'", "'some'")),
        (["export.dtype=int8"], ("export.dtype", "'float32', 'bfloat16' or 'float16'")),
        (["pretrain=[]"], ("pretrain: Input should be a valid dictionary",)),
        (["pretrain.sources=[]"], ("pretrain.sources: List should have at least 1 item",)),
        # Values that contradict each other, or that would have no effect.
        (["prompts.to_english=[Say it]"], ("prompts: 'Say it' lacks {text}",)),
        (["markers.english=<TH>", "markers.target=<TH>"], ("markers: two markers are alike", "choose different ones")),
        (["markers.response='<R S>'"], ("markers: the marker '<R S>' is empty or has a space",)),
        (["recover.translate_answers={missing: drop}"], ("recover.translate_answers: without a file",)),
        (["recover.translate_answers={fields: [a, b]}"], ("fields without a file mean nothing", "remove them")),
        (["transfer.pairs.format=text"], ("transfer.pairs: pairs are needed here", "format: pairs")),
        (["transfer.pairs.weight=2"], ("transfer.pairs: weight means nothing here", "remove it")),
        (["evaluation.text.weight=2"], ("evaluation.text: weight means nothing here",)),
        (["vocabulary.corpus=[{path: a, format: conversations}]"], ("vocabulary.corpus.0: text or pairs are needed",)),
        (["evaluation.text={path: a, format: conversations}"], ("evaluation.text: text or pairs are needed here",)),
        (["vocabulary.corpus=[{path: a, weight: 2}]"], ("vocabulary.corpus.0: weight means nothing here",)),
        (["transfer.pairs.separator=line"], ("transfer.pairs: separator is for text", "remove it")),
        (
            ["pretrain.sources=[{path: a, weight: 2}, {path: b}]"],
            ("pretrain: some sources have a weight and others none", "all of them or to none"),
        ),
        # Malformed overrides.
        (["pretrain.steps"], ("override 'pretrain.steps'", "write it as key.path=value")),
        (["=3"], ("override '=3'", "write it as key.path=value")),
        (["title.x=3"], ("override 'title.x=3'", "'title' is a value, not a section")),
        (["pretrain.sources.0.path=x"], ("'sources' is a value, not a section",)),
        (["pretrain.steps=[1"], ("override 'pretrain.steps=[1'", "not YAML", "quote it")),
        (["lora={rank: 1, rank: 2}"], ("override 'lora=", "the key 'rank' is given twice", "remove one")),
        # References that lead nowhere, and a language that has no name.
        (["title=to ${language.cod}"], ("config.yaml: title refers to language.cod", "did you mean 'code'?")),
        (["title=${model}"], ("config.yaml: title refers to model, which is not a single value", "refer to a key")),
        (["title=${title}"], ("config.yaml: title refers to title in a circle", "give one of them a value")),
        (["language.code=xx"], ("language: CLDR has no English name for the code 'xx'", "give language.name")),
        # Found before any file is read.
        (["language={code: xx, name: Nothing}"], ("language.code: language 'xx' is not supported",)),
    ],
)
def test_a_wrong_value(refused: Refused, config: Path, overrides: list[str], words: tuple[str, ...]) -> None:
    says(refused("run", config, *overrides), *words)
    assert not (config.parent / "run" / "base").exists()


def test_all_faults_are_reported_at_once(refused: Refused, config: Path) -> None:
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    tree["pretran"] = tree.pop("pretrain")
    tree["translate"]["steps"] = -1
    says(
        refused("run", write(config, tree)),
        "pretran: unknown key; did you mean 'pretrain'?",
        "pretrain: missing; add it",
        "translate.steps: Input should be greater than or equal to 0",
    )


@pytest.mark.parametrize(
    "arguments",
    [("walk",), ("run",), ("run", "a.yaml", "--untill", "base"), ("status",), ("chat", "a", "--top-p", "much"), ()],
)
def test_no_such_command(transllm: Command, arguments: tuple[str, ...]) -> None:
    code, printed = transllm(*arguments)
    assert code == 2 and "Usage" in printed


def test_a_work_directory_that_cannot_be_used(refused: Refused, config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    message = refused("run", config, "--workdir", tmp_path / "file")
    says(message, "file is a file, not a directory", "choose another --workdir")
    says(refused("run", config, "--workdir", tmp_path / "file" / "run"), "choose another --workdir")
    says(
        refused("run", config, "--workdir", tmp_path / ("x" * 300)), "cannot be written to", "choose another --workdir"
    )
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize("name", ["run[1]", "a\\b"])
def test_a_work_directory_whose_name_orbax_could_not_read(
    refused: Refused, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place = tmp_path / name
    says(refused("run", config, "--workdir", place), f"{place} has a", "in it", "choose another name")
    assert not place.exists()
    place.mkdir()
    monkeypatch.chdir(place)
    says(refused("run", config, "--workdir", "run"), f"{place}/run has a")
    with pytest.raises(UserError, match="could not be read again"):
        save_arrays(place / "trainable", {"a": np.ones(1)})
    assert not any(place.iterdir())


def test_a_tilde_is_the_home_directory(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert open_workdir("~/runs/a").local == tmp_path / "home" / "runs" / "a"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a.txt").write_text("text", encoding="utf-8")
    assert resolve("~/a.txt") == resolve("~/*.txt") == [tmp_path / "home" / "a.txt"]
    assert load_config(config, ["token_cache=~/tokens"]).token_cache == str(tmp_path / "home" / "tokens")
