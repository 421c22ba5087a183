"""Stage 4, first half: Recovery KD (TransLLM, arXiv 2405.13923).

The original chat model, which is the base weights with the adapters off, answers English instructions; instructions
and answers are translated. What it wrote is kept answer by answer, so a run that is cut off goes on where it was.
"""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transllm_jax.config import Translation
from transllm_jax.data.files import Place
from transllm_jax.data.sources import check_no_special, read_jsonl
from transllm_jax.errors import Preempted, UserError
from transllm_jax.generation.engine import Engine
from transllm_jax.generation.translate import FileTranslator, ModelTranslator
from transllm_jax.stages.run import Run
from transllm_jax.stages.training import contamination_inputs
from transllm_jax.tokenizer.chat import encode_prompt
from transllm_jax.training.metrics import read_rows

# Seconds between two copies of the answers to a store.
KEEP_EVERY = 60.0


def inputs(run: Run) -> dict[str, Any]:
    """What this stage reads: files and config sections."""
    section = run.config.recover
    files = [section.instructions, section.translate_instructions.file, section.translate_answers.file]
    return {
        "recover": section.model_dump(),
        **run.hashes(file for file in files if file is not None),
        **contamination_inputs(run, section.contamination),
    }


def check(run: Run) -> None:
    """What can be known to be wrong before this stage begins. Raises UserError."""
    section, context = run.config.recover, run.model_config.context
    texts, places = _instructions(run)
    run.check_room(zip(texts, places, strict=True), "recover.max_new_tokens", section.max_new_tokens)
    by_model = "model" in (section.translate_instructions.missing, section.translate_answers.missing)
    if by_model and 2 * (section.max_new_tokens + 2) > context:
        raise UserError(
            f"recover.max_new_tokens is {section.max_new_tokens}: an answer and its translation of so many tokens each "
            f"exceed the model's context of {context}; set it to at most {context // 2 - 2}"
        )
    for config in (section.translate_instructions, section.translate_answers):
        if config.file is not None:
            check_no_special(read_jsonl(config.file, required=config.fields), run.find_special)
    _from_file(texts, section.translate_instructions, "instructions")
    _from_file([], section.translate_answers, "answers")


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Write answers.jsonl (of the original model) and chains.jsonl (with their translations)."""
    section = run.config.recover
    texts, _ = _instructions(run)
    if section.contamination:
        texts = run.uncontaminated(texts, "recover: instructions")
    instructions = list(dict.fromkeys(texts))
    if len(instructions) < len(texts):
        twice = len(texts) - len(instructions)
        run.progress.say(f"  recover: {twice} instructions stand twice, read once", style="yellow")
    answers = _answer(run, directory / "answers.jsonl", instructions)
    whole = [row for row in answers if row["answer"] and (row["finished"] or section.keep_unfinished)]
    questions, by_question = _translate(
        run, [r["instruction"] for r in whole], section.translate_instructions, "instructions"
    )
    translated, by_answer = _translate(run, [r["answer"] for r in whole], section.translate_answers, "answers")
    chains = [
        {
            "question": question,
            "question_en": row["instruction"],
            "answer_en": row["answer"],
            "answer": answer,
            "translated_by": {"question": how_question, "answer": how_answer},
        }
        for row, question, how_question, answer, how_answer in zip(
            whole, questions, by_question, translated, by_answer, strict=True
        )
        if _usable(run, question) and _usable(run, row["answer"]) and _usable(run, answer)
    ]
    if not chains:
        raise UserError(f"recover: no chain is left of {len(instructions)} instructions; see {directory}/answers.jsonl")
    if run.primary:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chains)
        (directory / "chains.jsonl").write_text(text, encoding="utf-8")
    unfinished = len(answers) - len(whole)
    counts = {how: by_answer.count(how) for how in ("file", "model", "none")}
    return {
        "text": f"{len(answers)} answers of the original model ({unfinished} cut off or empty, left out), "
        f"{len(chains)} chains; answers translated by file {counts['file']}, by the model {counts['model']}",
        "answers": len(answers),
        "unfinished": unfinished,
        "chains": len(chains),
        "answers_translated_by": counts,
    }


def _usable(run: Run, text: str | None) -> bool:
    """Whether a text can stand in a chain: it is there, and no special token is spelled out in it."""
    return bool(text and text.strip()) and run.tokenizer("vocabulary").find_special(text or "") is None


def _printable(text: str) -> str:
    """A model's text without control characters, which no file of text may hold."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc").strip()


