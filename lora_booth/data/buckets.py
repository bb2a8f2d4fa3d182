"""Which size a picture is trained at and which part of it is kept: integers only, no pixels.

Words: a *bucket* is a size that pictures are trained at; its area is near resolution². A *crop* says how one picture
gets there: enlarge or shrink it to the resized size, then cut the bucket out of its middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from lora_booth.errors import ConfigError


@dataclass(frozen=True, order=True)
class Bucket:
    """A size in pixels that pictures are trained at."""

    width_px: int
    height_px: int

    def __str__(self) -> str:
        return f"{self.width_px}×{self.height_px}"


@dataclass(frozen=True)
class Crop:
    """The way of one picture into its bucket. `left_px` and `top_px` are offsets in the resized picture."""

    bucket: Bucket
    original_width_px: int
    original_height_px: int
    resized_width_px: int
    resized_height_px: int
    left_px: int
    top_px: int

    @property
    def geometry(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's micro-conditioning of this very picture (arXiv 2307.01952, section 2.2).

        Original height, original width, crop top, crop left, target height, target width: the original is the upright
        picture before any resizing, the offsets are in resized pixels, the target is the bucket.
        """
        original = (self.original_height_px, self.original_width_px)
        return (*original, self.top_px, self.left_px, self.bucket.height_px, self.bucket.width_px)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what is kept, in pixels of the original."""
        across = self.original_width_px / self.resized_width_px
        down = self.original_height_px / self.resized_height_px
        right = min((self.left_px + self.bucket.width_px) * across, self.original_width_px)
        bottom = min((self.top_px + self.bucket.height_px) * down, self.original_height_px)
        return self.left_px * across, self.top_px * down, right, bottom

    @property
    def lost_fraction(self) -> float:
        """Part of the picture's area that is cut off, from 0 to 1."""
        kept = self.bucket.width_px * self.bucket.height_px
        return 1 - kept / (self.resized_width_px * self.resized_height_px)

    @property
    def enlargement(self) -> float:
        """Resized size over original size: above 1 the picture is too small and will look soft."""
        by_width = self.resized_width_px / self.original_width_px
        return max(by_width, self.resized_height_px / self.original_height_px)

    def mirrored(self) -> Crop:
        """The crop of the mirrored picture that shows the same part of it."""
        return replace(self, left_px=self.resized_width_px - self.bucket.width_px - self.left_px)


def buckets(resolution: int, step: int, max_aspect: float) -> tuple[Bucket, ...]:
    """All useful sizes up to resolution² pixels, sorted, the square always among them.

    Sides are multiples of `step`, longest over shortest side is at most `max_aspect`, no bucket fits into another, and
    with every bucket comes the one turned by 90 degrees. At 1024 and 64 these are sizes that SDXL was trained at
    (arXiv 2307.01952, appendix I). Raises ConfigError if `resolution` is not a multiple of `step`.
    """
    if resolution < step or resolution % step:
        lower = max(resolution // step, 1) * step
        raise ConfigError(
            f"data.resolution is {resolution}, which is not a multiple of data.bucket_step = {step}; "
            f"set data.resolution = {lower} or {lower + step}."
        )
    found: set[Bucket] = set()
    longest = 0
    for short in range(resolution, 0, -step):
        limit = min(resolution * resolution // short, int(max_aspect * short))
        long = limit // step * step
        if long > longest and long >= short:
            longest = long
            found |= {Bucket(long, short), Bucket(short, long)}
    return tuple(sorted(found))


def assign(width_px: int, height_px: int, available: Sequence[Bucket]) -> Crop:
    """The crop that keeps most of an upright picture of this size; on a tie, in the largest bucket.

    The resized picture covers the bucket exactly along one side and is centred along the other.
    """
    assert min(width_px, height_px) > 0, f"a picture of {width_px}×{height_px} pixels"
    assert available, "no buckets to choose from"

    def merit(bucket: Bucket) -> tuple[Fraction, int, Bucket]:
        kept = sorted((width_px * bucket.height_px, height_px * bucket.width_px))
        return Fraction(kept[0], kept[1]), bucket.width_px * bucket.height_px, bucket

    best = max(available, key=merit)
    if width_px * best.height_px <= height_px * best.width_px:
        resized = (best.width_px, _rounded(height_px * best.width_px, width_px))
    else:
        resized = (_rounded(width_px * best.height_px, height_px), best.height_px)
    left, top = (resized[0] - best.width_px) // 2, (resized[1] - best.height_px) // 2
    return Crop(best, width_px, height_px, *resized, left, top)


def _rounded(numerator: int, denominator: int) -> int:
    """The quotient to the nearest integer, halves upwards."""
    return (2 * numerator + denominator) // (2 * denominator)
