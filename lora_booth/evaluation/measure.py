"""From pictures to the metrics of one candidate, by one encoder.

Words: *drawn* are the pictures of one candidate, or of the base, in the order of their prompts; `centre` is the mean of
what the base draws. Leak, drift and change are taken relative to it, since what all pictures of a base have in common
would make them small whatever an adapter did; fidelity, preservation and diversity are those of papers, and are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from lora_booth.evaluation import metrics
from lora_booth.evaluation.choice import Candidate
from lora_booth.evaluation.features import Encoder
from lora_booth.evaluation.intervals import Interval, mean_interval

Values = dict[str, list[float]]
"""Metric to a value for each picture, or prompt."""


@dataclass(frozen=True)
class Drawn:
    """Pictures: `subject` by prompt, `classes` one for each of those prompts without the token, and `unrelated`."""

    subject: tuple[tuple[Image.Image, ...], ...]
    classes: tuple[Image.Image, ...]
    unrelated: tuple[Image.Image, ...]

    @property
    def all(self) -> list[Image.Image]:
        """Every picture, prompt by prompt."""
        return [*(picture for row in self.subject for picture in row), *self.classes, *self.unrelated]


@dataclass(frozen=True)
class Features:
    """Of `Drawn`, `[N, D]` each: `subject` picture by picture, `per_prompt` of them for one prompt."""

    subject: Tensor
    classes: Tensor
    unrelated: Tensor
    per_prompt: int

    @property
    def centre(self) -> Tensor:
        """Mean `[D]` of class and unrelated pictures: of the base, what it draws without the subject."""
        return torch.cat([self.classes, self.unrelated]).mean(dim=0)


def features_of(drawn: Drawn, encoder: Encoder) -> Features:
    """The features of all its pictures."""
    sizes = [sum(map(len, drawn.subject)), len(drawn.classes), len(drawn.unrelated)]
    subject, classes, unrelated = encoder.embed_images(drawn.all).split(sizes)
    return Features(subject, classes, unrelated, len(drawn.subject[0]))


def values_of(features: Features, base: Features, real: Tensor | None, texts: Tensor | None) -> Values:
    """The metrics of `features`, those of a candidate or of the `base` itself, whose drift is 0 then.

    `real` `[M, D]`: the real pictures, None where there are none. `texts` `[P, D]`: the subject's prompts without the
    token, None where the encoder knows no texts.
    """
    values: Values = {}
    centre = base.centre
    if real is not None:
        values["subject_fidelity"] = metrics.subject_fidelity(features.subject, real)
        values["preservation"] = metrics.preservation(features.classes, real)
        own, before, unseen = (metrics.centred(rows, centre) for rows in (features.classes, base.classes, real))
        values["leak"] = metrics.leak(metrics.preservation(own, unseen), metrics.preservation(before, unseen))
    if texts is not None:
        repeated = texts.repeat_interleave(features.per_prompt, dim=0)
        values["prompt_fidelity"] = metrics.prompt_fidelity(features.subject, repeated)
    if features.per_prompt > 1:
        values["diversity"] = metrics.diversity(features.subject.split(features.per_prompt))
    for metric, part in (("drift", "unrelated"), ("subject_change", "subject")):
        before, after = (metrics.centred(getattr(of, part), centre) for of in (base, features))
        values[metric] = metrics.drift(before, after)
    return values


def intervals(
    values: Mapping[str, Sequence[float]], before: float | None, ceiling: float | None, *, seed: int = 0
) -> dict[str, Interval]:
    """Mean and interval of each metric, and, where the likeness `before` the adapter and its `ceiling` are given, the
    share of the way between the two."""
    found = {name: mean_interval(list(rows), seed=seed) for name, rows in values.items()}
    likeness = found.get("subject_fidelity")
    if likeness is not None and before is not None and ceiling is not None and ceiling > before:
        mean, low, high = (metrics.share(x, before, ceiling) for x in (likeness.mean, likeness.low, likeness.high))
        found["share"] = Interval(mean, low, high, likeness.confidence)
    return found


def candidate_of(step: int, strength: float, values: Values) -> Candidate:
    """What the rule for the best one asks of a candidate."""
    likeness, leak = values.get("subject_fidelity", []), values.get("leak", [])
    return Candidate(step, strength, likeness, leak, values["drift"], values["subject_change"])
