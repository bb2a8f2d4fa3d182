"""The training loop: `optimize` reads top to bottom as one step.

What surrounds it is in `verbs/train.py`.

Words: a *step* is one optimizer update over the effective batch; a *micro-step* is one forward and backward pass of
rows of one shape. The run is a pure function of (config, step): nothing in the loop depends on what ran before but the
adapter and the optimizer.

The host never makes the device wait: inputs are made while it computes, from pinned memory, and what a step brought
is read when the next one is on its way (`tally.py`). Processes add their gradients as one flat sum for each step,
without a DDP wrapper: the loop stays readable, and short micro-batches cannot keep one process waiting for another.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lora_booth.models import devices
from lora_booth.run.randomness import generator_for
from lora_booth.training import optimizers, session
from lora_booth.training.batch import Batch, sample_losses
from lora_booth.training.objective import draw
from lora_booth.training.order import Row, micro_batches
from lora_booth.training.session import Session
from lora_booth.training.tally import Done, Tally


@dataclass(frozen=True)
class MicroStep:
    """Rows of one shape, with what a pass of them needs on the device. `positions`: int64, `weights`: float32 `[B]`."""

    step: int
    rows: Sequence[Row]
    batch: Batch
    positions: Tensor
    weights: Tensor


Run = Callable[[MicroStep], Tensor]
"""Runs a micro-step: gives the losses of its rows, and adds their gradients to those of the step."""
Scale = Callable[[Tensor], Tensor]
"""Of a loss, before its backward pass."""


@runtime_checkable
class Forgetful(Protocol):
    """A `Run` that holds memory of the device from one micro-step to the next."""

    def forget(self) -> None:
        """Give that memory back."""


def optimize(s: Session, start: int, run: Run | None = None) -> None:
    """Steps `start` to the last, saving and drawing on the way; `run`: how a micro-step is run, by default `run_pass`.
    Raises Interrupted after a save, NumericError before anything is kept of a step that is not finite."""
    train, order, tally, run = s.config.train, s.prepared.order, Tally(s), run or partial(run_pass, s)
    following = _with_first_made(micro_steps(s, start))
    for step in range(start, train.steps):
        rows = order.at(step)
        learning_rate = _set_learning_rate_(s, step)
        session.set_training_(s, True)
        losses = torch.zeros(len(rows), device=s.accelerator.device)
        for micro in following:
            losses.index_copy_(0, micro.positions, run(micro))
        following = _with_first_made(micro_steps(s, step + 1))  # while the device still computes
        norm_loss = _norm_backward_(s)
        losses, asked = _share(s, losses)
        numbers = torch.cat([losses, asked, torch.stack([norm_loss, _reduce_and_clip_(s)])])
        tally.expect(Done(step, rows, learning_rate, devices.fetch(numbers)))
        s.scaler.step(s.optimizer)
        s.scaler.update()
        s.optimizer.zero_grad(set_to_none=True)
        if _is_looked_at(s, step + 1, tally):
            if isinstance(run, Forgetful):
                run.forget()
            _save_and_draw(s, step + 1, tally)


def run_pass(s: Session, micro: MicroStep, scale: Scale | None = None) -> Tensor:
    """Losses of each row of a micro-step, float32 `[B]`; its gradients, `scale`d, are added to the step's."""
    losses = backward(s, micro, scale)
    gather_(s)
    return losses


def backward(s: Session, micro: MicroStep, scale: Scale | None = None) -> Tensor:
    """Losses of each row of a micro-step, and their weighted sum's gradients, `scale`d, by default as the run scales
    them. Nothing in here waits for the device."""
    losses = losses_of(s, micro)
    (scale or s.scaler.scale)((losses * micro.weights).sum()).backward()
    return losses.detach()


def gather_(s: Session) -> None:
    """Add the gradients of the last backward pass to those of the step."""
    for flat in s.trained:
        flat.add_(flat.take())


def _share(s: Session, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of all processes, and how many of them were asked to stop, `[1]`, on which all must agree."""
    asked = torch.tensor([float(bool(s.stop))])
    if s.accelerator.num_processes == 1:
        return losses, devices.put(asked, losses.device)
    shared = s.accelerator.reduce(torch.cat([losses, devices.put(asked, losses.device)]), "sum")
    return shared[:-1], shared[-1:]


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
    objective, shape = s.objective, items[0].shape
    draws, latent_noise = draw(s.config.train.seed, step, positions, shape, objective.schedule, objective.levels)
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
    gather_(s)
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
    for flat in s.trained:
        if flat.vector.grad is None:  # of a process without a row
            flat.add_([None] * len(flat.parts))
    vectors = [flat.vector for flat in s.trained]
    if s.accelerator.num_processes > 1:
        for vector in vectors:
            vector.grad = s.accelerator.reduce(vector.grad, "sum")
    s.scaler.unscale_(s.optimizer)
    return nn.utils.clip_grad_norm_(vectors, s.config.optimizer.max_grad_norm)


def _is_looked_at(s: Session, done: int, tally: Tally) -> bool:
    """Whether after `done` steps something is saved or drawn, or the run stops."""
    return _is_saved(s, done) or _is_stopping(s, tally) or session.is_preview_due(s, done)


def _is_saved(s: Session, done: int) -> bool:
    return done % s.config.train.save_every_steps == 0 or done == s.config.train.steps


def _is_stopping(s: Session, tally: Tally) -> bool:
    return tally.is_stopping if s.accelerator.num_processes > 1 else bool(s.stop)


def _save_and_draw(s: Session, done: int, tally: Tally) -> None:
    """A checkpoint and a preview, each at its turn; a checkpoint also after the last step there will be. Raises
    Interrupted where a signal asked to stop, after everything was saved."""
    is_stopping = _is_stopping(s, tally)
    tally.read()
    if _is_saved(s, done) or is_stopping:
        session.save(s, done)
    if is_stopping:
        if not s.stop:  # another process was asked
            s.stop.signal_number = signal.SIGTERM
        told = f"stopped after step {done} of {s.config.train.steps}, everything is saved"
        s.stop.check(f"{told}; continue with: {s.continue_command}")
    session.draw_preview(s, done)
    tally.restart_clock()
