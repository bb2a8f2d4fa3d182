"""The file of results: figures of every finished run, with seed, recipe's digest, seconds and circumstances."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ablations.arms import Run
from benchmarks.record import circumstances
from lora_booth.run import disk

RESULTS = Path(__file__).parents[2] / "docs" / "likeness.json"


@dataclass(frozen=True)
class Outcome:
    """What one finished run is worth: figures by state's name, and processor seconds."""

    figures: dict[str, dict[str, float]]
    train_s: float
    judge_s: float


class Results:
    """The file at `path`, read anew before every change, so that two processes may write in turn."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """{"circumstances": […], "subjects": {name: …}, "runs": {key: …}}."""
        if not self.path.is_file():
            return {"circumstances": [], "subjects": {}, "runs": {}}
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return found

    def has(self, run: Run, digest: str) -> bool:
        """Whether the run was measured by this very recipe."""
        return bool(self.read()["runs"].get(run.key, {}).get("digest") == digest)

    def add(self, run: Run, digest: str, outcome: Outcome) -> None:
        """Write the outcome of a run in place of an earlier one."""
        found, now = self.read(), circumstances()
        if now not in found["circumstances"]:
            found["circumstances"].append(now)
        figures = {state: {k: round(v, 5) for k, v in values.items()} for state, values in outcome.figures.items()}
        found["runs"][run.key] = {
            "digest": digest,
            "seed": run.seed,
            "circumstances": found["circumstances"].index(now),
            "train_s": round(outcome.train_s, 1),
            "judge_s": round(outcome.judge_s, 1),
            "figures": figures,
        }
        self._write(found)

    def tell_subject(self, name: str, values: dict[str, Any]) -> None:
        """Keep what belongs to a subject and not to a run."""
        found = self.read()
        if found["subjects"].get(name) != values:
            found["subjects"][name] = values
            self._write(found)

    def _write(self, found: dict[str, Any]) -> None:
        """A line for each run, so that versions can be compared."""
        head = json.dumps({k: found[k] for k in ("circumstances", "subjects")}, indent=1).removesuffix("\n}")
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(found['runs'][key])}" for key in sorted(found["runs"]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with disk.replacing(self.path) as temporary:
            Path(temporary).write_text(f'{head},\n "runs": {{\n{lines}\n }}\n}}\n', encoding="utf-8")
