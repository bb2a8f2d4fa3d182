"""From `model.base` to files on this machine: a folder, or one `.safetensors` file.

What lives here: names, paths, downloads, which files count, and the refusal of unsafe ones. What does not: what the
files mean (`identify.py`) and loading them (`models/families/components.py`). No torch, so that `plan` answers at once.

Rules: a local base never touches the network. Only safetensors weights are read; pickles are never opened and never
downloaded (CVE-2025-32434, CVE-2026-24747). Names in an index file must stay in its folder.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_booth.config import inputs
from lora_booth.config.settings import BASE_ALIASES, ModelConfig
from lora_booth.errors import ConfigError, DiskError, ModelError
from lora_booth.models.bases.architectures import components, is_text
from lora_booth.run import headers

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parents[2] / "assets" / "booth_mini"
SHIPPED_CONFIGS = Path(__file__).parents[2] / "assets" / "architectures"
"""Folders of component configs: for single-file checkpoints, which carry weights alone, and for aliases."""
SHIPPED = {"sd15": "sd1", "sd21": "sd2_v", "sdxl": "sdxl"}
"""Alias to its folder of configs, by which it is known before it is downloaded."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
SMALL_SUFFIXES = (".json", ".txt")
AGAIN = "copy or download the base again"
MAX_COMPARED = 200
"""Letters of a word that is no base, when names like it are looked for."""
BLOCK_BYTES = 64 * 1024
BLOCKS = 64
WHY_NO_PICKLE = (
    "a pickle file can run any program when it is opened, so lora_booth never opens one; get the .safetensors version, "
    "or convert it once in a place you trust (diffusers: from_pretrained / from_single_file, then "
    "save_pretrained(folder, safe_serialization=True)) and pass that folder"
)


@dataclass(frozen=True)
class Found:
    """Where a base was found: a folder or file here, and of a base of the hub its repository and commit."""

    path: Path
    repository: str | None = None
    revision: str | None = None


class _NotThere(ModelError):
    """A home that does not have the base; another one may."""


@dataclass(frozen=True)
class Weights:
    """The weight files of one component: its variant (None or "fp16") and the file, or the shards in order."""

    variant: str | None
    files: tuple[Path, ...]


def is_local(config: ModelConfig) -> bool:
    """Whether `model.base` is on this machine without any download: a path, or the miniature."""
    return config.base == "booth-mini" or (config.base not in BASE_ALIASES and os.path.exists(_path(config.base)))


def resolve(config: ModelConfig, *, needs_weights: bool = True, pinned: Found | None = None) -> Found:
    """The folder or `.safetensors` file that `model.base` means; a hub id is downloaded, nothing else uses the network.

    Order: alias, existing path, hub id. A folder that has the name of an alias is reached as `./name`. Without weights,
    a base that is not local is a folder of its configs: of an alias those that ship with lora_booth, of a hub id those
    few files of it. `pinned`: what a run that is continued began with; of a base of the hub the same commit is taken.
    """
    base = config.base
    if base == "booth-mini":
        _refuse_revision(config)
        if not inputs.is_plain_file(EMBEDDED / "model_index.json"):
            raise ModelError(f"model.base is booth-mini, but {EMBEDDED} is missing; install lora-booth again.")
        return Found(EMBEDDED)
    if is_local(config):
        _refuse_revision(config)
        return Found(_checked_local(_path(base)))
    if not needs_weights and base in SHIPPED and config.revision is None:
        return Found(SHIPPED_CONFIGS / SHIPPED[base])
    homes, revision = BASE_ALIASES.get(base, (base,)), config.revision
    if not all(map(is_hub_id, homes)):
        why = inputs.why_unreadable(_path(base))
        hint = _nearby(base) if why in (None, inputs.MISSING) else f" ({why})"
        raise ModelError(f'model.base "{inputs.shown(base)}" is no file or folder here{hint}.')
    if pinned is not None and pinned.repository in homes:
        homes, revision = (pinned.repository,), pinned.revision
    faults = []
    for repository in homes:
        try:
            return _download(repository, revision, config, needs_weights=needs_weights)
        except _NotThere as fault:
            faults.append(str(fault))
    raise ModelError("\n".join(faults))


