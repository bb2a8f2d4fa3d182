"""What `evaluate` is asked to judge: a run with its kept checkpoints, or a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_booth.adapter import kept
from lora_booth.adapter.files import embedding, storage
from lora_booth.adapter.files.embedding import Embedding
from lora_booth.adapter.weights import AdapterWeights
from lora_booth.config import inputs, toml
from lora_booth.config.config import Config
from lora_booth.config.settings import BASE_ALIASES, ModelConfig
from lora_booth.data import concepts
from lora_booth.errors import ConfigError, DiskError
from lora_booth.models.bases.sources import is_hub_id
from lora_booth.run import identity
from lora_booth.run.folder import Run
from lora_booth.run.report import Report
from lora_booth.verbs.generate import PictureSettings

MAX_STEPS = 25
MINIATURE_STEPS = 10
"""Denoiser calls for a picture, at most: more change what is seen, and hardly what is measured."""


@dataclass(frozen=True)
class Asked:
    """What the user says; None where the run or the file is to tell, or the usual is meant."""

    base: str | None = None
    subject: Path | None = None
    class_noun: str | None = None
    token: str | None = None
    step: str = "all"
    out: Path | None = None


@dataclass(frozen=True)
class Target:
    """What is judged. `checkpoints`: step (0 of a file) to its adapter; `words`: and to the words that were learnt with
    it. `pictures`: folder of the real ones, None where
    there are none; `trained`: SHA-256 of those that were trained on, as far as that is known. `folder`: where scores
    go."""

    name: str
    model: ModelConfig
    token: str
    class_noun: str
    checkpoints: Mapping[int, AdapterWeights]
    pictures: Path | None
    trained: frozenset[str]
    folder: Path
    picture: PictureSettings
    has_zero_terminal_snr: bool = False
    words: Mapping[int, Sequence[Embedding]] = field(default_factory=dict)


def target_of(path: Path, asked: Asked, wishes: Mapping[str, Any], report: Report) -> Target:
    """What `path` means, with what the user `asked` on top.

    A run is drawn as its previews were, a file as `generate` draws, but for the fields in `wishes`.
    Raises ConfigError, DataError or ModelError.
    """
    if kept.find(path, "last") is not None:
        return _of_run(path, asked, wishes, report)
    if os.path.isdir(path):
        raise ConfigError(
            f"{inputs.shown_path(path)} is no run folder (it has no config.toml and checkpoints); name a run folder, a "
            "checkpoint of one, or an adapter file."
        )
    return _of_file(path, asked, wishes, report)


def _of_run(path: Path, asked: Asked, wishes: Mapping[str, Any], report: Report) -> Target:
    last = kept.find(path, None)
    assert last is not None, "asked before"
    folder = last.folder
    config = toml.load(folder / "config.toml")
    is_one = path != folder  # the folder or file of one checkpoint
    steps = (
        [None] if is_one else [asked.step] if asked.step != "all" else [str(s) for s in Run(folder).validation_losses()]
    )
    found = [last if step is None else kept.find(path, step) for step in steps]
    by_step = {int(one.name.rpartition("-")[2]): one for one in found if one is not None}
    stored = identity.read(folder)
    assert stored is not None, "there is a config.toml"
    is_miniature = (asked.base or config.model.base) == "booth-mini"
    drawn = PictureSettings(
        negative_prompt=config.fill(config.preview.negative_prompt),
        seed=config.preview.seed,
        sampler=config.preview.sampler,
        sampler_steps=min(config.preview.sampler_steps, MINIATURE_STEPS if is_miniature else MAX_STEPS),
        guidance_scale=config.preview.guidance_scale,
        size_px=(config.data.resolution, config.data.resolution) if config.data.resolution else None,
    )
    return Target(
        name=config.name,
        model=config.model if asked.base is None else toml.base_named(asked.base),
        token=asked.token or config.subject.token,
        class_noun=asked.class_noun or config.subject.class_noun,
        checkpoints={step: one.weights for step, one in by_step.items()},
        words={step: [one.word] for step, one in by_step.items() if one.word is not None},
        pictures=_pictures_of(config, asked, report),
        trained=frozenset(stored["inputs"].get("pictures", {}).values()),
        folder=asked.out or folder,
        picture=replace(drawn, **wishes),
        has_zero_terminal_snr=config.objective.zero_terminal_snr,
    )


def _pictures_of(config: Config, asked: Asked, report: Report) -> Path | None:
    """The folder of the real pictures of a run, unseen ones where there are any."""
    if asked.subject is not None:
        return asked.subject
    subject = config.subject
    if subject.held_out is not None and os.path.isdir(subject.held_out):
        return subject.held_out
    if os.path.isdir(subject.images):
        return concepts.folder_of(subject.images, subject.token, subject.class_noun)
    report.warn(
        f"the pictures of the run, {subject.images}, are gone, so likeness is not measured; name others with --subject."
    )
    return None


def _of_file(path: Path, asked: Asked, wishes: Mapping[str, Any], report: Report) -> Target:
    if asked.step != "all":
        raise ConfigError(f"--step {inputs.shown(asked.step)} chooses a checkpoint of a run, but {path} is none.")
    files, words = embedding.told_apart([path], report)
    weights = storage.trainable(path.name, storage.read_all(files, (), report)[0]) if files else {}
    told = _told(storage.read_metadata(path))
    token, noun = (asked.token or told.get("token"), asked.class_noun or told.get("class_noun"))
    base = asked.base or _known_base(told.get("base"))
    missing = {"--base": base, "--token": token, "--class-noun": noun}
    absent = [option for option, value in missing.items() if not value]
    if absent:
        raise ConfigError(f"{path.name} does not tell {' and '.join(absent)}; name it.")
    assert base is not None and token is not None and noun is not None, "all are there"
    if asked.subject is None:
        report.warn("without --subject DIR, pictures of the subject, likeness and leak are not measured.")
    name = path.stem
    folder = asked.out or path.parent / f"{name}_scores"
    return Target(
        name,
        toml.base_named(base),
        token,
        noun,
        {0: weights},
        asked.subject,
        frozenset(),
        folder,
        replace(PictureSettings(), **wishes),
        words={0: words},
    )


def _told(header: Mapping[str, str]) -> dict[str, str]:
    """Token, class noun and base of a file's own header; nothing that is not a word."""
    try:
        config: Any = json.loads(header.get("lora_booth.config", "{}"))
        found = {
            "token": config["subject"]["token"],
            "class_noun": config["subject"]["class_noun"],
            "base": config["model"]["base"],
        }
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str) and value.strip()}


def _known_base(base: str | None) -> str | None:
    """`base` if it means the same everywhere: of a folder a header keeps only the last part of its name."""
    return base if base is not None and (base in BASE_ALIASES or is_hub_id(base)) else None


def require_writable(folder: Path) -> None:
    """Raises DiskError where `folder`, or what it would be made in, is no folder that may be written to."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(place) or not os.access(place, os.W_OK):
        why = "may not be written to" if os.path.isdir(place) else "is a file"
        raise DiskError(f"scores cannot be written into {folder}: {place} {why}; choose another --out.")


def strengths_of(strengths: Sequence[float]) -> tuple[float, ...]:
    """The strengths, each once. Raises ConfigError where there is none but 0, which is the base."""
    found = tuple(dict.fromkeys(strength for strength in strengths if strength))
    if not found:
        raise ConfigError("--strengths names none but 0, which is the base and drawn anyway; write e.g. 0.6,0.8,1.")
    return found
