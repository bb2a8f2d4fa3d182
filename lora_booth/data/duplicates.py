"""Which pictures look almost like an earlier one, and whether all have one background.

Of copies a difference hash is held against the colours themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

Look = npt.NDArray[np.uint8]
"""What a picture looks like from afar: uint8 `[9, 9, 3]`, the mean colours of 9 × 9 cells."""

_NEAR_BITS = 10
_NEAR_LEVELS = 24
_SAME_LEVELS = 16
"""Standard deviation of the background's colours over pictures, below which it counts as one: photographs of one thing
in several places have 36 and more."""


def look(upright: Image.Image) -> Look:
    """The look of an upright RGB picture."""
    return np.asarray(upright.resize((9, 9), Image.Resampling.BOX))


def alike(looks: Sequence[Look]) -> list[int | None]:
    """For each picture, the number of the first earlier one that looks almost the same, else None.

    Two are alike if, of 128 bits "brighter than its left (upper) neighbour", at most 10 differ, and no cell's colour
    differs by more than 24 of 255 levels: on the flat backgrounds of product shots the bits alone say nothing.
    """
    colours = np.stack(looks).astype(np.int16)
    grey = colours.sum(axis=3)
    across, down = grey[:, :8, 1:] > grey[:, :8, :-1], grey[:, 1:, :8] > grey[:, :-1, :8]
    flags = np.concatenate([across.reshape(len(grey), -1), down.reshape(len(grey), -1)], axis=1)
    bits = np.packbits(flags, axis=1).view(np.uint64)
    found: list[int | None] = []
    for i in range(len(grey)):
        near = np.flatnonzero(np.bitwise_count(bits[:i] ^ bits[i]).sum(axis=1) <= _NEAR_BITS)
        distances = np.abs(colours[near] - colours[i]).max(axis=(1, 2, 3), initial=0)
        similar = near[distances <= _NEAR_LEVELS]
        found.append(int(similar[0]) if len(similar) else None)
    return found


def is_background_shared(looks: Sequence[Look]) -> bool:
    """Whether three pictures or more are nearly alike along their upper edge and their sides."""
    cells = np.stack(looks).astype(np.float32)
    top, sides = cells[:, :2].reshape(len(cells), -1), cells[:, 2:, [0, 1, 7, 8]].reshape(len(cells), -1)
    return len(cells) >= 3 and float(np.concatenate([top, sides], axis=1).std(axis=0).mean()) < _SAME_LEVELS
