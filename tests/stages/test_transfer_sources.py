"""Stage `transfer` on conversations in three formats, sources with a weight of 0, and frozen rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command, call, tiny_run, write_run_config
from full_runs import NEW_ROWS, POINTS, arrays, changed, write_qwen

from transllm_jax.config import load_config
from transllm_jax.conversion.hf.directory import read_weights
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import transfer
from transllm_jax.stages.run import Run
from transllm_jax.stages.training import prepare
from transllm_jax.training.record.metrics import read_rows


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a base model in bfloat16."""
    directory = tmp_path_factory.mktemp("qwen") / "model"
    write_qwen(directory, "bfloat16")
    return directory


CONVERSATIONS = [("What do bees make?", "Honey."), ("ผึ้งทำอะไร", "น้ำผึ้ง"), ("Say a word.", "Moon, of course.")]


def in_three_formats(conversations: list[tuple[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """The same conversations in the formats of the reference code, OpenAI and Alpaca."""
    return {
        "conversations": [
            {"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]}
            for ask, answer in conversations
        ],
        "messages": [
            {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
            for ask, answer in conversations
        ],
        "alpaca": [{"instruction": ask, "input": "", "output": answer} for ask, answer in conversations],
    }


def write_conversations(directory: Path) -> list[dict[str, Any]]:
    """Sources in the three formats, with weights."""
    sources = []
    for weight, (form, records) in zip((0.2, 0.3, 0.5), in_three_formats(CONVERSATIONS).items(), strict=True):
        path = directory / f"{form}.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        sources.append({"path": str(path), "format": "conversations", "weight": weight})
    return sources


@pytest.fixture(scope="module")
def adapted(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run with adapters and frozen rows, that transfers on conversations, not chains."""
    here = tmp_path_factory.mktemp("adapted")
    section: dict[str, Any] = {**tiny_run(qwen, here)["transfer"]}  # type: ignore[dict-item]
    sources = write_conversations(here)
    sources[1]["recovery"] = "token"
    section |= {"chains": 0, "recovery": "both", "sources": sources, "steps": 8}
    assert call("run", write_run_config(here, qwen, embeddings="none", transfer=section)) == 0
    return here / "run"


def test_the_original_teaches_what_the_config_says(adapted: Path) -> None:
    run = Run(load_config(adapted / "run.yaml"), adapted, Progress(quiet=True), Interrupt())
    job = prepare(run, name="transfer", start="translate", parts=transfer.parts(run))
    names = dict(zip(job.config.sources, job.config.teaching.modes, strict=True))  # type: ignore[union-attr]
    of_files = {"1 conversations.jsonl": "sequence", "2 messages.jsonl": "token", "3 alpaca.jsonl": "sequence"}
    assert names == {"english": "both", "translations": "sequence", **of_files}
    assert job.config.teaching is not None and 0 < job.config.teaching.rows <= job.batches.batch_size
    tokenizer = run.models.tokenizer("vocabulary")
    assert job.config.teaching.marker == tokenizer.token_id(run.markers.response) is not None
    rows = read_rows(adapted / "transfer" / "metrics.jsonl")
    # A divergence, which is near 0 in the beginning, beside the negative logarithms of text.
    seen = {name: [row["source_loss"][name] for row in rows if name in row["source_loss"]] for name in names}
    assert all(seen.values()) and min(seen["2 messages.jsonl"]) < min(seen["3 alpaca.jsonl"])


def test_frozen_rows_stay_the_same_with_adapters(adapted: Path, qwen: Path) -> None:
    first = before = arrays(adapted, "vocabulary")
    assert before.keys() > NEW_ROWS
    for point in POINTS[1:]:
        after = arrays(adapted, point)
        assert changed(before, after) == after.keys() - NEW_ROWS, point
        before = after
    out, size = read_weights(adapted / "export"), len(read_weights(qwen)["vocabulary.base"])
    for path, table in (("vocabulary.new", "vocabulary.base"), ("vocabulary.output_new", "vocabulary.output_base")):
        assert out[table][size:].tobytes() == first[path].tobytes()
    # The rows of the vocabulary are not counted as trainable.
    report = json.loads((adapted / "vocabulary/report.json").read_text(encoding="utf-8"))
    assert report["trainable_parameters"] == sum(first[path].size for path in first.keys() - NEW_ROWS)


def test_conversations_are_trained_on_and_weight_0_leaves_a_source_out(adapted: Path) -> None:
    manifest = json.loads((adapted / "transfer/manifest.json").read_text(encoding="utf-8"))
    sources, names = manifest["summary"]["sources"], ["1 conversations.jsonl", "2 messages.jsonl", "3 alpaca.jsonl"]
    assert list(sources) == ["english", "translations", *names]
    assert all(sources[name]["items"] == 3 and sources[name]["epochs"] > 0 for name in names)
    without = ["transfer.english=0", "transfer.recovery=sequence", "transfer.translations=0"]
    config = load_config(adapted / "run.yaml", without)
    run = Run(config, adapted, Progress(quiet=True), Interrupt())
    tokenizer, parts = run.models.tokenizer("vocabulary"), transfer.parts(run)
    assert [part.name for part in parts] == names and [part.weight for part in parts] == [0.2, 0.3, 0.5]
    rows = [[part.rows.row(number) for number in range(len(part.rows))] for part in parts]
    assert len(rows[0]) == len(rows[1]) == len(rows[2]) > 0
    for one, other, third in zip(*rows, strict=True):
        for field in one:
            np.testing.assert_array_equal(one[field], other[field], err_msg=field)
            np.testing.assert_array_equal(one[field], third[field], err_msg=field)
    trained = [row["labels"][row["weights"] > 0].tolist() for row in rows[0]]
    said = tokenizer.decode([number for labels in trained for number in labels])
    # The loss is on the answers and on the token that ends each.
    assert sorted(said.replace("<|im_end|>", "\n").split("\n")) == sorted(
        [*(answer for _, answer in CONVERSATIONS), ""]
    )
    whole = "".join(tokenizer.decode(row["tokens"].tolist()) for row in rows[0])
    assert all(
        f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n{answer}" in whole for ask, answer in CONVERSATIONS
    )


def test_a_stage_with_nothing_to_train_on_is_refused(qwen: Path, tmp_path: Path, transllm: Command) -> None:
    section: dict[str, Any] = {**tiny_run(qwen, tmp_path)["transfer"], "chains": 0}  # type: ignore[dict-item]
    for changes, said in (
        ({"english": 0, "translations": 0}, "nothing is left to train on"),
        (
            {"sources": [{"path": str(tmp_path / "talks.jsonl"), "format": "conversations"}]},
            "each of the sources needs a weight",
        ),
    ):
        config = write_run_config(tmp_path, qwen, transfer={**section, **changes})
        code, printed = transllm("run", config)
        assert code == 2 and said in printed and printed.count("\n") == 1
