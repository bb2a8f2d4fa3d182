"""What a base draws for words that it should not know, alone and before the class noun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lora_booth.config.settings import ModelConfig
from lora_booth.data.grid import labelled_grid
from lora_booth.errors import DeviceMemoryError, lacks_memory
from lora_booth.models import devices, loading
from lora_booth.models.at_once import PICTURES_AT_ONCE
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.sampling import Sampling, denoiser_offloaded, draw
from lora_booth.run import disk
from lora_booth.run.report import Report
from lora_booth.verbs.generate import PictureSettings, checked_size, memory_advice, within_memory


def draw_tokens(
    words: Sequence[str],
    config: ModelConfig,
    facts: BaseFacts,
    class_noun: str,
    folder: Path,
    seeds: Sequence[int],
    steps: int,
    device: str,
    report: Report,
) -> Path:
    """Draw each word alone and with `class_noun`, with each of `seeds`, as `folder`/tokens.png; returns its path.

    A row whose pictures are alike has a meaning in the base. Raises as `generate` does.
    """
    place = devices.found(device, "--device")
    prompts = [prompt for word in words for prompt in (word, f"{word} {class_noun}")]
    picture = PictureSettings(sampler_steps=steps, size_px=checked_size(None, facts))
    picture = within_memory(picture, facts, prompts * len(seeds), [], place, report)
    assert picture.size_px is not None, "chosen before"
    is_offloaded, columns = bool(picture.is_denoiser_offloaded), []
    sampling = Sampling(
        *picture.size_px,
        picture.sampler,
        picture.sampler_steps,
        picture.guidance_scale,
        batch_size=picture.pictures_at_once or PICTURES_AT_ONCE,
        is_tiled=bool(picture.is_tiled),
        is_denoiser_offloaded=is_offloaded,
    )
    try:
        dtype = devices.dtype_for(config.precision, place)
        family = loading.load(config, device=place, dtype=dtype, base=facts, is_denoiser_offloaded=is_offloaded)
        with torch.no_grad():
            with denoiser_offloaded(family, is_wanted=is_offloaded):
                conditioning = [family.encode_prompts([prompt]) for prompt in prompts]
                negative = family.encode_prompts([""])
            for done, seed in enumerate(seeds, start=1):
                columns.append(list(draw(family, conditioning, negative, sampling, seeds=[seed] * len(prompts))))
                report.progress("seeds", done, len(seeds))
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise DeviceMemoryError(memory_advice(picture, len(prompts))) from error
    rows = [
        (f"{word}: alone, and {word} {class_noun}", [c[2 * n] for c in columns] + [c[2 * n + 1] for c in columns])
        for n, word in enumerate(words)
    ]
    kinds = ("alone", f"with {class_noun}")
    labels = [f"{kind}, seed {seed}" for kind in kinds for seed in seeds]
    path = folder / "tokens.png"
    disk.write_png(path, labelled_grid(rows, columns=labels, title=f"What {facts.path.name} makes of each word"))
    report.event("pictures", f"{len(prompts) * len(seeds)} pictures in {path}", path=str(path))
    return path
