"""An exponential average of what is trained, which is what is looked at and handed over.

It weighs the last 1 / (1 - decay) steps, and early on fewer, as TensorFlow's ExponentialMovingAverage does: the decay
of the update n is min(decay, (1 + n) / (10 + n)). The steps themselves go on from the trained values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Averaging:
    """An optimizer, and the averages of its parameters, float32. After `eval` the parameters hold the averages, after
    `train` what is trained; in between nothing may update them."""

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self.optimizer, self.decay, self.num_updates = optimizer, decay, 0
        self._averages = [vector.clone() for vector in self._vectors]
        self._trained: list[Tensor] | None = None
        """What is trained, while the parameters hold the averages."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Mapping[Any, Any]:
        """What the optimizer remembers of each parameter."""
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """An update, which joins the averages."""
        assert self._trained is None, "an update of the averages"
        self.optimizer.step()
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self._averages, self._vectors, 1 - decay)

    def eval(self) -> None:
        """Let the parameters hold the averages."""
        if self._trained is None:
            self._trained = [vector.clone() for vector in self._vectors]
            torch._foreach_copy_(self._vectors, self._averages)

    def train(self) -> None:
        """Let them hold what is trained."""
        if self._trained is not None:
            torch._foreach_copy_(self._vectors, self._trained)
            self._trained = None

    def state_dict(self) -> dict[str, Any]:
        """What goes on exactly, together with the averages, which a checkpoint holds as the adapter."""
        trained = self._vectors if self._trained is None else self._trained
        return {"optimizer": self.optimizer.state_dict(), "num_updates": self.num_updates, "trained": trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; the parameters hold the averages of then."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates, self._trained = state["num_updates"], None
        self._averages = [vector.clone() for vector in self._vectors]
        for vector, trained in zip(self._vectors, state["trained"], strict=True):
            vector.copy_(trained)

    @property
    def _vectors(self) -> list[Tensor]:
        return [parameter.data for group in self.param_groups for parameter in group["params"]]
