"""The command that proposes words to name a subject with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_booth.cli.adapters import Json


def tokens(
    base: Annotated[str, typer.Option(help="sd15, sd21, sdxl, booth-mini, a folder or .safetensors file.")] = "sd15",
    class_noun: Annotated[str, typer.Option(help="What the subject is; the words are tried before it.")] = "dog",
    number: Annotated[int, typer.Option(help="How many words to tell.")] = 10,
    draw: Annotated[bool, typer.Option("--draw", help="Also draw what the base makes of each, with 4 seeds.")] = False,
    out: Annotated[Path | None, typer.Option(help="New folder for tokens.png.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoiser calls per picture. Default: 25.")] = None,
    device: Annotated[str, typer.Option(help="What draws: auto, cuda, xpu, mps or cpu.")] = "auto",
    as_json: Json = False,
) -> None:
    """Propose words to name a subject with: rare, one token, meaning little to the base, with the reason for each.

    lora-booth tokens --base sdxl --class-noun dog
    lora-booth tokens --base ./my_base --draw --out words
    """
    from lora_booth.cli.console import listening
    from lora_booth.errors import ConfigError
    from lora_booth.verbs.tokens import tokens as verb

    if draw != (out is not None):
        told = "--draw needs a folder for the picture; add --out." if draw else "--out means nothing without --draw."
        raise ConfigError(told)
    if steps is not None and not draw:
        raise ConfigError("--steps means nothing without --draw; leave it out.")
    with listening(as_json=as_json, quiet=False) as report:
        verb(
            base=base, class_noun=class_noun, number=number, folder=out, steps=steps or 25, device=device, report=report
        )
