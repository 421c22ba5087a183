"""Expands a tokenizer on a large corpus; measures time, memory and the result.

    python bench/expand.py BASE --corpus FILE ... [--megabytes 100] [--size 8000] [--language th] [--distinct]
        [--within-words]

BASE: a Hugging Face directory with tokenizer.json. FILE: UTF-8 text, documents separated by a blank line, may be .xz.
Every 20th document is held out. The rest is split into sentences at spaces and line ends. They are repeated and
shuffled to make documents of 50 sentences, up to the wanted size. A repeated small corpus has fewer distinct runs of
the script than real text of that size. With --distinct, the sentences of a document are cut at random places and joined
without a space, so that nearly every run is new, which is harder than real text. Prints the seconds of each phase, then
the peak memory of the process, tokens per character of the held-out documents before and after, new pieces that the
training text never makes, and English texts (--english) that change.
"""

from __future__ import annotations

import argparse
import lzma
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.growing.expand import expand, tokens_per_character
from transllm_jax.tokenizer.tokenizer import Tokenizer

SENTENCES = 50  # in a document


def read(path: Path) -> str:
    return lzma.open(path, "rt", encoding="utf-8").read() if path.suffix == ".xz" else path.read_text(encoding="utf-8")


def repeated(documents: list[str], megabytes: float, distinct: bool) -> Iterator[str]:
    """Documents of shuffled sentences, with about this many megabytes of UTF-8 in all."""
    rng = random.Random(0)
    sentences = [sentence for document in documents for sentence in document.split()]
    left = megabytes * 1e6
    while left > 0:
        rng.shuffle(sentences)
        for first in range(0, len(sentences), SENTENCES):
            some = sentences[first : first + SENTENCES]
            if distinct:
                halves = [(s[: (cut := rng.randrange(len(s) + 1))], s[cut:]) for s in some]
                text = " ".join(a + b for (_, a), (b, _) in zip(halves, halves[1:] + halves[:1], strict=True))
            else:
                text = " ".join(some)
            left -= len(text.encode())
            if left < 0:
                return
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--corpus", type=Path, nargs="+", required=True)
    parser.add_argument("--english", type=Path, nargs="*", default=[])
    parser.add_argument("--megabytes", type=float, default=100, help="0: the corpus as it is, once")
    parser.add_argument("--size", type=int, default=8000)
    parser.add_argument("--min-count", type=int, default=2)
    parser.add_argument("--language", default="th")
    parser.add_argument("--distinct", action="store_true")
    parser.add_argument("--within-words", action="store_true")
    given = parser.parse_args()

    documents = [document for path in given.corpus for document in read(path).split("\n\n") if document]
    held_out, rest = documents[::20], [document for i, document in enumerate(documents) if i % 20]
    base = Tokenizer.load(given.base)
    markers = list(Markers.for_language(given.language).in_order())
    began, phase = time.perf_counter(), ""

    def tell(name: str, _share: float) -> None:
        nonlocal phase
        if name != phase:
            phase = name
            print(f"{time.perf_counter() - began:7.1f} s  {name:8} peak {peak():.2f} GiB", flush=True)

    expansion = expand(
        base,
        repeated(rest, given.megabytes, given.distinct) if given.megabytes else rest,
        size=given.size,
        language=given.language,
        markers=markers,
        min_count=given.min_count,
        within_words=given.within_words,
        english=[text for path in given.english for text in read(path).split("\n\n")] if given.english else None,
        on_progress=tell,
    )
    print(f"{time.perf_counter() - began:7.1f} s  in all  peak {peak():.2f} GiB")
    before, after = (tokens_per_character(t, held_out) for t in (base, expansion.tokenizer))
    print(f"held-out tokens per character: {before:.3f} -> {after:.3f}")
    for name in ("never_produced", "produced_less_than_min_count", "english_changed"):
        print(f"{name}: {expansion.report[name]}")


def peak() -> float:
    """The process's peak memory so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
