"""How much device memory and work a run takes, by tracing its real step.

The step is traced on tensors without data, part by part.

The base's modules are built on the meta device from its configs, the real adapter is put in, and the real forward, loss
and backward run through them while every storage is counted from its birth to its death. That takes seconds, and
needs neither weights nor a GPU.

So the prediction follows any change to the layer or the loss. Attention alone is replaced, by what the fused
kernels allocate. What a trace cannot see (the context, cuDNN, the allocator's gaps) is one stated constant.

Words: a *part* is what some of the memory is for; a *phase* is a stretch of the run with its own parts. Totals are what
`torch.cuda.max_memory_allocated` counts; `OUTSIDE_GIB` comes on top of them. Not counted: cuDNN's workspaces, and what
the caching allocator cannot split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_booth.adapter import inject
from lora_booth.config.resolved import Filled
from lora_booth.data.buckets import Bucket
from lora_booth.models import loading
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.families.components import without_weights
from lora_booth.models.families.family import Family
from lora_booth.models.families.quantize import saved_bytes
from lora_booth.models.families.vae import Vae
from lora_booth.models.sampling import PICTURES_AT_ONCE
from lora_booth.planning import optimizer_states
from lora_booth.planning.tracing import LiveBytes, Work, fused_attention, held_bytes, tensors_of
from lora_booth.run.number_types import DTYPES
from lora_booth.training import choosing, optimizers
from lora_booth.training.batch import Batch, sample_losses
from lora_booth.training.class_images import most_together
from lora_booth.training.flat import Flat
from lora_booth.training.objective import Draws, Objective, objective_for
from lora_booth.training.order import VALIDATION_QUANTILES
from lora_booth.training.session import HELD_PROMPTS

GIB = 2**30
OUTSIDE_GIB = 0.8
"""CUDA context, cuDNN's workspaces and the allocator's gaps: assumed, not measured. The context is never part of
`torch.cuda.max_memory_allocated`."""
META = torch.device("meta")


@dataclass(frozen=True)
class Phase:
    """A stretch of the run. `parts`: bytes held at its fullest moment, by what they are for."""

    name: str
    parts: Mapping[str, int]

    @property
    def gib(self) -> float:
        return sum(self.parts.values()) / GIB


def needed_gib(phases: Iterable[Phase]) -> float:
    """Device memory of the fullest phase, with what lies outside of tensors."""
    return max(phase.gib for phase in phases) + OUTSIDE_GIB


def class_images_at_once(config: Filled) -> int:
    """Class images that are drawn together."""
    return min(most_together(config), config.prior.num_images)


def draws(config: Filled) -> bool:
    """Whether a run draws through its adapter: previews, or to choose among checkpoints."""
    return bool(config.preview.images_per_prompt) or config.evaluate.choose == "best"


def previews_at_once(config: Filled) -> int:
    """Pictures that are drawn together through the adapter."""
    pictures = config.preview.images_per_prompt * len(config.preview.prompts)
    if config.evaluate.choose == "best":
        pictures = max(pictures, choosing.num_pictures(config))
    return min(config.memory.pictures_at_once or PICTURES_AT_ONCE, pictures)


def rows_per_pass(config: Filled) -> int:
    """Rows of the largest micro-batch on one device."""
    return min(config.train.batch_size, _rows_per_step(config))


def _rows_per_step(config: Filled) -> int:
    return config.train.images_per_step * (2 if config.has_prior else 1)


def _compared_rows_per_step(config: Filled) -> int:
    """Rows that the base predicts too: those of the model's prior, and instance rows under DCO."""
    return config.train.images_per_step * (config.has_model_prior + (config.objective.dco_beta is not None))


def _stored_bytes(modules: Iterable[nn.Module], config: Filled) -> int:
    """Bytes of a base's modules as they lie on the device, quantised or not."""
    modules, kind = list(modules), config.model.quantize
    return held_bytes(tensors_of(modules)) - (0 if kind == "none" else sum(saved_bytes(m, kind) for m in modules))


