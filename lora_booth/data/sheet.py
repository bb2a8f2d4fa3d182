"""One picture that shows what the model will really see: every crop, its size and its caption."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

MAX_CELLS = 120
"""More crops are counted in the line under the title but not drawn."""

_COLUMNS, _CELL, _GAP, _MARGIN, _HEAD, _LABEL = 5, 256, 28, 44, 84, 66
_PAPER, _MAT, _INK, _FAINT = "#faf9f7", "#eeece7", "#22211f", "#85827b"

Rgb = npt.NDArray[np.uint8]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(items: Sequence[tuple[str, Rgb]], title: str) -> Image.Image:
    """A picture with the crops (uint8 `[H, W, 3]`) on it, each above its label and its size.

    Small crops are enlarged by a whole factor without smoothing, so that their pixels can be seen. Labels are cut to
    two lines, the title to one; letters that Pillow's own font lacks lose their accents or become "?".
    """
    assert items, "a contact sheet needs a crop"
    drawn = items[:MAX_CELLS]
    rows = math.ceil(len(drawn) / _COLUMNS)
    columns = math.ceil(len(drawn) / rows)
    width = 2 * _MARGIN + max(columns, 2) * (_CELL + _GAP) - _GAP
    height = 2 * _MARGIN + _HEAD + rows * (_CELL + _LABEL + _GAP) - _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    _draw_head(sheet, title, len(items))
    for i, (label, crop) in enumerate(drawn):
        row, column = divmod(i, columns)
        left = _MARGIN + column * (_CELL + _GAP)
        top = _MARGIN + _HEAD + row * (_CELL + _LABEL + _GAP)
        _draw_cell(sheet, label, crop, left, top)
    return sheet


def _draw_head(sheet: Image.Image, title: str, count: int) -> None:
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(30), ImageFont.load_default(16)
    words = "1 picture" if count == 1 else f"{count} pictures"
    if count > MAX_CELLS:
        words = f"the first {MAX_CELLS} of {words}"
    space = sheet.width - 2 * _MARGIN
    draw.text((_MARGIN, _MARGIN + 22), fitted(title, font, space), fill=_INK, font=font, anchor="ls")
    draw.text((_MARGIN, _MARGIN + 50), fitted(words, small, space), fill=_FAINT, font=small, anchor="ls")


def _draw_cell(sheet: Image.Image, label: str, crop: Rgb, left: int, top: int) -> None:
    """The crop in the middle of a square mat, its label and its size below."""
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), fill=_MAT)
    picture = _scaled(Image.fromarray(crop))
    sheet.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
    font, small = ImageFont.load_default(15), ImageFont.load_default(14)
    lines = wrapped(label, font, _CELL, max_lines=2)
    for i, line in enumerate(lines):
        draw.text((left, top + _CELL + 21 + 19 * i), line, fill=_INK, font=font, anchor="ls")
    size = f"{crop.shape[1]} x {crop.shape[0]}"
    draw.text((left, top + _CELL + 21 + 19 * len(lines)), size, fill=_FAINT, font=small, anchor="ls")


def _scaled(picture: Image.Image) -> Image.Image:
    """The picture as large as fits into a cell: shrunk smoothly, enlarged by a whole factor only."""
    longest = max(picture.size)
    if longest <= _CELL:
        factor = _CELL // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    width, height = (max(1, round(side * _CELL / longest)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def wrapped(words: str, font: Font, space_px: int, *, max_lines: int) -> list[str]:
    """`words` on at most `max_lines` lines of `space_px` pixels, broken at spaces, the last one cut with "…"."""
    lines: list[str] = []
    rest = _drawable(words).split()
    while rest and len(lines) < max_lines - 1:
        count = 1
        while count < len(rest) and font.getlength(" ".join(rest[: count + 1])) <= space_px:
            count += 1
        lines.append(fitted(" ".join(rest[:count]), font, space_px))
        rest = rest[count:]
    return [*lines, fitted(" ".join(rest), font, space_px)] if rest else lines


def fitted(words: str, font: Font, space_px: int) -> str:
    """`words` on one line, cut with "…" to `space_px` pixels."""
    line = _drawable(words)
    if font.getlength(line) <= space_px:
        return line
    cuts = (line[:n].rstrip() + "…" for n in range(len(line), 0, -1))
    return next((cut for cut in cuts if font.getlength(cut) <= space_px), "…")


def _drawable(words: str) -> str:
    """`words` on one line, in letters that Pillow's own font has: without accents, others as "?", 200 at most."""
    spread = unicodedata.normalize("NFKD", " ".join(words.split()))
    kept = (c for c in spread if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" else "?" for c in kept)[:200]
