"""The fastest way to compute a run that fits a memory budget.

Also what else could be changed.

Words: an *option* changes how a run is computed and leaves its result as it is; a *lever* is any change that makes a
training step smaller, with its price. What an option needs is traced by `memory.py`.

The order of options: first the smallest share of blocks that recompute their activations with which anything fits, then
the most rows of a pass at that share. Only then do inputs of those blocks move to main memory. By count SDXL at 1024 px
would move 5.4 GiB there and back for each row, 0.4 s over PCIe 4.0; computing them again is 5.2 TFLOP, 0.03 s on an RTX
4090 and 0.2 s on an RTX 3060 at their peaks. The inputs that are left are a tenth of that. The denoiser leaves the card
before pictures are decoded in tiles: tiles change tones a little, so they are for looking and never for training.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lora_booth.config.resolved import Filled
from lora_booth.data.buckets import Bucket
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.planning.memory import OUTSIDE_GIB, Modules, Phase, draws, rows_per_pass

MAX_PICTURES_AT_ONCE = 8
"""Guidance doubles them to 16 rows, which keep a card busy (assumed, not measured)."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the blocks that recompute their activations, as they are tried."""
SLOWER_WHEN_RECOMPUTED = 0.33
"""Of a step, when all blocks recompute: the ratio of the FLOPs, counted on SD 1.5, 2.1 and SDXL."""
CHOSEN_FOR_PICTURES = ("pictures_at_once", "tiled_decoding", "offload_denoiser")
"""Of the section [memory]."""
Changes = Mapping[str, Mapping[str, Any]]
"""Section, key and new value of settings, as `Config.with_values` takes them."""


@dataclass(frozen=True)
class Lever:
    """A change that makes a training step smaller, and its price. `saved_gib`: on top of the levers before it."""

    changes: Changes
    price: str
    saved_gib: float | None = None

    @property
    def settings(self) -> str:
        """The change as one would write it."""
        return spelled(self.changes)

    @property
    def told(self) -> str:
        """The price, after the saving where it is known."""
        return self.price if self.saved_gib is None else f"saves {self.saved_gib:.2f} GiB of a step; {self.price}"


class Option(NamedTuple):
    """How a step is computed: rows of a pass, share of the blocks that recompute their activations, and whether the
    inputs of these wait in main memory."""

    rows: int
    share: float
    is_offloading: bool

    @property
    def changes(self) -> Changes:
        """As settings."""
        train = {"batch_size": self.rows, "gradient_checkpointing": self.share}
        return {"train": train, "memory": {"offload_activations": self.is_offloading}}


@dataclass(frozen=True)
class Plan:
    """What was chosen to stay within a budget, a reason for each choice, and the phases of the run as it is then.

    `modules`: what they were traced on.
    """

    changes: Changes
    reasons: tuple[str, ...]
    phases: tuple[Phase, ...]
    budget_gib: float
    modules: Modules

    @property
    def too_large(self) -> tuple[Phase, ...]:
        """Phases that do not fit in spite of all."""
        return tuple(phase for phase in self.phases if phase.gib + OUTSIDE_GIB > self.budget_gib)


def choose(
    config: Filled,
    facts: BaseFacts,
    budget_gib: float,
    *,
    bucket: Bucket | None = None,
    modules: Modules | None = None,
) -> Plan:
    """The fastest options for training and drawing that stay within `budget_gib`; where none does, the smallest.

    What is set in the config stays. `bucket`: as `Modules` has it. `modules`: those of `config`, if they were made
    already; else it raises as their making does.
    """
    modules = modules or Modules.of(config, facts)
    needs: dict[Option, float] = {}

    def need(option: Option) -> float:
        if option not in needs:
            needs[option] = modules.step(config.with_values(option.changes), bucket).gib + OUTSIDE_GIB
        return needs[option]

    option = _fastest_option(config, lambda option: need(option) <= budget_gib)
    reasons = _reasons(config, option, need, needs)
    chosen, of_pictures = _with_drawing(modules, config.with_values(option.changes), budget_gib, bucket)
    for_pictures = {key: getattr(chosen.memory, key) for key in CHOSEN_FOR_PICTURES}
    changes = {"train": option.changes["train"], "memory": {**option.changes["memory"], **for_pictures}}
    phases = modules.phases(chosen, bucket)
    modules.counts.keep()
    return Plan(changes, (*reasons, *of_pictures), phases, budget_gib, modules)


