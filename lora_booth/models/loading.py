"""From the name of a base to its facts, or to its loaded family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from lora_booth.config.settings import ModelConfig
from lora_booth.errors import ModelError
from lora_booth.models.bases import identify, sources

if TYPE_CHECKING:
    import torch

    from lora_booth.models.families.components import Components
    from lora_booth.models.families.family import Family


def facts(
    config: ModelConfig, *, needs_weights: bool = True, pinned: sources.Found | None = None
) -> identify.BaseFacts:
    """What `model.base` is, without reading weights and without torch. A hub id is downloaded.

    Settings as in `sources.resolve`. Raises ModelError for a base that is missing, unsafe, incomplete or of another
    kind.
    """
    found = sources.resolve(config, needs_weights=needs_weights, pinned=pinned)
    said = None if config.prediction_type == "auto" else config.prediction_type
    has_weights = needs_weights or sources.is_local(config)
    base = identify.identify(found.path, has_weights=has_weights, said_prediction=said)
    return replace(base, repository=found.repository, revision=found.revision)


def load(
    config: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    base: identify.BaseFacts | None = None,
    needs_vae: bool = True,
    does_vae_wait: bool = False,
    do_text_encoders_wait: bool = False,
    is_denoiser_offloaded: bool = False,
) -> Family:
    """The base of `config`, frozen, on `device`: VAE in float32, the rest in `dtype`. `base`: its facts, if known: a
    name on the hub may mean another commit when it is asked for again.

    Parts that are not needed are not read; calling for them then is an assertion error. Those that wait are read from a
    folder when they are first called for. What is read has computed one tiny sample before it is returned, so that a
    damaged base is told here and not in the middle of a run; the denoiser as soon as there are text encoders, without
    which it is only called with prompts that an earlier sound base has encoded.
    `is_denoiser_offloaded`: the denoiser is left in main memory, and was never on the device beside the text encoders.
    """
    import torch

    from lora_booth.models.families.components import Wanted, load_components

    base = base or facts(config)
    quantization = None if config.quantize == "none" else config.quantize
    wanted = Wanted(
        torch.device(device),
        dtype,
        needs_vae,
        quantization,
        is_denoiser_offloaded,
        does_vae_wait=does_vae_wait,
        do_text_encoders_wait=do_text_encoders_wait,
    )
    parts = load_components(base, wanted)
    family = around(base, parts)
    family.fingerprint = sources.fingerprint(base.path)
    if quantization is not None:
        family.fingerprint += f" in {quantization}"  # its embeddings and pictures are not those of the plain base
    if config.prediction_type != "auto":
        family.fingerprint += f" as {config.prediction_type}"  # it draws other class images
    if needs_vae:  # else what is loaded is asked for its weights
        family.when_read = partial(_require_finite, base=base, is_denoiser_offloaded=is_denoiser_offloaded)
        if parts.read_vae is None:
            family.when_read(family, "vae")
        if parts.read_text_encoders is None:
            family.when_read(family, "text encoders")
    return family


def around(base: identify.BaseFacts, parts: Components) -> Family:
    """The family of `base`, made of `parts`; without a fingerprint, since nothing of its weights is read."""
    module, _, name = base.architecture.family.partition(":")
    family: Family = getattr(import_module(module), name)(base, parts)
    return family


def _require_finite(family: Family, part: str, *, base: identify.BaseFacts, is_denoiser_offloaded: bool) -> None:
    """Raises ModelError when a sample of the smallest size does not go through the "vae", or the "text encoders" and
    the denoiser, as finite numbers."""
    import torch

    from lora_booth.models.families.components import readable

    side, found = family.bucket_step, list[tuple[str, torch.Tensor]]()
    with readable(base.path), torch.no_grad():
        if part == "vae":
            mean, std = family.encode_images(torch.zeros(1, 3, side, side))
            found += [("vae", mean), ("vae", std), ("vae", family.decode_latents(mean))]
        else:
            prompt = family.encode_prompts(["a dog"])
            geometry = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=family.device)
            timesteps = family.schedule.timesteps_at([0.5]).to(family.device)
            noisy = torch.ones(1, *family.latent_shape(side, side), device=family.device)
            with _in_turn(family) if is_denoiser_offloaded else nullcontext():
                output = family.predict(noisy, timesteps, prompt, geometry)
            found += [("text encoder", tensor) for tensor in prompt.values()]
            found.append((base.architecture.denoiser, output))
    for what, tensor in found:
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"the {what} of {base.path} computes NaN or infinity; its weights are damaged (copy or download it "
                'again), or exceed float16 (set model.precision = "bf16" or "fp32").'
            )


@contextmanager
def _in_turn(family: Family) -> Iterator[None]:
    """Inside, the denoiser is on the device and the text encoders wait in main memory, the reverse of the usual
    placement."""
    from lora_booth.models.families.quantize import move_frozen_

    encoders = family.text_encoders().values()
    for encoder in encoders:
        move_frozen_(encoder, "cpu")
    family.move_denoiser(family.device)
    yield
    family.move_denoiser("cpu")
    for encoder in encoders:
        move_frozen_(encoder, family.device)
