"""The evaluation of one point on the held-out files, which no stage trains on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transllm_jax.choices import TRAININGS
from transllm_jax.conversion.import_base import base_fingerprint
from transllm_jax.data.clean.cleaning import refuse_swapped
from transllm_jax.data.read.questions import read_questions
from transllm_jax.data.read.sources import check_no_special, read_jsonl, read_pairs
from transllm_jax.disk import read_json, write_json
from transllm_jax.errors import Preempted, UserError
from transllm_jax.evaluation.likelihood import Teacher
from transllm_jax.evaluation.point import ASKED_PARTS, PARTS, HeldOut, Point, evaluate
from transllm_jax.generation.engine import Engine
from transllm_jax.model.parameters import Split
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.chat import encode_prompt
from transllm_jax.tokenizer.ends import answer_end_id, end_ids

# In the directory of all evaluations: the original model's answers, which the evaluation of each point uses.
ORIGINAL = "original_answers.json"
# The results of the parts that are done, while an evaluation is not finished.
SO_FAR = "so_far.json"
_OF_ANSWERS = ("answers", "max_questions", "max_questions_between", "max_answer_tokens")


def inputs(run: Run) -> dict[str, Any]:
    """An evaluation's inputs: the config sections and files that it reads."""
    section = run.config.evaluation
    return {
        # `others` are not measured. Without a file of answers, an evaluation is what it was before there were any.
        "evaluation": section.model_dump(exclude={"others", *(() if section.answers else _OF_ANSWERS)}),
        "prompts": run.config.prompts.model_dump(),
        "language": run.config.language.model_dump(),
        "markers": run.config.markers.model_dump(),
        "date": run.today.isoformat(),
        **run.inputs.source_hashes([section.text]),
        **run.inputs.hashes([section.pairs, section.instructions, *([section.answers] if section.answers else [])]),
    }


def require_held_out(run: Run) -> None:
    """Refuse a held-out file that a stage also trains on, or that is a copy of such a file. Raises UserError."""
    trained_on = _trained_hashes(run)
    for name, files in _held_out_hashes(run).items():
        for file, digest in files.items():
            if digest in trained_on:
                raise UserError(f"{name}: {file} is also trained on; hold it out of every stage")


def _trained_hashes(run: Run) -> set[str]:
    """The hashes of all files that a stage trains on."""
    config = run.config
    trained = [
        *config.vocabulary.sources,
        *config.pretrain.sources,
        *config.translate.sources,
        *config.transfer.sources,
        config.transfer.pairs,
    ]
    recover = config.recover
    records = [recover.instructions, recover.translate_instructions.file, recover.translate_answers.file]
    records += [None if recover.written is None else recover.written.file]
    return {*run.inputs.source_hashes(trained).values(), *run.inputs.hashes(path for path in records if path).values()}


def _held_out_hashes(run: Run) -> dict[str, dict[str, str]]:
    """The hashes of the held-out files by config key."""
    section = run.config.evaluation
    held_out = {
        "evaluation.text": run.inputs.source_hashes([section.text]),
        "evaluation.pairs": run.inputs.hashes([section.pairs]),
        "evaluation.instructions": run.inputs.hashes([section.instructions]),
        "evaluation.answers": run.inputs.hashes([section.answers] if section.answers else []),
        "evaluation.others": run.inputs.source_hashes(section.others),
    }
    for name in TRAININGS:
        validation = getattr(run.config, name).validation
        held_out[f"{name}.validation"] = {} if validation is None else run.inputs.source_hashes([validation.source])
    return held_out


