"""Seconds of a training step: each way to compute it, diffusers' own script, and what the card's peak rates allow.

All of them have the same job (`benchmarks/peers.py`): one instance and one class image a step, rank 8 on attention,
AdamW, nothing recomputed. They run alternately, each round all of them, each in a process of its own; a step is the
median between the ends of two optimizer steps, as the same clock sees them in every process.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, rates
from benchmarks.bases import kept_base, noise_pictures
from benchmarks.card.kit import ROOT, Base, Kit
from benchmarks.card.outcomes import Figures, Job, NotOffered
from benchmarks.card.store import Results
from lora_booth.config import toml
from lora_booth.errors import ConfigError
from lora_booth.models import cards
from lora_booth.models.cards import Card
from lora_booth.planning import decide, memory
from lora_booth.run.report import Silent


@dataclass(frozen=True)
class Mode:
    """A way to compute our step, as settings; `needs_card`: on a CPU it would silently be another one; `is_slow`: it
    takes minutes to begin."""

    settings: Mapping[str, object]
    needs_card: bool = True
    is_slow: bool = False


MODES = {
    "eager": Mode({"train.compile": "false"}, needs_card=False),
    "graphed": Mode({"train.compile": "graph"}),
    "compiled": Mode({"train.compile": "true"}, is_slow=True),
}
"""A mode that the settings do not know is told as not offered."""
PEER = "diffusers"
SCRIPTS = {"sd15": "train_dreambooth_lora.py", "sdxl": "train_dreambooth_lora_sdxl.py"}
"""Of github.com/huggingface/diffusers, examples/dreambooth; the families that are timed."""
PEAK = "at the peak rates"
WARM_UP_STEPS = 3
MAX_SAID_CHARACTERS = 900
_WATCHED = "watched.json"
FELL_BACK = "the run goes on without"
"""In the warning of a run that could not compute as it was told; what is timed then is another mode."""
NOTHING: Mapping[str, str] = {}


def job_name(base: Base, mode: str, number: int) -> str:
    """The job that times `mode` in round `number`, from 1 on."""
    return f"{base.name} {mode}, round {number}"


def jobs(kit: Kit) -> Iterator[Job]:
    """Each round every mode of every base, what is slow to begin last; the bounds before the first slow one."""
    bases = [kit.base(family) for family in SCRIPTS]
    for number in range(1, kit.scale.rounds + 1):
        for is_slow in (False, True):
            for base in bases:
                for mode in (mode for mode, of in MODES.items() if of.is_slow == is_slow):
                    yield job_name(base, mode, number), partial(_ours, kit, base, mode, number)
                if not is_slow:
                    yield job_name(base, PEER, number), partial(_peers, kit, base)
            if number == 1 and not is_slow:
                for base in bases:
                    yield f"{base.name} {PEAK}", partial(_bound, kit, base)


def _job(kit: Kit, base: Base) -> peers.Job:
    folder, side = kit.out / "steps", base.side_px
    return peers.Job(
        kept_base(kit.folder_of(base), base.architecture),
        noise_pictures(folder / f"subject_{side}", kit.scale.num_pictures, side),
        noise_pictures(folder / f"class_{side}", kit.scale.num_class_images, side),
        side,
        kit.scale.precision,
    )


def _settings(kit: Kit, base: Base, mode: str, out: Path) -> list[str]:
    """The words after `lora-booth train`."""
    own = {**kit.scale.run_settings, **MODES[mode].settings, "memory.device": kit.device}
    words = peers.our_words(_job(kit, base), kit.scale.steps, out)[1:]
    return [*words, *(f"{key}={value}" for key, value in own.items())]


def _ours(kit: Kit, base: Base, mode: str, number: int) -> Figures:
    """Raises NotOffered for a mode that this device or these settings do not know, or that the run gave up.

    In the first round a compiler finds nothing in its cache, so that its seconds are those of a first run.
    """
    if MODES[mode].needs_card and kit.device == "cpu":
        raise NotOffered("not offered on the CPU: runs there are the same bit for bit")
    out = kit.out / "steps" / "ours"
    shutil.rmtree(out, ignore_errors=True)
    compiled = kit.out / "steps" / f"compiled_{base.architecture}_{mode}"
    if number == 1:
        shutil.rmtree(compiled, ignore_errors=True)
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    words = ["-m", "lora_booth", "train", *_settings(kit, base, mode, out), "--json"]
    done = _watched(kit, words, environment)
    if done.returncode == ConfigError.exit_code:
        raise NotOffered(done.stderr.strip())
    return _figures(kit, done) | {"warnings": warnings_of(done.stdout)}


def warnings_of(said: str) -> list[str]:
    """What a run warned of. Raises NotOffered where it gave up the way in which it was to compute."""
    events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    warnings = [event["text"] for event in events if event["kind"] == "warning"]
    if fallen := [text for text in warnings if FELL_BACK in text]:
        raise NotOffered(fallen[0])
    return warnings


def _peers(kit: Kit, base: Base) -> Figures:
    """Raises NotOffered where diffusers' script is not there."""
    script = next(iter(sorted(kit.peers.rglob(SCRIPTS[base.family]))), None)
    if script is None:
        raise NotOffered(f"{SCRIPTS[base.family]} of diffusers is not in the folder that --peers names")
    out = kit.out / "steps" / PEER
    shutil.rmtree(out, ignore_errors=True)
    return _figures(kit, _watched(kit, [str(script), *peers.diffusers_words(_job(kit, base), kit.scale.steps, out)]))


