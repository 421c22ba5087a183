"""Writes the text of a whole run in a world of checkable facts: python examples/world/make.py LANGUAGE DIRECTORY

    names.tsv           English<TAB>target names: places, languages, currencies, months, days, numbers, other words
    pairs.tsv           English<TAB>target sentences: facts of the training, names in sentences that state no fact, and
                        questions
    text.txt            the target side in short documents, for stage pretrain
    english.txt         the English side likewise, for replay
    instructions.jsonl  {instruction, translation, kind}: questions about facts of the training
    answers.jsonl       {source, target}: true answers to them, for recover.translate_answers
    writer.jsonl        {instruction, answer}: the same questions answered truly by another writer, in other words than
                        the base model's, for recover.written; the answers are among answers.jsonl
    chains.jsonl        chains of questions to which the base model gives no answer of answers.jsonl, with true answers
    follow_ups.jsonl    conversations whose second turn is a question in the target language, answered by a chain
    replay.jsonl        conversations in English with the base model's own answers, for stage translate (needs --known)
    questions.jsonl     {question, answers, question_en, answers_en, kind, key, answer, answer_en}: questions about
                        facts that are held out. answers: what is accepted. question_en: all ways to ask it, the first
                        is asked. A second turn has history and history_en, the messages before it
    conversations.jsonl {instruction, translation}: held-out requests, for evaluation.instructions
    heldout.tsv         pairs of templates that the others lack, for chrF
    heldout.txt         the same as documents, for bits per byte

No training file states a fact that is held out; its names occur, in other sentences, and in questions that are not
those of the test. `--known FILE` (as `ask.py` writes it) asks only for what the base model knows in English, of the
kinds of which it knows at least half; first come the instructions to which it gives an answer of answers.jsonl.
`--beside DIRECTORY` (such as examples/thai) names everyday text that is also trained on: what it tells is not held out,
and its instructions and answers are written with those of the world. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain, cycle, islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parent))

from beside import Beside, read_beside, told
from chats import chains, follow_ups, otherwise, replay
from names import HERE, Fact, facts
from world import NAMED, USES, Line, Question, World, asked_in_pairs, lines, messages, questions, used, world_of

__all__ = ["NAMED", "choose", "read_known", "world_of", "write"]

Item = TypeVar("Item")

# Sentences in a document.
DOCUMENT = 5
# At most this share of the facts of a kind is held out.
SHARE = 0.4
HELD_OUT_PAIRS, HELD_OUT_REQUESTS = 40, 30
# Each of this many instructions is an everyday one.
EVERYDAY = 4
# A kind is asked if the base model knows this share of it.
ENOUGH = 0.5


def of_countries(world: World, everything: Sequence[Fact], number: int) -> list[Fact]:
    """The facts about this many countries, and those about none: in a smaller world each name is met more often.

    They are the countries of which the base model knows most, if that is known; else the first.
    """
    known = Counter(
        fact.names["country"][1]
        for fact in everything
        if "country" in fact.names and any((kind, key) == (fact.kind, fact.key) for kind, key, _ in world.known or ())
    )
    countries = dict.fromkeys(fact.names["country"][1] for fact in everything if fact.kind == "capital")
    kept = sorted(countries, key=lambda country: -known[country])[:number]
    return [fact for fact in everything if fact.names.get("country", ("", kept[0]))[1] in kept]


def read_known(world: World, path: Path) -> None:
    """Note what the base model knows, from a file of `ask.py`."""
    answered = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in answered if not row.get("way")]
    world.known = {(row["kind"], row["key"], row["question"]) for row in rows if row["right"]}
    right, total = (Counter(row["kind"] for row in rows if row["right"] or every) for every in (False, True))
    world.said = {row["question"]: row.get("answer", "").strip() for row in answered}
    world.said_next = {
        (row["kind"], row["key"]): row.get("answer", "").strip() for row in rows if row["kind"].startswith("follow_up ")
    }
    world.kinds = {kind for kind, count in total.items() if right[kind] >= ENOUGH * count}


def choose(world: World, everything: Sequence[Fact], wanted: int) -> None:
    """Choose the facts that are held out, so that each kind has the wanted number of questions, or what it can give.

    Its answers take turns, so that a model that always says Africa does not get far.
    """
    keys_of: dict[str, set[str]] = defaultdict(set)
    kinds_of: dict[str, list[str]] = defaultdict(list)
    answers: dict[tuple[str, str], str] = {}
    for question in questions(world, everything):
        keys_of[question.kind].add(question.fact.key)
        answers[question.kind, question.fact.key] = question.accepted[0][0]
        if world.is_known(question):
            kinds_of[question.fact.key].append(question.kind)
    open_secrets = {fact.key for fact in everything if fact.kind in NAMED and world.tells_itself(fact)}
    # What everyday text tells is as open.
    open_secrets |= world.told
    count = Counter[str]()
    for kind, keys in keys_of.items():
        candidates = sorted(key for key in keys if kind in kinds_of[key] and key not in open_secrets)
        candidates = _in_turns(world, [(key, answers[kind, key]) for key in candidates])
        held = len(keys & world.held_out)
        for key in candidates:
            if count[kind] >= wanted or held >= SHARE * len(keys):
                break
            if key not in world.held_out:
                world.held_out.add(key)
                held += 1
                count.update(kinds_of[key])


def _in_turns(world: World, found: Sequence[tuple[Item, str]]) -> list[Item]:
    """The items, each given with its answer, in an order that is drawn, but such that the answers take turns."""
    drawn = world.random.sample(found, len(found))
    count = Counter[str]()
    turns = []
    for item, answer in drawn:
        count[answer] += 1
        turns.append((count[answer], item))
    return [item for _, item in sorted(turns, key=lambda turn: turn[0])]


def write(
    world: World, directory: Path, everything: Sequence[Fact], wanted: int, beside: Beside | None = None
) -> dict[str, int]:
    """Write all files, with at most the wanted number of questions of a kind; returns how many lines each has.

    beside: everyday text, whose instructions and answers are written, too.
    """
    beside = beside or Beside()
    kept, asked = lines(world, everything), list(questions(world, everything))
    tested = _tested(world, asked, wanted)
    kept += asked_in_pairs(world, asked, everything, tested)
    world.random.shuffle(kept)
    held = _from(world, "heldout", HELD_OUT_PAIRS, everything)
    trained = _trained(world, asked, everything)
    answers = beside.answers | {answer.english: answer.target for question in trained for answer in question.answers}
    instructions = _in_order(world, trained, answers, beside)
    contents = {
        "names.tsv": _pairs(_names(world, everything)),
        "pairs.tsv": _pairs(kept),
        "text.txt": _documents(world, everything, kept, "target"),
        "english.txt": _documents(world, everything, kept, "english"),
        "instructions.jsonl": _json_lines(
            {"instruction": way.english, "translation": way.target, "kind": kind} for kind, way in instructions
        ),
        "answers.jsonl": _json_lines({"source": source, "target": target} for source, target in answers.items()),
        "writer.jsonl": _json_lines(otherwise(world, trained)),
        "questions.jsonl": _json_lines(map(_row, tested)),
        "chains.jsonl": _json_lines(chains(world, trained, answers)),
        "follow_ups.jsonl": _json_lines(follow_ups(world, asked, everything)),
        "replay.jsonl": _json_lines(replay(world, asked, everything)),
        "conversations.jsonl": _json_lines(
            {"instruction": line.english, "translation": line.target}
            for line in _from(world, "requests", HELD_OUT_REQUESTS, everything)
        ),
        "heldout.tsv": _pairs(held),
        "heldout.txt": _documents(world, everything, held, "target"),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (directory / name).write_text(content, encoding="utf-8")
    return {name: content.count("\n") for name, content in contents.items()}


def _from(world: World, part: str, wanted: int, everything: Sequence[Fact]) -> list[Line]:
    """As many sentences as wanted, or as the names allow, from the templates of a part in turns; names are drawn."""
    names = {}
    for name in world.english.words[part]:
        kind, slot = USES[name.partition("-")[0]]
        keys = used(everything, kind, slot)
        names[name] = [{slot: (kind, key)} for key in world.random.sample(keys, len(keys))]
    held, found = world.held(everything), list[Line]()
    for name in islice(cycle(names), wanted):
        while names[name]:
            line = world.fill(world.template(part, name), names[name].pop())
            if not world.tells(line, held):
                found.append(line)
                break
    world.random.shuffle(found)
    return found


def _in_order(
    world: World, trained: Sequence[Question], answers: Mapping[str, str], beside: Beside
) -> list[tuple[str, Line]]:
    """The instructions, each with its kind, in an order of which any beginning is a good training set.

    First those to which the base model gives an answer that has a translation, then the others; kinds take turns, and
    each EVERYDAY-th is an everyday one, as long as there are any.
    """
    first, rest = list[tuple[str, Line, str]](), list[tuple[str, Line, str]]()
    for question in trained:
        for way in question.ways:
            part = first if world.said.get(way.english) in answers else rest
            part.append((question.kind, way, question.accepted[0][0]))
    found: dict[str, tuple[str, Line]] = {}
    for part in (first, rest):
        by_kind: dict[str, list[tuple[Line, str]]] = defaultdict(list)
        for kind, way, answer in part:
            by_kind[kind].append((way, answer))
        turns = zip_longest(*([(kind, way) for way in _in_turns(world, ways)] for kind, ways in by_kind.items()))
        for one in chain.from_iterable(turns):
            if one is not None:
                found.setdefault(one[1].english, one)
    everyday = [("everyday", Line(*row)) for row in beside.instructions.items() if row[0] not in found]
    ordered: list[tuple[str, Line]] = []
    for one in found.values():
        ordered.append(one)
        if everyday and len(ordered) % EVERYDAY == EVERYDAY - 1:
            ordered.append(everyday.pop(0))
    return ordered + everyday


def _trained(world: World, asked: Sequence[Question], everything: Sequence[Fact]) -> list[Question]:
    """The single questions of the kinds that count, none of which tells a held-out fact with one of its answers."""
    held = world.held(everything)
    return [
        question
        for question in asked
        if world.counts(question.kind) and not question.history and world.in_training(question.fact)
        if not any(
            world.tells(Line(f"{way.english} {answer.english}", f"{way.target} {answer.target}"), held)
            for way in question.ways
            for answer in question.answers
        )
    ]


def _tested(world: World, asked: Sequence[Question], wanted: int) -> list[Question]:
    """The known questions about held-out facts, of each kind as many as wanted, in the order of `asked`."""
    by_kind: dict[str, list[Question]] = defaultdict(list)
    for question in asked:
        if question.fact.key in world.held_out and world.is_known(question):
            by_kind[question.kind].append(question)
    chosen = [
        question
        for found in by_kind.values()
        for question in _in_turns(world, [(one, one.accepted[0][0]) for one in found])[:wanted]
    ]
    identities = {question.identity for question in chosen}
    return [question for question in asked if question.identity in identities]


def _row(question: Question) -> dict[str, Any]:
    """A question as a line of questions.jsonl."""
    row: dict[str, Any] = {
        "question": question.ways[0].target,
        "answers": question.accepted[1],
        "question_en": list(dict.fromkeys([*(way.english for way in question.ways), *question.understood])),
        "answers_en": question.accepted[0],
        "kind": question.kind,
        "key": question.fact.key,
        "answer": question.answers[0].target,
        "answer_en": question.answers[0].english,
    }
    if question.history:
        row["history"] = messages([line.target for line in question.history])
        row["history_en"] = messages([line.english for line in question.history])
    return row


def _names(world: World, everything: Sequence[Fact]) -> list[Line]:
    """The names of the world. In the order of the alphabet, which tells no fact."""
    kinds = list(USES.values())
    found = {(kind, key) for kind, slot in kinds for key in used(everything, kind, slot)}
    found |= {name for fact in everything for name in fact.names.values()}
    pairs = {(world.english.name(*name), world.target.name(*name)) for name in found}
    held = world.held(everything)
    # In Hindi the South Korean won holds the names of the country and of its language.
    return [line for line in (Line(*pair) for pair in sorted(pairs)) if not world.tells(line, held)]


def _documents(world: World, everything: Sequence[Fact], kept: Sequence[Line], side: str) -> str:
    """The sentences of one side as documents, none of which holds all names of a held-out fact."""
    held = world.held(everything)
    documents, last = [], Line("", "")
    for number, line in enumerate(kept):
        joined = Line(f"{last.english} {line.english}".strip(), f"{last.target} {line.target}".strip())
        if number % DOCUMENT == 0 or world.tells(joined, held):
            documents.append(line)
            last = line
        else:
            documents[-1] = last = joined
    return "\n\n".join(getattr(document, side) for document in documents) + "\n"


def _pairs(found: Sequence[Line]) -> str:
    return "".join(f"{line.english}\t{line.target}\n" for line in found)


def _json_lines(rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    there = sorted(path.stem for path in (HERE / "languages").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language", choices=there)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--known", type=Path, help="ask only for what the base model knows: a file that ask.py wrote")
    parser.add_argument("--beside", type=Path, help="everyday text that is also trained on, such as examples/thai")
    parser.add_argument("--countries", type=int, help="only this many: those of which the base model knows most")
    parser.add_argument("--held-out", type=int, default=11, help="how many questions of a kind to test (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    world, everything = world_of(given.language), list(facts())
    world.random.seed(given.seed)
    if given.known is not None:
        read_known(world, given.known)
    if given.countries is not None:
        everything = of_countries(world, everything, given.countries)
    beside = None if given.beside is None else read_beside(given.beside)
    if beside is not None:
        world.told = told(world, everything, beside)
    choose(world, everything, given.held_out)
    for name, count in write(world, given.directory, everything, given.held_out, beside).items():
        print(f"{name:20}{count:6,} lines")


if __name__ == "__main__":
    main()
