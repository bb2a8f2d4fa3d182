"""Tiny bases and pictures for tests: real classes, random seeded weights, built on disk in well under a second.

Each base has the block layout of the model it stands for (so that target names and kohya names are the real ones), and
widths of 8 to 32, so that a training step takes milliseconds. Pictures are 32 pixels at the VAE's factor of 2: latents
are `[B, 4, 16, 16]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Prediction = Literal["epsilon", "v_prediction"]
WORDS = (
    "a",
    "photo",
    "of",
    "yql",
    "dog",
    "cat",
    "the",
    "on",
    "beach",
    "in",
    "red",
    "blue",
    "green",
    "and",
    "toy",
    "hat",
)
PROMPT_TOKENS = 24
"""Length of the text encoders' window, special tokens included."""
TEXT_WIDTH = 32
SECOND_TEXT_WIDTH = 48
"""Unlike the first, as in SDXL, so that mixed-up encoders show."""


def tiny_sd(folder: Path, *, prediction_type: Prediction = "epsilon", seed: int = 0) -> Path:
    """A base shaped like Stable Diffusion 1.x: four levels, OpenAI-like CLIP, convolutional projections."""
    return _write_sd(folder, seed, _sd_unet(), prediction_type)


def tiny_ends(folder: Path, *, seed: int = 0) -> Path:
    """The outermost blocks of `tiny_sd` alone, a third of its time: where names and counts of layers do not matter."""
    ends = {"block_out_channels": [16, 16], "layers_per_block": 1}
    ends |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    ends |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    return _write_sd(folder, seed, _sd_unet() | ends, "epsilon")


def tiny_sd2(folder: Path, *, prediction_type: Prediction = "v_prediction", seed: int = 0) -> Path:
    """A base shaped like Stable Diffusion 2.x: linear projections, OpenCLIP-like text encoder, padding with "!"."""
    unet = _sd_unet() | {"use_linear_projection": True, "attention_head_dim": [1, 2, 2, 2]}
    scheduler = _scheduler("DDIMScheduler", prediction_type, set_alpha_to_one=False)
    return _write_base(folder, seed, unet, [_text_config(2)], scheduler)


def tiny_sdxl(folder: Path, *, prediction_type: Prediction = "epsilon", seed: int = 0) -> Path:
    """A base shaped like SDXL: three levels, two text encoders, size and crop conditioning."""
    time_dim = 8
    unet = {
        "sample_size": 16,
        "block_out_channels": [16, 16, 32],
        "norm_num_groups": 8,
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": TEXT_WIDTH + SECOND_TEXT_WIDTH,
        "attention_head_dim": [1, 2, 2],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_dim,
        "projection_class_embeddings_input_dim": 6 * time_dim + SECOND_TEXT_WIDTH,
    }
    scheduler = _scheduler("EulerDiscreteScheduler", prediction_type)
    return _write_base(folder, seed, unet, [_text_config(1), _text_config(2, width=SECOND_TEXT_WIDTH)], scheduler)


