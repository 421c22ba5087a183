"""The chat template of a GGUF file: earlier turns become English, everything else is as the model's own writes it."""

from __future__ import annotations

import pytest
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.conversion.gguf.chat_template import with_english_history
from transllm_jax.generation.answer import answer_of
from transllm_jax.generation.chain import remembered
from transllm_jax.tokenizer.chain import MARKERS
from transllm_jax.tokenizer.chat import Message, render
from transllm_jax.tokenizer.tokenizer import Tokenizer

CHAIN = "<EN>What do bees make?<RESPONSE>Bees make honey.<TH>ผึ้งทำน้ำผึ้ง"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer with its own template, and with the other."""
    own = Tokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    assert own.chat_template is not None
    return own, own.derived(chat_template=with_english_history(own.chat_template, MARKERS))


def turns(*contents: str) -> list[Message]:
    return [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("contents", [("hello",), ("hello", "good day", "bye"), ("x", CHAIN)])
def test_other_messages_are_unchanged(
    pair: tuple[Tokenizer, Tokenizer], contents: tuple[str, ...], prompt: bool
) -> None:
    own, other = pair
    system: list[Message] = [{"role": "system", "content": "be kind"}]
    for before in ([], system):
        messages = before + turns(*contents)
        assert render(other, messages, prompt) == render(own, messages, prompt)


@pytest.mark.parametrize(
    "raw",
    [
        CHAIN,
        "<EN> What do bees make? <RESPONSE> Bees make honey. <TH> ผึ้งทำน้ำผึ้ง",
        "<EN>What do bees make?<RESPONSE>Bees make honey.",
        "<RESPONSE>Bees make honey.",
        "<TH>ผึ้งทำน้ำผึ้ง",
        "Bees make honey.",
    ],
)
def test_earlier_turns_are_what_chat_remembers(pair: tuple[Tokenizer, Tokenizer], raw: str) -> None:
    own, other = pair
    asked, after = "ผึ้งผลิตอะไร", turns("แล้ววัวล่ะ")
    kept = remembered(asked, answer_of(raw, MARKERS), own)
    assert render(other, [*turns(asked, raw), *after], True) == render(own, [*kept, *after], True)
