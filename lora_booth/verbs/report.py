"""The report of a run as one HTML file, and of several the same side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_booth.config import names
from lora_booth.config.inputs import shown_path
from lora_booth.errors import ConfigError
from lora_booth.report import compare, page, record, write
from lora_booth.run import disk
from lora_booth.run.report import Report

COMPARISON = Path("comparison.html")
MAX_RUNS = 6
"""Side by side; there are as many colours."""


def report(folders: Sequence[Path], out: Path | None, report: Report) -> Path:
    """Make the report of a run anew, or compare several; returns the file.

    `out`: by default report.html in the run's folder, of several comparison.html in the current one. Only what was made
    here is replaced, and of a name that was given nothing. Raises ConfigError or DiskError.
    """
    if len({folder.resolve() for folder in folders}) != len(folders):
        raise ConfigError("a run is named twice; name each once.")
    if len(folders) > MAX_RUNS:
        raise ConfigError(f"{len(folders)} runs are too many to compare side by side; name at most {MAX_RUNS}.")
    if out is not None:
        _require_writable(out)
    records = [record.read(folder) for folder in folders]
    path = out or (folders[0] / write.FILE_NAME if len(folders) == 1 else COMPARISON)
    write.require_own(path)
    disk.write_text(path, page.page(records[0]) if len(records) == 1 else compare.page(records))
    for found in records:
        for fault in found.faults:
            report.warn(f"{shown_path(found.folder)}: {fault}")
    report.event("report", f"report: {path}", path=str(path))
    return path


def _require_writable(out: Path) -> None:
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {shown_path(out)} is no name of a page; let it end with .html.")
    names.require_new(out, "--out")