def _instructions(run: Run) -> tuple[list[str], list[Place]]:
    """The instructions, each with its input where it has one, and where each stands."""
    section = run.config.recover
    loaded = read_jsonl(section.instructions, limit=section.limit)
    check_no_special(loaded, run.find_special)
    texts = []
    for row, place in zip(loaded, loaded.places, strict=True):
        more = row.get("input") or ""
        if not isinstance(more, str):
            raise UserError(f"{place}: field 'input' must be a string, not {str(more)[:40]}; write it as one")
        texts.append("\n\n".join(part.strip() for part in (row["instruction"], more) if part.strip()))
    return texts, loaded.places


def _answer(run: Run, path: Path, instructions: Sequence[str]) -> list[dict[str, Any]]:
    """Answers of the original model, in order; those that `path` holds are not asked again."""
    section = run.config.recover
    rows: list[dict[str, Any]] = run.peers.share(read_rows(path)[: len(instructions)] if run.primary else None)
    path = run.own(path.parent) / path.name
    # Whole batches only, so that a resumed run asks in the same batches as an undisturbed one.
    if len(rows) < len(instructions):
        rows = rows[: len(rows) // section.batch_size * section.batch_size]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if len(rows) == len(instructions):
        return rows
    tokenizer = run.tokenizer("base")
    engine = Engine(run.split("base"), run.model_config, batch_size=section.batch_size)
    kept = time.monotonic()
    with (
        path.open("a", encoding="utf-8") as file,
        run.progress.task("answers", total=len(instructions), done=len(rows), unit="answer") as bar,
    ):
        while len(rows) < len(instructions):
            batch = instructions[len(rows) : len(rows) + section.batch_size]
            prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in batch]
            generated = engine.generate(
                prompts,
                max_new_tokens=section.max_new_tokens,
                stop=[tokenizer.eos_id],
                on_tokens=bar.tokens,
            )
            for text, ids in zip(batch, generated, strict=True):
                row = {
                    "instruction": text,
                    "answer": _printable(tokenizer.decode(ids, skip_special_tokens=True)),
                    "finished": len(ids) < section.max_new_tokens,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                rows.append(row)
            file.flush()
            bar.update(len(rows))
            if time.monotonic() - kept > KEEP_EVERY:
                run.keep("recover")
                kept = time.monotonic()
            if len(rows) < len(instructions) and run.peers.any(run.interrupt.requested):
                run.keep("recover")
                raise Preempted(f"recover: {len(rows)} of {len(instructions)} answers: stopped, what is done is saved")
    return rows


def _from_file(texts: Sequence[str], config: Translation, what: str) -> list[str | None]:
    """What the file of translations has of each text. Raises UserError where that must be all, and is not."""
    if config.file is None:
        return [None] * len(texts)
    found = FileTranslator(config.file, config.fields).translate(texts, "to_target")
    missing = [text for text, translation in zip(texts, found, strict=True) if translation is None]
    if missing and config.missing == "error":
        raise UserError(
            f"{config.file}: no translation of {len(missing)} {what}, the first {missing[0][:60]!r}; "
            f"add them, or set recover.translate_{what}.missing to model or drop"
        )
    return found


def _translate(run: Run, texts: Sequence[str], config: Translation, what: str) -> tuple[list[str | None], list[str]]:
    """Translations of English texts, and who made each: `file`, `model` or `none`."""
    found = _from_file(texts, config, what)
    by = ["none" if text is None else "file" for text in found]
    missing = [place for place, text in enumerate(found) if text is None]
    if missing and config.missing == "model":
        engine = Engine(run.split("translate"), run.model_config, batch_size=run.config.recover.batch_size)
        with run.progress.task(f"translations of {what}", total=len(missing), unit="text") as bar:
            translator = ModelTranslator(
                engine,
                run.tokenizer("vocabulary"),
                run.markers,
                max_new_tokens=run.config.recover.max_new_tokens,
                on_tokens=bar.tokens,
            )
            for place, text in zip(
                missing, translator.translate([texts[place] for place in missing], "to_target"), strict=True
            ):
                found[place], by[place] = (None, "none") if text is None else (_printable(text), "model")
    return found, by
