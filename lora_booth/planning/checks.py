"""What can be wrong between settings and base, found on modules without weights.

What lives here: words that the text encoder cannot see, an adapter that is continued and does not fit, an optimizer
that cannot be made. What does not: contradictions between settings (`config/config.py`), targets and patterns
(`inject.py`, which `memory.Modules` runs).
"""

from __future__ import annotations

import torch

from lora_booth.adapter import inject
from lora_booth.adapter.files import storage
from lora_booth.adapter.files.family import family_of
from lora_booth.config.config import Config
from lora_booth.config.inputs import shown
from lora_booth.errors import ConfigError, ModelError
from lora_booth.planning.memory import Modules
from lora_booth.training import optimizers


def check(config: Config, modules: Modules, *, device_type: str) -> None:
    """Raises ConfigError or ModelError for what training would find later. `modules`: those of `config`."""
    _require_visible(config, modules)
    parameter = torch.nn.Parameter(torch.zeros(8))
    optimizers.make([{"params": [parameter], "lr": 1e-6}], config.optimizer, device_type=device_type)
    if config.adapter.continue_from is not None:
        path, family = config.adapter.continue_from, modules.family.name
        weights = storage.read(path)
        told = family_of(weights, storage.read_metadata(path))
        if told not in (None, family):
            raise ModelError(
                f"adapter.continue_from {path.name} is of {told}, but model.base is of {family}; name an adapter or a "
                "base of the other's family."
            )
        inject.require_fit(modules.adapted, weights, path.name)


def _require_visible(config: Config, modules: Modules) -> None:
    """Token and class noun must fit into the text encoder's window, or no prompt could name the subject."""
    words = config.fill("{token} {class}")
    for cut in modules.family.words_cut([words]).values():
        raise ConfigError(
            f'subject.token and subject.class_noun are "{shown(words)}", of which the text encoder does not see '
            f'"…{shown(cut[-40:])}"; choose shorter words.'
        )
