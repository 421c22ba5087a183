"""Bad rows: refused by default; or skipped, counted, written down, and too many of them refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_shards import hash_of
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.choices import Container, Content
from transllm_jax.config import Source
from transllm_jax.data.read.bad_rows import check_share
from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.headers import is_header
from transllm_jax.data.read.shards import Item, Reading, shards
from transllm_jax.data.read.sources import read_pairs
from transllm_jax.data.rows import token_cache
from transllm_jax.data.rows.planned import PlannedRows, Selection
from transllm_jax.data.rows.tokenise import tokenise
from transllm_jax.data.rows.transform import Transform
from transllm_jax.errors import UserError
from transllm_jax.stages.bad_rows import BadRows
from transllm_jax.stages.token_rows import fields_not_read, left_out
from transllm_jax.tokenizer.tokenizer import Tokenizer

PAIRS = "English\tThai\nIt rains.\tฝนตก\nIt rains.\tฝนตก\t(third column)\n\tว่าง\nThe sea is calm.\tทะเลสงบ\n"
GOOD = [("It rains.", "ฝนตก"), ("The sea is calm.", "ทะเลสงบ")]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def skipping(path: Path, content: Content = "text", **more: Any) -> tuple[list[Item], Collector]:
    """The items of a source whose bad rows are skipped, and what was noted of those."""
    collector = Collector("refuse", "skip")
    found = shards(Reading(str(path), content, on_bad_rows="skip", **more), hash_of)
    return [item for shard in found for item, _ in shard.items(collector)], collector


def test_bad_pairs_are_skipped_counted_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(PAIRS, encoding="utf-8")
    found, collector = skipping(path, "pairs")
    assert found == GOOD
    assert collector.skipped == {"header line": 1, "not one tab": 1, "empty side": 1}
    assert [(row["place"], row["reason"], row["row"]) for row in collector.bad_rows] == [
        (f"{path}:1", "header line", "English\tThai"),
        (f"{path}:3", "not one tab", "It rains.\tฝนตก\t(third column)"),
        (f"{path}:4", "empty side", "\tว่าง"),
    ]
    assert collector.bad_rows[2]["fault"] == f"{path}:4 has an empty English side: fill it in or remove the line"
    # A budget of items is one of good ones.
    assert skipping(path, "pairs", max_items=2)[0] == GOOD


def test_a_header_is_no_pair_by_default(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("\ufeff" + PAIRS, encoding="utf-8")
    (shard,) = shards(Reading(str(path), "pairs"), hash_of)
    for read in (lambda: list(shard.items(Collector("refuse"))), lambda: read_pairs(path)):
        with pytest.raises(
            UserError, match=r"a\.tsv:1 names the columns \('English' and 'Thai'\) and is not a pair: rem"
        ):
            read()
    # Elsewhere than in the first line, these words are a pair.
    path.write_text("a\tb\nEnglish\tThai\n", encoding="utf-8")
    assert list(read_pairs(path)) == [("a", "b"), ("English", "Thai")]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("source", "target"),
        ("Source", "Target"),
        ("src", "tgt"),
        ("en", "th"),
        ("EN", "TH"),
        ("en-US", "th_TH"),
        ("eng_Latn", "tha_Thai"),
        ("English", "Thai"),
        ("thai", "english"),
        ("source_text", "target_text"),
        ("English text", "translation"),
        ("en", "Traditional Chinese"),
    ],
)
def test_names_of_columns(one: str, other: str) -> None:
    assert is_header(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("English", "ภาษาอังกฤษ"),
        ("English", "Englisch"),
        ("English", "English"),
        ("Source", "Quelle"),
        ("no", "nej"),
        ("Is it?", "to"),
        ("It rains.", "Thai"),
        ("English", "Thai is spoken here by many"),
        ("Text", "Text"),
        ("target", "th"),
    ],
)
def test_a_pair_is_not_taken_for_names_of_columns(one: str, other: str) -> None:
    assert not is_header(one, other)


@pytest.mark.parametrize(
    ("content", "lines", "good", "reasons"),
    [
        ("text", ['{"text": "a"}', '{"text": null}', '{"text": ""}', "{", "[1]", '{"b": 1}', '{"text": "\\ud800"}'], 1,
         ["field of another type", "empty field", "not JSON", "not an object", "missing field",
          "half a surrogate pair"]),
        ("text", ['{"text": "a"}', '{"text": "b\\u0007"}', '{"text": "c\x07"}', '{"text": "d"}'], 2,
         ["control character", "control character"]),
        ("conversations",
         [json.dumps(CHAT), json.dumps({"messages": CHAT["messages"][1:]}),
          json.dumps({"messages": [*CHAT["messages"][:1] * 2, *CHAT["messages"]]}),
          json.dumps({"messages": [CHAT["messages"][0], {"role": "assistant", "content": None}]}),
          json.dumps({"messages": [CHAT["messages"][0], {"role": "tool", "content": "a"}]}),
          json.dumps({"instruction": "a", "output": "b"}), json.dumps({"other": 1}),
          json.dumps({**CHAT, "tools": ["a"]}), json.dumps(CHAT)], 2,
         ["turns out of order", "turns out of order", "field of another type", "unknown role", "another form",
          "no conversation", "unsupported field"]),
        ("conversations",
         ["{", json.dumps({"other": 1}), json.dumps({"instruction": "a", "output": ""}),
          json.dumps({"instruction": "a", "output": "b"})], 1, ["not JSON", "no conversation", "empty field"]),
    ],
)  # fmt: skip
def test_bad_records_are_skipped(
    tmp_path: Path, content: Content, lines: list[str], good: int, reasons: list[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found, collector = skipping(path, content)
    assert len(found) == good and [row["reason"] for row in collector.bad_rows] == reasons
    json.dumps(collector.bad_rows, ensure_ascii=False).encode()
    with pytest.raises(UserError):
        [item for shard in shards(Reading(str(path), content), hash_of) for item in shard.items(Collector("refuse"))]


def test_a_document_with_a_bad_line_is_skipped_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\nline\n\nbad\x07\nline\n\ntwo\n\nagain \xff\nand more\n\nthree\n")
    found, collector = skipping(path)
    assert found == ["one\nline", "two", "three"]
    assert [(row["place"][-2:], row["reason"]) for row in collector.bad_rows] == [
        (":4", "control character"),
        (":9", "not UTF-8"),
    ]
    assert (
        collector.bad_rows[1]["row"] == "again \\xff\nand more" and ":9 is not UTF-8" in collector.bad_rows[1]["fault"]
    )


def test_bad_lines_of_two_files_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("en\none\n\nthree\nfour\x07\nfive\n", encoding="utf-8")
    (tmp_path / "a.th").write_text("th\nหนึ่ง\nสอง\n \nสี่\nห้า\n", encoding="utf-8")
    found, collector = skipping(tmp_path / "a.en", "pairs", target_path=str(tmp_path / "a.th"))
    assert found == [("one", "หนึ่ง"), ("five", "ห้า")]
    assert collector.skipped == {"header line": 1, "empty side": 2, "control character": 1}
    # Which lines belong together cannot be known: no row's fault.
    (tmp_path / "a.th").write_text("ก\n", encoding="utf-8")
    with pytest.raises(UserError, match="has more"):
        skipping(tmp_path / "a.en", "pairs", target_path=str(tmp_path / "a.th"))


def test_what_is_not_a_rows_fault_stops(tmp_path: Path) -> None:
    wrong, cut, empty = tmp_path / "wrong.tsv", tmp_path / "cut.tsv.gz", tmp_path / "empty.tsv"
    wrong.write_bytes("ฝน\tตก\n".encode("utf-16"))
    cut.write_bytes(gzip.compress(b"a\tb\n" * 9)[:-9])
    empty.write_bytes(b"")
    listed = tmp_path / "a.json"
    listed.write_text('[{"text": "a"}, {"text": ', encoding="utf-8")
    for path, content, message in (
        (wrong, "pairs", "is not UTF-8"),
        (cut, "pairs", "cannot be decompressed"),
        (empty, "pairs", "is empty"),
        (tmp_path / "none*", "pairs", "no file matches"),
        (listed, "text", "a list has no end"),
    ):
        with pytest.raises(UserError, match=message):
            skipping(path, content)  # type: ignore[arg-type]


def test_a_source_of_bad_rows_alone_says_what_is_wrong_with_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("a,b\nc,d\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.tsv has no row that can be read, the first: .*a\.tsv:1 has 0 tabs"):
        skipping(path, "pairs")


@pytest.mark.parametrize("container", ["jsonl", "parquet"])
def test_fields_that_nobody_reads_are_counted_in_every_container(tmp_path: Path, container: Container) -> None:
    records = [{**CHAT, "id": str(n), "source": "x"} for n in range(3)]
    path = tmp_path / f"a.{container}"
    if container == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(records), path)
    assert skipping(path, "conversations")[1].ignored == {"id": 3, "source": 3}


def tokens_of(path: Path, tokenizer: Tokenizer, cache: Path, content: Content, **more: Any) -> PlannedRows:
    found = shards(Reading(str(path), content, on_bad_rows="skip"), hash_of)
    transform = Transform(content, 32)
    made = tokenise(found, transform, tokenizer, "refuse", cache, on_bad_rows="skip", **more)
    return PlannedRows(made, Selection(32), cache)


def test_counts_and_rows_come_back_from_the_cache(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        text = PAIRS + f"{name} <|im_end|>\tก\n"
        (tmp_path / f"{name}.tsv").write_text(text, encoding="utf-8")
    rows = tokens_of(tmp_path / "*.tsv", tokenizer, tmp_path / "one", "pairs", processes=1)
    bad = [row for shard in rows.shards for row in shard.bad_rows()]
    wanted = {f"bad rows: {r}": 2 for r in ("header line", "not one tab", "empty side", "special token")}
    assert left_out(rows) == {**wanted, "exact duplicates": 2} and rows.counts["items"] == 4
    assert len(bad) == 8 and bad[3]["row"] == '["a <|im_end|>", "ก"]' and bad[3]["place"].endswith("a.tsv:6")
    two = tokens_of(tmp_path / "*.tsv", tokenizer, tmp_path / "two", "pairs", processes=2)
    assert two.counts == rows.counts and [row for shard in two.shards for row in shard.bad_rows()] == bad
    # Nothing is read again.
    monkeypatch.setattr(token_cache, "write_shard", None)
    monkeypatch.setattr("transllm_jax.data.rows.tokenise.write_shard", None)
    again = tokens_of(tmp_path / "*.tsv", tokenizer, tmp_path / "one", "pairs")
    assert again.counts == rows.counts and [row for shard in again.shards for row in shard.bad_rows()] == bad
    keys = {shard.key for skip in ("refuse", "skip")
            for shard in shards(Reading(str(tmp_path / "*.tsv"), "pairs", on_bad_rows=skip), hash_of)}  # fmt: skip
    assert len(keys) == 4


def test_fields_that_nobody_reads_come_back_from_the_cache(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({**CHAT, "id": n}) + "\n" for n in range(3)), encoding="utf-8")
    assert fields_not_read(tokens_of(path, tokenizer, tmp_path / "cache", "conversations")) == {"id": 3}


def test_too_many_bad_rows_are_refused() -> None:
    check_share("a.tsv", 1, {"empty side": 10}, 0.0, "", "")  # ten in any case
    check_share("a.tsv", 989, {"empty side": 6, "not JSON": 5}, 0.011, "", "")
    with pytest.raises(UserError) as caught:
        check_share("a.tsv", 1000, {"empty side": 6, "not JSON": 5}, 0.01, "a.tsv:3 is not ...", "; all are in F")
    assert str(caught.value) == (
        "a.tsv: 11 of 1,011 rows are bad (6 empty side, 5 not JSON), more than max_bad_share 0.01; all are in F; the "
        "first: a.tsv:3 is not ..."
    )


def test_a_stage_says_and_writes_the_bad_rows_of_all_its_sources(tmp_path: Path) -> None:
    said: list[str] = []
    found = BadRows(lambda directory: directory, tmp_path, said.append)
    one, two = (Source(path=path, on_bad_rows="skip") for path in ("one", "two"))
    rows = [{"place": f"p:{n}", "reason": "empty side", "fault": f"p:{n} has", "row": f"ก{n}"} for n in range(20)]
    found.note("pretrain", one, 5, {"empty side": 2}, rows[:2])
    found.note("pretrain", two, 5, {"empty side": 1}, rows[2:3])
    found.note("pretrain", two, 5, {"empty side": 1}, rows[2:3])  # read again: written once
    found.note("pretrain", Source(path="good"), 5, {}, [])
    path = tmp_path / "pretrain" / "bad_rows.jsonl"
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows[:3]
    assert said[:2] == [
        f"  pretrain: 2 of 7 rows of one are bad and left out; all are in {path}",
        "    2 empty side, the first: p:0 has",
    ]
    assert found.counts("pretrain", [one, two]) == {"bad rows: empty side": 3}
    with pytest.raises(UserError, match=r"20 of 25 rows are bad .*bad_rows\.jsonl; the first: p:0 has"):
        found.note("translate", one, 5, {"empty side": 20}, rows)
    assert len((tmp_path / "translate" / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()) == 20
