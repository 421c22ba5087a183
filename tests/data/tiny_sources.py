"""Shared by the tests of sources: a few texts, files of them, and the items that are read from these."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.shards import Item, Reading, shards

THAI = "สวัสดีครับ วันนี้อากาศดี"

CHAT = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": f"<RESPONSE> {THAI}"},
    {"role": "user", "content": "And then?"},
]


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def items(reading: Reading, collector: Collector | None = None) -> list[Item]:
    """All items of a reading, in order."""
    collector = collector or Collector(reading.controls)
    return [item for shard in shards(reading, hash_of) for item, _ in shard.items(collector)]


def places(reading: Reading) -> list[str]:
    """Where each item of a reading is, as errors name it."""
    return [str(place) for shard in shards(reading, hash_of) for _, place in shard.items(Collector(reading.controls))]


def write(path: Path, content: str | bytes) -> Path:
    """Writes a file, and the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def json_list(path: Path, records: list[dict[str, Any]]) -> Path:
    return write(path, json.dumps(records, ensure_ascii=False, indent=2))


def parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
    return path
