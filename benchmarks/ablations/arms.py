"""What is compared: arms as data, subjects, nouns that are asked for, and the config of each run.

Words: an *arm* is one recipe; a *run* is one arm trained on one subject with one seed; a *state* is what of a run is
judged: its adapter after some steps, at some strength, as it is or averaged over steps.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lora_booth.cli.demo import MASCOT
from lora_booth.config import presets, toml
from lora_booth.config.config import Config

STEPS = 200
NUM_SEEDS = 3
COLOURS = ("white", "red", "green", "black")
"""Backgrounds that are judged, as in benchmarks.subjects; none but white is among those trained on."""
OTHERS = ("fox", "cat", "rocket", "robot", "penguin", "pizza", "strawberry", "airplane", "house", "elephant")
"""What must not change: nouns that the miniature knows; of each subject the first 8 that are not its class."""
NUM_OTHERS = 8
CAPTIONS = ("a lion", "a frog", "a duck", "a banana", "a bicycle", "a sunflower", "a balloon")
"""Of the model prior; none is among OTHERS or names a subject's class."""
WRONG_NOUNS = ("umbrella", "turtle", "octopus")
"""By seed, as the paper draws a wrong noun at random; nothing else in an arm names them."""
AVERAGE_DECAY = 0.98
"""Of a step, in the moving average of the update."""
AVERAGE_EVERY = 10
PROTOCOL = 1
"""Raised when what is drawn or computed of a state changes: then everything is measured again."""


@dataclass(frozen=True)
class State:
    """What of a run is judged. `is_averaged`: the moving average of the updates, sampled at every tenth step."""

    step: int = STEPS
    strength: float = 1.0
    is_averaged: bool = False

    @property
    def name(self) -> str:
        """Of its figures, as "200@0.8" or "200@1 averaged"."""
        return f"{self.step}@{self.strength:g}{' averaged' if self.is_averaged else ''}"


END = State()
STRENGTHS = (State(strength=0.6), State(strength=0.8), END)
WEAKER = (State(strength=0.2), State(strength=0.4), *STRENGTHS)
"""For what drifts so much that others are met at small strengths only."""
STEPWISE = (State(50), State(100), END)
AVERAGED = State(is_averaged=True)


@dataclass(frozen=True)
class Arm:
    """One recipe: `overrides` of configs/demo.toml, and what of its runs is judged.

    `noun`: which noun the instance captions hold; `trains`: an adapter by `lora_booth train`, or the whole denoiser by
    `full.py`.
    """

    name: str
    overrides: tuple[str, ...] = ()
    states: tuple[State, ...] = STRENGTHS
    noun: Literal["right", "wrong", "none"] = "right"
    trains: Literal["adapter", "denoiser"] = "adapter"

    @property
    def strengths(self) -> tuple[State, ...]:
        """The states after all steps, by strength."""
        return tuple(state for state in self.states if state.step == STEPS and not state.is_averaged)

    @property
    def save_every_steps(self) -> int:
        """So that every state is among the checkpoints."""
        return AVERAGE_EVERY if any(state.is_averaged for state in self.states) else 50


IMAGES = ("prior.mode=images",)
MODEL = ("prior.mode=model", f"prior.captions={json.dumps(CAPTIONS)}")
NONE = ("prior.mode=none",)
WORD_ALONE = ("adapter.embedding=only", "adapter.rank=16", "adapter.targets=attention")
"""The latter two are the defaults, as a word alone wants them."""
FULL_RATE = "optimizer.learning_rate=5e-5"
"""A twentieth of the adapter's, as DreamBooth's usual 5e-6 is of a LoRA's 1e-4."""
EVERYTHING = (*STRENGTHS, State(50), State(100), AVERAGED)

