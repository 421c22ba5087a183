"""Measures the cleaning of training text in one process: MB per second, microseconds per text, and texts left out.

    python bench/cleaning.py FILE ... [--format text|lines|jsonl] [--evaluation FILE ...] [--script Thai]
                             [--threshold 0.8] [--signatures 1000000] [--show 10]

FILE: UTF-8, may be .xz. text: documents separated by a blank line; lines: one text per line (a pair keeps its tab);
jsonl: all strings in an object and its lists are one text. --evaluation: jsonl or lines; each string, or each column
between tabs, is one text, and the file's name is the name of the set. For each file the table shows the speed of every
part (best of three), then what is removed and, with --show, some examples.
--signatures: also measures this many random signatures, every tenth a near copy: seconds, and the peak memory beyond
their array.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from transllm_jax.data.clean.cleaning import Rules, script_share, text_reason
from transllm_jax.data.clean.contamination import EvaluationTexts
from transllm_jax.data.clean.near_duplicates import SIZE, bands, exact_key, keep_first, signature


def read(path: Path) -> str:
    return lzma.open(path, "rt", encoding="utf-8").read() if path.suffix == ".xz" else path.read_text(encoding="utf-8")


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def texts_of(path: Path, kind: str) -> list[str]:
    content = read(path)
    if kind == "text":
        return [document for document in content.split("\n\n") if document.strip()]
    lines = [line for line in content.split("\n") if line.strip()]
    return ["\n".join(strings(json.loads(line))) for line in lines] if kind == "jsonl" else lines


def evaluation_texts(paths: list[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        for line in read(path).splitlines():
            for text in strings(json.loads(line)) if ".jsonl" in path.name else line.split("\t"):
                yield path.name, text


def seconds(function: Callable[[str], object], texts: list[str]) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for text in texts:
            function(text)
        best = min(best, time.perf_counter() - start)
    return best


def time_signatures(count: int, threshold: float) -> None:
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 1 << 32, (count, SIZE), np.uint32)
    copies = np.arange(count // 10)
    kept = rng.random((len(copies), SIZE)) < 0.93
    signatures[count - 1 - copies] = np.where(kept, signatures[copies], signatures[count - 1 - copies])
    exact = rng.integers(0, 1 << 63, count, np.uint64)
    start = time.perf_counter()
    result = keep_first(exact, signatures, threshold)
    took = time.perf_counter() - start
    tracemalloc.start()
    keep_first(exact, signatures, threshold)
    peak = tracemalloc.get_traced_memory()[1]
    print(
        f"{count:,} signatures at {threshold} ({bands(threshold)} bands and hashes a band): {took:.1f} s, "
        f"{result.near:,} of {len(copies):,} copies of similarity 0.93 removed, {peak / count:.0f} bytes a text"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--format", choices=["text", "lines", "jsonl"], default="text")
    parser.add_argument("--evaluation", type=Path, nargs="*", default=[])
    parser.add_argument("--script", default="Thai")
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--signatures", type=int, default=0)
    parser.add_argument("--show", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    evaluation = EvaluationTexts(evaluation_texts(options.evaluation))
    print(
        f"{evaluation.texts:,} evaluation texts in {time.perf_counter() - start:.1f} s, {evaluation.ignored} too short"
    )
    scripts = (options.script,)
    rules = Rules(scripts=scripts, min_script_share=0.5)
    parts: dict[str, Callable[[str], object]] = {
        "script": lambda text: script_share(text, scripts),
        "exact key": exact_key,
        "signature": signature,
        "contamination": evaluation.found_in,
        "all rules": lambda text: text_reason(text, rules, evaluation),
    }
    for path in options.files:
        texts = texts_of(path, options.format)
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        print(f"\n{path.name}: {len(texts):,} texts, {megabytes:.1f} MB")
        for name, function in parts.items():
            took = seconds(function, texts)
            print(f"  {name:15} {megabytes / took:7.1f} MB/s {took / len(texts) * 1e6:7.1f} us a text")
        kept = keep_first(
            np.array([exact_key(text) for text in texts], np.uint64),
            np.stack([signature(text) for text in texts]),
            options.threshold,
        )
        print(f"  duplicates: {kept.exact} exact, {kept.near} near; unchecked: {kept.unchecked}")
        found = [evaluation.found_in(text) for text in texts]
        print(f"  below half {options.script}: {sum(script_share(text, scripts) < 0.5 for text in texts)}")
        print(f"  contaminated: {dict(Counter(name for name in found if name)) or 0}")
        some = [(text, name) for text, name in zip(texts, found, strict=True) if name]
        for text, name in random.Random(0).sample(some, min(options.show, len(some))):
            print(f"    {name}: {text[:150]!r}")
    if options.signatures:
        time_signatures(options.signatures, options.threshold)


if __name__ == "__main__":
    main()
