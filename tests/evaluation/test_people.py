"""Sheets for people: what is in them, what annotators do to them, and what the judgements come to."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
from rich.table import Table

from transllm_jax.commands.sheets import Wanted, form_of, read, write
from transllm_jax.errors import UserError
from transllm_jax.evaluation.people.agreement import alpha, pair_results
from transllm_jax.evaluation.people.files import read_sheet
from transllm_jax.evaluation.people.read import Judgement, parse_words, read_sheets
from transllm_jax.evaluation.people.sheet import CELL, Form, conversation, needs_mark, same
from transllm_jax.evaluation.statistics import corrected_interval
from transllm_jax.evaluation.suites.answered import preferences, read_answered, suites_in

DANGEROUS = ("=1+1", "-5", "+44 20", "@home", '=HYPERLINK("x")', "1/2", "007")
ARABIC = "القاهرة هي عاصمة مصر."


def suite(directory: Path, name: str, answers: list[Any], scores: list[Any], **made_with: Any) -> None:
    """The results of a suite for a system: a question of one turn for each answer that is a text, else of several."""
    place = directory / name / "mt_bench"
    place.mkdir(parents=True)
    lines = []
    for number, (answer, score) in enumerate(zip(answers, scores, strict=True)):
        item: dict[str, Any] = {"id": str(number), "score": score}
        if isinstance(answer, str):
            item |= {"question": f"คำถาม {number}", "visible": answer}
        else:
            turns = [{"question": f"คำถาม {number}/{turn}", "visible": text} for turn, text in enumerate(answer)]
            item |= {"turns": turns}
        lines.append(json.dumps(item, ensure_ascii=False) + "\n")
    (place / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    (place / "results.json").write_text(json.dumps({"made_with": made_with}), encoding="utf-8")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two systems: the dangerous texts, an Arabic one, one of two turns, two equal answers, and plain Thai ones."""
    first = [*DANGEROUS, ARABIC, ["ก", "ข"], "เหมือนกัน", *(f"คำตอบ {number} ของหนึ่ง" for number in range(6))]
    second = [*(f"{text}!" for text in DANGEROUS), "أهلا", ["ค", ""], "เหมือนกัน"]
    second += [f"คำตอบ {number} ของสอง" for number in range(6)]
    suite(tmp_path / "results", "one", first, [8, *[5] * 15])
    suite(tmp_path / "results", "two", second, [3, *[7] * 15])
    return tmp_path / "results"


def sheets(results: Path, out: Path, annotators: int = 2, **options: Any) -> dict[str, Any]:
    return write(
        Wanted(results=results, suite=None, systems=(), out=out, annotators=annotators, **options), lambda line: None
    )


def filled(
    path: Path, choose: Callable[[str, dict[str, Any]], Any], key: dict[str, Any], column: str = "better"
) -> None:
    """Fill a column of an xlsx in place. choose: from the code and what the key says of it."""
    book = openpyxl.load_workbook(path)
    sheet = book.worksheets[0]
    heads = [str(cell.value) for cell in sheet[1]]
    place = next(number for number, head in enumerate(heads, 1) if head.startswith(column))
    for row in range(2, sheet.max_row + 1):
        code = sheet.cell(row, 1).value
        sheet.cell(row, place).value = choose(code, key["rows"][code])
    book.save(path)


def prefers(name: str) -> Callable[[str, dict[str, Any]], str]:
    return lambda code, row: "A" if row["a"] == name else "B"


