"""What kinds of devices can do, and what that means for a config.

What lives here: the table `LACKS`, and rules that need no torch. What does not: asking a device (`devices.py`). ROCm is
a kind of its own here, though torch calls its devices "cuda".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lora_booth.config.config import Config
from lora_booth.config.inputs import shown
from lora_booth.errors import ConfigError

AnyConfig = TypeVar("AnyConfig", bound=Config)

Kind = Literal["cuda", "rocm", "xpu", "mps", "cpu"]
Ability = Literal[
    "fp16",
    "bf16",
    "fast bf16",
    "8-bit optimizers",
    "paged optimizers",
    "nf4",
    "int8",
    "xformers",
    "compiling",
    "graphs",
    "dropout in recomputed blocks",
    "pinned memory",
    "memory of its own",
]
NAMES: dict[Kind, str] = {"cuda": "CUDA", "rocm": "ROCm", "xpu": "XPU (Intel)", "mps": "MPS (Apple)", "cpu": "the CPU"}
LACKS: dict[Kind, dict[Ability, str]] = {
    "cuda": {},
    "rocm": {},
    "xpu": {"xformers": "it has no kernels for Intel", "graphs": "torch records none there"},
    "mps": {
        "8-bit optimizers": "bitsandbytes has none for Metal",
        "paged optimizers": "bitsandbytes has none for Metal",
        "xformers": "it has no kernels for Metal",
        "compiling": "torch calls it a prototype there",
        "graphs": "torch records none there",
        "dropout in recomputed blocks": "torch does not draw the same numbers again there",
        "pinned memory": "it gains nothing where memory is shared",
        "memory of its own": "it computes in main memory",
    },
    "cpu": {
        "fast bf16": "few processors compute it as fast",
        "xformers": "it has no kernels for training there",
        "compiling": "runs on a CPU are the same bit for bit",
        "graphs": "it starts operations itself",
        "pinned memory": "nothing is copied",
    },
}
"""What devices of a kind lack whatever their model, and why; `lacks` adds what depends on the model. Everything else
they can. Sources, read in torch 2.13 and bitsandbytes 0.50.2:

- 8-bit optimizers, NF4, int8: the table "Accelerator support" of bitsandbytes' README, and which kernels its
  `backends/` register. Paged ones: `cget_managed_ptr` in its libraries for CUDA, ROCm and XPU; on a CPU they are
  not paged.
- xformers: its wheels for CUDA and ROCm; diffusers asks for a card before it takes it.
- Compiling: what a trial before the first step may try by itself. torch/_inductor has Triton for CUDA, ROCm and XPU.
- Graphs: `torch.cuda.CUDAGraph`, which builds for ROCm have too.
- Dropout in recomputed blocks: torch/utils/checkpoint.py keeps the random state of device modules that have
  `_initialized`, which torch.mps has not.
