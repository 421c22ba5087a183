"""From a language to the code points that it is written in."""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections import defaultdict

import pytest

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.scripts import Script, language_name, script_of


def holds(script: Script, text: str) -> bool:
    return all(any(first <= ord(c) <= last for first, last in script.blocks) for c in text)


@pytest.mark.parametrize(
    ("language", "name", "scripts"),
    [
        ("th", "Thai", {"Thai"}),
        ("tha", "Thai", {"Thai"}),
        ("TH", "Thai", {"Thai"}),
        ("th_TH", "Thai", {"Thai"}),
        ("iw", "Hebrew", {"Hebrew"}),
        ("he", "Hebrew", {"Hebrew"}),
        ("ja", "Japanese", {"Han", "Hiragana", "Katakana"}),
        ("ko", "Korean", {"Hangul", "Han"}),
        ("zh", "Chinese", {"Han"}),
        ("cmn", "Chinese", {"Han"}),
        ("zh-Hant", "Traditional Chinese", {"Han"}),
        ("pa", "Punjabi", {"Gurmukhi"}),
        ("pa-PK", "Punjabi", {"Arabic"}),
        ("sr", "Serbian", {"Cyrillic"}),
        ("sr-Latn", "Serbian", {"Latin"}),
        ("vi", "Vietnamese", {"Latin"}),
        ("ur", "Urdu", {"Arabic"}),
        ("my", "Burmese", {"Myanmar"}),
        ("ff-Adlm", "Fula", {"Adlam"}),
    ],
)
def test_a_language_is_written_in(language: str, name: str, scripts: set[str]) -> None:
    script = script_of(language)
    assert (script.language, set(script.scripts)) == (name, scripts)
    assert script.latin == (scripts == {"Latin"})
    assert language_name(language) == name


TEXTS = {
    "th": "ภาษาไทย๒๕๖๗ฯ฿",
    "lo": "ພາສາລາວ",
    "km": "ភាសាខ្មែរ៛",
    "my": "မြန်မာဘာသာ",
    "hi": "हिन्दी।",
    "bn": "বাংলা",
    "ar": "اَلْعَرَبِيَّةُ،؟ـ٣",
    "fa": "پارسی",
    "he": "עִבְרִית",
    "el": "Ελληνικάἀ",
    "ru": "Русскийёѣ",
    "ka": "ქართული",
    "am": "አማርኛ",
    "ja": "日本語ひらがなカタカナー々〇ゞ・",
    "ko": "한국어ㅋㄱ漢字",
    "zh": "简体中文𠮷々",
    "vi": "TiếngViệtđặcbiệt",
    "tr": "ığdırİşÇ",
    "yo": "ẹ́ọ̀",
    "sat": "ᱥᱟᱱᱛᱟᱲᱤ",
    "ff-Adlm": "𞤀𞤣𞤤𞤢𞤥",
}


@pytest.mark.parametrize("language", TEXTS)
def test_the_blocks_hold_what_the_language_writes(language: str) -> None:
    script = script_of(language)
    assert holds(script, TEXTS[language])
    assert list(script.blocks) == sorted(script.blocks)
    for other in TEXTS:
        mine, theirs = set(script.scripts), set(script_of(other).scripts)
        if mine.isdisjoint(theirs):
            assert not any(holds(script, c) for c in TEXTS[other]), other
    if not script.latin:
        assert not any(holds(script, chr(c)) for c in range(0x250))
    # Punctuation, digits and emoji of everybody, a byte order mark.
    assert not any(holds(script, c) for c in " .,!?0123456789-–—“”…€😀🈀\ufeff\u200b")


@functools.cache
def assigned_by_prefix() -> dict[bytes, set[int]]:
    """First two bytes of UTF-8 -> the assigned characters of three and four bytes that begin with them."""
    found: dict[bytes, set[int]] = defaultdict(set)
    for c in range(0x800, sys.maxunicode + 1):
        if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co"):
            found[chr(c).encode()[:2]].add(c)
    return found


@pytest.mark.parametrize("language", [name for name in TEXTS if name not in ("vi", "tr", "yo")])
def test_no_other_script_shares_first_bytes_unless_it_is_said(language: str) -> None:
    script = script_of(language)
    own = {c for first, last in script.blocks for c in range(max(first, 0x800), last + 1)}
    prefixes = {chr(c).encode()[:2] for c in own if not 0xD800 <= c <= 0xDFFF}
    others = {c for prefix in prefixes for c in assigned_by_prefix()[prefix]} - own
    assert bool(others) == bool(script.shared)
    if not script.shared:
        assert all(last < 0x800 or (first % 64 == 0 and last % 64 == 63) for first, last in script.blocks)
    expected = {"my": {"Georgian"}, "ka": {"Myanmar"}, "sat": {"Lepcha"}}
    if language in expected:
        assert set(script.shared) == expected[language]
    elif language not in ("ja", "ko", "zh", "ff-Adlm"):  # they share with punctuation, or with other historic letters
        assert not script.shared


def test_neighbours_in_a_block_of_128_stay_apart() -> None:
    assert script_of("th").blocks == ((0xE00, 0xE7F),)
    assert script_of("lo").blocks == ((0xE80, 0xEFF),)
    assert script_of("bn").blocks == ((0x980, 0x9FF),)
    assert not holds(script_of("el"), "ϣ")  # Coptic, in Greek's block


def test_scripts_by_name() -> None:
    thai = script_of("th")
    for name in ("Thai", "thai", " THAI "):
        assert script_of("en", [name]).blocks == thai.blocks
    assert script_of("en", ["Thai"]).language == "English" and not script_of("en", ["Thai"]).latin
    assert script_of("sr", ["Cyrl", "Latin"]).latin
    assert script_of("ja", ["Jpan"]) == script_of("ja")
    both = script_of("km", ["Khmer", "Thai"])
    assert set(both.blocks) == {*script_of("km").blocks, *thai.blocks} and both.scripts == ("Khmer", "Thai")
    assert script_of("ett", ["Old Italic"]).scripts == ("Old Italic",)


@pytest.mark.parametrize(
    ("language", "said"),
    [
        ("thai", "th (Thai)"),
        ("Japanes", "ja (Japanese)"),
        ("tai", "th (Thai)"),
        ("xx", "'xx' is not supported"),
        ("", "give an ISO 639 code"),
        ("th-", "not supported"),
        ("t\nh", "not supported"),
        ("und", "not supported"),
        ("th-Xxxx", "the script 'Xxxx', which is unknown"),
    ],
)
def test_an_unknown_language_is_refused_with_near_misses(language: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        script_of(language)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [("Tai", "Thai"), ("Cirillic", "Cyrillic"), ("Common", "unknown"), ("Zyyy", "unknown"), ("", "Unicode's name")],
)
def test_an_unknown_script_is_refused_with_near_misses(name: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        script_of("th", [name])
    assert said in str(error.value) and "near it: Common" not in str(error.value)


def test_what_is_no_language_has_no_name() -> None:
    assert [language_name(code) for code in ("EN", "zh-Hant", "xx", "RESPONSE", "")] == [
        "English",
        "Traditional Chinese",
        None,
        None,
        None,
    ]


def test_numerals_are_the_scripts_own() -> None:
    assert script_of("th").numerals == "๐๑๒๓๔๕๖๗๘๙"
    assert set("٠١٢۰۱۲") < set(script_of("ar").numerals)
    assert script_of("he").numerals == ""
