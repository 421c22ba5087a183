"""`transllm evaluate sheets`: sheets for people who compare answers, and what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from transllm_jax.disk import read_json, sha256_of, write_json
from transllm_jax.errors import UserError
from transllm_jax.evaluation.page.report import report_beside
from transllm_jax.evaluation.page.suites import IN_WORKDIR
from transllm_jax.evaluation.people.agreement import check_krippendorff, pair_results
from transllm_jax.evaluation.people.files import EXTENSIONS, check_openpyxl
from transllm_jax.evaluation.people.kept import PEOPLE, answers_now, keep
from transllm_jax.evaluation.people.numbers import counts_of, numbers_of, remarks_on, written
from transllm_jax.evaluation.people.read import Returned, parse_words, read_sheets, rows_of
from transllm_jax.evaluation.people.sheet import Form
from transllm_jax.evaluation.people.write import KEY, SHEETS, Plan, check_plan, write_sheets
from transllm_jax.evaluation.suites.answered import preferences, read_answered, suites_in
from transllm_jax.new_directory import check_destination, new_directory


@dataclass(frozen=True)
class Wanted:
    """What `write` is asked for.

    results: a directory `RESULTS/SYSTEM/SUITE`, or a work directory that has one. systems: their names; empty for all
    that the suite was run on. all_pairs: each with each other, rather than the first with each of the others.
    """

    results: Path
    suite: str | None
    systems: Sequence[str]
    out: Path
    annotators: int
    overlap: int | None = None
    questions: int | None = None
    all_pairs: bool = False
    seed: int = 0
    form: Form = field(default_factory=Form)


def form_of(tie: str, ratings: int | None, instructions: Path | None) -> Form:
    """What annotators fill in. Raises UserError for a word that means something else, and for a file without text."""
    tie = tie.strip()
    if not tie or tie.casefold() in ("a", "b") or set(tie) & set('",'):
        raise UserError(f"--tie {tie!r}: give a word that is not A or B, without commas and quotes")
    text = ""
    if instructions is not None:
        try:
            text = instructions.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{instructions} cannot be read as UTF-8 text: {error}") from None
        if not text:
            raise UserError(f"{instructions} is empty; write what annotators should do, or leave --instructions out")
    return Form(tie, ratings, text)


def write(wanted: Wanted, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the sheets and the key, which is returned. Raises UserError for what is missing or does not fit."""
    check_openpyxl()
    check_destination(wanted.out)
    results = _results_in(wanted.results)
    suite, names = _chosen(results, wanted)
    systems = {name: read_answered(results, name, suite) for name in names}
    pairs = list(combinations(names, 2)) if wanted.all_pairs else [(names[0], other) for other in names[1:]]
    plan = Plan(pairs, wanted.annotators, wanted.overlap or wanted.annotators, wanted.questions, wanted.seed)
    check_plan(plan)
    with new_directory(wanted.out) as directory:
        about = {"suite": suite, "results": str(results.resolve())}
        key = write_sheets(directory, systems, plan, wanted.form, about)
    for pair in key["pairs"]:
        equal = len(set(pair["equal"]) & set(pair["drawn"]))
        say(
            f"{pair['first']} and {pair['second']}: {len(pair['drawn'])} of {pair['asked']} questions"
            + (f", {equal} with equal answers, which are ties that nobody has to judge" if equal else "")
        )
    counts = [sum(row["annotator"] == person for row in key["rows"].values()) for person in _people(key)]
    rows = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    say(f"{wanted.annotators} people with {rows} rows each; {plan.overlap} judge each pair of answers")
    say(f"sheets  {wanted.out / SHEETS}: give each person one file, the xlsx or the csv, and how-to.txt")
    say(f"key     {wanted.out / KEY}: says whose answer is whose; keep it from them")
    return key


