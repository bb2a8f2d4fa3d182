"""A base without weights, with its adapter, and its passes counted one by one.

The base's modules are built on the meta device from its configs, the real adapter is put in, and the real forward, loss
and backward run through them while every storage is counted from its birth to its death. That takes seconds, and
needs neither weights nor a GPU.

So a count follows any change to the layer or the loss. Attention alone is replaced, by what the fused kernels allocate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_booth.adapter import inject
from lora_booth.config.resolved import Filled
from lora_booth.config.settings import OptimizerConfig
from lora_booth.data.buckets import Bucket
from lora_booth.models import loading
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.families.components import without_weights
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.models.families.quantize import saved_bytes
from lora_booth.models.families.vae import Vae
from lora_booth.planning import optimizer_states
from lora_booth.planning.counts import Pass
from lora_booth.planning.tracing import LiveBytes, fused_attention, held_bytes, tensors_of
from lora_booth.planning.work import Work
from lora_booth.run.number_types import DTYPES
from lora_booth.training import adapting
from lora_booth.training.batch import Batch, sample_losses
from lora_booth.training.flat import Flat
from lora_booth.training.objective import Draws, Objective, objective_for
from lora_booth.training.session import HELD_PROMPTS

META = torch.device("meta")


@dataclass(frozen=True)
class Built:
    """What is traced. `adapted`: what carries the adapter; `trained`: its parameters, as an optimizer updates them.

    Precision and optimizer "auto" mean what a CUDA card gets.
    """

    config: Filled
    family: Family
    vae: Vae
    text_encoders: Mapping[str, nn.Module]
    adapted: Mapping[str, nn.Module]
    trained: Sequence[Flat]
    base_bytes: int
    """Of the denoiser and, where something is trained in them, the text encoders, without it."""
    text_bytes: int

    @staticmethod
    def of(config: Filled, facts: BaseFacts) -> Built:
        """Modules of the base, with the adapter of `config`. Raises ModelError or ConfigError where training would."""
        dtype = DTYPES.get(config.model.precision, torch.bfloat16)  # "auto" on a card: two bytes, bf16 or fp16
        parts, row = without_weights(facts, dtype), facts.architecture
        family = loading.around(facts, parts)
        assert parts.vae is not None, "all parts were asked for"
        held = {row.denoiser: parts.denoiser} | (parts.text_encoders if config.adapter.is_text_trained else {})
        base_bytes, text_bytes = (_stored_bytes(of.values(), config) for of in (held, parts.text_encoders))
        adapted = adapting.adapt_(config, family)
        trained = adapting.flatten_(config, adapted, dtype, "cuda")
        modules = (family, parts.vae, parts.text_encoders, adapted.modules, trained)
        return Built(config, *modules, base_bytes, text_bytes)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of what lies on the device, and what latents and prompts are measured in, by name."""
        return {
            "base": self.base_bytes,
            "text encoders": self.text_bytes,
            "adapter": held_bytes(t for flat in self.trained for t in (flat.vector, *flat.copies.values())),
            "VAE": held_bytes(tensors_of([self.vae.module])),
            "latent channels": self.vae.module.config.latent_channels,
            "pixels per latent": self.vae.factor,
            "tokens of a prompt": self.family.window,
        }

    def optimizer_bytes(self, config: OptimizerConfig) -> int:
        """What an optimizer keeps for the adapter."""
        shapes = [part.shape for flat in self.trained for part in flat.parts]
        return optimizer_states.state_bytes(shapes, config, device_type="cuda")

    def input_bytes(self, rows: int, bucket: Bucket) -> int:
        """Of a pass."""
        return held_bytes(self._batch(rows, bucket).tensors)

    def step_input_bytes(self, rows: int, bucket: Bucket) -> int:
        """Of a micro-step and the next one, whose inputs are made meanwhile, and prompts that stay on the device."""
        batch = self._batch(rows, bucket)
        prompt_bytes = held_bytes((batch.conditioning or {}).values()) // rows
        return 2 * held_bytes(batch.tensors) + HELD_PROMPTS * prompt_bytes

    def encode(self, bucket: Bucket) -> Pass:
        """A picture through the VAE's encoder."""
        pixels = torch.empty(1, 3, bucket.height_px, bucket.width_px, device=META)
        return self._looking(partial(self.vae.encode, pixels))

    def encode_prompt(self) -> Pass:
        """A prompt through the text encoders."""
        return self._looking(partial(self.family.encode_prompts, [""]))

    def decode(self, count: int, bucket: Bucket, *, is_tiled: bool) -> Pass:
        """So many pictures through the VAE's decoder, together."""
        latents = torch.empty(count, *self.latent_shape(bucket), device=META)
        return self._looking(partial(self.vae.decode_chunk, latents, is_tiled=is_tiled))

    def denoise(self, bucket: Bucket, *, is_adapted: bool) -> Pass:
        """Two rows through the denoiser, without gradients."""
        batch = self._batch(2, bucket)
        self._switch(False)
        with nullcontext() if is_adapted else inject.disabled(self.adapted):
            return self._looking(lambda: sample_losses(self.family, self._objective(), batch), batch.tensors)

    def step(self, rows: int, bucket: Bucket, share: float, *, is_offloading: bool, follows_another: bool) -> Pass:
        """A micro-step. `share`: of the blocks that recompute; `follows_another`: gradients are there already."""
        self._switch(True, share, is_offloading)
        for flat in self.trained:
            flat.vector.grad = torch.empty_like(flat.vector) if follows_another else None
        found = trace_step(self.family, self._objective(), self._batch(rows, bucket), self.trained, self._tensors())
        for flat in self.trained:
            flat.vector.grad = None
        return Pass(found.others, found.work, found.gradients)

    def latent_shape(self, bucket: Bucket) -> Sequence[int]:
        """`[C, h, w]` of a picture of this size."""
        factor = self.vae.factor
        return (self.vae.module.config.latent_channels, bucket.height_px // factor, bucket.width_px // factor)

    def _looking(self, run: Callable[[], Any], inputs: Sequence[Tensor] = ()) -> Pass:
        """What `run` holds beyond the modules and its inputs, without gradients, and its work."""
        live = LiveBytes("meta", [*self._tensors(), *inputs])
        with torch.no_grad(), live, fused_attention(live.work):
            run()
        return Pass(live.peak, live.work)

    def _objective(self) -> Objective:
        """With tables of its own, so that no pass is counted without them because another came before it."""
        schedule: Any = self.family.schedule
        return objective_for(self.config.objective, replace(schedule))

    def _batch(self, rows: int, bucket: Bucket) -> Batch:
        encoded = None if self.config.adapter.is_text_trained else self._conditioning
        return make_batch(self.family, rows, self.latent_shape(bucket), encoded, device=META)

    @cached_property
    def _conditioning(self) -> Conditioning:
        """Of one prompt."""
        with torch.no_grad(), LiveBytes("meta", ()):  # which remembers operations
            return self.family.encode_prompts([""])

    def _switch(self, training: bool, share: float = 0.0, is_offloading: bool = False) -> None:
        for module in self.adapted.values():
            module.train(training)
        self.family.prepare_denoiser_(gradient_checkpointing=share, attention="sdpa", is_offloading=is_offloading)

    def _tensors(self) -> list[Tensor]:
        return tensors_of([self.family.denoiser, self.vae.module, *self.text_encoders.values()])


def _stored_bytes(modules: Iterable[nn.Module], config: Filled) -> int:
    """Bytes of a base's modules as they lie on the device, quantised or not."""
    modules, kind = list(modules), config.model.quantize
    return held_bytes(tensors_of(modules)) - (0 if kind == "none" else sum(saved_bytes(m, kind) for m in modules))


def make_batch(
    family: Family, rows: int, shape: Sequence[int], encoded: Conditioning | None, *, device: torch.device
) -> Batch:
    """A batch in the shapes and types of a real one. `shape`: of one row's latents, `[C, h, w]`; `encoded`: the
    conditioning of one prompt, None where the text encoders are trained."""
    latents, noise = (torch.zeros(rows, *shape, device=device) for _ in range(2))
    timesteps = family.schedule.timesteps_at([0.5] * rows).to(device)
    draws = Draws(timesteps, noise, torch.zeros(rows, shape[0], 1, 1, device=device))
    of_rows = None if encoded is None else {k: t.repeat(rows, *[1] * (t.ndim - 1)) for k, t in encoded.items()}
    return Batch(latents, draws, torch.ones(rows, 6, device=device), of_rows, [""] * rows)


class StepTrace(NamedTuple):
    """Bytes at the fullest moment of one forward and backward, those of gradients and all others, and its work."""

    gradients: int
    others: int
    work: Work


def trace_step(
    family: Family, objective: Objective, batch: Batch, trained: Sequence[Flat], known: Sequence[Tensor]
) -> StepTrace:
    """What one forward and backward holds beyond `known`, and asks of a card.

    Gradients that `trained` hold already count as gradients, and so does where those of a pass are gathered. Attention
    is traced as the fused kernels allocate it.
    """
    held = [tensor for flat in trained for tensor in (flat.vector.grad, flat.arrived) if tensor is not None]
    copies = [copy for flat in trained for copy in flat.copies.values()]
    live = LiveBytes(batch.latents.device.type, [*known, *held, *copies, *batch.tensors])
    with live, fused_attention(live.work):
        sample_losses(family, objective, batch).sum().backward()
    gradients = [flat.take() for flat in trained]
    new = live.at_peak(gradient for of in gradients for gradient in of if gradient is not None)
    others = live.peak - new
    with live:
        for flat, of in zip(trained, gradients, strict=True):
            flat.add_(of)
    return StepTrace(held_bytes(held) + new, others, live.work)
