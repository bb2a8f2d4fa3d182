"""The command line: one command for each verb.

Each is a thin door; nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_booth.cli import adapters, evaluation, many, parsing, tokens
from lora_booth.cli import report as report_command
from lora_booth.cli.adapters import Json, LeaveOut, Quiet
from lora_booth.run import imports, systems

if TYPE_CHECKING:
    from lora_booth.config.config import Config
    from lora_booth.run.summary import Summary

EXIT_CODES = """Exit codes: 0 done, 1 a fault of lora_booth, of which it writes a report, 2 wrong command or config,
3 pictures, 4 model or adapter file, 5 memory, 6 disk, 7 NaN or infinity, 8 another process of the run is lost,
130/138/143 stopped by SIGINT/SIGUSR1/SIGTERM with everything saved."""

app = typer.Typer(
    name="lora-booth",
    help="A photo booth for diffusion models: a few pictures in, a small adapter that works everywhere out.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG.toml] [section.key=value …]", help="A config file, and settings on top of it."),
]
Subject = Annotated[Path | None, typer.Option(help="Folder with 3 or more pictures (subject.images).")]
ClassNoun = Annotated[str | None, typer.Option(help='What the subject is, e.g. "dog" (subject.class_noun).')]
Token = Annotated[str | None, typer.Option(help="The word that will name it (subject.token).")]
Base = Annotated[str | None, typer.Option(help="sd15, sd21, sdxl, booth-mini, a hub id, folder or .safetensors file.")]
Vram = Annotated[float | None, typer.Option(help="GiB of device memory to stay within (memory.budget_gib).")]
Prior = Annotated[str | None, typer.Option(help="What keeps the base: images, model, weights or none (prior.mode).")]
Out = Annotated[Path | None, typer.Option(help="Run folder (run.folder).")]


def main() -> None:
    """Entry point: whatever happens becomes one message and an exit code, never a traceback."""
    from lora_booth.cli.streams import lasting, lost
    from lora_booth.config.inputs import reason
    from lora_booth.errors import DiskError

    imports.leave_out_("bitsandbytes", "scipy")  # who trains, quantises or compares by them imports them by name
    with lasting() as output:
        _speak_plainly()
        code, message = _ending(sys.argv[1:])
        fault = lost(output)
        if not code and fault is not None:
            code = DiskError.exit_code
            message = f"what was printed could not be written ({reason(fault)}); free some space, or print elsewhere."
        if message:
            print(f"lora-booth: {message}", file=sys.stderr, flush=True)
    if code:
        sys.exit(code)


def _ending(words: list[str]) -> tuple[int, str]:
    """Run the command; its exit code, and what is to be said of it."""
    from lora_booth.cli import crash
    from lora_booth.config.inputs import reason
    from lora_booth.errors import DeviceMemoryError, LoraBoothError, lacks_memory
    from lora_booth.run.interrupts import exit_on_term

    try:
        with exit_on_term():
            _check_words(words)
            code = app(standalone_mode=False)  # a number where typer itself ended it: help, or Ctrl-C
        return (code, "stopped." if code == 130 else "") if isinstance(code, int) else (0, "")
    except LoraBoothError as error:
        return error.exit_code, str(error)
    except SystemExit as stop:
        return (stop.code, "") if isinstance(stop.code, int) else (int(bool(stop.code)), str(stop.code or ""))
    except (typer.Abort, KeyboardInterrupt):
        return 130, "stopped."
    except BaseException as error:
        if lacks_memory(error):
            advice = "close other programs that use the device, or ask for less at once"
            return DeviceMemoryError.exit_code, f"there is not enough memory ({reason(error)}); {advice}."
        if hasattr(error, "format_message"):  # click's usage errors carry their own message and exit code
            return getattr(error, "exit_code", 2), f"{error.format_message()} See `lora-booth --help`."
        return crash.EXIT_CODE, crash.told(error, words)


def _check_words(words: list[str]) -> None:
    """Raises ConfigError for words that no file and no config can hold."""
    from lora_booth.config import inputs

    for before, word in zip(["", *words], words, strict=False):
        option, equals, value = word.partition("=")
        if equals and option.startswith("--"):
            inputs.word(value, option)
        else:
            inputs.word(word, before if before.startswith("--") else "the word")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the embedded subject on the embedded miniature base: two to three minutes on two CPU cores, no network."""
    from lora_booth.cli.demo import demo_config, explain

    with _listening(as_json, quiet) as report:
        explain(report)
        _train(demo_config(out), report, systems.command_line(["lora-booth", *sys.argv[1:]]))


