"""From the name of an encoder of pictures to its folder on this machine.

The rules are those of bases: a folder never touches the network, only safetensors weights are read or downloaded, and
a repository that wants its own code run is refused.
"""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

from lora_booth.config import inputs
from lora_booth.errors import DiskError, ModelError
from lora_booth.models.bases.sources import WHY_NO_PICKLE, Found, is_hub_id

WEIGHTS = "model.safetensors"
CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
WANTED = (WEIGHTS, "*.json", "*.txt", "spiece.model", "tokenizer.model")
AGAIN = "copy or download the encoder again"


def resolve(name: str) -> Found:
    """The folder that `name` means: an existing one, or a hub id, "owner/name" or "owner/name@revision".

    Raises ModelError for a name that is neither, and for a folder that cannot be read without running what it brings.
    """
    path = Path(os.path.expanduser(name))
    repository, _, revision = name.partition("@")
    if os.path.lexists(path):
        found = Found(path)
    elif is_hub_id(repository):
        found = _download(repository, revision or None)
    else:
        raise ModelError(
            f'--encoder "{inputs.shown(name)}" is no folder here and no hub id; use miniature, efficientnet-lite2, a '
            "folder, or an id such as facebook/dino-vits16."
        )
    _require_safe(found.path, name)
    return found


def _require_safe(folder: Path, name: str) -> None:
    """Raises ModelError unless `folder` has weights in safetensors, plain files only, and asks for no code."""
    shown = f'--encoder "{inputs.shown(name)}"'
    if not os.path.isdir(folder):
        raise ModelError(f"{shown} is a file; name the folder that holds config.json and {WEIGHTS}.")
    for file in ("config.json", "preprocessor_config.json"):
        if not os.path.lexists(folder / file):
            raise ModelError(
                f"{shown} is no folder of an encoder of pictures: it has no {file}; name one that transformers wrote."
            )
    if not os.path.lexists(folder / WEIGHTS):
        raise ModelError(f"{shown} has no {WEIGHTS}: {WHY_NO_PICKLE}.")
    for path in sorted(folder.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in WANTED):
            inputs.require_plain_file(path, AGAIN, ModelError)
    for file in CONFIGS:
        if os.path.lexists(folder / file) and "auto_map" in inputs.read_object(folder / file, AGAIN, ModelError):
            raise ModelError(
                f"{shown} asks for code of its own ({file}: auto_map), which is never run; name an encoder that "
                "transformers itself knows."
            )


def _download(repository: str, revision: str | None) -> Found:
    """The snapshot of `repository` in the hub's cache, fetched if need be."""
    import huggingface_hub
    from huggingface_hub import errors

    where = repository if revision is None else f"{repository} (revision {revision})"
    # the HTTP client's own base, whose name differs between versions
    http_error: type[BaseException] = errors.HfHubHTTPError.__mro__[1]
    patterns = list(WANTED)
    try:
        facts = huggingface_hub.HfApi().model_info(repository, revision=revision)
        names = [sibling.rfilename for sibling in facts.siblings or ()]
        if WEIGHTS not in names:
            raise ModelError(f"--encoder {where} has no {WEIGHTS}: {WHY_NO_PICKLE}.")
        folder = huggingface_hub.snapshot_download(repository, revision=facts.sha, allow_patterns=patterns)
        return Found(Path(folder), repository, facts.sha)
    except errors.GatedRepoError:
        raise ModelError(
            f"--encoder {where} is gated: accept its licence on https://huggingface.co/{repository}, then "
            "`hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"--encoder {where}: there is no such revision; correct what follows @.") from None
    except (ConnectionError, TimeoutError, http_error, errors.LocalEntryNotFoundError) as error:
        fault = error
    except OSError as error:
        raise DiskError(
            f"{where} could not be stored ({error}); free some space, or point HF_HOME elsewhere."
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=patterns, local_files_only=True
        )
    except errors.LocalEntryNotFoundError:
        raise ModelError(
            f"--encoder {where} is not on this machine, and the hub does not give it ({type(fault).__name__}); check "
            "its spelling, go online once (unset HF_HUB_OFFLINE), or name a folder."
        ) from None
    return Found(Path(folder), repository, Path(folder).name)
