"""Every kind of picture that people have comes out upright, RGB, and in the colours it was meant in."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from lora_booth.data.decode import MAX_FILE_BYTES, Unusable, file_bytes, opened, upright_rgb
from lora_booth.data.images import read

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """48 wide, 32 high: red, green above, blue, white below."""
    array = np.empty((32, 48, 3), np.uint8)
    array[:16, :24], array[:16, 24:], array[16:, :24], array[16:, 24:] = RED, GREEN, BLUE, WHITE
    return array


def decoded(image: Image.Image, format: str = "PNG", name: str = "a.png", **options: Any) -> Image.Image:
    """`image` saved and read back as the user's picture."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return upright_rgb(opened(file.getvalue(), Path(name)))


def pixel(image: Image.Image, *at: int) -> tuple[int, ...]:
    assert image.mode == "RGB"
    value = image.getpixel(at or (0, 0))  # type: ignore[arg-type]
    assert isinstance(value, tuple)
    return value


def png_of_16_bit_rgb(values: tuple[int, int, int]) -> bytes:
    """One pixel; Pillow cannot write such a file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = zlib.compress(b"\0" + struct.pack(">HHH", *values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


# Where EXIF says the first row and the first column of the stored picture belong (EXIF 2.32, tag 0x0112).
STORED = {
    1: lambda up: up,
    2: lambda up: up[:, ::-1],  # top, right
    3: lambda up: up[::-1, ::-1],  # bottom, right
    4: lambda up: up[::-1],  # bottom, left
    5: lambda up: up.transpose(1, 0, 2),  # left, top
    6: lambda up: up[:, ::-1].transpose(1, 0, 2),  # right, top
    7: lambda up: up[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: lambda up: up[::-1].transpose(1, 0, 2),  # left, bottom
}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("value", STORED)
def test_every_exif_orientation_comes_out_upright(value: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format != "PNG" else {}
    image = decoded(Image.fromarray(np.ascontiguousarray(STORED[value](corners()))), format, exif=exif, **options)
    assert image.size == (48, 32)
    points = [(4, 4), (44, 4), (4, 28), (44, 28)]
    for point, colour in zip(points, (RED, GREEN, BLUE, WHITE), strict=True):
        assert np.abs(np.subtract(pixel(image, *point), colour)).max() <= (8 if format in ("JPEG", "AVIF") else 0)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_outside_1_to_8_turns_nothing(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert np.array_equal(decoded(Image.fromarray(corners()), exif=exif), corners())


def test_a_broken_exif_block_turns_nothing() -> None:
    assert np.array_equal(decoded(Image.fromarray(corners()), exif=b"Exif\0\0MM\0*\0\0"), corners())


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.array([[0, 257 * 100, 257 * 100 + 128, 257 * 100 + 129, 65535]], np.uint16))
    assert image.mode == "I;16"
    assert np.array(decoded(image))[0, :, 0].tolist() == [0, 100, 100, 101, 255]


def test_16_bit_colour_is_scaled() -> None:
    image = upright_rgb(opened(png_of_16_bit_rgb((0x0000, 0x8000, 0xFFFF)), Path("a.png")))
    assert pixel(image) == (0, 128, 255)


@pytest.mark.parametrize(("mode", "colour"), [("L", 200), ("1", 1)])
def test_grey_becomes_rgb(mode: str, colour: int) -> None:
    grey = 200 if mode == "L" else 255
    assert pixel(decoded(Image.new(mode, (4, 4), colour))) == (grey,) * 3


def test_cmyk_jpeg_becomes_rgb() -> None:
    image = decoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", "a.jpg", quality=95)
    assert np.abs(np.subtract(pixel(image), RED)).max() <= 4


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (0, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),  # 51 / 255 = a fifth of red, four fifths of white
        ("LA", (0, 51), (204, 204, 204)),
    ],
)
def test_transparent_parts_lie_on_white(mode: str, colour: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert pixel(decoded(Image.new(mode, (4, 4), colour))) == expected


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_a_palette_with_transparency_lies_on_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*BLUE, *RED])
    image.putpixel((1, 0), 1)
    shown = decoded(image, transparency=transparency)
    assert [pixel(shown, 0, 0), pixel(shown, 1, 0)] == [WHITE, RED]


def test_a_transparent_colour_lies_on_white() -> None:
    image = Image.fromarray(corners())
    shown = decoded(image, transparency=BLUE)
    assert [pixel(shown, 0, 0), pixel(shown, 0, 31)] == [RED, WHITE]


def test_a_transparent_16_bit_grey_lies_on_white() -> None:
    image = Image.fromarray(np.array([[0, 257 * 9]], np.uint16))
    shown = decoded(image, transparency=0)
    assert [pixel(shown, 0, 0), pixel(shown, 1, 0)] == [WHITE, (9, 9, 9)]


def swapped_profile() -> bytes:
    """sRGB with the primaries red and blue exchanged, under another name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_embedded_colour_profile_is_applied(mode: str) -> None:
    image = Image.new("RGB", (4, 4), RED).convert(mode)
    assert pixel(decoded(image)) == RED
    assert np.abs(np.subtract(pixel(decoded(image, icc_profile=swapped_profile())), BLUE)).max() <= 1


