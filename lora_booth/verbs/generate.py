"""Pictures from a base and any number of adapter files, as a grid of prompts and strengths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from PIL import Image

from lora_booth.adapter import attach
from lora_booth.adapter.embeddings import LearntWord
from lora_booth.adapter.files import embedding, storage
from lora_booth.adapter.weights import AdapterWeights, num_parameters
from lora_booth.config import inputs
from lora_booth.config.resolved import Filled
from lora_booth.config.section import Sampler
from lora_booth.config.settings import ModelConfig
from lora_booth.config.toml import base_named
from lora_booth.data.buckets import Bucket
from lora_booth.data.grid import labelled_grid
from lora_booth.errors import ConfigError, DeviceMemoryError, LoraBoothError, lacks_memory
from lora_booth.models import devices, loading
from lora_booth.models.at_once import PICTURES_AT_ONCE
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.families.family import Family
from lora_booth.models.sampling import Sampling, denoiser_offloaded, draw
from lora_booth.planning import budget
from lora_booth.run import disk
from lora_booth.run.report import Report, Silent

FLOAT_BYTES = 4
MAX_SIDE_PX = 16_384
"""Of a picture: 16 times the native side of SDXL."""
MAX_STRENGTH = 1000.0
"""Of an adapter, and of the grid; what is drawn at 10 is noise already."""


@dataclass(frozen=True)
class PictureSettings:
    """How pictures are drawn. `size_px`: width and height, None for the base's own.

    The last four change memory and time: `budget_gib` of device memory, None for what is free; within it None of
    `pictures_at_once`, `is_tiled` (large ones are decoded in tiles, whose tones may differ a little) and
    `is_denoiser_offloaded` (it waits in main memory while other parts work) is chosen.
    """

    negative_prompt: str = ""
    seed: int = 1
    sampler: str = "dpm++"
    sampler_steps: int = 25
    guidance_scale: float = 7.0
    size_px: tuple[int, int] | None = None
    budget_gib: float | None = None
    pictures_at_once: int | None = None
    is_tiled: bool | None = None
    is_denoiser_offloaded: bool | None = None


def generate(
    *,
    base: str,
    prompts: Sequence[str],
    adapters: Sequence[tuple[Path, float]] = (),
    strengths: Sequence[float] = (1.0,),
    picture: PictureSettings = PictureSettings(),
    prediction_type: str = "auto",
    device: str = "auto",
    leave_out: Sequence[str] = (),
    folder: Path = Path("pictures"),
    report: Report | None = None,
) -> Path:
    """Draw every prompt at every strength into `folder`, and grid.png beside them; returns the grid's path.

    `adapters`: files with a strength each, those of words too, which have none; `strengths` multiply all of them, 0
    being the base alone. Every cell starts from the same noise. `prediction_type`, `device`: as in [model] and [memory]
    of a config; `leave_out`: as in storage.contents. Existing files in `folder` are not replaced: a number is added to
    the name.
    Raises ConfigError for settings that cannot be drawn with, ModelError for a base or adapter that cannot be used,
    DeviceMemoryError, with what to change, when the device has too little memory.
    """
    report = report or Silent()
    require_drawable(prompts, [*(own for _, own in adapters), *strengths], picture)
    config = base_named(base, prediction_type=prediction_type)
    place = devices.found(device, "--device")
    paths, words = embedding.told_apart([path for path, _ in adapters], report)
    adapters = _with_layers(adapters, paths)
    read = storage.read_all(paths, leave_out, report)  # refuses what is damaged, unsafe or foreign
    weights = [storage.trainable(path.name, found) for path, found in zip(paths, read, strict=True)]
    facts = loading.facts(config)
    picture = replace(picture, size_px=checked_size(picture.size_px, facts))
    picture = within_memory(picture, facts, prompts, weights, place, report)
    columns = []
    try:
        family, own_strengths = _loaded(config, picture, adapters, weights, place)
        with attach.words_learnt(family, words) as learnt:
            for done, strength in enumerate(strengths, start=1):
                if adapters:
                    own = [own * strength for own in own_strengths.values()]
                    family.pipeline(picture.sampler).set_adapters(list(own_strengths), adapter_weights=own)
                columns.append(_column(family, prompts, picture, learnt if strength == 0 else ()))
                report.progress("strengths", done, len(strengths))
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise DeviceMemoryError(memory_advice(picture, len(prompts))) from error
    return _write(folder, prompts, strengths, columns, report)


def require_drawable(prompts: Sequence[str], strengths: Sequence[float], picture: PictureSettings) -> None:
    """Raises ConfigError for a setting that nothing can be drawn with."""
    if not prompts:
        raise ConfigError("there is nothing to draw; give a --prompt.")
    for strength in strengths:
        inputs.require_number(strength, "a strength", -MAX_STRENGTH, MAX_STRENGTH)
    if picture.sampler not in get_args(Sampler):
        raise ConfigError(
            f'--sampler "{inputs.shown(picture.sampler)}" is unknown; use {", ".join(get_args(Sampler))}.'
        )
    inputs.require_number(picture.seed, "--seed", 0, 2**63 - 1)
    inputs.require_number(picture.sampler_steps, "--steps", 1, 1000)
    inputs.require_number(picture.guidance_scale, "--guidance", 0, 50)
    if picture.budget_gib is not None:
        inputs.require_number(picture.budget_gib, "--vram", 0.1, 1024)
    if picture.pictures_at_once is not None:
        inputs.require_number(picture.pictures_at_once, "--at-once", 1, 64)


def within_memory(
    picture: PictureSettings,
    facts: BaseFacts,
    prompts: Sequence[str],
    weights: Sequence[AdapterWeights],
    device: torch.device,
    report: Report,
) -> PictureSettings:
    """`picture` with the fastest way to draw that fits the device's memory, which is told; on a CPU as it is."""
    budget_gib, chosen = picture.budget_gib or devices.free_gib(device), None
    if budget_gib is None:
        return picture
    budget_gib -= sum(map(num_parameters, weights)) * FLOAT_BYTES / 2**30
    assert picture.size_px is not None, "chosen before"
    memory = {
        "pictures_at_once": picture.pictures_at_once,
        "tiled_decoding": picture.is_tiled,
        "offload_denoiser": picture.is_denoiser_offloaded,
    }
    drawing = Filled.model_validate(
        {
            "model": {"base": str(facts.path)},
            "subject": {"images": ".", "class_noun": "picture"},
            "data": {"resolution": facts.native_resolution, "bucket_step": facts.bucket_step},
            "prior": {"mode": "images", "num_images": len(prompts), "guidance_scale": picture.guidance_scale},
            "adapter": {"rank": 1, "text_encoder": True},  # which stay on the device
            "train": {"steps": 1, "save_every_steps": 1},
            "optimizer": {"warmup_steps": 0},
            "preview": {"images_per_prompt": 0},
            "memory": memory,
        }
    )
    try:
        chosen = budget.choose_for_pictures(drawing, facts, budget_gib, Bucket(*picture.size_px)).memory
    except LoraBoothError:
        raise
    except Exception as error:  # whatever a version of torch cannot trace must not keep anybody from drawing
        report.warn(f"memory cannot be predicted ({inputs.reason(error)}); drawing as usual.")
        return picture
    options = [f"{min(chosen.pictures_at_once or 1, len(prompts))} pictures at once"]
    options += ["decoded in tiles"] if chosen.tiled_decoding else []
    options += ["the denoiser offloaded"] if chosen.offload_denoiser else []
    report.event("memory", f"memory: {', '.join(options)}, to stay within {budget_gib:.1f} GiB")
    return replace(
        picture,
        pictures_at_once=chosen.pictures_at_once,
        is_tiled=chosen.tiled_decoding,
        is_denoiser_offloaded=chosen.offload_denoiser,
    )


