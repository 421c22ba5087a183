"""Writes sheets: pairs of answers to the same question, shuffled, with nothing in them that says whose they are."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transllm_jax.disk import write_json, write_text
from transllm_jax.errors import UserError
from transllm_jax.evaluation.people.files import EXTENSIONS, write_csv, write_xlsx
from transllm_jax.evaluation.people.sheet import Form, Row, conversation
from transllm_jax.evaluation.suites.answered import Answered

# Only SHEETS is for the annotators.
KEY, SHEETS, HOW_TO = "key.json", "sheets", "how-to.txt"

# Codes have no vowels and no digits: they are no words, and no spreadsheet takes them for a number.
_LETTERS, _LENGTH = "bcdfghjkmnpqrstvwxz", 6


@dataclass(frozen=True)
class Plan:
    """Who judges what.

    pairs: (first, second) names of systems. questions: how many are drawn at random; None for all. annotators: how many
    people. overlap: how many of them judge each pair of answers.
    """

    pairs: Sequence[tuple[str, str]]
    annotators: int
    overlap: int
    questions: int | None = None
    seed: int = 0


def check_plan(plan: Plan) -> None:
    """Raises UserError for an overlap that is not between 1 and the number of annotators."""
    if not 1 <= plan.overlap <= plan.annotators:
        raise UserError(
            f"--overlap {plan.overlap}: each pair of answers is judged by 1 to {plan.annotators} people, who are the "
            "--annotators"
        )


def require_same_questions(systems: Mapping[str, Mapping[str, Answered]]) -> list[str]:
    """The ids of the questions, which all systems were asked. Raises UserError if they were not asked the same."""
    (first, known), *others = systems.items()
    for name, answered in others:
        missing = sorted(known.keys() ^ answered.keys())
        if missing:
            raise UserError(
                f"{first} and {name} were not asked the same questions ({len(missing)} differ, such as {missing[0]}); "
                "evaluate both on the same file with the same --limit"
            )
        for id, one in known.items():
            if one.questions != answered[id].questions:
                raise UserError(
                    f"{first} and {name} were asked different questions {id}; evaluate both on the same file"
                )
    return sorted(known)


def write_sheets(
    directory: Path, systems: Mapping[str, Mapping[str, Answered]], plan: Plan, form: Form, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write `sheets/annotator-N.xlsx` and `.csv` for each person, `sheets/how-to.txt`, and key.json, which is returned.

    systems: the answered questions of each system by id. about: what else the key says (JSON). Pairs of equal answers
    are ties that nobody has to judge. The same plan and answers give the same sheets. Raises UserError if the systems
    were not asked the same questions, or all their answers are equal.
    """
    check_plan(plan)
    ids = require_same_questions(systems)
    chance = random.Random(plan.seed)
    drawn = sorted(chance.sample(ids, min(plan.questions or len(ids), len(ids))))
    pairs, units = [], []
    for number, (first, second) in enumerate(plan.pairs):
        equal = [id for id in ids if _is_equal(systems[first][id], systems[second][id])]
        pairs.append(
            {
                "first": first,
                "second": second,
                "asked": len(ids),
                "drawn": drawn,
                "equal": equal,
                "hashes": {id: [systems[first][id].hash, systems[second][id].hash] for id in drawn},
            }
        )
        left_out = set(equal)
        units += [(number, id) for id in drawn if id not in left_out]
    if not units:
        raise UserError("the systems give equal answers to all questions: there is nothing for people to judge")
    rows: dict[str, dict[str, Any]] = {}
    sheets: list[list[Row]] = []
    for person, mine in enumerate(_assigned(units, plan, chance), 1):
        sheet = []
        for number, id in mine:
            turned = chance.random() < 0.5
            names = plan.pairs[number]
            a, b = (names[1], names[0]) if turned else names
            row = Row(
                _code(chance, rows),
                conversation(systems[a][id].questions),
                conversation(systems[a][id].answers),
                conversation(systems[b][id].answers),
            )
            rows[row.code] = {
                "annotator": person,
                "pair": number,
                "id": id,
                "a": a,
                "b": b,
                "texts": list(row.texts),
            }
            sheet.append(row)
        sheets.append(sheet)
    key = {
        **about,
        "plan": {**asdict(plan), "pairs": [list(pair) for pair in plan.pairs]},
        "form": asdict(form),
        "pairs": pairs,
        "rows": rows,
    }
    for person, sheet in enumerate(sheets, 1):
        for extension, write in zip(EXTENSIONS, (write_xlsx, write_csv), strict=True):
            write(directory / SHEETS / f"annotator-{person}{extension}", sheet, form)
    write_text(directory / SHEETS / HOW_TO, form.text + "\n")
    write_json(directory / KEY, key)
    return key


def _is_equal(one: Answered, other: Answered) -> bool:
    return conversation(one.answers) == conversation(other.answers)


def _assigned(units: Sequence[tuple[int, str]], plan: Plan, chance: random.Random) -> list[list[tuple[int, str]]]:
    """What each person judges, in a random order: each unit goes to the `overlap` people who have the least so far."""
    mine: list[list[tuple[int, str]]] = [[] for _ in range(plan.annotators)]
    for unit in chance.sample(units, len(units)):
        people = sorted(range(plan.annotators), key=lambda person: (len(mine[person]), chance.random()))
        for person in people[: plan.overlap]:
            mine[person].append(unit)
    for one in mine:
        chance.shuffle(one)
    return mine


def _code(chance: random.Random, taken: Mapping[str, Any]) -> str:
    while True:
        code = "".join(chance.choices(_LETTERS, k=_LENGTH))
        if code not in taken:
            return code
