"""Texts of stage `recover` translated by a model: cut into sentences, translated, checked, put together.

Translations are appended to a file as they are done, so that a stopped run can continue. What was cut, and what is
rejected, is computed from these rows alone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Literal, NamedTuple

from transllm_jax.config import Recover
from transllm_jax.generation import checks
from transllm_jax.generation.engine import Engine
from transllm_jax.generation.pieces import Piece, cut, join, lost
from transllm_jax.generation.seq2seq import Seq2seqTranslator
from transllm_jax.generation.translate import Direction, Made, ModelTranslator, translation_prompt
from transllm_jax.stages.filters import CUT_OFF, EMPTY, REPETITIVE
from transllm_jax.stages.generated import Row, generated_rows
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.scripts import script_of

# What is translated, and by which model: that of stage `translate`, or that of `recover.seq2seq`.
Kind = Literal["instructions", "answers"]
By = Literal["model", "seq2seq"]
# Which of the texts of a kind.
Place = tuple[Kind, int]

TRANSLATIONS = {"model": "translations.jsonl", "seq2seq": "translations.seq2seq.jsonl"}
ROUND_TRIPS = {"model": "round_trips.jsonl", "seq2seq": "round_trips.seq2seq.jsonl"}
# Scripts that put no space between two sentences.
NO_SPACE = {"Han", "Hiragana", "Katakana"}


class Translated(NamedTuple):
    """Translations of texts by their places, and what was rejected, as lines of `dropped.jsonl`."""

    found: dict[Place, str]
    rejected: list[Row]


class _Text(NamedTuple):
    source: str
    pieces: list[Piece]

    @property
    def sentences(self) -> list[str]:
        return [piece.text for piece in self.pieces if piece.translate]


def translate(
    run: Run,
    directory: Path,
    by: By,
    texts: Mapping[Place, str],
    settings: Recover,
    *,
    checked: bool = True,
) -> Translated:
    """Translate texts into the target language.

    settings: `recover`, as it holds for this run. checked: whether bad translations are rejected.
    """
    given = {place: _Text(text, _pieces(text, settings)) for place, text in texts.items()}
    worker = _Worker(run, by, settings)
    rows = worker.rows(directory / TRANSLATIONS[by], "to_target", _wanted(given, settings), "translations")
    made = {(row["of"], row["source"]): row for row in rows}
    checks_of = TranslationChecks(run, settings, rows) if checked else None
    between = "" if NO_SPACE & set(_scripts(run)) else " "
    result = Translated({}, [])
    kept: dict[Place, list[str]] = {}
    for place, text in given.items():
        found = [made.get((place[0], sentence)) for sentence in text.sentences]
        for sentence, row in zip(text.sentences, found, strict=True):
            fault = "no room" if row is None else _plain_fault(row, settings) or (checks_of and checks_of.fault(row))
            if fault:
                result.rejected.append(_rejected(place, text, fault, sentence, row))
                break
        else:
            kept[place] = [row["translation"] for row in found if row is not None]
            result.found[place] = (
                join(text.pieces, kept[place], between) if settings.sentences else "".join(kept[place])
            )
    if checked and settings.checks.min_round_trip:
        _reject_by_round_trip(worker, directory / ROUND_TRIPS[by], given, kept, result)
    return result


def _pieces(text: str, settings: Recover) -> list[Piece]:
    return cut(text) if settings.sentences else [Piece(text, True)]


def _scripts(run: Run) -> tuple[str, ...]:
    language = run.config.language
    return script_of(language.code, language.scripts).scripts


def _wanted(given: Mapping[Place, _Text], settings: Recover) -> list[dict[str, str]]:
    """What is to be translated: each sentence of each kind once; without sentences each text."""
    rows = [(kind, sentence) for (kind, _), text in given.items() for sentence in text.sentences]
    return [{"of": kind, "source": source} for kind, source in (dict.fromkeys(rows) if settings.sentences else rows)]


def _plain_fault(row: Row, settings: Recover) -> str | None:
    """Why a translation cannot be used, whatever the checks are."""
    if not (row["translation"] or "").strip():
        return EMPTY
    # Rows of older versions do not say whether they were finished.
    return CUT_OFF if not row.get("finished", True) and not settings.keep_unfinished else None


def _rejected(place: Place, text: _Text, reason: str, sentence: str, row: Row | None) -> Row:
    translation = None if row is None else row["translation"]
    whole = {} if sentence == text.source else {"text": text.source}
    return {
        "of": f"translation of {place[0]}",
        "reason": reason,
        "source": sentence,
        "translation": translation,
        **whole,
    }


class TranslationChecks:
    """Says what is wrong with a translation. rows: all translations of the run, with `source` and `translation`."""

    def __init__(self, run: Run, settings: Recover, rows: Sequence[Row]) -> None:
        self._config, self._max_repeated = settings.checks, settings.filters.max_repeated
        self._scripts = _scripts(run)
        ratios = [len(row["translation"]) / len(row["source"]) for row in rows if row["translation"]]
        self.usual = median(ratios) if ratios else 1.0

    def fault(self, row: Row) -> str | None:
        """The reason to reject a row; None if there is none."""
        source, translation, config = row["source"], row["translation"], self._config
        if checks.repeated_share(translation) > max(self._max_repeated, checks.repeated_share(source)):
            return REPETITIVE
        longest = config.max_length_factor
        if longest is not None and checks.length_factor(source, translation, self.usual) > longest:
            return "wrong length"
        if config.min_script_share:
            if checks.is_untranslated(source, translation):
                return "untranslated"
            share = checks.letters_share(translation, self._scripts)
            # A sentence of a name or a title alone may stay as it is.
            if share is not None and share < config.min_script_share and len(source.split()) > checks.UNTRANSLATED:
                return "wrong script"
        return "lost code, address, number or mark" if lost(source, translation, config.keep) else None


def _reject_by_round_trip(
    worker: _Worker, path: Path, given: Mapping[Place, _Text], kept: Mapping[Place, Sequence[str]], result: Translated
) -> None:
    """Translate what was kept back, and move the texts of which too little comes back to the rejected ones."""
    wanted = dict.fromkeys((place[0], sentence) for place, sentences in kept.items() for sentence in sentences)
    known = [{"of": kind, "source": source} for kind, source in wanted]
    rows = worker.rows(path, "to_english", known, "round trips")
    back = {(row["of"], row["source"]): row["translation"] or "" for row in rows}
    for place, sentences in kept.items():
        text = given[place]
        if not sentences:  # nothing but code
            continue
        english = [back.get((place[0], sentence), "") for sentence in sentences]
        # By sentence: the chrF of two long texts is high, whatever they say.
        score = mean(map(checks.round_trip, text.sentences, english))
        if score < worker.settings.checks.min_round_trip:
            translation = result.found.pop(place)
            result.rejected.append(
                {
                    "of": f"translation of {place[0]}",
                    "reason": "round trip",
                    "measure": round(score, 1),
                    "source": text.source,
                    "translation": translation,
                    "back": " ".join(english),
                }
            )


class _Worker:
    """Translates sentences into rows with one of the models."""

    def __init__(self, run: Run, by: By, settings: Recover) -> None:
        self._run, self._by, self.settings = run, by, settings
        self._tokenizer = run.models.tokenizer("vocabulary")
        self._engine = cache(
            lambda: Engine(run.models.split("translate"), run.models.config, batch_size=settings.batch_size)
        )
        self._seq2seq = cache(lambda: Seq2seqTranslator(settings.seq2seq, max_new_tokens=settings.max_new_tokens))

    def rows(self, path: Path, direction: Direction, known: Sequence[Mapping[str, str]], what: str) -> list[Row]:
        """A row for each of the known ones for which there is room: with `translation`, and whether it `finished`."""
        known = self._in_order(known, direction)

        sources = [row["source"] for row in known]

        def make(
            first: int, on_tokens: Callable[[int], None], between: Callable[[], None]
        ) -> Iterator[tuple[int, Row]]:
            if self._by == "seq2seq":
                made = self._by_seq2seq(sources, direction, first, between)
            else:
                made = self._by_model(sources, direction, first, on_tokens, between)
            for number, (text, finished) in made:
                translation = None if text is None else printable(text)
                yield number, {**known[number], "translation": translation, "finished": finished}

        return generated_rows(self._run, path, known, make, stage="recover", what=what, unit="text")

    def _by_model(
        self,
        texts: Sequence[str],
        direction: Direction,
        first: int,
        on_tokens: Callable[[int], None],
        between: Callable[[], None],
    ) -> Iterator[tuple[int, Made]]:
        translator = ModelTranslator(
            self._engine(),
            self._tokenizer,
            self._run.markers,
            max_new_tokens=self.settings.max_new_tokens,
            on_tokens=on_tokens,
            between=between,
        )
        return translator.each(texts, direction, first)

    def _by_seq2seq(
        self, texts: Sequence[str], direction: Direction, first: int, between: Callable[[], None]
    ) -> Iterator[tuple[int, Made]]:
        """In batches, which are the same whatever `first` is: a translation may depend on those beside it."""
        size = self.settings.batch_size

        def batch(start: int) -> list[Made]:
            some = texts[start : start + size]
            # On one process: others might round differently, and go on with other rows.
            made = self._run.peers.run_on_primary("a batch", lambda: self._seq2seq().make(some, direction))
            return [Made(*one) for one in made or []]

        for start in range(first // size * size, len(texts), size):
            if start > first:
                between()
            yield from [(number, one) for number, one in enumerate(batch(start), start) if number >= first]

    def _in_order(self, known: Sequence[Mapping[str, str]], direction: Direction) -> list[Mapping[str, str]]:
        """The rows in order of prompt length, so that batches of a seq2seq model need less padding; those without room
        are left out."""
        run = self._run
        lengths = [len(translation_prompt(self._tokenizer, run.markers, row["source"], direction)) for row in known]
        order = sorted(range(len(known)), key=lambda number: (lengths[number], known[number]["of"], number))
        if self._by == "seq2seq":
            return [known[number] for number in order]
        context, room = run.models.config.context, self.settings.max_new_tokens
        fitting = [known[number] for number in order if lengths[number] + room <= context]
        if len(fitting) < len(known):
            run.progress.say(
                f"  recover: {len(known) - len(fitting)} texts leave no room in the context of {context} for a "
                f"translation of {room} tokens, left out",
                style="yellow",
            )
        return fitting


def printable(text: str) -> str:
    """A model's text without control characters, which files of text may not hold."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc").strip()