def _watched(kit: Kit, what: list[str], environment: Mapping[str, str] = NOTHING) -> subprocess.CompletedProcess[str]:
    """A process whose steps `watched.py` writes into `_WATCHED`."""
    _used_mib()  # so that this process's own context lies on the card during the run too, as it does after it
    path = kit.out / "steps" / _WATCHED
    path.unlink(missing_ok=True)
    words = [sys.executable, str(ROOT / "benchmarks" / "watched.py"), str(path), *what]
    environment = {**os.environ, **environment}
    return subprocess.run(words, capture_output=True, text=True, errors="replace", check=False, env=environment)


def _figures(kit: Kit, done: subprocess.CompletedProcess[str]) -> Figures:
    """Of its steps. Raises RuntimeError, with its last words, where it failed."""
    if done.returncode:
        raise RuntimeError((done.stdout[-300:] + done.stderr)[-MAX_SAID_CHARACTERS:])
    watched = json.loads((kit.out / "steps" / _WATCHED).read_text(encoding="utf-8"))
    return figures_of(watched, _used_mib())


def figures_of(watched: Mapping[str, Any], used_by_others_mib: float | None) -> Figures:
    """Of what `watched.py` wrote. `begin_s`: from the start to the first step, with all that the first steps take
    longer; `outside_gib`: what the process held of the card beside torch's allocator."""
    ends = watched["steps_s"]
    assert len(ends) > WARM_UP_STEPS + 1, f"only {len(ends)} steps were seen"
    apart = [later - earlier for earlier, later in pairwise(ends)][WARM_UP_STEPS - 1 :]
    step_s = statistics.median(apart)
    figures = {
        "step_s": round(step_s, 5),
        "slowest_s": round(max(apart), 5),
        "begin_s": round(ends[WARM_UP_STEPS - 1] - WARM_UP_STEPS * step_s, 2),
    }
    if used_by_others_mib is not None and watched["outside_mib"] is not None:
        figures["peak_gib"] = round(watched["peak_device_mib"] / 1024, 3)
        figures["reserved_gib"] = round(watched["peak_reserved_mib"] / 1024, 3)
        figures["outside_gib"] = round((watched["outside_mib"] - used_by_others_mib) / 1024, 3)
    return figures


def _used_mib() -> float | None:
    """What all processes hold of the card now, this one's own context among it."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return float(total - free) / 2**20


def _bound(kit: Kit, base: Base) -> Figures:
    """The seconds that the step's operations need at the rates of the data sheet (None for a card that is not known),
    and at those that were measured here."""
    wished = toml.load(None, _settings(kit, base, "eager", kit.out / "steps" / "ours"))
    inputs = decide.look(wished, Silent())
    config = decide.filled(wished, inputs)
    work = memory.Modules.of(config, inputs.facts).step_work(config, None)
    known = Results(kit.results, kit.card).figures("card", "rates")
    measured = Card(**known) if known else rates.measured_card()
    sheet = cards.find(measured.name) if kit.device == "cuda" else None
    return {
        "tflop": round(work.flops / 1e12, 4),
        "sheet_s": None if sheet is None else round(work.seconds(sheet), 5),
        "measured_rates_s": round(work.seconds(measured), 5),
    }
