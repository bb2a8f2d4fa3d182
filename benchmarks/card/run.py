"""One part in a process of its own, within its time; what the process cannot record any more is recorded here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.card.kit import ROOT, Kit, Part
from benchmarks.card.store import Results
from benchmarks.card.worker import GO_ON

START = "start"
"""The record of a process that ended before its first job."""
LAST_CHARACTERS = 900
"""Of what a process that crashed said last."""


def run(kit: Kit, part: Part, deadline: float, command: Sequence[str] = ()) -> None:
    """All jobs of `part`, until `deadline` (of `time.monotonic`); a process that ends badly is followed by another one
    for the jobs that are left. `command`: in place of the part's own."""
    results = Results(kit.results, kit.card)
    words = command or [sys.executable, "-m", "benchmarks.card.worker", part.name, *kit.words()]
    log = kit.out / f"{part.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    results.forget(part.name, START)
    code: int | None = GO_ON
    while code != 0:
        began = log.stat().st_size
        code = _code(words, kit, log, deadline)
        running = [name for name, record in results.part(part.name).items() if record["state"] == "running"]
        if code is None:
            _end(results, part, running, "its part had no time left")
            return
        if code not in (0, GO_ON) and not _has_told(results, part, running, code, _last_words(log, began)):
            return


def _has_told(results: Results, part: Part, running: Sequence[str], code: int, said: str) -> bool:
    """Record what ended the job that was `running`; False where none was, so that none would ever be."""
    for name in running:
        if code == -signal.SIGALRM:
            results.put(part.name, name, "out of time", message="it took longer than a job of its part may")
        else:
            results.put(part.name, name, "crashed", message=f"{_ending(code)}: {said}")
    if not running:
        results.put(part.name, START, "crashed", message=f"{_ending(code)}: {said}")
    return bool(running)


def _end(results: Results, part: Part, running: Sequence[str], why: str) -> None:
    for name in running:
        results.put(part.name, name, "out of time", message=why)
    for name, record in results.part(part.name).items():
        if record["state"] == "waiting":
            results.put(part.name, name, "out of time", message=f"not begun: {why}")


def _code(words: Sequence[str], kit: Kit, log: Path, deadline: float) -> int | None:
    """The exit code of a process group that is told to end at `deadline`; None where it had to be told."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            words, cwd=ROOT, env=_environment(kit), stdout=subprocess.PIPE, stderr=file, process_group=0
        )
        try:
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            while process.poll() is None and time.monotonic() < deadline:
                _copy(process.stdout.fileno(), file.fileno())
                time.sleep(0.1)
            _copy(process.stdout.fileno(), file.fileno())
            return process.poll()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _copy(source: int, file: int) -> None:
    """What a process has said by now, to the terminal and into the log."""
    with suppress(BlockingIOError):
        while data := os.read(source, 1 << 16):
            os.write(file, data)
            sys.stdout.write(data.decode(errors="replace"))
            sys.stdout.flush()


def _environment(kit: Kit) -> dict[str, str]:
    """No network; of a rehearsal on the CPU, no card either."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **own, **({"CUDA_VISIBLE_DEVICES": ""} if kit.device == "cpu" else {})}


def _last_words(log: Path, began: int) -> str:
    return log.read_bytes()[began:][-LAST_CHARACTERS:].decode(errors="replace").strip()


def _ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
