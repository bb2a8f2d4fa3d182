"""How much device memory a run takes, part by part: its real training step, traced on tensors without data.

The base's modules are built on the meta device from its configs, the real adapter is put in, and the real forward, loss
and backward run through them while every storage is counted from its birth to its death. That needs neither weights nor
a GPU, and seconds.

Words: a *part* is what some of the memory is for; a *phase* is a stretch of the run with its own parts. Totals are what
`torch.cuda.max_memory_allocated` counts; `OUTSIDE_GIB` comes on top of them. Not counted: cuDNN's workspaces, and what
the caching allocator cannot split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_booth import families, optim
from lora_booth.adapter import inject
from lora_booth.config import Config
from lora_booth.data.buckets import Bucket
from lora_booth.families.base import Family
from lora_booth.families.components import without_weights
from lora_booth.families.identify import BaseFacts
from lora_booth.families.quantize import saved_bytes
from lora_booth.families.sampling import PICTURES_AT_ONCE
from lora_booth.families.vae import Vae
from lora_booth.objectives import objective_for
from lora_booth.precision import DTYPES
from lora_booth.tracing import LiveBytes, fused_attention, held_bytes, tensors_of
from lora_booth.trial import Batch, make_batch, micro_step, trace_step

GIB = 2**30
OUTSIDE_GIB = 0.8
"""CUDA context, cuDNN's workspaces and the allocator's gaps: assumed, not measured. The context is never part of
`torch.cuda.max_memory_allocated`."""
VALIDATION_ROWS = 4
"""Noise levels of an image whose validation loss the loop measures in one pass."""
META = torch.device("meta")
Changes = Mapping[str, Mapping[str, Any]]
"""Section, key and new value of settings, as `Config.with_values` takes them."""


@dataclass(frozen=True)
class Phase:
    """A stretch of the run. `parts`: bytes held at its fullest moment, by what they are for."""

    name: str
    parts: Mapping[str, int]

    @property
    def gib(self) -> float:
        return sum(self.parts.values()) / GIB


@dataclass(frozen=True)
class Lever:
    """A change that makes a training step smaller, and its price. `saved_gib`: on top of the levers before it."""

    changes: Changes
    price: str
    saved_gib: float | None = None

    @property
    def settings(self) -> str:
        ((section, pairs),) = self.changes.items()
        ((key, value),) = pairs.items()
        return f"{section}.{key} = {str(value).lower() if isinstance(value, bool) else value}"

    @property
    def told(self) -> str:
        """The price, after the saving where it is known."""
        return self.price if self.saved_gib is None else f"saves {self.saved_gib:.2f} GiB of a step; {self.price}"


@dataclass(frozen=True)
class Plan:
    """What was chosen to stay within a budget, a reason for each choice, and what could still be changed, in order."""

    changes: Changes
    reasons: tuple[str, ...]
    phases: tuple[Phase, ...]
    levers: tuple[Lever, ...]


def needed_gib(phases: Iterable[Phase]) -> float:
    """Device memory of the fullest phase, with what lies outside of tensors."""
    return max(phase.gib for phase in phases) + OUTSIDE_GIB


def predict(config: Config, facts: BaseFacts, *, bucket: Bucket | None = None) -> tuple[Phase, ...]:
    """The phases of a run, in the order in which it comes to them.

    `bucket`: the largest that is trained at; by default the square of the resolution, which no other exceeds. Precision
    and optimizer "auto" mean what a CUDA card gets. Raises ModelError or ConfigError where training would.
    """
    return _Modules.of(config, facts).phases(config, bucket)


def fit(config: Config, facts: BaseFacts, budget_gib: float, *, bucket: Bucket | None = None) -> Changes:
    """The fastest way to compute a step within `budget_gib` that leaves the result as it is; else the smallest one.

    Tried in this order: the rows of a pass as set and halved down to one; the same with gradient checkpointing, unless
    that is set. Raises as `predict` does.
    """
    return _changes(_tried(_Modules.of(config, facts), config, budget_gib, bucket)[-1][0])


def choose(config: Config, facts: BaseFacts, budget_gib: float, *, bucket: Bucket | None = None) -> Plan:
    """What `fit` gives, with all there is to tell of it. Levers that change the result are only suggested."""
    modules = _Modules.of(config, facts)
    tried = _tried(modules, config, budget_gib, bucket)
    chosen, reasons = tried[-1][0], _reasons(config, tried)
    phases = modules.phases(chosen, bucket)
    for phase in phases:
        if phase.gib + OUTSIDE_GIB > budget_gib:
            need = phase.gib + OUTSIDE_GIB
            reasons.append(f'"{phase.name}" needs {need:.1f} GiB: it does not fit {budget_gib:g} GiB')
    return Plan(_changes(chosen), tuple(reasons), phases, _with_savings(modules, chosen, facts, bucket))


def levers(config: Config) -> tuple[Lever, ...]:
    """What is left to change for a smaller training step, what costs least first. `config` is resolved."""
    resolution, bucket_step = config.data.resolution, config.data.bucket_step
    assert resolution is not None and bucket_step is not None, "config is not resolved"
    found = []
    if _rows(config) > 1:
        found.append(Lever({"train": {"batch_size": 1}}, "same result, the class image in a pass of its own"))
    if not config.train.gradient_checkpointing:
        found.append(Lever({"train": {"gradient_checkpointing": True}}, "same result, about a third slower"))
    if config.optimizer.name in ("adamw", "prodigy", "schedulefree"):
        found.append(Lever({"optimizer": {"name": "adamw8bit"}}, "changes the result"))
    if config.adapter.text_encoder:
        found.append(Lever({"adapter": {"text_encoder": False}}, "changes the result: the denoiser alone learns"))
    if config.model.quantize == "none" and not config.adapter.dora:
        found.append(Lever({"model": {"quantize": "nf4"}}, "changes the result a little, slower; the base in 4 bits"))
    lower = resolution * 3 // 4 // bucket_step * bucket_step
    if lower >= bucket_step:
        found.append(Lever({"data": {"resolution": lower}}, "changes the result: less detail"))
    return tuple(found)


def savings(config: Config, facts: BaseFacts) -> tuple[Lever, ...]:
    """`levers` with what each saves of a training step at the resolution's square. Raises as `predict` does."""
    return _with_savings(_Modules.of(config, facts), config, facts, None)


