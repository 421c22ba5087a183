"""Answers cut into sentences: what is translated, what is copied, and what a translation may not lose."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transllm_jax.generation.pieces import cut, join, lost

ALL = ("code", "urls", "numbers", "markup")


def sentences(text: str) -> list[str]:
    return [piece.text for piece in cut(text) if piece.translate]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. Smith met J. R. Tolkien in St. Paul.", ["Dr. Smith met J. R. Tolkien in St. Paul."]),
        ("He paid $3.50, i.e. little. She left.", ["He paid $3.50, i.e. little.", "She left."]),
        ("See No. 5 and fig. 2. No. It is not.", ["See No. 5 and fig. 2.", "No.", "It is not."]),
        ("So did I. Then we went.", ["So did I.", "Then we went."]),
        ("In the U.S. it rains. In 2010. Often", ["In the U.S. it rains.", "In 2010.", "Often"]),
        ('"Is it?" he asked. "Yes!" She left.', ['"Is it?" he asked.', '"Yes!"', "She left."]),
        ("Wait... what? And so on… Then it ended.", ["Wait... what?", "And so on…", "Then it ended."]),
        ("Version 2.0.1 is at https://a.b/c.d. Use it.", ["Version 2.0.1 is at https://a.b/c.d.", "Use it."]),
        ("Call `a. B` first. Then stop.", ["Call `a. B` first.", "Then stop."]),
        # Lines, and what stands before them.
        ("# A title\n\n1. First. Second.\n   - third\n> quoted", ["A title", "First.", "Second.", "third", "quoted"]),
        ("a) Red\n• Blue\n- [x] Done", ["Red", "Blue", "Done"]),
        ("**Step 1:** Mix. **Bake** it now!", ["Step 1:", "Mix.", "**Bake** it now!"]),
        ("**Title**\n**Cost** - It is low.", ["Title", "Cost", "It is low."]),
        ("| Name | Age |\n|---|---:|\n| Bob | He is 3. Or 4. |", ["Name", "Age", "Bob", "He is 3.", "Or 4."]),
        # Nothing to translate.
        ("42 + 1 = 43\n---\nhttps://a.b/c\n`x = 1`", []),
        ("Before.\n```python\n# A comment. More.\n```\nAfter.", ["Before.", "After."]),
        ("Before.\n~~~\nnever closed. ```\nStill.", ["Before."]),
        ("$$\nx = a. B\n$$\nSo.\n\\[ a = B. C \\]\nEnd.", ["So.", "End."]),
        # Code and addresses after a colon.
        ("Run this: `pip install x`.", ["Run this:"]),
        ("Write to: a.b@c.org", ["Write to:"]),
        ("Run `x` and wait.", ["Run `x` and wait."]),
        ("", []),
        (" \n\t\n", []),
    ],
)
def test_the_sentences_of_a_text(text: str, wanted: list[str]) -> None:
    assert sentences(text) == wanted
    assert "".join(piece.text for piece in cut(text)) == text


@given(st.text(alphabet=st.sampled_from('aA1. \n!`*|#-:$\\[]()">~_ก่é\u2028\r')))
def test_the_pieces_are_the_text(text: str) -> None:
    pieces = cut(text)
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text for piece in pieces)
    assert all(any(map(str.isalpha, piece.text)) for piece in pieces if piece.translate)
    assert join(pieces, sentences(text)) == "".join(
        " ".join(piece.text.split()) if piece.translate else piece.text for piece in pieces
    )


ANSWER = """Use **two** tools. They are free.

1. **First tool:** It costs $0.
2. Second tool

```sh
run me. Now
```
More at: https://a.b"""


def test_a_text_is_put_together_as_it_was() -> None:
    pieces = cut(ANSWER)
    made = [f"<{text}>" for text in sentences(ANSWER)]
    assert join(pieces, made) == (
        "<Use **two** tools.> <They are free.>\n\n1. **<First tool:>** <It costs $0.>\n2. <Second tool>\n\n"
        "```sh\nrun me. Now\n```\n<More at:> https://a.b"
    )
    # A translation is one line; and Chinese has no space between sentences.
    made[:2] = ["一\n二。", " 三。 "]
    assert join(pieces, made, "").startswith("一 二。三。\n\n1. **<First tool:>** <It costs $0.>")


@pytest.mark.parametrize(
    ("source", "translation", "wanted"),
    [
        ("Pay 1,500 for it.", "จ่าย ๑.๕๐๐", []),
        ("Pay 1,500 for 2.", "จ่าย 1500 2", []),
        ("Pay 1,500 for 2.", "จ่าย 1500 3", ["2"]),
        ("2 and 2", "2", ["2"]),
        ("two", "2", []),
        ("Run `x = 1` now", "รัน `x = 1`", []),
        ("Run `x = 1` now", "รัน `x = 2` 1", ["`x = 1`"]),
        ("See https://a.b/c, or x@y.org.", "ดู https://a.b/c x@y.org", []),
        ("See https://a.b/c.", "ดู https://a.b/", ["https://a.b/c"]),
        ("A **red** car", "รถ **แดง**", []),
        ("A **red** car", "รถ **แดง", ["**"]),
        ("A red car", "รถ **แดง**", ["**"]),
    ],
)
def test_what_a_translation_lost(source: str, translation: str, wanted: list[str]) -> None:
    assert lost(source, translation, ALL) == wanted
    assert lost(source, translation, ()) == []
