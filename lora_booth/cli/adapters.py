"""The commands for adapter files: inspect, export, merge, resize, extract.

`app.py` hangs them on its app.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_booth.run import imports

Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")]
File = Annotated[
    Path, typer.Argument(help="An adapter file (.safetensors) in kohya, LyCORIS, diffusers or PEFT naming.")
]
Rank = Annotated[int | None, typer.Option(help="Rank of every layer.")]
Energy = Annotated[float | None, typer.Option(help="Or: share of each layer's squared norm to keep, e.g. 0.95.")]
Format = Annotated[str | None, typer.Option("--format", help="kohya (every UI) or diffusers. Default: as the source.")]
Dtype = Annotated[str, typer.Option(help="fp16, bf16 or fp32.")]
LeaveOut = Annotated[
    str,
    typer.Option(help="Go on without norm, bias, embedding, unknown, or what a key or layer begins with; by commas."),
]


def inspect(
    file: File,
    picture: Annotated[Path | None, typer.Option(help="Also draw the norms of the blocks into this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Tell what an adapter file is: kind, layers, ranks, norms, base family, words, faults, what programs will do.

    Runs nothing from the file.
    """
    with imports.sparing():
        from lora_booth.verbs.inspect import inspect as verb

    with _listening(as_json, False) as report:
        verb(file, report, picture=picture)


