"""The results of stage `recover` as conversations, which stage `transfer` reads like any other source.

`chains.jsonl` holds the parts of each chain in readable form; the files of conversations are made from it alone, in two
forms: ours, and that of the reference code (its example_cot.json and example_en.json).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transllm_jax.config import Source
from transllm_jax.data.read.sources import read_jsonl
from transllm_jax.disk import write_text
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.chain import Markers, build_chain, build_english_answer
from transllm_jax.tokenizer.chat import Message

# In the directory of stage `recover`.
CHAINS = "chains.jsonl"

Row = Mapping[str, Any]


def _chain(row: Row, markers: Markers) -> tuple[str, str]:
    return row["question"], build_chain(row["question_en"], row["answer_en"], row["answer"], markers)


def _english(row: Row, markers: Markers) -> tuple[str, str]:
    return row["question_en"], build_english_answer(row["answer_en"], markers)


# The reference code puts spaces around markers.
def _reference_chain(row: Row, markers: Markers) -> tuple[str, str]:
    parts = zip(markers.in_order(), ("question_en", "answer_en", "answer"), strict=True)
    return row["question"], " ".join(f"{marker} {row[name].strip()}" for marker, name in parts)


def _reference_english(row: Row, markers: Markers) -> tuple[str, str]:
    return row["question_en"], f"{markers.response} {row['answer_en'].strip()}"


# File in the directory of stage `recover` -> a chain's question and answer in it.
_CONVERSATIONS: dict[str, Callable[[Row, Markers], tuple[str, str]]] = {
    "conversations/chains.jsonl": _chain,
    "conversations/english.jsonl": _english,
}

_REFERENCE: dict[str, Callable[[Row, Markers], tuple[str, str]]] = {
    "reference/cot.json": _reference_chain,
    "reference/en.json": _reference_english,
}


def write_conversations(directory: Path, markers: Markers) -> None:
    """Write the conversations of a directory's chains: a question in the target language with its chain, and a question
    in English with its answer; in conversations/ for stage `transfer`, and in reference/ for the reference code."""
    rows = read_jsonl(directory / CHAINS, required=("question", "question_en", "answer_en", "answer"))
    for name, turn in _CONVERSATIONS.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        write_text(path, "".join(_record(*turn(row, markers)) for row in rows))
    for name, turn in _REFERENCE.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        records = ",\n".join(_reference_record(number, *turn(row, markers)) for number, row in enumerate(rows, 1))
        write_text(path, f"[\n{records}\n]\n")


def _record(question: str, answer: str) -> str:
    messages: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def _reference_record(number: int, question: str, answer: str) -> str:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": str(number), "conversations": turns}, ensure_ascii=False, indent=4)


def conversation_sources(run: Run) -> tuple[Source, Source]:
    """The chains, and the English answers, as sources of conversations.

    Stage `recover` writes both files. An older version wrote only chains.jsonl: they are then written now.
    """
    directory = run.workdir / "recover"
    paths = [directory / name for name in _CONVERSATIONS]

    def write_missing() -> bool:
        missing = not all(path.is_file() for path in paths)
        if missing:
            write_conversations(directory, run.markers)
        return missing

    if run.peers.run_on_primary("the conversations of recover", write_missing):
        run.site.publish("recover")
    chains, english = (Source(path=str(path), format="conversations") for path in paths)
    return chains, english
