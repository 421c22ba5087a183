"""Small files of text, pairs and conversations as shards: for tests only."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transllm_jax.choices import Content
from transllm_jax.data.clean.cleaning import Item
from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.shards import Reading, Shard, shards
from transllm_jax.data.rows.transform import ItemExamples, Transform
from transllm_jax.tokenizer.tokenizer import Tokenizer

DOCUMENTS = [f"Document {n}: " + "the quick brown fox " * (n % 5) + "สวัสดี " * (n % 3) for n in range(40)]
PAIRS = [(f"number {n}, " + "again " * (n % 4), f"ภาษาไทย {n} " + "สวัสดี" * (n % 3)) for n in range(40)]
SUFFIXES = {"text": "txt", "pairs": "tsv", "conversations": "jsonl"}


def conversation(n: int) -> list[dict[str, str]]:
    turns = [[f"What is {n}?", f"It is {n}."], [f"And {n} more?", "More. " * (n % 5)]][: 1 + n % 2]
    return [
        {"role": role, "content": text.strip() or "No."}
        for turn in turns
        for role, text in zip(["user", "assistant"], turn, strict=True)
    ]


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(path: Path, items: list[object]) -> Path:
    """A file of documents, pairs or conversations, one or two lines each."""
    if isinstance(items[0], str):
        content = "\n\n".join(map(str, items))
    elif isinstance(items[0], tuple):
        content = "\n".join("\t".join(item) for item in items if isinstance(item, tuple))
    else:
        content = "\n".join(json.dumps({"messages": item}) for item in items)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content + "\n", encoding="utf-8")
    return path


def shards_of(path: Path, content: Content = "text", max_bytes: int | None = None) -> list[Shard]:
    """The shards that a path or glob means."""
    return shards(Reading(str(path), content, max_bytes=max_bytes), hash_of)


def some_shards(directory: Path, content: Content = "text", files: int = 3) -> list[Shard]:
    """The items of this module in so many files."""
    items: list[object] = {
        "text": list(DOCUMENTS),
        "pairs": list(PAIRS),
        "conversations": [conversation(n) for n in range(12)],
    }[content]
    for n in range(files):
        write(directory / f"part-{n}.{SUFFIXES[content]}", items[n::files])
    return shards_of(directory / f"*.{SUFFIXES[content]}", content)


def items_of(found: list[Shard]) -> list[Item]:
    return [item for shard in found for item, _ in shard.items(Collector("refuse"))]


def examples_of(
    transform: Transform, tokenizer: Tokenizer, items: Sequence[Item], counts: Counter[str]
) -> list[ItemExamples]:
    """The examples of each item; none for an item that is left out. counts: gets the number left out, by reason."""
    prepared = transform.prepare(items, counts)
    return transform.finish(tokenizer, prepared, tokenizer.encode_batch(prepared.texts), counts)
