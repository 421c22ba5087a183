"""Files of questions of one or more turns, in the forms in which MT-Bench, AlpacaEval and others come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transllm_jax.config import Language as LanguageSection
from transllm_jax.data.read.files import Place
from transllm_jax.data.read.sources import read_jsonl
from transllm_jax.errors import UserError
from transllm_jax.evaluation.in_language import Letters
from transllm_jax.evaluation.systems.system import Language

# MT-Bench: 80 questions, 81 to 160, ten of each category, in this order. TransLLM's form has only their place.
FIRST_ID = 81
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
EACH = 10
# Fields that may hold an only turn, and the id, in the order in which they are looked for.
_ONLY = ("instruction", "question", "prompt")
_IDS = ("question_id", "id", "Instruct_id", "index")


@dataclass(frozen=True)
class OpenQuestion:
    """A question to which many answers are good, of one or more turns.

    language: in which it is asked. references: right answers, one a turn, where the file has them.
    """

    id: str
    turns: tuple[str, ...]
    language: Language = "target"
    category: str = ""
    references: tuple[str, ...] | None = None


def read_open_questions(
    path: Path,
    language: LanguageSection,
    *,
    asked_in: Language | None = None,
    mt_bench: bool = False,
    limit: int | None = None,
) -> list[OpenQuestion]:
    """The questions of a file (JSON, an object a line or one list; or parquet).

    A record has `turns` (a list of texts); or `instruction1`, `instruction2`, ...; or `instruction`, `question` or
    `prompt`. A field may have a form with the language's code, such as `instruction_th`, which is asked. asked_in:
    English asks the form without the code. None: the one with the code, if the records have it; else what most of the
    questions' letters say. mt_bench: ids and categories are those of MT-Bench, also where the file has only a place
    (`index` 0 is question 81).

    Raises UserError with file and line for a record without a question, with an empty turn, or with the id of another.
    """
    rows = read_jsonl(path, {}, controls="remove")
    codes = [] if asked_in == "english" else [language.code, language.code.split("-")[0]]
    found: list[OpenQuestion] = []
    ids: dict[str, Place] = {}
    coded: list[bool] = []
    for row, place in zip(rows, rows.places, strict=True):
        turns, with_code = _turns(row, codes, place)
        id = _id(row, place, mt_bench)
        if id in ids:
            raise UserError(f"{place}: {ids[id]} has the id {id}, too; give each question an id of its own")
        ids[id] = place
        category = row.get("category", _category(id) if mt_bench else "")
        if not isinstance(category, str):
            raise UserError(f"{place}: category is no text; correct it")
        references = None if mt_bench else _references(row, len(turns), place)
        found.append(OpenQuestion(id, turns, "target", category, references))
        coded.append(with_code)
    if mixed := Counter(coded).get(False, 0) if any(coded) else 0:
        raise UserError(
            f"{path}: {mixed} of {len(coded)} questions lack the field with _{codes[0]}; add it, or take all out"
        )
    spoken = asked_in or ("target" if any(coded) else _spoken(found, language))
    return [OpenQuestion(one.id, one.turns, spoken, one.category, one.references) for one in found][:limit]


def _turns(row: Mapping[str, Any], codes: Sequence[str], place: Place) -> tuple[tuple[str, ...], bool]:
    """The turns of a record, and whether they are those of a field with a code."""
    for code in (*codes, None):
        end = "" if code is None else f"_{code}"
        given: Any = row.get(f"turns{end}")
        if given is None and f"instruction1{end}" in row:
            names = [f"instruction{number}{end}" for number in range(1, 100)]
            given = [row[name] for name in names if row.get(name) is not None]
        if given is None:
            given = next(([row[f"{name}{end}"]] for name in _ONLY if f"{name}{end}" in row), None)
            # Alpaca's form has the text that an instruction is about in a field of its own.
            more = row.get(f"input{end}")
            if given is not None and isinstance(more, str) and more.strip():
                given = [f"{given[0]}\n\n{more.strip()}"]
        if given is None:
            continue
        texts = given if isinstance(given, list) else []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{place}: a question is a text, and turns a list of texts, none of them empty; correct it")
        return tuple(text.strip() for text in texts), code is not None
    raise UserError(f"{place} holds no question; give turns (a list of texts), or one of {', '.join(_ONLY)}")


def _id(row: Mapping[str, Any], place: Place, mt_bench: bool) -> str:
    name = next((name for name in _IDS if row.get(name) is not None), None)
    if name is None:
        return str(place.line)
    given = row[name]
    if isinstance(given, bool) or not isinstance(given, str | int) or "/" in str(given):
        raise UserError(f"{place}: {name} must be a text without a slash, or a whole number; correct it")
    if mt_bench and name in ("index", "Instruct_id"):
        if not str(given).isdecimal():
            raise UserError(f"{place}: {name} must be the question's place, from 0; correct it")
        return str(FIRST_ID + int(given))
    return str(given)


def _category(id: str) -> str:
    """The category of a question of MT-Bench; empty for another id."""
    number = int(id) - FIRST_ID if id.isdecimal() else -1
    return CATEGORIES[number // EACH] if 0 <= number < EACH * len(CATEGORIES) else ""


def _references(row: Mapping[str, Any], turns: int, place: Place) -> tuple[str, ...] | None:
    given = row.get("references", row.get("reference"))
    if given is None or given == []:
        return None
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or len(given) != turns or not all(isinstance(text, str) for text in given):
        raise UserError(f"{place}: references must be a list of texts, one for each of the {turns} turns; correct it")
    return tuple(given)


def _spoken(questions: Sequence[OpenQuestion], language: LanguageSection) -> Language:
    """In which language most questions are; the target language where letters do not tell."""
    letters = Letters(language.code, language.scripts)
    said = [letters.mostly(" ".join(one.turns)) for one in questions]
    return "english" if said.count(False) > said.count(True) else "target"
