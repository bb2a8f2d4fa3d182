"""Words that could name a subject: rare, one token, and meaning little, each with the reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_booth.config import inputs, names
from lora_booth.config.settings import ModelConfig
from lora_booth.config.toml import base_named
from lora_booth.errors import ConfigError, ModelError
from lora_booth.models import loading
from lora_booth.models.bases import identifiers, sources, vocabulary
from lora_booth.models.bases.identifiers import Candidate
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.run import imports
from lora_booth.run.report import Report

if TYPE_CHECKING:
    from lora_booth.models.meanings import Meaning

MAX_NUMBER = 200
MEASURED = 200
"""So many of the least wordlike are looked at in the text encoders, a few hundredths of a second each on a CPU."""
SEEDS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Proposal:
    """One word, and what is known of it; `meaning` is None where the base's weights are not here."""

    candidate: Candidate
    meaning: Meaning | None


def tokens(
    *,
    base: str,
    class_noun: str,
    report: Report,
    number: int = 10,
    folder: Path | None = None,
    steps: int = 25,
    device: str = "auto",
) -> list[Proposal]:
    """Tell the `number` words that suit best as a token for a `class_noun`, best first; downloads nothing without
    `folder`.

    `folder`: what the base makes of each is drawn into it, in `steps`. Raises ConfigError for a number, noun or folder
    that cannot be, ModelError for a base that is missing or keeps its vocabulary in another way.
    """
    inputs.require_number(number, "--number", 1, MAX_NUMBER)
    inputs.require_number(steps, "--steps", 1, 1000)
    noun = inputs.word(class_noun, "--class-noun").strip()
    if not noun:
        raise ConfigError('--class-noun is empty; say what the subject is, e.g. "dog".')
    config = base_named(base)
    if folder is not None:
        names.require_new(folder, "--out")
    facts = loading.facts(config, needs_weights=folder is not None)
    proposals, num_left = _proposals(config, facts, noun, report, is_loaded=folder is not None)
    if len(proposals) < number:
        report.warn(f"only {num_left} words are left of this base's vocabulary, of {number} that were asked for.")
    chosen = proposals[:number]
    _tell(chosen, noun, report)
    if folder is not None:
        from lora_booth.verbs.token_pictures import draw_tokens

        draw_tokens([p.candidate.word for p in chosen], config, facts, noun, folder, SEEDS, steps, device, report)
    return chosen


def _proposals(
    config: ModelConfig, facts: BaseFacts, noun: str, report: Report, *, is_loaded: bool
) -> tuple[list[Proposal], int]:
    """All words that are left, the best first, and how many these are."""
    vocabularies = vocabulary.of_base(facts)
    if not vocabularies:
        raise ModelError(
            f"{facts.path} keeps no vocab.json with merges.txt for each tokenizer, which the words are taken from; "
            "use a base that does, or sd15, sd21 or sdxl."
        )
    found = identifiers.candidates(vocabularies, noun)
    if not found:
        raise ModelError(
            f"no word of {facts.path.name}'s vocabulary is single, rare and unknown; choose a token yourself."
        )
    sizes = ", ".join(f"{len(own.ids):,}" for own in vocabularies)
    report.event("vocabulary", f"{len(found)} words are left of a vocabulary of {sizes} tokens", left=len(found))
    if vocabularies[0].rare_from != vocabulary.CLIP_RARE:
        report.warn(
            "this vocabulary is not CLIP's; words count as rare from the same share of it on "
            f"(id {vocabularies[0].rare_from:,}), so some may be common ones."
        )
    if not (is_loaded or sources.is_local(config)):
        report.warn(
            "the base's weights are not here, so what its text encoders make of these words was not measured; spelling "
            "and rarity alone rank them. Name a local folder or file with --base to measure it."
        )
        return [Proposal(candidate, None) for candidate in found], len(found)
    with imports.sparing():
        from lora_booth.models import meanings

    looked_at = found[:MEASURED]
    measured = meanings.measure(meanings.readers(facts), [c.word for c in looked_at], noun)
    usual = [Proposal(c, m) for c, m in zip(looked_at, measured, strict=True) if m.is_usual]
    if not usual:
        raise ModelError(f"no word of {facts.path.name} has an embedding of a usual size; choose a token yourself.")
    return _ranked(usual), len(usual)


def _ranked(proposals: Sequence[Proposal]) -> list[Proposal]:
    """Those with the lowest sum of two places first: by cosine with the nearest embedding, and by distance."""
    places: dict[str, int] = {}
    for key in ("cosine", "distance"):
        order = sorted(proposals, key=lambda p: (getattr(p.meaning, key), p.candidate.word))
        for place, proposal in enumerate(order):
            word = proposal.candidate.word
            places[word] = places.get(word, 0) + place
    return sorted(proposals, key=lambda p: (places[p.candidate.word], p.candidate.word))


def _tell(proposals: Sequence[Proposal], noun: str, report: Report) -> None:
    for proposal in proposals:
        candidate, meaning = proposal.candidate, proposal.meaning
        said = [f"one token, id {candidate.id:,}", f"looks like a word {100 * math.exp(candidate.likeness):.1f} in 100"]
        values: dict[str, float | str] = {"word": candidate.word, "id": candidate.id, "likeness": candidate.likeness}
        if meaning is not None:
            said += [f"nearest embedding {meaning.cosine:.2f}", f"changes a prompt by {meaning.distance:.3f}"]
            values |= {"cosine": meaning.cosine, "distance": meaning.distance}
        report.event("token", f"{candidate.word:<6} {'; '.join(said)}", **values)
    report.event(
        "note",
        f'lower is better but for the id; a prompt is "a photo of … {noun}". A word that means little keeps its old '
        "meaning out of the subject; it is hygiene, and no large gain. Names and abbreviations that our list lacks may "
        "be left.",
    )
