"""Chains of which the original writes the English answer: who writes what, in a batch and as a stream."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripted import WHOLE_CHAIN, Script, Typist, asked, chain_tokenizer, chat_of

from transllm_jax.generation.answer import Answer, Deltas
from transllm_jax.generation.chain import ChainChat
from transllm_jax.tokenizer.chain import Chain
from transllm_jax.tokenizer.chat import Message, encode_prompt
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.tokenizer import Tokenizer

HISTORY: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return chain_tokenizer(tmp_path)


def pair(model: Script, original: Script) -> ChainChat:
    return chat_of(model, original=chat_of(original))


def test_the_model_reads_the_original_answers_and_the_model_writes(tokenizer: Tokenizer) -> None:
    model, original = Script(tokenizer, "<EN>What is it?<RESPONSE>", "สุนัข"), Script(tokenizer, "A fox.")
    question = [*HISTORY, *asked("อะไร")]
    (answer,) = pair(model, original).answers([question])
    assert answer == Answer(WHOLE_CHAIN, Chain("What is it?", "A fox.", "สุนัข"), "สุนัข", False)
    assert (answer.how, answer.complete) == ("chain", True)
    (reading,), (writing,) = model.calls
    assert reading == encode_prompt(tokenizer, question)
    # Where it begins an English answer, the original takes over; at the end it has no other ends than its own.
    response = tokenizer.token_id("<RESPONSE>")
    assert [options["stop"] for options in model.options] == [(*end_ids(tokenizer), response), end_ids(tokenizer)]
    assert writing == reading + tokenizer.encode("<EN>What is it?<RESPONSE>A fox.<TH>")
    # The original sees the question in English, after the earlier turns.
    assert original.calls == [[encode_prompt(tokenizer, [*HISTORY, *asked("What is it?")])]]


def test_in_a_batch_each_answer_has_its_own_legs(tokenizer: Tokenizer) -> None:
    model = Script(tokenizer, "<EN>Who?<RESPONSE>", "<RESPONSE>", "<TH>หมา", "<EN>What?<RESPONSE>", "หมา", "แมว")
    original = Script(tokenizer, "A dog.", "Here.", "A cat.")
    questions = [asked("ใคร"), asked("Where?"), asked("Translate: dog"), asked("อะไร")]
    answers = pair(model, original).answers(questions)
    assert [answer.raw for answer in answers] == [
        "<EN>Who?<RESPONSE>A dog.<TH>หมา",
        "<RESPONSE>Here.",
        "<TH>หมา",
        "<EN>What?<RESPONSE>A cat.<TH>แมว",
    ]
    assert [answer.how for answer in answers] == ["chain", "english", "translation", "chain"]
    # Three runs: the questions, the original's answers, the translations. An English question is asked as it is.
    assert [len(call) for call in model.calls] == [4, 2] and [len(call) for call in original.calls] == [3]
    assert original.calls[0][1] == encode_prompt(tokenizer, asked("Where?"))


@pytest.mark.parametrize(
    ("texts", "english"),
    [
        (["<EN>What is it?<RESPONSE>", "สุนัข"], ["A fox."]),
        (["<RESPONSE>"], ["A dog."]),
        (["<EN>A dog."], []),
        (["<EN>What is it?<RESPONSE>"], [""]),
        (["no marker"], []),
    ],
)
def test_a_stream_ends_as_a_batch(tokenizer: Tokenizer, texts: list[str], english: list[str]) -> None:
    model, original = Script(tokenizer, *texts), Script(tokenizer, *english)
    steps = list(pair(model, original).stream(asked("อะไร")))
    (whole,) = pair(Script(tokenizer, *texts), Script(tokenizer, *english)).answers([asked("อะไร")])
    assert steps[-1] == whole and not model.texts and not original.texts
    assert all(whole.raw.startswith(step.raw) for step in steps)


def test_the_parts_come_one_after_another(tokenizer: Tokenizer) -> None:
    deltas = Deltas()
    chat = pair(Script(tokenizer, "<EN>What is it?<RESPONSE>", "สุนัข"), Script(tokenizer, "A fox."))
    found = [delta for answer in chat.stream(asked("อะไร")) for delta in deltas.of(answer)]
    parts = [(part, "".join(one.text for one in some)) for part, some in groupby(found, lambda delta: delta.part)]
    assert parts == [("question_en", "What is it?"), ("answer_en", "A fox."), ("answer", "สุนัข")]


def test_what_the_limit_or_the_context_ends_is_cut_off(tokenizer: Tokenizer) -> None:
    model, original = Script(tokenizer, "<EN>What is it?<RESPONSE>"), Script(tokenizer)
    original.config = SimpleNamespace(context=8)
    (answer,) = pair(model, original).answers([asked("อะไร")])
    assert answer.cut_off and not answer.complete and not original.calls
    # The original's answer is too long: what there is of it is translated, and the whole is marked.
    model = Script(tokenizer, "<EN>What is it?<RESPONSE>", "สุนัข")
    (answer,) = pair(model, Script(tokenizer, "A dog is here. " * 20)).answers([asked("อะไร")])
    assert answer.cut_off and answer.visible == "สุนัข" and answer.chain is not None


def test_without_an_original_the_marker_ends_nothing(tokenizer: Tokenizer) -> None:
    script = Typist(tokenizer, WHOLE_CHAIN)
    (*_, answer) = chat_of(script).stream(asked("อะไร"))
    assert answer.raw == WHOLE_CHAIN and len(script.calls) == 1
