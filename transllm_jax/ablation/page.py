"""The results of an ablation as a page in Markdown: a table with intervals, where chains fail, and what follows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from transllm_jax.ablation import numbers
from transllm_jax.ablation.numbers import Holds
from transllm_jax.ablation.results import Found
from transllm_jax.ablation.table import BRIDGE, FULL, INSIDE, ORIGINAL, OVERLAYS, THROUGH
from transllm_jax.evaluation.suites.results import Interval
from transllm_jax.words import duration

LABELS = {
    ORIGINAL: "the original, asked directly",
    BRIDGE: "the original between two translations of stage 3",
    INSIDE: "the full method's chains, English answered by the original",
    **{overlay.name: overlay.label for overlay in OVERLAYS},
}
# How a chain can fail, in the order of its parts, as a reader calls it.
FAILURES = {
    "misread": "question misread",
    "english": "English wrong",
    "translation": "mistranslated",
    "form": "form broken",
}
SHARES: dict[str, Holds] = {
    "understood": numbers.understood,
    "English right in the chain": numbers.chain_english,
    "right in the language": numbers.right,
    "right asked in English": numbers.english,
}
# Measures of a run that are one number: heading, name, digits.
NUMBERS = (("English drift, KL", "english_kl", 3), ("bits per byte", "bits_per_byte", 3))
NONE = "–"


def by_variant(found: Iterable[Found]) -> dict[str, list[Found]]:
    """The runs by variant, in the order of the table, each in the order of seeds."""
    groups: dict[str, list[Found]] = defaultdict(list)
    for one in sorted(found, key=lambda one: -1 if one.seed is None else one.seed):
        groups[one.name].append(one)
    return {name: groups[name] for name in LABELS if name in groups}


def page(found: Sequence[Found], does_not_apply: Mapping[str, str], plot: str | None) -> str:
    """The page. plot: the path of the plot from it. Every number has its interval and its number of samples."""
    groups = by_variant(found)
    full = groups.get(FULL.name, [])
    parts = [
        _made(found),
        _table(groups, full),
        _read_so(groups),
        *([f"![Right answers of each variant, with intervals]({plot})"] if plot else []),
        "## Against the full method",
        _against(groups, full),
        "## Where chains fail",
        _failures(groups),
    ]
    if does_not_apply:
        rows = "\n".join(f"| `{name}` | {LABELS[name]} | {why} |" for name, why in does_not_apply.items())
        parts += ["## Not run", f"| variant | | why |\n|---|---|---|\n{rows}"]
    return "\n\n".join(parts) + "\n"


def _made(found: Sequence[Found]) -> str:
    trained = [one for one in found if one.name not in (ORIGINAL, *THROUGH)]
    versions = sorted({str(one.made_with.get("version")) for one in trained})
    commits = sorted({str(one.made_with.get("commit")) for one in trained} - {"None"})
    of = f", commit {', '.join(commits)}" if commits else ""
    machines = sorted({str(one.made_with.get("machine")) for one in trained})
    seconds = sum(one.seconds for one in trained)
    runs = f"{len(trained)} run{'s' if len(trained) > 1 else ''}"
    return f"{runs} in {duration(seconds)} of work ({'; '.join(machines)}), by transllm-jax {', '.join(versions)}{of}."


def _table(groups: Mapping[str, Sequence[Found]], full: Sequence[Found]) -> str:
    heading = ["variant", "seeds", "tokens", *SHARES, *(title for title, _, _ in NUMBERS)]
    rows = []
    for name, runs in groups.items():
        cells = [_label(name), _seeds(runs), _tokens(runs)]
        cells += [
            _percent(numbers.share(runs, holds), bold=title == "right in the language")
            for title, holds in SHARES.items()
        ]
        cells += [_number(numbers.number(runs, key), digits) for _, key, digits in NUMBERS]
        rows.append(cells)
    return _markdown(heading, rows)


def _read_so(groups: Mapping[str, Sequence[Found]]) -> str:
    questions = sorted({len(one.questions) for runs in groups.values() for one in runs})
    seeds = max((len(runs) for runs in groups.values()), default=0)
    of = " or ".join(map(str, questions))
    text = (
        f"Shares are of {of} questions, asked of every seed; in parentheses 95 % intervals. Those of shares draw "
        "questions and seeds anew; those of other numbers are Student's, over seeds."
    )
    if seeds < 2:
        return f"{text} **With one seed, intervals of shares are over questions alone, and other numbers have none.**"
    return f"{text} With {seeds} seeds, what seeds contribute is itself known roughly."


def _against(groups: Mapping[str, Sequence[Found]], full: Sequence[Found]) -> str:
    if not full:
        return "The full method has not been run yet."
    heading = ["variant", "right in the language", "right asked in English", "English drift, KL", "bits per byte", ""]
    rows = []
    for name, runs in groups.items():
        if name == FULL.name:
            continue
        right = numbers.difference(runs, full, numbers.right)
        cells = [_label(name), _points(right), _points(numbers.difference(runs, full, numbers.english))]
        cells += [_signed(numbers.number_difference(runs, full, key), digits) for _, key, digits in NUMBERS]
        rows.append([*cells, _verdict(right, runs, full)])
    return "Differences on the same questions and seeds; positive is more.\n\n" + _markdown(heading, rows)


def _verdict(right: Interval | None, runs: Sequence[Found], full: Sequence[Found]) -> str:
    """What follows for right answers; of a rival that wins, also whether it had as many tokens."""
    if right is None:
        return NONE
    if right.high < 0:
        return "fewer right answers"
    if right.low <= 0:
        return "not told apart"
    tokens, fulls = ({one.tokens for one in found} for found in (runs, full))
    if len(tokens) == len(fulls) == 1 and None not in tokens | fulls:
        (own,), (others,) = tokens, fulls
        assert own is not None and others is not None
        at = "equal tokens" if abs(own - others) <= 0.02 * max(own, others) else f"{own:,} tokens against {others:,}"
        return f"**beats the full method at {at}**"
    return "**beats the full method**"


def _failures(groups: Mapping[str, Sequence[Found]]) -> str:
    heading = ["variant", *(f"{title}" for title in FAILURES.values()), "right"]
    rows = []
    for name, runs in groups.items():
        shares = {reason: numbers.share(runs, numbers.failed_by(reason)) for reason in FAILURES}
        if all(share is None for share in shares.values()):
            continue
        rows.append([_label(name), *map(_percent, shares.values()), _percent(numbers.share(runs, numbers.right))])
    if not rows:
        return "No variant answers in chains."
    return (
        "The first part of a chain that went wrong, as a share of all questions. Variants that answer directly have no "
        "chain.\n\n" + _markdown(heading, rows)
    )


def _label(name: str) -> str:
    label = f"{LABELS[name]} (`{name}`)"
    return f"**{label}**" if name == FULL.name else label


def _seeds(runs: Sequence[Found]) -> str:
    return NONE if runs[0].seed is None else ", ".join(str(one.seed) for one in runs)


def _tokens(runs: Sequence[Found]) -> str:
    known = sorted({one.tokens for one in runs if one.tokens is not None})
    return " to ".join(f"{number:,}" for number in dict.fromkeys(known[:1] + known[-1:])) or NONE


def _percent(interval: Interval | None, *, bold: bool = False) -> str:
    if interval is None:
        return NONE
    value = f"{interval.value:.1%}"
    return f"{f'**{value}**' if bold else value} ({interval.low:.0%}–{interval.high:.0%})"


def _number(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return NONE
    text = f"{interval.value:.{digits}f}"
    return text if interval.samples < 2 else f"{text} ({interval.low:.{digits}f}–{interval.high:.{digits}f})"


def _points(interval: Interval | None) -> str:
    return _with_sign(interval, lambda value: f"{100 * value:+.1f}", "points")


def _signed(interval: Interval | None, digits: int) -> str:
    return _with_sign(interval, lambda value: f"{value:+.{digits}f}", "")


def _with_sign(interval: Interval | None, write: Callable[[float], str], unit: str) -> str:
    if interval is None:
        return NONE
    value, low, high = (write(number) for number in (interval.value, interval.low, interval.high))
    text = f"{value} {unit}".strip()
    return text if interval.samples < 2 else f"{text} ({low} to {high})"


def _markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
