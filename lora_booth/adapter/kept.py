"""The adapter of a kept checkpoint of a run, and what a file made of it says of itself."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_booth.adapter import embeddings
from lora_booth.adapter.files import storage
from lora_booth.adapter.files.embedding import Embedding
from lora_booth.adapter.numbers import weights_of
from lora_booth.adapter.weights import AdapterWeights, uses_dora
from lora_booth.config import inputs, toml
from lora_booth.config.config import Config
from lora_booth.data import concepts
from lora_booth.errors import ConfigError, ModelError
from lora_booth.run import checkpoints, identity
from lora_booth.run.folder import Run

PACKAGES = ("lora-booth", "torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class Kept:
    """One checkpoint as an adapter. `word`: that which was learnt, if any; `name`: of files made of it, without ending;
    `told`: which step of which it is; `folder`: of its run."""

    weights: AdapterWeights
    word: Embedding | None
    header: dict[str, str]
    name: str
    told: str
    folder: Path


def facts_of(
    config: Config,
    stored: Mapping[str, Any],
    steps: int,
    buckets: Mapping[tuple[int, int], int] | None = None,
    strength: float = 1.0,
) -> storage.Facts:
    """What a file says of a run of the resolved `config` after `steps` steps, its update multiplied by `strength`.
    `stored`: its inputs.json."""
    given, pinned = stored["inputs"], stored["pinned"]
    own = len(given.get("class_pictures", {}))
    return storage.Facts(
        family=pinned["family"],
        prediction_type=pinned["prediction_type"],
        config=config,
        steps=steps,
        num_instance_images=len(given["pictures"]),
        num_class_images=(own or config.prior.num_images) if config.has_class_images else 0,
        resolution_px=config.data.resolution or 0,
        started_at=float(stored["started_at"]),
        identity=identity.digest(config, given),
        buckets=buckets or {},
        versions={name: version(name) for name in PACKAGES},
        strength=strength,
        words=concepts.words_of(given["pictures"]),
    )


def find(path: Path, step: str | None) -> Kept | None:
    """The checkpoint that `path` means: a run folder with `step` "best", "last" (the default) or a number, the folder
    of a checkpoint, or its adapter.safetensors; None when it is something else.

    Raises ConfigError for a step that is not kept, ModelError for a damaged checkpoint.
    """
    folder = path.parent if path.name == "adapter.safetensors" else path
    if folder.name.startswith("step-") and folder.parent.name == "checkpoints":
        path, step = folder.parent.parent, step or folder.name[5:]
    if not inputs.is_plain_file(path / "config.toml") or not os.path.isdir(path / "checkpoints"):
        return None
    run, config, stored = Run(path), toml.load(path / "config.toml"), identity.read(path)
    assert stored is not None, "there is a config.toml"
    losses = run.validation_losses()
    best = run.best()
    number = _step(step or "last", losses, None if best is None else best[0], path)
    strength = best[1] if step == "best" and best is not None else 1.0
    checkpoint = run.checkpoint_folder(number)
    fault = checkpoints.fault(checkpoint)
    if fault is not None:
        raise ModelError(f"checkpoint {checkpoint} is damaged ({fault}); choose another --step.")
    layers, word = embeddings.split(checkpoints.read(checkpoint).adapter)
    weights = at_strength(weights_of(layers, config.adapter), strength)
    kept = ", ".join(f"{s} ({'not measured' if loss is None else f'{loss:.4f}'})" for s, loss in losses.items())
    named = "" if best is None else f"; the best is {best[0]}" + (f" at strength {best[1]:g}" if best[1] != 1 else "")
    told = f"step {number} of {path}; kept with their validation loss: {kept}{named}"
    header = storage.metadata(facts_of(config, stored, number, strength=strength))
    learnt = Embedding(config.subject.token, embeddings.vectors_of(word), header) if word else None
    return Kept(weights, learnt, header, f"{config.name}-{number:06d}", told, path)


def at_strength(weights: AdapterWeights, strength: float) -> AdapterWeights:
    """`weights`, plain LoRA, with the update multiplied by `strength`, so that 1 means it from now on."""
    if strength == 1:
        return weights
    assert not uses_dora(weights), "DoRA at another strength is no DoRA"
    return {
        component: {path: replace(low, up=low.up * strength) for path, low in layers.items()}
        for component, layers in weights.items()
    }


def _step(wanted: str, losses: Mapping[int, float | None], best: int | None, folder: Path) -> int:
    """The step that `wanted` means. Raises ConfigError."""
    if not losses:
        raise ConfigError(f"run folder {folder} keeps no checkpoint yet; train first.")
    named = {"last": max(losses), "best": best}
    number = named[wanted] if wanted in named else int(wanted) if re.fullmatch("[0-9]{1,9}", wanted) else None
    if number is None or number not in losses:
        kept = ", ".join(map(str, losses))
        raise ConfigError(
            f"--step {inputs.shown(wanted)}: run folder {folder} keeps the steps {kept}; name one, or best or last."
        )
    return number
