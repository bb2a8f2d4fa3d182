"""Bases with hostile configs, headers, links and sizes: each draws and can be planned, or is refused by a message.

Half of the mutations choose what the library builds by, with sizes just beyond and far beyond what it can bear, so a
bound that is missing shows as memory or as time of the processor.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_booth.config.settings import ModelConfig
from lora_booth.errors import LoraBoothError
from lora_booth.models import loading
from lora_booth.models.bases import identify, limits, sources
from lora_booth.models.families import components
from lora_booth.models.families.family import Family
from lora_booth.models.sampling import Sampling, draw
from tests.soak.bench import Result
from tests.support import tiny

MAX_PROCESSOR_SECONDS = 60.0
MAX_GROWTH_KIB = 2 << 20
"""Of this process, over the whole campaign: a tiny base takes some megabytes."""
JSON_FILES = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
              "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json",
              "tokenizer/special_tokens_map.json")  # fmt: skip
HOSTILE_VALUES: tuple[Any, ...] = (
    None, 0, -1, 7, 1 << 40, 1 << 70, 10**400, 0.5, float("nan"), float("inf"), True, "", "x", "os.system",
    "../../../etc/passwd", [], [0], [1 << 40], [[]], {}, {"a": {"b": []}}, ["transformers", "AutoModel"],
    ["os", "system"], "x" * 100_000,
)  # fmt: skip
SIZES = (1, 2, 3, 8, 64, 99, 100, 640, 1000, 1024, 4096, 8192, 16_384, 65_536, 1 << 20, 1_000_000, 1 << 31)


def bases(count: int, folder: Path, seed: int = 0) -> Result:
    """Bases with hostile configs, sizes, headers and links: they draw, or are refused by an error that names them."""
    sound = tiny.tiny_sd(folder / "sound")
    single = tiny.tiny_single_file(sound, folder / "sound.safetensors")
    rng, failures = random.Random(seed), []
    outcomes: Counter[str] = Counter()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(count):
        base, what = _mutant(sound, single, folder, rng)
        began = time.process_time()
        for way in (_plan_with, _draw_with):
            fault, outcome = _tried(way, base)
            outcomes[outcome] += way is _draw_with
            failures += [f"base {i} ({what}) {way.__name__}: {fault}"] if fault else []
        if time.process_time() - began > MAX_PROCESSOR_SECONDS:
            failures.append(f"base {i} ({what}) took {time.process_time() - began:.0f} s of the processor")
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
        if grown_kib > MAX_GROWTH_KIB:
            failures.append(f"base {i} ({what}) took {grown_kib >> 20} GiB")
            before_kib += grown_kib
        shutil.rmtree(folder / "mutant")
    return Result(count, tuple(failures), f"{outcomes['refused']} refused")


def _tried(way: Callable[[Path], None], base: Path) -> tuple[str, str]:
    """What is wrong with how `way` ended with `base`, "" when nothing is, and how that was."""
    try:
        way(base)
    except LoraBoothError as error:
        is_named = str(base).removesuffix(".safetensors") in str(error) or "sampler" in str(error)
        is_named &= len(str(error)) <= 2000
        return ("" if is_named else str(error)[:200]), "refused"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}", "failed"
    return "", "drew"


def _plan_with(base: Path) -> None:
    """The base as `plan` builds it, without weights, and its identity."""
    facts = identify.identify(base)
    loading.around(facts, components.without_weights(facts, torch.float32))
    assert len(sources.fingerprint(base)) == 64


@torch.no_grad()
def _draw_with(base: Path) -> None:
    """One picture in one step: configs also reach the tokenizer, the text encoder and the solver."""
    family: Family = loading.load(ModelConfig(base=str(base)), device="cpu", dtype=torch.float32)
    prompts = family.encode_prompts(["a dog"]), family.encode_prompts([""])
    list(draw(family, [prompts[0]], prompts[1], Sampling(32, 32, "base", 9, 3.0), seeds=[0]))


def _mutant(sound: Path, single: Path, folder: Path, rng: random.Random) -> tuple[Path, str]:
    """A base with one thing changed, in `folder`/mutant, and what."""
    mutant = folder / "mutant"
    if rng.random() < 0.1:
        mutant.mkdir()
        file = mutant / "one.safetensors"
        shutil.copy(single, file)
        return file, rng.choice((_header, _header, _sidecar))(file, rng)
    shutil.copytree(sound, mutant)
    change = rng.choice((_value, _value, _value, _size, _size, _size, _size, _weights, _weights, _link, _link))
    return mutant, change(mutant, rng)


def _value(base: Path, rng: random.Random) -> str:
    """Any key of any small file, with a value of any kind."""
    name = rng.choice(JSON_FILES)
    path = base / name
    content = json.loads(path.read_text())
    key = rng.choice([key for key in content if key != "_diffusers_version"])
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


def _size(base: Path, rng: random.Random) -> str:
    """One to three of what a component is built by, each another size, alone, for each level, or in a nest."""
    name = rng.choice(("unet", "unet", "unet", "vae", "text_encoder", "scheduler"))
    path = base / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
    content, told = json.loads(path.read_text()), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        keys = [*limits.MOST[name], *limits.CHOICES.get(name, {}), *content]
        key, size = rng.choice(sorted(set(keys))), rng.choice(SIZES)
        length = rng.choice((1, 2, 3, 4, 4, 4, 8, 9, 100))
        shape = rng.choice(("alone", "alone", "each", "each", "mixed", "nest"))
        content[key] = {
            "alone": size,
            "each": [size] * length,
            "mixed": [rng.choice(SIZES) for _ in range(length)],
            "nest": [[size] * length] * length,
        }[shape]
        told.append(f"{key} = {str(content[key])[:40]}")
    path.write_text(json.dumps(content))
    return f"{', '.join(told)} in {name}"


def _weights(base: Path, rng: random.Random) -> str:
    return _header(rng.choice(sorted(base.rglob("*.safetensors"))), rng)


def _header(path: Path, rng: random.Random) -> str:
    """A bit, the length, or a word of the header; or a part of the file is gone."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    kind = rng.choice(("bit", "cut", "length", "entry", "entry"))
    if kind == "entry":
        header = json.loads(data[8 : 8 + length])
        key = rng.choice([*sorted(header)[:30], "model.diffusion_model.input_blocks.0.0.weight"])
        entry = header.setdefault(key, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
        field = rng.choice(sorted(entry) or ["x"])
        value = rng.choice((*HOSTILE_VALUES, [4], [2, 4], [1 << 70] * 4, "F4", "F8_E5M2", [4, 0]))
        if isinstance(entry, dict):
            entry[field] = value
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        return f"{key}.{field} = {str(value)[:30]} in {path.name}"
    at = rng.randrange(8 + length)
    path.write_bytes({
        "bit": data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
        "cut": data[: rng.randrange(len(data))],
        "length": struct.pack("<Q", rng.choice((0, length + 1, 1 << 40, 1 << 63))) + data[8:],
    }[kind])  # fmt: skip
    return f"{kind} in {path.name}"


def _sidecar(file: Path, rng: random.Random) -> str:
    path = file.with_suffix(".yaml")
    text = rng.choice((b"\xff\xfe", b"\0" * 40, b"parameterization: v\n", b"parameterization: x", b"\n" * 1_000_000))
    path.write_bytes(text)
    return f"{text[:20]!r} in {path.name}"


def _link(base: Path, rng: random.Random) -> str:
    """A file of the base, or one more, as a pipe, a device, a folder, or a link to nowhere or to itself."""
    path = rng.choice(sorted(p for p in base.rglob("*") if p.is_file()))
    if rng.random() < 0.3:
        path = path.parent / rng.choice(("x.txt", "added_tokens.json", "tokenizer.json", "model.fp16.safetensors"))
    path.unlink(missing_ok=True)
    kind = rng.choice(("pipe", "device", "folder", "nowhere", "itself", "shard"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "shard":
        index = path.parent / f"{sources.weight_stem(path.parent.name)}.safetensors.index.json"
        name = rng.choice(("x" * 300 + ".safetensors", "../x.safetensors", "a\0.safetensors", ".safetensors", ""))
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
        for weights in path.parent.glob("*.safetensors"):
            weights.unlink()
    else:
        path.symlink_to({"device": "/dev/zero", "nowhere": "../../blobs/1", "itself": path.name}[kind])
    return f"{kind} at {path.relative_to(base)}"
