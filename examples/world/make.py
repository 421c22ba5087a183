"""Writes the text of a whole run in a world of checkable facts: python examples/world/make.py LANGUAGE DIRECTORY

    pairs.tsv           English<TAB>target sentences: facts of the training, and names in sentences that state no fact
    text.txt            the target side in short documents, for stage pretrain
    english.txt         the English side likewise, for replay
    instructions.jsonl  {instruction, translation, kind}: questions about facts of the training
    answers.jsonl       {source, target}: the answers to them, for recover.translate_answers
    questions.jsonl     {kind, question, question_en, answers, answers_en}: questions about facts that are held out; one
                        with `history` is the second turn of a conversation (messages of both languages)
    heldout.tsv         pairs that the others lack, for chrF; heldout.txt: the same as documents, for bits per byte

No training file states a fact that is held out; its names occur, in other sentences. `--known FILE` (lines of JSON with
`kind` and `key`, as `ask.py` writes them) asks only for what the base model knows in English. The same arguments give
the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from names import HERE, Fact, Names, facts

# Kinds whose facts are told by any text that holds both names. Number words also stand in other sentences.
NAMED = ("capital", "country", "continent", "language", "currency")
# How many sentences state a fact, how many use a name, and sentences in a document.
STATED, USED, DOCUMENT = 2, 4, 5
# At most this share of the facts of a kind is held out.
SHARE = 0.4
HELD_OUT_PAIRS = 40


@dataclass(frozen=True)
class Line:
    """A sentence in both languages, and the fact that it states."""

    english: str
    target: str
    fact: Fact | None = None


@dataclass
class World:
    """The templates of both languages, and the facts that are held out, by key."""

    english: Names
    target: Names
    held_out: set[str] = field(default_factory=set)
    # The questions that the base model answers in English, as (kind, key); None is all.
    known: set[tuple[str, str]] | None = None
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def fill(self, template: Sequence[str] | tuple[str, str], names: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
        """A template of both languages with the names in its slots."""
        sides = zip(template, (self.english, self.target), strict=True)
        one, other = (
            _capital(text.format(**{slot: found.name(*name) for slot, name in names.items()})) for text, found in sides
        )
        return one, other

    def template(self, *path: Any) -> tuple[str, str]:
        """The template at a path in the files of both languages."""
        found: list[Any] = [self.english.words, self.target.words]
        for step in path:
            found = [side[step] for side in found]
        return str(found[0]), str(found[1])

    def held(self, everything: Sequence[Fact]) -> list[Fact]:
        """The held-out facts that any text tells which holds their names."""
        return [fact for fact in everything if fact.key in self.held_out and fact.kind in NAMED]

    def tells(self, line: Line, held: Sequence[Fact]) -> bool:
        """Whether a line holds all names of one of the facts, in either language, be it by a name inside another."""
        sides = ((line.english, self.english), (line.target, self.target))
        return any(
            all(names.name(*fact.names[slot]) in text for slot in fact.together)
            for fact in held
            for text, names in sides
        )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def choose(world: World, everything: Sequence[Fact], wanted: int) -> None:
    """Choose the facts that are held out: as many of each kind as its share of what is known."""
    by_kind: dict[str, list[Fact]] = defaultdict(list)
    for fact in everything:
        if world.known is None or (fact.kind, fact.key) in world.known:
            by_kind[fact.kind].append(fact)
    total = sum(map(len, by_kind.values()))
    for kind, found in by_kind.items():
        all_of_kind = sum(fact.kind == kind for fact in everything)
        count = min(round(wanted * len(found) / total) or 1, int(SHARE * all_of_kind), len(found))
        world.held_out |= {fact.key for fact in world.random.sample(found, count)}


def lines(world: World, everything: Sequence[Fact]) -> list[Line]:
    """The sentences of the training, without any that tells a held-out fact."""
    found: list[Line] = []
    by_prefix: dict[str, list[str]] = defaultdict(list)
    for name in world.english.words["facts"]:
        by_prefix[name.partition("-")[0]].append(name)
    for fact in everything:
        templates = by_prefix[fact.kind] + (by_prefix["country"] if fact.kind == "capital" else [])
        for name in world.random.sample(templates, min(STATED, len(templates))):
            found.append(Line(*world.fill(world.template("facts", name), fact.names), fact))
    for kind, slot, templates in _uses(world):
        # By slot, since a continent is a territory, too.
        slots = (slot, "capital") if slot == "city" else (slot,)
        keys = dict.fromkeys(fact.names[one][1] for fact in everything for one in slots if one in fact.names)
        for key in keys:
            for name in world.random.sample(templates, min(USED, len(templates))):
                found.append(Line(*world.fill(world.template("names", name), {slot: (kind, key)})))
    held = world.held(everything)
    kept = [
        line
        for line in found
        if (line.fact is None or line.fact.key not in world.held_out) and not world.tells(line, held)
    ]
    return list({(line.english, line.target): line for line in kept}.values())


def _uses(world: World) -> Iterator[tuple[str, str, list[str]]]:
    """(kind of name, slot, templates) of the sentences that use a name and state no fact."""
    kinds = {
        "city": ("cities", "city"),
        "country": ("territories", "country"),
        "language": ("languages", "language"),
        "currency": ("currencies", "currency"),
        "month": ("months", "month"),
        "day": ("days", "day"),
        "number": ("numbers", "a"),
    }
    for prefix, (kind, slot) in kinds.items():
        yield kind, slot, [name for name in world.english.words["names"] if name.startswith(f"{prefix}-")]


def questions(world: World, everything: Sequence[Fact]) -> Iterator[dict[str, Any]]:
    """Every question about a fact: its kind, fact, both texts, the answer in both languages, and what is accepted."""
    english = world.english.words
    zones = [fact for fact in everything if fact.kind in ("capital", "country")]
    for fact in everything:
        kinds = [fact.kind, "country"] if fact.kind == "capital" else [fact.kind]
        for kind in kinds:
            for number in range(len(english["questions"][kind]["ask"])):
                yield _about(world, fact, ("questions", kind), number)
        if fact in zones:
            yield from _yes_or_no(world, fact, zones)
    by_country = {fact.names["country"][1]: fact for fact in everything if fact.kind == "capital"}
    for fact in everything:
        first = by_country.get(fact.names.get("country", ("", ""))[1])
        if fact.kind in english["follow_ups"] and first is not None:
            before = [
                world.fill(world.template("questions", "capital", "ask", 0), first.names),
                world.fill(world.template("questions", "capital", "answer"), first.names),
            ]
            history = {
                name: [
                    {"role": role, "content": turn[side]}
                    for role, turn in zip(("user", "assistant"), before, strict=True)
                ]
                for side, name in enumerate(("history_en", "history"))
            }
            asked = _about(world, fact, ("follow_ups", fact.kind))
            yield asked | history | {"kind": f"follow_up {fact.kind}"}


def in_the_first_way(asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each question once, in the first of its ways, in which `ask.py` asks the base."""
    return list({(row["kind"], row["key"]): row for row in reversed(asked)}.values())[::-1]


