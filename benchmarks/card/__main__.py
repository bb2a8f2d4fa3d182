"""All that only a CUDA card can show, measured within nine minutes: `make card`.

    make card                                                   # installs the exact versions first
    python -m benchmarks.card                                   # with what is installed; needs no network
    python -m benchmarks.card --minutes 60                      # on a slower card; the same command continues
    python -m benchmarks.card --parts steps whole --again       # these anew
    make card CARD_ARGS="--device cpu --rehearse"               # the same code on tiny bases and the CPU
    python -m benchmarks.card --write                           # README's table from docs/card.json

In this order: which card; the tests that need one; seconds of a step of SD 1.5 and SDXL, computed in every way, and by
diffusers' script; peak memory of every preset within 8, 12, 16 and 24 GiB against `plan`; from pictures to the adapter;
what the code assumes beside what was measured. Every figure is in docs/card.json as soon as it is known, and README's
table follows it. Weights are random, of the published shapes, and made here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from benchmarks.card import facts, page, run
from benchmarks.card.kit import ROOT, Kit, parser, shares
from benchmarks.card.store import Results
from lora_booth.errors import DiskError


def main() -> int:
    """Command line of the kit; 2 where nothing can be measured."""
    words = parser()
    words.description, words.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    arguments = words.parse_args()
    if arguments.device == "cpu" and not arguments.rehearse:
        words.error("--device cpu is for --rehearse; what a CPU takes is no figure of a card")
    if arguments.minutes < 1:
        words.error("--minutes is less than 1, in which nothing can be measured")
    if not hasattr(os, "killpg"):
        words.error("the kit ends what takes too long as Linux and macOS can; on Windows, run it in WSL")
    machine = facts.of_machine(arguments.device)
    kit = Kit.of(arguments, card=machine["name"], date=datetime.now(UTC).isoformat(timespec="seconds"))
    try:
        if arguments.write:
            _write_page(kit)
            return 0
        return _measure(kit, arguments, machine)
    except KeyboardInterrupt:
        print(f"stopped; what is known is in {kit.results}, and the same command continues")
        return 130
    except (OSError, DiskError) as error:
        print(f"the kit cannot go on: {error}", file=sys.stderr)
    except ValueError as error:  # of a file that is no JSON, or a README without its marks
        print(f"{kit.results} or {kit.readme} cannot be used: {error}; restore them with git", file=sys.stderr)
    return 2


def _measure(kit: Kit, arguments: argparse.Namespace, machine: dict[str, Any]) -> int:
    """Nothing outside of the standard library is imported before it is known what is missing."""
    needed, useful = facts.missing()
    print(f"{machine['name']}, driver {machine['driver']}; python {machine['python']}; results go to {kit.results}")
    for names, told in ((needed, "nothing can be measured without them"), (useful, "some figures may be missing")):
        if names:
            print(f"not installed: {', '.join(names)}; {told}", flush=True)
    results = Results(kit.results, kit.card)
    if needed:
        results.begin(machine)
        return 2
    from filelock import FileLock, Timeout

    kit.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(kit.out / "lock", timeout=0):
            results.begin(machine)
            return _run_parts(kit, arguments, results)
    except Timeout:
        print(f"another kit is measuring in {kit.out}; wait for it", file=sys.stderr)
        return 2


def _run_parts(kit: Kit, arguments: argparse.Namespace, results: Results) -> int:
    began = deadline = time.monotonic()
    for part, share_s in shares(arguments.parts, arguments.minutes):
        deadline += share_s
        print(f"{part.told}: until {deadline - began:.0f} s", flush=True)
        run.run(replace(kit, patience=share_s / part.budget_s), part, deadline)
        _write_page(kit)
        records = results.part("card")
        if part.name == "card" and records.get("torch", {}).get("state") != "done":
            said = [record["message"] for record in records.values() if "message" in record]
            print(f"nothing can be measured: {' '.join(said) or 'torch could not be asked'}", file=sys.stderr)
            return 2
    print(f"measured in {time.monotonic() - began:.0f} s; figures: {kit.results}, table: {kit.readme}")
    return 0


def _write_page(kit: Kit) -> None:
    if not kit.readme.exists():
        shutil.copyfile(ROOT / "README.md", kit.readme)
    page.write(kit.results, kit.readme)


if __name__ == "__main__":
    sys.exit(main())
