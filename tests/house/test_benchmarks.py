"""The benchmarks measure what they say, on bases so small that it takes seconds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

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


@pytest.mark.slow
def test_the_job_of_the_peers_runs_and_is_measured(base: Path, tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text(f"import json, sys; json.dump(sys.argv, open({str(tmp_path / 'argv')!r}, 'w'))")
    pictures, classes = tmp_path / "pictures", tmp_path / "classes"
    for folder, count in ((pictures, 3), (classes, 2)):
        folder.mkdir()
        tiny.tiny_pictures(folder, count)
    job = peers.Job(base, pictures, classes, 64, "fp32")
    arguments = argparse.Namespace(diffusers=script, kohya=script, kohya_python=sys.executable, compiled=True)
    commands = peers.commands(arguments, job)
    assert list(commands) == ["diffusers", "kohya", "lora_booth", "lora_booth_compiled"]
    assert "train.compile=true" in commands.pop("lora_booth_compiled")(1, tmp_path)
    (tmp_path / "out").mkdir()
    found = [peers.measure(who, command, 1, tmp_path / "out" / who) for who, command in commands.items()]
    assert "--cache_latents" in json.loads((tmp_path / "argv").read_text()), "kohya ran after diffusers"
    assert all(row.processor_s > 0 and row.peak_mib > 50 for row in found)
    summary = json.loads((tmp_path / "out" / "lora_booth" / "run" / "summary.json").read_text())
    assert summary["steps"] == 1
    script.write_text("raise SystemExit('no such flag')")
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
    names = ["start-up", "loading", "class images", "encoding", "steps and previews", "choosing", "files and pictures"]
    assert list(parts) == names
    assert all(seconds >= 0 for seconds in parts.values())
    assert parts["class images"] > 0
