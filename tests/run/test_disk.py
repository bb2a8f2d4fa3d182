"""Files are replaced whole or not at all, and the disk's refusals become clear messages."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from lora_booth.errors import DiskError
from lora_booth.run import checkpoints, disk
from lora_booth.run.checkpoints import Checkpoint


def test_a_failed_write_keeps_the_old_content_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    disk.write_text(path, "old")
    with suppress(ZeroDivisionError), disk.replacing(path) as temporary:
        temporary.write_text("half of the ne")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_the_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), rename(a, b))[1])
    disk.write_bytes(tmp_path / "x", b"1")
    assert order == ["sync", "rename", "sync"]  # the file, its name, the folder that holds the name


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, r"no space for .*x: it needs 3 bytes and \d+ are free"), (errno.EROFS, "the disk is read-only")],
)
def test_the_disks_refusal_says_what_to_do(
    number: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskError, match=expected):
        disk.write_bytes(tmp_path / "x", b"123")
    assert list(tmp_path.iterdir()) == []


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    disk.write_bytes(tmp_path / "x", b"1")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def refusing(number: int, times: int) -> Callable[..., None]:
    """`os.replace`, which refuses so many times as Windows does, with its number."""
    honest, left = os.replace, [times]

    def replace(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] >= 0:
            error = PermissionError(errno.EACCES, "refused")
            error.winerror = number  # type: ignore[attr-defined]
            raise error
        honest(source, target)

    return replace


def test_a_file_that_a_scanner_has_open_for_a_moment_is_replaced_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(os, "replace", refusing(disk.IN_USE[1], 2))
    disk.write_text(tmp_path / "x", "1")
    assert (tmp_path / "x").read_text() == "1"
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "replace", refusing(disk.IN_USE[1], 3))
    with pytest.raises(DiskError, match=r"x cannot be written \(refused\); another program has it open: close that"):
        disk.write_text(tmp_path / "x", "2")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]


def test_a_refusal_that_no_waiting_mends_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PAUSES", (3600.0,))
    monkeypatch.setattr(os, "replace", refusing(19, 1))  # write-protected
    with pytest.raises(DiskError, match="choose a folder you may write to"):
        disk.write_text(tmp_path / "x", "2")


def test_advice_is_in_the_words_of_the_users_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "/".join(["x" * 100] * 3)
    too_many = OSError(errno.EMFILE, "Too many open files")
    missing = FileNotFoundError(errno.ENOENT, "The system cannot find the path specified")
    assert "`ulimit" in disk._message(tmp_path, None, too_many)
    assert "nearer to the root" not in disk._message(deep, None, missing)
    monkeypatch.setattr(signal, "CTRL_C_EVENT", 0, raising=False)
    assert disk._message(tmp_path / "x", None, too_many).endswith("too many files are open; close other programs.")
    assert "of which Windows takes 259: choose a folder nearer to the root" in disk._message(deep, None, missing)


def test_a_folder_is_removed_with_what_is_marked_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "c").write_text("1")
    (folder / "b" / "c").chmod(0o444)
    honest = os.unlink

    def unlink(path: str, *, dir_fd: int | None = None) -> None:
        if not os.stat(path, dir_fd=dir_fd).st_mode & 0o200:
            raise PermissionError(errno.EACCES, "Access is denied", path)
        honest(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    disk.remove_folder(folder)
    assert not folder.exists()


@pytest.fixture(params=[0o077, 0o027, 0o022, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_who_may_read_and_write_what_is_written_says_the_umask(tmp_path: Path, umask: int) -> None:
    disk.write_bytes(tmp_path / "new" / "x", b"1")
    disk.write_bytes(tmp_path / "new" / "x", b"2")
    checkpoints.write(tmp_path / "checkpoints" / "step-000001", Checkpoint(1, {}, {}, {}))
    found = [tmp_path / "new", *tmp_path.rglob("*/*")]
    assert len(found) == 7  # two folders, a file, four in the checkpoint
    for path in found:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_the_size_that_is_needed_is_told_only_where_it_is_known(
    tmp_path: Path,
) -> None:
    with (
        pytest.raises(DiskError, match=r"no space for .*x: \d+ are free; free some space"),
        disk.writing(tmp_path / "x"),
    ):
        raise OSError(errno.ENOSPC, "")


def test_space_is_asked_for_where_the_file_will_lie(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet" / "x"
    free = shutil.disk_usage(tmp_path).free
    disk.require_space(path, free // 2)
    with pytest.raises(DiskError, match=rf"no space for {path}: it needs {free * 2} bytes and \d+ are free"):
        disk.require_space(path, free * 2)
    assert not path.parent.exists()


def test_a_picture_carries_no_metadata(tmp_path: Path) -> None:
    disk.write_png(tmp_path / "s.png", Image.new("RGB", (8, 8)))
    data, kinds, at = (tmp_path / "s.png").read_bytes(), [], 8
    while at < len(data):
        kinds.append(data[at + 4 : at + 8])
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}


def test_a_picture_that_cannot_be_written_is_a_disk_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.png").mkdir()
    with pytest.raises(DiskError, match=r"s\.png cannot be written"):
        disk.write_png(tmp_path / "s.png", Image.new("RGB", (8, 8)))
    assert [p.name for p in tmp_path.iterdir()] == ["s.png"]


def test_folders_are_made(tmp_path: Path) -> None:
    disk.write_text(tmp_path / "a" / "b" / "c.txt", "é")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == b"\xc3\xa9"


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert disk.sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180


@pytest.mark.parametrize("days", [-365, 0, 365])
def test_what_a_killed_writer_left_goes_whatever_the_clock_says(days: int, tmp_path: Path) -> None:
    left = tmp_path / ".a.txt.x.tmp"
    left.write_text("half")
    seen = left.stat().st_mtime + days * 86_400
    os.utime(left, (seen, seen))
    disk.remove_abandoned(tmp_path, older_than_seconds=0 if days == 0 else 86_400)
    assert list(tmp_path.iterdir()) == []


def test_a_term_signal_while_writing_leaves_nothing_half_written(tmp_path: Path) -> None:
    script = (
        "import signal, sys; from pathlib import Path\n"
        "from lora_booth.run import disk; from lora_booth.run.interrupts import exit_on_term\n"
        "with exit_on_term(), disk.replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); print('writing', flush=True); signal.pause()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.txt")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
