"""README's table of what cards have shown: a column for each, every cell computed from docs/card.json."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.card.store import Record, read
from lora_booth.run import disk

BEGIN, END = "<!-- card: python -m benchmarks.card --write -->\n", "<!-- end of card -->"
NOTHING = "not yet measured on a card"
SHOWN_VERSIONS = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "triton")
BASES = {"SD 1.5": "SD 1.5 at 512 px", "SDXL": "SDXL at 1024 px"}
MODES = {"eager": "eager", "compiled": "compiled", "graphed": "graphed", "diffusers": "diffusers' script"}
PRIORS = {"model": "the model's own", "images": "class images"}
Parts = Mapping[str, Mapping[str, Record]]
"""Part to job to record."""
Cell = Callable[[Parts], str]


def write(results: Path, readme: Path) -> None:
    """Put the table of `results` into `readme`, between its marks."""
    text = readme.read_text(encoding="utf-8")
    placed_text = placed(text, read(results))
    if placed_text != text:
        disk.write_text(readme, placed_text)


def placed(readme: str, cards: Mapping[str, Any]) -> str:
    """`readme` with the table between its marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no table of cards has its place: the marks {BEGIN.strip()} and {END} are missing")
    return before + BEGIN + "\n".join(lines(cards)) + "\n" + END + after


def lines(cards: Mapping[str, Any]) -> Iterator[str]:
    """The table, line by line; without any card, one line that says so."""
    if not cards:
        yield (
            f"SD 1.5, 2.1 and SDXL on a GPU: **{NOTHING}**. `make card` measures it on any CUDA card, within nine\n"
            "minutes ([benchmarks/README.md](benchmarks/README.md))."
        )
        return
    yield "On a card, by `make card`; every figure with its commit in [docs/card.json](docs/card.json):"
    yield ""
    yield f"| | {' | '.join(cards)} |"
    yield "|---" * (len(cards) + 1) + "|"
    yield _row("driver, versions, date", [_circumstances(card) for card in cards.values()])
    for label, cell in _rows(cards):
        yield _row(label, [cell(card["parts"]) for card in cards.values()])


def _row(label: str, cells: list[str]) -> str:
    return f"| {' | '.join([label, *(cell or 'not yet measured' for cell in cells)])} |"


def _circumstances(card: Mapping[str, Any]) -> str:
    facts = card["facts"]
    known = facts["versions"]
    versions = [f"{name} {known[name]}" for name in SHOWN_VERSIONS if name in known]
    records = [record for jobs in card["parts"].values() for record in jobs.values()]
    days = sorted({record["date"][:10] for record in records if record.get("date")})
    return ", ".join([f"driver {facts['driver']}", *versions, " to ".join(dict.fromkeys([*days[:1], *days[-1:]]))])


def _rows(cards: Mapping[str, Any]) -> Iterator[tuple[str, Cell]]:
    yield "the tests that need a card, `make test-gpu`", _tests
    for base, told in BASES.items():
        yield f"a step of {told}, one instance and one class image", partial(_steps, base)
    for presets in _groups(cards):
        names = ", ".join(f"`{name}`" for name in presets)
        label = f"most device memory of a run of {names} within a card's, and as predicted, GiB"
        yield label, partial(_memory, presets)
    for base, told in BASES.items():
        yield f"from 5 pictures to the adapter, {told}, by prior", partial(_whole, base)
    yield "share of a step that compiling saves", partial(_assumed, "ASSUMED_SAVING, ", "")
    yield "seconds of compiling", partial(_assumed, "ASSUMED_S, ", " s")
    yield "outside of torch's allocator", partial(_assumed, "OUTSIDE_GIB", " GiB")


def _tests(parts: Parts) -> str:
    cells = []
    for record in parts.get("tests", {}).values():
        figures = record.get("figures", {})
        counts = [f"{figures[key]} {key}" for key in ("passed", "failed", "skipped") if key in figures]
        cells.append(", ".join(counts if record["state"] == "done" else [*counts, record["state"]]))
    return "; ".join(cells)


def _steps(base: str, parts: Parts) -> str:
    """Every mode, the peer's with its ratio to ours, and the bound."""
    jobs, cells, eager = parts.get("steps", {}), [], None
    for mode, told in MODES.items():
        records = [record for job, record in jobs.items() if job.startswith(f"{base} {mode}, ")]
        seconds = [record["figures"]["step_s"] for record in records if record["state"] == "done"]
        if seconds:
            step_s = statistics.median(seconds)
            eager = step_s if mode == "eager" else eager
            ratio = f" ({step_s / eager:.2f}×)" if eager and mode != "eager" else ""
            cells.append(f"{told} {step_s:.3g} s{ratio}")
        elif records:
            cells.append(f"{told} {records[-1]['state']}")
    figures = jobs.get(f"{base} at the peak rates", {}).get("figures", {})
    for key, told in (("sheet_s", "at the data sheet's rates"), ("measured_rates_s", "at the rates measured here")):
        if figures.get(key) is not None:
            cells.append(f"{told} {figures[key]:.3g} s")
    return "; ".join(cells)


def _groups(cards: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The presets that were run as one, over all cards."""
    records = [record for card in cards.values() for record in card["parts"].get("memory", {}).values()]
    groups = {tuple(record["figures"]["presets"]) for record in records if "figures" in record}
    return sorted(groups)


def _memory(presets: tuple[str, ...], parts: Parts) -> str:
    records = [record for record in parts.get("memory", {}).values() if "figures" in record]
    found = [record["figures"] for record in records if tuple(record["figures"]["presets"]) == presets]
    return "; ".join(_fit(figures) for figures in sorted(found, key=lambda figures: figures["budget_gib"]))


def _fit(figures: Mapping[str, Any]) -> str:
    measured = figures["measured_gib"]
    told = figures["measured"] if measured is None else f"{measured:.1f}"
    return f"within {figures['budget_gib']:g}: {told} ({figures['predicted_gib']:.1f})"


def _whole(base: str, parts: Parts) -> str:
    cells = []
    for prior, told in PRIORS.items():
        record = parts.get("whole", {}).get(f"{base}, prior.mode {prior}")
        if record is not None:
            is_done = record["state"] == "done"
            cells.append(f"{told} {record['figures']['in_all_s']:.0f} s" if is_done else f"{told}: {record['state']}")
    return "; ".join(cells)


def _assumed(job: str, unit: str, parts: Parts) -> str:
    cells = []
    for name, record in parts.get("assumptions", {}).items():
        if name.startswith(job) and record["state"] == "done":
            figures = record["figures"]
            where = name.removeprefix(job)
            cells.append(f"{where} {figures['measured']:g}{unit} (assumed {figures['assumed']:g})".strip())
        elif name.startswith(job):
            cells.append(f"{name.removeprefix(job)} {record['state']}".strip())
    return "; ".join(cells)
