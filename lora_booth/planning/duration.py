"""How long a run takes a card at its peak rates.

It is the work of its passes, as often as they come.

The passes are those whose memory is predicted (`memory.py`), so both come from one trace. No run reaches the
peak rates, and starting operations takes time too; so a prediction is the least that a run can take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_booth.config.resolved import Filled
from lora_booth.data.buckets import Bucket
from lora_booth.data.subject import Pictures
from lora_booth.evaluation.prompts import PREDICTED_ROWS
from lora_booth.models import at_once
from lora_booth.models.cards import Card
from lora_booth.planning.memory import Modules
from lora_booth.planning.work import Work
from lora_booth.training import candidates, class_images, reach, watching
from lora_booth.training.order import validation_levels
from lora_booth.training.watching import Watch


@dataclass(frozen=True)
class Duration:
    """The work of a run, by what it is for. `step`: passes with gradients, and what the base predicts for comparison;
    `watching`: validation and drift; `other`: pictures encoded, previews, the choice. `num_drawn`: class images, which
    `class_images` is the work of."""

    step: Sequence[Work]
    num_steps: int
    class_images: Sequence[Work]
    num_drawn: int
    watching: Sequence[Work]
    other: Sequence[Work]

    def step_s(self, card: Card) -> float:
        """Seconds of an optimizer step, without the optimizer's own."""
        return sum(work.seconds(card) for work in self.step)

    def training_s(self, card: Card) -> float:
        """Seconds of all steps."""
        return self.num_steps * self.step_s(card)

    def class_images_s(self, card: Card) -> float:
        """Seconds to draw and decode the class images, if none of them is there yet."""
        return sum(work.seconds(card) for work in self.class_images)

    def other_s(self, card: Card) -> float:
        """Seconds of everything else that the denoiser and the VAE do."""
        return sum(work.seconds(card) for work in (*self.watching, *self.other))

    def total_s(self, card: Card) -> float:
        """Seconds of the run."""
        return self.training_s(card) + self.class_images_s(card) + self.other_s(card)

    @property
    def watching_share(self) -> float:
        """The part of the run's operations that validation and drift are."""
        training = [work * self.num_steps for work in self.step]
        everything = (*training, *self.class_images, *self.watching, *self.other)
        return sum(work.flops for work in self.watching) / sum(work.flops for work in everything)


def predict(modules: Modules, config: Filled, pictures: Pictures, bucket: Bucket | None = None) -> Duration:
    """The work of a run with `config`, when nothing is cached yet.

    `bucket`: the largest that is trained at, by default the resolution's square; all pictures are taken to be of it.
    """
    train, prior, shown = config.train, config.prior, config.preview
    square = modules.square(config)
    bucket, drawn = bucket or square, []
    num_encoded, num_drawn = _num_made(modules, config, pictures)
    if num_drawn:
        drawing = modules.draw_work(config, bucket, prior.sampler_steps, is_guided=prior.guidance_scale > 1)
        drawn = [drawing * num_drawn, modules.decode_work(config, bucket) * num_drawn]
    watch = watching.of(config)
    other = [modules.encode_work(bucket) * num_encoded]
    is_guided = shown.guidance_scale > 1
    num_shown = _num_previews(config)
    if num_shown:
        drawing = modules.draw_work(config, square, shown.sampler_steps, is_guided=is_guided)
        other += [drawing * num_shown, modules.decode_work(config, square) * num_shown]
    num_judged = _num_judged(config)
    if num_judged:
        num_pictures = candidates.num_pictures(config) * num_judged
        picture = modules.draw_work(config, square, candidates.solver_steps(config), is_guided=is_guided)
        other += [picture * num_pictures, modules.decode_work(config, square) * num_pictures]
        other.append(modules.draw_work(config, square, 1, is_guided=False) * (PREDICTED_ROWS * num_judged))
    step = [modules.step_work(config, bucket), modules.comparison_work(config, bucket)]
    watched = _watching(modules, config, watch, bucket, _num_validation_rows(pictures, watch.rows))
    return Duration([work for work in step if work is not None], train.steps, drawn, num_drawn, watched, other)


def _watching(modules: Modules, config: Filled, watch: Watch, bucket: Bucket, num_validation_rows: int) -> list[Work]:
    """Validation, and where there is drift the pictures that it is measured at, and the looks at them: one at the base,
    and one at each save."""
    found = [modules.draw_work(config, bucket, 1, is_guided=False) * (watch.num_saves * num_validation_rows)]
    if watch.has_drift:
        square, num_pictures = modules.square(config), len(candidates.drifted(config))
        found.append(modules.draw_work(config, square, watching.SOLVER_STEPS, is_guided=False) * num_pictures)
        found.append(modules.draw_work(config, square, 1, is_guided=False) * ((1 + watch.num_saves) * watch.rows))
    return found


def _num_made(modules: Modules, config: Filled, pictures: Pictures) -> tuple[int, int]:
    """Pictures that are encoded, and class images that are drawn: what the steps reach, and who is drawn with them."""
    wanted = reach.class_images_of(config, pictures)
    rows, size_of = watching.of(config).rows, modules.latent_shape
    found = reach.of(
        config,
        pictures,
        wanted,
        fingerprint="",
        latent_shape=lambda *size: size_of(Bucket(*size)),
        validation_rows=rows,
    )
    batches = class_images.batches(wanted, found.keys, at_once.class_images_at_once(config))
    return len(found.pictures), sum(map(len, batches))


def _num_judged(config: Filled) -> int:
    """How many are drawn and measured in the end: the base and each candidate, or none."""
    num_compared, _ = num_candidates(config)
    return num_compared + 1 if num_compared else 0


def num_candidates(config: Filled) -> tuple[int, int]:
    """How many candidates are compared in the end, and how many there are. The checkpoint with the lowest validation
    loss is taken to be another than the last ones that are kept."""
    kept = range(min(watching.of(config).num_saves, config.train.keep_last + 1), 0, -1)
    if not candidates.is_wanted(config):
        return 0, 0
    return len(candidates.candidates(config, list(kept))), len(candidates.possible(config, list(kept)))


def with_other_prior(config: Filled) -> Filled | None:
    """`config` with the base's own predictions in place of class images that it would draw, or the other way round;
    None where it has neither."""
    if not config.has_prior or config.prior.folder is not None:
        return None
    return config.with_values({"prior": {"mode": "images" if config.has_model_prior else "model"}})


def _num_validation_rows(pictures: Pictures, wanted: int) -> int:
    count = len((pictures.held_out or pictures.instances).pictures)
    return sum(len(validation_levels(number, count, wanted)) for number in range(count))


def _num_previews(config: Filled) -> int:
    """Pictures drawn before the first step and on the way and, without and with the adapter, at the end."""
    every = config.preview.every_steps
    on_the_way = 0 if every is None else 1 + (config.train.steps - 1) // every
    return (on_the_way + 2) * config.preview.images_per_prompt * len(config.preview.prompts)
