"""What a judge's reply says: a rating or a choice, or nothing that could be relied on.

A judge is asked for its verdict in brackets, `[[7]]` or `[[A]]`. A reply with two different verdicts says nothing:
which of them is meant would be a guess. Nor does a rating that is not on the scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, TypeVar

T = TypeVar("T")

# The scale of ratings.
LOWEST, HIGHEST = 1.0, 10.0

# Which of two answers is better, in the order in which the judge saw them; C is a tie.
Choice = Literal["A", "B", "C"]
CHOICES: tuple[Choice, ...] = ("A", "B", "C")

# Digits of any script: a judge that answers in Thai may write them.
_NUMBER = r"[ \t]*([+-]?\d+(?:[.,]\d{1,2})?)[ \t]*"
_DOUBLE = re.compile(rf"\[\[{_NUMBER}\]\]")
_ANY_DOUBLE = re.compile(r"\[\[(.*?)\]\]")
# In single brackets only at the end of a line, where a verdict is and a citation such as "see [1] for more" is not.
_SINGLE = re.compile(rf"(?<!\[)\[{_NUMBER}\](?!\])[\s.!*_`\"'”’。]*$", re.MULTILINE)
_CHOICE = re.compile(r"\[\[([ABC])\]\]")


def rating_of(reply: str, *, single_brackets: bool = True) -> float | None:
    """The rating in a judge's reply, 1 to 10; None if there is none, or more than one, or one out of the scale.

    `[[n]]` counts, and where a reply has none of these, `[n]` at the end of a line, as FastChat reads it (there: in any
    place, and the first one of several). single_brackets: False for the preset `transllm-as-published`, which knows
    only double ones.
    """
    form = _DOUBLE if _ANY_DOUBLE.search(reply) or not single_brackets else _SINGLE
    found = form.findall(reply)
    value = _only({float(text.replace(",", ".")) for text in found})
    return value if value is not None and LOWEST <= value <= HIGHEST else None


def choice_of(reply: str) -> Choice | None:
    """Which answer a judge's reply prefers; None if it says nothing, or two different things."""
    found = _only(set(_CHOICE.findall(reply)))
    return next((choice for choice in CHOICES if choice == found), None)


def _only(values: Iterable[T]) -> T | None:
    """The only value; None if there is none or more than one."""
    found = [*values]
    return found[0] if len(found) == 1 else None
