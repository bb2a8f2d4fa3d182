"""From pictures to the adapter: `lora-booth train` as a user runs it, with the model's prior and with class images."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial

from benchmarks import time_to_adapter
from benchmarks.bases import kept_base, noise_pictures
from benchmarks.card.kit import Base, Kit
from benchmarks.card.outcomes import Figures, Job

PRIORS = ("model", "images")
FAMILIES = ("sd15", "sdxl")


def job_name(base: Base, prior: str) -> str:
    """The job that trains on `base` with prior.mode `prior`."""
    return f"{base.name}, prior.mode {prior}"


def jobs(kit: Kit) -> Iterator[Job]:
    """The quicker ones first: what takes longer than is left is told as that."""
    for family in FAMILIES:
        base = kit.base(family)
        for prior in PRIORS:
            yield job_name(base, prior), partial(_whole, kit, base, prior)


def _whole(kit: Kit, base: Base, prior: str) -> Figures:
    """Seconds of each part of the job with an empty cache, and all of them together."""
    out = kit.out / "whole"
    shutil.rmtree(out / "cache", ignore_errors=True)
    pictures = noise_pictures(out / f"pictures_{base.side_px}", kit.scale.num_pictures, base.side_px)
    settings = {
        "subject.images": pictures,
        "subject.class_noun": "dog",
        "model.base": kept_base(kit.folder_of(base), base.architecture),
        "prior.mode": prior,
        "memory.device": kit.device,
        "run.cache": out / "cache",
        **kit.scale.run_settings,
        **kit.scale.whole_settings,
    }
    parts = time_to_adapter.measure([f"{key}={value}" for key, value in settings.items()], out, "run")
    return {"in_all_s": round(sum(parts.values()), 2), **{f"{name}_s": round(s, 2) for name, s in parts.items()}}
