"""What each program will do with an adapter file, told to the user."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from lora_booth.adapter.programs.verdicts import Verdict, verdicts_of_file
from lora_booth.run.report import Report


def tell_programs(path: Path, family: str | None, report: Report, *, only: Container[str] | None = None) -> None:
    """One line for each program, or for those in `only`: how many layers it takes, where the file goes, what is lost.

    `family`: None when the file must tell it. Raises ModelError as `verdicts_of_file` does.
    """
    verdicts = [verdict for verdict in verdicts_of_file(path, family) if only is None or verdict.loader in only]
    width = max(len(verdict.loader) for verdict in verdicts)
    texts = [_outcome(verdict) for verdict in verdicts]
    text_width = max(map(len, texts))
    report.event("programs", f"layers of {path.name} that a program takes, and where to put the file:")
    for verdict, text in zip(verdicts, texts, strict=True):
        line = f"  {verdict.loader:<{width}}  {text:<{text_width}}  {verdict.folder}"
        report.event(
            "program",
            line,
            loader=verdict.loader,
            matched=verdict.matched,
            total=verdict.total,
            is_exact=verdict.is_exact,
            notes=list(verdict.notes),
        )
        for note in verdict.notes:
            report.event("note", f"  {'':<{width}}  {note}", loader=verdict.loader)


def _outcome(verdict: Verdict) -> str:
    if not verdict.matched:
        return f"none of {verdict.total}"
    return f"{verdict.matched} of {verdict.total}" + ("" if verdict.is_exact else ", changed")
