"""How much device memory and work a run takes, by what its passes were counted to hold.

A pass is counted once, by tracing it (`built.py`), and then known (`counts.py`); here the counts become parts of
phases. What a trace cannot see (the context, cuDNN, the allocator's gaps) is one stated constant.

Words: a *part* is what some of the memory is for; a *phase* is a stretch of the run with its own parts. Totals are what
`torch.cuda.max_memory_allocated` counts; `OUTSIDE_GIB` comes on top of them. Not counted: cuDNN's workspaces, and what
the caching allocator cannot split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lora_booth.config.resolved import Filled
from lora_booth.data.buckets import Bucket
from lora_booth.models import at_once
from lora_booth.models.at_once import PICTURES_AT_ONCE
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.planning.counts import Counts, Pass
from lora_booth.planning.work import Work
from lora_booth.training import candidates
from lora_booth.training.optimizers import chosen_name
from lora_booth.training.order import VALIDATION_QUANTILES

if TYPE_CHECKING:
    from lora_booth.planning.built import Built

GIB = 2**30
OUTSIDE_GIB = 0.8
"""CUDA context, cuDNN's workspaces and the allocator's gaps: assumed, not measured. The context is never part of
`torch.cuda.max_memory_allocated`."""


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
    return min(at_once.class_images_at_once(config), config.prior.num_images)


def draws(config: Filled) -> bool:
    """Whether a run draws through its adapter: previews, or to choose among checkpoints."""
    return bool(config.preview.images_per_prompt) or config.evaluate.choose == "best"


def previews_at_once(config: Filled) -> int:
    """Pictures that are drawn together through the adapter."""
    pictures = config.preview.images_per_prompt * len(config.preview.prompts)
    if config.evaluate.choose == "best":
        pictures = max(pictures, candidates.num_pictures(config))
    return min(config.memory.pictures_at_once or PICTURES_AT_ONCE, pictures)


def rows_per_pass(config: Filled) -> int:
    """Rows of the largest micro-batch on one device."""
    return min(config.train.batch_size, _rows_per_step(config))


def _optimizer_figure(config: Filled) -> str:
    averages = "" if config.optimizer.ema_decay is None else " with averages"
    return f"optimizer {chosen_name(config.optimizer, 'cuda')}{averages}"


def _rows_per_step(config: Filled) -> int:
    return config.train.images_per_step * (2 if config.has_prior else 1)


def _compared_rows_per_step(config: Filled) -> int:
    """Rows that the base predicts too: those of the model's prior, and instance rows under DCO."""
    return config.train.images_per_step * (config.has_model_prior + (config.objective.dco_beta is not None))


