"""Which card, as torch sees it, and the rates that it reaches here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch

from benchmarks import rates
from benchmarks.card.kit import Kit
from benchmarks.card.outcomes import Figures, Job, NotOffered


def jobs(kit: Kit) -> Iterator[Job]:
    """What torch says of it first, since without that nothing else can be measured."""
    yield "torch", lambda: _torch(kit)
    yield "rates", lambda: asdict(rates.measured_card())


def _torch(kit: Kit) -> Figures:
    """Raises NotOffered where torch finds no card."""
    figures: Figures = {"torch": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
    if kit.device == "cpu":
        return figures
    if not torch.cuda.is_available():
        raise NotOffered(f"torch {torch.__version__} finds no CUDA card; `lora-booth doctor` tells what is missing")
    free, total = torch.cuda.mem_get_info()
    return figures | {
        "name": torch.cuda.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cudnn": torch.backends.cudnn.version(),
        "total_gib": round(total / 2**30, 2),
        "free_gib": round(free / 2**30, 2),
    }
