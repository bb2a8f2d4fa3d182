"""Whatever a path or a small file is, reading it ends with its content or one message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_booth.config import inputs
from lora_booth.errors import ConfigError, ModelError


def told(read: object, path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read(path, "give another", ModelError)  # type: ignore[operator]
    return str(caught.value)


def test_what_is_no_plain_file_is_told_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer for ever
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name, why in {
        "pipe": "a named pipe",
        "nowhere": "a link to ",
        "circle": "symbolic links",
        "endless": "a device",
        ".": "a folder",
        "missing": "it is missing",
        "n" * 300: "File name too long",
        "nul\0": "null",
    }.items():
        message = told(inputs.read_text, tmp_path / name)
        assert why in message, name
        assert message.endswith("; give another."), name


def test_a_small_file_is_read_whole_and_a_large_one_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert inputs.read_toml(path, "", ModelError) == {"a": 1}
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(ModelError, match="more than 1 MiB"):
        inputs.read_text(path, "", ModelError, max_bytes=2**20)


def test_json_and_toml_of_any_shape_end_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("[" * 100_000, "null", "[]", "{", '{"a": ' + "9" * 5000 + "}", "\udcff"):
        path.write_bytes(text.encode(errors="surrogateescape"))
        assert str(path) in told(inputs.read_object, path)
    for text in ("a = " + "9" * 5000, "a = " + "[" * 100_000, "a"):
        path.write_text(text)
        assert str(path) in told(inputs.read_toml, path)


def test_a_word_that_no_file_can_hold_is_refused_by_its_name() -> None:
    assert inputs.word("Größe 🐕", "--prompt") == "Größe 🐕"
    for text in ("a\0b", "a\udcffb"):
        with pytest.raises(ConfigError, match="--prompt"):
            inputs.word(text, "--prompt")
    assert inputs.shown("a\nb" + "c" * 200) == "a\\nb" + "c" * 75 + "…"
