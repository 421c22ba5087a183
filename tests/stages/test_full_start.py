"""The start of full fine-tuning: the first values, the memory, and what is refused."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import Command, random_weights, write_run_config
from full_runs import BASE_ROWS, FROZEN, NEW_ROWS, arrays, bfloat16, write_qwen

from transllm_jax.config import load_config
from transllm_jax.conversion.hf.directory import open_hf, read_weights
from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.names import tensors
from transllm_jax.errors import UserError
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import base, training, vocabulary
from transllm_jax.stages.manifest import Artifact
from transllm_jax.stages.run import Run
from transllm_jax.training.loop import Outcome


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a base model in bfloat16."""
    directory = tmp_path_factory.mktemp("qwen") / "model"
    write_qwen(directory, "bfloat16")
    return directory


def begun(directory: Path, model: Path, **changes: Any) -> Run:
    """A run after stages `base` and `vocabulary`, without evaluations."""
    config = load_config(write_run_config(directory, model, **changes))
    run = Run(config, directory / "run", Progress(quiet=True), Interrupt())
    base.run_stage(run, run.models.base)
    vocabulary.run_stage(run, run.workdir / "vocabulary")
    return run


@pytest.mark.parametrize(("lora", "embeddings"), [("none", "new"), ({"rank": 4}, "all")])
def test_training_starts_from_the_float32_values_of_the_base(tmp_path: Path, lora: Any, embeddings: str) -> None:
    """Whatever the type of computation is; the frozen rows keep these values."""
    write_qwen(tmp_path / "model", "float32")
    path = write_run_config(tmp_path, tmp_path / "model", lora=lora, embeddings=embeddings)
    run = Run(load_config(path, ["model.dtype=bfloat16"]), tmp_path / "run", Progress(quiet=True), Interrupt())
    base.run_stage(run, run.models.base)
    vocabulary.run_stage(run, run.workdir / "vocabulary")
    original, begun_at = read_weights(tmp_path / "model"), arrays(run.workdir, "vocabulary")
    copied = {path.removesuffix("_trained"): array for path, array in begun_at.items()}
    for path in original if lora == "none" else BASE_ROWS:
        assert copied[path].dtype == np.float32 and copied[path].tobytes() == original[path].tobytes(), path
    assert all(np.any(original[path] != bfloat16(original[path])) for path in BASE_ROWS)
    if lora == "none":
        job = training.prepare(
            run,
            name="pretrain",
            start="vocabulary",
            parts=training.source_parts(run, "pretrain"),
        )
        assert job.held.keys() == BASE_ROWS
        for path, array in job.held.items():
            assert np.asarray(array).tobytes() == original[path].tobytes()
        assert all(array.dtype == jnp.float32 for array in job.split.trainable.values())


@pytest.mark.parametrize("after", ["none", {"rank": 4}])
def test_full_fine_tuning_and_adapters_do_not_share_a_directory(
    qwen: Path, tmp_path: Path, transllm: Command, after: Any
) -> None:
    then, now = ("a section", "none") if after == "none" else ("none", "a section")
    before = {"rank": 4} if after == "none" else "none"
    assert transllm("run", write_run_config(tmp_path, qwen, lora=before), "--until", "vocabulary")[0] == 0
    kept = (tmp_path / "run" / "run.yaml").read_bytes()
    code, printed = transllm("run", write_run_config(tmp_path, qwen, lora=after), "--until", "vocabulary")
    assert code == 2 and printed.count("\n") == 1
    assert f"vocabulary was made with other inputs: lora ({then} -> {now}); to go on give" in printed
    assert "redo it with --force vocabulary" in printed
    assert (tmp_path / "run" / "run.yaml").read_bytes() == kept
    # What the message advises helps.
    again = ("run", tmp_path / "config.yaml", "--until", "vocabulary", "--force", "vocabulary")
    assert transllm(*again)[0] == 0
    full = "blocks.mlp.up.kernel" in arrays(tmp_path / "run", "vocabulary")
    assert full == (after == "none")


