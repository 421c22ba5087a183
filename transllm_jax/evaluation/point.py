"""All measures of one point of a run, on held-out files. The questions are the same at every point, in the same format
unless the point was trained in another; the result says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transllm_jax.config import Evaluation, Prompts
from transllm_jax.data.read.questions import Question
from transllm_jax.evaluation.answers import count
from transllm_jax.evaluation.asked import Asking, English, metrics_of
from transllm_jax.evaluation.likelihood import Teacher, bits_per_byte
from transllm_jax.generation.chain import ChainChat
from transllm_jax.generation.engine import Engine
from transllm_jax.generation.translate import Direction, ModelTranslator
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.parameters import Split
from transllm_jax.tokenizer.chain import Markers, visible
from transllm_jax.tokenizer.chat import Message, encode_prompt
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.growing.expand import tokens_per_character
from transllm_jax.tokenizer.tokenizer import Tokenizer

# Given a part's name and a function that computes it: the part's stored result, or else the computed one (JSON), which
# it stores.
Part = Callable[[str, Callable[[], Any]], Any]
# How many parts an evaluation has, and how many more with questions that have known answers.
PARTS, ASKED_PARTS = 5, 2

# How a translation is asked for: in the format of pairs in stage `translate`, or in a conversation.
PAIR, CHAT = "pair", "chat"


@dataclass(frozen=True)
class HeldOut:
    """Texts that no stage trains on: documents, (English, target) pairs, and questions in both languages.

    checkable: questions with known answers, None if there are none; the first `asked` of them are asked, and
    `asked_between` of these at the points between the original and the last, if it is not None.
    """

    documents: Sequence[str]
    pairs: Sequence[tuple[str, str]]
    questions: Sequence[tuple[str, str]]
    checkable: Sequence[Question] | None = None
    asked: int = 0
    asked_between: int | None = None


@dataclass(frozen=True)
class Point:
    """The model after a stage: the point's name, arrays, tokenizer and config.

    tuned: whether stage `transfer` trains, if this is the point after it. chains: whether it then answers in chains.
    """

    name: str
    split: Split
    tokenizer: Tokenizer
    config: LlamaConfig
    tuned: bool = True
    chains: bool = True

    @property
    def translation_format(self) -> str:
        """`pair` if the model was last trained on pairs, else `chat`."""
        return PAIR if self.name == "translate" else CHAT

    @property
    def is_first(self) -> bool:
        """Whether this is the original model."""
        return self.name == "base"

    @property
    def answers_in_chains(self) -> bool:
        """Whether the model was trained to answer in the chain's format."""
        return self.is_tuned and self.chains

    @property
    def is_tuned(self) -> bool:
        """Whether stage `transfer` trained the model: then a marker comes before its English answers, and earlier turns
        are in English."""
        return self.name == "transfer" and self.tuned


def evaluate(
    point: Point,
    teacher: Teacher,
    held_out: HeldOut,
    config: Evaluation,
    prompts: Prompts,
    markers: Markers,
    language: str,
    part: Part,
    between: Callable[[], None],
) -> dict[str, Any]:
    """Metrics by name, and the texts that they were computed from.

    `between` is called between batches; it may raise to stop there.
    """
    import sacrebleu  # slow to import, and used only here

    engine = Engine(point.split, point.config, batch_size=config.batch_size)

    def text() -> dict[str, float]:
        bits = bits_per_byte(
            point.split, point.tokenizer, held_out.documents, length=config.length, batch_size=4, between=between
        )
        return {
            "bits_per_byte": bits,
            "tokens_per_character": tokens_per_character(point.tokenizer, held_out.documents),
        }

    def kept() -> dict[str, float | None]:
        plain, marked = teacher.divergence(point.split), None
        if point.is_tuned:
            marked = teacher.divergence(point.split, point.tokenizer.encode(markers.response))
        return {"plain": plain, "marked": marked}

    def conversations() -> list[dict[str, Any]]:
        # A model that was not trained to answer in chains gets the limit of a plain answer.
        limit = config.max_chain_tokens if point.answers_in_chains else config.max_new_tokens
        chat = ChainChat(engine, point.tokenizer, markers, max_new_tokens=limit)
        asked: list[list[Message]] = [[{"role": "user", "content": target}] for _, target in held_out.questions]
        return [answer.recorded() for answer in chat.answers(asked, fallback=False, between=between)]

    metrics: dict[str, float | None] = dict(part("bits per byte", text))
    divergence = part("English answers kept", kept)
    plain, marked = divergence["plain"], divergence["marked"]
    metrics["english_kl"] = plain if marked is None else marked
    translations: dict[Direction, list[str]] = {}
    directions: tuple[Direction, Direction] = ("to_target", "to_english")
    for side, direction in enumerate(directions):
        texts = [pair[side] for pair in held_out.pairs]
        translations[direction] = part(
            f"translation, {direction.replace('_', ' ')}",
            partial(_translate, point, engine, texts, direction, config, prompts, markers, language, between),
        )
        references = [pair[1 - side] for pair in held_out.pairs]
        metrics["chrf_" + direction] = sacrebleu.corpus_chrf(translations[direction], [references]).score
    answers = part("conversations", conversations)
    well_formed = sum(answer["chain"] is not None for answer in answers) / len(answers)
    # Who was taught to answer directly is not asked for chains.
    metrics["well_formed_chains"] = None if point.is_tuned and not point.chains else well_formed
    asked: dict[str, Any] = {}
    if held_out.checkable is not None:
        chat = ChainChat(
            engine,
            point.tokenizer,
            markers,
            max_new_tokens=config.max_chain_tokens if point.answers_in_chains else config.max_answer_tokens,
        )
        english = English(engine, point.tokenizer, markers, config.max_answer_tokens, marked=point.is_tuned)
        few = None if point.is_first or point.name == "transfer" else held_out.asked_between
        ask = Asking(
            held_out.checkable,
            held_out.asked,
            few=few,
            in_chains=point.answers_in_chains,
            english_history=point.is_tuned,
        )
        found = ask.judged(
            part("questions with known answers", lambda: ask.in_target(chat, between)),
            part("the same in English", lambda: ask.in_english(english, between)),
        )
        metrics |= metrics_of(found)
        asked = {"asked": {"counts": count(found), "questions": found}}
    return {
        "metrics": metrics,
        **asked,
        "english_kl_without_marker": plain,
        "chrf_prompt": point.translation_format,
        "translations": translations,
        "answers": answers,
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
    between: Callable[[], None],
) -> list[str]:
    """Greedy translations; an empty text if the model answers nothing."""
    if point.translation_format == PAIR:
        translator = ModelTranslator(
            engine, point.tokenizer, markers, max_new_tokens=config.max_new_tokens, between=between
        )
        return [text or "" for text in translator.translate(texts, direction)]
    prompt = (prompts.to_target if direction == "to_target" else prompts.to_english)[0]
    asked = [
        encode_prompt(
            point.tokenizer,
            [{"role": "user", "content": prompt.replace("{language}", language).replace("{text}", text)}],
        )
        for text in texts
    ]
    generated = engine.generate(
        asked, max_new_tokens=config.max_new_tokens, stop=end_ids(point.tokenizer), between=between
    )
    return [visible(point.tokenizer.decode(ids), markers) for ids in generated]
