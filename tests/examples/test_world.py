"""The files that examples/world writes: no training text tells what is held out, and a run can ask and judge it."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from world_files import ENGLISH, KNOWN, LANGUAGES, OF_A_KIND, THAI, documents, pairs, rows, whole

from beside import Beside, read_beside, told  # isort: skip
from make import EVERYDAY, NAMED, choose, of_countries, read_known, world_of, write  # isort: skip
from names import Fact, facts  # isort: skip
from world import questions  # isort: skip

from transllm_jax.data.clean.cleaning import text_of
from transllm_jax.data.clean.contamination import EvaluationTexts
from transllm_jax.data.read.questions import read_questions
from transllm_jax.evaluation.answers import Checkable, Judge
from transllm_jax.generation.translate import FileTranslator
from transllm_jax.tokenizer.chain import Markers, parse

CHATS = ("chains.jsonl", "follow_ups.jsonl", "replay.jsonl")
TRAINED = ("names.tsv", "pairs.tsv", "text.txt", "english.txt", "instructions.jsonl", "answers.jsonl", *CHATS)


@pytest.fixture(scope="module", params=[*LANGUAGES, f"{LANGUAGES[0]} known", "th beside"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A world and the directory with its files. `known`: of what a base model knows; `beside`: of that, with everyday
    text, whose training files are in the directory `beside`."""
    language, _, option = request.param.partition(" ")
    directory = tmp_path_factory.mktemp("world") / language
    world, everything, beside = world_of(language), list(facts()), Beside()
    if option:
        read_known(world, KNOWN)
    if option == "beside":
        beside = read_beside(THAI)
        world.told = told(world, everything, beside)
        (directory / "beside").mkdir(parents=True)
        for path in THAI.glob("*.train.*"):
            (directory / "beside" / path.name).symlink_to(path)
        # As the demo has it.
        everything = of_countries(world, everything, 50)
    choose(world, everything, OF_A_KIND)
    write(world, directory, everything, OF_A_KIND, beside)
    return world, directory


def training_files(directory: Path) -> list[Path]:
    """The files of the training: the world's and, if there are any, the everyday ones."""
    return [*(directory / name for name in TRAINED), *sorted((directory / "beside").glob("*"))]


def held_out(world: Any, named: bool) -> list[Fact]:
    return [fact for fact in facts() if fact.key in world.held_out and (fact.kind in NAMED) == named]


