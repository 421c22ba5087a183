"""Translation instructions of pairs, and conversations that the run made itself: rows like those of any source."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tiny_shards import PAIRS, examples_of, shards_of, write
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.data.rows.instructions import Instructions
from transllm_jax.data.rows.planned import PlannedRows, Selection
from transllm_jax.data.rows.tokenise import tokenise
from transllm_jax.data.rows.transform import Transform
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chain import MARKERS, build_chain
from transllm_jax.tokenizer.chat import encode_conversation
from transllm_jax.tokenizer.tokenizer import Tokenizer

T = 200
INSTRUCTIONS = Instructions(("To {language}: {text}", "{text} in {language}?"), ("To English: {text}",), "Thai")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_directions_alternate_and_prompts_take_turns() -> None:
    asked = [INSTRUCTIONS.conversation("good", "ดี", number, MARKERS) for number in range(5)]
    assert [(turn[0]["content"], turn[1]["content"]) for turn in asked] == [
        ("To Thai: good", "<TH>ดี"),
        ("To English: ดี", "<EN>good"),
        ("good in Thai?", "<TH>ดี"),
        ("To English: ดี", "<EN>good"),
        ("To Thai: good", "<TH>ดี"),
    ]


def test_instructions_go_through_the_token_cache(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several batches of a shard: the numbers of the pairs go on.
    monkeypatch.setattr("transllm_jax.data.rows.token_cache._ITEMS", 7)
    shards = shards_of(write(tmp_path / "pairs.tsv", list(PAIRS)), "pairs")
    transform = Transform("pairs", T, instructions=INSTRUCTIONS, exact=False)
    (tokens,) = tokenise(shards, transform, tokenizer, "refuse", tmp_path / "cache", processes=1)
    assert len(tokens) == len(PAIRS)
    for number, (pair, example) in enumerate(zip(PAIRS, tokens.examples(list(range(len(PAIRS)))), strict=True)):
        turns = INSTRUCTIONS.conversation(pair[0].strip(), pair[1].strip(), number, MARKERS)
        [row] = encode_conversation(tokenizer, turns)
        assert (example.ids.tolist(), example.mask.tolist()) == (row.ids, row.mask)


def test_what_makes_another_text_makes_another_cache() -> None:
    plain = Transform("pairs", T)
    asked = Transform("pairs", T, instructions=INSTRUCTIONS)
    other = Transform("pairs", T, instructions=Instructions(("{text}",), ("{text}",), "Thai"))
    own = Transform("pairs", T, holds_markers=True)
    assert len({plain.key, asked.key, other.key, own.key}) == 4


def test_markers_are_for_conversations_of_the_run_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chain = [{"role": "user", "content": "ดีไหม"}, {"role": "assistant", "content": build_chain("good?", "yes", "ดี")}]
    shards = shards_of(write(tmp_path / "chains.jsonl", [chain]), "conversations")
    with pytest.raises(UserError, match=r"chains\.jsonl:1 contains the special token <EN>"):
        tokenise(shards, Transform("conversations", T), tokenizer, "refuse", tmp_path / "cache", processes=1)
    own = Transform("conversations", T, exact=False, holds_markers=True)
    tokens = tokenise(shards, own, tokenizer, "refuse", tmp_path / "cache", processes=1)
    rows = PlannedRows(tokens, Selection(T, exact=False), tmp_path / "cache")
    assert len(rows) == 1 and "<EN>good?<RESPONSE>yes<TH>ดี" in tokenizer.decode(rows.row(0)["tokens"].tolist())


def test_pairs_with_evaluation_texts_give_no_instruction(tokenizer: Tokenizer) -> None:
    from transllm_jax.data.clean.contamination import EvaluationTexts

    held_out = "this very sentence is held out of the training text of every stage"
    transform = Transform("pairs", T, instructions=INSTRUCTIONS, evaluation=EvaluationTexts([("evaluation", held_out)]))
    counts = Counter[str]()
    made = examples_of(transform, tokenizer, [("one", "หนึ่ง"), (held_out, "ประโยค"), ("two", "สอง")], counts)
    assert [len(one.examples) for one in made] == [1, 0, 1] and counts["contaminated"] == 1
