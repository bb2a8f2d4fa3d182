"""What each part of the card kit measures, the table that is made of it, and rehearsals of all of it on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import peak_memory, watched
from benchmarks.card import card, facts, kit, memory, page, steps, store
from benchmarks.card import tests as gpu_tests
from benchmarks.card.outcomes import NotOffered
from benchmarks.card.store import Results
from lora_booth.config import presets
from lora_booth.errors import DeviceMemoryError
from tests.house.test_card import CARD, ROOT, kit_of, states


def test_a_way_to_compute_that_the_settings_do_not_know_is_not_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = kit_of(tmp_path)
    monkeypatch.setitem(steps.MODES, "sideways", steps.Mode({"train.compile": "sideways"}, needs_card=False))
    jobs = dict(steps.jobs(of))
    with pytest.raises(NotOffered, match=r"train\.compile is .sideways"):
        jobs["SD 1.5 sideways, round 1"]()
    with pytest.raises(NotOffered, match="on the CPU"):
        jobs["SD 1.5 graphed, round 1"]()
    with pytest.raises(NotOffered, match=r"train_dreambooth_lora_sdxl\.py"):
        jobs["SDXL diffusers, round 1"]()


def test_a_mode_that_a_run_refuses_or_gives_up_is_not_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steps.MODES, "graphed", steps.Mode({"train.compile": "graph"}, needs_card=False))
    with pytest.raises(NotOffered, match="which the CPU cannot do"):
        dict(steps.jobs(kit_of(tmp_path)))["SD 1.5 graphed, round 1"]()
    lines = [json.dumps({"kind": kind, "text": f"{kind} of it"}) for kind in ("saved", "warning")]
    assert steps.warnings_of("\n".join(["no JSON", *lines])) == ["warning of it"]
    lines += [json.dumps({"kind": "warning", "text": "no graph (reason); the run goes on without."})]
    with pytest.raises(NotOffered, match="no graph"):
        steps.warnings_of("\n".join(lines))


def test_the_code_says_it_in_the_words_that_are_looked_for() -> None:
    sources = [ROOT / "lora_booth" / "training" / name for name in ("compiling.py", "graphs.py")]
    assert all(f"{steps.FELL_BACK}." in path.read_text(encoding="utf-8") for path in sources)


def test_slow_ways_of_a_round_come_last_and_every_round_has_all(tmp_path: Path) -> None:
    of = replace(kit_of(tmp_path), is_rehearsal=False)
    names = [name for name, _ in steps.jobs(of)]
    assert len(names) == len(set(names)) == kit.FULL.rounds * 2 * (len(steps.MODES) + 1) + 2
    first = names[: names.index("SD 1.5 eager, round 2")]
    assert [name for name in first if "compiled" in name] == first[-2:]
    assert {name.replace("round 1", "round 2") for name in first} >= set(names) - set(first)


def test_a_step_is_the_median_between_ends_after_warm_up_and_the_rest_is_the_beginning() -> None:
    watched = {"steps_s": [30.0, 40.0, 41.0, 43.0, 45.0, 50.0], "peak_device_mib": None, "outside_mib": None}
    assert steps.figures_of(watched, None) == {"step_s": 2.0, "slowest_s": 5.0, "begin_s": 35.0}
    watched |= {"peak_device_mib": 2048.0, "peak_reserved_mib": 3072.0, "outside_mib": 1536.0}
    found = steps.figures_of(watched, 512.0)
    assert (found["peak_gib"], found["reserved_gib"], found["outside_gib"]) == (2.0, 3.0, 1.0)


def test_steps_of_a_foreign_loop_are_seen_at_their_ends(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import sys, torch\n"
        "optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])\n"
        "for _ in range(int(sys.argv[1])):\n"
        "    optimizer.step()\n"
    )
    words = [ROOT / "benchmarks" / "watched.py", tmp_path / "out.json", tmp_path / "train.py", "4"]
    subprocess.run([sys.executable, *map(str, words)], check=True)
    found = json.loads((tmp_path / "out.json").read_text())["steps_s"]
    assert len(found) == 4 and found == sorted(found) and found[0] > 0


def test_every_preset_is_run_within_every_budget_what_it_is_made_for_first(tmp_path: Path) -> None:
    cases = memory.cases(kit_of(tmp_path))
    of_families = {path for path in presets.FOLDER.glob("*.toml") if path.name.startswith("sd")}
    assert len(of_families) == 12 and {path for case in cases for path in case.presets} == of_families
    assert len(cases) == 7 * len(kit.REHEARSAL.budgets_gib)
    assert [case.is_own for case in cases] == sorted((case.is_own for case in cases), reverse=True)
    assert len({case.name for case in cases}) == len(cases)


def test_what_was_computed_alike_within_less_memory_is_not_measured_again(tmp_path: Path) -> None:
    of = kit_of(tmp_path)
    small, large = (c for c in memory.cases(of) if c.name.startswith("sd15_subject"))
    jobs = dict(memory.jobs(of))
    first = jobs[small.name]()
    Results(of.results, CARD).put("memory", small.name, "done", figures=first)
    assert first["fits"] and first["predicted_gib"] > 0 and first["measured"] == "not offered on the CPU"
    counts, latents = of.out / "memory" / "cache" / "counts.txt", of.out / "memory" / "cache" / "latents"
    assert counts.is_file() and list(latents.iterdir())
    again = jobs[large.name]()
    assert counts.is_file(), "nothing is counted twice"
    assert not list(latents.iterdir()), "every run makes its own"
    assert again["same_as"] == small.name and again["budget_gib"] == large.budget_gib
    assert again["predicted_gib"] == first["predicted_gib"]


def pretend_card(monkeypatch: pytest.MonkeyPatch, **figures: Any) -> list[Any]:
    """torch's functions answer as on a card of 16 GiB; returns what the allocator is capped at, as it is."""
    caps: list[Any] = []
    answers = {
        "is_available": True,
        "is_initialized": True,
        "mem_get_info": (4 << 30, 16 << 30),
        "get_device_properties": SimpleNamespace(total_memory=16 << 30),
        "get_device_name": "Some Card",
        "get_device_capability": (9, 0),
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 3 << 30,
        "max_memory_reserved": 5 << 30,
        "memory_reserved": 2 << 30,
    }
    for name, answer in (answers | figures).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", caps.append)
    return caps


