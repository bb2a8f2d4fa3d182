"""From the tensors of one layer in a file to the update they mean, for every kind.

Kinds and their tensors, in kohya's and LyCORIS' names (formulas: arXiv 2309.14859, sections 3 and A; LyCORIS 4.1):

| kind | tensors | change of the weight |
|---|---|---|
| LoRA | lora_down, lora_up, alpha | alpha / r * up @ down |
| Tucker | the same and lora_mid `[r, r, k, k]` | alpha / r * up x mid x down |
| LoHa | hada_w1_a, _w1_b, _w2_a, _w2_b; _t1, _t2 | alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b), entrywise |
| LoKr | lokr_w1 or _w1_a, _w1_b; lokr_w2 or _w2_a, _w2_b; _t2 | alpha / r * kron(w1, w2); 1 if neither is factored |
| DoRA | as one of these, and dora_scale `[out, 1]` or `[1, in]`, or PEFT's magnitudes | W + change, rescaled to it |
| full | diff | the tensor itself |
| norm | w_norm, b_norm of a normalisation | the tensor itself |
| bias | diff_b | the tensor itself, of the bias |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_booth.adapter.files.keys import BIASES, is_norm
from lora_booth.adapter.weights import Dense, LowRank, trimmed, weight_shape
from lora_booth.errors import ModelError

MAX_LAYER_NUMBERS = 1 << 26
"""A layer that multiplies out to more is refused; the largest of SDXL has 2^24.8."""
KERNELS = {"conv1": 3, "conv2": 3, "conv": 3, "conv_in": 3, "conv_out": 3, "conv_shortcut": 1}
"""Last part of a module path to the side of the convolution's kernel, in every Stable Diffusion UNet."""
_SCALES = {"alpha", "scale"}
_DORA = {"dora_scale", "magnitude"}


def update_of(
    name: str, leaves: Mapping[str, Tensor], scale: float | None = None, *, flat_axis: int | None = None
) -> LowRank | Dense:
    """The update that the tensors of layer `name` mean, float32; keys of `leaves` are words of ALIASES.

    `scale`: known from the header; else alpha / rank, and 1 where there is no alpha, as all programs do. `flat_axis`:
    0 (outputs) or 1 (inputs), which a dora_scale of one dimension runs along where the layer has as many of both.
    Raises ModelError for missing parts, shapes that do not fit each other, and sizes no Stable Diffusion layer has.
    """
    empty = next((leaf for leaf, tensor in leaves.items() if not tensor.numel()), None)
    if empty is not None:
        raise ModelError(f"{name} has a {empty} of shape {list(leaves[empty].shape)}, which holds no numbers.")
    parts = {leaf: tensor.float() for leaf, tensor in leaves.items()}
    if parts.keys() & {"diff", "w_norm", *BIASES}:
        return _whole(name, parts)
    plain = {leaf: tensor for leaf, tensor in parts.items() if leaf not in _DORA}
    if "hada_w1_a" in parts:
        update: LowRank | Dense = _loha(name, plain, scale)
    elif any(leaf.startswith("lokr_") for leaf in parts):
        update = _lokr(name, plain, scale)
    else:
        update = _lora(name, plain, scale)
    update = _unflattened(update, KERNELS.get(name.rpartition(".")[2], 0))
    return update if plain.keys() == parts.keys() else _decomposed(name, update, parts, flat_axis)


def rank_of(leaves: Mapping[str, Tensor]) -> int | None:
    """The rank that the tensors of a layer tell; None where none of them has one."""
    for leaf in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if leaf in leaves and leaves[leaf].ndim:
            return leaves[leaf].shape[0]
    return None


def flat_axis_of(leaves: Mapping[str, Tensor]) -> int | None:
    """The axis that a dora_scale of one dimension must run along, 0 or 1; None where the layer does not tell."""
    scale = leaves.get("dora_scale")
    if scale is None or scale.ndim != 1:
        return None
    try:
        update = update_of("", {leaf: tensor for leaf, tensor in leaves.items() if leaf not in _DORA})
    except ModelError:
        return None
    axes = _axes(update, scale.numel())
    return axes.pop() if len(axes) == 1 else None