@dataclass(frozen=True)
class Modules:
    """A base without weights, with its adapter: what is traced. `adapted`: what carries the adapter.

    `bucket` everywhere: the largest that is trained at; None is the square of the resolution, which no other exceeds.
    Precision and optimizer "auto" mean what a CUDA card gets.
    """

    family: Family
    vae: Vae
    text_encoders: Mapping[str, nn.Module]
    adapted: Mapping[str, nn.Module]
    trained: Sequence[Flat]
    base_bytes: int
    """Of what carries the adapter, without it."""
    text_bytes: int
    native_resolution: int
    traced: dict[tuple[Any, ...], Any]
    """What was counted, by what it depends on."""

    @staticmethod
    def of(config: Filled, facts: BaseFacts) -> Modules:
        """Modules of the base, with the adapter of `config`. Raises ModelError or ConfigError where training would."""
        dtype = DTYPES.get(config.model.precision, torch.bfloat16)  # "auto" on a card: two bytes, bf16 or fp16
        parts, row = without_weights(facts, dtype), facts.architecture
        family = loading.around(facts, parts)
        assert parts.vae is not None, "all parts were asked for"
        is_text_trained = config.adapter.text_encoder
        adapted = {row.denoiser: parts.denoiser} | (parts.text_encoders if is_text_trained else {})
        base_bytes, text_bytes = (_stored_bytes(of.values(), config) for of in (adapted, parts.text_encoders))
        used = family.num_used_text_layers if is_text_trained else {}
        groups = inject.inject_(adapted, config.adapter, presets=row.targets, num_used_text_layers=used)
        settings: dict[str, Any] = {"device_type": "cuda", "read_in": inject.reads_in(adapted, dtype)}
        trained = [
            flat for group in groups.values() for flat in optimizers.flatten(group, config.optimizer, **settings)
        ]
        inject.give_copies_(adapted, {part: copy for flat in trained for part, copy in flat.copies.items()})
        modules = (family, parts.vae, parts.text_encoders, adapted, trained)
        return Modules(*modules, base_bytes, text_bytes, facts.native_resolution, {})

    def square(self, config: Filled) -> Bucket:
        side = config.data.resolution or self.native_resolution
        return Bucket(side, side)

    def latent_shape(self, bucket: Bucket) -> Sequence[int]:
        """`[C, h, w]` of a picture of this size."""
        factor = self.vae.factor
        return (self.vae.module.config.latent_channels, bucket.height_px // factor, bucket.width_px // factor)

    def phases(self, config: Filled, bucket: Bucket | None) -> tuple[Phase, ...]:
        """All phases of the run, in the order in which it comes to them."""
        phases = [self.prepare(config, bucket), self.step(config, bucket), self.validate(config, bucket)]
        return (*phases, self.draw(config, bucket)) if draws(config) else tuple(phases)

    def prepare(self, config: Filled, bucket: Bucket | None) -> Phase:
        """The fullest moment before there is an adapter: prompts and pictures are encoded, class images drawn."""
        moments = [self._encode_prompts(config), self.encode(config, bucket)]
        if config.has_class_images and config.prior.folder is None:
            moments.append(self.draw_class_images(config, bucket))
        return max(moments, key=lambda phase: phase.gib)

    def encode(self, config: Filled, bucket: Bucket | None) -> Phase:
        """The moment of "prepare" in which the VAE encodes a picture."""
        bucket = bucket or self.square(config)
        held = self._without_denoiser(config, self._before_training(config))
        return Phase("prepare", held | {"encoding": self._encoding(bucket).peak})

    def _encoding(self, bucket: Bucket) -> LiveBytes:
        pixels = torch.empty(1, 3, bucket.height_px, bucket.width_px, device=META)
        return self._working(("encode", bucket), partial(self.vae.encode, pixels))

    def _encode_prompts(self, config: Filled) -> Phase:
        encoding = self._working(("prompts",), lambda: self.family.encode_prompts([""])).peak
        held = self._without_denoiser(config, self._before_training(config)) | {"text encoders": self.text_bytes}
        return Phase("prepare", held | {"encoding": encoding})

    def draw_class_images(self, config: Filled, bucket: Bucket | None) -> Phase:
        """The moment of "prepare" in which the base draws class images."""
        held, bucket = self._before_training(config), bucket or self.square(config)
        with inject.disabled(self.adapted):
            rows = class_images_at_once(config) * (2 if config.prior.guidance_scale > 1 else 1)
            return Phase("prepare", self._drawing(config, held, class_images_at_once(config), rows, bucket, "base"))

    def _before_training(self, config: Filled) -> dict[str, int]:
        """What lies on the device once the prompts are encoded."""
        denoiser = self._denoiser_bytes(config)
        encoders = {"text encoders": self.text_bytes} if config.adapter.text_encoder else {}
        return {"base": denoiser, **encoders, "VAE": self._vae_bytes()}

    def _without_denoiser(self, config: Filled, held: Mapping[str, int]) -> dict[str, int]:
        """What is left of `held` while the denoiser is offloaded, if that is wanted."""
        left = {"base": held["base"] - self._denoiser_bytes(config)} if config.memory.offload_denoiser else {}
        return {part: size for part, size in {**held, **left}.items() if size}

    def _denoiser_bytes(self, config: Filled) -> int:
        return self.base_bytes - (self.text_bytes if config.adapter.text_encoder else 0)

    def validate(self, config: Filled, bucket: Bucket | None) -> Phase:
        """The phase "validate": the denoiser alone, on several noise levels of one image."""
        measuring = len(VALIDATION_QUANTILES) * self._row_bytes(config, self.square(config), "adapted")
        return Phase("validate", self._lasting(config, bucket) | {"denoising": measuring})

    def draw(self, config: Filled, bucket: Bucket | None) -> Phase:
        """The phase "draw": previews through the adapter."""
        held = self._lasting(config, bucket) | {"VAE": self._vae_bytes()}
        rows = previews_at_once(config) * (2 if config.preview.guidance_scale > 1 else 1)
        square = self.square(config)
        return Phase("draw", self._drawing(config, held, previews_at_once(config), rows, square, "adapted"))

    def step(self, config: Filled, bucket: Bucket | None) -> Phase:
        """The phase "train": one micro-step. What the base predicts beside it for comparison is gone before the fullest
        moment, and takes less while it lasts."""
        batch = self._batch(config, rows_per_pass(config), bucket or self.square(config))
        gradients, others, _ = self._trace(config, batch)
        parts = {
            "base": self.base_bytes,
            "adapter": held_bytes(t for flat in self.trained for t in (flat.vector, *flat.copies.values())),
            "gradients": gradients,
            "optimizer": self._optimizer_bytes(config),
            # Those of the next micro-step are made meanwhile.
            "inputs": 2 * held_bytes(batch.tensors) + HELD_PROMPTS * self._prompt_bytes(batch),
            "activations": others,
        }
        return Phase("train", parts)

    def step_work(self, config: Filled, bucket: Bucket | None) -> Work:
        """One optimizer step: forward, backward, and what is computed again; not the optimizer's own, nor what the
        base predicts."""
        rows = rows_per_pass(config)
        batch = self._batch(config, rows, bucket or self.square(config))
        return self._trace(config, batch).work * (_rows_per_step(config) / rows)

    def comparison_work(self, config: Filled, bucket: Bucket | None) -> Work | None:
        """What the base predicts in one step; None where nothing is compared with it."""
        rows = _compared_rows_per_step(config)
        if not rows:
            return None
        with inject.disabled(self.adapted):
            return self._denoising(config, bucket or self.square(config), "base").work * (rows / 2)

    def encode_work(self, bucket: Bucket) -> Work:
        """One picture through the VAE's encoder."""
        return self._encoding(bucket).work

    def draw_work(self, config: Filled, bucket: Bucket, solver_steps: int, *, is_guided: bool) -> Work:
        """One picture drawn: the denoiser at each of `solver_steps`, twice where it is guided."""
        rows = 2 if is_guided else 1
        return self._denoising(config, bucket, "adapted").work * (solver_steps * rows / 2)

    def decode_work(self, config: Filled, bucket: Bucket) -> Work:
        """One picture through the VAE's decoder."""
        return self._decoding(config, 1, bucket).work

    def _optimizer_bytes(self, config: Filled) -> int:
        key = ("optimizer", config.optimizer.name)
        if key not in self.traced:
            shapes = [part.shape for flat in self.trained for part in flat.parts]
            self.traced[key] = optimizer_states.state_bytes(shapes, config.optimizer, device_type="cuda")
        size: int = self.traced[key]
        return size

    def _trace(self, config: Filled, batch: Batch) -> StepTrace:
        train, rows = config.train, len(batch.latents)
        follows_another = _rows_per_step(config) > rows or train.images_per_step > 1  # whose buckets may differ
        saving = (train.gradient_checkpointing or 0.0, bool(config.memory.offload_activations))
        key = (batch.latents.shape, *saving, follows_another)
        if key not in self.traced:
            self._switch(True, *saving)
            for flat in self.trained:
                flat.vector.grad = torch.empty_like(flat.vector) if follows_another else None
            objective = objective_for(config.objective, self.family.schedule)
            self.traced[key] = trace_step(self.family, objective, batch, self.trained, self._tensors())
            for flat in self.trained:
                flat.vector.grad = None
        counted: StepTrace = self.traced[key]
        return counted

    def _prompt_bytes(self, batch: Batch) -> int:
        """Bytes of one row of conditioning."""
        return held_bytes((batch.conditioning or {}).values()) // len(batch.latents)

    def _lasting(self, config: Filled, bucket: Bucket | None) -> dict[str, int]:
        parts = self.step(config, bucket).parts
        return {part: parts[part] for part in ("base", "adapter", "optimizer")}

    def _vae_bytes(self) -> int:
        return held_bytes(tensors_of([self.vae.module]))

    def _drawing(
        self, config: Filled, held: Mapping[str, int], together: int, rows: int, bucket: Bucket, denoiser: str
    ) -> dict[str, int]:
        """The fuller moment of denoising and decoding `together` pictures beside what is `held`, with the `denoiser`
        "adapted" or of the "base"; `rows`: of a pass, both halves of guidance in one."""
        decoding = self._without_denoiser(config, held) | {"decoding": self._decoding(config, together, bucket).peak}
        denoising = {**held, "denoising": rows * self._row_bytes(config, bucket, denoiser)}
        return max(decoding, denoising, key=lambda parts: sum(parts.values()))

    def _decoding(self, config: Filled, together: int, bucket: Bucket) -> LiveBytes:
        decoded = min(together, self.vae.num_at_once(bucket.width_px, bucket.height_px))
        latents = torch.empty(decoded, *self.latent_shape(bucket), device=META)
        is_tiled = bool(config.memory.tiled_decoding)
        decode = partial(self.vae.decode_chunk, latents, is_tiled=is_tiled)
        return self._working(("decode", decoded, bucket, is_tiled), decode)

    def _row_bytes(self, config: Filled, bucket: Bucket, denoiser: str) -> int:
        """Bytes of a pass for looking, inputs included, for one row; several take as many times that."""
        inputs = held_bytes(self._batch(config, 2, bucket).tensors)
        return (inputs + self._denoising(config, bucket, denoiser).peak) // 2

    def _denoising(self, config: Filled, bucket: Bucket, denoiser: str) -> LiveBytes:
        """A pass for looking, of two rows."""
        batch = self._batch(config, 2, bucket)
        objective = objective_for(config.objective, self.family.schedule)

        def denoise() -> None:
            self._switch(False)
            sample_losses(self.family, objective, batch)

        return self._working(("denoise", bucket, denoiser), denoise, batch.tensors)

    def _working(self, key: tuple[Any, ...], run: Callable[[], Any], inputs: Sequence[Tensor] = ()) -> LiveBytes:
        """What `run` holds beyond the modules and its inputs, without gradients, and its work."""
        if key not in self.traced:
            live = LiveBytes("meta", [*self._tensors(), *inputs])
            with torch.no_grad(), live, fused_attention(live.work):
                run()
            self.traced[key] = live
        counted: LiveBytes = self.traced[key]
        return counted

    def _batch(self, config: Filled, rows: int, bucket: Bucket) -> Batch:
        key = ("batch", rows, bucket)
        if key not in self.traced:
            is_trained = config.adapter.text_encoder
            shape = self.latent_shape(bucket)
            self.traced[key] = make_batch(self.family, rows, shape, is_text_trained=is_trained, device=META)
        batch: Batch = self.traced[key]
        return batch

    def _switch(self, training: bool, share: float = 0.0, is_offloading: bool = False) -> None:
        for module in self.adapted.values():
            module.train(training)
        self.family.prepare_denoiser_(gradient_checkpointing=share, attention="sdpa", is_offloading=is_offloading)

    def _tensors(self) -> list[Tensor]:
        return tensors_of([self.family.denoiser, self.vae.module, *self.text_encoders.values()])


def make_batch(
    family: Family, rows: int, shape: Sequence[int], *, is_text_trained: bool, device: torch.device
) -> Batch:
    """A batch in the shapes and types of a real one. `shape`: of one row's latents, `[C, h, w]`."""
    latents, noise = (torch.zeros(rows, *shape, device=device) for _ in range(2))
    timesteps = family.schedule.timesteps_at([0.5] * rows).to(device)
    draws = Draws(timesteps, noise, torch.zeros(rows, shape[0], 1, 1, device=device))
    prompts = [""] * rows
    with torch.no_grad():
        conditioning = None if is_text_trained else family.encode_prompts(prompts)
    return Batch(latents, draws, torch.ones(rows, 6, device=device), conditioning, prompts)


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
