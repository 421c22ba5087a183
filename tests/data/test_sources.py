"""Sources: every format gives the same items through one interface, streams them, and names what is wrong and where."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import pickle
import tracemalloc
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard

from transllm_jax.data.read import hub
from transllm_jax.data.read.files import Collector, read_lines
from transllm_jax.data.read.shards import Item, Reading, Shard, shards
from transllm_jax.data.read.sources import read_documents
from transllm_jax.errors import UserError

THAI = "สวัสดีครับ วันนี้อากาศดี"
TEXTS = [f"{THAI} 1", "two\nlines", "three"]
PAIRS = [("good day", THAI), ("two", "สอง")]
CHAT = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": f"<RESPONSE> {THAI}"},
    {"role": "user", "content": "And then?"},
]
Write = Callable[[Path, list[dict[str, Any]]], Path]


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def items(reading: Reading, collector: Collector | None = None) -> list[Item]:
    collector = collector or Collector(reading.controls)
    return [item for shard in shards(reading, hash_of) for item, _ in shard.items(collector)]


def places(reading: Reading) -> list[str]:
    return [str(place) for shard in shards(reading, hash_of) for _, place in shard.items(Collector(reading.controls))]


def write(path: Path, content: str | bytes) -> Path:
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


# ---- the same items from every format

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
    # A name says how a file is read, unless the reading does.
    assert items(Reading(str(jsonl(tmp_path / "b.dat", [{"text": "a"}])), container="jsonl")) == ["a"]


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, zstandard.compress])
def test_compressed_files(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    suffix = {gzip: ".gz", lzma: ".xz"}.get({gzip.compress: gzip, lzma.compress: lzma}.get(compress), ".zst")  # type: ignore[call-overload]
    content = ("\n".join(json.dumps({"text": f"{THAI} {n}"}) for n in range(3000)) + "\n").encode()
    # Two members (frames), as parallel compressors write.
    whole = compress(content[:50000]) + compress(content[50000:])
    path = write(tmp_path / f"a.jsonl{suffix}", whole)
    assert items(Reading(str(path))) == [f"{THAI} {n}" for n in range(3000)]
    for damaged in (whole[:-200], whole[: len(whole) // 3], b"no compression"):
        with pytest.raises(UserError, match=r"a\.jsonl\S+:\d+ cannot be decompressed .*damaged"):
            items(Reading(str(write(path, damaged))))


def test_zst_frames_that_hold_no_data_or_very_much(tmp_path: Path) -> None:
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00none"
    content = b"a" * 5_000_000 + b"\nb\n"
    path = write(tmp_path / "a.zst", skipped + zstandard.compress(content) + skipped)
    assert [len(line) for line, _ in read_lines(path, Collector("refuse"))] == [5_000_000, 1]


def test_no_stream_of_an_xz_file_is_left_out(tmp_path: Path) -> None:
    first, second = lzma.compress(b"one\n\n"), lzma.compress(b"two\n")
    # The format allows zeros between streams and behind the last.
    path = write(tmp_path / "a.txt.xz", first + b"\0" * 8 + second + b"\0" * 4)
    assert read_documents(path) == ["one", "two"]
    for damaged in (first + b"\1" + second[1:], first + b"no stream", first + second[:20]):
        with pytest.raises(UserError, match=r"a\.txt\.xz:\d+ cannot be decompressed .*damaged"):
            read_documents(write(path, damaged))


def test_texts_are_checked_made_nfc_and_counted(tmp_path: Path) -> None:
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
    # What is read at a time is 16 KiB to 1 MiB, by the format.
    assert peak < 1_500_000


# ---- shards


def test_a_shard_for_each_file_and_one_with_a_limit(tmp_path: Path) -> None:
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


def test_limits(tmp_path: Path) -> None:
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
    # What stands behind the limit is not read.
    tsv = write(tmp_path / "a.tsv", "a\tb\nc\td\nbad\n")
    assert items(Reading(str(tsv), "pairs", max_items=2)) == [("a", "b"), ("c", "d")]
    chat = str(jsonl(tmp_path / "c.jsonl", [{"messages": CHAT}, {"messages": CHAT}, {"bad": 1}]))
    assert len(items(Reading(chat, "conversations", max_items=2))) == 2


def test_a_key_changes_exactly_with_what_is_read(tmp_path: Path) -> None:
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
def test_settings_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: Reading, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.txt"), "a\n")
    write(Path("a.jsonl"), '{"text": "a"}\n')
    Path("here").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        shards(reading, hash_of)
    assert "\n" not in str(caught.value)


# ---- what is wrong is named with its place


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"a\.jsonl:2 is not JSON"),
        ("[1, 2]", r"a\.jsonl:2 is JSON but not an object"),
        ("1" * 5000, r"a\.jsonl:2 is not JSON"),
        ('{"tekst": "a"}', r"a\.jsonl:2 has no field 'text' \(it has: tekst\)"),
        ('{"text": 5}', r"a\.jsonl:2: field 'text' must be a string, not 5"),
        ('{"text": " "}', r"a\.jsonl:2: field 'text' is empty"),
        ('{"text": "a\\ud800"}', r"a\.jsonl:2 has half of a surrogate pair"),
        ('{"text": "a\\u0000"}', r"a\.jsonl:2 has the control character U\+0000"),
    ],
)
def test_bad_records(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n{line}\n{{"text": "more"}}\n')
    with pytest.raises(UserError, match=message):
        items(Reading(str(path)))


def test_a_text_of_nothing_but_control_characters_is_empty(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "\x01\x02"}])
    with pytest.raises(UserError, match="field 'text' is empty"):
        items(Reading(str(path), controls="remove"))


def test_paths_into_objects(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "a.jsonl", [{"a.b": "literal", "a": {"b": "inner", "c": "x"}}]))
    assert items(Reading(path, fields=("a.b",))) == ["literal"]
    assert items(Reading(path, fields=("a.c",))) == ["x"]
    for field in ("a.d", "a.c.x", "b.c"):
        with pytest.raises(UserError, match=rf"a\.jsonl:1 has no field '{field}'"):
            items(Reading(path, fields=(field,)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": }]', ":2 is not JSON .*column 10"),
        ('[{"text":\n "a"},\n{\n"text": 5}]', ":3: field 'text' must be a string"),
        ('[{"text": "a"}\n{"text": "b"}]', r":2 is not a list of objects \('' where ',' belongs\)"),
        ('[{"text": "a"}, 7, {"text": "a"}]', "is not a list of objects"),
        ('["a", "b"]', "is not a list of objects"),
        ('[["a"]]', ":1 is JSON but not an object"),
        ('[{"text": "a"}', ":1 is not JSON"),
        ('[{"text": "a"}]\n[{"text": "b"}]', ":2 begins another list"),
        ('[{"text": "a"}]\n]', ":2 is not a list"),
        ('[{"text": "a', "a string has no end"),
        ("[]", "a.json has no documents"),
        ("[" + "1,\n" * 200, ":50 is not a list of objects"),
    ],
)
def test_bad_lists(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        items(Reading(str(write(tmp_path / "a.json", content))))


def test_lists_are_cut_at_their_objects_alone(tmp_path: Path) -> None:
    texts = ['brackets ]}[{ and "quotes" \\', "", 'a\\"},{"', "[", "\\\\"]
    records = [{"text": text or "x", "more": [[{"a": []}], text]} for text in texts]
    for indent in (None, 1):
        path = write(tmp_path / "a.json", "\ufeff\n " + json.dumps(records, indent=indent) + "\n\n")
        assert items(Reading(str(path))) == [text or "x" for text in texts]
    write(path, '[\n{"text": "a"}, {"text":\n"b"}\n,\n{"text": "c"}\n]')
    assert [place.rpartition(":")[2] for place in places(Reading(str(path)))] == ["2", "2", "5"]


def test_an_object_that_never_ends_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transllm_jax.data.read.records._LARGEST", 1000)
    path = write(tmp_path / "a.json", '[\n{"text": "a",\n' + '"b": [1,\n' * 500)
    with pytest.raises(UserError, match=r"a\.json:2 has an object of more than"):
        items(Reading(str(path)))


def test_files_of_pairs(tmp_path: Path) -> None:
    english = write(tmp_path / "a.en", "one\ntwo\nthree\n")
    for content, message in (
        ("หนึ่ง\nสอง\n", r"a\.th has 2 lines and \S+a\.en has more"),
        ("หนึ่ง\nสอง\nสาม\nสี่\n", r"a\.en has 3 lines and \S+a\.th has more"),
        ("หนึ่ง\n \nสาม\n", r"a\.th:2 has an empty target-language side"),
    ):
        target = write(tmp_path / "a.th", content)
        with pytest.raises(UserError, match=message):
            items(Reading(str(english), "pairs", target_path=str(target)))
    with pytest.raises(UserError, match=r"a\.tsv:1 has an empty English side"):
        items(Reading(str(write(tmp_path / "a.tsv", " \tb\n")), "pairs"))
    with pytest.raises(UserError, match=r"p\.jsonl:1: field 'th' is empty"):
        items(Reading(str(jsonl(tmp_path / "p.jsonl", [{"en": "a", "th": " "}])), "pairs", fields=("en", "th")))


@pytest.mark.parametrize("name", ["a.txt", "a.tsv", "a.jsonl", "a.parquet"])
def test_empty_files(tmp_path: Path, name: str) -> None:
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    content = "pairs" if name == "a.tsv" else "text"
    with pytest.raises(UserError, match=rf"{name} is empty"):
        items(Reading(str(write(tmp_path / name, "")), content))  # type: ignore[arg-type]
    if name in ("a.txt", "a.jsonl"):
        with pytest.raises(UserError, match=rf"{name} has no documents"):
            items(Reading(str(write(tmp_path / name, "\n \n"))))


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.jsonlines", "a.Json", "a.jsonl.GZ", "a.ndjson.zst"])
def test_names_that_records_go_by(tmp_path: Path, name: str) -> None:
    raw = json.dumps({"text": THAI}).encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix.lower(), bytes)
    assert items(Reading(str(write(tmp_path / name, pack(raw))))) == [THAI]


def test_what_cannot_be_seen_is_empty(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\u200b"}]}
    for record, content in (({"text": "\ufeff \u200b"}, "text"), (chat, "conversations")):
        with pytest.raises(UserError, match=r"a\.jsonl:1: field .* is empty"):
            items(Reading(str(jsonl(tmp_path / "a.jsonl", [record])), content))  # type: ignore[arg-type]


def test_csv_is_not_read_as_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f"id,text\n1,{THAI}\n")
    with pytest.raises(UserError, match=r"a\.csv is CSV, which is not read"):
        items(Reading(str(path)))
    assert items(Reading(str(path), container="lines", separator="line")) == ["id,text", f"1,{THAI}"]


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table([["a"], ["b"], [1], [2]], names=["text", "text", "n", "n"])
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has the column 'text' twice"):
        items(Reading(str(tmp_path / "a.parquet")))


def test_bad_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [{"text": "a", "n": 1}, {"text": "b", "n": 2}, {"text": None, "n": 3}])
    with pytest.raises(UserError, match=r"a\.parquet:row 3: field 'text' must be a string, not null"):
        items(Reading(str(path)))
    with pytest.raises(UserError, match=r"a\.parquet has no field 'body' \(it has: text, n\)"):
        items(Reading(str(path), fields=("body",)))
    with pytest.raises(UserError, match=r"a\.parquet:row 1: field 'n' must be a string, not 1"):
        items(Reading(str(path), fields=("n",)))
    with pytest.raises(UserError, match=r"a\.parquet\S* cannot be read"):
        items(Reading(str(write(path, path.read_bytes()[:-20]))))
    with pytest.raises(UserError, match="decompress the file"):
        shards(Reading(str(write(tmp_path / "a.parquet.gz", "x"))), hash_of)


# ---- conversations


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


def flagged(**fields: object) -> dict[str, Any]:
    """A question and an answer with these fields beside it."""
    return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", **fields}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"is not a conversation \(it has: text\): write one of"),
        ({"messages": None}, "is not a conversation"),
        ({**turns("user"), "instruction": "a"}, "has 'messages' and 'instruction'"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "hello"}, "'messages' must be a list"),
        ({"messages": ["hello"]}, "message 1 must be an object"),
        ({"messages": [{"from": "human", "value": "x"}]}, "message 1 has no field 'role' .*from, value"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "message 1 has no field 'from'"),
        (turns("user", "tool"), "message 2 has the role 'tool' in 'role'.* user, assistant, system"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "the role 'bing' in 'from'"),
        (turns("assistant", "user"), "message 1 is the assistant's where the user's belongs"),
        (turns("user", "user"), "message 2 is the user's where the assistant's"),
        (turns("user", "system", "assistant"), "message 2 is the system's"),
        (turns("system", "assistant"), "message 2 is the assistant's"),
        (turns("user"), "no answer to train on"),
        (turns("system", "user"), "no answer to train on"),
        (turns("system"), "no answer to train on"),
        ({"messages": [{"role": "user", "content": " "}]}, r"'messages.1.content' is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"'messages.1.content' must be a string"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "has 'tool_calls', which is not supp"),
        ({**turns("user", "assistant"), "system": 5}, "'system' must be a string, not 5"),
        ({**turns("system", "user", "assistant"), "system": "Be good"}, "different system messages in system and the"),
        ({**turns("user", "assistant"), "system": "a", "system_prompt": "b"}, "in system and system_prompt"),
        ({**turns("user", "assistant"), "image": "0.jpg"}, "has 'image', which is not supported"),
        ({**turns("user", "assistant"), "chosen": ["a"], "tools": "[]"}, "has 'tools', 'chosen', which is not supp"),
        (flagged(reasoning_content="So."), "message 2 has 'reasoning_content', which is not supported"),
        (flagged(refusal="No."), "message 2 has 'refusal'"),
        (flagged(masked=False), "message 2 has 'masked', which is not read: set `train: true`"),
        (flagged(train_detail=[]), "message 2 has 'train_detail', which is not read"),
        (flagged(weight=0.5), "message 2 has the weight 0.5: an answer is trained on .1. or is only context .0."),
        (flagged(weight=True), "message 2 has the weight True"),
        (flagged(train="no"), "message 2 has 'no' in 'train': write true or false"),
        (flagged(train=False, weight=1), "message 2 has the weight 1 and train false: keep only one"),
        (flagged(weight=0), "no answer to train on"),
        (flagged(train=False), "no answer to train on"),
        ({"messages": [{"role": "user", "content": "x", "train": True}]}, "message 1 is the user's and has train true"),
        ({"instruction": "a"}, "has no field 'output'"),
        ({"instruction": "a", "output": " "}, "'output' is empty"),
        ({"instruction": "a", "output": "b", "input": 5}, "'input' must be a string"),
        ({"instruction": "a", "output": "b", "history": [["q", "a"]]}, "has 'history'"),
    ],
)
def test_bad_conversations(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [record])
    with pytest.raises(UserError, match=message) as caught:
        items(Reading(str(path), "conversations"))
    assert "a.jsonl:1" in str(caught.value) and "\n" not in str(caught.value)


def test_a_source_of_two_forms_is_refused(tmp_path: Path) -> None:
    chat, alpaca = turns("user", "assistant"), {"instruction": "a", "output": "b"}
    path = jsonl(tmp_path / "a.jsonl", [chat, alpaca])
    with pytest.raises(UserError, match=r"a\.jsonl:2 is of the form instruction, input, output.*messages"):
        items(Reading(str(path), "conversations"))
    jsonl(tmp_path / "b" / "a.jsonl", [chat])
    jsonl(tmp_path / "b" / "b.jsonl", [alpaca])
    _, second = shards(Reading(str(tmp_path / "b" / "*.jsonl"), "conversations"), hash_of)
    with pytest.raises(UserError, match=r"b\.jsonl:1 is of the form instruction"):
        list(second.items(Collector("refuse")))


def test_a_table_of_columns_is_a_list_of_messages(tmp_path: Path) -> None:
    columns = {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}}
    assert items(Reading(str(jsonl(tmp_path / "a.jsonl", [columns])), "conversations")) == [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ]


@pytest.mark.parametrize("form", ["conversations", "messages"])
@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": False}])
def test_an_answer_can_be_context_alone(tmp_path: Path, form: str, flag: dict[str, Any]) -> None:
    role, text, assistant = ("from", "value", "gpt") if form == "conversations" else ("role", "content", "assistant")
    turns = [
        # Exports give every message a weight.
        {role: "user", text: "a", "weight": 1},
        {role: assistant, text: "WRONG", **flag},
        {role: "user", text: "b", "weight": 0, "train": None},
        {role: assistant, text: "right", "weight": 1, "train": True},
    ]
    (found,) = items(Reading(str(jsonl(tmp_path / "a.jsonl", [{form: turns}])), "conversations"))
    assert isinstance(found, list)
    assert [message.get("train") for message in found] == [None, False, None, None]
    assert [message["content"] for message in found] == ["a", "WRONG", "b", "right"]


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_message_beside_a_conversation_is_its_first_message(tmp_path: Path, name: str) -> None:
    shapes: list[dict[str, Any]] = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"instruction": "a", "output": "b"},
    ]
    same = {"messages": [{"role": "system", "content": "Be brief. "}, *shapes[1]["messages"]]}
    for record in (*shapes, same):
        path = str(jsonl(tmp_path / "a.jsonl", [{**record, name: "Be brief."}, {**shapes[0], name: " "}][:1]))
        (found,) = items(Reading(path, "conversations"))
        assert [str(message["content"]).strip() for message in found if isinstance(message, dict)] == [
            "Be brief.",
            "a",
            "b",
        ]
        assert isinstance(found[0], dict) and found[0]["role"] == "system"
    path = str(jsonl(tmp_path / "a.jsonl", [{**shapes[0], name: " "}]))
    assert len(items(Reading(path, "conversations"))[0]) == 2


def test_fields_that_are_not_read_are_counted(tmp_path: Path) -> None:
    records = [
        {**flagged(timestamp=5), "id": "1", "source": "here"},
        {**flagged(timestamp=None, train=None), "id": "2", "source": None, "image": "", "tools": []},
    ]
    (shard,) = shards(Reading(str(jsonl(tmp_path / "a.jsonl", records)), "conversations"), hash_of)
    collector = Collector("refuse")
    assert len(list(shard.items(collector))) == 2
    assert collector.ignored == {"id": 2, "source": 1, "messages.timestamp": 1}


# ---- datasets of Hugging Face


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return pytest.importorskip("datasets")


def keys(found: list[Shard]) -> list[str]:
    return [shard.key for shard in found]


def test_a_local_dataset(tmp_path: Path, datasets: Any) -> None:
    root = tmp_path / "corpus"
    for number in range(3):
        jsonl(root / f"train-{number}.jsonl", [{"text": f"{THAI} {number}.{n}"} for n in range(2)])
    jsonl(root / "test.jsonl", [{"text": "held out"}])
    reading = Reading(str(root), container="datasets")
    found = shards(reading, hash_of)
    assert [shard.name for shard in found] == ["corpus-train-0", "corpus-train-1", "corpus-train-2"]
    assert len(set(keys(found))) == 3 and all(shard.size > 0 for shard in found)
    assert sorted(items(reading)) == [f"{THAI} {number}.{n}" for number in range(3) for n in range(2)]  # type: ignore[type-var]
    assert items(Reading(str(root), container="datasets", split="test")) == ["held out"]
    again = pickle.loads(pickle.dumps(found[1]))
    assert [str(place) for _, place in again.items(Collector("refuse"))][1].endswith("(train, shard 2 of 3):record 2")
    assert [item for item, _ in again.items(Collector("refuse"))] == [f"{THAI} 1.{n}" for n in range(2)]
    (limited,) = shards(Reading(str(root), container="datasets", max_bytes=1), hash_of)
    assert len(list(limited.items(Collector("refuse")))) == 1
    # The split's own files are what counts.
    before = keys(found)
    jsonl(root / "test.jsonl", [{"text": "changed"}])
    assert keys(shards(reading, hash_of)) == before
    jsonl(root / "train-2.jsonl", [{"text": "changed"}])
    assert not set(keys(shards(reading, hash_of))) & set(before)
    with pytest.raises(UserError, match=r"corpus.*\"?dev"):
        shards(Reading(str(root), container="datasets", split="dev"), hash_of)
    with pytest.raises(UserError, match=r"corpus \(test\):record 1 has no field 'body'"):
        items(Reading(str(root), container="datasets", split="test", fields=("body",)))


def test_a_dataset_that_was_saved_to_disk(tmp_path: Path, datasets: Any) -> None:
    root = tmp_path / "saved"
    whole = datasets.Dataset.from_list([{"messages": CHAT[:2]}, {"messages": CHAT}])
    datasets.DatasetDict({"train": whole}).save_to_disk(root)
    reading = Reading(str(root), "conversations", container="datasets")
    assert items(reading) == [CHAT[:2], CHAT]
    with pytest.raises(UserError, match="no such split; it has train"):
        shards(Reading(str(root), "conversations", container="datasets", split="dev"), hash_of)
    whole.save_to_disk(tmp_path / "one")
    assert items(Reading(str(tmp_path / "one"), "conversations", container="datasets")) == [CHAT[:2], CHAT]


def test_a_directory_with_the_name_of_a_reader(tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "json" / "train.jsonl", [{"text": "one"}])
    assert items(Reading("json", container="datasets")) == ["one"]


def test_datasets_that_are_damaged_or_no_text(tmp_path: Path, datasets: Any) -> None:
    write(tmp_path / "bad" / "train.jsonl", '{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"bad") as caught:
        items(Reading(str(tmp_path / "bad"), container="datasets"))
    assert "\n" not in str(caught.value)
    write(tmp_path / "pictures" / "a.png", b"x")
    with pytest.raises(UserError, match="kind 'imagefolder', which is not supported"):
        shards(Reading(str(tmp_path / "pictures"), container="datasets"), hash_of)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        shards(Reading(str(tmp_path / "empty"), container="datasets"), hash_of)


def test_a_name_on_the_hub_is_pinned_to_its_revision(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None, str | None]] = []
    head = ["a" * 40]
    real = datasets.load_dataset_builder
    jsonl(tmp_path / "corpus" / "train.jsonl", [{"text": "one"}])
    local = real(str(tmp_path / "corpus"))

    def load(path: str, name: str | None, *, revision: str | None = None, **options: Any) -> Any:
        assert options == {"data_dir": None}  # and never trust_remote_code
        asked.append((path, name, revision))
        return Builder(hash=revision or head[0], as_streaming_dataset=local.as_streaming_dataset)

    class Builder(SimpleNamespace):
        __module__ = "datasets.packaged_modules.json.json"

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    reading = Reading("owner/name/thai", container="datasets")
    (first,) = shards(reading, hash_of)
    assert asked[0] == ("owner/name", "thai", None) and first.size == 0
    head[0] = "b" * 40
    asked.clear()
    # A shard that was made before a change goes on reading what it was made for.
    assert [item for item, _ in first.items(Collector("refuse"))] == ["one"]
    assert set(asked) == {("owner/name", "thai", "a" * 40)}
    (second,) = shards(reading, hash_of)
    (pinned,) = shards(Reading(f"owner/name/thai@{'a' * 40}", container="datasets"), hash_of)
    assert second.key != first.key == pinned.key
    head[0] = "main"
    with pytest.raises(UserError, match="its revision on the hub cannot be found out"):
        shards(reading, hash_of)


@pytest.mark.parametrize(
    ("module", "container", "package"),
    [("datasets", "datasets", "datasets"), ("tensorflow_datasets", "tfds", "tensorflow-datasets")],
)
def test_a_library_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, container: Any, package: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=rf"needs `{package}`; pip install 'transllm-jax\[data\]'"):
        shards(Reading(str(tmp_path), container=container), hash_of)


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", "x")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow; pip install 'transllm-jax\[data\]'"):
        items(Reading(str(path)))


def test_an_empty_shard_among_others_is_passed_over(tmp_path: Path, datasets: Any) -> None:
    root = tmp_path / "corpus"
    for number, text in enumerate(("a\n", "")):
        write(root / f"train-{number}.csv", f"text\n{text}")
    reading = Reading(str(root), container="datasets")
    assert len(shards(reading, hash_of)) == 2 and items(reading) == ["a"]
    (root / "train-0.csv").unlink()
    with pytest.raises(UserError, match="has no documents"):
        items(reading)


# ---- TFDS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of prepared datasets, with one of two files in it."""
    tfds = pytest.importorskip("tensorflow_datasets")
    directory = tmp_path_factory.mktemp("tfds")
    text = tfds.features.Text()

    class TinyThai(tfds.core.GeneratorBasedBuilder):
        name = "tiny_thai"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = {
                "text": text,
                "translation": tfds.features.Translation(["en", "th"]),
                "messages": tfds.features.Sequence({"role": text, "content": text}),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager: Any) -> Mapping[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for number in range(6):
                translation = {"en": f"text {number}", "th": f"ข้อความ {number}"}
                yield number, {"text": f"{THAI} {number}", "translation": translation, "messages": CHAT}

    builder = TinyThai(data_dir=str(directory), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return directory


def test_tfds(prepared: Path) -> None:
    reading = Reading("tiny_thai", container="tfds", data_dir=str(prepared))
    found = shards(reading, hash_of)
    assert len(found) == 2 and len(set(keys(found))) == 2 and all(shard.size for shard in found)
    texts = items(reading)
    assert sorted(texts) == [f"{THAI} {n}" for n in range(6)]  # type: ignore[type-var]
    assert [int(place.rpartition(" ")[2]) for place in places(reading)] == [1, 2, 3, 4, 5, 6]
    again = pickle.loads(pickle.dumps(found[1]))
    assert [item for item, _ in again.items(Collector("refuse"))] == texts[3:]
    options: dict[str, Any] = {"container": "tfds", "data_dir": str(prepared)}
    part = Reading("tiny_thai:1.0.0", split="train[1:5]", **options)
    assert items(part) == texts[1:5] and not set(keys(shards(part, hash_of))) & set(keys(found))
    assert items(Reading("tiny_thai", max_bytes=1, **options)) == texts[:1]
    pairs = items(Reading("tiny_thai", "pairs", fields=("translation.en", "translation.th"), **options))
    assert ("text 3", "ข้อความ 3") in pairs and len(pairs) == 6
    assert items(Reading("tiny_thai", "conversations", **options)) == [CHAT] * 6
    with pytest.raises(UserError, match=r"1\.0\.0 \(train\):record 1 has no field 'body'"):
        items(Reading("tiny_thai", fields=("body",), **options))
    with pytest.raises(UserError, match=r"has no split 'dev' \(it has: train\)"):
        shards(Reading("tiny_thai", split="dev", **options), hash_of)
    with pytest.raises(UserError, match="TFDS dataset no_such_thai is not prepared in"):
        shards(Reading("no_such_thai", **options), hash_of)


def test_tfds_never_loads_code_that_a_dataset_names(prepared: Path, tmp_path: Path) -> None:
    root = tmp_path / "tiny_thai" / "1.0.0"
    root.mkdir(parents=True)
    for file in (prepared / "tiny_thai" / "1.0.0").iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    reading = Reading("tiny_thai", container="tfds", data_dir=str(tmp_path))
    assert len(items(reading)) == 6
    features = root / "features.json"
    features.write_text(features.read_text().replace("tensorflow_datasets.core.features.text_feature", "antigravity"))
    with pytest.raises(UserError, match=r"names code outside of TFDS \(antigravity\.Text\)"):
        shards(reading, hash_of)


def test_tfds_names(prepared: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"container": "tfds", "data_dir": str(tmp_path)}
    for version in ("1.0.0", "9.0.0", "10.0.0"):
        root = tmp_path / "tiny_thai" / version
        root.mkdir(parents=True)
        for file in (prepared / "tiny_thai" / "1.0.0").iterdir():
            (root / file.name).write_bytes(file.read_bytes())
    assert "/10.0.0 (" in places(Reading("tiny_thai", **options))[0]
    assert "/9.0.0 (" in places(Reading("tiny_thai:9.0.0", **options))[0]
    for config in ("b", "a"):
        (tmp_path / "other" / config / "1.0.0").mkdir(parents=True)
        write(tmp_path / "other" / config / "1.0.0" / "dataset_info.json", "{}")
    for name, message in (
        ("tiny_thai:2.0.0", r"has no version 2\.0\.0, but 1\.0\.0, 10\.0\.0, 9\.0\.0: name one, or prepare it by"),
        ("other", "has configs: name one of a, b, as other/CONFIG"),
        ("other/a", "has no features.json"),
        ("../tiny_thai", "is not the name of a TFDS dataset"),
        ("huggingface:name", "is not the name of a TFDS dataset"),
    ):
        with pytest.raises(UserError, match=message):
            shards(Reading(name, **options), hash_of)
    info = tmp_path / "tiny_thai" / "10.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"prepared as tfrecord, but only array_record is read: prepare it by"):
        shards(Reading("tiny_thai", **options), hash_of)


def test_hub_names() -> None:
    for path in ("../owner/name", "a/b/c/d", "/nowhere/at/all", "owner", "s3://bucket/x"):
        with pytest.raises(UserError, match="neither a directory nor a name on the hub"):
            hub.parts_of(path, "train", None, hash_of)