def test_no_training_text_tells_what_is_held_out(written: tuple[Any, Path]) -> None:
    """By search: no line or document of any file holds all names of a held-out fact, in either language: in Latin
    letters as whole words, in others also inside other words."""
    world, directory = written
    held = held_out(world, named=True)
    assert len(held) > 60 and len({fact.kind for fact in held}) >= 6
    files = training_files(directory)
    lines = [line.lower() for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    lines += [text.lower() for path in files if path.suffix == ".txt" for text in documents(path)]
    telling = []
    for fact in held:
        for side in (world.english, world.target):
            names = [side.name(*fact.names[slot]).lower() for slot in fact.together]
            maybe = [text for text in lines if all(name in text for name in names)]
            latin = [name for name in names if "LATIN" in unicodedata.name(name[0])]
            telling += [text for text in maybe if all(whole(name).search(text) for name in latin)]
    assert telling[:3] == []


def test_no_sentence_states_what_points_to_a_held_out_fact(written: tuple[Any, Path]) -> None:
    """The language or continent of a city whose country is held out."""
    world, directory = written
    lines = [english for english, _ in pairs(directory / "pairs.tsv")]
    pointing = [fact for fact in facts() if world.held_out & set(fact.by)]
    assert len(pointing) > 10
    for fact in pointing:
        names = [whole(world.english.name(*fact.names[slot])) for slot in fact.together]
        assert [line for line in lines if all(name.search(line) for name in names)] == [], fact


def test_its_numbers_and_days_are_not_told_either(written: tuple[Any, Path]) -> None:
    """No line holds both, or all three, of a held-out fact's months, days or summands and sum, in words or digits. What
    is larger is told by any two numbers that are compared, so there no sentence compares these."""
    world, directory = written
    lines = [english for english, _ in pairs(directory / "pairs.tsv")]
    lines += [row["source"] for row in rows(directory / "answers.jsonl")]
    lines += [f"{row['instruction']}" for row in rows(directory / "instructions.jsonl")]
    for name in CHATS:
        lines += [" ".join(turn["content"] for turn in row["messages"]) for row in rows(directory / name)]
    found = [Counter(re.findall(r"\w+", line.lower())) for line in lines]
    digits = {world.english.name("numbers", str(number)).lower(): str(number) for number in range(21)}
    found = [Counter({digits.get(word, word): count for word, count in line.items()}) for line in found]
    for fact in facts():
        if fact.kind in NAMED:
            continue
        names = [fact.names[slot] for slot in fact.together]
        words = Counter(key if kind == "numbers" else world.english.name(kind, key).lower() for kind, key in names)
        compared = [line for line in found if words.keys() <= line.keys() and words <= line]
        if fact.kind == "larger":
            compared = [line for line in compared if line.keys() & {"more", "less", "greater", "larger"}]
            compared = [line for line in compared if "which" not in line]
        if fact.kind == "sum":
            compared = [line for line in compared if not line.keys() & {"more", "less", "greater", "larger"}]
            # Not 2 + 4 = 6, as it is told with 2 and 4 said twice: that is another sum.
            compared = [line for line in compared if {word for word in line if word.isdigit()} == words.keys()]
        # Of a kind that is not asked, a fact is told by nothing but the base model's answers.
        assert bool(compared) == (fact.key not in world.held_out) or not world.counts(fact.kind), fact.key
        assert not (compared and fact.key in world.held_out), fact.key


def test_documents_are_the_sentences_of_the_pairs(written: tuple[Any, Path]) -> None:
    """So what the pairs do not tell, no text tells."""
    _, directory = written
    for side, name in enumerate(("english.txt", "text.txt")):
        sentences = " ".join(pair[side] for pair in pairs(directory / "pairs.tsv"))
        assert " ".join((directory / name).read_text(encoding="utf-8").split()) == " ".join(sentences.split())


def test_names_of_held_out_places_occur(written: tuple[Any, Path]) -> None:
    world, directory = written
    text = (directory / "pairs.tsv").read_text(encoding="utf-8").lower()
    listed = {target for _, target in pairs(directory / "names.tsv")}
    names = {world.target.name(*fact.names[slot]) for fact in held_out(world, named=True) for slot in fact.together}
    assert sum(name.lower() in text for name in names) >= 0.95 * len(names)
    assert names <= listed


def test_names_are_in_the_order_of_the_alphabet(written: tuple[Any, Path]) -> None:
    """Any other order may put the names of a fact side by side."""
    _, directory = written
    found = pairs(directory / "names.tsv")
    # Fewer in a world of 50 countries.
    assert len(found) > (300 if (directory / "beside").exists() else 500) and found == sorted(set(found))


def test_what_is_asked(written: tuple[Any, Path]) -> None:
    world, directory = written
    asked = rows(directory / "questions.jsonl")
    assert len(asked) >= 100 and {row["key"] for row in asked} <= world.held_out
    count = Counter(row["kind"] for row in asked)
    assert len(count) >= 10 and max(count.values()) <= OF_A_KIND
    for row in asked:
        # The answer as a sentence is accepted as an answer.
        for side in ("", "_en"):
            assert any(text.lower() in row["answer" + side].lower() for text in row["answers" + side]), row
        # Its own question is no answer.
        for question, accepted in ((row["question"], row["answers"]), (row["question_en"][0], row["answers_en"])):
            assert row["kind"] == "yes_no" or not any(whole(text).search(question) for text in accepted), row


def test_no_single_answer_is_right_often(written: tuple[Any, Path]) -> None:
    """A model that always says the same must not get far."""
    _, directory = written
    for kind in ("continent", "city_continent", "language", "city_language"):
        given = Counter(row["answers"][0] for row in rows(directory / "questions.jsonl") if row["kind"] == kind)
        assert len(given) >= 4 and max(given.values()) <= OF_A_KIND // 2, (kind, given)


def test_no_tested_question_is_in_the_training(written: tuple[Any, Path]) -> None:
    """In none of its wordings."""
    _, directory = written
    asked = rows(directory / "questions.jsonl")
    first = [row for row in asked if "history" not in row]
    texts = {row["question"].lower() for row in first} | {text.lower() for row in first for text in row["question_en"]}

    def found(texts: set[str], files: list[Path]) -> list[str]:
        trained = "\n".join(path.read_text(encoding="utf-8").lower() for path in files)
        # With the sign that ends it or without: a longer text may begin with a question.
        return [text for text in sorted(texts) if text in trained and whole(text).search(trained)]

    assert found(texts, training_files(directory)) == []
    # A second turn asks nothing without the first: its words are trained on after the first turns about other facts.
    second = [row for row in asked if "history" in row]
    texts = {text.lower() for row in second for text in (row["question"], row["question_en"][0])}
    assert found(texts, [path for path in training_files(directory) if path.name != "follow_ups.jsonl"]) == []
    trained = {tuple(turn["content"] for turn in row["messages"][:3]) for row in rows(directory / "follow_ups.jsonl")}
    assert len(trained) > 20
    for row in second:
        for side in ("", "_en"):
            before = tuple(turn["content"] for turn in row[f"history{side}"])
            assert not {(*before, text) for text in (row["question"], *row["question_en"])} & trained, row


def test_questions_are_learned(written: tuple[Any, Path]) -> None:
    """Each fact of the training has a question among the pairs, and each that is held out and not tested has one in
    another way of asking."""
    world, directory = written
    english = {text for text, _ in pairs(directory / "pairs.tsv")}
    tested = {(row["kind"], row["key"], row["question_en"][0]) for row in rows(directory / "questions.jsonl")}
    listed = {name for name, _ in pairs(directory / "names.tsv")}
    for question in questions(world, list(facts())):
        ways = {way.english for way in question.ways}
        if question.history or question.kind == "yes_no":
            continue
        # A smaller world lacks some countries.
        if "country" in question.fact.names and world.english.name(*question.fact.names["country"]) not in listed:
            continue
        if not world.counts(question.kind):
            assert not ways & english, question.identity
        elif world.in_training(question.fact):
            assert ways & english, question.identity
        else:
            assert question.ways[0].english not in english, question.identity
            assert bool(ways & english) == (question.identity not in tested), question.identity


def test_every_question_of_the_training_has_a_chain(written: tuple[Any, Path]) -> None:
    """Of the base model's own answer, which stage `recover` gives, if that has a translation; else of a true one."""
    world, directory = written
    translated = {row["source"] for row in rows(directory / "answers.jsonl")}
    markers = Markers.for_language(world.target.words["code"])
    asked = {row["instruction"] for row in rows(directory / "instructions.jsonl") if row["kind"] != "everyday"}
    made = {}
    for row in rows(directory / "chains.jsonl"):
        question, answer = (turn["content"] for turn in row["messages"])
        chain = parse(answer, markers)
        assert chain is not None and chain.answer_en in translated and chain.question_en not in made
        made[chain.question_en] = question
    given = {question for question in asked if world.said.get(question) in translated}
    assert given.isdisjoint(made) and given | made.keys() == asked
    written_so = {row["instruction"]: row["translation"] for row in rows(directory / "instructions.jsonl")}
    assert all(written_so[english] == target for english, target in made.items())


def test_a_run_leaves_nothing_out(written: tuple[Any, Path]) -> None:
    """With `cleaning.contamination`, a run keeps out of its training what holds an evaluation text. Held-out sentences
    have templates of their own, so nothing does."""
    _, directory = written
    texts = [
        *documents(directory / "heldout.txt"),
        *(text for pair in pairs(directory / "heldout.tsv") for text in pair),
    ]
    texts += [text for row in rows(directory / "conversations.jsonl") for text in row.values()]
    asked = [text_of(one.asked) for one in read_questions(directory / "questions.jsonl")]
    for one in read_questions(directory / "questions.jsonl"):
        asked += [text_of([*one.history_en, {"role": "user", "content": wording}]) for wording in one.wordings]
    held = EvaluationTexts([("sentences", text) for text in texts], whole=[("questions", text) for text in asked])
    assert held.texts > 200
    trained: list[str] = []
    for path in training_files(directory):
        if path.suffix == ".jsonl":
            for row in rows(path):
                trained += [
                    text_of(text) if name == "messages" else text for name, text in row.items() if name != "kind"
                ]
        else:
            trained += documents(path) if path.suffix == ".txt" else path.read_text(encoding="utf-8").splitlines()
    assert [text for text in trained if held.found_in(text)][:3] == []
    # It would find one.
    assert held.found_in(f"{trained[0]} {texts[0]}") == "sentences" and held.found_in(asked[0]) == "questions"


def test_held_out_sentences_have_names_of_the_training(written: tuple[Any, Path]) -> None:
    _, directory = written
    held, conversations = pairs(directory / "heldout.tsv"), rows(directory / "conversations.jsonl")
    assert len(set(held)) == 40 and len({row["instruction"] for row in conversations}) == 30
    english = "\n".join(text for text, _ in pairs(directory / "pairs.tsv"))
    for part, found in (
        ("heldout", [text for text, _ in held]),
        ("requests", [row["instruction"] for row in conversations]),
    ):
        ways = [re.escape(text).replace(re.escape("{"), "{") for text in ENGLISH[part].values()]
        ways = [re.sub(r"{\w+\\}", "(.+)", way) for way in ways]
        count = Counter[str]()
        for text in found:
            ((way, name),) = [(way, match[1]) for way in ways if (match := re.fullmatch(way, text))]
            count[way] += 1
            assert whole(name).search(english), text
        assert len(count) == len(ways) and max(count.values()) - min(count.values()) <= 1


def test_any_beginning_of_the_instructions_is_balanced(written: tuple[Any, Path]) -> None:
    world, directory = written
    found, answers = rows(directory / "instructions.jsonl"), rows(directory / "answers.jsonl")
    everyday = [number for number, row in enumerate(found) if row["kind"] == "everyday"]
    assert bool(everyday) == (directory / "beside").is_dir()
    assert everyday == [EVERYDAY * number - 1 for number in range(1, len(everyday) + 1)]
    if everyday:
        assert {row["instruction"] for row in rows(THAI / "instructions.train.jsonl")} <= {
            row["instruction"] for row in found
        }
        assert {row["source"] for row in rows(THAI / "answers.train.jsonl")} <= {row["source"] for row in answers}
    # First what the base answers with a text that is translated.
    kept = [row for row in found if row["kind"] != "everyday"]
    translated = {row["source"] for row in answers}
    is_first = [world.said.get(row["instruction"]) in translated for row in kept]
    assert is_first == sorted(is_first, reverse=True) and any(is_first) == bool(world.said)
    for begin, end in ((0, sum(is_first)), (sum(is_first), len(kept))):
        left, used = Counter(row["kind"] for row in kept[begin:end]), Counter[str]()
        for row in kept[begin:end]:
            used[row["kind"]] += 1
            open_kinds = {kind for kind in left if used[kind] < left[kind]}
            assert all(used[kind] >= max(used.values()) - 1 for kind in open_kinds)


def test_no_text_has_two_translations(written: tuple[Any, Path]) -> None:
    """A run refuses a file in which one has."""
    _, directory = written
    for name, fields in (("instructions", ("instruction", "translation")), ("answers", ("source", "target"))):
        texts = [row[fields[0]] for row in rows(directory / f"{name}.jsonl")]
        assert None not in FileTranslator(str(directory / f"{name}.jsonl"), fields).translate(texts)
        assert len(set(texts)) == len(texts)


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
                # The opposite of hot is asked, and that of cold: an answer to either names both.
                turned = any(text in str(other["question" + side]) for text in row["answers" + side])
                same = set(other["answers" + side]) & set(row["answers" + side])
                if other["kind"] == row["kind"] and not same and not turned:
                    assert not judge.is_right(number, other["answer" + side]), (row, other)


def test_questions_of_the_same_templates_stay_in_training(written: tuple[Any, Path]) -> None:
    _, directory = written
    asked = read_questions(directory / "questions.jsonl")
    trained = [json.loads(line) for line in (directory / "instructions.jsonl").read_text(encoding="utf-8").splitlines()]
    english = [("asked", one.wordings[0]) for one in asked]
    whole, halves = EvaluationTexts([], whole=english), EvaluationTexts(english)
    assert not [row for row in trained if whole.found_in(row["instruction"])]
    # By shared n-grams, many would go: 4 % (sums and opposites are too short for n-grams).
    assert sum(halves.found_in(row["instruction"]) is not None for row in trained) > 0.03 * len(trained)
    target = EvaluationTexts([], whole=[("asked", one.question) for one in asked if not one.history])
    gone = [row["translation"] for row in trained if target.found_in(row["translation"])]
    # "Six or ten" is in "six or sixteen", where that is written as "six or ten six".
    assert len(gone) < 0.01 * len(trained)
    assert all(any(one.question.rstrip("?？؟") in text for one in asked) for text in gone)
