"""The settings of what is seen of a run and what it hands over.

What lives here: [preview], [evaluate] and [export]. What does not: all that is learnt from (`settings.py`), where a run
computes and writes (`machine.py`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_booth.config.section import Sampler, Section, Strength, Texts


class PreviewConfig(Section):
    """[preview] — pictures drawn on the way, always with the same prompts and seeds."""

    prompts: Texts = Field(
        ("a photo of {token} {class}", "a photo of {token} {class} on the beach", "a photo of {class}"),
        description="What to draw. Slots: {token}, {class}.",
    )
    every_steps: int | None = Field(
        None, ge=1, description="Steps between previews. Default: only before the first step and after the last."
    )
    seed: int = Field(1, ge=0, lt=2**63, description="Seed of the first column.")
    images_per_prompt: int = Field(2, ge=0, le=16, description="Columns of the grid; 0 draws no previews.")
    negative_prompt: str = Field("", description="What not to draw.")
    sampler: Sampler = Field("dpm++", description="Solver. base: the base's own scheduler.")
    sampler_steps: int = Field(25, ge=1, le=1000, description="Denoiser calls per picture.")
    guidance_scale: float = Field(7.0, ge=0, le=50, description="Classifier-free guidance.")


class EvaluateConfig(Section):
    """[evaluate] — which of the kept checkpoints is exported, and by what that is found."""

    choose: Literal["best", "last"] = Field(
        "best",
        description="best: of the kept checkpoints at the strengths below, the one that draws most like the subject "
        "without forgetting too much, found by pictures. last: the last one as it is, and no picture is drawn for it.",
    )
    encoder: str | None = Field(
        None,
        min_length=1,
        description="miniature, efficientnet-lite2, a folder or hub id: measures pictures. Default: what suits the "
        "base, if it is installed; else the last checkpoint is exported.",
    )
    strengths: Annotated[tuple[Strength, ...], Field(strict=False, min_length=1, max_length=20)] = Field(
        (1.0, 0.8, 0.6),
        description="Strengths to compare, the most wanted first. The chosen one is put into the file, as its 1.",
    )
    max_share: float = Field(
        0.5, gt=0, le=100, description="The most passes that these pictures may take, as a share of those of training."
    )


class ExportConfig(Section):
    """[export] — the files handed to the user at the end."""

    formats: Annotated[tuple[Literal["diffusers", "kohya"], ...], Field(strict=False)] = Field(
        ("diffusers", "kohya"), description="diffusers: load_lora_weights. kohya: every Stable Diffusion UI."
    )
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="Type of the stored weights.")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}$",
        description="File name without ending. Default: token_class.",
    )
    cover: bool = Field(
        True, description="Keep a small preview picture in the file and beside it, for programs that show adapters."
    )
    author: str | None = Field(None, description="Written into the file's metadata if given.")
    license: str | None = Field(None, description="Written into the file's metadata if given.")
