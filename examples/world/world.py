"""The world in two languages: its sentences and questions, and which of them tell a fact that is held out."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from names import HERE, Fact, Names

from transllm_jax.tokenizer.chat import Message

# Kinds whose facts are told by any text that holds both names. Number words, months and days also stand in other
# sentences.
NAMED = ("capital", "country", "continent", "city_continent", "language", "city_language", "currency", "opposite")
# How many sentences state a fact, and how many use a name.
STATED, USED = 2, 4


@dataclass(frozen=True)
class Line:
    """A sentence in both languages, and the fact that it states."""

    english: str
    target: str
    fact: Fact | None = None


@dataclass(frozen=True)
class Question:
    """A question about a fact: the ways in which it is asked, its answers, and what an answer must hold, in both
    languages. The first way is the tested one. history: the turns before it."""

    kind: str
    fact: Fact
    ways: tuple[Line, ...]
    answers: tuple[Line, ...]
    accepted: tuple[list[str], list[str]]
    history: tuple[Line, ...] = ()
    # More ways to ask it in English; a chain that has one of them has understood it. They are not asked.
    understood: tuple[str, ...] = ()

    @property
    def identity(self) -> tuple[str, str, str]:
        """What `ask.py` names it by."""
        return (self.kind, self.fact.key, self.ways[0].english)


class Sought:
    """A name to be searched for in lower-case text: in Latin letters as a whole word."""

    def __init__(self, name: str) -> None:
        self.name = name.lower()
        latin = re.match("[a-z\u00c0-\u024f\u1e00-\u1eff]", self.name)
        self.whole = re.compile(rf"(?<!\w){re.escape(self.name)}(?!\w)") if latin else None

    def is_in(self, text: str) -> bool:
        return self.name in text and (self.whole is None or self.whole.search(text) is not None)


@dataclass(frozen=True)
class Secret:
    """The names of a held-out fact, in both languages."""

    english: list[Sought]
    target: list[Sought]


class _Shown(str):
    """A name in a template, in other forms: `{a:digits}` is a number in digits, `{country:the}` a name with its
    article, and `{continent:adjective}` its adjective."""

    forms: Mapping[str, str]

    def __format__(self, spec: str) -> str:
        return self.forms[spec] if spec else str(self)


@dataclass
class World:
    """The templates of both languages, and the facts that are held out, by key."""

    english: Names
    target: Names
    held_out: set[str] = field(default_factory=set)
    # The questions that the base model answers in English, by identity, and the kinds that count; None is all.
    known: set[tuple[str, str, str]] | None = None
    kinds: set[str] | None = None
    # What the base model answers, by the question in English.
    said: dict[str, str] = field(default_factory=dict)
    # The same of second turns, by kind and fact, since these are asked in the same words about many facts.
    said_next: dict[tuple[str, str], str] = field(default_factory=dict)
    # The keys of facts that other text tells, which are not held out.
    told: set[str] = field(default_factory=set)
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def fill(self, template: Sequence[str], names: Mapping[str, tuple[str, str]], fact: Fact | None = None) -> Line:
        """A template of both languages with the names in its slots."""
        sides = zip(template, (self.english, self.target), strict=True)
        one, other = (_capital(fill(text, found, names)) for text, found in sides)
        return Line(one, other, fact)

    def template(self, *path: Any) -> tuple[str, str]:
        """The template at a path in the files of both languages."""
        found: list[Any] = [self.english.words, self.target.words]
        for step in path:
            found = [side[step] for side in found]
        return str(found[0]), str(found[1])

    def held(self, everything: Sequence[Fact]) -> list[Secret]:
        """The held-out facts that any text tells which holds their names."""
        return [self.secret(fact) for fact in everything if fact.key in self.held_out and fact.kind in NAMED]

    def secret(self, fact: Fact) -> Secret:
        names = [fact.names[slot] for slot in fact.together]
        english, target = ([Sought(side.name(*name)) for name in names] for side in (self.english, self.target))
        return Secret(english, target)

    def tells(self, line: Line, held: Sequence[Secret]) -> bool:
        """Whether a line holds all names of one of the facts, in either language, whatever the case: Latin letters as
        whole words, others also inside another word."""
        english, target = line.english.lower(), line.target.lower()
        return any(
            all(name.is_in(target) for name in secret.target) or all(name.is_in(english) for name in secret.english)
            for secret in held
        )

    def tells_itself(self, fact: Fact) -> bool:
        """Whether one of its names holds another, as Mexico City does, and as Thai names the language of Poland: it can
        be answered by its question, and any text with that name would tell it."""
        names = [fact.names[slot] for slot in fact.together]
        alone = [Line(self.english.name(*name), self.target.name(*name)) for name in names]
        return any(self.tells(line, [self.secret(fact)]) for line in alone)

    def counts(self, kind: str) -> bool:
        """Whether the base model knows enough of a kind of question for it to be asked."""
        return self.kinds is None or kind in self.kinds

    def is_known(self, question: Question) -> bool:
        return self.counts(question.kind) and (self.known is None or question.identity in self.known)

    def in_training(self, fact: Fact) -> bool:
        """Whether a fact may be told: neither it nor a fact from which it follows is held out."""
        return not self.held_out & set(fact.keys)


def fill(template: str, side: Names, names: Mapping[str, tuple[str, str]], numbers: str = "") -> str:
    """A template of one language with the names in its slots. numbers: `digits` and `own` show all numbers as such."""
    shown = {}
    for slot, (kind, key) in names.items():
        text = side.name(kind, key)
        if kind == "numbers" and numbers:
            text = "".join(side.words["digits"][int(one)] for one in key) if numbers == "own" else key
        shown[slot] = _Shown(text)
        with_article = f"the {text}" if key in side.words.get("article", ()) else text
        shown[slot].forms = {
            "digits": key,
            "the": with_article,
            "adjective": side.words.get("adjectives", {}).get(key, text),
        }
    return template.format(**shown)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def lines(world: World, everything: Sequence[Fact]) -> list[Line]:
    """The sentences of the training, without any that tells a held-out fact, and facts of kinds that do not count."""
    found: list[Line] = []
    by_prefix: dict[str, list[str]] = defaultdict(list)
    for name in world.english.words["facts"]:
        by_prefix[name.partition("-")[0]].append(name)
    for fact in everything:
        if not world.counts(fact.kind):
            continue
        templates = by_prefix[fact.kind] + (by_prefix["country"] if fact.kind == "capital" else [])
        for name in world.random.sample(templates, min(STATED, len(templates))):
            found.append(world.fill(world.template("facts", name), fact.names, fact))
    for kind, slot, templates in _uses(world):
        for key in used(everything, kind, slot):
            for name in world.random.sample(templates, min(USED, len(templates))):
                found.append(world.fill(world.template("names", name), {slot: (kind, key)}))
    held = world.held(everything)
    kept = [
        line for line in found if (line.fact is None or world.in_training(line.fact)) and not world.tells(line, held)
    ]
    return _distinct(kept)


def used(everything: Sequence[Fact], kind: str, slot: str) -> list[str]:
    """The keys of the names of a kind that stand in a slot. By slot, since a continent is a territory, too."""
    return list(dict.fromkeys(fact.names[slot][1] for fact in everything if slot in fact.names))


# Prefix of the sentences that use a name and state no fact: (kind of name, slot).
USES = {
    "city": ("cities", "city"),
    "country": ("territories", "country"),
    "continent": ("territories", "continent"),
    "language": ("languages", "language"),
    "currency": ("currencies", "currency"),
    "month": ("months", "month"),
    "day": ("days", "day"),
    "number": ("numbers", "a"),
    "word": ("words", "word"),
}


def _uses(world: World) -> Iterator[tuple[str, str, list[str]]]:
    """(kind of name, slot, templates) of the sentences that use a name and state no fact."""
    for prefix, (kind, slot) in USES.items():
        yield kind, slot, [name for name in world.english.words["names"] if name.startswith(f"{prefix}-")]


def asked_in_pairs(
    world: World, asked: Sequence[Question], everything: Sequence[Fact], tested: Sequence[Question]
) -> list[Line]:
    """Questions as sentences, each in one way; none that is tested, in any way, and of others about a held-out fact not
    in the first."""
    # In any: a run leaves out all text with a wording of a tested question.
    listed = {way.english for question in tested for way in question.ways}
    found = []
    for question in asked:
        others = question.ways[1:] if question.history or not world.in_training(question.fact) else question.ways
        others = tuple(way for way in others if way.english not in listed)
        if others and world.counts(question.kind):
            found.append(world.random.choice(others))
    held = world.held(everything)
    return [line for line in _distinct(found) if not world.tells(line, held)]


def messages(texts: Sequence[str]) -> list[Message]:
    """Texts as messages, of the user and the assistant by turns."""
    return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]


def _distinct(found: Sequence[Line]) -> list[Line]:
    return list({(line.english, line.target): line for line in found}.values())


def questions(world: World, everything: Sequence[Fact]) -> Iterator[Question]:
    """Every question about a fact."""
    english = world.english.words
    zones = [fact for fact in everything if fact.kind in ("capital", "country")]
    for fact in everything:
        for kind in [fact.kind, "country"] if fact.kind == "capital" else [fact.kind]:
            yield _about(world, fact, "questions", kind)
        if fact in zones:
            yield _yes_or_no(world, fact, zones)
    by_country = {
        kind: {fact.names["country"][1]: fact for fact in everything if fact.kind == kind}
        for kind in ("capital", "language")
    }
    for kind, about in english["follow_ups"].items():
        for fact in everything:
            first = by_country[about["after"]].get(fact.names.get("country", ("", ""))[1])
            if fact.kind == kind and first is not None:
                before = _about(world, first, "questions", about["after"])
                yield _about(world, fact, "follow_ups", kind, (before.ways[0], before.answers[0]), first.names)


def _about(
    world: World,
    fact: Fact,
    part: str,
    kind: str,
    history: tuple[Line, ...] = (),
    before: Mapping[str, tuple[str, str]] | None = None,
) -> Question:
    """The question about a fact from the templates of a kind. before: the names of the turns before it."""
    about, named = world.english.words[part][kind], {**(before or {}), **fact.names}
    ways, answers = (
        tuple(
            world.fill(world.template(part, kind, name, number), named)
            for number, text in enumerate(about[name])
            # A city that is no capital has no name in the slot of one.
            if set(re.findall(r"{(\w+)", text)) <= named.keys()
        )
        for name in ("ask", "answers")
    )
    answers = tuple(_distinct(answers))
    name = f"follow_up {kind}" if part == "follow_ups" else kind
    understood = tuple(_capital(fill(text, world.english, named)) for text in about.get("understood", ()))
    return Question(name, fact, ways, answers, _accepted(world, fact, part, kind), history, understood)


def _yes_or_no(world: World, fact: Fact, zones: Sequence[Fact]) -> Question:
    yes = world.random.random() < 0.5
    other = (
        fact if yes else world.random.choice([one for one in zones if one.names["country"] != fact.names["country"]])
    )
    names = {"city": fact.names["city"], "country": other.names["country"]}
    word, way = ("yes", "answers_yes") if yes else ("no", "answers_no")
    # Drawn, so that the wording does not give the answer away.
    asked = world.fill(world.template("questions", "yes_no", "ask", world.random.randrange(2)), names)
    answer = world.fill(world.template("questions", "yes_no", way, 0), names)
    accepted = (list(world.english.words[word]), list(world.target.words[word]))
    return Question("yes_no", fact, (asked,), (answer,), accepted)


def _accepted(world: World, fact: Fact, part: str, kind: str) -> tuple[list[str], list[str]]:
    """What an answer must hold, in English and in the target language: one of these."""
    found: list[list[str]] = []
    default = world.english.words[part][kind]["accepted"]
    for side in (world.english, world.target):
        templates = side.words[part][kind].get("accepted", default)
        ways = ("", "digits", "own") if side.words.get("digits") else ("", "digits")
        found.append(list(dict.fromkeys(fill(text, side, fact.names, way) for text in templates for way in ways)))
    if kind == "currency":
        # An English answer may leave out whose it is: "the yen".
        found[0].append(found[0][0].split()[-1].lower())
    return found[0], found[1]


def world_of(language: str) -> World:
    """The world in a language that has a file in languages/, or in English on both sides."""
    paths = {language: f"languages/{language}.yaml", "en": "english.yaml"}
    words = {name: yaml.safe_load((HERE / path).read_text(encoding="utf-8")) for name, path in paths.items()}
    return World(Names("en", words["en"]), Names(language, words[language]))
