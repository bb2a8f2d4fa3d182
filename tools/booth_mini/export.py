"""Assembles the shipped model from trained parts (`python -m tools.booth_mini.export --data DIR --train DIR`).

Writes a diffusers folder that StableDiffusionPipeline.from_pretrained loads as it is, plus evaluator/: the
contrastive pair's vision tower, projections and temperature. The text half of the pair is text_encoder/
itself and is stored once.
"""

import argparse
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from tools.booth_mini.fetch import read_packages
from tools.booth_mini.models import make_clip, make_scheduler, make_unet, make_vae
from tools.booth_mini.pool import load_pool
from tools.booth_mini.state import load_ema

FOLDERS = {"vae": ("vae",), "clip": ("text_encoder", "evaluator"), "unet": ("unet",)}
PARTS = tuple(FOLDERS)
KEPT_FILES = ("MODEL_CARD.md", "figures.json")
EVALUATOR_PARTS = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


def export_model(data: Path, train: Path, out: Path, parts: Collection[str] = PARTS) -> None:
    """Writes the whole model folder beside `out` and then puts it in place; model card and figures are kept.

    Only `parts` are taken from the training states; the others are those of the model in `out`, which they must fit.
    """
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline, clip = assemble(data, train, out, parts)
    pipeline.save_pretrained(part)
    shutil.rmtree(part / "tokenizer")
    shutil.copytree(data / "tokenizer", part / "tokenizer")
    _declare_float32(part / "text_encoder" / "config.json")
    save_evaluator(clip, part / "evaluator")
    for kept in set(PARTS) - set(parts):
        for folder in FOLDERS[kept]:
            shutil.rmtree(part / folder)
            shutil.copytree(out / folder, part / folder)
    (part / "LICENSES.md").write_text(licences_text(), encoding="utf-8")
    for name in KEPT_FILES:
        if (out / name).exists():
            shutil.copy2(out / name, part / name)
    old = out.with_name(out.name + ".old")
    if out.exists():
        os.replace(out, old)
    os.replace(part, out)
    shutil.rmtree(old, ignore_errors=True)


def assemble(
    data: Path, train: Path, shipped: Path, parts: Collection[str] = PARTS
) -> tuple[StableDiffusionPipeline, CLIPModel]:
    """The pipeline and the contrastive pair in float16: the EMA weights of the trained `parts`, the rest as shipped."""
    vae, clip, unet = make_vae(), make_clip(), make_unet()
    if set(parts) != set(PARTS):
        whole = load_parts(shipped)
        vae, unet, clip = whole[0], whole[1], whole[2]
    scaling_factor = vae.config["scaling_factor"]
    if "vae" in parts:
        vae = make_vae()
        vae.load_state_dict(load_ema(train / "vae.pt"))
    if "clip" in parts:
        clip.load_state_dict(load_ema(train / "clip.pt"))
    if "unet" in parts:
        unet.load_state_dict(load_ema(train / "unet.pt"))
        scaling_factor = load_pool(train).scaling_factor
    vae.register_to_config(scaling_factor=scaling_factor)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_half(clip).half(),
        tokenizer=CLIPTokenizer.from_pretrained(data / "tokenizer"),
        unet=unet.half(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline, clip.half()


def _declare_float32(config_file: Path) -> None:
    """Makes transformers load the float16 file in float32, as diffusers loads the other parts unless told."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        part.pop("torch_dtype", None)
        part.pop("dtype", None)
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def text_half(clip: CLIPModel) -> CLIPTextModel:
    """The pair's text tower as the pipeline's text encoder: the very same weights."""
    text_encoder = CLIPTextModel(clip.config.text_config)
    weights = {k: v for k, v in clip.state_dict().items() if k.startswith("text_model.")}
    own = text_encoder.state_dict()
    renamed = {k if k in own else k.removeprefix("text_model."): v for k, v in weights.items()}
    text_encoder.load_state_dict(renamed)
    return text_encoder


def save_evaluator(clip: CLIPModel, folder: Path) -> None:
    """Stores config.json and what text_encoder/ does not hold: vision tower, projections, temperature."""
    folder.mkdir(parents=True, exist_ok=True)
    clip.config.save_pretrained(folder)
    _declare_float32(folder / "config.json")
    weights = {k: v.contiguous() for k, v in clip.state_dict().items() if k.startswith(EVALUATOR_PARTS)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_evaluator(model: Path) -> CLIPModel:
    """The contrastive pair of a shipped model folder, in float32: text_encoder/ and evaluator/ put together."""
    clip = CLIPModel(CLIPConfig.from_pretrained(model / "evaluator"))
    weights = load_file(model / "evaluator" / "model.safetensors")
    text = load_file(model / "text_encoder" / "model.safetensors")
    weights |= {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in text.items()}
    clip.load_state_dict(weights)
    return clip.float().eval()


def load_parts(model: Path) -> tuple[AutoencoderKL, UNet2DConditionModel, CLIPModel, CLIPTokenizer]:
    """The shipped parts in float32, for measuring."""
    return (
        AutoencoderKL.from_pretrained(model, subfolder="vae", dtype=torch.float32).eval(),
        UNet2DConditionModel.from_pretrained(model, subfolder="unet", dtype=torch.float32).eval(),
        load_evaluator(model),
        CLIPTokenizer.from_pretrained(model / "tokenizer"),
    )


def licences_text() -> str:
    """LICENSES.md: who drew the pictures the weights were trained on, and under which licence."""
    packages: dict[str, Any] = read_packages()
    lines = [
        "# Licences and attribution of booth-mini",
        "",
        "The weights in this folder were trained by the lora_booth project, which licenses them under Apache-2.0.",
        "They were trained on drawings by others, named below with thanks. Some of these licences (CC BY 4.0) ask",
        "for this attribution; keep it beside the weights. The drawings were rendered to small bitmaps, placed on",
        "coloured backgrounds and beside each other, mirrored, and some of them recoloured.",
        "",
        "| drawings | author | licence | source | package |",
        "|---|---|---|---|---|",
    ]
    for row in packages["icon_sets"]:
        licence = f"[{row['licence']}]({row['licence_url']})"
        package = f"{row['package']} {row['version']}"
        lines.append(f"| {row['title']} | {row['author']} | {licence} | <{row['url']}> | {package} |")
    names, merges = packages["names"], packages["tokenizer"]
    lines += [
        "",
        f"Names and keywords of the drawings: {names['package']} {names['version']} ({names['licence']}, "
        f"{names['author']}, <{names['url']}>).",
        "",
        f"Byte-pair merges of the tokenizer: CLIP's own, {merges['author']} ({merges['licence']}, <{merges['url']}>), "
        "cut to the first 8,192 entries.",
        "",
        "No drawing under a share-alike licence and none without a licence was used. The names of the sets say where",
        "the drawings come from; they do not say that their owners have anything to do with this project.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line of the export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/booth_mini"))
    parser.add_argument("--train", type=Path, default=Path("build/booth_mini/train"))
    parser.add_argument("--out", type=Path, default=Path("lora_booth/assets/booth_mini"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the others stay those in --out")
    arguments = parser.parse_args()
    export_model(arguments.data, arguments.train, arguments.out, arguments.parts)
    sizes = {p.parent.name: p.stat().st_size for p in sorted(arguments.out.rglob("*.safetensors"))}
    print(json.dumps(sizes), f"{sum(sizes.values()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
