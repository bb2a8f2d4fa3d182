"""What a run will do, told before it begins. Nothing is run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_booth.config.config import Config
from lora_booth.config.inputs import reason
from lora_booth.config.resolved import Filled
from lora_booth.data.buckets import Crop
from lora_booth.data.subject import Pictures, crops_of, tell_small
from lora_booth.errors import LoraBoothError, lacks_memory
from lora_booth.models import abilities, cards
from lora_booth.models.abilities import Abilities
from lora_booth.models.cards import Card
from lora_booth.planning import decide
from lora_booth.run import imports, versions
from lora_booth.run.report import Report
from lora_booth.run.state import is_begun, is_finished

if TYPE_CHECKING:
    from lora_booth.planning.decide import Inputs
    from lora_booth.planning.duration import Duration
    from lora_booth.planning.memory import Phase


CHOICES_COLUMNS = 110
MAX_LISTED = 4
"""Of a list, how many are shown."""
UNBROKEN = "\N{NO-BREAK SPACE}"
"""Where a line of choices may not end."""


def show(wished: Config, report: Report, card: Card | None = None) -> None:
    """Tell what `train` would do with `wished`; nothing is run or written, but counts into the cache. Memory and time
    come last: they need torch.

    `card`: the one to plan for, whose memory is the budget where none is set; by default the one that is here.
    """
    inputs = decide.look(wished, report, needs_weights=False)
    config, pictures = decide.filled(wished, inputs), inputs.pictures
    tell_small(config, pictures, report)
    crops = crops_of(config, pictures.instances.pictures)
    train, adapter = config.train, config.adapter
    seen = train.steps * train.images_per_step / len(crops)
    lines = {
        "subject": f'"{config.fill("{token} {class}")}", {len(crops)} pictures in {_buckets(crops)}',
        "base": decide.described(config, inputs.facts),
        "adapter": f"{adapter.targets}, rank {adapter.rank}, alpha {adapter.alpha or adapter.rank:g}",
        "prior": _prior(config, pictures),
        "steps": f"{train.steps} of {train.images_per_step} instance images: each picture is seen {seen:.0f} times",
        "writes": f"{_state(config)} {config.folder}",
    }
    for name, text in lines.items():
        report.event(name, f"{name:<8} {text}")
    for picture, crop in zip(pictures.instances.pictures, crops, strict=True):
        size = f"{picture.width_px}×{picture.height_px}"
        note = (", enlarged" if crop.enlargement > 1 else "") + (", masked" if picture.mask is not None else "")
        text = f"         {picture.name}: {size} to {crop.bucket}, {crop.lost_fraction:.0%} cut off{note}"
        report.event("picture", text, name=picture.name)
    try:
        _show_prediction(wished, config, inputs, report, card)
    except LoraBoothError:
        raise
    except Exception as error:  # as in `_within`: what cannot be traced must not keep anybody from planning
        if lacks_memory(error):
            raise
        report.warn(f"memory and time cannot be predicted ({reason(error)}); `train` will save as much as it can.")


def _show_prediction(wished: Config, config: Filled, inputs: Inputs, report: Report, card: Card | None) -> None:
    """The predicted memory part by part; with a budget also what was chosen, and where it does not fit, what helps.

    Then the time: on `card`, or the one that is here, or on usual ones with enough memory. Then what was chosen.
    """
    with imports.sparing():
        from lora_booth.planning import budget, duration, memory

    bucket, here = decide.largest_bucket(config, inputs.pictures), None if card else _looked_at(config)
    config = abilities.without_moving(config, here.abilities) if here else config
    known = here.card if here else card
    free_gib = here.free_gib if here else card.memory_gib if card else None
    budget_gib = config.memory.budget_gib or free_gib
    checked = decide.check(config, device_type=None, facts=inputs.facts)
    if budget_gib is None:
        modules, notes = checked or memory.Modules.of(config, inputs.facts), []
        phases = modules.phases(config, bucket)
    else:
        found = budget.choose(config, inputs.facts, budget_gib, bucket=bucket, modules=checked)
        config, modules, phases = decide.with_changes(config, found), found.modules, found.phases
        notes = [f"for {budget_gib:g} GiB: {reason}" for reason in found.reasons]
        if found.too_large:
            left = budget.savings(config, inputs.facts, bucket=bucket, modules=modules)
            notes += [f"{decide.excess(found)}; what would help, in this order:"]
            notes += [f"  {lever.settings} ({lever.told})" for lever in left]
    gib = memory.needed_gib(phases)
    outside = f"{memory.OUTSIDE_GIB:g} of them for the driver's context and workspaces (assumed)"
    head = f"predicted for a CUDA card, not measured: {gib:.1f} GiB, {outside}"
    report.event("memory", f"memory   {head}", gib=round(gib, 3))
    for line in [*_table(phases), *notes]:
        report.event("memory", f"         {line}")
    run = duration.predict(modules, config, inputs.pictures, bucket)
    for fault in abilities.faults_of(config, here.abilities) if here else ():
        report.warn(f"here this run would be refused: {fault}")
    usual = [other for other in map(cards.named, cards.USUAL) if other.memory_gib >= gib]
    shown = usual if known is None else [known]
    _show_time(run, shown, report)
    if run.class_images and run.num_drawn < config.prior.num_images:
        told = f"{run.num_drawn} of {config.prior.num_images} class images are drawn, which"
        report.event("time", f"         {told} {run.num_steps} steps reach", drawn=run.num_drawn)
    other = duration.with_other_prior(config)
    if other is not None and shown:
        _show_other_prior(run, duration.predict(modules, other, inputs.pictures, bucket), other, shown, report)
    _show_looks(run, config, report)
    modules.counts.keep()
    _show_choices(wished, decide.completed(abilities.decided(config, here.abilities)) if here else config, report)


class _Here(NamedTuple):
    """The device of this machine: what it can do, which card it is where that is known, and its free memory."""

    abilities: Abilities
    card: Card | None
    free_gib: float | None


def _looked_at(config: Config) -> _Here:
    """The device that `train` would take. torch is asked only where it could know another than the CPU."""
    if config.memory.device == "cpu" or versions.is_torch_for_cpus_alone():
        return _Here(abilities.CPU, None, None)
    from lora_booth.models import devices

    device = devices.here(config.memory.device)
    return _Here(devices.abilities(device), devices.card(device), devices.free_gib(device))


def _show_choices(wished: Config, chosen: Filled, report: Report) -> None:
    """Every setting that was left open, as it is chosen; to programs all settings.

    For another card those that depend on the device stay open.
    """
    before, settings = wished.model_dump(mode="json"), chosen.model_dump(mode="json")
    choices = [
        f"{section}.{key} = {_value(value)}".replace(" ", UNBROKEN)
        for section, pairs in settings.items()
        for key, value in pairs.items()
        if value != before[section][key]
    ]
    lines = wrap(", ".join(choices), CHOICES_COLUMNS, initial_indent="chosen   ", subsequent_indent=" " * 9)
    report.event("config", "\n".join(lines).replace(UNBROKEN, " "), settings=settings)


def _value(value: Any) -> str:
    """As one would write it; of a long list how many there are."""
    is_long = isinstance(value, list) and len(value) > MAX_LISTED
    return f"[{len(value)} of them]" if is_long else json.dumps(value)


def _show_time(run: Duration, shown: Sequence[Card], report: Report) -> None:
    """The least time that a run takes, a line for each card; nothing where there is none."""
    if not shown:
        return
    report.event(
        "time", "time     at least, computing at a card's peak rates; class images are drawn once for all runs"
    )
    columns = ("a step", "class images", "training", "other", "in all")
    report.event("time", f"         {'card':<18}" + "".join(f"{column:>14}" for column in columns))
    for card in shown:
        seconds = (run.class_images_s(card), run.training_s(card), run.other_s(card), run.total_s(card))
        cells = (f"{run.step_s(card):.3f} s", *(str(timedelta(seconds=round(s))) for s in seconds))
        line = f"         {card.name:<18}" + "".join(f"{cell:>14}" for cell in cells)
        report.event("time", line, card=card.name, step_s=round(run.step_s(card), 4), in_all_s=round(seconds[-1], 1))


def _show_looks(run: Duration, config: Filled, report: Report) -> None:
    """What a run looks at on the way, with its share of the work, and what it compares in the end, a line each."""
    from lora_booth.planning import duration
    from lora_booth.training import watching

    watch, is_chosen = watching.of(config), config.evaluate.choose == "best"
    each = f"{watch.rows} rows of validation" + (f" and {watch.rows} of drift" if watch.has_drift else "")
    text = f"{run.watching_share:.1%} of the work: {each} at each of {watch.num_saves} saves"
    if is_chosen and not watch.has_drift:
        text += f"; with drift it would be more than {watching.MAX_SHARE:.0%} of the training"
    report.event("watching", f"watching {text}", share=round(run.watching_share, 4), rows=watch.rows)
    if is_chosen:
        num_compared, num_candidates = duration.num_candidates(config)
        text = f"{num_compared} of {num_candidates} candidates, kept checkpoints × strengths, are drawn and compared"
        text += ", as many as evaluate.max_share allows" if num_compared < num_candidates else ""
        text = text if num_candidates else "nothing, since no encoder that measures pictures is installed"
        report.event("choosing", f"choosing {text}", compared=num_compared, candidates=num_candidates)


def _show_other_prior(run: Duration, other: Duration, changed: Filled, shown: Sequence[Card], report: Report) -> None:
    """What the other prior would take, in one line."""
    times = (
        f"{timedelta(seconds=round(other.total_s(card)))} instead of {timedelta(seconds=round(run.total_s(card)))} on "
        f"{card.name}"
        for card in shown
    )
    mode = changed.prior.mode
    why = "no class images are drawn" if mode == "model" else "class images are drawn first"
    report.event("time", f'         with prior.mode = "{mode}" {why}: {", ".join(times)}', mode=mode)


def _table(phases: Sequence[Phase]) -> list[str]:
    """Aligned lines: a part each, a column for each phase, in GiB."""
    parts = list(dict.fromkeys(part for phase in phases for part in phase.parts))

    def line(name: str, cells: Iterable[str]) -> str:
        return f"{name:<14}" + "".join(f"{cell:>10}" for cell in cells)

    lines = [line("GiB", (phase.name for phase in phases))]
    for part in parts:
        found = (phase.parts.get(part) for phase in phases)
        lines.append(line(part, ("" if size is None else f"{size / 2**30:.2f}" for size in found)))
    return [*lines, line("in all", (f"{phase.gib:.2f}" for phase in phases))]


def _buckets(crops: Sequence[Crop]) -> str:
    counts = Counter(str(crop.bucket) for crop in crops)
    return ", ".join(f"{bucket} ({count})" for bucket, count in counts.most_common())


def _prior(config: Config, pictures: Pictures) -> str:
    norm = f"the update's norm, weight {config.prior.norm_weight:g}" if config.prior.norm_weight else ""
    if not config.has_prior:
        return norm or ("none" if config.prior.mode == "none" else "none (prior.loss_weight is 0)")
    weight = f"weight {config.prior.loss_weight:g}" + (f"; {norm}" if norm else "")
    if config.has_model_prior:
        kept = f"your pictures without the token, and under {len(config.prior.captions)} captions"
        return f"the base's own predictions of {kept}, {weight}"
    if pictures.classes is not None:
        return f"{len(pictures.classes.pictures)} pictures of {config.prior.folder}, {weight}"
    prompts = ", ".join(f'"{config.fill(prompt)}"' for prompt in config.prior.prompts)
    return f"{config.prior.num_images} class images of {prompts}, {weight}"


def _state(config: Config) -> str:
    if is_finished(config.folder):
        return "nothing, since the run is finished:"
    return "a run that is continued:" if is_begun(config.folder) else "a new run:"
