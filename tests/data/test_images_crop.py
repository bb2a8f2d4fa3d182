"""What is cut out of a picture, and the numbers that the model gets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_booth.data.buckets import Bucket, Crop, assign, buckets
from lora_booth.data.images import crop, to_pixels


def scene(width: int, height: int) -> Image.Image:
    """A smooth picture."""
    coarse = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 200), st.integers(20, 200), st.sampled_from([(64, 16, 2.0), (128, 64, 4.0)]))
def test_a_crop_equals_resizing_the_whole_and_cutting(width: int, height: int, grid: tuple[int, int, float]) -> None:
    image = scene(width, height)
    window = assign(width, height, buckets(*grid))
    whole = np.asarray(image.resize((window.resized_width_px, window.resized_height_px), Image.Resampling.LANCZOS), int)
    bottom, right = window.top_px + window.bucket.height_px, window.left_px + window.bucket.width_px
    cut = crop(image, window)
    assert (cut.dtype, cut.shape) == (np.uint8, (window.bucket.height_px, window.bucket.width_px, 3))
    difference = np.abs(cut - whole[window.top_px : bottom, window.left_px : right])
    assert difference.max() <= 2, "Pillow rounds to 8 bits after each of two passes, and keeps boxes in float32"
    assert difference.mean() <= 0.25


def test_a_crop_at_full_size_is_the_very_pixels() -> None:
    image = scene(80, 48)
    window = Crop(Bucket(48, 48), 80, 48, 80, 48, 16, 0)
    assert np.array_equal(crop(image, window), np.asarray(image)[:, 16:64])


def test_shrinking_averages_instead_of_picking_pixels() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    cut = crop(Image.fromarray(stripes), assign(256, 256, [Bucket(64, 64)])).astype(int)
    assert np.abs(cut[:, 4:-4] - 127.5).max() <= 3


def test_a_thin_picture_does_not_explode() -> None:
    window = assign(1, 4000, buckets(512, 64, 2.0))
    assert window.resized_height_px > 1_000_000
    assert crop(Image.new("RGB", (1, 4000)), window).shape == (640, 384, 3)


def test_a_crop_of_another_picture_is_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError, match="another picture"):
        crop(scene(96, 72), assign(72, 96, [Bucket(64, 64)]))


def test_pixels_run_from_minus_one_to_one_with_channels_first() -> None:
    array = np.zeros((2, 3, 3), np.uint8)
    array[1, 2] = (255, 51, 0)
    pixels = to_pixels(array)
    assert (pixels.shape, pixels.dtype, pixels.flags["C_CONTIGUOUS"]) == ((3, 2, 3), np.float32, True)
    assert pixels[:, 0, 0].tolist() == [-1, -1, -1]
    assert pixels[:, 1, 2].tolist() == pytest.approx([1, -0.6, -1])
