"""Words of a command line that nobody should type, for every verb and every option that it has."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import typer

from lora_booth.cli import app
from tests.soak import commands
from tests.soak.bench import FEW_LAYERS, Result
from tests.support import tiny
from tests.support.adapted import adapter_file

TEXTS = (
    "", " ", "-", "--", "=", "a=b", "x" * 300, "x" * 5000, "x/" * 3000, "~no-such-user/x",
    "\udcff", "a\0b", "\n", "\x1b[31m", "🐕" * 60, "é" * 200,
    "%s{0}", "{token}", "{", "$(id)", "*", "~", "~root/x", "../x", "con", "nul.txt", "a/b/c", "/", "-rf", "--help",
    "nan", "inf", "-inf", "1e400", "-1", "0", "-0.0", "1e-320", "9" * 30, "9" * 5000, "0x" + "f" * 5000, "1_000", "٣",
    "1,2", "0,", ",", "0x0", "64x64x64", "1x1", "99999x99999", "true", "null", "[]", "{}", "[" * 5000, ":1", "x:nan",
    "x:1e308", "sd15", "booth-mini", "a/b", "\u202etxt", "http://x/y", "C:\\x", "\\\\x\\y", "regex:(", "regex:(a+)+$",
)  # fmt: skip
SETTINGS = (
    "train.steps", "subject.token", "subject.captions", "model.revision", "optimizer.betas", "preview.prompts",
    "run.folder", "run.cache", "adapter.targets", "adapter.rank_pattern", "adapter.continue_from", "export.author",
    "export.name", "prior.folder", "subject.held_out", "data.max_aspect", "memory.budget_gib", "nothing.at_all", "x",
)  # fmt: skip
NOT_RUN = ("demo",)
"""It takes two minutes where its words are sound."""


def words(count: int, folder: Path, seed: int = 0) -> Result:
    """Command lines with hostile words for every verb and option: done, or refused with one message, in its time."""
    sound, rng, failures = folder / "sound", random.Random(seed), []
    commands_of = _sound_commands(sound)
    verbs: dict[str, Any] = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    seen: Counter[str] = Counter()
    for number in range(count):
        verb = list(verbs)[number % len(verbs)]
        odd = commands.odd_things(folder / "odd")
        typed = _typed(verb, verbs[verb], commands_of.get(verb, []), odd, sound, rng)
        before = commands.state_of(sound)
        ended = commands.run(typed, folder / "work")
        fault = ended.fault or ("" if commands.state_of(sound) == before else "something of the user's has changed")
        seen["done" if ended.code == 0 else "refused"] += 1
        if fault:
            failures.append(f"{_shown(typed)}: {fault}")
        shutil.rmtree(folder / "work")
    return Result(count, tuple(failures), ", ".join(f"{n} {what}" for what, n in sorted(seen.items())))


def _sound_commands(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Verb to options and their values, with which it works; "" for what has no option's name."""
    base = str(tiny.tiny_ends(folder / "base"))
    tiny.tiny_pictures(folder / "pictures", 3)
    adapter = str(adapter_file(folder / "dog.safetensors", 0))
    settings = {
        "data.resolution": 32,
        "data.bucket_step": 16,
        "prior.loss_weight": 0,
        "train.steps": 1,
        "preview.images_per_prompt": 0,
        "adapter.targets": FEW_LAYERS,
    }
    job = [("", f"{key}={value}") for key, value in settings.items()]
    subject = [("--subject", str(folder / "pictures")), ("--class-noun", "dog"), ("--base", base)]
    return {
        "train": [*job, *subject],
        "train-many": [("", str(_subjects_file(folder, base))), *job, ("--out", "many")],
        "plan": [*job, *subject],
        "config": [("", f"model.base={base}"), ("", "subject.images=x"), ("", "subject.class_noun=dog"), *job],
        "generate": [("--base", base), ("--prompt", "x"), ("--steps", "1"), ("--adapter", adapter)],
        "inspect": [("", adapter)],
        "export": [("", adapter), ("--out", "out")],
        "merge": [("", adapter), ("", f"{adapter}:0.5"), ("--out", "both.safetensors")],
        "resize": [("", adapter), ("--rank", "1"), ("--out", "small.safetensors")],
        "extract": [("--base", base), ("--tuned", base), ("--rank", "1"), ("--out", "out.safetensors")],
    }


def _subjects_file(folder: Path, base: str) -> Path:
    """A file of one subject."""
    lines = ["[defaults.model]", f'base = "{base}"', "[[subject]]", f'images = "{folder / "pictures"}"']
    (folder / "subjects.toml").write_text("\n".join([*lines, 'class_noun = "dog"']))
    return folder / "subjects.toml"


def _typed(
    verb: str, command: Any, pairs: list[tuple[str, str]], odd: dict[str, Path], sound: Path, rng: random.Random
) -> list[str]:
    """The verb's sound command with one to three of its words, or added options, made hostile."""
    options = [max(p.opts, key=len) for p in command.params if p.param_type_name == "option" and not p.is_flag]
    values = [*TEXTS, *map(str, odd.values()), *(f"{path}:0.5" for path in odd.values())]
    values += [str(sound / "dog.safetensors"), "/dev/zero", "/dev/null", str(sound / "base" / "model_index.json")]
    pairs = list(pairs)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = rng.choice(values)
        kind = rng.randrange(4)
        if kind == 0 and pairs:
            at = rng.randrange(len(pairs))
            pairs[at] = (pairs[at][0], value)
        elif kind == 1 and options:
            pairs.append((rng.choice(options), value))
        elif kind == 2 and verb in ("train", "train-many", "plan", "config"):
            pairs.append(("", f"{rng.choice(SETTINGS)}={value}"))
        else:
            pairs.append(("", value))
    if verb in NOT_RUN:
        pairs.append(("--no-such-option", "x"))
    typed = [verb]
    for option, value in pairs:
        typed += [value] if not option else rng.choice(([option, value], [f"{option}={value}"]))
    return typed


def _shown(typed: list[str]) -> str:
    return " ".join(f"{word[:60]!a}" for word in typed)
