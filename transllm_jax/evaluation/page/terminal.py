"""The results in the terminal: the before/after table, the findings, and one conversation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from transllm_jax.evaluation.advice.recorded import PAGE
from transllm_jax.evaluation.page.asked import table_of_kinds
from transllm_jax.evaluation.page.measures import (
    ARROWS,
    BASE,
    NOT_MEASURED,
    Results,
    clean,
    language_name,
    point_label,
    points,
    rows,
    section,
)

_COLOURS = {"better": "green", "worse": "red"}


def summary_table(results: Results) -> Table:
    """The measures before (the original model) and after each stage, with the direction that is better."""
    where = points(results)
    # Text, not str: rich would read "[...]" inside a string as markup.
    table = Table(
        title=Text(clean(results.get("title") or "Before and after"), style="bold"),
        title_justify="left",
        caption_justify="left",
        # Five points and the change fit in 80 columns only without borders.
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("")
    for place, point in enumerate(where):
        table.add_column(
            Text(point_label(point)),
            justify="right",
            no_wrap=True,
            style="bold" if place == len(where) - 1 else None,
        )
    table.add_column("change", justify="right", no_wrap=True)
    notes = ["↓ lower is better  ↑ higher is better  – not measured"]
    for row in rows(results):
        change = row.change
        cells = [Text("–" if row.values[point] is None else row.text(point)) for point in where]
        if change is None:
            moved = Text("–")
        else:
            moved = Text(change.text.replace("points", "pts"), style=_COLOURS.get(change.verdict, ""))
            if change.since != BASE:
                notes.append(f"{row.short}: change since {point_label(change.since)}")
            if change.until != where[-1]:
                notes.append(f"{row.short}: change until {point_label(change.until)}")
        table.add_row(Text(f"{row.short} {ARROWS[row.measure.better]}".rstrip()), *cells, moved)
    table.caption = Text("\n".join(notes))
    return table


def asked_lines(results: Results) -> Iterator[RenderableType]:
    """What became of the questions with known answers: a sentence, and a table by kind; nothing if none were asked."""
    asked = table_of_kinds(results)
    if asked is None:
        return
    yield Text(f"\n{asked.sentence}")
    if asked.rows:
        title = Text(f"Asked in {language_name(results)}, by kind of question", "dim")
        table = Table(
            title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim"
        )
        table.add_column("")
        for heading in asked.headings:
            table.add_column(Text(heading), justify="right")
        for place, (kind, values) in enumerate(asked.rows):
            style = "bold" if place and place == len(asked.rows) - 1 else ""
            table.add_row(Text(kind), *(Text(str(value)) for value in values), style=style)
        yield table


def findings_lines(findings: Iterable[Mapping[str, Any]]) -> RenderableType | None:
    """The findings, numbered: a line on what was found where, and one on what to do, with keys and present values.

    findings: as `Finding.written` gives them. None if there are none.
    """
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(justify="right", style="dim")
    table.add_column()
    for number, finding in enumerate(findings, 1):
        what = Text.assemble((clean(finding.get("topic")), "bold"), f" ({clean(finding.get('stage'))}). ")
        turn = Text(f"→ {clean(finding.get('turn'))} ")
        keys = Text(", ".join(f"{key} ({now})" if now else key for key, now in keys_of(finding)), "cyan")
        table.add_row(str(number), Text.assemble(what, clean(finding.get("what")), "\n", turn, keys))
    if not table.row_count:
        return None
    return Group(Text.assemble(("What to do next", "bold"), (f"  {PAGE} has a section on each", "dim")), table)


def keys_of(finding: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The config keys of a finding, each with its present value as text; empty if it is unset or not one value."""
    for key, value in section(finding, "keys").items():
        text = f"{value:g}" if isinstance(value, float) else "" if value is None else clean(value)
        yield clean(key), text


def conversation_panel(results: Results, index: int = 0, *, asked: bool = False) -> RenderableType:
    """Conversation `index`: the question, the chain step by step, the answer, and the original's answer.

    asked: of the questions with known answers; the panel then says whether the answer is right. If the results have no
    such conversation, the panel says so.
    """
    conversations = (section(results, "asked") if asked else results).get("conversations") or []
    name = language_name(results)
    if not 0 <= index < len(conversations):
        return Panel(Text(f"Conversation: {NOT_MEASURED}"), title="Conversation", title_align="left")
    talk = conversations[index]
    lines: list[RenderableType] = []

    def step(label: str, text: object, style: str = "", heading: str = "dim") -> None:
        # The text is on a line of its own, since terminals disagree about the width of many scripts.
        lines.extend([Text(label, style=heading), Text(clean(text).strip() or "(empty)", style=style), Text()])

    step(f"Question in {name}", talk.get("question"), "bold")
    chain = talk.get("chain")
    if chain:
        step("Chain 1  question in English", chain.get("question_en"))
        step("Chain 2  answer in English", chain.get("answer_en"))
        step(f"Chain 3  answer in {name}", chain.get("answer_target"))
    else:
        step("The chain is not well formed; as the model wrote it", talk.get("raw"), heading="yellow")
    mark = ("Right answer" if talk.get("right") else "Wrong answer") if asked else "Answer"
    step(mark, talk.get("visible"), "bold", "dim" if not asked else "green" if talk.get("right") else "red")
    if talk.get("base") is not None:
        step("The original model answered", talk["base"], "dim")
    return Panel(Group(*lines[:-1]), title=f"Conversation {index + 1} of {len(conversations)}", title_align="left")
