"""Stage 4, second half: fine-tuning on chains, English answers and translation instructions.

TransLLM, arXiv 2405.13923.
The loss is on the assistant's tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transllm_jax.data.examples import Example, conversation_examples
from transllm_jax.data.sources import check_no_special, read_jsonl
from transllm_jax.stages.run import Run
from transllm_jax.stages.training import Rows, train_stage
from transllm_jax.tokenizer.chain import build_chain, build_english_answer, build_translation
from transllm_jax.tokenizer.chat import Message

Conversation = list[Message]


def inputs(run: Run) -> dict[str, Any]:
    """What this stage reads: files and config sections."""
    config = run.config
    return {
        "transfer": config.transfer.model_dump(),
        "prompts": config.prompts.model_dump(),
        "seed": config.seed,
        **run.hashes([config.transfer.pairs.path]),
    }


def check(run: Run) -> None:
    """What can be known to be wrong before this stage begins. Raises UserError."""
    run.check_length("transfer.length", run.config.transfer.length)
    run.check(run.config.transfer.pairs)


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Train on from stage `translate`; resumes from its checkpoint."""
    section = run.config.transfer
    rows: list[Rows] = []
    for name, conversations, weight in (
        ("chains", _chains(run), section.chains),
        ("english", _english(run), section.english),
        ("translations", _translations(run), section.translations),
    ):
        rows.append((name, _examples(run, name, conversations), weight))
    return train_stage(run, directory, name="transfer", start="translate", section=section, rows=rows)


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
    pairs = run.read(run.config.transfer.pairs)
    check_no_special(pairs, run.tokenizer("vocabulary").find_special)
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


def _examples(run: Run, name: str, conversations: Sequence[Conversation]) -> list[Example]:
    length = run.config.transfer.length
    examples, report = conversation_examples(run.tokenizer("vocabulary"), conversations, length, run.markers)
    if report.cut or report.dropped:
        run.progress.say(
            f"  [yellow]transfer: of {len(conversations)} {name}, {report.cut} were cut at a turn and {report.dropped} "
            f"left out, longer than {length} tokens; raise transfer.length to keep them"
        )
    return examples
