"""The last step of a run: all results as JSON and as an HTML page, and whether the goals were met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from transllm_jax.choices import POINTS, TRAININGS
from transllm_jax.data.read.questions import read_questions
from transllm_jax.data.read.sources import read_jsonl, read_pairs
from transllm_jax.disk import read_json, write_json
from transllm_jax.evaluation.advice.findings import findings
from transllm_jax.evaluation.page.measures import number, percent, written
from transllm_jax.evaluation.page.report import write_report
from transllm_jax.evaluation.page.suites import IN_WORKDIR, collect_suites
from transllm_jax.stages.recorded import MANIFEST, SKIPPED, VALIDATION, by_metric, recorded
from transllm_jax.stages.run import Run
from transllm_jax.training.record.metrics import read_rows, read_validations

STAGES = ("vocabulary", "pretrain", "translate", "recover", "transfer")
VERSIONS = ("transllm-jax", "jax", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy")
# How many conversations and translations the page shows.
SHOWN = 8
# How many skipped updates the page shows, and the texts of how many rows of each.
SKIPPED_SHOWN, SKIPPED_ROWS = 3, 4


def inputs(run: Run) -> dict[str, Any]:
    """What the report reads besides the results."""
    return {"title": run.config.title}


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Write evaluation/results.json and report.html."""
    results = collect(run)
    write_json(run.workdir / "evaluation" / "results.json", results)
    write_report({**results, "suites": collect_suites(run.workdir / IN_WORKDIR)}, run.workdir / "report.html")
    met = sum(goal["met"] is True for goal in results["goals"])
    return {"text": f"{met} of {len(results['goals'])} goals met"}


def collect(run: Run) -> dict[str, Any]:
    """The results of all points and stages in the form that the report reads."""
    config = run.config
    measured = {point: read_json(run.workdir / "evaluation" / point / "results.json") for point in POINTS}
    summaries = {name: read_json(run.workdir / name / MANIFEST)["summary"] for name in STAGES}
    metrics = by_metric(measured)
    vocabulary, record = summaries["vocabulary"], recorded(run.workdir)
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
        "findings": [finding.written(record) for finding in findings(record)],
        "stages": [_stage(name, run.workdir / name, summary) for name, summary in summaries.items()],
        "trained": {name: _trained(run.workdir / name, summaries[name]) for name in TRAININGS},
        "ledger": record.ledger,
        "losses": {name: record.training[name].losses for name in TRAININGS},
        "translations": _translations(run, measured),
        "conversations": _conversations(run, measured),
        **_asked(run, measured),
        "config": config.to_yaml(),
    }


def goals(metrics: Mapping[str, Mapping[str, float | None]], language: str, variety: str) -> list[dict[str, Any]]:
    """What a run should achieve, each goal with what was measured. `met` is None if something was not measured.

    metrics: value by metric and point. variety: says how different the chains are, next to the share of well-formed
    ones.
    """

    def values(metric: str, before: str = "base") -> tuple[float | None, float | None]:
        """A metric at an earlier point, by default that of the original model, and after stage `transfer`."""
        by_point = metrics.get(metric, {})
        return by_point.get(before), by_point.get("transfer")

    tokens_before, tokens_after = values("tokens_per_character")
    _, well_formed = values("well_formed_chains")
    kl_before, kl_after = values("english_kl", "translate")
    return [
        _bits_goal(language, *values("bits_per_byte")),
        _goal(
            f"Tokens per {language} character",
            "at most 0.40",
            f"{written(tokens_after)} against {written(tokens_before)}",
            None if tokens_after is None else tokens_after <= 0.40,
        ),
        _chrf_goal(f"English to {language}", *values("chrf_to_target")),
        _chrf_goal(f"{language} to English", *values("chrf_to_english")),
        _goal(
            "Well-formed chains",
            "at least 90 %",
            f"{written(well_formed, 'share')}; {variety}",
            None if well_formed is None else well_formed >= 0.9,
        ),
        _goal(
            "English answers kept",
            "KL to the original lower after stage 4 than after stage 3",
            f"{written(kl_after)} against {written(kl_before)}",
            None if kl_before is None or kl_after is None else kl_after < kl_before,
        ),
    ]


