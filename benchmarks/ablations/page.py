"""docs/likeness.md: what came out and what did not, every number and verdict computed from the results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablations import plots
from benchmarks.ablations.arms import ARMS, CAPTIONS, END, STRENGTHS, State
from benchmarks.ablations.claims import Claim, claims
from benchmarks.ablations.statistics import CONFIDENCE, FLAT, LEAST_ROOM, PLANNED, Difference, Table
from lora_booth.evaluation.intervals import Interval

QUESTIONS = {
    "a": "What does a prior bring?",
    "b": "What does the class noun bring?",
    "c": "An adapter, or the whole denoiser?",
    "d": "Which prior?",
    "e": "Which rank?",
    "f": "Do the fronts of class images and the model prior cross, over steps and weights?",
    "g": "What do a lower strength and averaging bring?",
}
MEASURE = f"""\
One run trains an adapter on five captioned pictures with `configs/demo.toml` (200 steps, rank 8, learning rate 1e-3)
and what its arm changes, and draws 20 pictures of 10 solver steps through each of its states. Everything is seen by the
miniature's own image tower, relative to the mean of many icons on the same background (`benchmarks/subjects.py`).

- **likeness**: mean cosine between pictures of the subject on four plain colours and unseen pictures of it on the same
  colours. **rise**: less that of the base. **share**: the rise as a share of what is possible, up to other real
  pictures of the subject on that colour; only where that is {LEAST_ROOM:g} at least, since elsewhere the base draws
  something as like already.
- **leak**: how much more like the subject the bare class noun has become, on the same colours.
- **drift**: mean change (1 - cosine) of 8 other nouns that no prior contains; **largest**: the most changed of them.
- **diversity**: 1 - cosine between pictures of the subject with the same prompt and other noise.
- **predictions**: squared difference of the denoiser's predictions with and without the update, relative, on noised
  pictures of these nouns.
- **at equal drift**: likeness along the front of each arm (over its strengths, from 0.2 or 0.6 to 1, or over 50, 100
  and 200 steps; straight between points, from the base on), where both have drifted as much as the second arm at its
  end, or as far as both reach.

