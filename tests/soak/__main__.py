"""The long column: every campaign at release length, and its table in docs/reliability.md.

    python -m tests.soak                   # all, about four hours on two cores
    python -m tests.soak --only kills_at_random configs
    python -m tests.soak --share 0.1       # a tenth of the tries; 5 for five times as many

Rows that were run before stay in the table with their own date and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.soak import disks
from tests.soak.campaigns import CAMPAIGNS

OUT = Path("docs/reliability")


def main() -> int:
    """Run the chosen campaigns; the exit code tells whether one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(CAMPAIGNS), default=list(CAMPAIGNS))
    parser.add_argument("--share", type=float, default=1.0, help="of the tries")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = (
        json.loads(OUT.with_suffix(".json").read_text()) if OUT.with_suffix(".json").exists() else {}
    )
    has_failed = False
    for name in arguments.only:
        campaign, began = CAMPAIGNS[name], time.monotonic()
        if campaign.needs_root and not disks.can_mount():
            print(f"{name}: left out, only root may mount a small disk", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = campaign.run(max(1, round(campaign.many * arguments.share)), Path(folder), arguments.seed)
        has_failed |= bool(result.failures)
        rows[name] = {
            "what": (campaign.run.__doc__ or "").splitlines()[0],
            "tries": result.tries,
            "failures": len(result.failures),
            "note": result.note,
            "seconds": round(time.monotonic() - began),
            "seed": arguments.seed,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": _commit(),
        }
        print(f"{name}: {result.tries} tries, {len(result.failures)} failures, {result.note}", flush=True)
        for failure in result.failures[:20]:
            print(f"  {failure}", flush=True)
        _write(rows)
    return int(has_failed)


def _write(rows: dict[str, dict[str, Any]]) -> None:
    OUT.parent.mkdir(exist_ok=True)
    OUT.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Reliability",
        "",
        "Written by `make soak` (`python -m tests.soak`). A failure is a wrong byte, a lost checkpoint, a traceback, a "
        "hang, or half of a file taken for the whole.",
        "",
        f"Machine: {os.cpu_count()} CPU cores ({platform.machine()}), {platform.system()}, "
        f"Python {platform.python_version()}, torch {version('torch')}.",
        "",
        "| what is done to it | tries | failures | what else was seen | s | date, commit |",
        "|---|---|---|---|---|---|",
    ]
    for name in CAMPAIGNS:
        row = rows.get(name)
        if row is None:
            lines.append(f"| `{name}` | not yet run | | | | |")
        else:
            planned = CAMPAIGNS[name].many
            tries = f"{row['tries']:,}" + (f" of {planned:,} planned" if row["tries"] < planned else "")
            cells = (row["what"], tries, row["failures"], row["note"], row["seconds"])
            lines.append("| " + " | ".join(map(str, cells)) + f" | {row['date']}, {row['commit']} |")
    OUT.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _commit() -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
