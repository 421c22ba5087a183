"""The world of checkable facts (examples/world): its languages, and that no training text tells what is held out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
import yaml

WORLD = Path(__file__).parents[2] / "examples" / "world"
sys.path.insert(0, str(WORLD))

from make import NAMED, choose, world_of, write  # noqa: E402
from names import facts  # noqa: E402

from transllm_jax.data.clean.contamination import EvaluationTexts  # noqa: E402
from transllm_jax.data.read.questions import read_questions  # noqa: E402
from transllm_jax.evaluation.answers import Checkable, Judge  # noqa: E402

ENGLISH = yaml.safe_load((WORLD / "english.yaml").read_text(encoding="utf-8"))
LANGUAGES = sorted(path.stem for path in (WORLD / "languages").glob("*.yaml"))
every_language = pytest.mark.parametrize("language", LANGUAGES)
TRAINED = ("pairs.tsv", "text.txt", "english.txt", "instructions.jsonl", "answers.jsonl")


def words_of(language: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((WORLD / "languages" / f"{language}.yaml").read_text(encoding="utf-8"))
    return found


def slots(template: str) -> list[str]:
    return sorted(name for _, name, _, _ in Formatter().parse(template) if name is not None)


def templates(words: dict[str, Any]) -> dict[str, str]:
    """Every template by its place."""
    found = {f"{part} {name}": text for part in ("facts", "names") for name, text in words[part].items()}
    for part in ("questions", "follow_ups"):
        for kind, about in words[part].items():
            found |= {f"{part} {kind} ask {number}": text for number, text in enumerate(about["ask"])}
            found |= {f"{part} {kind} {key}": text for key, text in about.items() if key.startswith("answer")}
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


@every_language
def test_a_language_has_every_template_with_its_slots(language: str) -> None:
    words = words_of(language)
    found, wanted = templates(words), templates(ENGLISH)
    assert found.keys() == wanted.keys()
    wrong = {place for place, text in found.items() if slots(text) != slots(wanted[place])}
    assert not wrong
    sentences = [text for place, text in found.items() if place.startswith(("facts", "names"))]
    assert len(set(sentences)) == len(sentences), "two sentences are alike"
    assert all(len(set(about["ask"])) == len(about["ask"]) for about in words["questions"].values())
    assert words["code"] == language and len(words["numbers"]) == 21 == len(set(words["numbers"]))
    assert words["yes"] and words["no"] and not set(words["yes"]) & set(words["no"])
    assert all(text == unicodedata.normalize("NFC", text) for text in found.values())


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


@pytest.fixture(scope="module", params=LANGUAGES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A world and the directory with its files."""
    directory = tmp_path_factory.mktemp("world") / request.param
    world, everything = world_of(request.param), list(facts())
    choose(world, everything, 150)
    write(world, directory, everything)
    return world, directory


def test_no_training_text_tells_what_is_held_out(written: tuple[Any, Path]) -> None:
    """By search: no line or document of any file holds all names of a held-out fact, in either language."""
    world, directory = written
    held = [fact for fact in facts() if fact.key in world.held_out and fact.kind in NAMED]
    assert len(held) > 60
    lines = [line for name in TRAINED for line in (directory / name).read_text(encoding="utf-8").splitlines()]
    told = [
        (fact.key, text)
        for fact in held
        for names in (world.english, world.target)
        for text in lines
        if all(names.name(*fact.names[slot]) in text for slot in fact.together)
    ]
    assert told[:3] == []


def test_its_numbers_and_days_are_not_told_either(written: tuple[Any, Path]) -> None:
    world, directory = written
    pairs = (directory / "pairs.tsv").read_text(encoding="utf-8").splitlines()
    english = {line.split("\t")[0].lower() for line in pairs}
    for fact in facts():
        if fact.kind not in NAMED:
            stated = {
                world.fill(world.template("facts", name), fact.names)[0].lower()
                for name in ENGLISH["facts"]
                if name.startswith(f"{fact.kind}-")
            }
            assert bool(stated & english) == (fact.key not in world.held_out), fact.key


