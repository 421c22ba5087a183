"""Stage `recover` by another engine: answers of a teacher, and translations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transllm_jax.config import Recover, TranslatorEndpoint
from transllm_jax.disk import write_text
from transllm_jax.stages.endpoint import BatchWanted, check_endpoint, replies_to, requests_of
from transllm_jax.stages.endpoint_check import check_teacher
from transllm_jax.stages.generated import Row
from transllm_jax.stages.run import Run
from transllm_jax.stages.translations import TranslationChecks, printable

K = TypeVar("K", bound=str)


def check_endpoints(run: Run) -> None:
    """Find what is wrong with the stage's endpoints before the run begins. Raises UserError.

    No server is asked: it may be started when the base model is there.
    """
    if run.config.recover.teacher is not None:
        check_endpoint(run.config.recover.teacher, "recover.teacher")
    for kind, translator in _translators(run).items():
        if translator is not None:
            check_endpoint(translator, f"recover.translate_{kind}.translator")


def teacher_answers(run: Run, path: Path, instructions: Sequence[str]) -> list[Row]:
    """Answers of the teacher's endpoint, in order, as the run's own engine makes them; written to `path`.

    Raises UserError if the endpoint serves another model, unless the
    config says that it may; and as `replies_to` does.
    """
    section, where = run.config.recover, "recover.teacher"
    teacher = section.teacher
    assert teacher is not None
    if teacher.check and teacher.endpoint is not None:
        check_teacher(run, path.parent, instructions, teacher, where, [])
    requests = requests_of(teacher, "answers", instructions, section.max_new_tokens, run.config.seed)
    replies = replies_to(
        run, path.parent, requests, teacher, stage="recover", where=where, what="answers", unit="answer"
    )
    if teacher.check and teacher.batch is not None:
        check_teacher(run, path.parent, instructions, teacher, where, replies)
    rows = [
        {"instruction": text, "answer": printable(reply.text), "finished": reply.finished}
        for text, reply in zip(instructions, replies, strict=True)
    ]
    if run.primary:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def add_translations(
    run: Run,
    directory: Path,
    texts: Mapping[K, Sequence[str]],
    found: Mapping[K, list[str | None]],
    by: Mapping[K, list[str]],
    settings: Recover | None,
) -> list[Row]:
    """Put the translations of endpoints in the places of `found` that have none yet, and `endpoint` into `by` there.

    All three by kind of texts. Texts that are equal are translated once. A translation that is empty, cut off or
    refused stays None, and so does one that the checks of `settings` reject (as whole texts; None: there are no
    checks). Returns the rejected ones, as lines of `dropped.jsonl`. Raises as `replies_to`, after the batch files of
    all kinds are written.
    """
    batches: list[BatchWanted] = []
    rejected: list[Row] = []
    for kind, translator in _translators(run).items():
        if translator is None or kind not in texts:
            continue
        places = [place for place, text in enumerate(found[kind]) if text is None]
        wanted = list(dict.fromkeys(texts[kind][place] for place in places))
        try:
            made = _translated(run, directory, translator, kind, wanted)
        except BatchWanted as error:
            batches.append(error)
            continue
        faults = _faults(run, settings, made)
        for place in places:
            source = texts[kind][place]
            if fault := faults.get(source):
                line = {"of": f"translation of {kind}", "reason": fault, "source": source, "translation": made[source]}
                rejected.append(line)
            elif translation := made[source]:
                found[kind][place], by[kind][place] = translation, "endpoint"
    if batches:
        raise BatchWanted("; ".join(map(str, batches)))
    return rejected


def _faults(run: Run, settings: Recover | None, made: Mapping[str, str]) -> dict[str, str]:
    """By source: why a translation is rejected."""
    if settings is None:
        return {}
    rows = [{"source": source, "translation": text} for source, text in made.items() if text]
    checks = TranslationChecks(run, settings, rows)
    return {row["source"]: fault for row in rows if (fault := checks.fault(row))}


def _translators(run: Run) -> dict[Any, TranslatorEndpoint | None]:
    """The translators by kind of texts."""
    section = run.config.recover
    return {
        "instructions": section.translate_instructions.translator,
        "answers": section.translate_answers.translator,
    }


def _translated(
    run: Run,
    directory: Path,
    translator: TranslatorEndpoint,
    kind: str,
    texts: Sequence[str],
) -> dict[str, str]:
    """The translation of each text; empty if there is none that can be used."""
    prompts = [_prompt(run, translator, text) for text in texts]
    limit = translator.max_tokens or run.config.recover.max_new_tokens
    requests = requests_of(translator, f"translate_{kind}", prompts, limit, run.config.seed)
    replies = replies_to(
        run,
        directory,
        requests,
        translator,
        stage="recover",
        where=f"recover.translate_{kind}.translator",
        what=f"translations of {kind}",
        unit="text",
    )
    return {text: printable(reply.text) if reply.finished else "" for text, reply in zip(texts, replies, strict=True)}


def _prompt(run: Run, translator: TranslatorEndpoint, text: str) -> str:
    # The text last: it may hold braces.
    return translator.prompt.replace("{language}", run.config.language.name).replace("{text}", text.strip())
