"""Readers and examples: what is good is read as it stands, what is bad is named with its file and line."""

from __future__ import annotations

import gzip
import json
import lzma
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import examples_of
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.data.read.sources import check_no_special, read_documents, read_jsonl, read_pairs
from transllm_jax.data.rows.examples import (
    conversation_rows,
    document_examples,
    make_example,
    pair_texts,
    text_example,
)
from transllm_jax.data.rows.transform import Transform
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.tokenizer import Tokenizer

THAI = "สวัสดีครับ วันนี้อากาศดี"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- documents


def test_documents_are_split_at_blank_lines_and_keep_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", f"\n{THAI}\n  two\u2028still two\n\n \t\n\nthird\tline")
    loaded = read_documents(path)
    assert loaded == [f"{THAI}\n  two\u2028still two", "third\tline"]
    assert [str(place) for place in loaded.places] == [f"{path}:2", f"{path}:7"]
    report = loaded.report
    assert (report.documents, report.normalised, report.removed) == (2, 0, 0)
    assert report.characters == sum(map(len, loaded))
    assert report.bytes == sum(len(text.encode()) for text in loaded)
    assert read_documents(path, separator="line") == [THAI, "  two\u2028still two", "third\tline"]


def test_compressed_files_globs_and_byte_order_marks(tmp_path: Path) -> None:
    text = f"{THAI}\n\nsecond\n"
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(text.encode()))
    write(tmp_path / "a.txt", "\ufefffirst")
    loaded = read_documents(tmp_path / "*.txt*")
    assert loaded == ["first", THAI, "second", THAI, "second"]  # sorted by name, never joined across files
    assert [place.line for place in loaded.places] == [1, 1, 3, 1, 3]


def test_a_byte_limit_takes_lines_from_the_start(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "aaaa\nbbbb\n\ncccc\ndddd\n")
    assert read_documents(path, max_bytes=13) == ["aaaa\nbbbb", "cccc"]
    assert read_documents(path, max_bytes=13).report.bytes == 13
    assert read_documents(path, max_bytes=12) == ["aaaa\nbbbb"]
    assert read_documents(path, max_bytes=1) == ["aaaa"]
    assert read_documents(path, max_bytes=10**9) == read_documents(path) == ["aaaa\nbbbb", "cccc\ndddd"]


def test_text_is_made_nfc_and_counted(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    loaded = read_documents(write(tmp_path / "a.txt", f"{decomposed}\n\ncafé\n"))
    assert loaded == ["café", "café"] and loaded.report.normalised == 1
    pairs = read_pairs(write(tmp_path / "a.tsv", f"{decomposed}\t{THAI}\n"))
    assert pairs == [("café", THAI)] and pairs.report.normalised == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n\n", "no documents"),
        (b"good\n\nb\xe0\xb8d\n", r":3 is not UTF-8: byte 0xe0 at offset 7"),
        ("good".encode("utf-16"), ":1 is not UTF-8"),
        (b"good\nb\x00d\n", r":2 has the control character U\+0000 at column 2"),
        ("good\nb\x85d\n".encode(), r":2 has the control character U\+0085"),
        (b"good\r\n", r":1 has a carriage return .* Unix line ends"),
    ],
)
def test_bad_text_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "bad.txt", content)
    with pytest.raises(UserError, match=message) as caught:
        read_documents(path)
    assert "bad.txt" in str(caught.value) and "\n" not in str(caught.value)


def test_control_characters_are_removed_only_when_asked_for(tmp_path: Path) -> None:
    loaded = read_documents(write(tmp_path / "a.txt", "a\x02b\r\nc\x9fd\n"), controls="remove")
    assert loaded == ["ab\ncd"] and loaded.report.removed == 3
    rows = read_jsonl(write(tmp_path / "a.jsonl", '{"instruction": "a\\u0002b"}\n'), controls="remove")
    assert rows == [{"instruction": "ab"}] and rows.report.removed == 1
    pairs = read_pairs(write(tmp_path / "a.tsv", "a\x02b\tc\n"), controls="remove")
    assert pairs == [("ab", "c")] and pairs.report.removed == 1


def test_paths_that_give_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches .*missing\.txt"):
        read_documents(tmp_path / "missing.txt")
    with pytest.raises(UserError, match=r"no file matches .*\*\.tsv"):
        read_pairs(tmp_path / "*.tsv")
    with pytest.raises(UserError, match="is a directory"):
        read_jsonl(tmp_path)


