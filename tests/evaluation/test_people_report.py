"""What people said, in a run's report and below a suite's table: beside the judge, and only of the same answers."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from evaluation.report_sample import Page, section, terminal, text_of

from transllm_jax.commands.sheets import Wanted, form_of, read, write
from transllm_jax.disk import read_json
from transllm_jax.errors import UserError
from transllm_jax.evaluation.page.report import refreshed_report
from transllm_jax.evaluation.page.suites import IN_WORKDIR
from transllm_jax.evaluation.people.kept import PEOPLE, kept

# Eight questions: the judge finds the first system, `new`, better in six; then a tie, then worse.
RATINGS = {"new": [8, 8, 8, 8, 8, 8, 5, 3], "old": [5] * 8}
# By question: what each of two people says of `new`. Nobody judges the last question.
SAID = [("+", "+"), ("+", "+"), ("+", "+"), ("+", "+"), ("+", "="), ("-", "-"), ("-", "-"), ("", "")]


def answer(results: Path, system: str, ratings: list[int], said: str = "says") -> None:
    place = results / system / "mt_bench"
    place.mkdir(parents=True, exist_ok=True)
    items = [
        {"id": str(number), "question": f"คำถาม {number}", "visible": f"{system} {said} {number}", "rating": rating}
        for number, rating in enumerate(ratings)
    ]
    (place / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    found = {"measure": "rating", "asked": 8, "parsed": 8, "notes": [], "contamination": None, "made_with": {}}
    (place / "results.json").write_text(json.dumps(found))


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A finished run with the suite `mt_bench` of two systems."""
    path = tmp_path / "run"
    for system, ratings in RATINGS.items():
        answer(path / IN_WORKDIR, system, ratings)
    # The report of a run without curves is made faster.
    (path / "evaluation" / "results.json").write_text(json.dumps({"language": {"code": "th", "name": "Thai"}}))
    (path / "report.html").touch()
    refreshed_report(path)
    return path


def sheets(workdir: Path, name: str = "sheets", said: list[tuple[str, str]] = SAID, **options: Any) -> Path:
    """Sheets that two people have filled in, as csv."""
    out = workdir.parent / name
    write(Wanted(workdir, "mt_bench", ["new", "old"], out, 2, **options), lambda line: None)
    fill(out, said)
    return out


def fill(out: Path, said: list[tuple[str, str]]) -> None:
    key = read_json(out / "key.json")
    for person in (1, 2):
        path = out / "sheets" / f"annotator-{person}.csv"
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines(keepends=True)))
        place = next(number for number, heading in enumerate(rows[0]) if heading.startswith("better"))
        for row in rows[1:]:
            about = key["rows"][row[0]]
            is_new = {True: "A", False: "B"}[about["a"] == "new"]
            is_old = {"A": "B", "B": "A"}[is_new]
            row[place] = {"+": is_new, "-": is_old, "=": "tie", "": ""}[said[int(about["id"])][person - 1]]
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)


def page_of(workdir: Path) -> str:
    return (workdir / "report.html").read_text(encoding="utf-8")


def told(workdir: Path) -> str:
    return text_of(section(page_of(workdir), "suite-mt_bench"))


def interval(found: dict[str, Any], *, share: bool = True) -> str:
    """As the page writes it: 0.5 is 50 %, and −0.5 has a minus sign."""
    ends = [f"{100 * found[end]:.1f}".removesuffix(".0") + " %" if share else f"{found[end]:.2f}" for end in ENDS]
    return f"{ends[0]} {ends[1]} to {ends[2]}".replace("-", "−")


ENDS = ("value", "low", "high")