def memory_advice(picture: PictureSettings, num_prompts: int) -> str:
    """What to change after the device ran out of memory, what costs least first."""
    at_once = min(picture.pictures_at_once or PICTURES_AT_ONCE, num_prompts)
    advice = ["--at-once 1 (same pictures up to rounding)"] if at_once > 1 else []
    advice += (
        [] if picture.is_denoiser_offloaded else ["--offload-denoiser (same pictures, copies to main memory and back)"]
    )
    advice += [] if picture.is_tiled else ["--tiled (tones may differ a little between tiles)"]
    advice += ["a smaller --size", "other programs on the device closed"]
    changes = "\n".join(f"  {number}. {text}" for number, text in enumerate(advice, start=1))
    return f"the device ran out of memory, and no picture was written. Try, in this order:\n{changes}"


def _loaded(
    config: ModelConfig,
    picture: PictureSettings,
    adapters: Sequence[tuple[Path, float]],
    weights: Sequence[AdapterWeights],
    device: torch.device,
) -> tuple[Family, dict[str, float]]:
    """The base with all adapters, and the strength of each by its name there. Raises ModelError for one that does not
    fit."""
    dtype, is_offloaded = devices.dtype_for(config.precision, device), bool(picture.is_denoiser_offloaded)
    family = loading.load(config, device=device, dtype=dtype, is_denoiser_offloaded=is_offloaded)
    weights = [attach.fitted(family, path.name, layers) for (path, _), layers in zip(adapters, weights, strict=True)]
    pipeline = family.pipeline(picture.sampler)
    own_strengths = {}
    for number, ((_, own), layers) in enumerate(zip(adapters, weights, strict=True)):
        for name in attach.load_into_(pipeline, f"adapter_{number}", layers, family.name):
            own_strengths[name] = own
    return family, own_strengths