def choose_for_pictures(config: Filled, facts: BaseFacts, budget_gib: float, bucket: Bucket) -> Filled:
    """`config` with the fastest option of drawing its class images in the size of `bucket` within `budget_gib`; where
    none is, the smallest. Raises as `choose`."""
    return _with_drawing(Modules.of(config, facts), config, budget_gib, bucket)[0]


def levers(config: Filled) -> tuple[Lever, ...]:
    """What is left to change for a smaller training step, what costs least first."""
    resolution, bucket_step = config.data.resolution, config.data.bucket_step
    found = []
    if rows_per_pass(config) > 1:
        found.append(Lever({"train": {"batch_size": 1}}, "same result, the prior's row in a pass of its own"))
    if (config.train.gradient_checkpointing or 0.0) < 1:
        slower = "same result, about a third slower than without"
        found.append(Lever({"train": {"gradient_checkpointing": 1.0}}, slower))
    if not config.memory.offload_activations:
        found.append(Lever({"memory": {"offload_activations": True}}, "same result, copies to main memory and back"))
    if config.optimizer.name in ("adamw", "prodigy", "schedulefree"):
        found.append(Lever({"optimizer": {"name": "adamw8bit"}}, "changes the result"))
    if config.adapter.text_encoder:
        found.append(Lever({"adapter": {"text_encoder": False}}, "changes the result: the denoiser alone learns"))
    if config.model.quantize == "none" and not config.adapter.dora:
        found.append(Lever({"model": {"quantize": "nf4"}}, "changes the result a little, slower; the base in 4 bits"))
    lower = resolution * 3 // 4 // bucket_step * bucket_step
    if lower >= bucket_step:
        found.append(Lever({"data": {"resolution": lower}}, "changes the result: less detail"))
    return tuple(found)


def savings(
    config: Filled, facts: BaseFacts, *, bucket: Bucket | None = None, modules: Modules | None = None
) -> tuple[Lever, ...]:
    """`levers` with what each saves of a training step, by default at the resolution's square. `modules`: as `choose`
    has them. Raises as it does."""
    modules, found = modules or Modules.of(config, facts), []
    before = modules.step(config, bucket).gib
    for lever in levers(config):
        config = config.with_values(lever.changes)
        if lever.changes.keys() & {"adapter", "model"}:
            modules = modules.like(config)
        after = modules.step(config, None if "data" in lever.changes else bucket).gib
        modules.counts.keep()
        found.append(replace(lever, saved_gib=before - after))
        before = after
    return tuple(found)


