"""Which bases can be expanded, and runs of the target script in the text of a byte-level base.

The pre-tokenizer of an expanded byte-level BPE tokenizer keeps these runs whole. The usual patterns cut a Thai word at
every vowel sign and tone mark (`\\p{L}+` does not match `\\p{M}`), and a merge cannot cross a cut. So runs of the
script, with a space before, are isolated first; the text between them is then cut exactly as the base cuts it alone.
Text without the script has no runs and keeps its cuts, and so its ids. A joiner (U+200C, U+200D), which also occurs in
emoji, is part of a run only between two of the script's characters.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.icu_words import Span
from transllm_jax.tokenizer.scripts import Script

# The pattern of `ByteLevel(use_regex=True)`, GPT-2's.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _steps(state: dict[str, Any]) -> list[dict[str, Any]]:
    step = state["pre_tokenizer"]
    if step is None:
        return []
    return list(step["pretokenizers"]) if step["type"] == "Sequence" else [step]


def check_supported(state: dict[str, Any], source: str) -> None:
    """Raises UserError unless `state`, a parsed tokenizer.json, is a BPE tokenizer that can be expanded."""
    kind_of(state, source)


def kind_of(state: dict[str, Any], source: str) -> str:
    """Which kind of BPE tokenizer `state`, a parsed tokenizer.json, is: "byte-level" or "sentencepiece".

    Raises UserError if it cannot be expanded.
    """
    model, steps = state["model"], _steps(state)
    if model["type"] != "BPE":
        raise UserError(f"{source} is a {model['type']} tokenizer: only BPE bases can be expanded; choose one")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UserError(f"{source} uses the BPE option {option}={model[option]!r}: expansion does not support it")
    if steps and steps[-1]["type"] == "ByteLevel":
        _check_byte_level(state, source)
        return "byte-level"
    _check_sentencepiece(state, source)
    return "sentencepiece"


def _check_byte_level(state: dict[str, Any], source: str) -> None:
    steps = _steps(state)
    if steps[-1].get("add_prefix_space"):
        raise UserError(f"{source} uses ByteLevel with add_prefix_space=true: expansion does not support it")
    for step in steps[:-1]:
        known = step["type"] == "Digits" or (
            step["type"] == "Split"
            and "Regex" in step["pattern"]
            and step["behavior"] == "Isolated"
            and not step["invert"]
        )
        if not known:
            raise UserError(f"{source} has the pre-tokenizer step {json.dumps(step)}: expansion does not support it")


_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREFIX = {"type": "Prepend", "prepend": "▁"}


def _check_sentencepiece(state: dict[str, Any], source: str) -> None:
    """Raises UserError unless a normalizer or Metaspace writes "▁" for spaces, and nothing else changes the text."""
    if not state["model"].get("byte_fallback"):
        raise UserError(
            f"{source} is neither a byte-level BPE tokenizer nor a SentencePiece one with byte_fallback: "
            f"expansion does not support it; choose another base"
        )
    normalizer, pre = state["normalizer"], state["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if pre is not None and (pre["type"] != "Metaspace" or pre.get("split", True) or pre["replacement"] != "▁"):
        raise UserError(
            f"{source}, a SentencePiece tokenizer, has the pre-tokenizer {json.dumps(pre)}: "
            "expansion does not support it"
        )
    if steps not in ([], [_SPACES], [_PREFIX, _SPACES]) or (pre is None) == (not steps):
        raise UserError(
            f"{source}, a SentencePiece tokenizer, has the normalizer {json.dumps(normalizer, ensure_ascii=False)} "
            f"and the pre-tokenizer {json.dumps(pre)}: expansion does not support them"
        )


def keep_runs_whole(state: dict[str, Any], script: Script) -> dict[str, Any]:
    """The pre-tokenizer of `state`, a parsed tokenizer.json, changed so that runs of `script` stay whole.

    A `Digits` step stays in front: if it splits the base's digits one by one, it does so with the script's own digits.
    """
    run = f" ?{script.stretch()}"

    def split(pattern: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    steps: list[dict[str, Any]] = []
    isolated = False
    for step in _steps(state):
        cuts = step["type"] == "Split" or (step["type"] == "ByteLevel" and step["use_regex"])
        if step["type"] != "Digits" and not isolated:
            steps.append(split(run))
            isolated = True
        if cuts:  # the runs are isolated already; as the first alternative each is matched whole and so not cut
            steps.append(split(f"{run}|{step['pattern']['Regex'] if step['type'] == 'Split' else GPT2_PATTERN}"))
        if step["type"] == "ByteLevel":
            steps.append({**step, "use_regex": False})
        elif step["type"] != "Split":
            steps.append(step)
    return {"type": "Sequence", "pretokenizers": steps}


class RunFinder:
    """Finds the runs of the target script in a text as the expanded tokenizer isolates them, with a space before."""

    def __init__(self, state: dict[str, Any], script: Script) -> None:
        """`state` is the base's parsed tokenizer.json."""
        inside, numerals = script.character_class, script.numerals
        pattern = f" ?{script.stretch()}"
        for step in _steps(state):
            if step["type"] == "Digits" and numerals:  # digits are cut off first, all of them or one by one
                many = "" if step["individual_digits"] else "+"
                pattern = f"[{numerals}]{many}| ?" + script.stretch(f"(?:(?![{numerals}])[{inside}])")
        self._pattern = re.compile(pattern)
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
        self._normalizer = backend.normalizer

    def find(self, text: str) -> tuple[str, list[Span]]:
        """The text, normalised if the base normalises, and where its runs begin and end, in order."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        return text, [match.span() for match in self._pattern.finditer(text)]

    def learnable(self, text: str) -> bool:
        """Whether new tokens may hold this: always, as a run has only the script's characters."""
        return True


class WordFinder:
    """Finds the words with characters of a script in a text as the base's own pre-tokenizer cuts them."""

    def __init__(self, state: dict[str, Any], script: Script) -> None:
        """`state` is the base's parsed tokenizer.json."""
        self._letter = re.compile(f"[{script.character_class}]")
        # For English's own script anything may be learned; for another, nothing that occurs in text without it.
        self._learnable = None if script.latin else re.compile(f" | ?[{script.character_class}]+")
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
        self._normalizer, self._pre_tokenizer = backend.normalizer, backend.pre_tokenizer

    def find(self, text: str) -> tuple[str, list[Span]]:
        """The text, normalised if the base normalises, and where its words begin and end, in order."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        spans = (span for _, span in self._pre_tokenizer.pre_tokenize_str(text))
        return text, [(first, last) for first, last in spans if self._letter.search(text, first, last)]

    def learnable(self, text: str) -> bool:
        """Whether new tokens may hold this stretch of a word."""
        return self._learnable is None or self._learnable.fullmatch(text) is not None
