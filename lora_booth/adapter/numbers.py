"""Rank and alpha of each adapted layer, by the patterns of the config.

Also the adapter that a checkpoint's tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from lora_booth.adapter.weights import AdapterWeights, LowRank
from lora_booth.config.patterns import Pattern
from lora_booth.config.settings import AdapterConfig
from lora_booth.errors import ModelError

ADAPTER = "default"
"""PEFT's name of the trained adapter; diffusers' `set_adapters` knows it by this name too."""


class Numbers:
    """Rank and alpha of layers under `config`; places are "component.module path".

    `unused`: the patterns that have matched none so far.
    """

    def __init__(self, config: AdapterConfig) -> None:
        self._config = config
        self._ranks, self._alphas = _ends(config.rank_pattern), _ends(config.alpha_pattern)
        self.unused = dict.fromkeys((*self._ranks, *self._alphas))

    def of(self, place: str) -> tuple[int, float]:
        """Rank and alpha of the layer at `place`; where no alpha is given, its scale is 1."""
        config = self._config
        rank_key, alpha_key = _first_match(self._ranks, place), _first_match(self._alphas, place)
        for key in (rank_key, alpha_key):
            self.unused.pop(key, None)  # type: ignore[arg-type]
        rank = config.rank if rank_key is None else config.rank_pattern[rank_key]
        default = float(rank) if config.alpha is None else config.alpha
        return rank, default if alpha_key is None else config.alpha_pattern[alpha_key]


def weights_of(tensors: Mapping[str, Tensor], config: AdapterConfig) -> AdapterWeights:
    """What `inject.state` gave of an adapter of `config`, as `inject.collect` would give it.

    Raises ModelError for tensors of another config.
    """
    numbers = Numbers(config)
    weights: AdapterWeights = {}
    for name, down in tensors.items():
        place, found, _ = name.partition(f".lora_A.{ADAPTER}.")
        if not found:
            continue
        component, _, path = place.partition(".")
        rank, alpha = numbers.of(place)
        up = tensors.get(name.replace(".lora_A.", ".lora_B."))
        magnitude = tensors.get(name.replace(".lora_A.", ".lora_magnitude_vector."))
        if up is None or down.shape[0] != rank or (magnitude is None) == config.dora:
            raise ModelError(f"The checkpoint is of another config at {place}; train in a new run.folder.")
        scale = alpha / (math.sqrt(rank) if config.rslora else rank)
        flat = None if magnitude is None else magnitude.reshape(-1)
        weights.setdefault(component, {})[path] = LowRank(down, up, scale, flat)
    return weights


def _ends(patterns: Iterable[str]) -> dict[str, Pattern]:
    """Each pattern's text to what matches a name or its end after a dot, as PEFT matches its patterns."""
    return {text: Pattern(text, "adapter.rank_pattern or adapter.alpha_pattern", is_end=True) for text in patterns}


def _first_match(patterns: Mapping[str, Pattern], name: str) -> str | None:
    """The first key that matches `name`."""
    return next((key for key, pattern in patterns.items() if pattern.matches(name)), None)