PHASES: tuple[tuple[Arm, ...], ...] = (
    (
        Arm("images", IMAGES, EVERYTHING),
        Arm("model", MODEL, EVERYTHING),
        Arm("none", NONE, (*WEAKER, State(50), State(100))),
    ),
    (
        Arm("weights-3e-4", ("prior.mode=weights", "prior.norm_weight=3e-4"), WEAKER),
        Arm("weights-3e-3", ("prior.mode=weights", "prior.norm_weight=3e-3"), WEAKER),
        Arm("model+weights", (*MODEL, "prior.norm_weight=3e-4")),
    ),
    (
        Arm("noun-wrong", IMAGES, (END,), noun="wrong"),
        Arm("noun-none", IMAGES, (END,), noun="none"),
        Arm("images-0.25", (*IMAGES, "prior.loss_weight=0.25"), STEPWISE),
        Arm("images-4", (*IMAGES, "prior.loss_weight=4"), STEPWISE),
        Arm("model-0.25", (*MODEL, "prior.loss_weight=0.25"), STEPWISE),
        Arm("model-4", (*MODEL, "prior.loss_weight=4"), STEPWISE),
        Arm("rank-4", (*IMAGES, "adapter.rank=4"), (END,)),
        Arm("rank-16", (*IMAGES, "adapter.rank=16"), (END,)),
        Arm("rank-64", (*IMAGES, "adapter.rank=64"), (END,)),
        Arm("full", (*IMAGES, FULL_RATE), STEPWISE, trains="denoiser"),
        Arm("full-none", (*NONE, FULL_RATE), STEPWISE, trains="denoiser"),
        Arm("word", (*NONE, *WORD_ALONE), STEPWISE),
        Arm("model+word", (*MODEL, "adapter.embedding=too")),
        Arm("dco", (*NONE, "objective.dco_beta=1000"), WEAKER),
        Arm("model+dco", (*MODEL, "objective.dco_beta=1000")),
    ),
)
"""In the order of their turn: all of them with seed 0 first, then with seed 1, then with seed 2."""
ARMS = {arm.name: arm for phase in PHASES for arm in phase}


