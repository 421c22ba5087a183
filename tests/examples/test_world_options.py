"""The options of examples/world/make.py: fewer countries, only what a base model knows, everyday text beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from world_files import KNOWN, LANGUAGES, OF_A_KIND, THAI, WORLD, pairs, rows, whole

from beside import read_beside, told  # isort: skip
from make import choose, of_countries, read_known, world_of, write  # isort: skip
from names import facts  # isort: skip
from world import questions  # isort: skip


def test_what_everyday_text_tells_is_not_held_out(tmp_path: Path) -> None:
    world, everything = world_of("th"), list(facts())
    told_by_thai = told(world, everything, read_beside(THAI))
    assert {"place Asia/Tokyo JP", "place DE Europe/Berlin", "place Europe/Rome IT", "language ES es"} <= told_by_thai
    assert {"opposite cold hot", "sum 2 3 5"} <= told_by_thai and len(told_by_thai) < len(
        {fact.key for fact in everything}
    )

    def told_by(**contents: str) -> set[str]:
        for name, text in contents.items():
            (tmp_path / name.replace("_", ".")).write_text(text, encoding="utf-8")
        found = told(world, everything, read_beside(tmp_path))
        for name in contents:
            (tmp_path / name.replace("_", ".")).unlink()
        return found

    # A document as a whole, either language, an instruction that only asks, and the tested question.
    both = "{} is a port.\nIt is near {}."
    peru = "place America/Lima PE"
    assert peru in told_by(text_train_txt=both.format("Lima", "Peru"))
    assert peru in told_by(
        text_train_txt=both.format(world.target.name("cities", "America/Lima"), world.target.name("territories", "PE"))
    )
    assert not told_by(text_train_txt="Lima is a port.\n\nIt is near Peru.")
    asked = json.dumps({"instruction": "Where is Lima?", "translation": "-"})
    assert peru in told_by(instructions_train_jsonl=asked) and "continent 005 PE" in told_by(
        instructions_train_jsonl=asked
    )
    assert "sum 4 5 9" in told_by(english_train_txt="4 apples and 5 pears are 9 fruits.")
    assert told_by(pairs_train_tsv="What is 4 + 5?\t-") == {"sum 4 5 9", "larger 4 5"}
    with pytest.raises(SystemExit, match="none of the files"):
        read_beside(tmp_path)


def test_the_command_writes_the_same_bytes_each_time(tmp_path: Path) -> None:
    language = LANGUAGES[0]
    for name in ("one", "two"):
        command = [sys.executable, str(WORLD / "make.py"), language, str(tmp_path / name), "--held-out", "9"]
        command += ["--known", str(KNOWN), "--beside", str(THAI)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_a_smaller_world_has_fewer_names(tmp_path: Path) -> None:
    world, everything = world_of(LANGUAGES[0]), list(facts())
    read_known(world, KNOWN)
    few = of_countries(world, everything, 8)
    countries = {fact.names["country"][1] for fact in few if "country" in fact.names}
    assert len(countries) == 8 and len({fact.kind for fact in few}) == len({fact.kind for fact in everything})
    choose(world, few, OF_A_KIND)
    write(world, tmp_path, few, OF_A_KIND)
    text = "\n".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    left_out = {fact.names["country"] for fact in everything if "country" in fact.names} - {
        fact.names["country"] for fact in few if "country" in fact.names
    }
    # Others are part of longer names: the United States dollar.
    assert sum(bool(whole(world.english.name(*name)).search(text)) for name in left_out) < 0.1 * len(left_out)
    assert len(set(pairs(tmp_path / "heldout.tsv"))) == 40 and len(rows(tmp_path / "conversations.jsonl")) == 30


def test_only_what_is_known_is_held_out(tmp_path: Path) -> None:
    """And a kind of which less than half is known is neither tested nor among the instructions."""
    world, everything = world_of(LANGUAGES[0]), list(facts())
    known = tmp_path / "known.jsonl"
    with known.open("w", encoding="utf-8") as out:
        count = Counter[str]()
        for kind, key, text in [question.identity for question in questions(world, everything)]:
            count[kind] += 1
            is_right = (count[kind] % 3 == 0) == (kind == "capital")
            out.write(json.dumps({"kind": kind, "key": key, "question": text, "right": is_right}) + "\n")
    read_known(world, known)
    assert "capital" not in world.kinds and "language" in world.kinds
    choose(world, everything, OF_A_KIND)
    write(world, tmp_path, everything, OF_A_KIND)
    right = {(row["kind"], row["key"], row["question"]) for row in rows(known) if row["right"]}
    asked = rows(tmp_path / "questions.jsonl")
    assert asked and {(row["kind"], row["key"], row["question_en"][0]) for row in asked} <= right
    kinds = {row["kind"] for row in asked} | {row["kind"] for row in rows(tmp_path / "instructions.jsonl")}
    assert "capital" not in kinds and "language" in kinds