def test_a_run_on_a_card_is_capped_and_what_its_tensors_and_the_allocator_held_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = kit_of(tmp_path)
    case = next(case for case in memory.cases(of) if case.name == "sd15_subject within 8 GiB")
    caps = pretend_card(monkeypatch)
    monkeypatch.setattr(peak_memory, "devices", SimpleNamespace(here=lambda _: torch.device("cuda")))
    found = dict(memory.jobs(of))[case.name]()
    assert caps == [pytest.approx((8 - 0.8) / 16), 1.0]
    assert (found["measured_gib"], found["reserved_gib"], found["fits"]) == (3.0, 5.0, True)

    def lacks_memory(*_: object, report: Any, **__: object) -> None:
        report.event("memory", "memory: 9 of 8 GiB predicted, with little", gib=9.8)
        raise DeviceMemoryError("none left")

    monkeypatch.setattr(peak_memory.train, "train", lacks_memory)
    found = dict(memory.jobs(of))[case.name]()
    assert (found["measured_gib"], found["measured"], found["fits"]) == (None, "does not fit", False)
    assert found["predicted_gib"] == 9.0 and found["chosen"] == "little" and caps[-1] == 1.0
    with pytest.raises(NotOffered, match=r"has 16\.0 GiB"):
        dict(memory.jobs(replace(of, device="cuda")))["sd15_subject within 24 GiB"]()


def test_what_lies_outside_of_the_allocator_is_what_the_card_holds_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_card(monkeypatch)
    assert watched._device_memory() == {"peak_device_mib": 3072, "peak_reserved_mib": 5120, "outside_mib": 10240}
    assert steps._used_mib() == 12 * 1024


