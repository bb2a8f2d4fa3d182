"""What the kit measures, on what, and how long each part may take: data, and the command line that chooses.

No torch: the process that starts the parts needs neither it nor anything else that may be missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
MINUTES, MARGIN_S = 9.0, 10.0


@dataclass(frozen=True)
class Part:
    """`budget_s`: of `MINUTES`; what a part leaves over is the next one's. `job_s`: the most for a single job."""

    name: str
    told: str
    budget_s: float
    job_s: float


PARTS = (
    Part("card", "which card, and its rates", 25, 25),
    Part("tests", "the tests that need a card", 110, 200),
    Part("bases", "bases of real size with random weights", 35, 60),
    Part("steps", "seconds of a step", 135, 110),
    Part("memory", "peak memory against plan", 115, 60),
    Part("whole", "from pictures to the adapter", 100, 400),
    Part("assumptions", "what the code assumes", 10, 30),
)
"""In the order in which they are measured."""


@dataclass(frozen=True)
class Base:
    """A base to be measured with: `family` as the names of configs/ begin, its shape, and its usual side in pixels."""

    name: str
    family: str
    architecture: str
    side_px: int


@dataclass(frozen=True)
class Scale:
    """How much is computed. `steps`: of a run that is timed; `run_settings`: of every run, `whole_settings`: of those
    from pictures to the adapter, `memory_settings`: of those whose memory is measured."""

    bases: tuple[Base, ...]
    precision: str
    steps: int
    rounds: int
    budgets_gib: tuple[float, ...]
    num_pictures: int
    num_class_images: int
    run_settings: Mapping[str, object] = field(default_factory=dict)
    whole_settings: Mapping[str, object] = field(default_factory=dict)
    memory_settings: Mapping[str, object] = field(default_factory=dict)


FULL = Scale(
    bases=(
        Base("SD 1.5", "sd15", "sd1", 512),
        Base("SDXL", "sdxl", "sdxl", 1024),
        Base("SD 2.1", "sd21", "sd2_v", 768),
    ),
    precision="bf16",
    steps=25,
    rounds=2,
    budgets_gib=(8, 12, 16, 24),
    num_pictures=5,
    num_class_images=5,
)
_SMALL = {"data.bucket_step": 16}
REHEARSAL = Scale(
    bases=(
        Base("SD 1.5", "sd15", "sd1_tiny", 32),
        Base("SDXL", "sdxl", "sdxl_tiny", 32),
        Base("SD 2.1", "sd21", "sd2_v_tiny", 32),
    ),
    precision="fp32",
    steps=6,
    rounds=1,
    budgets_gib=(8, 24),
    num_pictures=3,
    num_class_images=2,
    run_settings=_SMALL,
    whole_settings={"data.resolution": 32, "train.steps": 3, "prior.num_images": 2, "prior.sampler_steps": 1}
    | {"preview.sampler_steps": 1, "evaluate.choose": "last"},
    memory_settings={"data.resolution": 32, "model.precision": "fp32", "train.steps": 1, "prior.num_images": 2}
    | {"preview.every_steps": 1, "preview.sampler_steps": 1, "preview.images_per_prompt": 1, "prior.sampler_steps": 1},
)
"""The same code on bases that a CPU trains in seconds; what it measures says nothing of a card."""


def parser() -> argparse.ArgumentParser:
    """Of the kit and, with two words more, of the processes of its parts."""
    words = argparse.ArgumentParser(prog="make card CARD_ARGS=…", description=__doc__)
    words.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    words.add_argument("--rehearse", action="store_true", help="tiny bases; nothing is written outside of --out")
    words.add_argument("--again", action="store_true", help="measure anew what is measured already")
    words.add_argument("--parts", nargs="*", choices=[part.name for part in PARTS], help="only these")
    words.add_argument("--minutes", type=float, default=MINUTES, help="that all of it may take; default 9")
    words.add_argument("--out", type=Path, default=ROOT / "build" / "card", help="bases, runs and logs")
    words.add_argument("--results", type=Path, help="docs/card.json; of a rehearsal OUT/card.json")
    words.add_argument("--readme", type=Path, help="README.md; of a rehearsal OUT/README.md")
    words.add_argument("--peers", type=Path, default=ROOT / "build" / "peers", help="folder of diffusers' two scripts")
    words.add_argument("--write", action="store_true", help="only README's table, from the results that are there")
    words.add_argument("--commit", default="", help="of a copy that git knows nothing of")
    words.add_argument("--card", default="", help=argparse.SUPPRESS)
    words.add_argument("--date", default="", help=argparse.SUPPRESS)
    words.add_argument("--patience", type=float, default=1.0, help=argparse.SUPPRESS)
    return words


@dataclass(frozen=True)
class Kit:
    """What one call of the kit measures. `card`: its name, `date`: when the call began; they name its results.

    `patience`: how many times its usual time a measurement may take. `commit`: empty where git knows it.
    """

    device: str
    is_rehearsal: bool
    is_again: bool
    patience: float
    out: Path
    results: Path
    readme: Path
    peers: Path
    card: str
    date: str
    commit: str

    @staticmethod
    def of(arguments: argparse.Namespace, *, card: str, date: str) -> Kit:
        """From the command line; paths become absolute."""
        out = arguments.out.absolute()
        docs = (out / "card.json", out / "README.md")
        docs = docs if arguments.rehearse else (ROOT / "docs" / "card.json", ROOT / "README.md")
        return Kit(
            device=arguments.device,
            is_rehearsal=arguments.rehearse,
            is_again=arguments.again,
            patience=arguments.patience,
            out=out,
            results=(arguments.results or docs[0]).absolute(),
            readme=(arguments.readme or docs[1]).absolute(),
            peers=arguments.peers.absolute(),
            card=card,
            date=date,
            commit=arguments.commit,
        )

    @property
    def scale(self) -> Scale:
        """How much is computed."""
        return REHEARSAL if self.is_rehearsal else FULL

    def words(self) -> list[str]:
        """The command line that makes the same kit in another process."""
        paths = {"out": self.out, "results": self.results, "readme": self.readme, "peers": self.peers}
        texts = {"device": self.device, "patience": self.patience}
        texts |= {"card": self.card, "date": self.date, "commit": self.commit}
        switches = [word for word, is_on in (("--rehearse", self.is_rehearsal), ("--again", self.is_again)) if is_on]
        return [*switches, *(f"--{name}={value}" for name, value in {**paths, **texts}.items())]

    def base(self, family: str) -> Base:
        """The base of a family."""
        return next(base for base in self.scale.bases if base.family == family)

    def folder_of(self, base: Base) -> Path:
        """Where its weights are, once they are made."""
        return self.out / "bases" / base.architecture


def shares(names: Sequence[str] | None, minutes: float) -> list[tuple[Part, float]]:
    """The parts of these names, or all, each with its share of `minutes`, in seconds; `MARGIN_S` are for ending."""
    chosen = [part for part in PARTS if names is None or part.name in names]
    factor = (60 * minutes - MARGIN_S) / sum(part.budget_s for part in chosen)
    return [(part, factor * part.budget_s) for part in chosen]
