"""How many pictures go through a network together.

What lives here: the numbers, and what follows from the config. What does not: the networks.
"""

from __future__ import annotations

from lora_booth.config.resolved import Filled

PICTURES_AT_ONCE = 4
"""Pictures that are denoised together where nobody says how many; large ones are decoded one by one."""
PIXELS_AT_ONCE = 512 * 512
"""Pixels that go through the VAE together: one picture of SD 1.5's size, whose decoding holds 0.76 GiB by count
(`planning/memory.py`). Four would hold more than a training step; larger pictures go one by one anyhow."""


def decoded_at_once(width_px: int, height_px: int) -> int:
    """How many pictures of this size go through the VAE together."""
    return max(1, PIXELS_AT_ONCE // (width_px * height_px))


def class_images_at_once(config: Filled) -> int:
    """Class images that a run draws together unless it has begun with fewer: `PICTURES_AT_ONCE`, halved until the
    config allows it.

    More would be faster on a large card, but then what is drawn would depend on its free memory.
    """
    together = PICTURES_AT_ONCE
    while together > (config.memory.pictures_at_once or PICTURES_AT_ONCE):
        together //= 2
    return together
