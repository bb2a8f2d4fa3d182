"""The counts that ship: what planning asks of SD 1.5, SD 2.1 and SDXL with their usual settings.

`python -m tools.counts` counts all anew and writes lora_booth/assets/counts.txt; minutes. It is to be done when the
versions of constraints.txt change, or what is traced: tests hold the file against new counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_booth.config import presets, toml
from lora_booth.config.config import Config
from lora_booth.config.resolved import Filled
from lora_booth.data.images import Found, Picture
from lora_booth.data.subject import Pictures
from lora_booth.models import loading
from lora_booth.models.bases.sources import SHIPPED
from lora_booth.models.cards import CARDS
from lora_booth.planning import budget, counts, decide, duration, memory
from lora_booth.planning.counts import Group
from lora_booth.planning.decide import Inputs
from lora_booth.planning.memory import Modules

BUDGETS_GIB = (8, 12, 16, 24, *sorted({card.memory_gib for card in CARDS} - {8, 12, 16, 24}))
"""Those of the short commands in README first, then of all other cards."""
SIDES_PX = ((2048, 2048), (1536, 2048), (2048, 1536), (1365, 2048), (2048, 1365))
"""Of pictures: square, and as cameras and telephones take them."""


@dataclass(frozen=True)
class Case:
    """A plan that is answered from what ships. `inputs`: pictures of one size, and the base's configs that ship."""

    name: str
    config: Filled
    inputs: Inputs

    def ask(self, modules: Modules, budget_gib: float | None) -> tuple[float, float]:
        """What a plan tells, in GiB and seconds on a card: with this budget, or without any."""
        bucket, config = decide.largest_bucket(self.config, self.inputs.pictures), self.config
        if budget_gib is None:
            phases = modules.phases(config, bucket)
        else:
            plan = budget.choose(config, modules.facts, budget_gib, bucket=bucket, modules=modules)
            config, phases = decide.with_changes(config, plan), plan.phases
        both = [config, duration.with_other_prior(config)]
        runs = [duration.predict(modules, each, self.inputs.pictures, bucket) for each in both if each is not None]
        return memory.needed_gib(phases), sum(run.total_s(CARDS[0]) for run in runs)


def cases() -> Iterator[Case]:
    """Every config file that ships, but those for files of others, and the short command of each base, with pictures of
    every one of `SIDES_PX`."""
    given = {"subject": {"images": "x", "class_noun": "dog"}}
    configs = {path.stem: toml.load(path) for path in sorted(presets.FOLDER.glob("*.toml")) if path.stem != "demo"}
    configs |= {base: Config.model_validate({"model": {"base": base}, **given}) for base in SHIPPED}
    of_shipped = {name: config for name, config in configs.items() if config.model.base in SHIPPED}
    for name, config in of_shipped.items():
        facts = loading.facts(config.model, needs_weights=False)
        for width, height in SIDES_PX:
            pictures = tuple(Picture(Path(f"{n}.jpg"), str(n), width, height, None) for n in range(6))
            inputs = Inputs(Pictures(Found(pictures, (), ()), None, None), facts)
            yield Case(f"{name}, {width}×{height}", decide.filled(config, inputs), inputs)


def fresh() -> dict[str, Group]:
    """All that the cases ask for, counted now."""
    known: dict[str, Modules] = {}
    for case in cases():
        key = counts.key_of(case.config, case.inputs.facts)
        if key not in known:
            known[key] = Modules.of(case.config, case.inputs.facts)
        for budget_gib in (None, *BUDGETS_GIB):
            case.ask(known[key], budget_gib)
        print(f"{case.name}: {len(known[key].counts.figures)} figures", flush=True)
    return {key: dict(sorted(modules.counts.figures.items())) for key, modules in sorted(known.items())}


if __name__ == "__main__":
    counts.write(counts.SHIPPED, counts.stamp(), fresh())
