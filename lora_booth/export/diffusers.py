"""The diffusers file: what `pipe.load_lora_weights` takes, and what a later run or `generate` continues from.

Keys: `<component>.<module>.lora_A.weight` and `.lora_B.weight`, for DoRA also `.lora_magnitude_vector`.

The scale is multiplied into lora_B, and layers of a component are padded with zeros to one rank, so that the tensors
alone say everything: B @ A is the update. The alternative, diffusers' `lora_adapter_metadata` in the header, is ignored
before diffusers 0.34 (so alpha != rank loads at the wrong strength, silently), fails with a TypeError when an older
peft lacks one of its fields, and names text-encoder layers as one version of transformers does. Mixed ranks without it
load right only since 0.42, hence the padding. Reading takes files with that metadata too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_booth.adapter.weights import AdapterWeights, AnyWeights, LowRank, cast, padded, plain_path, require_finite
from lora_booth.errors import ModelError
from lora_booth.export.kinds import gather, leaf_of, strictly

_PEFT = "base_model.model"
_KEY = re.compile(
    rf"(unet|text_encoder|text_encoder_2|{re.escape(_PEFT)})\.(.+)"
    r"\.((?:lora_[AB]|lora_magnitude_vector|lora\.(?:up|down)|lora_linear_layer\.(?:up|down)|hada_\w+|lokr_\w+|alpha)"
    r"(?:\.weight)?)"
)
_OLD_KEY = re.compile(
    r"(unet|text_encoder|text_encoder_2)\.(.+\.processor\.to_(?:q|k|v|out))(_lora\.(?:up|down)\.weight)"
)
_METADATA = "lora_adapter_metadata"


def to_tensors(weights: AdapterWeights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the file in `dtype`.

    Raises ModelError when a value is too large for `dtype`, NumericError when one is not finite.
    """
    require_finite(weights)
    return cast(unrounded(weights), dtype)


def unrounded(weights: AdapterWeights) -> dict[str, Tensor]:
    """The file's tensors in float32."""
    tensors = {}
    for component, layers in weights.items():
        rank = max((low_rank.rank for low_rank in layers.values()), default=0)
        for path, low_rank in layers.items():
            low = padded(low_rank, rank)
            name = f"{component}.{path}" if component == "unet" else f"{component}.text_model.{path}"
            tensors[f"{name}.lora_A.weight"] = low.down.float()
            tensors[f"{name}.lora_B.weight"] = (low.up.double() * low.scale).float()
            if low.magnitude is not None:
                tensors[_magnitude_key(component, name)] = low.magnitude.float().reshape(_magnitude_shape(low))
    return tensors


def split_key(key: str) -> tuple[str, str, str]:
    """Component, module path and leaf (a word of `kinds.ALIASES`) of a key of diffusers, old or new, or of PEFT.

    Raises ModelError for other keys.
    """
    match = _KEY.fullmatch(key) or _OLD_KEY.fullmatch(key)
    leaf = leaf_of(match[3]) if match else None
    if match is None or leaf is None:
        raise ModelError(
            f"The adapter file holds {key}, which is no part of a LoRA in diffusers naming "
            "(<component>.<module>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector)."
        )
    component, path = match[1], plain_path(match[2]).replace(".processor.", ".")
    if component == _PEFT:  # PEFT's own file does not say whose layers these are
        component = "text_encoder" if path.startswith("encoder.layers") else "unet"
    return component, f"{path}.0" if path.endswith(".to_out") else path, leaf


def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> AnyWeights:
    """The adapter in a diffusers or PEFT file, float32; `metadata` is the file's header, read for alpha and patterns.

    Raises ModelError for foreign keys, missing halves and shapes that do not multiply.
    """
    return strictly(*gather(tensors, split_key, scale_from(metadata or {})))


def scale_from(metadata: Mapping[str, str]) -> Callable[[str, str, int], float | None]:
    """A function (component, module path, rank) to the scale that the header gives, None where it gives none."""
    settings = _settings(metadata)

    def scale_of(component: str, path: str, rank: int) -> float | None:
        own = settings.get(component)
        return _scale(f"{component}.{path}", rank, own) if own else None

    return scale_of


def peft_metadata(config: str) -> dict[str, str]:
    """The text of PEFT's adapter_config.json as the header that `scale_from` takes, for UNet and text encoder alike.

    Raises ModelError when it is no JSON object.
    """
    try:
        fields = json.loads(config)
        collated = {
            f"{component}.{key}": value for component in ("unet", "text_encoder") for key, value in fields.items()
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"adapter_config.json cannot be read ({error}); save the adapter again.") from error
    return {_METADATA: json.dumps(collated)}


def _magnitude_key(component: str, name: str) -> str:
    """UNet: peft's own saved name. Text encoder: the parameter's name, as transformers' `load_adapter` silently keeps
    the initial magnitudes when it meets peft's."""
    return f"{name}.lora_magnitude_vector" + ("" if component == "unet" else ".weight")


def _magnitude_shape(low_rank: LowRank) -> tuple[int, ...]:
    """PEFT's shape of the magnitudes: `[out]`, for a convolution `[1, out, 1, 1]`."""
    return (-1,) if low_rank.down.ndim == 2 else (1, -1, 1, 1)


def _settings(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Component to its LoraConfig fields, from diffusers' collated `<component>.<field>` JSON; empty without it."""
    if _METADATA not in metadata:
        return {}
    try:
        collated = json.loads(metadata[_METADATA])
        pairs = [(*key.split(".", 1), value) for key, value in collated.items()]
        return {component: {f: v for c, f, v in pairs if c == component} for component, _, _ in pairs}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"The file's {_METADATA} cannot be read ({error}); save the adapter again.") from error


def _scale(name: str, rank: int, settings: Mapping[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank), as PEFT resolves its patterns; 1 without settings."""
    if not settings:
        return 1.0
    path = name.partition(".")[2]
    try:
        alpha = float(settings["lora_alpha"])
        for pattern, value in dict(settings.get("alpha_pattern") or {}).items():
            ending = plain_path(pattern.removeprefix("^").replace("\\.", "."))
            if not re.fullmatch(r"[\w.-]+", ending):  # a regex out of a file could run for ever
                raise ValueError(f'the alpha_pattern "{pattern}" is no plain name')
            if path == ending or path.endswith("." + ending):
                alpha = float(value)
                break
        return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"The file's {_METADATA} gives no alpha for {name}: {error!r}; save it again.") from error
