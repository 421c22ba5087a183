"""Fixtures: a tiny random chat model in a Hugging Face directory, and a config of a whole run on it."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

# Before jax is imported: tests run on the CPU, wherever they run, and share one cache of compiled programs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "compiled"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
import yaml
from filelock import FileLock
from gcs_emulator import gcs  # noqa: F401 - a fixture: pytest finds it here
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.cli import main as cli
from transllm_jax.conversion.hf.directory import write_model
from transllm_jax.conversion.names import weight_shapes
from transllm_jax.model.config import LlamaConfig

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
EXAMPLES = Path(__file__).parents[1] / "examples" / "thai"


# Folders whose files take longest: they come first, so that both workers are busy to the end.
FIRST = ("stages", "training", "generation", "preflight", "commands", "hosts", "model")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return FIRST.index(folder) if folder in FIRST else len(FIRST)

    items.sort(key=place)


# Each compiled program maps some memory. Linux allows a process 65,530 maps by default; at the limit, it crashes.
MAPS = Path("/proc/self/maps")
MOST_MAPS = 20_000


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between two files, forget compiled programs if there are many; those on disk are read again."""
    other = nextitem is None or nextitem.path != item.path
    if other and MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


def tiny_config(vocab_size: int, *, tied: bool = True) -> LlamaConfig:
    """A LLaMA of 2 layers with grouped queries, and heads that do not fill the width (N * H != D)."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )


def random_weights(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights in our layout, large enough that attention and the norms matter.

    The layers speak louder than the embedding: with tied tables a weaker model only repeats its last token.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for path, shape in weight_shapes(config).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if path.endswith("scale"):
            weights[path] = 1 + np.float32(0.2) * values
        elif path.endswith("bias"):
            weights[path] = np.float32(0.3) * values
        else:
            weights[path] = values * np.float32(0.05 if path.startswith("vocabulary") else 1.2 / shape[-2] ** 0.5)
    return weights


def write_tiny_model(directory: Path, *, tied: bool = True, seed: int = 0) -> LlamaConfig:
    """A chat model as a Hugging Face directory: weights, config, tokenizer and chat template."""
    tokenizer_dir = directory.with_name(directory.name + "-tokenizer")
    build_tiny_tokenizer(tokenizer_dir)
    from transllm_jax.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tokenizer_dir)
    config = tiny_config(tokenizer.vocab_size, tied=tied)
    extra = {"eos_token_id": tokenizer.eos_id}
    write_model(directory, config, random_weights(config, seed), tokenizer_dir=tokenizer_dir, extra_config=extra)
    return config


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny chat model with tied embeddings."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_model(directory)
    return directory


def tiny_run(model: Path, workdir: Path, **changes: object) -> dict[str, object]:
    """The content of a config file: every stage in a few steps on the tiny model. Sections can be replaced."""
    training = {
        "steps": 4,
        "batch_size": 2,
        "length": 64,
        "learning_rate": 1e-2,
        "new_rows_multiplier": 2,
        "checkpoint_every": 2,
        "warmup_ratio": 0.25,
    }
    text = {"path": str(EXAMPLES / "text.train.txt"), "max_bytes": 20000}
    pairs = {"path": str(EXAMPLES / "pairs.train.tsv"), "format": "pairs", "max_items": 60}
    config: dict[str, object] = {
        "title": "tiny to Thai",
        "workdir": str(workdir),
        "seed": 1,
        "model": {"source": str(model)},
        "vocabulary": {"size": 140, "corpus": [text]},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "pretrain": {**training, "sources": [text]},
        "translate": {
            **training,
            "sources": [
                {**pairs, "weight": 0.8},
                {"path": str(EXAMPLES / "english.train.txt"), "max_bytes": 4000, "weight": 0.2},
            ],
        },
        "recover": {
            "instructions": str(EXAMPLES / "instructions.train.jsonl"),
            "max_instructions": 6,
            "max_new_tokens": 6,
            "batch_size": 4,
            "translate_instructions": {
                "file": str(EXAMPLES / "instructions.train.jsonl"),
                "fields": ["instruction", "translation"],
                "missing": "error",
            },
            # A random model hardly ever ends an answer by itself.
            "keep_unfinished": True,
            # What it says repeats itself, in any script.
            "filters": {"max_repeated": 1, "min_latin_share": 0},
            "checks": {"max_length_factor": None, "min_script_share": 0, "keep": []},
        },
        "transfer": {**training, "length": 256, "pairs": pairs},
        "evaluation": {
            "text": {"path": str(EXAMPLES / "text.heldout.txt")},
            "pairs": str(EXAMPLES / "pairs.heldout.tsv"),
            "instructions": str(EXAMPLES / "instructions.heldout.jsonl"),
            "max_documents": 2,
            "max_pairs": 3,
            "max_chats": 3,
            "max_new_tokens": 6,
            "max_chain_tokens": 8,
            "batch_size": 4,
            "length": 64,
        },
    }
    return config | changes


def call(*arguments: object) -> int:
    """Runs `transllm ARGUMENTS` as a user's command does; gives the exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["transllm", *map(str, arguments)])
        cli.main()
    return int(ended.value.code or 0)


# Gives the exit code of a command, and what it printed.
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def transllm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `transllm ARGUMENTS` in a wide terminal."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        code = call(*arguments)
        printed, errors = capfd.readouterr()
        assert "Traceback" not in printed + errors
        return code, printed + errors

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a finished run of `tiny_run`, with its config.yaml and its base `model` beside it.

    It is made once for all processes of the tests. Do not change it: `copy_run` it.
    """
    here = tmp_path_factory.getbasetemp()
    here = (here.parent if "PYTEST_XDIST_WORKER" in os.environ else here) / "finished"
    with FileLock(here.with_suffix(".lock")):
        if not (here / "done").exists():
            write_tiny_model(here / "model")
            write_config(here / "config.yaml", tiny_run(here / "model", here / "run"))
            # Traced, which changes nothing: tests compare with runs that are not.
            assert call("run", here / "config.yaml", "--profile", 1) == 0
            (here / "done").touch()
    return here / "run"


def copy_run(finished: Path, directory: Path, steps: Iterable[str] | None = None, **changes: object) -> Path:
    """A copy of `finished_run` (or of these steps of it) as directory/run; its config file, with sections replaced."""
    if steps is None:
        shutil.copytree(finished, directory / "run")
    else:
        for step in steps:
            shutil.copytree(finished / step, directory / "run" / step)
    return write_run_config(directory, finished.parent / "model", **changes)


def write_run_config(directory: Path, model: Path, **changes: object) -> Path:
    """The config file of a tiny run in `directory`/run."""
    return write_config(directory / "config.yaml", tiny_run(model, directory / "run", **changes))


def write_config(path: Path, tree: Mapping[str, object]) -> Path:
    """A config file with this content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture
def tiny_config_file(tiny_model: Path, tmp_path: Path) -> Path:
    """A config file of a whole run on the tiny model, with its work directory beside it."""
    return write_config(tmp_path / "tiny.yaml", tiny_run(tiny_model, tmp_path / "run"))
