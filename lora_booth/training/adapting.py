"""What is trained in a loaded base: low-rank layers, a word's vectors, or both.

And the optimizer that updates them. What lives here: which parameters there are, in which groups, at which rates. What
does not: how layers are made (`adapter/inject.py`) and words learnt (`adapter/embeddings.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_booth.adapter import inject
from lora_booth.adapter.embeddings import LearntWord
from lora_booth.config.resolved import Filled
from lora_booth.models.bases.architectures import is_text
from lora_booth.models.families.family import Family
from lora_booth.run.report import Report
from lora_booth.training import optimizers
from lora_booth.training.flat import Flat


@dataclass(frozen=True)
class Adapted:
    """What is trained. `modules`: in which something is, by component; `layers`: the parameters of low-rank layers,
    float32, by component; `word`: that which is learnt as vectors."""

    modules: dict[str, nn.Module]
    layers: dict[str, list[nn.Parameter]]
    word: LearntWord | None

    @property
    def num_parameters(self) -> int:
        """Count of trained numbers."""
        learnt = {} if self.word is None else self.word.parameters
        return inject.num_parameters(self.layers) + inject.num_parameters(learnt)


@dataclass(frozen=True)
class _Group:
    """Parameters that learn at one rate."""

    parts: Sequence[nn.Parameter]
    learning_rate: float
    weight_decay: float
    is_read_in_halves: bool = True
    """Whether passes may read them as the base's type; a word's vectors are cast after their length is set."""


def adapt_(config: Filled, family: Family) -> Adapted:
    """Put into `family` what `config` trains, as it is before the first step. Raises ModelError or ConfigError."""
    row, adapter = family.architecture, config.adapter
    denoiser: dict[str, nn.Module] = {row.denoiser: family.denoiser}
    texts = family.text_encoders() if adapter.is_text_trained else {}
    if adapter.embedding == "only":
        layers, modules = {}, texts
    else:
        layered = denoiser | (texts if adapter.text_encoder else {})
        used = family.num_used_text_layers if adapter.text_encoder else {}
        settings: dict[str, Any] = {"seed": config.train.seed, "presets": row.targets, "num_used_text_layers": used}
        layers, modules = inject.inject_(layered, adapter, **settings), denoiser | texts
    word = None
    if adapter.embedding != "none":
        word = LearntWord.new(family, config.subject.token, adapter.embedding_vectors)
    return Adapted(modules, layers, word)


def flatten_(config: Filled, adapted: Adapted, dtype: torch.dtype, device_type: str) -> list[Flat]:
    """The parameters as vectors that an optimizer updates, in the order of its groups; passes read copies of those of
    layers where a base of `dtype` allows it."""
    return [flat for _, flats in _flattened_(config, adapted, dtype, device_type) for flat in flats]


def optimizer_(
    config: Filled, adapted: Adapted, dtype: torch.dtype, device_type: str, report: Report
) -> tuple[list[Flat], torch.optim.Optimizer]:
    """The vectors, and an optimizer with a group for each learning rate, which are told."""
    names = config.optimizer
    for component, parts in adapted.layers.items():
        rate, count = _rate_of(config, component), sum(part.numel() for part in parts)
        told = f", that of B {rate * names.lora_plus_ratio:g}" if names.lora_plus_ratio != 1 else ""
        report.event("adapter", f"adapter on {component}: {count:,} parameters, learning rate {rate:g}{told}")
    if adapted.word is not None:
        count = len(next(iter(adapted.word.parameters.values()))[0])
        vectors = "1 vector" if count == 1 else f"{count} vectors"
        where = " and ".join(adapted.word.parameters)
        rate = names.embedding_learning_rate
        report.event("word", f'"{adapted.word.word}" is learnt as {vectors} in {where}, learning rate {rate:g}')
    trained, groups = [], []
    for group, flats in _flattened_(config, adapted, dtype, device_type):
        rate, vectors_of = group.learning_rate, [flat.vector for flat in flats]
        groups.append({"params": vectors_of, "lr": rate, "base_lr": rate, "weight_decay": group.weight_decay})
        trained += flats
    return trained, optimizers.make(groups, names, device_type=device_type)


def _flattened_(
    config: Filled, adapted: Adapted, dtype: torch.dtype, device_type: str
) -> list[tuple[_Group, list[Flat]]]:
    read_in, found = inject.reads_in(adapted.modules, dtype), []
    for group in _groups(config, adapted):
        settings: dict[str, Any] = {"device_type": device_type, "read_in": read_in if group.is_read_in_halves else None}
        found.append((group, optimizers.flatten(group.parts, config.optimizer, **settings)))
    copies = {part: copy for _, flats in found for flat in flats for part, copy in flat.copies.items()}
    inject.give_copies_(adapted.modules, copies)
    return found


def _groups(config: Filled, adapted: Adapted) -> list[_Group]:
    names, groups = config.optimizer, []
    for component, parts in adapted.layers.items():
        rate = _rate_of(config, component)
        for half, factor in optimizers.halves(adapted.modules[component], parts, names.lora_plus_ratio):
            groups.append(_Group(half, rate * factor, names.weight_decay))
    if adapted.word is not None:
        for rows in adapted.word.parameters.values():  # whose lengths are given, so that nothing decays
            groups.append(_Group(rows, names.embedding_learning_rate, 0.0, is_read_in_halves=False))
    return groups


def _rate_of(config: Filled, component: str) -> float:
    names = config.optimizer
    return names.text_encoder_learning_rate if is_text(component) else names.learning_rate
