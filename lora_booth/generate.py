"""Pictures from a base and any number of adapter files, as a grid of prompts and strengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from lora_booth import export, families, files
from lora_booth.adapter.weights import AdapterWeights, find_module, misfit
from lora_booth.config import ModelConfig
from lora_booth.data.grid import labelled_grid
from lora_booth.devices import dtype_for
from lora_booth.errors import ConfigError, ModelError
from lora_booth.families.base import Family
from lora_booth.families.identify import BaseFacts
from lora_booth.families.sampling import Sampling, draw
from lora_booth.report import Report, Silent


@dataclass(frozen=True)
class PictureSettings:
    """How pictures are drawn. `size_px`: width and height, None for the base's own."""

    negative_prompt: str = ""
    seed: int = 1
    sampler: str = "dpm++"
    sampler_steps: int = 25
    guidance_scale: float = 7.0
    size_px: tuple[int, int] | None = None


def generate(
    *,
    base: str,
    prompts: Sequence[str],
    adapters: Sequence[tuple[Path, float]] = (),
    strengths: Sequence[float] = (1.0,),
    picture: PictureSettings = PictureSettings(),
    folder: Path = Path("pictures"),
    report: Report | None = None,
) -> Path:
    """Draw every prompt at every strength into `folder`, and grid.png beside them; returns the grid's path.

    `adapters`: files with a strength each; `strengths` multiply all of them, 0 being the base alone. Every cell starts
    from the same noise. Existing files in `folder` are not replaced: a number is added to the name.
    """
    report = report or Silent()
    device = Accelerator().device
    weights = [export.read(path) for path, _ in adapters]  # refuses what is damaged, unsafe or foreign
    config = ModelConfig(base=base)
    size_px = _checked_size(picture.size_px, families.facts(config))
    family = families.load(config, device=device, dtype=dtype_for(config.precision, device))
    weights = [_fitted(family, path, layers) for (path, _), layers in zip(adapters, weights, strict=True)]
    pipeline = family.pipeline(picture.sampler)
    to_tensors = export.FORMATS["diffusers"].to_tensors  # diffusers itself knows fewer namings, and drops kohya's DoRA
    own_strengths = {}
    for number, ((_, own), layers) in enumerate(zip(adapters, weights, strict=True)):
        for kind, part in _alike(layers).items():
            tensors = to_tensors(part, family.name, torch.float32)
            pipeline.load_lora_weights(tensors, adapter_name=f"adapter_{number}_{kind}")
            own_strengths[f"adapter_{number}_{kind}"] = own
    columns = []
    for done, strength in enumerate(strengths, start=1):
        if adapters:
            pipeline.set_adapters(list(own_strengths), adapter_weights=[w * strength for w in own_strengths.values()])
        columns.append(_column(family, prompts, picture, size_px))
        report.progress("strengths", done, len(strengths))
    return _write(folder, prompts, strengths, columns, report)


def parse_adapter(text: str) -> tuple[Path, float]:
    """ "FILE" or "FILE:STRENGTH" as a path and a strength, 1 where none is given."""
    name, colon, strength = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            return Path(name), float(strength)
        except ValueError:
            pass
    return Path(text), 1.0


def parse_strengths(text: str) -> tuple[float, ...]:
    """ "0,0.5,1" as numbers. Raises ConfigError for anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f'--strengths "{text}" is not a list of numbers; write e.g. 0,0.5,1.') from None


def parse_size(text: str) -> tuple[int, int] | None:
    """ "512x768" as width and height, "" as None. Raises ConfigError for anything else."""
    if not text:
        return None
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise ConfigError(f'--size "{text}" is not a size; write WIDTHxHEIGHT in pixels, e.g. 512x768.') from None
    return width, height


def _checked_size(size_px: tuple[int, int] | None, facts: BaseFacts) -> tuple[int, int]:
    """The size to draw at. Raises ConfigError for one that the base cannot draw."""
    width, height = size_px or (facts.native_resolution, facts.native_resolution)
    if min(width, height) <= 0 or width % facts.bucket_step or height % facts.bucket_step:
        raise ConfigError(
            f"--size {width}x{height} is not a multiple of {facts.bucket_step} pixels, which this base needs."
        )
    return width, height


def _fitted(family: Family, path: Path, weights: AdapterWeights) -> AdapterWeights:
    """`weights` in the shapes of the base's layers: a 1x1 convolution's may be stored as a linear one's.

    Raises ModelError when the base lacks a layer that the adapter changes, or has it in another size.
    """
    modules = {"unet": family.denoiser, **family.text_encoders()}
    fitted: AdapterWeights = {}
    for component, layers in weights.items():
        for name, low in layers.items():
            try:
                shape = tuple(find_module(modules[component], name).weight.shape)
            except (KeyError, AttributeError, ModelError):
                shape = ()
            if not shape or misfit(low, shape):
                raise ModelError(
                    f"adapter {path.name} does not fit the base, a {family.name} model: {component} lacks layer {name} "
                    f"of its size. `lora-booth inspect {path.name}` tells its family; name such a base with --base."
                )
            down = low.down.reshape(low.rank, *shape[1:])
            up = low.up.reshape(shape[0], low.rank, *(1 for _ in shape[2:]))
            fitted.setdefault(component, {})[name] = replace(low, down=down, up=up)
    return fitted


def _alike(weights: AdapterWeights) -> dict[str, AdapterWeights]:
    """`weights` in parts that are DoRA throughout or plain throughout: PEFT can load no other."""
    parts: dict[str, AdapterWeights] = {}
    for component, layers in weights.items():
        for path, low_rank in layers.items():
            kind = "plain" if low_rank.magnitude is None else "dora"
            parts.setdefault(kind, {}).setdefault(component, {})[path] = low_rank
    return parts


@torch.no_grad()
def _column(
    family: Family, prompts: Sequence[str], picture: PictureSettings, size_px: tuple[int, int]
) -> list[Image.Image]:
    """One picture per prompt with the adapters as they are set now."""
    sampling = Sampling(*size_px, picture.sampler, picture.sampler_steps, picture.guidance_scale)
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
            path = _unused(folder / f"{number:02d}_{words}_{strength:g}.png")
            files.write_png(path, image)
    rows = [(prompt, [column[number] for column in columns]) for number, prompt in enumerate(prompts)]
    grid = _unused(folder / "grid.png")
    files.write_png(grid, labelled_grid(rows, columns=[f"strength {strength:g}" for strength in strengths]))
    report.event("pictures", f"{len(prompts) * len(strengths)} pictures and {grid}", path=str(grid))
    return grid


def _unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3 … that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate
