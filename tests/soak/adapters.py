"""Broken and hostile adapter files through every verb that reads one: one clear error or the whole adapter."""

from __future__ import annotations

import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_booth.adapter.files import storage
from lora_booth.adapter.weights import uses_dora
from lora_booth.errors import LoraBoothError
from lora_booth.run.report import Silent
from lora_booth.verbs import export as verb_export
from lora_booth.verbs import extract, generate, inspect, merge, resize
from tests.soak.bench import Result
from tests.soak.mutants import MUTATIONS, mutant
from tests.support import adapted, tiny

HEADER = {"modelspec.trigger_phrase": "yql dog", "ss_base_model_version": "sd_v1"}
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
    "small type",
    "scalar",
    "huge",
    "zeros",
    "dora",
    "tucker",
    "foreign",
}
"""Mutations that can leave a file sound: other numbers or other words, with every layer in place."""
ADDS_LAYERS = {"foreign"}
STRENGTHS = (1.0, -0.5, 0.0, 3e4, 1e308, float("nan"), float("inf"))

Layers = set[tuple[str, str]]


def adapters(count: int, folder: Path, seed: int = 0) -> Result:
    """Mutated adapter files through every verb that reads one: in kohya's naming, in diffusers', and of LyCORIS' kinds.

    What loads whole pipelines, generate and extract, is asked now and then.
    """
    base = tiny.tiny_sd(folder / "base")
    trained, _ = adapted.trained_mixed("sd1", {"sd1": base})
    weights = {name: dict(list(layers.items())[:: max(1, len(layers) // 12)]) for name, layers in trained.items()}
    failures, outcomes, notes = [], Counter[tuple[str, str]](), []
    for naming in ("kohya", "diffusers", "lycoris"):
        sound = folder / f"{naming}.safetensors"
        if naming == "lycoris":
            save_file(_lycoris(), sound, HEADER)
        else:
            storage.FORMATS[naming].write(sound, weights, "sd1", torch.float16, HEADER)
        content, path = sound.read_bytes(), folder / "mutant.safetensors"
        expected = _layers(sound)
        assert naming == "lycoris" or expected == {(c, layer) for c, layers in weights.items() for layer in layers}
        try_ = Try(path, sound, base, folder, expected, is_lora=naming != "lycoris")
        assert all(replace(try_, path=sound).outcomes(strength=1.0, is_deep=True)), "the sound file itself is refused"
        before = _peak_bytes()
        for number in range(seed, seed + count // 3):
            name, data = mutant(content, number)
            path.write_bytes(data)
            strength = STRENGTHS[number % len(STRENGTHS)] if number % 3 == 0 else 1.0
            is_deep = number % max(50, count // 8) == 0
            try:
                is_taken = all(try_.outcomes(strength=strength, is_deep=is_deep, may_add=name in ADDS_LAYERS))
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
    return Result(3 * (count // 3), tuple(failures), "; ".join([f"{refused} refused, the others whole", *notes]))


@dataclass(frozen=True)
class Try:
    """One adapter file and what the verbs need beside it: a sound one, a base, a folder to write into."""

    path: Path
    sound: Path
    base: Path
    folder: Path
    expected: Layers
    is_lora: bool
    """Without it, what takes plain LoRA alone is not asked."""

    def outcomes(self, *, strength: float, is_deep: bool, may_add: bool = False) -> Iterator[bool]:
        """Whether each verb took the file. Any exception that is not a LoraBoothError goes on to the caller."""
        yield self._takes(lambda out: self._read(may_add), "read")
        yield self._takes(lambda out: inspect.inspect(self.path, Silent()), "inspect")
        if self.is_lora:
            yield self._takes(self._export, "export")
        yield self._takes(self._resize, "resize")
        yield self._takes(lambda out: self._merge(out, strength), "merge")
        yield self._takes(lambda out: self._combine(out, strength), "combine")
        if is_deep and self.is_lora:
            yield self._takes(self._generate, "generate")
        if is_deep:
            yield self._takes(self._extract, "extract")

    def _takes(self, verb: Callable[[Path], object], name: str) -> bool:
        out = self.folder / "out"
        out.mkdir()
        try:
            verb(out)
            return True
        except LoraBoothError as error:
            if not str(error):
                raise AssertionError(f"{name}: an error without words") from error
            assert name == "generate" or not any(out.iterdir()), f"a refused {name} left something"
            return False
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def _read(self, may_add: bool) -> None:
        found = _layers(self.path)
        assert self.expected <= found and (may_add or found == self.expected), "half a file was taken"

    def _export(self, out: Path) -> None:
        verb_export.export(file=self.path, out=out, dtype="fp32", report=Silent())

    def _resize(self, out: Path) -> None:
        with_base = {"base": str(self.base)} if uses_dora(storage.read_any(self.path)) else {}
        resize.resize(file=self.path, out=out / "r.safetensors", rank=1, dtype="fp32", report=Silent(), **with_base)

    def _merge(self, out: Path, strength: float) -> None:
        merge.merge_into_base(
            base=str(self.base), adapters=[(self.path, strength)], out=out / "merged", report=Silent()
        )

    def _combine(self, out: Path, strength: float) -> None:
        merge.merge_adapters(
            adapters=[(self.path, strength), (self.sound, 1.0)],
            out=out / "both.safetensors",
            method="concat" if self.is_lora else "svd",
            rank=None if self.is_lora else 1,
            dtype="fp32",
            report=Silent(),
        )

    def _generate(self, out: Path) -> None:
        picture = generate.PictureSettings(sampler="ddim", sampler_steps=1)
        generate.generate(
            base=str(self.base),
            prompts=["x"],
            adapters=[(self.path, 1.0)],
            picture=picture,
            folder=out / "pictures",
            report=Silent(),
        )

    def _extract(self, out: Path) -> None:
        merged = merge.merge_into_base(
            base=str(self.base), adapters=[(self.path, 1.0)], out=self.folder / "tuned", report=Silent()
        )
        try:
            extract.extract(
                base=str(self.base), tuned=str(merged), out=out / "e.safetensors", rank=1, dtype="fp32", report=Silent()
            )
        finally:
            shutil.rmtree(merged)


def _layers(path: Path) -> Layers:
    return {(component, layer) for component, layers in storage.read_any(path).items() for layer in layers}


def _lycoris() -> dict[str, Tensor]:
    """A layer of each of LyCORIS' kinds that a resize makes plain LoRA of."""
    kinds = {
        "attentions_0_proj_in": {f"hada_w{side}_{ab}": shape for side in "12" for ab, shape in
                                 (("a", (32, 2)), ("b", (2, 32)))} | {"alpha": ()},
        "resnets_0_conv1": {"lokr_w1": (4, 4), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 8), "lokr_w2_b": (2, 8),
                            "alpha": ()},
        "resnets_0_conv2": {"lora_up.weight": (32, 2, 1, 1), "lora_mid.weight": (2, 2, 3, 3),
                            "lora_down.weight": (2, 32, 1, 1), "alpha": ()},
        "resnets_1_conv1": {"diff": (32, 32, 3, 3)},
        "attentions_0_transformer_blocks_0_attn2_to_v": {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2": (8, 8)},
    }  # fmt: skip
    return {
        f"lora_unet_mid_block_{layer}.{leaf}": torch.full(shape, 0.5)
        for layer, leaves in kinds.items()
        for leaf, shape in leaves.items()
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
