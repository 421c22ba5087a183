"""Cleaning: what is left out and why, by lengths, script and evaluation sets, of each kind of item."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict

import pytest

from transllm_jax.data.clean.cleaning import (
    Rules,
    conversation_reason,
    pair_reason,
    reason,
    script_share,
    text_of,
    text_reason,
)
from transllm_jax.data.clean.contamination import EvaluationTexts
from transllm_jax.errors import UserError

THAI = "ที่บ้านมีน้ำ"  # 12 code points, four of them marks
EVALUATION = EvaluationTexts([("held out", "How did US states get their names?")])


def message(content: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": content}


def test_no_rules_leave_all_in() -> None:
    assert reason("", Rules()) is None
    assert reason(("", ""), Rules()) is None
    assert reason([], Rules()) is None


def test_lengths_count_code_points_and_both_limits_are_kept() -> None:
    assert len(THAI) == 12
    assert text_reason(THAI, Rules(min_characters=12, max_characters=12)) is None
    assert text_reason(THAI, Rules(min_characters=13)) == "too short"
    assert text_reason(THAI, Rules(max_characters=11)) == "too long"
    # White space at the ends is no text.
    assert text_reason(f" \n{THAI}\t ", Rules(max_characters=12)) is None
    assert text_reason("  a  ", Rules(min_characters=2)) == "too short"


def test_either_side_of_a_pair_is_too_short_or_too_long() -> None:
    rules = Rules(min_characters=2, max_characters=4)
    assert pair_reason(("abc", "abcd"), rules) is None
    assert pair_reason(("a", "abcd"), rules) == pair_reason(("abcd", "a"), rules) == "too short"
    assert pair_reason(("abc", "abcde"), rules) == pair_reason(("abcde", "abc"), rules) == "too long"


def test_a_conversation_is_as_long_as_all_its_contents() -> None:
    turns = [message("abc"), message("defg", "assistant")]  # and a line end between
    assert conversation_reason(turns, Rules(min_characters=8, max_characters=8)) is None
    assert conversation_reason(turns, Rules(min_characters=9)) == "too short"
    assert conversation_reason(turns, Rules(max_characters=7)) == "too long"


@pytest.mark.parametrize(
    ("text", "scripts", "share"),
    [
        (THAI, ("Thai",), 1.0),
        (THAI, ("Latin",), 0.0),
        (f"{THAI}abcd", ("Thai",), 12 / 16),
        (f"{THAI}abcd", ("Latin",), 4 / 16),
        # Thai marks still count as Thai beside Latin, which is known by its letters.
        (f"{THAI}abcd", ("Thai", "Latin"), 1.0),
        (f"{THAI}abcd", ("Latin", "Thai"), 1.0),
        # Digits, signs and spaces are nobody's; so are the script's own.
        (f"{THAI} 123 ๑๒๓ ฿ !? \U0001f600", ("Thai",), 1.0),
        ("12:30 ๑๒๓", ("Thai",), 0.0),
        ("", ("Thai",), 0.0),
        ("カタカナー漢字ひらがな", ("Jpan",), 1.0),
        ("漢字abc", ("Han",), 2 / 5),
        ("नमस्ते", ("Devanagari",), 1.0),
        ("abc\U00020000", ("Hani",), 1 / 4),  # beyond the basic plane
        ("ok\ud800", ("Latin",), 1.0),  # half of a surrogate pair, as JSON may hold, is no letter
    ],
)
def test_the_share_of_letters_and_marks_of_scripts(text: str, scripts: tuple[str, ...], share: float) -> None:
    assert script_share(text, scripts) == share


def test_script_of_a_text_of_the_target_of_a_pair_and_of_no_conversation() -> None:
    rules = Rules(scripts=("Thai",), min_script_share=0.75)
    assert text_reason(f"{THAI}abcd", rules) is None  # exactly the share
    assert text_reason(f"{THAI}abcde", rules) == "other script"
    assert text_reason("123", rules) == "other script"
    assert pair_reason(("English", THAI), rules) is None
    assert pair_reason((THAI, "English"), rules) == "other script"
    assert conversation_reason([message("English")], rules) is None
    assert text_reason("English", Rules(scripts=("Thai",))) is None  # a share of 0 asks for nothing


def test_contamination_of_every_kind_of_item() -> None:
    copy = "how did us states get their names"
    rules = Rules()
    assert text_reason(f"Q: {copy} A: ...", rules, EVALUATION) == "contaminated"
    assert pair_reason((copy, THAI), rules, EVALUATION) == "contaminated"
    assert pair_reason((THAI, copy), rules, EVALUATION) == "contaminated"
    turns = [message("Hello"), message("Hi", "assistant"), message(copy)]
    assert conversation_reason(turns, rules, EVALUATION) == "contaminated"
    assert conversation_reason(turns[:2], rules, EVALUATION) is None
    assert text_reason(copy, rules, None) is None


def test_an_item_of_any_kind_goes_to_its_function() -> None:
    rules = Rules(min_characters=4, scripts=("Thai",), min_script_share=1)
    assert reason("abcd", rules) == "other script"
    assert reason(("abcd", THAI), rules) is None
    assert reason([message("abcd")], rules) is None
    assert reason([message("abc")], rules) == "too short"


def test_the_first_reason_is_given() -> None:
    rules = Rules(min_characters=100, scripts=("Thai",), min_script_share=0.5)
    copy = "How did US states get their names?"
    assert text_reason(copy, rules, EVALUATION) == "too short"
    assert text_reason(copy, Rules(scripts=("Thai",), min_script_share=0.5), EVALUATION) == "other script"


def test_the_whole_text_of_an_item() -> None:
    assert text_of("a b") == "a b"
    assert text_of(("a", "b")) == "a\nb"
    assert text_of([message("a"), message("b", "assistant")]) == "a\nb"


def test_rules_come_back_from_json_and_pickle() -> None:
    rules = Rules(1, 20, ("Thai", "Latin"), 0.5)
    for again in (Rules(**json.loads(json.dumps(asdict(rules)))), pickle.loads(pickle.dumps(rules))):
        assert again == rules and hash(again) == hash(rules)


def test_all_faults_of_rules_in_one_line() -> None:
    with pytest.raises(UserError) as caught:
        Rules(min_characters=-1, max_characters=0, scripts=("Thay", "Latn", "Gugu"), min_script_share=2)
    line = str(caught.value)
    assert "\n" not in line
    for part in ("min_characters is -1", "max_characters is 0", "min_script_share is 2", "'Thay'", "Thai", "'Gugu'"):
        assert part in line
    with pytest.raises(UserError, match="max_characters is 4"):
        Rules(min_characters=5, max_characters=4)
    with pytest.raises(UserError, match="scripts is empty"):
        Rules(min_script_share=0.5)