def export(
    file: File,
    out: Annotated[Path | None, typer.Option(help="Folder to write into. Default: the file's own.")] = None,
    format: Annotated[list[str] | None, typer.Option(help="kohya, diffusers; repeatable. Default: both.")] = None,
    dtype: Dtype = "fp16",
    name: Annotated[str | None, typer.Option(help="Name of the files, without ending. Default: the source's.")] = None,
    trigger: Annotated[str | None, typer.Option(help="What a prompt must say. Default: what the file says.")] = None,
    cover: Annotated[Path | None, typer.Option(help="A picture made with the adapter, for the cards of UIs.")] = None,
    base: Annotated[str | None, typer.Option(help="The base; needed for DoRA's portable form.")] = None,
    leave_out: LeaveOut = "",
    step: Annotated[str | None, typer.Option(help="Of a run folder: which checkpoint, best, last or a number.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter in other formats, and tell what each program will do with it and where to put it.

    lora-booth export runs/yql_dog/yql_dog_diffusers.safetensors --out for_comfyui --format kohya
    lora-booth export runs/yql_dog --step best
    """
    with imports.sparing():
        from lora_booth.verbs.export import export as verb

    with _listening(as_json, quiet) as report:
        verb(
            file=file,
            out=out,
            formats=format or ("kohya", "diffusers"),
            dtype=dtype,
            name=name,
            trigger=trigger,
            cover=cover,
            base=base,
            leave_out=words(leave_out),
            step=step,
            report=report,
        )


def merge(
    adapter: Annotated[list[str], typer.Argument(help="Adapter files, FILE or FILE:STRENGTH.")],
    out: Annotated[Path, typer.Option(help="What to write: a folder or file as the base is, or an adapter file.")],
    base: Annotated[str | None, typer.Option(help="Merge into this base. Without it the adapters become one.")] = None,
    method: Annotated[
        str | None, typer.Option(help="concat (exact), svd, linear, ties, dare_linear, dare_ties. Default: concat.")
    ] = None,
    rank: Rank = None,
    density: Annotated[
        float | None, typer.Option(help="Share of each change that ties and dare keep. Default: 0.5.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of dare's choice. Default: 0.")] = None,
    format: Annotated[str | None, typer.Option(help="kohya or diffusers. Default: kohya.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp16, bf16 or fp32. Default: fp16; with --base as the base.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="sd1, sd2 or sdxl, where the files do not tell.")] = None,
    leave_out: LeaveOut = "",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge adapters into a base, in the layout that the base has, or into one adapter.

    lora-booth merge dog.safetensors:0.8 style.safetensors --base model.safetensors --out merged.safetensors
    lora-booth merge dog.safetensors style.safetensors:0.5 --out both.safetensors
    """
    from lora_booth.cli.parsing import parse_adapter
    from lora_booth.errors import ConfigError

    with imports.sparing():
        from lora_booth.verbs import merge as verb

    adapters = [parse_adapter(text) for text in adapter]
    choices: dict[str, Any] = {
        "method": method,
        "rank": rank,
        "density": density,
        "seed": seed,
        "dtype": dtype,
        "family": family,
        "format": format,
    }
    chosen = {name: value for name, value in choices.items() if value is not None}
    if base is not None and chosen:
        names = ", ".join(f"--{name}" for name in chosen)
        raise ConfigError(f"{names}: with --base this means nothing, since the base decides; leave it out.")
    users = {"density": ("ties", "dare_linear", "dare_ties"), "seed": ("dare_linear", "dare_ties")}
    for name, methods in users.items():
        if name in chosen and method not in methods:
            raise ConfigError(f"--{name} means nothing with --method {method or 'concat'}; leave it out.")
    if "format" in chosen:
        chosen["formats"] = (chosen.pop("format"),)
    with _listening(as_json, quiet) as report:
        if base is not None:
            verb.merge_into_base(base=base, adapters=adapters, out=out, leave_out=words(leave_out), report=report)
            return
        verb.merge_adapters(adapters=adapters, out=out, leave_out=words(leave_out), report=report, **chosen)


def resize(
    file: File,
    out: Annotated[
        Path | None, typer.Option(help="File to write. Default: the source's name and the new rank.")
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    base: Annotated[str | None, typer.Option(help="The base; needed for DoRA.")] = None,
    format: Format = None,
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32. Default: as the source.")] = None,
    leave_out: LeaveOut = "",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a plain LoRA of another rank out of an adapter of any kind, and tell the error of each block.

    lora-booth resize yql_dog.safetensors --rank 8
    """
    with imports.sparing():
        from lora_booth.verbs.resize import resize as verb

    with _listening(as_json, quiet) as report:
        verb(
            file=file,
            out=out,
            rank=rank,
            energy=energy,
            base=base,
            format=format,
            dtype=dtype,
            leave_out=words(leave_out),
            report=report,
        )


def extract(
    base: Annotated[str, typer.Option(help="The model that the fine-tuning began with.")],
    tuned: Annotated[str, typer.Option(help="The fine-tuned model: folder, .safetensors file or hub id.")],
    out: Annotated[Path, typer.Option(help="Adapter file to write.")],
    rank: Rank = None,
    energy: Energy = None,
    targets: Annotated[str, typer.Option(help="Which layers, as adapter.targets.")] = "all-linear+conv",
    text_encoders: Annotated[bool, typer.Option(help="Also what changed in the text encoders.")] = True,
    format: Annotated[str, typer.Option(help="kohya or diffusers.")] = "kohya",
    dtype: Dtype = "fp16",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make an adapter out of the difference between a fine-tuned model and its base, and tell what it does not hold.

    lora-booth extract --base sd15 --tuned my_model.safetensors --rank 32 --out my_model_lora.safetensors
    """
    with imports.sparing():
        from lora_booth.verbs.extract import extract as verb

    with _listening(as_json, quiet) as report:
        verb(
            base=base,
            tuned=tuned,
            out=out,
            rank=rank,
            energy=energy,
            targets=targets,
            text_encoders=text_encoders,
            format=format,
            dtype=dtype,
            report=report,
        )


def words(text: str) -> tuple[str, ...]:
    """The parts of `text` between commas."""
    return tuple(word.strip() for word in text.split(",")) if text else ()


def _listening(as_json: bool, quiet: bool) -> Any:
    from lora_booth.cli.console import listening

    return listening(as_json=as_json, quiet=quiet)
