"""A conversation: what is shown of an answer while it grows, and what is remembered of it."""

from __future__ import annotations

import io
from itertools import groupby, pairwise
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import MARKERS, Script, Typist, asked, chain_tokenizer, chat_of
from tiny_sentencepiece import TEMPLATE, build_tiny_sentencepiece

from transllm_jax.commands.chat import Session, show
from transllm_jax.errors import UserError
from transllm_jax.generation.answer import PARTS, Answer, Deltas
from transllm_jax.generation.chain import ChainChat
from transllm_jax.progress import plain_console
from transllm_jax.tokenizer.chat import encode_prompt
from transllm_jax.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chain_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of LLaMA-2's kind, in which characters that it does not know are bytes, with the chain's markers."""
    made = Tokenizer.load(build_tiny_sentencepiece(tmp_path_factory.mktemp("bytewise")))
    made.backend.add_special_tokens(list(MARKERS.in_order()))
    return made.derived(chat_template=TEMPLATE)


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
def test_an_answer_is_shown_whole_though_a_burst_ends_inside_a_character(
    tokenizer: Tokenizer, show_chain: bool
) -> None:
    raw = "<EN>Who?<RESPONSE>A :dog: [b]x[/b].<TH>หมา\ufffd ก"
    ids = tokenizer.encode(raw)[:-1]  # the last character is cut off
    assert len(ids) > len("หมา ก") + 10
    console = plain_console(file=io.StringIO(), width=40)
    show(console, chat_of(Typist(tokenizer, ids)).stream(asked("ใคร")), show_chain=show_chain)
    shown = raw[:-1] + "\ufffd"
    assert console.file.getvalue() == (shown if show_chain else "หมา\ufffd \ufffd") + "\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("show_chain", [True, False])
def test_an_answer_is_shown_once_though_its_end_makes_what_was_shown_unreadable(
    bytewise: Tokenizer, show_chain: bool
) -> None:
    # With byte fallback, bytes that are tokens are decoded together: a lone one makes its neighbours unreadable.
    ids = [*bytewise.encode("<TH>"), *(bytewise.token_id(f"<0x{byte:02X}>") for byte in (*"ขx".encode(), 0xE0))]
    assert bytewise.decode(ids[:-1]).endswith("ขx") and bytewise.decode(ids).endswith("\ufffd" * 5)
    console = plain_console(file=io.StringIO(), width=40)
    (*_, last) = chat_of(Typist(bytewise, ids)).stream(asked("who"))
    show(console, chat_of(Typist(bytewise, ids)).stream(asked("who")), show_chain=show_chain)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert last.visible == "ขx\ufffd" and shown == (last.raw if show_chain else last.visible) + "\n"


@given(data=st.data(), limit=st.integers(1, 40))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_that_was_streamed_changes(
    tokenizer: Tokenizer, bytewise: Tokenizer, data: st.DataObject, limit: int
) -> None:
    chosen = data.draw(st.sampled_from([tokenizer, bytewise]))
    token = st.one_of(
        st.integers(0, chosen.vocab_size - 1),
        st.sampled_from(chosen.encode("<EN>Who <RESPONSE>ข้าว <TH>")),
    )
    texts = [data.draw(st.lists(token, max_size=20)) for _ in range(2)]
    answers = list(chat_of(Typist(chosen, *texts, limit=limit)).stream(asked("who")))
    for before, after in pairwise(answers):
        assert after.raw.startswith(before.raw) and after.visible.startswith(before.visible)
    sent: dict[str, str] = dict.fromkeys(PARTS, "")
    deltas = Deltas()
    for answer in answers:
        for part, more in deltas.of(answer):
            sent[part] += more
    last = answers[-1]
    assert sent["answer"] == last.answer and sent["answer_en"] == last.answer_en
    assert sent["question_en"] == last.question_en or sent["question_en"] in last.answer
    assert last.how in ("chain", "continued", "english", "translation", "plain", "broken")
    assert not last.complete or last.answer
    # It ends as what is not streamed does.
    script = Script(chosen)
    script.generate = lambda prompts, **_: [texts.pop(0)[:limit] for _ in prompts]  # type: ignore[method-assign]
    assert chat_of(script).answers([asked("who")]) == [last]


def test_the_parts_of_an_answer_come_one_after_another(tokenizer: Tokenizer) -> None:
    def sent(text: str) -> list[tuple[str, str]]:
        deltas = Deltas()
        found = [
            delta for answer in chat_of(Typist(tokenizer, text)).stream(asked("who")) for delta in deltas.of(answer)
        ]
        return [
            (part, "".join(delta.text for delta in group)) for part, group in groupby(found, lambda delta: delta.part)
        ]

    assert sent("<EN>Who is it?<RESPONSE>A dog.<TH>หมา") == [
        ("question_en", "Who is it?"),
        ("answer_en", "A dog."),
        ("answer", "หมา"),
    ]
    # A server sends the answer to a question in English as it comes.
    first, *_, last = chat_of(Typist(tokenizer, "<RESPONSE>A dog, and no cat.")).stream(asked("who"))
    assert sent("<RESPONSE>A dog, and no cat.") == [("answer", "A dog, and no cat.")]
    assert first.answer == "" and last.how == "english" and last.complete
    # Only its end tells that this is a translation.
    assert sent("<EN>A dog.") == [("question_en", "A dog."), ("answer", "A dog.")]


@pytest.mark.parametrize(
    ("texts", "how", "complete", "answer"),
    [
        (["<EN>Who?<RESPONSE>A dog.<TH>หมา"], "chain", True, "หมา"),
        (["<EN>Who?<RESPONSE>A dog.", "หมา"], "continued", True, "หมา"),
        (["<EN>Who?<RESPONSE>A dog.", ""], "continued", False, ""),
        (["<RESPONSE>A dog."], "english", True, "A dog."),
        (["<TH>หมา"], "translation", True, "หมา"),
        (["<EN>A dog."], "translation", True, "A dog."),
        (["A dog."], "plain", True, "A dog."),
        (["<RESPONSE>A dog.<EN>Who?<TH>หมา"], "broken", False, "A dog.\n\nหมา"),
        (["<EN>Who?<RESPONSE>A dog.<TH>หมา<EN>x<TH>y"], "broken", False, "หมา"),
        (["<EN>Who is it?<RESPONSE>A dog is here.<TH>" + "หมา" * 20], "chain", False, None),
        ([""], "plain", False, ""),
    ],
)
def test_how_an_answer_was_obtained(
    tokenizer: Tokenizer, texts: list[str], how: str, complete: bool, answer: str | None
) -> None:
    (*_, found) = chat_of(Typist(tokenizer, *texts, limit=30)).stream(asked("ใคร"))
    assert (found.how, found.complete) == (how, complete)
    assert answer is None or found.answer == answer
    assert found.cut_off == (answer is None)


def test_a_chain_that_the_limit_cut_off_is_continued_but_not_complete(tokenizer: Tokenizer) -> None:
    long = "<EN>Who is it?<RESPONSE>" + "A dog is here. " * 20
    script = Typist(tokenizer, long, "หมา", limit=30)
    (*_, found) = chat_of(script).stream(asked("ใคร"))
    assert found.how == "continued" and found.answer == "หมา" and found.cut_off and not found.complete


def test_what_the_template_cannot_write_is_not_remembered(tokenizer: Tokenizer) -> None:
    # As Qwen3's template does: such an answer would make every later prompt an error.
    template = (tokenizer.chat_template or "").replace("message['content']", "message['content'].split('</think>')[-1]")
    thinking = tokenizer.derived(chat_template=template)
    script = Script(thinking, "I think.</think>A dog.", "Yes.")
    session = Session("a model", chat_of(script), thinking)
    for question in ("Who?", "Really?"):
        (*_, answer) = session.ask(question)
    assert answer.visible == "Yes."
    assert [message["content"] for message in session.history] == ["Really?", "Yes."]


def test_a_half_answer_is_not_remembered_and_nothing_is_forgotten_for_it(tokenizer: Tokenizer) -> None:
    script = Script(tokenizer, "word " * 40, "word " * 40, "Yes.")
    session = Session("a model", chat_of(script), tokenizer)
    list(session.ask("Go on"))
    before = list(session.history)
    script.config = SimpleNamespace(context=len(encode_prompt(tokenizer, [*before, *asked("Go on")])) + 29)
    answers = session.ask("Go on")
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert session.history == before and session.forgotten == 0
    list(session.ask("Really?"))
    assert session.forgotten == 1 and [message["content"] for message in session.history] == ["Really?", "Yes."]


def test_the_original_answers_in_the_same_conversation(tokenizer: Tokenizer) -> None:
    script, original = (
        Script(tokenizer, "<EN>Who is it?<RESPONSE>A dog.<TH>หมา"),
        Script(tokenizer, "<|im_start|>A cat."),
    )
    opened: list[int] = []

    def open_original() -> ChainChat:
        opened.append(1)
        return chat_of(original)

    session = Session("a model", chat_of(script), tokenizer, original=open_original)
    list(session.ask("ใคร"))
    assert not opened
    list(session.ask("Really?", original=True))
    seen = tokenizer.decode(original.calls[0][0])
    assert "Who is it?" in seen and "A dog." in seen and "ใคร" not in seen
    assert session.history[-1]["content"] == "A cat." and len(opened) == 1
    with pytest.raises(UserError, match="there is no original model beside a model"):
        list(Session("a model", chat_of(script), tokenizer).ask("Who?", original=True))


@pytest.mark.parametrize("bad", ["\x1b[A", "a\x00", "a\x9bb", "\x7f"])
def test_control_characters_are_refused(tokenizer: Tokenizer, bad: str) -> None:
    session = Session("a model", chat_of(Script(tokenizer, "Yes.")), tokenizer)
    with pytest.raises(UserError, match=r"the control character U\+00"):
        list(session.ask(bad))
    list(session.ask("two\r\nlines\tand a tab\n"))
    assert session.history[0]["content"] == "two\r\nlines\tand a tab"
