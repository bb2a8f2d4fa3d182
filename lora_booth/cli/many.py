"""The command `train-many`; `app.py` hangs it on its app."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_booth.cli.adapters import Json, Quiet
from lora_booth.run import imports, systems

Source = Annotated[
    Path, typer.Argument(metavar="SUBJECTS", help="A TOML file of subjects, or a folder with a folder for each.")
]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value …]", help="Settings on top, of all subjects.")
]
ClassNoun = Annotated[
    str | None, typer.Option(help='What all subjects are, e.g. "dog", where neither file nor folder says (class_noun).')
]
Token = Annotated[str | None, typer.Option(help="The word that will name each of them (subject.token).")]
Base = Annotated[str | None, typer.Option(help="sd15, sd21, sdxl, booth-mini, a hub id, folder or .safetensors file.")]
Vram = Annotated[float | None, typer.Option(help="GiB of device memory to stay within (memory.budget_gib).")]
Out = Annotated[Path, typer.Option(help="Folder for the run folders and overview.html.")]


def train_many(
    subjects: Source,
    settings: Settings = None,
    class_noun: ClassNoun = None,
    token: Token = None,
    base: Base = None,
    vram: Vram = None,
    out: Out = Path("runs"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train many subjects, one after the other, on a base that is loaded once; each is a run folder of its own.

    The same command again continues. A subject that fails is told and passed over; then the exit code is that of the
    first failure.

    lora-booth train-many pets.toml --out runs/pets
    lora-booth train-many photos --class-noun dog --base sd15 optimizer.learning_rate=[1e-4,2e-4]
    """
    from lora_booth.cli.console import listening
    from lora_booth.cli.crash import told
    from lora_booth.config import presets, toml
    from lora_booth.config.inputs import shown
    from lora_booth.data import many
    from lora_booth.errors import ConfigError

    given = [] if base is None else [toml.override("model.base", base)]
    given += [] if vram is None else [toml.override("memory.budget_gib", vram)]
    unnamed = [word for word in settings or [] if "=" not in word]
    if unnamed:
        raise ConfigError(f"{shown(unnamed[0])} is no setting; write section.key=value, or all subjects into one file.")
    usual = toml.tables(presets.for_base(base)) if os.path.isdir(subjects) else {}
    words_of_all = {key: word for key, word in {"class_noun": class_noun, "token": token}.items() if word is not None}
    usual["subject"] = usual.get("subject", {}) | words_of_all
    runs = many.read(subjects, usual, out, [*(settings or []), *given])
    with imports.sparing():
        from lora_booth.verbs import train_many as verb

    words = sys.argv[1:]
    with listening(as_json=as_json, quiet=quiet) as report:
        ended = verb.train_many(
            runs,
            out,
            report,
            continue_command=systems.command_line(["lora-booth", *words]),
            tell_fault=lambda error: told(error, words),
        )
    failed = [(one.run.name, one.error) for one in ended if one.error is not None]
    if failed:
        name, error = failed[0]
        told_last = f"{len(failed)} of {len(ended)} subjects failed, {name} first: {error}"
        raise type(error)(
            f"{told_last}\nThe same command tries them again, and leaves those that are trained as they are."
        )
