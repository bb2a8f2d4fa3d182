"""Where metrics go besides metrics.jsonl: trackers, through accelerate.

Nothing is sent anywhere unless `run.trackers` names who sends it; of the settings, those that say how is trained, and
no path and no word of the user's but the run's name. trackio is not among them: it asks for a Pillow below 13, whose
JPEG decoder has a hole.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lora_booth.config.config import Config
from lora_booth.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "lora_booth"
INSTALLED_BY = {"tensorboard": "lora-booth[tracking]", "wandb": "wandb", "aim": "aim"}
SHOWN = {
    "adapter": ("targets", "rank", "alpha", "dropout", "rslora", "dora", "init", "text_encoder"),
    "objective": (
        "min_snr_gamma",
        "debiased",
        "timestep_range",
        "noise_offset",
        "loss",
        "dco_beta",
        "background_weight",
    ),
    "optimizer": ("name", "learning_rate", "text_encoder_learning_rate", "lora_plus_ratio", "weight_decay", "schedule"),
    "prior": ("mode", "loss_weight", "norm_weight", "num_images"),
    "train": ("steps", "images_per_step", "seed"),
}


def require(config: Config) -> None:
    """Raises ConfigError for a tracker that is not installed, which accelerate would leave out without a word."""
    for name in config.run.trackers:
        if find_spec(name) is None:
            raise ConfigError(
                f'run.trackers names "{name}", which is not installed; `pip install {INSTALLED_BY[name]}`, or leave it '
                "out."
            )


def begin(accelerator: Accelerator, config: Config) -> None:
    """Begin a run with each tracker of `config`, under the run's name."""
    if not config.run.trackers:
        return
    places = {"wandb": {"name": config.name, "dir": str(config.folder)}}
    accelerator.init_trackers(PROJECT, settings(config), {name: places.get(name, {}) for name in config.run.trackers})


def settings(config: Config) -> dict[str, Any]:
    """What trackers are told of the settings, by key."""
    values = config.model_dump(mode="json")
    found = {f"{section}.{key}": values[section][key] for section, keys in SHOWN.items() for key in keys}
    return {key: str(value) if isinstance(value, (list, type(None))) else value for key, value in found.items()}
