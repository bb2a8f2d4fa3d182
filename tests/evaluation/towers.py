"""Tiny encoders on disk, as transformers writes them: shapes of CLIP, DINO and DINOv2 with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from tests.support.tiny import write_tokenizer

SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE_PX, WINDOW = 32, 24


def tiny_clip(folder: Path) -> Path:
    """Both towers, tokenizer and image processor."""
    size = write_tokenizer(folder)
    text = {**SMALL, "vocab_size": size, "max_position_embeddings": WINDOW, "eos_token_id": size - 1}
    text |= {"bos_token_id": size - 2, "pad_token_id": size - 1}
    vision = {**SMALL, "image_size": SIDE_PX, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        transformers.CLIPModel(config).save_pretrained(folder)
    size_px = {"height": SIDE_PX, "width": SIDE_PX}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size=size_px).save_pretrained(folder)
    return folder


def tiny_dino(folder: Path, *, has_pooler: bool = False) -> Path:
    """As facebook/dino-vits16: a ViT whose file may lack the pooler that nobody uses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.ViTConfig(**SMALL, image_size=SIDE_PX, patch_size=8)
        transformers.ViTModel(config, add_pooling_layer=has_pooler).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX}).save_pretrained(folder)
    return folder


def plain(*colours: str) -> list[Image.Image]:
    """Pictures of one colour each."""
    return [Image.new("RGB", (40, 48), colour) for colour in colours]
