"""A wider model with the function of a narrower one, so that training goes on where the narrower one stood.

The narrower one's channels come first. What they read of the new ones begins at zero, so that the function is the same
(the idea of Net2Net, Chen et al. 2015, arXiv 1511.05641). Group norms must keep their group size, so that new channels
form groups of their own: with twice the channels, twice the groups.
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def widen(narrow: nn.Module, wide: nn.Module, *, trainable: str = "") -> None:
    """Gives `wide` the function of `narrow`: the same modules, some with more channels.

    New channels read with the weights that `wide` has where a name begins with `trainable`; elsewhere they stay zero.
    """
    weights = narrow.state_dict()
    if weights.keys() != wide.state_dict().keys():
        raise ValueError(f"not the same modules: {sorted(weights.keys() ^ wide.state_dict().keys())[:4]}")
    for name, new in wide.state_dict().items():
        if not name.startswith(trainable):
            new.zero_()
        _fill(new, weights[name])


def _fill(new: Tensor, old: Tensor) -> None:
    """Puts `old` [out, in, ...] or [out] first in `new`, and cuts the old outputs off the new inputs."""
    if new.ndim > 1:
        new[: old.shape[0], old.shape[1] :] = 0
    new[tuple(slice(size) for size in old.shape)] = old
