"""One plot of an ablation: right answers of each variant with their intervals, and what each seed found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transllm_jax.ablation import numbers
from transllm_jax.ablation.page import LABELS
from transllm_jax.ablation.results import Found
from transllm_jax.ablation.table import FULL

_INK, _MUTED, _LINE, _ACCENT, _GREY = "#1a1a1a", "#6b6b6b", "#dddddd", "#0b6e99", "#8aa4b0"


def write_plot(path: Path, groups: Mapping[str, Sequence[Found]]) -> None:
    """Write the plot of the variants (from `page.by_variant`) as .svg or .png: in the target language on the left,
    asked in English on the right. The full method is drawn across as a line."""
    import matplotlib
    from matplotlib.figure import Figure

    names = list(groups)
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "transllm", "text.parse_math": False, "axes.unicode_minus": False}
    ):
        figure = Figure(figsize=(9, 1.1 + 0.36 * len(names)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, title, holds in zip(
            panels, ("right in the language", "right asked in English"), (numbers.right, numbers.english), strict=True
        ):
            for place, name in enumerate(names):
                runs, colour = groups[name], _ACCENT if name == FULL.name else _GREY
                whole = numbers.share(runs, holds)
                if whole is None:
                    continue
                if name == FULL.name:
                    axes.axvline(whole.value, color=_ACCENT, linewidth=0.8, linestyle=(0, (3, 3)))
                axes.plot([whole.low, whole.high], [place, place], color=colour, linewidth=6, solid_capstyle="butt")
                axes.plot([whole.value], [place], "|", color=_INK, markersize=12, markeredgewidth=1.6)
                seeds = [share.value for one in runs if (share := numbers.share([one], holds)) is not None]
                if len(seeds) > 1:
                    axes.plot(seeds, [place] * len(seeds), "o", color=_INK, markersize=2.6)
            axes.set_title(title, fontsize=11, color=_INK, loc="left")
            axes.set_xlim(0, 1)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.grid(axis="x", color=_LINE, linewidth=0.7)
            axes.set_axisbelow(True)
            axes.tick_params(length=0, labelsize=9.5, labelcolor=_INK)
            for spine in axes.spines.values():
                spine.set_visible(False)
        panels[0].set_yticks(range(len(names)), [LABELS[name] for name in names])
        panels[0].invert_yaxis()
        figure.supxlabel("bars: 95 % intervals over questions and seeds; dots: seeds", fontsize=8.5, color=_MUTED)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
