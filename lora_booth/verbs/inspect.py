"""What an adapter file is, without a base: kinds, ranks, norms, faults, header."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lora_booth.adapter.files import embedding, storage
from lora_booth.adapter.files.family import MINIATURE_WIDTH, family_of
from lora_booth.adapter.files.keys import is_norm
from lora_booth.adapter.programs.verdicts import tell_programs
from lora_booth.adapter.weights import AnyWeights, Dense, LowRank, block_of, context_width, norm_of, num_parameters
from lora_booth.config import names
from lora_booth.data import charts
from lora_booth.errors import ModelError
from lora_booth.models.bases.architectures import ARCHITECTURES
from lora_booth.run import disk
from lora_booth.run.report import Report

SHOWN_FIELDS = (
    "modelspec.title",
    "modelspec.architecture",
    "modelspec.trigger_phrase",
    "modelspec.date",
    "modelspec.author",
    "modelspec.license",
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_steps",
)
SHOWN_CHARACTERS = 200
"""A longer field of a header is cut; it is the author's text, not ours."""
TARGETS = {
    "attention": (".to_q", ".to_k", ".to_v", ".to_out.0", "_proj"),
    "feed-forward": (".ff.net.0.proj", ".ff.net.2", ".fc1", ".fc2"),
    "projection": (".proj_in", ".proj_out"),
}
"""What kind of layer a module path is, by its end; everything else is a convolution or an embedding."""
KINDS = {
    "loha": "LoHa",
    "lokr": "LoKr",
    "tucker": "LoRA with Tucker core",
    "diff": "full difference",
    "norm": "change of a normalisation",
    "bias": "change of a bias",
}
"""Dense.kind in a user's words."""
BAR_WIDTH = 24


def inspect(path: Path, report: Report, *, picture: Path | None = None) -> None:
    """Tell about the adapter in `path`, and draw the norms of its blocks into `picture`; nothing in it is executed.

    Faults inside the file are warnings. Raises ModelError for a file that is no adapter at all, ConfigError when
    `picture` exists.
    """
    if picture is not None:
        names.require_new(picture, "--picture")
    if embedding.is_one(path):
        if picture is not None:
            raise ModelError(f"{path.name} is a learnt word, which has no blocks to draw; leave out --picture.")
        _inspect_word(path, report)
        return
    found = storage.contents(path)
    weights = found.weights
    kinds = Counter(_kind(update) for layers in weights.values() for update in layers.values())
    facts = {
        "file": f"{path.name}, {path.stat().st_size / 1e6:.1f} MB, {found.naming} naming, {_counted(kinds)}",
        "base": base_family(weights, found.header),
        "sha256": disk.sha256(path),
        "numbers": f"{num_parameters(weights):,} in {_counted(found.dtypes)}",
    }
    for component, layers in weights.items():
        facts[component] = _described(layers)
    told = embedding.told_beside(found.header)
    facts |= {} if told is None else {"word": f"learnt with it, in {told[0]}; without that file it is half of a whole"}
    facts |= {name: _cut(found.header[name]) for name in SHOWN_FIELDS if name in found.header}
    _tell(facts, report)
    norms = block_norms(weights)
    _tell_norms(norms, report)
    for fault in found.faults:
        report.warn(fault)
    with suppress(ModelError):  # of an unknown family nothing can be said
        tell_programs(path, None, report)
    if picture is not None:
        if not norms:
            raise ModelError(f"{path.name} has no sound layer, so {picture} was not drawn.")
        charts.save_bars(norms, picture, title=path.name, unit="change of the weights, Frobenius norm")
        report.event("picture", f"norms of the blocks: {picture}", path=str(picture))


