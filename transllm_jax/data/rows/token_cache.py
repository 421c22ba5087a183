"""Tokenised shards on disk: a shard is tokenised once for each tokenizer and transform, and never read for another.

A shard's examples are in an ArrayRecord file, read by index. A second file holds arrays of properties of each example
and item, so that packing is planned without reading tokens. It is written last: without it a shard is incomplete. The
files' name has a hash of the shard's content, the tokenizer and the transform, so if one shard changes only that shard
is tokenised again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from transllm_jax.choices import Controls, OnBadRows
from transllm_jax.data.clean.cleaning import text_of
from transllm_jax.data.clean.near_duplicates import SIZE
from transllm_jax.data.read.files import Collector, Place, catch_bad_row
from transllm_jax.data.read.shards import Item, Shard
from transllm_jax.data.rows.array_file import read_arrays, write_arrays, writing
from transllm_jax.data.rows.examples import Example
from transllm_jax.data.rows.transform import Prepared, Transform, refuse_specials
from transllm_jax.disk import whole
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.tokenizer import Tokenizer

_FORMAT = 3  # of the files
# Items that are tokenised at once: enough for all cores, in little memory; limited by characters for long documents.
_ITEMS, _CHARACTERS = 1000, 1 << 20
_AHEAD = 2  # batches that wait for the tokenizer, so that it never waits for the reader
# Each record can be read alone; token ids hardly compress.
_OPTIONS = "group_size:1,uncompressed"
_OPEN = 256  # record files that are open at once: a source may have more shards than a process may have open files
_EXAMPLE_COLUMNS = {"lengths": np.int32, "trained": np.int32, "bytes": np.int32, "item": np.int64}
_ITEM_COLUMNS = {"line": np.int64, "file": np.int32, "exact": np.uint64}


def shard_path(directory: Path, shard: Shard, transform: Transform, tokenizer: str) -> Path:
    """The path of a shard's arrays, which need not exist yet; `tokenizer` is the tokenizer's fingerprint."""
    key = json.dumps([_FORMAT, shard.key, transform.key, tokenizer])
    name = re.sub(r"[^\w.-]", "_", Path(shard.name).name, flags=re.ASCII)[:60]
    return directory / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"


class _Batch(NamedTuple):
    """Items that are being tokenised."""

    items: list[Item]
    places: list[Place]
    prepared: Prepared
    ids: Future[list[list[int]]]


def write_shard(
    path: Path,
    shard: Shard,
    transform: Transform,
    tokenizer: Tokenizer,
    controls: Controls,
    on_items: Callable[[int], None] = lambda items: None,
    on_bad_rows: OnBadRows = "refuse",
) -> None:
    """Tokenise a shard into the files of `path`. on_items: called with the number of items just done; may raise.

    on_bad_rows: as in the shard's `Reading`; skipped rows are stored with the counts. A thread encodes (on all cores,
    without holding Python's lock) while this one reads, cleans and writes. Raises UserError for whatever the shard's
    reader refuses, for a special token inside a text, and if the directory cannot be written to.
    """
    collector, counts = Collector(controls, on_bad_rows), Counter[str]()
    id_type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    file = whole(records_path(path), shared=True, errors=writing)
    with file as partial, ThreadPoolExecutor(1, thread_name_prefix="tokens") as encoder:
        with writing(path):
            writer = ArrayRecordWriter(str(partial), _OPTIONS)
        columns = _Columns(transform)
        waiting: deque[_Batch] = deque()
        read = 0

        def finish_first() -> None:
            batch = waiting.popleft()
            made = transform.finish(tokenizer, batch.prepared, batch.ids.result(), counts, batch.places)
            with writing(path):
                for examples, _ in made:
                    for example in examples:
                        writer.write(example.ids.astype(id_type).tobytes() + np.packbits(example.mask).tobytes())
            columns.add(batch, made)
            on_items(len(batch.items))

        try:
            for items, places in _batches(shard, collector, transform, tokenizer):
                prepared = transform.prepare(items, counts, read)
                read += len(items)
                waiting.append(_Batch(items, places, prepared, encoder.submit(tokenizer.encode_batch, prepared.texts)))
                if len(waiting) > _AHEAD:
                    finish_first()
            while waiting:
                finish_first()
            with writing(path):
                writer.close()
        finally:
            encoder.shutdown(cancel_futures=True)
            if writer.is_open():
                _abandon(writer)
        size = partial.stat().st_size
    counts |= Counter(normalised=collector.normalised, removed=collector.removed)
    about = {"counts": counts, "size": size, "wide": id_type is np.uint32, "files": list(columns.files)}
    about |= {"unit": columns.unit, "items": columns.items, "skipped": collector.skipped, "ignored": collector.ignored}
    bad_rows = np.frombuffer(json.dumps(collector.bad_rows, ensure_ascii=False).encode(), np.uint8)
    write_arrays(path, {"about": np.array(json.dumps(about)), "bad_rows": bad_rows, **columns.arrays})


def _batches(
    shard: Shard, collector: Collector, transform: Transform, tokenizer: Tokenizer
) -> Iterator[tuple[list[Item], list[Place]]]:
    """The shard's items, checked, in batches."""
    items: list[Item] = []
    places: list[Place] = []
    characters = 0
    for item, place in shard.items(collector):
        bad = None
        if not transform.holds_markers:
            bad = catch_bad_row(refuse_specials, item, place, tokenizer, transform.markers)
        if bad is not None:
            collector.refuse_or_skip(bad, place)
            continue
        items.append(item)
        places.append(place)
        characters += len(text_of(item))
        if len(items) >= _ITEMS or characters >= _CHARACTERS:
            yield items, places
            items, places, characters = [], [], 0
    if items:
        yield items, places


