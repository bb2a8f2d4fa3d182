"""The files of an identified base as frozen modules.

They come from a diffusers folder, or from a single-file checkpoint.

Every class is named here; nothing that a config says is imported. Nothing here uses the network.

Attention is torch's, and tensors are contiguous. Attention in chunks of our own was a third faster backward on a CPU at
8 numbers a head, and slower at 40 and 64, as real bases have them; channels-last made a step a little slower there.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_booth.errors import ConfigError, LoraBoothError, ModelError, lacks_memory
from lora_booth.models import devices
from lora_booth.models.bases.architectures import Architecture, is_text
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.bases.sources import SHIPPED_CONFIGS, component_weights, read_json
from lora_booth.models.families.prompts import Tokens
from lora_booth.models.families.quantize import Quantization, move_frozen_, quantize_
from lora_booth.models.families.vae import Vae
from lora_booth.run import imports
from lora_booth.run.number_types import FLOATS
from lora_booth.run.safetensors import read_layout

MAX_REASON_CHARACTERS = 300
"""What a library says of a file is cut there: it may quote all of it."""
MIN_WINDOW = 3
"""Tokens of a prompt: start, one word, end."""
CLIP_MERGES = SHIPPED_CONFIGS / "clip_merges.txt.gz"


@dataclass(frozen=True)
class Components:
    """The parts of a base, all frozen and in eval mode; `vae` and `text_encoders` only where they were read by now."""

    denoiser: nn.Module
    vae: Vae | None
    text_encoders: dict[str, nn.Module]
    tokens: dict[str, Tokens]
    """Component name of the text encoder that reads them, to its tokenizer."""
    device: torch.device
    read_vae: Callable[[], Vae] | None = None
    """Reads the VAE, where it waits until it is needed."""
    read_text_encoders: Callable[[], dict[str, nn.Module]] | None = None
    """Reads the text encoders, where they wait."""


@dataclass(frozen=True)
class Wanted:
    """Which parts to load, where to, and in which type. The VAE is float32 whatever `dtype` says."""

    device: torch.device
    dtype: torch.dtype
    needs_vae: bool = True
    quantization: Quantization | None = None
    """Of the denoiser and the text encoders."""
    is_denoiser_offloaded: bool = False
    """Whether the denoiser is left in main memory."""
    does_vae_wait: bool = False
    """Whether it is read when it is first needed, if ever. Nothing of a single file waits: it is read as a whole."""
    do_text_encoders_wait: bool = False


def load_components(facts: BaseFacts, wanted: Wanted) -> Components:
    """Load what is wanted. ModelError, naming the file, when weights are missing, surplus in shape, or unreadable."""
    row, is_file = facts.architecture, facts.path.is_file()
    does_vae_wait = wanted.does_vae_wait and wanted.needs_vae and not is_file
    do_texts_wait = wanted.do_text_encoders_wait and not is_file
    has_vae = wanted.needs_vae and not does_vae_wait
    now = [row.denoiser, *(["vae"] if has_vae else []), *(() if do_texts_wait else row.text_encoders)]
    modules = _read(facts, wanted, now)
    with quiet():
        tokens = {name: _tokens(facts, name) for name in row.text_encoders}
    return Components(
        denoiser=modules[row.denoiser],
        vae=_vae(facts, modules, wanted) if has_vae else None,
        text_encoders={name: modules[name] for name in row.text_encoders if name in modules},
        tokens=tokens,
        device=wanted.device,
        read_vae=(lambda: _vae(facts, _read(facts, wanted, ["vae"]), wanted)) if does_vae_wait else None,
        read_text_encoders=partial(_read, facts, wanted, row.text_encoders) if do_texts_wait else None,
    )


def _read(facts: BaseFacts, wanted: Wanted, names: Sequence[str]) -> dict[str, nn.Module]:
    """The components `names`, frozen, where they belong and in their types."""
    load = _from_single_file if facts.path.is_file() else _from_folder
    with quiet():
        modules = load(facts, names, wanted.dtype)
        for name, module in modules.items():
            module.requires_grad_(False)
            if wanted.quantization is not None and name != "vae":
                quantize_(module, wanted.quantization, wanted.device)
            if name == facts.architecture.denoiser and wanted.is_denoiser_offloaded:
                move_frozen_(module.eval(), "cpu")
            else:
                module.eval().to(wanted.device)
    return modules


def _vae(facts: BaseFacts, modules: Mapping[str, nn.Module], wanted: Wanted) -> Vae:
    with readable(facts.path):
        vae = Vae(modules["vae"])
        if wanted.device.type == "cpu":  # a fifth faster there; decoding gains nothing
            vae.module.encoder.to(memory_format=torch.channels_last)
    return vae


def without_weights(facts: BaseFacts, dtype: torch.dtype) -> Components:
    """All parts as `load_components` would give them, on the meta device: shapes and types, no data.

    For finding out what a run needs. Raises ModelError when the configs cannot be built.
    """
    row = facts.architecture
    modules: dict[str, nn.Module] = {}
    with quiet(), torch.device("meta"):
        import transformers  # not before `quiet`, which hides from it what it would look for

        for name in (row.denoiser, "vae", *row.text_encoders):
            with readable(facts.configs / name):
                if is_text(name):
                    module = _class_of(row, name)(transformers.CLIPTextConfig(**facts.config(name)))
                else:
                    module = _class_of(row, name).from_config(facts.config(name))
            module = module.to(torch.float32 if name == "vae" else dtype)
            modules[name] = module.requires_grad_(False).eval()
    with readable(facts.configs / "vae"):
        vae = Vae(modules["vae"])
    encoders = {name: modules[name] for name in row.text_encoders}
    tokens = {name: _tokens(facts, name) for name in row.text_encoders}
    return Components(modules[row.denoiser], vae, encoders, tokens, torch.device("meta"))


def load_component(facts: BaseFacts, name: str) -> nn.Module:
    """One adaptable component alone, frozen, on the CPU, in the type it is stored in (float32 where that is mixed).

    For reading and comparing weights. Raises ModelError as `load_components` does.
    """
    load = _from_single_file if facts.path.is_file() else _from_folder
    with quiet():
        module = load(facts, [name], _stored_dtype(facts, name))[name]
    return module.requires_grad_(False).eval()


def prepare_unet_(unet: Any, gradient_checkpointing: float, attention: str, *, is_offloading: bool) -> None:
    """Switch the UNet's memory savers; see `Family.prepare_denoiser_`.

    diffusers' checkpointing works in eval mode (it looks at grad mode alone).
    """
    drop_divisions_(unet)
    unet.enable_gradient_checkpointing(_offloaded_checkpoint if is_offloading else None)
    units = checkpointed_units(unet)
    for unit in units[round(gradient_checkpointing * len(units)) :]:
        unit.gradient_checkpointing = False
    if attention == "sdpa":
        from diffusers.models.attention_processor import AttnProcessor2_0

        unet.set_attn_processor(AttnProcessor2_0())  # set_default_attn_processor would mean the one before SDPA
        return
    assert attention == "xformers", f"unknown attention {attention}"
    if find_spec("xformers") is None:
        raise ConfigError(
            'model.attention is "xformers", which is not installed; `pip install lora-booth[xformers]`, or set '
            'model.attention = "sdpa".'
        )
    unet.enable_xformers_memory_efficient_attention()


def _offloaded_checkpoint(block: Any, *inputs: Any) -> Any:
    """The output of `block`, of which nothing is kept on the device; only its inputs pass through the hooks here."""
    with devices.offloading():
        return checkpoint(block.__call__, *inputs, use_reentrant=False)


class _One:
    """1 as a divisor: what is divided by it is the result, with no operation started."""

    def __rtruediv__(self, value: torch.Tensor) -> torch.Tensor:
        return value


def drop_divisions_(unet: Any) -> None:
    """Let attention and residual blocks divide their outputs by nothing where they divide by 1: 109 operations of a
    step of SD 1.5."""
    for module in unet.modules():
        for name in ("rescale_output_factor", "output_scale_factor"):
            if vars(module).get(name) == 1:
                setattr(module, name, _One())


def has_compiler() -> bool:
    """Whether torch finds a C++ compiler."""
    return any(which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


def compile_unet_(unet: Any) -> None:
    """Compile each transformer block when it first runs, all alike blocks once. ConfigError without a compiler."""
    if not has_compiler():
        raise ConfigError(
            "train.compile is true, but neither g++ nor clang++ is installed; install one, or set train.compile = "
            "false."
        )
    for module in unet.modules():
        if isinstance(vars(module).get("rescale_output_factor"), _One):
            module.rescale_output_factor = 1.0  # a compiler leaves it out itself, and knows no divisor of ours
    unet.compile_repeated_blocks()


def checkpointed_units(unet: Any) -> list[Any]:
    """The blocks that can recompute their activations, each by itself, in the order of the forward pass.

    The first ones lie between the high resolutions and the end of the backward pass, so recomputing them alone already
    lowers the peak. A unit is a block's convolutions, or one of its stacks of transformer blocks.
    """
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    return [unit for block in blocks for unit in block.modules() if "gradient_checkpointing" in vars(unit)]


def _class_of(row: Architecture, component: str) -> Any:
    """The class that a component of a family is built with."""
    part = row.parts[component]
    return getattr(importlib.import_module(part.module), part.classes[0])


def _stored_dtype(facts: BaseFacts, name: str) -> torch.dtype:
    """The floating type that all tensors of a component have, else float32."""
    prefix = facts.architecture.single_file_prefixes[name] if facts.path.is_file() else ""
    paths = [facts.path] if facts.path.is_file() else component_weights(facts.path / name).files
    entries = [item for path in paths for item in read_layout(path).entries.items()]
    found = {FLOATS[entry.dtype] for key, entry in entries if key.startswith(prefix) and entry.dtype in FLOATS}
    return found.pop() if len(found) == 1 and found < {torch.float16, torch.bfloat16} else torch.float32


def _from_folder(facts: BaseFacts, names: Sequence[str], dtype: torch.dtype) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for name in names:
        folder = facts.path / name
        settings: dict[str, Any] = {"variant": component_weights(folder).variant, "local_files_only": True}
        settings |= {"use_safetensors": True, "output_loading_info": True}
        settings["dtype"] = torch.float32 if name == "vae" else dtype
        with readable(folder):
            model_class = _class_of(facts.architecture, name)
            modules[name], report = model_class.from_pretrained(str(folder), **settings)
        absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
        if absent:
            raise ModelError(f"{folder} lacks {len(absent)} weights, first {absent[0]}; copy or download it again.")
    return modules


def _from_single_file(facts: BaseFacts, names: Sequence[str], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Through diffusers' converter, with the shipped configs of the architecture."""
    import diffusers

    path, configs = str(facts.path), str(facts.configs)
    settings = {"config": configs, "local_files_only": True}
    parts: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    row = facts.architecture
    parts |= dict.fromkeys(row.parts)
    if "text_encoder_2" in row.parts:
        del parts["safety_checker"]
    for name in names:
        parts.pop(name, None)
    parts["scheduler"] = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)  # unused, but asked for
    with readable(facts.path):
        if "vae" in names:
            vae_settings = settings | {"subfolder": "vae", "dtype": torch.float32}
            parts["vae"] = diffusers.AutoencoderKL.from_single_file(path, **vae_settings)
        pipeline = getattr(diffusers, row.pipeline).from_single_file(path, dtype=dtype, **settings, **parts)
    modules = {name: getattr(pipeline, name) for name in names}
    for name, module in modules.items():
        absent = [key for key, tensor in module.named_parameters() if tensor.is_meta]
        if absent:
            raise ModelError(f"{path} lacks {len(absent)} weights of {name}, first {absent[0]}; download it again.")
    return modules