def test_a_value_that_becomes_a_section_is_one_change(tmp_path: Path) -> None:
    made = Artifact(tmp_path, "step")
    made.begin({"lora.rank": 4, "lora.alpha": 8, "lorax": 1, "file a": "1", "file a.txt": "1", "same.x": None})
    given = {"lora": None, "lorax": 2, "file a": "2", "file a.txt": "2", "same.x": None}
    assert made.changes(given) == {
        "lora": ("a section", None),
        "lorax": (1, 2),
        "file a": ("1", "2"),
        "file a.txt": ("1", "2"),
    }


class Counting:
    """A base model that counts the tensors that are read from it."""

    def __init__(self, model: Any) -> None:
        self.model, self.count = model, 0
        self.where, self.config, self.dtype = model.where, model.config, model.dtype

    def read(self, tensor: Any) -> np.ndarray:
        self.count += 1
        return np.asarray(self.model.read(tensor))


def test_a_merged_full_model_copies_no_weights(qwen: Path) -> None:
    base = Counting(open_hf(qwen))
    trained: dict[str, np.ndarray] = {path: array + 1 for path, array in random_weights(base.config, 5).items()}
    trained |= {path: np.full((3, 48), 0.5, np.float32) for path in NEW_ROWS}
    model = Merged(base, trained, 1.0)
    assert model.full and model.config.vocab_size == base.config.vocab_size + 3
    for tensor in tensors(model.config):
        array = model.read(tensor)
        assert array.shape == tensor.shape and array.dtype == np.float32 == model.dtype(tensor)
        assert model.base_dtype(tensor) == ml_dtypes.bfloat16
        if tensor.path not in BASE_ROWS:  # these get new rows, so they are copied when they are read
            assert np.shares_memory(array, trained[tensor.path]), tensor.name
    assert base.count == 0


def test_weights_that_do_not_fit_the_base_are_refused(qwen: Path) -> None:
    base = open_hf(qwen)
    weights = random_weights(base.config)
    rows = {path: np.ones((3, 48), np.float32) for path in NEW_ROWS}
    assert Merged(base, {**weights, **rows}, 1.0).new_rows == 3
    bad = {**weights, **rows, "blocks.mlp.up.a": np.zeros((2, 48, 4), np.float32)}
    del bad["blocks.attention.q.bias"], bad["vocabulary.output_new"]
    bad["final_norm.scale"] = np.ones(47, np.float32)
    with pytest.raises(UserError) as found:
        Merged(base, bad, 1.0)
    said = str(found.value)
    for fault in (
        "what was trained does not fit the base model",
        "blocks.attention.q.bias is missing",
        "vocabulary.output_new is missing",
        "blocks.mlp.up.a is not part of the model",
        "final_norm.scale has shape [47], expected [48]",
    ):
        assert fault in said
    weights["final_norm.scale"][3] = np.nan
    with pytest.raises(UserError, match=r"final_norm\.scale of what was trained has 1 of 48 values NaN"):
        Merged(base, {**weights, **rows}, 1.0)


@pytest.mark.parametrize("embeddings", FROZEN)
def test_training_keeps_one_copy_of_the_base(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embeddings: str
) -> None:
    """At the first step the device holds the frozen base, the trained arrays and the frozen rows, each once."""
    run = begun(tmp_path, qwen, lora="none", embeddings=embeddings)
    gc.collect()
    known = {id(array) for array in jax.live_arrays()} - {id(array) for array in run.models.frozen.values()}
    seen: dict[str, int] = {}

    def look(split: Any, *_: Any, **__: Any) -> Outcome:
        gc.collect()
        seen["held"] = sum(array.nbytes for array in jax.live_arrays() if id(array) not in known)
        seen["trains"] = sum(array.nbytes for array in split.trainable.values())
        return Outcome(split.trainable, 0)

    monkeypatch.setattr(training, "train", look)
    monkeypatch.setattr(training, "_summary", lambda *_: {})
    training.train_stage(
        run,
        tmp_path / "run" / "pretrain",
        name="pretrain",
        start="vocabulary",
        parts=lambda run: training.source_parts(run, "pretrain"),
    )
    frozen = sum(array.nbytes for array in run.models.frozen.values())
    rows = sum(
        array.nbytes for path, array in arrays(tmp_path / "run", "vocabulary").items() if path in FROZEN[embeddings]
    )
    assert seen["held"] == frozen + seen["trains"] + rows
