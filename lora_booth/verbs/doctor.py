"""What of this machine would keep lora_booth from working, and the mending line.

What lives here: the questions, in the order in which answers are read. What does not: versions (`run/versions.py`) and
what devices can do (`models/devices.py`). Nothing is imported here but Python's own library, so that `python -m
lora_booth.verbs.doctor` works where everything else is broken; packages are imported by a process of its own, which may
die of it. The network is never asked.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lora_booth.run import versions
from lora_booth.run.versions import Need

BROKEN = 2
"""Exit code where something is broken that every run needs; 0 otherwise."""
MAX_SECONDS = 600
"""For importing everything: a cold disk may take minutes."""
FEW_GIB = {"the current folder": 1.0, "cache": 2.0, "bases": 8.0}
"""Free space below which a warning is due: checkpoints, 200 class images, and SDXL's files of 7 GiB."""
PROBES = {
    "torch": ("torch", ()),
    "transformers": ("transformers", ("CLIPTextModel", "CLIPTokenizer")),
    "diffusers": ("diffusers", ("UNet2DConditionModel", "AutoencoderKL", "StableDiffusionXLPipeline")),
    "peft": ("peft.tuners.lora.layer", ("Linear",)),
    "accelerate": ("accelerate", ("Accelerator",)),
    "bitsandbytes": ("bitsandbytes.optim", ("AdamW8bit",)),
    "xformers": ("xformers.ops", ("memory_efficient_attention",)),
    "pillow": ("PIL.Image", ()),
    "google-re2": ("re2", ()),
}
"""Package to what of it is used, since some import the rest only then. Others are modules of their own name."""
NEED_TORCH = (
    "transformers",
    "diffusers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "xformers",
    "prodigyopt",
    "schedulefree",
)
"""Fail if torch does, which is told once."""
EXTRAS = {
    "xformers": 'for model.attention = "xformers"',
    "heic": "for pictures in HEIC and AVIF",
    "likeness": "for lora-booth evaluate on photographs",
    "optim": 'for optimizer.name = "prodigy" and "schedulefree"',
    "tracking": 'for run.trackers = ["tensorboard"]',
}
SETTINGS = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ONEAPI_DEVICE_SELECTOR",
    "ACCELERATE_USE_CPU",
    "OMP_NUM_THREADS",
)
"""Environment variables that decide about devices; told where they are set."""
_MARK = "lora-booth doctor: "
_START = """
import gc, json, sys
gc.disable()
sys.path[:] = json.loads(sys.argv[1])
from lora_booth.verbs.doctor import _probe
_probe(*json.loads(sys.argv[2]))
"""