@pytest.mark.parametrize("suffix", ["xz", "gz"])
def test_a_damaged_compressed_file(tmp_path: Path, suffix: str) -> None:
    whole = (lzma if suffix == "xz" else gzip).compress(np.random.default_rng(0).bytes(9000).hex().encode())
    for content in (whole[: len(whole) // 2], b"not compressed"):
        path = write(tmp_path / f"a.txt.{suffix}", content)
        with pytest.raises(UserError, match=r"cannot be decompressed .*damaged"):
            read_documents(path)


# ---- pairs


def test_pairs_are_read_and_limited(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", f"good day\t{THAI}\n two \t สอง\n")
    assert read_pairs(path) == [("good day", THAI), ("two", "สอง")]
    assert read_pairs(path, limit=1) == [("good day", THAI)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("one side", ":2 has 0 tabs"),
        ("a\tb\tc", ":2 has 2 tabs"),
        ("", ":2 has 0 tabs"),
        ("a\t ", ":2 has an empty target-language side"),
        ("\tb", ":2 has an empty English side"),
        ("a\t \u200b\u2060", ":2 has an empty target-language side"),
        ("\ufeff\tb", ":2 has an empty English side"),
    ],
)
def test_bad_pairs_are_named_with_their_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_pairs(write(tmp_path / "a.tsv", f"good\tดี\n{line}\nmore\tอีก\n"))


# ---- records


def test_records_keep_their_other_fields(tmp_path: Path) -> None:
    records = [{"instruction": THAI, "id": 3, "messages": [{"role": "user"}]}, {"instruction": "b", "id": 4}]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n")
    assert read_jsonl(path) == records
    assert read_jsonl(path, {"id": int, "instruction": str}, limit=1) == records[:1]
    assert read_jsonl(path, ()).report.documents == 2
    # The same records in other containers, which sources are read from, too.
    listed = write(tmp_path / "a.json", json.dumps(records, indent=1))
    assert read_jsonl(listed) == records and read_jsonl(listed, limit=1) == records[:1]
    table = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist(records), table)
    assert [{k: v for k, v in row.items() if v is not None} for row in read_jsonl(table)] == records
    assert str(read_jsonl(table).places[1]) == f"{table}:row 2"
    with pytest.raises(UserError, match=r"a.parquet has no field 'answer'"):
        read_jsonl(table, ("answer",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a"', ":2 is not JSON"),
        ('["a"]', ":2 is JSON but not an object"),
        ('{"question": "a"}', ":2 has no field 'instruction' .*question"),
        ('{"instruction": 5}', ":2: field 'instruction' must be a string, not 5"),
        ('{"instruction": null}', ":2: field 'instruction' must be a string"),
        ('{"instruction": " "}', ":2: field 'instruction' is empty"),
        ('{"instruction": "a\\u0000"}', r":2 has the control character U\+0000"),
        ('{"instruction": "a\\ud800"}', ":2 has half of a surrogate pair"),
    ],
)
def test_bad_records_are_named_with_their_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_jsonl(write(tmp_path / "a.jsonl", f'{{"instruction": "good"}}\n{line}\n'))


def test_types_of_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"id": true, "messages": []}\n')
    with pytest.raises(UserError, match="'id' must be a number, not true"):
        read_jsonl(path, {"id": int})
    with pytest.raises(UserError, match="'messages' is empty"):
        read_jsonl(path, {"messages": list})
    with pytest.raises(UserError, match="'messages' must be a string"):
        read_jsonl(path, ["messages"])


# ---- special tokens inside user data


def test_special_tokens_in_data_are_refused_with_their_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = read_documents(write(tmp_path / "a.txt", "one\n\ntwo\nthree <|im_end|> four\n"))
    with pytest.raises(UserError, match=r"a\.txt:4 contains the special token <\|im_end\|>"):
        check_no_special(documents, tokenizer.find_special)
    pairs = read_pairs(write(tmp_path / "a.tsv", "a\tb\nc\t<|endoftext|>\n"))
    with pytest.raises(UserError, match=r"a\.tsv:2 contains"):
        check_no_special(pairs, tokenizer.find_special)
    rows = read_jsonl(write(tmp_path / "a.jsonl", '{"instruction": "a", "more": [{"x": "<|im_start|>"}]}\n'))
    with pytest.raises(UserError, match=r"a\.jsonl:1 contains"):
        check_no_special(rows, tokenizer.find_special)
    with pytest.raises(UserError, match=r"the answers, item 2 contains"):
        check_no_special(["fine", "<|im_end|>"], tokenizer.find_special, "the answers")
    check_no_special(read_documents(write(tmp_path / "b.txt", "a < b | c > d")), tokenizer.find_special)


