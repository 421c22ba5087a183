"""The end of a run: all results together, as JSON and as a page, and whether the goals were met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from transllm_jax.choices import POINTS, TRAININGS
from transllm_jax.data.read.sources import read_jsonl, read_pairs
from transllm_jax.disk import read_json, write_json
from transllm_jax.evaluation.page.measures import number, percent, written
from transllm_jax.evaluation.page.report import write_report
from transllm_jax.stages.run import Run
from transllm_jax.training.record.ledger import LEDGER, summarise
from transllm_jax.training.record.metrics import read_rows, read_validations

STAGES = ("vocabulary", "pretrain", "translate", "recover", "transfer")
VERSIONS = ("transllm-jax", "jax", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy")
# How many conversations and translations the page shows.
SHOWN = 8
# Of the updates that were skipped, so many are shown, and of each the texts of so many rows.
SKIPPED, SKIPPED_ROWS = 3, 4


def inputs(run: Run) -> dict[str, Any]:
    """What the report reads besides the results."""
    return {"title": run.config.title}


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Write evaluation/results.json and report.html."""
    results = collect(run)
    write_json(run.workdir / "evaluation" / "results.json", results)
    write_report(results, run.workdir / "report.html")
    met = sum(goal["met"] is True for goal in results["goals"])
    return {"text": f"{met} of {len(results['goals'])} goals met"}


def collect(run: Run) -> dict[str, Any]:
    """The results of all points and stages in the form that the report reads."""
    config = run.config
    measured = {point: read_json(run.workdir / "evaluation" / point / "results.json") for point in POINTS}
    manifests = {name: read_json(run.workdir / name / "manifest.json") for name in STAGES}
    metrics: dict[str, dict[str, float | None]] = {}
    for point, result in measured.items():
        for name, value in result["metrics"].items():
            metrics.setdefault(name, {})[point] = value
    vocabulary = manifests["vocabulary"]["summary"]
    return {
        "title": config.title,
        "language": config.language.model_dump(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "source": config.model.source,
            "parameters": vocabulary["frozen_parameters"],
            "trainable": vocabulary["trainable_parameters"],
            "new_tokens": vocabulary["new_tokens"],
            "hidden_size": run.models.config.hidden_size,
            "layers": run.models.config.num_hidden_layers,
        },
        "versions": {name: version(name) for name in VERSIONS},
        "points": list(POINTS),
        "metrics": metrics,
        "details": {
            "chrf_prompt": {point: result["chrf_prompt"] for point, result in measured.items()},
            "counts": measured["base"]["counts"],
            "drift of English answers asked for without the marker": ", ".join(
                f"{point} {written(result['english_kl_without_marker'])}" for point, result in measured.items()
            ),
        },
        "goals": goals(metrics, config.language.name, _variety(measured["transfer"]["answers"])),
        "stages": [
            {
                "name": name,
                "seconds": manifest["summary"].get("seconds"),
                "steps": manifest["summary"].get("steps"),
                "tokens": manifest["summary"].get("tokens"),
                **_speed(run.workdir / name, manifest["summary"]),
                "summary": manifest["summary"]["text"],
            }
            for name, manifest in manifests.items()
        ],
        "trained": {name: _trained(run.workdir / name, manifests[name]["summary"]) for name in TRAININGS},
        "ledger": summarise(run.workdir / LEDGER),
        "losses": {name: read_rows(run.workdir / name / "metrics.jsonl") for name in TRAININGS},
        "translations": _translations(run, measured),
        "conversations": _conversations(run, measured),
        "config": config.to_yaml(),
    }


def _speed(directory: Path, summary: Mapping[str, Any]) -> dict[str, float | None]:
    """A stage's tokens a second, the share of the devices' FLOPs that the model used, and the most memory in use."""
    rows = read_rows(directory / "speed.jsonl")

    def known(key: str) -> list[float]:
        return [value for value in (number(row.get(key)) for row in rows) if value is not None]

    used, speeds = known("model_flops_utilisation"), known("tokens_per_second")
    return {
        # The summary's is of the last process: nothing, where no step was left for it.
        "tokens_per_second": summary.get("tokens_per_second") or (median(speeds) if speeds else None),
        "model_flops_utilisation": median(used) if used else None,
        "memory_bytes": max(known("memory_bytes"), default=None),
    }


