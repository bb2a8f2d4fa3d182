"""What the code assumes, beside what the other parts have measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

from benchmarks.card import steps
from benchmarks.card.kit import Base, Kit
from benchmarks.card.outcomes import Figures, Job, NotOffered
from benchmarks.card.store import Results
from lora_booth.planning import memory
from lora_booth.training import compiling


def jobs(kit: Kit) -> Iterator[Job]:
    """One for each assumption; those of compiling for each base that is timed."""
    results = Results(kit.results, kit.card)
    for family in steps.SCRIPTS:
        base = kit.base(family)
        yield f"ASSUMED_SAVING, {base.name}", partial(_saving, results, base)
        yield f"ASSUMED_S, {base.name}", partial(_compile_s, results, base)
    yield "OUTSIDE_GIB", partial(_outside, kit, results)


def _figure(results: Results, base: Base, mode: str, name: str) -> list[float]:
    """Of each round that is done, in turn. Raises NotOffered where none is."""
    records = results.part("steps")
    found = [
        record["figures"][name]
        for job, record in records.items()
        if job.startswith(f"{base.name} {mode}, ") and record["state"] == "done" and name in record["figures"]
    ]
    if not found:
        states = [record["state"] for job, record in records.items() if job.startswith(f"{base.name} {mode}, ")]
        raise NotOffered(f"{base.name} {mode} was not timed ({', '.join(states) or 'never begun'})")
    return found


def _saving(results: Results, base: Base) -> Figures:
    """Share of a step that compiling saves."""
    eager, compiled = (statistics.median(_figure(results, base, mode, "step_s")) for mode in ("eager", "compiled"))
    return {"assumed": compiling.ASSUMED_SAVING, "measured": round(1 - compiled / eager, 3)}


def _compile_s(results: Results, base: Base) -> Figures:
    """Seconds by which compiled runs begin later: the first of them, and with what it left in the compiler's cache."""
    eager = statistics.median(_figure(results, base, "eager", "begin_s"))
    first, *later = (round(begin - eager, 1) for begin in _figure(results, base, "compiled", "begin_s"))
    return {"assumed": compiling.ASSUMED_S, "measured": first} | ({"with_cache": later[0]} if later else {})


def _outside(kit: Kit, results: Results) -> Figures:
    """GiB beside the allocator, the most of all timed runs; `gaps`: that the allocator held beyond tensors in runs
    that fitted within a smaller card, where they may be no larger than what is left."""
    if kit.device == "cpu":
        raise NotOffered("not offered on the CPU: its processes have no context on a card")
    found = [record["figures"] for record in results.part("steps").values() if record["state"] == "done"]
    outside = [figures["outside_gib"] for figures in found if "outside_gib" in figures]
    if not outside:
        raise NotOffered("no run was timed")
    rows = [record["figures"] for record in results.part("memory").values() if record["state"] == "done"]
    gaps = [row["reserved_gib"] - row["measured_gib"] for row in rows if row["measured_gib"] is not None]
    return {"assumed": memory.OUTSIDE_GIB, "measured": max(outside)} | ({"gaps": round(max(gaps), 3)} if gaps else {})
