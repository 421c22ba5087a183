"""Measures of answers and translations, on texts whose values are known."""

from __future__ import annotations

import pytest

from transllm_jax.generation.checks import (
    WINDOW,
    is_untranslated,
    length_factor,
    letters_share,
    repeated_share,
    round_trip,
)

# What SmolLM2-135M-Instruct said, greedily: the first line to the question for the language of Spain.
LOOP = "El lenguaje de España es el lenguaje de España es el lenguaje de España es el lenguaje de España es el lenguaje"
ALIKE = (
    "1. Spinach: A great source of Vitamin K, spinach is a great pick for a salad.\n\n"
    "2. Bell pepper: A great source of Vitamin C, bell pepper is a great pick for a salad."
)
PLAIN = "Bread is made from flour, water, yeast, and sometimes salt. It is baked in an oven until it is brown."
THAI_LOOP = "ภาษาไทยเป็นภาษาที่ใช้ในประเทศไทย" * 5


def test_what_is_said_n_times_repeats_all_but_one() -> None:
    sentence = "This sentence has more characters than the window. "
    assert len(sentence) > WINDOW
    for times in (1, 2, 3, 10):
        assert repeated_share((sentence * times).strip()) == pytest.approx((times - 1) / times, abs=0.01)
    # White space does not matter, nor where a repetition begins.
    assert repeated_share(sentence.replace(" ", " \n") * 4) == pytest.approx(0.75, abs=0.01)
    assert repeated_share("So. " + sentence * 4) == pytest.approx(0.75, abs=0.03)


def test_loops_are_told_from_answers_that_are_alike() -> None:
    assert repeated_share(LOOP) > 0.6 and repeated_share(THAI_LOOP) > 0.75
    assert 0.2 < repeated_share(ALIKE) < 0.5
    assert repeated_share(PLAIN) == 0
    assert repeated_share("") == repeated_share("the the the") == 0
    # A list of numbers is no loop.
    assert repeated_share(", ".join(map(str, range(200)))) == 0


def test_the_share_of_letters() -> None:
    assert letters_share("สวัสดี", ("Thai",)) == 1 and letters_share("hello", ("Thai",)) == 0
    assert letters_share("ab กข", ("Latin",)) == 0.5
    # Digits, signs and code without letters are of no language.
    assert letters_share("12 + 3 = 15.", ("Latin",)) is None
    assert letters_share("Hola, ¿qué tal?", ("Latin",)) == 1, "another language in Latin letters is not found"


def test_the_factor_of_the_length() -> None:
    assert length_factor("a" * 90, "b" * 90, 1.0) == 1
    assert length_factor("a" * 90, "b" * 190, 1.0) == length_factor("a" * 190, "b" * 90, 1.0) == 2
    # Chinese takes a third of the characters.
    assert length_factor("a" * 300, "b" * 100, 1 / 3) == pytest.approx(1)
    # Short texts may differ more.
    assert length_factor("OK", "b" * 8, 1.0) == 1.5


def test_a_copy_is_no_translation() -> None:
    assert is_untranslated("The cat sat  down.", "the cat sat down.")
    assert not is_untranslated("The cat sat down.", "แมวนั่งลง")
    assert not is_untranslated("New York City", "New York City"), "a name may stay as it is"


def test_what_comes_back() -> None:
    sentence = "The capital of Thailand is Bangkok."
    assert round_trip(sentence, sentence) == 100
    assert round_trip(sentence, "Bangkok is Thailand's capital.") > 40
    assert round_trip(sentence, "I like green apples.") < 20
    assert round_trip(sentence, "") == 0
