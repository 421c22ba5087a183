"""`initial_rows: aligned`: rows that begin at the English tokens that new tokens are aligned with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EXAMPLES, Command, random_weights, tiny_run, write_config, write_tiny_model
from tiny_sentencepiece import write_sentencepiece_model

from transllm_jax.config import Config, load_config
from transllm_jax.conversion.hf.directory import write_model
from transllm_jax.errors import UserError
from transllm_jax.evaluation.likelihood import Teacher
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import initial_rows, pipeline, vocabulary
from transllm_jax.stages.alignment import align
from transllm_jax.stages.new_rows import BOOST, DROP, LOWER, MEANING, aligned_rows, lifted
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import load_arrays

pytest.importorskip("thot")


def states(rng: np.random.Generator, mean: np.ndarray, size: int = 4000) -> np.ndarray:
    return mean + rng.standard_normal((size, len(mean)))


def test_an_aligned_row_is_at_its_english_tokens_in_part() -> None:
    table = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    means = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    before = means.copy()
    rows = aligned_rows(means, table, [{2: 3, 5: 1}, {}, {0: 7}])
    assert rows.dtype == np.float32
    wanted = [(3 * table[2] + table[5]) / 4, means[1], table[0]]
    np.testing.assert_allclose(rows, MEANING * np.stack(wanted) + (1 - MEANING) * means, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(rows[1], means[1])
    np.testing.assert_array_equal(means, before)


def test_logits_rise_on_the_language_by_the_prior_and_fall_on_english() -> None:
    rng, width = np.random.default_rng(0), 16
    base = rng.standard_normal((300, width)) * 0.1
    english, target = states(rng, rng.standard_normal(width)), states(rng, 6 + rng.standard_normal(width))
    rows = np.float32(rng.standard_normal((5, width)) * 0.1)
    counts, inside = np.array([1, 10, 100, 1000, 0]), np.array([0, 0.5, 1, 0.25, 0])
    moved = lifted(rows, counts, inside, target, english, base) - rows
    prior = np.log(counts[:4]) - np.log(counts[:4]).mean()
    rise = np.append(BOOST + prior, 0) - LOWER * inside
    np.testing.assert_allclose(target.mean(axis=0) @ moved.T, rise, atol=1e-3)
    np.testing.assert_allclose(english.mean(axis=0) @ moved.T, -DROP - LOWER * inside, atol=1e-3)
    # Any other change that does this moves logits more within a language.
    other = rng.standard_normal(width)
    means = np.stack([target.mean(axis=0), english.mean(axis=0)])
    other -= means.T @ np.linalg.solve(means @ means.T, means @ other)
    change = moved[2].astype(np.float64)

    def spread(direction: np.ndarray) -> float:
        logits = np.var(target @ direction) + np.var(english @ direction)
        return float(logits + 100 * np.mean((base @ direction) ** 2))

    assert all(spread(change + step * other) > spread(change) for step in (0.1, -0.1))


def test_languages_that_cannot_be_told_apart_are_refused() -> None:
    rng = np.random.default_rng(0)
    same = states(rng, np.ones(8))
    near = states(rng, np.ones(8) + 0.1)
    for target, english in ((same, same), (same, near), (same, 2 * same)):
        with pytest.raises(UserError, match=r"initial_rows: this model's states do not tell"):
            lifted(np.zeros((2, 8)), np.array([1, 2]), np.zeros(2), target, english, np.ones((4, 8)))


# --- stage vocabulary -----------------------------------------------------------------------------------------------

PAIRS: dict[str, Any] = {"path": str(EXAMPLES / "pairs.train.tsv"), "format": "pairs", "max_items": 300}
ENGLISH = {"path": str(EXAMPLES / "english.train.txt"), "max_bytes": 4000}


def settings(model: Path, workdir: Path, **section: Any) -> dict[str, Any]:
    """A tiny run whose tokens are learned from text and pairs."""
    run = tiny_run(model, workdir)
    vocabulary: Any = run["vocabulary"]
    vocabulary |= {"corpus": [*vocabulary["corpus"], PAIRS], **section}
    return run


def rows_of(model: Path, workdir: Path, **section: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the report of a run's stage `vocabulary`."""
    config = Config.model_validate(settings(model, workdir, **section))
    pipeline.run_pipeline(config, workdir, Progress(quiet=True), Interrupt(), until="vocabulary")
    report = json.loads((workdir / "vocabulary" / "report.json").read_text(encoding="utf-8"))
    return load_arrays(workdir / "vocabulary" / "trainable"), report


def tied(directory: Path) -> None:
    write_tiny_model(directory)


def untied(directory: Path) -> None:
    write_tiny_model(directory, tied=False)


@pytest.mark.parametrize("write", [tied, untied, write_sentencepiece_model])
def test_a_run_aligns_the_rows_of_its_tables(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "model")
    (mean, _), (rows, report) = (
        rows_of(tmp_path / "model", tmp_path / way, initial_rows=way) for way in ("mean", "aligned")
    )
    made, number = report["initial_rows"], len(rows["vocabulary.new"])
    assert set(made) == {"aligned", "mean"} and sum(made.values()) == number and made["aligned"] > number / 2
    changed = {path for path in mean if not np.array_equal(mean[path], rows[path])}
    assert changed == ({"vocabulary.new"} if write is tied else {"vocabulary.new", "vocabulary.output_new"})
    # In the input table, which gets no prior, a token that the pairs do not hold keeps its mean.
    if write is not tied:
        same = (mean["vocabulary.new"] == rows["vocabulary.new"]).all(axis=1)
        assert same.sum() == made["mean"] > 0
    # The same files give the same rows, bit for bit; with English text of its own, the prior has another direction.
    again, _ = rows_of(tmp_path / "model", tmp_path / "again", initial_rows="aligned")
    assert all(np.array_equal(rows[path], again[path]) for path in rows)
    if write is untied:
        other, _ = rows_of(tmp_path / "model", tmp_path / "other", initial_rows="aligned", english=ENGLISH)
        changed = {path for path in rows if not np.array_equal(rows[path], other[path])}
        assert changed == {"vocabulary.output_new"}


