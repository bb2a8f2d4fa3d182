"""A base's tokenizers without their library: how a word is cut, and how rare it is.

What lives here: byte pair encoding as CLIP does it (openai/CLIP `simple_tokenizer.py`), and what an id says. What does
not: ids of whole prompts (`families/prompts.py`). No torch, and a tenth of a second, so that `plan` can ask.

A merge's id is its place in the vocabulary, most frequent first: a late one was rare where the merges were made, which
does not say that it means nothing.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from lora_booth.config.inputs import is_plain_file, read_text
from lora_booth.errors import LoraBoothError, ModelError
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.bases.sources import AGAIN, SHIPPED_CONFIGS

CLIP_SIZE = 49_408
CLIP_COMMON, CLIP_RARE = 30_000, 40_000
"""A word with a lower id than the first is common, one from the second on is rare; the same shares of other sizes."""
END = "</w>"
_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_LETTER_OF_BYTE = {
    **{byte: chr(byte) for byte in _PLAIN},
    **{byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in _PLAIN)},
}


@dataclass(frozen=True)
class Vocabulary:
    """One tokenizer's pieces with their ids, and its merges with their order."""

    ids: Mapping[str, int]
    ranks: Mapping[tuple[str, str], int]

    def cut(self, text: str) -> list[str]:
        """The pieces that `text` becomes; the last one of a word ends with `</w>`."""
        return [piece for word in _WORDS.findall(text.lower()) for piece in self._cut_word(word)]

    def whole(self, word: str) -> int | None:
        """The id of `word` where it is a single piece, else None."""
        pieces = self.cut(word)
        return self.ids.get(pieces[0]) if len(pieces) == 1 else None

    @property
    def common_below(self) -> int:
        """Words with a lower id are common: 30,000 in CLIP's."""
        return CLIP_COMMON * len(self.ids) // CLIP_SIZE

    @property
    def rare_from(self) -> int:
        """Words from this id on are rare: 40,000 in CLIP's."""
        return CLIP_RARE * len(self.ids) // CLIP_SIZE

    def _cut_word(self, word: str) -> list[str]:
        letters = [_LETTER_OF_BYTE[byte] for byte in word.encode("utf-8", "replace")]
        pieces = [*letters[:-1], letters[-1] + END]
        while len(pieces) > 1:
            pairs = pairwise(pieces)
            rank, at = min((self.ranks.get(pair, len(self.ids)), n) for n, pair in enumerate(pairs))
            if rank == len(self.ids):
                break
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return pieces


def of_base(facts: BaseFacts) -> list[Vocabulary]:
    """The vocabularies of a base, one of those that are alike; empty where one of them is kept in another way than
    `vocab.json` with `merges.txt`, or cannot be read."""
    names = [encoder.replace("text_encoder", "tokenizer") for encoder in facts.architecture.text_encoders]
    found: list[Vocabulary] = []
    for folder in (facts.configs / name for name in names):
        if is_plain_file(folder / "vocab.json"):
            own = _read(folder)
        elif folder.is_relative_to(SHIPPED_CONFIGS):
            own = shipped()
        else:
            own = None
        if own is None:
            return []
        if own not in found:
            found.append(own)
    return found


@lru_cache(maxsize=1)
def shipped() -> Vocabulary:
    """CLIP's, which SD 1.x, 2.x and SDXL share: 256 bytes, the same at a word's end, one piece a merge, start, end."""
    with gzip.open(SHIPPED_CONFIGS / "clip_merges.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    merges: list[tuple[str, str]] = [(a, b) for a, b in (line.split() for line in lines)]
    letters = [chr(byte) for byte in _PLAIN] + [chr(256 + n) for n in range(256 - len(_PLAIN))]
    pieces = [*letters, *(c + END for c in letters), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    return Vocabulary({piece: n for n, piece in enumerate(pieces)}, {pair: n for n, pair in enumerate(merges)})


def _read(folder: Path) -> Vocabulary | None:
    try:
        ids = json.loads(read_text(folder / "vocab.json", AGAIN, ModelError))
        lines = read_text(folder / "merges.txt", AGAIN, ModelError).splitlines()
    except (LoraBoothError, ValueError, RecursionError):
        return None
    if not isinstance(ids, dict) or not all(type(n) is int for n in ids.values()):
        return None
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return Vocabulary(ids, {(p[0], p[1]): n for n, p in enumerate(pairs) if len(p) == 2})
