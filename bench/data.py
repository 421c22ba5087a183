"""Measures the data path from files to batches: MB per second, share of padding, milliseconds per batch, memory.

    python bench/data.py TOKENIZER --corpus FILE ... [--content text|pairs] [--length 512] [--megabytes 60]
                         [--examples 1000000] [--batch 8] [--near] [--repeat 3]

TOKENIZER: a Hugging Face directory. FILE: documents separated by blank lines, or lines of pairs (English, tab, target
language), may be .xz; control characters are removed. The corpus is repeated up to --megabytes of UTF-8 and written as
one file and as eight. Prints the speed of `encode_batch_fast` alone on the same texts in memory, which no pipeline can
beat, and that of reading, checking, cleaning, encoding and writing together; each is the best of --repeat, in turns.
Then the share of padding at --length, as packed here and by the two usual methods; the time to plan --examples of the
corpus's lengths; the time to make a batch of packed rows in one thread; and the peak memory of this process. --near:
with MinHash signatures. Times are wall times, so nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np

from transllm_jax.choices import Content
from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.shards import Item, Reading, Shard, shards
from transllm_jax.data.rows.batches import Batches
from transllm_jax.data.rows.examples import pair_texts
from transllm_jax.data.rows.packing import plan
from transllm_jax.data.rows.planned import PlannedRows, Selection
from transllm_jax.data.rows.token_cache import ShardTokens
from transllm_jax.data.rows.tokenise import tokenise
from transllm_jax.data.rows.transform import Transform
from transllm_jax.tokenizer.tokenizer import Tokenizer

FILES = 8


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path: str, content: Content) -> list[Item]:
    found = shards(Reading(path, content, controls="remove"), hash_of)
    return [item for shard in found for item, _ in shard.items(Collector("remove"))]


def size_of(item: Item) -> int:
    return len((item if isinstance(item, str) else "\t".join(map(str, item))).encode())


def write(path: Path, items: list[Item]) -> None:
    if isinstance(items[0], str):
        path.write_text("\n\n".join(map(str, items)) + "\n", encoding="utf-8")
    else:
        path.write_text("".join("\t".join(map(str, item)) + "\n" for item in items), encoding="utf-8")


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def print_padding(lengths: np.ndarray, rows: PlannedRows, length: int, batch: int) -> None:
    order = np.random.default_rng(0).permutation(lengths)
    groups = order[: len(order) // batch * batch].reshape(-1, batch)
    longest = 1 - groups.sum() / (groups.max(axis=1).sum() * batch)
    ends = lengths.cumsum()
    cut = ((ends - 1) // length > (ends - lengths) // length).mean()
    print(f"padding at {length}: packed {rows.padded_fraction:.2%}, nothing cut")
    print(f"  one example a row, padded to the longest of {batch}: {longest:.1%}, to {length}: ", end="")
    print(f"{1 - lengths.mean() / length:.1%}; concatenated: 0 %, and {cut:.1%} of the examples cut apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--content", choices=["text", "pairs"], default="text")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--megabytes", type=float, default=60, help="0: the corpus without repetition")
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--near", action="store_true")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    tokenizer = Tokenizer.load(options.tokenizer)
    transform = Transform(options.content, options.length, near=options.near)
    once = [item for path in options.corpus for item in read(path, options.content)]
    sizes = np.array([size_of(item) for item in once])
    whole, part = divmod(options.megabytes * 1e6 / sizes.sum(), 1) if options.megabytes else (1, 0)
    items = list(islice(cycle(once), int(whole) * len(once) + int((sizes.cumsum() < part * sizes.sum()).sum())))
    megabytes = sum(map(size_of, items)) / 1e6
    texts = [str(item) for item in items]
    if options.content == "pairs":
        texts = list(chain.from_iterable(pair_texts(str(item[0]), str(item[1])) for item in items))
    print(f"{len(items):,} items ({len(once):,} different), {megabytes:.1f} MB")

    with tempfile.TemporaryDirectory() as name:
        root, cache = Path(name), Path(name) / "cache"
        write(root / "one.dat", items)
        for number in range(min(FILES, len(items))):
            write(root / f"part-{number}.dat", items[number::FILES])

        def shards_of(pattern: str) -> list[Shard]:
            return shards(Reading(str(root / pattern), options.content), hash_of)

        def run(pattern: str) -> list[ShardTokens]:
            shutil.rmtree(cache, ignore_errors=True)
            return tokenise(shards_of(pattern), transform, tokenizer, "refuse", cache)

        ways: dict[str, Callable[[], object]] = {
            "encode_batch_fast alone": lambda: tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False),
            f"{FILES} files": lambda: run("part-*.dat"),
            "one file": lambda: run("one.dat"),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(options.repeat):
            for way, function in ways.items():
                best[way] = min(best[way], timed(function))
        floor = best["encode_batch_fast alone"]
        for way, took in best.items():
            print(f"  {way:24} {megabytes / took:6.2f} MB/s  {took / floor:.2f} times the floor")
        disk = sum(file.stat().st_size for file in cache.iterdir())
        tokens = ShardTokens(next(cache.glob("*.npz")), "one.dat")
        print(f"  the cache holds {disk / 1e6:.1f} MB, {disk / tokens.lengths.sum():.2f} bytes a token")

        # Repeats would be taken for duplicates.
        rows = PlannedRows([tokens], Selection(options.length, exact=False), cache)
        print_padding(tokens.lengths.astype(np.int64), rows, options.length, options.batch)
        lengths = np.random.default_rng(0).choice(tokens.lengths, options.examples)
        print(f"plan of {options.examples:,} examples: {timed(lambda: plan(lengths, options.length)):.1f} s")
        batches = Batches([("corpus", rows, None)], options.batch, seed=0)
        batches[0]
        per_batch = timed(lambda: [batches[k] for k in range(100)]) * 10
        per_row = rows.counts["examples"] / len(rows)
        print(f"a batch of {options.batch} x {options.length}: {per_batch:.2f} ms ({per_row:.1f} examples a row)")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process: {peak:.0f} MiB, with the corpus held in it")


if __name__ == "__main__":
    main()
