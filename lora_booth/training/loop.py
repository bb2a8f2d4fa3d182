"""The training loop: `optimize` reads top to bottom as one step.

What surrounds it is in `verbs/train.py`.

Words: a *step* is one optimizer update over the effective batch; a *micro-step* is one forward and backward pass of
rows of one shape. The run is a pure function of (config, step): nothing in the loop depends on what ran before but the
adapter and the optimizer.

A step waits for the device once, for its losses and the norm of its gradient; until then the next inputs are on their
way, from pinned memory. Processes add their gradients as one flat sum for each step, without a DDP wrapper: the loop
stays readable, and short micro-batches cannot keep one process waiting for another.
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_booth.adapter.weights import plain_path
from lora_booth.errors import NumericError
from lora_booth.models import devices
from lora_booth.run.randomness import generator_for
from lora_booth.training import optimizers, session
from lora_booth.training.batch import Batch, sample_losses
from lora_booth.training.objective import draw
from lora_booth.training.order import Row, micro_batches
from lora_booth.training.session import Session

ROLES = ("instance", "class", "prior")
MAX_SKIPPED_STEPS = 20
"""Overflowing fp16 steps in a row after which the run stops; the loss scale halves at each."""


@dataclass(frozen=True)
class MicroStep:
    """Rows of one shape, with what a pass of them needs on the device. `positions`: int64, `weights`: float32 `[B]`."""

    step: int
    rows: Sequence[Row]
    batch: Batch
    positions: Tensor
    weights: Tensor


def optimize(s: Session, start: int) -> None:
    """Steps `start` to the last, saving and drawing on the way. Raises Interrupted after a save, NumericError before a
    step that would not be finite."""
    train, order = s.config.train, s.prepared.order
    skipped, following, is_unchecked = 0, _with_first_made(micro_steps(s, start)), True
    for step in range(start, train.steps):
        began = time.perf_counter()
        rows = order.at(step)
        learning_rate = _set_learning_rate_(s, step)
        session.set_training_(s, True)
        on_device = torch.zeros(len(rows), device=s.accelerator.device)
        for micro in following:
            loss = losses_of(s, micro)
            s.scaler.scale((loss * micro.weights).sum()).backward()
            on_device.index_copy_(0, micro.positions, loss.detach())
        following = _with_first_made(micro_steps(s, step + 1))  # while the device still computes
        norm_loss = _norm_backward_(s)
        on_device, is_stopping = _share(s, on_device)
        sums = torch.stack([norm_loss, _reduce_and_clip_(s)])
        *losses, norm, grad_norm = torch.cat([on_device, sums]).tolist()  # here it is waited for
        if math.isfinite(grad_norm):
            skipped = 0
            if is_unchecked:  # an fp16 run may overflow in its first steps
                _require_gradients(s)
                is_unchecked = False
        else:
            skipped += 1
            _require_recoverable(s, step, rows, losses, skipped)
        s.scaler.step(s.optimizer)
        s.scaler.update()
        s.optimizer.zero_grad(set_to_none=True)
        metrics = {
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "seconds": time.perf_counter() - began,
        }
        metrics |= {"norm_loss": norm} if s.config.prior.norm_weight else {}
        _log(s, step + 1, rows, losses, metrics)
        for warning in s.watchdog.observe(metrics["seconds"], devices.used_share(s.accelerator.device)):
            s.report.warn(warning)
        _save_and_draw(s, step + 1, is_stopping=is_stopping)
        if is_stopping:
            done = f"stopped after step {step + 1} of {train.steps}, everything is saved"
            s.stop.check(f"{done}; continue with: {s.continue_command}")


def _share(s: Session, losses: Tensor) -> tuple[Tensor, bool]:
    """Losses of all processes, and whether one of them was asked to stop, on which all must agree."""
    if s.accelerator.num_processes == 1:
        return losses, bool(s.stop)
    asked = torch.tensor([float(bool(s.stop))], device=losses.device)
    shared = s.accelerator.reduce(torch.cat([losses, asked]), "sum")
    is_stopping = bool(shared[-1] > 0)
    if is_stopping and not s.stop:
        s.stop.signal_number = signal.SIGTERM
    return shared[:-1], is_stopping


def micro_steps(s: Session, step: int) -> Iterator[MicroStep]:
    """This process's micro-steps of `step`, each made when it is asked for; none after the last step."""
    train = s.config.train
    if step < train.steps:
        yield from (micro_step(s, rows, step) for rows in micro_rows(s, step))


def micro_rows(s: Session, step: int) -> Iterator[Sequence[Row]]:
    """The rows of each of this process's micro-steps of `step`."""
    processes = {"process": s.accelerator.process_index, "num_processes": s.accelerator.num_processes}
    return iter(micro_batches(s.prepared.order.at(step), s.config.train.batch_size, **processes))


