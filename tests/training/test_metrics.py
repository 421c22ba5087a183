"""metrics.jsonl: only complete lines, and none past the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from transllm_jax.training.record.metrics import MetricsLog, read_rows


def test_an_unfinished_last_line_is_ignored_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    rows = [{"step": step, "loss": step / 3} for step in (1, 2, 3)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    for cut in range(len(whole) - len(json.dumps(rows[-1])) - 1, len(whole)):
        path.write_text(whole[:cut], encoding="utf-8")
        assert read_rows(path) == rows[:2], "a line is complete with its end"
    path.write_text(whole[:-4], encoding="utf-8")
    log = MetricsLog(path, step=3)
    log.write(rows[-1])
    assert path.read_text(encoding="utf-8") == whole, "a line is written at once"
    log.close()


def test_lines_past_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 8)), encoding="utf-8")
    log = MetricsLog(path, step=4)
    log.write({"step": 5, "loss": 2.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2)]
    MetricsLog(path).close()
    assert read_rows(path) == [], "a run that starts anew has an empty log"