def _fastest_option(config: Filled, fits: Callable[[Option], bool]) -> Option:
    """The least saving of activations with which anything fits, with it the most rows; if nothing does, the smallest.

    The rows are those set, halved until they are one.
    """
    sizes = [config.train.batch_size]
    while min(sizes[-1], rows_per_pass(config)) > 1:
        sizes.append(min(sizes[-1], rows_per_pass(config)) // 2)
    smallest = [Option(sizes[-1], *saving) for saving in _savings(config)]
    first = 0  # tried first, since most budgets allow it
    if not fits(smallest[0]):
        first = bisect_left(smallest, True, lo=1, key=fits)
    if first == len(smallest):
        return smallest[-1]
    options = [smallest[first]._replace(rows=size) for size in sizes]
    return next(option for option in options if option == smallest[first] or fits(option))


def _savings(config: Filled) -> list[tuple[float, bool]]:
    """Share of blocks to recompute, and whether their inputs wait elsewhere; what is faster is tried first."""
    share, is_offloading = config.train.gradient_checkpointing, config.memory.offload_activations
    shares = SHARES if share is None else (share,)
    found = [(share, bool(is_offloading)) for share in shares]
    return [*found, (shares[-1], True)] if is_offloading is None and shares[-1] > 0 else found


def _reasons(
    config: Filled, option: Option, need: Callable[[Option], float], needs: Mapping[Option, float]
) -> list[str]:
    """Why `option` was taken: a line for each choice, with what a faster one would `need`; `needs`: those known."""
    reasons = [f"train.batch_size = {option.rows}: as set"]
    if option.rows != config.train.batch_size:
        reasons = [f"train.batch_size = {option.rows} (same result)"]
        larger = [other for other in needs if other.rows > option.rows and other[1:] == option[1:]]
        if larger:
            reasons = [f"{reasons[0]}: {min(larger).rows} needs {needs[min(larger)]:.1f} GiB"]
    setting = f"train.gradient_checkpointing = {option.share:g}"
    if config.train.gradient_checkpointing is not None:
        reasons.append(f"{setting}: as set")
    elif option.share == 0:
        reasons.append(f"{setting}: not needed, and a third faster so")
    else:
        less = max(other.share for other in needs if other.share < option.share)
        slower = f"about {SLOWER_WHEN_RECOMPUTED * option.share:.0%} slower"
        least = min(gib for other, gib in needs.items() if other.share == less)
        reasons.append(f"{setting} (same result, {slower}): with {less:g} a step needs {least:.1f} GiB")
    if option.is_offloading and config.memory.offload_activations is None:
        kept = need(option._replace(is_offloading=False))
        reasons.append(f"memory.offload_activations = true (same result): without, a step needs {kept:.1f} GiB")
    return reasons


def _with_drawing(
    modules: Modules, config: Filled, budget_gib: float, bucket: Bucket | None
) -> tuple[Filled, list[str]]:
    """`config` with the fastest option of drawing class images and previews that fits, and a reason for each choice."""
    has_class_images = config.has_class_images and config.prior.folder is None

    def need(**settings: Any) -> float:
        """Of drawing, as `config` is by now but for these settings of [memory]."""
        changed = config.with_values({"memory": settings})
        phases = [modules.draw_class_images(changed, bucket)] if has_class_images else []
        phases += [modules.draw(changed, bucket)] if draws(changed) else []
        return max((phase.gib for phase in phases), default=0.0) + OUTSIDE_GIB

    reasons = []
    if config.memory.offload_denoiser is None:
        few = {"pictures_at_once": 1, "tiled_decoding": bool(config.memory.tiled_decoding)}
        preparing = modules.prepare(config.with_values({"memory": few}), bucket).gib + OUTSIDE_GIB
        beside = max(preparing, need(**few))
        config = config.with_values({"memory": {"offload_denoiser": beside > budget_gib}})
        if beside > budget_gib:
            reasons.append(
                f"memory.offload_denoiser = true (same result): beside the denoiser {beside:.1f} GiB are needed"
            )
    if config.memory.tiled_decoding is None:
        whole = need(pictures_at_once=1, tiled_decoding=False)
        is_tiled = whole > budget_gib and need(pictures_at_once=1, tiled_decoding=True) < whole
        config = config.with_values({"memory": {"tiled_decoding": is_tiled}})
        if is_tiled:
            reasons.append(f"memory.tiled_decoding = true (same training): whole pictures need {whole:.1f} GiB")
    if config.memory.pictures_at_once is None:
        at_once = MAX_PICTURES_AT_ONCE
        while at_once > 1 and need(pictures_at_once=at_once) > budget_gib:
            at_once //= 2
        config = config.with_values({"memory": {"pictures_at_once": at_once}})
        reasons.append(f"memory.pictures_at_once = {at_once}: the most that fit, up to {MAX_PICTURES_AT_ONCE}")
    return config, reasons


def spelled(changes: Changes) -> str:
    """ "train.batch_size = 1, memory.tiled_decoding = true" """
    settings = [(f"{section}.{key}", value) for section, pairs in changes.items() for key, value in pairs.items()]
    return ", ".join(
        f"{key} = {f'{value:g}' if type(value) is float else str(value).lower()}" for key, value in settings
    )
