"""The settings that say where a run computes and writes; none changes what it learns.

What lives here: [memory] and [run]. What does not: all that is learnt from (`settings.py`), what
is seen and handed over (`results.py`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_booth.config.section import FilePath, Section


class MemoryConfig(Section):
    """[memory] — what the run may use."""

    device: Literal["auto", "cuda", "xpu", "mps", "cpu"] = Field(
        "auto",
        description="What computes. auto: the graphics card that torch finds (cuda: NVIDIA, or AMD through ROCm; xpu: "
        "Intel; mps: Apple), else the CPU. Any other value is an error where torch finds no such device.",
    )
    budget_gib: float | None = Field(
        None, gt=0, le=1024, description="Device memory the run may use. Default: what the card has free."
    )
    pictures_at_once: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Class images and previews that are drawn together. Default: as many as the budget allows, at most "
        "8; 4 on a CPU.",
    )
    tiled_decoding: bool | None = Field(
        None,
        description="Decode pictures in overlapping tiles of 768 px: far less memory for SDXL, and tones may differ a "
        "little between tiles. Nothing that is trained on changes. Default: where the budget demands it.",
    )
    offload_activations: bool | None = Field(
        None,
        description="Of blocks that compute their activations again, the inputs too wait in main memory: half of what "
        "is left, for a copy there and back. Needs train.gradient_checkpointing. Default: where the budget demands it.",
    )
    offload_denoiser: bool | None = Field(
        None,
        description="The denoiser waits in main memory while prompts are encoded and while the VAE works. Default: "
        "where the budget demands it.",
    )


class RunConfig(Section):
    """[run] — where things are written."""

    folder: FilePath | None = Field(None, description="Run folder. Default: runs/<token>_<class>.")
    cache: FilePath | None = Field(None, description="Shared latents, embeddings, class images. Default: the user's.")
    cache_limit_gib: float = Field(
        20.0,
        gt=0,
        le=1_000_000,
        description="What the cache may hold; beyond it, what was not used for the longest goes when a run has "
        "prepared. 20: about fifty sets of 200 class images of SDXL, so that nobody has to think of it.",
    )
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "aim"], ...], Field(strict=False)] = Field(
        (),
        description="Who is told the metrics besides metrics.jsonl. tensorboard (lora-booth[tracking]) and aim write "
        "into the run folder; wandb sends them to its server. Each has to be installed.",
    )
    report: bool = Field(True, description="Keep report.html at saves, in at most 2 % of a run's time, and in the end.")
