"""The families of bases, one row each: what is known of a family besides its modules.

What lives here: names, labels, parts, sizes, how a family is recognised and how adapters for it are named and labelled.
What does not: its modules (`models/families/`, one file each), and what single programs make of its adapters
(`adapter/programs/table.py`). A family is one such file and one row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lora_booth.models.bases import unets

PredictionType = Literal["epsilon", "v_prediction", "flow"]
"""What a denoiser predicts: the noise, the velocity of a diffusion, or the velocity of a rectified flow."""


@dataclass(frozen=True)
class Part:
    """A component of a base. `module`: what model_index.json names as its library; `classes`: those of it that may be
    loaded, the first of which is built."""

    module: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """One family of bases."""

    name: str
    """As "sd1", in configs, headers and messages."""
    label: str
    """As a user calls it."""
    family: str
    """Its `models.families.family.Family`, as module:class; imported when a base is loaded."""
    pipeline: str
    """Class in model_index.json. Families that share one have the same parts and check."""
    denoiser: str
    """Component name of the denoiser."""
    parts: Mapping[str, Part]
    """Every component of a complete base."""
    recognises: Callable[[Mapping[str, Any]], bool]
    """Whether the config of a denoiser is one of this family, among those with the same pipeline."""
    check: Callable[[Path, unets.Configs], None]
    """Raises ModelError for a base (first argument: where) whose configs want what training does not have."""
    latent_multiple: Callable[[Mapping[str, Any]], int]
    """Latents by which a side must be divisible, from the denoiser's config."""
    predictions: Mapping[PredictionType, int]
    """What its denoisers may predict, to the native side in pixels where the denoiser's config does not say it."""
    step_limits: tuple[int, int]
    """Fewest and most steps, the range on which other trainers and the DreamBooth paper agree."""
    targets: Mapping[str, str]
    """Preset of `adapter.targets` to a pattern that must match a module name of the denoiser as a whole."""
    kohya_prefixes: Mapping[str, str]
    """Component to the prefix of its keys in a kohya file."""
    modelspec: Mapping[PredictionType, str]
    """What the denoiser predicts, to `modelspec.architecture`."""
    kohya_version: str
    """`ss_base_model_version`."""
    marks: tuple[str, ...]
    """Parts of ss_base_model_version and modelspec.architecture that tell this family."""
    ui_version: str
    """"sd version" in the sidecar of A1111 and Forge."""
    implementation: str = "diffusers"
    """`modelspec.implementation`."""
    has_original_names: bool = False
    """Whether kohya's files name the denoiser's layers as the original code does ("LDM")."""
    context_width: int | None = None
    """Width of the text embeddings that cross-attention reads in a base of full size, where that tells the family."""
    path_words: str = ""
    """Parts of module paths besides those of Stable Diffusion: they tell a kohya name's underscores apart."""
    single_file_prefixes: Mapping[str, str] = field(default_factory=dict)
    """Component to how its keys begin in a checkpoint of one file; `….model.` holds an OpenCLIP text encoder."""
    depths: tuple[int, ...] = ()
    """Of a UNet of full size: transformer blocks in each attention, by level from the largest picture to the smallest;
    0 is no attention. Sources: the configs in assets/architectures."""
    text_layers: Mapping[str, int] = field(default_factory=dict)
    """Of a base of full size: text encoder to the number of its layers."""
    text_widths: Mapping[str, int] = field(default_factory=dict)
    """Of a base of full size: text encoder to the numbers in a row of its vocabulary."""
    embedding_keys: Mapping[str, str] = field(default_factory=dict)
    """Text encoder to the key of a learnt word's vectors in its file; none where that is the word itself."""
    bounds: Mapping[str, int] = field(default_factory=dict)
    """Of a denoiser that is no UNet: key of its config to the most it may say (`limits.py`)."""

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Component names of the text encoders."""
        return tuple(name for name in self.parts if is_text(name))

    @property
    def adaptable(self) -> tuple[str, ...]:
        """The components that an adapter can change: the denoiser first."""
        return (self.denoiser, *self.text_encoders)


def is_text(component: str) -> bool:
    """Whether a component is a text encoder."""
    return component.startswith("text_encoder")


_SCHEDULER = Part(
    "diffusers",
    (
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ),
)
_TOKENIZER = Part("transformers", ("CLIPTokenizer", "CLIPTokenizerFast"))
_ONE_ENCODER = {
    "unet": Part("diffusers", ("UNet2DConditionModel",)),
    "vae": Part("diffusers", ("AutoencoderKL",)),
    "scheduler": _SCHEDULER,
    "text_encoder": Part("transformers", ("CLIPTextModel",)),
    "tokenizer": _TOKENIZER,
}
_SECOND_ENCODER = {
    "text_encoder_2": Part("transformers", ("CLIPTextModelWithProjection",)),
    "tokenizer_2": _TOKENIZER,
}

SD1 = Architecture(
    name="sd1",
    label="Stable Diffusion 1.x",
    family="lora_booth.models.families.stable_diffusion:StableDiffusion",
    pipeline="StableDiffusionPipeline",
    denoiser="unet",
    parts=_ONE_ENCODER,
    recognises=unets.is_sd1,
    check=unets.check,
    latent_multiple=unets.latent_multiple,
    predictions={"epsilon": 512, "v_prediction": 512},
    step_limits=(400, 1200),
    targets=unets.TARGETS,
    kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
    modelspec={"epsilon": "stable-diffusion-v1/lora", "v_prediction": "stable-diffusion-v1/lora"},
    kohya_version="sd_v1",
    marks=("sd_v1", "-v1"),
    ui_version="SD1",
    context_width=768,
    single_file_prefixes={"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."},
    depths=(1, 1, 1, 0),
    text_layers={"text_encoder": 12},
    text_widths={"text_encoder": 768},
)
SD2 = replace(
    SD1,
    name="sd2",
    label="Stable Diffusion 2.x",
    recognises=unets.is_sd2,
    predictions={"epsilon": 512, "v_prediction": 768},
    modelspec={"epsilon": "stable-diffusion-v2-512/lora", "v_prediction": "stable-diffusion-v2-768-v/lora"},
    kohya_version="sd_v2",
    marks=("sd_v2", "-v2"),
    ui_version="SD2",
    context_width=1024,
    single_file_prefixes={"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.model."},
    text_layers={"text_encoder": 23},
    text_widths={"text_encoder": 1024},
)
SDXL = Architecture(
    name="sdxl",
    label="SDXL",
    family="lora_booth.models.families.sdxl:StableDiffusionXL",
    pipeline="StableDiffusionXLPipeline",
    denoiser="unet",
    parts=_ONE_ENCODER | _SECOND_ENCODER,
    recognises=unets.is_sdxl,
    check=unets.check,
    latent_multiple=unets.latent_multiple,
    predictions={"epsilon": 1024, "v_prediction": 1024},
    step_limits=(500, 1500),
    targets=unets.TARGETS,
    kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    modelspec={"epsilon": "stable-diffusion-xl-v1-base/lora", "v_prediction": "stable-diffusion-xl-v1-base/lora"},
    kohya_version="sdxl_base_v1-0",
    marks=("sdxl", "-xl-"),
    ui_version="SDXL",
    implementation="https://github.com/Stability-AI/generative-models",
    has_original_names=True,
    context_width=2048,
    single_file_prefixes={
        "unet": "model.diffusion_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    depths=(0, 2, 10),
    text_layers={"text_encoder": 12, "text_encoder_2": 32},
    text_widths={"text_encoder": 768, "text_encoder_2": 1280},
    embedding_keys={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
)

ARCHITECTURES: dict[str, Architecture] = {row.name: row for row in (SD1, SD2, SDXL)}
"""Every family by name. Who adds one puts its row in here."""


def components() -> tuple[str, ...]:
    """Component names of all families, each once."""
    return tuple(dict.fromkeys(name for row in ARCHITECTURES.values() for name in row.parts))
