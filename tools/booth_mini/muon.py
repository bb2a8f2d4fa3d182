"""Muon for matrices and kernels, AdamW for the rest, as one optimizer.

Muon (Jordan 2024, "Muon: an optimizer for hidden layers") replaces a momentum matrix by the nearest
semi-orthogonal one, found by five Newton-Schulz steps; the update is scaled to AdamW's usual size as in Liu et al.
2025, arXiv 2502.16982, so that both kinds share one learning rate and weight decay.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tools.booth_mini.state import has_fast_bfloat16

MOMENTUM = 0.95
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.02
ADAM_SCALE = 0.5
"""The learning rate of AdamW's parameters as a share of Muon's."""


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups say `is_matrix`; `lr_scale` multiplies the learning rate that the schedule sets."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim > 1 and not _is_end(name)]
        others = [p for name, p in named if p.ndim <= 1 or _is_end(name)]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "is_matrix": True, "lr_scale": 1.0},
            {"params": others, "is_matrix": False, "lr_scale": ADAM_SCALE},
        ]
        super().__init__(groups, {"lr": learning_rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "no closure is supported"
        for group in self.param_groups:
            update = self._muon if group["is_matrix"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, parameter.grad, group["lr"])

    def _muon(self, parameter: Tensor, gradient: Tensor, learning_rate: float) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        matrix = gradient.lerp(momentum, MOMENTUM).flatten(1)
        size = 0.2 * max(matrix.shape) ** 0.5
        parameter.mul_(1 - learning_rate * WEIGHT_DECAY)
        parameter.sub_(orthogonalise(matrix).view_as(parameter), alpha=learning_rate * size)

    def _adam(self, parameter: Tensor, gradient: Tensor, learning_rate: float) -> None:
        state = self.state[parameter]
        if "count" not in state:
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        count = state["count"] = int(state.get("count", 0)) + 1
        mean = state["mean"].lerp_(gradient, 1 - BETAS[0]) / (1 - BETAS[0] ** count)
        square = state["square"].lerp_(gradient.square(), 1 - BETAS[1]) / (1 - BETAS[1] ** count)
        parameter.sub_(mean / (square.sqrt() + 1e-8), alpha=learning_rate)


def _is_end(name: str) -> bool:
    """Whether a parameter meets pictures or latents themselves; those kernels are AdamW's."""
    return not {"conv_in", "conv_out"}.isdisjoint(name.split("."))


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Roughly U V^T of a matrix [m, n] = U S V^T: singular values come out between about 0.7 and 1.2.

    Newton-Schulz with Jordan's quintic (3.4445, -4.7750, 2.0315), in bfloat16 where that is fast.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).to(torch.bfloat16 if has_fast_bfloat16(matrix.device) else torch.float32)
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    restored: Tensor = (x.T if is_tall else x).to(matrix.dtype)
    return restored
