"""Stage 4, first half: Recovery KD (TransLLM, arXiv 2405.13923).

The original chat model, which is the base weights with the adapters off, answers English instructions. Then
instructions and answers are translated. Each batch is written at once, so a stopped run goes on from there.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from transllm_jax.config import Translation
from transllm_jax.data.read.conversations import SYSTEM_FIELDS
from transllm_jax.data.read.files import Place
from transllm_jax.data.read.sources import check_no_special, read_jsonl
from transllm_jax.disk import write_text
from transllm_jax.errors import UserError
from transllm_jax.generation.engine import Engine
from transllm_jax.generation.translate import FileTranslator, ModelTranslator, translation_prompt
from transllm_jax.stages.chains import CHAINS, write_conversations
from transllm_jax.stages.endpoint import MAY_CHANGE as OF_ENDPOINTS
from transllm_jax.stages.endpoint_rows import add_translations, check_endpoints, teacher_answers
from transllm_jax.stages.generated import Row, generated_rows
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.chat import encode_prompt
from transllm_jax.tokenizer.ends import end_ids

# Fields that other data sets have, which would change the answer and are not supported, each with how to fix it.
_TURNS = ("history", "messages", "conversations", "conversation", "dialog", "dialogue")
_INPUT = ("context", "inputs")
_OTHER = ("tools", "functions", "image", "images")
_UNSUPPORTED = {
    **dict.fromkeys(SYSTEM_FIELDS, "put its text into 'instruction', or remove it"),
    **dict.fromkeys(_TURNS, "give each question in an 'instruction' of its own, or remove it"),
    **dict.fromkeys(_INPUT, "name it 'input', or remove it"),
    **dict.fromkeys(_OTHER, "remove it, or leave the record out"),
}

# Keys that may change when a stopped stage goes on, and that may differ when it is done.
MAY_CHANGE = tuple(
    f"recover.{section}.{key}"
    for section in ("teacher", "translate_instructions.translator", "translate_answers.translator")
    for key in OF_ENDPOINTS
)

# What is translated.
Kind = Literal["instructions", "answers"]


def inputs(run: Run) -> dict[str, Any]:
    """The stage's inputs: the config sections and files that it reads."""
    section = run.config.recover
    files = [section.instructions, section.translate_instructions.file, section.translate_answers.file]
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
    by_model = "model" in (section.translate_instructions.missing, section.translate_answers.missing)
    if by_model and 2 * (section.max_new_tokens + 2) > context:
        raise UserError(
            f"recover.max_new_tokens is {section.max_new_tokens}: an answer and its translation of this many tokens "
            f"each exceed the model's context of {context}; set it to at most {context // 2 - 2}"
        )
    for config in (section.translate_instructions, section.translate_answers):
        if config.file is not None:
            check_no_special(read_jsonl(config.file, required=config.fields), run.inputs.find_special)
    translations = _from_file(texts, section.translate_instructions, "instructions")
    _from_file([], section.translate_answers, "answers")
    if section.translate_instructions.missing == "model":
        given = zip(texts, places, translations, strict=True)
        asked = [(text, place) for text, place, translation in given if translation is None]
        run.models.check_room(asked, "recover.max_new_tokens", section.max_new_tokens, chat=False)
    elif section.translate_instructions.missing != "endpoint" and not any(translations):
        raise UserError(
            f"{section.translate_instructions.file}: it has no translation of any of the instructions in "
            f"{section.instructions}; add them, or set recover.translate_instructions.missing to model"
        )
    if section.contamination:
        run.inputs.check_clean(texts, section.instructions, "recover.contamination")


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Write answers.jsonl (of the original model), translations.jsonl (of the model itself), chains.jsonl, and the
    conversations that stage `transfer` trains on."""
    section = run.config.recover
    instructions = _distinct_instructions(run)
    answers = _answer(run, directory / "answers.jsonl", instructions)
    usable = [row for row in answers if row["answer"] and (row["finished"] or section.keep_unfinished)]
    texts: dict[Kind, list[str]] = {
        "instructions": [row["instruction"] for row in usable],
        "answers": [row["answer"] for row in usable],
    }
    translated, by = _translate(run, directory / "translations.jsonl", texts)
    chains = _chains(run, usable, translated, by)
    if not chains:
        raise UserError(f"recover: no chain is left of {len(instructions)} instructions; see {directory}/answers.jsonl")
    if run.primary:
        write_text(directory / CHAINS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chains))
        write_conversations(directory, run.markers)
    unfinished = len(answers) - len(usable)
    ways = ("file", "model", *(("endpoint",) if section.translate_answers.translator else ()), "none")
    counts = {how: by["answers"].count(how) for how in ways}
    who = "the original model" if section.teacher is None else f"{section.teacher.model} at {section.teacher.place}"
    by_endpoint = f", by the endpoint {counts['endpoint']}" if "endpoint" in ways else ""
    return {
        "text": f"{len(answers)} answers of {who} ({unfinished} cut off or empty, left out), {len(chains)} chains; "
        f"answers translated by file {counts['file']}, by the model {counts['model']}{by_endpoint}",
        "answers": len(answers),
        "unfinished": unfinished,
        "chains": len(chains),
        "answers_translated_by": counts,
    }


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
    loaded = read_jsonl(section.instructions, limit=section.max_instructions)
    check_no_special(loaded, run.inputs.find_special)
    texts = []
    for row, place in zip(loaded, loaded.places, strict=True):
        for name in _UNSUPPORTED.keys() & row.keys():
            if row[name] not in (None, "", [], {}):
                raise UserError(f"{place}: field {name!r} is not read ({str(row[name])[:40]!r}): {_UNSUPPORTED[name]}")
        more = row.get("input") or ""
        if not isinstance(more, str):
            raise UserError(f"{place}: field 'input' must be a string, not {str(more)[:40]}; write it as one")
        texts.append("\n\n".join(part.strip() for part in (row["instruction"], more) if part.strip()))
    return texts, loaded.places


def _answer(run: Run, path: Path, instructions: Sequence[str]) -> list[Row]:
    """Answers of the original model, in order; those that `path` holds are not generated again."""
    section = run.config.recover
    if section.teacher is not None:
        return teacher_answers(run, path, instructions, _printable)
    tokenizer = run.models.tokenizer("base")
    engine = cache(lambda: Engine(run.models.split("base"), run.models.config, batch_size=section.batch_size))

    def make(batch: Sequence[int], on_tokens: Callable[[int], None]) -> list[Row]:
        texts = [instructions[number] for number in batch]
        prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]
        generated = engine().generate(
            prompts,
            max_new_tokens=section.max_new_tokens,
            stop=end_ids(tokenizer),
            on_tokens=on_tokens,
        )
        return [
            {
                "instruction": text,
                "answer": _printable(tokenizer.decode(ids, skip_special_tokens=True)),
                "finished": len(ids) < section.max_new_tokens,
            }
            for text, ids in zip(texts, generated, strict=True)
        ]

    known = [{"instruction": text} for text in instructions]
    return generated_rows(
        run, path, known, make, stage="recover", what="answers", unit="answer", batch_size=section.batch_size
    )


def _translate(
    run: Run, path: Path, texts: Mapping[Kind, Sequence[str]]
) -> tuple[dict[Kind, list[str | None]], dict[Kind, list[str]]]:
    """Translations of English texts by kind, and who made each: `file`, `model`, `endpoint` or `none`.

    `path` keeps those of the model; the ones that it holds are not generated again.
    """
    configs = {kind: _config_of(run, kind) for kind in texts}
    # From files first: some file may have to hold all translations, which is checked before the model makes any.
    found = {kind: _from_file(given, configs[kind], kind) for kind, given in texts.items()}
    by = {kind: ["none" if text is None else "file" for text in given] for kind, given in found.items()}
    add_translations(run, path.parent, texts, found, by, _printable)
    missing = [
        (kind, place)
        for kind, given in found.items()
        if configs[kind].missing == "model"
        for place, text in enumerate(given)
        if text is None
    ]
    wanted = _that_fit(run, texts, missing)
    known = [{"of": kind, "source": texts[kind][place]} for kind, place in wanted]
    for (kind, place), row in zip(wanted, _generate_translations(run, path, known), strict=True):
        if row["translation"] is not None:
            found[kind][place], by[kind][place] = row["translation"], "model"
    return found, by


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


def _that_fit(
    run: Run, texts: Mapping[Kind, Sequence[str]], missing: Sequence[tuple[Kind, int]]
) -> list[tuple[Kind, int]]:
    """The missing translations for which the context has room, in order of prompt length: batches need less padding."""
    new_tokens, context = run.config.recover.max_new_tokens, run.models.config.context
    tokenizer = run.models.tokenizer("vocabulary")
    lengths = [
        (len(translation_prompt(tokenizer, run.markers, texts[kind][place], "to_target")), kind, place)
        for kind, place in missing
    ]
    fitting = sorted(key for key in lengths if key[0] + new_tokens <= context)
    if len(fitting) < len(missing):
        run.progress.say(
            f"  recover: {len(missing) - len(fitting)} texts leave no room in the context of {context} for a "
            f"translation of {new_tokens} tokens, left out",
            style="yellow",
        )
    return [(kind, place) for _, kind, place in fitting]


def _generate_translations(run: Run, path: Path, known: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows with the translations that the model of stage `translate` makes. known: the other fields of each row."""
    section, tokenizer = run.config.recover, run.models.tokenizer("vocabulary")
    engine = cache(lambda: Engine(run.models.split("translate"), run.models.config, batch_size=section.batch_size))

    def make(batch: Sequence[int], on_tokens: Callable[[int], None]) -> list[Row]:
        translator = ModelTranslator(
            engine(), tokenizer, run.markers, max_new_tokens=section.max_new_tokens, on_tokens=on_tokens
        )
        made = translator.translate([known[number]["source"] for number in batch], "to_target")
        return [
            {**known[number], "translation": None if text is None else _printable(text)}
            for number, text in zip(batch, made, strict=True)
        ]

    return generated_rows(
        run, path, known, make, stage="recover", what="translations", unit="text", batch_size=section.batch_size
    )


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


def _printable(text: str) -> str:
    """A model's text without control characters, which files of text may not hold."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc").strip()