def _about(world: World, fact: Fact, place: tuple[str, str], number: int = 0) -> dict[str, Any]:
    """The question about a fact from the templates at a place, in one of its ways."""
    asked = world.fill(world.template(*place, "ask", number), fact.names)
    answer = world.fill(world.template(*place, "answer"), fact.names)
    part, kind = place
    (slot,) = (text.strip("{}") for text in world.english.words[part][kind]["accepted"])
    return _question(kind, fact, asked, answer, _accepted(world, fact, slot))


def _yes_or_no(world: World, fact: Fact, zones: Sequence[Fact]) -> Iterator[dict[str, Any]]:
    yes = world.random.random() < 0.5
    other = (
        fact if yes else world.random.choice([one for one in zones if one.names["country"] != fact.names["country"]])
    )
    names = {"city": fact.names["city"], "country": other.names["country"]}
    word, way = ("yes", "answer_yes") if yes else ("no", "answer_no")
    # Drawn, so that the wording does not give the answer away.
    asked = world.fill(world.template("questions", "yes_no", "ask", world.random.randrange(2)), names)
    answer = world.fill(world.template("questions", "yes_no", way), names)
    accepted = tuple(list(side.words[word]) for side in (world.english, world.target))
    yield _question("yes_no", fact, asked, answer, accepted)


