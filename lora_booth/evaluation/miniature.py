"""The miniature's own image and text towers, which know its icons; they ship with it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_booth.errors import ModelError
from lora_booth.models.bases.sources import EMBEDDED
from lora_booth.run import disk, imports
from lora_booth.run.versions import VERSION

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_booth.evaluation.features import Tower

NAME = "miniature"
SIDE_PX = 64


def miniature(device: torch.device) -> Tower:
    """The encoder: two towers in float32, whose text half is the base's own text encoder and stored there alone.

    Raises ModelError where the package lacks a file of it.
    """
    import torch

    from lora_booth.evaluation.features import Tower, pooled, record_of
    from lora_booth.models.families.prompts import Tokens
    from lora_booth.run import safetensors

    with imports.sparing():
        from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    files = [EMBEDDED / part / "model.safetensors" for part in ("evaluator", "text_encoder")]
    config = EMBEDDED / "evaluator" / "config.json"
    for path in (*files, config):
        if not path.is_file():
            raise ModelError(f"the miniature's encoder lacks {path}; install lora-booth again.")
    own, text = map(safetensors.read, files)
    text = {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in text.items()}
    clip: Any = CLIPModel(CLIPConfig.from_pretrained(config.parent))
    clip.load_state_dict({**own, **text})
    clip = clip.eval().to(device, torch.float32)
    tokens = Tokens(
        CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer"), clip.config.text_config.max_position_embeddings
    )
    processor = CLIPImageProcessorPil(
        size={"height": SIDE_PX, "width": SIDE_PX}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )

    def images(pixels: Tensor) -> Tensor:
        return pooled(clip.get_image_features(pixel_values=pixels))

    def texts(prompts: Sequence[str]) -> Tensor:
        return pooled(clip.get_text_features(input_ids=tokens.ids(prompts).to(device)))

    digest = hashlib.sha256("".join(map(disk.sha256, (*files, config))).encode()).hexdigest()
    return Tower(record_of(NAME, VERSION, digest, processor, "projection"), processor, images, texts, device)
