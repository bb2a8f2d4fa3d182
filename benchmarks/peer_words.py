"""The same job in the words of diffusers' script, of kohya's, and of lora_booth."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_booth.models.bases.sources import SHIPPED_CONFIGS
from lora_booth.models.families.components import CLIP_MERGES, shipped_tokenizer

RANK = 8
LEARNING_RATE = "1e-4"
TOKENS = {"bos_token": "startoftext", "eos_token": "endoftext", "unk_token": "endoftext"}


@dataclass(frozen=True)
class Job:
    """What all of them are to do. `subject` and `classes`: folders of pictures."""

    base: Path
    subject: Path
    classes: Path
    resolution: int
    precision: str

    @property
    def is_sdxl(self) -> bool:
        """Whether the base has SDXL's two text encoders."""
        return (self.base / "text_encoder_2").exists()


def diffusers_words(job: Job, steps: int, out: Path) -> list[str]:
    """Flags of diffusers' script."""
    flags = {
        "pretrained_model_name_or_path": job.base,
        "instance_data_dir": job.subject,
        "class_data_dir": job.classes,
        "instance_prompt": "a yql dog",
        "class_prompt": "a dog",
        "num_class_images": len(list(job.classes.iterdir())),
        "output_dir": out,
        "resolution": job.resolution,
        "train_batch_size": 1,
        "rank": RANK,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "max_train_steps": steps,
        "checkpointing_steps": 10 * steps,
        "mixed_precision": {"fp32": "no"}.get(job.precision, job.precision),
        "dataloader_num_workers": 0,
        "report_to": "all",
        "seed": 0,
    }
    return ["--with_prior_preservation", *_as_flags(flags)]


def kohya_words(job: Job, steps: int, out: Path) -> list[str]:
    """Flags of kohya's script, with the pictures in the folders that it reads: repeats and words in their names."""
    data, tokenizers = out.parent / "kohya_data", out.parent / "kohya_tokenizers"
    _write_tokenizers(tokenizers)
    for kind, folder, name in (("train", job.subject, "1_yql dog"), ("reg", job.classes, "1_dog")):
        if not (data / kind / name).exists():
            shutil.copytree(folder, data / kind / name)
    flags = {
        "pretrained_model_name_or_path": job.base,
        "train_data_dir": data / "train",
        "reg_data_dir": data / "reg",
        "output_dir": out,
        "resolution": job.resolution,
        "train_batch_size": 2,
        "network_module": "networks.lora",
        "network_dim": RANK,
        "network_alpha": RANK,
        "learning_rate": LEARNING_RATE,
        "optimizer_type": "AdamW",
        "lr_scheduler": "constant",
        "max_train_steps": steps,
        "mixed_precision": {"fp32": "no"}.get(job.precision, job.precision),
        "max_data_loader_n_workers": 0,
        "tokenizer_cache_dir": tokenizers,
        "save_model_as": "safetensors",
        "seed": 0,
    }
    switches = ["--network_train_unet_only", "--sdpa", "--cache_latents", "--enable_bucket"]
    if job.is_sdxl:
        switches.append("--cache_text_encoder_outputs")  # a flag of the script for SDXL alone
    return [*switches, *_as_flags(flags)]


def our_words(job: Job, steps: int, out: Path, *, is_compiled: bool = False, is_warm: bool = False) -> list[str]:
    """The same through lora_booth, with a cache of its own, so that it pays for caching too, or one that `is_warm`."""
    settings = {
        "subject.images": job.subject,
        "subject.class_noun": "dog",
        "subject.prompt": "a {token} {class}",
        "subject.captions": "off",
        "model.base": job.base,
        "model.precision": job.precision,
        "prior.mode": "images",
        "prior.folder": job.classes,
        "prior.prompts": '["a {class}"]',
        "data.resolution": job.resolution,
        "adapter.targets": "attention",
        "adapter.rank": RANK,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": LEARNING_RATE,
        "train.steps": steps,
        "train.save_every_steps": steps,
        "train.images_per_step": 1,
        "train.batch_size": 2,
        "train.gradient_checkpointing": "false",
        "train.compile": str(is_compiled).lower(),
        "preview.images_per_prompt": 0,
        "run.folder": out / "run",
        "run.cache": out.parent / "warm_cache" if is_warm else out / "cache",
    }
    return ["train", *(f"{key}={value}" for key, value in settings.items())]


def kohya_constants(job: Job) -> tuple[str, ...]:
    """Flags of `watched.py` that set the widths of kohya's own UNet to those of the base."""
    config: dict[str, Any] = json.loads((job.base / "unet" / "config.json").read_text(encoding="utf-8"))
    widths = config["block_out_channels"]
    if job.is_sdxl:
        place = "library.sdxl_original_unet"
        values = {
            "MODEL_CHANNELS": widths[0],
            "TIME_EMBED_DIM": 4 * widths[0],
            "ADM_IN_CHANNELS": config["projection_class_embeddings_input_dim"],
            "CONTEXT_DIM": config["cross_attention_dim"],
        }
    else:
        place = "library.original_unet"
        values = {"BLOCK_OUT_CHANNELS": widths, "TIMESTEP_INPUT_DIM": widths[0], "TIME_EMBED_DIM": 4 * widths[0]}
    words = [(f"{place}:{name}={json.dumps(value, separators=(',', ':'))}") for name, value in values.items()]
    return tuple(word for constant in words for word in ("--set", constant))


def _write_tokenizers(folder: Path) -> None:
    """CLIP's tokenizers where kohya's script looks before it asks the hub, as files of any version."""
    names = {"openai_clip-vit-large-patch14": "sd1", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k": "sdxl"}
    for name, architecture in names.items():
        if (folder / name).exists():
            continue
        kind = "tokenizer_2" if architecture == "sdxl" else "tokenizer"
        source = SHIPPED_CONFIGS / architecture / kind
        (folder / name).mkdir(parents=True)
        tokenizer = shipped_tokenizer(source)
        (folder / name / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()), encoding="utf-8")
        with gzip.open(CLIP_MERGES, "rt", encoding="utf-8") as merges:
            (folder / name / "merges.txt").write_text(f"#version: 0.2\n{merges.read()}", encoding="utf-8")
        settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
        settings |= {key: f"<|{word}|>" for key, word in TOKENS.items()}
        settings["pad_token"] = tokenizer.pad_token
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _as_flags(values: dict[str, object]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]
