"""What can be wrong between settings and base, found on modules without weights.

What lives here: words that the text encoder cannot see, an adapter that is continued and does not fit, an optimizer
that cannot be made. What does not: contradictions between settings (`config/config.py`), targets and patterns
(`inject.py`, which `memory.Modules` runs).
"""

from __future__ import annotations

from lora_booth.config.config import Config
from lora_booth.config.inputs import shown
from lora_booth.config.resolved import Filled
from lora_booth.errors import ConfigError, ModelError
from lora_booth.planning.memory import Modules
from lora_booth.training import optimizers


def check(config: Filled, modules: Modules, *, device_type: str | None) -> None:
    """Raises ConfigError or ModelError for what training would find later. `modules`: those of `config`.

    `device_type`: None where nothing will be trained now, so that an optimizer whose bytes are known is not made.
    """
    _require_visible(config, modules)
    if device_type is not None or not modules.knows_optimizer(config):
        import torch

        parameter = torch.nn.Parameter(torch.zeros(8))
        optimizers.make([{"params": [parameter], "lr": 1e-6}], config.optimizer, device_type=device_type or "cuda")
    if config.adapter.continue_from is not None:
        from lora_booth.adapter import inject
        from lora_booth.adapter.files import storage
        from lora_booth.adapter.files.family import family_of

        path, family = config.adapter.continue_from, modules.facts.family
        weights = storage.read(path)
        told = family_of(weights, storage.read_metadata(path))
        if told not in (None, family):
            raise ModelError(
                f"adapter.continue_from {path.name} is of {told}, but model.base is of {family}; name an adapter or a "
                "base of the other's family."
            )
        inject.require_fit(modules.built.adapted, weights, path.name)


def _require_visible(config: Config, modules: Modules) -> None:
    """Token and class noun must fit into the text encoder's window, or no prompt could name the subject."""
    words = config.fill("{token} {class}")
    most = len(words) + (config.adapter.embedding_vectors or 0)
    if words.isascii() and most <= modules.size("tokens of a prompt") - 2:  # no token is less than a letter
        return
    for cut in modules.built.family.words_cut([words]).values():
        raise ConfigError(
            f'subject.token and subject.class_noun are "{shown(words)}", of which the text encoder does not see '
            f'"…{shown(cut[-40:])}"; choose shorter words.'
        )
