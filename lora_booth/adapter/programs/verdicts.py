"""What each program will do with an adapter file.

It is told from the file's keys, shapes and header: how many layers find their place, whether at the right strength, and
what to do where not.

The programs' rules are in `table.py`. A table cannot see everything; not told are: dtypes (a bf16 file loses
0.5 % of its change in every program), an alpha that is stored but wrong (diffusers' convert_state_dict_to_kohya writes
the rank, whatever the alpha was), shapes that do not fit the base, and what newer versions do.

A base of another size than the released ones, as the miniature, has a layout that is not known here: every name that
parses counts as present in it, and whether InvokeAI would recognise it is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_booth.adapter.files import storage
from lora_booth.adapter.files.keys import is_norm
from lora_booth.adapter.programs.rules import CONVERT, RESIZE, alpha_over_rank
from lora_booth.adapter.programs.spelling import TEXT_PROJECTION, AdapterFile, Layer, Shape, adapter_file
from lora_booth.adapter.programs.table import LOADERS, Loader
from lora_booth.errors import ModelError
from lora_booth.models.bases.architectures import ARCHITECTURES
from lora_booth.run.report import Report


@dataclass(frozen=True)
class Verdict:
    """What one program makes of a file.

    `matched`, `total`: layers that load, of the layers in the file. `is_exact`: something loads, and all that loads has
    the strength and form that the file states. `notes`: one sentence each, empty when there is nothing to say.
    `folder`: where the file goes, relative to the program, or how it is given to it.
    """

    loader: str
    matched: int
    total: int
    is_exact: bool
    notes: tuple[str, ...]
    folder: str


def verdicts(
    shapes: Mapping[str, Shape],
    *,
    family: str | None = None,
    metadata: Mapping[str, str] | None = None,
    alphas: Mapping[str, float] | None = None,
) -> list[Verdict]:
    """One verdict for each row of LOADERS on a file with these keys.

    `shapes`: key to shape, of tensors or from a safetensors header. `family`: of the base; told from the shapes where
    None. `metadata`: the header's fields. `alphas`: key (`….alpha`) to value; where one is missing, its value is not
    judged. Raises ModelError when no key belongs to a layer, the family cannot be told or is not the file's, or the
    header's `lora_adapter_metadata` is broken.
    """
    file = adapter_file(shapes, family, metadata or {}, alphas or {})
    return [_verdict(loader, file) for loader in LOADERS]


def verdicts_of_file(path: Path, family: str | None = None) -> list[Verdict]:
    """`verdicts` on a safetensors file; of its tensors only the alphas are read, and nothing in it is executed.

    Raises ModelError as `verdicts` does, and for a file that is missing, a pickle or cut off.
    """
    with storage.opened(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        types = {key: file.get_slice(key).get_dtype() for key in shapes if key.endswith(".alpha")}
        scalars = [key for key, dtype in types.items() if dtype in storage.REAL and math.prod(shapes[key]) == 1]
        alphas = {key: float(file.get_tensor(key)) for key in scalars}
        header = dict(file.metadata() or {})
    try:
        return verdicts(shapes, family=family, metadata=header, alphas=alphas)
    except ModelError as error:
        raise ModelError(f"{path.name}: {error}") from error


def _verdict(loader: Loader, file: AdapterFile) -> Verdict:
    total = len(file.layers)
    if file.family not in loader.unet_namings:
        note = f"what {loader.name} makes of adapters for {ARCHITECTURES[file.family].label} is not known here."
        return Verdict(loader.name, 0, total, False, (note,), loader.folder)
    lost: dict[str, list[Layer]] = {}
    wrong: dict[str, list[Layer]] = {}
    for layer in file.layers:
        if reason := _why_lost(loader, file, layer):
            lost.setdefault(reason, []).append(layer)
        elif reason := _why_wrong(loader, file, layer):
            wrong.setdefault(reason, []).append(layer)
    refusal = _refusal(loader, file, lost)
    if refusal:
        return Verdict(loader.name, 0, total, False, (refusal,), loader.folder)
    matched = total - sum(map(len, lost.values()))
    notes = [_note(_LOST[reason], loader, file, layers) for reason, layers in lost.items()]
    notes += [_note(_wrong_text(reason, loader), loader, file, layers) for reason, layers in wrong.items()]
    if matched:
        notes += [text for rule in (*loader.remarks, _foreign, _unstated) if (text := rule(file))]
    return Verdict(loader.name, matched, total, bool(matched) and not wrong, tuple(notes), loader.folder)


def _refusal(loader: Loader, file: AdapterFile, lost: Mapping[str, list[Layer]]) -> str | None:
    """Why the program loads nothing at all, None when it loads what it can."""
    text = next((text for rule in loader.refusals if (text := rule(file))), None)
    unmatched = [
        key
        for reason, layers in lost.items()
        for layer in layers
        for key in layer.keys
        if reason != "kind" or not key.endswith((".alpha", ".dora_scale"))  # which it looks up for every layer
    ] + list(file.foreign)
    if text or loader.max_unmatched is None or len(unmatched) <= loader.max_unmatched:
        return text
    return (
        f"{loader.name} loads nothing: {len(unmatched)} keys, first {unmatched[0]}, have no place in its model, and "
        f"with more than {loader.max_unmatched} such keys it gives up; {CONVERT}."
    )


_RESIZED = ("LoCon with lora_mid", "LoHa", "LoKr", "LoKr with Tucker core", "full difference")
_LOST = {
    "base": "have no place in a {base} base: the file is of another family, or its names are damaged",
    "half": "lack one of their factors: the file is damaged or cut off; export it again",
    "spelling": "are lost, as {loader} does not look up names of this kind: {convert}",
    "kind": "are lost, being {kind}, which {loader} does not read: {resize}",
    "factors": "are lost, as {loader} knows no factors of these names: {convert}",
    "naming": "are lost, as {loader} knows {base} by other block names: {convert}",
    "prefix": "are lost, as they begin with {prefix}, not {prefixes} as {loader} expects: {convert}",
    "text_model": "are lost, as their names lack the part text_model_: {convert}",
    "norm": "are lost, as {loader} has no names for the normalisations of this text encoder",
    "nameless": "are lost, as {loader} has no name for them: train within attentions, resnets and samplers only",
    "fused": "are lost, as {loader} changes this attention only when q, k, v and out are all adapted: adapt all four",
}
"""Reason to what happens and how to avoid it; `_note` puts the count in front."""


def _why_lost(loader: Loader, file: AdapterFile, layer: Layer) -> str | None:
    """The first reason in _LOST why the program leaves the layer as it is, None when it loads."""
    is_text = layer.is_text
    projections = file.text_attention.get((layer.component, layer.path.rpartition(".")[0]), set())
    # LyCORIS' prefix was measured on diffusers names of the UNet alone.
    is_other_lycoris = layer.spelling == "lycoris" and (is_text or layer.naming == "ldm")
    has_full_name = layer.has_text_model or layer.path == TEXT_PROJECTION
    is_other_generic = layer.spelling == "generic" and not is_text and layer.naming != "ldm"
    reasons = {
        "base": not file.is_in_base(layer),
        "half": layer.kind == "half",
        "spelling": layer.spelling not in loader.spellings or is_other_lycoris or is_other_generic,
        "kind": layer.kind not in loader.kinds,
        "factors": layer.factors not in loader.factors,
        "naming": not is_text and layer.spelling == "kohya" and layer.naming not in loader.unet_namings[file.family],
        "prefix": is_text and layer.prefix not in {"", *loader.text_prefixes[file.family]},
        "text_model": layer.component in loader.needs_text_model and not has_full_name,
        "norm": is_norm(layer.path) and (file.family, layer.component) in loader.lacks_norms,
        "nameless": layer.path in loader.nameless.get((file.family, layer.naming), ()),
        "fused": (file.family, layer.component) in loader.fused_attention and 0 < len(projections) < 4,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _why_wrong(loader: Loader, file: AdapterFile, layer: Layer) -> str | None:
    """Why a layer that loads gets another strength or form than the file states: a reason of _wrong_text, or None."""
    if layer.dora_axis and not loader.keeps_dora(layer):
        return "dora"
    if layer.kind in loader.changed_kinds:
        return "kind"
    if "diff_b" in layer.leaves and layer.kind not in (*loader.biases, "bias alone"):
        return "bias"
    if "scale" in layer.leaves and not loader.reads_scale_tensor:
        return "scale tensor"
    if not layer.rank:
        return None
    given, has_alpha = loader.scale(file, layer), "alpha" in layer.leaves
    in_header = None if has_alpha else file.header_scale(layer.component, layer.path, layer.rank)
    stated = alpha_over_rank(file, layer) if in_header is None else in_header
    if given is not None and stated is not None and not math.isclose(stated, given, rel_tol=1e-3):
        return "strength" if in_header is None else "header"
    has_no_alphas = layer.spelling.startswith(("dotted", "bare")) or layer.spelling == "processor"
    is_unstated = not has_alpha and in_header is None and not has_no_alphas
    return "no alpha" if is_unstated else None


def _wrong_text(reason: str, loader: Loader) -> str:
    return {
        "dora": "are DoRA, whose magnitudes {loader} ignores or applies otherwise: load lora_booth's diffusers format "
        "in diffusers, or train without DoRA",
        "kind": "are {kind}, which {loader} takes for another limit than they were trained with",
        "bias": "also change biases, which {loader} leaves as they are",
        "scale tensor": "carry a tensor called scale, which {loader} ignores: store alpha instead",
        "no alpha": "have no alpha and load at scale 1: right only if the scale is in lora_up already; else export the "
        "file again with alphas",
        "header": "load at scale 1, as {loader} does not read the alpha in the header: {convert}",
        "strength": loader.strength,
    }[reason]


def _note(text: str, loader: Loader, file: AdapterFile, layers: list[Layer]) -> str:
    filled = text.format(
        loader=loader.name,
        base=ARCHITECTURES[file.family].label,
        convert=CONVERT,
        kind=layers[0].kind,
        resize=f"{RESIZE} of them" if layers[0].kind in _RESIZED else "nothing converts them",
        prefix=layers[0].prefix,
        prefixes=" or ".join(sorted(loader.text_prefixes[file.family])),
    )
    return f"{len(layers)} of {len(file.layers)} layers, first {layers[0].name}, {filled}."


def _foreign(file: AdapterFile) -> str | None:
    others = [key for key in file.foreign if not key.startswith("bundle_emb")]
    return f"{len(others)} keys, first {others[0]}, belong to no layer and are ignored." if others else None


def _unstated(file: AdapterFile) -> str | None:
    """PEFT stores no alpha among its tensors; in lora_booth's files the scale is in lora_B."""
    is_ours = any(key.startswith("lora_booth.") for key in file.header)
    spellings = ("dotted", "dotted attention", "dotted text", "bare", "bare attention")
    peft = [layer for layer in file.layers if layer.spelling in spellings]
    if is_ours or "lora_adapter_metadata" in file.header or all("alpha" in layer.leaves for layer in peft):
        return None
    return (
        "The file states no alpha, so every program takes scale 1; if it was trained with another, save it with its "
        "metadata or export it again."
    )


