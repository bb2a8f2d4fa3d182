"""What campaigns of commands call endless: what they tried, never how busy the machine is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_booth.cli import app
from tests.soak import commands


def _waits() -> None:
    read, _ = os.pipe()
    os.read(read, 1)


def _computes() -> None:
    try:
        while True:
            pass
    except Exception as error:
        raise SystemExit("taken for a fault of its own") from error


def _waits_for_a_process_that_computes() -> None:
    subprocess.run([sys.executable, "-c", "while True: pass"], check=False, timeout=600)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (_waits, "waits for 2 s and does nothing"),
        (_computes, "not done within 2 s of the processor"),
        (_waits_for_a_process_that_computes, "not done within 2 s of the processor"),
    ],
)
def test_a_command_that_never_ends_is_a_fault_that_the_command_cannot_catch(
    body: Callable[[], None], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if body is _waits:
        monkeypatch.setattr(commands, "MAX_STILL_SECONDS", 2)
    monkeypatch.setattr(commands, "MAX_PROCESSOR_SECONDS", 2.0)
    monkeypatch.setattr(app, "main", body)
    assert commands.run([], tmp_path).fault == fault
