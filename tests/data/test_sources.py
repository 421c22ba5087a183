"""Sources: every format is streamed and gives the same items, and shards have keys."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import pickle
import tracemalloc
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from tiny_sources import CHAT, THAI, hash_of, items, json_list, jsonl, parquet, places, write

from transllm_jax.data.read.files import Collector, read_lines
from transllm_jax.data.read.shards import Reading, shards
from transllm_jax.data.read.sources import read_documents
from transllm_jax.errors import UserError

TEXTS = [f"{THAI} 1", "two\nlines", "three"]
PAIRS = [("good day", THAI), ("two", "สอง")]

Write = Callable[[Path, list[dict[str, Any]]], Path]

RECORDS: list[tuple[Write, str]] = [(jsonl, "a.jsonl"), (json_list, "a.json"), (parquet, "a.parquet")]


@pytest.mark.parametrize(("writer", "name"), RECORDS)
def test_records_give_texts_pairs_and_conversations(tmp_path: Path, writer: Write, name: str) -> None:
    texts = [{"text": text, "id": number, "body": {"th": text[::-1]}} for number, text in enumerate(TEXTS)]
    path = str(writer(tmp_path / name, texts))
    assert items(Reading(path)) == TEXTS
    assert items(Reading(path, fields=("body.th",))) == [text[::-1] for text in TEXTS]

    pairs = [{"translation": {"en": f" {en} ", "th": th}} for en, th in PAIRS]
    path = str(writer(tmp_path / name, pairs))
    assert items(Reading(path, "pairs", fields=("translation.en", "translation.th"))) == PAIRS

    turns = [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in CHAT]
    path = str(writer(tmp_path / name, [{"id": "1", "conversations": turns}] * 2))
    assert items(Reading(path, "conversations")) == [CHAT, CHAT]
    system = {"role": "system", "content": "Be short."}
    path = str(writer(tmp_path / name, [{"messages": [system, *CHAT]}]))
    assert items(Reading(path, "conversations")) == [[system, *CHAT]]
    alpaca = [
        {"instruction": " Add. ", "input": "1 2 ", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "x"},
    ]
    path = str(writer(tmp_path / name, alpaca))
    assert [[m["content"] for m in item] for item in items(Reading(path, "conversations"))] == [  # type: ignore[index]
        ["Add.\n\n1 2", "3"],
        ["Hi", "x"],
    ]


def test_lines_give_texts_and_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\ntwo\n\nthree\n")
    assert items(Reading(str(path))) == read_documents(path) == ["one\ntwo", "three"]
    assert items(Reading(str(path), separator="line")) == ["one", "two", "three"]
    tsv = write(tmp_path / "a.tsv", "".join(f"{en}\t {th}\n" for en, th in PAIRS))
    assert items(Reading(str(tsv), "pairs")) == PAIRS
    english = write(tmp_path / "t.en", "".join(f"{en}\n" for en, _ in PAIRS))
    target = write(tmp_path / "t.th", "".join(f"{th} \n" for _, th in PAIRS))
    assert items(Reading(str(english), "pairs", target_path=str(target))) == PAIRS
    # The file's name decides how it is read, unless `container` is set.
    assert items(Reading(str(jsonl(tmp_path / "b.dat", [{"text": "a"}])), container="jsonl")) == ["a"]


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, zstandard.compress])
def test_compressed_files_are_read(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    suffix = {gzip: ".gz", lzma: ".xz"}.get({gzip.compress: gzip, lzma.compress: lzma}.get(compress), ".zst")  # type: ignore[call-overload]
    content = ("\n".join(json.dumps({"text": f"{THAI} {n}"}) for n in range(3000)) + "\n").encode()
    # Parallel compressors write several members (frames).
    whole = compress(content[:50000]) + compress(content[50000:])
    path = write(tmp_path / f"a.jsonl{suffix}", whole)
    assert items(Reading(str(path))) == [f"{THAI} {n}" for n in range(3000)]
    for damaged in (whole[:-200], whole[: len(whole) // 3], b"no compression"):
        with pytest.raises(UserError, match=r"a\.jsonl\S+:\d+ cannot be decompressed .*damaged"):
            items(Reading(str(write(path, damaged))))


def test_zst_frames_may_be_empty_or_large(tmp_path: Path) -> None:
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00none"
    content = b"a" * 5_000_000 + b"\nb\n"
    path = write(tmp_path / "a.zst", skipped + zstandard.compress(content) + skipped)
    assert [len(line) for line, _ in read_lines(path, Collector("refuse"))] == [5_000_000, 1]


def test_every_stream_of_an_xz_file_is_read(tmp_path: Path) -> None:
    first, second = lzma.compress(b"one\n\n"), lzma.compress(b"two\n")
    # The format allows zeros between streams and after the last.
    path = write(tmp_path / "a.txt.xz", first + b"\0" * 8 + second + b"\0" * 4)
    assert read_documents(path) == ["one", "two"]
    for damaged in (first + b"\1" + second[1:], first + b"no stream", first + second[:20]):
        with pytest.raises(UserError, match=r"a\.txt\.xz:\d+ cannot be decompressed .*damaged"):
            read_documents(write(path, damaged))


def test_records_may_have_windows_line_ends(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    whole = write(tmp_path / "b.json", b'[\r\n{"text":\r\n"one"},\r\n{"text": "two"}\r\n]\r\n')
    for path in (lines, whole):
        assert items(Reading(str(path))) == ["one", "two"]
    # Elsewhere in a line it is refused still.
    with pytest.raises(UserError, match=r"a\.jsonl:1 has a carriage return"):
        items(Reading(str(write(lines, b'{"text":\r"one"}\r\n'))))


def test_texts_are_checked_normalised_and_counted(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"{decomposed}\r\nb"}, {"text": "ก", "unused": "\x00"}])
    with pytest.raises(UserError, match=r"a\.jsonl:1 has a carriage return"):
        items(Reading(str(path)))
    collector = Collector("remove")
    assert items(Reading(str(path), controls="remove"), collector) == ["café\nb", "ก"]
    report = collector.report
    assert (report.documents, report.normalised, report.removed) == (2, 1, 1)
    assert (report.characters, report.bytes) == (7, 10)
    assert not collector.items
    chat = {"messages": [{"role": "user", "content": decomposed}, {"role": "assistant", "content": "x"}]}
    assert items(Reading(str(jsonl(path, [chat])), "conversations"))[0][0]["content"] == "café"  # type: ignore[index]


@pytest.mark.parametrize("form", ["lines", "jsonl", "list", "zst"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, form: str) -> None:
    texts = [f"{THAI} {hashlib.sha256(str(n).encode()).hexdigest()} " * 8 for n in range(6000)]
    records = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    content = {"lines": "\n\n".join(texts), "list": "[\n" + ",\n  ".join(records) + "]"}
    raw = content.get(form, "\n".join(records)).encode()
    assert len(raw) > 6_000_000
    path = write(
        tmp_path / {"lines": "a.txt", "list": "a.json", "zst": "a.jsonl.zst"}.get(form, "a.jsonl"),
        zstandard.compress(raw) if form == "zst" else raw,
    )
    (shard,) = shards(Reading(str(path)), lambda _: "")
    del texts, records, content, raw
    tracemalloc.start()
    assert sum(1 for _ in shard.items(Collector("refuse"))) == 6000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 16 KiB to 1 MiB are read at a time, depending on the format.
    assert peak < 1_500_000


def test_each_file_is_a_shard_unless_there_is_a_limit(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.txt", f"{name}1\n\n{name}2\n")
    reading = Reading(str(tmp_path / "*.txt"))
    found = shards(reading, hash_of)
    assert [shard.name for shard in found] == ["a.txt", "b.txt", "c.txt"]
    assert [shard.size for shard in found] == [7, 7, 7] and len({shard.key for shard in found}) == 3
    assert items(reading) == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert places(reading)[1] == f"{tmp_path}/a.txt:3"
    (limited,) = shards(Reading(reading.path, max_bytes=6), hash_of)
    assert limited.size == 21 and "/" not in limited.name
    assert [item for item, _ in limited.items(Collector("refuse"))] == ["a1", "a2", "b1"]
    again = pickle.loads(pickle.dumps(limited))
    assert again == limited and [item for item, _ in again.items(Collector("refuse"))] == ["a1", "a2", "b1"]


def test_reading_ends_at_its_limits(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "a.jsonl", [{"text": "aaaa"}, {"text": "กก"}, {"text": "c"}]))
    assert [items(Reading(path, max_bytes=size)) for size in (1, 9, 10, 11)] == [
        ["aaaa"],
        ["aaaa"],
        ["aaaa", "กก"],
        ["aaaa", "กก", "c"],
    ]
    assert items(Reading(path, max_items=2)) == ["aaaa", "กก"]
    assert items(Reading(path, max_bytes=11, max_items=1)) == items(Reading(path, max_bytes=1, max_items=2)) == ["aaaa"]
    text = str(write(tmp_path / "a.txt", "a\n\nb\n\nc\n"))
    assert items(Reading(text, max_items=2)) == ["a", "b"]
    # Nothing after the limit is read.
    tsv = write(tmp_path / "a.tsv", "a\tb\nc\td\nbad\n")
    assert items(Reading(str(tsv), "pairs", max_items=2)) == [("a", "b"), ("c", "d")]
    chat = str(jsonl(tmp_path / "c.jsonl", [{"messages": CHAT}, {"messages": CHAT}, {"bad": 1}]))
    assert len(items(Reading(chat, "conversations", max_items=2))) == 2


def test_a_key_depends_on_what_is_read_and_nothing_else(tmp_path: Path) -> None:
    def key(reading: Reading) -> str:
        (shard,) = shards(reading, hash_of)
        return shard.key

    path = write(tmp_path / "a.tsv", "a\tb\n")
    same = write(tmp_path / "elsewhere" / "b.txt", "a\tb\n")
    text, pairs = Reading(str(path)), Reading(str(path), "pairs")
    assert key(text) == key(Reading(str(same))) == key(Reading(str(path), container="lines"))
    target = write(tmp_path / "t.th", "a\tb\n")
    record = write(tmp_path / "r.jsonl", '{"text": "a"}')
    assert key(Reading(str(record))) == key(Reading(str(record), fields=("text",)))
    keys = [
        key(text),
        key(pairs),
        key(Reading(str(path), separator="line")),
        key(Reading(str(path), controls="remove")),
        key(Reading(str(path), max_bytes=5)),
        key(Reading(str(path), max_bytes=6)),
        key(Reading(str(path), max_items=5)),
        key(Reading(str(path), "pairs", target_path=str(target))),
        key(Reading(str(write(tmp_path / "a.txt.gz", "a\tb\n")))),
        key(Reading(str(record))),
        key(Reading(str(record), fields=("other",))),
        key(Reading(str(record), "pairs", fields=("a", "b"))),
        key(Reading(str(record), "pairs", fields=("b", "a"))),
        key(Reading(str(record), container="lines")),
    ]
    write(path, "a\tc\n")
    keys += [key(text), key(pairs)]
    write(target, "a\td\n")
    keys.append(key(Reading(str(same), "pairs", target_path=str(target))))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (Reading("a.txt", "conversations"), "lines hold no conversations"),
        (Reading("a.txt", fields=("a",)), "fields are for records"),
        (Reading("a.jsonl", "pairs"), "jsonl of pairs need fields: name two, the English one first"),
        (Reading("a.jsonl", "pairs", fields=("a",)), "need fields: name two"),
        (Reading("a.jsonl", fields=("a", "b")), "fields are a, b: name the one"),
        (Reading("a.jsonl", "conversations", fields=("a",)), "remove fields"),
        (Reading("a.txt", target_path="b"), "target_path"),
        (Reading("a.jsonl", "pairs", fields=("a", "b"), target_path="b"), "target_path"),
        (Reading("a.jsonl", separator="line"), "separator is for text in lines"),
        (Reading("a.txt", "pairs", separator="line"), "separator is for text in lines"),
        (Reading("a.txt", split="test"), "split and data_dir are for datasets and tfds"),
        (Reading("a.jsonl", data_dir="x"), "split and data_dir are for datasets and tfds"),
        (Reading("a.txt", max_bytes=0), "max_bytes is 0"),
        (Reading("a.txt", max_items=0, fields=("a",)), "remove fields; max_items is 0"),
        (Reading("a.txt", "pairs", max_bytes=9), "max_bytes is for text: set max_items"),
        (Reading("a.*"), r"several kinds, a\.jsonl \(jsonl\), a\.txt \(lines\): .* set container"),
        (Reading("none.txt"), "no file matches none.txt"),
        (Reading("."), "is a directory"),
        (Reading("a.txt", "pairs", target_path="*"), r"a\.txt means 1 files and \* 2"),
        (Reading("none/", container="datasets"), "neither a directory nor a name on the hub"),
        (Reading("json", container="datasets"), "neither a directory nor a name on the hub"),
        (Reading("here/none", container="datasets"), "there is a directory here here, and no none in it"),
        (Reading("here/none/v2", container="datasets"), "there is a directory here here, and no none/v2 in it"),
        (Reading("org/a.parquet", container="datasets"), "there is no such file here"),
        # The tests are offline.
        (Reading("org/none", container="datasets"), "there is no such directory here, and on the hub it cannot be"),
    ],
)
def test_settings_that_conflict_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: Reading, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.txt"), "a\n")
    write(Path("a.jsonl"), '{"text": "a"}\n')
    Path("here").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        shards(reading, hash_of)
    assert "\n" not in str(caught.value)
