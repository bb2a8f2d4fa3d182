"""The plots of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablations.arms import ARMS, END, STEPWISE, State
from benchmarks.ablations.statistics import Table

PAPER, INK = "#f7f6f3", "#22211f"
COLOURS = {"images": "#3d7a8c", "model": "#c8553d", "none": "#8a8680", "full": "#7a5ca8", "full-none": "#b9a7d6"}
MORE = ("#d9a441", "#5b8c5a", "#a05c7b", "#4f5d75", "#2f4b3c", "#b07d62")


def write(table: Table, folder: Path) -> list[str]:
    """likeness_fronts.png and likeness_arms.png, as far as whole arms are there; their names."""
    from matplotlib.figure import Figure  # takes a third of a second

    names = []
    figure = Figure(figsize=(11, 4.6), facecolor=PAPER, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    over_strengths = {arm.name: arm.strengths for arm in ARMS.values() if len(arm.strengths) > 1}
    over_steps = {arm.name: STEPWISE for arm in ARMS.values() if set(STEPWISE) <= set(arm.states)}
    drawn = _fronts(left, table, over_strengths, "over strengths up to 1")
    drawn += _fronts(right, table, over_steps, "over 50, 100, 200 steps")
    left.set_ylabel("share of the possible rise in likeness")
    if drawn:
        names.append("likeness_fronts.png")
        figure.savefig(folder / names[-1], dpi=110)
    whole = [arm for arm in ARMS if table.is_whole(arm)]
    if whole:
        figure = Figure(figsize=(11, 1.6 + 0.28 * len(whole)), facecolor=PAPER, layout="constrained")
        shown = (("rise", "rise of likeness"), ("leak", "leak"), ("other_change", "drift of other prompts"))
        for axes, (value, title) in zip(figure.subplots(1, 3, sharey=True), shown, strict=True):
            _bars(axes, table, whole, value, title)
        names.append("likeness_arms.png")
        figure.savefig(folder / names[-1], dpi=110)
    return names


def _fronts(axes: Any, table: Table, arms: Mapping[str, Sequence[State]], title: str) -> int:
    """Lines of the arms that every subject has; how many."""
    whole = [arm for arm, states in arms.items() if all(table.is_whole(arm, state) for state in states)]
    for number, arm in enumerate(whole):
        points = []
        for state in arms[arm]:
            share = table.values((arm, state), "share")
            drift = table.values((arm, state), "other_change")
            points.append((sum(drift[name] for name in share) / len(share), sum(share.values()) / len(share)))
        xs, ys = zip((0.0, 0.0), *points, strict=True)
        axes.plot(xs, ys, marker="o", markersize=4, label=arm, color=COLOURS.get(arm, MORE[number % len(MORE)]))
    axes.set_title(f"Likeness against drift, {title}", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("drift of other prompts")
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right"]].set_visible(False)
    if whole:
        axes.legend(frameon=False, fontsize=8)
    return len(whole)


def _bars(axes: Any, table: Table, arms: Sequence[str], value: str, title: str) -> None:
    intervals = [table.interval((arm, END), value) for arm in arms]
    means = [i.mean for i in intervals if i is not None]
    ends = [[i.mean - i.low for i in intervals if i is not None], [i.high - i.mean for i in intervals if i is not None]]
    colours = [COLOURS.get(arm, "#9fb4ba") for arm in arms]
    axes.barh(list(arms), means, xerr=ends, color=colours, height=0.7, error_kw={"ecolor": INK, "lw": 1})
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
