"""What new rows start from."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import tiny_run

from transllm_jax import pipeline
from transllm_jax.config import Config
from transllm_jax.errors import UserError
from transllm_jax.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.training.checkpoint import load_arrays
from transllm_jax.training.new_rows import BOOST, calibrated, mean_rows


def test_a_mean_row_is_the_mean_of_its_pieces() -> None:
    table = np.arange(20, dtype=np.float32).reshape(5, 4)
    rows = mean_rows(table, [[0, 2], [4], [1, 1, 3]])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, [(table[0] + table[2]) / 2, table[4], (2 * table[1] + table[3]) / 3])


def states(rng: np.random.Generator, mean: np.ndarray, size: int = 4000) -> np.ndarray:
    return mean + rng.standard_normal((size, len(mean)))


def test_calibrated_rows_say_how_frequent_a_token_is_and_only_in_its_language() -> None:
    rng = np.random.default_rng(0)
    width = 16
    base = rng.standard_normal((300, width)) * 0.1
    english, target = states(rng, rng.standard_normal(width)), states(rng, 6 + rng.standard_normal(width))
    rows = np.float32(rng.standard_normal((5, width)) * 0.1)
    counts = np.array([1, 10, 100, 1000, 0])
    moved = calibrated(rows, counts, target, english, base) - rows
    np.testing.assert_array_equal(moved[4], 0)  # a marker does not occur in text
    rise = target.mean(axis=0) @ moved[:4].T
    np.testing.assert_allclose(rise, BOOST + np.log(counts[:4]) - np.log(counts[:4]).mean(), rtol=1e-4)
    # On English, less than a third of it: the direction was chosen to tell the two apart.
    assert np.abs(english.mean(axis=0) @ moved[:4].T).max() < rise.max() / 3


def test_languages_that_cannot_be_told_apart_are_refused() -> None:
    same = states(np.random.default_rng(0), np.zeros(8))
    with pytest.raises(UserError, match="initial_rows"):
        calibrated(np.zeros((2, 8)), np.array([1, 2]), -same, same, np.ones((4, 8)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_calibrates_the_output_rows(tied: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    from conftest import EXAMPLES, write_tiny_model

    here = tmp_path_factory.mktemp("rows")
    write_tiny_model(here / "model", tied=tied)
    found = {}
    for name in ("mean", "calibrated"):
        settings = tiny_run(here / "model", here / name)
        english = {"path": str(EXAMPLES / "english.train.txt"), "limit": 4000}
        settings["vocabulary"] |= {"initial_rows": name} | ({"english": english} if name == "calibrated" else {})  # type: ignore[operator]
        config = Config.model_validate(settings)
        pipeline.run_pipeline(config, here / name, Progress(quiet=True), Interrupt(), until="vocabulary")
        found[name] = load_arrays(here / name / "vocabulary" / "trainable")
    changed = {path for path in found["mean"] if not np.array_equal(found["mean"][path], found["calibrated"][path])}
    assert changed == {"vocabulary.new" if tied else "vocabulary.output_new"}
