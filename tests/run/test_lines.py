"""Files of one line a step: read with damage, and cut back; what is written into a run is held in `test_folder.py`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lora_booth.errors import DiskError
from lora_booth.run import lines, notes
from lora_booth.run.notes import Notes
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support.runs import At


def test_lines_are_read_by_step_and_damage_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert lines.read(path) == ([], 0)
    for step in (2, 1, 2):
        lines.append(path, {"step": step, "value": step})
    with path.open("ab") as file:
        file.write(b'{"step": 0}\n{"step": "3"}\n\xff\n[' + b"[" * 5000 + b'\n{"step": 4, "va')
    assert lines.read(path) == ([{"step": 1, "value": 1}, {"step": 2, "value": 2}], 5)
    assert lines.forget_after(path, 1) == 1
    assert lines.read(path) == ([{"step": 1, "value": 1}], 0)


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(DiskError, match="it is a named pipe"):
        lines.read(tmp_path / "metrics.jsonl")


def test_every_save_has_a_line_though_its_checkpoint_is_dropped_and_the_run_was_resumed(
    make_config: MakeConfig,
) -> None:
    config = make_config(train={"steps": 4, "save_every_steps": 1, "keep_last": 1})
    path = config.folder / "saves.jsonl"

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, report=At(4, stop))
    lines.append(path, {"step": 4, "validation_loss": -1.0})  # of a process killed between line and checkpoint
    train.train(config)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert all(line["validation_loss"] > 0 and "prediction_drift" in line for line in found)
    assert len(list((config.folder / "checkpoints").iterdir())) < 4


def test_notes_are_kept_and_read_again(tmp_path: Path) -> None:
    assert notes.read(tmp_path) is None
    written = Notes({"train.steps": "400"}, {"a.txt": "no picture"}, {"b.png": "small"}, {"torch": "2"}, "cpu")
    written.write(tmp_path)
    assert notes.read(tmp_path) == written
    assert notes.by_name([("a", "one"), ("b", "two"), ("a", "three")]) == {"a": "one; three", "b": "two"}
    (tmp_path / "notes.json").write_text('{"chosen": {}, "left_out": []}')
    with pytest.raises(DiskError, match='"left_out" is missing, or not what was written; remove it'):
        notes.read(tmp_path)
