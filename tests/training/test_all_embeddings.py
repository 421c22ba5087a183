"""Runs in which all rows of the vocabulary train: copies of the base rows, beside the original model."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_run, write_tiny_model

from conversion.hf.directory import read_weights
from transllm_jax.config import Config
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import base as base_stage
from transllm_jax.stages import pipeline, vocabulary
from transllm_jax.stages.run import Run
from transllm_jax.training.arrays import load_arrays

# A frozen array that was given away with the state.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")


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

    # The original model is still inside, bit for bit: the teacher, whatever was trained.
    run = Run(config, workdir, Progress(quiet=True), Interrupt())
    tokens = jnp.arange(24)[None] + 40
    rows = (tokens, jnp.arange(24)[None], jnp.ones_like(tokens))
    whole, off, wanted = (
        model.vocabulary.logits(model(*rows, adapters=adapters), base_only=True, adapters=adapters)
        for model, adapters in (
            (run.models.split("pretrain").merge(), True),
            (run.models.split("pretrain").merge(), False),
            (run.models.split("base").merge(), True),
        )
    )
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
