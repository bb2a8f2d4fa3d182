"""The process of one part: its jobs one by one, each recorded as soon as it is known.

What goes wrong in a job is its own: an error is recorded, and the process ends, since a CUDA error would spoil all that
comes after it; `run.py` begins another for the jobs that are left. An alarm ends a job that takes too long, also in
code that no exception reaches.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from benchmarks import record
from benchmarks.card.kit import PARTS, Kit, Part, parser
from benchmarks.card.outcomes import Figures, Job, NotOffered, Unfinished
from benchmarks.card.store import Results, State
from lora_booth.errors import lacks_memory

GO_ON = 75
"""The exit code of a process that wants another one to do the jobs that are left."""
MAX_HELD_BYTES = 64 << 20
"""Of device memory that a job leaves behind; more would count as the next one's."""
MAX_COLUMNS = 240
"""Of a line about an outcome; the whole of it is in the results."""


def main() -> None:
    """Command line: a part's name, then the words of the kit."""
    part = next(part for part in PARTS if part.name == sys.argv[1])
    end_with_parent()
    arguments = parser().parse_args(sys.argv[2:])
    kit = Kit.of(arguments, card=arguments.card, date=arguments.date)
    jobs = import_module(f"benchmarks.card.{part.name}").jobs(kit)
    sys.exit(work(kit, part, jobs))


def work(kit: Kit, part: Part, jobs: Iterable[Job]) -> int:
    """Do what is left of `jobs`; 0 when all are done, `GO_ON` when another process should."""
    results, jobs, commit = Results(kit.results, kit.card), list(jobs), kit.commit or record.commit()
    left = [(name, measure) for name, measure in jobs if not is_settled(kit, results.part(part.name).get(name, {}))]
    for name, _ in left:
        if not results.figures(part.name, name):  # with --again, what is known is kept until it is known anew
            results.put(part.name, name, "waiting")
    for name, measure in left:
        results.put(part.name, name, "running", date=kit.date, commit=commit)
        signal.setitimer(signal.ITIMER_REAL, part.job_s * max(1.0, kit.patience))
        began = time.perf_counter()
        state, values = _outcome(measure)
        signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = round(time.perf_counter() - began, 1)
        results.put(part.name, name, state, seconds=seconds, **values)
        print(f"  {name}: {told(state, values)} ({seconds:.0f} s)", flush=True)
        if state in ("failed", "out of memory") or _held_bytes() > MAX_HELD_BYTES:
            return GO_ON
    return 0


def is_settled(kit: Kit, found: dict[str, Any]) -> bool:
    """Whether a job's record is one to keep: done, or tried by this very call of the kit."""
    is_tried = found.get("date") == kit.date and found.get("state") != "waiting"
    return is_tried or (found.get("state") == "done" and not kit.is_again)


def told(state: State, values: dict[str, Any]) -> str:
    """An outcome in a line."""
    figures = ", ".join(f"{name} {_short(value)}" for name, value in values.get("figures", {}).items())
    message = next(iter(values.get("message", "").strip().splitlines()[-1:]), "")
    return (figures if state == "done" else f"{state}: {message}")[:MAX_COLUMNS]


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _outcome(measure: Callable[[], Figures]) -> tuple[State, dict[str, Any]]:
    try:
        return "done", {"figures": measure()}
    except NotOffered as why:
        return "not offered", {"message": str(why)}
    except Exception as error:  # whatever it is, it is this job's alone
        state: State = "out of memory" if lacks_memory(error) else "failed"
        figures = {"figures": error.figures} if isinstance(error, Unfinished) else {}
        return state, {"message": f"{type(error).__name__}: {error}", **figures}


def _held_bytes() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    gc.collect()
    return int(torch.cuda.memory_allocated())


def end_with_parent() -> None:
    """From now on this process, and all of its group, end once the kit that began it is gone: no two kits measure."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
