"""A word learnt as vectors, textual inversion, alone or beside low-rank adapters.

What lives here: the vectors (arXiv 2208.01618) in the text encoders of a loaded base, while they are trained and when
they are used. What does not: their file (`files/embedding.py`), and how a prompt is written in ids
(`models/families/prompts.py`).

A vector keeps the length of the row that it began as, and learns a direction alone: free ones grow far beyond all rows
of the vocabulary, and prompts lose the words beside them (arXiv 2512.13672).

Words: a *word* is what is written in prompts; its *vectors* are rows of the encoder's first layer, `[n, width]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_booth.config.inputs import shown
from lora_booth.errors import ModelError

if TYPE_CHECKING:
    from lora_booth.models.families.family import Family
    from lora_booth.models.families.prompts import Tokens

WordVectors = dict[str, Tensor]
"""Component name of a text encoder to the vectors of one word there, float32 `[n, width]`."""
VECTORS, LENGTHS = "token_embedding.vectors", "token_embedding.lengths"
"""In a checkpoint, after the component's name."""


class LearntRows(nn.Module):
    """The first layer of a text encoder, where ids below 0 are rows of its own: -1 - n the row n of `vectors`.

    `vectors`: their directions, float32 `[n, width]`; each has the length that it begins with.
    """

    def __init__(self, base: nn.Module, vectors: Tensor) -> None:
        super().__init__()
        self.base = base
        self.vectors = nn.Parameter(vectors.detach().float().contiguous())
        self.lengths = nn.Buffer(self.vectors.detach().norm(dim=-1, keepdim=True), persistent=False)

    @property
    def rows(self) -> Tensor:
        """What the encoder reads, float32 `[n, width]`."""
        return _at_length(self.vectors, self.lengths)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of ids, `[…, width]`, in the base's type."""
        known: Tensor = self.base(ids.clamp(min=0))
        own = self.rows.to(known.dtype)[(-1 - ids).clamp(min=0)]
        return torch.where((ids < 0)[..., None], own, known)


class LearntWord:
    """A word with vectors in every text encoder of a family, whose prompts mean them by it from now on."""

    def __init__(self, family: Family, word: str, vectors: Mapping[str, Tensor]) -> None:
        """Raises ModelError, before anything is changed, where `vectors` are not of the family's text encoders, or the
        word is one already."""
        self.word, self._family = word, family
        self._encoders: dict[str, Any] = dict(family.text_encoders())
        self._before = {name: encoder.get_input_embeddings() for name, encoder in self._encoders.items()}
        widths = {name: layer_width(layer) for name, layer in self._before.items()}
        given = {name: rows.shape[1] for name, rows in vectors.items()}
        if widths != given:
            raise ModelError(
                f"the word {word} has vectors of {_told(given)}, but the base, a {family.name} model, reads "
                f"{_told(widths)}; take one that was learnt on such a base."
            )
        for name in self._encoders:
            _require_new(word, family.tokens(name))
        self.layers: dict[str, LearntRows] = {}
        for name, encoder in self._encoders.items():
            before: Any = self._before[name]
            own, first = vectors[name].to(family.device, torch.float32), 0
            if isinstance(before, LearntRows):  # another word's are there
                first, before, own = len(before.vectors), before.base, torch.cat([before.rows.detach(), own])
            self.layers[name] = LearntRows(before, own)
            encoder.set_input_embeddings(self.layers[name])
            numbers = tuple(-1 - number for number in range(first, len(own)))
            tokens = family.tokens(name)
            tokens.learnt = {**tokens.learnt, tokens.word(word): numbers}

    @staticmethod
    def new(family: Family, word: str, num_vectors: int | None = None) -> LearntWord:
        """A word that means what its tokens mean to the base: its vectors begin as their rows, as many as there are, or
        the first of them, or these over and over. As many: the base predicts the same, up to rounding."""
        vectors = {}
        for name, encoder in family.text_encoders().items():
            module: Any = encoder
            ids = family.tokens(name).word(word)
            ids = tuple(ids[number % len(ids)] for number in range(num_vectors or len(ids)))
            weight = module.get_input_embeddings().get_parameter("weight").detach()
            vectors[name] = weight[torch.tensor(ids, device=weight.device)]
        return LearntWord(family, word, vectors)

    @property
    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What is trained of it, float32, by component."""
        return {name: [layer.vectors] for name, layer in self.layers.items()}

    def vectors(self) -> WordVectors:
        """As they are read in prompts, on the CPU."""
        return {name: _copy(layer.rows) for name, layer in self.layers.items()}

    def state(self) -> dict[str, Tensor]:
        """Its values as they are, for a checkpoint: exact float32 CPU copies."""
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            found |= {f"{name}.{VECTORS}": _copy(layer.vectors), f"{name}.{LENGTHS}": _copy(layer.lengths)}
        return found

    def load_state_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, bit for bit. Raises ModelError, before anything is written, for that of
        another word."""
        own = self.state()
        faults = [name for name, t in own.items() if name not in tensors or tensors[name].shape != t.shape]
        if faults:
            raise ModelError(f"The checkpoint does not fit the word {self.word}: it lacks {faults[0]} of its shape.")
        for name, layer in self.layers.items():
            layer.vectors.data.copy_(tensors[f"{name}.{VECTORS}"])
            layer.lengths.copy_(tensors[f"{name}.{LENGTHS}"])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block prompts are read as the base reads them."""
        tokens = [self._family.tokens(name) for name in self.layers]
        were = [each.learnt for each in tokens]
        for each in tokens:
            each.learnt = {}
        try:
            yield
        finally:
            for each, learnt in zip(tokens, were, strict=True):
                each.learnt = learnt

    def forget_(self) -> None:
        """Take it out again, the last word that was learnt first."""
        for name, encoder in self._encoders.items():
            encoder.set_input_embeddings(self._before[name])
            tokens = self._family.tokens(name)
            tokens.learnt = {ids: numbers for ids, numbers in tokens.learnt.items() if ids != tokens.word(self.word)}


def layer_width(layer: nn.Module) -> int:
    """Numbers in a row of a text encoder's first layer."""
    base = layer.base if isinstance(layer, LearntRows) else layer
    return int(base.get_parameter("weight").shape[1])


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's tensors: those of the layers, and those of the word."""
    words = {name: t for name, t in tensors.items() if name.partition(".")[2] in (VECTORS, LENGTHS)}
    return {name: t for name, t in tensors.items() if name not in words}, words


def vectors_of(tensors: Mapping[str, Tensor]) -> WordVectors:
    """The vectors in a checkpoint's tensors; none where it has no word."""
    found = {}
    for key, directions in tensors.items():
        name = re.fullmatch(rf"(\w+)\.{re.escape(VECTORS)}", key)
        if name is not None:
            found[name[1]] = _at_length(directions, tensors[f"{name[1]}.{LENGTHS}"])
    return found


def _require_new(word: str, tokens: Tokens) -> None:
    ids = tokens.word(word)
    if not ids or ids in tokens.learnt:
        why = "is learnt already" if ids else "has no letter that the base reads"
        raise ModelError(f"the word {shown(word)} {why}; give its file another name.")


def _at_length(directions: Tensor, lengths: Tensor) -> Tensor:
    shares: Tensor = lengths / directions.norm(dim=-1, keepdim=True)
    return directions * shares


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _told(widths: Mapping[str, int]) -> str:
    return " and ".join(f"{width} numbers for {name}" for name, width in widths.items()) or "no text encoder"
