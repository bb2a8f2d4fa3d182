"""The base in 4 and 8 bits, by bitsandbytes on the CPU: smaller, nearly the same, and adapters fit the plain base."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_booth.config.config import Config
from lora_booth.config.settings import ModelConfig
from lora_booth.errors import Interrupted
from lora_booth.models import loading
from lora_booth.models.bases import sources
from lora_booth.models.families.quantize import move_frozen_, quantize_, saved_bytes
from lora_booth.training import loop
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support.runs import At, assert_equal, session_of, trained
from tools.booth_mini.sdxl import write_sdxl

KINDS = ("nf4", "int8")


class Blocks(nn.Module):
    """Two linear layers in a transformer block, one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.Sequential(nn.Linear(320, 640), nn.SiLU(), nn.Linear(640, 320))])
        self.time_embedding = nn.Linear(320, 320)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.time_embedding(self.transformer_blocks[0](x))


def weight_bytes(module: nn.Module) -> int:
    """Of all parameters, with the scales of 4-bit ones."""
    total = 0
    for parameter in module.parameters():
        total += parameter.numel() * parameter.element_size()
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.numel() * state.absmax.element_size() + state.state2.absmax.numel() * 4
    return total


@pytest.mark.parametrize(("kind", "share", "error"), [("nf4", 0.27, 0.15), ("int8", 0.52, 0.02)])
def test_blocks_shrink_and_compute_nearly_the_same(kind: Any, share: float, error: float) -> None:
    torch.manual_seed(0)
    module = Blocks().bfloat16().requires_grad_(False)
    x = torch.randn(2, 77, 320, dtype=torch.bfloat16)
    before, size = module(x).float(), weight_bytes(module.transformer_blocks)
    assert quantize_(module, kind, torch.device("cpu")) == 2
    assert type(module.time_embedding) is nn.Linear
    assert weight_bytes(module.transformer_blocks) < share * size
    assert module(x).dtype == torch.bfloat16
    assert float((module(x).float() - before).norm() / before.norm()) < error
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases that know something, so that what quantisation costs can be seen."""
    folder = tmp_path_factory.mktemp("xl") / "base"
    write_sdxl(sources.EMBEDDED, folder)
    return {"sd1": sources.EMBEDDED, "sdxl": folder}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_component_is_loaded_quantised(kind: str, family: str, miniatures: dict[str, Path]) -> None:
    base = str(miniatures[family])
    config = ModelConfig.model_validate({"base": base, "quantize": kind})
    plain = loading.load(ModelConfig(base=base), device="cpu", dtype=torch.bfloat16)
    small = loading.load(config, device="cpu", dtype=torch.bfloat16)
    pairs = [(plain.denoiser, small.denoiser)]
    pairs += [(module, small.text_encoders()[name]) for name, module in plain.text_encoders().items()]
    for one, other in pairs:
        names = [n for n, m in one.named_modules() if type(m) is nn.Linear]
        expected = {n for n in names if "transformer_blocks." in n or "encoder.layers." in n}
        found = {n for n, m in other.named_modules() if type(m).__module__.startswith("bitsandbytes")}
        assert found == expected != set()
    assert small.fingerprint != plain.fingerprint
    before, after = (family.encode_prompts(["a dog"]) for family in (plain, small))
    errors = [float((before[k].float() - after[k].float()).norm() / before[k].float().norm()) for k in before]
    assert 0 < max(errors) < 0.25


@pytest.mark.parametrize(("kind", "base"), list(zip(KINDS, ("sdxl", "ends"), strict=True)))
def test_training_on_it_resumes_exactly_and_moves_the_adapter_as_the_plain_base_does(
    kind: str, base: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    def config(name: str, quantize: str) -> Config:
        return make_config(
            base,
            name,
            model={"quantize": quantize, "precision": "bf16"},
            adapter={"rank": 4, "text_encoder": True},
            train={"steps": 4},
            preview={"images_per_prompt": 1, "sampler_steps": 1, "prompts": ["a {class}"], "every_steps": 2},
        )

    plain, straight = trained(config("plain", "none")), trained(config("straight", kind))
    interrupted = config("interrupted", kind)
    with pytest.raises(Interrupted):
        train.train(interrupted, report=At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert_equal(straight, trained(interrupted))
    assert straight.keys() == plain.keys()
    ups = sorted(name for name in plain if "lora_B" in name)
    moved, expected = (torch.cat([found[name].flatten() for name in ups]) for found in (straight, plain))
    assert 0.6 < float(torch.nn.functional.cosine_similarity(moved, expected, dim=0)) < 0.9999
    files = [load_file(tmp_path / name / "yql_dog_diffusers.safetensors") for name in ("plain", "straight")]
    assert {key: tensor.shape for key, tensor in files[0].items()} == {k: t.shape for k, t in files[1].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_saves_is_known_without_weights(kind: Any) -> None:
    module = Blocks().bfloat16().requires_grad_(False)
    with torch.device("meta"):
        shape = Blocks().bfloat16()
    before, predicted = weight_bytes(module), saved_bytes(shape, kind)
    quantize_(module, kind, torch.device("cpu"))
    scales = sum(4 * layer.out_features for layer in module.transformer_blocks[0] if isinstance(layer, nn.Linear))
    measured = before - weight_bytes(module) - (scales if kind == "int8" else 0)  # int8's scales are no parameters
    assert predicted == pytest.approx(measured, rel=0.01)


def held_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that `module` or one of its parameters holds by any name, bitsandbytes' states among them."""
    found: dict[str, torch.Tensor] = dict(module.named_buffers())
    for name, part in module.named_modules():
        for path, weight in [("", part), *part.named_parameters(recurse=False)]:
            holders = {"": weight, "state": getattr(weight, "state", None), "quant": vars(weight).get("quant_state")}
            holders["nested"] = getattr(holders["quant"], "state2", None)
            for by, holder in holders.items():
                names = {} if holder is None else vars(holder)
                found |= {f"{name}.{path}.{by}.{n}": x for n, x in names.items() if isinstance(x, torch.Tensor)}
            if isinstance(weight, torch.Tensor):
                found[f"{name}.{path}"] = weight
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_used", [False, True])
def test_all_that_is_frozen_moves_and_what_is_trained_stays(
    kind: str, is_used: bool, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session_of(make_config(model={"quantize": kind, "precision": "bf16"}), monkeypatch)
    micro = loop.micro_step(s, s.prepared.order.at(0)[:1], 0)
    expected = loop.losses_of(s, micro).detach()
    if not is_used:  # bitsandbytes keeps its 8-bit weights in another place before the first pass
        for layer in s.family.denoiser.modules():
            if isinstance(getattr(getattr(layer, "state", None), "CB", None), torch.Tensor):
                layer.weight.CB, layer.weight.SCB = layer.state.CB, layer.state.SCB
                layer.state.CB = layer.state.SCB = None
    before = held_of(s.family.denoiser)
    places = {name: tensor.data_ptr() for name, tensor in before.items()}
    trained = {name for name, p in s.family.denoiser.named_parameters() if p.requires_grad}
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda tensor, _: tensor.clone())  # as a move to another device does
        move_frozen_(s.family.denoiser, "elsewhere")
    stayed = {name for name, tensor in held_of(s.family.denoiser).items() if tensor.data_ptr() == places[name]}
    assert len(trained) > 0
    copies = {name for name in before if name.endswith(".in_base_type")}  # of the trained, which passes read
    assert stayed == {".".join(name.rpartition(".")[::2]) for name in trained} | copies
    assert len(copies) == len(trained)
    assert torch.equal(loop.losses_of(s, micro), expected)


def test_no_kernels_are_fetched_for_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.backends.mps import ops

    fetched: list[str] = []
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda name, **_: fetched.append(name)))
    monkeypatch.setattr(ops, "_kernel_load_failed", False)  # as on macOS 26
    quantize_(nn.Linear(2, 2), "nf4", torch.device("mps"))
    assert ops._get_kernel() is None and fetched == []
