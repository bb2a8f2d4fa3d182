"""The command `report`; `app.py` hangs it on its app."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_booth.cli.adapters import Json, Quiet

Runs = Annotated[list[Path], typer.Argument(help="Run folders; several are compared side by side.")]
Out = Annotated[
    Path | None,
    typer.Option(help="The file. Default: report.html in the run's folder; of several comparison.html here."),
]


def report(runs: Runs, out: Out = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Make the report of a run anew: one HTML file with pictures, curves, choices and how to use the adapter.

    lora-booth report runs/yql_dog
    lora-booth report runs/yql_dog runs/yql_dog_rank8 --out ranks.html
    """
    from lora_booth.cli.console import listening
    from lora_booth.run import imports

    with imports.sparing():
        from lora_booth.verbs import report as verb

    with listening(as_json=as_json, quiet=quiet) as listener:
        verb.report(runs, out, listener)
