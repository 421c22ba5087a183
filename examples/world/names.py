"""The names of the world in a language, from CLDR (through babel), and the facts that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from babel import Locale
from babel.core import get_global

HERE = Path(__file__).parent
# A language is a country's own if this share of its people speaks it and no other language is official.
SPOKEN = 50


@dataclass(frozen=True)
class Fact:
    """A fact: the kind of question that asks for it, and what it is about by slot.

    names: slot -> (kind of name, key), which `Names.name` looks up. together: the slots whose names make the fact; a
    text that holds all of these names, and no question, tells it. A held-out fact is in no training text. of: the slots
    that make its key, if others than `together`. by: keys of facts from which it follows, together with its own; it is
    in no training text if one of them is held out.
    """

    kind: str
    names: Mapping[str, tuple[str, str]]
    together: tuple[str, ...]
    of: tuple[str, ...] = ()
    by: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What the fact is, whatever kind asks for it: `place Asia/Tokyo JP`.

        The language of a capital is that of its country, and a city's continent that of its country.
        """
        kind = _SAME.get(self.kind, self.kind)
        return " ".join([kind, *sorted(self.names[slot][1] for slot in self.of or self.together)])

    @property
    def keys(self) -> tuple[str, ...]:
        """Its key, and those of the facts from which it follows."""
        return (self.key, *self.by)


# Kinds of question about one kind of fact.
_SAME = {"capital": "place", "country": "place", "city_language": "language", "city_continent": "continent"}


@dataclass(frozen=True)
class Names:
    """The names in a language. code: CLDR's. words: the content of the language's file."""

    code: str
    words: Mapping[str, Any] = field(hash=False)

    @cached_property
    def _locale(self) -> Locale:
        return Locale.parse(self.code)

    @cached_property
    def _found(self) -> dict[tuple[str, str], str]:
        return {}

    def name(self, kind: str, key: str) -> str:
        """The name of a territory, city (a time zone), language, currency, month (1 to 12), day (0 to 6), number or
        word."""
        if (kind, key) not in self._found:
            prefix = (self.words.get("prefix") or {}).get(kind, "")
            self._found[kind, key] = prefix + self._look_up(kind, key)
        return self._found[kind, key]

    def _look_up(self, kind: str, key: str) -> str:
        if kind == "numbers":
            return str(self.words["numbers"][int(key)])
        if kind == "words":
            return str(self.words["opposites"][key]) if self.code != "en" else key
        renamed = (self.words.get("rename") or {}).get(kind) or {}
        if key in renamed:
            return str(renamed[key])
        if kind in ("months", "days"):
            return str(getattr(self._locale, kind)["stand-alone"]["wide"][int(key)])
        if kind == "cities":
            zones = self._locale.time_zones
            city = zones[key].get("city") if key in zones else None
            return str(city or key.rpartition("/")[2].replace("_", " "))
        return str(getattr(self._locale, kind)[key])


def facts() -> Iterator[Fact]:
    """All facts, in a fixed order."""
    world = yaml.safe_load((HERE / "facts.yaml").read_text(encoding="utf-8"))
    capitals = {country: zone for found in world["capitals"].values() for country, zone in found.items()}
    continents = {country: part for part, found in world["capitals"].items() for country in found}
    continents |= world["continents"]
    cities: dict[tuple[str, str], str] = {}
    for country, zone in capitals.items():
        place = {"country": ("territories", country), "capital": ("cities", zone), "city": ("cities", zone)}
        yield (fact := Fact("capital", place, ("country", "capital")))
        cities[country, zone] = fact.key
    for country, zones in world["cities"].items():
        for zone in zones:
            names = {"country": ("territories", country), "city": ("cities", zone)}
            yield (fact := Fact("country", names, ("country", "city")))
            cities[country, zone] = fact.key
    for country, part in continents.items():
        names = {"country": ("territories", country), "continent": ("territories", part)}
        yield Fact("continent", names, ("country", "continent"))
    for (country, zone), place_key in cities.items():
        # Turkey has no continent here, and Russia's cities lie in two.
        if country not in continents or capitals.get(country, zone) != zone:
            continue
        names = {"city": ("cities", zone), "continent": ("territories", continents[country])}
        names["country"] = ("territories", country)
        yield Fact("city_continent", names, ("city", "continent"), ("country", "continent"), (place_key,))
    for country in continents:
        if language := _language(country):
            names = {"country": ("territories", country), "language": ("languages", language)}
            yield Fact("language", names, ("country", "language"))
            if country in capitals:
                names = names | {"city": ("cities", capitals[country])}
                by = (cities[country, capitals[country]],)
                yield Fact("city_language", names, ("city", "language"), ("country", "language"), by)
        if currency := _currency(country):
            names = {"country": ("territories", country), "currency": ("currencies", currency)}
            yield Fact("currency", names, ("country", "currency"))
    for number in range(12):
        names = {"month": ("months", str(number + 1)), "next_month": ("months", str((number + 1) % 12 + 1))}
        yield Fact("month", names, ("month", "next_month"))
    for number in range(7):
        names = {"day": ("days", str(number)), "next_day": ("days", str((number + 1) % 7))}
        yield Fact("day", names, ("day", "next_day"))
    for a in range(2, 10):
        for b in range(2, 10):
            names = {slot: ("numbers", str(value)) for slot, value in (("a", a), ("b", b), ("sum", a + b))}
            yield Fact("sum", names, ("a", "b", "sum"))
    for a in range(1, 20):
        for b in range(1 + a % 3, 20, 3):
            if a != b:
                pairs = (("a", a), ("b", b), ("larger", max(a, b)), ("smaller", min(a, b)))
                yield Fact("larger", {slot: ("numbers", str(value)) for slot, value in pairs}, ("a", "b"))
    for pair in yaml.safe_load((HERE / "english.yaml").read_text(encoding="utf-8"))["opposites"]:
        for word, opposite in (pair, pair[::-1]):
            yield Fact("opposite", {"word": ("words", word), "opposite": ("words", opposite)}, ("word", "opposite"))


def _language(country: str) -> str | None:
    found = get_global("territory_languages").get(country, {})
    official = [code for code, about in found.items() if about["official_status"] in ("official", "de_facto_official")]
    if len(official) == 1 and found[official[0]]["population_percent"] >= SPOKEN:
        return official[0].partition("_")[0]
    return None


def _currency(country: str) -> str | None:
    found = get_global("territory_currencies").get(country, [])
    now = [code for code, _, until, tender in found if until is None and tender]
    return now[0] if len(now) == 1 else None
