"""Decoding in a process of its own: what hangs, crashes or wants too much costs its file, and nothing else."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from lora_booth.data import images, worker
from lora_booth.data.decode import Unusable
from lora_booth.errors import DataError
from tests.support import tiny


@pytest.fixture(autouse=True)
def _a_decoder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_decoder", worker._Decoder())


def slow_jpeg(path: Path) -> Path:
    """A progressive JPEG of 16 megapixels whose last scan comes 20,000 times; a file of a few MB."""
    Image.effect_noise((4000, 4000), 8).resize((4000, 4000)).save(path, progressive=True, quality=5)
    data = path.read_bytes()
    scan = data.rindex(b"\xff\xda")
    path.write_bytes(data[:scan] + data[scan:-2] * (60 * 2**20 // (len(data) - scan)) + data[-2:])
    return path


def test_a_picture_that_takes_for_ever_is_left_out_and_the_others_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.tiny_pictures(tmp_path, 3)
    slow_jpeg(tmp_path / "slow.jpg")
    monkeypatch.setattr(worker, "MAX_SECONDS", 4.0)
    began = time.monotonic()
    found = images.find(tmp_path, max_megapixels=64)
    assert time.monotonic() - began < 40
    assert len(found.pictures) == 3
    assert "slow.jpg takes longer than 4 s to decode; save it again" in str(found.left_out[0])


def test_a_decoder_that_crashes_costs_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (picture,) = tiny.tiny_pictures(tmp_path, 1)
    honest = worker._START
    monkeypatch.setattr(worker, "_START", "raise SystemExit(3)")
    with pytest.raises(Unusable, match=r"crashes its decoder \(3\)"):
        worker.inspect(picture, 64)
    monkeypatch.setattr(worker, "_START", honest)
    assert worker.inspect(picture, 64)[1] == (48, 48)


def test_a_decoder_that_cannot_be_started_is_not_the_fault_of_the_picture(tmp_path: Path) -> None:
    tiny.tiny_pictures(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, before[1]))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        os.close(taken.pop())  # for the folder that `find` lists
        with pytest.raises(DataError, match=r"can be started \(Too many open files\); .*`ulimit -a`"):
            images.find(tmp_path, max_megapixels=64)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in taken:
            os.close(descriptor)


def test_a_picture_that_needs_too_much_memory_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGBA", (5000, 5000)).save(tmp_path / "large.png")
    monkeypatch.setattr(worker, "MAX_BYTES", 400 * 2**20)
    with pytest.raises(Unusable, match=r"needs more than 0\.39 GiB to decode"):
        worker.decode(tmp_path / "large.png", None)


def test_memory_is_bounded_where_the_system_grants_any_address_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbound = "import lora_booth.run.systems\nlora_booth.run.systems.bound_own_memory = lambda max_bytes: None\n_serve"
    monkeypatch.setattr(worker, "_START", worker._START.replace("_serve(", unbound + "("))
    Image.new("RGBA", (9000, 9000)).save(tmp_path / "large.png")
    monkeypatch.setattr(worker, "MAX_BYTES", 400 * 2**20)
    with pytest.raises(Unusable, match=r"needs more than 0\.39 GiB to decode; save it smaller"):
        worker.decode(tmp_path / "large.png", None)
    (picture,) = tiny.tiny_pictures(tmp_path, 1)
    assert worker.inspect(picture, 64)[1] == (48, 48)


def test_a_decoder_whose_owner_was_killed_before_the_answer_ends_without_a_word(tmp_path: Path) -> None:
    (picture,) = tiny.tiny_pictures(tmp_path, 1)
    command = [sys.executable, "-c", worker._START, json.dumps(sys.path), str(worker.MAX_BYTES)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    child.stdout.close()  # whoever asks is gone
    child.stdin.write(json.dumps({"work": "inspect", "path": str(picture), "max_megapixels": 64}).encode() + b"\n")
    child.stdin.close()
    assert (child.wait(timeout=60), child.stderr.read()) == (0, b"")


def test_a_relative_path_is_that_of_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        tiny.tiny_pictures(tmp_path / name, 1)
        monkeypatch.chdir(tmp_path / name)
        assert worker.inspect(Path("picture_00.png"), 64)[1] == (48, 48)
        os.rename("picture_00.png", "moved.png")


def test_a_forked_process_has_a_decoder_of_its_own(tmp_path: Path) -> None:
    (picture,) = tiny.tiny_pictures(tmp_path, 1)
    first = worker._decoder._running().pid
    child = os.fork()
    if child == 0:
        is_right = worker.inspect(picture, 64)[1] == (48, 48) and worker._decoder._running().pid != first
        os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert worker.inspect(picture, 64)[1] == (48, 48)
    assert worker._decoder._running().pid == first


def test_ctrl_c_does_not_reach_it_and_it_ends_with_its_owner(tmp_path: Path) -> None:
    (picture,) = tiny.tiny_pictures(tmp_path, 1)
    process = worker._decoder._running()
    worker.inspect(picture, 64)
    assert os.getpgid(process.pid) != os.getpgid(0)
    process.send_signal(signal.SIGINT)
    assert worker.inspect(picture, 64)[1] == (48, 48)
    assert process.poll() is None
    assert process.stdin is not None
    process.stdin.close()  # what happens when the owner dies
    assert process.wait(timeout=20) == 0


def test_modules_beside_the_user_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL" / "__init__.py").write_text("raise SystemExit(5)")
    (picture,) = tiny.tiny_pictures(tmp_path / "pictures", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry not in ("", ".")])
    assert worker.inspect(picture, 64)[1] == (48, 48)
