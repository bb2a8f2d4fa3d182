"""Class images drawn by the base, and written as soon as they are there."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from torch import Tensor

from lora_booth.config.resolved import Resolved
from lora_booth.data.buckets import Bucket
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.models.sampling import Sampling, decode, sample
from lora_booth.run.interrupts import StopRequest
from lora_booth.run.report import Report
from lora_booth.training.class_images import ClassImage, batches

STOPPED = "stopped while preparing; what was done is kept, and the same command goes on from there"


def made_by(family: Family, config: Resolved, together: int) -> tuple[str | int, ...]:
    """All that class images depend on besides base, prompt, size, sampler and seed: number type, kind of device, noise
    schedule, and how many are drawn `together`, because a device rounds by it."""
    dtype = next(family.denoiser.parameters()).dtype
    return (str(dtype), family.device.type, int(config.objective.zero_terminal_snr), together)


def draw_missing(
    images: Sequence[ClassImage],
    reached: Container[str],
    family: Family,
    config: Resolved,
    prompts: Mapping[str, Conditioning],
    *,
    together: int,
    report: Report,
    stop: StopRequest,
) -> tuple[dict[str, Tensor], int]:
    """The latents of those of `images` whose names are `reached`, by name, and how many had to be drawn for them: the
    batches of those that are not there yet, each image written whole. Nothing is read again, so a cache that is cleared
    meanwhile loses nothing.

    `prompts` holds the conditioning of every reached image's prompt and of "". Images of one prompt and size are drawn
    in the same batches whether they are drawn for the first time or again after a kill, because rounding depends on the
    batch size. Raises Interrupted between two steps of the solver; what was being drawn then is drawn again. Raises
    what the device raises when its memory does not suffice for so many `together`.
    """
    found: dict[str, Tensor] = {}
    missing: list[tuple[list[ClassImage], set[str]]] = []
    for batch in batches(images, reached, together):
        stored = {image.name: image.latents() for image in batch if image.name in reached}
        if None in stored.values():
            stored |= {image.name: image.latents() for image in batch if image.name not in reached}
            missing.append((batch, {name for name, latents in stored.items() if latents is None}))
        found |= {name: latents for name, latents in stored.items() if latents is not None}
    for path in (path for cache in {id(i.cache): i.cache for i in images}.values() for path in cache.damaged):
        report.warn(f"{path} was damaged; its class image is drawn again.")
    done, total = 0, sum(len(names) for _, names in missing)
    for batch, names in missing:
        sampling = _sampling(config, batch[0].bucket, together, stop)
        seeds = [image.seed for image in batch]
        conditioning = [prompts[batch[0].prompt]] * len(batch)
        for latents in sample(family, conditioning, prompts[""], sampling, seeds=seeds):
            pictures = decode(family, latents, sampling, seeds=[image.name for image in batch])
            for image, row, picture in zip(batch, latents, pictures, strict=True):
                if image.name in names:
                    found[image.name] = image.save(picture, row)
                    done += 1
                    report.progress("draw class images", done, total)
    return {name: latents for name, latents in found.items() if name in reached}, done


def _sampling(config: Resolved, bucket: Bucket, together: int, stop: StopRequest) -> Sampling:
    return Sampling(
        width_px=bucket.width_px,
        height_px=bucket.height_px,
        sampler=config.prior.sampler,
        sampler_steps=config.prior.sampler_steps,
        guidance_scale=config.prior.guidance_scale,
        batch_size=together,
        is_divisible=False,
        is_tiled=config.memory.tiled_decoding,
        is_denoiser_offloaded=config.memory.offload_denoiser,
        on_step=lambda: stop.check(STOPPED),
    )
