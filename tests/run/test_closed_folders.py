"""Folders that a user may list and not enter, as other people's often are: each command says so, and none crashes."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from pathlib import Path

import pytest

from tests.soak import commands
from tests.support import tiny

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="powers are dropped as Linux does it")


def _drop_powers() -> None:
    """Of root, to read and enter everything; others have none (capset(2), version 3)."""
    header = struct.pack("Ii", 0x20080522, 0)
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")


def run(words: list[str], folder: Path) -> commands.Ended:
    """`words` in a process of its own that has no powers."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _drop_powers()
            ended = commands.run(words, folder)
            os.write(write, json.dumps([ended.code, ended.out[-2000:], ended.err[-2000:], ended.fault]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return commands.Ended(*json.loads(told))


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A base, an adapter and a run, in folders of which only the names can be read."""
    tiny.tiny_ends(tmp_path / "base")
    for name in ("run", "adapters", "base"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.toml").touch()
        (tmp_path / name).chmod(0o644)
    tiny.tiny_pictures(tmp_path / "pictures", 3)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("generate --base base --prompt x", 4, "base cannot be read: its model_index.json: Permission denied"),
        (
            "generate --base ./base/x --prompt x",
            4,
            '"./base/x" is no file or folder here (Permission denied).',
        ),
        ("merge a --base base --out b", 4, "base cannot be read: its model_index.json: Permission denied"),
        ("extract --base base --tuned base --rank 1 --out o.safetensors", 4, "cannot be read: its model_index.json"),
        ("inspect adapters/a.safetensors", 4, "a.safetensors cannot be read: Permission denied"),
        ("export run --out o", 4, "run cannot be read: it is a folder"),
        ("train run/config.toml", 2, "config.toml cannot be read: Permission denied; name a config file"),
        ("train run/confg.toml", 2, "confg.toml cannot be read: Permission denied; the nearest name is"),
        (
            "train --base booth-mini --subject pictures --class-noun dog run.folder=run prior.loss_weight=0",
            6,
            "run cannot be written (Permission denied); choose a folder you may write to",
        ),
    ],
)
def test_what_lies_in_a_folder_that_may_not_be_entered_is_told(
    words: str, code: int, message: str, closed: Path
) -> None:
    ended = run(words.split(), closed)
    assert (ended.code, ended.fault) == (code, ""), ended
    assert message in ended.err


def test_a_tokenizer_whose_settings_may_not_be_read_is_told(tmp_path: Path) -> None:
    base = tiny.tiny_ends(tmp_path / "base")
    (base / "tokenizer" / "tokenizer_config.json").chmod(0)
    ended = run(["generate", "--base", "base", "--prompt", "x"], tmp_path)
    assert (ended.code, ended.fault) == (4, ""), ended
    assert "tokenizer_config.json cannot be read (Permission denied)" in ended.err