def test_a_card_is_named_by_its_driver_and_by_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho $* > {tmp_path}/words\necho 'NVIDIA H200, 580.1, 9.0, 143771 MiB'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    found = facts.of_machine("cuda")
    assert found["name"] == "NVIDIA H200" and found["driver"] == "580.1" and found["compute_capability"] == "9.0"
    assert "--id=1" in (tmp_path / "words").read_text()
    program.write_text("#!/bin/sh\nexit 9\n")
    assert facts.of_machine("cuda")["driver"] == "unknown"
    jobs = dict(card.jobs(replace(kit_of(tmp_path), device="cuda")))
    with pytest.raises(NotOffered, match="finds no CUDA card"):
        jobs["torch"]()
    pretend_card(monkeypatch)
    assert jobs["torch"]()["total_gib"] == 16.0


def test_tests_are_counted_with_the_first_line_of_what_failed(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "pytestmark = getattr(pytest.mark, 'gpu')\n"
        "def test_good() -> None: ...\n"
        "def test_bad() -> None:\n    assert 1 == 2, 'one is not two'\n"
        "@pytest.fixture\ndef broken() -> None:\n    raise OSError('no disk')\n"
        "def test_broken(broken: None) -> None: ...\n"
        "@pytest.mark.skipif(True, reason='no card')\ndef test_skipped() -> None: ...\n"
    )
    program = (
        "import json, sys; from pathlib import Path; from benchmarks.card import tests\n"
        "known = []; at = Path(sys.argv[1])\n"
        "found = tests.run([at / 'test_some.py'], at / 'tmp', lambda figures: known.append(figures['passed']))\n"
        "(at / 'out.json').write_text(json.dumps([found, len(known)]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    found, times_known = json.loads((tmp_path / "out.json").read_text())
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert "one is not two" in found["failures"]["test_bad"] and "no disk" in found["failures"]["test_broken"]
    assert found["skips"] == {"Skipped: no card": 1} and times_known == 4
    assert not (tmp_path / "tmp").exists()


def test_the_tests_that_need_a_card_are_found() -> None:
    assert ROOT / "tests" / "training" / "test_gpu.py" in gpu_tests.files()


def measured() -> dict[str, Any]:
    """What a card might have shown."""

    def done(**figures: Any) -> dict[str, Any]:
        return {"state": "done", "date": "2026-03-04T05:06:07+00:00", "commit": "abc", "figures": figures}

    row = {"presets": ["sd15_style_12gb"], "fits": True, "measured": ""}
    parts = {
        "tests": {"make test-gpu": {"state": "out of time", "figures": {"passed": 20, "failed": 1, "skipped": 0}}},
        "steps": {
            "SD 1.5 eager, round 1": done(step_s=0.2),
            "SD 1.5 eager, round 2": done(step_s=0.4),
            "SD 1.5 graphed, round 1": {"state": "not offered", "message": "no"},
            "SD 1.5 diffusers, round 1": done(step_s=0.6),
            "SD 1.5 at the peak rates": done(sheet_s=0.05, measured_rates_s=0.07),
        },
        "memory": {
            "sd15_style within 12 GiB": done(**row, budget_gib=12, predicted_gib=3.21, measured_gib=3.3),
            "sd15_style within 8 GiB": done(
                **row | {"measured": "does not fit"}, budget_gib=8, predicted_gib=3.1, measured_gib=None
            ),
        },
        "whole": {
            "SD 1.5, prior.mode model": done(in_all_s=41.4),
            "SD 1.5, prior.mode images": {"state": "out of time"},
        },
        "assumptions": {"OUTSIDE_GIB": done(assumed=0.8, measured=0.61)},
    }
    return {CARD: {"facts": {"driver": "5", "versions": {"torch": "2.13", "rich": "1"}}, "parts": parts}}


def test_the_table_says_what_was_measured_by_what_and_what_was_not() -> None:
    rows = [line.strip("| ").split(" | ") for line in page.lines(measured()) if not line.startswith("| |")]
    found = {row[0]: row[1] for row in rows if len(row) == 2}
    assert found["driver, versions, date"] == "driver 5, torch 2.13, 2026-03-04"
    assert found["the tests that need a card, `make test-gpu`"] == "20 passed, 1 failed, 0 skipped, out of time"
    step = found["a step of SD 1.5 at 512 px, one instance and one class image"]
    assert step == (
        "eager 0.3 s; graphed not offered; diffusers' script 0.6 s (2.00×); at the data sheet's rates 0.05 s; "
        "at the rates measured here 0.07 s"
    )
    assert found["a step of SDXL at 1024 px, one instance and one class image"] == "not yet measured"
    (fits,) = (cell for label, cell in found.items() if "`sd15_style_12gb`" in label)
    assert fits == "within 8: does not fit (3.1); within 12: 3.3 (3.2)"
    assert found["from 5 pictures to the adapter, SD 1.5 at 512 px, by prior"] == (
        "the model's own 41 s; class images: out of time"
    )
    assert found["outside of torch's allocator"] == "0.61 GiB (assumed 0.8)"


def test_readme_says_what_docs_card_json_says() -> None:
    readme, cards = (ROOT / "README.md").read_text(encoding="utf-8"), store.read(ROOT / "docs" / "card.json")
    assert page.placed(readme, cards) == readme, "run: python -m benchmarks.card --write"
    assert cards or page.NOTHING in readme
    assert page.NOTHING in "\n".join(page.lines({}))
    assert "Some Card" in page.placed(readme, measured())


def test_the_guide_names_every_benchmark_and_its_command() -> None:
    guide = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    modules = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks").glob("*/__main__.py")]
    names = [path.parent.name if path.stem == "__main__" else path.stem for path in modules]
    commands = [f"python -m benchmarks.{name}" for name in names]
    runnable = [command for command, path in zip(commands, modules, strict=True) if command in path.read_text("utf-8")]
    assert len(runnable) >= 8
    for command in runnable:
        assert command in guide and f"`{command.rpartition('.')[2]}`" in guide, command
    for part in kit.PARTS:
        assert f"`{part.name}`" in guide


REHEARSAL = [sys.executable, "-m", "benchmarks.card", "--device=cpu", "--rehearse", "--minutes=60"]


def rehearse(folder: Path, *words: str) -> dict[str, Any]:
    """The records of a rehearsal, by part and job."""
    documents = [(ROOT / name).read_bytes() for name in ("README.md",)]
    command = [*REHEARSAL, f"--out={folder}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert documents == [(ROOT / name).read_bytes() for name in ("README.md",)], "a rehearsal is no measurement"
    (entry,) = store.read(folder / "card.json").values()
    assert "| CPU, " in (folder / "README.md").read_text(encoding="utf-8")
    return dict(entry["parts"])


def test_a_rehearsal_of_the_quick_parts_gives_figures_or_says_why_not(tmp_path: Path) -> None:
    parts = rehearse(tmp_path, "--parts", "card", "assumptions")
    assert states(parts["card"]) == {"torch": "done", "rates": "done"}
    assert parts["card"]["rates"]["figures"]["tflops"] > 0
    assert set(states(parts["assumptions"]).values()) == {"not offered"}
    assert "never begun" in parts["assumptions"]["ASSUMED_S, SDXL"]["message"]


@pytest.mark.slow
def test_a_whole_rehearsal_gives_a_figure_or_says_what_a_cpu_does_not_offer(tmp_path: Path) -> None:
    for name in steps.SCRIPTS.values():
        (tmp_path / "peers").mkdir(exist_ok=True)
        (tmp_path / "peers" / name).write_text(
            "import torch\n"
            "optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(9))])\n"
            "for _ in range(8):\n    optimizer.step()\n"
        )
    parts = rehearse(tmp_path, f"--peers={tmp_path / 'peers'}")
    assert list(parts) == [part.name for part in kit.PARTS]
    for part, records in parts.items():
        for job, record in records.items():
            assert record["state"] in ("done", "not offered"), f"{part}: {job}: {record}"
            assert record.get("figures") or record["message"]
    assert parts["tests"][gpu_tests.JOB]["figures"]["skipped"] >= 22
    done = {job for job, record in parts["steps"].items() if record["state"] == "done"}
    assert {"SD 1.5 eager, round 1", "SDXL diffusers, round 1", "SDXL at the peak rates"} <= done
    assert all(record["figures"]["predicted_gib"] > 0 for record in parts["memory"].values())
    assert len([record for record in parts["whole"].values() if record["figures"]["in_all_s"] > 0]) == 4
