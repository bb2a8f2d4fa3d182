"""An adapter as plain numbers, free of PEFT and of any file format.

Exporting, merging and inspecting work on it.

Words: `down` is what PEFT calls lora_A, `up` what it calls lora_B. A *module path* here never begins with
`text_model.`: transformers 5.6 dropped that level from `CLIPTextModel` but not from `CLIPTextModelWithProjection`, so
it says nothing about the layer. `find_module` looks a path up in either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_booth.errors import ModelError, NumericError
from lora_booth.models.bases.architectures import is_text
from lora_booth.run.number_types import NAMES

_WORST_ROUNDING = 0.01
"""Relative error of a stored tensor that is worth a word; fp16 has 0.0003 and bf16 0.002 on ordinary weights."""


@dataclass(frozen=True)
class LowRank:
    """The update of one layer: delta W = scale * up @ down.

    `down`: `[r, in]`, for a convolution `[r, in, k, k]`. `up`: `[out, r]`, for a convolution `[out, r, 1, 1]`.
    `scale`: alpha / rank, or alpha / sqrt(rank) for rsLoRA; never folded into the factors here.
    `magnitude`: of a DoRA layer the norms of its rows, `[out]`, or with `over_inputs` of its columns, `[in]`.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None
    over_inputs: bool = False

    @property
    def rank(self) -> int:
        """Inner dimension of the factors."""
        return self.down.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of the update."""
        return (self.down, self.up) if self.magnitude is None else (self.down, self.up, self.magnitude)


@dataclass(frozen=True)
class Dense:
    """The update of one layer as one tensor in the shape of its weight: what foreign kinds come to when read.

    `kind`: "loha", "lokr", "tucker" or "diff", or of vectors "norm" (weight or bias of a normalisation) and "bias".
    `change`: the tensor, or what computes it from `factors` when asked, so that a file of factors never stands in
    memory multiplied out. `rank`: of the factors, None where there are none. `magnitude`, `over_inputs`: as in LowRank.
    """

    kind: str
    change: Tensor | Callable[[], Tensor]
    rank: int | None = None
    factors: tuple[Tensor, ...] = ()
    shape: tuple[int, ...] | None = None
    """Of delta, where `change` is computed."""
    magnitude: Tensor | None = None
    over_inputs: bool = False

    @property
    def delta(self) -> Tensor:
        """What is added to the weight."""
        return self.change if isinstance(self.change, Tensor) else self.change()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor stored of the update."""
        change = (self.change,) if isinstance(self.change, Tensor) else self.factors
        return change if self.magnitude is None else (*change, self.magnitude)


AdapterWeights = dict[str, dict[str, LowRank]]
"""Component ("unet", "text_encoder", "text_encoder_2") to module path in that component to its update."""

AnyWeights = dict[str, dict[str, LowRank | Dense]]
"""The same for files of every kind: what can be inspected, merged and turned into low rank, but not trained on. The
update of a bias lies under the layer's path and ".bias"."""

VECTORS = ("norm", "bias")
"""Kinds of Dense that no LoRA can hold, since they change vectors."""


def plain_path(name: str) -> str:
    """The module path of a layer that `named_modules()` calls `name`."""
    return name.removeprefix("text_model.")


def find_module(module: nn.Module, path: str) -> nn.Module:
    """The layer at a module path of an AdapterWeights. Raises ModelError when there is none."""
    for name in (path, f"text_model.{path}"):
        try:
            return module.get_submodule(name)
        except AttributeError:
            continue
    raise ModelError(
        f"{type(module).__name__} has no layer {path}; the adapter was trained on another model family. "
        "`lora-booth inspect` tells which."
    )


def delta(update: LowRank | Dense) -> Tensor:
    """What is added to the layer's weight, float32, in its shape: `[out, in]` or `[out, in, k, k]`.

    For a DoRA layer this is the low-rank part only: the merged weight is also rescaled to `magnitude`.
    """
    if isinstance(update, Dense):
        return update.delta.float()
    down, up = update.down.float(), update.up.float()
    product = up.flatten(1) @ down.flatten(1)
    return (update.scale * product).reshape(up.shape[0], *down.shape[1:])


