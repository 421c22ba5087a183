"""Measures what stage `recover` would leave out of texts that are known to be good: false alarms at each threshold.

    python bench/left_out.py answers FILE ... [--field output]
    python bench/left_out.py pairs ENGLISH TARGET --language th [ENGLISH TARGET --language ...]
    python bench/left_out.py unrelated ENGLISH

answers: jsonl files (may be .xz) with an English answer in a field; the share of answers by `filters`. pairs: files of
lines, each line of TARGET the translation by a person of the same line of ENGLISH; the share of sentences by `checks`,
with the defaults and with other thresholds. unrelated: lines of text (of a line with tabs, the first column), paired at
random; their chrF, which a round trip that lost everything would have.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from transllm_jax.generation import checks
from transllm_jax.generation.pieces import lost
from transllm_jax.tokenizer.scripts import script_of


def lines(path: str) -> list[str]:
    content = Path(path).read_bytes()
    return (lzma.decompress(content) if path.endswith(".xz") else content).decode().split("\n")


def share(found: Sequence[bool]) -> str:
    return f"{sum(found):,} ({100 * sum(found) / max(1, len(found)):.2f} %)"


def answers(paths: Sequence[str], field: str) -> None:
    print("| file | answers | repeated > 0.3 | > 0.4 | > 0.5 | Latin < 0.5 |\n|---|---|---|---|---|---|")
    for path in paths:
        texts = [text for line in lines(path) if line.strip() and (text := json.loads(line).get(field))]
        repeated = [checks.repeated_share(text) for text in texts]
        latin = [checks.letters_share(text, ("Latin",)) for text in texts]
        counts = [share([value > limit for value in repeated]) for limit in (0.3, 0.4, 0.5)]
        counts.append(share([value is not None and value < 0.5 for value in latin]))
        print(f"| {Path(path).name} | {len(texts):,} | {' | '.join(counts)} |")


def pairs(english: str, target: str, language: str) -> Iterator[str]:
    rows = [
        (one.strip(), other.strip())
        for one, other in zip(lines(english), lines(target), strict=True)
        if one.strip() and other.strip()
    ]
    scripts = script_of(language).scripts
    usual = median(len(other) / len(one) for one, other in rows)
    factors = [checks.length_factor(one, other, usual) for one, other in rows]
    shares = [value for _, other in rows if (value := checks.letters_share(other, scripts)) is not None]
    numbers = [bool(lost(one, other, ["numbers"])) for one, other in rows if any(map(str.isdigit, one))]
    yield f"{usual:.2f}"
    yield from (share([factor > limit for factor in factors]) for limit in (2, 2.5, 3))
    yield from (share([value < limit for value in shares]) for limit in (0.3, 0.5))
    yield share(numbers)


def unrelated(path: str) -> None:
    import sacrebleu

    texts = [line.split("\t")[0] for line in lines(path) if line.strip()]
    chosen = random.Random(0)
    drawn = [chosen.sample(texts, 2) for _ in range(2000)]
    scores = [sacrebleu.sentence_chrf(one, [other]).score for one, other in drawn]
    print(f"mean {np.mean(scores):.1f}; 50, 95 and 100 % are at most {np.quantile(scores, [0.5, 0.95, 1]).round(1)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["answers", "pairs", "unrelated"])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--field", default="output")
    parser.add_argument("--language", action="append", default=[])
    given = parser.parse_intermixed_args()
    if given.what == "answers":
        answers(given.files, given.field)
    elif given.what == "unrelated":
        unrelated(given.files[0])
    else:
        print(
            "| language | characters | factor > 2 | > 2.5 | > 3 | script < 0.3 | < 0.5 | of those with numbers, lost |"
        )
        print("|---|---|---|---|---|---|---|---|")
        files = zip(given.files[::2], given.files[1::2], given.language, strict=True)
        for english, target, language in files:
            print(f"| {language} | {' | '.join(pairs(english, target, language))} |", flush=True)


if __name__ == "__main__":
    main()
