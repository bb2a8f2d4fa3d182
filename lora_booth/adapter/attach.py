"""Adapters put into the pipeline of a loaded base, several beside each other.

What lives here: that an adapter fits the base, the parts PEFT can load it in, and words beside it. What does not:
training's own injection (`inject.py`), and files (`files/`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_booth.adapter import peft_layers
from lora_booth.adapter.embeddings import LearntWord
from lora_booth.adapter.files import storage
from lora_booth.adapter.files.embedding import Embedding
from lora_booth.adapter.weights import AdapterWeights, find_module, misfit
from lora_booth.errors import ModelError
from lora_booth.models.families.family import Family
from lora_booth.run import imports

with imports.sparing():
    from peft.tuners.tuners_utils import BaseTunerLayer


def load_into_(pipeline: Any, name: str, weights: AdapterWeights, family: str) -> list[str]:
    """Put `weights`, which fit, into a diffusers pipeline beside what it has; returns the names that `set_adapters`
    takes, each beginning with `name`."""
    to_tensors = storage.FORMATS["diffusers"].to_tensors  # diffusers itself knows fewer namings, and drops kohya's DoRA
    names = []
    for kind, part in _alike(weights).items():
        with peft_layers.knowing_loaded_quantizers():
            pipeline.load_lora_weights(to_tensors(part, family, torch.float32), adapter_name=f"{name}_{kind}")
        names.append(f"{name}_{kind}")
    return names


def detach_(module: nn.Module) -> None:
    """Take every adapter out of `module` again, whose layers are then those of the base, the very same."""
    adapted = [(path, child) for path, child in module.named_modules() if isinstance(child, BaseTunerLayer)]
    for path, layer in adapted:
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, layer.get_base_layer())
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        if mark in vars(module):
            delattr(module, mark)
    module.requires_grad_(False)


@contextmanager
def words_learnt(family: Family, words: Sequence[Embedding]) -> Iterator[list[LearntWord]]:
    """Inside the block `family` reads `words` in prompts. Raises ModelError for one of another kind of base."""
    learnt: list[LearntWord] = []
    try:
        for word in words:
            learnt.append(LearntWord(family, word.word, word.vectors))
        yield learnt
    finally:
        for one in reversed(learnt):
            one.forget_()


def fitted(family: Family, name: str, weights: AdapterWeights) -> AdapterWeights:
    """`weights` in the shapes of the base's layers: a 1x1 convolution's may be stored as a linear one's.

    Raises ModelError when the base lacks a layer that the adapter changes, or has it in another size.
    """
    modules = {family.architecture.denoiser: family.denoiser, **family.text_encoders()}
    found: AdapterWeights = {}
    for component, layers in weights.items():
        for path, low in layers.items():
            try:
                shape = tuple(find_module(modules[component], path).get_parameter("weight").shape)
            except (KeyError, AttributeError, ModelError):
                shape = ()
            if not shape or misfit(low, shape):
                raise ModelError(
                    f"adapter {name} does not fit the base, a {family.name} model: {component} lacks layer {path} "
                    f"of its size. `lora-booth inspect {name}` tells its family; name such a base with --base."
                )
            down = low.down.reshape(low.rank, *shape[1:])
            up = low.up.reshape(shape[0], low.rank, *(1 for _ in shape[2:]))
            found.setdefault(component, {})[path] = replace(low, down=down, up=up)
    return found


def _alike(weights: AdapterWeights) -> dict[str, AdapterWeights]:
    """`weights` in parts that are DoRA throughout or plain throughout: PEFT can load no other."""
    parts: dict[str, AdapterWeights] = {}
    for component, layers in weights.items():
        for path, low_rank in layers.items():
            kind = "plain" if low_rank.magnitude is None else "dora"
            parts.setdefault(kind, {}).setdefault(component, {})[path] = low_rank
    return parts
