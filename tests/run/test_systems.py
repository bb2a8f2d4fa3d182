"""What differs between operating systems is asked for by what they have, and told in their own words."""

from __future__ import annotations

import ast
import io
import os
import signal
import subprocess
import sys

import psutil
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from lora_booth.run import systems
from tests.house.sources import sources

NO_MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "select", "selectors")
OF_FILES = ("os.O_DIRECTORY", "os.replace", "shutil.rmtree")
ROOMS = (
    dict.fromkeys(NO_MODULES, ("run.systems",))
    | dict.fromkeys(OF_FILES, ("run.disk",))
    | dict.fromkeys(("os.fsync", "os.rename", "tempfile"), ("run.disk", "cli.crash"))
)
"""What Windows lacks or does otherwise, and the rooms that know how; names of `os` and `signal` are added below."""
GONE_FROM_OS = (
    "fork", "getuid", "geteuid", "getgid", "setsid", "killpg", "getpgid", "mkfifo", "chown", "statvfs", "uname",
    "sched_getaffinity", "sysconf", "nice", "getloadavg", "pread", "pwrite", "wait", "wait3", "wait4", "O_NOFOLLOW",
    "O_NONBLOCK", "O_CLOEXEC", "symlink", "fchmod",
)  # fmt: skip
OTHER_OPENERS = {"Image", "Run", "cls", "os", "disk", "inputs"}
"""Whose `open`, `read_text` and `write_text` are no text file's, or name the encoding themselves."""
KNOWN_SIGNALS = {"SIGINT", "SIGTERM", "SIG_IGN", "SIG_DFL"}


def attributes(tree: ast.Module) -> list[ast.Attribute]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


def test_only_what_every_system_has_is_asked_for() -> None:
    checked = 0
    for name, (path, tree) in sources().items():
        for node in attributes(tree):
            word = ast.unparse(node)
            checked += 1
            assert word not in {f"os.{gone}" for gone in GONE_FROM_OS}, f"{path.name}:{node.lineno} {word}"
            assert name in ROOMS.get(word, (name,)), f"{path.name}:{node.lineno} {word}"
            if word.startswith("signal.SIG"):
                assert node.attr in KNOWN_SIGNALS, f"{path.name}:{node.lineno} {word}"
            assert node.attr not in ("symlink_to", "hardlink_to", "rename") or word == "os.rename", (
                f"{path.name}:{node.lineno} {word}"
            )
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    assert name in ROOMS.get(alias.name, (name,)), f"{path.name} imports {alias.name}"
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ROOMS, f"{path.name} imports {node.module}"
            if isinstance(node, ast.keyword):
                assert node.arg not in ("preexec_fn", "pass_fds", "start_new_session") or name == "run.systems", path
    assert checked > 3000


def test_every_text_file_names_its_encoding() -> None:
    """Windows' own would be another in every country."""
    checked = 0
    for path, tree in sources().values():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            owner, _, word = ast.unparse(node.func).rpartition(".")
            if (
                word not in ("open", "read_text", "write_text")
                or owner in OTHER_OPENERS
                or word == ast.unparse(node.func) != "open"
            ):
                continue
            if "b" in "".join(str(a.value) for a in node.args if isinstance(a, ast.Constant)):
                continue
            checked += 1
            assert any(keyword.arg == "encoding" for keyword in node.keywords), f"{path.name}:{node.lineno}"
    assert checked > 5


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_no_character_ends_the_program(encoding: str) -> None:
    words = [sys.executable, "-c", "from lora_booth.run import systems; systems.settle_streams(); print('3×4 ✓ 犬')"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    ended = subprocess.run(words, env=environment, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.decode(encoding).split()[0] == {"ascii": "3?4"}.get(encoding, "3×4")


def test_a_file_gets_utf_8_whatever_the_country(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    systems.settle_streams()
    print("✓", flush=True)
    assert written.getvalue().decode("utf-8").strip() == "✓"


def test_a_command_is_quoted_as_the_users_shell_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["lora-booth", "train", "my dog's.toml"]
    assert systems.command_line(words) == """lora-booth train 'my dog'"'"'s.toml'"""
    monkeypatch.setattr(signal, "CTRL_C_EVENT", 0, raising=False)
    assert systems.command_line(words) == 'lora-booth train "my dog\'s.toml"'


def test_memory_is_known_without_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    now = psutil.Process().memory_info().rss
    assert 0.5 * now < systems.peak_memory_bytes() < 100 * now
    monkeypatch.setitem(sys.modules, "resource", None)
    assert 0.5 * now < systems.peak_memory_bytes() < 2 * now
    assert 0.5 * now < systems.memory_bytes(os.getpid()) < 2 * now
    systems.bound_own_memory(1)  # nothing is bound, and nothing is raised


@pytest.mark.parametrize(
    ("words", "others", "is_lost"),
    [
        (["--cpu", "--num_processes", "2"], {}, True),
        (["--cpu", "--num_processes", "1"], {}, False),
        (["--cpu"], {}, False),
        (["--cpu", "--num_processes", "2"], {"RANK": "0", "LOCAL_RANK": "0"}, False),
    ],
)
def test_processes_that_accelerate_did_not_begin_are_noticed(
    words: list[str], others: dict[str, str], is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    arguments = launch_command_parser().parse_args([*words, "-m", "lora_booth", "train"])
    arguments, *_ = _validate_launch_command(arguments)
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    for name, value in {**environment, **others}.items():
        monkeypatch.setenv(name, value)
    assert systems.lost_processes() == is_lost
