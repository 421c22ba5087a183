"""`embeddings: all`: copies of the base rows train, and the original model is unchanged."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_run, write_tiny_model

from transllm_jax.config import Config
from transllm_jax.conversion.hf.directory import read_weights
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.model.parameters import merge
from transllm_jax.progress import Progress
from transllm_jax.stages import base as base_stage
from transllm_jax.stages import pipeline, vocabulary
from transllm_jax.stages.run import Run
from transllm_jax.training.arrays import load_arrays

# XLA gives this warning if a frozen array is donated with the state.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")


@partial(jax.jit, static_argnums=(0, 3))
def logits(structure: Any, trainable: Any, frozen: Any, adapters: bool) -> jax.Array:
    """The logits of a few tokens, of the base vocabulary alone."""
    model = merge(structure, trainable, frozen)
    tokens = jnp.arange(24)[None] + 40
    hidden = model(tokens, jnp.arange(24)[None], jnp.ones_like(tokens), adapters=adapters)
    return model.vocabulary.logits(hidden, base_only=True, adapters=adapters)


def test_a_run_with_all_embeddings_trains_copies_of_the_base_rows(tiny_model: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    config = Config.model_validate(tiny_run(tiny_model, workdir, embeddings="all"))
    pipeline.run_pipeline(config, workdir, Progress(quiet=True), Interrupt(), until="pretrain")
    original = read_weights(tiny_model)["vocabulary.base"]
    started, trained = (load_arrays(workdir / point / "trainable") for point in ("vocabulary", "pretrain"))
    assert started["vocabulary.base_trained"].tobytes() == original.astype(np.float32).tobytes()
    assert "vocabulary.output_base_trained" not in started, "tied embeddings stay tied"
    assert started.keys() == trained.keys()
    assert all(started[path].tobytes() != trained[path].tobytes() for path in started)
    manifest = json.loads((workdir / "vocabulary" / "manifest.json").read_text(encoding="utf-8"))
    report = json.loads((workdir / "vocabulary" / "report.json").read_text(encoding="utf-8"))
    assert report["trainable_parameters"] == sum(values.size for values in started.values())
    assert str(report["trainable_parameters"]) in json.dumps(manifest)

    # With adapters off it is still the original model, bit for bit: the teacher.
    run = Run(config, workdir, Progress(quiet=True), Interrupt())
    trained, base = run.models.split("pretrain"), run.models.split("base")
    whole, off, wanted = logits(*trained, True), logits(*trained, False), logits(*base, True)
    assert np.array_equal(off, wanted) and not np.array_equal(whole, wanted)


def test_an_untied_run_copies_both_tables(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", tied=False)
    workdir = tmp_path / "run"
    config = Config.model_validate(tiny_run(tmp_path / "model", workdir, embeddings="all"))
    run = Run(config, workdir, Progress(quiet=True), Interrupt())
    for name, stage in (("base", base_stage), ("vocabulary", vocabulary)):
        (workdir / name).mkdir(parents=True)
        stage.run_stage(run, workdir / name)
    arrays, original = load_arrays(workdir / "vocabulary" / "trainable"), read_weights(tmp_path / "model")
    for path in ("vocabulary.base", "vocabulary.output_base"):
        assert arrays[f"{path}_trained"].tobytes() == original[path].astype(np.float32).tobytes()
