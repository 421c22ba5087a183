"""Conversations with a SentencePiece tokenizer: where a text is cut must not show in its ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_sentencepiece import TEMPLATE, TEXT, build_tiny_sentencepiece

from transllm_jax.tokenizer.chat import Message, encode_conversation, encode_prompt, render
from transllm_jax.tokenizer.growing.expand import expand, save_expanded
from transllm_jax.tokenizer.tokenizer import Tokenizer

# LLaMA-2's own, without its system prompt.
TALK: list[Message] = [
    {"role": "user", "content": "the capital of France"},
    {"role": "assistant", "content": "Paris is the capital of France"},
    {"role": "user", "content": "การมา"},
    {"role": "assistant", "content": "he said that it is not far"},
]


@pytest.fixture(params=[False, True], ids=["prepend", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    directory = build_tiny_sentencepiece(
        tmp_path / "base", text=[*TEXT, "[INST] [/INST] Paris"], metaspace=request.param
    )
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    path.write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.load(directory)


def test_a_conversation_in_parts_has_the_ids_of_the_whole(tokenizer: Tokenizer) -> None:
    [(ids, mask, _)] = encode_conversation(tokenizer, TALK)
    assert ids == tokenizer.encode(render(tokenizer, TALK))
    prompt = encode_prompt(tokenizer, TALK[:1])
    assert prompt == tokenizer.encode(render(tokenizer, TALK[:1])) == ids[: len(prompt)]
    assert mask[: len(prompt)] == [0] * len(prompt) and mask[len(prompt)] == 1
    first = tokenizer.token(ids[len(prompt)])
    assert first is not None and first.startswith("▁P"), "no lone ▁ before the answer's first word"
    answers = [number for number, kept in zip(ids, mask, strict=True) if kept]
    assert answers.count(tokenizer.eos_id) == 2


def test_an_answer_continues_what_precedes_it(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(" is far", continuing=True) == tokenizer.encode("x is far")[len(tokenizer.encode("x")) :]
    assert tokenizer.encode("far", continuing=True) != tokenizer.encode("far")
    # After a special token a text begins anew, as the whole does.
    assert tokenizer.encode(" far</s>is", continuing=True)[-2:] == tokenizer.encode("x far</s>is")[-2:]
    assert tokenizer.eos_id not in tokenizer.encode("a</s>", specials=False, continuing=True)


@pytest.mark.reference
def test_transformers_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    expanded = expand(tokenizer, ["การมาดี การดีมา มาการ"] * 3, size=3, markers=["<EN>", "<RESPONSE>", "<TH>"])
    save_expanded(expanded.tokenizer, Path(tokenizer.source), tmp_path / "new")
    ours = Tokenizer.load(tmp_path / "new")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    chain: list[Message] = [
        {"role": "user", "content": "การมาดี"},
        {"role": "assistant", "content": "<EN>is it far<RESPONSE>it is not far<TH>การดี"},
    ]
    for talk in (TALK, chain):
        wanted = theirs.apply_chat_template(talk, tokenize=True, return_dict=False)
        assert encode_conversation(ours, talk)[0].ids == wanted
