"""Labelled grids of pictures: rows are prompts, columns are what is compared."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from lora_booth.data.sheet import fitted

_GAP, _MARGIN, _LABEL, _LINE = 10, 24, 30, 18
MIN_SIDE = 192
"""Smaller pictures are enlarged by a whole factor."""
_PAPER, _INK, _FAINT = "#f7f6f3", "#22211f", "#6f6c66"


Rows = Sequence[tuple[str, Sequence[Image.Image]]]
"""A label and its pictures, row by row; all rows have equally many pictures."""


def labelled_grid(
    rows: Rows,
    *,
    columns: Sequence[str] = (),
    title: str = "",
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """One picture: each row's label above its pictures, column names above the first row.

    `captions`: what stands under each picture, on as many lines as the longest of them all has.
    Pictures under 192 pixels are enlarged by a whole factor, so that what is seen is what was drawn.
    """
    assert rows and all(len(pictures) == len(rows[0][1]) for _, pictures in rows), (
        "rows must have equally many pictures"
    )
    sample = rows[0][1][0]
    factor = max(1, -(-MIN_SIDE // min(sample.size)))
    width, height = (max(p.size[axis] for _, pictures in rows for p in pictures) * factor for axis in (0, 1))
    count = len(rows[0][1])
    num_lines = max((caption.count("\n") + 1 for row in captions for caption in row), default=0)
    foot = num_lines * _LINE + (_GAP if num_lines else 0)
    head = _MARGIN + (36 if title else 0) + (_LABEL if columns else 0)
    size = (
        2 * _MARGIN + count * width + (count - 1) * _GAP,
        head + len(rows) * (_LABEL + height + foot + _GAP) + _MARGIN - _GAP,
    )
    paper = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(paper)
    if title:
        _write(pen, (_MARGIN, _MARGIN - 6), title, size[0] - 2 * _MARGIN, font_px=22, fill=_INK)
    for column, name in enumerate(columns):
        _write(pen, (_MARGIN + column * (width + _GAP), head - _LABEL + 6), name, width, font_px=16, fill=_FAINT)
    for row, (label, pictures) in enumerate(rows):
        top = head + row * (_LABEL + height + foot + _GAP)
        _write(pen, (_MARGIN, top + 4), label, size[0] - 2 * _MARGIN, font_px=17, fill=_INK)
        for column, picture in enumerate(pictures):
            shown = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
            left = _MARGIN + column * (width + _GAP)
            paper.paste(shown, (left, top + _LABEL))
            for number, line in enumerate(captions[row][column].split("\n") if captions else ()):
                under = top + _LABEL + height + 4 + number * _LINE
                _write(pen, (left, under), line, width, font_px=14, fill=_FAINT)
    return paper


def cut(picture: Image.Image, *, rows: int, columns: int, has_columns: bool = True) -> list[list[Image.Image]]:
    """The pictures of a `labelled_grid` with a title, which are square, row by row, as large as they are in it; empty
    where `picture` is no grid of so many. `has_columns`: whether it has column names."""
    head = _MARGIN + 36 + (_LABEL if has_columns else 0)
    side, odd = divmod(picture.width - 2 * _MARGIN - (columns - 1) * _GAP, columns)
    stride, uneven = divmod(picture.height - head - _MARGIN + _GAP, rows)
    if odd or uneven or side < 1 or stride < _LABEL + side + _GAP:
        return []
    lefts = [_MARGIN + column * (side + _GAP) for column in range(columns)]
    tops = [head + row * stride + _LABEL for row in range(rows)]
    return [[picture.crop((left, top, left + side, top + side)) for left in lefts] for top in tops]


def _write(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, *, font_px: int, fill: str) -> None:
    font = ImageFont.load_default(font_px)
    pen.text(at, fitted(text, font, width), font=font, fill=fill)
