"""Why one document, pair or conversation is left out of training.

Everything here looks at one item at a time, so worker processes can do it. Finding duplicates needs all items: see
`transllm_jax.data.clean.near_duplicates`, which compares what `text_of` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from transllm_jax.data.clean.contamination import EvaluationTexts, categories
from transllm_jax.data.clean.near_duplicates import code_points
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chat import Message
from transllm_jax.tokenizer.scripts import script_of

# Below this share of letters of the language's scripts, a text is certainly not in it; above the other, it is the wrong
# side of a pair.
NO_SCRIPT_SHARE, LEAST_SWAPPED_SHARE = 0.01, 0.7
# The pairs of a file whose two sides are told apart by their letters.
COMPARED = 200

# A document; a pair (English, target); a conversation.
Item = str | tuple[str, str] | Sequence[Message]
Reason = Literal["too short", "too long", "other script", "contaminated"]


@dataclass(frozen=True)
class Rules:
    """Limits that an item must keep. Plain values: they are part of a cache key.

    min_characters, max_characters: code points, without white space at either end; None is no limit. scripts: Unicode's
    names (`Thai`) or codes. min_script_share: 0 to 1, the share of letters and marks that must be of these scripts; 0
    accepts any text. Raises UserError for limits that no text can keep and for an unknown script.
    """

    min_characters: int = 0
    max_characters: int | None = None
    scripts: tuple[str, ...] = ()
    min_script_share: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scripts", tuple(self.scripts))  # a list, where read from JSON
        faults = []
        if self.min_characters < 0:
            faults.append(f"min_characters is {self.min_characters}: it must be at least 0")
        if self.max_characters is not None and self.max_characters < max(1, self.min_characters):
            faults.append(f"max_characters is {self.max_characters}: it must be at least 1 and min_characters")
        if not 0 <= self.min_script_share <= 1:
            faults.append(f"min_script_share is {self.min_script_share}: it must be from 0 to 1")
        if self.min_script_share > 0 and not self.scripts:
            faults.append("min_script_share is set but scripts is empty: name the scripts, such as Thai")
        for name in self.scripts:
            try:
                _points(name)
            except UserError as error:
                faults.append(str(error))
        if faults:
            raise UserError("; ".join(faults))


def reason(item: Item, rules: Rules, evaluation: EvaluationTexts | None = None) -> Reason | None:
    """Why an item of any kind is left out: the first reason that applies, or None. See the function of each kind."""
    if isinstance(item, str):
        return text_reason(item, rules, evaluation)
    if isinstance(item, tuple):
        return pair_reason(item, rules, evaluation)
    return conversation_reason(item, rules, evaluation)


def text_reason(text: str, rules: Rules, evaluation: EvaluationTexts | None = None) -> Reason | None:
    """Why a document is left out, judged by its whole text."""
    return _length(text, rules) or _script(text, rules) or _contamination(text, evaluation)


def pair_reason(pair: tuple[str, str], rules: Rules, evaluation: EvaluationTexts | None = None) -> Reason | None:
    """Why a pair (English, target) is left out: length of each side, script of the target, contamination of both."""
    english, target = pair
    lengths = _length(english, rules) or _length(target, rules)
    return lengths or _script(target, rules) or _contamination(text_of(pair), evaluation)


def conversation_reason(
    messages: Sequence[Message], rules: Rules, evaluation: EvaluationTexts | None = None
) -> Reason | None:
    """Why a conversation is left out, judged by all its contents together; not by script, as it is often English."""
    text = text_of(messages)
    return _length(text, rules) or _contamination(text, evaluation)


def text_of(item: Item) -> str:
    """The whole text of an item, by which duplicates are found: both sides, or all contents, one per line."""
    if isinstance(item, str):
        return item
    if isinstance(item, tuple):
        return "\n".join(item)
    return "\n".join(message["content"] for message in item)


def script_share(text: str, scripts: tuple[str, ...]) -> float:
    """The share of a text's letters and marks that are of one of the scripts, 0 to 1; 0 if it has none."""
    _, outside, inside = np.bincount(_kinds(scripts)[code_points(text)], minlength=3).tolist()
    return inside / (inside + outside) if inside else 0.0


def refuse_swapped(path: str, pairs: Sequence[tuple[str, str]], language: str, scripts: Sequence[str]) -> None:
    """Raises UserError for a file of pairs whose English is in the target language, and the other way round.

    pairs: the first `COMPARED` of them are looked at. language, scripts: as in `script_of`, the target's.
    """
    names, compared = script_of(language, scripts).scripts, pairs[:COMPARED]
    english, target = (script_share("\n".join(pair[side] for pair in compared), names) for side in (0, 1))
    if target < NO_SCRIPT_SHARE and english > LEAST_SWAPPED_SHARE:
        raise UserError(f"{path}: its columns are swapped: write English<TAB>{language}; the first is {language} here")


def _length(text: str, rules: Rules) -> Reason | None:
    characters = len(text.strip())
    if characters < rules.min_characters:
        return "too short"
    if rules.max_characters is not None and characters > rules.max_characters:
        return "too long"
    return None


def _script(text: str, rules: Rules) -> Reason | None:
    if rules.min_script_share > 0 and script_share(text, rules.scripts) < rules.min_script_share:
        return "other script"
    return None


def _contamination(text: str, evaluation: EvaluationTexts | None) -> Reason | None:
    return "contaminated" if evaluation is not None and evaluation.found_in(text) is not None else None


@cache
def _points(script: str) -> np.ndarray:
    """The code points of a script, int64 [n]. Raises UserError for an unknown name."""
    blocks = script_of("en", [script]).blocks  # the script decides, not the language
    return np.concatenate([np.arange(first, last + 1) for first, last in blocks])


@cache
def _kinds(scripts: tuple[str, ...]) -> np.ndarray:
    """Kind of each code point: 0 neither letter nor mark, 1 of another script, 2 of one of these; uint8 [0x110000]."""
    inside = np.zeros(len(categories()), bool)
    for script in scripts:  # one by one: together with Latin the marks of the others would be missing
        inside[_points(script)] = True
    letter = np.isin(categories(), np.frombuffer(b"LM", np.uint8))
    return np.where(letter, 1 + inside, 0).astype(np.uint8)
