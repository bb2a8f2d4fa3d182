"""Several adapters made one, layer by layer.

A layer that an adapter lacks counts as no change.

| method | the combined change of a layer | rank |
|---|---|---|
| concat | sum of strength * delta, exactly: the factors side by side | sum of ranks |
| svd | the same sum, its best form of the given rank | given |
| linear | product of the mean `down` and the mean `up`, weighted by strength; for adapters of one run only | as each |
| ties | small entries dropped, a sign elected, those of that sign averaged (arXiv 2306.01708), then SVD | given |
| dare_linear | random entries dropped, the rest scaled up (arXiv 2311.03099), summed, then SVD | given |
| dare_ties | random entries dropped, the rest scaled up, a sign elected, those of it averaged, then SVD | given |

The last three are PEFT's own functions (peft/utils/merge_utils.py), applied to deltas as in its `ties_svd` and so on.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_booth.adapter.decompose import Approximation, approximate
from lora_booth.adapter.weights import AdapterWeights, AnyWeights, Dense, LowRank, delta, uses_dora, weight_shape
from lora_booth.errors import ConfigError, ModelError
from lora_booth.run import imports

METHODS = ("concat", "svd", "linear", "ties", "dare_linear", "dare_ties")
WITH_RANK = ("svd", "ties", "dare_linear", "dare_ties")
"""Methods that end in a low-rank approximation, so that a rank can be given."""


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined.

    `rank`: of the result for WITH_RANK, None for the largest of the adapters' ranks. `density`: share of entries kept
    by ties and dare, in (0, 1]. `seed`: of dare's choice, which depends on it and the layer's name alone.
    """

    method: str = "concat"
    rank: int | None = None
    density: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Adapter:
    """One of the adapters to combine; `name` is for messages."""

    name: str
    weights: AnyWeights
    strength: float


@dataclass(frozen=True)
class Combination:
    """The combined adapter, float32, and for WITH_RANK how near each layer came: component to module path to it."""

    weights: AdapterWeights
    steps: dict[str, dict[str, Approximation]]


Part = tuple[LowRank | Dense, float]
"""What one adapter does to a layer, and its strength."""


def combine(
    adapters: Sequence[Adapter], recipe: Recipe, on_layer: Callable[[int, int], None] = lambda done, total: None
) -> Combination:
    """One adapter that does what `adapters` do together, in float32; `on_layer` is told layers done and their number.

    Raises ConfigError for an impossible recipe, ModelError for adapters that cannot be combined so: DoRA, whose change
    depends on the base, layers of one name and different shapes, other kinds than LoRA with concat and linear.
    """
    _check(recipe)
    active = [adapter for adapter in adapters if adapter.strength != 0]
    if not active:
        raise ConfigError("All strengths are 0, so nothing is left to combine; give one adapter another strength.")
    for adapter in active:
        if uses_dora(adapter.weights):
            raise ModelError(
                f"{adapter.name} is DoRA, whose change depends on the base's weights, so it cannot be combined without "
                "them; merge it into the base instead."
            )
    if recipe.method in WITH_RANK and recipe.rank is None:
        recipe = replace(recipe, rank=_largest_rank(active))
    layers = list(
        dict.fromkeys((c, path) for adapter in active for c in adapter.weights for path in adapter.weights[c])
    )
    weights: AdapterWeights = {}
    steps: dict[str, dict[str, Approximation]] = {}
    for done, (component, path) in enumerate(layers, start=1):
        name = f"{component}.{path}"
        found = [(a.weights.get(component, {}).get(path), a) for a in active]
        _require_usable(name, recipe.method, found)
        parts = _aligned(name, [(update, a.strength) for update, a in found if update is not None])
        if recipe.method in WITH_RANK:
            step = approximate(_change(name, parts, recipe), rank=recipe.rank)
            steps.setdefault(component, {})[path] = step
            combined = step.low_rank
        else:
            combined = concatenated(parts) if recipe.method == "concat" else _mean(parts)
        weights.setdefault(component, {})[path] = combined
        on_layer(done, len(layers))
    return Combination(weights, steps)


def concatenated(parts: Sequence[Part]) -> LowRank:
    """The sum of strength * delta over LowRank updates of one shape, as factors side by side with scale 1."""
    downs, ups = [], []
    for update, strength in parts:
        assert isinstance(update, LowRank), "checked by combine"
        downs.append(update.down.float())
        ups.append((update.up.double() * (strength * update.scale)).float())
    return LowRank(torch.cat(downs), torch.cat(ups, dim=1), 1.0)


