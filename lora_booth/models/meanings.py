"""What a base's text encoders make of single words: how isolated, and what a prompt becomes.

What lives here: two measures over embeddings and conditioning. What does not: which words are asked about
(`bases/identifiers.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_booth.models import loading
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.families.components import load_component, without_weights
from lora_booth.models.families.family import Family

NORMS = (0.05, 0.95)
"""Quantiles between which a usual embedding's norm lies."""


@dataclass(frozen=True)
class Meaning:
    """One word as a base's encoders know it; of several encoders the larger cosine."""

    cosine: float
    """Of its embedding with the nearest other one."""
    is_usual: bool
    """Whether its norm lies within `NORMS` of all."""
    distance: float
    """1 minus the mean cosine between the states from the noun to the end with the word and without it."""


def readers(facts: BaseFacts) -> Family:
    """The base with its text encoders alone, float32 on the CPU; its other parts have no weights."""
    parts = without_weights(facts, torch.float32)
    encoders = {name: load_component(facts, name).to(torch.float32) for name in parts.text_encoders}
    return loading.around(facts, replace(parts, text_encoders=encoders, device=torch.device("cpu")))


@torch.no_grad()
def measure(family: Family, words: Sequence[str], class_noun: str) -> list[Meaning]:
    """The meaning of each of `words`, which are one token each, before `class_noun`."""
    isolation = [_isolation(family, name, words) for name in family.text_encoders()]
    distances = [_distance(family, word, class_noun) for word in words]
    return [
        Meaning(max(rows[n][0] for rows in isolation), all(rows[n][1] for rows in isolation), distance)
        for n, distance in enumerate(distances)
    ]


def _isolation(family: Family, name: str, words: Sequence[str]) -> list[tuple[float, bool]]:
    """Largest cosine with another embedding, and whether the norm is usual, of each word in one encoder."""
    encoder: Any = family.text_encoders()[name]
    table: Tensor = encoder.get_input_embeddings().weight.float()
    tokenizer = family.tokenizers()[name]
    norms = table.norm(dim=1)
    low, high = norms.quantile(torch.tensor(NORMS)).tolist()
    unit = table / norms.clamp_min(1e-12)[:, None]
    found = []
    for word in words:
        (number,) = tokenizer(word, add_special_tokens=False).input_ids
        cosines = unit @ unit[number]
        cosines[number] = -1.0
        found.append((cosines.max().item(), low <= norms[number].item() <= high))
    return found


def _distance(family: Family, word: str, class_noun: str) -> float:
    """See `Meaning.distance`. The states before the word are the same, since the encoders read from left to right."""
    tokenizer = next(iter(family.tokenizers().values()))
    plain = f"a photo of {class_noun}"
    end = min(len(tokenizer(plain).input_ids), family.window - 1)
    noun = len(tokenizer("a photo of", add_special_tokens=False).input_ids) + 1  # after the start
    states = [_sequence(family.encode_prompts([prompt])) for prompt in (f"a photo of {word} {class_noun}", plain)]
    with_word, without = states[0][noun + 1 : end + 1], states[1][noun:end]
    return 1 - torch.cosine_similarity(with_word, without, dim=1).mean().item()


def _sequence(conditioning: dict[str, Tensor]) -> Tensor:
    """The states of all tokens of one prompt, `[tokens, D]`."""
    (rows,) = (tensor for tensor in conditioning.values() if tensor.ndim == 3)
    return rows[0].float()