def _tokens(facts: BaseFacts, encoder: str) -> Tokens:
    """The tokenizer that `encoder` reads, checked against its vocabulary."""
    folder = facts.configs / encoder.replace("text_encoder", "tokenizer")
    tokenizer = shipped_tokenizer(folder) if facts.path.is_file() else _tokenizer(folder)
    known = facts.number(encoder, "vocab_size", 49408)
    if len(tokenizer) > known:
        raise ModelError(f"{folder} has {len(tokenizer)} tokens, but {encoder} knows {known}; download the base again.")
    tokens = Tokens(tokenizer, facts.number(encoder, "max_position_embeddings", 77))
    if tokens.window < MIN_WINDOW:
        raise ModelError(f"{folder} allows prompts of {tokens.window} tokens only; download the base again.")
    return tokens


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, read once: half a second goes into parsing its vocabulary."""
    with readable(folder):
        files = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
        return _read_tokenizer(folder, tuple((name, found.st_mtime_ns, found.st_size) for name, found in files))


@lru_cache(maxsize=4)
def _read_tokenizer(folder: Path, files: tuple[tuple[str, int, int], ...]) -> Any:
    """`files`: name, time and size of each, so that one that has changed is read again."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    tokenizer("a dog")  # a broken one may load and fail at its first word
    return tokenizer


