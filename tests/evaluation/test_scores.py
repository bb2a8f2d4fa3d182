"""scores.json: kept whole, damaged ones refused, and unlike ones not compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_booth.errors import ConfigError, DataError
from lora_booth.evaluation import scores
from lora_booth.evaluation.features import Record
from lora_booth.evaluation.intervals import Interval
from lora_booth.evaluation.scores import ByEncoder, Scored, Scores

RECORD = Record("tower", None, "a" * 64, "b" * 64, {"torch": "2"})
MEAN = Interval(0.5, 0.4, 0.6, 0.9)


def found(name: str = "one", record: Record = RECORD, **changed: Any) -> Scores:
    by = ByEncoder(
        record, MEAN, {"diversity": MEAN}, (Scored(100, 0.8, {"leak": MEAN, "drift": MEAN}),), 0, "why", True
    )
    values = {"name": name, "token": "emo", "class_noun": "dog", "real": {"a.png": "c" * 64}, "is_in_sample": False}
    return Scores(**{**values, "drawing": {"seed": 1, "base": "x"}, "encoders": (by,), **changed})  # type: ignore[arg-type]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    for each in (found(), found(encoders=(replace(found().encoders[0], ceiling=None),))):
        each.write(tmp_path / "scores.json")
        assert scores.read(tmp_path / "scores.json") == each
    assert str(tmp_path) not in (tmp_path / "scores.json").read_text()


def _damaged(values: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    *path, last = where.split(".")
    inner: Any = values
    for key in path:
        inner = inner[int(key) if key.isdigit() else key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return values


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("name", 3),
        ("real", []),
        ("encoders", []),
        ("encoders", {}),
        ("encoders", ["x"]),
        ("drawing", "x"),
        ("token", None),
        ("encoders.0.best", 1),
        ("encoders.0.best", -1),
        ("encoders.0.record", None),
        ("encoders.0.record.weights_sha256", 1),
        ("encoders.0.candidates", []),
        ("encoders.0.candidates.0.step", "100"),
        ("encoders.0.candidates.0.metrics", []),
        ("encoders.0.candidates.0.metrics.leak", {"mean": "x"}),
        ("encoders.0.ceiling", 0.5),
        ("encoders.0.base.diversity", None),
    ],
)
def test_a_damaged_file_is_refused_plainly(where: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    found().write(path)
    values = _damaged(json.loads(path.read_text()), where, value)
    path.write_text(json.dumps(values))
    if where == "encoders.0.base.diversity":
        assert scores.read(path).encoders[0].base == {}
        return
    with pytest.raises(DataError, match="damaged"):
        scores.read(path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"{", DataError),
        (b"[]", DataError),
        (b'{"schema": 99}', ConfigError),
        (b"{}", ConfigError),
        (b"\xff", DataError),
    ],
)
def test_what_is_no_scores_file_is_refused(content: bytes, error: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_bytes(content)
    with pytest.raises(error, match="evaluate again"):
        scores.read(tmp_path / "scores.json")
    with pytest.raises(DataError, match="missing"):
        scores.read(tmp_path / "none.json")


def test_scores_of_different_encoders_pictures_or_prompts_are_not_compared() -> None:
    assert len(scores.require_comparable(found(), found("two", replace(RECORD, name="renamed", versions={})))) == 1
    unlike = {
        "different encoders": found("two", replace(RECORD, weights_sha256="d" * 64)),
        "other preprocessing": found("two", replace(RECORD, preprocessing_sha256="d" * 64)),
        "different real pictures": found("two", real={"a.png": "d" * 64}),
        "another seed": found("two", drawing={"seed": 2, "base": "x"}),
    }
    for said, other in unlike.items():
        with pytest.raises(ConfigError, match=rf"one and two .*{said}|{said}.*one and two"):
            scores.require_comparable(found(), other)
    with pytest.raises(ConfigError, match="different real pictures"):
        scores.require_comparable(found(), found("two", is_in_sample=True))


def test_the_table_is_aligned_and_marks_the_best() -> None:
    lines = scores.table(found().encoders[0])
    assert lines[0].split() == ["leak", "diversity", "drift"]
    assert lines[2].startswith("step 100 at 0.8 *") and "0.500 ±0.100" in lines[2]
    assert len({len(line) for line in lines}) == 1
