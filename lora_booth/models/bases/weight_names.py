"""Which file, tensor and rows of a base hold the weight of a layer.

A diffusers folder has a tensor for each layer. A single-file checkpoint has the original names (`ldm.py` for the
UNet), and OpenCLIP's text encoder (SD 2, the second of SDXL) keeps q, k and v of an attention in one tensor.
Layers are named as in `adapter/weights.py`: component and module path without `text_model.`; in the files that level is
there or not, whichever transformers wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_booth.errors import ModelError
from lora_booth.models.bases.architectures import ARCHITECTURES
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.bases.ldm import original_name
from lora_booth.models.bases.sources import read_header, weight_stem

if TYPE_CHECKING:
    from torch import Tensor


_OPEN_CLIP_LAYERS = {
    "self_attn.q_proj": ("attn.in_proj_weight", 0),
    "self_attn.k_proj": ("attn.in_proj_weight", 1),
    "self_attn.v_proj": ("attn.in_proj_weight", 2),
    "self_attn.out_proj": ("attn.out_proj.weight", None),
    "mlp.fc1": ("mlp.c_fc.weight", None),
    "mlp.fc2": ("mlp.c_proj.weight", None),
    "layer_norm1": ("ln_1.weight", None),
    "layer_norm2": ("ln_2.weight", None),
}


@dataclass(frozen=True)
class Place:
    """The tensor that holds a layer's weight, and which part of it.

    `third`: 0, 1 or 2 for the first, second or last third of the rows, None for all. `is_transposed`: it has inputs in
    rows.
    """

    key: str
    third: int | None = None
    is_transposed: bool = False

    def part(self, tensor: Tensor) -> Tensor:
        """The layer's weight as a view of the stored `tensor`."""
        if self.third is not None:
            rows = tensor.shape[0] // 3
            tensor = tensor[self.third * rows : (self.third + 1) * rows]
        return tensor.T if self.is_transposed else tensor

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the layer's weight when the tensor's is `stored`."""
        if self.third is not None:
            stored = (stored[0] // 3, *stored[1:])
        return stored[::-1] if self.is_transposed else stored


def weight_sets(base: BaseFacts, component: str) -> list[dict[str, Path]]:
    """Tensor key to file, for each set of weights that holds the component: one in a single file, in a folder one for
    each variant (full, fp16, non_ema …), whose files may be shards.

    Raises ModelError when the base has no such component.
    """
    if component not in base.architecture.adaptable:
        raise ModelError(f"{base.path} is a {base.family} model, which has no {component}; use an adapter made for it.")
    if base.path.is_file():
        return [dict.fromkeys(read_header(base.path)[0], base.path)]
    pattern = rf"{weight_stem(component)}(?:\.(\w+))?(?:-\d{{5}}-of-\d{{5}})?(?:\.(\w+))?\.safetensors"
    sets: dict[str, dict[str, Path]] = {}
    for path in sorted((base.path / component).iterdir()):
        if match := re.fullmatch(pattern, path.name):
            sets.setdefault(match[1] or match[2] or "", {}).update(dict.fromkeys(read_header(path)[0], path))
    assert sets, f"{base.path} was identified, so {component} has weights"
    return list(sets.values())


def find(base: BaseFacts, component: str, path: str, keys: Container[str]) -> Place | None:
    """Where the weight of a layer lies in a file of `base` that has `keys`; None when it has no such layer.

    A path that ends in ".bias" is that of the layer's bias.
    """
    if path.endswith(".bias"):
        of_weight = find(base, component, path.removesuffix(".bias"), keys)
        bias = None if of_weight is None else _bias(of_weight)
        return bias if bias is not None and bias.key in keys else None
    places = _single_file_places(base.family, component, path) if base.path.is_file() else _plain(path)
    return next((place for place in places if place.key in keys), None)


def _bias(weight: Place) -> Place | None:
    """Where the bias of the layer with this `weight` lies, if it can have one."""
    stem = re.fullmatch(r"(.+[._])weight", weight.key)
    return Place(f"{stem[1]}bias", weight.third) if stem else None


def _plain(path: str, prefix: str = "") -> list[Place]:
    return [Place(f"{prefix}{level}{path}.weight") for level in ("text_model.", "")]


def _single_file_places(family: str, component: str, path: str) -> list[Place]:
    """Every place that a layer can have in a single file of the family."""
    row = ARCHITECTURES[family]
    prefix = row.single_file_prefixes[component]
    if component == row.denoiser:
        name = original_name(path)
        names = [name, re.sub(r"\.2\.conv$", ".1.conv", name)]  # an upsampler with and without attention before it
        return [Place(f"{prefix}{name}.weight") for name in names]
    if not prefix.endswith(".model."):
        return _plain(path, prefix)
    if path == "text_projection":
        return [Place(f"{prefix}text_projection", is_transposed=True)]
    if path == "final_layer_norm":
        return [Place(f"{prefix}ln_final.weight")]
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", path)
    if match is None or match[2] not in _OPEN_CLIP_LAYERS:
        return []
    leaf, third = _OPEN_CLIP_LAYERS[match[2]]
    return [Place(f"{prefix}transformer.resblocks.{match[1]}.{leaf}", third)]
