"""Prompts to token ids, and what of a prompt the text encoder cannot see."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

log = logging.getLogger(__name__)


class Tokens:
    """One tokenizer with the length of its encoder's window. Warns once per prompt that is cut."""

    def __init__(self, tokenizer: Any, window: int) -> None:
        self.tokenizer = tokenizer
        self.window = min(window, tokenizer.model_max_length)
        self._warned: set[str] = set()

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """int64 `[B, window]` on the CPU, always padded to the window: a prompt's ids do not depend on others."""
        for prompt, cut in self.cut(prompts).items():
            if prompt not in self._warned:
                self._warned.add(prompt)
                log.warning(
                    "The text encoder reads %d tokens; it does not see the end of a prompt: …%s", self.window, cut
                )
        settings = {"padding": "max_length", "max_length": self.window, "truncation": True, "return_tensors": "pt"}
        ids: Tensor = self.tokenizer(list(prompts), **settings).input_ids
        return ids

    def cut(self, prompts: Sequence[str]) -> dict[str, str]:
        """The prompts that are longer than the window, each with the words that are cut off."""
        room = self.window - 2  # the start and end tokens
        rows = {prompt: self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids for prompt in prompts}
        return {prompt: self.tokenizer.decode(ids[room:]).strip() for prompt, ids in rows.items() if len(ids) > room}
