"""Stage 1's tokenizer: a base tokenizer with new tokens for the target language and the chain's markers.

Guaranteed, and tested: ids of the base never change; text without characters of the target script keeps its ids;
decoding gives the text back; a marker is one id; the same corpus gives the same files. (English has the letters of a
language in Latin script, so there its ids may change. The report counts the texts that change.)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from transllm_jax.choices import Cuts
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.encoded import WORD_END
from transllm_jax.tokenizer.growing.growth import (
    base_ids_of_token,
    byte_level_growth,
    check_markers,
    piece_growth,
    with_base_tokens,
)
from transllm_jax.tokenizer.growing.icu_words import Span, WordCutter
from transllm_jax.tokenizer.growing.prune import OnProgress
from transllm_jax.tokenizer.growing.runs import kind_of
from transllm_jax.tokenizer.llama_cpp import REBUILT, passes_for, readers, stand_in
from transllm_jax.tokenizer.scripts import language_name, script_of
from transllm_jax.tokenizer.sentencepiece_model import unused, write_model
from transllm_jax.tokenizer.tokenizer import Tokenizer

_REPORTED_CHARACTERS = 2_000_000  # about this much of the corpus is used to measure tokens per character
_BATCH = 200  # documents that are encoded at a time
_RUNS = 1_000_000  # runs that are counted at a time


@dataclass(frozen=True)
class Expansion:
    """An expanded tokenizer, and what is needed to initialise its new rows.

    tokenizer   ids of the base unchanged, then `new_tokens`
    new_tokens  the new pieces as readable text, then the markers, in the order of their ids
    pieces      for each new token, in the same order, the base's ids of the text that it replaces (for a marker: of a
                word that describes it); never empty
    report      numbers for people and for report.json
    build       makes the tokenizer of the first n new pieces; see `at`
    """

    tokenizer: Tokenizer
    new_tokens: list[str]
    pieces: list[list[int]]
    report: dict[str, Any]
    build: Callable[[int], Tokenizer] = field(repr=False, compare=False)

    def at(self, size: int) -> Tokenizer:
        """The tokenizer with only the first `size` new pieces by rank, followed by the markers.

        Raises UserError if there are fewer.
        """
        if not 0 <= size <= self.report["new_tokens"]:
            raise UserError(f"size {size} is not one of 0 to {self.report['new_tokens']}, the new tokens there are")
        return self.build(size)


def expand(
    base: Tokenizer,
    documents: Iterable[str],
    *,
    size: int,
    language: str = "th",
    markers: list[str],
    min_count: int = 2,
    first_id: int | None = None,
    cuts: Cuts | None = None,
    within_words: bool = False,
    english: Iterable[str] | None = None,
    scripts: list[str] | None = None,
    on_progress: OnProgress | None = None,
) -> Expansion:
    """Adds the markers and exactly `size` tokens learned from `documents` to a BPE tokenizer of either kind.

    size: new pieces, without markers. min_count: each new piece occurs at least this often in the encoded corpus
    (except parts of characters). `documents` is read once; only the distinct runs of the script and their counts are
    kept. first_id: where the new ids begin, after the rows of an embedding that is larger than the tokenizer; ids in
    between are unused. cuts: by default "base" for a Latin script and for models for which transformers makes the
    base's cuts whatever tokenizer.json says (`llama_cpp.REBUILT`), else "whole"; a SentencePiece base has no cuts.
    within_words: no token is learned across the end of a word, as ICU finds them; the new tokenizer needs no ICU.
    english: the report says how many of these texts change their ids. scripts: names of scripts to use instead of the
    language's usual ones. on_progress: called with a phase and the share of it that is done. Raises UserError for a
    base of another kind, an unknown language, a corpus without the script or one that supports fewer tokens, a marker
    that the base has already, and for `within_words` without icu4py.
    """
    script = script_of(language, scripts or ())
    state: dict[str, Any] = json.loads(base.backend.to_str())
    kind = kind_of(state, base.source)
    check_markers(base, markers)
    if size < 1 or min_count < 1:
        raise UserError(f"size={size} and min_count={min_count}: both must be at least 1")
    progress = on_progress or (lambda _phase, _share: None)
    whole_words = script.latin if kind == "sentencepiece" else cuts == "base"
    if cuts is None and kind == "byte-level":
        whole_words = script.latin or base.model_type in REBUILT
    full_state = with_base_tokens(state, base.source, first_id)
    make_growth = byte_level_growth if kind == "byte-level" else piece_growth
    growth = make_growth(state, full_state, script, whole_words, markers)

    cutter = WordCutter(language) if within_words else None
    runs, sample, sampled = _count_runs(documents, growth.find, cutter, progress)
    if not runs:
        raise UserError(f"the corpus has no {script.language} characters: give {script.language} text")
    learned = growth.learn(runs, size, min_count, progress)

    def build(n: int) -> Tokenizer:
        grown = growth.state(learned.choice, n)
        _add_markers(grown, markers)
        tokenizer = _tokenizer(grown, base, f"{base.source}+{language}")
        _check_apart(tokenizer, markers)
        return tokenizer

    tokenizer = build(size)
    expanded: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    progress("report", 0.0)
    names = [growth.name(token) for token in learned.choice.tokens]
    by_count = sorted(range(size), key=lambda i: -learned.counts[i])
    report = {
        "language": language,
        "kind": kind,
        "markers": list(markers),
        "base_vocabulary": base.vocab_size,
        "vocabulary": tokenizer.vocab_size,
        "first_new_id": tokenizer.vocab_size - size - len(markers),
        "new_tokens": size,
        "min_count": min_count,
        "cuts": "none" if kind == "sentencepiece" else "base" if whole_words else "whole",
        "within_words": within_words,
        "icu": None if cutter is None else cutter.version,
        "parts_of_characters": growth.character_parts(learned.choice),
        "model_type": base.model_type,
        "readers": readers(expanded, base.model_type),
        "llama_cpp_stand_in": stand_in(expanded),
        "passes_for_base": passes_for(base, tokenizer) if kind == "byte-level" else None,
        "never_produced": sum(n == 0 for n in learned.counts),
        "produced_less_than_min_count": sum(n < min_count for n in learned.counts),
        "produced_less_than_10": sum(n < 10 for n in learned.counts),
        "tokens_per_character_before": tokens_per_character(base, sample),
        "tokens_per_character_after": tokens_per_character(tokenizer, sample),
        # With the first half of the new tokens: what the second half saves says what more tokens would.
        "tokens_per_character_half": tokens_per_character(build(size // 2), sample),
        "measured_on_characters": sampled,
        "english_changed": None if english is None else changed(base, tokenizer, english),
        "most_frequent": [{"token": names[i], "count": learned.counts[i]} for i in by_count[:50]],
        "least_frequent": [{"token": names[i], "count": learned.counts[i]} for i in by_count[-20:]],
        "longest": sorted(names, key=lambda name: (-len(name), name))[:20],
    }
    pieces = growth.base_ids(base, learned.choice) + [_described(base, kind, m) for m in markers]
    progress("report", 1.0)
    return Expansion(tokenizer, names + list(markers), pieces, report, build)


def expansion_of(base: Tokenizer, expanded: Tokenizer, markers: Iterable[str], *, first_id: int) -> Expansion:
    """The expansion for a tokenizer that `expand` has expanded before; markers that it lacks are added.

    first_id: where its new ids must begin. `pieces` has the base's ids of each new token's text; for a part of a
    character, of its bytes. Raises UserError if the tokenizer was not expanded from this base, or if its new ids are
    not all from `first_id` on.
    """
    for number in sorted(base.backend.get_vocab(with_added_tokens=True).values()):
        if base.token(number) != expanded.token(number):
            raise UserError(
                f"{expanded.source} was not expanded from {base.source}: token {number} is {expanded.token(number)!r}, "
                f"but {base.token(number)!r} in the base"
            )
    vocabulary = expanded.backend.get_vocab(with_added_tokens=True)
    last = max(vocabulary.values())
    numbers = range(first_id, last + 1)
    early = [number for token, number in vocabulary.items() if base.token(number) is None and number < first_id]
    if any(expanded.token(number) != unused(number) for number in early):
        raise UserError(
            f"{expanded.source} has new ids from {min(early)} on, and the model's embedding has {first_id} rows: "
            "expand the tokenizer from the model's directory, whose config says how many rows there are"
        )
    missing = [number for number in numbers if expanded.token(number) is None]
    if missing or not numbers:
        raise UserError(f"{expanded.source} has no token {missing[0] if missing else first_id}; expand it again")
    markers = list(markers)
    tokens = {number: str(expanded.token(number)) for number in numbers}
    specials = {number for number in numbers if tokens[number] in expanded.special_tokens}
    kind = kind_of(json.loads(base.backend.to_str()), base.source)
    pieces = [
        _described(base, kind, tokens[number]) if number in specials else base_ids_of_token(base, kind, tokens[number])
        for number in numbers
    ]
    names = list(tokens.values())
    tokenizer, missing_markers = expanded, [marker for marker in markers if expanded.token_id(marker) is None]
    if missing_markers:
        tokenizer, marker_pieces = with_markers(expanded, missing_markers)
        names, pieces = names + missing_markers, pieces + marker_pieces
    report = {
        "kind": kind,
        "markers": markers,
        "base_vocabulary": base.vocab_size,
        "vocabulary": tokenizer.vocab_size,
        "first_new_id": first_id,
        "new_tokens": len(names) - len(markers),
        "model_type": base.model_type,
        "readers": readers(json.loads(tokenizer.backend.to_str()), base.model_type),
    }

    def build(size: int) -> Tokenizer:
        raise ValueError(f"{expanded.source} exists in one size only, not with {size} tokens")

    return Expansion(tokenizer, names, pieces, report, build)


def with_markers(
    tokenizer: Tokenizer, markers: Iterable[str], *, first_id: int | None = None
) -> tuple[Tokenizer, list[list[int]]]:
    """A tokenizer with markers added after its last id, and for each marker the ids of a word that describes it.

    first_id: the first marker's id, if that is not the next one; ids in between are unused. Raises UserError for a
    marker that the tokenizer has already, and for ids with gaps.
    """
    markers = list(markers)
    check_markers(tokenizer, markers)
    base: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    state = with_base_tokens(base, tokenizer.source, first_id)
    _add_markers(state, markers)
    kind = "byte-level" if not base["model"].get("byte_fallback") else "sentencepiece"
    words = [_described(tokenizer, kind, marker) for marker in markers]
    return _tokenizer(state, tokenizer, tokenizer.source), words


def save_expanded(tokenizer: Tokenizer, base: str | Path, directory: str | Path) -> list[str]:
    """Writes an expanded tokenizer's files to `directory`; returns which of tokenizer.json and tokenizer.model.

    base: the directory of the tokenizer that was expanded. If it has a tokenizer.model, one is written too. It agrees
    with the new tokenizer.json on all texts on which the base's two files agree (transformers 5 writes a tokenizer.json
    that puts no "▁" before a text that begins with a space; SentencePiece puts one). SentencePiece parses no special
    tokens, like `Tokenizer.encode(text, specials=False)`. Raises UserError if the base's two files disagree.
    """
    tokenizer.save(directory)
    model = Path(base) / "tokenizer.model"
    if not model.is_file() or not json.loads(tokenizer.backend.to_str())["model"].get("byte_fallback"):
        return ["tokenizer.json"]
    write_model(model, tokenizer, Path(directory) / "tokenizer.model")
    return ["tokenizer.json", "tokenizer.model"]


def tokens_per_character(tokenizer: Tokenizer, documents: Iterable[str]) -> float:
    """Tokens per Unicode character over all documents. Raises UserError if they have no characters."""
    texts = list(documents)
    characters = sum(map(len, texts))
    if not characters:
        raise UserError("no text to measure tokens per character on: give non-empty documents")
    parts = (texts[first : first + _BATCH] for first in range(0, len(texts), _BATCH))
    return sum(len(ids) for part in parts for ids in tokenizer.encode_batch(part)) / characters


def changed(base: Tokenizer, tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
    """How many of the texts have other ids in `tokenizer` than in `base`, as {"changed", "texts", "more_tokens"}.

    more_tokens: by how many tokens all texts together became longer, or shorter if negative. Special tokens that a text
    spells are ordinary text.
    """
    texts = list(texts)
    different = more = 0
    for first in range(0, len(texts), _BATCH):
        some = texts[first : first + _BATCH]
        before, after = (t.encode_batch(some, specials=False) for t in (base, tokenizer))
        different += sum(a != b for a, b in zip(before, after, strict=True))
        more += sum(map(len, after)) - sum(map(len, before))
    return {"changed": different, "texts": len(texts), "more_tokens": more}


def _count_runs(
    documents: Iterable[str],
    find: Callable[[str], tuple[str, list[Span]]],
    cutter: WordCutter | None,
    on_progress: OnProgress,
) -> tuple[Counter[str], list[str], int]:
    """The distinct runs with their counts, a sample of the documents, and the characters in the sample.

    cutter: puts WORD_END between the words of a run; None to leave runs whole.
    """
    total = len(documents) if isinstance(documents, Sized) else 0
    runs: Counter[str] = Counter()
    sample: list[str] = []
    sampled = 0
    found: list[str] = []
    for number, document in enumerate(documents, start=1):
        text, spans = find(document)
        if cutter is None:
            found += [text[first:last] for first, last in spans]
        else:
            found += [WORD_END.join(words) for words in cutter.cut(text, spans)]
        if sampled < _REPORTED_CHARACTERS:
            sample.append(document)
            sampled += len(document)
        if len(found) >= _RUNS:
            runs.update(found)
            found.clear()
        if number % _BATCH == 0:
            on_progress("read", number / total if total else 0.0)
    runs.update(found)
    on_progress("read", 1.0)
    return runs, sample, sampled


def _tokenizer(state: dict[str, Any], base: Tokenizer, source: str) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    return base.derived(backend, source=source)


def _add_markers(state: dict[str, Any], markers: Iterable[str]) -> None:
    # No white space is stripped: decoding gives back the text, with a newline before a marker.
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = state["model"]["vocab"]
    for marker in markers:
        vocabulary[marker] = len(vocabulary)
        state["added_tokens"].append({"id": vocabulary[marker], "content": marker, **flags})


def _check_apart(tokenizer: Tokenizer, markers: list[str]) -> None:
    """Raises UserError for a marker that ordinary text produces."""
    wrong = [
        m
        for m in markers
        if any(tokenizer.token_id(m) in tokenizer.encode(text, specials=False) for text in (m, f" {m}", f"a{m}a"))
    ]
    if wrong:
        raise UserError(f"the markers {wrong} are words that text can spell: choose others, like <TH>")


def _described(base: Tokenizer, kind: str, marker: str) -> list[int]:
    """The ids of a word that describes the marker, from whose rows its row is initialised."""
    word = "".join(c for c in marker if c.isalnum())
    word = (language_name(word) if len(word) == 2 else None) or word.capitalize()
    return base.encode(word if kind == "sentencepiece" else f" {word}")
