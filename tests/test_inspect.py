"""What an adapter file is said to be, from hand-made files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_booth import export
from lora_booth.adapter.weights import LowRank
from lora_booth.errors import ModelError
from lora_booth.inspect import base_family, inspect
from tests.test_train import Recorder


def adapter(width: int, rank: int = 4) -> dict[str, dict[str, LowRank]]:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    return {"unet": {name: LowRank(torch.ones(rank, width), torch.ones(640, rank), 0.5)}}


@pytest.mark.parametrize(
    ("width", "family"), [(768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x"), (2048, "SDXL")]
)
def test_the_family_is_told_by_the_width_of_the_text_embeddings(width: int, family: str) -> None:
    assert base_family(adapter(width)) == family
    assert base_family(adapter(100)).startswith("unknown")
    assert base_family({"unet": {}}).startswith("unknown")


@pytest.mark.parametrize("name", ["kohya", "diffusers"])
def test_kind_layers_rank_scale_and_words_are_told(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {"modelspec.trigger_phrase": "sks dog"}
    export.FORMATS[name].write(path, adapter(768), "sd1", torch.float32, header)
    recorder = Recorder()
    inspect(path, recorder)
    text = "\n".join(line for _, line in recorder.events)
    assert f"{name} naming, LoRA" in text
    assert "1 layers, rank 4 (1)" in text
    assert "sks dog" in text
    # Every entry of the change is 4 * 0.5 = 2, and there are 640 * 768: norm 2 * sqrt(491520) = 1402.2.
    assert "1.4e+03" in text


def test_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"hello")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        inspect(tmp_path / "x.safetensors", Recorder())