def test_the_report_has_what_people_said_beside_the_judge(workdir: Path) -> None:
    before = page_of(workdir)
    out, lines = sheets(workdir), list[Any]()
    found = read(out, (), lines.append)
    (pair,) = found["pairs"]
    # By hand: 4 questions won, 1 with a win and a tie, 2 lost.
    assert pair["win_rate"]["value"] == pytest.approx(4.75 / 7)
    # The judge: 6 won, a tie, 1 lost, of 8; of the 7 that people judged, 6.5 won.
    assert pair["judge"]["win_rate"]["value"] == pytest.approx(6.5 / 8)
    assert pair["judge"]["corrected"]["value"] == pytest.approx(6.5 / 8 + (4.75 - 6.5) / 7)
    text = told(workdir)
    assert "Judged by people: new against old" in text and "new wins, ties as halves" in text
    for line in (
        f"people {interval(pair['win_rate'])} 7 of 8 questions",
        f"judge {interval(pair['judge']['win_rate'])} 8 of 8 questions",
        f"judge, corrected by people {interval(pair['judge']['corrected'])} 7 questions that both judged",
        f"two people say the same {interval(pair['people_agree'])} 7 questions",
        f"Krippendorff's alpha {interval(pair['alpha']['interval'], share=False)} 7 questions that two or more judged",
        f"people and judge say the same {interval(pair['judge']['agree'])} 7 questions",
        f"where neither says tie {interval(pair['judge']['agree_without_ties'])} 6 questions",
    ):
        assert line in text, line
    assert "67.9 %" in text and "81.2 %" in text and "56.2 %" in text and "85.7 %" in text and "0.73" in text
    assert "14 judgements of 2 people: new preferred 9 times, old 4, tie 1; by side, A " in text
    assert (
        "Nobody has judged 1 of 8 questions: new wins 59.4 % if it lost all of them, and 71.9 % if it won all." in text
    )
    labels = [
        tag["aria-label"] for name, tag in Page(section(page_of(workdir), "suite-mt_bench")).tags if name == "svg"
    ]
    (label,) = [label for label in labels if label and label.startswith("people, mt_bench, new against old: ")]
    assert "people 67.9 % (" in label and "judge 81.2 % (" in label and "judge, corrected 56.2 % (" in label
    # The same numbers in the terminal.
    printed = "\n".join(line if isinstance(line, str) else terminal(line, 120) for line in lines)
    assert "new wins, ties as halves" in printed and re.search(r"  judge, corrected by people +56.2% \(", printed)
    assert f"report   {workdir}/report.html" in printed
    # All else is as it was, and without them all is.
    assert re.sub(r'<div class="people">.*?</figure></div>\s*</div>\n', "", page_of(workdir), flags=re.DOTALL) == before
    (workdir / IN_WORKDIR / PEOPLE).unlink()
    refreshed_report(workdir)
    assert page_of(workdir) == before and 'class="people"' not in before


def test_ratings_and_rows_that_were_left_out(workdir: Path) -> None:
    out = sheets(workdir, form=form_of("tie", 5, None))
    path = out / "sheets" / "annotator-1.csv"
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines(keepends=True)))
    a, b = (next(n for n, heading in enumerate(rows[0]) if heading.startswith(f"rating {side}")) for side in "AB")
    key = read_json(out / "key.json")
    for row in rows[1:]:
        is_new = key["rows"][row[0]]["a"] == "new"
        row[a], row[b] = ("4", "1") if is_new else ("1", "4")
    rows[1][a] = "6"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    (pair,) = read(out, (), lambda line: None, leave_out=True)["pairs"]
    text, rated = told(workdir), pair["ratings"]
    assert f"new 4.00 4.00 to 4.00 {rated['first']['samples']} questions" in text
    assert f"new minus old 3.00 3.00 to 3.00 {rated['difference']['samples']} questions" in text
    assert "Krippendorff's alpha, ordinal no row was judged by two people – 0 answers that two or more rated" in text
    # The last question has ratings without a choice.
    assert f"{len(read_json(out / PEOPLE)['left_out'])} rows of the sheets had a problem and were left out" in text


def test_sheets_that_are_read_again_replace_their_numbers(workdir: Path) -> None:
    out = sheets(workdir)
    read(out, (), lambda line: None)
    fill(out, [*SAID[:7], ("+", "+")])
    read(out, (), lambda line: None)
    text = told(workdir)
    assert text.count("Judged by people") == 1 and "8 of 8 questions" in text and "16 judgements" in text
    # Other sheets of the same two are another sample.
    other = sheets(workdir, "other", [("-", "-")] * 8, seed=3)
    read(other, (), lambda line: None)
    page = page_of(workdir)
    text = text_of(section(page, "suite-mt_bench"))
    assert f"new against old, {out}" in text and f"new against old, {other}" in text
    assert "people 0 % 0 % to " in text and len(kept(workdir / IN_WORKDIR, "mt_bench")) == 2
    ids = [tag["id"] for _, tag in Page(page).tags if "id" in tag]
    assert len(set(ids)) == len(ids)


