"""Which checkpoints are compared at which strengths in the end, and by how many pictures.

What lives here: what follows from the config. What does not: drawing and measuring (`choosing.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_booth.config.resolved import Filled
from lora_booth.errors import ConfigError
from lora_booth.evaluation import encoders
from lora_booth.evaluation.prompts import Prompts, few
from lora_booth.training import watching
from lora_booth.training.optimizers import OPTIMIZERS

MAX_SOLVER_STEPS = 12
"""Denoiser calls for a picture, at most; more hardly change what is measured."""
PER_PROMPT = 2
"""Pictures of each prompt of the subject."""
BACKWARD = 3
"""Passes that a row with gradients costs: forward, and backward twice as much."""


def candidates(config: Filled, steps: Sequence[int]) -> list[tuple[int, float]]:
    """Step and strength of each candidate, the most wanted first: as many as evaluate.max_share allows beside the base.

    `steps`: those kept, the last one first.
    """
    train = config.train
    rows = train.images_per_step * (2 if config.has_prior else 1)
    guided = 2 if config.preview.guidance_scale > 1 else 1
    each = num_pictures(config) * solver_steps(config) * guided
    number = int(config.evaluate.max_share * train.steps * rows * BACKWARD / each) - 1
    return possible(config, steps)[: max(0, number)]


def possible(config: Filled, steps: Sequence[int]) -> list[tuple[int, float]]:
    """All of them, whatever they take."""
    if config.optimizer.name != "auto" and OPTIMIZERS[config.optimizer.name].has_modes:
        steps = steps[:1]  # the weights of the others are those that were updated, not those that are exported
    strengths = (1.0,) if config.adapter.dora or config.adapter.embedding == "only" else config.evaluate.strengths
    ranked = [(i + j, j, step, x) for i, step in enumerate(steps) for j, x in enumerate(strengths)]
    return [(step, strength) for _, _, step, strength in sorted(ranked, key=lambda r: r[:2])]


def is_affordable(config: Filled) -> bool:
    """Whether evaluate.max_share allows one candidate at least."""
    return bool(candidates(config, [config.train.steps]))


def prompts(config: Filled) -> Sequence[str]:
    """What is asked for to choose among checkpoints; none where nothing is chosen."""
    return asked(config)[1].all if config.evaluate.choose == "best" and is_affordable(config) else ()


def num_pictures(config: Filled) -> int:
    """Of one candidate, or the base."""
    return asked(config)[1].num_pictures(PER_PROMPT)


def solver_steps(config: Filled) -> int:
    """Denoiser calls for one of them."""
    return min(config.preview.sampler_steps, MAX_SOLVER_STEPS)


def is_wanted(config: Filled) -> bool:
    """Whether a run chooses: [evaluate] says so, and something to measure pictures with is there."""
    try:
        return config.evaluate.choose == "best" and bool(
            config.evaluate.encoder or encoders.default_names(config.model.base)
        )
    except ConfigError:
        return False


def asked(config: Filled) -> tuple[str, Prompts]:
    """What is drawn to choose among checkpoints: the name of the list, and its prompts."""
    subject = config.subject
    return few(config.model.base, token=subject.token, class_noun=subject.class_noun)


def drifted(config: Filled) -> Sequence[str]:
    """What is asked for to measure drift at every save; of each there is one of the fewest rows."""
    return asked(config)[1].unrelated[: watching.MIN_ROWS]