def weight_change(weight: Tensor, update: LowRank | Dense) -> Tensor:
    """What the update adds to the layer's `weight` at strength 1, float32, in the weight's shape.

    Plain: delta. DoRA: W' - W, W' = magnitude * (W + delta) / |W + delta|, the norm over each output row (arXiv
    2402.09353, equation 5), or with `over_inputs` over each input column (LyCORIS, wd_on_out = False).
    Raises ModelError when the shapes do not fit, see `misfit`.
    """
    base = weight.float()
    if wrong := misfit(update, tuple(base.shape)):
        raise ModelError(f"an update of {wrong} does not fit a weight of {list(base.shape)}.")
    added = delta(update).reshape(base.shape)
    if update.magnitude is None:
        return added
    whole = base + added
    axis = 1 if update.over_inputs else 0
    norm = torch.linalg.vector_norm(whole, dim=[i for i in range(whole.ndim) if i != axis], keepdim=True)
    shape = [-1 if i == axis else 1 for i in range(whole.ndim)]
    tiny = torch.finfo(torch.float32).tiny  # a row of zeros stays one
    rescaled: Tensor = whole * (update.magnitude.float().reshape(shape) / norm.clamp_min(tiny))
    return rescaled - base


def misfit(update: LowRank | Dense, shape: tuple[int, ...]) -> str:
    """What does not fit a weight of `shape`: "shape [4, 4]" or "5 magnitudes"; "" when all fits.

    A 1x1 convolution's weight takes a linear update and the reverse, a convolution's also one that is flattened to
    `[out, in k k]`, as LoHa and LoKr store it.
    """
    change = weight_shape(update)
    is_flat = len(change) == 2 and len(shape) > 2 and change == (shape[0], math.prod(shape[1:]))
    if not is_flat and _without_ones(change) != _without_ones(shape):
        return f"shape {list(change)}"
    count = None if update.magnitude is None else update.magnitude.numel()
    if count is not None and count != shape[1 if update.over_inputs else 0]:
        return f"{count} magnitudes over the {'inputs' if update.over_inputs else 'outputs'}"
    return ""


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without the kernel of a 1x1 convolution."""
    return shape[:2] if shape[2:] and set(shape[2:]) == {1} else shape


def weight_shape(update: LowRank | Dense) -> tuple[int, ...]:
    """The shape of the update, which is that of the layer's weight up to the two ones of a 1x1 convolution."""
    if isinstance(update, LowRank):
        return (update.up.shape[0], *update.down.shape[1:])
    return update.shape or tuple(update.delta.shape)


def context_width(weights: AdapterWeights | AnyWeights) -> int | None:
    """Width of the text embeddings that the adapted cross-attention reads, which tells the families apart.

    None where no cross-attention key or value is adapted, or where they disagree.
    """
    layers = [item for component, of in weights.items() if not is_text(component) for item in of.items()]
    found = {weight_shape(update)[1] for path, update in layers if path.endswith(("attn2.to_k", "attn2.to_v"))}
    return found.pop() if len(found) == 1 else None


def norm_of(update: LowRank | Dense) -> float:
    """|delta|, the Frobenius norm; of a LowRank without multiplying it out: |U D|^2 = <U^T U, D D^T>."""
    if isinstance(update, Dense):
        return float(torch.linalg.vector_norm(update.delta.double()))
    up, down = update.up.double().flatten(1), update.down.double().flatten(1)
    square = float(((up.T @ up) * (down @ down.T)).sum())
    return abs(update.scale) * math.sqrt(max(square, 0.0))


def block_of(component: str, path: str) -> str:
    """The part of the model that a layer lies in: "down_blocks.1", "mid_block", "conv_in", "text_encoder"."""
    if is_text(component):
        return component
    first, _, rest = path.partition(".")
    return f"{first}.{rest.split('.')[0]}" if first in ("down_blocks", "up_blocks") else first


