"""Settings with every choice made: what planning gives, and all that training takes.

`Filled` has all that does not depend on a device or its memory: sizes and counts. `Resolved` has the rest too, so in it
no setting that decides what is computed, or how, is open: neither None nor "auto".
"""

from __future__ import annotations

from typing import Literal

from lora_booth.config.config import Config
from lora_booth.config.machine import MemoryConfig
from lora_booth.config.settings import DataConfig, ModelConfig, OptimizerConfig, TrainConfig


class FilledData(DataConfig):
    """[data] with its sizes."""

    resolution: int
    bucket_step: int


class FilledTrain(TrainConfig):
    """[train] with its counts."""

    steps: int
    save_every_steps: int


class FilledOptimizer(OptimizerConfig):
    """[optimizer] with its counts."""

    warmup_steps: int


class Filled(Config):
    """A config in which only what depends on a device is open."""

    data: FilledData
    train: FilledTrain
    optimizer: FilledOptimizer


class ResolvedModel(ModelConfig):
    """[model] with its number type."""

    precision: Literal["fp32", "bf16", "fp16"]


class ResolvedOptimizer(FilledOptimizer):
    """[optimizer] with its name."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "adafactor", "prodigy", "schedulefree"]


class ResolvedTrain(FilledTrain):
    """[train] with its share of blocks."""

    gradient_checkpointing: float


class ResolvedMemory(MemoryConfig):
    """[memory] with the device and how its memory is used; `budget_gib` None: what is free."""

    device: Literal["cuda", "xpu", "mps", "cpu"]
    pictures_at_once: int
    tiled_decoding: bool
    offload_activations: bool
    offload_denoiser: bool


class Resolved(Filled):
    """A config with every choice made."""

    model: ResolvedModel
    optimizer: ResolvedOptimizer
    train: ResolvedTrain
    memory: ResolvedMemory
