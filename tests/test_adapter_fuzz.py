"""Broken and hostile adapter files through every verb that reads one: one clear error or the whole adapter."""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_booth import deliver, export, inspect, merge
from lora_booth.adapter.weights import AdapterWeights
from lora_booth.errors import LoraBoothError
from lora_booth.report import Silent
from tests import adapted
from tests.fuzz_adapters import MUTATIONS, mutant

SHORT, LONG = 150, 5000
FIRST_SEED = int(os.environ.get("LORA_BOOTH_FUZZ_SEED", "0"))
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


@pytest.fixture(scope="module")
def weights(bases: dict[str, Path]) -> AdapterWeights:
    some, _ = adapted.trained_mixed("sd1", bases)
    return {component: dict(list(layers.items())[:: max(1, len(layers) // 12)]) for component, layers in some.items()}


def layers_of(weights: object) -> set[tuple[str, str]]:
    assert isinstance(weights, dict)
    return {(component, path) for component, layers in weights.items() for path in layers}


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=pytest.mark.soak)])
def test_a_mutated_file_is_refused_or_whole(
    naming: str, count: int, weights: AdapterWeights, bases: dict[str, Path], tmp_path: Path
) -> None:
    sound = tmp_path / "sound.safetensors"
    export.FORMATS[naming].write(sound, weights, "sd1", torch.float16, HEADER)
    content, expected = sound.read_bytes(), layers_of(weights)
    outcomes: Counter[tuple[str, str]] = Counter()
    assert all(accepted(sound, expected, -1, bases["sd1"], tmp_path))
    before = peak_bytes()
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        name, data = mutant(content, seed)
        path = tmp_path / "mutant.safetensors"
        path.write_bytes(data)
        outcomes[name, "accepted" if all(accepted(path, expected, seed, bases["sd1"], tmp_path)) else "refused"] += 1
        path.unlink()
    assert peak_bytes() - before < MAX_GROWTH_BYTES
    assert {name for name, _ in outcomes} == {name for name, _ in MUTATIONS}
    assert {name for name, outcome in outcomes if outcome == "accepted"} <= SOUND_AFTER
    refused = sum(number for (_, outcome), number in outcomes.items() if outcome == "refused")
    print(f"{naming}: {count} mutants, {refused} refused, the others whole")


def accepted(path: Path, expected: set[tuple[str, str]], seed: int, base: Path, folder: Path) -> Iterator[bool]:
    """Whether each verb took the file; any exception that is not a LoraBoothError fails the test."""
    try:
        read = export.read_any(path)
        assert layers_of(read) == expected, f"seed {seed}: half a file was taken"
        yield True
    except LoraBoothError as error:
        yield not str(error)  # an error without words would count as taken, and fail above
    try:
        inspect.inspect(path, Silent())
    except LoraBoothError:
        yield False
    out = folder / "out"
    try:
        deliver.convert(file=path, out=out, dtype="fp32", report=Silent())
        yield True
    except LoraBoothError:
        yield False
    finally:
        clear(out)
    merged = folder / "merged"
    try:
        merge.merge_into_base(base=str(base), adapters=[(path, 1.0)], out=merged, report=Silent())
        yield True
    except LoraBoothError:
        assert not merged.exists(), f"seed {seed}: a refused merge left something"
        yield False
    finally:
        clear(merged)


def clear(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if folder.exists():
        folder.rmdir()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
