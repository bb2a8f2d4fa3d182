"""The diffusers file: for `pipe.load_lora_weights`, and to continue from.

Keys: `<component>.<module>.lora_A.weight` and `.lora_B.weight`, for DoRA also `.lora_magnitude_vector`.

The scale is multiplied into lora_B, and layers of a component are padded with zeros to one rank, so that the tensors
alone say everything: B @ A is the update. The alternative, diffusers' `lora_adapter_metadata` in the header, is ignored
before diffusers 0.34 (so alpha != rank loads at the wrong strength, silently), fails with a TypeError when an older
peft lacks one of its fields, and names text-encoder layers as one version of transformers does. Mixed ranks without it
load right only since 0.42, hence the padding. Reading takes files with that metadata too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_booth.adapter.weights import AdapterWeights, LowRank, cast, padded, plain_path, require_finite
from lora_booth.errors import ModelError
from lora_booth.models.bases.architectures import is_text

_METADATA = "lora_adapter_metadata"
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq")
"""Values of PEFT's init_lora_weights that also change the base's weights, so that the tensors alone say nothing."""


def to_tensors(weights: AdapterWeights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the file in `dtype`.

    Raises ModelError for DoRA over the inputs, which PEFT has not, and when a value is too large for `dtype`,
    NumericError when one is not finite.
    """
    require_finite(weights)
    for component, layers in weights.items():
        for path, low_rank in layers.items():
            if low_rank.over_inputs:
                raise ModelError(
                    f"{component}.{path} is DoRA over the inputs, as LyCORIS and OneTrainer write it, which diffusers "
                    "and PEFT cannot compute: `lora-booth merge --base` merges it into the base, `lora-booth resize "
                    "--base` makes a plain LoRA of it."
                )
    return cast(unrounded(weights), dtype)


def unrounded(weights: AdapterWeights) -> dict[str, Tensor]:
    """The file's tensors in float32."""
    tensors = {}
    for component, layers in weights.items():
        rank = max((low_rank.rank for low_rank in layers.values()), default=0)
        for path, low_rank in layers.items():
            low = padded(low_rank, rank)
            lies_above = not is_text(component) or path == "text_projection"
            name = f"{component}.{path}" if lies_above else f"{component}.text_model.{path}"
            tensors[f"{name}.lora_A.weight"] = low.down.float()
            tensors[f"{name}.lora_B.weight"] = (low.up.double() * low.scale).float()
            if low.magnitude is not None:
                tensors[_magnitude_key(component, name)] = low.magnitude.float().reshape(_magnitude_shape(low))
    return tensors


def scale_from(metadata: Mapping[str, str]) -> Callable[[str, str, int | None], float | None]:
    """A function (component, module path, rank) to the scale that the header gives, None where it gives none.

    Raises ModelError for a header that is broken or says that the base was changed too.
    """
    settings = _settings(metadata)
    for own in settings.values():
        start = own.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGED_BASES):
            raise ModelError(
                f"The adapter was begun with init_lora_weights = {start}, which changed its base too, so it fits no "
                "other; save it again with PEFT's path_initial_model_for_weight_conversion."
            )

    def scale_of(component: str, path: str, rank: int | None) -> float | None:
        own = settings.get(component)
        return _scale(f"{component}.{path}", rank, own) if own else None

    return scale_of


def peft_metadata(fields: Mapping[str, Any]) -> dict[str, str]:
    """The fields of PEFT's adapter_config.json as the header that `scale_from` takes, for UNet and text encoder
    alike."""
    collated = {f"{component}.{key}": value for component in ("unet", "text_encoder") for key, value in fields.items()}
    return {_METADATA: json.dumps(collated)}


def _magnitude_key(component: str, name: str) -> str:
    """UNet: peft's own saved name. Text encoder: the parameter's name, as transformers' `load_adapter` silently keeps
    the initial magnitudes when it meets peft's."""
    return f"{name}.lora_magnitude_vector" + (".weight" if is_text(component) else "")


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


def _scale(name: str, rank: int | None, settings: Mapping[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank), as PEFT resolves its patterns.

    LoHa and LoKr call it `alpha`, and divide by the rank of the settings even where LoKr has no factors of that rank.
    """
    path = name.partition(".")[2]
    try:
        is_lora = "lora_alpha" in settings
        alpha = _resolved(path, settings["lora_alpha" if is_lora else "alpha"], settings.get("alpha_pattern"))
        if not is_lora or rank is None:
            rank = int(_resolved(path, settings["r"], settings.get("rank_pattern")))
        scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        if not math.isfinite(scale):
            raise ValueError(f"the scale is {scale}")
        return scale
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"The file's {_METADATA} gives no alpha for {name}: {why}; save it again.") from error


def _resolved(path: str, default: Any, patterns: Any) -> float:
    """The number for a layer: that of the first pattern which is its path or the path's end, else the default."""
    for pattern, value in dict(patterns or {}).items():
        ending = plain_path(pattern.removeprefix("^").replace("\\.", "."))
        if not re.fullmatch(r"[\w.-]+", ending):  # a regex out of a file could run for ever
            raise ValueError(f'the alpha_pattern or rank_pattern "{pattern}" is no plain name')
        if path == ending or path.endswith("." + ending):
            return float(value)
    return float(default)
