"""The report of a run: one self-contained HTML file, made from the results alone.

A value that the results lack is shown as "not measured". The file needs no network, no script and no other file. The
terminal has `summary_table` and `conversation_panel`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from transllm_jax.choices import TRAININGS
from transllm_jax.disk import read_json, write_bytes
from transllm_jax.evaluation.advice.recorded import PAGE
from transllm_jax.evaluation.page.asked import asked_sentence, judgement, table_of_kinds
from transllm_jax.evaluation.page.measures import (
    ARROWS,
    BASE,
    NOT_MEASURED,
    Results,
    clean,
    language_name,
    number,
    percent,
    point_label,
    points,
    rows,
    section,
    written,
)
from transllm_jax.evaluation.page.plots import loss_plot, measure_plot, validation_plot
from transllm_jax.evaluation.page.suites import IN_WORKDIR, collect_suites, suite_sections
from transllm_jax.evaluation.page.terminal import (
    asked_lines,
    conversation_panel,
    findings_lines,
    keys_of,
    summary_table,
)
from transllm_jax.evaluation.page.verdict import verdict
from transllm_jax.words import duration, size

__all__ = [
    "asked_lines",
    "asked_sentence",
    "conversation_panel",
    "findings_lines",
    "refreshed_report",
    "render_report",
    "report_beside",
    "summary_table",
    "time_sentence",
    "write_report",
]

_CHAIN = ("question_en", "answer_en", "answer_target")
# Labels of the kinds of time (keys of transllm_jax.training.record.ledger), in the order in which they are shown.
_TIME_LABELS = {
    "step": "training steps",
    "compile": "compiling",
    "init": "starting",
    "data": "waiting for data",
    "save": "saving",
    "validate": "validation",
    "other": "other work",
    "redone": "done, then redone",
    "lost": "lost to restarts",
}
# The most characters shown of where a row's texts come from.
_PLACE = 240
_MODEL_LABELS = {
    "source": "Original model",
    "parameters": "Parameters, all",
    "trainable": "Parameters, trained",
    "new_tokens": "New tokens",
    "hidden_size": "Hidden size",
    "layers": "Layers",
}


def write_report(results: Results, path: Path) -> None:
    """Write the report of `results` (the contents of evaluation/results.json) to `path`, atomically.

    A reader never sees a partial file, and an earlier report stays if this one fails.
    """
    # Rendered before the file is opened. A lone surrogate, which UTF-8 cannot encode, becomes "?".
    data = render_report(results).encode("utf-8", errors="replace")
    write_bytes(path, data)


def refreshed_report(workdir: Path) -> Path | None:
    """Write the report of a finished run again, with what suites have found since; its path. None without a report."""
    results, path = workdir / "evaluation" / "results.json", workdir / "report.html"
    if not (results.exists() and path.exists()):
        return None
    write_report({**read_json(results), "suites": collect_suites(workdir / IN_WORKDIR)}, path)
    return path


def report_beside(results: Path) -> Path | None:
    """As `refreshed_report`, of the run in whose work directory a directory of suites' results is, if it is in one."""
    return refreshed_report(results.parents[1]) if results.parts[-2:] == IN_WORKDIR.parts else None


