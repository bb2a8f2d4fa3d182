"""Training a run: by `lora_booth train`, or every weight of the denoiser by a plain loop over the very same rows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ablations.arms import AVERAGE_DECAY, STEPS, Run, State
from benchmarks.ablations.judge import Learnt
from lora_booth.adapter import kept
from lora_booth.adapter.weights import delta
from lora_booth.config.config import Config
from lora_booth.models import loading
from lora_booth.models.families.family import Family
from lora_booth.planning import decide
from lora_booth.run.interrupts import stop_requests
from lora_booth.run.report import Report, Silent
from lora_booth.training import prepare
from lora_booth.training.batch import Batch, sample_losses
from lora_booth.training.objective import draw, objective_for
from lora_booth.training.order import Row
from lora_booth.verbs import train


def updates(run: Run, out: Path, report: Report) -> Iterator[tuple[State, Learnt]]:
    """Train `run`, or continue it, and give each of its states with what is added to the base's weights, and the word.

    Raises Interrupted when a signal asked to stop; the run folder then holds what was done.
    """
    config = run.config(out)
    if run.arm.trains == "denoiser":
        found = whole_denoiser(config)
        yield from ((state, Learnt(found[state.step])) for state in run.states)
        return
    train.train(config, report=report)
    for state in run.states:
        yield state, Learnt(average(config.folder, run)) if state.is_averaged else at(config.folder, state.step)


def forget(run: Run, out: Path) -> None:
    """Remove the run folder."""
    shutil.rmtree(run.config(out).folder, ignore_errors=True)


def at(folder: Path, step: int) -> Learnt:
    """What the checkpoint of `step` holds."""
    found = kept.find(folder, str(step))
    assert found is not None, f"{folder} is no run folder"
    layers = found.weights.get("unet", {})
    return Learnt({f"{path}.weight": delta(update) for path, update in layers.items()}, found.word)


def average(folder: Path, run: Run) -> dict[str, Tensor]:
    """The moving average of the updates of all checkpoints, from the untrained 0 on."""
    every = max(1, run.arm.save_every_steps * run.steps // STEPS)
    decay = AVERAGE_DECAY**every
    mean: dict[str, Tensor] = {}
    for step in range(every, run.steps + 1, every):
        for name, change in at(folder, step).update.items():
            mean[name] = mean.get(name, torch.zeros_like(change)).mul_(decay).add_(change, alpha=1 - decay)
    return mean


def whole_denoiser(config: Config) -> dict[int, dict[str, Tensor]]:
    """The updates of a full fine-tune by step: AdamW in float32, constant rate after the warm-up, gradients clipped.

    Rows, noise and objective of every step are those of the adapter's run of the same config. Not resumable.
    """
    inputs = decide.look(config, Silent())
    family = loading.load(config.model, device="cpu", dtype=torch.float32, base=inputs.facts)
    resolved = decide.resolve(config, inputs, Silent(), device=torch.device("cpu"), free_gib=None)
    base = {name: p.detach().clone() for name, p in family.denoiser.named_parameters()}
    found: dict[int, dict[str, Tensor]] = {}
    with stop_requests() as stop:
        prepared = prepare.prepare(resolved, family, inputs.pictures, report=Silent(), stop=stop)
        objective, settings = objective_for(resolved.objective, family.schedule), resolved.optimizer
        parameters = list(family.denoiser.requires_grad_(True).parameters())
        optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay, betas=settings.betas)
        for step in range(resolved.train.steps):
            stop.check("stopped; the run begins again")
            warm = min(1.0, (step + 1) / (settings.warmup_steps + 1))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warm
            rows = prepared.order.at(step)
            batch = _batch(family, prepared, rows, resolved.train.seed, step)
            weights = torch.tensor([row.weight for row in rows])
            (sample_losses(family, objective, batch) * weights).sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % resolved.train.save_every_steps == 0:
                named = family.denoiser.named_parameters()
                found[step + 1] = {name: p.detach() - base[name] for name, p in named}
    return found


def _batch(family: Family, prepared: prepare.Prepared, rows: Sequence[Row], seed: int, step: int) -> Batch:
    """All rows of a step, with the randomness that `training.loop` gives them."""
    items = [row.item for row in rows]
    draws, latent_noise = draw(seed, step, [row.position for row in rows], items[0].shape, family.schedule)
    moments = [prepared.latents[item.latent_key] for item in items]
    mean, std = torch.stack([m.mean for m in moments]), torch.stack([m.std for m in moments])
    geometry = torch.tensor([item.geometry for item in items], dtype=torch.float32)
    prompts = [item.prompt for item in items]
    names = prepared.prompts[prompts[0]]
    conditioning = {name: torch.cat([prepared.prompts[prompt][name] for prompt in prompts]) for name in names}
    return Batch(mean + std * latent_noise, draws, geometry, conditioning, prompts)