def _inspect_word(path: Path, report: Report) -> None:
    """Tell about the learnt word in `path`. Raises ModelError for a damaged one."""
    found = embedding.read(path)
    vectors = "1 vector" if found.num_vectors == 1 else f"{found.num_vectors} vectors"
    family, width = embedding.family_of(found), next(iter(found.vectors.values())).shape[1]
    small = "booth-mini" if width == MINIATURE_WIDTH else f"unknown: its vectors have {width} numbers"
    facts = {
        "file": f"{path.name}, {path.stat().st_size / 1e3:.1f} kB, a learnt word (textual inversion)",
        "word": f"{found.word}, {vectors} of a prompt",
        "base": small if family is None else ARCHITECTURES[family].label,
        "sha256": disk.sha256(path),
    }
    for name, rows in found.vectors.items():
        lengths = ", ".join(f"{length:.3g}" for length in rows.norm(dim=-1).tolist())
        facts[name] = f"{rows.shape[1]} numbers each, of length {lengths}"
    _tell(facts | {name: _cut(found.header[name]) for name in SHOWN_FIELDS if name in found.header}, report)
    if family is not None:
        for program, (place, written) in embedding.PLACE.items():
            report.event("program", f"{program}: {place}; a prompt says {written.format(word=path.stem)}")


def _tell(facts: Mapping[str, str], report: Report) -> None:
    width = max(map(len, facts))
    for name, text in facts.items():
        report.event("fact", f"{name:<{width}}  {text}", name=name, value=text)


def base_family(weights: AnyWeights, header: Mapping[str, str]) -> str:
    """The family of the base in a user's words, as far as the adapter's shapes, names and header tell."""
    width, family = context_width(weights), family_of(weights, header)
    if width == MINIATURE_WIDTH:
        return "booth-mini"
    if family is not None:
        return ARCHITECTURES[family].label
    return "unknown: " + (f"its text embeddings are {width} wide" if width else "its layers are those of several")


def block_norms(weights: AnyWeights) -> dict[str, float]:
    """Block to the Frobenius norm of all that the adapter adds there, at strength 1, in the order of the model."""
    squares: Counter[str] = Counter()
    for component, layers in weights.items():
        for path, update in layers.items():
            squares[block_of(component, path)] += norm_of(update) ** 2  # type: ignore[assignment]
    order = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out")
    place = {name: number for number, name in enumerate(order)}
    blocks = sorted(squares, key=lambda name: (place.get(name.split(".")[0], len(order)), name))
    return {name: math.sqrt(squares[name]) for name in blocks}


def _tell_norms(norms: Mapping[str, float], report: Report) -> None:
    width, largest = max(map(len, norms), default=0), max(norms.values(), default=0.0)
    for name, norm in norms.items():
        bar = "█" * round(BAR_WIDTH * norm / largest) if largest > 0 and math.isfinite(norm / largest) else ""
        report.event("block", f"{name:<{width}}  {bar:<{BAR_WIDTH}} {norm:.3g}", name=name, norm=norm)


def _kind(update: LowRank | Dense) -> str:
    if isinstance(update, LowRank):
        name = "LoRA" if update.magnitude is None else "DoRA"
    else:
        name = KINDS[update.kind] + ("" if update.magnitude is None else " with DoRA")
    return f"{name} over the inputs" if update.over_inputs else name


def _counted(counts: Mapping[str, int]) -> str:
    """ "LoRA", or "LoRA (12), DoRA (3)" when there are several."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "no sound layer"


def _described(layers: Mapping[str, LowRank | Dense]) -> str:
    ranks = Counter(update.rank for update in layers.values())
    rank = ", ".join(f"{rank} ({count})" for rank, count in sorted(ranks.items(), key=str))
    scales = sorted({round(update.scale, 6) for update in layers.values() if isinstance(update, LowRank)})
    scale = "" if not scales else f", scale {scales[0]:g}" + (f" to {scales[-1]:g}" if len(scales) > 1 else "")
    norm = max(norm_of(update) for update in layers.values())
    targets = _counted(Counter(_target(path) for path in layers))
    return f"{len(layers)} layers, rank {rank}{scale}, {targets}; largest change of a layer {norm:.3g}"


def _target(path: str) -> str:
    if is_norm(path) or path.endswith(".bias"):
        return "normalisation or bias"
    for name, endings in TARGETS.items():
        if f".{path}".endswith(endings):
            return name
    return "convolution or embedding"


def _cut(text: str) -> str:
    """One line of printable text, of an author who may be anyone."""
    plain = "".join(c if c.isprintable() else " " for c in text[: SHOWN_CHARACTERS + 1])
    return plain if len(plain) <= SHOWN_CHARACTERS else plain[:SHOWN_CHARACTERS] + "…"