def render_report(results: Results) -> str:
    """The report of `results` as HTML text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("transllm_jax.evaluation.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clean"] = clean
    environment.filters["point"] = point_label
    environment.filters["count"] = _count
    language = section(results, "language")
    measured = list(rows(results))
    suites = suite_sections(results.get("suites") or [])
    return environment.get_template("report.html.j2").render(
        title=results.get("title") or "Report",
        created=_date(results.get("created")),
        language=language_name(results),
        # In HTML, an empty language tag means that the language is unknown.
        code=str(language.get("code") or ""),
        verdict=verdict(results),
        findings=_findings(results),
        findings_page=PAGE,
        points=points(results),
        base=BASE,
        not_measured=NOT_MEASURED,
        rows=measured,
        arrows=ARROWS,
        plots=[(row, measure_plot(row)) for row in measured if row.has_plot],
        suites=suites,
        most_systems=max((len(one["systems"]) for one in suites), default=0),
        asked=table_of_kinds(results),
        asked_talks=list(_asked(results)),
        notes=list(_notes(results)),
        conversations=list(_conversations(results)),
        translations=list(_translations(results)),
        sources=list(_sources(results)),
        stages=list(_stages(results)),
        skipped=list(_skipped(results)),
        curves=list(_curves(results)),
        times=_times(section(results, "ledger")),
        model=[
            (_MODEL_LABELS.get(key, key.replace("_", " ")), _value(value))
            for key, value in section(results, "model").items()
        ],
        versions=[(key, _value(value)) for key, value in section(results, "versions").items()],
        config=results.get("config") or "",
    )


def _findings(results: Results) -> list[dict[str, Any]] | None:
    """The findings, each with its keys as (key, present value); None if the results are from before there were any."""
    if results.get("findings") is None:
        return None
    return [
        {
            **{part: clean(finding.get(part)) for part in ("topic", "stage", "what", "turn")},
            "keys": list(keys_of(finding)),
        }
        for finding in results["findings"]
        if isinstance(finding, Mapping)
    ]


def _notes(results: Results) -> Iterator[tuple[str, str]]:
    """The details of the evaluation, each as a name and one line; an unknown one is shown unchanged."""
    for key, value in section(results, "details").items():
        if key == "counts" and isinstance(value, Mapping):
            text = ", ".join(f"{_count(count)} {name.replace('_', ' ')}" for name, count in value.items())
            yield "Held-out material", text
        elif key == "chrf_prompt" and isinstance(value, Mapping):
            text = ", ".join(f"{point_label(point)}: {prompt}" for point, prompt in value.items())
            yield "How translations were asked for", text
        else:
            yield key.replace("_", " ").capitalize(), _value(value)


def _conversations(results: Results) -> Iterator[dict[str, Any]]:
    code = str(section(results, "language").get("code") or "")
    for talk in results.get("conversations") or []:
        base, chain = talk.get("base"), talk.get("chain")
        yield {
            "question": clean(talk.get("question")),
            "base": None if base is None else clean(base).strip(),
            "base_code": code if _mostly_beyond_ascii(clean(base)) else "",
            "visible": clean(talk.get("visible")).strip(),
            "raw": clean(talk.get("raw")),
            "chain": {step: clean(chain.get(step)).strip() for step in _CHAIN} if chain else None,
        }


def _asked(results: Results) -> Iterator[dict[str, Any]]:
    """The first questions with known answers: as `_conversations`, and what is right."""
    talks = [talk for talk in section(results, "asked").get("conversations") or [] if isinstance(talk, Mapping)]
    for shown, talk in zip(_conversations({**results, "conversations": talks}), talks, strict=True):
        yield {**shown, **judgement(talk)}


def _translations(results: Results) -> Iterator[dict[str, Any]]:
    """Each sentence in both directions: source, reference, and the model's translation at each point."""
    order = points(results)
    for pair in results.get("translations") or []:
        outputs = section(pair, "outputs")
        where = [point for point in order if point in outputs] + [point for point in outputs if point not in order]
        answers = {
            direction: [(point, clean(section(outputs, point).get(direction)).strip()) for point in where]
            if any(section(outputs, point).get(direction) is not None for point in where)
            else []
            for direction in ("to_target", "to_english")
        }
        yield {"english": clean(pair.get("english")), "target": clean(pair.get("target")), **answers}


def _stages(results: Results) -> Iterator[dict[str, str]]:
    for stage in results.get("stages") or []:
        keys = ("seconds", "tokens_per_second", "memory_bytes", "model_flops_utilisation")
        seconds, speed, memory, flops = (number(stage.get(key)) for key in keys)
        yield {
            "name": str(stage.get("name") or ""),
            "time": NOT_MEASURED if seconds is None else duration(seconds),
            "steps": _count(stage.get("steps")),
            "tokens": _count(stage.get("tokens")),
            "speed": "" if speed is None else f"{speed:,.1f}",
            "memory": "" if memory is None else size(memory),
            "flops": "" if flops is None else percent(flops),
            "summary": clean(stage.get("summary")),
        }


