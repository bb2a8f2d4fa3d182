"""Figures drawn by matplotlib, without a display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_booth.run import disk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAR, _INK, _PAPER = "#3d7a8c", "#22211f", "#f7f6f3"


def save_bars(values: Mapping[str, float], path: Path, *, title: str, unit: str) -> None:
    """Write a PNG of one horizontal bar per value, the first on top, each with its number."""
    import matplotlib  # takes a third of a second, which other verbs need not pay

    with matplotlib.rc_context({"text.parse_math": False}):  # names of files and layers may hold "$"
        figure = _bars(values, title=title, unit=unit)
        with disk.replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def _bars(values: Mapping[str, float], *, title: str, unit: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.3 + 0.32 * len(values)), facecolor=_PAPER, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(_PAPER)
    bars = axes.barh(list(values), list(values.values()), color=_BAR, height=0.7)
    axes.bar_label(bars, fmt="%.3g", padding=4, fontsize=9, color=_INK)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlabel(unit, color=_INK)
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
