"""Small plots as inline SVG that takes its colours and font from the page around it, and one plot as a file.

For the page, matplotlib draws with placeholder colours, which are then replaced by the page's CSS variables: one
drawing serves light mode, dark mode and print. Text stays text. matplotlib is imported when the first plot is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from transllm_jax.evaluation.page.measures import BASE, Row, number, point_label, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colour -> CSS variable of the page. The colours only have to differ from each other.
_INK, _MUTED, _LINE, _ACCENT, _SOFT, _BEFORE = (
    "#010101",
    "#020202",
    "#030303",
    "#040404",
    "#050505",
    "#060606",
)
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    _ACCENT: "var(--accent)",
    _SOFT: "var(--accent-soft)",
    _BEFORE: "var(--before)",
}
_MOST_POINTS = 400
"""A curve has at most this many points: more cannot be seen at its size, and each costs bytes."""
_MOST_DOTS = 25
"""Up to this many measurements on a curve are marked with dots."""


def measure_plot(row: Row) -> Markup:
    """A bar chart from zero: one bar per point, labelled with its value; a missing value says "not measured"."""
    where = list(row.values)
    with _style():
        figure = _figure(400, 200)
        axes = figure.add_axes((0.01, 0.15, 0.98, 0.72))
        known = [value for value in row.values.values() if value is not None]
        top = 1.0 if row.measure.style == "share" else max([*known, 0.0])
        top = top if top > 0 else 1.0
        for place, (point, value) in enumerate(row.values.items()):
            if value is None:
                axes.text(place, top * 0.03, "not\nmeasured", ha="center", va="bottom", color=_MUTED, fontsize=11)
                continue
            last = place == len(where) - 1
            axes.bar(place, value, width=0.62, color=_BEFORE if point == BASE else _ACCENT if last else _SOFT)
            text = written(value, row.measure.style)
            axes.text(
                place,
                max(value, 0.0) + top * 0.03,
                text,
                ha="center",
                va="bottom",
                color=_INK,
                fontsize=13.5,
                weight="bold" if last else "normal",
            )
        axes.axhline(0, color=_MUTED, linewidth=1)
        axes.set_xlim(-0.5, max(len(where), 1) - 0.5)
        axes.set_ylim(min([*known, 0.0]), top)
        axes.set_xticks(range(len(where)), [point_label(point) for point in where], color=_MUTED)
        axes.tick_params(length=0, pad=5, labelsize=12.5)
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        values = ", ".join(f"{point_label(point)} {row.text(point)}" for point in where)
        return _svg(figure, f"{row.label}: {values}", f"measure-{row.measure.key}")


def loss_plot(stage: str, records: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The loss over the steps of a stage, and its running mean if there are enough steps.

    records: dicts with `step` and `loss`; records without a finite loss are left out. None if none is left.
    """
    drawn = _finite(records, "loss")
    if not drawn:
        return None
    steps, losses = [step for step, _ in drawn], [loss for _, loss in drawn]
    mean = _running_mean(losses)
    every = -(-len(drawn) // _MOST_POINTS)
    with _style():
        figure = _figure(320, 190)
        axes = _curve_axes(figure)
        marker = "o" if len(drawn) == 1 else None
        if mean is None:
            axes.plot(steps, losses, color=_ACCENT, linewidth=1.8, marker=marker)
        else:
            axes.plot(steps[::every], losses[::every], color=_SOFT, linewidth=1)
            axes.plot(steps[::every], mean[::every], color=_ACCENT, linewidth=2)
        axes.margins(x=0.02)
        _style_curve(axes)
        ends = [f"{losses[place]:.3f} at step {steps[place]:.0f}" for place in (0, -1)]
        label = f"Loss of {stage}: {', '.join(ends)}"
        return _svg(figure, label, f"loss-{stage}")


def validation_plot(
    stage: str, records: Sequence[Mapping[str, Any]], best: float | None, losses: Sequence[Mapping[str, Any]]
) -> Markup | None:
    """The bits per byte of held-out text over the steps of a stage, with a ring around the best step.

    records: dicts with `step` and `bits_per_byte`; those without a finite number are left out. None if none is left.
    losses: the records of `loss_plot`; both plots span the same steps, so that they can be read one below the other.
    """
    drawn = _finite(records, "bits_per_byte")
    if not drawn:
        return None
    span = [step for step, _ in [*_finite(losses, "loss"), *drawn]]
    every = -(-len(drawn) // _MOST_POINTS)
    with _style():
        figure = _figure(320, 130)
        axes = _curve_axes(figure, bottom=0.22)
        dots = "o" if len(drawn) <= _MOST_DOTS else None
        axes.plot(*zip(*drawn[::every], strict=True), color=_ACCENT, linewidth=1.8, marker=dots, markersize=3.5)
        chosen = [pair for pair in drawn if pair[0] == best]
        for step, value in chosen[:1]:
            axes.plot([step], [value], "o", markersize=10, markerfacecolor="none", markeredgecolor=_INK)
        room = 0.02 * (max(span) - min(span)) or 0.5
        axes.set_xlim(min(span) - room, max(span) + room)
        # Room for the ring.
        axes.margins(y=0.2)
        _style_curve(axes)
        best_text = f", best {chosen[0][1]:.3f} at step {chosen[0][0]:.0f}" if chosen else ""
        label = f"Validation of {stage}: {drawn[-1][1]:.3f} bits per byte at step {drawn[-1][0]:.0f}{best_text}"
        return _svg(figure, label, f"validation-{stage}")


def _finite(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """The (step, value) of each record in which both are finite numbers."""
    pairs = [(number(record.get("step")), number(record.get(key))) for record in records]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _curve_axes(figure: Figure, bottom: float = 0.15) -> Axes:
    return figure.add_axes((0.12, bottom, 0.86, 0.94 - bottom))


def _style_curve(axes: Axes) -> None:
    """Apply the style that all curves over steps share."""
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.tick_params(length=0, labelsize=11, labelcolor=_MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_MUTED)


def cost_plot(path: Path, texts: Mapping[str, Sequence[tuple[int, float, float, float]]]) -> None:
    """Write a plot of what texts cost against the size of the vocabulary, to a .png, .svg or .pdf file.

    texts: name -> for each vocabulary, (tokens in the vocabulary, tokens per character, per UTF-8 byte, per word).
    """
    with _style():
        figure = _figure(760, 290)
        panels = figure.subplots(1, 3)
        sizes = sorted({point[0] for points in texts.values() for point in points})
        for place, (axes, unit) in enumerate(
            zip(panels, ("character", "UTF-8 byte", "word between spaces"), strict=True), start=1
        ):
            for name, points in texts.items():
                drawn = sorted((point[0], point[place]) for point in points)
                axes.plot(*zip(*drawn, strict=True), marker="o", markersize=4, linewidth=1.8, label=name)
            axes.set_title(f"tokens per {unit}", fontsize=11)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("tokens in the vocabulary", fontsize=9)
            axes.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
            axes.locator_params(axis="x", nbins=4)
            axes.margins(x=0.06 if len(sizes) > 1 else 0.5)
            axes.grid(axis="y", color="#dddddd", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.tick_params(length=0, labelsize=9)
            for side, spine in axes.spines.items():
                spine.set_visible(side == "bottom")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=min(len(labels), 2), frameon=False, fontsize=9)
        rows = -(-len(labels) // 2)
        figure.tight_layout(rect=(0, 0.03 + 0.06 * rows, 1, 1))
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def interval_plot(
    label: str, rows: Sequence[tuple[str, float, float, float]], text: Callable[[float], str], *, share: bool
) -> Markup:
    """A row for each system: a dot at its value, with a line over its interval. The first is drawn in another colour.

    rows: (name, value, low, high). text: writes a value. share: the scale is that of shares, 0 to 1.
    """
    with _style():
        figure = _figure(400, 34 + 34 * len(rows))
        names = max(len(name) for name, *_ in rows)
        left = min(0.06 + 0.019 * names, 0.45)
        axes = figure.add_axes((left, 24 / (34 + 34 * len(rows)), 0.97 - left, 1 - 30 / (34 + 34 * len(rows))))
        for place, (_, value, low, high) in enumerate(rows):
            colour = _ACCENT if place or len(rows) == 1 else _MUTED
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([value], [place], "o", color=colour, markersize=7)
            axes.text(value, place - 0.24, text(value), ha="center", va="bottom", color=_INK, fontsize=11.5)
        axes.set_yticks(range(len(rows)), [_short(name) for name, *_ in rows], color=_INK)
        axes.set_ylim(len(rows) - 0.5, -0.75)
        if share:
            axes.set_xlim(-0.03, 1.03)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        else:
            axes.margins(x=0.12)
            axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", color=_LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=11)
        axes.tick_params(axis="x", labelcolor=_MUTED)
        for spine in axes.spines.values():
            spine.set_visible(False)
        values = ", ".join(f"{name} {text(value)} ({text(low)} to {text(high)})" for name, value, low, high in rows)
        return _svg(figure, f"{label}: {values}", f"interval-{label}")


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"


def _running_mean(values: Sequence[float]) -> list[float] | None:
    """Exponential mean over about a tenth of the values, unbiased at the start; None for fewer than 20 values."""
    if len(values) < 20:
        return None
    keep = 1 - 1 / max(len(values) / 10, 4)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means


def _style() -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            # Ids inside the file are salted hashes: with a fixed salt, the same results give the same bytes.
            "svg.hashsalt": "transllm",
            "text.parse_math": False,
            "axes.unicode_minus": False,
        }
    )


def _figure(width: float, height: float) -> Figure:
    """A figure of width x height points (a font of size 10 is 10 points high)."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72))


def _svg(figure: Figure, label: str, name: str) -> Markup:
    """The figure as an `<svg>` element for an HTML page. Its ids begin with `name`, to differ from other figures'."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    name = re.sub(r"[^\w-]", "-", name)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    # The style element would apply to the whole page. matplotlib writes the font as one property or as several.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    text = re.sub(r"font: ([^'\";]*px) [^;\"]*", r"font: \1 var(--font)", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    head = re.match(r"<svg[^>]*>", text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert head is not None and view is not None
    opening = f'<svg {view[0]} role="img" aria-label="{escape(label)}">'
    return Markup(opening + text[head.end() :].strip())