Numbers are means over seeds, compared between runs of the same subject and seed; intervals are the {CONFIDENCE:.0%}
bootstrap over subjects, p the exact sign-flip test over subjects, which with 7 of them cannot go below .016. No p is
corrected for the number of comparisons. "Came out" means that the interval lies on the expected side of 0, and for
"flat" and "costs no likeness" within ±{FLAT:g}.
"""


def write(results: Mapping[str, Any], folder: Path) -> None:
    """The page and its plots into `folder`."""
    table = Table(results)
    names = plots.write(table, folder)
    (folder / "likeness.md").write_text("\n".join(lines(table, results, names)) + "\n", encoding="utf-8")


def lines(table: Table, results: Mapping[str, Any], plotted: list[str]) -> Iterator[str]:
    """The page, line by line."""
    yield from ("# Likeness and forgetting, on seven icon subjects of a 9 M model", "")
    yield "Made by `python -m benchmarks.ablations report` from `likeness.json`; do not edit. Everything here holds for"
    yield "seven icon subjects of a miniature with 9 million parameters. An order may carry over to a real base; no"
    yield from ("size of an effect does.", "")
    yield f"{len(table.runs)} of {PLANNED * len(ARMS)} runs are measured. {_versions(results)}"
    yield from ("", "## What came out, and what did not", "")
    found = [(claim, claim.difference(table)) for claim in claims()]
    yield from _summary(found)
    for letter, question in QUESTIONS.items():
        yield from ("", f"### ({letter}) {question}", "")
        yield "| claim | difference of | mean | interval | p | runs | verdict |"
        yield "|---|---|---|---|---|---|---|"
        yield from (_claim_row(claim, of) for claim, of in found if claim.question == letter)
        if letter == "f":
            yield from ("", _crossing([of for claim, of in found if claim.question == "f"]))
    for name in plotted:
        yield from ("", f"![{name}]({name})")
    yield from ("", "## Every arm, after all steps at strength 1", "", *_arms(table))
    yield from ("", "## Subject by subject: the model prior against class images", "", *_subjects(table))
    yield from ("", "## How it is measured", "", MEASURE)
    yield f"The model prior's captions: the empty one, {', '.join(CAPTIONS)}, and those of the instances without token."


def _summary(found: list[tuple[Claim, Difference]]) -> Iterator[str]:
    for verdict in ("came out", "did not come out", "the reverse came out", "not decided", "not yet measured"):
        texts = [f"  - ({claim.question}) {claim.text}" for claim, of in found if of.verdict(claim.expected) == verdict]
        if texts:
            yield from (f"- **{verdict[0].upper() + verdict[1:]}**", *texts)


def _claim_row(claim: Claim, of: Difference) -> str:
    verdict, names = of.verdict(claim.expected), f"{claim.a[0]} - {claim.b[0]}"
    if claim.a[0] == claim.b[0]:
        names = f"{claim.a[0]}: {_states(claim.a[1])} - {_states(claim.b[1])}"
    worse = of.worse if claim.figure.startswith("likeness") and claim.expected == "+" else []
    if verdict != "not yet measured" and worse:
        verdict += f"; clearly worse: {', '.join(worse)}"
    figure = claim.figure.replace("other_change", "drift")
    if not of.by_subject:
        return f"| {claim.text} | {figure}, {names} | | | | 0 of {PLANNED} | {verdict} |"
    interval, count = of.interval, f"{of.num_pairs} of {PLANNED}"
    if not of.is_measured:
        return f"| {claim.text} | {figure}, {names} | ({interval.mean:+.3f}) | | | {count} | {verdict} |"
    return (
        f"| {claim.text} | {figure}, {names} | {interval.mean:+.3f} | {interval.low:+.3f} to {interval.high:+.3f} | "
        f"{of.p:.3f} | {count} | {verdict} |"
    )


def _states(states: State | Sequence[State]) -> str:
    found = [states] if isinstance(states, State) else states
    return found[0].name if len(found) == 1 else "front"


def _crossing(found: list[Difference]) -> str:
    """One sentence on the fronts of (f)."""
    if not all(of.is_measured for of in found):
        return (
            f"Whether they cross cannot be said yet: {sum(of.is_measured for of in found)} of {len(found)} are there."
        )
    signs = {of.verdict("+") for of in found}
    if signs == {"came out"}:
        return "The fronts do not cross: the model prior's lies above at each weight."
    if {"came out", "the reverse came out"} <= signs:
        return "The fronts cross: which lies above depends on the weight."
    return "Whether the fronts cross is not decided at every weight."


def _arms(table: Table) -> Iterator[str]:
    yield "| arm | runs | rise | share | leak | drift | largest | diversity | predictions |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for arm in ARMS:
        if not table.count(arm):
            yield f"| {arm} | 0 of {PLANNED} | not yet measured | | | | | | |"
            continue
        wide = [_wide(table.interval((arm, END), figure)) for figure in ("rise", "share", "leak", "other_change")]
        rest = ("largest_other_change", "diversity", "prediction_change")
        short = [_short(table.interval((arm, END), figure)) for figure in rest]
        yield f"| {arm} | {table.count(arm)} of {PLANNED} | {' | '.join([*wide, *short])} |"
    before = table.values(("images", END), "diversity_before")
    if before:
        yield ""
        yield f"The base's own diversity is {sum(before.values()) / len(before):.3f}. Arms with some subjects only"
        yield "cannot be compared with others here; the comparisons above pair runs."


def _subjects(table: Table) -> Iterator[str]:
    yield "| subject | class noun | base | ceiling | images: likeness, drift | model: the same | at equal drift |"
    yield "|---|---|---|---|---|---|---|"
    fronts = table.at_equal_drift(("model", STRENGTHS), ("images", STRENGTHS)).by_subject
    base = table.values(("images", END), "likeness_before")
    for name, row in sorted(table.subjects.items()):
        cells = []
        for arm in ("images", "model"):
            likeness, drift = (table.values((arm, END), figure).get(name) for figure in ("likeness", "other_change"))
            cells.append("" if likeness is None or drift is None else f"{likeness:.3f}, {drift:.3f}")
        equal = f"{fronts[name]:+.3f}" if name in fronts else ""
        before = f"{base[name]:.3f}" if name in base else ""
        yield f"| {name} | {row['class_noun']} | {before} | {row['ceiling']:.3f} | {' | '.join(cells)} | {equal} |"


def _wide(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _short(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.mean:.3f}"


def _versions(results: Mapping[str, Any]) -> str:
    found = results["circumstances"]
    if not found:
        return ""
    commits, torches = (list(dict.fromkeys(row[key] for row in found)) for key in ("commit", "torch"))
    commits = commits if len(commits) < 4 else [commits[0], "…", commits[-1]]
    return f"Commits {', '.join(commits)}; torch {', '.join(torches)}; {found[-1]['device']}, one thread."