def _whole(name: str, parts: Mapping[str, Tensor]) -> Dense:
    """A change that is stored as it is: of a weight, of a normalisation, of a bias."""
    leaf = next(iter(parts.keys() & {"diff", "w_norm", *BIASES}))
    _require(name, parts, {leaf}, scales={"alpha"})  # which no program multiplies it by
    change, is_vector = parts[leaf], leaf != "diff" or is_norm(name)
    if change.ndim not in ((1,) if is_vector else (2, 4)):
        raise ModelError(
            f"{name} has a {leaf} of shape {list(change.shape)}; expected {'[out]' if is_vector else '[out, in, …]'}."
        )
    if leaf in ("w_norm", "b_norm") and not is_norm(name):
        raise ModelError(f"{name} has a {leaf}, but is no normalisation; the file is damaged.")
    if not is_vector:
        _bound(name, change.numel())
        return Dense("diff", change)
    return Dense("norm" if is_norm(name) else "bias", change)


def _unflattened(update: LowRank | Dense, side: int) -> LowRank | Dense:
    """`update` in the shape of a convolution with a square kernel; LoHa and LoKr store it as `[out, in * side * side]`.

    `side`: 0 where the layer is none. What cannot be one is left as it is.
    """
    shape = weight_shape(update)
    if not side or len(shape) != 2 or shape[1] % side**2:
        return update
    tail = (shape[1] // side**2, side, side)
    if isinstance(update, LowRank):
        return replace(update, down=update.down.reshape(-1, *tail), up=update.up[..., None, None])
    return replace(update, change=lambda: update.delta.reshape(shape[0], *tail), shape=(shape[0], *tail))


def _decomposed(
    name: str, update: LowRank | Dense, parts: Mapping[str, Tensor], flat_axis: int | None
) -> LowRank | Dense:
    """`update` with the magnitudes of DoRA."""
    if len(parts.keys() & _DORA) > 1:
        raise ModelError(f"{name} has a dora_scale and also PEFT's magnitudes; no kind is so.")
    magnitude = parts["magnitude"] if "magnitude" in parts else parts["dora_scale"]
    count, shape = magnitude.numel(), weight_shape(update)
    axes = _axes(update, count)
    if "magnitude" in parts:
        axis = 0  # PEFT knows no other, and gives a convolution's the shape [1, out, 1, 1]
    elif magnitude.ndim > 1:
        axis = int(magnitude.shape[0] == 1 and shape[0] != 1)  # LyCORIS keeps the other sides as ones
    elif len(axes) == 2 and flat_axis is None:
        raise ModelError(
            f"{name} has a dora_scale of one dimension and as many inputs as outputs, so nothing tells which of them "
            "it scales; save it as [out, 1] or [1, in]."
        )
    else:
        axis = flat_axis if len(axes) == 2 and flat_axis is not None else min(axes, default=0)
    if axis not in axes or count != max(magnitude.shape, default=1):
        what = "inputs" if axis else "outputs"
        raise ModelError(f"{name} has {count} magnitudes over the {what}, expected {shape[axis]}; the file is damaged.")
    return replace(update, magnitude=magnitude.reshape(-1), over_inputs=bool(axis))


def _axes(update: LowRank | Dense, count: int) -> set[int]:
    """The axes of the layer's weight, 0 for outputs and 1 for inputs, that `count` magnitudes can run along."""
    out, inputs = weight_shape(update)[:2]
    is_flat = isinstance(update, Dense) and len(weight_shape(update)) == 2  # perhaps inputs times a kernel
    is_over_inputs = count == inputs or (is_flat and inputs % count == 0)
    return {axis for axis, holds in enumerate((count == out, is_over_inputs)) if holds}


def _lora(name: str, parts: Mapping[str, Tensor], scale: float | None) -> LowRank | Dense:
    _require(name, parts, {"lora_down", "lora_up"}, {"lora_mid"})
    down, up = parts["lora_down"], parts["lora_up"]
    if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != down.shape[0]:
        raise ModelError(f"The shapes {list(down.shape)} and {list(up.shape)} of {name} do not multiply.")
    if up[0, 0].numel() != 1:
        raise ModelError(
            f"{name} has an up factor of shape {list(up.shape)}; expected [out, rank] or [out, rank, 1, 1]."
        )
    rank = down.shape[0]
    scale = _scale(name, parts, rank) if scale is None else scale
    if "lora_mid" in parts:
        return _tucker(name, parts, scale)
    return trimmed(LowRank(down, up, scale))


def _tucker(name: str, parts: Mapping[str, Tensor], scale: float) -> Dense:
    up, mid, down = parts["lora_up"].flatten(1), parts["lora_mid"], parts["lora_down"].flatten(1)
    rank = down.shape[0]
    if mid.ndim != 4 or mid.shape[:2] != (rank, rank) or parts["lora_down"][0, 0].numel() != 1:
        raise ModelError(f"{name} has a lora_mid of shape {list(mid.shape)}, expected [{rank}, {rank}, k, k].")
    _bound(name, up.shape[0] * down.shape[1] * mid[0, 0].numel())
    shape = (up.shape[0], down.shape[1], *mid.shape[2:])
    return Dense(
        "tucker", lambda: scale * torch.einsum("oi,ijkl,jn->onkl", up, mid, down), rank, (up, mid, down), shape
    )


def _loha(name: str, parts: Mapping[str, Tensor], scale: float | None) -> Dense:
    cores = {"hada_t1", "hada_t2"} & parts.keys()
    _require(name, parts, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, cores)
    first, second = (_half(name, parts, side) for side in "12")
    if first.shape != second.shape or len(cores) == 1:
        raise ModelError(f"The two halves of {name} have different shapes; the file is damaged.")
    rank = parts["hada_w1_b"].shape[0]
    scale = _scale(name, parts, rank) if scale is None else scale
    factors = (*first.factors, *second.factors)
    return Dense("loha", lambda: scale * first.product() * second.product(), rank, factors, first.shape)


def _lokr(name: str, parts: Mapping[str, Tensor], scale: float | None) -> Dense:
    _require(name, parts, set(), {leaf for leaf in parts if leaf.startswith("lokr_")})
    try:
        first, second = _kron_side(parts, "1"), _kron_side(parts, "2")
        if first.ndim != 2 or second.ndim not in (2, 4):
            raise ValueError(f"{list(first.shape)} and {list(second.shape)}")
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise ModelError(f"The LoKr factors of {name} do not fit each other ({error}); the file is damaged.") from error
    _bound(name, first.numel() * second.numel())
    if scale is None:
        scale = _lokr_scale(name, parts)
    wide = first.reshape(*first.shape, *(1,) * (second.ndim - 2))
    shape = tuple(a * b for a, b in zip(wide.shape, second.shape, strict=True))
    return Dense("lokr", lambda: scale * torch.kron(wide, second), rank_of(parts), (first, second), shape)


def _lokr_scale(name: str, parts: Mapping[str, Tensor]) -> float:
    """1 where no side is factored, as LyCORIS has it."""
    ranks = {parts[leaf].shape[0] for leaf in ("lokr_w1_b", "lokr_w2_b") if leaf in parts}
    if len(ranks) > 1 and "alpha" in parts:
        raise ModelError(f"The factors of {name} have ranks {sorted(ranks)}, so nothing tells what divides its alpha.")
    return _scale(name, parts, ranks.pop()) if ranks else 1.0


@dataclass(frozen=True)
class _Half:
    """One of LoHa's two low-rank factors of the change, not multiplied out."""

    factors: tuple[Tensor, ...]
    shape: tuple[int, ...]

    def product(self) -> Tensor:
        a, b, *core = self.factors
        return _core(core[0], a, b) if core else a @ b


def _half(name: str, parts: Mapping[str, Tensor], side: str) -> _Half:
    a, b, core = parts[f"hada_w{side}_a"], parts[f"hada_w{side}_b"], parts.get(f"hada_t{side}")
    if a.ndim != 2 or b.ndim != 2 or (core is None and a.shape[1] != b.shape[0]):
        raise ModelError(f"The factors {list(a.shape)} and {list(b.shape)} of {name} do not multiply.")
    if core is None:
        half = _Half((a, b), (a.shape[0], b.shape[1]))
    else:
        if core.ndim != 4 or core.shape[:2] != (a.shape[0], b.shape[0]):
            raise ModelError(f"The core {list(core.shape)} of {name} does not fit its factors; the file is damaged.")
        half = _Half((a, b, core), (a.shape[1], b.shape[1], *core.shape[2:]))
    _bound(name, math.prod(half.shape))
    return half


def _kron_side(parts: Mapping[str, Tensor], side: str) -> Tensor:
    """w1 or w2 of LoKr, whole or from its factors."""
    others = parts.keys() & {f"lokr_w{side}_a", f"lokr_w{side}_b", f"lokr_t{side}"}
    if f"lokr_w{side}" in parts:
        if others:
            raise ValueError(f"both lokr_w{side} and {min(others)}")
        return parts[f"lokr_w{side}"]
    a, b, core = parts[f"lokr_w{side}_a"], parts[f"lokr_w{side}_b"], parts.get(f"lokr_t{side}")
    if core is not None:
        if core.ndim != 4 or a.ndim != 2 or b.ndim != 2:
            raise ValueError(f"a core of {list(core.shape)}")
        _bound("lokr_t", a.shape[-1] * b.shape[-1] * core[0, 0].numel())
        return _core(core, a, b)
    _bound(f"lokr_w{side}", a.shape[0] * b[0].numel())
    return (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])