def _with_first_made(steps: Iterator[MicroStep]) -> Iterator[MicroStep]:
    """The same iterator, with its first item computed now."""
    return itertools.chain(list(itertools.islice(steps, 1)), steps)


def micro_step(s: Session, rows: Sequence[Row], step: int) -> MicroStep:
    """One micro-step of `rows`, its inputs on their way to the device."""
    positions, items = [row.position for row in rows], [row.item for row in rows]
    draws, latent_noise = draw(s.config.train.seed, step, positions, items[0].shape, s.objective.schedule)
    numbers = (torch.tensor(positions), torch.tensor([row.weight for row in rows]))
    moved = (devices.put(tensor, s.accelerator.device) for tensor in numbers)
    return MicroStep(step, rows, session.batch_of(s, items, draws, latent_noise), *moved)


def losses_of(s: Session, micro: MicroStep) -> Tensor:
    """Loss of each row of a micro-step, float32 `[B]`, weighted by noise level, but not by role."""
    if s.config.adapter.dropout:
        words = (s.config.train.seed, "dropout", micro.step, micro.rows[0].position)
        torch.manual_seed(generator_for(*words).initial_seed())
    return sample_losses(s.family, s.objective, micro.batch)


def _norm_backward_(s: Session) -> Tensor:
    """Add the gradient of `prior.norm_weight` times the update's squared norm (arXiv 2505.19519) in the main process,
    whose gradients are added to those of the others; returns that loss, `[]`."""
    if not s.config.prior.norm_weight or not s.accelerator.is_main_process:
        return torch.zeros((), device=s.accelerator.device)
    loss = s.config.prior.norm_weight * s.injected.squared_norm()
    s.scaler.scale(loss).backward()
    return loss.detach()


def _set_learning_rate_(s: Session, step: int) -> float:
    """Put the learning rate of `step` into every group; returns the first."""
    optimizer, train = s.config.optimizer, s.config.train
    factor = optimizers.learning_rate_factor(
        step, steps=train.steps, warmup_steps=optimizer.warmup_steps, schedule=optimizer.schedule
    )
    for group in s.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(s.optimizer.param_groups[0]["lr"])


def _reduce_and_clip_(s: Session) -> Tensor:
    """Sum the gradients over processes, undo the loss scale, clip; returns the norm before clipping."""
    vectors = [flat.collect_() for flat in s.trained]
    if s.accelerator.num_processes > 1:
        for vector in vectors:
            vector.grad = s.accelerator.reduce(vector.grad, "sum")
    s.scaler.unscale_(s.optimizer)
    return nn.utils.clip_grad_norm_(vectors, s.config.optimizer.max_grad_norm)


def _require_recoverable(s: Session, step: int, rows: Sequence[Row], losses: Sequence[float], skipped: int) -> None:
    """An overflow under fp16 loss scaling is skipped and told; everything else that is not finite ends the run."""
    if s.scaler.is_enabled() and all(map(math.isfinite, losses)) and skipped <= MAX_SKIPPED_STEPS:
        s.report.event("skipped_step", f"step {step + 1} overflowed in fp16 and was skipped", step=step + 1)
        return
    culprits = [row.item.name for row, loss in zip(rows, losses, strict=True) if not math.isfinite(loss)]
    cause = f"the loss of {', '.join(culprits)}" if culprits else "the gradient"
    raise NumericError(f"{cause} is not finite at step {step + 1}; {session.LOWER_RATE}")


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


def _log(s: Session, done: int, rows: Sequence[Row], losses: Sequence[float], metrics: dict[str, float]) -> None:
    """Tell everybody who listens what the step brought (main process)."""
    if not s.accelerator.is_main_process:
        return
    by_role = {role: [x for r, x in zip(rows, losses, strict=True) if r.item.role == role] for role in ROLES}
    values = {f"{role}_loss": sum(x) / len(x) for role, x in by_role.items() if x} | metrics
    s.run.append_metrics({"step": done, **values})
    s.accelerator.log(values, step=done)
    memory = devices.peak_gib(s.accelerator.device)
    s.report.progress("train", done, s.config.train.steps or done, **values, memory_gib=memory)


def _save_and_draw(s: Session, done: int, *, is_stopping: bool) -> None:
    """A checkpoint and a preview, each at its turn; a checkpoint also after the last step there will be."""
    train = s.config.train
    if done % train.save_every_steps == 0 or done == train.steps or is_stopping:
        session.save(s, done)
    if not is_stopping:
        session.draw_preview(s, done)
