"""The files and fields that programs show, as those programs read them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from lora_booth.adapter.files.sidecar import cover_fields, write_cover, write_sidecar


def photograph(size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, (200, 40, 30))
    picture.getexif()[0x010E] = "a secret"
    picture.info["comment"] = "a secret"
    return picture


@pytest.mark.parametrize(("family", "version"), [("sd1", "SD1"), ("sd2", "SD2"), ("sdxl", "SDXL")])
def test_the_json_has_the_keys_that_programs_ask_for(family: str, version: str, tmp_path: Path) -> None:
    path = write_sidecar(tmp_path / "é dog.safetensors", family=family, trigger="yql dog", strength=0.8)
    assert path.name == "é dog.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    assert fields["activation text"] == "yql dog"
    assert fields["preferred weight"] == 0.8
    assert fields["sd version"] == version
    assert {"description", "negative text", "notes"} <= fields.keys()


def test_a_name_with_dots_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "dog.v1.5.safetensors"
    assert write_sidecar(path, family="sd1", trigger="x").name == "dog.v1.5.json"


@pytest.mark.parametrize(
    ("size", "shown"), [((64, 64), (512, 512)), ((1024, 768), (512, 384)), ((300, 512), (300, 512))]
)
def test_the_cover_is_a_small_png_of_pixels_alone(
    size: tuple[int, int], shown: tuple[int, int], tmp_path: Path
) -> None:
    path = write_cover(tmp_path / "dog.safetensors", photograph(size))
    assert path.name == "dog.png"
    assert b"secret" not in path.read_bytes()
    with Image.open(path) as picture:
        assert picture.size == shown and picture.getpixel((5, 5)) == (200, 40, 30)


def test_the_header_holds_the_cover_as_a1111_and_modelspec_ask_for_it() -> None:
    fields = cover_fields(photograph((1024, 1024)))
    (text,) = json.loads(fields["ssmd_cover_images"])
    content = base64.b64decode(text, validate=True)
    assert b"secret" not in content
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "JPEG" and picture.size == (256, 256)
    assert fields["modelspec.thumbnail"] == f"data:image/jpeg;base64,{text}"
    assert sum(map(len, fields.values())) < 100_000