def test_sheets_are_blind_and_texts_stay_texts(results: Path, tmp_path: Path) -> None:
    key = sheets(results, tmp_path / "out")
    assert key == json.loads((tmp_path / "out" / "key.json").read_text())
    for person in (1, 2):
        path = tmp_path / "out" / "sheets" / f"annotator-{person}.xlsx"
        sheet = openpyxl.load_workbook(path).worksheets[0]
        values = [[cell.value for cell in row] for row in sheet.iter_rows()]
        assert values[0] == ["code", "question", "answer A", "answer B", "better (A, B or tie)", "comment"]
        assert len(values) == 1 + 15  # of 16 questions, one has equal answers
        for row in sheet.iter_rows(min_row=2):
            assert all(cell.data_type == "s" and cell.alignment.wrap_text for cell in row[:4])
            assert [cell.value for cell in row[1:4]] == key["rows"][row[0].value]["texts"]
            right_to_left = [cell.alignment.readingOrder == 2 for cell in row[1:4]]
            assert right_to_left == [
                False,
                "كم" in str(row[2].value) or "ا" in str(row[2].value),
                "ا" in str(row[3].value),
            ]
        text = path.with_suffix(".csv").read_bytes()
        assert text.startswith(b"\xef\xbb\xbf") and b"one" not in text.replace(b"none", b"") and b"two" not in text
        rows = list(csv.reader(text.decode("utf-8-sig").splitlines()))
        for row in rows[1:]:
            assert not any(cell and cell[0] in "=+-@" for cell in row)
    orders = [[code for code, row in key["rows"].items() if row["annotator"] == person] for person in (1, 2)]
    ids = [[key["rows"][code]["id"] for code in order] for order in orders]
    assert ids[0] != ids[1] and sorted(ids[0]) == sorted(ids[1]) != ids[0]
    assert {row["a"] for row in key["rows"].values()} == {"one", "two"}
    two_turns = next(row for row in key["rows"].values() if row["id"] == "8" and row["a"] == "two")
    assert two_turns["texts"][1] == "[1] ค\n\n[2] (no answer)"


def test_overlap_is_spread_evenly_and_questions_are_drawn(results: Path, tmp_path: Path) -> None:
    key = sheets(results, tmp_path / "out", annotators=3, overlap=2, questions=9, seed=5)
    people: dict[str, list[int]] = {}
    for row in key["rows"].values():
        people.setdefault(row["id"], []).append(row["annotator"])
    assert all(len(set(ones)) == len(ones) == 2 for ones in people.values())
    counts = [sum(row["annotator"] == person for row in key["rows"].values()) for person in (1, 2, 3)]
    assert max(counts) - min(counts) <= 1 and len(key["pairs"][0]["drawn"]) == 9
    again = sheets(results, tmp_path / "again", annotators=3, overlap=2, questions=9, seed=5)
    assert again == key


def test_judgements_come_back_from_sorted_extended_and_mixed_sheets(results: Path, tmp_path: Path) -> None:
    key = sheets(results, tmp_path / "out")
    folder = tmp_path / "out" / "sheets"
    filled(folder / "annotator-1.xlsx", prefers("one"), key)
    # The first person sorts the rows, adds a row, columns and notes above, and hides the question.
    book = openpyxl.load_workbook(folder / "annotator-1.xlsx")
    sheet = book.worksheets[0]
    rows = sorted([[cell.value for cell in row] for row in sheet.iter_rows(min_row=2)], key=lambda row: row[3])
    sheet.delete_rows(2, sheet.max_row)
    for row in rows:
        sheet.append([*row, "note"])
        for cell in sheet[sheet.max_row][:4]:
            cell.data_type = "s"
    sheet.insert_cols(1)
    sheet.insert_rows(1, amount=2)
    sheet["B1"] = "mine"
    book.save(folder / "annotator-1.xlsx")
    # The second uses the csv, with semicolons, other cases and spaces.
    table = list(csv.reader((folder / "annotator-2.csv").read_text(encoding="utf-8-sig").splitlines(keepends=True)))
    for number, row in enumerate(table[1:]):
        side = prefers("two")(row[0], key["rows"][row[0]])
        row[4] = [side.lower(), f" {side} ", "TIE", "Ａ" if side == "A" else "Ｂ"][number % 4]
    with (folder / "annotator-2.csv").open("w", encoding="utf-16", newline="") as file:
        csv.writer(file, delimiter=";").writerows(table)
    returned = read_sheets(sorted(folder.glob("annotator-*.*")), key, {})
    assert not returned.problems and not returned.unfinished and not returned.missing
    by_person = {person: [one.won for one in returned.judgements if one.annotator == person] for person in (1, 2)}
    assert by_person[1] == [1.0] * 15
    assert sorted(set(by_person[2])) == [0.0, 0.5] and by_person[2].count(0.5) == 4


