"""Putting low-rank adapters into modules with PEFT, and taking their numbers out again.

What lives here: which layers a target preset means, injection, initial values, strength. What does not: files
(`files/`), which modules a base has and how many layers of a text encoder it reads (`models/families/`, passed in).

Adapters are float32 inside a base of any type, without autocast. PEFT's injection takes the base's type, in which
AdamW's updates of bf16 parameters are rounded away; `inject_` casts back, and a test compares the two displacements.

Words: a *component* is a module's name in the pipeline ("unet", "text_encoder", "text_encoder_2"); *strength* is the
factor a user puts on a whole adapter, on top of each layer's *scale* = alpha / rank.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_booth.adapter import peft_layers
from lora_booth.adapter.numbers import ADAPTER, Numbers
from lora_booth.adapter.weights import AdapterWeights, LowRank, plain_path
from lora_booth.config.inputs import shown
from lora_booth.config.patterns import Pattern
from lora_booth.config.settings import AdapterConfig
from lora_booth.errors import ConfigError, ModelError
from lora_booth.models.bases import unets
from lora_booth.models.bases.architectures import is_text
from lora_booth.run import imports
from lora_booth.run.randomness import generator_for

with imports.sparing():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

TEXT_ATTENTION = "text-attention"
"""The preset of every text encoder: q, k, v and out together, since A1111 merges OpenCLIP's fused attention only so."""

_TEXT_TARGETS = {TEXT_ATTENTION: r"(text_model\.)?encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj"}


