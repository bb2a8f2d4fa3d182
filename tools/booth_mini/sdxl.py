"""booth-mini in SDXL's shape: the same function of prompt and noise, with two text encoders and micro-conditioning.

    python -m tools.booth_mini.sdxl --out build/booth_mini_xl

Nothing is trained and nothing is shipped: the weights are booth-mini's, put where SDXL's architecture asks for them, so
that the SDXL family is tested on a model that knows something for none of the 26 MB that a second model would add.

* SDXL reads hidden states one layer before the last, without the final norm. So that norm becomes a layer: with the
  residual stream scaled by EPSILON (the norms in front of each part undo it), a seventh layer whose attention is zero
  and whose MLP is the identity, gelu(z + 20) - 20 = z, adds norm(x), beside which EPSILON x is nothing. An eighth layer
  adds zero and is the one that SDXL leaves out.
* Both encoders are this one, so the UNet reads the same text twice, each time with half the weight of keys and values.
* The pooled prompt and the sizes enter through an embedding whose last layer is zero: they are read and change nothing.
* SDXL's projections are linear: a 1x1 convolution's weight without its last two axes.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

EPSILON = 2.0**-14
SHIFT = 20.0
"""gelu(z + SHIFT) - SHIFT = z to 1e-6 for every normalised z."""
SIZE_WIDTH = 16
"""Sinusoids for each of the six sizes."""


def write_sdxl(source: Path, out: Path) -> None:
    """Writes the diffusers folder `out` from the booth-mini folder `source`, in float32 (90 MB)."""
    for name in ("vae", "scheduler", "tokenizer"):
        shutil.copytree(source / name, out / name, dirs_exist_ok=True)
    shutil.copytree(source / "tokenizer", out / "tokenizer_2", dirs_exist_ok=True)
    text = {key.removeprefix("text_model."): t.float() for key, t in _weights(source / "text_encoder").items()}
    config = json.loads((source / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        encoder = kind(_text_config(config))
        projection = _weights(source / "evaluator")["text_projection.weight"].float()
        _load_(encoder, _text_weights(text, config["num_hidden_layers"]) | {"text_projection.weight": projection})
        encoder.save_pretrained(out / name)
    unet_config = json.loads((source / "unet" / "config.json").read_text(encoding="utf-8"))
    unet = UNet2DConditionModel.from_config(_unet_config(unet_config, config["projection_dim"]))
    _load_(unet, _unet_weights(_weights(source / "unet"), unet.state_dict()))
    unet.save_pretrained(out / "unet")
    (out / "model_index.json").write_text(json.dumps(_index(source), indent=1) + "\n", encoding="utf-8")


def _weights(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def _text_config(config: dict[str, Any]) -> CLIPTextConfig:
    kept = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "dtype")}
    layers, eps = config["num_hidden_layers"] + 2, config["layer_norm_eps"] * EPSILON**2
    return CLIPTextConfig(**kept | {"num_hidden_layers": layers, "layer_norm_eps": eps})


def _text_weights(source: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The encoder's weights by the names without "text_model."."""
    scaled = ("embedding.weight", "self_attn.out_proj.weight", "self_attn.out_proj.bias", "fc2.weight", "fc2.bias")
    weights = {key: tensor * EPSILON if key.endswith(scaled) else tensor for key, tensor in source.items()}
    width = source["final_layer_norm.weight"].numel()
    for number in (num_layers, num_layers + 1):
        layer, first = f"encoder.layers.{number}", "encoder.layers.0."
        for key in [key for key in source if key.startswith(first)]:
            norm = torch.ones if "layer_norm" in key and key.endswith("weight") else torch.zeros
            weights[f"{layer}.{key.removeprefix(first)}"] = norm(source[key].shape)
    layer = f"encoder.layers.{num_layers}"
    for end in ("weight", "bias"):
        weights[f"{layer}.layer_norm2.{end}"] = source[f"final_layer_norm.{end}"]
    weights[f"{layer}.mlp.fc1.weight"][:width] = torch.eye(width)
    weights[f"{layer}.mlp.fc1.bias"][:width] = SHIFT
    weights[f"{layer}.mlp.fc2.weight"][:, :width] = torch.eye(width)
    weights[f"{layer}.mlp.fc2.bias"][:] = -SHIFT
    return weights


def _unet_config(config: dict[str, Any], pooled_width: int) -> dict[str, Any]:
    return config | {
        "cross_attention_dim": 2 * config["cross_attention_dim"],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": pooled_width + 6 * SIZE_WIDTH,
        "use_linear_projection": True,
    }


def _unet_weights(source: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """`fresh`: the new UNet's own initial values, kept for the first layer of the added embedding."""
    weights = {key: tensor.float() for key, tensor in source.items()}
    for key, tensor in weights.items():
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            weights[key] = torch.cat([tensor, tensor], dim=1) / 2
        elif key.endswith(("proj_in.weight", "proj_out.weight")):
            weights[key] = tensor.flatten(1)
    added = {key: tensor for key, tensor in fresh.items() if key.startswith("add_embedding.")}
    return weights | {key: tensor if "linear_1" in key else torch.zeros_like(tensor) for key, tensor in added.items()}


def _load_(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Every parameter of `module` from `weights`, with "text_model." in front where the class has it; the projection
    may be one too many."""
    names = {key.removeprefix("text_model."): key for key in module.state_dict()}
    missing = names.keys() - weights.keys()
    assert missing <= {"embeddings.position_ids"}, f"no weights for {sorted(missing)}"
    module.load_state_dict({names[key]: tensor for key, tensor in weights.items() if key in names}, strict=not missing)


def _index(source: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in index.items() if key not in ("safety_checker", "requires_safety_checker")}
    return kept | {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": False,
    }


def main() -> None:
    """Command line of the rewriting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("lora_booth/assets/booth_mini"))
    parser.add_argument("--out", type=Path, default=Path("build/booth_mini_xl"))
    arguments = parser.parse_args()
    write_sdxl(arguments.model, arguments.out)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
