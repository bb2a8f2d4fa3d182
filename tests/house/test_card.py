"""The card kit records whatever becomes of a job, goes on where it was, and says plainly what nobody has measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.card import facts, kit, run, store
from benchmarks.card.kit import Kit, Part, parser
from benchmarks.card.store import Results

ROOT = Path(__file__).parents[2]
CARD = "Some Card"
BAD_JOBS = """\
import os, signal, sys
from benchmarks.card.kit import Kit, Part, parser
from benchmarks.card.outcomes import NotOffered, Unfinished
from benchmarks.card.worker import end_with_parent, work

def raises(error):
    raise error

def lingers():
    (kit.out / "pid").write_text(str(os.getpid()))
    signal.pause()

arguments = parser().parse_args(sys.argv[1:])
kit = Kit.of(arguments, card=arguments.card, date=arguments.date)
end_with_parent()
jobs = {
    "good": lambda: {"s": 1.5},
    "raises": lambda: raises(KeyError("no such thing")),
    "lacks memory": lambda: raises(RuntimeError("CUDA error: out of memory")),
    "knows a part": lambda: raises(Unfinished("half", {"passed": 3})),
    "is not offered": lambda: raises(NotOffered("by this device")),
    "aborts": os.abort,
    "exits": lambda: os._exit(3),
    "lingers": lingers,
    "last": lambda: {"s": 2.5},
}
chosen = [(name, jobs[name]) for name in os.environ["JOBS"].split(",")]
sys.exit(work(kit, Part("steps", "", 1, float(os.environ["JOB_S"])), chosen))
"""
PART = Part("steps", "", 1, 1)


def kit_of(folder: Path, *words: str, date: str = "2026-01-01T00:00:00+00:00") -> Kit:
    arguments = parser().parse_args(["--device=cpu", "--rehearse", f"--out={folder}", f"--peers={folder}/none", *words])
    return Kit.of(arguments, card=CARD, date=date)


def run_jobs(of: Kit, monkeypatch: pytest.MonkeyPatch, jobs: str, job_s: float = 600.0) -> dict[str, Any]:
    of.out.mkdir(exist_ok=True)
    (of.out / "jobs.py").write_text(BAD_JOBS)
    monkeypatch.setenv("JOBS", jobs)
    monkeypatch.setenv("JOB_S", str(job_s))
    run.run(of, PART, time.monotonic() + 600, [sys.executable, str(of.out / "jobs.py"), *of.words()])
    return Results(of.results, CARD).part("steps")


def states(records: dict[str, Any]) -> dict[str, str]:
    return {name: record["state"] for name, record in records.items()}


def test_whatever_becomes_of_a_job_is_recorded_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = "good,raises,lacks memory,knows a part,is not offered,aborts,exits,last"
    found = run_jobs(kit_of(tmp_path), monkeypatch, jobs)
    assert states(found) == {
        "good": "done",
        "raises": "failed",
        "lacks memory": "out of memory",
        "knows a part": "failed",
        "is not offered": "not offered",
        "aborts": "crashed",
        "exits": "crashed",
        "last": "done",
    }
    assert found["good"]["figures"] == {"s": 1.5} and found["good"]["date"] == "2026-01-01T00:00:00+00:00"
    assert found["good"]["commit"]
    assert "KeyError" in found["raises"]["message"] and found["is not offered"]["message"] == "by this device"
    assert found["knows a part"]["figures"] == {"passed": 3}
    assert "SIGABRT" in found["aborts"]["message"] and "exit code 3" in found["exits"]["message"]


def test_a_job_that_takes_too_long_ends_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_jobs(kit_of(tmp_path), monkeypatch, "lingers,last", job_s=2.0)
    assert states(found) == {"lingers": "out of time", "last": "done"}


def test_a_part_without_time_left_ends_and_says_what_was_not_begun(tmp_path: Path) -> None:
    of = kit_of(tmp_path)
    results = Results(of.results, CARD)
    for name, state in (("a", "done"), ("b", "running"), ("c", "waiting")):
        results.put("steps", name, state, figures={"passed": 7})  # type: ignore[arg-type]
    run.run(of, PART, time.monotonic(), [sys.executable, "-c", "import time; time.sleep(600)"])
    found = results.part("steps")
    assert states(found) == {"a": "done", "b": "out of time", "c": "out of time"}
    assert found["b"]["figures"] == {"passed": 7}, "what was known of it is kept"
    assert "not begun" in found["c"]["message"]


def test_a_part_that_cannot_begin_is_recorded_and_forgotten_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = kit_of(tmp_path)
    run.run(of, PART, time.monotonic() + 600, [sys.executable, "-c", "import a_package_that_is_missing"])
    found = Results(of.results, CARD).part("steps")
    assert states(found) == {"start": "crashed"}
    assert "a_package_that_is_missing" in found["start"]["message"]
    assert states(run_jobs(of, monkeypatch, "good")) == {"good": "done"}


def test_the_same_command_keeps_what_is_done_and_tries_the_rest_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = kit_of(tmp_path), kit_of(tmp_path, date="2026-01-02T00:00:00+00:00")
    run_jobs(first, monkeypatch, "good,raises")
    found = run_jobs(second, monkeypatch, "good,raises,last")
    assert [record["date"][:10] for record in found.values()] == ["2026-01-01", "2026-01-02", "2026-01-02"]
    third = kit_of(tmp_path, "--again", "--commit=abc1234", date="2026-01-03T00:00:00+00:00")
    found = run_jobs(third, monkeypatch, "aborts,good,last")
    assert {name: record["date"][8:10] for name, record in found.items()} == {
        "good": "03",
        "raises": "02",
        "last": "03",
        "aborts": "03",
    }
    assert found["last"]["commit"] == "abc1234" != found["raises"]["commit"]


def test_a_part_ends_with_the_kit_that_began_it_and_what_is_known_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = kit_of(tmp_path)
    (tmp_path / "jobs.py").write_text(BAD_JOBS)
    monkeypatch.setenv("JOBS", "good,lingers,last")
    monkeypatch.setenv("JOB_S", "600")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = (
        "import sys, time; from benchmarks.card import run; from benchmarks.card.kit import Kit, Part, parser\n"
        "arguments = parser().parse_args(sys.argv[2:])\n"
        "kit = Kit.of(arguments, card=arguments.card, date=arguments.date)\n"
        "run.run(kit, Part('steps', '', 1, 1), time.monotonic() + 600, [sys.executable, sys.argv[1], *sys.argv[2:]])"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "jobs.py"), *of.words()])
    until = time.monotonic() + 300
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until and parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    pid = int((tmp_path / "pid").read_text())
    while is_running(pid):
        assert time.monotonic() < until, "the part goes on without its kit"
        time.sleep(0.1)
    assert states(Results(of.results, CARD).part("steps")) == {"good": "done", "lingers": "running", "last": "waiting"}


def is_running(pid: int) -> bool:
    """Whether the process is there and no zombie, which nobody may have waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or ") Z " not in stat.read_text()


