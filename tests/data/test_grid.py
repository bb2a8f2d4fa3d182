"""Grids of pictures: what is cut out of one is what was put in."""

from __future__ import annotations

import pytest
from PIL import Image

from lora_booth.data.grid import cut, labelled_grid


def noise(side: int, count: int) -> list[Image.Image]:
    return [Image.effect_noise((side, side), 80).convert("RGB") for _ in range(count)]


@pytest.mark.parametrize(("side", "factor"), [(64, 3), (200, 1), (256, 1)])
@pytest.mark.parametrize("columns", [(), ("one", "two", "three")])
@pytest.mark.parametrize("captions", [(), [["a\nb", "", "c"], ["d", "e", "f"]]])
def test_a_grid_is_cut_into_its_pictures(side: int, factor: int, columns: list[str], captions: list[list[str]]) -> None:
    rows = [("first", noise(side, 3)), ("second", noise(side, 3))]
    grid = labelled_grid(rows, title="a grid", columns=columns, captions=captions)
    found = cut(grid, rows=2, columns=3, has_columns=bool(columns))
    assert len(found) == 2
    for (_, pictures), cells in zip(rows, found, strict=True):
        for picture, cell in zip(pictures, cells, strict=True):
            enlarged = picture.resize((side * factor,) * 2, Image.Resampling.NEAREST)
            assert cell.tobytes() == enlarged.tobytes()


def test_another_picture_is_not_cut() -> None:
    grid = labelled_grid([("first", noise(64, 3))], title="a grid")
    assert cut(grid, rows=1, columns=3, has_columns=False)
    for rows, columns in ((1, 2), (1, 4), (5, 3)):
        assert cut(grid, rows=rows, columns=columns, has_columns=False) == []
    assert cut(Image.new("RGB", (8, 8)), rows=1, columns=1) == []
