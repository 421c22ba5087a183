"""`transllm status`: the state of each stage, and the time of the run."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from transllm_jax.commands.status import status_table
from transllm_jax.stages.steps import artifact
from transllm_jax.training.record.ledger import Ledger


def terminal(renderable: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def jsonl(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_the_last_line_is_the_time(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("title: x\n")
    without = terminal(status_table(tmp_path))
    now = 0.0
    with Ledger(tmp_path / "ledger.jsonl", clock=lambda: now) as book, book.stage("pretrain"):
        with book.spend("step"):
            now = 75.0
        now = 100.0
    assert terminal(status_table(tmp_path)) == f"{without}\ntrained 75 % of 1 min 40 s\n"


def test_a_stage_in_each_of_its_states(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("title: x\n")

    def line() -> str:
        lines = terminal(status_table(tmp_path), width=200).splitlines()
        return re.sub(r" +", " ", next(line for line in lines if line.startswith("pretrain "))).strip()

    place = artifact(tmp_path, "pretrain")
    assert line() == "pretrain to do"
    place.begin({})
    assert line() == "pretrain begun"
    jsonl(place.directory / "metrics.jsonl", {"step": 7, "loss": 2.34567})
    assert line() == "pretrain begun step 7, loss 2.346"
    jsonl(place.directory / "metrics.jsonl", {"step": 7, "loss": 2.3}, {"step": 8, "loss": None})
    assert line() == "pretrain begun step 8, loss not finite"
    jsonl(place.directory / "skipped.jsonl", {"step": 8})
    assert line() == "pretrain begun step 8, loss not finite; 1 update skipped, not finite"
    scores = [(2, 1.5), (4, 1.25), (6, 1.25), (7, math.nan), (8, 1.4)]
    jsonl(place.directory / "validation.jsonl", *({"step": step, "bits_per_byte": bits} for step, bits in scores))
    jsonl(place.directory / "skipped.jsonl", {"step": 3}, {"step": 8})
    best = "best so far 1.250 bits a byte at step 6"
    assert line() == f"pretrain begun step 8, loss not finite; {best}; 2 updates skipped, not finite"
    place.finish({}, {"text": "8 steps [all]", "seconds": 3.2})
    assert line() == "pretrain done 3 s 8 steps [all]"