# ---- examples


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class WithBos:
    """A tokenizer of LLaMA-2's kind: one token before every text."""

    bos_ids = (1,)
    document_end_id = 2

    def encode(self, text: str) -> list[int]:
        return [10 + ord(c) for c in text]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def test_a_document_ends_with_its_end_and_its_bos_is_not_trained(tokenizer: Tokenizer) -> None:
    example = text_example(tokenizer, tokenizer.encode(THAI))
    assert example.ids.tolist() == [*tokenizer.encode(THAI), tokenizer.document_end_id]
    assert example.mask.all()
    assert (example.ids.dtype, example.mask.dtype) == (np.int32, np.uint8)
    with_bos = text_example(WithBos(), WithBos().encode("ab"))
    assert with_bos.ids.tolist() == [1, 107, 108, 2]
    assert with_bos.mask.tolist() == [0, 1, 1, 1]


def test_long_documents_are_split_and_lose_nothing() -> None:
    examples = document_examples(WithBos(), ["a" * 20, "b", "c" * 6], 8)
    assert len(examples) == 5 and max(map(len, examples)) == 8
    joined = np.concatenate([examples[0].ids, *(e.ids[1:] for e in examples[1:3])])
    assert joined.tolist() == text_example(WithBos(), WithBos().encode("a" * 20)).ids.tolist()
    assert [e.ids[-1] for e in examples] == [107, 107, 2, 2, 2]


def test_pairs_give_both_directions() -> None:
    assert pair_texts("good day", THAI) == (f"<EN>good day<TH>{THAI}", f"<TH>{THAI}<EN>good day")


def test_pairs_that_are_too_long_are_counted(tokenizer: Tokenizer) -> None:
    pairs = [("good day", "ดี"), ("a long text " * 30, "ยาว"), ("two", "สอง")]
    counts = Counter[str]()
    made = examples_of(Transform("pairs", 64), tokenizer, pairs, counts)
    assert [len(one.examples) for one in made] == [2, 0, 2] and counts["longer than a row"] == 1
    for text, example in zip(pair_texts(*pairs[0]), made[0].examples, strict=True):
        assert example.ids.tolist() == [*tokenizer.encode(text), tokenizer.document_end_id] and example.mask.all()


def conversation(*contents: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]


def trained_text(tokenizer: Tokenizer, example: object) -> str:
    return tokenizer.decode(example.ids[example.mask == 1])  # type: ignore[attr-defined]


def test_only_answers_and_their_ends_are_trained(tokenizer: Tokenizer) -> None:
    [row], outcome = conversation_rows(tokenizer, conversation("one", "first.", "two", "second."), 500)
    assert outcome == "kept" and row.size == len("first.second.")
    assert trained_text(tokenizer, make_example(row.ids, row.mask)) == "first.<|im_end|>second.<|im_end|>"


def test_long_conversations_are_cut_at_a_turn_and_counted(tokenizer: Tokenizer) -> None:
    short = conversation("one", "first.")
    long = conversation("one", "first.", "two", "second. " * 100)
    hopeless = conversation("one " * 200, "first.")
    unanswered = conversation("one", "first.", "two")
    counts = Counter[str]()
    made = examples_of(Transform("conversations", 120), tokenizer, [short, long, hopeless, unanswered], counts)
    assert [len(one.examples) for one in made] == [1, 1, 0, 1]
    assert (counts["cut at a turn"], counts["longer than a row"]) == (2, 1)
    examples = [example for one in made for example in one.examples]
    assert all(len(e) <= 120 for e in examples)
    for example in examples:  # what is left of each is the short one
        np.testing.assert_array_equal(example.ids, examples[0].ids)
        np.testing.assert_array_equal(example.mask, examples[0].mask)
    assert trained_text(tokenizer, examples[1]) == "first.<|im_end|>"
