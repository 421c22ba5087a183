"""Recognises the line of column names that a table of pairs may begin with."""

from __future__ import annotations

import re

from transllm_jax.tokenizer.scripts import is_language_name, language_name

# Names of a column of English text, and of a column of its translations; words of either.
_ENGLISH = {"english", "en", "eng", "source", "src", "input"}
_TARGET = {"target", "tgt", "trg", "translation", "translated", "output"}
_MORE = {"text", "texts", "sentence", "sentences", "segment", "segments", "lang", "language"}


def is_header(one: str, other: str) -> bool:
    """Whether a first line holds the names of its two columns: `source` and `target`, `en` and `th_TH`, `English` and
    `Thai`, possibly with words such as `text`. Either column may be the English one."""
    return {_kind(one), _kind(other)} == {"english", "target"}


def _kind(name: str) -> str | None:
    words = [word for word in re.split(r"[\s_.:()\[\]#-]+", name.strip().casefold()) if word]
    known = [word for word in words if word not in _MORE]
    if not 0 < len(known) <= 2 or len(words) > 3:
        return None
    if known[0] in _ENGLISH:  # en, en-US, eng_Latn, source_text
        return "english" if len(known) == 1 or re.fullmatch("[a-z]{2}|[a-z]{4}", known[1]) else None
    if known[0] in _TARGET and len(known) == 1:
        return "target"
    return "target" if _is_language(" ".join(known)) else None


def _is_language(words: str) -> bool:
    """A language's code or tag, or its name in English."""
    return is_language_name(words) or language_name(words.replace(" ", "-")) is not None