def check(run: Run) -> None:
    """Find what is wrong with the config and files of an evaluation before the first begins. Raises UserError."""
    section, prompts = run.config.evaluation, run.config.prompts
    for key, given in (("to_target", prompts.to_target), ("to_english", prompts.to_english)):
        for prompt in given:
            if found := run.inputs.find_special(prompt):
                raise UserError(f"prompts.{key}: {prompt!r} contains the special token {found}; take it out")
    run.models.check_length("evaluation.length", section.length)
    run.models.check_length("evaluation.max_chain_tokens", section.max_chain_tokens)
    run.inputs.check(section.text)
    pairs = read_pairs(section.pairs, limit=section.max_pairs)
    refuse_swapped(section.pairs, pairs, run.config.language.code, run.config.language.scripts)
    rows = read_jsonl(section.instructions, required=section.instruction_fields, limit=section.max_chats)
    check_no_special(pairs, run.inputs.find_special)
    check_no_special(rows, run.inputs.find_special)
    asked = [
        (prompt.replace("{language}", run.config.language.name).replace("{text}", text), place)
        for pair, place in zip(pairs, pairs.places, strict=True)
        for prompt, text in zip((prompts.to_target[0], prompts.to_english[0]), pair, strict=True)
    ]
    english, target = section.instruction_fields
    asked += [(row[english], place) for row, place in zip(rows, rows.places, strict=True)]
    in_target = [(row[target], place) for row, place in zip(rows, rows.places, strict=True)]
    sides = [(text, place) for pair, place in zip(pairs, pairs.places, strict=True) for text in pair]
    run.models.check_room([*asked, *in_target], "evaluation.max_new_tokens", section.max_new_tokens)
    # At point `translate` texts are translated between markers; at point `transfer` questions need room for a chain.
    run.models.check_room(sides, "evaluation.max_new_tokens", section.max_new_tokens, chat=False)
    run.models.check_room(in_target, "evaluation.max_chain_tokens", section.max_chain_tokens)
    if section.answers is not None:
        _check_answers(run, section.answers)


def _check_answers(run: Run, path: str) -> None:
    """Find what is wrong with the file of checkable questions. Raises UserError with file and line."""
    section = run.config.evaluation
    questions = read_questions(path, run.inputs.find_special)
    asked = list(zip(questions, questions.places, strict=True))[: section.max_questions]
    plain = [(question.asked, place) for question, place in asked]
    run.models.check_room(plain, "evaluation.max_answer_tokens", section.max_answer_tokens)
    # One more token: at point `transfer` a marker comes before an answer in English.
    english = [(question.asked_in_english, place) for question, place in asked if question.wordings]
    run.models.check_room(english, "evaluation.max_answer_tokens", section.max_answer_tokens + 1)
    in_chains = [(question.asked_in_chains, place) for question, place in asked]
    run.models.check_room(in_chains, "evaluation.max_chain_tokens", section.max_chain_tokens)


def run_evaluation(run: Run, directory: Path, point: str) -> Mapping[str, Any]:
    """Measure a point, and write results.json. Each part's result is kept at once, so a stopped evaluation goes on.

    Raises Preempted between two batches when asked to stop.
    """
    config, path = run.config, directory / SO_FAR
    base = run.models.split("base")
    split = base if point == "base" else run.models.split(point)
    here = Point(
        point,
        split,
        run.models.tokenizer(point),
        run.models.config,
        tuned=config.transfer.steps != 0,
        chains=config.transfer.answers == "chains",
    )
    done: dict[str, Any] = (
        run.peers.run_on_primary("an evaluation so far", lambda: read_json(path) if path.exists() else {}) or {}
    )
    stop_if_asked = partial(_stop_if_asked, run)

    parts = PARTS + (ASKED_PARTS if config.evaluation.answers else 0)

    with run.progress.task(f"evaluation of {point}", total=parts, unit="part") as bar:

        def part(name: str, make: Callable[[], Any]) -> Any:
            if name not in done:
                bar.update(len(done), name)
                done[name] = make()
                if run.primary:
                    write_json(path, done)
                stop_if_asked()
            return done[name]

        try:
            held_out = _held_out(run)
            if run.teacher is None:
                run.teacher = _make_teacher(run, base, directory.parent / ORIGINAL, held_out)
            results = evaluate(
                here,
                run.teacher,
                held_out,
                config.evaluation,
                config.prompts,
                run.markers,
                config.language.name,
                part,
                stop_if_asked,
            )
        except Preempted:
            run.push(f"evaluation/{ORIGINAL}", f"evaluation/{point}")
            told = f"{len(done)} of {parts} parts: stopped, what is done is saved"
            raise Preempted(f"evaluation/{point}: {told}") from None
        bar.update(parts)
    counts = {"documents": len(held_out.documents), "pairs": len(held_out.pairs), "chats": len(held_out.questions)}
    if held_out.checkable is not None:
        counts["questions"] = len(results["asked"]["questions"])
    if run.primary:
        write_json(directory / "results.json", {"point": point, "counts": counts, **results})
        path.unlink(missing_ok=True)
    return {
        "text": _summary_text(results["metrics"]),
        # In the manifest, because `transllm status` reads it and not all texts of the evaluation.
        "metrics": results["metrics"],
        "chains": counts_of_chains(results["answers"]),
        **({"asked": results["asked"]["counts"]} if "asked" in results else {}),
    }


