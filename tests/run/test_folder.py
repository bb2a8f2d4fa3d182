"""The run folder: checkpoints that can be trusted, one owner at a time, no mixing of runs."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image

from lora_booth.config import toml
from lora_booth.config.config import Config
from lora_booth.errors import ConfigError, DiskError
from lora_booth.run import checkpoints, disk, folder
from lora_booth.run.checkpoints import Checkpoint
from lora_booth.run.folder import Run, _locked, require_free_space
from lora_booth.run.summary import Summary

INPUTS = {"base": {"files": "abc"}, "pictures": {"a.jpg": "1", "b.jpg": "2"}}


def config(**sections: dict[str, Any]) -> Config:
    values = {"model": {"base": "sd15"}, "subject": {"images": "x", "class_noun": "dog"}}
    return Config.model_validate({**values, **sections})


def checkpoint(step: int, loss: float = 1.0) -> Checkpoint:
    parameter = torch.nn.Parameter(torch.linspace(0, 1, 5))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    adapter = {"unet.a": parameter.detach().clone()}
    return Checkpoint(step, adapter, optimizer.state_dict(), {"validation_loss": loss, "scaler": {"scale": 2.0}})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "run", config(), INPUTS)


def steps_kept(run: Run) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run.folder / "checkpoints").glob("step-*"))


def test_a_checkpoint_reads_back_exactly(run: Run) -> None:
    saved = checkpoint(3)
    run.save(saved, keep_last=2)
    loaded = run.latest(pytest.fail)
    assert loaded is not None
    assert (loaded.step, loaded.state["scaler"]) == (3, {"scale": 2.0})
    assert torch.equal(loaded.adapter["unet.a"], saved.adapter["unet.a"])
    old, new = saved.optimizer, loaded.optimizer
    assert new["param_groups"] == old["param_groups"]
    assert new["state"].keys() == old["state"].keys() == {0}
    assert all(torch.equal(new["state"][0][k], old["state"][0][k]) for k in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "empty"])
def test_a_damaged_checkpoint_is_named_and_passed_over(name: str, harm: str, run: Run) -> None:
    run.save(checkpoint(1), keep_last=5)
    path = run.save(checkpoint(2), keep_last=5) / name
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 0x10
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[: len(data) // 2]), "empty": b"", "remove": b""}[harm])
    if harm == "remove":
        path.unlink()
    told: list[str] = []
    loaded = run.latest(told.append)
    assert loaded is not None
    assert (loaded.step, len(told)) == (1, 1)
    assert "step-000002 is damaged" in told[0]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_pipe_or_a_device_in_a_checkpoint_is_never_read(name: str, run: Run) -> None:
    run.save(checkpoint(1), keep_last=5)
    path = run.save(checkpoint(2), keep_last=5) / name
    for make in (os.mkfifo, lambda at: at.symlink_to("/dev/zero"), lambda at: at.symlink_to("/dev/full"), Path.mkdir):
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        make(path)  # reading it would wait for ever, or never end
        told: list[str] = []
        loaded = run.latest(told.append)
        assert loaded is not None and loaded.step == 1
        assert len(told) == 1 and "step-000002 is damaged" in told[0]
        assert run.best_step() in (1, 2)


def test_the_newest_checkpoint_is_the_one_of_the_highest_step_not_of_the_latest_clock(run: Run) -> None:
    for step in (9, 10, 2):
        path = run.save(checkpoint(step), keep_last=9)
        os.utime(path, (0, 0) if step == 10 else (time.time(), time.time()))
    loaded = run.latest(pytest.fail)
    assert loaded is not None
    assert loaded.step == 10


def test_the_last_n_and_the_best_are_kept(run: Run) -> None:
    for step, loss in ((1, 0.9), (2, 0.5), (3, 0.8), (4, 0.7), (5, 0.6)):
        run.save(checkpoint(step, loss), keep_last=2)
    assert steps_kept(run) == [2, 4, 5]
    assert run.best_step() == 2


def test_a_save_that_dies_leaves_the_old_ones_and_no_orphan_after_the_next_start(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(checkpoint(1), keep_last=2)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(disk, "move", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        run.save(checkpoint(2), keep_last=2)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    loaded = run.latest(pytest.fail)
    assert loaded is not None
    assert loaded.step == 1
    (run.folder / ".summary.json.abc.tmp").write_text("{")
    run.close()
    Run.open(run.folder, config(), INPUTS).close()
    assert {p.name for p in (run.folder / "checkpoints").iterdir()} == {"step-000001"}
    assert not list(run.folder.glob("*.tmp"))


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name_and_the_name_before_an_old_one_goes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(checkpoint(1, loss=2.0), keep_last=1)
    order: list[str] = []

    def told(module: Any, name: str, word: Callable[[Any], str]) -> None:
        honest = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *words, **more: (order.append(word(words)), honest(*words, **more))[1])

    for name in ("sync", "sync_folder"):
        told(disk, name, lambda words: f"sync {words[0].name.rpartition('-')[0] or words[0].name}")
    told(disk, "move", lambda _: "rename")
    told(shutil, "rmtree", lambda words: f"remove {Path(words[0]).name.rpartition('-')[0]}")
    run.save(checkpoint(2), keep_last=1)
    names = ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json", ".saving"]
    assert order == [*(f"sync {name}" for name in names), "rename", "sync checkpoints", "remove .saving", "remove step"]


def test_a_run_killed_before_its_config_was_written_may_start_again(tmp_path: Path) -> None:
    for name in (".lock", "..owner.json.x1.tmp", ".inputs.json.x2.tmp", ".config.toml.x3.tmp", "inputs.json"):
        (tmp_path / name).write_text("{")
    Run.open(tmp_path, config(), INPUTS).close()
    assert {p.name for p in tmp_path.iterdir()} == {".lock", ".owner.json", "inputs.json", "config.toml"}


def test_a_checkpoint_whose_manifest_names_fewer_files_is_damaged(run: Run) -> None:
    path = run.save(checkpoint(1), keep_last=5) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["optimizer.safetensors"]
    path.write_text(json.dumps(manifest))
    told: list[str] = []
    assert run.latest(told.append) is None
    assert len(told) == 1


@pytest.mark.parametrize("content", [b"", b"[1]", b"[" * 100_000, b"\xff", b"null", b"9" * 5000])
@pytest.mark.parametrize("name", ["inputs.json", "summary.json"])
def test_a_damaged_file_of_the_run_is_named_with_what_to_do(name: str, content: bytes, run: Run) -> None:
    run.close()
    (run.folder / name).write_bytes(content)
    with pytest.raises(DiskError, match=rf"{name} (is not|cannot be read).*; (put it back|remove it)"):
        Run.open(run.folder, config(), INPUTS).summary()


SUMMARY = Summary("run", {"kohya": "a.safetensors"}, None, 4, 1.5, 2.0, 8, 0.25, {"loading": 1})


def test_a_summary_is_what_was_written_or_damaged(run: Run) -> None:
    assert run.summary() is None
    run.finish(SUMMARY)
    expected = SUMMARY.moved(lambda name: str(run.folder / name), str(run.folder))
    assert run.summary() == expected
    sound = json.loads(run.summary_path.read_text())
    run.summary_path.write_text(json.dumps(sound | {"of a later version": 1}))
    assert run.summary() == expected
    for key, value in (
        ("steps", "4"), ("steps", 1.5), ("steps", True), ("seconds", float("nan")), ("seconds", 10**400),
        ("files", None), ("files", {"kohya": 1}), ("seconds_of", {"loading": None}), ("folder", []),
        ("before_and_after", 3), ("validation_loss", None),
    ):  # fmt: skip
        run.summary_path.write_text(json.dumps(sound | {key: value}))
        with pytest.raises(DiskError, match=f'summary.json is damaged: "{key}" .*; remove it, and the same command'):
            run.summary()
    run.summary_path.unlink()
    run.summary_path.symlink_to("gone")
    with pytest.raises(DiskError, match="it is a link to gone, which is missing"):
        run.summary()


@pytest.mark.parametrize("content", ["null", "[]", '{"validation_loss": "low"}', '{"validation_loss": [1]}', "{"])
def test_the_best_is_chosen_among_checkpoints_that_can_be_read(content: str, run: Run) -> None:
    run.save(checkpoint(1, 0.9), keep_last=9)
    path = run.save(checkpoint(2, 0.1), keep_last=9)
    (path / "state.json").write_text(content)
    assert run.best_step() == 1


def test_folders_with_names_of_others_among_the_checkpoints_are_left_alone(run: Run) -> None:
    run.save(checkpoint(1), keep_last=1)
    for name in ("step-²", "step-٣", "step-", "step-1e3", "step-" + "9" * 200):
        (run.folder / "checkpoints" / name).mkdir()
    run.save(checkpoint(2), keep_last=1)
    assert run.best_step() == 1
    assert len(list((run.folder / "checkpoints").glob("step-*"))) == 7


@pytest.mark.parametrize("content", ["[1]", '{"id": [1], "pid": {}}', '"x"', "[" * 100_000, "9" * 5000, "\0"])
def test_an_owner_file_of_any_shape_says_nothing(content: str, run: Run) -> None:
    (run.folder / ".owner.json").write_text(content)
    run.require_taken()
    (run.folder / ".owner.json").unlink()
    os.mkfifo(run.folder / ".owner.json")  # opening it would wait for ever
    run.require_taken()


def test_a_step_reads_the_owner_again_only_where_its_file_is_another(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    honest = folder._owner_of
    monkeypatch.setattr(folder, "_owner_of", lambda path: (reads.append(path), honest(path))[1])
    for step in range(1, 6):
        run.append_metrics({"step": step})
    assert len(reads) <= 1
    owner = run.folder / ".owner.json"
    taken = json.loads(owner.read_text()) | {"id": "another"}
    os.replace(write_text(run.folder / "new", json.dumps(taken)), owner)
    with pytest.raises(DiskError, match="was taken by"):
        run.append_metrics({"step": 6})
    owner.unlink()
    with pytest.raises(DiskError, match="has vanished"):
        run.append_metrics({"step": 6})
    assert len(run.metrics_path.read_text().splitlines()) == 5


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_metrics_are_written_into_the_folder_or_not_at_all(run: Run, tmp_path: Path) -> None:
    def link(path: Path, target: Path) -> None:
        path.symlink_to(target)

    def gigabytes(path: Path) -> None:
        path.touch()
        os.truncate(path, 2**40)

    (tmp_path / "foreign").write_text("mine")
    for make, why in (
        (lambda path: link(path, tmp_path / "elsewhere"), "a link"),
        (lambda path: link(path, tmp_path / "foreign"), "a link"),
        (os.mkfifo, "a named pipe"),
        (Path.mkdir, "a folder"),
        (gigabytes, "more than 1024 MiB"),
    ):
        make(run.metrics_path)
        for use in (lambda: run.append_metrics({"step": 1}), lambda: run.forget_metrics_after(1)):
            with pytest.raises(DiskError, match=f"metrics.jsonl cannot be written: it (is|has) {why}; remove it"):
                use()
        (run.metrics_path.rmdir if why == "a folder" else run.metrics_path.unlink)()
    assert (tmp_path / "foreign").read_text() == "mine" and not (tmp_path / "elsewhere").exists()


def test_lost_lines_of_the_metrics_are_counted(run: Run) -> None:
    assert run.forget_metrics_after(0) == 0
    assert run.forget_metrics_after(3) == 3
    for step in range(1, 6):
        run.append_metrics({"step": step})
    assert run.forget_metrics_after(4) == 0
    lines = run.metrics_path.read_text().splitlines()
    lines[1] = lines[1][:5]
    run.metrics_path.write_text("\n".join([*lines, "null", '{"step": "x"}', '{"step": 1e400}', "[" * 9999, ""]))
    assert run.forget_metrics_after(4) == 1
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1, 3, 4]


def test_a_picture_of_the_run_counts_only_while_it_is_whole(run: Run, tmp_path: Path) -> None:
    path = run.sheet_path
    assert not run.has_picture(path)
    Image.effect_noise((64, 64), 50).save(path)
    assert run.has_picture(path)
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", data[:200] + bytes(50) + data[250:], b"no picture"):
        path.write_bytes(damaged)
        assert not run.has_picture(path)
    path.unlink()
    os.mkfifo(path)
    assert not run.has_picture(path)
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    assert not run.has_picture(path)
    run.write_picture(path, Image.new("RGB", (8, 8)))
    assert run.has_picture(path) and not path.is_symlink() and not (tmp_path / "gone").exists()


def test_a_folder_that_another_process_took_is_not_saved_into(run: Run) -> None:
    run.save(checkpoint(1), keep_last=2)
    owner = {"pid": 7, "host": "elsewhere", "started": "2026-01-01 00:00:00", "id": "another"}
    (run.folder / ".owner.json").write_text(json.dumps(owner))
    with pytest.raises(DiskError, match="was taken by process 7 on elsewhere since 2026-01-01"):
        run.save(checkpoint(2), keep_last=2)
    assert steps_kept(run) == [1]
    (run.folder / ".owner.json").write_text("{")  # nobody says anything else
    run.save(checkpoint(2), keep_last=2)


def test_the_metrics_of_a_folder_that_another_process_took_are_left_alone(run: Run) -> None:
    run.append_metrics({"step": 1})
    (run.folder / ".owner.json").write_text(json.dumps({"pid": 7, "id": "another"}))
    with pytest.raises(DiskError, match="was taken by process 7"):
        run.append_metrics({"step": 2})
    with pytest.raises(DiskError, match="was taken by process 7"):
        run.forget_metrics_after(0)
    assert run.metrics_path.read_text() == '{"step": 1}\n'


def test_a_folder_that_vanished_is_not_made_anew(run: Run) -> None:
    run.save(checkpoint(1), keep_last=2)
    away = run.folder.rename(run.folder.with_name("away"))
    for use in (
        lambda: run.save(checkpoint(2), keep_last=2),
        lambda: run.append_metrics({"step": 2}),
        lambda: run.forget_metrics_after(0),
        lambda: run.write_picture(run.sheet_path, Image.new("RGB", (8, 8))),
        lambda: run.finish({}),
    ):
        with pytest.raises(DiskError, match=f"run folder {run.folder} has vanished.*bring it back"):
            use()
    with pytest.raises(DiskError, match="No such file"):
        require_free_space(run.folder, 1)
    assert not run.folder.exists()
    away.rename(run.folder)
    assert run.save(checkpoint(2), keep_last=2).exists()


def test_another_config_is_refused_with_the_keys_that_differ(run: Run) -> None:
    run.close()
    with pytest.raises(ConfigError, match=r"train\.seed: 0 -> 3"):
        Run.open(run.folder, config(train={"seed": 3}), INPUTS)


def test_settings_that_do_not_change_the_result_may_differ(run: Run) -> None:
    run.close()
    Run.open(run.folder, config(train={"batch_size": 7, "keep_last": 9}), INPUTS).close()
    assert toml.load(run.folder / "config.toml").train.batch_size == 7


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"base": {"files": "other"}, "pictures": INPUTS["pictures"]}, "files of the base have changed"),
        ({"base": {"files": "abc"}, "pictures": {"a.jpg": "1"}}, r"b\.jpg is gone"),
        ({"base": {"files": "abc"}, "pictures": {"a.jpg": "9", "b.jpg": "2"}}, r"a\.jpg has changed"),
        ({"base": {"files": "abc"}, "pictures": {"a.jpg": "1", "b.jpg": "2", "c.jpg": "3"}}, r"c\.jpg is new"),
    ],
)
def test_changed_inputs_are_refused_by_name(inputs: dict[str, Any], expected: str, run: Run) -> None:
    run.close()
    with pytest.raises(ConfigError, match=expected):
        Run.open(run.folder, config(), inputs)


@pytest.mark.parametrize(("count", "end"), [(5, "p4.png is new$"), (6, "p4.png is new, …$")])
def test_of_many_changed_pictures_five_are_named(count: int, end: str, run: Run) -> None:
    run.close()
    pictures = INPUTS["pictures"] | {f"p{i}.png": "f" for i in range(count)}
    with pytest.raises(ConfigError) as caught:
        Run.open(run.folder, config(), {**INPUTS, "pictures": pictures})
    assert re.search(end, str(caught.value), re.MULTILINE)


def test_a_folder_that_is_only_read_has_no_lock_to_let_go(run: Run) -> None:
    Run(run.folder).close()
    with pytest.raises(DiskError, match="in use"):
        Run.open(run.folder, config(), INPUTS)


def test_a_checkpoint_is_saved_again_over_itself(run: Run) -> None:
    run.save(checkpoint(1), keep_last=2)
    run.save(checkpoint(1), keep_last=2)
    assert steps_kept(run) == [1]
    assert run.latest(pytest.fail) is not None


def test_a_checkpoint_of_another_version_is_named_and_passed_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(checkpoint(1), keep_last=2)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SCHEMA", checkpoints.CHECKPOINT_SCHEMA + 1)
    run.save(checkpoint(2), keep_last=2)
    monkeypatch.undo()
    told: list[str] = []
    newest = run.latest(told.append)
    assert newest is not None and newest.step == 1
    assert (
        len(told) == 1
        and f"step-000002 is damaged (written by another version (schema {checkpoints.CHECKPOINT_SCHEMA + 1}))"
        in told[0]
    )


def test_a_run_of_another_version_alone_is_not_begun_anew(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SCHEMA", checkpoints.CHECKPOINT_SCHEMA - 1)
    run.save(checkpoint(1), keep_last=2)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"trained by another version.*continue with that version"):
        run.latest(lambda told: None)
    assert steps_kept(run) == [1]


def test_without_a_measured_loss_no_step_is_the_best(run: Run) -> None:
    assert run.best_step() is None


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match=r"run folder .*run is a file; choose another folder with run\.folder"):
        Run.open(tmp_path / "run", config(), INPUTS)


def test_pictures_on_the_way_have_their_step_in_six_digits(run: Run) -> None:
    assert run.preview_path(40) == run.folder / "previews" / "step-000040.png"


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"holiday\.jpg"):
        Run.open(tmp_path, config(), INPUTS)
    assert {p.name for p in tmp_path.iterdir()} == {"holiday.jpg"}


def test_a_second_run_in_the_folder_is_refused_with_its_owner(run: Run) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Run.open(run.folder, config(), INPUTS)
        except DiskError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert f"in use by process {os.getpid()} on " in os.read(read, 4096).decode()


def test_a_folder_that_cannot_be_locked_is_told(tmp_path: Path) -> None:
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(DiskError, match=r"\.lock cannot be written \(Is a directory\)"):
        Run.open(tmp_path / "run", config(), INPUTS)


def test_a_holder_that_has_not_yet_said_who_it_is_gets_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        lock = _locked(tmp_path)
        os.write(write, b"locked")
        while lock.is_locked:
            signal.pause()
    assert os.read(read, 6) == b"locked"
    honest = FileLock.acquire

    def acquire(lock: FileLock, timeout: float, **options: Any) -> Any:
        assert timeout >= 1
        (tmp_path / ".owner.json").write_text(json.dumps({"pid": child, "host": "here", "started": "now"}))
        return honest(lock, timeout=0, **options)  # that moment has passed

    monkeypatch.setattr(FileLock, "acquire", acquire)
    try:
        with pytest.raises(DiskError, match=f"in use by process {child} on here since now"):
            _locked(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_save_that_another_process_swept_away_says_who_took_the_folder(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = disk.sync

    def sync_after_a_taking(path: Path) -> None:
        (run.folder / ".owner.json").write_text(json.dumps({"pid": 7, "id": "another"}))
        for unfinished in (run.folder / "checkpoints").glob(".saving-*"):
            shutil.rmtree(unfinished)
        honest(path)

    monkeypatch.setattr(disk, "sync", sync_after_a_taking)
    with pytest.raises(DiskError, match="was taken by process 7"):
        run.save(checkpoint(1), keep_last=1)


def test_the_lock_of_a_dead_process_does_not_count(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        Run.open(tmp_path / "run", config(), INPUTS)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    Run.open(tmp_path / "run", config(), INPUTS).close()


def test_metrics_after_the_checkpoint_are_forgotten_torn_lines_too(run: Run) -> None:
    for step in range(1, 6):
        run.append_metrics({"step": step, "loss": 1.0})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 6, "lo')
    run.forget_metrics_after(3)
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1, 2, 3]


def test_too_little_space_is_told_before_the_first_step(tmp_path: Path) -> None:
    require_free_space(tmp_path, 1)
    free_mib = shutil.disk_usage(tmp_path).free / 2**20
    with pytest.raises(
        DiskError, match=r"has \d+ MiB free, but the run's checkpoints need about 1099511627776 MiB"
    ) as told:
        require_free_space(tmp_path, 2**60)
    assert float(str(told.value).split(" has ")[1].split()[0]) == pytest.approx(free_mib, rel=0.2)


def test_a_disk_that_fills_up_in_a_checkpoint_is_told_and_the_old_one_stays(run: Run) -> None:
    run.save(checkpoint(1), keep_last=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (run.folder / "checkpoints/step-000001/optimizer.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))  # writes fail in the second file
    try:
        with pytest.raises(DiskError, match=r"step-000002 cannot be written \(File too large\)"):
            run.save(checkpoint(2), keep_last=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert steps_kept(run) == [1]
    assert not list((run.folder / "checkpoints").glob(".saving-*"))


def test_an_open_run_whose_folder_vanishes_is_told(run: Run) -> None:
    shutil.rmtree(run.folder)
    with pytest.raises(DiskError, match=r"has vanished, or lost its config\.toml; bring it back"):
        run.started_at()