def _trained(directory: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage was trained on, its validation and the updates that it skipped; None for what is not known."""
    skipped = read_rows(directory / "skipped.jsonl")
    return {
        "sources": summary.get("sources"),
        "best": summary.get("best"),
        "validation": [
            {"step": row["step"], "bits_per_byte": number(row["bits_per_byte"])}
            for row in read_validations(directory / "validation.jsonl")
        ],
        "skipped": summary.get("skipped"),
        "skipped_updates": [
            {**row, "rows": row["rows"][:SKIPPED_ROWS], "more_rows": len(row["rows"][SKIPPED_ROWS:])}
            for row in skipped[:SKIPPED]
        ],
    }


def _variety(answers: Sequence[Mapping[str, Any]]) -> str:
    """How many of the chains say something of their own: a form can be learned without a content."""
    questions = [answer["chain"]["question_en"] for answer in answers if answer["chain"] is not None]
    return f"{len(set(questions))} different English questions in {len(questions)} chains"


def goals(metrics: Mapping[str, Mapping[str, float | None]], language: str, variety: str) -> list[dict[str, Any]]:
    """What a run is expected to show, each with what was measured. `met` is None where something was not measured.

    `variety` says how different the chains are, beside the share that is well formed.
    """

    def goal(name: str, wanted: str, measured: str, met: bool | None) -> dict[str, Any]:
        return {"name": name, "wanted": wanted, "measured": measured, "met": met}

    def at(metric: str, point: str) -> float | None:
        return metrics.get(metric, {}).get(point)

    found = []
    before, after = at("bits_per_byte", "base"), at("bits_per_byte", "transfer")
    known = before is not None and after is not None and before > 0
    change = f" ({percent(after / before - 1, sign=True)})" if known else ""  # type: ignore[operator]
    found.append(
        goal(
            f"{language} bits per byte",
            "at least 20 % below the original model's with its own tokenizer",
            f"{written(after)} against {written(before)}{change}",
            after <= 0.8 * before if known else None,  # type: ignore[operator]
        )
    )
    before, after = at("tokens_per_character", "base"), at("tokens_per_character", "transfer")
    found.append(
        goal(
            f"Tokens per {language} character",
            "at most 0.40",
            f"{written(after)} against {written(before)}",
            None if after is None else after <= 0.40,
        )
    )
    for metric, name in (("chrf_to_target", f"English to {language}"), ("chrf_to_english", f"{language} to English")):
        before, after = at(metric, "base"), at(metric, "transfer")
        found.append(
            goal(
                f"chrF, {name}",
                "above the original model's",
                f"{written(after, 'score')} against {written(before, 'score')}",
                None if before is None or after is None else after > before,
            )
        )
    after = at("well_formed_chains", "transfer")
    found.append(
        goal(
            "Well-formed chains",
            "at least 90 %",
            f"{written(after, 'share')}; {variety}",
            None if after is None else after >= 0.9,
        )
    )
    before, after = at("english_kl", "translate"), at("english_kl", "transfer")
    found.append(
        goal(
            "English answers kept",
            "KL to the original lower after stage 4 than after stage 3",
            f"{written(after)} against {written(before)}",
            None if before is None or after is None else after < before,
        )
    )
    return found


def _translations(run: Run, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    pairs = read_pairs(run.config.evaluation.pairs, limit=run.config.evaluation.max_pairs)[:SHOWN]
    return [
        {
            "english": english,
            "target": target,
            "outputs": {
                point: {way: measured[point]["translations"][way][place] for way in ("to_target", "to_english")}
                for point in ("base", "translate", "transfer")
            },
        }
        for place, (english, target) in enumerate(pairs)
    ]


def _conversations(run: Run, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    section = run.config.evaluation
    target = section.instruction_fields[1]
    rows = read_jsonl(section.instructions, required=(target,), limit=section.max_chats)
    answers, before = measured["transfer"]["answers"], measured["base"]["answers"]
    # The first ones, whatever they are: an example is not chosen for how it looks.
    return [
        {"question": row[target], "base": old["visible"], **new}
        for row, new, old in list(zip(rows, answers, before, strict=True))[:SHOWN]
    ]
