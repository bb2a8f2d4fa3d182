"""Folders and files with every name that a disk takes: all verbs work on them, and the result is the same bytes."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import sys
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors import safe_open

from lora_booth.cli import app
from lora_booth.cli.console import PlainReport
from lora_booth.config import names as odd
from lora_booth.config import toml
from lora_booth.config.config import Config
from lora_booth.errors import Interrupted
from lora_booth.verbs import train
from tests.soak.bench import FEW_LAYERS, Result
from tests.support import tiny

MAX_NAME_BYTES = 255
LONGEST_ENDING = "-1_diffusers.safetensors"
E_ACUTE = "caf\u00e9"
NAMES = (
    "plain", "with spaces", " leads", "trails ", "a\nb", "a\tb", "a\rb", "\x1b[31mred", "\x01", "-rf", "--help", "=",
    "2024-05-01", "true", "~", "$HOME", "`id`", "%s{0}{token}", "'", '"', "a:0.5", "#", "[x]", "*?", "\\", "a..b",
    "a=b", "a,b", "a.b.", "con", "漢字", "🐕‍🦺", "ünï", "ﷺ" * 20, "\u202egnp.exe", "\u200b", "e\u0301", "İı", "ß",
    unicodedata.normalize("NFC", E_ACUTE), unicodedata.normalize("NFD", E_ACUTE), os.fsdecode(b"\xff\xfe\x80"),
    "x" * 255, "é" * 127, "🐕" * 63,
)  # fmt: skip
"""Each is cut to what fits a file name of 255 bytes. Bytes that are not UTF-8 are for pictures alone: no config holds
them."""
COLLISIONS = (
    ("DOG", "Dog", "dog"),
    (unicodedata.normalize("NFC", E_ACUTE), unicodedata.normalize("NFD", E_ACUTE), "cafe"),
)


def names(count: int, folder: Path, seed: int = 0) -> Result:
    """Odd names of pictures, captions, folders, configs, bases and adapters: train, resume, export, inspect work."""
    base, rng, failures = tiny.tiny_ends(folder / "base"), random.Random(seed), []
    odd_names = NAMES[:: max(1, len(NAMES) // count)]  # a few tries take some of each kind
    expected = _tensors(_trained(folder / "expected", base, ("a", "b", "c"), "plain"))
    for i in range(count):
        name = odd_names[i] if i < len(odd_names) else _random_name(rng)
        stems = COLLISIONS[i // 8 % 2] if i % 8 == 7 else tuple(f"{_cut(name, LONGEST_ENDING)}-{n}" for n in range(3))
        where = folder / str(i)
        try:
            cut = _cut(name, LONGEST_ENDING) if _is_utf8(name) else "plain"
            file = _trained(where, base, stems, cut)
            if _tensors(file) != expected:
                failures.append(f"{name!r}: another adapter than under plain names")
            _look_at_and_export(file, where, cut)
        except Exception as error:
            failures.append(f"{name!r}: {type(error).__name__}: {str(error)[-300:]!a}")
        shutil.rmtree(where)
    return Result(count, tuple(failures), f"{len(NAMES)} chosen names, the others at random")


def _trained(where: Path, base: Path, stems: tuple[str, ...], name: str) -> Path:
    """The adapter file of a run in which everything is called `name`, stopped after two steps, then continued."""
    places = {kind: where / kind / name for kind in ("pictures", "held out", "run", "cache", "base")}
    if odd.fault(name, room=0) is not None:
        places["run"] = where / "run" / "plain"  # the name of a run folder is one that every system takes
    drawn = tiny.tiny_pictures(where / "drawn", 4)
    for kind in ("pictures", "held out"):
        places[kind].mkdir(parents=True)
    for stem, picture in zip(sorted(stems), drawn, strict=False):
        shutil.copy(picture, places["pictures"] / f"{stem}{picture.suffix}")
        (places["pictures"] / f"{stem}.txt").write_text("a photo of {token} {class}")
    shutil.copy(drawn[3], places["held out"] / f"{name}.jpg")
    places["base"].parent.mkdir()
    places["base"].symlink_to(base)
    values: dict[str, Any] = {
        "model": {"base": str(places["base"])},
        "subject": {"images": places["pictures"], "class_noun": "dog", "held_out": places["held out"]},
        "data": {"resolution": 32, "bucket_step": 16},
        "prior": {"loss_weight": 0.0},
        "adapter": {"rank": 2, "targets": FEW_LAYERS},
        "train": {"steps": 3},
        "preview": {"images_per_prompt": 0},
        "run": {"folder": places["run"], "cache": places["cache"]},
    }
    config = Config.model_validate(values)
    try:
        _speaking(lambda: train.train(config, report=_StopAtOnce()))
        raise AssertionError("the run was not stopped")
    except Interrupted:
        pass
    file = where / f"{name}.toml"
    file.write_bytes(os.fsencode(toml.to_toml(config)))
    _command("train", str(file))
    return places["run"] / "yql_dog.safetensors"


def _look_at_and_export(file: Path, where: Path, name: str) -> None:
    """`inspect` and `export` of the adapter under `name`, into a folder of that name."""
    (where / "adapters").mkdir()
    renamed = where / "adapters" / f"{name}.safetensors"
    shutil.copy(file, renamed)
    picture = "plain.png" if odd.fault(f"{name}.png", room=0) else f"{name}.png"
    _command("inspect", str(renamed), "--picture", str(where / "adapters" / picture))
    _command("export", str(renamed), "--out", str(where / "out" / name), "--dtype", "fp32")
    assert {path.name for path in (where / "out" / name).glob("*.safetensors")} == {
        f"{name}.safetensors",
        f"{name}_diffusers.safetensors",
    }


class _StopAtOnce(PlainReport):
    """Stops the run after its second step."""

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        super().progress(task, done, total, **values)
        if task == "train" and done == 1:  # seen at the next step, which is saved
            os.kill(os.getpid(), signal.SIGTERM)


def _command(*words: str) -> None:
    """`lora-booth` with `words`, in this process."""

    def run() -> None:
        with patch.object(sys, "argv", ["lora-booth", *words]):
            app.main()

    _speaking(run)


def _speaking(run: Callable[[], object]) -> None:
    """Call `run` with the streams of a terminal. Raises AssertionError with what it said when it exits."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with redirect_stdout(out), redirect_stderr(err):
        try:
            run()
        except SystemExit as stop:
            err.seek(0)
            raise AssertionError(f"exit code {stop.code}: {err.read()[-500:]}") from stop


def _tensors(file: Path) -> dict[str, bytes]:
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key).numpy().tobytes() for key in opened.keys()}  # noqa: SIM118


def _cut(name: str, ending: str) -> str:
    """As much of `name` as a file name has room for before `ending`."""
    return os.fsencode(name)[: MAX_NAME_BYTES - len(ending)].decode("utf-8", "ignore") if _is_utf8(name) else name


def _is_utf8(name: str) -> bool:
    return all(not "\ud800" <= letter <= "\udfff" for letter in name)


def _random_name(rng: random.Random) -> str:
    """1 to 60 letters of the first two planes, without "/", and with no dot in front, which would hide the file."""
    letters = "".join(chr(rng.choice((rng.randrange(1, 128), rng.randrange(1, 0x20000)))) for _ in range(60))
    letters = "".join(letter for letter in letters if letter != "/" and _is_utf8(letter))
    return letters[: rng.randrange(1, 60)].lstrip(".") or "x"
