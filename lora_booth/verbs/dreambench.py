"""DreamBooth's data set: its photographs judged among themselves, and runs on it.

The set is github.com/google/dreambooth. Its layout: `dataset/<subject>/*.jpg` and `dataset/prompts_and_classes.txt`, or
the same without `dataset`. Nothing of it is shipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_booth.adapter import kept
from lora_booth.config import inputs
from lora_booth.data import images
from lora_booth.data.decode import ENDINGS
from lora_booth.errors import ConfigError, DataError
from lora_booth.evaluation import encoders, metrics
from lora_booth.evaluation.features import Encoder
from lora_booth.evaluation.intervals import mean_interval
from lora_booth.evaluation.scores import Scores
from lora_booth.models import devices
from lora_booth.run.interrupts import stop_requests
from lora_booth.run.report import Report
from lora_booth.verbs.evaluate import MAX_MEGAPIXELS, STOPPED, Method, evaluate
from lora_booth.verbs.evaluated import Asked

FILE_NAME = "prompts_and_classes.txt"
LIVING = ("cat", "dog")
"""Its classes that are drawn with the prompts for live subjects."""
SUMMED = ("subject_fidelity", "share", "prompt_fidelity", "preservation", "leak", "diversity", "drift")


@dataclass(frozen=True)
class RealSet:
    """The data set: subject to its class noun and to its folder, and the prompts with slots, by kind."""

    classes: Mapping[str, str]
    folders: Mapping[str, Path]
    objects: tuple[str, ...]
    living: tuple[str, ...]

    def templates(self, subject: str) -> tuple[str, ...]:
        """The prompts that this subject is drawn with."""
        return self.living if self.classes[subject] in LIVING else self.objects


def walk(folder: Path, runs: Path | None, asked: Asked, method: Method, report: Report) -> None:
    """Judge the photographs in `folder` among themselves, or each run in `runs` that is named like a subject.

    Raises ConfigError, DataError or ModelError.
    """
    real_set = read(folder)
    if runs is None:
        _photographs(real_set, method, report)
    else:
        _runs(real_set, runs, asked, method, report)


def read(folder: Path) -> RealSet:
    """The data set in `folder`. Raises DataError where it lacks lists of classes and prompts, or all subjects."""
    root = folder / "dataset" if os.path.lexists(folder / "dataset" / FILE_NAME) else folder
    remedy = "give --dreambench the folder of github.com/google/dreambooth that holds this file"
    text = inputs.read_text(root / FILE_NAME, remedy, DataError)
    rows = re.findall(r"^([a-z0-9_]+),([a-z ]+?)\s*$", text, re.M)
    classes = {subject: noun for subject, noun in rows if (subject, noun) != ("subject_name", "class")}
    first, _, second = text.partition("Live Subject Prompts")
    lists = [tuple(_templates(part)) for part in (first, second)]
    if not classes or not all(lists):
        raise DataError(
            f"{inputs.shown_path(root / FILE_NAME)} lists no classes, or no prompts of both kinds; {remedy}."
        )
    folders = {subject: root / subject for subject in classes if os.path.isdir(root / subject)}
    if not folders:
        raise DataError(f"{inputs.shown_path(root)} has no folder of any of the {len(classes)} subjects; {remedy}.")
    return RealSet(classes, folders, *lists)


def _templates(text: str) -> list[str]:
    """The prompts of one list, its positional slots by their names."""
    found = re.findall(r"^\s*'(.*\{0\} \{1\}.*)'\.format\(", text, re.M)
    return [line.replace("{0}", "{token}").replace("{1}", "{class}") for line in found]


def _photographs(real_set: RealSet, method: Method, report: Report) -> None:
    """Likeness of the real photographs: what an adapter could reach at most, and what the encoder can tell apart."""
    device = devices.found(method.device, "--device")
    names = method.encoder_names or encoders.default_names(None)
    paths = [(subject, path) for subject, folder in real_set.folders.items() for path in _listed(folder)]
    for tower in [encoders.encoder_named(name, device) for name in names]:
        with stop_requests() as stop:
            rows: list[Tensor] = []
            for done, (_, path) in enumerate(paths, start=1):
                stop.check(STOPPED)
                rows.append(tower.embed_images([images.read(path)]))
                report.progress("photographs", done, len(paths))
        _tell_photographs(real_set, tower, torch.cat(rows), [subject for subject, _ in paths], report)


def _listed(folder: Path) -> list[Path]:
    found = images.find(folder, max_megapixels=MAX_MEGAPIXELS, captions=False, remedy="Download the data set again")
    return [picture.path for picture in found.pictures if picture.path.suffix.lower() in ENDINGS]


def _tell_photographs(real_set: RealSet, tower: Encoder, features: Tensor, labels: list[str], report: Report) -> None:
    same, different = metrics.pairs(features, labels)
    report.event(
        "encoder",
        f"by {tower.record.name}, weights {tower.record.weights_sha256[:8]}, preprocessing "
        f"{tower.record.preprocessing_sha256[:8]}:",
        **vars(tower.record),
    )
    width = max(map(len, real_set.folders))
    ceilings = []
    for subject in real_set.folders:
        own = features[[row for row, label in enumerate(labels) if label == subject]]
        if len(own) > 1:
            ceilings.append(mean_interval(metrics.ceiling(own)).mean)
            text = f"{subject:<{width}}  {len(own)} photographs, to each other {ceilings[-1]:.3f}"
            report.event("subject", text, subject=subject, ceiling=ceilings[-1])
    if len(real_set.folders) > 1 and same:
        nearest, auc = metrics.nearest_is_same(features, labels), metrics.separation(same, different)
        ceiling = mean_interval(ceilings)
        report.event(
            "photographs",
            f"{len(real_set.folders)} subjects, {len(labels)} pictures: ceiling {ceiling.mean:.3f} "
            f"({ceiling.low:.3f} to {ceiling.high:.3f}), nearest neighbour of the same subject {nearest:.3f}, "
            f"AUC {auc:.3f}",
            ceiling=ceiling.mean,
            nearest=nearest,
            auc=auc,
        )


def _runs(real_set: RealSet, runs: Path, asked: Asked, method: Method, report: Report) -> None:
    """Each run on the data set's prompts and photographs, and the means over subjects."""
    found = {subject: runs / subject for subject in real_set.folders if kept.find(runs / subject, None) is not None}
    if not found:
        raise ConfigError(
            f"{inputs.shown_path(runs)} holds no run that is named like a subject, as {next(iter(real_set.folders))}; "
            "train with run.folder = RUNS/<subject>."
        )
    judged: dict[str, Scores] = {}
    for subject, run in found.items():
        report.event("subject", f"{subject}:")
        own = replace(asked, subject=real_set.folders[subject], class_noun=real_set.classes[subject])
        own = replace(own, out=None if asked.out is None else asked.out / subject)
        judged[subject] = evaluate(run, own, replace(method, templates=real_set.templates(subject)), report)
    for number, each in enumerate(next(iter(judged.values())).encoders):
        best = [one.encoders[number].candidates[one.encoders[number].best] for one in judged.values()]
        parts = []
        for name in SUMMED:
            if all(name in one.metrics for one in best):
                mean = mean_interval([one.metrics[name].mean for one in best])
                parts.append(f"{name} {mean.mean:.3f} ({mean.low:.3f} to {mean.high:.3f})")
        report.event("summary", f"{len(best)} subjects by {each.record.name}, each at its best: {', '.join(parts)}")