def _sources(results: Results) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """For each stage, a row per source that it was trained on."""
    trained = section(results, "trained")
    for stage in trained:
        sources = section(section(trained, stage), "sources")
        if sources:
            yield stage, [_source(name, section(sources, name)) for name in sources]


def _source(name: str, source: Mapping[str, Any]) -> dict[str, str]:
    padded, epochs = number(source.get("padded_fraction")), number(source.get("epochs"))
    left_out = None
    if isinstance(source.get("left_out"), Mapping):
        # Items that were cut were not left out.
        counts = [(str(reason), f"{_count(count)} {reason}") for reason, count in section(source, "left_out").items()]
        cut = [text for reason, text in counts if reason.startswith("cut")]
        out = [text for reason, text in counts if not reason.startswith("cut")]
        left_out = "; ".join([f"left out: {', '.join(out)}" if out else "nothing left out", *cut])
    return {
        "name": clean(name),
        "left_out": clean(left_out),
        "items": _count(source.get("items")),
        "tokens": _count(source.get("tokens")),
        "rows": _count(source.get("rows")),
        "padded": "" if padded is None else percent(padded),
        "epochs": "" if epochs is None else f"{epochs:.2f}",
    }


def _skipped(results: Results) -> Iterator[dict[str, Any]]:
    """The stages that skipped updates: how many, and where the texts of the first few come from."""
    trained = section(results, "trained")
    for stage in trained:
        found = section(trained, stage)
        updates = [update for update in found.get("skipped_updates") or [] if isinstance(update, Mapping)]
        count = number(found.get("skipped")) or len(updates)
        if count:
            yield {
                "stage": stage,
                "count": f"{_count(count)} update{'' if count == 1 else 's'}",
                "more": max(int(count) - len(updates), 0),
                "updates": [
                    {
                        "text": f"step {_count(update.get('step'))}: loss {_any_number(update.get('loss'))}, "
                        f"gradient norm {_any_number(update.get('gradient_norm'))}",
                        "rows": [_cut(clean(row)) for row in update.get("rows") or []],
                        "more": _count(update.get("more_rows") or None),
                    }
                    for update in updates
                ],
            }


def _curves(results: Results) -> Iterator[dict[str, Any]]:
    losses, trained = section(results, "losses"), section(results, "trained")
    for stage in [*TRAININGS, *(name for name in losses if name not in TRAININGS)]:
        records = [record for record in losses.get(stage) or [] if isinstance(record, Mapping)]
        finite = [record for record in records if number(record.get("loss")) is not None]
        caption = NOT_MEASURED
        if finite:
            first, last = finite[0], finite[-1]
            caption = f"{written(number(first['loss']))} at step {_count(first.get('step'))}, "
            caption += f"{written(number(last['loss']))} at step {_count(last.get('step'))}"
        if len(records) > len(finite):
            caption += f"; {len(records) - len(finite)} without a finite loss"
        yield {
            "stage": stage,
            "plot": loss_plot(stage, records),
            "caption": caption,
            "validation": _validation(stage, section(trained, stage), records),
        }


def _validation(stage: str, trained: Mapping[str, Any], losses: list[Mapping[str, Any]]) -> dict[str, Any] | None:
    records = [record for record in trained.get("validation") or [] if isinstance(record, Mapping)]
    best = number(trained.get("best"))
    plot = validation_plot(stage, records, best, losses)
    if plot is None:
        return None
    finite = [record for record in records if number(record.get("bits_per_byte")) is not None]
    shown = [record for record in finite if record is finite[-1] or record["step"] == best]
    caption = ", ".join(
        f"{'best ' if record.get('step') == best else ''}{written(number(record['bits_per_byte']))} "
        f"at step {_count(record.get('step'))}"
        for record in shown
    )
    return {"plot": plot, "caption": caption}


