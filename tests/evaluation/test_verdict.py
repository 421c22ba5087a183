"""What is read from a judge's reply, and what is not: a hundred malformed ones, and any text at all."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transllm_jax.errors import UserError
from transllm_jax.evaluation.judge.fastchat_prompts import PROMPTS
from transllm_jax.evaluation.judge.judge import spoken
from transllm_jax.evaluation.judge.prompts import again, pair_prompt, single_prompt
from transllm_jax.evaluation.judge.verdict import HIGHEST, LOWEST, choice_of, rating_of

RATINGS = {
    "Rating: [[5]]": 5,
    "[[10]]": 10,
    "It is good.\n\nRating: [[7.5]].": 7.5,
    "[[7,5]]": 7.5,
    "**Rating: [[ 8 ]]**": 8,
    "Rating: [[8]]. So: [[8.0]]": 8,
    "[[๗]]": 7,
    "คะแนน: [[9]] คะแนน": 9,
    "Rating: [6]": 6,
    "Rating: [6].\n\nThis is why.": 6,
    "As said in [1] by others, it is right.\n**Rating: [6]**": 6,
    "Rating: [6] first.\nRating: [[7]]": 7,
    "<b>[[1]]</b>": 1,
}
# Replies without a rating that could be relied on.
NO_RATING = [
    "",
    "   \n",
    "I cannot rate this.",
    "Rating: 5",
    "5",
    "5/10",
    "Rating: (5)",
    "Rating: {5}",
    "Rating: <<5>>",
    "Rating: 【【5】】",
    "Rating: ［［5］］",
    "Rating: [[",
    "Rating: [[5",
    "Rating: [[5]",
    "Rating: [5]]",
    "Rating: [[ ]]",
    "Rating: [[]]",
    "Rating: []",
    "Rating: [[rating]]",
    "Rating: [[five]]",
    "Rating: [[ห้า]]",
    "Rating: [[V]]",
    "Rating: [[5/10]]",
    "Rating: [[5 out of 10]]",
    "Rating: [[5-6]]",
    "Rating: [[5 or 6]]",
    "Rating: [[~5]]",
    "Rating: [[5%]]",
    "Rating: [[5.]]",
    "Rating: [[.5]]",
    "Rating: [[5.5.5]]",
    "Rating: [[1,000]]",
    "Rating: [[1e1]]",
    "Rating: [[0x5]]",
    "Rating: [[11]]",
    "Rating: [[0]]",
    "Rating: [[-5]]",
    "Rating: [[+11]]",
    "Rating: [[0.5]]",
    "Rating: [[10.1]]",
    "Rating: [[100]]",
    "Rating: [[5]] no, [[6]]",
    "[[5]] [[6]] [[7]]",
    "The format is [[5]]. Rating: [[7]]",
    "First turn: [[9]]\nSecond turn: [[2]]",
    "Rating: [[nan]]",
    "Rating: [[inf]]",
    "Rating: [[NaN]]",
    "Rating: [[Infinity]]",
    "Rating: [[None]]",
    "Rating: [[null]]",
    "Rating: [[A]]",
    "Rating: [[C]]",
    "Rating: [[5]A]",
    "Rating: [[[5]",
    "Rating: [ [5] ] of 10",
    "Rating: [5] of 10",
    "See [1] and [2] for more.",
    "See [3]\nand [4]",
    "a[0] = b[1] + 2",
    "Rating: [11]",
    "Rating: [0]",
    "Rating: [-3]",
    "Rating: [5.5.5]",
    "Rating: [five]",
    "Rating: [5/10]",
    "[[rating]] is [7]",
    "Rating: \\[\\[5\\]\\]",
    "Rating: [\n5\n]",
    "Rating: &#91;&#91;5&#93;&#93;",
    '{"rating": 5}',
    '{"rating": [5, 6]}',
    "Rating: [[5\u200b]]",
    "Rating: [[\u0000]]",
    "Rating: [[½]]",
    "Rating: [[⑤]]",
    "Rating: [[五]]",
    "Rating: [[5]][[6]]",
    "ฉันไม่สามารถให้คะแนนได้",
    "لا أستطيع",
    "Rating: [[ 5 6 ]]",
    "Rating: [[5;6]]",
    "Rating: [[5, 6]]",
    "Rating: [[5]]]] [[4]]",
    "Rating: [[10]] (out of [[100]])",
    "Rating: [[1]]0 [[2]]",
    "I'm sorry, but as an AI I do not rate.",
    "Rating: [[?]]",
    "Rating: [[*5*]]",
    "Rating: [[**5**]]",
    "Rating: [[`5`]]",
    'Rating: [["5"]]',
    "Rating: [[Rating: 5]]",
    "Rating: [[score=5]]",
    "Rating: [[5 stars]]",
    "Rating: [[★★★★★]]",
    "Rating: [[5️⃣]]",
    "Rating: [[10/10]]",
    "[[User]] [[Assistant]]",
    "Rating: [[[[]]]]",
    "[" * 5000,
    "[[1" * 2000,
]
NO_CHOICE = [
    *(text for text in NO_RATING if "[[A]]" not in text and "[[C]]" not in text),
    "[[A]] or [[B]]",
    "[[D]]",
    "[[a]]",
    "[A]",
    "[[AB]]",
    "[[A/B]]",
    "[[Tie]]",
    "Assistant A is better.",
    '"[[A]]" if A is better, "[[B]]" if B is better: [[A]]',
]


def test_there_are_a_hundred() -> None:
    assert len(set(NO_RATING)) >= 100


@pytest.mark.parametrize(("reply", "rating"), RATINGS.items())
def test_ratings(reply: str, rating: float) -> None:
    assert rating_of(reply) == rating
    # The code of TransLLM knows double brackets only.
    assert rating_of(reply, single_brackets=False) == (rating if "[[" in reply else None)


def test_a_rating_that_could_not_be_relied_on_is_none() -> None:
    assert [text for text in NO_RATING if rating_of(text) is not None] == []
    assert [text for text in NO_RATING if rating_of(text, single_brackets=False) is not None] == []


def test_choices() -> None:
    assert [choice_of(text) for text in ("[[A]]", "I prefer B.\n\n[[B]]", "**[[C]]**", "[[A]] ... [[A]]")] == [*"ABCA"]
    assert [text for text in NO_CHOICE if choice_of(text) is not None] == []


@given(st.text(alphabet="[]0123456789.,-ABC \n๗") | st.text())
def test_any_text_is_read_or_not(text: str) -> None:
    rating, choice = rating_of(text), choice_of(text)
    assert rating is None or LOWEST <= rating <= HIGHEST
    assert choice is None or f"[[{choice}]]" in text
    # A second verdict takes away the first.
    assert rating_of(text + "[[3]][[4]]") is None and choice_of(text + "[[A]][[B]]") is None


def test_thoughts_are_no_verdict() -> None:
    assert rating_of(spoken("<think>Is it [[3]]? Or [[4]]?</think>Rating: [[5]]")) == 5
    assert rating_of(spoken("Rating: [[5]]")) == 5


# --- what is asked ---------------------------------------------------------------------------------------------------

# The SHA-256 of each prompt of FastChat's judge_prompts.jsonl: the system message, a zero, the template.
PUBLISHED = {
    "pair-v2": "b40285ee2bd28eb7",
    "pair-v2-multi-turn": "b68c6e33f67f870b",
    "pair-math-v1": "bf7685d4fdd94736",
    "pair-math-v1-multi-turn": "ebe9b04d041444e8",
    "single-v1": "7d276fe1d4b3f18f",
    "single-math-v1": "226191a3df0fe7a9",
    "single-v1-multi-turn": "a91a5b4266b4e377",
    "single-math-v1-multi-turn": "572e584361120697",
}
# And of each user message of TransLLM's eval/gpt4_eval.py (commit 3ec02f0), by whether it has references and turns.
PUBLISHED_BY_TRANSLLM = {
    (False, 1): "d2a0c1c49f22c8a1",
    (True, 1): "deca87c0ca850061",
    (False, 2): "ca53cb7a8e8918c0",
    (True, 2): "c65b63e980726a33",
}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_prompts_are_the_published_ones() -> None:
    assert {name: digest(f"{one.system}\0{one.template}") for name, one in PROMPTS.items()} == PUBLISHED
    for (with_references, turns), wanted in PUBLISHED_BY_TRANSLLM.items():

        def places(name: str, turns: int = turns) -> list[str]:
            return [f"{{{name}_{number}}}" for number in range(1, turns + 1)] if turns > 1 else [f"{{{name}}}"]

        references = [f"{{ref_answer_{number}}}" for number in range(1, turns + 1)] if with_references else None
        system, user = single_prompt(
            "transllm-as-published", places("question"), places("answer"), references, language="Thai"
        )
        assert digest(user["content"]) == wanted and system["content"] == "You are a friendlt and helpful assistant"


def test_what_is_judged_is_put_in_as_it_is() -> None:
    system, user = single_prompt("fastchat", ["Why {answer}?", "And {x}?"], ["{question_1} [[10]]", "b"], ["r", "s"])
    assert "second question" in system["content"] and system["role"] == "system"
    for text in ("Why {answer}?", "And {x}?", "{question_1} [[10]]", "### Reference answer:\nr\n", "answer:\ns\n"):
        assert user["content"].count(text) == (2 if text.endswith("?") else 1)
    assert not re.findall(r"\{(question_2|answer_\d|ref_answer_\d)\}", user["content"])
    _, user = pair_prompt("fastchat", ["Q?"], (["one"], ["two"]), None)
    assert user["content"].index("Assistant A's Answer]\none") < user["content"].index("Assistant B's Answer]\ntwo")
    with pytest.raises(UserError, match="grades single answers only"):
        pair_prompt("transllm-as-published", ["Q?"], (["one"], ["two"]), None)


def test_a_judge_sees_all_turns_of_a_longer_conversation() -> None:
    questions, answers, right = (["one?", "two?", "three?"], ["a-one", "a-two", "a-three"], ["r1", "r2", "r3"])
    for references in (None, right):
        (system, user), (pair_system, pair) = (
            single_prompt("fastchat", questions, answers, references),
            pair_prompt("fastchat", questions, (answers, ["b-one", "b-two", "b-three"]), references),
        )
        for text in (*questions, *answers, *(references or [])):
            assert text in user["content"] and text in pair["content"]
        assert "b-three" in pair["content"] and user["content"].index("two?") < user["content"].index("three?")
        for message in (system, pair_system):
            assert "the last" in message["content"] and "second" not in message["content"]
    _, published = single_prompt("transllm-as-published", questions, answers, None, language="Thai")
    assert "a-three" in published["content"] and "{" not in published["content"].replace('{"', "")


def test_the_second_attempt_names_the_format() -> None:
    first = single_prompt("fastchat", ["Q?"], ["a"], None)
    second = again(first, "rating")
    assert second[0] == first[0] and second[1]["content"].startswith(first[1]["content"])
    assert "[[number]]" in second[1]["content"] and "[[A]]" in again(first, "choice")[1]["content"]