def weight_stem(component: str) -> str:
    """The name of the weight file of a component, without ending, as diffusers and transformers write it."""
    return "model" if is_text(component) else "diffusion_pytorch_model"


def weighted() -> tuple[str, ...]:
    """The components that have weights, of all families."""
    return tuple(name for name in components() if not name.startswith(("tokenizer", "scheduler")))


def component_weights(folder: Path) -> Weights:
    """The safetensors files of the component in `folder`, full precision first, then fp16."""
    stem, odd = weight_stem(folder.name), []
    for variant in (None, "fp16"):
        dotted = "" if variant is None else f".{variant}"
        single, index = folder / f"{stem}{dotted}.safetensors", folder / f"{stem}.safetensors.index{dotted}.json"
        if inputs.is_plain_file(single):
            return Weights(variant, (single,))
        if inputs.is_plain_file(index):
            return Weights(variant, _shards(index))
        odd += [path for path in (single, index) if os.path.lexists(path)]
    for path in odd:  # a link into a cleaned cache, say, and nothing beside it
        inputs.require_plain_file(path, AGAIN, ModelError)
    pickles = [path.name for path in _listed(folder) if path.suffix in PICKLES]
    if pickles:
        raise ModelError(f"{folder} holds only {pickles[0]}: {WHY_NO_PICKLE}.")
    raise ModelError(f"{folder} has no {stem}.safetensors; the base is incomplete, copy or download it again.")


def weight_files(base: Path) -> list[Path]:
    """Every safetensors file that loading `base` reads, sorted."""
    if base.is_file():
        return [base]
    found = (component_weights(base / name).files for name in weighted() if (base / name).is_dir())
    return sorted(path for files in found for path in files)