def time_sentence(ledger: Mapping[str, Any]) -> str:
    """How much of the time was spent on training, and what restarts cost, in one line.

    ledger: the result of transllm_jax.training.record.ledger.summarise. Empty if no time was counted.
    """
    total, trained = number(ledger.get("total")), number(ledger.get("trained"))
    if not total or trained is None:
        return ""
    # Whole percents are enough here, except near 0 and 1: a little is not nothing, and most is not all.
    share = percent(trained if trained < 0.01 or trained > 0.99 else round(trained, 2))
    text = f"trained {share} of {duration(total)}"
    restarts, lost = number(ledger.get("restarts")) or 0, number(ledger.get("lost")) or 0
    if restarts:
        cost = f"{duration(lost)} lost" if lost else "nothing lost"
        text += f"; {cost} to {restarts:.0f} restart{'' if restarts == 1 else 's'}"
    return text


def _times(ledger: Mapping[str, Any]) -> dict[str, Any]:
    """Where the time went: a sentence, the kinds of time that occur, and each stage's time by kind in this order."""
    stages = section(ledger, "stages")
    # The ledger's name for time outside all stages is "run"; it is shown last.
    spent = {name: _spent(section(stages, name)) for name in sorted(stages, key=lambda name: name == "run")}
    spent = {name: seconds for name, seconds in spent.items() if sum(seconds.values()) > 0}
    kinds = [kind for kind in _TIME_LABELS if any(seconds[kind] > 0 for seconds in spent.values())]
    longest = max((sum(seconds.values()) for seconds in spent.values()), default=0.0)
    return {
        "sentence": time_sentence(ledger),
        "kinds": [(kind, _TIME_LABELS[kind]) for kind in kinds],
        "stages": [
            {
                "name": "between stages" if name == "run" else name,
                "total": duration(sum(seconds.values())),
                "width": f"{100 * sum(seconds.values()) / longest:.2f}",
                "parts": [
                    {
                        "kind": kind,
                        "label": _TIME_LABELS[kind],
                        "width": f"{100 * seconds[kind] / sum(seconds.values()):.2f}",
                        "text": duration(seconds[kind]) if seconds[kind] else "",
                    }
                    for kind in kinds
                ],
            }
            for name, seconds in spent.items()
        ],
    }


def _spent(stage: Mapping[str, Any]) -> dict[str, float]:
    seconds = {**section(stage, "seconds"), "lost": stage.get("lost"), "redone": stage.get("redone")}
    return {kind: number(seconds.get(kind)) or 0.0 for kind in _TIME_LABELS}


def _count(value: object) -> str:
    """A count with thousands separators; empty if there is none."""
    amount = number(value)
    return "" if amount is None else f"{amount:,.0f}" if amount.is_integer() else f"{amount:,}"


def _any_number(value: object) -> str:
    """A number that skipped.jsonl holds as text, because it may not be finite."""
    try:
        amount = float(str(value))
    except ValueError:
        return NOT_MEASURED
    return f"{amount:.4g}" if math.isfinite(amount) else "NaN" if math.isnan(amount) else "infinite"


def _cut(text: str) -> str:
    return text if len(text) <= _PLACE else text[: _PLACE - 1] + "…"


def _value(value: object) -> str:
    """A value of the settings or details in one line."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, int) and not isinstance(value, bool):
        return _count(value)
    if isinstance(value, (Mapping, list, tuple)):
        return clean(json.dumps(value, ensure_ascii=False))
    return clean(value)


def _date(created: object) -> str:
    """An ISO 8601 time for people to read; anything else unchanged."""
    try:
        moment = datetime.fromisoformat(str(created))
    except ValueError:
        return str(created or "")
    zone = moment.strftime(" %Z") if moment.tzinfo else ""
    return f"{moment.day} {moment.strftime('%B %Y, %H:%M')}{zone}"


def _mostly_beyond_ascii(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    return 2 * sum(not letter.isascii() for letter in letters) > len(letters)