def tiny_single_file(base: Path, path: Path, *, metadata: dict[str, str] | None = None) -> Path:
    """The weights of a base, tiny or not, as one checkpoint file with the original (LDM) names."""
    from safetensors.torch import load_file, save_file

    weights: dict[str, Any] = {}
    unet = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    is_sdxl = "add_embedding.linear_1.weight" in unet
    is_sd2 = not is_sdxl and json.loads((base / "unet/config.json").read_text()).get("use_linear_projection", False)
    weights |= {f"model.diffusion_model.{_ldm_unet_name(k, unet)}": v for k, v in unet.items()}
    vae = load_file(base / "vae" / "diffusion_pytorch_model.safetensors")
    levels = 1 + max(int(k.split(".")[2]) for k in vae if ".up_blocks." in k)
    weights |= {f"first_stage_model.{_ldm_vae_name(k, levels)}": _as_conv(k, v) for k, v in vae.items()}
    text = load_file(base / "text_encoder" / "model.safetensors")
    if is_sd2:
        weights |= _open_clip(text, "cond_stage_model.model.")
    else:
        prefix = "conditioner.embedders.0.transformer." if is_sdxl else "cond_stage_model.transformer."
        weights |= {f"{prefix}text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    if is_sdxl:
        text = load_file(base / "text_encoder_2" / "model.safetensors")
        weights |= _open_clip(text, "conditioner.embedders.1.model.")
    save_file({k: v.contiguous() for k, v in weights.items()}, path, metadata=metadata)
    return path


def _ldm_unet_name(name: str, unet: dict[str, Any]) -> str:
    """CompVis' numbering: blocks are counted through all levels; 0 is a resnet, 1 its attention, then a resampler."""
    layers, levels = 2, 1 + max(int(k.split(".")[1]) for k in unet if k.startswith("down_blocks."))
    plain = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    plain |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    plain |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    stem, _, kind = name.rpartition(".")
    if stem in plain:
        return f"{plain[stem]}.{kind}"
    head, *rest = name.split(".")
    if head == "mid_block":
        place = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}[".".join(rest[:2])]
        block, inner = f"middle_block.{place}", rest[2:]
    else:
        level, part, index, *inner = (int(rest[0]), rest[1], int(rest[2]), *rest[3:])
        if part == "downsamplers":
            return f"input_blocks.{level * (layers + 1) + layers + 1}.0.op.{kind}"
        if part == "upsamplers":
            has_attention = any(k.startswith(f"up_blocks.{level}.attentions.") for k in unet)
            return f"output_blocks.{level * (layers + 1) + layers}.{1 + has_attention}.conv.{kind}"
        number = level * (layers + 1) + index + (head == "down_blocks")
        block = f"{'input' if head == 'down_blocks' else 'output'}_blocks.{number}.{int(part == 'attentions')}"
        assert level < levels
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    resnet |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    return ".".join([block, *(resnet.get(word, word) if len(inner) == 2 else word for word in inner)])


