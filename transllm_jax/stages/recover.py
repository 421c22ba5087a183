"""Stage 4, first half: Recovery KD (TransLLM, arXiv 2405.13923).

The original chat model, which is the base weights with the adapters off, answers English instructions. Then
instructions and answers are translated. What is done is written at once, so a stopped run goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transllm_jax.config import Filters, Recover, Translation, Written
from transllm_jax.data.read.files import Place
from transllm_jax.data.read.instructions import read_instruction
from transllm_jax.data.read.sources import check_no_special, read_jsonl, refuse_special
from transllm_jax.disk import write_text
from transllm_jax.errors import UserError
from transllm_jax.generation.engine import Engine, Request
from transllm_jax.generation.seq2seq import check_seq2seq
from transllm_jax.generation.translate import FileTranslator
from transllm_jax.stages.chains import CHAINS, write_conversations
from transllm_jax.stages.endpoint import MAY_CHANGE as OF_ENDPOINTS
from transllm_jax.stages.endpoint_rows import add_translations, check_endpoints, teacher_answers
from transllm_jax.stages.filters import CUT_OFF, DROPPED, EMPTY, counts, shown, sort_out, write_dropped
from transllm_jax.stages.generated import Row, generated_rows
from transllm_jax.stages.run import Run
from transllm_jax.stages.translations import TRANSLATIONS, By, Kind, printable, translate
from transllm_jax.tokenizer.chat import default_system_prompt, encode_prompt
from transllm_jax.tokenizer.ends import end_ids

# Where other engines are, and how they are asked: this may change when a stopped stage goes on, and when it is done.
WHERE = tuple(
    f"recover.{section}.{key}"
    for section in ("teacher", "translate_instructions.translator", "translate_answers.translator")
    for key in OF_ENDPOINTS
)


def inputs(run: Run) -> dict[str, Any]:
    """The stage's inputs: the config sections and files that it reads."""
    section = run.config.recover
    files = [section.instructions, section.translate_instructions.file, section.translate_answers.file]
    if section.written is not None:
        files.append(section.written.file)
    if section.seq2seq is not None and Path(section.seq2seq.model).expanduser().is_dir():
        files.append(f"{section.seq2seq.model}/*")
    return {
        "recover": section.model_dump(),
        "date": run.today.isoformat(),
        **run.inputs.hashes(file for file in files if file is not None),
        **run.inputs.contamination_hashes(section.contamination),
    }