def test_an_srgb_profile_changes_no_value_and_costs_no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageCms, "profileToProfile", None)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decoded(Image.fromarray(noise), icc_profile=profile), noise)


@pytest.mark.parametrize(
    "profile",
    [b"nonsense", swapped_profile()[:200]],
    ids=["nonsense", "cut"],  # its own name would hold the time
)
def test_a_broken_colour_profile_is_ignored(profile: bytes) -> None:
    assert pixel(decoded(Image.new("RGB", (4, 4), RED), icc_profile=profile)) == RED


def test_a_profile_of_another_colour_space_is_ignored() -> None:
    assert pixel(decoded(Image.new("L", (4, 4), 7), icc_profile=swapped_profile())) == (7, 7, 7)


def test_no_metadata_is_left() -> None:
    exif = Image.Exif()
    exif[0x010F] = "camera"
    exif.get_ifd(0x8825)[1] = "N"
    image = decoded(Image.fromarray(corners()), "JPEG", "a.jpg", exif=exif, comment="secret", dpi=(72, 72))
    assert image.info == {}
    assert dict(image.getexif()) == {}


def test_a_phones_mpo_gives_its_first_picture(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert np.abs(np.subtract(pixel(read(tmp_path / "a.jpg")), RED)).max() <= 4


def test_content_counts_not_the_name() -> None:
    assert pixel(decoded(Image.new("RGB", (4, 4), RED), "PNG", "a.jpg")) == RED


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS", "EPS", "PDF"])
def test_other_formats_are_refused_whatever_their_name(format: str) -> None:
    with pytest.raises(Unusable, match="holds no picture that can be read"):
        decoded(Image.new("RGB", (16, 16)), format, "a.jpg")


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    header = struct.pack(">II", 20_000, 20_000) + file.getvalue()[24:29]
    bomb = file.getvalue()[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + file.getvalue()[33:]
    with pytest.raises(Unusable, match="more than 178 megapixels"):
        opened(bomb, Path("a.png"))


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(Unusable, match=f"has {MAX_FILE_BYTES + 1} bytes, above the limit of {MAX_FILE_BYTES}"):
        file_bytes(tmp_path / "a.png", MAX_FILE_BYTES)


def heic_like() -> bytes:
    return struct.pack(">I", 24) + b"ftypheic" + bytes(12)


def test_heic_without_its_reader_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    for name in ("IMG_1.HEIC", "renamed.jpg"):
        with pytest.raises(Unusable, match=r"pip install lora-booth\[heic\]"):
            opened(heic_like(), Path(name))


def test_heic_is_read_where_its_reader_is_installed() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(corners())).save(file, quality=95)
    image = upright_rgb(opened(file.getvalue(), Path("IMG_1.HEIC")))
    assert image.size == (48, 32)
    assert np.abs(np.subtract(pixel(image, 4, 4), RED)).max() <= 16
    with pytest.raises(Unusable, match="holds no picture"):
        opened(heic_like(), Path("IMG_1.HEIC"))