def test_other_versions_begin_anew_and_other_cards_stand_beside(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    old = {"driver": "1", "versions": {"torch": "2.13", "rich": "1"}}
    for name in ("A", "B"):
        Results(path, name).begin(old)
        Results(path, name).put("card", "torch", "done", figures={})
    Results(path, "A").begin(old | {"versions": {"torch": "2.13", "rich": "2"}})
    assert Results(path, "A").part("card"), "rich computes nothing"
    Results(path, "A").begin(old | {"versions": {"torch": "2.14"}})
    assert not Results(path, "A").part("card") and Results(path, "B").part("card")


def test_shares_add_up_to_the_minutes_and_leave_time_to_end() -> None:
    assert sum(share for _, share in kit.shares(None, 9)) == pytest.approx(530)
    (only,) = kit.shares(["memory"], 9)
    assert only == (next(part for part in kit.PARTS if part.name == "memory"), pytest.approx(530))


def test_what_is_missing_is_told_by_what_it_is_needed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    there = facts.versions.installed
    absent = ("torch", "bitsandbytes", "pytest")
    monkeypatch.setattr(facts.versions, "installed", lambda name: None if name in absent else there(name))
    needed, useful = facts.missing()
    assert needed == ["torch"]
    assert {"bitsandbytes", "pytest"} <= set(useful)
    absent = ("importlib-metadata",)
    assert facts.missing()[0] == [] and "importlib-metadata" in facts.missing()[1], "diffusers asks for it"


def test_the_kit_says_what_is_missing_where_nothing_is_installed(tmp_path: Path) -> None:
    words = [sys.executable, "-S", "-m", "benchmarks.card", "--device=cpu", "--rehearse", f"--out={tmp_path}"]
    done = subprocess.run(words, cwd=ROOT, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "not installed: torch, diffusers" in done.stdout and not done.stderr
    (entry,) = store.read(tmp_path / "card.json").values()
    assert "torch" in entry["facts"]["missing"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device=cpu"], "--rehearse"),
        (["--minutes=0.5"], "less than 1"),
        (["--device=cpu", "--rehearse", "--readme={}/no_marks"], "marks"),
        (["--device=cpu", "--rehearse", "--results={}/no_json"], "no_json"),
        (["--device=cpu", "--rehearse", "--readme={}/no_json/README.md"], "cannot go on"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(words: list[str], told: str, tmp_path: Path) -> None:
    for name in ("no_marks", "no_json"):
        (tmp_path / name).write_text("nothing")
    words = [word.format(tmp_path) for word in words]
    command = [sys.executable, "-m", "benchmarks.card", *words, f"--out={tmp_path}", "--write"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert told in done.stderr and "Traceback" not in done.stderr
