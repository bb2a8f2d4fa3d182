"""Curves of runs as small SVGs inside of a page, in the page's own colours, light and dark.

matplotlib is imported where it draws: it takes a third of a second.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from lora_booth.report.record import Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--line)",
    "#040404": "var(--first)",
    "#050505": "var(--second)",
    "#060606": "var(--third)",
    "#070707": "var(--fourth)",
    "#080808": "var(--fifth)",
    "#090909": "var(--sixth)",
}
"""What matplotlib is told, and the page's colour that is put there."""
INK, FAINT, LINE, *SERIES = COLOURS
MAX_POINTS = 300
"""Of a line; longer ones are drawn by the means of as many parts."""
SIZE_IN = (4.4, 2.7)
FONT = re.compile(r"font: ([\d.]+)px [^;\"]*")


@dataclass(frozen=True)
class Series:
    """A line of a figure. `is_noisy`: it is drawn faintly, with its moving mean; `ends`: low and high of each point,
    where they are known; `is_dotted`: points are marked."""

    name: str
    points: Points
    is_noisy: bool = False
    is_dotted: bool = False
    ends: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Figure:
    """A figure over the steps of runs. `levels`: name to a value that is drawn as a dashed line."""

    title: str
    says: str
    series: Sequence[Series]
    levels: Mapping[str, float] = field(default_factory=dict)
    has_zero: bool = False
    """Whether both axes begin at zero."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(series.points for series in self.series)


def svg(figure: Figure, salt: str) -> str:
    """`figure` as an `svg` element that fills its place. `salt`: another for each figure of a page, so that no two
    elements have one name."""
    import matplotlib
    from matplotlib.figure import Figure as Paper

    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "font.family": "DejaVu Sans",  # it ships with matplotlib
            "font.size": 9,
            "text.parse_math": False,  # names of runs may hold "$"
            "text.color": INK,
            "axes.edgecolor": FAINT,
            "axes.labelcolor": FAINT,
            "xtick.color": FAINT,
            "ytick.color": FAINT,
        }
    ):
        paper = Paper(figsize=SIZE_IN)
        num_told = len(figure.levels) + sum(bool(series.points) for series in figure.series)
        top = 0.97 if num_told < 2 else 0.9 if num_told == 2 else 0.83
        paper.subplots_adjust(left=0.12, right=0.985, top=top, bottom=0.17)
        paper.patch.set_visible(False)
        _draw(paper.subplots(), figure)
        content = io.StringIO()
        paper.savefig(content, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _for_page(content.getvalue(), f"{figure.title}. {figure.says} {_told(figure)}")


def _draw(axes: Axes, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.patch.set_visible(False)
    drawn = [series for series in figure.series if series.points]
    for number, series in enumerate(drawn):
        _draw_line(axes, series, SERIES[number % len(SERIES)])
    for number, (name, value) in enumerate(figure.levels.items()):
        axes.axhline(value, color=FAINT, linewidth=1, linestyle=((0, (4, 3)), (0, (1, 2)))[number % 2], label=name)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("step")
    steps = [step for series in drawn for step, _ in series.points]
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if figure.has_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(steps) * 1.02)
    if len(drawn) + len(figure.levels) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))


def _draw_line(axes: Axes, series: Series, colour: str) -> None:
    points = thinned(series.points)
    steps, values = [step for step, _ in points], [value for _, value in points]
    if series.is_noisy and len(points) > 12:
        axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.9)
        axes.plot(steps, smoothed(values), color=colour, linewidth=1.8, label=series.name)
        return
    if series.ends:
        low = [value - end[0] for value, end in zip(values, series.ends, strict=True)]
        high = [end[1] - value for value, end in zip(values, series.ends, strict=True)]
        axes.errorbar(steps, values, yerr=[low, high], fmt="none", ecolor=colour, elinewidth=1, capsize=3)
    marker = "o" if series.is_dotted or len(points) < 12 else ""
    axes.plot(steps, values, color=colour, marker=marker, markersize=4, linewidth=1.6, label=series.name)


def thinned(points: Points) -> list[tuple[float, float]]:
    """`points`, of more than `MAX_POINTS` the means of as many equal parts."""
    if len(points) <= MAX_POINTS:
        return [(float(step), value) for step, value in points]
    size = math.ceil(len(points) / MAX_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(_mean(step for step, _ in part), _mean(value for _, value in part)) for part in parts]


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, a tenth of all."""
    half = max(1, len(values) // 20)
    return [_mean(values[max(0, place - half) : place + half + 1]) for place in range(len(values))]


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return math.fsum(kept) / len(kept)


def _told(figure: Figure) -> str:
    """Each line in words: its first and its last value."""
    lines = [(series.name, series.points[0], series.points[-1]) for series in figure.series if series.points]
    return "; ".join(f"{name}: {a[1]:.3g} at step {a[0]}, {b[1]:.3g} at step {b[0]}" for name, a, b in lines)


def _for_page(text: str, says: str) -> str:
    """The `svg` element of matplotlib's file, named, in the page's colours and letters, as wide as its place."""
    element = text[text.index("<svg ") :]
    head, _, body = element.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = FONT.sub(r"font: \1px system-ui, sans-serif", body)
    for told, own in COLOURS.items():
        body = body.replace(told, own)
    return f'{head} role="img" aria-label="{escape(says)}">{body}'
