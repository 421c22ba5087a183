"""The conversations of recovered chains, which stage `transfer` trains on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transllm_jax.config import Source
from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.shards import shards
from transllm_jax.hosts.runtime import Peers
from transllm_jax.stages.chains import CHAINS, conversation_sources, write_conversations
from transllm_jax.stages.inputs import reading
from transllm_jax.tokenizer.chain import MARKERS, Chain, parse

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


# The reference code's example_cot.json and example_en.json.
COT: dict[str, Any] = {
    "id": "1",
    "conversations": [
        {"from": "human", "value": "ดีไหม"},
        {"from": "gpt", "value": "<EN> good? <RESPONSE> yes <TH> ดี"},
    ],
}
EN: dict[str, Any] = {
    "id": "1",
    "conversations": [{"from": "human", "value": "good?"}, {"from": "gpt", "value": "<RESPONSE> yes"}],
}


def test_chains_in_the_form_of_the_reference_code(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "question_en": "fine?", "answer_en": 'So:\n"yes"'}]
    (tmp_path / CHAINS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_conversations(tmp_path, MARKERS)
    found = json.loads((tmp_path / "reference/cot.json").read_text(encoding="utf-8"))
    assert found[0] == COT and len(found) == 2 and found[1]["id"] == "2"
    assert found[1]["conversations"][1]["value"] == '<EN> fine? <RESPONSE> So:\n"yes" <TH> ดี'
    assert json.loads((tmp_path / "reference/en.json").read_text(encoding="utf-8"))[0] == EN
    # They are read like any other source; and the parser knows their spaces.
    for name, wanted in (("cot", COT), ("en", EN)):
        source = Source(path=str(tmp_path / f"reference/{name}.json"), format="conversations", chains=True)
        (shard,) = shards(reading(source), lambda path: path.name)
        items = [item for item, _ in shard.items(Collector("refuse"))]
        assert [turn["content"] for turn in items[0]] == [turn["value"] for turn in wanted["conversations"]]
        assert len(items) == 2
    assert parse(COT["conversations"][1]["value"]) == Chain("good?", "yes", "ดี")
