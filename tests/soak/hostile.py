"""Mutated configs and pictures: each is taken whole or refused with one of the documented errors."""

from __future__ import annotations

import random
import shutil
import string
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from lora_booth.config import presets, toml
from lora_booth.data import images
from lora_booth.errors import ConfigError, DataError
from tests.soak.bench import Result

MAX_PROCESSOR_SECONDS = 5.0
WRONG_VALUES = (
    "-1", "0", "1e400", "nan", "inf", "-0.0", "99999999999999999999", "1e-320", '""', '"\\u0000"', "[]", "[[]]", "{}",
    "true", '"../../etc/passwd"', '"' + "x" * 5000 + '"', "1979-05-27", '"{token.__class__}"', '"{0}"', '"{"', "'%s'",
)  # fmt: skip


def configs(count: int, folder: Path, seed: int = 0) -> Result:
    """Config files with typing errors and worse: a config, or a message with a key or a line; never a traceback."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(presets.FOLDER.glob("*.toml"))]
    path, rng, failures, refused = folder / "config.toml", random.Random(seed), [], 0
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        text = rng.choice(sources)
        for _ in range(rng.choice((1, 1, 2, 5))):
            text = rng.choice(_CONFIG_MUTATIONS)(text, rng)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        began = time.process_time()
        try:
            toml.load(path)
        except ConfigError as error:
            refused += 1
            if len(str(error)) < 20 or len(str(error)) > 20_000:
                failures.append(f"config {i}: the message has {len(str(error))} characters")
        except Exception as error:
            failures.append(f"config {i}: {type(error).__name__}: {error}")
        if time.process_time() - began > MAX_PROCESSOR_SECONDS:
            failures.append(f"config {i} took {time.process_time() - began:.0f} s of the processor")
    return Result(count, tuple(failures), f"{refused} refused")


def _typo(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) or 1)
    return text[:at] + rng.choice(string.printable + "é\ud800\u202e🐶") + text[at + rng.randrange(2) :]


def _wrong_value(text: str, rng: random.Random) -> str:
    lines = text.splitlines()
    places = [i for i, line in enumerate(lines) if "=" in line and not line.startswith("#")]
    if places:
        at = rng.choice(places)
        lines[at] = f"{lines[at].partition('=')[0]}= {rng.choice(WRONG_VALUES)}"
    return "\n".join(lines)


def _wrong_key(text: str, rng: random.Random) -> str:
    lines = text.splitlines()
    places = [i for i, line in enumerate(lines) if line[:1].isalpha() or line.startswith("[")] or [0]
    at = rng.choice(places)
    line = lines[at] if lines else ""
    if len(line) > 2:
        swap = rng.randrange(len(line) - 1)
        lines[at] = line[:swap] + line[swap + 1] + line[swap] + line[swap + 2 :]
    return "\n".join(lines)


def _lost_line(text: str, rng: random.Random) -> str:
    lines = text.splitlines()
    if lines:
        del lines[rng.randrange(len(lines))]
    return "\n".join(lines)


def _double_line(text: str, rng: random.Random) -> str:
    lines = text.splitlines() or [""]
    return "\n".join([*lines, rng.choice(lines)])


def _deep(text: str, rng: random.Random) -> str:
    return text + f"\nx = {'[' * 3000}{']' * 3000}\n"


_CONFIG_MUTATIONS: tuple[Callable[[str, random.Random], str], ...] = (
    _typo, _typo, _wrong_value, _wrong_value, _wrong_key, _lost_line, _double_line, _deep,
)  # fmt: skip


def pictures(count: int, folder: Path, seed: int = 0) -> Result:
    """Picture files with flipped, missing, foreign and added bytes: used or left out with a reason, never a crash."""
    folder.mkdir(parents=True, exist_ok=True)
    sound = _sound_pictures(folder / "sound")
    rng, failures, used, batch = random.Random(seed), [], 0, 50
    for start in range(0, count, batch):
        where = folder / "mutants"
        where.mkdir()
        for i in range(start, min(start + batch, count)):
            source = rng.choice(sound)
            data = _mutated(source.read_bytes(), rng)
            (where / f"{i:06d}{rng.choice((source.suffix, source.suffix, '.png', '.jpg'))}").write_bytes(data)
        try:
            found = images.find(where, max_megapixels=64)
            used += len(found.pictures)
            for picture in found.pictures:
                upright = images.read(picture.path, sha256=picture.sha256)
                if upright.size != (picture.width_px, picture.height_px) or upright.mode != "RGB":
                    failures.append(f"{picture.path.name} is {upright.size}, not as it was found")
        except DataError as error:
            if len(str(error)) < 20 or "no usable picture" not in str(error):
                failures.append(f"from picture {start}: {error}")
        except Exception as error:
            failures.append(f"from picture {start}: {type(error).__name__}: {error}")
        shutil.rmtree(where)
    return Result(count, tuple(failures), f"{used} used, the others left out with a reason")


def _sound_pictures(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "plain.jpg": (picture, {"exif": exif}),
        "progressive.jpg": (picture, {"progressive": True}),
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "plain.png": (picture, {}),
        "palette.png": (picture.quantize(9), {"transparency": 3}),
        "deep.png": (picture.convert("I;16"), {}),
        "clear.png": (picture.convert("RGBA"), {}),
        "lossy.webp": (picture, {}),
        "lossless.webp": (picture, {"lossless": True}),
        "moving.webp": (picture, {"save_all": True, "append_images": [picture.rotate(90)]}),
        "plain.avif": (picture, {}),
    }
    for name, (image, settings) in kinds.items():
        image.save(folder / name, **settings)
    return sorted(folder.iterdir())


def _mutated(data: bytes, rng: random.Random) -> bytes:
    kind, at = rng.choice(("bits", "bits", "cut", "swap", "longer", "lengths", "noise")), rng.randrange(len(data))
    if kind == "bits":
        mutant = bytearray(data)
        for _ in range(rng.choice((1, 4, 32))):
            mutant[rng.randrange(len(mutant) if rng.random() < 0.5 else min(64, len(mutant)))] ^= 1 << rng.randrange(8)
        return bytes(mutant)
    if kind == "lengths":  # a 32-bit number anywhere: sizes of chunks, widths and heights
        number = rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 40_000, 9_000))
        return data[:at] + struct.pack(rng.choice((">I", "<I")), number) + data[at + 4 :]
    if kind == "swap":
        to = rng.randrange(len(data))
        return data[:at] + data[to : to + 40] + data[at + 40 :]
    return {"cut": data[:at], "longer": data + rng.randbytes(at), "noise": rng.randbytes(at)}[kind]