def read(
    directory: Path,
    files: Sequence[Path],
    say: Callable[[str | Table], None],
    *,
    words: Sequence[str] = (),
    leave_out: bool = False,
    results: Path | None = None,
) -> dict[str, Any]:
    """Read sheets back, write people.json beside the key and return it; keep the numbers beside the suite's results,
    and write the report of their run again.

    files: the sheets; empty for those in `DIRECTORY/sheets`. words: see `parse_words`. leave_out: rows with a problem
    are left out and counted, rather than the end of the command. results: where the suite's results are now. Raises
    UserError for problems, each in a line that was said before.
    """
    check_openpyxl()
    check_krippendorff()
    key = _key(directory / KEY)
    paths = list(files) or sorted(
        path
        for path in (directory / SHEETS).iterdir()
        if path.suffix.lower() in EXTENSIONS and path.name[0] not in ".~"
    )
    if not paths:
        raise UserError(f"{directory / SHEETS} holds no sheets; give the files that came back")
    returned = read_sheets(paths, key, parse_words(words))
    for problem in returned.problems:
        say(str(problem))
    _say_unfinished(returned, say)
    if returned.problems and not leave_out:
        count = len(returned.problems)
        raise UserError(
            f"{count} problem{'s' if count > 1 else ''} in the sheets, listed above; correct the cells, say what words "
            "mean with --word, or leave these rows out with --leave-out"
        )
    if not returned.judgements:
        raise UserError(f"nobody has judged anything yet in {len(paths)} files")
    where = Path(key["results"]) if results is None else _results_in(results)
    pairs = []
    for number, pair in enumerate(key["pairs"]):
        mine = [one for one in returned.judgements if one.pair == number]
        judge = _judge_of(where, key["suite"], pair, say)
        pairs.append(pair_results(pair, mine, judge))
    found = {
        "suite": key["suite"],
        "pairs": pairs,
        "rows": len(key["rows"]),
        "judgements": len(returned.judgements),
        "left_out": [str(problem) for problem in returned.problems],
        "unfinished": returned.unfinished,
        "missing": {str(person): count for person, count in returned.missing.items()},
        "files": {str(path): sha256_of(path) for path in paths},
    }
    write_json(directory / PEOPLE, found)
    for result in pairs:
        say(shown(key["suite"], result))
        for remark in (counts_of(result), *remarks_on(result)):
            say(f"  {remark}")
    say(f"results  {directory / PEOPLE}")
    # Results that were moved are found again with --results.
    if where.is_dir():
        keep(where, directory, key, found)
        if report := report_beside(where):
            say(f"report   {report}")
    return found


def shown(suite: str, pair: Mapping[str, Any]) -> Table:
    """The numbers of a pair of systems as a table for a terminal."""
    title = f"{pair['first']} against {pair['second']}, judged by people"
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False, box=None)
    table.add_column("measure")
    table.add_column("value")
    table.add_column("of", style="dim")
    for group in numbers_of(suite, pair):
        table.add_row(Text(group.title))
        for line in group.lines:
            table.add_row(Text(f"  {line.name}"), Text(written(line)), Text(line.of))
    return table


def _results_in(path: Path) -> Path:
    if (path / IN_WORKDIR).is_dir():
        return path / IN_WORKDIR
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a work directory, or the --out of transllm evaluate")
    return path


def _chosen(results: Path, wanted: Wanted) -> tuple[str, list[str]]:
    """The suite, and the names of the systems."""
    suites = suites_in(results)
    several = {suite: names for suite, names in suites.items() if len(names) > 1}
    suite = wanted.suite
    if suite is None:
        if len(several) != 1:
            have = f"has several: {', '.join(several)}" if several else "has no suite of two systems"
            raise UserError(f"{results} {have}; say which one with --suite, or evaluate two systems with one command")
        (suite,) = several
    names = suites.get(suite, [])
    for name in wanted.systems:
        if name not in names:
            raise UserError(f"{results} has no results of {suite} for {name}; it has {', '.join(names) or 'none'}")
    names = list(dict.fromkeys(wanted.systems)) or names
    if len(names) < 2:
        raise UserError(f"people compare two systems; {results} has {suite} of {', '.join(names) or 'none'} only")
    return suite, names


def _key(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path} does not exist; give the directory that `transllm evaluate sheets write` made")
    key = read_json(path)
    if not key.keys() >= {"rows", "pairs", "form", "suite", "results"}:
        raise UserError(f"{path} is no key of sheets; give the directory that `transllm evaluate sheets write` made")
    return key


def _people(key: Mapping[str, Any]) -> range:
    return range(1, key["plan"]["annotators"] + 1)


def _say_unfinished(returned: Returned, say: Callable[[str], None]) -> None:
    for file, rows in returned.unfinished.items():
        say(f"{file}: no choice yet in {len(rows)} rows: {rows_of(rows)}")
    for person, count in sorted(returned.missing.items()):
        say(f"person {person}: {count} rows are in none of the files")


def _judge_of(
    results: Path, suite: str, pair: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, float] | None:
    """The judge's preferences; None if there is no judge, or the answers have changed since the sheets were written."""
    names = pair["first"], pair["second"]
    try:
        now = answers_now(results, suite, pair, pair["hashes"])
    except UserError as error:
        say(f"no comparison with the judge: {error}")
        return None
    for id, hashes in pair["hashes"].items():
        if now[id] != hashes:
            say(
                f"no comparison with the judge: question {id} has other answers in {results} than in the sheets; give "
                "the results that the sheets were made from: --results DIR"
            )
            return None
    found = preferences(results, suite, *names)
    if not found:
        say(f"no comparison with the judge: {suite} of {names[0]} and {names[1]} has no scores in {results}")
    return found or None
