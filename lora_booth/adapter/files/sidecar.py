"""What programs show beside an adapter file: a small JSON file and a cover picture.

The header holds the same picture.

`<name>.json` is read by A1111, Forge (activation text is put into the prompt when the adapter is chosen) and InvokeAI
(trigger phrase, description); `<name>.png` by all three as the picture on its card. Inside the header,
`ssmd_cover_images` is read by A1111 and ComfyUI's model browser, `modelspec.thumbnail` by ModelSpec viewers. No picture
carries EXIF, and nothing says where or by whom it was made.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from PIL import Image

from lora_booth.models.bases.architectures import ARCHITECTURES
from lora_booth.run import disk

COVER_PX = 512
"""Longest side of `<name>.png`."""
THUMBNAIL_PX = 256
"""Longest side of the picture in the header: ModelSpec 1.0.1 asks for 256x256; some 15 kB as JPEG."""


def write_sidecar(path: Path, *, family: str, trigger: str, strength: float = 1.0, description: str = "") -> Path:
    """Write the JSON file that belongs to the adapter file `path`; returns its path. Raises DiskError."""
    fields = {
        "description": description,
        "sd version": ARCHITECTURES[family].ui_version,
        "activation text": trigger,
        "preferred weight": strength,
        "negative text": "",
        "notes": "",
    }
    beside = path.with_suffix(".json")
    disk.write_text(beside, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
    return beside


def write_cover(path: Path, cover: Image.Image) -> Path:
    """Write the picture that belongs to the adapter file `path`; returns its path. Raises DiskError."""
    beside = path.with_suffix(".png")
    disk.write_png(beside, _small(cover, COVER_PX))
    return beside


def cover_fields(cover: Image.Image) -> dict[str, str]:
    """The header's fields that hold the picture, as JPEG."""
    content = io.BytesIO()
    _small(cover, THUMBNAIL_PX).save(content, format="JPEG", quality=85)
    text = base64.b64encode(content.getvalue()).decode("ascii")
    return {"ssmd_cover_images": json.dumps([text]), "modelspec.thumbnail": f"data:image/jpeg;base64,{text}"}


def _small(picture: Image.Image, side_px: int) -> Image.Image:
    """A copy of the pixels alone, no side longer than `side_px`; one much smaller is enlarged by a whole factor."""
    plain = Image.new("RGB", picture.size)
    plain.paste(picture.convert("RGB"))
    factor = side_px // max(plain.size)
    if factor > 1:
        return plain.resize((plain.width * factor, plain.height * factor), Image.Resampling.NEAREST)
    plain.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    return plain
