"""Overlays by themselves: what each changes, where it does not apply, and the new keys of a config that they use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_run, write_config, write_run_config
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.ablation.overlay import DoesNotApply, applied, tokens_of
from transllm_jax.ablation.plan import plan_of
from transllm_jax.ablation.table import FULL, NAMES, OVERLAYS
from transllm_jax.config import Config, load_config
from transllm_jax.data.rows.examples import chat_examples, direct_message
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.tokenizer import Tokenizer

BY_NAME = {overlay.name: overlay for overlay in OVERLAYS}
GIVEN = {"writer": "writer.jsonl", "base_model": "base", "adapter": "adapter"}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run that is held to the original in all stages, and whose translations come from files."""
    tree: Any = tiny_run(tmp_path / "model", tmp_path / "run")
    english = {"path": "english.txt", "recovery": "token", "weight": 0.2}
    replay = {"path": "replay.jsonl", "format": "conversations", "recovery": "token", "weight": 0.2}
    tree["translate"]["sources"] += [english, replay]
    tree["transfer"].update(recovery="token", sources=[english, {"path": "names.tsv", "format": "pairs", "weight": 1}])
    tree["recover"]["translate_answers"] = {"file": "answers.jsonl", "missing": "drop"}
    tree["evaluation"]["answers"] = "questions.jsonl"
    tree["vocabulary"].update(initial_rows="aligned", english={"path": "english.txt"})
    tree["vocabulary"]["corpus"].append({"path": "pairs.tsv", "format": "pairs"})
    return load_config(write_config(tmp_path / "config.yaml", tree))


def test_every_overlay_makes_a_config(config: Config, tmp_path: Path) -> None:
    for overlay in OVERLAYS:
        if overlay.name != "kd-token":
            made = applied(overlay, config, GIVEN, seed=7)
            assert made.seed == 7
            # A variant's run.yaml is a config itself.
            path = tmp_path / "again.yaml"
            path.write_text(made.to_yaml(), encoding="utf-8")
            assert load_config(path) == made, overlay.name
    with pytest.raises(DoesNotApply, match="is this already"):
        applied(BY_NAME["kd-token"], config, GIVEN, seed=0)
    assert applied(FULL, config, {}, seed=config.seed) == config


def test_what_they_change(config: Config) -> None:
    def made(name: str) -> Config:
        return applied(BY_NAME[name], config, GIVEN, seed=0)

    def taught(of: Config) -> list[str]:
        sources = [*of.pretrain.sources, *of.translate.sources, *of.transfer.sources]
        return [source.path for source in sources if source.recovery != "sequence"]

    assert taught(config) == ["english.txt", "replay.jsonl", "english.txt"]
    for name in ("no-recovery-kd", "full-ft-no-kd"):
        other = made(name)
        assert taught(other) == [] and other.transfer.recovery == "sequence" and other.recover.written is not None
        assert not any(source.path == "replay.jsonl" for source in other.translate.sources)
    assert made("full-ft").lora is None and made("full-ft").pretrain.learning_rate == config.pretrain.learning_rate / 10
    assert any(source.path == "replay.jsonl" for source in made("full-ft").translate.sources)
    for name in ("chains-only", "direct"):
        other = made(name)
        assert other.pretrain.steps == other.translate.steps == 0
        assert tokens_of(other) == pytest.approx(tokens_of(config), rel=0.1)
    assert made("direct").transfer.sources == [] and made("direct").transfer.answers == "direct"
    assert [source.in_chat for source in made("in-chat").pretrain.sources] == [True]
    rows = [made(name).vocabulary for name in ("rows-mean", "rows-calibrated")]
    assert [(section.initial_rows, section.english is None) for section in rows] == [
        ("mean", True),
        ("calibrated", False),
    ]
    assert made("elchat").vocabulary.adapter == "adapter" and made("elchat").transfer.steps == 0


def test_where_they_do_not_apply(config: Config, tmp_path: Path) -> None:
    by_model = load_config(write_run_config(tmp_path, tmp_path / "model"))
    with pytest.raises(DoesNotApply, match=r"missing is model: the model of stage translate"):
        applied(BY_NAME["no-translate"], by_model, GIVEN, seed=0)
    with pytest.raises(DoesNotApply, match="give --base-model"):
        applied(BY_NAME["chat-vector"], config, {}, seed=0)
    in_epochs = config.model_copy(update={"pretrain": config.pretrain.model_copy(update={"steps": None, "epochs": 1})})
    with pytest.raises(DoesNotApply, match=r"pretrain is counted in epochs; give pretrain\.steps"):
        applied(BY_NAME["chains-only"], in_epochs, GIVEN, seed=0)


