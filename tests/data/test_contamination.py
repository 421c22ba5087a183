"""Contamination: which documents hold a text of an evaluation set."""

from __future__ import annotations

import pickle
import random
import unicodedata

import pytest

from transllm_jax.data.clean import contamination
from transllm_jax.data.clean.contamination import SHORTEST, EvaluationTexts, N, compared
from transllm_jax.errors import UserError

ENGLISH = "What are the names of some famous actors that started their careers on Broadway?"
THAI = "นักแสดงชื่อดังที่เริ่มต้นอาชีพการแสดงละครบรอดเวย์ชื่ออะไรบ้าง และมีผลงานอะไร"
SHORT = "What is the meaning of life?"  # 22 letters
SETS = EvaluationTexts([("first", ENGLISH), ("second", THAI), ("second", SHORT)])


def letters(seed: int, length: int) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=length))


def test_a_copy_is_found_anywhere_in_a_document() -> None:
    for text, name in ((ENGLISH, "first"), (THAI, "second"), (SHORT, "second")):
        assert SETS.found_in(text) == name
        assert SETS.found_in(f"{letters(0, 500)} {text} {letters(1, 500)}") == name
    assert SETS.found_in("") is None
    assert SETS.found_in(letters(2, 5000)) is None


def test_spaces_case_punctuation_and_forms_of_characters_do_not_hide_a_copy() -> None:
    for text, name in ((ENGLISH, "first"), (THAI, "second"), (SHORT, "second")):
        changed = [
            text.upper(),
            text.replace(" ", ""),
            " ".join(text),
            text.replace(" ", "\n\t- "),
            f"“{text.replace('?', '!?')}”",
            text.replace("a", "\uff41").replace("s", "\u017f"),  # fullwidth a, long s
            unicodedata.normalize("NFD", text),
            unicodedata.normalize("NFKC", text),  # takes ำ apart
            text.replace(" ", "\u200b"),
        ]
        assert [SETS.found_in(one) for one in changed] == [name] * len(changed)


def test_thai_vowels_and_tones_and_all_digits_count() -> None:
    assert "".join(map(chr, compared("ที่นี่, Ⅷ–๑２3 ½ฯ ๆ"))) == "ที่นี่viii๑2312ฯๆ"
    toneless = "".join(c for c in THAI if unicodedata.category(c) != "Mn")
    assert SETS.found_in(toneless) is None
    numbers = EvaluationTexts([("sums", "What is 12345678 times 87654321?")])
    assert numbers.found_in("what is 12345678 times 87654321") == "sums"
    assert numbers.found_in("what is 52345678 times 37654321") is None


@pytest.mark.parametrize(("share", "least"), [(0.5, 39), (0.1, 8), (1.0, 77), (0.001, 1)])
def test_exactly_the_share_of_distinct_ngrams_counts(share: float, least: int) -> None:
    text = letters(3, 100)  # 77 n-grams, all distinct
    sets = EvaluationTexts([("set", text)], share=share)
    beginning = text[: least + N - 1]
    assert sets.found_in(beginning + "?" + letters(4, 300)) == "set"
    assert sets.found_in(beginning[1:] + "?" + letters(4, 300)) is None
    assert sets.found_in(beginning[1:] * 5) is None  # the same n-grams again count once
    # n-grams may lie apart
    apart = text[:50] + letters(5, 30) + text[50:]
    held = (50 - N + 1) * 2
    assert sets.found_in(apart) == ("set" if held >= least else None)


def test_a_share_that_a_float_cannot_hold_is_what_was_written() -> None:
    text = letters(7, 300 + N - 1)
    assert (
        EvaluationTexts([("set", text)], share=0.07).found_in(text[: 21 + N - 1]) == "set"
    )  # 0.07 * 300 is 21.000000000000004


def test_what_repeats_in_an_evaluation_text_counts_once() -> None:
    text = letters(8, 60)
    sets = EvaluationTexts([("set", "na" * 200 + text)])  # 2 n-grams, then 23 + 37
    assert sets.found_in("na" * 200) is None
    assert sets.found_in(text) == "set"


def test_ngrams_that_several_texts_share_count_for_each() -> None:
    common, one, two = letters(9, 60), letters(10, 60), letters(11, 30)
    sets = EvaluationTexts([("one", common + one), ("two", common + two)])
    assert sets.found_in(common) == "two"  # 37 of 67 n-grams; of the first, 37 of 97
    assert sets.found_in(common + one) == "one"
    assert sets.found_in(one) is None  # 37 of 97


def test_a_short_text_must_stand_whole() -> None:
    bare = "whatisthemeaningoflife"
    assert len(bare) < N
    assert SETS.found_in(f"xxx{bare}yyy") == "second"
    assert SETS.found_in(f"{bare[:-1]}-yyy") is None
    assert SETS.found_in(f"{bare[:SHORTEST]} {bare[SHORTEST + 1 :]}") is None
    border = EvaluationTexts(
        [("long", letters(12, N)), ("short", letters(13, N - 1)), ("least", letters(14, SHORTEST))]
    )
    for seed, length, name in ((12, N, "long"), (13, N - 1, "short"), (14, SHORTEST, "least")):
        assert border.found_in(letters(seed, length)) == name
        assert border.found_in(letters(seed, length)[:-1]) is None
        assert border.found_in(letters(seed, length)[1:]) is None


