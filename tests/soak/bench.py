"""A small job that goes through every part of a run, and what it makes, so that an interrupted one can be compared."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_booth.adapter.files import storage
from lora_booth.config.config import Config
from lora_booth.errors import LoraBoothError
from lora_booth.run.folder import Run
from tests.soak import crash
from tests.soak.crash import Fate
from tests.support import tiny

STEPS = 4
FEW_LAYERS = r"regex:.*attn2\.to_k"
"""17 of 136 layers: nothing that can be interrupted is left out, and a run takes half as long."""


@dataclass(frozen=True)
class Result:
    """What a campaign found: how often it tried, one sentence for each failure, and what else is worth telling."""

    tries: int
    failures: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Materials:
    """Folders that a job reads."""

    base: Path
    pictures: Path
    held_out: Path


def materials(folder: Path, make_base: Callable[[Path], Path] = tiny.tiny_sdxl) -> Materials:
    """A base, three pictures to learn and one to judge by, written into `folder`."""
    tiny.tiny_pictures(folder / "pictures", 3)
    tiny.tiny_pictures(folder / "held_out", 1)
    return Materials(make_base(folder / "base"), folder / "pictures", folder / "held_out")


class Bench:
    """The job in `folder`, and what its straight run makes.

    `changes`: what it changes on the disk, in order; `moments`: seconds since its start, by word of the report
    and number.
    """

    def __init__(self, folder: Path, read: Materials | None = None, **sections: dict[str, Any]) -> None:
        self.folder, self.sections = folder, sections
        self.read = read or materials(folder)
        self.straight = self.config("straight")
        outcome = crash.run(self.straight, Fate(event="change", folder=folder / "straight"))
        assert outcome.code == 0, outcome.output
        lines = outcome.output.splitlines()
        self.seconds, self.expected = outcome.seconds, made(self.straight)
        self.changes = [line for line in lines if line.startswith("change ")]
        self.moments: dict[tuple[str, int], float] = {}
        counts: Counter[str] = Counter()
        for _, seconds, word in (line.split(maxsplit=2) for line in lines if line.startswith("moment ")):
            counts[word] += 1
            self.moments[word, counts[word]] = float(seconds)

    def config(self, name: str, **sections: dict[str, Any]) -> Config:
        """The job in a folder of its own, with a cache of its own."""
        values: dict[str, dict[str, Any]] = {
            "model": {"base": str(self.read.base)},
            "subject": {"images": self.read.pictures, "class_noun": "dog", "held_out": self.read.held_out},
            "data": {"resolution": 32, "bucket_step": 16},
            "evaluate": {"choose": "last"},
            "prior": {"mode": "images", "num_images": 2, "sampler_steps": 1, "sampler": "ddim"},
            "adapter": {"rank": 2, "targets": FEW_LAYERS},
            "optimizer": {"learning_rate": 1e-2},
            "train": {"steps": STEPS, "save_every_steps": 2, "keep_last": 1},
            "preview": {
                "prompts": ["a photo of {class}"],
                "images_per_prompt": 1,
                "sampler_steps": 1,
                "sampler": "ddim",
                "every_steps": 2,
            },
            "run": {"folder": self.folder / name / "run", "cache": self.folder / name / "cache"},
        }
        for changed in (self.sections, sections):
            for section, pairs in changed.items():
                values.setdefault(section, {}).update(pairs)
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return Config.model_validate(values)

    def finish(self, config: Config) -> str:
        """Continue `config` to its end; returns what is wrong with the result, "" when nothing is."""
        outcome = crash.run(config)
        if outcome.code != 0:
            return f"ended with {outcome.code}: {outcome.output[-500:]}"
        fault = differences(self.expected, made(config)) or left_over(config)
        if not fault:
            self.clear(config)
        return fault

    def clear(self, config: Config) -> None:
        """Remove the job's folder; of a failed one everything is kept to be looked at."""
        assert config.run.folder is not None
        shutil.rmtree(config.run.folder.parent)


def made(config: Config) -> dict[str, str]:
    """Everything that a finished run of `config` made, as digests by name; times and paths are left out."""
    folder, cache = config.run.folder, config.run.cache
    assert folder is not None and cache is not None
    checkpoint = max((folder / "checkpoints").glob("step-*"))
    found = {
        name: _digest((checkpoint / name).read_bytes()) for name in ("adapter.safetensors", "optimizer.safetensors")
    }
    found["checkpoint"] = checkpoint.name
    found |= {path.name: storage.read_metadata(path)["sshs_model_hash"] for path in folder.glob("*.safetensors")}
    pictures = [*folder.glob("*.png"), *folder.glob("previews/*.png"), *cache.glob("class_images/*/*.png")]
    found |= {path.name: _digest(_pixels(path)) for path in pictures}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = json.dumps([{k: v for k, v in line.items() if k != "seconds"} for line in lines])
    summary = json.loads((folder / "summary.json").read_text())
    return found | {key: str(summary[key]) for key in ("steps", "num_parameters", "validation_loss")}


def differences(expected: dict[str, str], found: dict[str, str]) -> str:
    """Names of what differs, "" when all is equal."""
    return ", ".join(sorted(name for name in expected | found if expected.get(name) != found.get(name)))


def left_over(config: Config) -> str:
    """Files that a killed process left in the run folder and nobody removed, "" when there are none."""
    assert config.run.folder is not None
    found = [*config.run.folder.rglob("*.tmp"), *config.run.folder.rglob(".saving-*")]
    return f"left over: {', '.join(path.name for path in found)}" if found else ""


def half_file(config: Config, expected: dict[str, str]) -> str:
    """What is wrong with the adapter files that a killed run has handed over already, "" when nothing is."""
    assert config.run.folder is not None
    for path in config.run.folder.glob("*.safetensors"):
        try:
            if storage.read_metadata(path)["sshs_model_hash"] != expected[path.name] or not storage.read(path):
                return f"{path.name} is another than that of the straight run"
        except LoraBoothError as error:
            return f"{path.name} cannot be read: {error}"
    return ""


def lost_checkpoint(config: Config, output: str) -> str:
    """What is wrong with the checkpoints of a run that was killed after printing `output`, "" when nothing is."""
    assert config.run.folder is not None
    saved = [int(line.split()[1]) for line in output.splitlines() if line.startswith("step ") and " saved" in line]
    told: list[str] = []
    newest = Run(config.run.folder).latest(told.append)
    if told:
        return f"damaged: {told[0]}"
    if saved and (newest is None or newest.step < max(saved)):
        return f"step {max(saved)} was saved and is lost"
    return ""


def _pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
