"""Conversations that are trained on as they are: second turns, and what the base model itself says in English.

Stage `recover` asks single questions. A conversation goes on in English (TransLLM, arXiv 2405.13923), and a model that
has seen no second turn repeats the first. The answers are the base model's own, where `--known` has them in a form that
has a translation; without `--known` they are true ones.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

from names import Fact
from world import Line, Question, Secret, World, messages

from transllm_jax.tokenizer.chain import Markers, build_chain, build_english_answer
from transllm_jax.tokenizer.chat import Message


def _told(world: World, held: Sequence[Secret], texts: Sequence[Line]) -> bool:
    """Whether the texts together tell a held-out fact."""
    whole = Line(" ".join(text.english for text in texts), " ".join(text.target for text in texts))
    return world.tells(whole, held)


def _asked(*turns: str) -> list[Message]:
    """Messages of the user and the assistant by turns; the last answer is trained on."""
    found = messages(turns)
    for message in found[1:-1:2]:
        message["train"] = False
    return found


def _nearest(question: Question, said: str) -> Line:
    """The true answer that begins as what the base model says: its knowledge is met best in its own words."""
    return max(question.answers, key=partial(_alike, said))


def _alike(said: str, answer: Line) -> int:
    """How many characters an answer begins with that the base model says, too."""
    pairs = takewhile(lambda two: two[0] == two[1], zip(answer.english, said, strict=False))
    return sum(1 for _ in pairs)


def chains(world: World, trained: Sequence[Question], answers: Container[str]) -> Iterator[dict[str, Any]]:
    """Chains of questions to which the base model gives none of the answers, which have a translation.

    Their own answers are true, and begin as the base model's.
    """
    markers = Markers.for_language(world.target.words["code"])
    for question in trained:
        for way in question.ways:
            said = world.said.get(way.english, "")
            if said not in answers:
                answer = _nearest(question, said)
                yield {"messages": _asked(way.target, build_chain(way.english, answer.english, answer.target, markers))}


def otherwise(world: World, trained: Sequence[Question]) -> Iterator[dict[str, Any]]:
    """True answers by another writer than the base model: of each question the one that begins least as its own."""
    written = set[str]()
    for question in trained:
        for way in question.ways:
            said = world.said.get(way.english, "")
            others = [answer for answer in question.answers if answer.english != said]
            if others and way.english not in written:
                written.add(way.english)
                yield {"instruction": way.english, "answer": min(others, key=partial(_alike, said)).english}


def follow_ups(world: World, asked: Sequence[Question], everything: Sequence[Fact]) -> Iterator[dict[str, Any]]:
    """Second turns about facts of the training, in the target language with a chain as the answer, and in English."""
    markers, held = Markers.for_language(world.target.words["code"]), world.held(everything)
    for question in asked:
        if not (question.history and world.counts(question.kind) and world.in_training(question.fact)):
            continue
        way = question.ways[0]
        answer = _nearest(question, world.said_next.get((question.kind, question.fact.key), ""))
        if _told(world, held, [*question.history, way, answer]):
            continue
        before = [line.english for line in question.history]
        chain = build_chain(way.english, answer.english, answer.target, markers)
        yield {"messages": _asked(*before, way.target, chain)}
        yield {"messages": _asked(*before, way.english, build_english_answer(answer.english, markers))}


def replay(world: World, asked: Sequence[Question], everything: Sequence[Fact]) -> Iterator[dict[str, Any]]:
    """Questions in English with the base model's own whole answers, right or wrong.

    With them, a stage without conversations does not unlearn how to answer. None tells a held-out fact or is tested.
    """
    held = world.held(everything)
    tested = {way.english for question in asked if not world.in_training(question.fact) for way in question.ways}
    for question in asked:
        for way in question.ways:
            answer = world.said.get(way.english, "")
            whole = answer.endswith((".", "!", "?")) and not question.history and way.english not in tested
            if whole and not _told(world, held, [Line(f"{way.english} {answer}", "")]):
                yield {"messages": _asked(way.english, answer)}
