"""How differently two pictures look to a network trained on photographs: a loss that asks for edges, not for means.

The network is the first blocks of EfficientNet-Lite0 (Apache-2.0) out of a pinned package. It is used in training only;
nothing of it is in the shipped model.
"""

import io

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS: tuple[tuple[int, int], ...] = ((3, 1), (3, 2), (3, 1), (5, 2), (5, 1))
"""Kernel side and stride of the inverted bottlenecks that are used; the stem before them has 3 and 2."""
TAPS = (0, 2, 4)
"""The blocks after which pictures are compared: at a half, a quarter and an eighth of their side."""
BATCH_NORM_EPSILON = 1e-3


class Perceptual(nn.Module):
    """Callable (a, b [B, 3, H, W] in -1..1) -> scalar; 0 for equal pictures, about 1 for unrelated ones."""

    def __init__(self, checkpoint: bytes) -> None:
        super().__init__()
        saved = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True)
        self._fold(saved, "stem", "_conv_stem", "_bn0")
        for index in range(len(BLOCKS)):
            convs = [
                c
                for c in ("_expand_conv", "_depthwise_conv", "_project_conv")
                if f"_blocks.{index}.{c}.weight" in saved
            ]
            norms = ("_bn0", "_bn1", "_bn2")[-len(convs) :]
            for conv, norm in zip(convs, norms, strict=True):
                self._fold(saved, f"block{index}{conv}", f"_blocks.{index}.{conv}", f"_blocks.{index}.{norm}")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean over the taps of the features' mean difference, as a share of their own mean size."""
        with torch.no_grad():
            targets = self.features(b)
        shares = [(x - y).abs().mean() / y.abs().mean() for x, y in zip(self.features(a), targets, strict=True)]
        return torch.stack(shares).mean()

    def features(self, x: Tensor) -> list[Tensor]:
        """What the TAPS see: [B, C, H / 2, W / 2] and smaller."""
        seen = []
        x = self._conv(x, "stem", stride=2).clamp(0, 6)
        for index, (_, stride) in enumerate(BLOCKS):
            before = x
            if hasattr(self, f"block{index}_expand_conv_weight"):
                x = self._conv(x, f"block{index}_expand_conv").clamp(0, 6)
            x = self._conv(x, f"block{index}_depthwise_conv", stride=stride, groups=x.shape[1]).clamp(0, 6)
            x = self._conv(x, f"block{index}_project_conv")
            x = x + before if x.shape == before.shape else x
            if index in TAPS:
                seen.append(x)
        return seen

    def _conv(self, x: Tensor, name: str, *, stride: int = 1, groups: int = 1) -> Tensor:
        """A convolution padded as TensorFlow's SAME: the odd pixel at the end."""
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        side = weight.shape[-1]
        padding = [max((-(-size // stride) - 1) * stride + side - size, 0) for size in x.shape[:1:-1]]
        x = F.pad(x, [part for total in padding for part in (total // 2, total - total // 2)])
        return F.conv2d(x, weight, bias, stride, groups=groups)

    def _fold(self, saved: dict[str, Tensor], name: str, conv: str, norm: str) -> None:
        """Keeps a convolution and the batch norm after it as one weight and bias."""
        scale = saved[f"{norm}.weight"] / (saved[f"{norm}.running_var"] + BATCH_NORM_EPSILON).sqrt()
        self.register_buffer(f"{name}_weight", saved[f"{conv}.weight"] * scale[:, None, None, None])
        self.register_buffer(f"{name}_bias", saved[f"{norm}.bias"] - saved[f"{norm}.running_mean"] * scale)
