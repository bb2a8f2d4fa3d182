"""Every number measured on the programs themselves (2026-11), and lora_booth's own files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_booth.adapter import inject
from lora_booth.adapter.files import storage
from lora_booth.adapter.files.keys import SPELLINGS
from lora_booth.adapter.programs.spelling import module_paths, norm_paths
from lora_booth.adapter.programs.table import LOADERS
from lora_booth.adapter.programs.verdicts import Verdict, verdicts, verdicts_of_file
from lora_booth.adapter.weights import AdapterWeights, LowRank, plain_path
from lora_booth.config.settings import TARGET_PRESETS
from lora_booth.errors import ModelError
from lora_booth.models.bases import ldm
from lora_booth.models.bases.sources import SHIPPED_CONFIGS
from tests.adapter.test_metadata import facts
from tests.support import adapted

A1111, FORGE, COMFYUI, INVOKEAI, SDNEXT, SD_SCRIPTS, SD_CPP, DIFFUSERS = (row.name for row in LOADERS)
ALL = tuple(row.name for row in LOADERS)
KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")
PEFT = ("lora_A.weight", "lora_B.weight")
CONTEXT = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
HIDDEN = {"sd1": 768, "sd2": 1024, "sdxl": 768}

Paths = Iterable[tuple[str, str]]
Spell = Callable[[str, str], str]


class File:
    """Keys, shapes and alphas as a file has them; no tensor of full size is ever made."""

    def __init__(self, family: str, header: Mapping[str, str] | None = None) -> None:
        self.family, self.header = family, dict(header or {})
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.alphas: dict[str, float] = {}

    def add(
        self,
        paths: Paths,
        spell: Spell | None = None,
        *,
        leaves: Iterable[str] = KOHYA,
        rank: int = 16,
        alpha: float = 8.0,
        dora: tuple[int, ...] | None = None,
    ) -> File:
        for component, path in paths:
            name = (spell or kohya(self.family))(component, path)
            fan_in = width(self.family, component, path)
            sides = {
                "down": (rank, fan_in),
                "A": (rank, fan_in),
                "up": (8, rank),
                "B": (8, rank),
                "mid": (rank, rank, 3, 3),
                "w_norm": (320,),
                "b_norm": (320,),
                "diff_b": (320,),
                "diff": (8, fan_in),
                "oft_blocks": (2, 4, 4),
            }
            for leaf in leaves:
                part = re.search(r"down|up|mid|_A|_B|[wb]_norm|diff_b|diff|oft_blocks", leaf)
                key = f"{name}.{leaf}" if leaf[0] != "_" else f"{name}{leaf}"
                self.shapes[key] = sides[part[0].strip("_")] if part else ()
                if leaf == "alpha":
                    self.alphas[key] = alpha
            if dora:
                self.shapes[f"{name}.dora_scale"] = dora if dora[0] != 1 else (1, fan_in)
        return self

    def verdicts(self, **settings: Any) -> dict[str, Verdict]:
        values = {"family": self.family, "metadata": self.header, "alphas": self.alphas} | settings
        found = {verdict.loader: verdict for verdict in verdicts(self.shapes, **values)}
        assert tuple(found) == ALL
        return found

    def matched(self) -> dict[str, int]:
        return {name: verdict.matched for name, verdict in self.verdicts().items()}


def width(family: str, component: str, path: str) -> int:
    if path.endswith(("attn2.to_k", "attn2.to_v")):
        return CONTEXT[family]
    if "self_attn" in path:
        return 1280 if component == "text_encoder_2" else HIDDEN[family]
    return 1280 if "time_emb_proj" in path else 320


def text_name(prefix: str, path: str) -> str:
    return f"{prefix}_{path}" if path == "text_projection" else f"{prefix}_text_model_{path.replace('.', '_')}"


def kohya(family: str, naming: str = "diffusers", **prefixes: str) -> Spell:
    """kohya's names with the UNet in `naming`; `prefixes`: component to another prefix than the family's."""
    usual = {"text_encoder": "lora_te1" if family == "sdxl" else "lora_te", "text_encoder_2": "lora_te2"} | prefixes

    def spell(component: str, path: str) -> str:
        if component != "unet":
            return text_name(usual[component], path)
        original = ldm.original_name(path).replace(
            "output_blocks.2.2", f"output_blocks.2.{2 if family == 'sdxl' else 1}"
        )
        return "lora_unet_" + (path if naming == "diffusers" else original).replace(".", "_")

    return spell


def without_text_model(spell: Spell) -> Spell:
    return lambda component, path: spell(component, path).replace("text_model_", "").replace("text_model.", "")


def dotted(component: str, path: str) -> str:
    return f"unet.{path}" if component == "unet" else f"{component}.text_model.{path}"


def unet(family: str, pattern: str = ".") -> list[tuple[str, str]]:
    return [(c, p) for c, p in sorted(module_paths(family)) if c == "unet" and re.search(pattern, p)]


def texts(family: str, pattern: str = "encoder", component: str = "text_encoder") -> list[tuple[str, str]]:
    return [(c, p) for c, p in sorted(module_paths(family)) if c.startswith(component) and re.search(pattern, p)]


def plain(family: str = "sd1") -> list[tuple[str, str]]:
    """Attention, feed-forward and projections of the UNet, and all of the text encoders."""
    return unet(family, "attentions") + texts(family)


def text_of(verdict: Verdict) -> str:
    return " ".join(verdict.notes)


def peft_header(alpha: float = 8.0, **components: float) -> dict[str, str]:
    fields = {"unet": alpha, "text_encoder": alpha} | components
    return {"lora_adapter_metadata": json.dumps({f"{name}.lora_alpha": value for name, value in fields.items()})}


@lru_cache
def real_modules(architecture: str) -> dict[str, nn.Module]:
    import diffusers
    import transformers

    folder, modules = SHIPPED_CONFIGS / architecture, {}
    with torch.device("meta"):
        modules["unet"] = diffusers.UNet2DConditionModel.from_config(
            json.loads((folder / "unet/config.json").read_text())
        )
        for config in sorted(folder.glob("text_encoder*/config.json")):
            fields = json.loads(config.read_text())
            model = getattr(transformers, fields["architectures"][0])
            modules[config.parent.name] = model(transformers.CLIPTextConfig(**fields))
    return modules


def real_paths(architecture: str, *kinds: type[nn.Module]) -> set[tuple[str, str]]:
    """Component and path of each module that is of one of `kinds`."""
    return {
        (component, plain_path(name))
        for component, module in real_modules(architecture).items()
        for name, child in module.named_modules()
        if isinstance(child, kinds)
    }


@pytest.mark.parametrize(("architecture", "family", "counts"), [
    ("sd1", "sd1", {"unet": 282, "text_encoder": 72}),
    ("sd2_base", "sd2", {"unet": 282, "text_encoder": 138}),
    ("sd2_v", "sd2", {"unet": 282, "text_encoder": 138}),
    ("sdxl", "sdxl", {"unet": 794, "text_encoder": 72, "text_encoder_2": 193}),
])  # fmt: skip
def test_module_paths_are_the_linear_and_convolutional_layers_of_the_real_models(
    architecture: str, family: str, counts: dict[str, int]
) -> None:
    real = real_paths(architecture, nn.Linear, nn.Conv2d)
    assert real == module_paths(family)
    assert {name: sum(c == name for c, _ in real) for name in counts} == counts


@pytest.mark.parametrize(("family", "naming", "total"), [
    ("sd1", "diffusers", 264), ("sd2", "diffusers", 330), ("sdxl", "ldm", 986),
])  # fmt: skip
def test_a_file_by_the_rules_loads_whole_and_exactly_everywhere(family: str, naming: str, total: int) -> None:
    file = File(family).add(plain(family), kohya(family, naming))
    for name, verdict in file.verdicts().items():
        assert verdict == Verdict(name, total, total, True, (), verdict.folder), name
        assert verdict.folder
    assert file.verdicts(family=None) == file.verdicts(), "the family is told from the widths"


MEASURED: list[tuple[str, File, dict[str, int]]] = [
    (
        "SD 1 with original block names: 192 lost in InvokeAI and sd-scripts, an error in diffusers",
        File("sd1").add(plain(), kohya("sd1", "ldm")),
        {A1111: 264, FORGE: 264, COMFYUI: 264, INVOKEAI: 72, SDNEXT: 264, SD_SCRIPTS: 72, SD_CPP: 264, DIFFUSERS: 0},
    ),
    (
        "lora_te1_ on SD 1: 72 lost in InvokeAI, SD.Next and sd-scripts",
        File("sd1").add(plain(), kohya("sd1", text_encoder="lora_te1")),
        {A1111: 264, FORGE: 264, COMFYUI: 264, INVOKEAI: 192, SDNEXT: 192, SD_SCRIPTS: 192, SD_CPP: 264,
         DIFFUSERS: 264},
    ),
    (
        "lora_te1_ on SD 2: the text encoder lost in A1111 too",
        File("sd2").add(plain("sd2"), kohya("sd2", text_encoder="lora_te1")),
        {A1111: 192, FORGE: 330, COMFYUI: 330, INVOKEAI: 192, SDNEXT: 192, SD_SCRIPTS: 192, SD_CPP: 330,
         DIFFUSERS: 330},
    ),
    (
        "without text_model_: 72 lost in ComfyUI, everything in Forge, 576 of 792 keys applied in sd.cpp",
        File("sd1").add(plain(), without_text_model(kohya("sd1"))),
        {A1111: 192, FORGE: 0, COMFYUI: 192, INVOKEAI: 192, SDNEXT: 264, SD_SCRIPTS: 192, SD_CPP: 192, DIFFUSERS: 264},
    ),
    (
        "diffusers' convert_state_dict_to_kohya: lora_te1_, no text_model_",
        File("sd1").add(plain(), without_text_model(kohya("sd1", text_encoder="lora_te1")), alpha=16.0),
        {A1111: 192, FORGE: 0, COMFYUI: 192, INVOKEAI: 192, SDNEXT: 192, SD_SCRIPTS: 192, SD_CPP: 192, DIFFUSERS: 264},
    ),
    (
        "PEFT keys as saved today: 200 of 264 lost in ComfyUI, 384 of 528 keys applied in sd.cpp",
        File("sd1", peft_header()).add(plain(), without_text_model(dotted), leaves=PEFT),
        {A1111: 0, FORGE: 0, COMFYUI: 64, INVOKEAI: 0, SDNEXT: 0, SD_SCRIPTS: 0, SD_CPP: 192, DIFFUSERS: 264},
    ),
    (
        "every convolution of SD 1: 4 of 282 lost in sd-scripts, 834 of 846 keys applied in sd.cpp",
        File("sd1").add(unet("sd1")),
        {A1111: 282, FORGE: 282, COMFYUI: 282, INVOKEAI: 282, SDNEXT: 282, SD_SCRIPTS: 278, SD_CPP: 278,
         DIFFUSERS: 282},
    ),
    (
        "every layer of SDXL in original names: 788 of 794 in sd-scripts",
        File("sdxl").add(unet("sdxl"), kohya("sdxl", "ldm")),
        {A1111: 794, FORGE: 794, COMFYUI: 794, INVOKEAI: 794, SDNEXT: 794, SD_SCRIPTS: 788, SD_CPP: 788,
         DIFFUSERS: 794},
    ),
    (
        "every layer of SDXL in diffusers names: none in sd-scripts, 3 lost in A1111",
        File("sdxl").add(unet("sdxl")),
        {A1111: 791, FORGE: 794, COMFYUI: 794, INVOKEAI: 794, SDNEXT: 794, SD_SCRIPTS: 0, SD_CPP: 788, DIFFUSERS: 794},
    ),
    (
        "lora_te_ on SDXL: an error in InvokeAI",
        File("sdxl").add(unet("sdxl", "attn2"), kohya("sdxl", "ldm")).add(
            texts("sdxl", component="text_encoder")[:72], kohya("sdxl", text_encoder="lora_te")),
        {A1111: 280, FORGE: 352, COMFYUI: 352, INVOKEAI: 0, SDNEXT: 280, SD_SCRIPTS: 280, SD_CPP: 352, DIFFUSERS: 352},
    ),
    (
        "ComfyUI's own generic keys",
        File("sd1").add(
            plain(),
            lambda component, path: f"diffusion_model.{ldm.original_name(path)}" if component == "unet"
            else f"text_encoders.clip_l.transformer.text_model.{path}",
            leaves=PEFT),
        {A1111: 0, FORGE: 264, COMFYUI: 264, INVOKEAI: 0, SDNEXT: 0, SD_SCRIPTS: 0, SD_CPP: 0, DIFFUSERS: 0},
    ),
    (
        "diffusers' names of 2023",
        File("sd1").add(
            unet("sd1", "attn"),
            lambda component, path: dotted(component, path).replace(".to_", ".processor.to_").removesuffix(".0"),
            leaves=("_lora.down.weight", "_lora.up.weight")),
        {A1111: 0, FORGE: 128, COMFYUI: 128, INVOKEAI: 0, SDNEXT: 0, SD_SCRIPTS: 0, SD_CPP: 128, DIFFUSERS: 128},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("file", "expected"), [row[1:] for row in MEASURED], ids=[row[0] for row in MEASURED])
def test_as_many_layers_are_matched_as_were_measured(file: File, expected: dict[str, int]) -> None:
    assert file.matched() == expected
    for verdict in file.verdicts().values():
        assert verdict.notes or verdict.matched == verdict.total, "what is lost is told"
        assert all(note.endswith(".") and "{" not in note for note in verdict.notes)


def test_peft_files_load_at_scale_1_where_the_header_is_not_read() -> None:
    found = File("sd1", peft_header()).add(plain(), dotted, leaves=PEFT).verdicts()
    assert found[DIFFUSERS].is_exact and found[DIFFUSERS].notes == ()
    assert not found[COMFYUI].is_exact and not found[SD_CPP].is_exact
    assert "136 of 264 layers" in text_of(found[COMFYUI]) and "load at scale 1" in text_of(found[COMFYUI])
    assert "192 of 264 layers" in text_of(found[SD_CPP]) and "rank 1" not in text_of(found[SD_CPP])
    assert found[COMFYUI].matched == 64 + 72, "with text_model_ in its keys the text encoder is found"
    assert not found[A1111].is_exact, "nothing loads"
    same = File("sd1", peft_header(alpha=16.0)).add(plain(), dotted, leaves=PEFT).verdicts()
    assert same[COMFYUI].is_exact, "alpha = rank is scale 1"
    unstated = File("sd1").add(plain(), dotted, leaves=PEFT).verdicts()
    assert unstated[DIFFUSERS].is_exact and "states no alpha" in text_of(unstated[DIFFUSERS])


def test_missing_alphas_are_told_by_every_program() -> None:
    for verdict in File("sd1").add(plain(), leaves=KOHYA[:2]).verdicts().values():
        assert (verdict.matched, verdict.is_exact) == (264, False)
        assert "264 of 264 layers" in text_of(verdict) and "have no alpha and load at scale 1" in text_of(verdict)
    partly = File("sd1").add(unet("sd1", "attn1"), leaves=KOHYA[:2]).add(unet("sd1", "attn2")).verdicts()
    assert "64 of 128 layers" in text_of(partly[COMFYUI]) and "load at scale 1" in text_of(partly[COMFYUI])
    assert "64 of 128 layers" in text_of(partly[DIFFUSERS]) and "commonest alpha" in text_of(partly[DIFFUSERS])


def test_diffusers_takes_the_commonest_alpha_for_attention_and_text_encoders() -> None:
    file = File("sd1")
    for component, path in plain():
        alpha = 3.5 if path.endswith(("attn1.to_q", "mlp.fc1")) else 5.0 if path.endswith("ff.net.2") else 8.0
        file.add([(component, path)], alpha=alpha, rank=4 if "attn2" in path else 16)
    found = file.verdicts()
    assert not found[DIFFUSERS].is_exact and "28 of 264 layers" in text_of(found[DIFFUSERS])
    assert all(found[name].is_exact for name in ALL if name != DIFFUSERS)
    by_part = File("sd1").add(unet("sd1", "attentions")).add(texts("sd1"), alpha=4.0, rank=8).verdicts()
    assert by_part[DIFFUSERS].is_exact and by_part[DIFFUSERS].notes == ()


def test_only_sd_cpp_misreads_the_rank_of_rank_1() -> None:
    found = File("sd1").add(unet("sd1", "attn2"), rank=1, alpha=1.0).add(texts("sd1", "attn")).verdicts()
    assert [name for name in ALL if not found[name].is_exact] == [SD_CPP]
    assert "64 of 112 layers" in text_of(found[SD_CPP]) and "pad them to rank 2" in text_of(found[SD_CPP])


@pytest.mark.parametrize(("shape", "exact"), [((8, 1), {SDNEXT}), ((1, 0), {SDNEXT, COMFYUI, FORGE, A1111, INVOKEAI})])
def test_dora_keeps_its_form_in_few_programs(shape: tuple[int, ...], exact: set[str]) -> None:
    found = File("sd1").add(plain(), dora=shape).verdicts()
    assert {name for name in ALL if found[name].is_exact} == exact
    assert all(verdict.matched == 264 for verdict in found.values())
    assert all("DoRA" in text_of(found[name]) for name in ALL if name not in exact)


def test_dora_in_diffusers_own_file_is_exact_but_for_text_encoders_under_pefts_key() -> None:
    def check(key: str, paths: list[tuple[str, str]]) -> Verdict:
        file = File("sd1", {"lora_booth.versions": "{}"}).add(paths, dotted, leaves=PEFT)
        file.shapes |= {f"{dotted(component, path)}.{key}": (8,) for component, path in paths}
        return file.verdicts()[DIFFUSERS]

    assert check("lora_magnitude_vector", unet("sd1", "attn")).is_exact
    assert not check("lora_magnitude_vector", texts("sd1")).is_exact
    assert check("lora_magnitude_vector.weight", texts("sd1")).is_exact


def test_a_bundled_embedding_makes_diffusers_refuse_and_others_pass_it_by() -> None:
    file = File("sd1").add(plain())
    file.shapes["bundle_emb.yql.string_to_param.*"] = (2, 768)
    found = file.verdicts()
    assert found[DIFFUSERS].matched == 0 and "bundle_emb.yql" in text_of(found[DIFFUSERS])
    assert all(found[name].matched == 264 and found[name].is_exact for name in ALL if name != DIFFUSERS)
    assert found[A1111].notes == found[SDNEXT].notes == ()
    assert "embedding in the file is not read" in text_of(found[COMFYUI])


@pytest.mark.parametrize(("family", "component", "lost"), [
    ("sd1", "text_encoder", 0), ("sd2", "text_encoder", 46), ("sdxl", "text_encoder_2", 64),
])  # fmt: skip
def test_a1111_needs_the_whole_attention_of_open_clip(family: str, component: str, lost: int) -> None:
    pairs = [row for row in texts(family, r"\.[qv]_proj") if row[0] == component]
    file = File(family).add([*unet(family, "attn2"), *pairs], kohya(family, "ldm" if family == "sdxl" else "diffusers"))
    found = file.verdicts()
    assert found[A1111].total - found[A1111].matched == lost
    assert ("adapt all four" in text_of(found[A1111])) == (lost > 0)
    assert all(found[name].matched == found[name].total for name in ALL if name != A1111)


def test_forge_bears_twelve_keys_without_a_place_and_no_more() -> None:
    for count, matched in ((4, 192), (5, 0)):  # three keys a layer
        file = File("sd1").add(unet("sd1", "attentions"))
        file.add(texts("sd1")[:count], without_text_model(kohya("sd1")))
        assert (file.verdicts()[FORGE].matched, file.verdicts()[FORGE].total) == (matched, 192 + count)
    file = File("sd1").add(plain())
    file.shapes |= {f"note.{i}": (1,) for i in range(12)}
    assert file.verdicts()[FORGE].matched == 264 and "12 keys, first note.0" in text_of(file.verdicts()[FORGE])
    file.shapes["note.12"] = (1,)
    assert file.verdicts()[FORGE].matched == 0 and "13 keys, first note.0" in text_of(file.verdicts()[FORGE])


def test_invokeai_knows_the_base_by_widths_alone() -> None:
    def check(family: str, pattern: str) -> Verdict:
        return File(family).add(unet(family, pattern)).verdicts()[INVOKEAI]

    assert check("sd1", "attn2").matched == 64
    assert "refuses to import" in text_of(check("sd1", "attn1")) and check("sd1", "attn1").matched == 0
    assert "takes the file for SDXL" in text_of(check("sd1", "resnets"))
    assert check("sdxl", "attn1").notes == (), "ten transformer blocks in a row are SDXL's"
    assert check("sdxl", r"down_blocks\.1.+attn1").matched == 0
    only_texts = File("sdxl").add(texts("sdxl")).verdicts()[INVOKEAI]
    assert only_texts.matched == 0 and "refuses to import" in text_of(only_texts)
    embedding_first = check("sd1", r"mid_block.+attn2\.to_k|down_blocks\.3.+time_emb_proj")
    assert embedding_first.matched == 0 and "takes the file for SDXL" in text_of(embedding_first)
    assert check("sd1", r"down_blocks\.0.+attn2\.to_k|down_blocks\.3.+time_emb_proj").notes == ()
    both = File("sd1").add([*unet("sd1", "attn1"), *texts("sd1")]).verdicts()[INVOKEAI]
    assert both.matched == 64 + 72 and both.notes == ()


def test_sdnext_loses_the_first_upsampler_of_sd1_and_2_under_original_names() -> None:
    for family in ("sd1", "sd2"):
        upsamplers = unet(family, r"up_blocks\.[01]\.upsamplers")
        verdict = File(family).add(upsamplers, kohya(family, "ldm")).verdicts()[SDNEXT]
        assert (verdict.matched, verdict.total) == (1, 2)
        assert File(family).add(upsamplers).verdicts()[SDNEXT].matched == 2


def test_invokeai_refuses_two_namings_and_strangers_in_an_sdxl_file() -> None:
    half = unet("sdxl", "attn2")
    mixed = File("sdxl").add(half[:80]).add(half[80:], kohya("sdxl", "ldm"))
    assert mixed.verdicts()[INVOKEAI].matched == 0 and "two namings" in text_of(mixed.verdicts()[INVOKEAI])
    stranger = File("sdxl").add(half)
    stranger.shapes["note"] = (1,)
    assert "stops with an error at note" in text_of(stranger.verdicts()[INVOKEAI])


def test_a1111_hides_an_sdxl_file_whose_header_does_not_say_so() -> None:
    def check(header: dict[str, str]) -> dict[str, Verdict]:
        return File("sdxl", header).add(unet("sdxl", "attn2"), kohya("sdxl", "ldm")).verdicts()

    told = check({"format": "pt"})
    assert "hides it while SDXL is loaded" in text_of(told[A1111]) and told[A1111].matched == 280
    assert [name for name in ALL if told[name].notes] == [A1111]
    for header in ({}, {"ss_base_model_version": "sdxl_base_v1-0"}):
        assert [name for name in ALL if check(header)[name].notes] == []
    wrong = check({"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora"})
    assert [name for name in ALL if wrong[name].notes] == [A1111, FORGE, SDNEXT]


def test_diffusers_refuses_whole_files_for_single_keys() -> None:
    def refused(key: str, header: dict[str, str] | None = None) -> str:
        file = File("sd1", header).add(plain())
        file.shapes |= {key: (1,)} if key else {}
        verdict = file.verdicts()[DIFFUSERS]
        return text_of(verdict) if verdict.matched == 0 else ""

    assert "lora_unet_x.note" in refused("lora_unet_x.note")
    assert "lora_te_text_model_x.lora_mid.weight" in refused("lora_te_text_model_x.lora_mid.weight")
    assert "alphas and also lora_adapter_metadata" in refused("", peft_header())
    one_part = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})}
    file = File("sd1", one_part).add(plain(), dotted, leaves=PEFT)
    assert "says nothing of text_encoder" in text_of(file.verdicts()[DIFFUSERS])


def test_kinds_that_a_program_does_not_read_are_lost_in_it() -> None:
    loha = [f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b")]
    paths = unet("sd1", "attn2")
    found = File("sd1").add(paths).add(unet("sd1", r"resnets.+conv1"), leaves=(*KOHYA, "lora_mid.weight")).verdicts()
    assert {name: found[name].matched for name in (SD_SCRIPTS, DIFFUSERS, COMFYUI)} == {
        SD_SCRIPTS: 64, DIFFUSERS: 0, COMFYUI: 86}  # fmt: skip
    file = File("sd1").add(paths).add(unet("sd1", "attn1"), leaves=(*loha, "alpha"))
    assert file.matched() == dict.fromkeys(ALL, 128) | {SD_SCRIPTS: 64, DIFFUSERS: 0}
    assert "being LoHa, which kohya sd-scripts does not read" in text_of(file.verdicts()[SD_SCRIPTS])


def norms(family: str, pattern: str = ".", component: str = "unet") -> list[tuple[str, str]]:
    return [(c, p) for c, p in sorted(norm_paths(family)) if c == component and re.search(pattern, p)]


@pytest.mark.parametrize(("architecture", "family", "counts"), [
    ("sd1", "sd1", {"unet": 109, "text_encoder": 25}),
    ("sd2_base", "sd2", {"unet": 109, "text_encoder": 47}),
    ("sdxl", "sdxl", {"unet": 256, "text_encoder": 25, "text_encoder_2": 65}),
])  # fmt: skip
def test_norm_paths_are_the_normalisations_of_the_real_models(
    architecture: str, family: str, counts: dict[str, int]
) -> None:
    real = real_paths(architecture, nn.GroupNorm, nn.LayerNorm)
    assert real == norm_paths(family)
    assert {name: sum(c == name for c, _ in real) for name in counts} == counts


def test_normalisations_load_where_the_programs_look_for_them() -> None:
    """LyCORIS' train_norm changes those of resnets and transformers: read in the programs' code, and 570 of 570 keys of
    such a file were loaded by Forge itself."""
    leaves = ("w_norm", "b_norm")
    blocks = File("sd1").add(plain()).add(norms("sd1", "norm[123]?$"), leaves=leaves)
    lost = {SD_SCRIPTS: 264, SD_CPP: 264, DIFFUSERS: 0}
    assert blocks.matched() == dict.fromkeys(ALL, 372) | lost
    assert "108 of 372 layers" in text_of(blocks.verdicts()[SD_CPP]) and "being norm" in text_of(
        blocks.verdicts()[SD_CPP]
    )
    texts_too = File("sd1").add(plain()).add(norms("sd1", component="text_encoder"), leaves=leaves)
    assert texts_too.matched() == dict.fromkeys(ALL, 289) | lost | {A1111: 288, FORGE: 0, COMFYUI: 264}
    assert "has no names for the normalisations" in text_of(texts_too.verdicts()[COMFYUI])
    half = File("sd1").add(plain()).add(norms("sd1", "norm1"), leaves=leaves[:1]).verdicts()
    assert half[A1111].matched == 0 and "is norm without bias" in text_of(half[A1111])
    assert half[COMFYUI].matched == half[FORGE].matched == half[INVOKEAI].matched == 264 + 38


def test_biases_load_where_the_programs_look_for_them() -> None:
    beside = File("sd1").add(unet("sd1", "attn2"), leaves=(*KOHYA, "diff_b")).verdicts()
    assert {name for name in ALL if beside[name].is_exact} == {COMFYUI, FORGE, SD_CPP, SDNEXT}
    assert "also change biases, which InvokeAI leaves" in text_of(beside[INVOKEAI])
    whole = File("sd1").add(unet("sd1", "attn2"), leaves=("diff", "diff_b")).verdicts()
    assert {name for name in ALL if whole[name].is_exact} == {A1111, COMFYUI, FORGE, SD_CPP, SDNEXT, INVOKEAI}
    alone = File("sd1").add(unet("sd1", "attn2")).add(unet("sd1", "conv1"), leaves=("diff_b",)).verdicts()
    assert {name: alone[name].matched for name in ALL} == {
        A1111: 0, FORGE: 86, COMFYUI: 86, INVOKEAI: 0, SDNEXT: 64, SD_SCRIPTS: 64, SD_CPP: 86, DIFFUSERS: 0,
    }  # fmt: skip


def of_shapes(shapes: Mapping[str, tuple[int, ...]], alpha: float = 0.0) -> dict[str, Verdict]:
    """One cross-attention value of plain LoRA and one layer with these leaves."""
    file = File("sd1").add(unet("sd1", "attn2.to_v"))
    file.shapes |= {f"lora_unet_mid_block_attentions_0_proj_in.{leaf}": shape for leaf, shape in shapes.items()}
    file.alphas |= {key: alpha for key in file.shapes if key.endswith("proj_in.alpha")}
    return file.verdicts()


def test_glora_and_oft_load_in_the_programs_that_compute_them() -> None:
    new = {"a1.weight": (4, 2), "a2.weight": (2, 4), "b1.weight": (8, 2), "b2.weight": (2, 4), "alpha": ()}
    old = {"a1.weight": (2, 4), "a2.weight": (4, 2), "b1.weight": (2, 4), "b2.weight": (8, 2), "alpha": ()}
    oft = {"oft_blocks": (2, 4, 4), "alpha": ()}

    def takers(shapes: Mapping[str, tuple[int, ...]], alpha: float = 0.0) -> set[str]:
        found = of_shapes(shapes, alpha)
        return {name for name in ALL if found[name].matched == 17}

    assert takers(new) == {COMFYUI, FORGE} and takers(old) == {COMFYUI, FORGE, A1111, SDNEXT}
    assert takers(oft) == {COMFYUI} and takers(oft, alpha=0.1) == {COMFYUI, A1111, SDNEXT}
    assert of_shapes(oft)[COMFYUI].is_exact and not of_shapes(oft, alpha=0.1)[COMFYUI].is_exact
    assert "being OFT, which Forge does not read: nothing converts them" in text_of(of_shapes(oft)[FORGE])
    assert "InvokeAI stops with an error" in text_of(of_shapes(new)[INVOKEAI])
    many = File("sd1").add(unet("sd1", "attn2")).add(unet("sd1", "attn1"), leaves=("oft_blocks", "alpha"), alpha=0.0)
    assert many.matched()[FORGE] == 0 and "64 keys" in text_of(many.verdicts()[FORGE]), "alphas find their place"


def test_lokr_with_a_tucker_core_loads_where_it_is_multiplied_out_in_order() -> None:
    core = {"lokr_w1": (2, 2), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 4), "alpha": ()}
    found = of_shapes(core, 2.0)
    assert {name: found[name].matched for name in ALL} == {
        A1111: 17, FORGE: 0, COMFYUI: 16, INVOKEAI: 17, SDNEXT: 17, SD_SCRIPTS: 16, SD_CPP: 16, DIFFUSERS: 0,
    }  # fmt: skip
    assert "LoKr with Tucker core; `lora-booth resize` makes plain LoRA of it" in text_of(found[FORGE])


def test_lycoris_kinds_with_dora_stop_invokeai() -> None:
    loha = {f"hada_{part}": (2, 2) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
    found = of_shapes(loha | {"dora_scale": (1, 2)})
    assert found[INVOKEAI].matched == 0 and "stops with an error" in text_of(found[INVOKEAI])
    assert {name for name in ALL if found[name].matched == 17 and found[name].is_exact} == {
        A1111,
        FORGE,
        COMFYUI,
        SDNEXT,
    }
    assert all("being LoHa" in text_of(found[name]) for name in (SD_SCRIPTS,))


def test_names_of_2023_need_no_alpha_and_bare_ones_find_their_place() -> None:
    for start, exact in (("unet.", {COMFYUI, FORGE, SD_CPP, DIFFUSERS}), ("", {COMFYUI, FORGE, SD_CPP})):
        found = (
            File("sd1")
            .add(
                unet("sd1", "attn"),
                lambda _, path, start=start: start + path.replace(".to_", ".processor.to_").removesuffix(".0"),  # type: ignore[misc]
                leaves=("_lora.down.weight", "_lora.up.weight"),
            )
            .verdicts()
        )
        assert {name for name in ALL if found[name].matched == 128 and found[name].is_exact} == exact
        assert all(not found[name].notes for name in exact)


def test_comfyui_knows_its_generic_names_in_original_blocks_only() -> None:
    found = File("sd1").add(unet("sd1", "attn"), lambda _, path: f"diffusion_model.{path}", leaves=PEFT).verdicts()
    assert found[COMFYUI].matched == 0


def test_a_file_for_another_model_is_called_by_its_name() -> None:
    with pytest.raises(ModelError, match="It is an adapter for Flux"):
        verdicts({"lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": (4, 4), "lora_te1_x.alpha": ()})


def test_our_diffusers_file_does_not_warn_against_itself(tmp_path: Path) -> None:
    low = LowRank(torch.ones(2, 768), torch.ones(8, 2), 0.5)
    weights = {"unet": {path: low for _, path in unet("sd1", "attn2.to_k")}}
    storage.FORMATS["diffusers"].write(tmp_path / "a.safetensors", weights, "sd1", torch.float16, {})
    found = {verdict.loader: verdict for verdict in verdicts_of_file(tmp_path / "a.safetensors")}
    assert found[DIFFUSERS].is_exact and found[DIFFUSERS].notes == ()


def test_headers_and_alphas_that_are_broken_do_not_mislead() -> None:
    with pytest.raises(ModelError, match="lora_adapter_metadata cannot be read"):
        File("sd1", {"lora_adapter_metadata": "["}).add(plain(), dotted, leaves=PEFT).verdicts()
    loha = File("sd1", peft_header()).add(unet("sd1", "attn2"), dotted, leaves=[f"hada_{p}" for p in ("w1_a", "w1_b")])
    assert loha.matched()[DIFFUSERS] == 0
    not_finite = File("sd1").add(plain(), alpha=float("nan")).verdicts()
    assert all(verdict.matched == 264 and verdict.notes == () for verdict in not_finite.values())


def test_half_a_layer_stops_a1111_and_is_lost_elsewhere() -> None:
    file = File("sd1").add(plain())
    del file.shapes["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"]
    found = file.verdicts()
    assert found[A1111].matched == 0 and "stops with an error" in text_of(found[A1111])
    assert found[COMFYUI].matched == 263 and "damaged" in text_of(found[COMFYUI])


def test_layers_of_another_base_have_no_place() -> None:
    file = File("sdxl").add(unet("sdxl", "attn2"), kohya("sdxl", "ldm"))
    file.add([("unet", "up_blocks.3.resnets.0.conv1")]).add([("unet", "double_blocks.0.img_attn.proj")])
    found = file.verdicts()
    assert found[COMFYUI].matched == found[COMFYUI].total - 2
    assert "2 of 282 layers" in text_of(found[COMFYUI]) and "no place in a SDXL base" in text_of(found[COMFYUI])


def test_the_second_encoders_projection_is_known_to_comfyui_and_forge() -> None:
    found = File("sdxl").add([*unet("sdxl", "attn2"), ("text_encoder_2", "text_projection")], kohya("sdxl", "ldm"))
    matched = found.matched()
    assert matched[COMFYUI] == matched[FORGE] == 281
    assert matched[A1111] == matched[SD_SCRIPTS] == matched[SD_CPP] == 280


def test_the_family_is_told_or_asked_for() -> None:
    assert verdicts(File("sd2").add(unet("sd2", "attn2")).shapes)[0].matched == 64
    assert verdicts(File("sdxl").add(texts("sdxl")).shapes)[0].matched == 264
    assert verdicts(File("sd1").add(unet("sd1", "attn1")).shapes)[2].matched == 64
    with pytest.raises(ModelError, match=r"for Stable Diffusion 1\.x by the width .+ not for SDXL"):
        verdicts(File("sd1").add(plain()).shapes, family="sdxl")
    with pytest.raises(ModelError, match=r"family of the base cannot be told.+sd1, sd2, sdxl"):
        verdicts(File("sd1").add(unet("sd1", r"mid_block\.resnets")).shapes)
    with pytest.raises(ModelError, match=r"no layer of a LoRA.+its first key is note"):
        verdicts({"note": (1,)})
    assert verdicts(File("sd1").add(unet("sd1", "mid_block")).shapes, family="sd1")[2].matched > 0


def adapter(modules: Mapping[str, nn.Module], targets: str) -> AdapterWeights:
    """Rank 4, alpha 3 on a base's layers of `targets` and its text encoders' attention; `up` has only 4 rows."""
    generator = torch.Generator().manual_seed(0)

    def low_rank(layer: Any) -> LowRank:
        shape = layer.weight.shape[1:]
        down = torch.randn(4, 1, *shape[1:], generator=generator).expand(4, *shape)
        return LowRank(down, torch.randn(4, 4, *(1 for _ in shape[1:]), generator=generator), 0.75)

    return {
        component: {
            plain_path(name): low_rank(module.get_submodule(name))
            for name in inject.target_modules(module, targets if component == "unet" else inject.TEXT_ATTENTION)
        }
        for component, module in modules.items()
    }


@pytest.mark.parametrize("targets", TARGET_PRESETS)
@pytest.mark.parametrize(
    ("architecture", "family"), [("sd1", "sd1"), ("sd2_base", "sd2"), ("sd2_v", "sd2"), ("sdxl", "sdxl")]
)
def test_our_kohya_files_of_full_size_load_exactly_everywhere(architecture: str, family: str, targets: str) -> None:
    prediction = "v_prediction" if architecture == "sd2_v" else "epsilon"
    header = storage.metadata(facts(family=family, prediction_type=prediction))
    weights = adapter(real_modules(architecture), targets)
    tensors = storage.kohya.to_tensors(weights, family, torch.float16)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    alphas = {key: float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    total = sum(map(len, weights.values()))
    assert total > 128
    for verdict in verdicts(shapes, metadata=header, alphas=alphas):
        assert (verdict.matched, verdict.total, verdict.is_exact, verdict.notes) == (total, total, True, ()), verdict


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_our_files_of_tiny_bases_are_judged_from_disk(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    modules = adapted.components(adapted.pipeline(family, bases))
    header, path = storage.metadata(facts(family=family)), tmp_path / "a.safetensors"
    for targets in TARGET_PRESETS:
        weights = adapter(modules, targets)
        total = sum(map(len, weights.values()))
        storage.FORMATS["kohya"].write(path, weights, family, torch.float16, header)
        for verdict in verdicts_of_file(path):
            assert (verdict.matched, verdict.is_exact, verdict.notes) == (total, True, ()), verdict
        storage.FORMATS["diffusers"].write(path, weights, family, torch.float16, header)
        found = {verdict.loader: verdict for verdict in verdicts_of_file(path, family)}
        assert (found[DIFFUSERS].matched, found[DIFFUSERS].is_exact, found[DIFFUSERS].notes) == (total, True, ())
        assert {found[name].matched for name in (A1111, FORGE, INVOKEAI, SDNEXT, SD_SCRIPTS)} == {0}
        assert 0 < found[COMFYUI].matched < total
        assert all(found[name].notes for name in ALL if name != DIFFUSERS)


def test_a_file_of_the_miniature_is_judged_by_names_that_parse(tmp_path: Path) -> None:
    convolution = LowRank(torch.ones(2, 8, 3, 3), torch.ones(8, 2, 1, 1), 1.0)
    weights: AdapterWeights = {
        "unet": {
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": LowRank(
                torch.ones(2, 192), torch.ones(8, 2), 1.0
            ),
            "down_blocks.7.resnets.9.conv1": convolution,
        }
    }
    storage.FORMATS["kohya"].write(tmp_path / "a.safetensors", weights, "sd1", torch.float16, {})
    assert all(verdict.matched == 2 and not verdict.notes for verdict in verdicts_of_file(tmp_path / "a.safetensors"))


def test_files_that_cannot_be_judged_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"first_stage_model.x": torch.ones(1)}, path)
    with pytest.raises(ModelError, match=r"model\.safetensors: The file holds no layer"):
        verdicts_of_file(path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="is a pickle"):
        verdicts_of_file(path)
    with pytest.raises(ModelError, match="cannot be read: it is missing"):
        verdicts_of_file(tmp_path / "none.safetensors")


def tiny_weights(pipe: Any) -> list[tuple[str, str, Tensor, Tensor]]:
    """Component, path, down and up of a few layers of each kind in each component of a pipeline."""
    found = []
    for component, module in adapted.components(pipe).items():
        for name, child in module.named_modules():
            is_wanted = re.search(r"(mid_block\.a|up_blocks\.1\.r).+|encoder\.layers\.0\.", name)
            if is_wanted and isinstance(child, nn.Linear | nn.Conv2d):
                down, up = torch.randn(2, *child.weight.shape[1:]), torch.randn(child.weight.shape[0], 2)
                up = up.reshape(*up.shape, *(1 for _ in down.shape[2:]))
                found.append((component, plain_path(name), down, up))
    return found


CASES: dict[str, tuple[str, Callable[[str, str, str], str], tuple[str, ...]]] = {
    "kohya": ("sd1", lambda family, c, p: kohya(family)(c, p), KOHYA),
    "kohya, lora_te1_": ("sd1", lambda family, c, p: kohya(family, text_encoder="lora_te1")(c, p), KOHYA),
    "no text_model_": ("sd1", lambda family, c, p: without_text_model(kohya(family))(c, p), KOHYA),
    "original names, SD 1": ("sd1", lambda family, c, p: kohya(family, "ldm")(c, p), KOHYA),
    "original names, SDXL": ("sdxl", lambda family, c, p: kohya(family, "ldm")(c, p), KOHYA),
    "no text_model_, SDXL": ("sdxl", lambda family, c, p: without_text_model(kohya(family))(c, p), KOHYA),
    "lora_te_ on SDXL": ("sdxl", lambda family, c, p: kohya(family, text_encoder="lora_te")(c, p), KOHYA),
    "own names": ("sdxl", lambda family, c, p: dotted(c, p), PEFT),
}


@pytest.mark.parametrize("case", CASES)
def test_diffusers_itself_loads_as_many_layers_as_the_table_says(
    case: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    family, spell, leaves = CASES[case]
    tensors: dict[str, Tensor] = {}
    pipe = adapted.pipeline(family, bases)
    layers = tiny_weights(pipe)
    for component, path, down, up in layers:
        values = (down, up, torch.tensor(alpha_of(path)))
        tensors |= {f"{spell(family, component, path)}.{leaf}": v for leaf, v in zip(leaves, values, strict=False)}
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, {"lora_booth.versions": "{}"})
    verdict = next(v for v in verdicts_of_file(file, family) if v.loader == DIFFUSERS)
    try:
        pipe.load_lora_weights(file)
    except Exception:
        assert verdict.matched == 0 and re.search("refuses|stops", text_of(verdict))
        return
    scales = loaded_scales(pipe)
    assert len(scales) == verdict.matched > 0
    if leaves == KOHYA:
        wrong = re.search(r"(\d+) of \d+ layers, first [^,]+, get the commonest alpha", text_of(verdict))
        own = {f"{component}.{path}": alpha_of(path) / 2 for component, path, _, _ in layers}
        assert sum(scale != own[name] for name, scale in scales.items()) == int(wrong[1] if wrong else 0) > 0


def alpha_of(path: str) -> float:
    return 3.0 if "fc1" in path or "attn1.to_q" in path else 1.0


def loaded_scales(pipe: Any) -> dict[str, float]:
    """component.path of every layer that received non-zero factors, to its scale."""
    return {
        f"{component}.{plain_path(name)}": next(iter(child.scaling.values()))
        for component, module in adapted.components(pipe).items()
        for name, child in module.named_modules()
        if isinstance(child, LoraLayer) and any(factor.weight.abs().sum() > 0 for factor in child.lora_B.values())
    }


def test_every_row_names_its_source_and_place() -> None:
    assert len(LOADERS) == 8
    assert all(re.search(r"\d{4}-\d\d|\d\.\d", row.source) and row.folder for row in LOADERS)
    assert {row.folder for row in LOADERS if row.name in (A1111, FORGE, SDNEXT)} == {"models/Lora"}
    assert {spelling for row in LOADERS for spelling in row.spellings} <= SPELLINGS.keys()
    assert {factors for row in LOADERS for factors in row.factors} == {"down/up", "A/B", "A/B.default", "old"}
