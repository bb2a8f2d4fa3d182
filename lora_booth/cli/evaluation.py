"""The command `evaluate`; `app.py` hangs it on its app."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_booth.cli import parsing
from lora_booth.cli.adapters import Json, Quiet
from lora_booth.run import imports

Target = Annotated[
    Path | None,
    typer.Argument(help="A run folder, a checkpoint of one, an adapter file; with --dreambench a folder of runs."),
]
Base = Annotated[str | None, typer.Option(help="The base. Default: what the run or the file tells.")]
Real = Annotated[
    Path | None, typer.Option(help="Folder of real pictures that were not trained on. Default: the run's held-out.")
]
ClassNoun = Annotated[str | None, typer.Option(help="What the subject is. Default: the run's.")]
Token = Annotated[str | None, typer.Option(help="The word that names it. Default: the run's.")]
Encoder = Annotated[
    list[str] | None,
    typer.Option(help="miniature, efficientnet-lite2, a folder or hub id; repeatable, the first one chooses."),
]
Prompts = Annotated[
    Path | None, typer.Option(help="A text file with one prompt for each line, with {token} and {class}.")
]
Living = Annotated[
    bool | None, typer.Option("--living/--object", help="Which shipped prompts. Default: by the class noun.")
]
Strengths = Annotated[str, typer.Option(help="Strengths to try, e.g. 0.6,0.8,1.")]
Step = Annotated[str, typer.Option(help="Of a run: all kept checkpoints, best, last or a number.")]
Pictures = Annotated[int, typer.Option(help="Pictures for each prompt of the subject; papers draw 4.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the first picture. Default: the run's.")]
Sampler = Annotated[str | None, typer.Option(help="dpm++, ddim, euler or base. Default: the run's.")]
Steps = Annotated[int | None, typer.Option(help="Denoiser calls for each picture. Default: the run's.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance. Default: the run's.")]
Size = Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels; default: the run's, or the base's own.")]
Vram = Annotated[float | None, typer.Option(help="GiB of device memory to stay within. Default: what is free.")]
AtOnce = Annotated[int | None, typer.Option(help="Pictures that are drawn together.")]
Device = Annotated[str, typer.Option(help="What computes: auto, cuda, xpu, mps or cpu.")]
Dreambench = Annotated[
    Path | None, typer.Option(help="The folder of DreamBooth's data set; alone, its photographs are judged.")
]
Compare = Annotated[
    Path | None, typer.Option(help="Another run, or its scores.json: tell by how much the best differs.")
]
Out = Annotated[Path | None, typer.Option(help="Folder for scores.json and scores.png. Default: the run's own.")]


def evaluate(
    target: Target = None,
    base: Base = None,
    subject: Real = None,
    class_noun: ClassNoun = None,
    token: Token = None,
    encoder: Encoder = None,
    prompts: Prompts = None,
    living: Living = None,
    strengths: Strengths = "0.6,0.8,1",
    step: Step = "all",
    pictures: Pictures = 2,
    seed: Seed = None,
    sampler: Sampler = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = "",
    vram: Vram = None,
    at_once: AtOnce = None,
    device: Device = "auto",
    dreambench: Dreambench = None,
    compare: Compare = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure likeness, what was forgotten, and which checkpoint at which strength is the best.

    lora-booth evaluate runs/yql_dog
    lora-booth evaluate my_dog.safetensors --base sd15 --subject ./more_of_my_dog --class-noun dog --token yql
    """
    from lora_booth.cli.console import listening
    from lora_booth.errors import ConfigError

    with imports.sparing():
        from lora_booth.verbs import dreambench as verb_of_sets
        from lora_booth.verbs import evaluate as verb
        from lora_booth.verbs.evaluated import Asked

    asked = Asked(base, subject, class_noun, token, step, out)
    wishes: dict[str, object] = {"seed": seed, "sampler": sampler, "sampler_steps": steps, "guidance_scale": guidance}
    wishes |= {"budget_gib": vram, "pictures_at_once": at_once, "size_px": parsing.parse_size(size)}
    method = verb.Method(
        encoder_names=encoder or (),
        prompt_file=prompts,
        is_living=living,
        strengths=parsing.parse_strengths(strengths),
        per_prompt=pictures,
        wishes={name: value for name, value in wishes.items() if value is not None},
        device=device,
        compare=compare,
    )
    with listening(as_json=as_json, quiet=quiet) as report:
        if dreambench is not None:
            verb_of_sets.walk(dreambench, target, asked, method, report)
        elif target is None:
            raise ConfigError("there is nothing to judge; name a run folder or an adapter file, or --dreambench DIR.")
        else:
            verb.evaluate(target, asked, method, report)
