"""Suite `translation`: pairs, translated in both directions, and how much the translations share with the references.

chrF counts sequences of characters, and chrF++ words as well; what is a word is told by spaces, so in scripts without
spaces its word part means little. spBLEU counts pieces of FLORES-200's sentencepiece model. COMET cannot be installed
beside this package (it needs numpy 1): the files that `comet-score` takes are written to `comet/`, and what it writes
there is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transllm_jax.data.clean.cleaning import refuse_swapped
from transllm_jax.data.read.sources import read_pairs
from transllm_jax.disk import write_text
from transllm_jax.errors import UserError
from transllm_jax.evaluation.suites.measure import Item, Measure, mean_of, measured
from transllm_jax.evaluation.suites.results import Results
from transllm_jax.evaluation.suites.suite_run import SuiteOptions, SuiteRun
from transllm_jax.evaluation.systems.system import Asked, Turn
from transllm_jax.evaluation.translation_scores import SCORERS, Unavailable, scorer, signature
from transllm_jax.generation.translate import Direction

DIRECTIONS: tuple[Direction, Direction] = ("to_target", "to_english")
_WORDS = {"to_target": "into the target language", "to_english": "into English"}
_COMET = "COMET"
# Languages whose writing puts no spaces between words.
_NO_SPACES = ("th", "lo", "km", "my", "zh", "ja", "bo", "dz", "shn", "yue", "wuu")


def _parts(name: str, direction: Direction, item: Item) -> Sequence[float] | None:
    return item["statistics"].get(name) if item["direction"] == direction else None


def _measure(name: str, direction: Direction) -> Measure:
    def value(sums: Any) -> float:
        return scorer(name).score(sums)

    return Measure(f"{name} {_WORDS[direction]}", lambda item: _parts(name, direction, item), value)


def _comet(direction: Direction) -> Measure:
    return mean_of(f"{_COMET} {_WORDS[direction]}", f"comet_{direction}")


MEASURES = (
    *(_measure(name, direction) for name in SCORERS for direction in DIRECTIONS),
    *(_comet(direction) for direction in DIRECTIONS),
)


def check(options: SuiteOptions) -> None:
    """Raises UserError if the file of pairs is missing or wrong, or has its columns swapped."""
    refuse_swapped(str(options.pairs), _pairs(options), options.language.code, options.language.scripts)


def _pairs(options: SuiteOptions) -> list[tuple[str, str]]:
    if options.pairs is None:
        raise UserError("the suite translation needs pairs (English<TAB>target lines); give --pairs FILE")
    return list(read_pairs(str(options.pairs), limit=options.limit))


def texts(options: SuiteOptions) -> list[tuple[str, str]]:
    """The sentences as they would stand in training data."""
    return [(str(number), text) for number, pair in enumerate(_pairs(options), 1) for text in pair]


def run(suite: SuiteRun) -> Results:
    """Translate, score, and keep what was found."""
    options, pairs = suite.options, _pairs(suite.options)
    asked = list(_asked(pairs, options))
    turns = suite.ask(asked)
    notes = _notes(options)
    usable = []
    for name in SCORERS:
        try:
            scorer(name)
            usable.append(name)
        except Unavailable as why:
            notes.append(f"{name} is not measured: {why}")
    items = [
        _item(number, direction, pair, turns[f"{number}/{direction}"][0], usable)
        for number, pair in enumerate(pairs, 1)
        for direction in DIRECTIONS
    ]
    _write_for_comet(suite.directory / "comet", items)
    scored = _read_comet(suite.directory / "comet", items)
    if scored:
        notes.append(f"COMET is that of {', '.join(scored)}, made by comet-score")
    found = measured(MEASURES, items)
    main = found[MEASURES[0].name]
    failed = sum(item["error"] is not None for item in items)
    return suite.keep(
        items,
        Results(
            suite=suite.suite,
            system=suite.system.name,
            measure=MEASURES[0].name,
            score=main["value"],
            interval=(main["low"], main["high"]),
            asked=len(items),
            parsed=len(items) - failed,
            more={
                **{name: value for name, value in found.items() if value is not None},
                "cut off": sum(item["cut_off"] for item in items),
                "signatures": {name: signature(name) for name in usable},
            },
            made_with={**suite.made_with, "max_new_tokens": options.max_new_tokens},
            notes=notes,
        ),
    )


def _asked(pairs: Sequence[tuple[str, str]], options: SuiteOptions) -> Iterator[Asked]:
    prompts = {"to_target": options.prompts.to_target[0], "to_english": options.prompts.to_english[0]}
    for number, pair in enumerate(pairs, 1):
        for side, direction in enumerate(DIRECTIONS):
            text = pair[side].strip()
            prompt = prompts[direction].replace("{language}", options.language.name).replace("{text}", text)
            yield Asked(
                id=f"{number}/{direction}",
                turns=(prompt,),
                language="target" if direction == "to_target" else "english",
                max_new_tokens=options.max_new_tokens,
                translate=(direction, text),
            )


def _item(
    number: int, direction: Direction, pair: tuple[str, str], turn: Turn, usable: Sequence[str]
) -> dict[str, Any]:
    side = DIRECTIONS.index(direction)
    source, reference = pair[side].strip(), pair[1 - side].strip()
    # COMET reads lines, so a translation is one.
    hypothesis = " ".join(turn.visible.split())
    return {
        "id": f"{number}/{direction}",
        "cluster": str(number),
        "direction": direction,
        "source": source,
        "reference": reference,
        "translation": hypothesis,
        "score": scorer("chrF").of(hypothesis, reference),
        "statistics": {name: scorer(name).statistics(hypothesis, reference) for name in usable},
        **turn.recorded(),
    }


def _notes(options: SuiteOptions) -> list[str]:
    if options.language.code.split("-")[0] in _NO_SPACES:
        return [
            f"chrF++ counts words by spaces, which {options.language.name} does not put between words: compare by chrF"
        ]
    return []


# --- COMET ----------------------------------------------------------------------------------------------------------


def _write_for_comet(directory: Path, items: Sequence[Mapping[str, Any]]) -> None:
    """The files that comet-score takes: a line for each pair."""
    for direction in DIRECTIONS:
        own = [item for item in items if item["direction"] == direction]
        for name, field in (("source", "source"), ("hypothesis", "translation"), ("reference", "reference")):
            lines = (" ".join(item[field].split()) + "\n" for item in own)
            write_text(directory / f"{direction}.{name}.txt", "".join(lines))


def _read_comet(directory: Path, items: Sequence[dict[str, Any]]) -> list[str]:
    """Puts the scores of `DIRECTION.json`, as `comet-score --to_json` writes it, into the items; gives the files.

    Raises UserError if a file is not that, or not of these translations.
    """
    found = []
    for direction in DIRECTIONS:
        path = directory / f"{direction}.json"
        if not path.exists():
            continue
        own = [item for item in items if item["direction"] == direction]
        try:
            (rows,) = json.loads(path.read_text(encoding="utf-8")).values()
            scores = [(" ".join(row["mt"].split()), float(row[_COMET])) for row in rows]
            if not all(math.isfinite(score) for _, score in scores):
                raise ValueError("a score that is no number")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not what comet-score --to_json writes ({error}); make it again") from None
        if [text for text, _ in scores] != [item["translation"] for item in own]:
            raise UserError(f"{path} is of other translations; run comet-score again, or remove it")
        for item, (_, score) in zip(own, scores, strict=True):
            item[f"comet_{direction}"] = score
        found.append(path.name)
    return found
