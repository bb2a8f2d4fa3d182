"""Files of a run, besides its checkpoints, of every shape: the same result, or one message that names the file."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.soak import commands
from tests.soak.bench import Result
from tests.soak.commands import ODD_THINGS, replace_
from tests.soak.pipes import job

FILES = (
    "summary.json", "inputs.json", "config.toml", "metrics.jsonl", "contact_sheet.png", ".owner.json", ".lock",
    "previews/step-000000.png", "previews/step-000001.png", "before_after.png", "yql_dog.safetensors", "yql_dog.json",
    "saves.jsonl", "notes.json", "report.html", "warnings.txt",
)  # fmt: skip
VALUES = (None, True, 0, -1, 1.5, 1e308, 10**400, "", "x", "x" * 5000, [], [1], {}, {"a": None}, {"a": {"b": []}})


def run_files(count: int, folder: Path, seed: int = 0) -> Result:
    """Files of a run outside of checkpoints/ with other shapes, cut, or no files: the same adapter, or told by name."""
    sound, rng, failures = job(folder / "sound"), random.Random(seed), []
    expected = load_file(sound / "run" / "yql_dog.safetensors")
    finished = folder / "finished"
    shutil.copytree(sound, finished)
    assert commands.run(["train", "job.toml"], finished).code == 0
    shutil.rmtree(finished / ".home")
    seen: Counter[str] = Counter()
    for number in range(count):
        where, foreign = folder / "work", folder / "foreign"
        shutil.copytree(finished if number % 2 else sound, where)
        foreign.write_text("mine")
        name, harm = FILES[number % len(FILES)], rng.choice(list(HARMS))
        path = where / "run" / name
        if path.exists():
            _harm(path, harm, foreign, rng)
        ended = commands.run(["train", "job.toml"], where)
        seen["done" if ended.code == 0 else "refused"] += 1
        fault = ended.fault or ("" if foreign.read_text() == "mine" else "a foreign file has changed")
        says_another = name in ("config.toml", "inputs.json")  # harmed, they are still those of a run
        is_another_run = says_another and "holds a run of another config" in ended.err
        if not fault and ended.code and path.name not in ended.err and not is_another_run:
            fault = f"{path.name} is not named: {ended.err}"
        made = where / "run" / "yql_dog.safetensors"
        if not fault and ended.code == 0 and path != made:
            found = load_file(made)
            same = found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in expected)
            fault = "" if same else "another adapter"
        if fault:
            failures.append(f"{harm} of {name}, {'finished' if number % 2 else 'unfinished'}: {fault}")
        shutil.rmtree(where)
    return Result(count, tuple(failures), ", ".join(f"{n} {what}" for what, n in sorted(seen.items())))


def _harm(path: Path, harm: str, foreign: Path, rng: random.Random) -> None:
    if harm == "link to a foreign file":
        replace_(path, lambda at: at.symlink_to(foreign))
    elif harm in ODD_THINGS:
        replace_(path, ODD_THINGS[harm])
    else:
        path.write_bytes(HARMS[harm](path.read_bytes(), rng))


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) or 1)]


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"x")
    for _ in range(rng.choice((1, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _another_shape(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(rng.choice(VALUES)).encode()


def _another_field(data: bytes, rng: random.Random) -> bytes:
    """One of the values of a JSON object at any depth, another; else the whole."""
    try:
        tree = json.loads(data)
    except ValueError:
        return _another_shape(data, rng)
    places = list(_places(tree))
    if not places:
        return _another_shape(data, rng)
    holder, key = rng.choice(places)
    if rng.random() < 0.3:
        del holder[key]
    elif rng.random() < 0.2:
        holder["a field of a later version"] = 1
    else:
        holder[key] = rng.choice(VALUES)
    return json.dumps(tree).encode()


def _places(tree: Any) -> list[tuple[dict[str, Any], str]]:
    if not isinstance(tree, dict):
        return []
    return [(tree, key) for key in tree] + [place for value in tree.values() for place in _places(value)]


def _lost_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    if lines:
        del lines[rng.randrange(len(lines))]
    return b"".join(lines)


HARMS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": _cut,
    "flip": _flip,
    "another shape": _another_shape,
    "another field": _another_field,
    "lost line": _lost_line,
    "deep": lambda data, rng: b"[" * 100_000,
    "long number": lambda data, rng: b"9" * 5000,
    "not UTF-8": lambda data, rng: b"\xff\xfe" + data,
    "link to a foreign file": _cut,
    **dict.fromkeys(ODD_THINGS, _cut),
}
