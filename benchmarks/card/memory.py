"""Peak device memory of every preset in configs/ beside what `plan` predicts, within the memory of smaller cards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import peak_memory
from benchmarks.bases import kept_base, noise_pictures
from benchmarks.card.kit import Kit
from benchmarks.card.outcomes import Figures, Job, NotOffered
from benchmarks.card.store import Results
from lora_booth.config import presets, toml


@dataclass(frozen=True)
class Case:
    """Presets that differ in nothing but their budget, and a budget to run them with. `own`: whether it is one's."""

    presets: tuple[Path, ...]
    budget_gib: float
    is_own: bool

    @property
    def name(self) -> str:
        """Of the job: by the first of its presets, without the memory that it is for."""
        return f"{self.presets[0].stem.rpartition('_')[0]} within {self.budget_gib:g} GiB"


def cases(kit: Kit) -> list[Case]:
    """First what presets are made for, then the rest."""
    alike: dict[str, list[Path]] = {}
    families = tuple(f"{base.family}_" for base in kit.scale.bases)
    paths = [path for path in sorted(presets.FOLDER.glob("*.toml")) if path.name.startswith(families)]
    for path in paths:
        settings = toml.load(path).model_dump(mode="json")
        settings["memory"].pop("budget_gib")
        alike.setdefault(repr(settings), []).append(path)
    found = []
    for group in alike.values():
        own = {toml.load(path).memory.budget_gib for path in group}
        found += [Case(tuple(group), budget, budget in own) for budget in kit.scale.budgets_gib]
    return sorted(found, key=lambda case: not case.is_own)


def jobs(kit: Kit) -> Iterator[Job]:
    """One for each case."""
    for case in cases(kit):
        yield case.name, partial(_measured, kit, case)


def _measured(kit: Kit, case: Case) -> Figures:
    """Raises NotOffered where the card has less memory than the budget; a card of 8 GB has 7.6 GiB."""
    if kit.device == "cuda" and (has_gib := torch.cuda.mem_get_info()[1] / 2**30) < 0.9 * case.budget_gib:
        raise NotOffered(f"this card has {has_gib:.1f} GiB")
    base = kit.base(case.presets[0].name.partition("_")[0])
    settings: dict[str, object] = {
        "model.base": kept_base(kit.folder_of(base), base.architecture),
        "subject.images": noise_pictures(kit.out / "memory" / f"pictures_{base.side_px}", 3, base.side_px),
        "memory.device": kit.device,
        **kit.scale.run_settings,
        **kit.scale.memory_settings,
    }
    names = {"presets": [path.stem for path in case.presets], "budget_gib": case.budget_gib}
    known = _known(kit, case)
    try:
        row = peak_memory.run_within(case.presets[0], case.budget_gib, settings, kit.out / "memory", known)
    except peak_memory.SameAgain as same:
        earlier = known[same.chosen]
        return names | {**earlier["figures"], **names, "same_as": earlier["name"]}
    figures = {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(row).items()}
    figures.pop("job")
    return names | figures | {"measured": _how(row)}


def _how(row: peak_memory.Row) -> str:
    """What `measured_gib` is, where it is none."""
    if not row.fits:
        return "does not fit"
    return "not offered on the CPU" if row.measured_gib is None else "by torch.cuda.max_memory_allocated"


def _known(kit: Kit, case: Case) -> dict[str, Any]:
    """How a run was computed to its record: those of the same presets that fitted within less memory."""
    found: dict[str, Any] = {}
    for name, record in Results(kit.results, kit.card).part("memory").items():
        figures = record.get("figures", {})
        is_same = figures.get("presets") == [path.stem for path in case.presets] and record.get("state") == "done"
        if is_same and figures["fits"] and figures["budget_gib"] < case.budget_gib:
            found[figures["chosen"]] = {"name": figures.get("same_as", name), "figures": figures}
    return found