def target_modules(
    module: nn.Module,
    targets: str,
    *,
    presets: Mapping[str, str] = unets.TARGETS,
    num_used_layers: int | None = None,
) -> list[str]:
    """Names of the linear and convolutional layers of the plain `module` that `targets` means, in the module's order.

    `targets`: a key of `presets` (those of the family), TEXT_ATTENTION, or "regex:…" matched against whole names.
    `num_used_layers`: text encoder layers that reach the output; later ones would get no gradient and are left out.
    Raises ModelError when nothing matches, ConfigError when `targets` is no preset or not a regular expression.
    """
    pattern = _pattern(targets, presets)
    layers = [name for name, child in module.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    found = [name for name in layers if pattern.matches(name) and _is_used(name, num_used_layers)]
    if found:
        return found
    wanted = shown(targets.removeprefix("regex:"))
    near = difflib.get_close_matches(wanted, layers, n=3, cutoff=0.0) or ["none: it has no such layer"]
    raise ModelError(
        f'adapter.targets = "{shown(targets)}" matches none of the {len(layers)} linear and convolutional layers of '
        f"{type(module).__name__}; the nearest names are {', '.join(near)}. A regex must match the whole name."
    )


def inject_(
    modules: Mapping[str, nn.Module],
    config: AdapterConfig,
    *,
    seed: int = 0,
    presets: Mapping[str, str] = unets.TARGETS,
    num_used_text_layers: Mapping[str, int] | None = None,
) -> dict[str, list[nn.Parameter]]:
    """Put an untrained adapter into each component and return its trainable parameters, float32, by component.

    Text encoders get TEXT_ATTENTION, the denoiser `config.targets`, where a name means what `presets`, those of its
    family, say. Everything else is frozen. Each layer's initial values depend on (seed, component, module path) alone:
    not on the global random state, which is left as it was, nor on the base's dtype, nor on which other layers are
    adapted. The output is unchanged until the first step; with init "orthogonal" only up to rounding, since there `up`
    starts non-zero.

    Not promised: that dropout is reproducible; PEFT draws it from the global random state.
    Raises ModelError or ConfigError before any module is touched.
    """
    used = num_used_text_layers or {}
    numbers = Numbers(config)
    plans = {name: _plan(name, module, config, numbers, presets, used.get(name)) for name, module in modules.items()}
    _require_used(numbers)
    parameters = {}
    for component, module in modules.items():
        module.requires_grad_(False)
        _inject_one_(module, config, plans[component])
        for path, layer in _layers(module).items():
            _initialise_(layer, config.init, generator_for(seed, "adapter", component, path))
        parameters[component] = [p for p in module.parameters() if p.requires_grad]
    return parameters


def num_parameters(parameters: Mapping[str, Sequence[nn.Parameter]]) -> int:
    """Count of trainable numbers in what `inject_` returned."""
    return sum(p.numel() for group in parameters.values() for p in group)


class Injected:
    """The adapted layers of modules, looked up once: a walk through SDXL's modules takes as long as a short step."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.layers = [layer for module in modules.values() for layer in _layers(module).values()]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the modules compute the base's output; afterwards each layer is as it was, strength
        included."""
        were_disabled = [bool(layer.disable_adapters) for layer in self.layers]
        for layer in self.layers:
            _enable_(layer, False)
        try:
            yield
        finally:
            for layer, was_disabled in zip(self.layers, were_disabled, strict=True):
                _enable_(layer, not was_disabled)

    def squared_norm(self) -> Tensor:
        """The squared Frobenius norm of the update, summed over layers, float32 `[]`, with gradients; plain LoRA only.

        ||s B A||² = s² sum((A Aᵀ) * (Bᵀ B)), so nothing as large as a weight is made; s is the trained scale.
        """
        norms = []
        for layer in self.layers:
            down, up, _ = _factors(layer)
            a, b = down.flatten(start_dim=1), up.flatten(start_dim=1)
            norms.append(_trained_scale(layer) ** 2 * ((a @ a.T) * (b.T @ b)).sum())
        return torch.stack(norms).sum()


def reads_in(modules: Mapping[str, nn.Module], dtype: torch.dtype) -> torch.dtype | None:
    """`dtype`, that of the modules' passes, if it has two bytes and all adapted layers read copies of their factors in
    it; else None, and they read the parameters."""
    is_ours = all(peft_layers.reads_copies(layer, ADAPTER) for layer in Injected(modules).layers)
    return dtype if is_ours and dtype in peft_layers.HALVES else None


def give_copies_(modules: Mapping[str, nn.Module], copies: Mapping[nn.Parameter, Tensor]) -> None:
    """Let passes with gradients read the factors of adapted layers from `copies`, by parameter."""
    for layer in Injected(modules).layers:
        peft_layers.give_copies_(layer, ADAPTER, copies)


def disabled(modules: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
    """`Injected.disabled` of these modules, for once."""
    return Injected(modules).disabled()


def collect(modules: Mapping[str, nn.Module]) -> AdapterWeights:
    """The adapter's numbers: detached contiguous float32 copies on the CPU, with each layer's trained scale."""
    weights: AdapterWeights = {}
    for component, module in modules.items():
        weights[component] = {}
        for path, layer in _layers(module).items():
            down, up, magnitude = _factors(layer)
            copied = None if magnitude is None else _copy(magnitude).reshape(-1)
            weights[component][path] = LowRank(_copy(down), _copy(up), _trained_scale(layer), copied)
    return weights


def base_weight(modules: Mapping[str, nn.Module], component: str, path: str) -> Tensor:
    """The frozen weight under an adapted layer, on the CPU, where exported layers are."""
    return _layers(modules[component])[path].get_base_layer().get_parameter("weight").detach().cpu()


def load_into_(modules: Mapping[str, nn.Module], weights: AdapterWeights) -> None:
    """Overwrite the injected adapter's values with `weights`, which must cover exactly its layers.

    Where the scales differ, `up` is multiplied by their ratio, so that the update is the same. Raises ModelError,
    naming what is missing, extra, of another shape or not finite, before any value is written.
    """
    require_fit(modules, weights)
    for component, module in modules.items():
        for path, layer in _layers(module).items():
            low_rank, own_scale = weights[component][path], _trained_scale(layer)
            ratio = low_rank.scale / own_scale
            up = low_rank.up if math.isclose(ratio, 1.0, rel_tol=1e-6) else low_rank.up.double() * ratio
            values = (low_rank.down, up, low_rank.magnitude)
            for parameter, value in zip(_factors(layer), values, strict=True):
                if parameter is not None and value is not None:
                    parameter.data.copy_(value.reshape(parameter.shape))


def require_fit(modules: Mapping[str, nn.Module], weights: AdapterWeights, name: str = "The adapter") -> None:
    """Raises ModelError, naming the faults, when `weights` are not exactly those of the injected adapter."""
    faults = _load_faults(modules, weights)
    if faults:
        raise ModelError(f"{name} does not fit: " + " ".join(faults))


def state(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The trainable values as they are, for a checkpoint: exact float32 CPU copies by `component.parameter name`."""
    return {name: _copy(parameter) for name, parameter in _adapter_parameters(modules)}


def load_state_into_(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state` gave, bit for bit. Raises ModelError before any value is written when the names differ."""
    parameters = dict(_adapter_parameters(modules))
    faults = _key_faults("checkpoint", parameters, tensors)
    faults += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(parameter.shape)}."
        for name, parameter in parameters.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if faults:
        raise ModelError("The checkpoint does not fit the adapter: " + " ".join(faults[:3]))
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])