- Pinned memory: on MPS a copy that is not waited for may read a source that is gone (pytorch issue 189690), and pinning
  gains nothing (pull request 181720)."""
NEEDS: dict[tuple[str, Any], Ability] = {
    ("model.precision", "bf16"): "bf16",
    ("model.precision", "fp16"): "fp16",
    ("model.quantize", "nf4"): "nf4",
    ("model.quantize", "int8"): "int8",
    ("model.attention", "xformers"): "xformers",
    ("optimizer.name", "adamw8bit"): "8-bit optimizers",
    ("optimizer.name", "lion8bit"): "8-bit optimizers",
    ("optimizer.name", "paged_adamw8bit"): "paged optimizers",
    ("train.compile", "graph"): "graphs",
    ("memory.offload_activations", True): "memory of its own",
    ("memory.offload_denoiser", True): "memory of its own",
}
"""Key and value of a setting to what it needs."""


@dataclass(frozen=True)
class Abilities:
    """What a device is. `type`: what torch calls it; `missing`: what it lacks, and why, in one clause each."""

    type: str
    kind: Kind
    missing: Mapping[Ability, str]


CPU = Abilities("cpu", "cpu", LACKS["cpu"])


def best_precision(device: Abilities) -> Literal["fp32", "bf16", "fp16"]:
    """What model.precision = "auto" means on `device`."""
    missing = device.missing
    if device.kind == "cpu" or {"bf16", "fp16"} <= missing.keys():
        return "fp32"
    return "bf16" if "fp16" in missing or not {"bf16", "fast bf16"} & missing.keys() else "fp16"


def best_optimizer(device: Abilities) -> Literal["adamw8bit", "adamw"]:
    """What optimizer.name = "auto" means on `device`: 8-bit Adam where it can be had and saves device memory."""
    return "adamw" if device.kind == "cpu" or "8-bit optimizers" in device.missing else "adamw8bit"


def decided(config: AnyConfig, device: Abilities) -> AnyConfig:
    """`config` with each "auto" as what it means on `device`, so that a run stays what it is on another one."""
    precision, name, compile = config.model.precision, config.optimizer.name, config.train.compile
    has_none = {"compiling", "graphs"} <= LACKS[device.kind].keys()
    is_never_tried = compile == "trial" and (has_none or config.adapter.dropout > 0)
    return config.with_values(
        {
            "model": {"precision": best_precision(device) if precision == "auto" else precision},
            "optimizer": {"name": best_optimizer(device) if name == "auto" else name},
            "train": {"compile": False if is_never_tried else compile},
            "memory": {"device": device.type if config.memory.device == "auto" else config.memory.device},
        }
    )


def require(config: Config, device: Abilities) -> None:
    """Raises ConfigError, with all that `config` asks for and `device` lacks, before anything is computed."""
    faults = faults_of(config, device)
    if faults:
        raise ConfigError("\n".join(faults))


def faults_of(config: Config, device: Abilities) -> list[str]:
    """What `config` asks for and `device` lacks: what, where, and what to set instead, a line each."""
    fault = not_here(config.memory.device, "memory.device", device)
    if fault is not None:
        return [fault]
    missing, row = device.missing, device.kind
    values = {f"{section}.{key}": value for section, settings in config for key, value in settings}
    faults = [
        f"{key} is {json.dumps(value)}, which {NAMES[row]} cannot do ({missing[ability]}); "
        f"set {_instead(key, value, missing)}."
        for (key, value), ability in NEEDS.items()
        if values[key] == value and ability in missing
    ]
    is_recomputed = config.train.gradient_checkpointing != 0
    if config.adapter.dropout and is_recomputed and "dropout in recomputed blocks" in missing:
        faults.append(
            f"adapter.dropout is {config.adapter.dropout:g}, but on {NAMES[row]} blocks that are computed again would "
            "drop other inputs; set train.gradient_checkpointing = 0, or adapter.dropout = 0."
        )
    return faults


def without_moving(config: AnyConfig, device: Abilities) -> AnyConfig:
    """`config` without what saves nothing on a device that computes in main memory: moving things there."""
    if "memory of its own" not in device.missing:
        return config
    waiting = ("offload_activations", "offload_denoiser")
    return config.with_values({"memory": {key: getattr(config.memory, key) or False for key in waiting}})


def _instead(key: str, value: Any, missing: Mapping[Ability, str]) -> str:
    """The setting to take in place of one that the device lacks, as one would write it."""
    other: Any = {"model.quantize": "none", "model.attention": "sdpa", "optimizer.name": "adamw"}.get(key, False)
    if key == "model.precision":
        other = next((half for half in ("bf16", "fp16") if half != value and half not in missing), "fp32")
    return f"{key} = {json.dumps(other)}"


def not_here(wanted: str, key: str, device: Abilities) -> str | None:
    """What is wrong where `device` is not the kind that the setting `key` asks for, else None."""
    if wanted in ("auto", device.type):
        return None
    there = "no other device than the CPU" if device.type == "cpu" else f"{NAMES[device.kind]} here"
    return (
        f'{key} is "{shown(wanted)}", but torch finds {there}; set it to "auto" or "{device.type}". '
        "`lora-booth doctor` tells what is missing."
    )
