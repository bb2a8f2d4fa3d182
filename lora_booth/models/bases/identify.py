"""What a base is, from its configs and headers alone; all others are refused.

What lives here: facts that need no weights, so that `plan` knows them in milliseconds (no torch). What does not:
finding the files (`sources.py`) and loading them (`models/families/components.py`).

Only classes on the lists below are ever loaded; a config that names another class, or custom code, is refused.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_booth.config.inputs import MISSING, is_plain_file, read_text, why_unreadable
from lora_booth.errors import ModelError
from lora_booth.models.bases import limits
from lora_booth.models.bases.architectures import ARCHITECTURES, Architecture, PredictionType
from lora_booth.models.bases.sources import (
    AGAIN,
    SHIPPED_CONFIGS,
    component_weights,
    read_header,
    read_json,
    require_small_files,
    weighted,
)
from lora_booth.models.bases.unets import WHAT_WORKS, why_channels

Shapes = dict[str, tuple[int, ...]]

NEVER_LOADED = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
CODE_KEYS = frozenset(
    {"auto_map", "custom_pipelines", "trust_remote_code", "quantization_config", "attn_implementation"}
)
"""Config keys that could bring code, or weights of a kind that LoRA is not put on here."""
FLOW_SOLVERS = frozenset({"FlowMatchEulerDiscreteScheduler"})
"""diffusers' solvers whose config describes a rectified flow."""
SIDES_PX = (16, 4096)
"""Smallest and largest native side, as `data.resolution` allows them."""
STEPS_PX = (8, 256)
"""Smallest and largest step between the sides of crops; 64 for all published bases."""


@dataclass(frozen=True)
class BaseFacts:
    """What is known of a base before any weight is read."""

    path: Path
    """Folder or single file."""
    configs: Path
    """Folder of the component configs: the base itself, or the shipped architecture of a single file."""
    family: str
    prediction_type: PredictionType
    native_resolution: int
    bucket_step: int
    scheduler_changes: dict[str, Any]
    """What a single file says about its noise schedule, over the architecture's scheduler config."""
    repository: str | None = None
    """Of a base of the hub: which one served it."""
    revision: str | None = None
    """Of a base of the hub: its commit."""

    @property
    def architecture(self) -> Architecture:
        """The row of its family."""
        return ARCHITECTURES[self.family]

    def config(self, component: str) -> dict[str, Any]:
        """The config of "unet", "vae", "text_encoder", "scheduler" …"""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        changes = self.scheduler_changes if component == "scheduler" else {}
        return read_json(self.configs / component / name) | changes

    def number(self, component: str, key: str, default: int) -> int:
        """A count or size in the config of `component`. Raises ModelError when it is none."""
        value = self.config(component).get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limits.MAX_NUMBER:
            path = self.configs / component / "config.json"
            raise ModelError(f"{path} has {key} = {reprlib.repr(value)}, which is no size; download the base again.")
        return value


def identify(base: Path, *, has_weights: bool = True, said_prediction: PredictionType | None = None) -> BaseFacts:
    """The facts of a base; ModelError when it is not one that lora_booth trains.

    `has_weights`: False for a folder of its configs alone; `said_prediction`: what its denoiser predicts, whatever the
    base says.
    """
    if base.is_file():
        (configs, changes), held = _architecture_of_file(base, said_prediction), None
    else:
        _check_folder(base, has_weights=has_weights)
        configs, held = base, _weights_held(base) if has_weights else None
        changes = {} if said_prediction is None else {"prediction_type": said_prediction}
    row = _architecture(base, configs)
    components = [name for name in row.parts if not name.startswith("tokenizer")]
    limits.require(configs, row, held)
    found = {name: read_json(_config_path(configs, name)) for name in components}
    denoiser, scheduler = found[row.denoiser], found["scheduler"] | changes
    prediction_type = _prediction_type(base, row, scheduler)
    if said_prediction not in (None, prediction_type):
        raise ModelError(f"{base} predicts {prediction_type}, whatever is said; leave model.prediction_type out.")
    factor = 2 ** (len(found["vae"]["block_out_channels"]) - 1)
    native = _native_resolution(denoiser, factor, row.predictions[prediction_type])
    step = _bucket_step(factor * row.latent_multiple(denoiser), native)
    for what, side, (least, most) in (("pictures", native, SIDES_PX), ("steps", step, STEPS_PX)):
        if not least <= side <= most:
            told = f"{_config_path(configs, row.denoiser)}, with its VAE, asks for {what} of {side} px"
            raise ModelError(f"{told}, and {least} to {most} can be trained; {AGAIN}.")
    return BaseFacts(
        path=base,
        configs=configs,
        family=row.name,
        prediction_type=prediction_type,
        native_resolution=native,
        bucket_step=step,
        scheduler_changes=changes,
    )


