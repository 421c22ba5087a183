"""A conversation: what is shown of an answer while it grows, and what is remembered of it."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from scripted import Script, asked, chain_tokenizer, chat_of

from transllm_jax.commands.chat import Session, show
from transllm_jax.generation.chain import Answer
from transllm_jax.progress import plain_console
from transllm_jax.tokenizer.chain import parse, visible
from transllm_jax.tokenizer.chat import encode_prompt
from transllm_jax.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chain_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_special_tokens_in_an_answer_do_not_end_the_conversation(tokenizer: Tokenizer) -> None:
    # A small model now and then writes the header of another turn into its answer.
    odd = [
        "<EN>Who<|endoftext|> is it?<RESPONSE>A dog.<|im_start|><TH>หมา",
        "<|im_start|>",
        "<|im_<|im_start|>start|>Hi",
    ]
    script = Script(tokenizer, *odd, "Yes.")
    session = Session("a model", chat_of(script), tokenizer)
    for question in ("ใคร", "อะไร", "Hm?", "Really?"):
        (*_, answer) = session.ask(question)
    assert answer.visible == "Yes."
    assert [message["content"] for message in session.history] == [
        "Who is it?",
        "A dog.",
        "Hm?",
        "Hi",
        "Really?",
        "Yes.",
    ]


def test_a_conversation_that_outgrows_the_context_forgets_its_oldest_turns(tokenizer: Tokenizer) -> None:
    script = Script(tokenizer, *["word " * 40] * 4)
    session = Session("a model", chat_of(script), tokenizer)
    one = len(encode_prompt(tokenizer, asked("Go on, number 0")))
    script.config = SimpleNamespace(context=one + 2 * (40 * len(tokenizer.encode(" word")) + one) + 30)
    for number in range(4):
        list(session.ask(f"Go on, number {number}"))
    assert session.forgotten >= 1 and session.history[-2]["content"] == "Go on, number 3"
    assert all(len(prompts[0]) + 30 <= script.config.context for prompts in script.calls)
    script.config = SimpleNamespace(context=8)
    script.texts = ["no"]
    list(session.ask("x"))  # no turn is left to forget: the engine refuses what does not fit
    assert len(session.history) == 2


def test_a_chain_that_the_context_has_no_room_to_continue_stays_as_it_is(tokenizer: Tokenizer) -> None:
    broken = "<EN>Who is it?<RESPONSE>A dog."
    script = Script(tokenizer, broken, broken)
    script.config = SimpleNamespace(context=len(encode_prompt(tokenizer, asked("ใคร"))) + 30)
    (answer,) = chat_of(script).answers([asked("ใคร")])
    (*_, streamed) = chat_of(script).stream(asked("ใคร"))
    assert answer == streamed == Answer(broken, None, "A dog.", False) and len(script.calls) == 2


@pytest.mark.parametrize("show_chain", [True, False])
def test_an_answer_is_shown_whole_though_a_burst_ends_inside_a_character(show_chain: bool) -> None:
    raw = "<EN>Who?<RESPONSE>A :dog: [b]x[/b].<TH>หมา\ufffd"
    data = raw.encode()
    bursts = [data[:size].decode(errors="replace") for size in range(0, len(data) + 1)]
    answers = [Answer(text, parse(text), visible(text), False) for text in bursts]
    console = plain_console(file=io.StringIO(), width=40)
    show(console, iter(answers), show_chain=show_chain)
    assert console.file.getvalue() == (raw if show_chain else "หมา\ufffd") + "\n"  # type: ignore[attr-defined]
