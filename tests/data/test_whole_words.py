"""Whole words and numbers in text of any script."""

from __future__ import annotations

from decimal import Decimal

import pytest

from transllm_jax.data.clean.whole_words import number_of, numbers, spelled, word_places, words


@pytest.mark.parametrize(
    ("text", "part", "times"),
    [
        ("four and fourteen, FOUR!", "Four", 2),
        ("ﬁve\u200b", "five", 1),  # a ligature; invisible characters
        # Thai, Lao, Khmer, Burmese, Chinese and Japanese write no spaces; marks belong to the letter before them.
        ("เท่ากับสี่ครับ", "สี่", 1),
        ("กินน้ำ", "น", 1),  # น้ is one character with its mark, the other น is its own
        ("ນະຄອນຫຼວງວຽງຈັນ", "ວຽງຈັນ", 1),
        ("រាជធានីភ្នំពេញ", "ភ្នំពេញ", 1),
        ("ភ្នំ", "ន", 0),  # below the letter before it
        ("ရန်ကုန်မြို့", "ရန်ကုန်", 1),
        ("日本の首都は東京です", "東京", 1),
        ("首都是北京。", "北京", 1),
        ("Bangkokเป็นเมืองหลวง", "bangkok", 1),
        # Hindi: a vowel mark is no letter, but goes on with the word.
        ("भारत की राजधानी दिल्ली है", "दिल्ली", 1),
        ("दिल्ली", "दिल्ल", 0),
        ("नेपाली", "नेपाल", 0),
        ("thủ đô là Hà Nội.", "Hà Nội", 1),
        ("Ha Noi", "Hà Nội", 0),
        ("Ha\u0300 No\u0323\u0302i", "Hà Nội", 1),  # written with combining marks
        # Short words before a name, in Arabic, Hebrew and Amharic; vowel marks are optional.
        ("في باريس", "باريس", 1),
        ("وباريس", "باريس", 1),
        ("بِباريسَ", "باريس", 1),
        ("الباريسية", "باريس", 0),
        ("كلا", "لا", 0),  # too short to be told from the end of another word
        ("בפריז", "פריז", 1),
        ("በጃፓን ውስጥ", "ጃፓን", 1),
        ("የአዲስ አበባ፣", "አዲስ አበባ", 1),
        ("ጃፓንኛ", "ጃፓን", 0),
        # Korean: endings follow a word.
        ("수도는 서울입니다", "서울", 1),
        ("새서울", "서울", 0),
        # A number with a unit.
        ("it is 5 km, not 15 km and not 1.5 km", "5 km", 1),
        ("ห่าง ๕ กม.", "5 กม", 1),
        ("version 2.5", "version 2", 0),
    ],
)
def test_whole_words(text: str, part: str, times: int) -> None:
    assert len(list(word_places(spelled(text), spelled(part)))) == times


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("7", [7]),
        ("17 and 7.", [17, 7]),
        ("๗ ٧ ७ ၇ 7", [7] * 5),
        ("1,000 1.000 12,345,678.5 1.234,5", [1000, 1000, "12345678.5", "1234.5"]),
        ("1,00,000", [100000]),
        ("٣٫٥ ١٬٠٠٠", ["3.5", 1000]),
        ("0.125 2,5 2.50", ["0.125", "2.5", "2.5"]),
        ("-7 −7 10-7 10 - 7", [-7, -7, 10, 7, 10, 7]),
        ("1.2.2020", []),
        ("covid19 H2O 5th", [5]),
        ("เท่ากับ7บาท", [7]),
    ],
)
def test_numbers(text: str, values: list[int | str]) -> None:
    assert [value for _, _, value in numbers(spelled(text))] == [Decimal(value) for value in values]


def test_a_text_that_is_a_number() -> None:
    assert number_of(spelled("๑๗")) == 17 and number_of("-7") == -7
    assert number_of("7 km") is None and number_of("seven") is None and number_of("7 8") is None


def test_words_are_compared_without_punctuation() -> None:
    assert words("  What's  THAT, then? ") == "whats that then"
    assert words("ประเทศ ไนเจอร์ (Niger) คือ?") == "ประเทศไนเจอร์nigerคือ"
    assert words("3 - 4") == words("3 − 4") != words("3 4") and words("well-known") == "well known"