def _prediction_type(base: Path, row: Architecture, scheduler: dict[str, Any]) -> PredictionType:
    """What a base predicts, by its scheduler's config."""
    said = "flow" if scheduler.get("_class_name") in FLOW_SOLVERS else scheduler.get("prediction_type", "epsilon")
    for known in row.predictions:
        if said == known:
            return known
    raise ModelError(f"{base} predicts {reprlib.repr(said)}; only {' and '.join(row.predictions)} can be trained.")


def _architecture(base: Path, configs: Path) -> Architecture:
    """The row of the family that the configs of a base are of."""
    rows = _candidates(base, read_json(configs / "model_index.json"))
    for row in rows:
        if row.recognises(read_json(_config_path(configs, row.denoiser))):
            return row
    raise ModelError(f"{base} has the parts of {rows[0].label}, but another denoiser; {WHAT_WORKS}.")


def _candidates(base: Path, index: dict[str, Any]) -> list[Architecture]:
    """The families with the pipeline that model_index.json names. Raises ModelError when there is none."""
    pipeline = index.get("_class_name")
    rows = [row for row in ARCHITECTURES.values() if row.pipeline == pipeline]
    if not rows:
        raise ModelError(f"{base} is a {reprlib.repr(pipeline)[:200]}; {WHAT_WORKS}.")
    return rows


def _config_path(configs: Path, component: str) -> Path:
    """Where the config of a component lies."""
    return configs / component / ("scheduler_config.json" if component == "scheduler" else "config.json")


def _native_resolution(denoiser: dict[str, Any], vae_factor: int, usual: int) -> int:
    sample_size = denoiser.get("sample_size")
    if sample_size:
        side: int = max(sample_size) if isinstance(sample_size, list) else sample_size
        return vae_factor * side
    return usual


def _bucket_step(least_px: int, native_resolution: int) -> int:
    """The smallest step, doubled until 16 of them reach the native side.

    `least_px`: the smallest whose latents the denoiser takes. Doubling keeps buckets few, so that pictures share them,
    and gives 64 for SD 1, 2 and SDXL (the step of SDXL's own buckets, arXiv 2307.01952, appendix I), 16 for booth-mini.
    """
    step = least_px
    while step * 16 < native_resolution or step < STEPS_PX[0]:
        step *= 2
    return step


def _check_folder(base: Path, *, has_weights: bool) -> None:
    """Refuse a diffusers folder that is not one of ours, is incomplete, or names other classes or code."""
    require_small_files(base)
    index = read_json(base / "model_index.json")
    row = _candidates(base, index)[0]
    needed = list(row.parts)
    for name, value in index.items():
        if name in needed or name.startswith("_") or name in NEVER_LOADED or not isinstance(value, list):
            continue
        if any(part is not None for part in value):
            raise ModelError(
                f"{base}/model_index.json has an unknown component {name} ({reprlib.repr(value)}); {WHAT_WORKS}."
            )
    for name in needed:
        module, classes = row.parts[name].module, row.parts[name].classes
        if name not in index:
            raise ModelError(f"{base}/model_index.json names no {name}; the base is incomplete, download it again.")
        if not isinstance(index[name], list) or len(index[name]) != 2 or index[name][0] != module:
            raise ModelError(
                f"{base}/model_index.json: {name} is {reprlib.repr(index[name])}, which is not loaded; {WHAT_WORKS}."
            )
        _check_class(base / "model_index.json", name, index[name][1], classes)
    for name in needed:
        _check_component(base, name, row.parts[name].classes, has_weights=has_weights)
    sized = [name for name in needed if not name.startswith(("tokenizer", "scheduler"))]
    row.check(base, {name: read_json(base / name / "config.json") for name in sized})


def _check_component(base: Path, name: str, classes: Iterable[str], *, has_weights: bool) -> None:
    """Refuse a component whose config names another class or code, or whose weights are missing or unsafe."""
    folder = base / name
    if name.startswith("tokenizer"):
        vocabularies = (folder / "tokenizer.json", folder / "vocab.json")
        if has_weights and not any(map(is_plain_file, vocabularies)):
            raise ModelError(f"{folder} holds no vocab.json; the base is incomplete, copy or download it again.")
        path = folder / "tokenizer_config.json"
        config = {} if why_unreadable(path) == MISSING else read_json(path)
        named = [config[key] for key in ("tokenizer_class",) if key in config]
        classes = (*classes, "TokenizersBackend", "PreTrainedTokenizerFast")
    else:
        path = _config_path(base, name)
        config = read_json(path)
        key = "architectures" if name.startswith("text_encoder") else "_class_name"
        named = config.get(key) or ([] if name != "scheduler" else [None])  # which solver "base" means stands there
        named = named if isinstance(named, list) else [named]
    for class_name in named:
        _check_class(path, name, class_name, classes)
    if bad := CODE_KEYS & config.keys():
        raise ModelError(f"{path} has {sorted(bad)[0]}, which is not supported; use the plain base model.")


def _weights_held(base: Path) -> dict[str, int]:
    """Component to the count of numbers in its weight files, by their headers."""
    held = {}
    for name in weighted():
        if (base / name).is_dir():
            shapes = [shape for file in component_weights(base / name).files for shape in read_header(file)[0].values()]
            held[name] = sum(math.prod(shape) for shape in shapes)
    return held


