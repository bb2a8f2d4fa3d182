"""What a run reads or is told, changed between a kill and the same command: refused by its name, or without effect."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_booth.config.config import Config
from lora_booth.errors import ConfigError, DataError
from lora_booth.run import identity
from tests.soak import crash
from tests.soak.bench import FEW_LAYERS, STEPS, Bench, Materials, Result, differences, made, materials
from tests.soak.crash import Fate
from tests.support import tiny

OTHER: dict[str, tuple[Any, ...]] = {
    "model.precision": ("bf16", "fp16"),
    "model.quantize": ("int8",),
    "model.prediction_type": ("v_prediction",),
    "subject.prompt": ("a drawing of {token} {class}", "a {class}"),
    "subject.captions": ("off",),
    "subject.templates": (("a {token} {class}",),),
    "subject.masks": ("off", "alpha"),
    "prior.prompts": (("a {class}",), ("a photo of {class}", "a {class}")),
    "prior.sampler": ("dpm++", "euler"),
    "prior.captions": (("a cat",), ("a cat", "a {class}")),
    "adapter.targets": ("attention", r"regex:.*attn1\.to_k"),
    "adapter.alpha": (1.0, 3.0),
    "adapter.rank_pattern": ({"to_k": 4},),
    "adapter.alpha_pattern": ({"to_k": 4.0},),
    "adapter.init": ("gaussian", "orthogonal"),
    "adapter.embedding": ("too",),
    "adapter.continue_from": (None,),
    "objective.min_snr_gamma": (5.0,),
    "objective.loss": ("huber",),
    "objective.timestep_range": ((0.0, 0.5), (0.25, 1.0)),
    "objective.dco_beta": (1000.0,),
    "optimizer.name": ("adafactor", "adamw8bit"),
    "optimizer.betas": ((0.8, 0.99),),
    "optimizer.ema_decay": (0.9,),
    "optimizer.schedule": ("linear", "cosine"),
    "optimizer.warmup_steps": (1, 3),
    "preview.prompts": (("a {class}",),),
    "preview.sampler": ("dpm++", "euler"),
    "evaluate.choose": ("last",),
    "evaluate.encoder": ("miniature",),
    "evaluate.strengths": ((1.0,), (0.5, 1.0)),
    "data.resolution": (48, 64),
    "data.bucket_step": (8,),
    "subject.held_out": (None,),
    "train.compile": (False,),
    "train.gradient_checkpointing": (0.5, 1.0),
    "memory.device": ("cpu",),
    "memory.budget_gib": (2.0, 8.0),
    "memory.pictures_at_once": (1, 2, 8),
    "memory.tiled_decoding": (True, False),
    "memory.offload_activations": (False,),
    "memory.offload_denoiser": (False,),
    "export.formats": (("kohya",), ("diffusers",)),
    "export.dtype": ("fp32", "bf16"),
    "export.name": ("other",),
    "export.author": ("me",),
    "export.license": ("MIT",),
}
"""Valid other values of settings that are no plain numbers, words or switches, or that allow few."""
LEFT_OUT = {
    "model.base": "its files are changed",
    "model.revision": "a local base has none",
    "model.attention": "xformers needs a card",
    "objective.zero_terminal_snr": "this base predicts epsilon",
    "objective.huber_delta": "without huber it is a contradiction",
    "adapter.embedding_vectors": "without a learnt word it is a contradiction",
    "prior.folder": "its pictures are changed",
    "prior.mode": "with class images of one's own others are a contradiction",
    "train.batch_size": "equal up to rounding",
    "run.folder": "another folder is another run",
    "run.trackers": "needs an extra",
}
"""Settings that are not changed here, and why."""
ADAPTER_ALONE = ("adapter.safetensors", "optimizer.safetensors", "checkpoint")
"""What free settings leave as it is, of what `made` lists; names and pictures may follow them."""


def changed_inputs(count: int, folder: Path, seed: int = 0) -> Result:
    """Every setting, picture, caption, adapter and file of the base, changed between a kill and the same command."""
    rng, failures = random.Random(seed), []
    seen: Counter[str] = Counter()
    bench = _bench(folder)
    kinds = [*_settings(bench.straight), *_files(bench.read)]
    rng.shuffle(kinds)
    for i in range(count):
        kind, name = kinds[i % len(kinds)]
        fault, what = _try(bench, i, kind, name, rng)
        seen[what] += 1
        if fault:
            failures.append(f"{kind} {name} {i}: {fault}")
    return Result(count, tuple(failures), ", ".join(f"{n} {what}" for what, n in sorted(seen.items())))


def _bench(folder: Path) -> Bench:
    """A job that reads everything a run can read, an adapter to go on from too."""
    read = materials(folder / "read", tiny.tiny_ends)
    tiny.tiny_pictures(folder / "read" / "classes", 3)
    for pictures in ("pictures", "held_out", "classes"):
        first = min((folder / "read" / pictures).iterdir())
        first.with_suffix(".txt").write_text(f"a {{token}} {{class}} of {pictures}")
    before = Bench(folder / "before", read)
    assert before.straight.run.folder is not None
    shutil.copy(before.straight.run.folder / "yql_dog_diffusers.safetensors", folder / "read" / "start.safetensors")
    adapter = {"continue_from": folder / "read" / "start.safetensors", "rank": 2, "targets": FEW_LAYERS}
    return Bench(folder, read, prior={"folder": folder / "read" / "classes"}, adapter=adapter)


def _settings(config: Config) -> Iterator[tuple[str, str]]:
    for section, pairs in config:
        for key in type(pairs).model_fields:
            name = f"{section}.{key}"
            if name not in LEFT_OUT:
                yield ("free" if name in identity.FREE_TO_CHANGE else "setting"), name


def _files(read: Materials) -> Iterator[tuple[str, str]]:
    root = read.base.parent
    for path in sorted(root.rglob("*")):
        is_config = path.suffix in (".json", ".txt") or path.suffix == ".safetensors"
        if path.is_file() and (is_config if root / "base" in path.parents else True):
            yield "file", str(path.relative_to(root))


def _try(bench: Bench, number: int, kind: str, name: str, rng: random.Random) -> tuple[str, str]:
    """What is wrong, "" when nothing is, and what was seen."""
    config = bench.config(f"changed-{number}")
    killed = crash.run(config, Fate(event="saved", number=1))
    if killed.code >= 0:
        return f"ended with {killed.code} before its kill: {killed.output[-300:]}", "failed"
    if kind == "file":
        fault, what = _with_changed_file(bench, config, bench.read.base.parent / name, rng)
    else:
        fault, what = _with_changed_setting(bench, config, kind, name, rng)
    if not fault:
        bench.clear(config)
    return fault, what


def _with_changed_file(bench: Bench, config: Config, path: Path, rng: random.Random) -> tuple[str, str]:
    content = path.read_bytes()
    is_removed = rng.random() < 0.2
    is_last = len([*path.parent.glob("*.png"), *path.parent.glob("*.jpg")]) == 1
    try:
        path.unlink() if is_removed else path.write_bytes(_harmed(path, content, rng))
        outcome = crash.run(config)
    finally:
        path.write_bytes(content)
    told = outcome.code not in (0, crash.BUG) and (path.name in outcome.output or "model.base" in outcome.output)
    if not told and path.is_relative_to(bench.read.base) and outcome.code in (3, 4):
        told = str(bench.read.base) in outcome.output
    few = "at least 3 are needed" in outcome.output  # of three pictures
    if is_removed and is_last and path.suffix in (".png", ".jpg"):
        few = outcome.code == DataError.exit_code and f"no usable picture in {path.parent}; " in outcome.output
    fault = "" if told or few else f"{path.name} changed, ended with {outcome.code}: {outcome.output[-400:]}"
    return fault, "files refused by name"


def _harmed(path: Path, content: bytes, rng: random.Random) -> bytes:
    """Another content that is as good."""
    if path.suffix in (".png", ".jpg"):
        other = tiny.tiny_pictures(path.parent.parent / "other", 20)
        fitting = [p for p in other if p.suffix == path.suffix and p.read_bytes() != content]
        chosen = rng.choice(fitting).read_bytes()
        shutil.rmtree(path.parent.parent / "other")
        return chosen
    if path.suffix == ".safetensors":
        place = rng.randrange(len(content) - 64, len(content))
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    return content + (b" and more" if path.parent.name in ("pictures", "classes", "held_out") else b"\n")


def _with_changed_setting(bench: Bench, config: Config, kind: str, name: str, rng: random.Random) -> tuple[str, str]:
    section, _, key = name.partition(".")
    value = rng.choice(OTHER[name]) if name in OTHER else _other(getattr(getattr(config, section), key), name, bench)
    outcome = crash.run(config.with_values({section: {key: value}}))
    if kind == "free":
        if outcome.code != 0:
            return f"= {value} ended with {outcome.code}: {outcome.output[-400:]}", "failed"
        found = made(config) if name not in ("run.cache", "export.name", "export.formats") else None
        expected = {key: bench.expected[key] for key in ADAPTER_ALONE}
        apart = "" if found is None else differences(expected, {key: found[key] for key in ADAPTER_ALONE})
        return apart and f"= {value} changed {apart}", "free settings with the same bytes"
    is_told = outcome.code == ConfigError.exit_code and f"{name}: " in outcome.output
    fault = "" if is_told else f"= {value} ended with {outcome.code}: {outcome.output[-400:]}"
    return fault, "settings refused by name"


def _other(value: Any, name: str, bench: Bench) -> Any:
    """Another value of the same kind."""
    makers: dict[type, Callable[[Any], Any]] = {
        bool: lambda old: not old,
        int: lambda old: old + 1 if name != "train.steps" else STEPS + 2,
        float: lambda old: old / 2 if old else 0.5,
        str: lambda old: f"{old}x",
    }
    if name == "run.cache":
        return bench.folder / "another cache"
    if name == "subject.images":
        moved = bench.folder / "moved"
        shutil.copytree(value, moved, dirs_exist_ok=True)
        return moved
    return makers[type(value)](value)