@dataclass(frozen=True)
class Subject:
    """One held-out thing: its pictures to train on and to judge by, and what the base calls it."""

    name: str
    class_noun: str
    folder: Path

    @cached_property
    def unseen(self) -> dict[Path, str]:
        """Pictures that are judged by to the colour they are on."""
        found = {path: re.search(r"_on_([a-z]+)$", path.stem) for path in sorted((self.folder / "held_out").glob("*"))}
        unseen = {path: match[1] for path, match in found.items() if match and match[1] in COLOURS}
        assert set(unseen.values()) == set(COLOURS), f"{self.folder} has pictures on {sorted(set(unseen.values()))}"
        return unseen

    @property
    def others(self) -> tuple[str, ...]:
        """The nouns that must not change."""
        words = self.class_noun.split()
        return tuple(noun for noun in OTHERS if noun not in words)[:NUM_OTHERS]

    @cached_property
    def digest(self) -> str:
        """Of pictures, captions and class noun."""
        files = sorted(path for part in ("instance", "held_out") for path in (self.folder / part).iterdir())
        found = {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        return digest_of([self.class_noun, found])


@dataclass(frozen=True)
class Run:
    """One arm, subject and seed. `steps`: 200, fewer in a rehearsal."""

    arm: Arm
    subject: Subject
    seed: int
    steps: int = STEPS

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.arm.name}/{self.subject.name}/{self.seed}"

    @property
    def noun(self) -> str:
        """What the captions call the subject, besides its token; "" for nothing."""
        wrong = WRONG_NOUNS[self.seed % len(WRONG_NOUNS)]
        return {"right": self.subject.class_noun, "wrong": wrong, "none": ""}[self.arm.noun]

    @property
    def states(self) -> list[State]:
        """Those of the arm; in a rehearsal at steps in proportion."""
        return [replace(state, step=max(1, state.step * self.steps // STEPS)) for state in self.arm.states]

    @property
    def _folder(self) -> str:
        """Another one for another recipe: what a killed run left is continued by its own recipe or not at all."""
        return f"{self.key.replace('/', '-')}-{digest_of([self.arm.overrides, self.steps, self.subject.digest])}"

    def config(self, out: Path) -> Config:
        """The run's settings; folder, cache and captions with another noun lie in `out`."""
        every = max(1, self.arm.save_every_steps * self.steps // STEPS)
        overrides = [
            *self.arm.overrides,
            f"train.seed={self.seed}",
            f"train.steps={self.steps}",
            f"train.save_every_steps={every}",
            "train.keep_last=100",
            f"optimizer.warmup_steps={10 * self.steps // STEPS}",  # the same for every number of steps
            "preview.images_per_prompt=0",
            "evaluate.choose=last",
            f"subject.images={_captioned(self, out)}",
            f"subject.class_noun={self.subject.class_noun}",
            f"run.folder={out / 'runs' / self._folder}",
            f"run.cache={out / 'cache'}",
        ]
        return toml.load(presets.MINIATURE, overrides)

    def digest(self, out: Path, base: str) -> str:
        """Of all that the figures depend on but versions: recipe, pictures, the `base`'s weights, what is judged."""
        config, without = self.config(out), {"run", "preview", "export", "evaluate"}
        values = config.model_dump(mode="json", exclude_defaults=True, exclude=without)
        del values["subject"]["images"]
        values["prior"] = _prior_in_use(values.get("prior", {}), config.prior.mode)
        for key in ("save_every_steps", "keep_last"):
            del values["train"][key]
        judged = [PROTOCOL, [state.name for state in self.states], self.subject.others, self.noun, self.arm.trains]
        return digest_of([values, judged, self.subject.digest, base])


def _prior_in_use(prior: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """The settings of [prior] that its mode reads, so that the preset and the default may change without a new
    measurement."""
    norm = {"norm_weight": prior.get("norm_weight", 0.0)}
    if mode in ("none", "weights"):
        return norm
    left_out = {
        "images": ("captions",),
        "model": ("num_images", "prompts", "sampler", "sampler_steps", "guidance_scale"),
    }
    used = {key: value for key, value in prior.items() if key not in ("mode", *left_out[mode])} | norm
    return used if mode == "images" else used | {"mode": mode}


def digest_of(value: object) -> str:
    """12 hexadecimal digits of anything that JSON holds."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def subjects(data: Path) -> list[Subject]:
    """The mascot and the six subjects that `tools.booth_mini.data` drew into `data`."""
    found = [Subject("mascot", "dog", MASCOT)]
    for record in sorted((data / "subjects").glob("*/subject.json")):
        noun = json.loads(record.read_text(encoding="utf-8"))["class_noun"]
        found.append(Subject(record.parent.name, noun, record.parent))
    assert len(found) == 7, f"{len(found)} subjects in {data}; run tools.booth_mini.data first, or name its --data"
    return found


def schedule(everyone: Sequence[Subject], *, steps: int = STEPS) -> Iterator[Run]:
    """All runs, in the order of their turn: whenever it is stopped, what is done is balanced."""
    for seed in range(NUM_SEEDS):
        for phase in PHASES:
            for subject in everyone:
                yield from (Run(arm, subject, seed, steps) for arm in phase)


def _captioned(run: Run, out: Path) -> Path:
    """The instance pictures, with captions that hold the run's noun: copies where it is not the right one."""
    instance = run.subject.folder / "instance"
    if run.arm.noun == "right":
        return instance
    folder = out / "captioned" / f"{run.subject.name}-{run.noun or 'none'}"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(instance.iterdir()):
        body = path.read_bytes()
        if path.suffix == ".txt":
            text = body.decode().replace("{class}", run.noun)
            body = re.sub(" +", " ", text).encode()
        if not (folder / path.name).is_file() or (folder / path.name).read_bytes() != body:
            (folder / path.name).write_bytes(body)
    return folder
