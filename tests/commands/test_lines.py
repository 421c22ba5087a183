"""Lines of a terminal, in scripts with and without spaces."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from transllm_jax.commands.lines import Lines, Plain, units, words
from transllm_jax.progress import plain_console

THAI = "น้ำผึ้งเป็นอาหารที่ผึ้งทำขึ้นจากน้ำหวานของดอกไม้ เก็บได้นานๆ ทั้งในกรุงเทพฯ และที่อื่น"
ARABIC = "مُحَمَّدٌ يقرأ كتابًا جديدًا عن تاريخ مدينة بغداد، وهو سعيد."
HINDI = "क्षत्रिय हिन्दी में लिखते हैं, और मधुमक्खियाँ शहद बनाती हैं।"
KHMER = "ប្រទេសកម្ពុជាមានរាជធានីឈ្មោះភ្នំពេញ ហើយទន្លេមេគង្គហូរកាត់ទីក្រុងនេះ"
JAPANESE = "蜂蜜は、ミツバチが花の蜜から作る「食品」です。きゃっ！"
ENGLISH = "Honey is made by bees. It keeps for years, even in ordinary-looking jars (and cellars)."
TEXTS = {"th": THAI, "ar": ARABIC, "hi": HINDI, "km": KHMER, "ja": JAPANESE, "en": ENGLISH}
DIVIDERS = {"units": (units, 1), "words": (words, 3)}

Divider = tuple[Callable[[str], list[str]], int]


@pytest.fixture(params=DIVIDERS)
def divide(request: pytest.FixtureRequest) -> Divider:
    if request.param == "words":
        pytest.importorskip("icu4py")
    return DIVIDERS[request.param]


def terminal(width: int, **options: object) -> Console:
    return plain_console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, **options)


def printed(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def lines_of(text: str, width: int, divide: Divider, step: int = 5) -> list[str]:
    console = terminal(width)
    lines = Lines(console, divide)
    for start in range(0, len(text), step):
        lines.write(text[start : start + step])
    lines.end()
    *found, last = printed(console).split("\n")
    assert last == ""
    return found


@pytest.mark.parametrize("width", [12, 20, 33])
@pytest.mark.parametrize("name", TEXTS)
def test_lines_fit_and_nothing_is_lost(divide: Divider, name: str, width: int) -> None:
    text = TEXTS[name]
    lines = lines_of(text, width, divide)
    assert max(map(cell_len, lines)) <= width and len(lines) > 1
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    # No line begins with a mark that belongs to the letter before it, and all letters are whole.
    whole = regex.findall(r"\X", text.replace(" ", ""))
    assert [letter for line in lines for letter in regex.findall(r"\X", line.replace(" ", ""))] == whole
    if divide[0] is units or name != "km":
        # How the text came makes no difference. (In Khmer, ICU makes short words of the beginning of a long one.)
        assert lines == lines_of(text, width, divide, 1) == lines_of(text, width, divide, 1000)
    if divide[0] is units:
        # Lines are filled: the first word of a line, and a space, have no room in the one before.
        for before, after in pairwise(lines):
            assert cell_len(before) + cell_len(units(after)[0].rstrip()) + 1 > width


def test_where_lines_of_thai_end() -> None:
    # rich alone would begin a line with the vowel of น้ำ, which takes a column of its own.
    assert units("น้ำเปล่าๆ กรุงเทพฯ") == ["น้ำ", "เป", "ล่าๆ ", "ก", "รุ", "ง", "เท", "พฯ"]
    assert units("(ดี) a b") == ["(ดี) ", "a ", "b"]
    assert units("क्षत्रिय हिन्दी") == ["क्षत्रिय ", "हिन्दी"]
    assert units("蜜。「食」") == ["蜜。", "「食」"]


def test_words_are_whole_where_icu_is_installed() -> None:
    pytest.importorskip("icu4py")
    text = "สวัสดีครับ ผมเกิดที่กรุงเทพมหานครและเรียนที่มหาวิทยาลัย"
    first = ["สวัสดีครับ ผมเกิดที่", "กรุงเทพมหานคร"]
    assert lines_of(text, 14, (words, 3)) == [*first, "และเรียนที่", "มหาวิทยาลัย"]
    assert lines_of(text, 14, (units, 1)) == [*first, "และเรียนที่มหาวิท", "ยาลัย"]


def test_line_breaks_indents_and_long_words_are_kept(divide: Divider) -> None:
    assert lines_of("a  b\n\n  def f():\r\n\treturn 1", 20, divide, 1) == ["a  b", "", "  def f():", "    return 1"]
    assert lines_of("see " + "x" * 25 + " ok", 10, divide) == ["see", "x" * 10, "x" * 10, "xxxxx ok"]
    assert lines_of("ก็" * 25, 10, divide)[0] == "ก็" * 10


def test_what_could_do_harm_in_a_terminal_is_replaced(divide: Divider) -> None:
    assert lines_of("a\x1b[2J\x07b\x9b1m [b]x[/b] :dog:", 60, divide) == ["a\ufffd[2J\ufffdb\ufffd1m [b]x[/b] :dog:"]
    # Nothing happens to it in a file.
    console = plain_console(file=io.StringIO(), width=5)
    Plain(console).write("a\tb\x07 long line [b]")
    assert printed(console) == "a\tb\x07 long line [b]"


def test_a_sign_is_there_until_the_first_text_comes() -> None:
    console = terminal(20)
    lines = Lines(console, (units, 1))
    lines.wait()
    assert printed(console) == "…"
    lines.write("dog")  # may be the beginning of "dogs"
    assert printed(console) == "…"
    lines.write(" and")
    assert printed(console) == "…\r\x1b[2Kdog"


@given(st.lists(st.text(alphabet=st.sampled_from(THAI + ARABIC + "\n\u200d👨👩🇹🇭e\u0301漢 \u200b"), max_size=12)))
def test_any_text_comes_out_whole(pieces: list[str]) -> None:
    console = terminal(7)
    lines = Lines(console, (units, 1))
    for piece in pieces:
        lines.write(piece)
    lines.end()
    found = printed(console)
    assert found.replace("\n", "").replace(" ", "") == "".join(pieces).replace("\n", "").replace(" ", "")