def _abandon(writer: Any) -> None:
    with contextlib.suppress(RuntimeError):  # another error is being raised already, and the file is removed
        writer.close()


class _Columns:
    """The properties of each example and item of a shard, by column, one array per batch: small for any shard."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform
        types = _EXAMPLE_COLUMNS | _ITEM_COLUMNS
        self._parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0, dtype)] for name, dtype in types.items()}
        if transform.near:
            self._parts["near"] = [np.zeros((0, SIZE), np.uint32)]
        self.files: dict[str, int] = {}
        self.unit = "line"
        self.items = 0

    def add(self, batch: _Batch, made: Sequence[tuple[list[Example], list[int]]]) -> None:
        examples = [example for found, _ in made for example in found]
        self._add("lengths", [len(example) for example in examples])
        self._add("trained", [np.count_nonzero(example.mask[1:]) for example in examples])
        self._add("bytes", [size for _, sizes in made for size in sizes])
        self._add("item", np.repeat(np.arange(len(made)), [len(found) for found, _ in made]) + self.items)
        self._add("line", [place.line for place in batch.places])
        self._add("file", [self.files.setdefault(place.path, len(self.files)) for place in batch.places])
        keys = [self._transform.keys(item) for item in batch.items]
        self._add("exact", [exact for exact, _ in keys])
        if self._transform.near:
            self._add("near", [near for _, near in keys])
        self.unit = batch.places[0].unit
        self.items += len(batch.items)

    def _add(self, name: str, values: Any) -> None:
        self._parts[name].append(np.asarray(values, self._parts[name][0].dtype))

    @property
    def arrays(self) -> dict[str, list[np.ndarray]]:
        return self._parts


def records_path(path: Path) -> Path:
    """The path of the records that belong to the arrays at `path`."""
    return path.with_suffix(".array_record")


@lru_cache(_OPEN)
def _reader(path: str, version: tuple[int, int]) -> Any:
    """version: distinguishes a file from one that has replaced it."""
    return ArrayRecordReader(path, "readahead_buffer_size:0")


class ShardTokens:
    """A tokenised shard.

    lengths: tokens of each example, int32. items: number of items that the examples were made of. counts: what happened
    to items, by reason. skipped: reason -> bad rows. ignored: field that was not read -> records that have it. Only
    `lengths` stays in memory; other columns are read on demand.
    """

    def __init__(self, path: Path, name: str) -> None:
        """Raises UserError if the files are damaged."""
        self.path, self.name = path, name
        try:
            stored, self.lengths = read_arrays(path, ["about", "lengths"])
            about = json.loads(str(stored))
            records = records_path(path).stat()
            if records.st_size != about["size"]:
                raise ValueError("its records are incomplete")
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error
        self.counts: dict[str, int] = about["counts"]
        self.items: int = about["items"]
        self.skipped: dict[str, int] = about["skipped"]
        self.ignored: dict[str, int] = about["ignored"]
        self._files, self._unit = about["files"], about["unit"]
        self._id_type = np.dtype(np.uint32 if about["wide"] else np.uint16)
        self._version = records.st_mtime_ns, records.st_ino

    def __len__(self) -> int:
        return len(self.lengths)

    def column(self, name: str) -> np.ndarray:
        """A column, read from disk. Raises UserError if it is damaged.

        Per example: `lengths`; `trained`, number of trained tokens; `bytes` of the text of these tokens; `item`, number
        of the shard's item that it was made of. Per item: `file`, index of its file; `line`, where it begins in that
        file; `exact`, uint64, a hash that equal items share; `near`, uint32 [items, SIZE], MinHash signatures, if the
        transform computes them.
        """
        try:
            return read_arrays(self.path, [name])[0]
        except ValueError as error:
            raise self._damaged(error) from error

    def bad_rows(self) -> list[dict[str, str]]:
        """The rows that were skipped: place, reason, fault and row of each, read from disk."""
        found: list[dict[str, str]] = json.loads(self.column("bad_rows").tobytes())
        return found

    @cached_property
    def _bytes(self) -> np.ndarray:
        return self.column("bytes")

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.column("item"), self.column("file"), self.column("line")

    def bytes_of(self, numbers: list[int]) -> int:
        """The UTF-8 bytes of the text that these examples train."""
        return int(self._bytes[numbers].sum())

    def places(self, numbers: list[int]) -> list[str]:
        """Where the items of these examples come from, as `file:line`."""
        item, file, line = self._places
        return [str(Place(self._files[file[i]], int(line[i]), self._unit)) for i in item[numbers]]

    def examples(self, numbers: list[int]) -> list[Example]:
        """The examples with these numbers. Raises UserError if the file is damaged."""
        try:
            records = _reader(str(records_path(self.path)), self._version).read(numbers)
            return [self._example(record, number) for record, number in zip(records, numbers, strict=True)]
        except (ValueError, IndexError, RuntimeError, OSError) as error:
            raise self._damaged(error) from error

    def _example(self, record: bytes, number: int) -> Example:
        length = int(self.lengths[number])
        size = length * self._id_type.itemsize
        if len(record) != size + -(-length // 8):
            raise ValueError(f"record {number} has {len(record)} bytes")
        ids = np.frombuffer(record, self._id_type, length).astype(np.int32)
        mask = np.unpackbits(np.frombuffer(record, np.uint8, offset=size), count=length)
        return Example(ids, mask)

    def _damaged(self, error: Exception) -> UserError:
        reason = (str(error) or type(error).__name__).splitlines()[0][:150]
        return UserError(
            f"{self.path} is damaged ({reason}): remove it and run again; it is made again from {self.name}"
        )