def test_too_short_texts_are_ignored_and_counted() -> None:
    sets = EvaluationTexts([("a", "x" * (SHORTEST - 1)), ("a", "!" * 100), ("b", SHORT), ("b", ENGLISH)])
    assert (sets.ignored, sets.texts, sets.names) == (2, 2, ("a", "b"))
    assert sets.found_in("x" * (SHORTEST - 1)) is None
    assert sets.found_in("x" * 100) is None


def test_the_first_set_is_named() -> None:
    document = f"{THAI} {SHORT} {ENGLISH}"
    texts = [("a", ENGLISH), ("b", SHORT), ("c", THAI)]
    for some in (texts, texts[1:], texts[::-1], texts[2:]):
        assert EvaluationTexts(some).found_in(document) == some[0][0]
    # One text in two sets, in either form.
    for text in (SHORT, ENGLISH):
        assert EvaluationTexts([("c", THAI), ("b", text), ("a", text)]).found_in(text) == "b"


def test_no_evaluation_texts() -> None:
    sets = EvaluationTexts([])
    assert sets.found_in(ENGLISH) is None and sets.texts == sets.ignored == 0 and sets.names == ()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"{letters(15, n)}{text}{letters(16, 100)}" for n in range(60) for text in (ENGLISH, THAI, SHORT)]
    expected = [SETS.found_in(document) for document in documents]
    assert expected == ["first", "second", "second"] * 60
    for size in (1, 37):
        monkeypatch.setattr(contamination, "_CHUNK", size)
        assert [SETS.found_in(document) for document in documents] == expected
        assert SETS.found_in(letters(17, 200)) is None and SETS.found_in("") is None


def test_against_sets_of_strings() -> None:
    """Every answer is that of the rule, written out, on documents that hold random parts of evaluation texts."""
    rng = random.Random(18)
    texts = [letters(seed, rng.randrange(SHORTEST, 120)) for seed in range(100, 140)]
    texts += [texts[rng.randrange(40)][:60] + letters(seed, 20) for seed in range(140, 150)]
    sets = EvaluationTexts([(f"set {i % 3}", text) for i, text in enumerate(texts)])

    def grams(text: str) -> set[str]:
        return {text[i : i + N] for i in range(len(text) - N + 1)}

    def rule(document: str) -> str | None:
        found = [
            i % 3
            for i, text in enumerate(texts)
            if (text in document if len(text) < N else 2 * len(grams(text) & grams(document)) >= len(grams(text)))
        ]
        return f"set {min(found)}" if found else None

    answers = set()
    for _ in range(500):
        parts = []
        for _ in range(rng.randrange(1, 4)):
            text = rng.choice(texts)
            start = rng.randrange(len(text) // 2)
            parts += [text[start : start + rng.randrange(len(text))], letters(rng.randrange(10**6), rng.randrange(30))]
        document = "".join(parts)
        answers.add(rule(document))
        assert sets.found_in(document) == rule(document)
    assert answers == {None, "set 0", "set 1", "set 2"}


def test_workers_get_the_same() -> None:
    again = pickle.loads(pickle.dumps(SETS))
    assert again.key == SETS.key and again.found_in(f"x {THAI}") == "second" and again.found_in("x") is None


def test_the_key_changes_with_all_that_answers_depend_on() -> None:
    same = [("a", ENGLISH), ("b", THAI)]
    assert EvaluationTexts(same).key == EvaluationTexts(iter(same)).key
    others = [
        EvaluationTexts(same, share=0.4),
        EvaluationTexts(same[::-1]),
        EvaluationTexts(same[:1]),
        EvaluationTexts([("a", ENGLISH), ("c", THAI)]),
        EvaluationTexts([("a", ENGLISH), ("b", THAI + "x")]),
        EvaluationTexts([]),
    ]
    assert len({EvaluationTexts(same).key, *(other.key for other in others)}) == 7
    assert len(EvaluationTexts(same).key) == 32


@pytest.mark.parametrize("share", [0, -0.5, 1.1, float("nan")])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(UserError, match="share of n-grams"):
        EvaluationTexts([], share=share)


def test_of_a_question_only_the_whole_counts() -> None:
    asked = [
        "What is the capital of Niger?",
        "เมืองหลวงของประเทศไนเจอร์คือเมืองอะไร",
        "ما عاصمة النيجر يا صديقي؟",
        "short?",
    ]
    sets = EvaluationTexts([("text", ENGLISH)], whole=[("answers", text) for text in asked])
    assert (sets.names, sets.texts, sets.ignored) == (("text", "answers"), 4, 1)
    for text in (
        "what is  the capital of NIGER",
        "He asked: “What is the capital of Niger?” I did not know.",
        "ถามว่า เมืองหลวงของ ประเทศไนเจอร์ คือเมืองอะไร ครับ",
        "ما عاصمة النيجر، يا صديقي",
        "x " * 100_000 + asked[0],
    ):
        assert sets.found_in(text) == "answers"
    for text in (
        "What is the capital of Nigeria?",
        "What is the capital of Chad?",
        "Tell me what the capital of Niger is.",
        "เมืองหลวงของประเทศชาดคือเมืองอะไร",
        "short?",
    ):
        assert sets.found_in(text) is None
    assert sets.found_in(f"{asked[0]}\n{ENGLISH}") == "text"


def test_the_key_depends_on_whole_texts() -> None:
    texts, whole = [("a", ENGLISH)], [("b", "What is the capital of Niger?")]
    keys = {EvaluationTexts(texts, whole=given).key for given in ([], whole, [("c", whole[0][1])])}
    assert len(keys) == 3 and EvaluationTexts([*texts, *whole]).key not in keys
    assert EvaluationTexts(texts, whole=()).key == EvaluationTexts(texts).key
