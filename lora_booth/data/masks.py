"""What in a picture is the subject: masks found, checked, and cut as their picture is.

What lives here: files named `name.mask.png` beside a picture or `masks/name.png`, white where the subject is, and the
picture's own transparency. What does not: what the rest counts in the loss (`training/objective.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops

from lora_booth.data import worker
from lora_booth.data.buckets import Crop
from lora_booth.data.decode import ENDINGS, Unusable
from lora_booth.errors import DataError

FOLDER = "masks"
MARK = ".mask"


@dataclass(frozen=True)
class Mask:
    """A file whose brightness, or where it `is_alpha` whose opacity, says how much of each pixel is the subject."""

    path: Path
    sha256: str
    is_alpha: bool = False


def pictured(path: Path, stems: Mapping[str, str]) -> str | None:
    """The stem of the picture that `path`, beside it, is the mask of; None where it is none. `stems`: as they are
    written, by how they are compared."""
    return stems.get(path.stem[: -len(MARK)]) if is_named_mask(path) else None


def is_named_mask(path: Path) -> bool:
    """Whether a file has the name of a mask, so that it is no picture to learn."""
    return path.suffix.lower() in ENDINGS and path.stem.lower().endswith(MARK)


def in_folder(folder: Path, stems: Mapping[str, str]) -> tuple[dict[str, Path], list[Path]]:
    """Masks in the folder "masks" by the stems of their pictures, and files there that are the mask of none."""
    found: dict[str, Path] = {}
    others: list[Path] = []
    try:
        names = sorted(name for name in os.listdir(folder / FOLDER) if not name.startswith("."))
    except OSError:
        return {}, []
    for path in (folder / FOLDER / name for name in names):
        stem = stems.get(path.stem) if path.suffix.lower() in ENDINGS else None
        if stem is None:
            others.append(path)
        else:
            found[stem] = path
    return found, others


def checked(path: Path, picture: Path, size: tuple[int, int], max_megapixels: float) -> tuple[Mask, list[str]]:
    """The mask in the file `path` of a `picture` of this upright size, and remarks on it. Raises Unusable where it does
    not fit it."""
    without = f"so its picture {picture.name} is left out"
    try:
        sha256, found, _, _ = worker.inspect(path, max_megapixels)
        mask = Mask(path, sha256)
        if found != size:
            raise Unusable(
                f"is a mask of {found[0]}×{found[1]} pixels, but its picture has {size[0]}×{size[1]}, {without}; save "
                "it in the same size."
            )
        lowest = _require_subject(mask, without)
    except Unusable as fault:
        raise Unusable(
            str(fault) if without in str(fault) else f"{fault} Until then {picture.name} is left out."
        ) from fault
    return mask, [
        "is a mask that is white everywhere, so it changes nothing; black leaves out."
    ] if lowest == 255 else []


def of_alpha(picture: Path, sha256: str) -> Mask:
    """The picture's own transparency. Raises Unusable where nothing of it can be seen."""
    mask = Mask(picture, sha256, is_alpha=True)
    _require_subject(mask, "so it is left out")
    return mask


def read(mask: Mask) -> Image.Image:
    """The mask, upright, mode L: 255 where all is subject. Raises DataError where the file is not what it was."""
    try:
        return _decoded(mask)
    except Unusable as fault:
        raise DataError(f"{mask.path.name} {fault}") from fault


def crop(image: Image.Image, window: Crop, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """What a picture's crop keeps of its mask, uint8 `[height, width]` of `size`, each the mean of its area."""
    assert image.size == (window.original_width_px, window.original_height_px), "a crop of another picture"
    return np.array(image.resize(size, Image.Resampling.BOX, box=window.box))


def _decoded(mask: Mask) -> Image.Image:
    if mask.is_alpha:
        return worker.alpha(mask.path, mask.sha256)
    drawn = worker.decode(mask.path, mask.sha256).convert("L")
    if not worker.has_alpha(mask.path, mask.sha256):
        return drawn
    return ImageChops.multiply(drawn, worker.alpha(mask.path, mask.sha256))  # white on nothing is white on black


def _require_subject(mask: Mask, without: str) -> int:
    """The darkest value of a mask. Raises Unusable where nothing is subject."""
    values = np.asarray(_decoded(mask))
    if not values.any():
        what = "is transparent everywhere" if mask.is_alpha else "is a mask that is black everywhere"
        raise Unusable(f"{what}, {without}; white is the subject.")
    return int(values.min())