def test_a_plan_goes_seed_by_seed_and_names_what_is_wrong(config: Config, tmp_path: Path) -> None:
    from datetime import date

    day = date(2026, 1, 1)
    plan = plan_of(config, tmp_path / "out", [0, 1], ["no-tcot", "full"], {}, day)
    assert [variant.name for variant in plan.variants] == [
        "full, seed 0",
        "no-tcot, seed 0",
        "full, seed 1",
        "no-tcot, seed 1",
    ]
    assert len({variant.config_hash for variant in plan.variants}) == 4
    again = plan_of(config, tmp_path / "elsewhere", [0], [], GIVEN, date(2027, 1, 1))
    hashes = {variant.overlay.name: variant.config_hash for variant in again.variants}
    assert hashes["full"] == plan.variants[0].config_hash, "where and when a run is made does not count"
    assert list(again.does_not_apply) == ["kd-token"] and set(hashes) == set(NAMES) - {"kd-token"}
    through = plan_of(config, tmp_path / "out", [0], ["inside"], {}, day)
    assert [variant.name for variant in through.variants] == ["full, seed 0"] and through.through == ("inside",)
    assert plan.through == ("bridge", "inside") and not plan.by_name and through.by_name
    assert plan_of(config, tmp_path / "out", [0], ["no-tcot"], {}, day).through == ()
    with pytest.raises(UserError, match="no such variant; the variants are full, no-tcot"):
        plan_of(config, tmp_path, [0], ["tcot"], {}, day)
    with pytest.raises(UserError, match="--only no-recovery-kd: it does not apply to this config: give --writer FILE"):
        plan_of(config, tmp_path, [0], ["no-recovery-kd"], {}, day)
    without = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"answers": None})})
    with pytest.raises(UserError, match=r"evaluation\.answers is not given"):
        plan_of(without, tmp_path, [0], [], {}, day)


def test_idle_keys_do_not_change_what_runs_were_made_from(config: Config) -> None:
    dumped = json.dumps(config.model_dump(mode="json"))
    assert not [key for key in ("in_chat", '"written"', '"answers": "chains"') if key in dumped]


def test_a_direct_answer_is_the_last_part_of_a_chain() -> None:
    chain = {"role": "assistant", "content": "<EN>Why?<RESPONSE>Because.<TH>เพราะ", "train": True}
    assert direct_message(chain) == {"role": "assistant", "content": "เพราะ", "train": True}  # type: ignore[arg-type]
    for role, content in (("user", "<EN>a<RESPONSE>b<TH>c"), ("assistant", "<RESPONSE>Because."), ("assistant", "a")):
        assert direct_message({"role": role, "content": content}) == {"role": role, "content": content}


def test_text_in_the_chat_template_is_an_answer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(build_tiny_tokenizer(tmp_path / "tokenizer"))
    text = "The river is long. " * 4
    (whole,) = chat_examples(tokenizer, text, 512)
    first = whole.mask.tolist().index(1)
    assert tokenizer.decode(whole.ids[first:-1].tolist()).strip() == text.strip()
    assert int(whole.ids[-1]) in tokenizer.special_tokens.values() and whole.mask[first:].all()
    pieces = chat_examples(tokenizer, text, first + 10)
    template = whole.ids[:first].tolist()
    assert all(len(piece) <= first + 10 and piece.ids[:first].tolist() == template for piece in pieces)
    assert [id for piece in pieces for id in piece.ids[first:].tolist()] == whole.ids[first:].tolist()
    with pytest.raises(UserError, match=r"takes \d+ tokens of a row"):
        chat_examples(tokenizer, text, first)


def test_bad_combinations_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    for key, value, message in (
        ("recover.written", "{file: a.jsonl}", None),
        ("recover", "{instructions: a, written: {file: a}, teacher: {endpoint: 'http://a/v1', model: b}}", "both give"),
        ("pretrain.sources", "[{path: a, in_chat: true, recovery: token}]", "in_chat is for text"),
        ("evaluation.text", "{path: a, in_chat: true}", "in_chat means nothing here"),
        ("pretrain.steps", "-1", "greater than or equal to 0"),
    ):
        path = write_run_config(tmp_path, model)
        if message is None:
            load_config(path, [f"{key}={value}"])
            continue
        with pytest.raises(UserError, match=message):
            load_config(path, [f"{key}={value}"])