def counts_of_chains(answers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many answers there are, how many are well-formed chains, and how many different questions these have; how
    many answers the limit of new tokens cut off, and how many of those are not well-formed."""
    questions = [answer["chain"]["question_en"] for answer in answers if answer["chain"] is not None]
    return {
        "answers": len(answers),
        "well_formed": len(questions),
        "different_questions": len(set(questions)),
        "cut_off": sum(answer.get("cut_off", False) for answer in answers),
        "broken_off": sum(answer.get("cut_off", False) and answer["chain"] is None for answer in answers),
    }


def _held_out(run: Run) -> HeldOut:
    section = run.config.evaluation
    documents = run.inputs.read_target(section.text, "evaluation")
    pairs = read_pairs(section.pairs, limit=section.max_pairs)
    english, target = section.instruction_fields
    rows = read_jsonl(section.instructions, required=(english, target), limit=section.max_chats)
    for loaded in (pairs, rows):
        check_no_special(loaded, run.models.tokenizer("base").find_special)
    questions = [(row[english].strip(), row[target].strip()) for row in rows]
    return HeldOut(
        documents=documents[: section.max_documents],
        pairs=pairs,
        questions=questions,
        checkable=None if section.answers is None else read_questions(section.answers),
        asked=section.max_questions,
        asked_between=section.max_questions_between,
    )


def _make_teacher(run: Run, base: Split, path: Path, held_out: HeldOut) -> Teacher:
    """The original model with its answers to the English questions, which `path` keeps."""
    answers = _original_answers(run, path, [question for question, _ in held_out.questions])
    return Teacher(base, answers, batch_size=4, between=partial(_stop_if_asked, run))


def _original_answers(run: Run, path: Path, questions: list[str]) -> list[tuple[list[int], list[int]]]:
    """The original model's answers to the English questions as (prompt ids, answer ids).

    The answer ids include the end token, unless the answer was cut off. `path` keeps the answers.
    """
    tokenizer, section = run.models.tokenizer("base"), run.config.evaluation
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in questions]
    # The answers in the file are used if they were made from the same. Prompts, because a template may write the date.
    wanted = {
        "prompts": prompts,
        "ends": list(end_ids(tokenizer)),
        "weights": base_fingerprint(run.models.base),
        "max_new_tokens": section.max_new_tokens,
    }
    known = run.peers.share(read_json(path) if run.primary and path.exists() else None)
    if known is not None and known["of"] == wanted:
        return [(row["prompt"], row["answer"]) for row in known["rows"]]
    engine = Engine(run.models.split("base"), run.models.config, batch_size=section.batch_size)
    generated = engine.generate(
        prompts, max_new_tokens=section.max_new_tokens, stop=end_ids(tokenizer), between=partial(_stop_if_asked, run)
    )
    rows: list[dict[str, Any]] = []
    for question, prompt, ids in zip(questions, prompts, generated, strict=True):
        ended = [answer_end_id(tokenizer)] if len(ids) < section.max_new_tokens else []
        rows.append({"question": question, "text": tokenizer.decode(ids), "prompt": prompt, "answer": ids + ended})
    if run.primary:
        write_json(path, {"of": wanted, "rows": rows})
    return [(row["prompt"], row["answer"]) for row in rows]


def _summary_text(metrics: Mapping[str, Any]) -> str:
    chains = metrics["well_formed_chains"]
    return (
        f"{metrics['bits_per_byte']:.3f} bits/byte, chrF {metrics['chrf_to_target']:.1f} and "
        f"{metrics['chrf_to_english']:.1f}, English KL {metrics['english_kl']:.3f}"
        + ("" if chains is None else f", {chains:.0%} well-formed chains")
        + (f", {metrics['answers']:.0%} of answers right" if "answers" in metrics else "")
    )


def _stop_if_asked(run: Run) -> None:
    """Raise Preempted in all processes if one of them was asked to stop."""
    if run.peers.any(run.interrupt.requested):
        raise Preempted("evaluation: stopped, what is done is saved")