def fingerprint(base: Path) -> str:
    """sha256 (hex) that tells bases apart, in milliseconds: headers, 64 blocks of 64 KiB of each weight file, configs.

    Small files count whole. Independent of where the base lies, and of a single file's name. Not promised: that two
    bases which differ only between the sampled blocks get different values; it is no protection against forgery.
    """
    digest = hashlib.sha256()
    for path in weight_files(base):
        digest.update(b"weights" if base.is_file() else path.relative_to(base).as_posix().encode())
        _digest_samples(path, digest)
    if base.is_dir():
        for path in small_files(base):
            digest.update(path.relative_to(base).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def small_files(base: Path) -> list[Path]:
    """The configs and vocabularies in a folder, sorted: all that counts besides weights. Nothing is opened."""
    found = [base / "model_index.json"]
    for name in components():
        found += [p for p in _listed(base / name) if p.suffix in SMALL_SUFFIXES and ".index" not in p.name]
    return sorted(found)


def require_small_files(base: Path) -> None:
    """Raises ModelError for a config or vocabulary that is no plain file, is too large to be one, or may not be read.

    The libraries that load a base open whatever lies in its folders: a named pipe would have them wait for ever.
    """
    for path in small_files(base):
        inputs.require_plain_file(path, AGAIN, ModelError)
        size = path.stat().st_size
        if size > inputs.MAX_BYTES:
            raise ModelError(f"{path} has {size} bytes, and no real one more than {inputs.MAX_BYTES}; {AGAIN}.")
        try:
            path.open("rb").close()
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({inputs.reason(error)}); {AGAIN}.") from error


def _listed(folder: Path) -> list[Path]:
    """What lies in `folder`, sorted; nothing where it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Tensor names with their shapes, and the metadata, of a safetensors file; a cut-off file is an error."""
    header = headers.read(path)
    return {name: entry.shape for name, entry in header.entries.items()}, header.metadata


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the base; a missing or broken file is an error that names it."""
    return inputs.read_object(path, "the base is incomplete or damaged, copy or download it again", ModelError)


def _refuse_revision(config: ModelConfig) -> None:
    if config.revision is not None:
        raise ConfigError(
            f"model.revision is {config.revision!r}, but model.base {config.base!r} is a local base, which has no "
            "revisions; remove model.revision."
        )


def _checked_local(path: Path) -> Path:
    if not path.is_dir():
        inputs.require_plain_file(path, "name a .safetensors file or a diffusers folder", ModelError)
        if path.suffix in PICKLES:
            raise ModelError(f"model.base {path} is a {path.suffix} file: {WHY_NO_PICKLE}.")
        if path.suffix != ".safetensors":
            raise ModelError(f"model.base {path} is no .safetensors checkpoint; pass one, or a diffusers folder.")
        return path
    why = inputs.why_unreadable(path / "model_index.json")
    if why is None:
        return path
    if why != inputs.MISSING:
        raise ModelError(f"model.base {path} cannot be read: its model_index.json: {why}; correct that.")
    checkpoints = sorted(p.name for p in path.glob("*.safetensors"))
    pickles = sorted(p.name for p in path.glob("*") if p.suffix in PICKLES)
    if checkpoints:
        advice = f'it holds {", ".join(checkpoints[:3])}: write model.base = "{path / checkpoints[0]}"'
    elif pickles:
        advice = f"it holds only {pickles[0]}: {WHY_NO_PICKLE}"
    else:
        advice = "pass the folder that holds unet/, vae/ and model_index.json"
    raise ModelError(f"model.base {path} is not a diffusers folder (no model_index.json); {advice}.")


def _path(base: str) -> Path:
    """`base` as a path; a home that nobody has stays a word."""
    return Path(os.path.expanduser(base))


def is_hub_id(name: str) -> bool:
    """True for `owner/name`, as the hub allows them."""
    part = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_])?"
    is_allowed = len(name) <= 96 and "--" not in name and ".." not in name
    is_file = name.endswith((".safetensors", ".git", *PICKLES))
    return is_allowed and not is_file and re.fullmatch(f"{part}/{part}", name) is not None


def _nearby(name: str) -> str:
    """' (nearest: …)' with aliases and neighbours in the folder whose names are close, or ''."""
    path = _path(name)
    near = difflib.get_close_matches(name[:MAX_COMPARED], BASE_ALIASES, n=2, cutoff=0.6)
    names = [p.name for p in _listed(path.parent)]
    near += [str(path.parent / n) for n in difflib.get_close_matches(path.name[:MAX_COMPARED], names, n=3, cutoff=0.6)]
    return f" (nearest: {', '.join(near)})" if near else ""


def _shards(index: Path) -> tuple[Path, ...]:
    """The files an index names, each a plain name whose file lies in the base."""
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise ModelError(f"{index} has no usable weight_map; copy or download the base again.")
    files = []
    for name in sorted(set(mapping.values())):
        path = index.parent / name
        if Path(name).name != name or "\\" in name or path.suffix != ".safetensors":
            raise ModelError(
                f"{index} names the file {inputs.shown(name)}; only .safetensors files beside it are read."
            )
        why = inputs.why_unreadable(path)
        if why is not None:
            shard = inputs.shown(name)
            raise ModelError(f"{index} names {shard}, which cannot be read: {why}; {AGAIN}.")
        if not path.resolve().is_relative_to(_root(index.parent.parent)):
            raise ModelError(f"{path} is a link that leads out of the base; put the file itself there.")
        files.append(path)
    return tuple(files)


def _root(base: Path) -> Path:
    """Where links of `base` may point: the base, or its repository in the hub's cache, whose snapshots are links."""
    base = base.resolve()
    return base.parent.parent if base.parent.name == "snapshots" else base


def _digest_samples(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= BLOCKS * BLOCK_BYTES:
            digest.update(file.read())
            return
        digest.update(file.read(min(8 + int.from_bytes(file.read(8), "little"), headers.MAX_HEADER_BYTES)))
        for i in range(BLOCKS):
            file.seek(i * (size - BLOCK_BYTES) // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))


def _download(repository: str, revision: str | None, config: ModelConfig, *, needs_weights: bool) -> Found:
    """The snapshot of `repository` in the hub's cache, fetched if need be; fp16 weights unless fp32 is asked for."""
    import huggingface_hub
    from huggingface_hub import errors

    where = repository if revision is None else f"{repository} (revision {revision})"
    # the HTTP client's own base, whose name differs between versions
    http_error: type[BaseException] = errors.HfHubHTTPError.__mro__[1]
    try:
        facts = huggingface_hub.HfApi().model_info(repository, revision=revision)
        names = [sibling.rfilename for sibling in facts.siblings or ()]
        small, weights = _wanted(names, where, prefer_fp16=config.precision != "fp32")
        wanted = [*small, *weights] if needs_weights else small
        folder = huggingface_hub.snapshot_download(repository, revision=facts.sha, allow_patterns=wanted)
        return Found(Path(folder), repository, facts.sha)
    except errors.GatedRepoError:
        raise _NotThere(
            f"{where} is gated: accept its licence on https://huggingface.co/{repository}, then `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        return _from_cache(
            repository,
            revision,
            f"model.base {where}: there is no such file or folder here, and no such public model on the hub"
            f"{_nearby(config.base)}; check the spelling, or run `hf auth login` if it is private.",
        )
    except errors.RevisionNotFoundError:
        raise _NotThere(f"model.revision {revision!r} does not exist in {repository}; correct it.") from None
    except (ConnectionError, TimeoutError, http_error, errors.LocalEntryNotFoundError) as error:
        return _from_cache(
            repository,
            revision,
            f"model.base {where} is not on this machine and the hub cannot be reached ({type(error).__name__}); go "
            "online once (unset HF_HUB_OFFLINE), or give a local folder or .safetensors file.",
        )
    except OSError as error:
        raise DiskError(
            f"{where} could not be stored ({error}); free some space, or point HF_HOME elsewhere."
        ) from None


def _from_cache(repository: str, revision: str | None, fault: str) -> Found:
    """What was downloaded before, when the hub cannot be reached or has it no longer; else raises `fault`."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        small = ["model_index.json", "*/*.json", "*/*.txt"]
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=small, local_files_only=True
        )
    except errors.LocalEntryNotFoundError:
        raise _NotThere(fault) from None
    log.warning("The hub does not answer for %s; using the copy that was downloaded before.", repository)
    return Found(Path(folder), repository, Path(folder).name)


def _wanted(names: list[str], where: str, *, prefer_fp16: bool) -> tuple[list[str], list[str]]:
    """Of a repository's files, what a diffusers base needs: configs and tokenizers; and one set of safetensors."""
    if "model_index.json" not in names:
        raise ModelError(f"{where} is not in diffusers format (no model_index.json); pass one .safetensors file of it.")
    small, weights = ["model_index.json"], []
    for name in names:
        folder, _, file = name.partition("/")
        if folder in components() and "/" not in file and file.endswith((".json", ".txt")):
            small.append(name)
    for component in weighted():
        stem = weight_stem(component)
        files = [n for n in names if n.startswith(f"{component}/")]
        if not files:
            continue
        number = r"(-\d{5}-of-\d{5})?"
        full = [n for n in files if re.fullmatch(rf"{component}/{stem}{number}\.safetensors", n)]
        half = [n for n in files if re.fullmatch(rf"{component}/{stem}\.fp16{number}\.safetensors", n)]
        if not full and not half:
            raise ModelError(f"{where} has no safetensors file for {component}: {WHY_NO_PICKLE}.")
        weights += half if half and (prefer_fp16 or not full) else full
    return small, weights
