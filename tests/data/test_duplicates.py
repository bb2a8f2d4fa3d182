"""Copies are recognised after what people do to pictures, different pictures are not."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

from lora_booth.data.duplicates import alike, is_background_shared, look


def scene(seed: int = 0, width: int = 96, height: int = 72) -> Image.Image:
    """A smooth picture that differs from that of every other seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def recoded(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def test_resized_recoded_brightened_and_blurred_copies_are_alike() -> None:
    copies = [
        scene().resize((48, 36)),
        scene().resize((960, 720)),
        recoded(scene(), 30),
        scene().point(lambda v: min(255, v + 12)),
        scene().filter(ImageFilter.GaussianBlur(2)),
        scene().crop((1, 1, 95, 71)),
    ]
    assert alike([look(image) for image in [scene(), *copies]]) == [None, 0, 0, 0, 0, 0, 0]


def test_a_hundred_different_scenes_are_not_alike() -> None:
    assert alike([look(scene(seed)) for seed in range(100)]) == [None] * 100


def test_different_small_things_on_the_same_white_are_not_alike() -> None:
    papers = []
    for i in range(8):
        paper = Image.new("RGB", (90, 90), "white")
        paper.paste(scene(i, 24, 24), (33, 33))
        papers.append(look(paper))
    assert alike(papers) == [None] * 8


def test_the_same_shape_in_another_colour_is_not_alike() -> None:
    red, blue = (Image.new("RGB", (90, 90), "white") for _ in range(2))
    red.paste((200, 60, 60), (30, 30, 60, 60))
    blue.paste((60, 60, 200), (30, 30, 60, 60))
    assert alike([look(red), look(blue)]) == [None, None]


def test_the_same_shapes_in_other_tones_are_not_alike() -> None:
    darker = scene().point(lambda v: v // 2)
    assert alike([look(scene()), look(darker)]) == [None, None]


def test_different_scenes_in_fog_are_not_alike() -> None:
    foggy = [look(scene(seed).point(lambda v: 180 + v // 12)) for seed in range(8)]
    assert np.ptp(np.stack(foggy)) <= 24, "the colours alone cannot tell"
    assert alike(foggy) == [None] * 8


def test_a_mirrored_picture_is_another_one() -> None:
    mirrored = scene().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert alike([look(scene()), look(mirrored)]) == [None, None]


def test_the_first_of_several_alike_is_named() -> None:
    looks = [look(scene(seed)) for seed in (5, 1, 5, 2, 1, 5)]
    assert alike(looks) == [None, None, 0, None, 1, 0]


def test_a_look_is_the_mean_of_each_cell() -> None:
    array = np.zeros((18, 18, 3), np.uint8)
    array[0, 0] = array[1, 1] = 200
    array[16:, 16:] = 10
    seen = look(Image.fromarray(array))
    assert (seen.shape, seen[0, 0, 0], seen[8, 8, 2], seen.sum()) == ((9, 9, 3), 100, 10, 330)


def test_things_on_one_table_share_their_background_and_scenes_do_not() -> None:
    table = scene(7, 90, 90)
    shots = []
    for i in range(4):
        shot = table.point(lambda value, i=i: min(255, value + 3 * i))  # other light
        shot.paste(scene(i, 40, 50), (22 + i, 30))
        shots.append(recoded(shot, 80))
    assert is_background_shared([look(shot) for shot in shots])
    assert not is_background_shared([look(shot) for shot in shots[:2]])
    assert not is_background_shared([*(look(shot) for shot in shots[:3]), look(scene(8, 90, 90))])
    assert not is_background_shared([look(scene(seed)) for seed in range(5)])
