"""Mutated configs, pictures and bases: each is taken whole or refused with one of the documented errors."""

from __future__ import annotations

import json
import random
import shutil
import string
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_booth import config_file, families, presets
from lora_booth.config import ModelConfig
from lora_booth.data import images
from lora_booth.errors import ConfigError, DataError, LoraBoothError
from lora_booth.families.base import Family
from lora_booth.families.sampling import Sampling, draw
from tests import tiny
from tests.soak.bench import Result

MAX_SECONDS_FOR_CONFIG = 5.0
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
        began = time.monotonic()
        try:
            config_file.load(path)
        except ConfigError as error:
            refused += 1
            if len(str(error)) < 20 or len(str(error)) > 20_000:
                failures.append(f"config {i}: the message has {len(str(error))} characters")
        except Exception as error:
            failures.append(f"config {i}: {type(error).__name__}: {error}")
        if time.monotonic() - began > MAX_SECONDS_FOR_CONFIG:
            failures.append(f"config {i} took {time.monotonic() - began:.0f} s")
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


JSON_FILES = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
              "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json",
              "tokenizer/special_tokens_map.json")  # fmt: skip
HOSTILE_VALUES: tuple[Any, ...] = (
    None, 0, -1, 7, 1 << 40, 1 << 70, 0.5, float("nan"), True, "", "x", "os.system", "../../../etc/passwd",
    [], [0], [1 << 40], [[]], {}, {"a": {"b": []}}, ["transformers", "AutoModel"], ["os", "system"], "x" * 100_000,
)  # fmt: skip


def bases(count: int, folder: Path, seed: int = 0) -> Result:
    """Base folders with hostile configs and weight headers: they draw, or are refused by an error that names them."""
    sound = tiny.tiny_sd(folder / "sound")
    rng, failures, refused = random.Random(seed), [], 0
    codes: Counter[str] = Counter()
    for i in range(count):
        mutant = folder / "mutant"
        shutil.copytree(sound, mutant)
        what = _break_base(mutant, rng)
        began = time.monotonic()
        try:
            family = families.load(ModelConfig(base=str(mutant)), device="cpu", dtype=torch.float32)
            _draw_with(family)
        except LoraBoothError as error:
            refused += 1
            codes[type(error).__name__] += 1
            if str(mutant) not in str(error) or len(str(error)) > 2000:
                failures.append(f"base {i} ({what}): {str(error)[:200]}")
        except Exception as error:
            failures.append(f"base {i} ({what}): {type(error).__name__}: {str(error)[:200]}")
        if time.monotonic() - began > 30:
            failures.append(f"base {i} ({what}) took {time.monotonic() - began:.0f} s")
        shutil.rmtree(mutant)
    return Result(count, tuple(failures), f"{refused} refused")


@torch.no_grad()
def _draw_with(family: Family) -> None:
    """One picture in one step: configs also reach the tokenizer, the text encoder and the solver."""
    prompts = family.encode_prompts(["a dog"]), family.encode_prompts([""])
    list(draw(family, [prompts[0]], prompts[1], Sampling(32, 32, "base", 9, 3.0), seeds=[0]))


def _break_base(base: Path, rng: random.Random) -> str:
    """Change one thing in `base`; returns what."""
    if rng.random() < 0.25:
        path = rng.choice(sorted(base.rglob("*.safetensors")))
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        at = rng.randrange(8 + length)
        kind = rng.choice(("bit", "cut", "length"))
        path.write_bytes({
            "bit": data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
            "cut": data[: rng.randrange(len(data))],
            "length": struct.pack("<Q", rng.choice((0, length + 1, 1 << 40, 1 << 63))) + data[8:],
        }[kind])  # fmt: skip
        return f"{kind} in {path.relative_to(base)}"
    name = rng.choice(JSON_FILES)
    path = base / name
    content = json.loads(path.read_text())
    keys = [key for key in content if key != "_diffusers_version"]
    key = rng.choice(keys)
    kind = rng.choice(("value", "value", "value", "gone", "whole", "extra"))
    value = rng.choice(HOSTILE_VALUES)
    if kind == "gone":
        del content[key]
    elif kind == "whole":
        content = value
    elif kind == "extra":
        key = rng.choice(("auto_map", "trust_remote_code", "custom_pipeline", "quantization_config", "_class_name"))
        content[key] = value
    else:
        content[key] = value
    path.write_text(json.dumps(content))
    return f"{kind} {key} = {str(value)[:30]} in {name}"
