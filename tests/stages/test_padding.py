"""Rows without a token: a base that has some, and a table that is rounded up. They are never produced."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from conftest import random_weights, tiny_config, tiny_run
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.cli import main as cli
from transllm_jax.commands import convert
from transllm_jax.commands.chat import open_session
from transllm_jax.commands.open_model import open_source
from transllm_jax.config import load_config
from transllm_jax.conversion.hf.directory import open_hf, read_config, read_weights, write_model
from transllm_jax.conversion.logits import logits_of
from transllm_jax.conversion.merged import Merged
from transllm_jax.disk import read_json
from transllm_jax.errors import UserError
from transllm_jax.generation.engine import ORIGINAL, WHOLE, Engine, Mode
from transllm_jax.generation.sampling import Sampling
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.model.parameters import assemble, load_frozen
from transllm_jax.model.vocabulary import mask_padding, padding_of
from transllm_jax.progress import Progress
from transllm_jax.stages.points import token_ids
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import load_arrays
from transllm_jax.training.loss import cross_entropy
from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
from transllm_jax.training.step import initial_state, make_step

TOKENS, ROWS, NEW, ROUNDED = 400, 407, 143, 192
LOUD = 20.0


def write_padded_model(directory: Path, *, tied: bool = True, loud: float = LOUD) -> None:
    """A tiny chat model of 400 tokens and 407 rows; what has no token speaks loudest."""
    build_tiny_tokenizer(directory.with_name("tokenizer"))
    config = tiny_config(ROWS, tied=tied)
    weights = random_weights(config)
    weights["vocabulary.base" if tied else "vocabulary.output_base"][TOKENS:] *= loud
    write_model(
        directory, config, weights, tokenizer_dir=directory.with_name("tokenizer"), extra_config={"eos_token_id": 2}
    )


# --- the model ------------------------------------------------------------------------------------------------------


def test_padding_is_what_no_token_stands_for() -> None:
    assert padding_of(range(5), 5) == ()
    assert padding_of(range(5), 8) == ((5, 8),)
    assert padding_of([1, 2, 5, 6, 9], 12) == ((0, 1), (3, 5), (7, 9), (10, 12))
    assert padding_of([0, 1, 7], 4) == ((2, 4),)  # an id above the table is another one's to refuse
    assert padding_of([], 3) == ((0, 3),)


def test_scores_without_padding() -> None:
    scores = jnp.arange(12.0).reshape(2, 6)
    expected = np.where([False, True, True, False, False, True], -np.inf, scores)
    np.testing.assert_array_equal(mask_padding(scores, ((11, 13), (15, 40), (2, 9)), first=10), expected)
    assert mask_padding(scores, ((0, 10), (16, 20)), first=10) is scores  # nothing to compute


@pytest.mark.parametrize("train_base", [False, True])
def test_rounding_changes_neither_loss_nor_gradient(train_base: bool) -> None:
    rng = np.random.default_rng(0)
    hidden, base, new = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((2, 9, 8), (13, 8), (5, 8)))
    labels, weights = jnp.asarray(rng.integers(0, 18, (2, 9))), jnp.asarray(rng.random((2, 9), np.float32))
    # What stands in the rows does not matter, though in a run they are 0.
    rounded = jnp.concatenate([new, 3 * hidden[0, :3]])

    def loss(hidden: jax.Array, base: jax.Array, new: jax.Array, padding: Any) -> jax.Array:
        return cross_entropy(hidden, base, new, labels, weights, train_base=train_base, padding=padding)[0]

    plain, grown = (
        jax.value_and_grad(loss, argnums=(0, 1, 2))(hidden, base, rows, padding)
        for rows, padding in ((new, ()), (rounded, ((18, 21),)))
    )
    # A sum over more terms, all 0, may be taken in another order.
    np.testing.assert_allclose(plain[0], grown[0], rtol=1e-6)
    for left, right in zip(plain[1], grown[1], strict=True):
        np.testing.assert_allclose(left, right[: len(left)], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(grown[1][2][5:], 0)
    without_mask = loss(hidden, base, rounded, ())
    assert abs(float(without_mask - plain[0])) > 0.1
    # The base's own padding keeps its place in the softmax, as the original model has it.
    np.testing.assert_array_equal(loss(hidden, base, new, ((11, 13),)), plain[0])


@pytest.mark.parametrize("tied", [True, False])
def test_padding_is_never_produced(tied: bool, tmp_path: Path) -> None:
    write_padded_model(tmp_path / "model", tied=tied)
    config = read_config(tmp_path / "model")
    frozen = load_frozen(config, read_weights(tmp_path / "model"))
    rows = np.zeros((8, config.hidden_size), np.float32)
    rows[:5] = random_weights(config)["vocabulary.base"][:5]
    trainable = {"vocabulary.new": rows} | ({} if tied else {"vocabulary.output_new": rows})
    padding = padding_of([*range(TOKENS), *range(ROWS, ROWS + 5)], ROWS + 8)
    assert padding == ((TOKENS, ROWS), (ROWS + 5, ROWS + 8))
    prompts = [[1, 65 + n, 70, 99] for n in range(4)]
    produced: dict[bool, set[int]] = {}
    for masked in (True, False):
        split = assemble(config, frozen, trainable=trainable, padding=padding if masked else ())
        engine = Engine(split, config, batch_size=4)
        for mode in (WHOLE, ORIGINAL, Mode(sampling=Sampling(1.0, 0.9, 3))) if masked and tied else (WHOLE,):
            answers = engine.generate(prompts, max_new_tokens=8, stop=[2], mode=mode)
            produced.setdefault(masked, set()).update(*answers)
    empty = {number for start, stop in padding for number in range(start, stop)}
    assert len(produced[True]) > 3 and not produced[True] & empty
    assert produced[False] & set(range(TOKENS, ROWS))  # it would be, if nobody cared


@pytest.mark.parametrize("tied", [True, False])
def test_base_rows_without_a_token_never_train(tied: bool) -> None:
    config = replace(tiny_config(40, tied=tied), num_hidden_layers=1)
    frozen = load_frozen(config, random_weights(config))
    tables = ("base",) if tied else ("base", "output_base")
    trainable = {f"vocabulary.{name}_trained": np.asarray(frozen[f"vocabulary.{name}"]) for name in tables}
    split = assemble(config, frozen, trainable=trainable, padding=((33, 40),))
    rates = OptimizerConfig(0.1, steps=4, warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(rates)
    step = make_step(split.structure, optimizer, schedule(rates), seed=0, dropout=False, remat="none")
    ids = np.arange(16, dtype=np.int32)[None]
    batch = {"tokens": ids, "positions": ids, "segment_ids": np.ones_like(ids), "labels": ids + 1}
    batch |= {"weights": np.ones(ids.shape, np.float32)}
    state, _ = step(initial_state(split.trainable, optimizer), split.frozen, jax.tree.map(jnp.asarray, batch))
    for path, before in trainable.items():
        moved = (np.asarray(state.trainable[path]) != before).any(axis=1)
        np.testing.assert_array_equal(moved, np.arange(40) < 33, err_msg=path)


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a base with padding rows, with new rows rounded up."""
    here = tmp_path_factory.mktemp("padded")
    write_padded_model(here / "model", loud=4.0)
    recipe = tiny_run(here / "model", here / "run")
    recipe["vocabulary"] |= {"pad_to_multiple_of": 64}  # type: ignore[operator]
    (here / "config.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["transllm", "run", str(here / "config.yaml")])
        cli.main()
    assert ended.value.code in (0, None)
    return here / "run"


@pytest.mark.full
def test_the_report_says_what_the_table_holds(run: Path) -> None:
    report = json.loads((run / "vocabulary/report.json").read_text(encoding="utf-8"))
    assert report["table"] == {
        "rows": ROWS + ROUNDED,
        "base_rows": ROWS,
        "base_rows_without_token": ROWS - TOKENS,
        "new_rows": ROUNDED,
        "new_tokens": NEW,
        "padding_rows": ROUNDED - NEW,
        "pad_to_multiple_of": 64,
    }
    assert report["initial_rows"] == {"mean": NEW}
    manifest = json.loads((run / "vocabulary/manifest.json").read_text(encoding="utf-8"))
    assert "and 49 rows of padding" in json.dumps(manifest)


@pytest.mark.full
def test_new_ids_begin_behind_the_bases_rows(run: Path) -> None:
    tokenizer, base = Tokenizer.load(run / "vocabulary"), Tokenizer.load(run / "base")
    assert token_ids(tokenizer) == [*range(TOKENS), *range(ROWS, ROWS + NEW)]
    text = "The capital of France is Paris."
    assert tokenizer.encode(text) == base.encode(text)
    thai = "ภาษาไทย ประเทศไทย"
    assert max(tokenizer.encode(thai)) >= ROWS and tokenizer.decode(tokenizer.encode(thai)) == thai


@pytest.mark.full
@pytest.mark.parametrize("point", ["vocabulary", "pretrain", "translate", "transfer"])
def test_padding_stays_zero_and_the_rest_trains(run: Path, point: str) -> None:
    rows = load_arrays(run / point / "trainable")["vocabulary.new"]
    assert rows.shape[0] == ROUNDED
    np.testing.assert_array_equal(rows[NEW:], 0)
    assert rows[:NEW].any(axis=1).all()


@pytest.mark.full
def test_only_tokens_are_answered(run: Path) -> None:
    config = load_config(run / "run.yaml")
    made = Run(config, run, Progress(quiet=True), Interrupt())
    assert made.models.split("base").structure != made.models.split("transfer").structure
    for row in read_json(run / "evaluation/original_answers.json")["rows"]:
        assert set(row["answer"]) <= set(range(TOKENS))
    for place in (run, run / "export"):
        session = open_session(place, max_new_tokens=16)
        engine = session.chat._engine
        produced = engine.generate([[1, 65, 70], [1, 99, 120]], max_new_tokens=16, stop=[2])
        assert {number for ids in produced for number in ids} <= {*range(TOKENS), *range(ROWS, ROWS + NEW)}
        *_, answer = session.ask("สวัสดี hello")
        assert answer.raw and "<unused" not in answer.raw


@pytest.mark.full
def test_the_export_has_the_whole_table(run: Path) -> None:
    assert read_config(run / "export") == replace(read_config(run / "base"), vocab_size=ROWS + ROUNDED)
    generation = read_json(run / "export/generation_config.json")
    assert generation["suppress_tokens"] == [*range(TOKENS, ROWS), *range(ROWS + NEW, ROWS + ROUNDED)]
    assert "suppress_tokens" not in read_json(run / "base/generation_config.json")
    table = read_weights(run / "export")["vocabulary.base"]
    np.testing.assert_array_equal(table[:ROWS], read_weights(run / "base")["vocabulary.base"])
    np.testing.assert_array_equal(table[ROWS:], load_arrays(run / "transfer/trainable")["vocabulary.new"])


IDS = [1, 65, 70, 99, 300, 399, *range(ROWS, ROWS + 20), ROWS + NEW - 1, 7]


@pytest.mark.full
@pytest.mark.reference
def test_transformers_computes_the_same_and_produces_no_padding(run: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    with torch.no_grad():
        theirs = np.asarray(model(torch.tensor([IDS])).logits[0])
    found = open_source(str(run))
    ours = logits_of(found.model, IDS, found.lora)
    assert theirs.shape == ours.shape == (len(IDS), ROWS + ROUNDED)
    # Merged kernels against factors beside them, in float32; logits spread by about 4.
    assert np.abs(theirs - ours).max() < 1e-3
    made = model.generate(torch.tensor([IDS]), max_new_tokens=32, do_sample=True, top_k=0, temperature=3.0)
    fresh = set(made[0, len(IDS) :].tolist())
    assert fresh <= {*range(TOKENS), *range(ROWS, ROWS + NEW)}
    text = "A Thai word: ภาษาไทย <EN>"
    theirs_ids = AutoTokenizer.from_pretrained(run / "export")(text, add_special_tokens=False)["input_ids"]
    assert theirs_ids == Tokenizer.load(run / "vocabulary").encode(text)


@pytest.mark.full
@pytest.mark.parametrize("rows", ["tokens", "tables"])
def test_peft_and_back(run: Path, tmp_path: Path, rows: Any) -> None:
    quiet = Progress(quiet=True)
    convert.to_peft(str(run), tmp_path / "peft", quiet, rows=rows)
    assert convert.verify(str(run), str(tmp_path / "peft"), quiet)
    convert.from_peft(str(run / "base"), tmp_path / "peft", tmp_path / "ours", quiet)
    ours, back = load_arrays(run / "transfer/trainable"), load_arrays(tmp_path / "ours/trainable")
    assert ours.keys() == back.keys()
    for path, values in ours.items():
        # Padding says nothing, and is not brought back.
        np.testing.assert_array_equal(back[path], values[:NEW] if path == "vocabulary.new" else values)
    # A run goes on from it, and rounds up as it is told.
    recipe = tiny_run(run.parent / "model", tmp_path / "run")
    recipe["vocabulary"] = {"adapter": str(tmp_path / "ours"), "pad_to_multiple_of": 48}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["transllm", "run", str(tmp_path / "config.yaml"), "--until", "vocabulary"])
        cli.main()
    assert ended.value.code in (0, None)
    again = load_arrays(tmp_path / "run/vocabulary/trainable")["vocabulary.new"]
    np.testing.assert_array_equal(again, np.pad(back["vocabulary.new"], ((0, 144 - NEW), (0, 0))))
    report = json.loads((tmp_path / "run/vocabulary/report.json").read_text(encoding="utf-8"))
    assert report["initial_rows"] == {"adapter": NEW, "mean": 0}


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_rows_that_are_not_zero_need_tokens(run: Path, tmp_path: Path) -> None:
    from transllm_jax.conversion.hf.export import export_hf

    trainable = load_arrays(run / "transfer/trainable")
    for change, fits in ((1e-30, False), (0.0, True)):
        trainable["vocabulary.new"][NEW + 3, 0] = change
        model = Merged(open_hf(run / "base"), trainable, 1.0)
        assert model.padding == (ROUNDED - NEW if fits else ROUNDED - NEW - 4)
        if fits:
            export_hf(model, run / "base", tmp_path / "out", tokenizer_dir=run / "vocabulary")
        else:
            with pytest.raises(UserError, match=f"{NEW} ids from {ROWS} on, the adapter has {ROUNDED} new rows"):
                export_hf(model, run / "base", tmp_path / "out", tokenizer_dir=run / "vocabulary")
