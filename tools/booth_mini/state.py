"""Resumable training: one file with weights, EMA, optimizer and step, written atomically; and the learning rate."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: warm-up, then a cosine from `learning_rate` to 2 % of it at step `steps`."""

    steps: int
    learning_rate: float
    warmup_steps: int = 100

    def at(self, step: int) -> float:
        """The learning rate of update `step` (0-based)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        share = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


class Training:
    """A model with its EMA, optimizer and step count; `run` advances it, saving every five minutes."""

    def __init__(
        self,
        model: nn.Module,
        path: Path,
        schedule: Schedule,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        ema_decay: float = 0.999,
    ) -> None:
        self.model, self.path, self.schedule = model, path, schedule
        adamw = torch.optim.AdamW(_decay_groups(model), lr=schedule.learning_rate, betas=(0.9, 0.98))
        self.optimizer = optimizer or adamw
        self.ema = AveragedModel(model, multi_avg_fn=ema_update(ema_decay))
        self.step = 0
        if path.exists():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict(saved["model"])
            self.ema.load_state_dict(saved["ema"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]
            print(f"continuing {path.name} at step {self.step}", flush=True)

    @property
    def steps_left(self) -> range:
        """The steps that `run` would take now."""
        return range(self.step, self.schedule.steps)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begins at given weights (the shipped ones, widened) when there is no saved state to continue."""
        if self.step == 0:
            self.model.load_state_dict(weights)
            self.ema.module.load_state_dict(weights)

    def run(
        self,
        loss_at: Callable[[int], Tensor],
        on_save: Callable[[nn.Module, int], None],
        *,
        save_every_s: float = 300.0,
        until: int | None = None,
    ) -> None:
        """Trains until step `until`, by default the schedule's end; ends early, but saved, on a SIGTERM.

        `loss_at(step)` must depend on the step only, so that a resumed run agrees. `on_save` gets the EMA model and the
        step after each save. Raises FloatingPointError on a loss that is not finite.
        """
        begun = saved = time.time()
        first_step, total, count = self.step, 0.0, 0
        end = self.schedule.steps if until is None else until
        asked_to_end: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: asked_to_end.append(number))
        while self.step < end:
            self._update(loss := loss_at(self.step))
            total, count = total + float(loss.detach()), count + 1
            is_last = self.step == end
            if self.step % 50 == 0 or is_last:
                rate = (self.step - first_step) / (time.time() - begun)
                left_min = (end - self.step) / rate / 60
                print(f"step {self.step} loss {total / count:.4f} {rate:.2f}/s, {left_min:.0f} min", flush=True)
                total, count = 0.0, 0
            if time.time() - saved > save_every_s or is_last:
                self.save()
                on_save(self.ema.module, self.step)
                saved = time.time()
            elif asked_to_end:
                self.save()
                raise SystemExit(f"{self.path.name} saved at step {self.step}")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _update(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss)} at step {self.step} of {self.path.name}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(self.step) * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        self.step += 1

    def save(self) -> None:
        """Writes the state beside its final name first, so that a kill leaves the previous one whole."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        with replacing(self.path) as part:
            torch.save(state, part)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 pay: on GPUs, and on CPUs with instructions for them.

    Without these a step of the autoencoder took ten times as long in bfloat16 as in float32 (AMD EPYC (Zen 3), one
    thread, 2026-11-28).
    """
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 for the matrix products of a training step, where that is faster."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_fast_bfloat16(device))


def ema_update(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """An averaging function that begins fast: after n updates the decay is min(decay, (1 + n) / (10 + n))."""

    def update(averages: Tensors, currents: Tensors, num_averaged: Tensor | int) -> None:
        count = int(num_averaged)
        share = 1 - min(decay, (1 + count) / (10 + count))
        for average, current in zip(averages, currents, strict=True):
            average.lerp_(current, share)

    return update


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    yield part
    os.replace(part, path)


def load_ema(path: Path) -> dict[str, Tensor]:
    """The EMA weights of a saved state, under the model's own names."""
    saved = torch.load(path, map_location="cpu", weights_only=True)["ema"]
    return {key.removeprefix("module."): value for key, value in saved.items() if key.startswith("module.")}


def _decay_groups(model: nn.Module) -> list[dict[str, object]]:
    """Weight decay on matrices and kernels only."""
    wide = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    thin = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": wide, "weight_decay": 0.02}, {"params": thin, "weight_decay": 0.0}]