def _question(
    kind: str, fact: Fact, asked: Sequence[str], answer: Sequence[str], accepted: Sequence[list[str]]
) -> dict[str, Any]:
    return {
        "kind": kind,
        "key": fact.key,
        "question": asked[1],
        "question_en": asked[0],
        "answer": answer[1],
        "answer_en": answer[0],
        "answers": accepted[1],
        "answers_en": accepted[0],
    }


def _accepted(world: World, fact: Fact, slot: str) -> tuple[list[str], list[str]]:
    """What an answer must hold, in English and in the target language: one of these."""
    kind, key = fact.names[slot]
    found = tuple([names.name(kind, key)] for names in (world.english, world.target))
    if kind == "numbers":
        return tuple([*side, key] for side in found)
    if kind == "currencies":
        # An English answer may leave out whose it is: "the yen".
        found[0].append(found[0][0].split()[-1].lower())
    return found


def write(world: World, directory: Path, everything: Sequence[Fact]) -> dict[str, int]:
    """Write all files; returns how many lines each has."""
    sentences, asked = lines(world, everything), list(questions(world, everything))
    world.random.shuffle(sentences)
    plain = [line for line in sentences if line.fact is None]
    spare = {line.english for line in plain[:HELD_OUT_PAIRS]}
    held, used = plain[:HELD_OUT_PAIRS], [line for line in sentences if line.english not in spare]
    tested = [
        row
        for row in asked
        if row["key"] in world.held_out and (world.known is None or (row["kind"], row["key"]) in world.known)
    ]
    tested = in_the_first_way(tested)
    trained = [row for row in asked if row["key"] not in world.held_out and "history" not in row]
    told = world.held(everything)
    trained = [row for row in trained if not world.tells(_as_line(row), told)]
    instructions = [
        {"instruction": row["question_en"], "translation": row["question"], "kind": row["kind"]} for row in trained
    ]
    answers = {row["answer_en"]: row["answer"] for row in trained}
    contents = {
        "pairs.tsv": "".join(f"{line.english}\t{line.target}\n" for line in used),
        "text.txt": _documents(world, everything, used, "target"),
        "english.txt": _documents(world, everything, used, "english"),
        "instructions.jsonl": _json_lines(instructions),
        "answers.jsonl": _json_lines([{"source": source, "target": target} for source, target in answers.items()]),
        "questions.jsonl": _json_lines(tested),
        "heldout.tsv": "".join(f"{line.english}\t{line.target}\n" for line in held),
        "heldout.txt": _documents(world, everything, held, "target"),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (directory / name).write_text(content, encoding="utf-8")
    return {name: content.count("\n") for name, content in contents.items()}


def _as_line(row: Mapping[str, Any]) -> Line:
    """A question and its answer."""
    return Line(f"{row['question_en']} {row['answer_en']}", f"{row['question']} {row['answer']}")


def _documents(world: World, everything: Sequence[Fact], used: Sequence[Line], side: str) -> str:
    """The sentences of one side as documents, none of which holds all names of a held-out fact."""
    held = world.held(everything)
    documents, last = [], Line("", "")
    for number, line in enumerate(used):
        joined = Line(f"{last.english} {line.english}".strip(), f"{last.target} {line.target}".strip())
        if number % DOCUMENT == 0 or world.tells(joined, held):
            documents.append(line)
            last = line
        else:
            documents[-1] = last = joined
    return "\n\n".join(getattr(document, side) for document in documents) + "\n"


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def world_of(language: str) -> World:
    """The world in a language that has a file in languages/."""
    words = {
        name: yaml.safe_load((HERE / path).read_text(encoding="utf-8"))
        for name, path in (("en", "english.yaml"), (language, f"languages/{language}.yaml"))
    }
    return World(Names("en", words["en"]), Names(language, words[language]))


def main() -> None:
    there = sorted(path.stem for path in (HERE / "languages").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language", choices=there)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--known", type=Path, help="ask only for what this file holds")
    parser.add_argument("--held-out", type=int, default=150, help="how many facts to hold out (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    world, everything = world_of(given.language), list(facts())
    world.random.seed(given.seed)
    if given.known is not None:
        rows = [json.loads(line) for line in given.known.read_text(encoding="utf-8").splitlines()]
        world.known = {(row["kind"], row["key"]) for row in rows}
    choose(world, everything, given.held_out)
    for name, count in write(world, given.directory, everything).items():
        print(f"{name:20}{count:6,} lines")


if __name__ == "__main__":
    main()