def checked_size(size_px: tuple[int, int] | None, facts: BaseFacts) -> tuple[int, int]:
    """The size to draw at. Raises ConfigError for one that the base cannot draw."""
    width, height = size_px or (facts.native_resolution, facts.native_resolution)
    if min(width, height) <= 0 or width % facts.bucket_step or height % facts.bucket_step:
        raise ConfigError(
            f"--size {width}x{height} is not a multiple of {facts.bucket_step} pixels, which this base needs."
        )
    if max(width, height) > MAX_SIDE_PX:
        raise ConfigError(f"--size {width}x{height} is above {MAX_SIDE_PX} pixels; choose a smaller one.")
    return width, height


def _with_layers(adapters: Sequence[tuple[Path, float]], paths: Sequence[Path]) -> list[tuple[Path, float]]:
    """Those of `adapters` that are at `paths`. Raises ConfigError where one of the others, a word, has a strength."""
    for path, own in adapters:
        if path not in paths and own != 1:
            raise ConfigError(f"{path.name} is a learnt word, which has no strength; write it without :{own:g}.")
    return [(path, own) for path, own in adapters if path in paths]


@torch.no_grad()
def _column(
    family: Family, prompts: Sequence[str], picture: PictureSettings, without: Sequence[LearntWord]
) -> list[Image.Image]:
    """One picture per prompt with the adapters as they are set now, `without` these words."""
    assert picture.size_px is not None, "chosen before"
    is_offloaded = bool(picture.is_denoiser_offloaded)
    sampling = Sampling(
        *picture.size_px,
        picture.sampler,
        picture.sampler_steps,
        picture.guidance_scale,
        batch_size=picture.pictures_at_once or PICTURES_AT_ONCE,
        is_tiled=bool(picture.is_tiled),
        is_denoiser_offloaded=is_offloaded,
    )
    with denoiser_offloaded(family, is_wanted=is_offloaded), ExitStack() as stack:
        for word in without:
            stack.enter_context(word.disabled())
        conditioning = [family.encode_prompts([prompt]) for prompt in prompts]
        negative = family.encode_prompts([picture.negative_prompt])
    return list(draw(family, conditioning, negative, sampling, seeds=[picture.seed] * len(prompts)))


def _write(
    folder: Path,
    prompts: Sequence[str],
    strengths: Sequence[float],
    columns: Sequence[Sequence[Image.Image]],
    report: Report,
) -> Path:
    for column, strength in zip(columns, strengths, strict=True):
        for number, (prompt, image) in enumerate(zip(prompts, column, strict=True)):
            words = "".join(c if c.isalnum() else "_" for c in prompt)[:60].strip("_")
            path = unused(folder / f"{number:02d}_{words}_{strength:g}.png")
            disk.write_png(path, image)
    rows = [(prompt, [column[number] for column in columns]) for number, prompt in enumerate(prompts)]
    grid = unused(folder / "grid.png")
    disk.write_png(grid, labelled_grid(rows, columns=[f"strength {strength:g}" for strength in strengths]))
    report.event("pictures", f"{len(prompts) * len(strengths)} pictures and {grid}", path=str(grid))
    return grid


def unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3 … that does not exist."""
    candidate, number = path, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate
