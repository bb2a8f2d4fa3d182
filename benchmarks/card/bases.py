"""Bases of real size with random weights, made once for all parts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.bases import kept_base
from benchmarks.card.kit import Base, Kit
from benchmarks.card.outcomes import Figures, Job


def jobs(kit: Kit) -> Iterator[Job]:
    """One for each base."""
    for base in kit.scale.bases:
        yield base.name, partial(_made, kit, base)


def _made(kit: Kit, base: Base) -> Figures:
    folder = kept_base(kit.folder_of(base), base.architecture)
    return {"gib": round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30, 3)}
