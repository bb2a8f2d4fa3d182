"""All that training works with, and what is done between steps: saving, restoring, looking.

A picture on the way is drawn after its checkpoint is safe, and on resume if a kill came between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_booth.adapter import embeddings, inject
from lora_booth.config.resolved import Resolved
from lora_booth.data.grid import labelled_grid
from lora_booth.errors import NumericError
from lora_booth.models import devices
from lora_booth.models.bases.architectures import is_text
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.models.sampling import concatenate
from lora_booth.run.checkpoints import Checkpoint
from lora_booth.run.folder import Run
from lora_booth.run.interrupts import StopRequest
from lora_booth.run.randomness import generator_for
from lora_booth.run.report import Report
from lora_booth.training import optimizers, preview
from lora_booth.training.batch import Batch, Reference, sample_losses
from lora_booth.training.drift import Drift
from lora_booth.training.flat import Flat
from lora_booth.training.objective import Draws, Objective
from lora_booth.training.order import Geometry, Item
from lora_booth.training.prepare import Prepared
from lora_booth.training.watchdog import Watchdog

HELD_PROMPTS = 64
"""Rows of prompts that stay on the device, 0.3 MB each for SDXL, so that steps move none."""
LOWER_RATE = (
    "nothing of this step was kept, and the last checkpoint is good. Lower optimizer.learning_rate, or set "
    "model.precision = bf16 (or fp32); if it happens at the first step, the base itself may be damaged."
)


@dataclass(frozen=True)
class Session:
    """All that the loop works with. `adapted`: the modules in which something is trained, by component; `trained`: the
    parameters as the optimizer has them; `word`: that which is learnt as vectors."""

    config: Resolved
    family: Family
    adapted: dict[str, nn.Module]
    prepared: Prepared
    objective: Objective
    trained: Sequence[Flat]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    accelerator: Accelerator
    run: Run
    report: Report
    stop: StopRequest
    continue_command: str
    word: embeddings.LearntWord | None = None
    drift: Drift | None = None
    watchdog: Watchdog = field(default_factory=Watchdog)

    @cached_property
    def injected(self) -> inject.Injected:
        """The adapted layers of all components."""
        return inject.Injected(self.adapted)

    @cached_property
    def injected_denoiser(self) -> inject.Injected:
        """Those of the denoiser alone."""
        return inject.Injected({self.family.architecture.denoiser: self.family.denoiser})

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter, in the optimizer's order."""
        return [part for flat in self.trained for part in flat.parts]

    @property
    def is_text_trained(self) -> bool:
        """Whether text encoders carry an adapter, or learn a word."""
        return any(map(is_text, self.adapted))

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning on the device: from the cache, or by the text encoders while they are being trained."""
        return self.family.encode_prompts(prompts) if self.is_text_trained else self.base_condition(prompts)

    def base_condition(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning by the untrained base, from the cache, on the device."""
        return concatenate([self._row_of(prompt) for prompt in prompts])

    @cached_property
    def _row_of(self) -> Callable[[str], Conditioning]:
        """A prompt's row on the device, where the last ones stay."""

        def on_device(prompt: str) -> Conditioning:
            return {name: devices.put(t, self.accelerator.device) for name, t in self.prepared.prompts[prompt].items()}

        return lru_cache(HELD_PROMPTS)(on_device)

    @cached_property
    def geometry_of(self) -> Callable[[Geometry], Tensor]:
        """A geometry on the device, float32 `[1, 6]`, where the last ones stay."""
        return lru_cache(HELD_PROMPTS)(lambda g: devices.put(torch.tensor([g]).float(), self.accelerator.device))


@contextmanager
def base_alone(s: Session) -> Iterator[None]:
    """Inside the block the base computes as if nothing had been learnt."""
    with s.injected.disabled(), nullcontext() if s.word is None else s.word.disabled():
        yield


def state(s: Session) -> dict[str, Tensor]:
    """All that is trained, as it is, for a checkpoint: exact float32 copies on the CPU."""
    return inject.state(s.adapted) | ({} if s.word is None else s.word.state())