def num_parameters(weights: AdapterWeights | AnyWeights) -> int:
    """Count of stored numbers."""
    return sum(t.numel() for layers in weights.values() for update in layers.values() for t in update.tensors)


def uses_dora(weights: AdapterWeights | AnyWeights) -> bool:
    """True when any layer has a magnitude."""
    return any(update.magnitude is not None for layers in weights.values() for update in layers.values())


def require_finite(weights: AdapterWeights) -> None:
    """Raise NumericError when a trained adapter holds a NaN or an infinity."""
    broken = nonfinite(weights)
    if broken:
        raise NumericError(
            f"{len(broken)} layers of the adapter hold NaN or infinity, first {broken[0]}; use an earlier checkpoint."
        )


def nonfinite(weights: AdapterWeights | AnyWeights) -> list[str]:
    """`component.module` of every update that holds a NaN or an infinity."""
    return [
        f"{component}.{path}"
        for component, layers in weights.items()
        for path, low_rank in layers.items()
        if not all(bool(torch.isfinite(t).all()) for t in low_rank.tensors)
    ]


def padded(low_rank: LowRank, rank: int) -> LowRank:
    """The same update with zero rows in `down` and zero columns in `up` until it has `rank`."""
    extra = rank - low_rank.rank
    if extra <= 0:
        return low_rank
    down = torch.cat([low_rank.down, low_rank.down.new_zeros(extra, *low_rank.down.shape[1:])])
    up = torch.cat([low_rank.up, low_rank.up.new_zeros(low_rank.up.shape[0], extra, *low_rank.up.shape[2:])], dim=1)
    return replace(low_rank, down=down, up=up)


def trimmed(low_rank: LowRank) -> LowRank:
    """The same update without the inner dimensions that are zero in both factors, which only padding makes."""
    in_down = (low_rank.down.flatten(1) != 0).any(1)
    in_up = (low_rank.up.transpose(0, 1).flatten(1) != 0).any(1)
    in_use = in_down | in_up
    if in_use.all() or not in_use.any():
        return low_rank
    return replace(low_rank, down=low_rank.down[in_use], up=low_rank.up[:, in_use])


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """`tensors` as contiguous CPU tensors of `dtype`. Raises ModelError, naming the tensor, when a value is too big."""
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.detach().to("cpu", dtype).contiguous()
        if not torch.isfinite(result[name]).all():
            is_largest = dtype in (torch.float32, torch.bfloat16)  # both reach as far
            remedy = "lower its strength" if is_largest else "store it as fp32 (export.dtype, or --dtype fp32)"
            raise ModelError(
                f"{name} reaches {tensor.abs().max().item():.3g}, more than {NAMES.get(dtype, dtype)} holds "
                f"({torch.finfo(dtype).max:.5g}); {remedy}."
            )
    return result


def rounding_faults(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    """What storing float32 `tensors` as `dtype` would lose beyond ordinary rounding: one sentence, or none.

    Counts a tensor when a non-zero row becomes zero or when its relative error exceeds 1 %: both happen when values
    fall under fp16's smallest normal number, 6.1e-5.
    """
    lossy = []
    for name, tensor in tensors.items():
        rows = tensor.float().flatten(1) if tensor.ndim > 1 else tensor.float().reshape(1, -1)
        stored = rows.to(dtype).float()
        vanished = bool(((rows != 0).any(1) & (stored == 0).all(1)).any())
        if vanished or float((stored - rows).norm()) > _WORST_ROUNDING * float(rows.norm()):
            lossy.append(name)
    if not lossy:
        return []
    return [
        f"{len(lossy)} of {len(tensors)} tensors lose more than 1 % in {NAMES.get(dtype, dtype)}, first {lossy[0]}; "
        "store it as fp32 (export.dtype, or --dtype fp32)."
    ]
