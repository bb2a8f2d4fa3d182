"""Prompts to token ids, and what of a prompt the text encoder cannot see.

A word that was learnt as vectors is written as ids below 0, the vector n of all as -1 - n: no vocabulary has such, the
end token stays the largest id, by which some encoders find it, and `adapter/embeddings.py` gives the encoder's first
layer their rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Tokens:
    """One tokenizer with the length of its encoder's window. Warns once per prompt that is cut."""

    def __init__(self, tokenizer: Any, window: int) -> None:
        self.tokenizer = tokenizer
        self.window = min(window, tokenizer.model_max_length)
        self.learnt: dict[tuple[int, ...], tuple[int, ...]] = {}
        """The vocabulary's ids of a learnt word, to the ids of its vectors."""
        self._warned: set[str] = set()

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """int64 `[B, window]` on the CPU, always padded to the window: a prompt's ids do not depend on others."""
        for prompt, cut in self.cut(prompts).items():
            if prompt not in self._warned:
                self._warned.add(prompt)
                log.warning(
                    "The text encoder reads %d tokens; it does not see the end of a prompt: …%s", self.window, cut
                )
        if self.learnt:
            return torch.tensor([self._whole(prompt) for prompt in prompts])
        settings = {"padding": "max_length", "max_length": self.window, "truncation": True, "return_tensors": "pt"}
        ids: Tensor = self.tokenizer(list(prompts), **settings).input_ids
        return ids

    def word(self, text: str) -> tuple[int, ...]:
        """The vocabulary's ids of a word, or of several."""
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def cut(self, prompts: Sequence[str]) -> dict[str, str]:
        """The prompts that are longer than the window, each with the words that are cut off."""
        rows = {prompt: self._written(prompt)[self._room :] for prompt in prompts}
        return {prompt: self._spelled(beyond) for prompt, beyond in rows.items() if beyond}

    @property
    def _room(self) -> int:
        """Tokens of a prompt between its start and its end."""
        return int(self.window) - 2

    def _written(self, prompt: str) -> list[int]:
        """The ids of a prompt of any length, without start and end."""
        ids, found, at = self.word(prompt), list[int](), 0
        while at < len(ids):
            word = next((word for word in self.learnt if ids[at : at + len(word)] == word), ids[at : at + 1])
            found += self.learnt.get(word, word)
            at += len(word)
        return found

    def _whole(self, prompt: str) -> list[int]:
        """The ids of a prompt, with start and end, padded to the window, as the tokenizer has them."""
        tokenizer, seen = self.tokenizer, self._written(prompt)[: self._room]
        padding = [tokenizer.pad_token_id] * (self._room - len(seen))
        return [tokenizer.bos_token_id, *seen, tokenizer.eos_token_id, *padding]

    def _spelled(self, ids: Sequence[int]) -> str:
        """The words of ids, which may begin within a learnt one; that once."""
        names = {numbers[-1]: word for word, numbers in self.learnt.items()}
        known = (word for number in ids for word in ((number,) if number >= 0 else names.get(number, ())))
        return str(self.tokenizer.decode(list(known))).strip()