def test_names_of_held_out_places_occur(written: tuple[Any, Path]) -> None:
    world, directory = written
    text = (directory / "pairs.tsv").read_text(encoding="utf-8")
    held = [fact for fact in facts() if fact.key in world.held_out and fact.kind in ("capital", "country")]
    names = {world.target.name(*fact.names[slot]) for fact in held for slot in fact.together}
    assert sum(name in text for name in names) >= 0.95 * len(names)


def test_what_is_asked(written: tuple[Any, Path]) -> None:
    world, directory = written
    asked = [json.loads(line) for line in (directory / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(asked) >= 100 and {row["key"] for row in asked} <= world.held_out
    assert len({row["kind"].split()[0] for row in asked}) >= 10
    for row in asked:
        # The answer as a sentence is accepted as an answer.
        for side in ("", "_en"):
            assert any(text.lower() in row["answer" + side].lower() for text in row["answers" + side]), row
    trained = [json.loads(line) for line in (directory / "instructions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert not {row["question_en"] for row in asked if "history" not in row} & {row["instruction"] for row in trained}


def test_a_run_can_ask_and_judge_what_is_asked(written: tuple[Any, Path]) -> None:
    _, directory = written
    rows = [json.loads(line) for line in (directory / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = read_questions(directory / "questions.jsonl")
    assert len(asked) == len(rows) and any(question.history_en for question in asked)
    target = Judge(Checkable(one.question, one.answers, one.kind) for one in asked)
    english = Judge(Checkable(one.wordings[0], one.answers_en, one.kind) for one in asked)
    for judge, side in ((target, ""), (english, "_en")):
        for number, row in enumerate(rows):
            assert judge.is_right(number, row["answer" + side]), row
            # Another number, day or month may be named on the way to an answer.
            for other in rows if row["kind"] in NAMED else ():
                if other["kind"] == row["kind"] and not set(other["answers" + side]) & set(row["answers" + side]):
                    assert not judge.is_right(number, other["answer" + side]), (row, other)


def test_questions_of_the_same_templates_stay_in_training(written: tuple[Any, Path]) -> None:
    _, directory = written
    asked = read_questions(directory / "questions.jsonl")
    trained = [json.loads(line) for line in (directory / "instructions.jsonl").read_text(encoding="utf-8").splitlines()]
    english = [("asked", one.wordings[0]) for one in asked]
    whole, halves = EvaluationTexts([], whole=english), EvaluationTexts(english)
    assert not [row for row in trained if whole.found_in(row["instruction"])]
    # By shared n-grams, many would go.
    assert sum(halves.found_in(row["instruction"]) is not None for row in trained) > 0.05 * len(trained)
    target = EvaluationTexts([], whole=[("asked", one.question) for one in asked if not one.history])
    gone = [row["translation"] for row in trained if target.found_in(row["translation"])]
    # "Six or ten" is in "six or sixteen", where that is written as "six or ten six".
    assert len(gone) < 0.01 * len(trained)
    assert all(any(one.question.rstrip("?？؟") in text for one in asked) for text in gone)


def test_the_command_writes_the_same_bytes_each_time(tmp_path: Path) -> None:
    language = LANGUAGES[0]
    for name in ("one", "two"):
        command = [sys.executable, str(WORLD / "make.py"), language, str(tmp_path / name), "--held-out", "120"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_only_what_is_known_is_held_out(tmp_path: Path) -> None:
    world, everything = world_of(LANGUAGES[0]), list(facts())
    world.known = {(fact.kind, fact.key) for number, fact in enumerate(everything) if number % 3 == 0}
    choose(world, everything, 100)
    assert world.held_out and world.held_out <= {key for _, key in world.known}
    write(world, tmp_path, everything)
    asked = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert asked and {(row["kind"], row["key"]) for row in asked} <= world.known
