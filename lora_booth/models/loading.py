"""From the name of a base to its facts, or to its loaded family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
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
    base = identify.identify(found.path, has_weights=needs_weights or sources.is_local(config))
    return replace(base, repository=found.repository, revision=found.revision)


def load(
    config: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    base: identify.BaseFacts | None = None,
    needs_vae: bool = True,
    is_denoiser_offloaded: bool = False,
) -> Family:
    """The base of `config`, frozen, on `device`: VAE in float32, the rest in `dtype`. `base`: its facts, if known: a
    name on the hub may mean another commit when it is asked for again.

    Parts that are not needed are not read; calling for them then is an assertion error. A base with all its parts has
    computed one tiny sample before it is returned, so that a damaged one is told here and not in the middle of a run.
    `is_denoiser_offloaded`: the denoiser is left in main memory, and was never on the device beside the text encoders.
    """
    import torch

    from lora_booth.models.families.components import Wanted, load_components, readable

    base = base or facts(config)
    quantization = None if config.quantize == "none" else config.quantize
    wanted = Wanted(torch.device(device), dtype, needs_vae, quantization, is_denoiser_offloaded)
    family = around(base, load_components(base, wanted))
    family.fingerprint = sources.fingerprint(base.path)
    if quantization is not None:
        family.fingerprint += f" in {quantization}"  # its embeddings and pictures are not those of the plain base
    if needs_vae:
        with readable(base.path):
            _require_finite_sample(family, base, is_denoiser_offloaded=is_denoiser_offloaded)
    return family


def around(base: identify.BaseFacts, parts: Components) -> Family:
    """The family of `base`, made of `parts`; without a fingerprint, since nothing of its weights is read."""
    module, _, name = base.architecture.family.partition(":")
    family: Family = getattr(import_module(module), name)(base, parts)
    return family


def _require_finite_sample(family: Family, base: identify.BaseFacts, *, is_denoiser_offloaded: bool) -> None:
    """Raises ModelError when a grey picture of the smallest size does not go through every part as finite numbers."""
    import torch

    side = family.bucket_step
    with torch.no_grad():
        mean, std = family.encode_images(torch.zeros(1, 3, side, side))
        prompt = family.encode_prompts(["a dog"])
        geometry = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=mean.device)
        timesteps = family.schedule.timesteps_at([0.5]).to(mean.device)
        pixels = family.decode_latents(mean)
        with _in_turn(family) if is_denoiser_offloaded else nullcontext():
            output = family.predict(mean, timesteps, prompt, geometry)
    texts = [("text encoder", tensor) for tensor in prompt.values()]
    for what, tensor in (
        ("vae", mean),
        ("vae", std),
        ("vae", pixels),
        *texts,
        (base.architecture.denoiser, output),
    ):
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