@app.command()
def train(
    settings: Settings = None,
    subject: Subject = None,
    class_noun: ClassNoun = None,
    token: Token = None,
    base: Base = None,
    prior: Prior = None,
    vram: Vram = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter. The same command again continues an interrupted run.

    lora-booth train configs/sd15_subject_12gb.toml subject.images=./my_dog
    lora-booth train --subject ./my_dog --class-noun dog --base sdxl --vram 12
    """
    config = _config(settings, subject, class_noun, token, base, prior, vram, out)
    with _listening(as_json, quiet) as report:
        _train(config, report, systems.command_line(["lora-booth", *sys.argv[1:]]))


@app.command()
def plan(
    settings: Settings = None,
    subject: Subject = None,
    class_noun: ClassNoun = None,
    token: Token = None,
    base: Base = None,
    prior: Prior = None,
    vram: Vram = None,
    card: Annotated[
        str | None, typer.Option(help='Card to plan for, as "RTX 3060": its memory and speed. Default: the one here.')
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Decide and show what `train` would do with the same arguments; run nothing."""
    from lora_booth.models import cards
    from lora_booth.verbs import plan as verb

    config = _config(settings, subject, class_noun, token, base, prior, vram, out)
    with _listening(as_json, False) as report:
        verb.show(config, report, None if card is None else cards.named(card))


@app.command()
def generate(
    base: Annotated[str, typer.Option(help="The base the adapter was trained on.")],
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeat for several.")],
    prediction: Annotated[
        str, typer.Option(help="What a checkpoint file without a mark predicts: epsilon or v_prediction.")
    ] = "auto",
    adapter: Annotated[list[str] | None, typer.Option(help="Adapter file, FILE or FILE:STRENGTH; repeatable.")] = None,
    strengths: Annotated[str, typer.Option(help="Columns of the grid, e.g. 0,0.5,1.")] = "1",
    negative: Annotated[str, typer.Option(help="What not to draw.")] = "",
    seed: Annotated[int, typer.Option(help="Seed; every cell of the grid starts from the same noise.")] = 1,
    sampler: Annotated[str, typer.Option(help="dpm++, ddim, euler or base.")] = "dpm++",
    steps: Annotated[int, typer.Option(help="Denoiser calls per picture.")] = 25,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 7.0,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels; default: the base's own.")] = "",
    vram: Annotated[
        float | None, typer.Option(help="GiB of device memory to stay within. Default: what is free.")
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(help="Pictures that are drawn together. Default: as many as fit.")
    ] = None,
    tiled: Annotated[
        bool | None, typer.Option(help="Decode in tiles: less memory, tones may differ a little. Default: if needed.")
    ] = None,
    offload_denoiser: Annotated[
        bool | None, typer.Option(help="The denoiser waits in main memory for other parts. Default: if needed.")
    ] = None,
    device: Annotated[str, typer.Option(help="What computes: auto, cuda, xpu, mps or cpu.")] = "auto",
    leave_out: LeaveOut = "",
    out: Annotated[Path, typer.Option(help="Folder for the pictures and grid.png.")] = Path("pictures"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw pictures with a base and adapters, as a grid of prompts and strengths."""
    with imports.sparing():
        from lora_booth.verbs import generate as verb

    with _listening(as_json, quiet) as report:
        verb.generate(
            base=base,
            prompts=prompt,
            adapters=[parsing.parse_adapter(text) for text in adapter or []],
            strengths=parsing.parse_strengths(strengths),
            prediction_type=prediction,
            picture=verb.PictureSettings(
                negative_prompt=negative,
                seed=seed,
                sampler=sampler,
                sampler_steps=steps,
                guidance_scale=guidance,
                size_px=parsing.parse_size(size),
                budget_gib=vram,
                pictures_at_once=at_once,
                is_tiled=tiled,
                is_denoiser_offloaded=offload_denoiser,
            ),
            device=device,
            leave_out=adapters.words(leave_out),
            folder=out,
            report=report,
        )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what of this machine would keep lora_booth from working, and the line that mends it; a bug report's start.

    Ends with 0 where runs can work, else with 2. Never asks the network. Where even this fails to start:
    python -m lora_booth.verbs.doctor
    """
    from lora_booth.verbs import doctor as verb

    sys.exit(verb.main(["--json"] if as_json else []))


@app.command()
def config(
    settings: Settings = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of config files, for editors.")
    ] = False,
) -> None:
    """Print the config that a file and settings make, complete and checked; or the schema of config files."""
    import json

    from lora_booth.config import toml
    from lora_booth.config.config import Config

    if schema:
        print(json.dumps(Config.model_json_schema(), indent=2))
    else:
        print(toml.to_toml(_config(settings)), end="")


@app.command()
def cache(
    folder: Annotated[Path | None, typer.Option(help="The cache (run.cache). Default: the user's.")] = None,
    base: Annotated[str | None, typer.Option(help="Only what was made with this base.")] = None,
    older_than: Annotated[str | None, typer.Option(help="Only what was not used for 12h, 30d or 4w.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove it, but for what a live run uses.")] = False,
    as_json: Json = False,
) -> None:
    """Tell what the cache holds (latents of your pictures, embeddings, class images), or clear it.

    lora-booth cache --clear --older-than 30d
    """
    from lora_booth.verbs.cache import cache as verb

    with _listening(as_json, False) as report:
        verb(folder, report, clear=clear, older_than=older_than, base=base)


for _command in (
    many.train_many,
    adapters.inspect,
    adapters.export,
    adapters.merge,
    adapters.resize,
    adapters.extract,
    evaluation.evaluate,
    report_command.report,
    tokens.tokens,
):
    app.command()(_command)


def _config(
    settings: list[str] | None,
    subject: Path | None = None,
    class_noun: str | None = None,
    token: str | None = None,
    base: str | None = None,
    prior: str | None = None,
    vram: float | None = None,
    out: Path | None = None,
) -> Config:
    """The config of a command line. Options win over settings, settings over the file."""
    from lora_booth.config import inputs, presets, toml
    from lora_booth.errors import ConfigError

    words = list(settings or [])
    paths = [word for word in words if "=" not in word or inputs.is_plain_file(Path(word))]
    if len(paths) > 1:
        raise ConfigError(
            f"{', '.join(map(inputs.shown, paths))}: only one config file can be given; settings are section.key=value."
        )
    options = {
        "subject.images": _path_text(subject),
        "subject.class_noun": class_noun,
        "subject.token": token,
        "model.base": base,
        "prior.mode": prior,
        "memory.budget_gib": vram,
        "run.folder": _path_text(out),
    }
    overrides = [word for word in words if word not in paths]
    overrides += [toml.override(key, value) for key, value in options.items() if value is not None]
    path = Path(paths[0]) if paths else presets.for_base(base)
    return toml.load(path, overrides)


def _path_text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _train(config: Config, report: Any, command: str) -> None:
    from lora_booth.planning.decide import look

    inputs = look(config, report)
    with imports.sparing():
        from lora_booth.verbs.train import train as run

    _show_summary(run(config, inputs=inputs, report=report, continue_command=command), report)


def _show_summary(summary: Summary, report: Any) -> None:
    from lora_booth.cli.console import clock

    parts = ", ".join(f"{part} {clock(seconds)}" for part, seconds in summary.seconds_of.items())
    lines = [
        f"{summary.steps} steps in {clock(summary.seconds)}, peak {summary.peak_gib:.1f} GiB, "
        f"{summary.num_parameters:,} trained parameters",
        f"of that: {parts}",
    ]
    lines += [f"{name} file: {path}" for name, path in summary.files.items()]
    if summary.exported_step is not None:
        lines += [f"exported: {summary.reason}", f"scores: {summary.scores}"]
    elif summary.best_step not in (None, summary.steps):
        command = f"lora-booth export {summary.folder} --step best"
        lines.append(
            f"exported is step {summary.steps}; the lowest validation loss has step {summary.best_step}: {command}"
        )
    if summary.before_and_after is not None:
        lines.append(f"before and after: {summary.before_and_after}")
    page = Path(summary.folder) / "report.html"
    if page.is_file():
        lines.append(f"report: {page}")
    for line in lines:
        report.event("summary", line)


def _listening(as_json: bool, quiet: bool) -> Any:
    from lora_booth.cli.console import listening

    return listening(as_json=as_json, quiet=quiet)


def _speak_plainly() -> None:
    """Keep libraries' own progress bars and notices out of the user's sight, and let every character be printed."""
    import logging
    import os
    import warnings

    systems.settle_streams()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Metal lacks is computed by the CPU
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