def test_people_have_judged_the_answers_that_are_shown(workdir: Path) -> None:
    out = sheets(workdir)
    read(out, (), lambda line: None)
    answer(workdir / IN_WORKDIR, "new", RATINGS["new"], "now says")
    refreshed_report(workdir)
    text = told(workdir)
    assert f"The answers are no longer those that people judged with the sheets in {out}" in text
    assert "ties as halves" not in text and "14 judgements" not in text
    # As they were, they count again.
    answer(workdir / IN_WORKDIR, "new", RATINGS["new"])
    refreshed_report(workdir)
    assert "14 judgements" in told(workdir)


def test_verdicts_that_came_later_are_not_those_that_people_were_compared_with(workdir: Path) -> None:
    out = sheets(workdir)
    read(out, (), lambda line: None)
    answer(workdir / IN_WORKDIR, "new", [3, *RATINGS["new"][1:]])
    refreshed_report(workdir)
    text = told(workdir)
    assert "Verdicts came or changed after the sheets were read, and only people's numbers are here" in text
    assert f"transllm evaluate sheets read {out}." in text
    assert "people 67.9 %" in text and "corrected by people" not in text and "people and judge" not in text
    read(out, (), lambda line: None)
    assert "corrected by people" in told(workdir) and "came or changed" not in told(workdir)


def test_results_that_were_moved(workdir: Path, tmp_path: Path) -> None:
    out = sheets(workdir)
    moved = workdir.rename(tmp_path / "moved")
    lines = list[Any]()
    assert read(out, (), lines.append)["pairs"][0]["judge"] is None
    assert any("no comparison with the judge" in line for line in lines if isinstance(line, str))
    assert not workdir.exists()
    read(out, (), lambda line: None, results=moved)
    assert "corrected by people" in told(moved)
    with pytest.raises(UserError, match="nowhere does not exist"):
        read(out, (), lambda line: None, results=tmp_path / "nowhere")


def test_names_are_text(tmp_path: Path, workdir: Path) -> None:
    results = workdir / IN_WORKDIR
    (results / "new").rename(results / "<b>new")
    out = tmp_path / "<i>sheets"
    write(Wanted(workdir, "mt_bench", ["<b>new", "old"], out, 2), lambda line: None)
    fill(out, SAID)
    read(out, (), lambda line: None)
    part = section(page_of(workdir), "suite-mt_bench")
    assert "&lt;b&gt;new against old" in part and "<b>new" not in part and "<i>sheets" not in part


def test_a_file_that_is_not_what_is_kept(workdir: Path) -> None:
    out = sheets(workdir)
    read(out, (), lambda line: None)
    (workdir / IN_WORKDIR / PEOPLE).write_bytes((out / PEOPLE).read_bytes())
    with pytest.raises(UserError, match=r"people\.json is not what `transllm evaluate sheets read` keeps there"):
        refreshed_report(workdir)


def test_evaluate_says_it_below_the_suites_table(transllm: Command, tmp_path: Path) -> None:
    """A suite without a judge: people are compared with its scores."""
    asked = [{"question": f"คำถาม {number}", "answers": [f"คำตอบ {number}"]} for number in range(8)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")

    def answers(name: str, is_right: Callable[[int], bool]) -> str:
        rows = [
            {"question": row["question"], "answer": f"คำตอบ {number}" if is_right(number) else f"{name} ไม่รู้ {number}"}
            for number, row in enumerate(asked)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return f"{name}=answers:{path}"

    out = tmp_path / "run" / IN_WORKDIR
    systems = (answers("new", lambda number: number < 6), answers("old", lambda number: number == 7))
    command = ("evaluate", *systems, "--suite", "answers", "--language", "th", "--out", out)
    command += ("--questions", tmp_path / "asked.jsonl")
    code, printed = transllm(*command)
    assert code == 0 and "people" not in printed, printed
    code, printed = transllm("evaluate", "sheets", "write", out, "--annotators", 2, "--out", tmp_path / "sheets")
    assert code == 0, printed
    ids = sorted(row["id"] for row in read_json(tmp_path / "sheets" / "key.json")["rows"].values())[::2]
    by_id = dict(zip(ids, SAID, strict=True))
    fill(tmp_path / "sheets", [by_id.get(str(number), ("", "")) for number in range(9)])
    code, printed = transllm("evaluate", "sheets", "read", tmp_path / "sheets")
    assert code == 0 and "people and scores say the same" in printed and "people and judge" not in printed, printed
    code, printed = transllm(*command)
    line = next(line for line in printed.splitlines() if "ties as halves" in line)
    assert code == 0 and line.startswith("  new wins, ties as halves, against old: people 67.9% (")
    assert "7 of 8 questions; scores " in line and "; scores, corrected by people " in line
