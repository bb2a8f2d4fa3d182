"""What steps brought, read one step late, so that the device computes the next one meanwhile.

Numbers that are not finite end the run there, before anything of that step or the one after it is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_booth.adapter.weights import plain_path
from lora_booth.errors import NumericError
from lora_booth.models import devices
from lora_booth.training import session
from lora_booth.training.order import Row
from lora_booth.training.session import Session

ROLES = ("instance", "class", "prior")
MAX_SKIPPED_STEPS = 20
"""Overflowing fp16 steps in a row after which the run stops; the loss scale halves at each."""


@dataclass(frozen=True)
class Done:
    """A step whose numbers are on their way from the device: the loss of each row, whether a process was asked to stop,
    the loss of the update's norm, and the norm of the gradient before clipping."""

    step: int
    rows: Sequence[Row]
    learning_rate: float
    numbers: Callable[[], list[float]]


class Tally:
    """Reads the numbers of each step, tells them, and ends the run where they are not finite.

    `is_stopping`: whether by the last step that was read a process was asked to stop.
    """

    def __init__(self, s: Session) -> None:
        self.is_stopping = False
        self._s, self._waiting, self._skipped = s, list[Done](), 0
        self._is_unchecked = True
        self._began = time.perf_counter()

    def expect(self, done: Done) -> None:
        """Read the step before, and this one as soon as the next one is on its way."""
        self.read()
        self._waiting.append(done)
        if self._is_unchecked:  # gradients are there until the next step
            self.read()

    def read(self) -> None:
        """Read what was not read yet, waiting for the device. Raises NumericError where it is not finite."""
        while self._waiting:
            self._read(self._waiting.pop())

    def restart_clock(self) -> None:
        """Whatever was done since the last step was none of the next one."""
        self._began = time.perf_counter()

    def _read(self, done: Done) -> None:
        s = self._s
        *losses, asked, norm, grad_norm = done.numbers()
        self.is_stopping = asked > 0
        if math.isfinite(grad_norm):
            self._skipped = 0
            if self._is_unchecked:  # an fp16 run may overflow in its first steps
                _require_gradients(s)
                self._is_unchecked = False
        else:
            self._skipped += 1
            _require_recoverable(s, done, losses, self._skipped)
        now = time.perf_counter()
        metrics = {"learning_rate": done.learning_rate, "grad_norm": grad_norm, "seconds": now - self._began}
        metrics |= {"norm_loss": norm} if s.config.prior.norm_weight else {}
        self._began = now
        _log(s, done.step + 1, done.rows, losses, metrics)
        for warning in s.watchdog.observe(metrics["seconds"], devices.used_share(s.accelerator.device)):
            s.report.warn(warning)


def _require_recoverable(s: Session, done: Done, losses: Sequence[float], skipped: int) -> None:
    """An overflow under fp16 loss scaling is skipped and told; everything else that is not finite ends the run."""
    number = done.step + 1
    if s.scaler.is_enabled() and all(map(math.isfinite, losses)) and skipped <= MAX_SKIPPED_STEPS:
        s.report.event("skipped_step", f"step {number} overflowed in fp16 and was skipped", step=number)
        return
    culprits = [row.item.name for row, loss in zip(done.rows, losses, strict=True) if not math.isfinite(loss)]
    cause = f"the loss of {', '.join(culprits)}" if culprits else "the gradient"
    raise NumericError(f"{cause} is not finite at step {number}; {session.LOWER_RATE}")


def _require_gradients(s: Session) -> None:
    """Name the adapted layers that the first step gives no gradient, and raise NumericError when it gives none at all.

    Such a layer stays what it is for the whole run: the loss does not depend on it.
    """
    gradients = {id(parameter): gradient for flat in s.trained for parameter, gradient in flat.gradients()}
    is_alive: dict[str, bool] = {}
    for component, module in s.adapted.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                layer = f"{component}.{plain_path(name.partition('.lora_')[0])}"
                is_alive[layer] = is_alive.get(layer, False) or bool(gradients[id(parameter)].any())
    dead = [layer for layer, alive in is_alive.items() if not alive]
    if len(dead) == len(is_alive):
        raise NumericError(
            "no adapted layer gets a gradient, so nothing would be learnt; choose other adapter.targets."
        )
    if dead:
        s.report.warn(
            f"{len(dead)} of {len(is_alive)} adapted layers get no gradient and will not learn, first {dead[0]}; leave "
            "them out with adapter.targets."
        )


def _log(s: Session, number: int, rows: Sequence[Row], losses: Sequence[float], metrics: dict[str, float]) -> None:
    """Tell everybody who listens what step `number`, counted from 1, brought (main process)."""
    if not s.accelerator.is_main_process:
        return
    by_role = {role: [x for r, x in zip(rows, losses, strict=True) if r.item.role == role] for role in ROLES}
    values = {f"{role}_loss": sum(x) / len(x) for role, x in by_role.items() if x} | metrics
    s.run.append_metrics({"step": number, **values})
    s.accelerator.log(values, step=number)
    memory = devices.peak_gib(s.accelerator.device)
    s.report.progress("train", number, s.config.train.steps or number, **values, memory_gib=memory)
