"""The devices that a run may compute on: what each says of itself, and how tensors get there.

What lives here: every question to torch about a device. What does not: what kinds of devices can do and what follows
(`abilities.py`), which device a process of several gets (accelerate, in `verbs/train.py`), how fast cards are
(`cards.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lora_booth.config.section import Precision
from lora_booth.errors import ConfigError
from lora_booth.models import cards
from lora_booth.models.abilities import LACKS, NAMES, Abilities, Ability, Kind, best_precision, not_here
from lora_booth.models.cards import Card
from lora_booth.run import number_types, systems

_BITSANDBYTES: tuple[Ability, ...] = ("8-bit optimizers", "paged optimizers", "nf4", "int8")
_WITHOUT_BF16 = ("gfx7", "gfx8", "gfx900", "gfx902", "gfx906", "gfx909", "gfx90c", "gfx10")
"""AMD's architectures before CDNA 1 and RDNA 3, whose matrix instructions are the first for bf16 (AMD's ISA documents).
torch says that all have it, and computes it by other means."""
OFFLOADED_BYTES = 2**20
"""Smaller tensors stay where they are: they are many, save little, and most are held by others too."""


def here(wanted: str = "auto") -> torch.device:
    """The device that a run of one process takes, as accelerate chooses it; `wanted`: memory.device."""
    asks_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "y", "yes", "t", "true", "on")
    found = None if wanted == "cpu" or asks_for_cpu else torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def found(wanted: str, key: str) -> torch.device:
    """`here`. Raises ConfigError, naming the setting `key`, when that is not the kind of device that is `wanted`."""
    device = here(wanted)
    fault = not_here(wanted, key, abilities(device))
    if fault is not None:
        raise ConfigError(fault)
    return device


def kind(device: torch.device) -> Kind:
    """Which row of `LACKS` is meant. Raises ConfigError for a device that has none."""
    if device.type == "cuda":
        return "rocm" if torch.version.hip else "cuda"
    known: Kind | None = next((row for row in LACKS if row == device.type), None)
    if known is None:
        raise ConfigError(
            f'torch finds a device "{device.type}", which lora_booth knows nothing of; set memory.device = "cpu".'
        )
    return known


def lacks(device: torch.device) -> dict[Ability, str]:
    """What `device` lacks, and why, in one clause each. Raises ConfigError as `kind` does."""
    row = kind(device)
    return {**LACKS[row], **_BY_MODEL[row](device)}


def abilities(device: torch.device) -> Abilities:
    """What `device` is and lacks. Raises ConfigError as `kind` does."""
    return Abilities(device.type, kind(device), lacks(device))


def name(device: torch.device) -> str:
    """What its driver calls a card; else what people call its kind."""
    return str(_module(device).get_device_name(device)) if device.type in ("cuda", "xpu") else NAMES[kind(device)]


def card(device: torch.device) -> Card | None:
    """The card that `device` is, where its speed is known."""
    return cards.find(name(device)) if kind(device) == "cuda" else None


def dtype_for(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of `model.precision` on `device`; "auto": float32 on a CPU, bf16 where it is fast, else fp16."""
    return number_types.DTYPES[precision if precision != "auto" else best_precision(abilities(device))]


def _cuda_lacks(device: torch.device) -> dict[Ability, str]:
    """torch: bf16 from compute capability 8.0 on; bitsandbytes: from 6.0 on; Triton: from 7.0 on."""
    major, minor = torch.cuda.get_device_capability(device)
    found: dict[Ability, str] = {} if find_spec("triton") else {"compiling": "triton is not installed"}
    for first, lost in ((8, ("fast bf16",)), (7, ("compiling",)), (6, _BITSANDBYTES)):
        if major < first:
            why = f"compute capability {major}.{minor} is below {first}.0"
            found |= dict.fromkeys(lost, why)
    return found


def _rocm_lacks(device: torch.device) -> dict[Ability, str]:
    found: dict[Ability, str] = {} if find_spec("triton") else {"compiling": "triton is not installed"}
    architecture = str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    if architecture.startswith(_WITHOUT_BF16):
        found["fast bf16"] = f"{architecture} has no matrix instructions for it"
    return found


