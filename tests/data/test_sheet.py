"""The contact sheet shows every crop where it should be, whatever the labels hold."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from lora_booth.data import sheet as sheet_module
from lora_booth.data.sheet import contact_sheet, fitted, wrapped

RED, GREEN = (255, 0, 0), (0, 255, 0)
FONT = ImageFont.load_default(15)


def plain(
    width: int, height: int, colour: tuple[int, int, int] = RED
) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    return np.full((height, width, 3), colour, np.uint8)


def drawn(*crops: np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]) -> Image.Image:
    return contact_sheet([("a label", crop) for crop in crops], "title")


def extent(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of what has exactly this colour."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(axis=2))
    return columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (256, 256)),
        ((640, 384), (256, 154)),
        ((384, 640), (154, 256)),
        ((64, 64), (256, 256)),
        ((80, 48), (240, 144)),
        ((256, 8), (256, 8)),
        ((2048, 2), (256, 1)),
    ],
)
def test_a_crop_keeps_its_aspect_and_fills_its_cell(size: tuple[int, int], expected: tuple[int, int]) -> None:
    left, top, width, height = extent(drawn(plain(*size)), RED)
    assert (width, height) == expected
    assert left == 44 + (256 - width) // 2, "centred between even margins"
    assert top == 44 + 84 + (256 - height) // 2


def test_small_crops_are_enlarged_without_smoothing() -> None:
    crop = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sheet = np.asarray(drawn(crop))
    assert np.array_equal(sheet[128:384:4, 44:300:4], crop)
    assert np.array_equal(sheet[131:384:4, 47:300:4], crop)


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 2, 1), (2, 2, 1), (5, 5, 1), (6, 3, 2), (7, 4, 2), (10, 5, 2), (11, 4, 3)]
)
def test_rows_are_balanced_and_margins_even(count: int, columns: int, rows: int) -> None:
    sheet = drawn(*[plain(64, 64)] * (count - 1), plain(64, 64, GREEN))
    assert sheet.size == (2 * 44 + columns * 284 - 28, 2 * 44 + 84 + rows * 350 - 28)
    left, top, _, _ = extent(sheet, GREEN)
    used = -(-count // rows)
    assert (left, top) == (44 + (count - 1) % used * 284, 128 + (count - 1) // used * 350)


def test_very_many_crops_are_counted_but_not_all_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet_module, "MAX_CELLS", 10)
    sheet = np.asarray(drawn(*[plain(8, 8)] * 10, plain(8, 8, GREEN)))
    assert sheet.shape[0] == 2 * 44 + 84 + 2 * 350 - 28
    assert not (sheet == GREEN).all(axis=2).any()


@pytest.mark.parametrize(
    "label", ["", " ", "a\nb\tc", "漢字 🐕", "\udcff\0\x07", "x" * 10_000, "word " * 500, "-", "é…"]
)
def test_any_label_can_be_drawn_inside_its_cell(label: str) -> None:
    sheet = np.asarray(contact_sheet([(label, plain(64, 64))], label)).astype(int)
    paper = (250, 249, 247)
    assert (sheet[:, :40] == paper).all(), "nothing in the left margin"
    assert (sheet[120:, 304:] == paper).all(), "nothing beside the only cell"
    assert (sheet[:, -40:] == paper).all(), "nothing in the right margin"
    assert (sheet[-40:] == paper).all(), "nothing in the lower margin"


def test_the_label_is_drawn() -> None:
    with_label, without = (
        np.asarray(contact_sheet([(label, plain(64, 64))], "t"))[388:430].min() for label in ("dog.jpg", "")
    )
    assert with_label < 60 < without


def test_accents_go_and_unknown_letters_become_question_marks() -> None:
    assert fitted("Dög\n漢 é…", FONT, 999) == "Dog ? e..."


def test_long_words_are_cut_to_the_space_there_is() -> None:
    assert fitted("abc", FONT, 200) == "abc"
    cut = fitted("a long line of words", FONT, 80)
    assert cut.endswith("…")
    assert "a long line of words".startswith(cut[:-1])
    assert FONT.getlength(cut) <= 80 < FONT.getlength(cut[:-1] + "xx…")


def test_labels_are_broken_at_spaces_into_two_lines_at_most() -> None:
    assert wrapped("", FONT, 100, max_lines=2) == []
    assert wrapped("one", FONT, 100, max_lines=2) == ["one"]
    assert wrapped("one two three", FONT, 60, max_lines=2) == ["one two", "three"]
    lines = wrapped("one two three four five", FONT, 60, max_lines=2)
    assert lines == ["one two", "three fo…"]
    assert all(FONT.getlength(line) <= 60 for line in lines)
