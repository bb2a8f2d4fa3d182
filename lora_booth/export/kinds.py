"""One layer of an adapter file, whatever its kind: from the tensors stored for it to the update they mean.

Kinds and their tensors, in kohya's and LyCORIS' names (formulas: arXiv 2309.14859, sections 3 and A; LyCORIS 4.1):

| kind | tensors | change of the weight |
|---|---|---|
| LoRA | lora_down, lora_up, alpha | alpha / r * up @ down |
| Tucker | the same and lora_mid `[r, r, k, k]` | alpha / r * up x mid x down |
| DoRA | as LoRA, and dora_scale `[out, 1]` | rows of W + change rescaled to it |
| LoHa | hada_w1_a, _w1_b, _w2_a, _w2_b; _t1, _t2 | alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b), entrywise |
| LoKr | lokr_w1 or _w1_a, _w1_b; lokr_w2 or _w2_a, _w2_b; _t2 | alpha / r * kron(w1, w2); 1 if neither is factored |
| full | diff | the tensor itself |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_booth.adapter.weights import AnyWeights, Dense, LowRank, trimmed
from lora_booth.errors import ModelError

ALIASES = {
    "lora_down": "lora_down",
    "lora_up": "lora_up",
    "lora_mid": "lora_mid",
    "lora_A": "lora_down",
    "lora_B": "lora_up",
    "lora.down": "lora_down",
    "lora.up": "lora_up",
    "_lora.down": "lora_down",
    "_lora.up": "lora_up",
    "lora_linear_layer.down": "lora_down",
    "lora_linear_layer.up": "lora_up",
    "lora_magnitude_vector": "dora_scale",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "scale": "scale",
    "diff": "diff",
} | {
    name: name
    for name in (
        *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    )
}
"""Every leaf of a key, without ".weight", to the one word for it here."""
MAX_LAYER_NUMBERS = 1 << 26
"""A layer that multiplies out to more is refused; the largest of SDXL has 2^24.8."""


def leaf_of(text: str) -> str | None:
    """The word of ALIASES for the last part of a key, None for an unknown one."""
    return ALIASES.get(text.removesuffix(".weight"))


def gather(
    tensors: Mapping[str, Tensor],
    split_key: Callable[[str], tuple[str, str, str]],
    scale_of: Callable[[str, str, int], float | None] = lambda component, path, rank: None,
) -> tuple[AnyWeights, list[str]]:
    """The adapter in a file's tensors, and what is wrong with it, one sentence for each fault.

    `split_key`: a key to component, module path and leaf. `scale_of`: component, module path and rank to the scale that
    the file's header gives, None for the tensors' own. Layers with a fault are left out.
    """
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    faults = []
    for key, tensor in tensors.items():
        try:
            component, path, leaf = split_key(key)
        except ModelError as error:
            faults.append(str(error))
            continue
        leaves = parts.setdefault((component, path), {})
        if leaf in leaves:
            faults.append(f"The adapter file holds {component}.{path} twice, under two names; the second is {key}.")
        leaves[leaf] = tensor
    weights: AnyWeights = {}
    for (component, path), leaves in parts.items():
        try:
            down = leaves.get("lora_down")
            scale = None if down is None or not down.ndim else scale_of(component, path, down.shape[0])
            weights.setdefault(component, {})[path] = update_of(f"{component}.{path}", leaves, scale)
        except ModelError as error:
            faults.append(str(error))
    return {component: layers for component, layers in weights.items() if layers}, faults


def strictly(weights: AnyWeights, faults: Sequence[str]) -> AnyWeights:
    """`weights`, or ModelError with the first of `faults` and their number."""
    if faults:
        more = f" ({len(faults) - 1} more such faults.)" if len(faults) > 1 else ""
        raise ModelError(faults[0] + more)
    return weights


def update_of(name: str, leaves: Mapping[str, Tensor], scale: float | None = None) -> LowRank | Dense:
    """The update that the tensors of layer `name` mean, float32; keys of `leaves` are words of ALIASES.

    `scale`: known from the header; else alpha / rank, and 1 where there is no alpha, as all programs do.
    Raises ModelError for missing parts, shapes that do not fit each other, and sizes no Stable Diffusion layer has.
    """
    parts = {leaf: tensor.float() for leaf, tensor in leaves.items()}
    if "hada_w1_a" in parts:
        return _loha(name, parts, scale)
    if any(leaf.startswith("lokr_") for leaf in parts):
        return _lokr(name, parts, scale)
    if "diff" in parts:
        _require(name, parts, {"diff"})
        return Dense("diff", parts["diff"])
    return _lora(name, parts, scale)


def _lora(name: str, parts: Mapping[str, Tensor], scale: float | None) -> LowRank | Dense:
    _require(name, parts, {"lora_down", "lora_up"}, {"lora_mid", "dora_scale"})
    down, up = parts["lora_down"], parts["lora_up"]
    if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != down.shape[0] or 0 in (*down.shape, *up.shape):
        raise ModelError(f"The shapes {list(down.shape)} and {list(up.shape)} of {name} do not multiply.")
    if up[0, 0].numel() != 1:
        raise ModelError(
            f"{name} has an up factor of shape {list(up.shape)}; expected [out, rank] or [out, rank, 1, 1]."
        )
    rank = down.shape[0]
    scale = _scale(name, parts, rank) if scale is None else scale
    if "lora_mid" in parts:
        return _tucker(name, parts, scale)
    magnitude = parts.get("dora_scale")
    if magnitude is None:
        return trimmed(LowRank(down, up, scale))
    out, fan_in = up.shape[0], down.shape[1]
    if magnitude.numel() != out or (magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] != out):
        kind = "over the inputs, which only older LyCORIS files have, is" if magnitude.numel() == fan_in else "is"
        raise ModelError(f"{name} has {magnitude.numel()} magnitudes, expected {out}; DoRA {kind} not read.")
    if magnitude.ndim > 1 and out == fan_in and magnitude.shape[0] == 1 and down.ndim == 2:
        raise ModelError(f"{name} is DoRA over the inputs, which only older LyCORIS files have; it is not read.")
    return trimmed(LowRank(down, up, scale, magnitude.reshape(-1)))


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
    optional = {leaf for leaf in parts if leaf.startswith("lokr_")}
    _require(name, parts, set(), optional)
    try:
        rank = next((parts[leaf].shape[0] for leaf in ("lokr_w1_b", "lokr_w2_b") if leaf in parts), None)
        first, second = _kron_side(parts, "1"), _kron_side(parts, "2")
        if first.ndim != 2 or second.ndim not in (2, 4):
            raise ValueError(f"{list(first.shape)} and {list(second.shape)}")
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise ModelError(f"The LoKr factors of {name} do not fit each other ({error}); the file is damaged.") from error
    _bound(name, first.numel() * second.numel())
    if scale is None:
        scale = 1.0 if rank is None else _scale(name, parts, rank)
    wide = first.reshape(*first.shape, *(1,) * (second.ndim - 2))
    shape = tuple(a * b for a, b in zip(wide.shape, second.shape, strict=True))
    return Dense("lokr", lambda: scale * torch.kron(wide, second), rank, (first, second), shape)


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
    if a.ndim != 2 or b.ndim != 2 or 0 in (*a.shape, *b.shape) or (core is None and a.shape[1] != b.shape[0]):
        raise ModelError(f"The factors {list(a.shape)} and {list(b.shape)} of {name} do not multiply.")
    if core is None:
        half = _Half((a, b), (a.shape[0], b.shape[1]))
    else:
        if core.ndim != 4 or core.shape[:2] != (a.shape[0], b.shape[0]) or 0 in core.shape:
            raise ModelError(f"The core {list(core.shape)} of {name} does not fit its factors; the file is damaged.")
        half = _Half((a, b, core), (a.shape[1], b.shape[1], *core.shape[2:]))
    _bound(name, math.prod(half.shape))
    return half


def _kron_side(parts: Mapping[str, Tensor], side: str) -> Tensor:
    """w1 or w2 of LoKr, whole or from its factors."""
    if f"lokr_w{side}" in parts:
        return parts[f"lokr_w{side}"]
    a, b, core = parts[f"lokr_w{side}_a"], parts[f"lokr_w{side}_b"], parts.get(f"lokr_t{side}")
    if core is not None:
        _bound("lokr_t", a.shape[-1] * b.shape[-1] * core[0, 0].numel())
        return _core(core, a, b)
    _bound(f"lokr_w{side}", a.shape[0] * b[0].numel())
    return (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])


def _core(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`core` `[i, j, k, k]`, `a` `[i, out]`, `b` `[j, in]` to `[out, in, k, k]`."""
    return torch.einsum("ijkl,io,jn->onkl", core, a, b)


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


def _require(name: str, parts: Mapping[str, Tensor], needed: Set[str], optional: Set[str] = frozenset()) -> None:
    """Raise ModelError unless `parts` has everything `needed` and nothing beyond it, `optional` and the scale."""
    if not needed <= parts.keys():
        raise ModelError(f"The adapter file has only {', '.join(sorted(parts))} of {name}; it is damaged or cut off.")
    extra = parts.keys() - needed - optional - {"alpha", "scale"}
    if extra:
        raise ModelError(f"{name} has {', '.join(sorted(extra))} besides {', '.join(sorted(needed))}; no kind is so.")


def _bound(name: str, count: int) -> None:
    if count > MAX_LAYER_NUMBERS:
        raise ModelError(f"{name} multiplies out to {count} numbers, more than any Stable Diffusion layer has.")