def shipped_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer from the shipped merges, with the special tokens of `folder`/tokenizer_config.json.

    An architecture may bring a vocabulary of its own. CLIP's follows from the merges: 256 bytes, the same at a word's
    end, one piece per merge, start, end.
    """
    from transformers import CLIPTokenizer

    if (folder / "vocab.json").is_file():
        return _tokenizer(folder)
    with gzip.open(CLIP_MERGES, "rt", encoding="utf-8") as file:
        merges = [(a, b) for a, b in (line.split() for line in file)]
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    pieces = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    settings = read_json(folder / "tokenizer_config.json") | {"merges": merges}
    settings.pop("tokenizer_class", None)
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, **settings)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Errors of the loading libraries, which raise dozens of kinds on odd files, as one ModelError that names it.

    Where they fail they leave torch's default type behind as they had set it; it is put back.
    """
    default_dtype = torch.get_default_dtype()
    try:
        yield
    except LoraBoothError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), "")[:MAX_REASON_CHARACTERS] or type(error).__name__
        raise ModelError(
            f"{path} cannot be loaded ({reason.rstrip('.: ')}); copy or download the base again."
        ) from error
    finally:
        torch.set_default_dtype(default_dtype)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the loading libraries' bars and advice off the console; their settings are as they were afterwards.

    What matters of it (missing weights, wrong shapes) is checked here and raised.
    """
    with imports.sparing():
        import transformers.modeling_utils  # noqa: F401  # so both have looked for all that they ever will
        from diffusers.utils import logging as of_diffusers
        from transformers.utils import logging as of_transformers

    libraries = [of_diffusers, of_transformers]
    before = [(library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, (had_bars, verbosity) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if had_bars:
                library.enable_progress_bar()
