"""The world of checkable facts (examples/world): its facts, and that every language can say them."""

from __future__ import annotations

import re
import unicodedata
from string import Formatter
from typing import Any

import yaml
from world_files import ENGLISH, LANGUAGES, OF_A_KIND, WORLD, every_language

from make import NAMED, choose, world_of  # isort: skip
from names import Fact, facts  # isort: skip

UNUSED = ("heldout", "requests")


def words_of(language: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((WORLD / "languages" / f"{language}.yaml").read_text(encoding="utf-8"))
    return found


def slots(template: str) -> list[str]:
    """Its slots; an answer may name a continent twice."""
    return sorted({name for _, name, _, _ in Formatter().parse(template) if name is not None})


def templates(words: dict[str, Any]) -> dict[str, str]:
    """Every template by its place."""
    found = {f"{part} {name}": text for part in ("facts", "names", *UNUSED) for name, text in words[part].items()}
    for part in ("questions", "follow_ups"):
        for kind, about in words[part].items():
            for key in about:
                if key == "ask" or key.startswith("answers"):
                    found |= {f"{part} {kind} {key} {number}": text for number, text in enumerate(about[key])}
    return found


def test_there_is_enough_to_learn_and_to_ask() -> None:
    assert len(ENGLISH["facts"]) + len(ENGLISH["names"]) >= 60
    assert len(ENGLISH["questions"]) >= 10 and len(LANGUAGES) >= 1
    assert len({fact.key for fact in facts()}) > 500


def test_facts_are_those_of_the_world() -> None:
    known = {(fact.kind, fact.key) for fact in facts()}
    assert ("capital", "place Asia/Tokyo JP") in known and ("country", "place America/Chicago US") in known
    assert ("language", "language JP ja") in known and ("currency", "currency JP JPY") in known
    # Switzerland has four languages, so it is not asked for one.
    assert not any(kind == "language" and " CH" in key for kind, key in known)
    # A city's continent is its country's; Russia's cities lie in two.
    assert ("city_continent", "continent 142 JP") in known and ("city_language", "language JP ja") in known
    cities = {fact.names["city"][1] for fact in facts() if fact.kind == "city_continent"}
    assert {"Asia/Tokyo", "Europe/Moscow"} <= cities and not {"Asia/Omsk", "Europe/Istanbul"} & cities


def test_what_follows_from_a_held_out_fact_is_held_out_with_it() -> None:
    def about_tokyo(kind: str) -> Fact:
        return next(
            fact for fact in facts() if fact.kind == kind and fact.names.get("city", ("", ""))[1] == "Asia/Tokyo"
        )

    assert about_tokyo("city_language").keys == ("language JP ja", "place Asia/Tokyo JP")
    assert about_tokyo("city_continent").keys == ("continent 142 JP", "place Asia/Tokyo JP")
    both = [fact for fact in facts() if fact.key == "opposite cold hot"]
    assert {fact.names["word"][1] for fact in both} == {"hot", "cold"}
    assert len([fact for fact in facts() if fact.key == "sum 2 3 5"]) == 2


@every_language
def test_a_language_has_every_template_with_its_slots(language: str) -> None:
    words = words_of(language)
    found, wanted = templates(words), templates(ENGLISH)
    assert found.keys() == wanted.keys()
    wrong = {place for place, text in found.items() if slots(text) != slots(wanted[place])}
    assert not wrong
    sentences = [text for place, text in found.items() if place.startswith(("facts", "names", *UNUSED))]
    assert len(set(sentences)) == len(sentences), "two sentences are alike"
    assert all(len(set(about["ask"])) == len(about["ask"]) for about in words["questions"].values())
    assert words["code"] == language and len(words["numbers"]) == 21 == len(set(words["numbers"]))
    assert words["yes"] and words["no"] and not set(words["yes"]) & set(words["no"])
    assert len(words.get("digits", "0123456789")) == 10
    assert all(text == unicodedata.normalize("NFC", text) for text in found.values())
    opposites = [word for pair in ENGLISH["opposites"] for word in pair]
    assert words["opposites"].keys() == set(opposites) and len(set(opposites)) == len(opposites) >= 80
    written = [text.lower() for text in words["opposites"].values()]
    assert len(set(written)) == len(written), "two words are alike"


@every_language
def test_every_name_is_in_the_language(language: str) -> None:
    """A zone or a code that CLDR does not know would be written in English."""
    target = world_of(language).target
    names = {name for fact in facts() for name in fact.names.values()}
    written = {name: target.name(*name) for name in names}
    if not re.match("[A-Za-z]", words_of(language)["numbers"][0]):
        assert not {name: text for name, text in written.items() if re.search("[A-Za-z]", text)}
    cities: dict[str, str] = {}
    for (kind, key), text in written.items():
        assert kind != "cities" or cities.setdefault(text, key) == key, text


@every_language
def test_a_fact_whose_names_hold_one_another_is_not_held_out(language: str) -> None:
    """Its question holds its answer: Mexico City, and what Thai and others call the language of Poland."""
    world, everything = world_of(language), list(facts())
    choose(world, everything, OF_A_KIND)
    assert "place America/Mexico_City MX" not in world.held_out
    for fact in everything:
        if fact.key in world.held_out and fact.kind in NAMED:
            names = [world.target.name(*fact.names[slot]).lower() for slot in fact.together]
            if "LATIN" in unicodedata.name(names[0][0]):
                names = [f" {name} " for name in names]
            assert not any(one in other for one in names for other in names if one is not other), fact.key