@dataclass(frozen=True)
class _Plan:
    """What will be injected into one component: module names, and rank and alpha of each."""

    ranks: dict[str, int]
    alphas: dict[str, float]


def _pattern(targets: str, presets: Mapping[str, str]) -> Pattern:
    patterns = {**presets, **_TEXT_TARGETS}
    if targets in patterns:
        return Pattern(patterns[targets], "adapter.targets")
    if not targets.startswith("regex:"):
        raise ConfigError(f'adapter.targets is "{shown(targets)}"; use one of {", ".join(presets)}, or "regex:…".')
    return Pattern(targets.removeprefix("regex:"), "adapter.targets")


def _is_used(name: str, num_used_layers: int | None) -> bool:
    layer = re.search(r"encoder\.layers\.(\d+)\.", name)
    return num_used_layers is None or layer is None or int(layer[1]) < num_used_layers


def _plan(
    component: str,
    module: nn.Module,
    config: AdapterConfig,
    numbers: Numbers,
    presets: Mapping[str, str],
    num_used_layers: int | None,
) -> _Plan:
    if any(isinstance(child, LoraLayer) for child in module.modules()):
        raise ModelError(f"The {component} already has an adapter; load the base afresh before adding another.")
    targets = TEXT_ATTENTION if is_text(component) else config.targets
    names = target_modules(module, targets, presets=presets, num_used_layers=num_used_layers)
    ranks, alphas = {}, {}
    for name in names:
        ranks[name], alphas[name] = numbers.of(f"{component}.{name}")
        _check_numbers(component, name, ranks[name], alphas[name], config.init)
    return _Plan(ranks, alphas)


def _check_numbers(component: str, name: str, rank: int, alpha: float, init: str) -> None:
    where = f"for {component}.{name}"
    if rank < 1 or not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(f"adapter rank is {rank} and alpha {alpha:g} {where}; both must be positive.")
    if init == "orthogonal" and rank % 2:
        raise ConfigError(f'adapter rank is {rank} {where}, but adapter.init = "orthogonal" needs an even rank.')


def _require_used(numbers: Numbers) -> None:
    for unused in numbers.unused:
        raise ModelError(
            f'adapter.rank_pattern or adapter.alpha_pattern has "{shown(unused)}", which matches no adapted layer. '
            'Names look like "unet.mid_block.attentions.0.proj_in"; a part from the right, as "proj_in", suffices.'
        )


def _inject_one_(module: nn.Module, config: AdapterConfig, plan: _Plan) -> None:
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        target_modules=list(plan.ranks),
        rank_pattern={re.escape(name): rank for name, rank in plan.ranks.items() if rank != config.rank},
        alpha_pattern={re.escape(name): alpha for name, alpha in plan.alphas.items() if alpha != config.rank},
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
    )
    peft_config._register_custom_module(peft_layers.LAYERS)
    is_training = module.training
    with torch.random.fork_rng(devices=[]), peft_layers.knowing_loaded_quantizers():
        inject_adapter_in_model(peft_config, module, ADAPTER)
    module.train(is_training)
    layers = _layers(module)
    assert layers.keys() == {plain_path(name) for name in plan.ranks}, "PEFT adapted other layers than the plan says"
    marked: Any = module
    marked._hf_peft_config_loaded = True  # without it diffusers' and transformers' set_adapter refuse to act


