"""Candidates one after the other: drawn from the same noise, measured, and the best found.

What lives here: the order of it. What does not: how a candidate is put into the denoiser, which is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_booth.evaluation import metrics
from lora_booth.evaluation.choice import choose
from lora_booth.evaluation.drawing import Condition, draw_all, pixels_of
from lora_booth.evaluation.features import Encoder
from lora_booth.evaluation.intervals import mean_interval
from lora_booth.evaluation.measure import Drawn, Features, Values, candidate_of, features_of, intervals, values_of
from lora_booth.evaluation.prediction import Probe, predictions, probe, relative_change
from lora_booth.evaluation.prompts import Prompts
from lora_booth.evaluation.scores import ByEncoder, Scored
from lora_booth.evaluation.sheet import SHOWN_PROMPTS
from lora_booth.models.families.family import Family
from lora_booth.models.sampling import Sampling
from lora_booth.run.report import Report


@dataclass(frozen=True)
class Setting:
    """All that pictures are drawn and measured with. `condition`: prompts to their conditioning, with the adapter as it
    is set; `real`: of each tower the features of the real pictures, None where there are none."""

    family: Family
    condition: Condition
    prompts: Prompts
    negative_prompt: str
    sampling: Sampling
    seed: int
    per_prompt: int
    towers: Sequence[Encoder]
    real: Sequence[Tensor | None]
    report: Report

    @property
    def each(self) -> int:
        """Pictures of one candidate."""
        return self.prompts.num_pictures(self.per_prompt)

    def drawing(self, base: str, list_name: str, token: str) -> dict[str, Any]:
        """What pictures depend on besides the adapter, as JSON values without a path. `base`: fingerprint of it;
        `list_name`: of the prompts."""
        s = self.sampling
        return {
            "base": base,
            "prompts": list_name,
            "templates": [prompt.replace(token, "{token}") for prompt in self.prompts.subject],
            "unrelated": list(self.prompts.unrelated),
            "pictures": self.per_prompt,
            "size": [s.width_px, s.height_px],
            "solver": [s.sampler, s.sampler_steps, s.guidance_scale, self.negative_prompt],
            "seed": self.seed,
        }


@dataclass
class Bench:
    """The base, measured when the bench is made while the denoiser is without its adapter, and every candidate so far.

    `shown`: step, strength and a picture of each of the first prompts; `base_shown` those of the base.
    """

    setting: Setting
    num_candidates: int
    shown: list[tuple[int, float, list[Image.Image]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        s = self.setting
        self._done = 0
        parts = f"{len(s.prompts.subject)} prompts × {s.per_prompt}"
        parts += f", {len(s.prompts.classes)} of the class, {len(s.prompts.unrelated)} unrelated"
        text = f"{self._total} pictures: {parts}; the base and {self.num_candidates} candidates"
        s.report.event("pictures", text, pictures=self._total)
        drawn = self._draw()
        self.base_shown = _shown(drawn)
        self._before = [features_of(drawn, tower) for tower in s.towers]
        self._texts = [tower.embed_texts(s.prompts.classes) for tower in s.towers]
        self._probe = self._noised(drawn.unrelated)
        self._own = self._predicted()
        self._values: list[list[Values]] = [[] for _ in s.towers]

    def add(self, step: int, strength: float) -> None:
        """Draw and measure the candidate that is in the denoiser now."""
        drawn = self._draw()
        moved = relative_change(self._predicted(), self._own)
        features = [features_of(drawn, tower) for tower in self.setting.towers]
        for row, values in zip(self._values, self._measured(features), strict=True):
            row.append(values | {"prediction_drift": moved})
        self.shown.append((step, strength, _shown(drawn)))

    def results(self, *, is_in_sample: bool) -> tuple[ByEncoder, ...]:
        """What each tower measured, and which candidate is the best by it."""
        base = self._measured(self._before)
        return tuple(self._by_encoder(number, base[number], is_in_sample) for number in range(len(base)))

    @property
    def _total(self) -> int:
        return self.setting.each * (self.num_candidates + 1)

    def _draw(self) -> Drawn:
        s = self.setting
        drawn = draw_all(
            s.family, s.condition, s.prompts, s.negative_prompt, s.sampling, seed=s.seed, per_prompt=s.per_prompt
        )
        self._done += s.each
        s.report.progress("pictures", self._done, self._total)
        return drawn

    def _measured(self, found: Sequence[Features]) -> list[Values]:
        rows = zip(found, self._before, self.setting.real, self._texts, strict=True)
        return [values_of(features, before, real, texts) for features, before, real, texts in rows]

    @torch.no_grad()
    def _noised(self, unrelated: Sequence[Image.Image]) -> Probe:
        """Unrelated pictures of the base, noised."""
        pixels, family = pixels_of(unrelated), self.setting.family
        latents = torch.cat([family.encode_images(row)[0].cpu() for row in pixels.split(1)])
        height, width = pixels.shape[2:]
        geometry = torch.tensor([[height, width, 0, 0, height, width]] * len(pixels), dtype=torch.float32)
        return probe(family, latents, geometry)

    @torch.no_grad()
    def _predicted(self) -> Tensor:
        s = self.setting
        return predictions(s.family, self._probe, s.condition(s.prompts.unrelated), rows_at_once=s.sampling.batch_size)

    def _by_encoder(self, number: int, base: Values, is_in_sample: bool) -> ByEncoder:
        real, rows = self.setting.real[number], self._values[number]
        ceiling = None if real is None or len(real) < 2 else mean_interval(metrics.ceiling(real))
        likeness = base.get("subject_fidelity")
        before = None if likeness is None else sum(likeness) / len(likeness)
        scored = tuple(
            Scored(step, strength, intervals(values, before, None if ceiling is None else ceiling.mean))
            for (step, strength, _), values in zip(self.shown, rows, strict=True)
        )
        candidates = [candidate_of(s.step, s.strength, values) for s, values in zip(scored, rows, strict=True)]
        choice = choose(candidates, is_in_sample=is_in_sample)
        known = {name: values for name, values in base.items() if name not in ("leak", "drift", "subject_change")}
        return ByEncoder(
            record=self.setting.towers[number].record,
            ceiling=ceiling,
            base=intervals(known, None, None),
            candidates=scored,
            best=candidates.index(choice.candidate),
            reason=choice.reason,
            is_feasible=choice.is_feasible,
        )


def _shown(drawn: Drawn) -> list[Image.Image]:
    return [row[0] for row in drawn.subject[:SHOWN_PROMPTS]]