def tell_programs(path: Path, family: str | None, report: Report, *, only: Container[str] | None = None) -> None:
    """One line for each program, or for those in `only`: how many layers it takes, where the file goes, what is lost.

    `family`: None when the file must tell it. Raises ModelError as `verdicts_of_file` does.
    """
    verdicts = [verdict for verdict in verdicts_of_file(path, family) if only is None or verdict.loader in only]
    width = max(len(verdict.loader) for verdict in verdicts)
    texts = [_outcome(verdict) for verdict in verdicts]
    text_width = max(map(len, texts))
    report.event("programs", f"layers of {path.name} that a program takes, and where to put the file:")
    for verdict, text in zip(verdicts, texts, strict=True):
        line = f"  {verdict.loader:<{width}}  {text:<{text_width}}  {verdict.folder}"
        report.event(
            "program",
            line,
            loader=verdict.loader,
            matched=verdict.matched,
            total=verdict.total,
            is_exact=verdict.is_exact,
            notes=list(verdict.notes),
        )
        for note in verdict.notes:
            report.event("note", f"  {'':<{width}}  {note}", loader=verdict.loader)


def _outcome(verdict: Verdict) -> str:
    if not verdict.matched:
        return f"none of {verdict.total}"
    return f"{verdict.matched} of {verdict.total}" + ("" if verdict.is_exact else ", changed")
