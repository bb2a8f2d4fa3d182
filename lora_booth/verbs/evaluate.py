"""How like its subject an adapter draws, what it forgot, and which candidate is best."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_booth.adapter import attach
from lora_booth.config import inputs
from lora_booth.data import images
from lora_booth.data.images import Picture
from lora_booth.errors import DeviceMemoryError, lacks_memory
from lora_booth.evaluation import encoders, scores
from lora_booth.evaluation import prompts as prompt_lists
from lora_booth.evaluation.bench import Bench, Setting
from lora_booth.evaluation.prompts import Prompts
from lora_booth.evaluation.scores import Scores
from lora_booth.evaluation.sheet import SHOWN_PROMPTS, sheet
from lora_booth.models import devices, loading
from lora_booth.models.at_once import PICTURES_AT_ONCE
from lora_booth.models.bases.sources import fingerprint
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.models.families.noise import Diffusion
from lora_booth.models.sampling import Sampling, denoiser_offloaded
from lora_booth.run import disk
from lora_booth.run.interrupts import stop_requests
from lora_booth.run.report import Report, Silent
from lora_booth.verbs import generate
from lora_booth.verbs.evaluated import Asked, Target, require_writable, strengths_of, target_of
from lora_booth.verbs.generate import PictureSettings

STRENGTHS = (0.6, 0.8, 1.0)
NOTHING = Asked()
MAX_MEGAPIXELS = 64.0
MAX_PER_PROMPT = 64
STALE_SECONDS = 3600.0
STOPPED = "stopped; nothing was written. The same command begins again."


@dataclass(frozen=True)
class Method:
    """How to judge. `encoder_names`: none for the one that suits; the first one chooses. `templates`: prompts with
    slots, None for the shipped list that suits, where `is_living` says which. `wishes`: fields of PictureSettings that
    are not to be as the run had them."""

    encoder_names: Sequence[str] = ()
    prompt_file: Path | None = None
    templates: Sequence[str] | None = None
    is_living: bool | None = None
    strengths: Sequence[float] = STRENGTHS
    per_prompt: int = 2
    wishes: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    compare: Path | None = None


def evaluate(path: Path, asked: Asked = NOTHING, method: Method | None = None, report: Report | None = None) -> Scores:
    """Draw with the base and with each checkpoint at each strength, measure, and write scores.json and scores.png.

    `path`: a run folder, a checkpoint of one, or an adapter file. The base's pictures are drawn once. Scores that are
    there already are replaced. Raises ConfigError, DataError, ModelError, DeviceMemoryError, DiskError, and Interrupted
    where a signal asked to stop.
    """
    report, method = report or Silent(), method or Method()
    strengths = strengths_of(method.strengths)
    inputs.require_number(method.per_prompt, "--pictures", 1, MAX_PER_PROMPT)
    generate.require_drawable(["a prompt"], strengths, replace(PictureSettings(), **method.wishes))
    target = target_of(path, asked, method.wishes, report)
    require_writable(target.folder)
    list_name, prompts = _prompts(target, method)
    others = None if method.compare is None else scores.read(_scores_file(method.compare))
    place = devices.found(method.device, "--device")
    names = tuple(dict.fromkeys(method.encoder_names)) or encoders.default_names(target.model.base)
    real, is_in_sample = _real(target, report)
    towers = [encoders.encoder_named(name, place) for name in names]
    facts = loading.facts(target.model)
    target = replace(
        target, picture=replace(target.picture, size_px=generate.checked_size(target.picture.size_px, facts))
    )
    texts = [*prompts.subject, *prompts.classes, *prompts.unrelated]
    weights = list(target.checkpoints.values())[:1]  # one is loaded at a time
    picture = generate.within_memory(target.picture, facts, texts, weights, place, report)
    with stop_requests() as stop, _told_plainly(picture, len(texts)):
        on_step = partial(stop.check, STOPPED)
        family = _family(target, facts, picture, place)
        opened = [images.read(one.path, sha256=one.sha256) for one in real]
        setting = Setting(
            family=family,
            condition=partial(_encoded, family, bool(picture.is_denoiser_offloaded)),
            prompts=prompts,
            negative_prompt=picture.negative_prompt,
            sampling=_sampling(picture, on_step),
            seed=picture.seed,
            per_prompt=method.per_prompt,
            towers=towers,
            real=[tower.embed_images(opened) if opened else None for tower in towers],
            report=report,
        )
        bench = _judged(target, strengths, setting)
    found = Scores(
        name=target.name,
        token=target.token,
        class_noun=target.class_noun,
        real={one.path.name: one.sha256 for one in real},
        is_in_sample=is_in_sample,
        drawing=setting.drawing(fingerprint(facts.path), list_name, target.token),
        encoders=bench.results(is_in_sample=is_in_sample),
    )
    _write(target, found, opened, bench, report)
    tell(found, report)
    if others is not None:
        _tell_difference(found, others, report)
    return found


def _judged(target: Target, strengths: Sequence[float], setting: Setting) -> Bench:
    """The base and all candidates, drawn and measured."""
    family = setting.family
    if not any(target.checkpoints.values()):
        setting.report.event("strengths", "a word alone is judged as it is: it has no strengths")
        strengths = (1.0,)
    bench = Bench(setting, len(target.checkpoints) * len(strengths))
    weights = {step: attach.fitted(family, target.name, found) for step, found in target.checkpoints.items()}
    pipeline = family.pipeline(setting.sampling.sampler)
    for step, layers in weights.items():
        names = attach.load_into_(pipeline, f"step_{step}", layers, family.name)
        with attach.words_learnt(family, target.words.get(step, ())):
            for strength in strengths:
                if names:
                    pipeline.set_adapters(names, adapter_weights=[strength] * len(names))
                bench.add(step, strength)
        if names:
            pipeline.delete_adapters(names)
    return bench


def _encoded(family: Family, is_offloaded: bool, texts: Sequence[str]) -> Conditioning:
    with torch.no_grad(), denoiser_offloaded(family, is_wanted=is_offloaded):
        return family.encode_prompts(texts)


def _prompts(target: Target, method: Method) -> tuple[str, Prompts]:
    """The name of the list, and the prompts of this subject."""
    if method.prompt_file is not None:
        name, templates = inputs.shown(method.prompt_file.name), prompt_lists.read(method.prompt_file)
    elif method.templates is not None:
        name, templates = "dreambooth", tuple(method.templates)
    else:
        name, templates = prompt_lists.templates_for(target.model.base, target.class_noun, is_living=method.is_living)
    unrelated = prompt_lists.unrelated_for(target.model.base)
    return name, prompt_lists.filled(templates, unrelated, token=target.token, class_noun=target.class_noun)


def _real(target: Target, report: Report) -> tuple[Sequence[Picture], bool]:
    """The real pictures, looked at but not kept, and whether they were trained on: those that were not, where there are
    any. Raises DataError where a folder has none."""
    if target.pictures is None:
        return (), False
    remedy = "Name a folder with pictures of the subject with --subject"
    found = images.find(target.pictures, max_megapixels=MAX_MEGAPIXELS, captions=False, remedy=remedy)
    for fault in found.left_out:
        if fault.path.suffix.lower() != ".txt":  # captions, which are not read here
            report.warn(f"left out: {fault}")
    unseen = [picture for picture in found.pictures if picture.sha256 not in target.trained]
    kind = "not trained on" if unseen else "in-sample: trained on, since no others are known"
    report.event("real", f"{len(unseen or found.pictures)} real pictures, {kind}")
    return unseen or found.pictures, not unseen


def _family(target: Target, facts: Any, picture: PictureSettings, device: torch.device) -> Family:
    dtype = devices.dtype_for(target.model.precision, device)
    is_offloaded = bool(picture.is_denoiser_offloaded)
    family = loading.load(target.model, device=device, dtype=dtype, base=facts, is_denoiser_offloaded=is_offloaded)
    if target.has_zero_terminal_snr and isinstance(family.schedule, Diffusion):
        family.schedule = family.schedule.rescaled_to_zero_terminal_snr()
    for weights in target.checkpoints.values():
        attach.fitted(family, target.name, weights)  # before anything is drawn
    for words in target.words.values():
        with attach.words_learnt(family, words):
            pass
    return family


def _sampling(picture: PictureSettings, on_step: Callable[[], None]) -> Sampling:
    assert picture.size_px is not None, "chosen before"
    return Sampling(
        *picture.size_px,
        picture.sampler,
        picture.sampler_steps,
        picture.guidance_scale,
        batch_size=picture.pictures_at_once or PICTURES_AT_ONCE,
        is_tiled=bool(picture.is_tiled),
        is_denoiser_offloaded=bool(picture.is_denoiser_offloaded),
        on_step=on_step,
    )


@contextmanager
def _told_plainly(picture: PictureSettings, num_prompts: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise DeviceMemoryError(generate.memory_advice(picture, num_prompts)) from error


def _write(
    target: Target,
    found: Scores,
    real: Sequence[Image.Image],
    bench: Bench,
    report: Report,
) -> None:
    first, prompts = found.encoders[0], bench.setting.prompts.subject[:SHOWN_PROMPTS]
    shown = [(scored, pictures) for scored, (_, _, pictures) in zip(first.candidates, bench.shown, strict=True)]
    title = f"{found.name}, measured by {first.record.name}"
    picture = sheet(title, prompts, real, bench.base_shown, shown, first)
    disk.remove_abandoned(target.folder, older_than_seconds=STALE_SECONDS)
    paths = [target.folder / name for name in (scores.FILE_NAME, "scores.png")]
    found.write(paths[0])
    disk.write_png(paths[1], picture)
    report.event("files", f"scores: {paths[0]}, {paths[1]}", path=str(paths[0]))


def tell(found: Scores, report: Report) -> None:
    """Print a table for each encoder, and which candidate is the best and why."""
    for each in found.encoders:
        kind = "in-sample" if found.is_in_sample else "unseen pictures"
        ceiling = "" if each.ceiling is None else f"; real pictures to each other {each.ceiling.mean:.3f}"
        report.event("encoder", f"by {each.record.name} ({kind}{ceiling}); mean ± half of a 90 % interval:")
        for line in scores.table(each):
            report.event("scores", line)
        best = each.candidates[each.best]
        report.event("best", f"best: {each.reason}", step=best.step, strength=best.strength)
        if not each.is_feasible:
            report.warn(
                "every candidate forgot too much, or leaks into its class; train fewer steps, or with a stronger prior."
            )


def _tell_difference(found: Scores, other: Scores, report: Report) -> None:
    for own, theirs in scores.require_comparable(found, other):
        best = [each.candidates[each.best] for each in (own, theirs)]
        parts = [
            f"{scores.SHORT[name]} {best[0].metrics[name].mean - best[1].metrics[name].mean:+.3f}"
            for name in scores.SHORT
            if all(name in one.metrics for one in best)
        ]
        report.event("compared", f"best against that of {other.name}, by {own.record.name}: {', '.join(parts)}")


def _scores_file(path: Path) -> Path:
    return path / scores.FILE_NAME if os.path.isdir(path) else path
