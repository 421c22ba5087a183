"""Stage 4, second half: fine-tuning on chains, English answers and translation instructions.

TransLLM, arXiv 2405.13923.
The loss is on the assistant's tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.sources import read_jsonl
from transllm_jax.data.rows.examples import conversation_examples
from transllm_jax.data.rows.packing import pack
from transllm_jax.errors import UserError
from transllm_jax.stages.run import Run
from transllm_jax.stages.training import (
    Part,
    check_training,
    contamination_inputs,
    say_left_out,
    source_parts,
    train_stage,
    training_inputs,
)
from transllm_jax.tokenizer.chain import build_chain, build_english_answer, build_translation
from transllm_jax.tokenizer.chat import Message, encode_prompt

Conversation = list[Message]


# The point that the stage goes on from.
START = "translate"
_CLEAN = "transfer.contamination"


def inputs(run: Run) -> dict[str, Any]:
    """What this stage reads: files and config sections."""
    config = run.config
    return {
        **training_inputs(run, "transfer"),
        "prompts": config.prompts.model_dump(),
        "date": run.today.isoformat(),
        **run.source_hashes([config.transfer.pairs]),
        **contamination_inputs(run, config.transfer.contamination),
    }


def check(run: Run) -> None:
    """What can be known to be wrong before this stage begins. Raises UserError."""
    section = run.config.transfer
    check_training(run, "transfer")
    run.check(section.pairs)
    if section.translations and section.contamination:
        collector = Collector("remove", section.pairs.on_bad_rows)
        run.check_clean((item for item, _ in run.items(section.pairs, collector)), section.pairs.path, _CLEAN)
    # A chain of three texts of a token each, with its markers and its end.
    least = len(encode_prompt(run.tokenizer("base"), [{"role": "user", "content": "a"}])) + 7
    if section.length < least:
        raise UserError(
            f"transfer.length is {section.length}: with the chat template the shortest chain has {least} tokens; "
            "raise transfer.length"
        )


def parts(run: Run) -> list[Part]:
    """The rows that the stage trains on: chains, English answers, translation instructions, and other sources."""
    section = run.config.transfer
    made = [("chains", _chains, section.chains), ("english", _english, section.english)]
    return [*_parts(run, made), *known_parts(run)]


def known_parts(run: Run) -> list[Part]:
    """Those of the rows that do not depend on stage `recover`."""
    made = [("translations", _translations, run.config.transfer.translations)]
    return [*_parts(run, made), *source_parts(run, "transfer")]


def _parts(run: Run, made: Sequence[tuple[str, Callable[[Run], list[Conversation]], float]]) -> list[Part]:
    length, found = run.config.transfer.length, []
    for name, make, weight in made:
        if weight:
            conversations = make(run)
            examples, report = conversation_examples(run.tokenizer("vocabulary"), conversations, length, run.markers)
            if not examples:
                raise UserError(f"transfer: source {name} gave no example to train on; give it more, or shorter, text")
            counts = {"cut at a turn": report.cut, "longer than a row": report.dropped}
            if make is _translations:
                counts |= run.bad_rows.counts("transfer", [run.config.transfer.pairs])
            gone = {reason: count for reason, count in counts.items() if count}
            say_left_out(run, "transfer", name, len(conversations), gone)
            found.append(Part(name, pack(examples, length), weight, len(conversations), gone))
    return found


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Train on from stage `translate`; resumes from its checkpoint."""
    return train_stage(run, directory, name="transfer", start=START, parts=parts(run))


def _turn(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _recovered(run: Run) -> list[dict[str, Any]]:
    return read_jsonl(
        run.workdir / "recover" / "chains.jsonl", required=("question", "question_en", "answer_en", "answer")
    )


def _chains(run: Run) -> list[Conversation]:
    return [
        _turn(row["question"], build_chain(row["question_en"], row["answer_en"], row["answer"], run.markers))
        for row in _recovered(run)
    ]


def _english(run: Run) -> list[Conversation]:
    return [_turn(row["question_en"], build_english_answer(row["answer_en"], run.markers)) for row in _recovered(run)]


def _translations(run: Run) -> list[Conversation]:
    prompts, markers, language = run.config.prompts, run.markers, run.config.language.name
    pairs = list(run.read(run.config.transfer.pairs, "transfer", run.tokenizer("vocabulary").find_special))
    if run.config.transfer.contamination:
        pairs = run.uncontaminated(pairs, "transfer: pairs")
    conversations = []
    for number, (english, target) in enumerate(pairs):
        # Directions alternate, and the prompts of each take turns: every one meets every kind of pair.
        place, backwards = divmod(number, 2)
        if backwards:
            prompt = prompts.to_english[place % len(prompts.to_english)]
            question, answer = target, build_translation(english, markers.english, markers)
        else:
            prompt = prompts.to_target[place % len(prompts.to_target)]
            question, answer = english, build_translation(target, markers.target, markers)
        conversations.append(_turn(prompt.replace("{language}", language).replace("{text}", question), answer))
    return conversations
