"""Pipes, devices, links and folders in the place of every file that is read: nothing waits, or is read for ever."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lora_booth.config.toml import override
from tests.soak import commands
from tests.soak.bench import FEW_LAYERS, Result
from tests.soak.commands import ODD_THINGS, replace_
from tests.support import tiny
from tests.support.adapted import adapter_file

SETTINGS = {
    "subject.class_noun": "dog",
    "data.resolution": 32,
    "data.bucket_step": 16,
    "prior.mode": "images",
    "prior.num_images": 1,
    "prior.sampler_steps": 1,
    "prior.sampler": "ddim",
    "adapter.targets": FEW_LAYERS,
    "adapter.rank": 2,
    "train.steps": 2,
    "train.save_every_steps": 1,
    "preview.images_per_prompt": 1,
    "preview.every_steps": 1,
    "preview.sampler_steps": 1,
    "preview.sampler": "ddim",
}
LOOKS = (
    "inspect dog.safetensors",
    "export dog.safetensors --out out --cover cover.png",
    "merge dog.safetensors --out both.safetensors",
    "merge dog.safetensors --out both --base base",
    "resize dog.safetensors --rank 1 --out small.safetensors",
    "generate --base base --prompt x --steps 1 --adapter dog.safetensors",
    "extract --base base --tuned base --rank 1 --out out.safetensors",
)
"""Commands on the files of `job`, besides training."""


def pipes(count: int, folder: Path, seed: int = 0) -> Result:
    """Pipes, sockets, devices, links and folders instead of a file that is read: done or refused, never waited for."""
    sound, rng, failures = job(folder / "sound"), random.Random(seed), []
    files = [path.relative_to(sound) for path in sorted(sound.rglob("*")) if path.is_file()]
    tries = [(file, kind) for file in files for kind in ODD_THINGS]
    rng.shuffle(tries)
    seen: Counter[str] = Counter()
    for number in range(count):
        file, kind = tries[number % len(tries)]
        where = folder / "work"
        shutil.copytree(sound, where, symlinks=True)
        replace_(where / file, ODD_THINGS[kind])
        for words in _readers(file, rng):
            ended = commands.run(words, where)
            seen["done" if ended.code == 0 else "refused"] += 1
            if ended.fault:
                failures.append(f"{kind} as {file}, {' '.join(words)}: {ended.fault}")
        shutil.rmtree(where)
    return Result(count, tuple(failures), ", ".join(f"{n} {what}" for what, n in sorted(seen.items())))


def job(folder: Path) -> Path:
    """A folder with all that commands read: base, pictures, adapters, a config, and a run that lacks its end."""
    tiny.tiny_ends(folder / "base")
    (picture, *_) = tiny.tiny_pictures(folder / "pictures", 3)
    picture.with_suffix(".txt").write_text("a photo of {token} {class}")
    shutil.copy(picture, folder / "cover.png")
    adapter_file(folder / "dog.safetensors", 0)
    values = SETTINGS | {"model.base": "base", "subject.images": "pictures", "run.folder": "run", "run.cache": "cache"}
    (folder / "job.toml").write_text("\n".join(override(key, value) for key, value in values.items()))
    ended = commands.run(["train", "job.toml"], folder)
    assert ended.code == 0, ended.err
    shutil.rmtree(folder / ".home")
    (folder / "run" / "summary.json").unlink()
    return folder


def _readers(file: Path, rng: random.Random) -> Iterator[list[str]]:
    """Commands that read `file` of the job."""
    if file.parts[0] in ("run", "cache", "pictures", "job.toml"):
        yield ["train", "job.toml"]
        return
    names = [words for words in LOOKS if file.name in words or file.parts[0] in words.split()]
    yield rng.choice(names).split()
    if file.parts[0] == "base":
        yield ["plan", "job.toml"]
