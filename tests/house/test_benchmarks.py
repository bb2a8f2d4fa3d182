"""The benchmarks measure what they say, on bases so small that it takes seconds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peak_memory, peers, rates, step_time, time_to_adapter
from tests.support import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_ends(tmp_path_factory.mktemp("benchmarks") / "base")


def run(who: str, steps: int, processor_s: float, peak_mib: float = 100.0) -> peers.Run:
    return peers.Run(who, steps, 2 * processor_s, processor_s, peak_mib, None)


def test_a_step_is_the_median_of_what_more_steps_took_longer_and_the_rest_is_the_rest() -> None:
    runs = [run("a", 10, 30.0), run("a", 20, 40.0, 120.0), run("a", 10, 30.0), run("a", 20, 50.0), run("a", 10, 31.0)]
    row = peers.table([*runs, run("a", 20, 81.0)], 10, 20)["a"]
    assert row["step_processor_s"] == 2.0  # of 1, 2 and 5
    assert row["step_clock_s"] == 4.0
    assert row["rest_processor_s"] == 30.0 - 20.0
    assert row["peak_mib"] == 120.0


def test_a_benchmark_of_peers_goes_on_where_it_was(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def killed_at(count: int) -> Any:
        def measure(who: str, command: peers.Command, steps: int, out: Path) -> peers.Run:
            if len(seen) == count:
                raise KeyboardInterrupt
            seen.append((who, steps))
            (out / "run").mkdir(parents=True, exist_ok=True)
            (out / "run" / "summary.json").touch()
            return run(who, steps, 10.0 + steps * {"lora_booth": 1, "lora_booth_warm": 1, "diffusers": 2}[who])

        return measure

    (tmp_path / "train_dreambooth_lora.py").touch()
    words = ["peers", "--base", str(base), "--resolution", "64", "--few", "2", "--many", "4", "--rounds", "2"]
    words += ["--diffusers", str(tmp_path), "--kohya", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    results = tmp_path / "peers.json"
    monkeypatch.setattr(sys, "argv", [*words, "--results", str(results)])
    with monkeypatch.context() as patch:
        patch.setattr(peers, "measure", killed_at(4))
        with pytest.raises(KeyboardInterrupt):
            peers.main()
        patch.setattr(peers, "measure", killed_at(-1))
        peers.main()
    ours = [("lora_booth", 2), ("lora_booth", 4)]
    first = [("diffusers", 2), ("diffusers", 4), *ours]
    warm = [("lora_booth_warm", 2), ("lora_booth_warm", 4)]
    assert seen == [*first, warm[1], *warm, *first, *warm], "its cache is filled once"
    (found,) = json.loads(results.read_text())["cases"].values()
    assert len(found["runs"]) == 12 and found["medians"]["diffusers"]["step_processor_s"] == 2.0
    assert found["goals"] == {
        "step_processor_s of lora_booth at most that of diffusers": True,
        "peak_mib of lora_booth at most that of diffusers": True,
    }
    seen.clear()
    peers.main()
    assert seen == [], "all is measured"


def test_the_goals_of_a_job_are_compared_with_whoever_was_measured() -> None:
    rows = {
        name: {"rest_processor_s": rest, "step_processor_s": step, "peak_mib": 100.0}
        for name, rest, step in (("lora_booth", 30.0, 1.0), ("lora_booth_warm", 9.0, 1.0), ("diffusers", 10.0, 2.0))
    }
    assert [value for goal, value in peers.goals("small", rows).items() if "rest" in goal] == [False]
    assert [value for goal, value in peers.goals("sd1", rows).items() if "rest" in goal] == [True], "kohya is not there"
    assert all(peers.goals("sdxl_half", rows).values())


@pytest.mark.slow
def test_the_job_of_the_peers_runs_and_is_measured(base: Path, tmp_path: Path) -> None:
    script = f"import json, sys; json.dump(sys.argv, open({str(tmp_path / 'argv')!r}, 'w'))"
    for name in ("train_dreambooth_lora.py", "train_network.py"):
        (tmp_path / name).write_text(script)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "original_unet.py").write_text("BLOCK_OUT_CHANNELS = (320,)")
    pictures, classes = tmp_path / "pictures", tmp_path / "classes"
    for folder, count in ((pictures, 3), (classes, 2)):
        folder.mkdir()
        tiny.tiny_pictures(folder, count)
    job = peers.Job(base, pictures, classes, 64, "fp32")
    python = {"diffusers_python": sys.executable, "kohya_python": sys.executable}
    arguments = argparse.Namespace(diffusers=tmp_path, kohya=tmp_path, compiled=True, **python)
    commands = peers.commands(arguments, job)
    assert list(commands) == ["diffusers", "kohya", "lora_booth", "lora_booth_warm", "lora_booth_compiled"]
    assert "train.compile=true" in commands.pop("lora_booth_compiled")(1, tmp_path)
    (tmp_path / "out").mkdir()
    found = [peers.measure(who, command, 1, tmp_path / "out" / who) for who, command in commands.items()]
    assert "--cache_latents" in json.loads((tmp_path / "argv").read_text()), "kohya ran after diffusers"
    assert all(row.processor_s > 0 and row.peak_mib > 50 for row in found)
    summary = json.loads((tmp_path / "out" / "lora_booth" / "run" / "summary.json").read_text())
    assert summary["steps"] == 1
    (tmp_path / "train_dreambooth_lora.py").write_text("raise SystemExit('no such flag')")
    with pytest.raises(RuntimeError, match="no such flag"):
        peers.measure("diffusers", commands["diffusers"], 1, tmp_path / "out" / "diffusers")


def test_what_is_counted_on_the_cpu_is_what_was_predicted(base: Path) -> None:
    row = peak_memory.on_cpu(base, 0.5, 64)
    assert row.measured_gib == pytest.approx(row.predicted_gib, rel=0.02)


def test_a_step_s_time_memory_and_operations_are_measured(base: Path, tmp_path: Path) -> None:
    for name in ("pictures", "class"):
        (tmp_path / name).mkdir()
        tiny.tiny_pictures(tmp_path / name, 3)
    arguments = argparse.Namespace(out=tmp_path, precision="fp32", resolution=64, steps=4)
    card = rates.measured_card()
    assert card.tflops > 1e-3
    assert card.gb_per_s > 0.1
    slow = dataclasses.replace(card, tflops=1e-6)
    row = step_time.measure("half checkpointed", str(base), slow, arguments)
    assert row.step_s > 0
    assert row.least_s == pytest.approx(2 * row.tflop * 1e6, rel=0.1), "float32 at half the rate"
    assert row.peak_gib > 0.1
    assert row.tflop > 1e-3


def test_a_lever_that_begins_slowly_pays_after_some_steps_or_never() -> None:
    plain = step_time.Row("plain", 0.5, 1.0, 1.0, 1.0, 0.1, warm_up_s=1.0)
    compiled = dataclasses.replace(plain, lever="compiled", step_s=0.25, warm_up_s=21.0)
    assert step_time.break_even(compiled, plain) == 80
    assert step_time.break_even(dataclasses.replace(compiled, warm_up_s=0.0), plain) == 0
    assert step_time.break_even(dataclasses.replace(compiled, step_s=0.5), plain) is None


def test_the_parts_of_a_job_add_up_to_its_time(base: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    tiny.tiny_pictures(tmp_path / "pictures", 3)
    words = [f"model.base={base}", f"subject.images={tmp_path / 'pictures'}", "subject.class_noun=dog"]
    words += ["data.resolution=32", "data.bucket_step=16", "prior.mode=images", "prior.num_images=2"]
    words += [
        "prior.sampler_steps=1",
        "train.steps=2",
        "preview.images_per_prompt=0",
        f"run.cache={tmp_path / 'cache'}",
    ]
    parts = time_to_adapter.measure(words, tmp_path, "run")
    names = ["start-up", "loading", "class images", "encoding", "steps and previews", "files and pictures"]
    assert list(parts) == names, "two steps are too few to choose among checkpoints"
    assert all(seconds >= 0 for seconds in parts.values())
    assert parts["class images"] > 0
