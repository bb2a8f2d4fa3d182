"""From the tensors of an adapter file to its layers, and what is wrong with it.

What lives here: keys sorted into layers, what is left out by name, and faults told once for each cause. What does not:
what a key says (`keys.py`) and what a layer's tensors mean (`kinds.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lora_booth.adapter.files import other_models
from lora_booth.adapter.files.keys import BIASES, EXTRAS, WHOLE_KINDS, Key, is_norm, parse
from lora_booth.adapter.files.kinds import flat_axis_of, rank_of, update_of
from lora_booth.adapter.weights import AnyWeights
from lora_booth.config.inputs import shown
from lora_booth.errors import ModelError

LEAVABLE = {
    "norm": "weights and biases of normalisations",
    "bias": "biases",
    "embedding": "bundled embeddings",
    "unknown": "keys of no layer or kind that can be read",
}
"""Words of --leave-out to what they name; other words are beginnings of keys or of layers' names."""

ScaleOf = Callable[[str, str, int | None], float | None]
"""Component, module path and rank to the scale that the file's header gives, None for the tensors' own."""


@dataclass
class _Layer:
    """The tensors of one layer by their leaves, and how its first key is spelled."""

    spelling: str
    leaves: dict[str, Tensor] = field(default_factory=dict)


def strictly(weights: AnyWeights, faults: Sequence[str]) -> AnyWeights:
    """`weights`, or ModelError with the first of `faults` and their number."""
    if faults:
        more = f" ({len(faults) - 1} more such faults.)" if len(faults) > 1 else ""
        raise ModelError(faults[0] + more)
    return weights


def gather(
    tensors: Mapping[str, Tensor], scale_of: ScaleOf = lambda component, path, rank: None
) -> tuple[AnyWeights, list[str]]:
    """The layers of a file that are sound, and what is wrong with the others, one sentence for each cause."""
    layers: dict[tuple[str, str], _Layer] = {}
    faults: list[tuple[str, str]] = []
    words = words_of(tensors)
    for key, tensor in tensors.items():
        found = parse(key)
        if found is None or words[key][0] in ("embedding", "unknown"):
            continue
        path = f"{found.path}.bias" if found.leaf in BIASES else found.path
        layer = layers.setdefault((found.component, path), _Layer(found.spelling))
        name = f"{found.component}.{path}"
        if found.leaf in layer.leaves or found.spelling != layer.spelling:
            faults.append((name, f"The adapter file holds {name} twice, under two names; the second is {key}."))
        layer.leaves[found.leaf] = tensor
    axes = {axis for layer in layers.values() if (axis := flat_axis_of(layer.leaves)) is not None}
    flat_axis = axes.pop() if len(axes) == 1 else None
    weights: AnyWeights = {}
    for (component, path), layer in layers.items():
        name = f"{component}.{path}"
        try:
            is_stated = layer.spelling.startswith(("dotted", "peft"))  # the header speaks of PEFT's keys alone
            scale = scale_of(component, path, rank_of(layer.leaves)) if is_stated and _is_scaled(layer) else None
            update = update_of(name, layer.leaves, scale, flat_axis=flat_axis)
            weights.setdefault(component, {})[path] = update
        except ModelError as error:
            faults.append((name, str(error)))
    return weights, [*unreadable(words), *folded(faults)]


def words_of(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Key to the word of LEAVABLE that names it, "" for a part of an ordinary layer, and to what it is a part of."""
    parsed = {key: parse(key) for key in keys}
    kinds = {
        (found.component, found.path): WHOLE_KINDS[found.leaf]
        for found in parsed.values()
        if found and found.leaf in WHOLE_KINDS
    }
    return {key: _word(key, found, kinds) for key, found in parsed.items()}


def kept(keys: Sequence[str], leave_out: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The keys without those that a word of `leave_out` names; and word to the keys that it named."""
    named, left = words_of(keys), {word: list[str]() for word in leave_out}
    for key, (own, _) in named.items():
        found = parse(key)
        layer = f"{found.component}.{found.path}" if found else key
        for word in leave_out:
            if own == word or (word not in LEAVABLE and (key.startswith(word) or layer.startswith(word))):
                left[word].append(key)
                break
    gone = {key for named_keys in left.values() for key in named_keys}
    return [key for key in keys if key not in gone], left


def unreadable(words: Mapping[str, tuple[str, str]]) -> list[str]:
    """What a file holds that is no part of a readable layer, one sentence; empty where there is nothing of it."""
    strange: dict[str, list[str]] = {}
    for key, (word, kind) in words.items():
        if word in ("embedding", "unknown"):
            strange.setdefault(kind, []).append(key)
    if not strange:
        return []
    texts = [f"{_keys(len(keys))} of {kind}, first {shown(keys[0])}" for kind, keys in strange.items()]
    options = ",".join(word for word in ("unknown", "embedding") if word in {word for word, _ in words.values()})
    return [
        f"The adapter file holds {'; '.join(texts)}. To go on without them, export, generate, merge and resize take "
        f"--leave-out {options}."
    ]


def folded(faults: Iterable[tuple[str, str]]) -> list[str]:
    """(layer, sentence) to one sentence for each cause: the first, and how many more there are.

    Sentences that differ in layer and numbers alone have one cause.
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for name, text in faults:
        cause = re.sub(r"\d+|lora_\S+", "#", text.replace(name, "#"))
        counts[cause] += 1
        first.setdefault(cause, text)
    return [
        first[cause] + (f" The same holds for {count - 1} more layers." if count > 1 else "")
        for cause, count in counts.items()
    ]


def _word(key: str, found: Key | None, kinds: Mapping[tuple[str, str], str]) -> tuple[str, str]:
    if key.startswith("bundle_emb"):
        return "embedding", "a bundled embedding"
    if found is None:
        return "unknown", "what is no part of a LoRA, DoRA, LoHa or LoKr"
    if found.spelling == "unknown":
        return "unknown", "what is no layer of a Stable Diffusion 1, 2 or XL model"
    if found.leaf in EXTRAS:
        return "unknown", EXTRAS[found.leaf]
    if kind := kinds.get((found.component, found.path)):
        return "unknown", f"{kind}, which is not computed here"
    if is_norm(found.path):
        return "norm", ""
    return ("bias" if found.leaf in BIASES else ""), ""


def _keys(count: int) -> str:
    return "1 key" if count == 1 else f"{count:,} keys"


def _is_scaled(layer: _Layer) -> bool:
    return not layer.leaves.keys() & {"diff", "w_norm", *BIASES}


def require_no_stranger(keys: Iterable[str]) -> None:
    """Raise ModelError when the keys are those of an adapter for another model."""
    model = other_models.model_of(keys)
    if model is not None:
        raise ModelError(other_models.refusal(model))