def write_bilingual(directory: Path) -> None:
    """A tiny model whose states tell languages apart, as those of a trained one: by the bytes that a text has."""
    config = write_tiny_model(directory.with_name("plain"), tied=False)
    weights, tokenizer = random_weights(config), Tokenizer.load(directory.with_name("plain"))
    foreign = [not str(tokenizer.decode([token])).isascii() for token in range(tokenizer.vocab_size)]
    weights["vocabulary.base"][:, 0] += np.where(foreign, 4, -4)
    ends = {"eos_token_id": tokenizer.eos_id}
    write_model(directory, config, weights, tokenizer_dir=directory.with_name("plain"), extra_config=ends)


def test_english_is_not_harmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows like those of English tokens alone would take much of English text's probability."""
    write_bilingual(tmp_path / "model")
    texts = (EXAMPLES / "english.heldout.txt").read_text(encoding="utf-8").split("\n\n")[:8]

    def drift(workdir: Path) -> float:
        config = Config.model_validate(settings(tmp_path / "model", workdir, initial_rows="aligned"))
        pipeline.run_pipeline(config, workdir, Progress(quiet=True), Interrupt(), until="vocabulary")
        models = Run(config, workdir, Progress(quiet=True), Interrupt()).models
        ids = models.tokenizer("base").encode_batch(texts)
        teacher = Teacher(models.split("base"), [(some[:1], some[1:60]) for some in ids], batch_size=4)
        return teacher.divergence(models.split("vocabulary"))

    kept = drift(tmp_path / "lifted")
    monkeypatch.setattr(initial_rows, "lifted", lambda rows, *_: rows)
    raw = drift(tmp_path / "raw")
    assert raw > 0.1 and kept < raw * np.exp(-DROP / 2)


def test_pairs_and_english_text_are_inputs_of_the_stage(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    english = tmp_path / "english.txt"
    english.write_text("A text.", encoding="utf-8")
    config = settings(tmp_path / "model", tmp_path / "run", initial_rows="aligned", english={"path": str(english)})
    path = write_config(tmp_path / "config.yaml", config)

    def inputs() -> dict[str, Any]:
        return vocabulary.inputs(Run(load_config(path), tmp_path / "run", Progress(quiet=True), Interrupt()))

    before = inputs()
    evaluation: Any = config["evaluation"]
    assert {f"file {path}" for path in (english, PAIRS["path"], evaluation["pairs"])} <= before.keys()
    english.write_text("Another text.", encoding="utf-8")
    assert inputs() != before


def test_rows_do_not_learn_from_evaluation_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path / "model")
    trained, held_out = (
        EXAMPLES.joinpath(f"pairs.{part}.tsv").read_text(encoding="utf-8").splitlines()[:80]
        for part in ("train", "heldout")
    )
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("\n".join([*trained[:40], *held_out, *trained[40:]]), encoding="utf-8")
    run = settings(tmp_path / "model", tmp_path / "run", initial_rows="aligned")
    run["vocabulary"]["corpus"][1] = {"path": str(pairs), "format": "pairs"}
    read: list[str] = []

    def spy(pairs: list[tuple[str, str]], *rest: Any) -> Any:
        read.extend("\t".join(pair) for pair in pairs)
        return align(pairs, *rest)

    monkeypatch.setattr(initial_rows, "align", spy)
    config = Config.model_validate(run)
    pipeline.run_pipeline(config, tmp_path / "run", Progress(quiet=True), Interrupt(), until="vocabulary")
    assert len(held_out) > 40 and not set(read) & set(held_out)
    assert set(read) <= set(trained) and len(read) > 70


def test_pairs_that_hold_no_new_token(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    french = tmp_path / "pairs.tsv"
    french.write_text("the dog\tle chien\nthe tree\tl'arbre\n", encoding="utf-8")
    run = settings(tmp_path / "model", tmp_path / "run", initial_rows="aligned")
    run["vocabulary"]["corpus"][1] = {"path": str(french), "format": "pairs"}
    with pytest.raises(UserError, match="aligned: the pairs of at most 100 tokens hold no new token"):
        pipeline.run_pipeline(
            Config.model_validate(run), tmp_path / "run", Progress(quiet=True), Interrupt(), until="vocabulary"
        )


def test_the_aligner_is_looked_for_before_a_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transllm: Command
) -> None:
    write_tiny_model(tmp_path / "model")
    config = settings(tmp_path / "model", tmp_path / "run", initial_rows="aligned")
    monkeypatch.setitem(sys.modules, "thot.alignment", None)
    for more in (("--dry-run",), ()):
        code, printed = transllm("run", write_config(tmp_path / "config.yaml", config), *more)
        assert code == 2 and "aligned needs a word aligner; pip install 'transllm-jax[align]'" in printed
    assert not (tmp_path / "run" / "vocabulary").exists()