def _xpu_lacks(device: torch.device) -> dict[Ability, str]:
    """bitsandbytes registers 8-bit optimizers for XPU through Triton alone; a loss scale is inverted in float64
    (torch/amp/grad_scaler.py), which the Arc A series lacks (pytorch issue 147731)."""
    properties, found = torch.xpu.get_device_properties(device), dict[Ability, str]()
    if not find_spec("triton"):
        why = "triton is not installed"
        found |= {"compiling": why, "8-bit optimizers": why, "paged optimizers": why}
    if not properties.has_fp64:
        found["fp16"] = "it has no float64, which loss scaling needs"
    if not properties.has_bfloat16_conversions:
        found["fast bf16"] = "it has no instructions for it"
    return found


def _mps_lacks(device: torch.device) -> dict[Ability, str]:
    """As accelerate has it (`is_bf16_available`)."""
    has_bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
    return {} if has_bf16 else {"bf16": "it needs macOS 14"}


def _cpu_lacks(device: torch.device) -> dict[Ability, str]:
    return {}


_BY_MODEL: dict[Kind, Callable[[torch.device], dict[Ability, str]]] = {
    "cuda": _cuda_lacks,
    "rocm": _rocm_lacks,
    "xpu": _xpu_lacks,
    "mps": _mps_lacks,
    "cpu": _cpu_lacks,
}


def free_gib(device: torch.device) -> float | None:
    """Memory that a run may take, None on a CPU: what nobody uses now."""
    figures = _memory(device)
    return None if figures is None else figures[0] / 2**30


def used_share(device: torch.device) -> float | None:
    """Share of the memory that anybody uses, None on a CPU."""
    figures = _memory(device)
    return None if figures is None else 1 - figures[0] / figures[1]


def peak_gib(device: torch.device) -> float | None:
    """Most memory held by tensors of this process so far, None on a CPU.

    On MPS what Metal holds for it now, which does not shrink while it computes.
    """
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if device.type == "cpu":
        return None
    return float(_module(device).max_memory_allocated(device)) / 2**30


def _memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes that are free, and all there are. On MPS, which shares main memory: of what Metal recommends to a process,
    and no more than the system has left."""
    if device.type == "cpu":
        return None
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return max(0, min(total - torch.mps.driver_allocated_memory(), systems.available_memory_bytes())), total
    module = _module(device)
    try:
        free, total = module.mem_get_info(device)
    except RuntimeError:  # Intel's drivers need not tell what is free (intel/torch-xpu-ops)
        total = module.get_device_properties(device).total_memory
        free = total - module.memory_reserved(device)
    return int(free), int(total)


def empty_cache(device: torch.device) -> None:
    """Give back what torch's allocator holds unused."""
    if device.type != "cpu":
        _module(device).empty_cache()


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` of main memory on `device`; where memory can be pinned the copy is queued and not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if _pins(device) else tensor.to(device)


def fetch(tensor: Tensor) -> Callable[[], list[float]]:
    """A function that gives the numbers of `tensor` `[N]`; where memory can be pinned the copy is queued now, and what
    the device is given after it is not waited for."""
    if not _pins(tensor.device):
        return tensor.tolist
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    arrival = _module(tensor.device).Event()
    arrival.record()

    def numbers() -> list[float]:
        arrival.synchronize()
        return [float(value) for value in copy.tolist()]

    return numbers


def offloading() -> torch.autograd.graph.saved_tensors_hooks:
    """Inside, what autograd saves waits in main memory until the backward pass asks for it.

    Where that is pinned the copies are queued among the device's other work and not waited for. Tensors without data
    leave no copy.
    """
    return torch.autograd.graph.saved_tensors_hooks(_away, _back)


def _away(tensor: Tensor) -> tuple[torch.device, Tensor]:
    if tensor.nbytes < OFFLOADED_BYTES:
        return tensor.device, tensor
    if tensor.is_meta:
        return tensor.device, tensor.new_empty(1).expand(tensor.shape)
    is_pinned = _pins(tensor.device)
    copy = torch.empty_like(tensor, device="cpu", pin_memory=is_pinned)
    return tensor.device, copy.copy_(tensor, non_blocking=is_pinned)


def _back(saved: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = saved
    return tensor.contiguous() if tensor.is_meta else tensor.to(device, non_blocking=_pins(device))


def _pins(device: torch.device) -> bool:
    return device.type != "meta" and "pinned memory" not in LACKS[kind(device)]


def _module(device: torch.device) -> Any:
    """torch.cuda, torch.xpu or torch.mps."""
    return getattr(torch, device.type)
