"""What devices can do and say of themselves, and how tensors get there and back."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_booth import cards
from lora_booth.cards import Card
from lora_booth.config import Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

OFFLOADED_BYTES = 2**20
"""Smaller tensors stay where they are: they are many, save little, and most are held by others too."""


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


def dtype_for(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of `model.precision` on `device`; "auto": float32 on a CPU, bf16 where the card has it, else fp16."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` of main memory on `device`; on a card the copy is queued from pinned memory and not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def offloading() -> torch.autograd.graph.saved_tensors_hooks:
    """Inside, what autograd saves waits in pinned main memory until the backward pass asks for it.

    The copies are queued among the device's other work and not waited for. Tensors without data leave no copy.
    """
    return torch.autograd.graph.saved_tensors_hooks(_away, _back)


def _away(tensor: Tensor) -> tuple[torch.device, Tensor]:
    if tensor.nbytes < OFFLOADED_BYTES:
        return tensor.device, tensor
    if tensor.is_meta:
        return tensor.device, tensor.new_empty(1).expand(tensor.shape)
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return tensor.device, copy.copy_(tensor, non_blocking=True)


def _back(saved: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = saved
    return tensor.contiguous() if tensor.is_meta else tensor.to(device, non_blocking=True)
