"""What a CUDA card says of itself, and how tensors get there. On a CPU everything that it says is None."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_booth import cards
from lora_booth.cards import Card


def here() -> torch.device:
    """The device that a run of one process takes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def card(device: torch.device) -> Card | None:
    """The card that `device` is, where its speed is known."""
    return cards.find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def free_gib(device: torch.device) -> float | None:
    """Memory that nobody uses now."""
    return torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else None


def peak_gib(device: torch.device) -> float | None:
    """Most memory held by tensors of this process so far."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def used_share(device: torch.device) -> float | None:
    """Share of the memory that anybody uses."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return 1 - free / total


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` of main memory on `device`; on a card the copy is queued from pinned memory and not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
