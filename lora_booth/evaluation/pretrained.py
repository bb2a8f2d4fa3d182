"""Encoders that transformers knows, from a folder or the hub: DINO, CLIP, SigLIP.

Only safetensors weights are read, and no code that a repository brings is ever run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_booth.config import inputs
from lora_booth.errors import LoraBoothError, ModelError, lacks_memory
from lora_booth.evaluation.features import Tower, pooled, record_of
from lora_booth.models.bases import encoders
from lora_booth.models.families.components import quiet
from lora_booth.models.families.prompts import Tokens
from lora_booth.run import disk, imports

with imports.sparing():
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

WITH_TEXTS = ("clip", "siglip", "siglip2")
"""Kinds whose texts lie in the space of their pictures, and are encoded without a mask, padded to the window."""


def pretrained(name: str, device: torch.device) -> Tower:
    """The encoder that `name` means: a folder, or a hub id, "owner/name" or "owner/name@revision", that is downloaded.

    Features are the projections of a model that has texts too, as CLIP; else the class token of the last layer, as DINO
    is used (arXiv 2208.12242, section 4.2), or the mean over places where there is none.
    Raises ModelError for what is no encoder, has only pickles, asks for code of its own, lacks weights or is damaged.
    """
    found = encoders.resolve(name)
    with _told_plainly(name), quiet():
        processor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            found.path, local_files_only=True, backend="pil"
        )
        model, told = AutoModel.from_pretrained(
            found.path, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        _require_whole(name, told)
        model = model.eval().to(device)
        kind = model.config.model_type
        tokens = _tokens(found.path, model) if kind in WITH_TEXTS and hasattr(model, "get_text_features") else None
    pooling = "projection" if hasattr(model, "get_image_features") else "class token or mean"

    def images(pixels: Tensor) -> Tensor:
        with _told_plainly(name):
            if pooling == "projection":
                return pooled(model.get_image_features(pixel_values=pixels))
            hidden: Tensor = model(pixel_values=pixels).last_hidden_state
            return hidden[:, 0] if hidden.ndim == 3 else hidden.mean(dim=(2, 3))

    def texts(prompts: Sequence[str]) -> Tensor:
        assert tokens is not None, "only called where there are texts"
        return pooled(model.get_text_features(input_ids=tokens.ids(prompts).to(device)))

    digest = disk.sha256(found.path / encoders.WEIGHTS)
    record = record_of(found.repository or found.path.name, found.revision, digest, processor, pooling)
    return Tower(record, processor, images, None if tokens is None else texts, device)


def _tokens(folder: Path, model: Any) -> Tokens:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Tokens(tokenizer, model.config.text_config.max_position_embeddings)


def _require_whole(name: str, told: dict[str, Any]) -> None:
    """Raises ModelError where the file lacks weights, which transformers would draw at random; a pooler is not used."""
    missing = sorted(key for key in told["missing_keys"] if "pooler." not in key)
    if missing:
        raise ModelError(
            f'--encoder "{inputs.shown(name)}" lacks {len(missing)} weights of its model, first {missing[0]}; copy or '
            "download it again."
        )


@contextmanager
def _told_plainly(name: str) -> Iterator[None]:
    """What transformers raises on odd files, dozens of kinds, as one ModelError."""
    try:
        yield
    except LoraBoothError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise ModelError(
            f'--encoder "{inputs.shown(name)}" cannot be used as an encoder of pictures ({inputs.reason(error)}); '
            "name one of CLIP, SigLIP or DINO, copy it again if it is one, or leave --encoder out."
        ) from error