def test_what_is_unclear_is_a_problem_with_its_cell(results: Path, tmp_path: Path) -> None:
    key = sheets(results, tmp_path / "out", form=Form(rating=5))
    path = tmp_path / "out" / "sheets" / "annotator-1.xlsx"
    filled(path, prefers("one"), key)
    filled(path, lambda code, row: 4, key, "rating A")
    filled(path, lambda code, row: "2", key, "rating B")
    book = openpyxl.load_workbook(path)
    sheet = book.worksheets[0]
    sheet["E2"] = "เท่ากัน"
    sheet["E3"] = "=IF(1,A,B)"
    sheet["E4"] = "А"  # Cyrillic
    sheet["E5"] = None
    sheet["G6"] = "4,5"
    sheet["F7"] = 6
    sheet["A8"] = "zzzzzz"
    sheet["A9"] = None
    sheet["A10"] = sheet["A11"].value
    sheet["C12"].value, sheet["C13"].value = sheet["C13"].value, sheet["C12"].value
    for line in (14, 15):
        for letter in "EFG":
            sheet[f"{letter}{line}"] = None
    book.save(path)
    returned = read_sheets([path], key, {})
    found = {problem.cell: problem.what for problem in returned.problems}
    assert all(problem.file == "annotator-1.xlsx" for problem in returned.problems)
    assert found["E2"].startswith("'เท่ากัน' is not A, B or tie") and "--word 'เท่ากัน'=tie" in found["E2"]
    assert found["E3"].startswith("a formula") and found["E4"].startswith("'А' is not")
    assert found["E5"].startswith("rated and not compared")
    assert found["G6"] == "'4,5' is no whole number from 1 to 5" and found["F7"].startswith("'6' is no")
    assert "in no sheet of this key" in found["A8"] and found["A9"].startswith("the code is missing")
    # A10 has the code of row 11: its texts are those of another one, and row 11 is the second of this code.
    assert found["B10"].startswith("this text belongs to code") and "in row 10 as well" in found["A11"]
    assert found["C12"].startswith("this text belongs") and "Sort whole rows" in found["C13"]
    assert len(found) == len(returned.problems) == 12
    assert returned.unfinished == {"annotator-1.xlsx": [14, 15]}
    assert len(returned.judgements) == 1 and returned.judgements[0].ratings in ((4, 2), (2, 4))
    assert returned.missing[2] == 15
    assert str(returned.problems[0]).startswith("annotator-1.xlsx: row 2, cell E2: 'เท่ากัน'")
    meant = read_sheets([path], key, parse_words(["เท่ากัน=tie"]))
    assert len(meant.problems) == 11 and meant.judgements[0].won == 0.5


