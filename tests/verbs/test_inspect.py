"""What an adapter file is said to be, from hand-made files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_booth.adapter.files import storage
from lora_booth.adapter.weights import LowRank
from lora_booth.errors import ModelError
from lora_booth.verbs.inspect import base_family, block_norms, inspect
from tests.support.runs import Recorder


def adapter(width: int, rank: int = 4) -> dict[str, dict[str, LowRank]]:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    return {"unet": {name: LowRank(torch.ones(rank, width), torch.ones(640, rank), 0.5)}}


@pytest.mark.parametrize(
    ("width", "family"), [(768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x"), (2048, "SDXL")]
)
def test_the_family_is_told_by_the_width_of_the_text_embeddings(width: int, family: str) -> None:
    assert base_family(adapter(width), {}) == family
    assert base_family(adapter(192), {}) == "booth-mini"
    assert base_family(adapter(100), {}) == "unknown: its text embeddings are 100 wide"
    assert base_family({"unet": {}}, {}) == "unknown: its layers are those of several"


def test_where_shapes_do_not_tell_the_family_the_header_does() -> None:
    assert base_family({"unet": {}}, {"ss_base_model_version": "sd_v2"}) == "Stable Diffusion 2.x"


@pytest.mark.parametrize("name", ["kohya", "diffusers"])
def test_kind_layers_rank_scale_and_words_are_told(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {"modelspec.trigger_phrase": "yql dog"}
    storage.FORMATS[name].write(path, adapter(768), "sd1", torch.float32, header)
    recorder = Recorder()
    inspect(path, recorder)
    text = "\n".join(line for _, line in recorder.events)
    assert f"{name} naming, LoRA" in text
    assert "1 layers, rank 4 (1)" in text
    assert "yql dog" in text
    # Every entry of the change is 4 * 0.5 = 2, and there are 640 * 768: norm 2 * sqrt(491520) = 1402.2.
    assert "1.4e+03" in text


def test_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"hello")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        inspect(tmp_path / "x.safetensors", Recorder())


def events_of(path: Path, picture: Path | None = None) -> Recorder:
    recorder = Recorder()
    inspect(path, recorder, picture=picture)
    return recorder


def test_norms_of_blocks_are_the_roots_of_summed_squares_in_the_models_order() -> None:
    ones = LowRank(torch.ones(1, 4), torch.ones(4, 1), 0.5)  # 16 entries of 0.5: norm 2
    names = ("up_blocks.1.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in", "down_blocks.0.attentions.1.proj_in")
    weights = {"text_encoder": {"encoder.layers.0.mlp.fc1": ones}, "unet": dict.fromkeys(names, ones)}
    norms = block_norms(weights)
    assert list(norms) == ["down_blocks.0", "up_blocks.1", "text_encoder"]
    assert list(norms.values()) == pytest.approx([8**0.5, 2.0, 2.0])


def test_every_kind_of_the_field_is_named(tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_attentions_0_"
    wide = {"hada_w1_a": (5, 2), "hada_w1_b": (2, 5), "hada_w2_a": (5, 2), "hada_w2_b": (2, 5)}
    layers = {
        f"{stem}proj_in": {"lora_down.weight": (2, 5), "lora_up.weight": (5, 2), "dora_scale": (5, 1)},
        f"{stem}proj_out": wide,
        f"{stem}transformer_blocks_0_attn1_to_q": {"lokr_w1": (2, 2), "lokr_w2": (2, 2)},
        f"{stem}transformer_blocks_0_attn1_to_k": {"diff": (5, 5)},
    }
    tensors = {f"{name}.{leaf}": torch.ones(shape) for name, leaves in layers.items() for leaf, shape in leaves.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    text = "\n".join(line for _, line in events_of(tmp_path / "a.safetensors").events)
    for kind in ("DoRA (1)", "LoHa (1)", "LoKr (1)", "full difference (1)", "attention (2)", "projection (2)"):
        assert kind in text


def test_faults_are_told_and_the_sound_layers_too(tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_attentions_0_proj_"
    pair = {"lora_down.weight": torch.ones(2, 5), "lora_up.weight": torch.ones(5, 2)}
    tensors = {f"{stem}{end}.{leaf}": tensor.clone() for end in ("in", "out") for leaf, tensor in pair.items()}
    tensors[f"{stem}out.lora_up.weight"][0, 0] = float("nan")
    tensors["bundle_emb.x"] = torch.ones(2)
    tensors["lora_unet_conv_in.lora_up.weight"] = torch.ones(5, 2)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"modelspec.title": "a\x1b[2Jb" + "c" * 999})
    recorder = events_of(tmp_path / "a.safetensors")
    warnings = "\n".join(recorder.warnings)
    for part in ("bundle_emb.x", "has only lora_up of unet.conv_in", "NaN or infinity in 1 layers"):
        assert part in warnings
    text = "\n".join(line for _, line in recorder.events)
    assert "2 layers, rank 2 (2)" in text
    assert "\x1b" not in text and "c" * 300 not in text


def test_the_picture_of_norms_is_a_png_whose_bars_differ(tmp_path: Path) -> None:
    weights = adapter(768)
    weights["unet"]["mid_block.attentions.0.proj_in"] = LowRank(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    odd = tmp_path / "x $1{2 and 3$.safetensors"  # no formula, whatever matplotlib thinks of it
    storage.FORMATS["kohya"].write(odd, weights, "sd1", torch.float32, {})
    events_of(odd, tmp_path / "norms.png")
    with Image.open(tmp_path / "norms.png") as picture:
        assert picture.format == "PNG" and not picture.getexif()
        colours = [count for count, colour in picture.convert("RGB").getcolors(1 << 20) if colour == (61, 122, 140)]
    assert sum(colours) > 1000  # the bars are there
