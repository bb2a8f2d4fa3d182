"""lora_booth: a photo booth for diffusion models.

The Python API has the verbs of the command line:

    import lora_booth
    config = lora_booth.load_config("configs/sd15_subject_12gb.toml", ["subject.images=./my_dog"])
    summary = lora_booth.verbs.train(config)

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_booth.config.config import Config
    from lora_booth.config.toml import load as load_config
    from lora_booth.errors import LoraBoothError
    from lora_booth.run.summary import Summary
    from lora_booth.run.versions import VERSION as __version__
    from lora_booth.verbs.generate import generate
    from lora_booth.verbs.train import train

__all__ = ["Config", "LoraBoothError", "Summary", "__version__", "generate", "load_config", "train"]

_HOMES = {
    "Config": ("config.config", "Config"),
    "LoraBoothError": ("errors", "LoraBoothError"),
    "Summary": ("run.folder", "Summary"),
    "generate": ("verbs.generate", "generate"),
    "load_config": ("config.toml", "load"),
    "train": ("verbs.train", "train"),
    "__version__": ("run.versions", "VERSION"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)
