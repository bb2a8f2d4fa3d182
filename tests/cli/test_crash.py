"""What nobody foresaw ends in one sentence, exit code 1 and a report; a stream that breaks ends nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_booth.cli import app, crash
from lora_booth.errors import DiskError
from tests.cli.test_app import ENVIRONMENT, in_process
from tests.conftest import CRASH_REPORTS, crash_reports

Run = tuple[pytest.CaptureFixture[str], pytest.MonkeyPatch]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return capsys, monkeypatch


def ending_with(error: BaseException | Callable[[], None], run: Run, *words: str) -> tuple[int, str]:
    """Exit code and message of a command in which `error` is raised."""

    def fall(**_: object) -> None:
        if callable(error):
            error()
        else:
            raise error

    run[1].setattr(app, "app", fall)
    code, out, told = in_process(list(words), *run)
    assert out == "" and "Traceback" not in told
    return code, told


def test_what_nobody_foresaw_is_one_sentence_and_a_report(run: Run, tmp_path: Path) -> None:
    run[1].chdir(tmp_path)
    home = Path.home() / "models" / "dog.json"
    where = f"{home}, {tmp_path}/pictures/a.png, '/data/my own/b.png', /srv/c/d.png, /typed/e.png"
    code, told = ending_with(TypeError(f"no {where}"), run, "inspect", "/typed/e.png")
    assert code == 1
    assert told.startswith("lora-booth: an unexpected TypeError (no ") and told.count("\n") == 1
    assert str(CRASH_REPORTS) in told and "issue" in told
    (report,) = crash_reports()
    for part in (
        "lora-booth inspect /typed/e.png",
        "torch 2.",
        "peft",
        "Traceback",
        "lora_booth/cli/app.py",
        "TypeError",
    ):
        assert part in report
    shown = "no ~/models/dog.json, ./pictures/a.png, '…/b.png', …/d.png, /typed/e.png"
    assert shown in report
    for place in (str(tmp_path), str(Path.home()) + "/", sys.prefix, "my own", "/srv"):
        assert place not in report, place


def test_a_report_replaces_nothing_and_goes_where_it_can_be_written(run: Run, tmp_path: Path) -> None:
    run[1].delenv(crash.REPORTS)
    run[1].setattr(time, "strftime", lambda *_: "now")
    for folder in ("work", "gone", "temp"):
        (tmp_path / folder).mkdir()
    run[1].setattr(crash.tempfile, "gettempdir", lambda: str(tmp_path / "temp"))
    run[1].chdir(tmp_path / "work")
    first = f"lora-booth-crash-now-{os.getpid()}.txt"
    for count in (1, 2):
        code, told = ending_with(TypeError("x"), run)
        assert code == 1 and len(list((tmp_path / "work").iterdir())) == count
    assert "-2.txt" in told and (tmp_path / "work" / first).stat().st_mode & 0o077 == 0
    run[1].chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert str(tmp_path / "temp" / first) in ending_with(TypeError("x"), run)[1]
    (tmp_path / "temp" / first).unlink()
    (tmp_path / "temp").rmdir()
    code, told = ending_with(TypeError("x"), run)
    assert code == 1 and told.count("\n") == 1
    assert "no report of it could be written (No such file" in told
    run[1].chdir(tmp_path)


def test_of_several_processes_one_tells(run: Run, tmp_path: Path) -> None:
    run[1].setenv("WORLD_SIZE", "2")
    told = []
    for rank in ("1", "0"):
        run[1].setenv("RANK", rank)
        code, message = ending_with(TypeError("x"), run)
        assert code == 1
        told.append(message)
    assert "unexpected TypeError" in told[0] and told[1] == ""
    assert len(crash_reports()) == 1


def test_endings_of_every_kind_have_their_code_and_no_traceback(run: Run) -> None:
    def endless() -> None:
        endless()

    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    for error, code, message in (
        (MemoryError(), 5, "there is not enough memory (MemoryError)"),
        (KeyboardInterrupt(), 130, "stopped."),
        (BrokenPipeError(32, "Broken pipe"), 1, "unexpected BrokenPipeError"),
        (endless, 1, "unexpected RecursionError (maximum recursion depth"),
        (Mute(), 1, "an unexpected error. "),
        (ExceptionGroup("several", [TypeError("x")]), 1, "unexpected ExceptionGroup (several"),
        (GeneratorExit(), 1, "unexpected GeneratorExit"),
        (DiskError("full"), 6, "full"),
        (SystemExit("words"), 1, "words"),
        (SystemExit(143), 143, ""),
    ):
        found, told = ending_with(error, run)
        assert (found, message in told) == (code, True), told
        assert len(crash_reports()) == ("unexpected" in message)


def test_ctrl_c_in_a_command_is_no_success(run: Run) -> None:
    def pressed() -> None:
        raise KeyboardInterrupt

    run[1].setattr("lora_booth.config.toml.load", lambda *_: pressed())
    assert in_process(["config", "model.base=x"], *run)[::2] == (130, "lora-booth: stopped.\n")


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("| head -c 1 > /dev/null; exit ${PIPESTATUS[0]}", 0, ""),
        ("> /dev/full", 6, "could not be written (No space left on device)"),
        (">&-", 0, ""),
        ("> /dev/null 2>&-", 0, ""),
    ],
)
def test_output_that_nobody_takes_is_no_crash(redirection: str, code: int, message: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m lora_booth config --schema {redirection}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, check=False
    )
    assert done.returncode == code, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == bool(message)
