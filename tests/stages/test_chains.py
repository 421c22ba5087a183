"""The conversations of recovered chains, which stage `transfer` trains on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.shards import shards
from transllm_jax.hosts.runtime import Peers
from transllm_jax.stages.chains import CHAINS, conversation_sources, write_conversations
from transllm_jax.stages.inputs import reading
from transllm_jax.tokenizer.chain import MARKERS

ROW = {"question": "ดีไหม", "question_en": "good?", "answer_en": "yes", "answer": "ดี", "translated_by": {}}


def messages(run: Any) -> list[list[tuple[str, str]]]:
    found = []
    for source in conversation_sources(run):
        (shard,) = shards(reading(source), lambda path: path.name)
        found += [[(turn["role"], turn["content"]) for turn in item] for item, _ in shard.items(Collector("refuse"))]
    return found


def test_a_chain_and_its_english_answer_are_a_conversation_each(tmp_path: Path) -> None:
    (tmp_path / "recover").mkdir()
    (tmp_path / "recover" / CHAINS).write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    published: list[str] = []
    run: Any = SimpleNamespace(
        workdir=tmp_path, markers=MARKERS, peers=Peers(), site=SimpleNamespace(publish=published.append)
    )
    # A run whose stage was finished by a version that did not write them.
    wanted = [
        [("user", "ดีไหม"), ("assistant", "<EN>good?<RESPONSE>yes<TH>ดี")],
        [("user", "good?"), ("assistant", "<RESPONSE>yes")],
    ]
    assert messages(run) == wanted and published == ["recover"]
    assert messages(run) == wanted and published == ["recover"]
    write_conversations(tmp_path / "recover", MARKERS)
    assert messages(run) == wanted
