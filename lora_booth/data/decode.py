"""From a file's bytes to an upright RGB picture, whatever its format.

Words: a file is *unusable* for a reason, which is written as the rest of a sentence that begins with the file's name.
Only the formats named here are ever tried (Pillow knows 43 more), and only as much as a whole picture needs is read.
"""

from __future__ import annotations

import io
import stat
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".heic", ".heif")
"""Endings of the files that are looked at, in any case. What a file holds is decided by its content."""
TAKEN = "JPEG, PNG, WebP and AVIF are taken, HEIC with `pip install lora-booth[heic]`"
MAX_FILE_BYTES = 64 * 2**20

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
_SHARED_BRANDS = (b"mif1", b"msf1")
"""ISO base media brands (bytes 8 to 12 of the file): of HEIC alone, and of HEIC or AVIF."""
_ORIENTATION = 0x0112
_MIDDLE_GREY = 128
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what makes the picture upright (EXIF 2.32, tag 0x0112)."""


class Unusable(Exception):
    """Why a file cannot be used, as a sentence that follows its name."""


def file_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file. Looks before it opens, since opening a pipe would wait for ever."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Unusable("is not a file but a folder, pipe or device; remove it.")
        if status.st_size > limit:
            raise Unusable(f"has {status.st_size} bytes, above the limit of {limit}; save it smaller or remove it.")
        return path.read_bytes()
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror}); mend that or remove it.") from error


def opened(data: bytes, path: Path) -> Image.Image:
    """The still undecoded picture in `data`. Only allowed formats are tried, whatever the name says."""
    if not data:
        raise Unusable("is empty (0 bytes); copy it again or remove it.")
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    is_heif = brand in _HEIF_BRANDS or (brand in _SHARED_BRANDS and path.suffix.lower() in (".heic", ".heif"))
    formats = [*_FORMATS, _heif()] if is_heif else _FORMATS
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except MemoryError:
        raise
    except Exception as error:  # Decoders raise a dozen unrelated kinds on damaged bytes.
        if isinstance(error, Image.DecompressionBombError):
            raise Unusable("has more than 178 megapixels, which no setting allows; save it smaller.") from error
        raise Unusable(
            f"holds no picture that can be read: it is damaged, or of another format than its name says ({TAKEN}); "
            "save it again as PNG or remove it."
        ) from error


def _heif() -> str:
    """The name of the HEIC format in Pillow, after making it known there."""
    try:
        import pillow_heif
    except ImportError:
        raise Unusable(
            "is a HEIC picture; install the reader with `pip install lora-booth[heic]`, or save it as JPEG."
        ) from None
    pillow_heif.register_heif_opener()
    return "HEIF"


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none or the EXIF block is broken, as viewers do."""
    try:
        value = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # As in `opened`.
        return 1
    return value if value in _TURNS else 1


def missing_share(image: Image.Image) -> float:
    """Share of a decoded JPEG's rows, from the bottom, for which its data did not suffice; 0 for other formats.

    libjpeg fills them with middle grey and says nothing (libjpeg-turbo jdhuff.c, "insufficient_data").
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
        return 0.0
    values = np.asarray(image)
    is_drawn = (values != _MIDDLE_GREY).reshape(len(values), -1).any(axis=1)
    return 1.0 if not is_drawn.any() else int(is_drawn[::-1].argmax()) / len(values)


def upright_rgb(image: Image.Image) -> Image.Image:
    """`image` decoded, on white where it is transparent, in sRGB, turned upright."""
    try:
        colours = _srgb(image)
        turn = _TURNS.get(orientation(image))
        if turn is not None:
            colours = colours.transpose(turn)
    except MemoryError:
        raise
    except Exception as error:  # As in `opened`.
        problem = str(error) or type(error).__name__
        raise Unusable(f"is damaged ({problem}); copy it again, or remove it.") from error
    return Image.fromarray(np.asarray(colours))  # A fresh picture carries no metadata.


def upright_alpha(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel of `image` is, mode L, turned upright; None where it all is."""
    if image.mode.startswith("I") or not image.has_transparency_data:
        return None
    try:
        alpha = image.convert("RGBA").getchannel("A")
        turn = _TURNS.get(orientation(image))
    except MemoryError:
        raise
    except Exception as error:  # As in `opened`.
        raise Unusable(f"is damaged ({error}); copy it again, or remove it.") from error
    if alpha.getextrema()[0] == 255:
        return None
    return alpha if turn is None else alpha.transpose(turn)


def _srgb(image: Image.Image) -> Image.Image:
    """RGB in sRGB, transparent parts on white."""
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if not image.has_transparency_data:
        return _in_srgb(image, image.info.get("icc_profile"))
    layers = image.convert("RGBA")
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(_in_srgb(layers.convert("RGB"), image.info.get("icc_profile")), mask=layers.getchannel("A"))
    return on_white


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey with 16 bits to RGB, scaled. Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image).astype(np.int32)
    grey = ((values.clip(0, 65535) + 128) // 257).astype(np.uint8)
    see_through = image.info.get("transparency")
    if isinstance(see_through, int):
        grey[values == see_through] = 255
    return Image.fromarray(grey).convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB through the embedded colour profile, if there is one that fits and is not sRGB already."""
    plain = image if image.mode in ("L", "CMYK") else image.convert("RGB")
    if profile:
        with suppress(ImageCms.PyCMSError, OSError):  # A broken profile says nothing about the pixels.
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            fits = {"L": "GRAY", "CMYK": "CMYK", "RGB": "RGB "}[plain.mode] == source.profile.xcolor_space
            if fits and "srgb" not in ImageCms.getProfileDescription(source).lower():
                target = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(plain, source, target, outputMode="RGB")
                assert converted is not None, "profileToProfile gives None only when it works in place"
                return converted
    return plain.convert("RGB")