def _check_class(path: Path, component: str, class_name: Any, allowed: Iterable[str]) -> None:
    if class_name not in tuple(allowed):
        named = class_name if isinstance(class_name, str) and len(class_name) < 100 else reprlib.repr(class_name)
        raise ModelError(f"{path}: {component} is a {named}; {WHAT_WORKS}, whose {component} is never that.")


def _architecture_of_file(path: Path, said: PredictionType | None) -> tuple[Path, dict[str, Any]]:
    """Config folder for a single-file checkpoint, and what the file itself says about its schedule; `said`: what the
    user says that it predicts."""
    shapes, metadata = read_header(path)
    first = shapes.get("model.diffusion_model.input_blocks.0.0.weight")
    if first is None or len(first) != 4:
        raise ModelError(f"{path} is {_foreign(shapes)}; {WHAT_WORKS}.")
    if first[1] != 4:
        raise ModelError(f"{path} takes {first[1]} input channels{why_channels(first[1])}; {WHAT_WORKS}.")
    if "first_stage_model.decoder.conv_in.weight" not in shapes:
        raise ModelError(f"{path} has no VAE; use a checkpoint with everything in it, or a diffusers folder.")
    if any(name.startswith("conditioner.embedders.1.model.transformer.") for name in shapes):
        family = "sdxl"
    elif any(name.startswith("conditioner.embedders.0.model.transformer.") for name in shapes):
        raise ModelError(f"{path} is the SDXL refiner; {WHAT_WORKS}.")
    elif "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight" in shapes:
        family = "sd1"
    elif any(name.startswith("cond_stage_model.model.transformer.") for name in shapes):
        family = "sd2"
    else:
        raise ModelError(f"{path} has no text encoder that is known; use a complete checkpoint or a diffusers folder.")
    prediction_type = said or _declared_prediction(path, shapes, metadata)
    if prediction_type is None:
        if family == "sd2":
            raise ModelError(
                f"{path} does not say whether it predicts epsilon (512-pixel bases) or v (768-pixel models). Set "
                "model.prediction_type, or write 'parameterization: v' or 'parameterization: eps' into "
                f"{path.with_suffix('.yaml')} beside it."
            )
        prediction_type = "epsilon"  # what SD 1.x and SDXL were released with; v-tunes declare themselves
    changes: dict[str, Any] = {"prediction_type": prediction_type}
    if "ztsnr" in shapes:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    folder = {"sd2": "sd2_v" if prediction_type == "v_prediction" else "sd2_base"}.get(family, family)
    return SHIPPED_CONFIGS / folder, changes


def _declared_prediction(path: Path, shapes: Shapes, metadata: dict[str, str]) -> str | None:
    """What the file, or the .yaml of its name beside it, declares; None when nothing does.

    In order: `modelspec.prediction_type` and `modelspec.architecture` (github.com/Stability-AI/ModelSpec), the marker
    tensor "v_pred" (a convention of SDXL v-prediction tunes), `parameterization` of the yaml (CompVis configs).
    """
    stated = metadata.get("modelspec.prediction_type", "")
    by_name = {
        "epsilon": "epsilon",
        "v": "v_prediction",
        "v_prediction": "v_prediction",
        "v-prediction": "v_prediction",
    }
    if stated:
        if stated not in by_name:
            raise ModelError(f"{path} says modelspec.prediction_type {stated!r}; only epsilon and v can be trained.")
        return by_name[stated]
    architecture = metadata.get("modelspec.architecture", "")
    if architecture.startswith("stable-diffusion-v2-"):
        return "v_prediction" if architecture.startswith("stable-diffusion-v2-768-v") else "epsilon"
    if "v_pred" in shapes:
        return "v_prediction"
    sidecar = path.with_suffix(".yaml")
    if os.path.lexists(sidecar):
        text = read_text(sidecar, "correct or remove it", ModelError)
        found = re.search(r"^[ \t]*parameterization:[ \t]*[\"']?(\w+)", text, re.MULTILINE)
        return {"v": "v_prediction", "eps": "epsilon"}.get(found.group(1)) if found else "epsilon"  # CompVis' default
    return None


def _foreign(shapes: Shapes) -> str:
    """What a safetensors file without a Stable Diffusion UNet is, as far as its names tell."""
    kinds = (
        (("lora_", "lora.", ".lora_A.", ".lora_B."), "an adapter (LoRA), not a base model"),
        (("double_blocks.", "single_blocks.", "double_stream_blocks."), "a Flux-like model"),
        (("joint_blocks.",), "a Stable Diffusion 3 model"),
        (("down_blocks.", "mid_block."), "one component in diffusers naming, not a whole checkpoint (pass its folder)"),
    )
    for marks, what in kinds:
        if any(mark in name for name in shapes for mark in marks):
            return what
    return "no Stable Diffusion checkpoint"
