"""Sources: an error in a file names its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from tiny_sources import THAI, hash_of, items, jsonl, parquet, places, write

from transllm_jax.data.read.shards import Reading, shards
from transllm_jax.errors import UserError


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
def test_bad_records_are_refused_with_their_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n{line}\n{{"text": "more"}}\n')
    with pytest.raises(UserError, match=message):
        items(Reading(str(path)))


def test_a_text_of_control_characters_is_empty(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "\x01\x02"}])
    with pytest.raises(UserError, match="field 'text' is empty"):
        items(Reading(str(path), controls="remove"))


def test_a_field_may_be_a_path(tmp_path: Path) -> None:
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
def test_bad_lists_are_refused_with_their_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        items(Reading(str(write(tmp_path / "a.json", content))))


def test_lists_are_split_at_their_objects(tmp_path: Path) -> None:
    texts = ['brackets ]}[{ and "quotes" \\', "", 'a\\"},{"', "[", "\\\\"]
    records = [{"text": text or "x", "more": [[{"a": []}], text]} for text in texts]
    for indent in (None, 1):
        path = write(tmp_path / "a.json", "\ufeff\n " + json.dumps(records, indent=indent) + "\n\n")
        assert items(Reading(str(path))) == [text or "x" for text in texts]
    write(path, '[\n{"text": "a"}, {"text":\n"b"}\n,\n{"text": "c"}\n]')
    assert [place.rpartition(":")[2] for place in places(Reading(str(path)))] == ["2", "2", "5"]


def test_an_object_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transllm_jax.data.read.records._LARGEST", 1000)
    path = write(tmp_path / "a.json", '[\n{"text": "a",\n' + '"b": [1,\n' * 500)
    with pytest.raises(UserError, match=r"a\.json:2 has an object of more than"):
        items(Reading(str(path)))


def test_bad_pairs_are_refused(tmp_path: Path) -> None:
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
def test_empty_files_are_refused(tmp_path: Path, name: str) -> None:
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    content = "pairs" if name == "a.tsv" else "text"
    with pytest.raises(UserError, match=rf"{name} is empty"):
        items(Reading(str(write(tmp_path / name, "")), content))  # type: ignore[arg-type]
    if name in ("a.txt", "a.jsonl"):
        with pytest.raises(UserError, match=rf"{name} has no documents"):
            items(Reading(str(write(tmp_path / name, "\n \n"))))


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.jsonlines", "a.Json", "a.jsonl.GZ", "a.ndjson.zst"])
def test_every_ending_of_a_file_of_records_is_known(tmp_path: Path, name: str) -> None:
    raw = json.dumps({"text": THAI}).encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix.lower(), bytes)
    assert items(Reading(str(write(tmp_path / name, pack(raw))))) == [THAI]


def test_invisible_text_is_empty(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\u200b"}]}
    for record, content in (({"text": "\ufeff \u200b"}, "text"), (chat, "conversations")):
        with pytest.raises(UserError, match=r"a\.jsonl:1: field .* is empty"):
            items(Reading(str(jsonl(tmp_path / "a.jsonl", [record])), content))  # type: ignore[arg-type]


def test_csv_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f"id,text\n1,{THAI}\n")
    with pytest.raises(UserError, match=r"a\.csv is CSV, which is not read"):
        items(Reading(str(path)))
    assert items(Reading(str(path), container="lines", separator="line")) == ["id,text", f"1,{THAI}"]


def test_a_repeated_column_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table([["a"], ["b"], [1], [2]], names=["text", "text", "n", "n"])
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has the column 'text' twice"):
        items(Reading(str(tmp_path / "a.parquet")))


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
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


def test_parquet_without_pyarrow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", "x")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow; pip install 'transllm-jax\[data\]'"):
        items(Reading(str(path)))