Level = Literal["ok", "note", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """One answer. `remedy`: what mends it, "" where nothing needs to be; `values`: the same for programs."""

    level: Level
    about: str
    text: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def main(words: Sequence[str] = tuple(sys.argv[1:])) -> int:
    """Print every finding, as JSON with "--json"; returns 0, or `BROKEN`."""
    levels = []
    for finding in findings():
        levels.append(finding.level)
        print(json.dumps(asdict(finding)) if "--json" in words else _line(finding), flush=True)
    if "--json" not in words:
        bad = levels.count("broken")
        print(f"\n{bad} of these must be mended first." if bad else "\nlora_booth can work here.", flush=True)
    return BROKEN if "broken" in levels else 0


def findings() -> Iterator[Finding]:
    """Everything, what lies deepest first. Never raises for what is broken here; that is what is found."""
    yield from _this()
    try:
        os.getcwd()
    except OSError as error:  # then no Python can start
        yield Finding("broken", "the current folder", _reason(error), "go to a folder that is there.")
        return
    needs, problem = _needs()
    if problem is not None:
        yield problem
    broken = []
    for finding in [*_versions(needs), *_imports(needs)]:
        broken += [finding.about] if finding.level == "broken" else []
        if finding.about != "devices" or "torch" not in broken:
            yield finding
    yield from _extras(needs)
    yield from _compiler()
    yield from _disks()
    yield from _hub()


def _line(finding: Finding) -> str:
    marks = {"ok": "ok     ", "note": "       ", "warning": "WARNING", "broken": "BROKEN "}
    remedy = f"\n        -> {finding.remedy}" if finding.remedy else ""
    return f"{marks[finding.level]} {finding.about}: {finding.text}{remedy}"


def _this() -> Iterator[Finding]:
    found = versions.versions()
    text = f"{found['lora-booth']}, Python {found['python']} on {found['platform']} ({platform.machine()})"
    yield Finding("ok", "lora-booth", text, values=found)
    names = [name for name in found if name not in ("lora-booth", "python", "platform")]
    yield Finding("note", "versions", ", ".join(f"{name} {found[name]}" for name in names))
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    if settings:
        told = ", ".join(f'{name} = "{value}"' for name, value in settings.items())
        yield Finding("note", "environment", told, values=settings)


def _needs() -> tuple[list[Need], Finding | None]:
    """What lora_booth asks for; with a finding where nobody can say."""
    try:
        needs = versions.needs()
    except Exception as error:  # a package that is broken may raise anything
        return [], Finding("broken", "packaging", _reason(error), "python -m pip install --force-reinstall packaging")
    if needs:
        return needs, None
    text = "is not installed, so that nothing says which versions it needs"
    return [], Finding("warning", "lora-booth", text, "python -m pip install . (in its folder)")


def _versions(needs: Sequence[Need]) -> Iterator[Finding]:
    """Packages that are missing or of another version than asked for, and how many are not as tested."""
    tested, others = versions.tested(), []
    for need in needs:
        found = versions.installed(need.name)
        install = f'python -m pip install "{need.name}{need.versions}"'
        if found is None and not need.extra:
            yield Finding("broken", need.name, "is not installed", install)
        if found is None:
            continue
        if not versions.is_allowed(found, need):
            yield Finding("warning", need.name, f"is {found}, and {need.versions} is asked for", install)
        exact = tested.get(need.name.lower())
        if exact is not None and exact != found.partition("+")[0]:
            others.append(f"{need.name} {found} ({exact})")
    if tested:
        told = f"{len(others)} packages have other versions than lora_booth was tested with: {', '.join(others)}"
        yield Finding("note", "tested", told if others else "all versions as lora_booth was tested with")


def _imports(needs: Sequence[Need]) -> Iterator[Finding]:
    """What cannot be imported, and what the devices can do, as other processes find it."""
    installed = [need for need in needs if versions.installed(need.name) is not None]
    specs = {need.name: need for need in installed} or {name: Need(name, "") for name in versions.CORE}
    names = sorted(specs, key=lambda name: (name not in ("numpy", "torch"), name))
    asks_devices, failed = "torch" in specs, set[str]()
    while names:
        answers, ending = _ask(names, asks_devices=asks_devices and "torch" not in failed)
        results = {answer["name"]: answer for answer in answers if "name" in answer}
        begun = [answer["importing"] for answer in answers if "importing" in answer]
        for name, answer in results.items():
            if answer["error"] and not ("torch" in failed and name in NEED_TORCH):
                failed.add(name)
                yield _failed(specs[name], answer["error"], answer["origin"])
        for answer in answers:
            asks_devices &= not {"devices", "devices_error"} & answer.keys()
            yield from _devices(answer)
        dead = next((name for name in begun if name not in results), None)
        if dead is None:
            break
        failed.add(dead)
        yield _failed(specs[dead], f"the process that imports it {ending}", None)
        names = names[names.index(dead) + 1 :]
    if asks_devices and "torch" not in failed:
        yield Finding("broken", "devices", f"cannot be asked for: the process {ending}", "run the same command again.")
    if not failed:
        yield Finding("ok", "packages", f"{len(specs)} can be imported")


def _failed(need: Need, error: str, origin: str | None) -> Finding:
    """A package that cannot be imported. `origin`: the file that Python takes for it."""
    level: Level = "warning" if need.extra else "broken"
    if origin is not None and not _is_installed_at(need.name, origin):
        text = f"{_short(origin)} is taken for it, which fails ({error})"
        return Finding(level, need.name, text, "rename that file or folder, or start elsewhere; see PYTHONPATH too.")
    remedy = f'python -m pip install --force-reinstall "{need.name}{need.versions}"'
    return Finding(level, need.name, f"cannot be imported: {error}", remedy)


def _is_installed_at(name: str, origin: str) -> bool:
    """Whether a file lies where the package was installed. An editable one may lie anywhere."""
    try:
        root = Path(str(metadata.distribution(name).locate_file(""))).resolve()
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return True
    return Path(origin).resolve().is_relative_to(root) or "site-packages" in origin


def _devices(answer: dict[str, Any]) -> Iterator[Finding]:
    if "devices_error" in answer:
        remedy = "python -m pip install --force-reinstall lora-booth"
        yield Finding("broken", "devices", f"cannot be asked: {answer['devices_error']}", remedy)
    for device in answer.get("devices", ()):
        memory = "" if device["free_gib"] is None else f", {device['free_gib']:.1f} GiB free"
        is_card = device["device"] != "cpu"
        lacking = "; ".join(f"{ability} ({why})" for ability, why in device["lacks"].items() if is_card)
        text = f"{device['name']}{memory}; auto means {device['precision']} and {device['optimizer']}"
        yield Finding(
            "ok", f"device {device['device']}", text + (f"; without {lacking}" if lacking else ""), values=device
        )
    is_alone = [device["device"] for device in answer.get("devices", ())] == ["cpu"]
    if is_alone and (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()):
        text = f"an NVIDIA driver is here, but torch {answer['torch']} finds no card"
        remedy = "install torch for CUDA (pytorch.org, Get Started) or a newer driver; see CUDA_VISIBLE_DEVICES too."
        yield Finding("warning", "device cuda", text, remedy)
    elif is_alone:
        yield Finding("warning", "devices", "only the CPU: the miniature trains in minutes, other bases for days")


def _extras(needs: Sequence[Need]) -> Iterator[Finding]:
    for extra, purpose in EXTRAS.items():
        wanted = [need.name for need in needs if need.extra == extra]
        absent = [name for name in wanted if versions.installed(name) is None]
        if wanted and absent:
            install = f'python -m pip install "lora-booth[{extra}]"'
            yield Finding("note", f"lora-booth[{extra}]", f"not installed; it is {purpose}", install)
        elif wanted:
            yield Finding("ok", f"lora-booth[{extra}]", ", ".join(f"{n} {versions.installed(n)}" for n in wanted))


def _compiler() -> Iterator[Finding]:
    found = next(
        (name for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name and shutil.which(name)), None
    )
    if found is not None:
        yield Finding("ok", "compiler", found)
    else:
        text = "neither g++ nor clang++; train.compile stays off without one"
        yield Finding("note", "compiler", text, "install one if steps on a card shall be compiled.")


def _disks() -> Iterator[Finding]:
    places = {"the current folder": Path.cwd()}
    try:
        from platformdirs import user_cache_path

        places["cache"] = user_cache_path("lora_booth")
    except Exception:  # whatever a broken package raises, as `_imports` has told
        pass
    home = os.environ.get("HF_HOME") or Path(os.path.expanduser("~")) / ".cache" / "huggingface"
    places["bases"] = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    for about, path in places.items():
        yield _disk(about, path)


def _disk(about: str, path: Path) -> Finding:
    """Free space of a folder that is there, or will be made."""
    try:
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(there).free / 2**30
    except (OSError, ValueError, StopIteration) as error:
        return Finding("warning", about, f"{_short(path)} cannot be looked at ({_reason(error)})")
    text, values = f"{_short(path)}, {free:.1f} GiB free", {"path": _short(path), "free_gib": round(free, 2)}
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        setting = {"cache": "set run.cache", "bases": "set HF_HOME"}.get(about, "set run.folder")
        level: Level = "broken" if about == "cache" else "warning"
        return Finding(level, about, f"{_short(path)} cannot be written", f"{setting} to a folder of yours.", values)
    if free < FEW_GIB[about]:
        return Finding("warning", about, text, f"free some space: {FEW_GIB[about]:g} GiB may be needed.", values)
    return Finding("ok", about, text, values=values)


def _hub() -> Iterator[Finding]:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding("note", "hub", "HF_HUB_OFFLINE is set: only bases that are on this machine can be used")
    else:
        yield Finding("ok", "hub", "a base that is not on this machine is downloaded when it is first used (not tried)")


def _ask(names: Sequence[str], *, asks_devices: bool) -> tuple[list[dict[str, Any]], str]:
    """What a process of this very Python answers that imports `names`, and how it ended."""
    command = [sys.executable, "-c", _START, json.dumps(sys.path), json.dumps([list(names), asks_devices])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True}
    try:
        done = subprocess.run(command, check=False, env=environment, timeout=MAX_SECONDS, **options)
        output, ending = done.stdout, f"ended with {_ending(done.returncode)}"
    except subprocess.TimeoutExpired as error:
        output, ending = error.stdout or b"", f"did not end in {MAX_SECONDS} s"
    except OSError as error:
        return [], f"cannot be started ({_reason(error)})"
    lines = output.decode("utf-8", errors="replace").splitlines()
    return [json.loads(line.removeprefix(_MARK)) for line in lines if line.startswith(_MARK)], ending


def _ending(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"exit code {code}"


def _probe(names: Sequence[str], asks_devices: bool) -> None:
    """In the other process: import each of `names`, then ask torch for devices, an answer a line."""
    failed = []
    for name in names:
        _answer(importing=name)
        path, attributes = PROBES.get(name, (name.replace("-", "_"), ()))
        error = ""
        try:
            module = import_module(path)
            for attribute in attributes:
                getattr(module, attribute)
        except BaseException as fault:  # whatever a broken package does; even to end the process
            error = f"{type(fault).__name__}: {_reason(fault)}"
            failed.append(name)
        _answer(name=name, error=error, origin=_origin(path.partition(".")[0]) if error else None)
    if asks_devices and "torch" not in failed:
        try:
            found = _devices_here()
        except BaseException as fault:
            _answer(devices_error=f"{type(fault).__name__}: {_reason(fault)}")
        else:
            _answer(devices=found, torch=versions.installed("torch"))


def _devices_here() -> list[dict[str, Any]]:
    import torch

    from lora_booth.models import abilities, devices

    here = devices.here()
    count = 0 if here.type == "cpu" else torch.accelerator.device_count()
    found = []
    for device in [torch.device(here.type, index) for index in range(count)] + [torch.device("cpu")]:
        able = devices.abilities(device)
        values: dict[str, Any] = {"device": str(device), "name": devices.name(device), "lacks": able.missing}
        choices = {"precision": abilities.best_precision(able), "optimizer": abilities.best_optimizer(able)}
        found.append({**values, **choices, "free_gib": devices.free_gib(device)})
    return found


def _origin(name: str) -> str | None:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
    return None if spec is None else spec.origin


def _answer(**values: Any) -> None:
    print(f"\n{_MARK}{json.dumps(values)}", flush=True)


def _reason(error: BaseException) -> str:
    """What an exception says, in one line that is not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _short(path: Path | str) -> str:
    """A path without the user's name."""
    home = os.path.expanduser("~")  # "~" itself where a user has none, as in some containers
    text = str(path)
    return "~" + text[len(home) :] if len(home) > 1 and text.startswith(home + os.sep) else text


if __name__ == "__main__":
    sys.exit(main())
