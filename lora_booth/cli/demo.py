"""Training on the embedded base and subject, for a first look.

It needs no GPU, no hub and no gigabyte to download.
"""

from __future__ import annotations

from pathlib import Path

from lora_booth.config import presets, toml
from lora_booth.config.config import Config
from lora_booth.run.report import Report

MASCOT = Path(__file__).parents[1] / "assets" / "mascot"


def demo_config(folder: Path) -> Config:
    """The miniature's preset with the mascot as subject; its run goes into `folder`."""
    overrides = [
        f"subject.images={MASCOT / 'instance'}",
        f"subject.held_out={MASCOT / 'held_out'}",
        f"run.folder={folder}",
        f"run.cache={folder.parent / 'cache'}",
    ]
    return toml.load(presets.MINIATURE, overrides)


def explain(report: Report) -> None:
    """Say what this is, so that nobody takes icons for what a real base draws."""
    report.event(
        "demo",
        "This is a miniature: 64-pixel icons, drawn by a small Stable Diffusion that ships with lora_booth. For the "
        "real thing name a base: lora-booth train --subject ./my_dog --class-noun dog --base sd15",
    )
