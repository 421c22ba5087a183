"""The corrected reference answers: each computed anew, each program run; and which references a judge sees."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transllm_jax.errors import UserError
from transllm_jax.evaluation.judge.corrected_references import CORRECTED
from transllm_jax.evaluation.judge.references import References, mt_bench_references, read_references

# lm-sys/FastChat#3158
REPORTED = (104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130)


def program(id: int, turn: int, language: str = "python") -> str:
    found = re.search(rf"```{language}\n(.*?)```", CORRECTED[id].turns[turn], re.DOTALL)
    assert found is not None
    return found[1]


def function(id: int, turn: int) -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(program(id, turn), names)
    (made,) = (value for name, value in names.items() if name != "__builtins__")
    return made  # type: ignore[no-any-return]


def test_there_are_all_of_the_report() -> None:
    assert tuple(CORRECTED) == REPORTED
    assert all(one.working and all(one.turns) for one in CORRECTED.values())


def test_brothers() -> None:
    # A family of David, his sisters and b - 1 more boys.
    for turn, brothers in enumerate((1, 2)):
        boys = [f"boy {number}" for number in range(brothers)]  # the brothers of each sister
        assert len(boys) - 1 == turn
    assert CORRECTED[104].turns[0].startswith("David has no brother") and "has one brother" in CORRECTED[104].turns[1]


def test_parking_spaces() -> None:
    colours = [
        order
        for order in itertools.permutations(["yellow", "green", "purple", "red", "blue"])
        if order[0] == "red" and order[4] == "purple" and order[3] == "yellow"
        if order.index("blue") * 2 == order.index("red") + order.index("green")
    ]
    assert len(colours) == 1
    people = [
        order
        for order in itertools.permutations(["Alice", "Bert", "Cheryl", "David", "Enid"])
        if order[4] == "David" and abs(order.index("Alice") - order.index("David")) == 1
        if colours[0][order.index("Enid")] == "green"
        if order.index("Bert") * 2 == order.index("Cheryl") + order.index("Enid")
    ]
    assert people == [("Cheryl", "Bert", "Enid", "Alice", "David")]
    assert people[0][3] in CORRECTED[105].turns[0].splitlines()[0]
    assert CORRECTED[105].turns[1].lower().rstrip(".").split(", ") == list(reversed(colours[0]))


def test_shadow() -> None:
    compass = ["north", "east", "south", "west"]
    facing = [name for place, name in enumerate(compass) if compass[(place + 1) % 4] == "west"]
    assert facing == ["south"] and "facing south" in CORRECTED[109].turns[1] and "west" in CORRECTED[109].turns[0]


def test_triangle() -> None:
    points = [(0, 0), (-1, 1), (3, 3)]
    assert abs(-1 * 3 - 1 * 3) / 2 == 3 and "area is 3." in CORRECTED[111].turns[0]
    distances = {(x - 1) ** 2 + (y - 2) ** 2 for x, y in points}
    assert distances == {5} and "5 * pi" in CORRECTED[111].turns[1] and round(5 * math.pi, 2) == 15.71


def test_probabilities() -> None:
    assert 100 - (58 + 45 - 22) == 19 and "is 19 %" in CORRECTED[113].turns[0]
    assert CORRECTED[113].turns[1].startswith("The probability is 0.")
    totals = [a + b for a in range(1, 7) for b in range(1, 7)]
    assert sum(total >= 3 for total in totals) == 35 and "35/36" in CORRECTED[114].turns[0] and len(totals) == 36
    assert all(total >= 3 or total % 2 == 0 for total in totals) and "probability is 1 " in CORRECTED[114].turns[1]


def test_cubic() -> None:
    def f(x: complex) -> complex:
        return 4 * x**3 - 9 * x - 14

    assert f(2) == 0 and "= 0" in CORRECTED[120].turns[0] and CORRECTED[120].turns[1].startswith("x = 2")
    for sign in (1, -1):
        assert abs(f(complex(-1, sign * math.sqrt(3) / 2))) < 1e-9
    assert round(f(1.65).real, 1) == -10.9


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_sequences(tmp_path: Path) -> None:
    def run(name: str, turn: int, numbers: list[int]) -> list[int]:
        source = tmp_path / f"{name}.cpp"
        source.write_text(program(122, turn, "cpp"), encoding="utf-8")
        subprocess.run(["g++", "-Wall", "-Wextra", "-Werror", "-o", tmp_path / name, source], check=True)
        refused = subprocess.run([tmp_path / name], input="-1", text=True, capture_output=True)
        assert refused.returncode == 1 and "give a whole number" in refused.stderr
        done = [
            subprocess.run([tmp_path / name], input=str(n), text=True, capture_output=True, check=True) for n in numbers
        ]
        return [int(one.stdout) for one in done]

    assert run("fibonacci", 0, [0, 1, 2, 3, 10]) == [0, 1, 1, 2, 55]
    assert run("three", 1, [1, 2, 3, 4, 5, 6, 7, 8]) == [0, -1, -1, -2, -4, -7, -13, -24]


def longest_by_trial(one: str, other: str) -> int:
    def parts(text: str) -> set[str]:
        return {"".join(part) for size in range(len(text) + 1) for part in itertools.combinations(text, size)}

    return max(map(len, parts(one) & parts(other)))


def test_common_subsequences() -> None:
    corrected = function(124, 1)
    texts = ["".join(letters) for size in range(4) for letters in itertools.product("ab", repeat=size)]
    for one, other in itertools.product(texts, texts):
        assert corrected(one, other) == longest_by_trial(one, other)


def test_highest_common_ancestor() -> None:
    root = object()
    assert function(125, 0)(root, object(), object()) is root and "root" in CORRECTED[125].turns[1]


@pytest.mark.parametrize("turn", [0, 1])
def test_medians(turn: int) -> None:
    found, draw = function(126, turn), random.Random(turn)
    for _ in range(500):
        one, other = ([draw.randint(0, 9) for _ in range(draw.randint(0, 7))] for _ in range(2))
        if not one and not other:
            with pytest.raises(ValueError):
                found([], [])
            continue
        merged = sorted(one + other)
        middle = (merged[(len(merged) - 1) // 2] + merged[len(merged) // 2]) / 2
        assert found(sorted(one), sorted(other)) == middle


def test_full_trees() -> None:
    binary, ternary = function(128, 0), function(128, 1)
    for k in range(13):
        assert binary(2 * k + 1) == math.comb(2 * k, k) // (k + 1) and binary(2 * k) == 0
        assert ternary(3 * k + 1) == math.comb(3 * k, k) // (2 * k + 1)
        assert ternary(3 * k) == ternary(3 * k + 2) == 0
    assert binary(-1) == ternary(-2) == 0


def test_common_elements(capsys: pytest.CaptureFixture[str]) -> None:
    printing, returning, draw = function(130, 0), function(130, 1), random.Random(0)
    for _ in range(200):
        one, other = ([draw.randint(0, 5) for _ in range(draw.randint(0, 6))] for _ in range(2))
        printing(one, other)
        printed = [int(line) for line in capsys.readouterr().out.split()]
        assert sorted(printed) == sorted(returning(one, other)) == sorted({x for x in one if x in other})


# --- which are used --------------------------------------------------------------------------------------------------


def published(path: Path, ids: tuple[int, ...]) -> Path:
    rows = [{"question_id": id, "choices": [{"index": 0, "turns": [f"{id} first", f"{id} second"]}]} for id in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_choice_of_references(tmp_path: Path) -> None:
    path = published(tmp_path / "gpt-4.jsonl", (101, 104))
    assert mt_bench_references("none", None) == References("none")
    gpt4 = mt_bench_references("gpt4", path)
    assert gpt4.of("104", 2) == ("104 first", "104 second") and gpt4.of("81", 1) is None and gpt4.of("104", 3) is None
    corrected = mt_bench_references("corrected", path)
    assert corrected.of("104", 1) == CORRECTED[104].turns[:1] and corrected.of("101", 1) == ("101 first",)
    # No others than the file has.
    assert corrected.recorded(["81", "101", "104"]) == {"choice": "corrected", "questions": 2, "corrected": ["104"]}
    for choice in ("corrected", "gpt4"):
        with pytest.raises(UserError, match="needs --reference-file"):
            mt_bench_references(choice, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="uses no --reference-file"):
        mt_bench_references("none", path)


@pytest.mark.parametrize("row", [{}, {"question_id": 1}, {"id": 1, "turns": []}, {"id": 1, "turns": [3]}])
def test_a_file_of_another_form_is_refused(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": 0, "turns": ["a"]}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:2: a reference answer needs question_id"):
        read_references(path)
