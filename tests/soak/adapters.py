"""Broken and hostile adapter files through every verb that reads one: one clear error or the whole adapter."""

from __future__ import annotations

import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from lora_booth import deliver, export, inspect, merge
from lora_booth.errors import LoraBoothError
from lora_booth.report import Silent
from tests import adapted, tiny
from tests.soak.bench import Result
from tests.soak.mutants import MUTATIONS, mutant

HEADER = {"modelspec.trigger_phrase": "sks dog", "ss_base_model_version": "sd_v1"}
MAX_GROWTH_BYTES = 1 << 30
"""Of the process; torch's own arenas take some hundred MB."""
SOUND_AFTER = {
    "bits",
    "every dtype",
    "metadata",
    "header bits",
    "transpose",
    "shared data",
    "dtype",
    "flatten",
    "shape",
}
"""Mutations that can leave a file sound: other numbers or other words, with every layer in place."""

Layers = set[tuple[str, str]]


def adapters(count: int, folder: Path, seed: int = 0) -> Result:
    """Mutated adapter files, half in kohya's naming, half in diffusers', through inspect, export and merge."""
    base = tiny.tiny_sd(folder / "base")
    trained, _ = adapted.trained_mixed("sd1", {"sd1": base})
    weights = {name: dict(list(layers.items())[:: max(1, len(layers) // 12)]) for name, layers in trained.items()}
    expected: Layers = {(component, path) for component, layers in weights.items() for path in layers}
    failures, outcomes, notes = [], Counter[tuple[str, str]](), []
    for naming in ("kohya", "diffusers"):
        sound = folder / f"{naming}.safetensors"
        export.FORMATS[naming].write(sound, weights, "sd1", torch.float16, HEADER)
        content, path = sound.read_bytes(), folder / "mutant.safetensors"
        assert all(_accepted(sound, expected, base, folder))
        before = _peak_bytes()
        for number in range(seed, seed + count // 2):
            name, data = mutant(content, number)
            path.write_bytes(data)
            try:
                is_taken = all(_accepted(path, expected, base, folder))
                outcomes[name, "accepted" if is_taken else "refused"] += 1
                if is_taken and name not in SOUND_AFTER:
                    failures.append(f"{naming} {number}: a file with {name} was taken")
            except Exception as error:
                failures.append(f"{naming} {number} ({name}): {type(error).__name__}: {error}")
            path.unlink()
        growth = _peak_bytes() - before
        notes.append(f"{naming}: memory grew by {growth / 2**20:.0f} MiB")
        if growth > MAX_GROWTH_BYTES:
            failures.append(f"{naming}: the process grew by {growth / 2**30:.1f} GiB")
    missing = {name for name, _ in MUTATIONS} - {name for name, _ in outcomes}
    failures += [f"{name} was never tried" for name in missing]
    refused = sum(number for (_, outcome), number in outcomes.items() if outcome == "refused")
    return Result(2 * (count // 2), tuple(failures), "; ".join([f"{refused} refused, the others whole", *notes]))


def _accepted(path: Path, expected: Layers, base: Path, folder: Path) -> Iterator[bool]:
    """Whether each verb took the file. Any exception that is not a LoraBoothError goes on to the caller."""
    try:
        read = export.read_any(path)
        found = {(component, layer) for component, layers in read.items() for layer in layers}
        assert found == expected, "half a file was taken"
        yield True
    except LoraBoothError as error:
        if not str(error):
            raise AssertionError("an error without words") from error
        yield False
    try:
        inspect.inspect(path, Silent())
    except LoraBoothError:
        yield False
    out, merged = folder / "out", folder / "merged"
    try:
        deliver.convert(file=path, out=out, dtype="fp32", report=Silent())
        yield True
    except LoraBoothError:
        yield False
    finally:
        shutil.rmtree(out, ignore_errors=True)
    try:
        merge.merge_into_base(base=str(base), adapters=[(path, 1.0)], out=merged, report=Silent())
        yield True
    except LoraBoothError:
        assert not merged.exists(), "a refused merge left something"
        yield False
    finally:
        shutil.rmtree(merged, ignore_errors=True)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