def _goal(name: str, wanted: str, measured: str, met: bool | None) -> dict[str, Any]:
    return {"name": name, "wanted": wanted, "measured": measured, "met": met}


def _bits_goal(language: str, before: float | None, after: float | None) -> dict[str, Any]:
    change, met = "", None
    if before is not None and after is not None and before > 0:
        change, met = f" ({percent(after / before - 1, sign=True)})", after <= 0.8 * before
    return _goal(
        f"{language} bits per byte",
        "at least 20 % below the original model's with its own tokenizer",
        f"{written(after)} against {written(before)}{change}",
        met,
    )


def _chrf_goal(direction: str, before: float | None, after: float | None) -> dict[str, Any]:
    return _goal(
        f"chrF, {direction}",
        "above the original model's",
        f"{written(after, 'score')} against {written(before, 'score')}",
        None if before is None or after is None else after > before,
    )


def _variety(answers: Sequence[Mapping[str, Any]]) -> str:
    """How many chains have different questions: a model can learn the form of a chain without its content."""
    questions = [answer["chain"]["question_en"] for answer in answers if answer["chain"] is not None]
    return f"{len(set(questions))} different English questions in {len(questions)} chains"


def _stage(name: str, directory: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "seconds": summary.get("seconds"),
        "steps": summary.get("steps"),
        "tokens": summary.get("tokens"),
        **_speed(directory, summary),
        "summary": summary["text"],
    }


def _speed(directory: Path, summary: Mapping[str, Any]) -> dict[str, float | None]:
    """A stage's tokens per second, model FLOPs utilisation and peak memory in bytes; None if not known."""
    rows = read_rows(directory / "speed.jsonl")

    def known(key: str) -> list[float]:
        return [value for value in (number(row.get(key)) for row in rows) if value is not None]

    used, speeds = known("model_flops_utilisation"), known("tokens_per_second")
    return {
        # The summary has the speed of the last process, which is 0 if no step was left for it.
        "tokens_per_second": summary.get("tokens_per_second") or (median(speeds) if speeds else None),
        "model_flops_utilisation": median(used) if used else None,
        "memory_bytes": max(known("memory_bytes"), default=None),
    }


def _trained(directory: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's sources, validation and skipped updates; None for what is not known."""
    skipped = read_rows(directory / SKIPPED)
    return {
        "sources": summary.get("sources"),
        "best": summary.get("best"),
        "validation": [
            {"step": row["step"], "bits_per_byte": number(row["bits_per_byte"])}
            for row in read_validations(directory / VALIDATION)
        ],
        "skipped": summary.get("skipped"),
        "skipped_updates": [
            {**row, "rows": row["rows"][:SKIPPED_ROWS], "more_rows": len(row["rows"][SKIPPED_ROWS:])}
            for row in skipped[:SKIPPED_SHOWN]
        ],
    }


def _translations(run: Run, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first held-out pairs, each with its translations at three points."""
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
    """The first held-out questions with the final answers and the original model's; none is chosen for how it looks."""
    section = run.config.evaluation
    target = section.instruction_fields[1]
    rows = read_jsonl(section.instructions, required=(target,), limit=section.max_chats)
    answers, before = measured["transfer"]["answers"], measured["base"]["answers"]
    return [
        {"question": row[target], "base": old["visible"], **new}
        for row, new, old in list(zip(rows, answers, before, strict=True))[:SHOWN]
    ]


def _asked(run: Run, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The questions with known answers: the counts of each point, and the first, right or wrong; empty if there are
    none."""
    path = run.config.evaluation.answers
    if path is None:
        return {}
    answers, before = (measured[point]["asked"]["questions"] for point in ("transfer", "base"))
    conversations = [
        {**new, "base": old["visible"], "answers": list(question.answers), "history": list(question.history)}
        for question, new, old in list(zip(read_questions(path), answers, before, strict=False))[:SHOWN]
    ]
    counts = {point: result["asked"]["counts"] for point, result in measured.items()}
    return {"asked": {"counts": counts, "conversations": conversations}}
