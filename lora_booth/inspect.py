"""What an adapter file is, without a base: layers, ranks, strength, dtype, and what it says of itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lora_booth import export, files
from lora_booth.adapter.weights import AdapterWeights, LowRank, delta, num_parameters, uses_dora
from lora_booth.report import Report

CONTEXT_WIDTHS = {192: "booth-mini", 768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
"""Width of the text embeddings that cross-attention reads, which tells the families apart."""
SHOWN_FIELDS = (
    "modelspec.title",
    "modelspec.architecture",
    "modelspec.trigger_phrase",
    "modelspec.date",
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_steps",
)


def inspect(path: Path, report: Report) -> None:
    """Tell about the adapter in `path`. Nothing in it is executed. Raises ModelError for a file that is no adapter."""
    weights, header = export.read(path), export.read_metadata(path)
    kind = "DoRA" if uses_dora(weights) else "LoRA"
    facts = {
        "file": f"{path.name}, {path.stat().st_size / 1e6:.1f} MB, {export.detect(path)} naming, {kind}",
        "base": base_family(weights),
        "sha256": files.sha256(path),
        "numbers": f"{num_parameters(weights):,}",
    }
    for component, layers in weights.items():
        facts[component] = _described(layers)
    facts |= {name: header[name] for name in SHOWN_FIELDS if name in header}
    width = max(map(len, facts))
    for name, text in facts.items():
        report.event("fact", f"{name:<{width}}  {text}", name=name, value=text)


def base_family(weights: AdapterWeights) -> str:
    """The family of the base, as far as the adapter's shapes tell."""
    layers = weights.get("unet", {})
    widths = {low.down.shape[1] for name, low in layers.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    if len(widths) != 1:
        return "unknown: no cross-attention keys or values are adapted"
    (width,) = widths
    return CONTEXT_WIDTHS.get(width, f"unknown: its text embeddings are {width} wide")


def _described(layers: dict[str, LowRank]) -> str:
    ranks = Counter(low.rank for low in layers.values())
    scales = sorted({round(low.scale, 6) for low in layers.values()})
    norm = max(float(delta(low).norm()) for low in layers.values())
    rank = ", ".join(f"{rank} ({count})" for rank, count in sorted(ranks.items()))
    scale = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    return f"{len(layers)} layers, rank {rank}, scale {scale}, largest change of a layer {norm:.3g} (Frobenius norm)"
