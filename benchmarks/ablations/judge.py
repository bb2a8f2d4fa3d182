"""What a trained update does: pictures drawn through it, and the figures of them.

The update is added to the base's own weights and taken off again, so that adapters of every rank and whole denoisers
are judged alike, and the base is loaded once. What the base itself draws is drawn once for each subject, name of the
subject and seed, and kept in a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.ablations.arms import COLOURS, PROTOCOL, Run, Subject, digest_of
from benchmarks.likeness import SIDE_PX, features
from benchmarks.subjects import NUM_ICONS
from lora_booth.adapter.attach import words_learnt
from lora_booth.adapter.files.embedding import Embedding
from lora_booth.adapter.weights import plain_path
from lora_booth.config.settings import ModelConfig
from lora_booth.models import loading
from lora_booth.models.families.family import Conditioning
from lora_booth.models.sampling import Sampling, concatenate, draw
from lora_booth.run.randomness import generator_for
from tools.booth_mini.compose import COLOURS as RGB
from tools.booth_mini.compose import Pixels, article, paste
from tools.booth_mini.data import load_icons
from tools.booth_mini.subjects import SUBJECT_PX

SAMPLING = Sampling(SIDE_PX, SIDE_PX, "dpm++", 10, 3.0, batch_size=10)
SEEDS_PER_RUN = 2
LEVELS = (0.125, 0.375, 0.625, 0.875)
"""Noise levels at which predictions are compared, shares of the way from clean to noise."""

Update = Mapping[str, Tensor]
"""Name of a parameter of the denoiser to what is added to it at strength 1."""


@dataclass(frozen=True)
class Learnt:
    """What a run brought: the update, empty where a word alone was learnt, and the word, where there is one."""

    update: Update
    word: Embedding | None = None


@dataclass(frozen=True)
class Asked:
    """What is drawn for a run: prompts and seeds in one order. `subject`: what the run calls it; `plain`: its class."""

    subject: str
    plain: str
    others: tuple[str, ...]
    seeds: tuple[int, ...]

    @staticmethod
    def of(run: Run, token: str) -> Asked:
        """Other training seeds are judged with other noise, so that a mean over seeds is one over both."""
        seeds = tuple(11 + SEEDS_PER_RUN * run.seed + i for i in range(SEEDS_PER_RUN))
        subject = f"a {token} {run.noun}".strip()
        return Asked(subject, article(run.subject.class_noun), tuple(map(article, run.subject.others)), seeds)

    @property
    def pictures(self) -> list[tuple[str, int]]:
        """Prompt and seed of each: the subject in front of each colour with both seeds, all else with the first."""
        first = self.seeds[0]
        on = [(in_front(self.subject, colour), seed) for colour in COLOURS for seed in self.seeds]
        return [*on, *((in_front(self.plain, colour), first) for colour in COLOURS), *((o, first) for o in self.others)]


def in_front(who: str, colour: str) -> str:
    """The prompt of `who` on a plain background."""
    return f"{who} on a {colour} background"


class Judge:
    """The loaded base and what it draws. `cache`: folder of what depends on the base alone."""

    def __init__(self, data: Path, cache: Path) -> None:
        self.family = loading.load(ModelConfig(base="booth-mini"), device="cpu", dtype=torch.float32)
        self.family.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.fingerprint = self.family.fingerprint
        self._data, self._cache = data, cache
        self._parameters = {plain_path(name): p.data for name, p in self.family.denoiser.named_parameters()}
        self._conditioning: dict[str, Conditioning] = {}
        cache.mkdir(parents=True, exist_ok=True)

    def figures(self, run: Run, token: str, learnt: Learnt, strength: float) -> dict[str, float]:
        """What `learnt`, its update at `strength`, does to the subject, to its class, and to everything else; see the
        page."""
        asked = Asked.of(run, token)
        before = self._base(asked)
        with self._applied(learnt.update, strength), self._read(learnt.word):
            drawn = self._drawn(asked)[0]
            predicted = self._predicted(asked, before["latents"])
        likeness, of_class = self._likeness(run.subject, asked, drawn)
        likeness_before, class_before = self.base_likeness(run.subject, token, run.seed)
        on_subject = slice(0, len(COLOURS) * SEEDS_PER_RUN)
        changes = 1 - (self._relative(asked, drawn) * self._relative(asked, before["features"])).sum(dim=-1)
        others = changes[-len(asked.others) :]
        difference = (predicted - before["predictions"]).square().sum() / before["predictions"].square().sum()
        return {
            "likeness": likeness,
            "likeness_before": likeness_before,
            "leak": of_class - class_before,
            "other_change": float(others.mean()),
            "largest_other_change": float(others.max()),
            "diversity": self._diversity(asked, drawn),
            "diversity_before": self._diversity(asked, before["features"]),
            "subject_change": float(changes[on_subject].mean()),
            "prediction_change": float(difference),
            "update_norm": sum(float(t.square().sum()) for t in learnt.update.values()) ** 0.5 * strength,
        }

    def base_likeness(self, subject: Subject, token: str, seed: int) -> tuple[float, float]:
        """Likeness to the unseen pictures of what the base draws for "a token noun", and for the bare class noun."""
        seeds = tuple(11 + SEEDS_PER_RUN * seed + i for i in range(SEEDS_PER_RUN))
        others = tuple(map(article, subject.others))
        right = Asked(f"a {token} {subject.class_noun}", article(subject.class_noun), others, seeds)
        return self._likeness(subject, right, self._base(right)["features"])

    def ceiling(self, subject: Subject) -> float:
        """Likeness of other real pictures to the unseen ones on the same background: the subject's drawings put on it,
        or, where there are none in the data, the other unseen pictures."""
        found = []
        drawings = [
            master for name, master in zip(*load_icons(self._data), strict=True) if name.subject == subject.name
        ]
        for path, colour in subject.unseen.items():
            real = self._real({path: colour})
            like = _on(RGB[colour], drawings) or [
                Image.open(other) for other, its in subject.unseen.items() if its == colour and other != path
            ]
            if like:
                found.append((normalize(features(like) - self._means[colour], dim=-1) @ real.T).mean())
        return float(torch.stack(found).mean())

    def _likeness(self, subject: Subject, asked: Asked, drawn: Tensor) -> tuple[float, float]:
        """Mean cosine between unseen pictures and those drawn on the same colour: of the subject, and of its class."""
        relative, real = self._relative(asked, drawn), self._real(subject.unseen)
        on_subject = relative[: len(COLOURS) * SEEDS_PER_RUN].view(len(COLOURS), SEEDS_PER_RUN, -1)
        on_class = relative[len(COLOURS) * SEEDS_PER_RUN :][: len(COLOURS), None]
        places = [COLOURS.index(colour) for colour in subject.unseen.values()]
        found = [
            torch.stack([(of[i] @ x).mean() for i, x in zip(places, real, strict=True)])
            for of in (on_subject, on_class)
        ]
        return float(found[0].mean()), float(found[1].mean())

    def _diversity(self, asked: Asked, drawn: Tensor) -> float:
        """Mean 1 - cosine between pictures of the same prompt and other seeds."""
        of = self._relative(asked, drawn)[: len(COLOURS) * SEEDS_PER_RUN].view(len(COLOURS), SEEDS_PER_RUN, -1)
        alike = of @ of.transpose(1, 2)
        pairs = SEEDS_PER_RUN * (SEEDS_PER_RUN - 1)
        return float(1 - (alike.sum(dim=(1, 2)) - SEEDS_PER_RUN).mean() / pairs)

    def _relative(self, asked: Asked, drawn: Tensor) -> Tensor:
        """Features of a run's pictures relative to the mean of icons on the same background, for others white."""
        twice = [colour for colour in COLOURS for _ in range(SEEDS_PER_RUN)]
        colours = [*twice, *COLOURS, *("white" for _ in asked.others)]
        return normalize(drawn - torch.stack([self._means[colour] for colour in colours]), dim=-1)

    def _real(self, pictures: Mapping[Path, str]) -> Tensor:
        means = torch.stack([self._means[colour] for colour in pictures.values()])
        return normalize(features([Image.open(path) for path in pictures]) - means, dim=-1)

    @cached_property
    def _means(self) -> dict[str, Tensor]:
        """Colour to the mean features of icons on it, as `benchmarks.subjects.mean_features`."""
        path = self._cache / f"means-{digest_of([PROTOCOL, self.fingerprint, NUM_ICONS])}.safetensors"
        if not path.is_file():
            names, masters = load_icons(self._data)
            known = [i for i, name in enumerate(names) if not name.subject]
            chosen = [masters[i] for i in np.random.default_rng(0).choice(known, NUM_ICONS, replace=False)]
            save_file({colour: features(_on(RGB[colour], chosen)).mean(dim=0) for colour in COLOURS}, path)
        return load_file(path)

    def _base(self, asked: Asked) -> dict[str, Tensor]:
        """What the base draws and predicts: features `[pictures, D]`, latents of the others, predictions of those."""
        name = digest_of([PROTOCOL, self.fingerprint, asked.pictures, repr(SAMPLING).partition(", on_step")[0], LEVELS])
        path = self._cache / f"base-{name}.safetensors"
        if not path.is_file():
            found, pictures = self._drawn(asked)
            arrays = [np.asarray(picture) for picture in pictures[-len(asked.others) :]]
            pixels = torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents = self.family.encode_images(pixels)[0]
            tensors = {"features": found, "latents": latents, "predictions": self._predicted(asked, latents)}
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        return load_file(path)

    @torch.no_grad()
    def _drawn(self, asked: Asked) -> tuple[Tensor, list[Image.Image]]:
        prompts, seeds = zip(*asked.pictures, strict=True)
        conditioning = [self._encoded(prompt) for prompt in prompts]
        pictures = list(draw(self.family, conditioning, self._encoded(""), SAMPLING, seeds=seeds))
        return features(pictures), pictures

    @torch.no_grad()
    def _predicted(self, asked: Asked, latents: Tensor) -> Tensor:
        """The denoiser's output for the others' base pictures, noised: each at all LEVELS, always by the same noise."""
        schedule, rows = self.family.schedule, concatenate([self._encoded(prompt) for prompt in asked.others])
        geometry = torch.tensor([[SIDE_PX, SIDE_PX, 0, 0, SIDE_PX, SIDE_PX]]).float().repeat(len(latents), 1)
        found = []
        for level in LEVELS:
            noise = torch.randn(latents.shape, generator=generator_for("prediction", str(level)))
            timesteps = schedule.timesteps_at([level] * len(latents))
            found.append(self.family.predict(schedule.noised(latents, noise, timesteps), timesteps, rows, geometry))
        return torch.cat(found)

    @torch.no_grad()
    def _encoded(self, prompt: str) -> Conditioning:
        if prompt not in self._conditioning:
            self._conditioning[prompt] = self.family.encode_prompts([prompt])
        return self._conditioning[prompt]

    @contextmanager
    def _read(self, word: Embedding | None) -> Iterator[None]:
        """Inside, prompts are read with the word."""
        known = self._conditioning
        with words_learnt(self.family, [] if word is None else [word]):
            self._conditioning = known if word is None else {}
            try:
                yield
            finally:
                self._conditioning = known

    @contextmanager
    def _applied(self, update: Update, strength: float) -> Iterator[None]:
        """Inside, the denoiser carries `update`; afterwards it is the base again, bit for bit."""
        kept = {name: self._parameters[name].clone() for name in update}
        for name, change in update.items():
            self._parameters[name].add_(change.reshape(kept[name].shape), alpha=strength)
        try:
            yield
        finally:
            for name, values in kept.items():
                self._parameters[name].copy_(values)


def _on(rgb: tuple[int, int, int], drawings: Sequence[Pixels]) -> list[Image.Image]:
    """Each drawing on a plain background."""
    pictures = [Image.new("RGB", (SUBJECT_PX, SUBJECT_PX), rgb) for _ in drawings]
    for picture, drawing in zip(pictures, drawings, strict=True):
        paste(picture, Image.fromarray(drawing, "RGBA"), 0.85, (0.5, 0.5))
    return pictures
