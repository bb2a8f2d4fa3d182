"""Pictures from files: strength 0 is the base, strengths and several adapters count, nothing is overwritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_booth.adapter.files import storage
from lora_booth.adapter.weights import LowRank
from lora_booth.cli.parsing import parse_adapter, parse_size, parse_strengths
from lora_booth.errors import ConfigError, DeviceMemoryError, ModelError
from lora_booth.verbs import generate
from lora_booth.verbs.generate import PictureSettings
from lora_booth.verbs.merge import merge_into_base
from tests.soak.sabotage import ASK_FOR_NONE, OutOfMemory
from tests.support.adapted import adapter_file
from tests.support.runs import Recorder

PICTURE = PictureSettings(sampler="ddim", sampler_steps=2)


def pixels(folder: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(folder / name)).astype(int)


def test_strength_zero_is_the_base_and_more_is_further_from_it(bases: dict[str, Path], tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "a.safetensors", 0, scale=4.0)
    settings = {"base": str(bases["sd1"]), "prompts": ["a yql dog"], "picture": PICTURE}
    generate.generate(**settings, folder=tmp_path / "base")
    generate.generate(**settings, adapters=[(file, 1.0)], strengths=(0, 0.5, 1), folder=tmp_path / "grid")
    base = pixels(tmp_path / "base", "00_a_yql_dog_1.png")
    assert np.array_equal(base, pixels(tmp_path / "grid", "00_a_yql_dog_0.png"))
    far = [abs(base - pixels(tmp_path / "grid", f"00_a_yql_dog_{s}.png")).mean() for s in ("0.5", "1")]
    assert 0 < far[0] < far[1]
    assert Image.open(tmp_path / "grid" / "grid.png").width > 3 * 192


def test_two_adapters_differ_from_either(bases: dict[str, Path], tmp_path: Path) -> None:
    one, two = (adapter_file(tmp_path / f"{n}.safetensors", n, scale=4.0) for n in range(2))
    pictures = []
    for number, adapters in enumerate(([(one, 1.0)], [(two, 1.0)], [(one, 1.0), (two, 1.0)])):
        folder = tmp_path / str(number)
        generate.generate(base=str(bases["sd1"]), prompts=["a dog"], adapters=adapters, picture=PICTURE, folder=folder)
        pictures.append(pixels(folder, "00_a_dog_1.png"))
    assert not any(np.array_equal(a, b) for a, b in ((pictures[0], pictures[2]), (pictures[1], pictures[2])))


def test_every_naming_draws_the_same_dora_too(bases: dict[str, Path], tmp_path: Path) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator)
    magnitude = 3 * torch.rand(16, generator=generator)
    low = LowRank(down, up, 0.5, magnitude)
    storage.FORMATS["diffusers"].write(
        tmp_path / "diffusers.safetensors", {"unet": {path: low}}, "sd1", torch.float32, {}
    )
    for naming, prefix in (("kohya", "lora_unet_"), ("lycoris", "lycoris_")):
        leaves = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
        leaves["dora_scale"] = magnitude[:, None]
        tensors = {f"{prefix}{path.replace('.', '_')}.{leaf}": tensor for leaf, tensor in leaves.items()}
        save_file(tensors, tmp_path / f"{naming}.safetensors")
    drawn = {}
    for naming in ("diffusers", "kohya", "lycoris"):
        adapters = [(tmp_path / f"{naming}.safetensors", 1.0)]
        folder = tmp_path / naming
        generate.generate(
            base=str(bases["sd1"]), prompts=["x"], adapters=adapters, strengths=(0, 1), picture=PICTURE, folder=folder
        )
        drawn[naming] = pixels(folder, "00_x_1.png")
        assert not np.array_equal(drawn[naming], pixels(folder, "00_x_0.png"))
    assert np.array_equal(drawn["diffusers"], drawn["kohya"]) and np.array_equal(drawn["kohya"], drawn["lycoris"])


def test_existing_pictures_are_not_replaced(bases: dict[str, Path], tmp_path: Path) -> None:
    for _ in range(2):
        generate.generate(base=str(bases["sd1"]), prompts=["a dog"], picture=PICTURE, folder=tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"00_a_dog_1.png", "00_a_dog_1-2.png", "grid.png", "grid-2.png"}


def test_a_damaged_adapter_and_an_odd_size_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a file of tensors")
    with pytest.raises(ModelError, match="bad"):
        generate.generate(base=str(bases["sd1"]), prompts=["x"], adapters=[(bad, 1.0)])
    picture = PictureSettings(size_px=(33, 32))
    with pytest.raises(ConfigError, match="is not a multiple of"):
        generate.generate(base=str(bases["sd1"]), prompts=["x"], picture=picture, folder=tmp_path / "out")


def test_command_line_values_are_read_as_written(tmp_path: Path) -> None:
    assert parse_adapter("a.safetensors:0.7") == (Path("a.safetensors"), 0.7)
    assert parse_adapter("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert parse_adapter("C:\\a.safetensors") == (Path("C:\\a.safetensors"), 1.0)
    assert parse_strengths("0,0.5,1") == (0.0, 0.5, 1.0)
    assert (parse_size(""), parse_size("512x768")) == (None, (512, 768))


def test_an_adapter_of_another_family_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "a.safetensors", 0)
    with pytest.raises(ModelError, match="does not fit the base, a sdxl model"):
        generate.generate(base=str(bases["sdxl"]), prompts=["x"], adapters=[(file, 1.0)], folder=tmp_path / "out")


def test_dora_on_some_layers_only_draws_what_the_merged_base_draws(bases: dict[str, Path], tmp_path: Path) -> None:
    stem, generator = "down_blocks.0.attentions.0.transformer_blocks.0.attn1", torch.Generator().manual_seed(0)
    layers = {
        f"{stem}.{leaf}": LowRank(torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator), 1.0)
        for leaf in ("to_q", "to_k")
    }
    layers[f"{stem}.to_q"] = replace(layers[f"{stem}.to_q"], magnitude=3 * torch.rand(16, generator=generator))
    file = tmp_path / "a.safetensors"
    storage.FORMATS["diffusers"].write(file, {"unet": layers}, "sd1", torch.float32, {})
    settings = {"prompts": ["x"], "picture": PICTURE}
    generate.generate(base=str(bases["sd1"]), adapters=[(file, 1.0)], folder=tmp_path / "loaded", **settings)
    merge_into_base(base=str(bases["sd1"]), adapters=[(file, 1.0)], out=tmp_path / "merged")
    generate.generate(base=str(tmp_path / "merged"), folder=tmp_path / "drawn", **settings)
    generate.generate(base=str(bases["sd1"]), folder=tmp_path / "base", **settings)
    loaded, merged, base = (pixels(tmp_path / name, "00_x_1.png") for name in ("loaded", "drawn", "base"))
    assert abs(loaded - merged).max() <= 1 < abs(base - merged).max()


def test_dora_over_the_inputs_is_refused_by_name_with_what_takes_it(bases: dict[str, Path], tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    leaves = {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2), "dora_scale": (1, 16)}
    save_file({f"{name}.{leaf}": torch.ones(shape) for leaf, shape in leaves.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"a\.safetensors is DoRA over the inputs at unet.+attn1\.to_q.+merge --base"):
        generate.generate(base=str(bases["sd1"]), prompts=["x"], adapters=[(tmp_path / "a.safetensors", 1.0)])


def test_a_convolution_stored_as_a_linear_layer_is_drawn(bases: dict[str, Path], tmp_path: Path) -> None:
    name, generator = "lora_unet_mid_block_attentions_0_proj_in", torch.Generator().manual_seed(0)
    shapes = {"linear": ((2, 32), (32, 2)), "conv": ((2, 32, 1, 1), (32, 2, 1, 1))}
    factors = [torch.randn(shape, generator=generator) for shape in shapes["linear"]]
    drawn = []
    for kind, pair in shapes.items():
        values = [factor.reshape(shape) for factor, shape in zip(factors, pair, strict=True)]
        file = tmp_path / f"{kind}.safetensors"
        save_file({f"{name}.lora_{leaf}.weight": v for leaf, v in zip(("down", "up"), values, strict=True)}, file)
        generate.generate(
            base=str(bases["sd1"]), prompts=["x"], adapters=[(file, 1.0)], picture=PICTURE, folder=tmp_path / kind
        )
        drawn.append(pixels(tmp_path / kind, "00_x_1.png"))
    assert np.array_equal(*drawn)


def test_how_pictures_are_kept_in_memory_changes_them_by_rounding_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "a.safetensors", 0, scale=4.0)
    ways = {
        "plain": {},
        "small": {"pictures_at_once": 1, "is_tiled": True, "is_denoiser_offloaded": True},
        "budget": {"budget_gib": 0.801},
        "large": {"budget_gib": 100.0},
    }
    drawn = {}
    recorder = Recorder()
    for name, memory in ways.items():
        generate.generate(
            base=str(bases["sd1"]),
            prompts=["a dog", "a cat"],
            adapters=[(file, 1.0)],
            picture=replace(PICTURE, **memory),
            folder=tmp_path / name,
            report=recorder,
        )
        drawn[name] = [pixels(tmp_path / name, f"{n:02d}_a_{word}_1.png") for n, word in enumerate(("dog", "cat"))]
    for name in ways:
        assert all(abs(a - b).max() <= 1 for a, b in zip(drawn["plain"], drawn[name], strict=True)), name
    chosen = [text for kind, text in recorder.events if kind == "memory"]
    assert "2 pictures at once, to stay within 100.0 GiB" in chosen[-1]
    assert "1 pictures at once" in chosen[0] and "the denoiser offloaded" in chosen[0]


def test_what_cannot_be_drawn_is_left_out_by_name(bases: dict[str, Path], tmp_path: Path) -> None:
    plain = adapter_file(tmp_path / "plain.safetensors", 0, scale=4.0)
    more = load_file(plain) | {"lora_unet_conv_norm_out.w_norm": torch.ones(16)}
    save_file(more, tmp_path / "more.safetensors", storage.read_metadata(plain))
    settings: dict[str, Any] = {"base": str(bases["sd1"]), "prompts": ["a dog"], "picture": PICTURE, "device": "cpu"}
    with pytest.raises(ModelError, match="export, generate, merge and resize take --leave-out norm"):
        generate.generate(**settings, adapters=[(tmp_path / "more.safetensors", 1.0)], folder=tmp_path / "no")
    left_out = {"adapters": [(tmp_path / "more.safetensors", 1.0)], "leave_out": ["norm"], "folder": tmp_path / "less"}
    generate.generate(**settings, **left_out)
    generate.generate(**settings, adapters=[(plain, 1.0)], folder=tmp_path / "plain")
    assert np.array_equal(pixels(tmp_path / "less", "00_a_dog_1.png"), pixels(tmp_path / "plain", "00_a_dog_1.png"))
    assert not (tmp_path / "no").exists()


class FullDevice(OutOfMemory):
    """Refuses every operation from the `number`-th on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.count >= self.number and func not in ASK_FOR_NONE:
            self.number = self.count + 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_a_lack_of_memory_names_the_options_that_are_left(bases: dict[str, Path], tmp_path: Path) -> None:
    told = {}
    for memory, prompts in (({}, ["x", "y"]), ({"is_tiled": True, "is_denoiser_offloaded": True}, ["x"])):
        picture = replace(PICTURE, **memory)
        with pytest.raises(DeviceMemoryError) as caught, FullDevice(3000):
            generate.generate(base=str(bases["sd1"]), prompts=prompts, picture=picture, folder=tmp_path / "out")
        told[len(prompts)] = str(caught.value)
    assert all(
        option in told[2] for option in ("1. --at-once 1", "2. --offload-denoiser", "3. --tiled", "4. a smaller --size")
    )
    assert "--" not in told[1].replace("--size", "") and not (tmp_path / "out").exists()
