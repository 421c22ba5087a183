"""What new rows start from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EXAMPLES, tiny_run, write_tiny_model

from transllm_jax.commands import convert
from transllm_jax.config import Config
from transllm_jax.conversion.hf.directory import read_config, read_weights
from transllm_jax.conversion.token_rows import open_token_rows
from transllm_jax.errors import UserError
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import new_rows, pipeline
from transllm_jax.stages.new_rows import (
    BOOST,
    HALF,
    calibrated,
    mean_rows,
    random_rows,
    text_states,
    token_counts,
    weighted_rows,
)
from transllm_jax.stages.run import Run, seed_for
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import load_arrays


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
    here = tmp_path_factory.mktemp("rows")
    write_tiny_model(here / "model", tied=tied)
    found = {}
    for name in ("mean", "calibrated"):
        settings = tiny_run(here / "model", here / name)
        english = {"path": str(EXAMPLES / "english.train.txt"), "max_bytes": 4000}
        settings["vocabulary"] |= {"initial_rows": name} | ({"english": english} if name == "calibrated" else {})  # type: ignore[operator]
        config = Config.model_validate(settings)
        pipeline.run_pipeline(config, here / name, Progress(quiet=True), Interrupt(), until="vocabulary")
        found[name] = load_arrays(here / name / "vocabulary" / "trainable")
    changed = {path for path in found["mean"] if not np.array_equal(found["mean"][path], found["calibrated"][path])}
    assert changed == {"vocabulary.new" if tied else "vocabulary.output_new"}


def test_a_rare_piece_weighs_more() -> None:
    table = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    counts = np.array([60, 30, 0, 5, 5])
    rows = weighted_rows(table, [[0, 2], [3, 4, 3], [1]], counts)
    assert rows.dtype == np.float32
    frequent, rare = HALF / (HALF + 0.6), 1.0
    np.testing.assert_allclose(rows[0], (frequent * table[0] + rare * table[2]) / (frequent + rare), rtol=1e-5)
    # Pieces that are equally frequent, and one alone: the mean.
    np.testing.assert_allclose(rows[1:], mean_rows(table, [[3, 4, 3], [1]]), rtol=1e-5)
    # A text without a piece of these says nothing of them.
    nothing = weighted_rows(table, [[0, 2]], np.zeros(5, int))
    np.testing.assert_allclose(nothing, mean_rows(table, [[0, 2]]), rtol=1e-6)


def test_random_rows_are_like_the_tables_and_follow_the_seed() -> None:
    table = np.float32([3, -1, 0.5] + np.random.default_rng(0).standard_normal((500, 3)) * [0.1, 2, 1e-3])
    rows = random_rows(table, 4000, seed=7)
    assert rows.dtype == np.float32 and len(np.unique(rows[:, 0])) > 3900
    # 4000 draws: a mean is within 0.016 deviations, a deviation within 1.1 %; four times that is never seen.
    assert np.abs((rows.mean(axis=0) - table.mean(axis=0)) / table.std(axis=0)).max() < 0.064
    np.testing.assert_allclose(rows.std(axis=0), table.std(axis=0), rtol=0.045)
    np.testing.assert_array_equal(rows, random_rows(table, 4000, seed=7))
    assert not np.array_equal(rows, random_rows(table, 4000, seed=8))
    assert not np.array_equal(rows, random_rows(table, 4000, seed=7, number=1))


def test_tokens_are_counted_in_a_range_of_ids(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transllm_jax.stages.new_rows.DOCUMENTS", 2)
    tokenizer = Tokenizer.load(tiny_model)
    texts = ["the cat", "the dog, the dog", "สวัสดี", "the end", "a"]
    ids = [number for text in texts for number in tokenizer.encode(text)]
    np.testing.assert_array_equal(token_counts(tokenizer, texts, 0, 400), np.bincount(ids, minlength=400))
    np.testing.assert_array_equal(token_counts(tokenizer, texts, 30, 70), np.bincount(ids, minlength=400)[30:100])


def test_states_are_those_of_the_first_texts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = Config.model_validate(tiny_run(tiny_model, tmp_path))
    (tmp_path / "base").symlink_to(tiny_model)
    models = Run(config, tmp_path, Progress(quiet=True), Interrupt()).models
    tokenizer, split = models.tokenizer("base"), models.split("base")
    texts = (EXAMPLES / "english.heldout.txt").read_text(encoding="utf-8").split("\n\n")
    whole = text_states(split, tokenizer, texts)
    assert len(whole) >= sum(len(tokenizer.encode(text)) for text in texts)
    encoded: list[str] = []
    documents = new_rows.document_examples

    def spy(tokenizer: Tokenizer, documents_: list[str], length: int) -> Any:
        encoded.extend(documents_)
        return documents(tokenizer, documents_, length)

    monkeypatch.setattr(new_rows, "document_examples", spy)
    monkeypatch.setattr(new_rows, "CHARACTERS", len(texts[0]) + 1)
    assert len(text_states(split, tokenizer, texts)) < len(whole) and encoded == texts[:2]


# --- stage vocabulary -----------------------------------------------------------------------------------------------


def vocabulary(model: Path, workdir: Path, **rows: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the report of a run's stage `vocabulary`."""
    settings = tiny_run(model, workdir)
    settings["vocabulary"] |= rows  # type: ignore[operator]
    config = Config.model_validate(settings)
    pipeline.run_pipeline(config, workdir, Progress(quiet=True), Interrupt(), until="vocabulary")
    report = json.loads((workdir / "vocabulary" / "report.json").read_text(encoding="utf-8"))
    return load_arrays(workdir / "vocabulary" / "trainable"), report


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, exported from a run with fewer tokens: tied, of the same width."""
    here = tmp_path_factory.mktemp("donor")
    write_tiny_model(here / "model", seed=5)
    vocabulary(here / "model", here / "run", size=120)
    convert.to_hf(str(here / "run"), here / "export", Progress(quiet=True), stage="vocabulary", check=False)
    return here / "export"


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_copied_by_the_tokens_text(tied: bool, donor: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", tied=tied)
    mean, _ = vocabulary(tmp_path / "model", tmp_path / "mean")
    source = donor
    if not tied:  # and out of a checkpoint of ours
        source = tmp_path / "ours"
        convert.from_hf(str(donor), source, Progress(quiet=True), mesh=None, sha256=None, force=False)
    rows, report = vocabulary(tmp_path / "model", tmp_path / "run", initial_rows="copy", rows_from=str(source))
    theirs, ours = Tokenizer.load(donor), Tokenizer.load(tmp_path / "run" / "vocabulary")
    table = read_weights(donor)["vocabulary.base"]
    copied = 0
    for number in range(143):
        token = theirs.token_id(str(ours.token(400 + number)))
        copied += token is not None
        for path in ("vocabulary.new",) if tied else ("vocabulary.new", "vocabulary.output_new"):
            np.testing.assert_array_equal(rows[path][number], mean[path][number] if token is None else table[token])
    assert 20 < copied < 143
    assert report["initial_rows"] == {"copy": copied, "mean": 143 - copied}
    done = json.loads((tmp_path / "run/vocabulary/manifest.json").read_text(encoding="utf-8"))
    assert f"{copied} rows of {source}, {143 - copied} made of pieces" in json.dumps(done)


@pytest.mark.parametrize("way", ["weighted", "random"])
def test_both_tables_of_an_untied_model_get_their_rows(way: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", tied=False)
    rows, report = vocabulary(tmp_path / "model", tmp_path / "run", initial_rows=way, pad_to_multiple_of=8)
    assert report["initial_rows"] == {way: 143} and report["table"]["rows"] == 544
    base = read_weights(tmp_path / "model")
    seed = seed_for(1, "new rows")  # not the run's own, from which the adapters are drawn
    for number, (path, table) in enumerate(
        (("vocabulary.new", "vocabulary.base"), ("vocabulary.output_new", "vocabulary.output_base"))
    ):
        assert rows[path].shape == (144, 48) and not rows[path][143:].any()
        if way == "random":
            np.testing.assert_array_equal(rows[path][:143], random_rows(base[table], 143, seed, number))
        else:
            token = Tokenizer.load(tmp_path / "run/vocabulary").token_id("<TH>") or 0
            word = Tokenizer.load(tmp_path / "model").encode(" Thai")
            spread = rows[path][token - 400] - mean_rows(base[table], [word])[0]
            assert 1e-4 < np.abs(spread).max() < 0.1  # near the mean of the word's pieces, and not it


def test_a_model_that_rows_cannot_come_from(donor: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    write_tiny_model(tmp_path / "untied", tied=False)
    for number, (source, said) in enumerate(
        (
            (tmp_path / "model", "vocabulary.rows_from: .*has none of the 143 new tokens"),
            (tmp_path / "untied", "vocabulary.rows_from: .*the base ties them"),
            (tmp_path / "nowhere", "no file matches .*nowhere/config.json"),
        )
    ):
        with pytest.raises(UserError, match=said) as caught:
            vocabulary(tmp_path / "model", tmp_path / str(number), initial_rows="copy", rows_from=str(source))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="its rows are 48 wide, the base's 64"):
        open_token_rows(donor, replace(read_config(donor), hidden_size=64))
