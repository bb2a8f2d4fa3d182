"""Pictures and texts as unit vectors, and what must be alike for two to be compared.

What lives here: the contract of an encoder, and one body for all of them. What does not: which encoders there are
(`encoders.py`) and where their weights come from (`miniature.py`, `efficientnet.py`, `pretrained.py`).

Words: an *encoder* is a network with the *preprocessing* of its pictures; preprocessing alone moves figures of DINO by
.02, so it counts as much as weights do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from lora_booth.errors import NumericError
from lora_booth.run.versions import installed

PICTURES_AT_ONCE = 8


@dataclass(frozen=True)
class Record:
    """Which encoder a figure comes from. `revision`: commit or package version, None for a folder; the digests are
    SHA-256 of the weights and of the preprocessing with the pooling, in hex."""

    name: str
    revision: str | None
    weights_sha256: str
    preprocessing_sha256: str
    versions: dict[str, str]

    def is_comparable(self, other: Record) -> bool:
        """Whether figures of both may be compared: same weights and same preprocessing, whatever they are called."""
        own, others = ((record.weights_sha256, record.preprocessing_sha256) for record in (self, other))
        return own == others


class Encoder(Protocol):
    """Pictures, and with some encoders texts, as features that can be compared by their cosine."""

    @property
    def record(self) -> Record:
        """Which encoder it is."""
        ...

    def embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors `[N, D]`, float32 on the CPU. Raises NumericError where they are not finite."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor | None:
        """Unit vectors `[N, D]` in the space of the pictures; None where the encoder knows no texts."""
        ...


@dataclass(frozen=True)
class Tower:
    """An encoder of an image processor of transformers, and functions of pixels and of texts to features `[B, D]`."""

    record: Record
    processor: Any
    images: Callable[[Tensor], Tensor]
    texts: Callable[[Sequence[str]], Tensor] | None
    device: torch.device

    @torch.no_grad()
    def embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """As the protocol says."""
        rows = []
        for start in range(0, len(pictures), PICTURES_AT_ONCE):
            some = [picture.convert("RGB") for picture in pictures[start : start + PICTURES_AT_ONCE]]
            pixels = self.processor(images=some, return_tensors="pt")["pixel_values"]
            rows.append(self.images(pixels.to(self.device)).float().cpu())
        return self._unit(torch.cat(rows))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor | None:
        """As the protocol says; in lower case, which CLIP's tokenizer makes of every text and SigLIP 2 was trained
        on."""
        if self.texts is None:
            return None
        return self._unit(self.texts([text.lower() for text in texts]).float().cpu())

    def _unit(self, rows: Tensor) -> Tensor:
        if not torch.isfinite(rows).all():
            raise NumericError(
                f"the encoder {self.record.name} computes NaN or infinity; its weights are damaged: fetch them again, "
                "or choose another --encoder."
            )
        return normalize(rows, dim=-1)


def record_of(name: str, revision: str | None, weights_sha256: str, processor: Any, pooling: str) -> Record:
    """The record of an encoder whose pictures `processor` prepares and whose features are pooled as `pooling` says."""
    settings: Mapping[str, Any] = {**processor.to_dict(), "pooling": pooling}
    text = json.dumps(settings, sort_keys=True, default=str)
    versions = {package: installed(package) or "?" for package in ("torch", "transformers", "pillow")}
    return Record(name, revision, weights_sha256, hashlib.sha256(text.encode()).hexdigest(), versions)


def pooled(output: Any) -> Tensor:
    """The features in what a tower of transformers returns: it is itself a tensor in some versions."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
