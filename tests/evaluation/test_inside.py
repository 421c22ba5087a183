"""Runs in which the original writes the English answers: who is asked what, and what is remembered."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import copy_run
from scripted import MARKERS, Script, chain_tokenizer

from transllm_jax.commands.open_systems import Systems
from transllm_jax.errors import UserError
from transllm_jax.evaluation.suites.suite_run import SuiteOptions
from transllm_jax.evaluation.systems.local import LocalSystem, Weights
from transllm_jax.evaluation.systems.named import parse_system
from transllm_jax.evaluation.systems.system import Asked, Turn
from transllm_jax.tokenizer.chat import encode_prompt
from transllm_jax.tokenizer.tokenizer import Tokenizer


def scripted(tokenizer: Tokenizer, *texts: str, **about: Any) -> tuple[LocalSystem, Script]:
    """A local system with these texts in place of a model, and its script."""
    none: Any = None
    shape: Any = SimpleNamespace(context=1000)
    system = LocalSystem("a", Weights(none, shape, tokenizer, MARKERS, **about), {}, batch_size=2)
    script = system.__dict__["engine"] = Script(tokenizer, *texts)
    return system, script


def inside(
    tokenizer: Tokenizer, model: tuple[str, ...], original: tuple[str, ...]
) -> tuple[LocalSystem, Script, Script]:
    trained, read_and_written = scripted(tokenizer, *model, tuned=True, in_chains=True)
    base, english = scripted(tokenizer, *original)
    trained.original, trained.inside = (lambda: base), True
    return trained, read_and_written, english


def answered(system: LocalSystem, *asked: Asked) -> dict[str, list[Turn]]:
    return {one.id: turns for one, turns in system.answers(asked)}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return chain_tokenizer(tmp_path)


def test_earlier_turns_are_remembered_in_english_by_both(tokenizer: Tokenizer) -> None:
    system, model, original = inside(
        tokenizer,
        ("<EN>What is it?<RESPONSE>", "สุนัข", "<EN>And where?<RESPONSE>", "ที่นี่"),
        ("A fox.", "It is here."),
    )
    first, second = answered(system, Asked("1", ("อะไร", "แล้วที่ไหน"), max_new_tokens=30))["1"]
    assert first.raw == "<EN>What is it?<RESPONSE>A fox.<TH>สุนัข" and first.visible == "สุนัข"
    assert first.chain == {"question_en": "What is it?", "answer_en": "A fox.", "answer": "สุนัข"}
    assert (first.how, second.visible) == ("chain", "ที่นี่")
    turns = [("user", "What is it?"), ("assistant", "A fox."), ("user", "And where?")]
    asked = encode_prompt(tokenizer, [{"role": role, "content": text} for role, text in turns])
    assert original.calls[1] == [asked] and not model.texts
    reading = encode_prompt(
        tokenizer,
        [*({"role": role, "content": text} for role, text in turns[:2]), {"role": "user", "content": "แล้วที่ไหน"}],
    )
    assert model.calls[2] == [reading]


def test_english_goes_to_the_original_and_what_is_no_chain_is_the_models(tokenizer: Tokenizer) -> None:
    system, _, original = inside(tokenizer, ("<TH>สุนัข", "<RESPONSE>"), ("Hello.", "A dog."))
    found = answered(
        system,
        Asked("english", ("Hi",), "english", 30),
        Asked("translated", ("Translate: fox",), max_new_tokens=30),
        Asked("begun", ("Who?",), max_new_tokens=30),
    )
    assert found["english"][0].visible == "Hello."
    assert original.calls[0] == [encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])]
    assert (found["translated"][0].visible, found["translated"][0].how) == ("สุนัข", "translation")
    # The model takes it for an English question: the original gets it as it is.
    assert original.calls[1] == [encode_prompt(tokenizer, [{"role": "user", "content": "Who?"}])]
    assert (found["begun"][0].visible, found["begun"][0].how) == ("A dog.", "english")


def test_it_is_opened_from_a_run_with_chains_alone(finished_run: Path, tmp_path: Path) -> None:
    opener = Systems(print, SuiteOptions(), batch_size=2)
    named = parse_system(f"inside:{finished_run}")
    assert (named.kind, named.name) == ("inside", "inside-run")
    system, model = opener.open(named), opener.open(parse_system(str(finished_run)))
    assert system.identity != model.identity
    alone = opener.open(parse_system(f"{finished_run}#original"))
    question = Asked("1", ("Who?",), "english", 6)
    ((_, by_inside),), ((_, by_original),) = system.answers([question]), alone.answers([question])
    assert by_inside == by_original and len(list(system.answers([Asked("2", ("ใคร",), max_new_tokens=6)]))) == 1
    with pytest.raises(UserError, match="is no work directory"):
        opener.open(parse_system(f"inside:{finished_run.parent / 'model'}"))
    copy_run(finished_run, tmp_path / "copy", None)
    shutil.rmtree(tmp_path / "copy" / "run" / "transfer")
    with pytest.raises(UserError, match="answers in no chains"):
        Systems(print, SuiteOptions()).open(parse_system(f"inside:{tmp_path / 'copy' / 'run'}"))
