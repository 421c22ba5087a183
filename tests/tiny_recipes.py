"""Tiny files of the public data sets that configs name, in their formats and at their paths: for tests only."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import EXAMPLES, random_weights, tiny_config
from tiny_sentencepiece import TEMPLATE, TEXT, build_tiny_sentencepiece

from transllm_jax.conversion.hf.directory import write_model
from transllm_jax.data.read.sources import read_documents, read_jsonl, read_pairs
from transllm_jax.tokenizer.tokenizer import Tokenizer

DOCUMENTS: list[str] = read_documents(EXAMPLES / "text.train.txt")
ENGLISH: list[str] = read_documents(EXAMPLES / "english.train.txt")
PAIRS: list[tuple[str, str]] = read_pairs(EXAMPLES / "pairs.train.tsv")
HELD_OUT: list[tuple[str, str]] = read_pairs(EXAMPLES / "pairs.heldout.tsv")
INSTRUCTIONS: list[dict[str, Any]] = read_jsonl(EXAMPLES / "instructions.train.jsonl")
CHATS: list[dict[str, Any]] = read_jsonl(EXAMPLES / "instructions.heldout.jsonl")


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def wikipedia(documents: list[str]) -> Callable[[Path], None]:
    rows = [{"id": str(n), "url": f"https://x/{n}", "title": "x", "text": text} for n, text in enumerate(documents)]
    return lambda path: parquet(path, rows)


def fineweb(path: Path) -> None:
    rows = [
        {"text": text, "id": f"<urn:{n}>", "dump": "CC", "language_score": 0.9, "minhash_cluster_size": 1}
        for n, text in enumerate(DOCUMENTS)
    ]
    # Nobody has looked through the web: an empty page, a control character, and what LLaMA-2 ends an answer with.
    bad = [{**rows[0], "text": text} for text in (" ", f"{DOCUMENTS[0]}\r\x9f", f"{DOCUMENTS[1]}</s>")]
    parquet(path, [*bad, *rows])


def scb(path: Path) -> None:
    parquet(path, [{"subdataset": "x", "translation": {"en": english, "th": thai}} for english, thai in PAIRS])


def c4(path: Path) -> None:
    rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://x"} for text in ENGLISH]
    path.write_bytes(gzip.compress(jsonl(rows)))


def social(path: Path) -> None:
    path.write_text("".join(f"{thai} \u200b555\r\n" for _, thai in PAIRS), encoding="utf-8")


def instructions(path: Path) -> None:
    path.write_bytes(jsonl([{"instruction": row["instruction"], "input": ""} for row in INSTRUCTIONS]))


def held_out(first: int, last: int) -> Callable[[Path], None]:
    lines = "".join(f"{english}\t{thai}\n" for english, thai in HELD_OUT[first:last])
    return lambda path: (path.write_text(lines, encoding="utf-8"), None)[1]


def chats(*names: str) -> Callable[[Path], None]:
    """Instructions in TransLLM's tables: each field of `names` is there in English, and with _th in Thai."""
    rows = [
        {"Unnamed: 0": n, "Instruct_id": n}
        | {key: row[field] for name in names for key, field in ((name, "instruction"), (f"{name}_th", "translation"))}
        for n, row in enumerate(CHATS)
    ]
    return lambda path: (path.write_bytes(jsonl(rows)), None)[1]


# Where the commands of docs/data-thai.md put the files of each data set, and a tiny one of its format.
FILES: dict[str, Callable[[Path], None]] = {
    "data/wikipedia/20231101.th/train-00000-of-00001.parquet": wikipedia(DOCUMENTS),
    "data/wikipedia/20231101.simple/train-00000-of-00001.parquet": wikipedia(ENGLISH),
    "data/fineweb-2/data/tha_Thai/train/000_00000.parquet": fineweb,
    "data/fineweb-2/data/tha_Thai/train/000_00001.parquet": fineweb,
    "data/scb/data/train-00000-of-00001.parquet": scb,
    "data/scb/data/test-00000-of-00001.parquet": scb,
    "data/c4/en/c4-train.00000-of-01024.json.gz": c4,
    "data/social/neg.txt": social,
    "data/social/q.txt": social,
    "data/instructions/dolly.jsonl": instructions,
    "data/instructions/alpaca.jsonl": instructions,
    "data/evaluation/pud.en-th.tsv": held_out(0, 20),
    "data/evaluation/ntrex.en-th.tsv": held_out(20, 40),
    "data/evaluation/alpaca_eval.en-th.jsonl": chats("instruction"),
    "data/evaluation/mt_bench.en-th.jsonl": chats("instruction1", "instruction2"),
}


def write_llama2(directory: Path) -> None:
    """A chat model with LLaMA-2's kind of tokenizer, as tokenizer.model alone, and its template."""
    tokenizer = build_tiny_sentencepiece(directory.with_name("tokenizer"), text=[*TEXT, "[INST] [/INST]"])
    shape = tiny_config(Tokenizer.load(tokenizer).vocab_size, tied=False)
    write_model(directory, shape, random_weights(shape), extra_config={"bos_token_id": 1, "eos_token_id": 2})
    shutil.copy(tokenizer / "tokenizer.model", directory)
    described = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    (directory / "tokenizer_config.json").write_text(json.dumps({**described, "chat_template": TEMPLATE}))
