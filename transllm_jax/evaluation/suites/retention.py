"""Suite `retention`: what the transfer cost in English.

- Drift: the original model answers English instructions, greedily; on these answers, the KL divergence per token from
  the original to the model, in nats, and the share of tokens that both find likeliest. Where the model answers in
  chains, its English answers begin with a marker; it is put before each answer, and does not count.
- Bits per byte of English text.
- The questions with known answers, asked in English.

The original itself can be measured, too: its drift is 0, and the rest is what there was to lose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transllm_jax.data.read.instructions import read_instruction
from transllm_jax.data.read.sources import read_jsonl
from transllm_jax.disk import sha256_of_json
from transllm_jax.errors import UserError
from transllm_jax.evaluation.answers import Checkable, Judge
from transllm_jax.evaluation.likelihood import Teacher
from transllm_jax.evaluation.suites import answers
from transllm_jax.evaluation.suites.documents import measured_documents, ratio_in
from transllm_jax.evaluation.suites.measure import Measure, mean_of, measured, ratio_of
from transllm_jax.evaluation.suites.perplexity import ENGLISH, english_documents, require_weights
from transllm_jax.evaluation.suites.records import open_records
from transllm_jax.evaluation.suites.results import Results
from transllm_jax.evaluation.suites.suite_run import SuiteOptions, SuiteRun
from transllm_jax.evaluation.systems.local import LocalSystem
from transllm_jax.evaluation.systems.system import System
from transllm_jax.generation.engine import Request
from transllm_jax.tokenizer.chat import encode_prompt
from transllm_jax.tokenizer.ends import answer_end_id, end_ids

MEASURES: tuple[Measure, ...] = (
    ratio_of("drift, KL per token", "kl", "answer_tokens", higher_is_better=False),
    ratio_of("tokens that the original would say", "same", "answer_tokens", percent=True),
    ratio_in("bits per byte of English", "bits", "bytes", ENGLISH),
    mean_of("right in English", "right_english", percent=True),
)
# Answers that are compared together.
GROUP = 16


def check(options: SuiteOptions) -> None:
    """Raises UserError if there is nothing to measure, or a file is wrong."""
    _instructions(options)
    english_documents(options)
    if options.questions is not None:
        answers.questions(options)


def check_system(system: System) -> None:
    """Raises UserError for a system without an original model."""
    local = require_weights(system, "retention")
    if local.original is None:
        raise UserError(
            f"the suite retention compares with the original model, which {system.name} does not hold; give a run's "
            "work directory"
        )


def _instructions(options: SuiteOptions) -> list[str]:
    if options.instructions is None:
        raise UserError("the suite retention needs English instructions (jsonl); give --instructions FILE")
    field = options.instruction_field
    if field != "instruction":
        rows = read_jsonl(str(options.instructions), required=(field,), limit=options.limit)
        return [row[field].strip() for row in rows]
    rows = read_jsonl(str(options.instructions), {}, limit=options.limit)
    return [read_instruction(row, place) for row, place in zip(rows, rows.places, strict=True)]


def run(suite: SuiteRun) -> Results:
    """Measure all three, and keep what was found."""
    options = suite.options
    system = require_weights(suite.system, suite.suite)
    assert system.original is not None
    items: list[dict[str, Any]] = _drift(suite, system, system.original(), _instructions(options))
    documents = measured_documents(suite, system, english_documents(options), "documents.jsonl")
    items += [{**row, "language": ENGLISH} for row in documents]
    if options.questions is not None:
        items += _asked(suite, options)
    found = measured(MEASURES, items)
    main = found[MEASURES[0].name]
    unanswered = sum(item.get("error") is not None for item in items)
    return suite.keep(
        items,
        Results(
            suite=suite.suite,
            system=suite.system.name,
            measure=MEASURES[0].name,
            score=main["value"],
            interval=(main["low"], main["high"]),
            asked=len(items),
            parsed=len(items) - unanswered,
            higher_is_better=False,
            more={
                **{name: interval for name, interval in found.items() if interval is not None},
                "answers of the original": sum("kl" in item for item in items),
                "texts": len(documents),
                "questions": sum("right_english" in item for item in items),
            },
            made_with={
                **suite.made_with,
                "original": dict(system.original().identity),
                "max_new_tokens": options.max_new_tokens,
                "max_answer_tokens": options.max_answer_tokens,
                "length": options.length,
            },
        ),
    )


def _drift(
    suite: SuiteRun, system: LocalSystem, original: LocalSystem, instructions: Sequence[str]
) -> list[dict[str, Any]]:
    """For each answer of the original: the sum of KL over its tokens, and on how many both models agree."""
    rows = _original_answers(suite, original, instructions)
    weights = system.weights
    prefix = weights.tokenizer.encode(weights.markers.response) if weights.tuned else []
    what = f"{suite.suite} of {system.name}"
    settings = {"system": system.identity, "answers": sha256_of_json([row["ids"] for row in rows]), "prefix": prefix}
    with (
        open_records(suite.directory / "drift.jsonl", settings) as records,
        suite.progress.task(what, total=len(rows), done=len(records), unit="answer") as bar,
    ):
        for start in range(0, len(rows), GROUP):
            some = rows[start : start + GROUP]
            if all(row["id"] in records for row in some):
                continue
            suite.stop(f"{what}: {len(records)} of {len(rows)} answers")
            pairs = [(row["prompt"], row["ids"]) for row in some]
            teacher = Teacher(original.weights.split, pairs, batch_size=4)
            kl, same = teacher.by_token(weights.split, prefix)
            first = 0
            for row in some:
                last = first + len(row["ids"])
                if row["id"] not in records:
                    counts = {"kl": float(kl[first:last].sum()), "same": int(same[first:last].sum())}
                    records.add({"id": row["id"], **counts, "answer_tokens": last - first})
                first = last
            bar.update(len(records))
        return [{**records[row["id"]], "instruction": row["instruction"], "original": row["text"]} for row in rows]


def _original_answers(suite: SuiteRun, original: LocalSystem, instructions: Sequence[str]) -> list[Mapping[str, Any]]:
    """The original's greedy answers, as ids with their end, unless they were cut off; those without a token are left
    out, because nothing can be compared on them."""
    tokenizer, limit = original.weights.tokenizer, suite.options.max_new_tokens
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in instructions]
    settings = {"system": original.identity, "prompts": sha256_of_json(prompts), "max_new_tokens": limit}
    stop, what = end_ids(tokenizer), f"{suite.suite} of {suite.system.name}: answers of the original"
    with (
        open_records(suite.directory / "original.jsonl", settings) as records,
        suite.progress.task(what, total=len(prompts), done=len(records), unit="answer") as bar,
    ):
        missing = [number for number in range(len(prompts)) if f"drift/{number + 1}" not in records]

        def between() -> None:
            suite.stop(f"{what}: {len(records)} of {len(prompts)}")

        requests = [Request(prompts[number], limit, stop) for number in missing]
        for place, result in original.engine.run(requests, at_once=len(prompts), between=between) if missing else ():
            number = missing[place]
            ended = [answer_end_id(tokenizer)] if result.finish_reason == "stop" else []
            records.add(
                {
                    "id": f"drift/{number + 1}",
                    "instruction": instructions[number],
                    "text": tokenizer.decode(result.ids),
                    "prompt": prompts[number],
                    "ids": [*result.ids, *ended],
                }
            )
            bar.update(len(records))
        rows = [records[f"drift/{number + 1}"] for number in range(len(prompts))]
    return [row for row in rows if row["ids"]]


def _asked(suite: SuiteRun, options: SuiteOptions) -> list[dict[str, Any]]:
    """The questions that have an English wording, asked in English."""
    given, everything = answers.questions(options), answers.read_all(options)
    turns = suite.ask(answers.in_english(given, options))
    judge = Judge(Checkable(one.wordings[0] if one.wordings else "", one.answers_en, one.kind) for one in everything)
    return [
        {
            "id": id,
            "kind": one.kind,
            "question": one.wordings[0],
            "accepted": list(one.answers_en),
            "right_english": judge.is_right(number, turns[id][0].visible),
            **turns[id][0].recorded(),
        }
        for number, one in enumerate(given)
        if (id := f"{number + 1}/en") in turns
    ]
