"""Words that could name a subject, and what speaks against a chosen one.

A good one is a single piece, rare, and no word, name or part of one. What lives here: what spelling and id tell. What
does not: what a text encoder makes of it (`models/meanings.py`). No torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from lora_booth.models.bases.vocabulary import END, Vocabulary

SHORTEST, LONGEST = 3, 5
KNOWN_WORDS = Path(__file__).parents[2] / "assets" / "prompts" / "known_words.txt"
TO_DO = "`lora-booth tokens` proposes others"


@dataclass(frozen=True)
class Candidate:
    """A word with its id in the first vocabulary, and how its letters follow each other."""

    word: str
    id: int
    likeness: float
    """Mean natural logarithm of a letter's probability after the one before it, as common words have them: the lower,
    the less it looks like one."""


def candidates(vocabularies: Sequence[Vocabulary], class_noun: str) -> list[Candidate]:
    """The words that are single and rare in all `vocabularies`, and no known word or a part of one, the least wordlike
    first."""
    first, noun = vocabularies[0], class_noun.lower()
    common, known = _common(first), known_words()
    score = _Likeness(common)
    found = []
    for piece, number in first.ids.items():
        word = piece.removesuffix(END)
        is_rare = piece.endswith(END) and SHORTEST <= len(word) <= LONGEST and re.fullmatch("[a-z]+", word)
        if not is_rare or not all((own.whole(word) or 0) >= own.rare_from for own in vocabularies):
            continue
        if word in known or word in noun or noun in word or _parts(word) & common:
            continue
        found.append(Candidate(word, number, score.of(word)))
    return sorted(found, key=lambda c: (c.likeness, c.word))


def faults(token: str, class_noun: str, vocabularies: Sequence[Vocabulary]) -> list[str]:
    """What speaks against `token` as the name of a subject, a sentence each. Without vocabularies only its spelling."""
    said = []
    cut = next((pieces for own in vocabularies if len(pieces := own.cut(token)) > 1), None)
    ids = [own.whole(token) for own in vocabularies]
    if cut is not None:
        shown = " + ".join(piece.removesuffix(END) for piece in cut)
        said.append(
            f'subject.token "{token}" is {len(cut)} tokens for this base ({shown}), each with a meaning of its own; '
            f"take a word of one token: {TO_DO}."
        )
    elif any(number is not None and number < own.common_below for own, number in zip(vocabularies, ids, strict=True)):
        said.append(
            f'subject.token "{token}" is a common word, whose own meaning mixes with your subject; take a rare one: '
            f"{TO_DO}."
        )
    if token.lower() == "sks" and cut is None:
        said.append(f'subject.token "{token}" is also a rifle, which may show in pictures; {TO_DO}.')
    noun = class_noun.strip().lower()
    if noun and noun in token.lower():
        said.append(
            f'subject.token "{token}" holds the class noun "{class_noun}", so the two are hard to tell apart; leave '
            f"the noun out of the token: {TO_DO}."
        )
    return said


@lru_cache(maxsize=1)
def known_words() -> frozenset[str]:
    """The words of our own list; it does not know most names."""
    lines = KNOWN_WORDS.read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


def _common(vocabulary: Vocabulary) -> set[str]:
    limit = vocabulary.common_below
    pieces = (piece for piece, number in vocabulary.ids.items() if number < limit and piece.endswith(END))
    words = (piece.removesuffix(END) for piece in pieces)
    return {word for word in words if len(word) >= SHORTEST and re.fullmatch("[a-z]+", word)}


def _parts(word: str) -> set[str]:
    """Every run of at least three letters of `word`."""
    return {word[a:b] for a in range(len(word)) for b in range(a + SHORTEST, len(word) + 1)}


class _Likeness:
    """How often letters follow each other in some words."""

    def __init__(self, words: set[str]) -> None:
        self._pairs = Counter(pair for word in words for pair in _pairs(word))
        self._heads = Counter(head for word in words for head, _ in _pairs(word))

    def of(self, word: str) -> float:
        """See `Candidate.likeness`; a pair that never occurs counts as one that did once."""
        pairs = _pairs(word)
        return sum(math.log((self._pairs[p] + 1) / (self._heads[p[0]] + 27)) for p in pairs) / len(pairs)


def _pairs(word: str) -> list[tuple[str, str]]:
    ends = f"^{word}$"
    return list(pairwise(ends))
