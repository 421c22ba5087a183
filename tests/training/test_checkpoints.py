"""Checkpoints: restored bit for bit, and refused if damaged or of another shape."""

from __future__ import annotations

import gc
import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import (
    LORA,
    NEW,
    OPTIMIZER,
    STEPS,
    adapted_split,
    latest,
    leaves,
    restored,
    run,
    save,
    some_state,
    tree_bytes,
)

from transllm_jax.errors import UserError
from transllm_jax.training.arrays import load_arrays, save_arrays
from transllm_jax.training.checkpoint import Checkpoints
from transllm_jax.training.optimizer import make_optimizer
from transllm_jax.training.record.metrics import read_rows
from transllm_jax.training.step import initial_state

# XLA gives this warning if a frozen array is donated with the state.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")


def test_a_save_that_is_given_up_says_nothing_of_itself(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        assert latest(tmp_path) is None
        warnings.warn("coroutine 'async_serialize_from_host.<locals>.write' was never awaited", RuntimeWarning, 1)
    assert not caught


def test_a_checkpoint_is_restored_bit_for_bit(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    states = [some_state(step) for step in (2, 4, 7)]
    save(tmp_path, *states)
    assert latest(tmp_path) == 7
    again = restored(tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(states[-1])
    assert tree_bytes(again) == tree_bytes(states[-1]) != tree_bytes(states[0])
    assert [leaf.dtype for _, leaf in leaves(again)] == [leaf.dtype for _, leaf in leaves(states[-1])]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()} == {"4", "7"}


def test_a_checkpoint_is_of_its_step_while_training_goes_on(tmp_path: Path) -> None:
    onwards = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=(0,))
    large = {"vocabulary.new": jnp.zeros((1000, 1000))}
    state = onwards(initial_state(large, make_optimizer(OPTIMIZER)))
    with closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(state)
        for _ in range(5):
            state = onwards(state)
    again = restored(tmp_path, state)
    assert int(again.step) == 1 and (np.asarray(again.trainable["vocabulary.new"]) == 1).all()


# Orbax does not finish reading the other arrays.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "other",
    [{"lora": replace(LORA, rank=3)}, {"new_rows": NEW + 1}, {"new_rows": 0}, {"train_base": True}],
    ids=["rank", "rows", "no rows", "base rows"],
)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    save(tmp_path, some_state(3))

    def message() -> str:
        with pytest.raises(UserError, match="checkpoints/3: not a checkpoint of this configuration") as caught:
            restored(tmp_path, some_state(0, **other))
        return str(caught.value)

    assert "\n" not in message()
    gc.collect()


def test_arrays_of_a_stage_are_read_back(tmp_path: Path) -> None:
    arrays = dict(adapted_split().trainable)
    save_arrays(tmp_path / "trainable", arrays)
    read = load_arrays(tmp_path / "trainable")
    assert tree_bytes(read) == tree_bytes(arrays)
    assert all(isinstance(values, np.ndarray) for values in read.values())
    with pytest.raises(UserError, match="no such adapters"):
        load_arrays(tmp_path / "elsewhere")


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_each_time(tmp_path: Path) -> None:
    """The first refusal keeps the damaged checkpoints, so that a restart does not begin the run anew."""
    directory = tmp_path / "pretrain"
    run(directory)
    for step in ("4", "6"):
        (directory / "checkpoints" / step / "state" / "_METADATA").write_text("{", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(UserError, match=r"6 is damaged .*; .*4 is damaged .*no other is left: run the stage with"):
            run(directory)
    assert len(read_rows(directory / "metrics.jsonl")) == STEPS