def _initialise_(layer: LoraLayer, init: str, generator: torch.Generator) -> None:
    """Float32 initial values, PEFT's three schemes; PEFT's own come rounded to the base's dtype."""
    down, up, magnitude = _factors(layer)
    rank, fan_in, fan_out = down.shape[0], down[0].numel(), up.shape[0]
    new_up = torch.zeros(fan_out, rank)
    if init == "orthogonal":
        # Odd and even rows of a rotation: up @ down = 0, both non-zero (datta0.github.io/posts/rethink-lora-init).
        rotation = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
        new_down = (torch.randn(fan_in, rank // 2, generator=generator) @ rotation[0::2]).T / 10
        new_up = torch.randn(fan_out, rank // 2, generator=generator) @ rotation[1::2] / 10
    elif init == "gaussian":
        new_down = torch.randn(rank, fan_in, generator=generator) / rank
    else:  # kaiming_uniform with a = sqrt(5): bound = sqrt(6 / ((1 + 5) fan_in))
        new_down = (2 * torch.rand(rank, fan_in, generator=generator) - 1) / math.sqrt(fan_in)
    down.data = new_down.reshape(down.shape).contiguous().to(down.device)
    up.data = new_up.reshape(up.shape).contiguous().to(up.device)
    if magnitude is not None:
        norms: Any = layer.lora_magnitude_vector[ADAPTER]
        norms.update_layer(
            base_layer=layer.get_base_layer(), lora_A=down.data, lora_B=up.data, scaling=layer.scaling[ADAPTER]
        )


def _layers(module: nn.Module) -> dict[str, LoraLayer]:
    """Module path to adapted layer, in `named_modules()` order."""
    found = ((name, child) for name, child in module.named_modules() if isinstance(child, LoraLayer))
    return {plain_path(name): child for name, child in found if ADAPTER in child.lora_A}


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter | None]:
    """down, up and, for DoRA, magnitude of an adapted layer."""
    down, up = (factor[ADAPTER].get_parameter("weight") for factor in (layer.lora_A, layer.lora_B))
    if not layer.use_dora[ADAPTER]:
        return down, up, None
    return down, up, layer.lora_magnitude_vector[ADAPTER].get_parameter("weight")


def _trained_scale(layer: LoraLayer) -> float:
    """alpha / rank or alpha / sqrt(rank), whatever the strength is set to (`layer.scaling` includes it)."""
    rank = layer.r[ADAPTER]
    return float(layer.lora_alpha[ADAPTER] / (math.sqrt(rank) if layer.use_rslora[ADAPTER] else rank))


def _enable_(layer: LoraLayer, enabled: bool) -> None:
    """Turn the layer's adapter on or off; PEFT would change `requires_grad` with it."""
    wanted = [(p, p.requires_grad) for p in _factors(layer) if p is not None]
    layer.enable_adapters(enabled)
    for parameter, requires_grad in wanted:
        parameter.requires_grad_(requires_grad)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _adapter_parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for component, module in modules.items():
        for path, layer in _layers(module).items():
            for part, parameter in zip(("lora_A", "lora_B", "lora_magnitude_vector"), _factors(layer), strict=True):
                if parameter is not None:
                    yield f"{component}.{path}.{part}.{ADAPTER}.weight", parameter


def _load_faults(modules: Mapping[str, nn.Module], weights: AdapterWeights) -> list[str]:
    faults = _key_faults("adapter", modules, {name: layers for name, layers in weights.items() if layers})
    for component in modules.keys() & weights.keys():
        layers, given = _layers(modules[component]), weights[component]
        faults += _key_faults(f"{component} adapter", layers, given)
        for path in layers.keys() & given.keys():
            faults += _layer_faults(f"{component}.{path}", layers[path], given[path])
    return faults if len(faults) <= 3 else [*faults[:3], f"And {len(faults) - 3} more such faults."]


def _layer_faults(where: str, layer: LoraLayer, low_rank: LowRank) -> Iterator[str]:
    down, up, magnitude = _factors(layer)
    if (low_rank.magnitude is None) != (magnitude is None):
        yield f"{where} is {'plain LoRA' if low_rank.magnitude is None else 'DoRA'}; change adapter.dora."
    elif low_rank.rank != down.shape[0]:
        yield f"{where} has rank {low_rank.rank}, expected {down.shape[0]}; change adapter.rank or its pattern."
    elif low_rank.down.shape != down.shape or low_rank.up.shape != up.shape:
        shapes = f"{list(low_rank.down.shape)} and {list(low_rank.up.shape)}"
        yield f"{where} has shapes {shapes}, expected {list(down.shape)} and {list(up.shape)}; it is of another base."
    elif magnitude is not None and low_rank.magnitude is not None and low_rank.magnitude.numel() != magnitude.numel():
        yield f"{where} has {low_rank.magnitude.numel()} magnitudes, expected {magnitude.numel()}."
    if not all(bool(torch.isfinite(t).all()) for t in low_rank.tensors):
        yield f"{where} holds NaN or infinity; the file is damaged or its training diverged."


def _key_faults(what: str, expected: Iterable[str], given: Iterable[str]) -> list[str]:
    expected, given = dict.fromkeys(expected), dict.fromkeys(given)
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    faults = []
    if missing:
        faults.append(f"The {what} lacks {len(missing)} of {len(expected)}, first {missing[0]}.")
    if extra:
        faults.append(f"The {what} has {len(extra)} that nothing takes, first {extra[0]}; see adapter.targets.")
    return faults
