"""Chains whose English answer is the original's: who is asked what, in which order, and what is remembered."""

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
from transllm_jax.evaluation.systems.inside import OriginalInside
from transllm_jax.evaluation.systems.local import LocalSystem, Weights
from transllm_jax.evaluation.systems.named import parse_system
from transllm_jax.evaluation.systems.system import Asked, Turn
from transllm_jax.tokenizer.chat import encode_prompt
from transllm_jax.tokenizer.tokenizer import Tokenizer


def scripted(name: str, tokenizer: Tokenizer, *texts: str, context: int = 1000, **about: bool) -> tuple[Any, Script]:
    """A local system with these texts in place of a model, and its script."""
    script = Script(tokenizer, *texts)
    none: Any = None
    shape: Any = SimpleNamespace(context=context)
    system = LocalSystem(name, Weights(none, shape, tokenizer, MARKERS, **about), {"of": name}, batch_size=2)
    system.__dict__["engine"] = script
    return system, script


def inside(
    tokenizer: Tokenizer, model: tuple[str, ...], original: tuple[str, ...], **more: int
) -> tuple[OriginalInside, Script, Script]:
    trained, read_and_written = scripted("model", tokenizer, *model, tuned=True, in_chains=True, **more)
    base, english = scripted("original", tokenizer, *original)
    return OriginalInside("inside", trained, base), read_and_written, english


def answered(system: OriginalInside, *asked: Asked) -> dict[str, list[Turn]]:
    return {one.id: turns for one, turns in system.answers(asked)}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return chain_tokenizer(tmp_path)


def test_the_model_reads_the_original_answers_the_model_writes(tokenizer: Tokenizer) -> None:
    system, model, original = inside(
        tokenizer,
        ("<EN>What is it?<RESPONSE>", "สุนัข", "<EN>And where?<RESPONSE>", "ที่นี่"),
        ("A fox.", "It is here."),
    )
    first, second = answered(system, Asked("1", ("อะไร", "แล้วที่ไหน"), max_new_tokens=30))["1"]
    assert first.raw == "<EN>What is it?<RESPONSE>A fox.<TH>สุนัข" and first.visible == "สุนัข"
    assert first.chain == {"question_en": "What is it?", "answer_en": "A fox.", "answer": "สุนัข"}
    assert first.how == "chain" and second.visible == "ที่นี่"
    # The model reads until the marker of the English answer, and writes after the original's answer.
    (reading,), (writing,), _, _ = model.calls
    assert tokenizer.token_id("<RESPONSE>") in model.options[0]["stop"]
    assert tokenizer.token_id("<RESPONSE>") not in model.options[1]["stop"]
    assert writing == reading + tokenizer.encode("<EN>What is it?<RESPONSE>A fox.<TH>")
    # The original gets no markers, and earlier turns in English.
    (alone,), (with_history,) = original.calls
    assert alone == encode_prompt(tokenizer, [{"role": "user", "content": "What is it?"}])
    turns = [("user", "What is it?"), ("assistant", "A fox."), ("user", "And where?")]
    assert with_history == encode_prompt(tokenizer, [{"role": role, "content": text} for role, text in turns])


def test_english_goes_to_the_original_and_what_is_no_chain_is_the_models(tokenizer: Tokenizer) -> None:
    system, model, original = inside(tokenizer, ("<TH>สุนัข", "<RESPONSE>", "หมา"), ("Hello.", "A dog."))
    found = answered(
        system,
        Asked("english", ("Hi",), "english", 30),
        Asked("translated", ("Translate: fox",), max_new_tokens=30),
        Asked("begun", ("อะไร",), max_new_tokens=30),
    )
    assert found["english"][0].visible == "Hello." and len(original.calls) == 2
    assert found["translated"][0].visible == "สุนัข" and found["translated"][0].how == "translation"
    # Taken for an English question: the original gets it as it is.
    assert original.calls[1] == [encode_prompt(tokenizer, [{"role": "user", "content": "อะไร"}])]
    assert found["begun"][0].visible == "หมา" and not model.texts


def test_a_turn_without_an_english_answer_or_without_room_is_an_error(tokenizer: Tokenizer) -> None:
    system, _, _ = inside(tokenizer, ("<EN>What is it?<RESPONSE>",), ("",))
    (turn,) = answered(system, Asked("1", ("อะไร",), max_new_tokens=30))["1"]
    assert turn.error == "the original has no answer in English" and turn.visible == ""
    prompt = len(encode_prompt(tokenizer, [{"role": "user", "content": "อะไร"}]))
    system, _, _ = inside(tokenizer, ("<EN>What is it?<RESPONSE>",), ("A fox " * 9,), context=prompt + 40)
    (turn,) = answered(system, Asked("1", ("อะไร",), max_new_tokens=30))["1"]
    assert turn.error is not None and "exceed the model's context" in turn.error


def test_it_is_opened_from_a_run_with_chains_alone(finished_run: Path, tmp_path: Path) -> None:
    opener = Systems(print, SuiteOptions(), batch_size=2)
    named = parse_system(f"inside:{finished_run}")
    assert (named.kind, named.name) == ("inside", "inside-run")
    system = opener.open(named)
    assert isinstance(system, OriginalInside) and system.original is not system.model
    for one in Asked("1", ("ใคร",), max_new_tokens=6), Asked("2", ("Who?",), "english", 6):
        ((_, turns),) = system.answers([one])
        assert turns[0].error is None or "no answer in English" in turns[0].error
    alone = opener.model(parse_system(f"{finished_run}#original"))
    assert system.original.identity == alone.identity
    with pytest.raises(UserError, match="is no work directory"):
        opener.open(parse_system(f"inside:{finished_run.parent / 'model'}"))
    copy_run(finished_run, tmp_path / "copy", None)
    shutil.rmtree(tmp_path / "copy" / "run" / "transfer")
    with pytest.raises(UserError, match="answers in no chains"):
        Systems(print, SuiteOptions()).open(parse_system(f"inside:{tmp_path / 'copy' / 'run'}"))
