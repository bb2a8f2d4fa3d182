"""Optimizers as rows of a table, and the learning rate as a pure function of the step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_booth.config.settings import OptimizerConfig
from lora_booth.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from lora_booth.training.flat import Flat

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class OptimizerRow:
    """Where an optimizer's class is, and which of our settings it takes under which name."""

    module: str
    class_name: str
    note: str
    extra: str = ""
    """The pip extra that installs it; empty when it is always there."""
    takes_betas: bool = True
    is_elementwise: bool = True
    """Numbers are updated without regard to the shape of their parameter, so that all may lie in one vector."""
    has_modes: bool = False
    """Its weights must be switched with .train() and .eval() around updates, as schedule-free averaging needs."""
    fixed: tuple[tuple[str, Any], ...] = ()


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw": OptimizerRow("torch.optim", "AdamW", "float32 moments", fixed=(("fused", True),)),
    "adamw8bit": OptimizerRow("bitsandbytes.optim", "AdamW8bit", "8-bit moments, block-wise quantised"),
    "paged_adamw8bit": OptimizerRow(
        "bitsandbytes.optim", "PagedAdamW8bit", "8-bit moments that may move to main memory"
    ),
    "lion8bit": OptimizerRow("bitsandbytes.optim", "Lion8bit", "one 8-bit moment; a third of AdamW's learning rate"),
    "adafactor": OptimizerRow(
        "transformers.optimization",
        "Adafactor",
        "factored second moment, no first",
        takes_betas=False,
        is_elementwise=False,
        fixed=(("scale_parameter", False), ("relative_step", False), ("warmup_init", False)),
    ),
    "prodigy": OptimizerRow("prodigyopt", "Prodigy", "finds its own step size; learning_rate = 1", extra="optim"),
    "schedulefree": OptimizerRow(
        "schedulefree", "AdamWScheduleFree", "averages instead of decaying", extra="optim", has_modes=True
    ),
}


def flatten(
    parameters: Sequence[torch.nn.Parameter],
    config: OptimizerConfig,
    *,
    device_type: str,
    read_in: torch.dtype | None = None,
) -> list[Flat]:
    """What the optimizer of `config` updates: all `parameters` as one vector, or each by itself where shapes matter.
    `read_in`: as `Flat` has it."""
    from lora_booth.training.flat import Flat

    row = OPTIMIZERS[chosen_name(config, device_type)]
    groups = [parameters] if row.is_elementwise else [[parameter] for parameter in parameters]
    return [Flat(group, read_in) for group in groups]


def halves(
    module: torch.nn.Module, parameters: Sequence[torch.nn.Parameter], ratio: float
) -> list[tuple[Sequence[torch.nn.Parameter], float]]:
    """The trained `parameters` of a component, in one part or in two that learn at their own rates, each with the
    factor on the learning rate: LoRA+ (arXiv 2402.12354) has B learn `ratio` times as fast as all else."""
    if ratio == 1:
        return [(parameters, 1.0)]
    ups = {id(parameter) for name, parameter in module.named_parameters() if ".lora_B." in name}
    slow, fast = ([p for p in parameters if (id(p) in ups) == is_up] for is_up in (False, True))
    return [(slow, 1.0), (fast, ratio)]


def make(groups: Iterable[dict[str, Any]], config: OptimizerConfig, *, device_type: str) -> torch.optim.Optimizer:
    """The optimizer of `config` over parameter groups that carry their own `lr`, with averages where it wants them.

    Raises ConfigError when its package is not installed.
    """
    name = chosen_name(config, device_type)
    row = OPTIMIZERS[name]
    try:
        cls: Callable[..., torch.optim.Optimizer] = getattr(importlib.import_module(row.module), row.class_name)
    except ImportError as error:
        remedy = f"pip install 'lora-booth[{row.extra}]'" if row.extra else "reinstall lora-booth"
        raise ConfigError(
            f'optimizer.name is "{name}", but {row.module} cannot be imported ({error}); '
            f'{remedy}, or set optimizer.name = "adamw".'
        ) from None
    settings: dict[str, Any] = {"weight_decay": config.weight_decay, **dict(row.fixed)}
    if row.takes_betas:
        settings["betas"] = config.betas
    optimizer: Any = cls(list(groups), **settings)
    if config.ema_decay is not None:
        from lora_booth.training.averages import Averaging

        optimizer = Averaging(optimizer, config.ema_decay)
    return optimizer  # type: ignore[no-any-return]  # all that is asked of one, Averaging has


def chosen_name(config: OptimizerConfig, device_type: str) -> str:
    """The key of OPTIMIZERS that `optimizer.name` means on such a device."""
    return config.name if config.name != "auto" else default_name(device_type)


def default_name(device_type: str) -> str:
    """What `optimizer.name = "auto"` means: 8-bit Adam where it saves device memory."""
    return "adamw8bit" if device_type == "cuda" else "adamw"


def set_mode_(optimizer: torch.optim.Optimizer, *, training: bool) -> None:
    """Switch an optimizer that averages weights between the ones to train and the ones to use; no-op for the others."""
    names = ["Averaging", *(row.class_name for row in OPTIMIZERS.values() if row.has_modes)]
    if type(optimizer).__name__ in names:
        optimizer.train() if training else optimizer.eval()  # type: ignore[attr-defined]


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """Factor on the base learning rate for the update of `step` (0-based), in (0, 1].

    Warm-up is linear and reaches 1 at step `warmup_steps`; the first update is already larger than 0. Linear and cosine
    then fall towards 0, which they would reach at step `steps`, one past the last.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