def check(run: Run) -> None:
    """Find what is wrong with the stage's config and files before it begins. Raises UserError."""
    section, context = run.config.recover, run.models.config.context
    check_endpoints(run)
    texts, places = _instructions(run)
    run.models.check_room(zip(texts, places, strict=True), "recover.max_new_tokens", section.max_new_tokens)
    if section.seq2seq is not None:
        check_seq2seq(section.seq2seq)
    by_model = "model" in (section.translate_instructions.missing, section.translate_answers.missing)
    if by_model and 2 * (section.max_new_tokens + 2) > context:
        raise UserError(
            f"recover.max_new_tokens is {section.max_new_tokens}: an answer and its translation of this many tokens "
            f"each exceed the model's context of {context}; set it to at most {context // 2 - 2}"
        )
    for config in (section.translate_instructions, section.translate_answers):
        if config.file is not None:
            check_no_special(read_jsonl(config.file, required=config.fields), run.inputs.find_special)
    if section.written is not None:
        check_no_special(read_jsonl(section.written.file, required=section.written.fields), run.inputs.find_special)
        _written(section.written, texts)
    translations = _from_file(texts, section.translate_instructions, "instructions")
    _from_file([], section.translate_answers, "answers")
    if section.translate_instructions.missing == "model":
        given = zip(texts, places, translations, strict=True)
        asked = [(text, place) for text, place, translation in given if translation is None]
        run.models.check_room(asked, "recover.max_new_tokens", section.max_new_tokens, chat=False)
    elif section.translate_instructions.missing not in ("seq2seq", "endpoint") and not any(translations):
        raise UserError(
            f"{section.translate_instructions.file}: it has no translation of any of the instructions in "
            f"{section.instructions}; add them, or set recover.translate_instructions.missing to model"
        )
    if section.contamination:
        run.inputs.check_clean(texts, section.instructions, "recover.contamination")


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Write answers.jsonl (of the original model), the models' translations, chains.jsonl, dropped.jsonl (what is left
    out, with the reasons), and the conversations that stage `transfer` trains on."""
    instructions = _distinct_instructions(run)
    answers = _answer(run, directory / "answers.jsonl", instructions)
    section, checked = _settings(run, directory)
    usable, dropped = sort_out(answers, section.filters, keep_unfinished=section.keep_unfinished)
    left_out = counts(dropped)
    if run.primary and checked:
        write_dropped(directory, dropped)
    texts: dict[Kind, list[str]] = {
        "instructions": [row["instruction"] for row in usable],
        "answers": [row["answer"] for row in usable],
    }
    translated, by, rejected = _translate(run, directory, texts, section, checked=checked)
    chains = _chains(run, usable, translated, by)
    if run.primary and checked:
        write_dropped(directory, [*dropped, *rejected])
    reasons = counts(rejected)
    if not chains:
        raise UserError(
            f"recover: no chain is left of {len(instructions)} instructions; answers left out: "
            f"{shown(left_out) or 'none'}; translations rejected: {shown(reasons) or 'none'}; "
            f"see {directory}/{DROPPED}; "
            + (
                "with other recover.checks, the run goes on from what is translated"
                if reasons
                else "raise recover.max_new_tokens, or look at what the original answers: transllm chat "
                f"{run.workdir} --base"
            )
        )
    if run.primary:
        write_text(directory / CHAINS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chains))
        write_conversations(directory, run.markers)
    how = {how: by["answers"].count(how) for how in ("file", "model", "seq2seq", "none")}
    if section.translate_answers.translator is not None:
        how["endpoint"] = by["answers"].count("endpoint")
    system = default_system_prompt(run.models.tokenizer("base"))
    said = f" ({shown(left_out)}: left out)" if dropped else ""
    of_model = f", by the model {how['model']}" + (f", by seq2seq {how['seq2seq']}" if how["seq2seq"] else "")
    of_model += f", by the endpoint {how['endpoint']}" if "endpoint" in how else ""
    who = "the original model" if section.teacher is None else f"{section.teacher.model} at {section.teacher.place}"
    who = who if section.written is None else section.written.file
    return {
        "text": f"{len(answers)} answers of {who}{said}, {len(chains)} chains; answers translated by "
        f"file {how['file']}{of_model}" + (f"; rejected: {shown(reasons)}" if rejected else ""),
        "answers": len(answers),
        "unfinished": left_out.get(EMPTY, 0) + left_out.get(CUT_OFF, 0),
        "left_out": left_out,
        "chains": len(chains),
        "answers_translated_by": how,
        "translations_rejected": reasons,
        # What the original was told before each instruction: it colours all answers.
        "system_prompt": system,
    }


def _settings(run: Run, directory: Path) -> tuple[Recover, bool]:
    """The config's section, and whether translations are checked.

    A stage that an older version began to translate goes on as it began: whole texts, no filters, no checks.
    """
    section = run.config.recover

    def begun() -> bool:
        # Since there are filters, the file of what is left out is written before anything is translated.
        return (directory / TRANSLATIONS["model"]).is_file() and not (directory / DROPPED).is_file()

    if not run.peers.run_on_primary("what an older version began", begun):
        return section, True
    run.progress.say("  recover: begun by an older version, goes on without filters and checks", style="yellow")
    none = Filters(max_repeated=1, min_latin_share=0)
    return section.model_copy(update={"filters": none, "sentences": False}), False


def _distinct_instructions(run: Run) -> list[str]:
    """The instructions without evaluation texts, if the config says so, and without repetitions."""
    texts, _ = _instructions(run)
    if run.config.recover.contamination:
        texts = run.inputs.uncontaminated(texts, "recover: instructions")
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < len(texts):
        repeated = len(texts) - len(distinct)
        run.progress.say(f"  recover: {repeated} instructions repeat earlier ones and are used once", style="yellow")
    return distinct


def _instructions(run: Run) -> tuple[list[str], list[Place]]:
    """The instructions, each with its input if it has one, and their places. Raises UserError for a bad record."""
    section = run.config.recover
    loaded = read_jsonl(section.instructions, {}, limit=section.max_instructions)
    texts = [read_instruction(row, place) for row, place in zip(loaded, loaded.places, strict=True)]
    for text, place in zip(texts, loaded.places, strict=True):
        refuse_special((text,), run.inputs.find_special, place)
    return texts, loaded.places


def _answer(run: Run, path: Path, instructions: Sequence[str]) -> list[Row]:
    """Answers of the original model, in order; those that `path` holds are not generated again."""
    section = run.config.recover
    if section.teacher is not None:
        return teacher_answers(run, path, instructions)
    if section.written is not None:
        return _write_written(run, path, section.written, instructions)
    tokenizer = run.models.tokenizer("base")
    stop, room = end_ids(tokenizer), section.max_new_tokens

    def make(first: int, on_tokens: Callable[[int], None], between: Callable[[], None]) -> Iterator[tuple[int, Row]]:
        prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in instructions]
        engine = Engine(run.models.split("base"), run.models.config, batch_size=section.batch_size)
        answers = engine.run(
            (Request(prompt, room, stop) for prompt in prompts[first:]),
            longest=max(map(len, prompts)) + room,
            stops=len(stop),
            # All of them, however many are left: with other slots, an answer might be rounded differently.
            at_once=len(instructions),
            on_tokens=on_tokens,
            between=between,
        )
        for number, result in answers:
            text = instructions[first + number]
            answer = printable(tokenizer.decode(result.ids, skip_special_tokens=True))
            finished = result.finish_reason == "stop"
            yield first + number, {"instruction": text, "answer": answer, "finished": finished}

    known = [{"instruction": text} for text in instructions]
    return generated_rows(run, path, known, make, stage="recover", what="answers", unit="answer")


def _write_written(run: Run, path: Path, written: Written, instructions: Sequence[str]) -> list[Row]:
    """The answers of another writer, which are written to `path` like those of the original model."""
    answers = _written(written, instructions)
    rows: list[Row] = [
        {"instruction": text, "answer": printable(answer), "finished": True} for text, answer in answers.items()
    ]
    if len(rows) < len(instructions):
        missing = len(instructions) - len(rows)
        run.progress.say(f"  recover: {written.file} has no answer to {missing} instructions, left out", style="yellow")
    if run.primary:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def _written(written: Written, instructions: Sequence[str]) -> dict[str, str]:
    """The file's answer to each instruction that it has. Raises UserError if one is missing that must not be, or all
    are."""
    found = FileTranslator(written.file, written.fields).translate(instructions)
    answers = {text: answer for text, answer in zip(instructions, found, strict=True) if answer is not None}
    missing = [text for text in instructions if text not in answers]
    if missing and (written.missing == "error" or not answers):
        raise UserError(
            f"{written.file}: no answer to {len(missing)} of {len(instructions)} instructions, the first "
            f"{missing[0][:60]!r}; add them" + ("" if not answers else ", or set recover.written.missing to drop")
        )
    return answers


def _translate(
    run: Run, directory: Path, texts: Mapping[Kind, Sequence[str]], section: Recover, *, checked: bool
) -> tuple[dict[Kind, list[str | None]], dict[Kind, list[str]], list[Row]]:
    """Translations of English texts by kind; who made each: `file`, `model`, `seq2seq`, `endpoint` or `none`; and the
    rejected ones of models."""
    configs = {kind: _config_of(run, kind) for kind in texts}
    # From files first: some file may have to hold all translations, which is checked before a model makes any.
    found = {kind: _from_file(given, configs[kind], kind) for kind, given in texts.items()}
    by = {kind: ["none" if text is None else "file" for text in given] for kind, given in found.items()}
    rejected = add_translations(run, directory, texts, found, by, section if checked else None)
    models: tuple[By, ...] = ("model", "seq2seq")
    for model in models:
        missing = {
            (kind, place): texts[kind][place]
            for kind, given in found.items()
            if configs[kind].missing == model
            for place, text in enumerate(given)
            if text is None
        }
        if not missing:
            continue
        made = translate(run, directory, model, missing, section, checked=checked)
        rejected += made.rejected
        for (kind, place), text in made.found.items():
            found[kind][place], by[kind][place] = text, model
    return found, by, rejected


def _config_of(run: Run, kind: Kind) -> Translation:
    section = run.config.recover
    return section.translate_instructions if kind == "instructions" else section.translate_answers


def _from_file(texts: Sequence[str], config: Translation, what: str) -> list[str | None]:
    """Each text's translation in the file, or None. Raises UserError if one is missing that must not be."""
    if config.file is None:
        return [None] * len(texts)
    found = FileTranslator(config.file, config.fields).translate(texts)
    missing = [text for text, translation in zip(texts, found, strict=True) if translation is None]
    if missing and config.missing == "error":
        raise UserError(
            f"{config.file}: no translation of {len(missing)} {what}, the first {missing[0][:60]!r}; "
            f"add them, or set recover.translate_{what}.missing to model or drop"
        )
    return found


def _chains(
    run: Run,
    rows: Sequence[Row],
    translated: Mapping[Kind, Sequence[str | None]],
    by: Mapping[Kind, Sequence[str]],
) -> list[Row]:
    """The chains of answered instructions that have both translations, each with who translated what."""
    return [
        {
            "question": question,
            "question_en": row["instruction"],
            "answer_en": row["answer"],
            "answer": answer,
            "translated_by": {"question": question_by, "answer": answer_by},
        }
        for row, question, question_by, answer, answer_by in zip(
            rows, translated["instructions"], by["instructions"], translated["answers"], by["answers"], strict=True
        )
        if _usable(run, question) and _usable(run, row["answer"]) and _usable(run, answer)
    ]


def _usable(run: Run, text: str | None) -> bool:
    """Whether a text can be part of a chain: it is not empty, and no special token is spelled out in it."""
    return bool(text and text.strip()) and run.models.tokenizer("vocabulary").find_special(text or "") is None