def put_(s: Session, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state` gave, bit for bit. Raises ModelError for that of another adapter."""
    layers, word = embeddings.split(tensors)
    inject.load_state_into_(s.adapted, layers)
    if s.word is not None:
        s.word.load_state_(word)


def set_training_(s: Session, training: bool) -> None:
    """Switch dropout of the adapters, and the weights of optimizers that average, for training or for evaluation;
    passes that train then read the weights as they are now."""
    for module in s.adapted.values():
        if module.training != training:  # else it would go through thousands of modules in every step
            module.train(training)
    optimizers.set_mode_(s.optimizer, training=training)
    if training:
        for flat in s.trained:
            flat.refresh_()


def batch_of(
    s: Session, items: Sequence[Item], draws: Draws, latent_noise: Tensor, *, is_compared: bool = True
) -> Batch:
    """`items` with their latents drawn by `latent_noise`, on the device; `is_compared`: with what the
    objective wants of the base."""
    put = partial(devices.put, device=s.accelerator.device)
    moments = [s.prepared.latents[item.latent_key] for item in items]
    mean, std = torch.stack([m.mean for m in moments]), torch.stack([m.std for m in moments])
    geometry = torch.cat([s.geometry_of(item.geometry) for item in items])
    prompts = [item.prompt for item in items]
    conditioning = None if s.is_text_trained else s.condition(prompts)
    draws = Draws(put(draws.timesteps), put(draws.noise), put(draws.offsets))
    reference = _reference(s, items) if is_compared else None
    masks = _masks(s, items)
    masks = None if masks is None else put(masks)
    return Batch(put(mean + std * latent_noise), draws, geometry, conditioning, prompts, reference, masks)


def _masks(s: Session, items: Sequence[Item]) -> Tensor | None:
    """What each place of `items` counts, float32 `[B, 1, h, w]`; None where the run has no masks."""
    held = s.prepared.masks
    if not held:
        return None
    whole = torch.ones(1, *items[0].shape[1:])
    return torch.stack([whole if item.mask_key is None else held[item.mask_key] for item in items])


def _reference(s: Session, items: Sequence[Item]) -> Reference | None:
    """The rows of `items` that are compared with the base; instance rows come first."""
    roles = [item.role for item in items]
    num_instances = roles.count("instance")
    first = 0 if s.objective.dco_beta is not None else num_instances
    last = num_instances + roles.count("prior")
    if first == last:
        return None
    conditioning = s.base_condition([item.prompt for item in items[first:last]])
    return Reference(first, num_instances, last, conditioning, s.injected_denoiser.disabled)


def save(s: Session, done: int) -> None:
    """Write a checkpoint (main process)."""
    loss = validation_loss(s)
    if not math.isfinite(loss):
        raise NumericError(f"the validation loss is not finite after step {done}; {LOWER_RATE}")
    if s.accelerator.is_main_process:
        drift = _drift(s)
        numbers = {"validation_loss": loss, "prediction_drift": drift, "scaler": s.scaler.state_dict()}
        set_training_(s, s.config.optimizer.ema_decay is None)  # of averages the adapter is what is handed over
        tensors = state(s)
        set_training_(s, True)
        checkpoint = Checkpoint(done, tensors, s.optimizer.state_dict(), numbers)
        broken = [f"{name} of the adapter" for name, t in checkpoint.adapter.items() if not t.isfinite().all()]
        broken += [f"{name} of the optimizer" for name, t in _optimizer_tensors(s) if not t.isfinite().all()]
        if broken:
            raise NumericError(f"{broken[0]} is not finite after step {done}; {LOWER_RATE}")
        s.run.append_save({"step": done, "validation_loss": loss, "prediction_drift": drift})
        path = s.run.save(checkpoint, keep_last=s.config.train.keep_last)
        told = "" if drift is None else f", drift {drift:.3f}"
        s.report.event("saved", f"step {done} saved, validation loss {loss:.4f}{told}", step=done, path=str(path))
    s.accelerator.wait_for_everyone()


def restore(s: Session, checkpoint: Checkpoint | None) -> int:
    """Load the run's newest checkpoint into the session; returns the number of steps done, 0 if there is none."""
    if checkpoint is None:
        if s.accelerator.is_main_process:
            s.run.forget_metrics_after(0)
        return 0
    put_(s, checkpoint.adapter)
    s.optimizer.load_state_dict(checkpoint.optimizer)
    s.scaler.load_state_dict(checkpoint.state["scaler"])
    if s.accelerator.is_main_process:
        lost = s.run.forget_metrics_after(checkpoint.step)
        if lost:
            s.report.warn(
                f"{s.run.metrics_path} lacks {lost} of the {checkpoint.step} lines so far; they are lost, and nothing "
                "that is trained depends on them."
            )
    s.report.event("continued", f"continuing after step {checkpoint.step}", step=checkpoint.step)
    return checkpoint.step


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]
def validation_loss(s: Session) -> float:
    """Mean loss over some held-out images (instance images where there are none) at fixed noise levels.

    The noise is the same every time, so that two checkpoints of a run can be compared; two runs cannot.
    """
    set_training_(s, False)
    losses: list[float] = []
    for number, (item, levels) in enumerate(s.prepared.validation):
        generator = generator_for("validation", number)
        shape = (len(levels), *item.shape)
        timesteps = s.objective.schedule.timesteps_at(levels)
        draws = Draws(timesteps, torch.randn(shape, generator=generator), torch.zeros(*shape[:2], 1, 1))
        batch = batch_of(s, [item] * len(levels), draws, torch.zeros(shape), is_compared=False)
        losses += sample_losses(s.family, s.objective, batch).tolist()
    return sum(losses) / len(losses)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]
def _drift(s: Session) -> float | None:
    """How far the adapter moves what the base predicts for other pictures; None where nobody asks."""
    return None if s.drift is None else s.drift.of(s.family, s.condition(s.drift.prompts))


def is_preview_due(s: Session, done: int) -> bool:
    """Whether a preview is to be drawn after `done` steps."""
    every = s.config.preview.every_steps
    return (
        every is not None
        and done % every == 0
        and done != s.config.train.steps
        and bool(s.config.preview.images_per_prompt)
    )


def draw_preview(s: Session, done: int) -> None:
    """Draw and write the preview grid after `done` steps, if it is its turn and was not drawn yet (main process)."""
    path = s.run.preview_path(done)
    if not is_preview_due(s, done):
        return
    if s.accelerator.is_main_process and not s.run.has_picture(path):
        rows = draw_rows(s)
        title = f"{s.config.name}: {'the base' if done == 0 else f'after {done} steps'}"
        s.run.write_picture(path, labelled_grid(rows, title=title))
        s.report.event("preview", f"pictures of step {done}: {path}", step=done, path=str(path))
    s.accelerator.wait_for_everyone()


@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]
def draw_rows(s: Session) -> preview.Rows:
    """Pictures of the preview prompts through the adapter as it is now."""
    set_training_(s, False)
    s.family.move_vae(s.accelerator.device)
    with torch.no_grad():
        rows = preview.draw_rows(s.config, s.family, s.condition, on_step=partial(stop_drawing, s))
    s.family.move_vae("cpu")
    return rows


def _optimizer_tensors(s: Session) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer remembers, floating point only: 8-bit states are numbers of a table."""
    for state in s.optimizer.state.values():
        yield from ((name, t) for name, t in state.items() if isinstance(t, Tensor) and t.is_floating_point())


def stop_drawing(s: Session) -> None:
    """Raises Interrupted when a signal asked to stop: pictures are drawn after everything was saved, and drawn again.

    Of several processes the others wait for the one that draws; they stop together, at the next step.
    """
    if s.accelerator.num_processes == 1:
        s.stop.check(f"stopped while drawing, everything is saved; continue with: {s.continue_command}")
