"""The original names of a UNet's layers, as checkpoints in one file have them.

SDXL adapters use them too, as input_blocks, middle_block and output_blocks.

Each level is 3 places of a list, resnet in column 0, attention in column 1; after the second place comes the sampler
(Stability-AI/generative-models, openaimodel.py, UNetModel). Stable Diffusion 1 and 2 count the same way.
Two resnets per level are assumed, as all three families have them.
"""

from __future__ import annotations

import re

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|mid|up)_blocks?\.?(\d{0,3})\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)")


def original_name(module: str) -> str:
    """The original path of a diffusers UNet module; one that no rule knows is returned as it is.

    An upsampler gets column 2, after an attention. Where its level has none (the first of SD 1 and 2) it is 1.
    """
    match = _BLOCK.fullmatch(module)
    if match is None:
        return _OUTSIDE.get(module, module)
    level, place = int(match[2] or 0), int(match[4])
    rest = _RESNET.get(match[5], match[5]) if match[3] == "resnets" else match[5]
    column = 0 if match[3] == "resnets" else 1
    if match[1] == "mid":
        return f"middle_block.{1 if column else 2 * place}.{rest}"
    if match[3] == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.op"
    if match[3] == "upsamplers":
        return f"output_blocks.{3 * level + 2}.2.conv"
    if match[1] == "down":
        return f"input_blocks.{3 * level + place + 1}.{column}.{rest}"
    return f"output_blocks.{3 * level + place}.{column}.{rest}"


def diffusers_name(name: str) -> str:
    """The diffusers name, in underscores, of an original one in underscores; any other name as it is."""
    outside = {_underscored(ldm): _underscored(module) for module, ldm in _OUTSIDE.items()}
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)_(\d{1,3})_(?:([0-2])_)?(.+)", name)
    if match is None or name in outside:
        return outside.get(name, name)
    side, place, column, rest = match[1], int(match[2]), match[3], match[4]
    resnet = {_underscored(ldm): part for part, ldm in _RESNET.items()}.get(rest)
    if side == "middle_block":
        return f"mid_block_attentions_0_{rest}" if place == 1 else f"mid_block_resnets_{place // 2}_{resnet}"
    level, place = divmod(place - 1 if side == "input_blocks" else place, 3)
    block = f"{'down' if side == 'input_blocks' else 'up'}_blocks_{level}"
    if rest in ("op", "conv"):
        return f"{block}_{'downsamplers' if rest == 'op' else 'upsamplers'}_0_conv"
    return f"{block}_resnets_{place}_{resnet}" if column == "0" else f"{block}_attentions_{place}_{rest}"


def _underscored(name: str) -> str:
    return name.replace(".", "_")