def _core(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`core` `[i, j, k, k]`, `a` `[i, out]`, `b` `[j, in]` to `[out, in, k, k]`."""
    return torch.einsum("ijkl,io,jn->onkl", core, a, b).contiguous()  # torch.kron takes no other


def _scale(name: str, parts: Mapping[str, Tensor], rank: int) -> float:
    """`scale` itself where a file has it; alpha / rank; 1 where it has neither."""
    for leaf in ("scale", "alpha"):
        if leaf in parts:
            if parts[leaf].numel() != 1:
                raise ModelError(f"{name}.{leaf} has {parts[leaf].numel()} numbers, expected one.")
            value = float(parts[leaf])
            if not math.isfinite(value):
                raise ModelError(f"{name}.{leaf} is {value}; the file is damaged.")
            return value if leaf == "scale" else value / rank
    return 1.0


def _require(
    name: str,
    parts: Mapping[str, Tensor],
    needed: Set[str],
    optional: Set[str] = frozenset(),
    scales: Set[str] = frozenset(_SCALES),
) -> None:
    """Raise ModelError unless `parts` has everything `needed` and nothing beyond it, `optional` and `scales`."""
    if not needed <= parts.keys():
        raise ModelError(f"The adapter file has only {', '.join(sorted(parts))} of {name}; it is damaged or cut off.")
    extra = parts.keys() - needed - optional - scales
    if extra:
        beside = ", ".join(sorted(parts.keys() - extra))
        raise ModelError(f"{name} has {', '.join(sorted(extra))} besides {beside}; no kind is so.")


def _bound(name: str, count: int) -> None:
    if count > MAX_LAYER_NUMBERS:
        raise ModelError(f"{name} multiplies out to {count} numbers, more than any Stable Diffusion layer has.")