def _check(recipe: Recipe) -> None:
    if recipe.method not in METHODS:
        raise ConfigError(f'method "{recipe.method}" is unknown; use one of {", ".join(METHODS)}.')
    if recipe.rank is not None and recipe.method not in WITH_RANK:
        raise ConfigError(f'method "{recipe.method}" has no choice of rank; leave it out, or use svd.')
    if recipe.rank is not None and recipe.rank < 1:
        raise ConfigError(f"rank is {recipe.rank}; use 1 or more, usually 4 to 64.")
    if not 0 < recipe.density <= 1:
        raise ConfigError(f"density is {recipe.density:g}; it is the share of entries kept, above 0 and up to 1.")


def _largest_rank(adapters: Sequence[Adapter]) -> int:
    updates = (update for a in adapters for layers in a.weights.values() for update in layers.values())
    ranks = [update.rank for update in updates if update.rank is not None]
    if not ranks:
        raise ConfigError("None of the adapters has a rank to take over; give one, usually 4 to 64.")
    return max(ranks)


def _require_usable(name: str, method: str, found: Sequence[tuple[LowRank | Dense | None, Adapter]]) -> None:
    """Raise ModelError when a layer cannot be combined with concat or linear."""
    if method in WITH_RANK:
        return
    for update, adapter in found:
        if isinstance(update, Dense):
            raise ModelError(
                f"{adapter.name} is {update.kind} at {name}, which has no factors that {method} could use; use method "
                "svd with a rank."
            )
    ranks = [0 if update is None else update.rank for update, _ in found]
    if method == "linear" and len(set(ranks)) > 1:
        raise ModelError(
            f"{name} has rank {', '.join(map(str, ranks))} in {', '.join(a.name for _, a in found)}; linear averages "
            "factors, so it needs adapters of one run, of equal ranks. Use concat or svd."
        )


def _aligned(name: str, parts: list[Part]) -> list[Part]:
    """`parts` in one shape: 1x1 convolutions where one of them is. Raises ModelError when they differ otherwise."""
    shapes = {weight_shape(update) for update, _ in parts}
    if len(shapes) == 1:
        return parts
    if len({shape[:2] for shape in shapes}) > 1 or any(side != 1 for shape in shapes for side in shape[2:]):
        raise ModelError(
            f"{name} is {' and '.join(str(list(shape)) for shape in sorted(shapes))} in these adapters; they were made "
            "for different bases."
        )
    return [(_as_convolution(update), strength) for update, strength in parts]


def _as_convolution(update: LowRank | Dense) -> LowRank | Dense:
    if isinstance(update, LowRank):
        return replace(update, down=update.down.flatten(1)[..., None, None], up=update.up.flatten(1)[..., None, None])
    return Dense(update.kind, delta(update).flatten(1)[..., None, None], update.rank)


def _mean(parts: Sequence[Part]) -> LowRank:
    """Means of `down` and `scale * up`, weighted by strength, times the sum of strengths: adapters that are equal give
    sum * delta. PEFT's "linear" weights by square roots instead, which doubles two equal adapters of strength 0.5."""
    total = sum(strength for _, strength in parts)
    if abs(total) < 1e-6:
        raise ConfigError("The strengths sum up to 0, of which linear can make no mean; use concat or svd.")
    down, up = None, None
    for update, strength in parts:
        assert isinstance(update, LowRank), "checked by combine"
        share = strength / total
        more_down, more_up = share * update.down.double(), share * update.scale * update.up.double()
        down, up = (more_down, more_up) if down is None or up is None else (down + more_down, up + more_up)
    assert down is not None and up is not None, "a layer is in one adapter at least"
    return LowRank(down.float(), up.float(), total)


def _change(name: str, parts: Sequence[Part], recipe: Recipe) -> LowRank | Tensor:
    """The combined change before its approximation: as factors where that is possible, else in the weight's shape."""
    if recipe.method == "svd":
        if all(isinstance(update, LowRank) for update, _ in parts):
            return concatenated(parts)
        return torch.stack([strength * delta(update) for update, strength in parts]).sum(0)
    with imports.sparing():
        from peft.utils import merge_utils

    deltas = [delta(update) for update, _ in parts]
    strengths = torch.tensor([strength for _, strength in parts], dtype=torch.float32)
    function = {"ties": merge_utils.ties, "dare_linear": merge_utils.dare_linear, "dare_ties": merge_utils.dare_ties}
    with _seeded(recipe.seed, name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # density 1 is a choice like others
        result: Tensor = function[recipe.method](deltas, strengths, density=recipe.density)
    return result


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """The CPU's global generator, which PEFT draws from, seeded by (seed, name); afterwards as it was."""
    before = torch.get_rng_state()
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(before)
