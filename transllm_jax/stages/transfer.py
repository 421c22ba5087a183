"""Stage 4, second half: fine-tuning on chains, English answers and translation instructions.

TransLLM, arXiv 2405.13923. The loss is on the assistant's tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transllm_jax.data.read.files import Collector
from transllm_jax.errors import UserError
from transllm_jax.stages.chains import conversation_sources
from transllm_jax.stages.run import Run
from transllm_jax.stages.token_rows import chain_rows, instruction_rows
from transllm_jax.stages.training import Part, check_training, part_of, source_parts, train_stage, training_inputs
from transllm_jax.tokenizer.chat import encode_prompt

# The point from which the stage starts.
START = "translate"


def inputs(run: Run) -> dict[str, Any]:
    """The stage's inputs: the config sections and files that it reads."""
    config = run.config
    return {
        **training_inputs(run, "transfer"),
        "prompts": config.prompts.model_dump(),
        "date": run.today.isoformat(),
        **run.inputs.source_hashes([config.transfer.pairs]),
        **run.inputs.contamination_hashes(config.transfer.contamination),
    }


def check(run: Run) -> None:
    """Find what is wrong with the stage's config and files before it begins. Raises UserError."""
    section = run.config.transfer
    check_training(run, "transfer")
    run.inputs.check(section.pairs)
    if section.translations and section.contamination:
        collector = Collector("remove", section.pairs.on_bad_rows)
        pairs = (item for item, _ in run.inputs.items(section.pairs, collector))
        run.inputs.check_clean(pairs, section.pairs.path, "transfer.contamination")
    # The shortest chain has three texts of one token each, three markers and an end token.
    least = len(encode_prompt(run.models.tokenizer("base"), [{"role": "user", "content": "a"}])) + 7
    if section.length < least:
        raise UserError(
            f"transfer.length is {section.length}: with the chat template the shortest chain has {least} tokens; "
            "raise transfer.length"
        )


def parts(run: Run) -> list[Part]:
    """The parts of the stage's mixture: chains, English answers, translation instructions, and other sources."""
    section, found = run.config.transfer, []
    weights = {"chains": section.chains, "english": section.english}
    if any(weights.values()):
        for (name, weight), source in zip(weights.items(), conversation_sources(run), strict=True):
            if weight:
                rows = chain_rows(run, "transfer", source, section.length)
                recovery = section.recovery if name == "english" else "sequence"
                found.append(part_of(run, "transfer", name, source, rows, weight, recovery))
    return [*found, *known_parts(run)]


def known_parts(run: Run) -> list[Part]:
    """The parts that do not depend on stage `recover`: translation instructions, and other sources."""
    section, found = run.config.transfer, []
    if section.translations:
        rows = instruction_rows(run, "transfer", section.pairs, section.length, contamination=section.contamination)
        found.append(part_of(run, "transfer", "translations", section.pairs, rows, section.translations))
    return [*found, *source_parts(run, "transfer")]


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Train from point `translate`, or from the stage's own last checkpoint."""
    return train_stage(run, directory, name="transfer", start=START, parts=parts)
