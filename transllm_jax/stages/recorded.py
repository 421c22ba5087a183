"""What the files of a work directory record of a run so far, for the findings (`evaluation/advice`).

Only small files are read, so that `transllm status` can fetch them from an object store: manifests, the logs of
training, and the report of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transllm_jax.choices import POINTS, TRAININGS
from transllm_jax.config.load import recorded_settings
from transllm_jax.disk import read_json
from transllm_jax.evaluation.advice.recorded import Recorded, Training
from transllm_jax.training.record.ledger import LEDGER, summarise
from transllm_jax.training.record.metrics import read_rows, read_validations

# The resolved config, in the work directory; and files of steps.
RUN, MANIFEST = "run.yaml", "manifest.json"
METRICS, VALIDATION, SKIPPED = "metrics.jsonl", "validation.jsonl", "skipped.jsonl"
VOCABULARY = "vocabulary/report.json"


def recorded(workdir: Path) -> Recorded:
    """What a run has recorded so far. Raises UserError that names a damaged file."""
    measured = {point: _summary(workdir / "evaluation" / point) for point in POINTS}
    return Recorded(
        settings=recorded_settings(workdir / RUN),
        metrics=by_metric(measured),
        training={name: _training(workdir / name) for name in TRAININGS if (workdir / name / MANIFEST).is_file()},
        chains=measured["transfer"].get("chains", {}),
        asked={point: result["asked"] for point, result in measured.items() if "asked" in result},
        vocabulary=read_json(workdir / VOCABULARY) if (workdir / VOCABULARY).is_file() else {},
        recover=_summary(workdir / "recover"),
        ledger=summarise(workdir / LEDGER),
    )


def by_metric(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The values of each metric by point, from what was measured at each point."""
    metrics: dict[str, dict[str, float | None]] = {}
    for point, result in measured.items():
        for name, value in result.get("metrics", {}).items():
            metrics.setdefault(name, {})[point] = value
    return metrics


def _summary(directory: Path) -> Mapping[str, Any]:
    """The summary of a step's manifest; empty until the step is done."""
    path = directory / MANIFEST
    summary = read_json(path).get("summary") if path.is_file() else None
    return summary if isinstance(summary, Mapping) else {}


def _training(directory: Path) -> Training:
    return Training(
        losses=read_rows(directory / METRICS),
        validation=read_validations(directory / VALIDATION),
        skipped=len(read_rows(directory / SKIPPED)),
        sources=_summary(directory).get("sources") or {},
    )
