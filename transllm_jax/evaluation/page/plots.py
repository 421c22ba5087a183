"""Small plots as inline SVG that takes its colours and its font from the page around it, and one as a file.

For the page, matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables: one drawing
serves light mode, dark mode and print. Text stays text. matplotlib is imported when the first plot is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from transllm_jax.evaluation.page.measures import BASE, Row, number, point_label, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-in colour -> CSS variable of the page. They only have to differ from each other.
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
"""More points than this on a curve cannot be seen at its size; each costs bytes."""
_MOST_DOTS = 25
"""More measurements than this on a curve are not marked one by one."""


def measure_plot(row: Row) -> Markup:
    """A bar for each point, from zero, with its value written on it; gaps say "not measured"."""
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
        spoken = ", ".join(f"{point_label(point)} {row.text(point)}" for point in where)
        return _svg(figure, f"{row.label}: {spoken}", f"measure-{row.measure.key}")


def loss_plot(stage: str, records: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The loss over the steps of a stage, and its running mean where there are enough steps for one.

    records: dicts with `step` and `loss`; a record without a finite loss is left out. None without any left.
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
        _mark_steps(axes)
        ends = [f"{losses[place]:.3f} at step {steps[place]:.0f}" for place in (0, -1)]
        label = f"Loss of {stage}: {', '.join(ends)}"
        return _svg(figure, label, f"loss-{stage}")


def validation_plot(
    stage: str, records: Sequence[Mapping[str, Any]], best: float | None, losses: Sequence[Mapping[str, Any]]
) -> Markup | None:
    """The bits per byte of held-out text over the steps of a stage, with a ring around the best step.

    records: dicts with `step` and `bits_per_byte`; one without a finite number is left out. None without any left.
    losses: those of `loss_plot`, whose steps this plot spans, so that both can be read one below the other.
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
        _mark_steps(axes)
        said = f", best {chosen[0][1]:.3f} at step {chosen[0][0]:.0f}" if chosen else ""
        label = f"Validation of {stage}: {drawn[-1][1]:.3f} bits per byte at step {drawn[-1][0]:.0f}{said}"
        return _svg(figure, label, f"validation-{stage}")


def _finite(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the records that have both as finite numbers."""
    pairs = [(number(record.get("step")), number(record.get(key))) for record in records]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _curve_axes(figure: Figure, bottom: float = 0.15) -> Axes:
    return figure.add_axes((0.12, bottom, 0.86, 0.94 - bottom))


def _mark_steps(axes: Axes) -> None:
    """The look that the curves over steps share."""
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.tick_params(length=0, labelsize=11, labelcolor=_MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_MUTED)


def cost_plot(path: Path, texts: Mapping[str, Sequence[tuple[int, float, float, float]]]) -> None:
    """Write what texts cost against the size of the vocabulary, as a picture of its own (.png, .svg or .pdf).

    texts: name -> (tokens in the vocabulary, tokens per character, per UTF-8 byte, per word) of each vocabulary.
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


def _running_mean(values: Sequence[float]) -> list[float] | None:
    """Exponential mean over about a tenth of the values, unbiased at the start; None for a few values."""
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
            # Ids inside the file are hashes: salted alike, the same results give the same bytes.
            "svg.hashsalt": "transllm",
            "text.parse_math": False,
            "axes.unicode_minus": False,
        }
    )


def _figure(width: float, height: float) -> Figure:
    """A figure of width x height units, where 10 units are a font of size 10."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72))


def _svg(figure: Figure, label: str, name: str) -> Markup:
    """The figure as an `<svg>` for the inside of an HTML page; `name` keeps its ids apart from others'."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    name = re.sub(r"[^\w-]", "-", name)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    # The style element would reach the whole page. The font is written as one property or as several.
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
