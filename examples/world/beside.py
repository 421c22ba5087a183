"""Everyday text beside the world's: which facts it tells, so that they are not held out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from names import Fact
from world import Sought, World, questions

# Its training files, in the form of examples/thai. Of these, a directory may lack any.
DOCUMENTS = ("text.train.txt", "english.train.txt")
PAIRS, INSTRUCTIONS, ANSWERS = "pairs.train.tsv", "instructions.train.jsonl", "answers.train.jsonl"


@dataclass(frozen=True)
class Beside:
    """Everyday text. texts: documents and sentences, a pair as one text. instructions: English -> target, answers
    likewise; of two translations the first."""

    texts: Sequence[str] = ()
    instructions: dict[str, str] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)


def read_beside(directory: Path) -> Beside:
    """The training files of a directory such as examples/thai. Exits if it has none of them."""
    there = {name: directory / name for name in (*DOCUMENTS, PAIRS, INSTRUCTIONS, ANSWERS)}
    contents = {name: path.read_text(encoding="utf-8") for name, path in there.items() if path.is_file()}
    if not contents:
        raise SystemExit(
            f"{directory} has none of the files {', '.join(there)}: give a directory such as examples/thai"
        )
    texts = [document for name in DOCUMENTS for document in contents.get(name, "").split("\n\n") if document.strip()]
    texts += contents.get(PAIRS, "").splitlines()
    asked, answered = (
        [json.loads(line) for line in contents.get(name, "").splitlines()] for name in (INSTRUCTIONS, ANSWERS)
    )
    instructions = {row["instruction"].strip(): row["translation"].strip() for row in reversed(asked)}
    answers = {row["source"].strip(): row["target"].strip() for row in reversed(answered)}
    return Beside(texts, dict(reversed(instructions.items())), dict(reversed(answers.items())))


def told(world: World, everything: Sequence[Fact], beside: Beside) -> set[str]:
    """The keys of the facts that a text tells or asks for.

    A text tells a fact if it holds all its names, in either language. An instruction asks for it if it holds the names
    that a question about it holds: stage `recover` then lets the base model answer. So does the question itself.
    """
    texts = [text.lower() for text in (*beside.texts, *map(" ".join, beside.answers.items()))]
    asked = [" ".join(row).lower() for row in beside.instructions.items()]
    places: dict[str, set[int]] = {}

    def holding(name: tuple[str, str]) -> set[int]:
        """The numbers of the texts that hold a name; instructions are the last ones."""
        # Words for numbers are parts of other words where no spaces are written.
        forms = [world.english.name(*name), name[1] if name[0] == "numbers" else world.target.name(*name)]
        for form in forms:
            if form not in places:
                sought = Sought(form)
                places[form] = {number for number, text in enumerate((*texts, *asked)) if sought.is_in(text)}
        return set.union(*(places[form] for form in forms))

    whole = "\n".join((*texts, *asked))
    found: set[str] = set()
    # Another source of chance, so that what is drawn later is the same with everyday text and without.
    for question in questions(replace(world, random=Random(0)), everything):
        if question.history:
            continue
        fact, first = question.fact, question.ways[0]
        template = world.english.words["questions"][question.kind]["ask"][0]
        slots = set(re.findall(r"{(\w+)", template)) & fact.names.keys()
        tells = set.intersection(*(holding(fact.names[slot]) for slot in fact.together))
        asks = {
            number
            for number in set.intersection(*(holding(fact.names[slot]) for slot in slots))
            if number >= len(texts)
        }
        is_there = any(side.lower().rstrip("?？؟.") in whole for side in (first.english, first.target))
        if tells or asks or is_there:
            found |= set(fact.keys)
    return found