def _ldm_vae_name(name: str, levels: int) -> str:
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    swaps = {"down_blocks.": "down."} | {
        ".resnets.": ".block.",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
    }
    swaps |= {
        "mid_block.block.0": "mid.block_1",
        "mid_block.block.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
    }
    swaps |= {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "group_norm": "norm"}
    swaps |= {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for ours, theirs in swaps.items():
        name = name.replace(ours, theirs)
    return name


def _as_conv(name: str, value: Any) -> Any:
    """CompVis' VAE attention is made of 1x1 convolutions."""
    is_linear = ".attentions." in name and value.ndim == 2
    return value[:, :, None, None] if is_linear else value


def _open_clip(text: dict[str, Any], prefix: str) -> dict[str, Any]:
    """OpenCLIP's names: queries, keys and values in one matrix, the projection transposed."""
    import torch

    text = {k.removeprefix("text_model."): v for k, v in text.items()}
    out = {"positional_embedding": text["embeddings.position_embedding.weight"]}
    out["token_embedding.weight"] = text["embeddings.token_embedding.weight"]
    if "text_projection.weight" in text:
        out["text_projection"] = text["text_projection.weight"].T
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names |= {"self_attn.out_proj": "attn.out_proj"}
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = text[f"final_layer_norm.{kind}"]
        for i in range(1 + max(int(k.split(".")[2]) for k in text if k.startswith("encoder.layers."))):
            ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            out |= {f"{theirs}.{new}.{kind}": text[f"{ours}.{old}.{kind}"] for old, new in names.items()}
            qkv = [text[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            out[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(qkv)
    return {prefix + k: v for k, v in out.items()}


def tiny_pictures(folder: Path, n: int, *, sizes: Sequence[tuple[int, int]] = ()) -> list[Path]:
    """`n` small pictures (PNG and JPEG in turn) of mixed aspect: a bright disc on a plain colour, all different."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    sizes = sizes or [(48, 48), (64, 40), (40, 64), (72, 48)]
    paths = []
    for i in range(n):
        width, height = sizes[i % len(sizes)]
        picture = Image.new("RGB", (width, height), ((37 * i) % 128, (91 * i + 40) % 128, (53 * i + 80) % 128))
        x, y = 8 + (5 * i) % 12, 6 + (7 * i) % 10
        ImageDraw.Draw(picture).ellipse((x, y, x + 22, y + 22), fill=(250, 200 - (17 * i) % 90, 60 + (29 * i) % 160))
        path = folder / (f"picture_{i:02d}." + ("png" if i % 2 == 0 else "jpg"))
        picture.save(path, **({} if i % 2 == 0 else {"quality": 95}))
        paths.append(path)
    return paths


def _sd_unet() -> dict[str, Any]:
    return {
        "sample_size": 16,
        "block_out_channels": [16, 16, 32, 32],
        "norm_num_groups": 8,
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 2,
    }


def _write_sd(folder: Path, seed: int, unet: dict[str, Any], prediction_type: Prediction) -> Path:
    scheduler = _scheduler("PNDMScheduler", prediction_type, skip_prk_steps=True, set_alpha_to_one=False)
    return _write_base(folder, seed, unet, [_text_config(1)], scheduler)


def _scheduler(name: str, prediction_type: str, **extra: Any) -> tuple[str, dict[str, Any]]:
    settings = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    if name == "DDIMScheduler":
        settings["clip_sample"] = False
    return name, settings | extra


def _text_config(generation: int, *, width: int = TEXT_WIDTH) -> dict[str, Any]:
    """`generation` 1: OpenAI's CLIP (quick_gelu, pads with the end token); 2: OpenCLIP (gelu, pads with "!")."""
    config = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": PROMPT_TOKENS,
        "projection_dim": width,
        "hidden_act": "quick_gelu" if generation == 1 else "gelu",
        "eos_token_id": 2,
    }
    return {"config": config, "pad_token": "<|endoftext|>" if generation == 1 else "!"}


def _write_base(
    folder: Path, seed: int, unet: dict[str, Any], texts: list[dict[str, Any]], scheduler: tuple[str, dict[str, Any]]
) -> Path:
    import diffusers
    import torch
    import transformers

    folder = Path(folder)
    scheduler_name, scheduler_settings = scheduler
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline" if len(texts) == 1 else "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler_name],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        diffusers.UNet2DConditionModel(**unet).save_pretrained(folder / "unet")
        _tiny_vae().save_pretrained(folder / "vae")
        for i, text in enumerate(texts):
            suffix = "" if i == 0 else f"_{i + 1}"
            vocabulary_size = write_tokenizer(folder / f"tokenizer{suffix}", text["pad_token"])
            special = {"bos_token_id": vocabulary_size - 2, "pad_token_id": 0}
            config = transformers.CLIPTextConfig(vocab_size=vocabulary_size, **special, **text["config"])
            class_name = "CLIPTextModelWithProjection" if i == 1 else "CLIPTextModel"
            getattr(transformers, class_name)(config).save_pretrained(folder / f"text_encoder{suffix}")
            index[f"text_encoder{suffix}"] = ["transformers", class_name]
            index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    getattr(diffusers, scheduler_name)(**scheduler_settings).save_pretrained(folder / "scheduler")
    if len(texts) == 1:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    else:
        index["force_zeros_for_empty_prompt"] = True
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _tiny_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.18215,
    )


def write_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> int:
    """CLIP's tokenizer with bytes, a few whole words and the two special tokens, as the real repositories store it.

    Returns the size of the vocabulary. The end token has the highest id, as in CLIP.
    """
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = (pieces[0], pieces[1])
            if merge not in merges:
                merges.append(merge)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    merged = dict.fromkeys("".join(merge) for merge in merges)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad_token
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = special | {"model_max_length": PROMPT_TOKENS, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(tokens)