def _with_savings(modules: _Modules, config: Config, facts: BaseFacts, bucket: Bucket | None) -> tuple[Lever, ...]:
    found, before = [], modules.step(config, bucket).gib
    for lever in levers(config):
        config = config.with_values({section: dict(pairs) for section, pairs in lever.changes.items()})
        if lever.changes.keys() & {"adapter", "model"}:
            modules = _Modules.of(config, facts)
        after = modules.step(config, None if "data" in lever.changes else bucket).gib
        found.append(replace(lever, saved_gib=before - after))
        before = after
    return tuple(found)


def _tried(modules: _Modules, config: Config, budget_gib: float, bucket: Bucket | None) -> list[tuple[Config, float]]:
    """Ways of computing a step with the GiB each needs, up to the first that fits."""
    tried: list[tuple[Config, float]] = []
    for way in _ways(config):
        candidate = config.with_values({"train": way})
        tried.append((candidate, modules.step(candidate, bucket).gib + OUTSIDE_GIB))
        if tried[-1][1] <= budget_gib:
            break
    return tried


def _changes(config: Config) -> Changes:
    keys = ("batch_size", "gradient_checkpointing")
    return {"train": {key: getattr(config.train, key) for key in keys}}


def _ways(config: Config) -> list[dict[str, Any]]:
    """Settings of [train] that leave the result as it is, the fastest first."""
    asked = config.train.gradient_checkpointing
    sizes = [config.train.batch_size]
    while min(sizes[-1], _rows(config)) > 1:
        sizes.append(min(sizes[-1], _rows(config)) // 2)
    switches = (False, True) if asked is None else (asked,)
    return [{"batch_size": size, "gradient_checkpointing": switch} for switch in switches for size in sizes]


def _reasons(config: Config, tried: Sequence[tuple[Config, float]]) -> list[str]:
    """Why the last of `tried` was taken: a line for each choice, with what the one before would need."""
    needs = {(c.train.batch_size, bool(c.train.gradient_checkpointing)): gib for c, gib in tried}
    train = tried[-1][0].train
    size, is_on, asked = train.batch_size, bool(train.gradient_checkpointing), config.train
    reasons = [f"train.batch_size = {size}: as set"]
    if size != asked.batch_size:
        more = min(key[0] for key in needs if key[0] > size)
        reasons = [f"train.batch_size = {size} (same result): {more} needs {needs[more, is_on]:.1f} GiB"]
    setting = f"train.gradient_checkpointing = {str(is_on).lower()}"
    if asked.gradient_checkpointing is not None:
        return [*reasons, f"{setting}: as set"]
    if not is_on:
        return [*reasons, f"{setting}: not needed, and a third faster so"]
    least = min(gib for (_, is_checkpointed), gib in needs.items() if not is_checkpointed)
    return [*reasons, f"{setting} (same result, about a third slower): without it {least:.1f} GiB are needed"]


def _rows(config: Config) -> int:
    """Rows of the largest micro-batch on one device."""
    return min(config.train.batch_size, _rows_per_step(config))


def _rows_per_step(config: Config) -> int:
    return config.train.images_per_step * (2 if config.has_prior else 1)


def _stored_bytes(modules: Iterable[nn.Module], config: Config) -> int:
    """Bytes of a base's modules as they lie on the device, quantised or not."""
    modules, kind = list(modules), config.model.quantize
    return held_bytes(tensors_of(modules)) - (0 if kind == "none" else sum(saved_bytes(m, kind) for m in modules))


@dataclass(frozen=True)
class _Modules:
    """A base without weights, with its adapter: what phases are traced on. `adapted`: what carries the adapter."""

    family: Family
    vae: Vae
    text_encoders: Mapping[str, nn.Module]
    adapted: Mapping[str, nn.Module]
    parameters: Sequence[nn.Parameter]
    base_bytes: int
    native_resolution: int
    traced: dict[tuple[Any, ...], tuple[int, int]]
    """What `trace_step` gave, by what it depends on."""

    @staticmethod
    def of(config: Config, facts: BaseFacts) -> _Modules:
        dtype = DTYPES.get(config.model.precision, torch.bfloat16)  # "auto" on a card: two bytes, bf16 or fp16
        parts = without_weights(facts, dtype)
        family = families.around(facts, parts)
        assert parts.vae is not None, "all parts were asked for"
        is_text_trained = config.adapter.text_encoder
        adapted = {"unet": parts.unet} | (parts.text_encoders if is_text_trained else {})
        base_bytes = _stored_bytes(adapted.values(), config)
        used = family.num_used_text_layers if is_text_trained else {}
        groups = inject.inject_(adapted, config.adapter, num_used_text_layers=used)
        parameters = [parameter for group in groups.values() for parameter in group]
        modules = (family, parts.vae, parts.text_encoders, adapted)
        return _Modules(*modules, parameters, base_bytes, facts.native_resolution, {})

    def square(self, config: Config) -> Bucket:
        side = config.data.resolution or self.native_resolution
        return Bucket(side, side)

    def phases(self, config: Config, bucket: Bucket | None) -> tuple[Phase, ...]:
        """All phases of the run."""
        step, preview = self.step(config, bucket), config.preview
        lasting = {part: step.parts[part] for part in ("base", "adapter", "optimizer")}
        square = self.square(config)
        measuring = self._working(partial(self._denoise, config, VALIDATION_ROWS, square))
        phases = [self._prepare(config, bucket or square), step]
        phases.append(Phase("validate", lasting | {"denoising": measuring}))
        if preview.images_per_prompt:
            pictures = preview.images_per_prompt * len(preview.prompts)
            drawing = self._draw(config, pictures, preview.guidance_scale, square)
            phases.append(Phase("draw", lasting | {"VAE": held_bytes(tensors_of([self.vae.module]))} | drawing))
        return tuple(phases)

    def step(self, config: Config, bucket: Bucket | None) -> Phase:
        """The phase "train": one micro-step."""
        batch = self._batch(config, _rows(config), bucket or self.square(config))
        gradients, others = self._trace(config, batch)
        parts = {
            "base": self.base_bytes,
            "adapter": held_bytes(self.parameters),
            "gradients": gradients,
            "optimizer": optim.state_bytes([p.shape for p in self.parameters], config.optimizer, device_type="cuda"),
            "inputs": held_bytes(batch.tensors),
            "activations": others,
        }
        return Phase("train", parts)

    def _trace(self, config: Config, batch: Batch) -> tuple[int, int]:
        train, rows = config.train, len(batch.latents)
        follows_another = _rows_per_step(config) > rows or train.images_per_step > 1  # whose buckets may differ
        key = (batch.latents.shape, train.gradient_checkpointing, follows_another)
        if key not in self.traced:
            self._switch(training=True, gradient_checkpointing=bool(train.gradient_checkpointing))
            for parameter in self.parameters:
                parameter.grad = torch.empty_like(parameter) if follows_another else None
            objective = objective_for(config.objective, self.family.schedule)
            self.traced[key] = trace_step(self.family, objective, batch, self.parameters, self._tensors())
            for parameter in self.parameters:
                parameter.grad = None
        return self.traced[key]

    def _prepare(self, config: Config, bucket: Bucket) -> Phase:
        """Class images are drawn, pictures and prompts encoded, with all of the base on the device and no adapter."""
        prior, text = config.prior, _stored_bytes(self.text_encoders.values(), config)
        pixels = torch.empty(1, 3, bucket.height_px, bucket.width_px, device=META)
        working = {"encoding": self._working(partial(self.vae.encode, pixels))}
        if config.has_prior and prior.folder is None:
            with inject.disabled(self.adapted):
                working |= self._draw(config, prior.num_images, prior.guidance_scale, bucket)
        name, size = max(working.items(), key=lambda item: item[1])
        unet = self.base_bytes - (text if config.adapter.text_encoder else 0)
        vae = held_bytes(tensors_of([self.vae.module]))
        return Phase("prepare", {"base": unet, "text encoders": text, "VAE": vae, name: size})

    def _draw(self, config: Config, pictures: int, guidance_scale: float, bucket: Bucket) -> dict[str, int]:
        """The larger of denoising and decoding as many pictures as go together."""
        together = min(PICTURES_AT_ONCE, pictures)
        rows = together * (2 if guidance_scale > 1 else 1)  # both halves of guidance go in one pass
        decoded = min(together, self.vae.num_at_once(bucket.width_px, bucket.height_px))
        latents = torch.empty(decoded, *self._shape(bucket), device=META)
        denoising = self._working(partial(self._denoise, config, rows, bucket))
        decoding = self._working(lambda: self.vae.module.decode(latents))
        return {"denoising": denoising} if denoising > decoding else {"decoding": decoding}

    def _denoise(self, config: Config, rows: int, bucket: Bucket) -> None:
        """One pass of the denoiser for looking, its inputs included."""
        self._switch(training=False, gradient_checkpointing=False)
        objective = objective_for(config.objective, self.family.schedule)
        micro_step(self.family, objective, self._batch(config, rows, bucket))

    def _working(self, run: Callable[[], Any]) -> int:
        """Most bytes that `run` holds beyond the modules, without gradients."""
        live = LiveBytes("meta", self._tensors())
        with torch.no_grad(), live, fused_attention():
            run()
        return live.peak

    def _batch(self, config: Config, rows: int, bucket: Bucket) -> Batch:
        is_text_trained = config.adapter.text_encoder
        return make_batch(self.family, rows, self._shape(bucket), is_text_trained=is_text_trained, device=META)

    def _shape(self, bucket: Bucket) -> Sequence[int]:
        factor = self.vae.factor
        return (self.vae.module.config.latent_channels, bucket.height_px // factor, bucket.width_px // factor)

    def _switch(self, *, training: bool, gradient_checkpointing: bool) -> None:
        for module in self.adapted.values():
            module.train(training)
        self.family.prepare_denoiser_(gradient_checkpointing=gradient_checkpointing, attention="sdpa")

    def _tensors(self) -> list[Tensor]:
        return tensors_of([self.family.denoiser, self.vae.module, *self.text_encoders.values()])
