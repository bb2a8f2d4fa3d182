"""The ablations of the DreamBooth paper, and some of our own, on the miniature.

    python -m tools.booth_mini.data --out build/booth_mini     # draws the subjects' pictures; needs npm
    python -m benchmarks.ablations                             # hours; the same command again continues
    python -m benchmarks.ablations --minutes 50                # no further run once 50 minutes have passed
    python -m benchmarks.ablations --list                      # what is done, and what is left
    python -m benchmarks.ablations report                      # docs/likeness.md and its plots from what there is

One run trains an adapter for one subject with configs/demo.toml and an arm's changes to it (arms.py), and judges it by
pictures drawn through it (judge.py). Its figures are added to docs/likeness.json at once, and its folder under --out
is removed. A run whose recipe, pictures or base have changed since is measured again.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablations import page, trained
from benchmarks.ablations.arms import ARMS, NUM_SEEDS, PHASES, STEPS, Run, State, Subject, schedule, subjects
from benchmarks.ablations.judge import Judge
from benchmarks.ablations.store import RESULTS, Outcome, Results
from lora_booth.config.settings import ModelConfig
from lora_booth.errors import Interrupted
from lora_booth.models import loading
from lora_booth.models.bases import sources
from lora_booth.run.report import Silent

GUESS_S = 120.0
"""Guess for a run of an arm of which none is done yet."""


def main() -> None:
    """Command line of the ablations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("measure", "report"), default="measure")
    parser.add_argument("--data", type=Path, default=Path("build/booth_mini"))
    parser.add_argument("--out", type=Path, default=Path("build/ablations"), help="runs on their way, and caches")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), help="only these")
    parser.add_argument("--seeds", nargs="*", type=int, choices=range(NUM_SEEDS), help="only these")
    parser.add_argument("--subjects", nargs="*", help="only these, by name")
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a rehearsal, kept apart in OUT/rehearsal.json")
    parser.add_argument("--list", action="store_true", help="tell what is done and what is left")
    arguments = parser.parse_args()
    if arguments.what == "report":
        page.write(Results(RESULTS).read(), RESULTS.parent)
        return
    everyone = subjects(arguments.data)
    results = Results(RESULTS if arguments.steps == STEPS else arguments.out / "rehearsal.json")
    wanted = [run for run in schedule(everyone, steps=arguments.steps) if _is_wanted(run, arguments)]
    if arguments.list:
        _tell(wanted, results, arguments.out)
        return
    try:
        _measure(wanted, results, arguments)
    except Interrupted as stopped:
        raise SystemExit(f"{stopped}") from None


def _is_wanted(run: Run, arguments: argparse.Namespace) -> bool:
    return (
        (not arguments.arms or run.arm.name in arguments.arms)
        and (not arguments.seeds or run.seed in arguments.seeds)
        and (not arguments.subjects or run.subject.name in arguments.subjects)
    )


def _measure(wanted: Sequence[Run], results: Results, arguments: argparse.Namespace) -> None:
    """Every wanted run that is not done yet, in turn."""
    began, out = time.monotonic(), arguments.out
    judge = Judge(arguments.data, out / "base")
    for number, run in enumerate(wanted, start=1):
        digest = run.digest(out, judge.fingerprint)
        if results.has(run, digest):
            continue
        _tell_subject(judge, run.subject, results)
        outcome = _outcome(run, judge, out)
        results.add(run, digest, outcome)
        trained.forget(run, out)
        gc.collect()
        minutes = (time.monotonic() - began) / 60
        last = outcome.figures[State(run.steps).name]
        print(
            f"{number}/{len(wanted)} {run.key}: trained {outcome.train_s:.0f} s, judged {outcome.judge_s:.0f} s; "
            f"likeness {last['likeness']:.3f}, leak {last['leak']:.3f}, others {last['other_change']:.3f}; "
            f"{minutes:.0f} minutes",
            flush=True,
        )
        if arguments.minutes is not None and minutes >= arguments.minutes:
            print("time is up; the same command continues")
            return
    print("all is measured; now: python -m benchmarks.ablations report")


def _outcome(run: Run, judge: Judge, out: Path) -> Outcome:
    """Train and judge one run."""
    token, figures, began = run.config(out).subject.token, {}, time.process_time()
    judge_s = 0.0
    for state, update in trained.updates(run, out, Silent()):
        before = time.process_time()
        figures[state.name] = judge.figures(run, token, update, state.strength)
        judge_s += time.process_time() - before
    return Outcome(figures, time.process_time() - began - judge_s, judge_s)


def _tell_subject(judge: Judge, subject: Subject, results: Results) -> None:
    if subject.name not in results.read()["subjects"]:
        values = {
            "class_noun": subject.class_noun,
            "others": subject.others,
            "ceiling": round(judge.ceiling(subject), 5),
        }
        results.tell_subject(subject.name, values)


def _tell(wanted: Sequence[Run], results: Results, out: Path) -> None:
    """A line for each arm: how many runs are done, and about how many processor minutes are left."""
    base = sources.fingerprint(loading.facts(ModelConfig(base="booth-mini")).path)
    runs = results.read()["runs"]
    done, left, seconds = defaultdict(int), defaultdict(int), defaultdict(list)
    for run in wanted:
        is_done = results.has(run, run.digest(out, base))
        (done if is_done else left)[run.arm.name] += 1
        if is_done:
            seconds[run.arm.name].append(runs[run.key]["train_s"] + runs[run.key]["judge_s"])
    every = [s for group in seconds.values() for s in group] or [GUESS_S]
    total = 0.0
    for name in [arm.name for phase in PHASES for arm in phase if arm.name in done or arm.name in left]:
        group = seconds[name] or every
        minutes = left[name] * sum(group) / len(group) / 60
        total += minutes
        print(f"{name:<14} {done[name]:3d} done, {left[name]:3d} left, about {minutes:4.0f} minutes of one processor")
    print(f"{'all':<14} {sum(done.values()):3d} done, {sum(left.values()):3d} left, about {total / 60:.1f} hours")


if __name__ == "__main__":
    main()