@dataclass(frozen=True)
class Modules:
    """A base with its adapter, as far as is asked for: it is built and traced where a count is not known yet.

    `bucket` everywhere: the largest that is trained at; None is the square of the resolution, which no other exceeds.
    Precision and optimizer "auto" mean what a CUDA card gets.
    """

    config: Filled
    facts: BaseFacts
    counts: Counts

    @staticmethod
    def of(config: Filled, facts: BaseFacts, *, is_kept: bool = False) -> Modules:
        """The base with the adapter of `config`. Raises ModelError or ConfigError where training would.

        `is_kept`: what was counted before is known, and what is counted now will be after `counts.keep()`.
        """
        modules = Modules(config, facts, Counts.of(config, facts, is_kept=is_kept))
        modules.size("base")
        return modules

    def like(self, config: Filled) -> Modules:
        """The same base with another adapter, or in other types."""
        return Modules.of(config, self.facts, is_kept=self.counts.folder is not None)

    @cached_property
    def built(self) -> Built:
        """What is traced. The first time takes seconds."""
        from lora_booth.planning.built import Built

        return Built.of(self.config, self.facts)

    def size(self, name: str) -> int:
        """One of `Built.sizes`."""
        if name not in self.counts.figures:
            for each, figure in self.built.sizes.items():
                self.counts.add(each, figure)
        return self._number(name, lambda built: built.sizes[name])

    def knows_optimizer(self, config: Filled) -> bool:
        """Whether the bytes that its optimizer keeps are known."""
        return _optimizer_figure(config) in self.counts.figures

    def _number(self, name: str, count: Callable[[Built], int]) -> int:
        if name not in self.counts.figures:
            self.counts.add(name, count(self.built))
        figure = self.counts.figures[name]
        assert isinstance(figure, int), name
        return figure

    def _pass(self, name: str, trace: Callable[[Built], Pass]) -> Pass:
        if name not in self.counts.figures:
            self.counts.add(name, trace(self.built))
        figure = self.counts.figures[name]
        assert isinstance(figure, Pass), name
        return figure

    def square(self, config: Filled) -> Bucket:
        side = config.data.resolution or self.facts.native_resolution
        return Bucket(side, side)

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """`[C, h, w]` of a picture of this size."""
        factor = self.size("pixels per latent")
        return self.size("latent channels"), bucket.height_px // factor, bucket.width_px // factor

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

    def _encoding(self, bucket: Bucket) -> Pass:
        return self._pass(f"encode {bucket}", lambda built: built.encode(bucket))

    def _encode_prompts(self, config: Filled) -> Phase:
        encoding = self._pass("encode a prompt", lambda built: built.encode_prompt()).peak
        held = self._without_denoiser(config, self._before_training(config))
        held |= {"text encoders": self.size("text encoders")}
        return Phase("prepare", held | {"encoding": encoding})

    def draw_class_images(self, config: Filled, bucket: Bucket | None) -> Phase:
        """The moment of "prepare" in which the base draws class images."""
        held, bucket = self._before_training(config), bucket or self.square(config)
        rows = class_images_at_once(config) * (2 if config.prior.guidance_scale > 1 else 1)
        parts = self._drawing(config, held, class_images_at_once(config), rows, bucket, is_adapted=False)
        return Phase("prepare", parts)

    def _before_training(self, config: Filled) -> dict[str, int]:
        """What lies on the device once the prompts are encoded."""
        denoiser = self._denoiser_bytes(config)
        encoders = {"text encoders": self.size("text encoders")} if config.adapter.is_text_trained else {}
        return {"base": denoiser, **encoders, "VAE": self.size("VAE")}

    def _without_denoiser(self, config: Filled, held: Mapping[str, int]) -> dict[str, int]:
        """What is left of `held` while the denoiser is offloaded, if that is wanted."""
        left = {"base": held["base"] - self._denoiser_bytes(config)} if config.memory.offload_denoiser else {}
        return {part: size for part, size in {**held, **left}.items() if size}

    def _denoiser_bytes(self, config: Filled) -> int:
        return self.size("base") - (self.size("text encoders") if config.adapter.is_text_trained else 0)

    def validate(self, config: Filled, bucket: Bucket | None) -> Phase:
        """The phase "validate": the denoiser alone, on several noise levels of one image."""
        measuring = len(VALIDATION_QUANTILES) * self._row_bytes(self.square(config), is_adapted=True)
        return Phase("validate", self._lasting(config, bucket) | {"denoising": measuring})

    def draw(self, config: Filled, bucket: Bucket | None) -> Phase:
        """The phase "draw": previews through the adapter."""
        held = self._lasting(config, bucket) | {"VAE": self.size("VAE")}
        rows = previews_at_once(config) * (2 if config.preview.guidance_scale > 1 else 1)
        together, square = previews_at_once(config), self.square(config)
        return Phase("draw", self._drawing(config, held, together, rows, square, is_adapted=True))

    def step(self, config: Filled, bucket: Bucket | None) -> Phase:
        """The phase "train": one micro-step. What the base predicts beside it for comparison is gone before the fullest
        moment, and takes less while it lasts."""
        rows, bucket = rows_per_pass(config), bucket or self.square(config)
        traced = self._step(config, bucket)
        parts = {
            "base": self.size("base"),
            "adapter": self.size("adapter"),
            "gradients": traced.gradients,
            "optimizer": self._optimizer_bytes(config),
            "inputs": self._step_input_bytes(rows, bucket),
            "activations": traced.peak,
        }
        return Phase("train", parts)

    def step_work(self, config: Filled, bucket: Bucket | None) -> Work:
        """One optimizer step: forward, backward, and what is computed again; not the optimizer's own, nor what the
        base predicts."""
        work = self._step(config, bucket or self.square(config)).work
        return work * (_rows_per_step(config) / rows_per_pass(config))

    def comparison_work(self, config: Filled, bucket: Bucket | None) -> Work | None:
        """What the base predicts in one step; None where nothing is compared with it."""
        rows = _compared_rows_per_step(config)
        if not rows:
            return None
        return self._denoising(bucket or self.square(config), is_adapted=False).work * (rows / 2)

    def encode_work(self, bucket: Bucket) -> Work:
        """One picture through the VAE's encoder."""
        return self._encoding(bucket).work

    def draw_work(self, config: Filled, bucket: Bucket, solver_steps: int, *, is_guided: bool) -> Work:
        """One picture drawn: the denoiser at each of `solver_steps`, twice where it is guided."""
        rows = 2 if is_guided else 1
        return self._denoising(bucket, is_adapted=True).work * (solver_steps * rows / 2)

    def decode_work(self, config: Filled, bucket: Bucket) -> Work:
        """One picture through the VAE's decoder."""
        return self._decoding(config, 1, bucket).work

    def _optimizer_bytes(self, config: Filled) -> int:
        return self._number(_optimizer_figure(config), lambda built: built.optimizer_bytes(config.optimizer))

    def _input_bytes(self, rows: int, bucket: Bucket) -> int:
        return self._number(f"inputs {rows} {bucket}", lambda built: built.input_bytes(rows, bucket))

    def _step_input_bytes(self, rows: int, bucket: Bucket) -> int:
        return self._number(f"inputs of a step {rows} {bucket}", lambda built: built.step_input_bytes(rows, bucket))

    def _step(self, config: Filled, bucket: Bucket) -> Pass:
        train, rows = config.train, rows_per_pass(config)
        follows = _rows_per_step(config) > rows or train.images_per_step > 1  # another, whose buckets may differ
        share, is_offloading = float(train.gradient_checkpointing or 0), bool(config.memory.offload_activations)
        name = f"step {rows} {bucket} {share:g}{' offloading' * is_offloading}{' following' * follows}"
        flags = {"is_offloading": is_offloading, "follows_another": follows}
        return self._pass(name, lambda built: built.step(rows, bucket, share, **flags))

    def _lasting(self, config: Filled, bucket: Bucket | None) -> dict[str, int]:
        parts = self.step(config, bucket).parts
        return {part: parts[part] for part in ("base", "adapter", "optimizer")}

    def _drawing(
        self, config: Filled, held: Mapping[str, int], together: int, rows: int, bucket: Bucket, *, is_adapted: bool
    ) -> dict[str, int]:
        """The fuller moment of denoising and decoding `together` pictures beside what is `held`, with the adapter or
        the base alone; `rows`: of a pass, both halves of guidance in one."""
        decoding = self._without_denoiser(config, held) | {"decoding": self._decoding(config, together, bucket).peak}
        denoising = {**held, "denoising": rows * self._row_bytes(bucket, is_adapted=is_adapted)}
        return max(decoding, denoising, key=lambda parts: sum(parts.values()))

    def _decoding(self, config: Filled, together: int, bucket: Bucket) -> Pass:
        count = min(together, at_once.decoded_at_once(bucket.width_px, bucket.height_px))
        is_tiled = bool(config.memory.tiled_decoding)
        name = f"decode {count} {bucket}{' in tiles' * is_tiled}"
        return self._pass(name, lambda built: built.decode(count, bucket, is_tiled=is_tiled))

    def _row_bytes(self, bucket: Bucket, *, is_adapted: bool) -> int:
        """Bytes of a pass for looking, inputs included, for one row; several take as many times that."""
        return (self._input_bytes(2, bucket) + self._denoising(bucket, is_adapted=is_adapted).peak) // 2

    def _denoising(self, bucket: Bucket, *, is_adapted: bool) -> Pass:
        """A pass for looking, of two rows."""
        name = f"denoise {bucket}{'' if is_adapted else ' by the base'}"
        return self._pass(name, lambda built: built.denoise(bucket, is_adapted=is_adapted))
