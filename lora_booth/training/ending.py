"""The end of a run: the best checkpoint exported, pictures before and after, and the summary."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from PIL import Image

from lora_booth.adapter import delivery, inject, kept
from lora_booth.adapter.files import storage
from lora_booth.adapter.files.embedding import Embedding
from lora_booth.adapter.weights import AdapterWeights
from lora_booth.data.grid import labelled_grid
from lora_booth.run.report import Silent
from lora_booth.run.stopwatch import Stopwatch
from lora_booth.run.summary import Summary
from lora_booth.training import choosing, preview, session
from lora_booth.training.choosing import Exported, Judge
from lora_booth.training.session import Session


def finish(s: Session, stopwatch: Stopwatch, judge: Judge | None) -> Summary:
    """Export the best checkpoint, draw before and after, and write the summary, which marks the run as finished."""
    session.set_training_(s, False)
    is_main, chosen = s.accelerator.is_main_process, None
    if is_main:
        forms, made = _forms(s)
        delivery.write_files(_delivery(s), forms, Silent(), made)  # before the pictures, which may fail
        chosen = _choice(s, judge, stopwatch)
        if chosen is not None and (chosen.step, chosen.strength) != (s.config.train.steps, 1.0):
            forms, made = _forms(s)
    comparison, cover = _draw_before_and_after(s, chosen)
    paths: dict[str, Path] = {}
    if is_main:
        s.run.require_taken()
        delivered = _delivery(s, cover, chosen)
        paths = delivery.write_files(delivered, forms, s.report, made)
        if "kohya" in paths and s.config.model.base != "booth-mini":  # no program but this one draws with the miniature
            delivery.tell_use(paths["kohya"], "kohya", delivered, s.report)
        if "embedding" in paths and s.config.model.base != "booth-mini":
            delivery.tell_word(paths["embedding"], s.report, has_adapter=bool(forms))
    stopwatch.lap("files and pictures")
    steps = s.config.train.steps
    validation_loss = s.run.validation_losses()[steps]
    assert validation_loss is not None, "every save measures it"
    summary = Summary(
        folder=str(s.run.folder),
        files={name: str(path) for name, path in paths.items()},
        before_and_after=None if comparison is None else str(comparison),
        steps=steps,
        seconds=sum(stopwatch.seconds_of.values()),
        peak_gib=stopwatch.peak_gib(),
        num_parameters=sum(parameter.numel() for parameter in s.parameters),
        validation_loss=validation_loss,
        seconds_of=stopwatch.seconds_of,
        peak_gib_of=stopwatch.peak_gib_of,
        best_step=s.run.best_step(),
        **({} if chosen is None else chosen.told),
    )
    if s.accelerator.is_main_process:
        s.run.finish(summary)
    s.accelerator.end_training()
    return summary


def _choice(s: Session, judge: Judge | None, stopwatch: Stopwatch) -> Exported | None:
    """Put the best checkpoint into the denoiser (main process)."""
    if judge is None:
        return None
    chosen = choosing.choose(s, judge)
    stopwatch.lap("choosing")
    return chosen


def _forms(s: Session) -> tuple[dict[str, AdapterWeights], dict[str, bytes]]:
    """The adapter that is in the denoiser, as each format has it, and the bytes of its tensors."""
    weights, weight_of = inject.collect(s.adapted), partial(inject.base_weight, s.adapted)
    forms = delivery.forms(s.config.export.formats, weights, weight_of, s.report)
    s.run.require_taken()
    return forms, delivery.bodies(_delivery(s), forms)


def _delivery(s: Session, cover: Image.Image | None = None, chosen: Exported | None = None) -> delivery.Delivery:
    config, header = s.config, storage.metadata(_facts(s, chosen))
    word = None if s.word is None else Embedding(s.word.word, s.word.vectors(), header)
    return delivery.Delivery(
        folder=s.run.folder,
        name=config.name,
        family=s.family.name,
        header=header,
        dtype=config.export.dtype,
        trigger=header["modelspec.trigger_phrase"],
        cover=cover if config.export.cover else None,
        word=word,
    )


def _facts(s: Session, chosen: Exported | None) -> storage.Facts:
    order, config = s.prepared.order, s.config
    buckets: dict[tuple[int, int], int] = {}
    pictures = order.instances[: len(order.instances) // (2 if config.data.flip else 1)]  # then come the mirrored ones
    for item in pictures:
        size = (item.geometry[5], item.geometry[4])
        buckets[size] = buckets.get(size, 0) + 1
    step, strength = (config.train.steps, 1.0) if chosen is None else (chosen.step, chosen.strength)
    return kept.facts_of(config, s.run.stored(), step, buckets, strength)


def _draw_before_and_after(s: Session, chosen: Exported | None) -> tuple[Path | None, Image.Image | None]:
    """The preview prompts without and with the adapter, side by side (main process); the file and the first "with"."""
    if not s.config.preview.images_per_prompt or not s.accelerator.is_main_process:
        return None, None
    path = s.run.folder / "before_after.png"
    with session.base_alone(s):
        before = session.draw_rows(s)
    after = session.draw_rows(s)
    rows = preview.before_and_after(before, after)
    steps, strength = (s.config.train.steps, 1.0) if chosen is None else (chosen.step, chosen.strength)
    title = f"{s.config.name}: {steps} steps" + (f" at strength {strength:g}" if strength != 1 else "")
    columns = ("before", "after") * s.config.preview.images_per_prompt
    s.run.write_picture(path, labelled_grid(rows, title=title, columns=columns))
    return path, after[0][1][0]