def test_two_files_of_a_person_may_not_differ(results: Path, tmp_path: Path) -> None:
    key = sheets(results, tmp_path / "out", annotators=1)
    path = tmp_path / "out" / "sheets" / "annotator-1.xlsx"
    other = shutil.copy(path, tmp_path / "b.xlsx")
    filled(path, prefers("one"), key)
    filled(other, lambda code, row: "tie" if row["id"] == "3" else None, key)
    returned = read_sheets([path, other], key, {})
    assert len(returned.judgements) == 14 and not returned.unfinished
    (problem,) = returned.problems
    assert problem.file == "b.xlsx" and "differs from annotator-1.xlsx, cell E" in problem.what


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda sheet: sheet.delete_cols(5), "there is no column 'better'"),
        (lambda sheet: sheet.delete_rows(1), "there is no column 'code'"),
        (lambda sheet: setattr(sheet["F1"], "value", "Better"), "there is a column 'better' already"),
    ],
)
def test_columns_that_are_gone_or_double(
    results: Path, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    key = sheets(results, tmp_path / "out")
    path = tmp_path / "out" / "sheets" / "annotator-1.xlsx"
    book = openpyxl.load_workbook(path)
    change(book.worksheets[0])
    book.save(path)
    returned = read_sheets([path], key, {})
    assert [message in str(problem) for problem in returned.problems] == [True]


def test_files_that_are_no_sheets(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK no")
    (tmp_path / "b.csv").write_bytes("code,better\nก".encode("cp874"))
    (tmp_path / "c.ods").touch()
    for name, message in (("a.xlsx", "save it again as xlsx"), ("b.csv", "not UTF-8"), ("c.ods", "no xlsx and no csv")):
        with pytest.raises(UserError, match=message):
            read_sheet(tmp_path / name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("soffice") is None, reason="LibreOffice is not installed")
def test_sheets_that_libreoffice_saved(results: Path, tmp_path: Path) -> None:
    key = sheets(results, tmp_path / "out")
    path = tmp_path / "out" / "sheets" / "annotator-1.xlsx"
    filled(path, prefers("two"), key)
    command = ["soffice", f"-env:UserInstallation=file://{tmp_path}/profile", "--headless", "--convert-to"]
    for kind in ("xlsx", "csv:Text - txt - csv (StarCalc):44,34,76"):
        subprocess.run([*command, kind, "--outdir", tmp_path / "saved", path], check=True, capture_output=True)
    for saved in ("annotator-1.xlsx", "annotator-1.csv"):
        returned = read_sheets([tmp_path / "saved" / saved], key, {})
        assert not returned.problems and [one.won for one in returned.judgements] == [0.0] * 15


def test_the_numbers_by_hand() -> None:
    """Four questions, two people: the first system wins 1 + 1, ½ + 1, 0 + 0, and one pair of answers is equal."""
    said = {"a": (1, 1), "b": (0.5, 1), "c": (0, 0)}
    judgements = [
        Judgement(person, 0, id, won, "tie" if won == 0.5 else "AB"[(person + int(won)) % 2], (4, 2 + person))
        for id, both in said.items()
        for person, won in enumerate(both)
    ]
    pair = {"first": "x", "second": "y", "asked": 6, "drawn": ["a", "b", "c", "d", "e"], "equal": ["d"]}
    judge = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0, "e": 1.0, "f": 1.0}
    found = pair_results(pair, judgements, judge)
    # Of a, b, c and d (a tie); e was judged by nobody.
    assert found["win_rate"]["value"] == pytest.approx((1 + 0.75 + 0 + 0.5) / 4) and found["win_rate"]["samples"] == 4
    assert found["worst"] == pytest.approx(2.25 / 5) and found["best"] == pytest.approx(3.25 / 5)
    assert found["wins"] == {"first": 3, "second": 2, "tie": 1} and found["judged"] == 3 and found["equal"] == 1
    assert found["people_agree"]["value"] == pytest.approx(2 / 3)
    # Nominal alpha by hand: 1 - (n - 1) sum o_ck / sum n_c n_k, with n = 6, values 1: 3, 0: 2, ½: 1.
    assert found["alpha"]["interval"]["value"] == pytest.approx(1 - 5 * 2 / (2 * (3 * 2 + 3 * 1 + 2 * 1)))
    # The judge: a 1, b 0, c 0, d a tie, e 1, f 1; corrected by the mean of people - judge on a to d.
    assert found["judge"]["win_rate"]["value"] == pytest.approx(3.5 / 6)
    assert found["judge"]["corrected"]["value"] == pytest.approx(3.5 / 6 + 0.75 / 4)
    assert found["judge"]["agree"]["value"] == pytest.approx(4 / 6)
    assert found["judge"]["agree_without_ties"]["value"] == pytest.approx(4 / 5)
    assert found["judge"]["people_and_judge"] == {
        "first, judge first": 2,
        "first, judge second": 1,
        "second, judge second": 2,
        "tie, judge second": 1,
    }
    assert (
        found["ratings"]["difference"]["value"] == pytest.approx(1.5)
        and found["ratings"]["alpha"]["level"] == "ordinal"
    )


def test_alpha_agrees_with_krippendorffs_own_example() -> None:
    """Four people and 12 units, in Krippendorff (2011), Computing Krippendorff's alpha-reliability, part C."""
    table = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = {
        unit: {person: float(row[unit]) for person, row in enumerate(table) if row[unit] is not None}  # type: ignore[arg-type]
        for unit in range(12)
    }
    nominal, ordinal = alpha(units, "nominal"), alpha(units, "ordinal")
    assert nominal["interval"]["value"] == pytest.approx(0.743, abs=5e-4)
    assert ordinal["interval"]["value"] == pytest.approx(0.815, abs=5e-4)
    assert (nominal["units"], nominal["pairable"]) == (12, 11) and nominal["interval"]["low"] < 0.743
    assert alpha({"a": {1: 1.0}}, "nominal")["why"] == "no row was judged by two people"
    assert alpha({"a": {1: 1.0, 2: 1.0}}, "nominal")["why"] == "all judgements are equal"


@pytest.mark.parametrize("count, drawn, right", [(80, 30, 0.8), (400, 60, 0.95), (60, 60, 0.7)])
def test_a_biased_judge_is_corrected(count: int, drawn: int, right: float) -> None:
    """The judge prefers the first system where it errs; people judge a part."""
    chance, hits = np.random.default_rng(0), 0
    for _ in range(400):
        truth = chance.choice([1, 0.5, 0], p=[0.5, 0.2, 0.3], size=count)
        judge = np.where(chance.random(count) < right, truth, 1.0)
        rows = chance.choice(count, drawn, replace=False)
        found = corrected_interval(judge, rows.tolist(), truth[rows])
        hits += found.low <= 0.6 <= found.high
    assert hits / 400 >= 0.93
    with pytest.raises(ValueError, match="counts once"):
        corrected_interval([1, 0], [0, 0], [1, 0])


def test_the_command_reads_all_and_says_what_is_missing(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    key = sheets(results, out)
    said: list[Any] = []
    with pytest.raises(UserError, match="nobody has judged anything yet"):
        read(out, (), said.append)
    path = out / "sheets" / "annotator-1.xlsx"
    filled(path, lambda code, row: "?" if row["id"] == "0" else prefers("one")(code, row), key)
    with pytest.raises(UserError, match="1 problem in the sheets"):
        read(out, (), said.append)
    assert not (out / "people.json").exists()
    said.clear()
    found = read(out, (), said.append, leave_out=True)
    assert found == json.loads((out / "people.json").read_text())
    (pair,) = found["pairs"]
    assert (
        found["judgements"] == 14
        and len(found["left_out"]) == 1
        and found["unfinished"] == {"annotator-2.csv": [*range(2, 17)]}
    )
    assert pair["judge"]["verdicts"] == 16 and pair["judge"]["win_rate"]["value"] == pytest.approx((1 + 0.5) / 16)
    assert any(isinstance(line, Table) for line in said)
    # Answers that were made again are not those that people judged.
    items = results / "one" / "mt_bench" / "items.jsonl"
    items.write_text(items.read_text().replace("ของหนึ่ง", "ใหม่"))
    said.clear()
    assert read(out, (), said.append, leave_out=True)["pairs"][0]["judge"] is None
    assert any("has other answers" in str(line) for line in said)


def test_bad_wishes_are_refused_in_one_line(results: Path, tmp_path: Path) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            sheets(results, tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()

    refused("--overlap 3: each pair", overlap=3)
    suite(results, "three", ["x"] * 3, [1] * 3)
    refused("were not asked the same questions", all_pairs=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="not empty"):
        sheets(results, tmp_path / "full")
    with pytest.raises(UserError, match="no results of mt_bench for four"):
        write(Wanted(results, "mt_bench", ["one", "four"], tmp_path / "new", 2), print)
    with pytest.raises(UserError, match="write WORD=A"):
        parse_words(["x"])
    with pytest.raises(UserError, match="not A or B"):
        form_of("a", None, None)
    (results / "one" / "mt_bench" / "items.jsonl").write_text('{"id": "1", "bits": 3}\n')
    with pytest.raises(UserError, match=r"items.jsonl:1 holds no question with a visible answer"):
        read_answered(results, "one", "mt_bench")


def test_a_judges_baseline_gives_its_answers_and_verdicts(tmp_path: Path) -> None:
    """As suites with a judge keep it: an item for each turn, with the baseline's answers."""
    place = tmp_path / "one" / "mt_bench"
    place.mkdir(parents=True)
    items = [
        {
            "id": f"{id}/{turn}",
            "cluster": id,
            "questions": ["q", "r"][:turn],
            "turns": [{"visible": "a"}, {"visible": "b"}][:turn],
            "baseline": [f"x{id}", "y"][:turn],
            "win": win,
            "score": win,
        }
        for id, wins in (("1", (1, 0.5)), ("2", (None, 0)), ("3", (None, None)))
        for turn, win in enumerate(wins, 1)
    ]
    (place / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (place / "results.json").write_text(json.dumps({"made_with": {"baseline": "two"}}))
    assert suites_in(tmp_path) == {"mt_bench": ["one", "two"]}
    assert read_answered(tmp_path, "two", "mt_bench")["1"].turns == (("q", "x1"), ("r", "y"))
    out = tmp_path / "out"
    key = write(Wanted(tmp_path, "mt_bench", ["two", "one"], out, 1), lambda line: None)
    assert len(key["rows"]) == 3 and next(iter(key["rows"].values()))["texts"][0] == "[1] q\n\n[2] r"
    filled(out / "sheets" / "annotator-1.xlsx", prefers("two"), key)
    (pair,) = read(out, (), lambda line: None)["pairs"]
    # The judge saw two, the first of the pair, lose and tie on question 1 and win on 2; 3 has no verdict.
    assert pair["judge"]["win_rate"]["value"] == (0.25 + 1) / 2 and pair["judge"]["verdicts"] == 2
    assert pair["win_rate"]["value"] == 1


def test_a_judge_prefers_by_the_turns_that_both_have_a_verdict_on(tmp_path: Path) -> None:
    for name, ratings in (("one", (8, 9)), ("two", (None, 4))):
        place = tmp_path / name / "mt_bench"
        place.mkdir(parents=True)
        items = [
            {"id": f"1/{turn}", "cluster": "1", "questions": ["q", "r"][:turn], "rating": rating}
            for turn, rating in enumerate(ratings, 1)
        ]
        (place / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    assert preferences(tmp_path, "mt_bench", "one", "two") == {"1": 1.0}
    path = tmp_path / "two" / "mt_bench" / "items.jsonl"
    # Of turn 2 alone, which is 9 and 8.5 here: the first's mean of both turns is 8.5, as much.
    path.write_text(path.read_text().replace(": 4}", ": 8.5}"))
    assert preferences(tmp_path, "mt_bench", "one", "two") == {"1": 1.0}
    assert preferences(tmp_path, "mt_bench", "two", "one") == {"1": 0.0}


def test_an_apostrophe_of_the_text_is_not_that_of_the_spreadsheet() -> None:
    assert same("'90s music") == same("''90s music") == same("'  '90s  music") != same("80s music")


def test_the_ratings_of_one_question_are_drawn_together() -> None:
    units = {(id, side): {1: float(id + side), 2: float(id)} for id in range(6) for side in (0, 1)}
    apart, together = (
        alpha(units, "ordinal"),
        alpha(units, "ordinal", lambda unit: unit[0]),
    )
    assert apart["interval"]["value"] == together["interval"]["value"]
    assert (apart["interval"]["samples"], together["interval"]["samples"]) == (12, 6)


def test_texts_of_any_length_and_letter_fit_a_cell() -> None:
    assert conversation(["a\x00b\x0bc\r\nd"]) == "a\ufffdb\ufffdc\nd"
    long = conversation(["😀" * 20_000])
    assert len(long.encode("utf-16-le")) <= 2 * CELL and long.endswith("[cut: longer than a cell]")
    assert [needs_mark(text) for text in (*DANGEROUS, "สวัสดี", "no number")] == [True] * 7 + [False] * 2
