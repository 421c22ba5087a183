"""All measures of one point of a run, on held-out files. What is asked and how is the same at every point, except where
a point's own format differs; that is said in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transllm_jax.config import Evaluation, Prompts
from transllm_jax.evaluation.likelihood import Teacher, bits_per_byte
from transllm_jax.generation.chain import ChainChat
from transllm_jax.generation.engine import Engine
from transllm_jax.generation.translate import Direction, ModelTranslator
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.parameters import Split
from transllm_jax.progress import Bar
from transllm_jax.tokenizer.chain import Markers, visible
from transllm_jax.tokenizer.chat import encode_prompt
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.expand import tokens_per_character
from transllm_jax.tokenizer.tokenizer import Tokenizer

# How a translation is asked for: as pairs stand in stage `translate`, or in a conversation.
PAIR, CHAT = "pair", "chat"


@dataclass(frozen=True)
class HeldOut:
    """What no stage reads: documents, (English, target) pairs, and questions in both languages."""

    documents: Sequence[str]
    pairs: Sequence[tuple[str, str]]
    questions: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Point:
    """A state of the model: its name, arrays, tokenizer, and the format that it was last trained in."""

    name: str
    split: Split
    tokenizer: Tokenizer
    config: LlamaConfig

    @property
    def translation_format(self) -> str:
        """`pair` where the model was last trained on pairs, else `chat`."""
        return PAIR if self.name == "translate" else CHAT

    @property
    def answers_in_chains(self) -> bool:
        """Whether the model was trained to answer in the chain's format."""
        return self.name == "transfer"


def evaluate(
    point: Point,
    teacher: Teacher,
    held_out: HeldOut,
    config: Evaluation,
    prompts: Prompts,
    markers: Markers,
    language: str,
    bar: Bar,
) -> dict[str, Any]:
    """Metrics by name, and the texts behind them."""
    import sacrebleu  # slow to import, and wanted here only

    engine = Engine(point.split, point.config, batch_size=config.batch_size)
    bar.update(0, "bits per byte")
    metrics: dict[str, float | None] = {
        "bits_per_byte": bits_per_byte(
            point.split, point.tokenizer, held_out.documents, length=config.length, batch_size=4
        ),
        "tokens_per_character": tokens_per_character(point.tokenizer, held_out.documents),
    }
    bar.update(1, "English answers kept")
    plain = teacher.divergence(point.split)
    marked = None
    if point.answers_in_chains:
        prefix = point.tokenizer.encode(markers.response)
        marked = teacher.divergence(point.split, prefix)
    metrics["english_kl"] = plain if marked is None else marked
    translations: dict[Direction, list[str]] = {}
    ways: tuple[Direction, Direction] = ("to_target", "to_english")
    for number, direction in enumerate(ways):
        bar.update(2 + number, f"translation, {direction.replace('_', ' ')}")
        side = 0 if direction == "to_target" else 1
        outputs = _translate(
            point, engine, [pair[side] for pair in held_out.pairs], direction, config, prompts, markers, language
        )
        translations[direction] = outputs
        references = [pair[1 - side] for pair in held_out.pairs]
        metrics["chrf_" + direction] = sacrebleu.corpus_chrf(outputs, [references]).score
    bar.update(4, "conversations")
    # A model that was not trained to answer in chains is given the room of a plain answer.
    room = config.max_chain_tokens if point.answers_in_chains else config.max_new_tokens
    chat = ChainChat(engine, point.tokenizer, markers, max_new_tokens=room)
    first = chat.answers([[{"role": "user", "content": target}] for _, target in held_out.questions], fallback=False)
    metrics["well_formed_chains"] = sum(a.chain is not None for a in first) / len(first)
    bar.update(5)
    return {
        "metrics": metrics,
        "english_kl_without_marker": plain,
        "chrf_prompt": point.translation_format,
        "translations": translations,
        "answers": [
            {
                "raw": answer.raw,
                "visible": answer.visible,
                "chain": None if answer.chain is None else vars(answer.chain),
            }
            for answer in first
        ],
    }


def _translate(
    point: Point,
    engine: Engine,
    texts: Sequence[str],
    direction: Direction,
    config: Evaluation,
    prompts: Prompts,
    markers: Markers,
    language: str,
) -> list[str]:
    """Greedy translations; an empty text where the model gives none."""
    if point.translation_format == PAIR:
        translator = ModelTranslator(engine, point.tokenizer, markers, max_new_tokens=config.max_new_tokens)
        return [text or "" for text in translator.translate(texts, direction)]
    prompt = (prompts.to_target if direction == "to_target" else prompts.to_english)[0]
    asked = [
        encode_prompt(
            point.tokenizer,
            [{"role": "user", "content": prompt.replace("{language}", language).replace("{text}", text)}],
        )
        for text in texts
    ]
    generated = engine.generate(asked, max_new_tokens=config.max_new_tokens, stop=end_ids(point.tokenizer))
    return [visible(point.tokenizer.decode(ids), markers) for ids in generated]
