"""What an adapter file says of itself: ModelSpec 1.0.1 and the kohya fields.

They are the fields that programs read, in their types.

Every value is text. Never written: absolute paths (a path is cut to its last part), user names, machine names.

| fields | who reads them |
|---|---|
| modelspec.* | Forge and SD.Next (architecture), model browsers, sharing sites |
| ss_base_model_version, ss_v2 | A1111, Forge, SD.Next: without them an SDXL adapter is filed under SD 1 and hidden |
| ss_network_module, ss_network_dim, ss_network_alpha | A1111's table, kohya's resize and merge |
| ss_output_name | A1111, Forge: the name in `<lora:name:1>` |
| ss_tag_frequency, ss_dataset_dirs, ss_training_* and the rest of ss_* | A1111's and Forge's details dialog |
| sshs_model_hash, modelspec.hash_sha256 | A1111, Forge: "Lora hashes" in picture infos (added by `with_metadata`) |
| lora_booth.config, lora_booth.identity, lora_booth.versions | lora_booth |

Sources: Stability-AI/ModelSpec README; sd-scripts train_network.py and library/train_util.py (field names and formats).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from lora_booth.adapter.weights import AdapterWeights
from lora_booth.config.config import Config
from lora_booth.models.bases.architectures import ARCHITECTURES, PredictionType
from lora_booth.run import headers
from lora_booth.run.identity import settings

STALE_FIELDS = (
    "modelspec.hash_sha256",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "lora_adapter_metadata",
    "ss_network_args",
    "lora_booth.scales",
)
"""Fields that say nothing true of other tensors: hashes, scales that are in the tensors now, the source's kind."""
SCALES_FIELD = "lora_booth.scales"
"""Says that a file which states no alpha needs none."""
MAX_HEADER_BYTES = 1 << 20
"""ComfyUI shows no metadata of a file whose header is longer."""
_MAX_CONFIG_BYTES = 1 << 18


@dataclass(frozen=True)
class Facts:
    """What happened in a run, as far as a file tells it. `started_at`, in seconds since 1970, is the only time in a
    file: a run that is finished again, or exported again, gives the same bytes, and so do two runs that began in the
    same second. `identity`: digest of all that the result depends on (`run/identity.py`)."""

    family: str
    prediction_type: PredictionType
    config: Config
    steps: int
    num_instance_images: int
    num_class_images: int
    resolution_px: int
    started_at: float
    identity: str
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(width, height) to images in it."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package to version, lora_booth's first."""
    strength: float = 1.0
    """By which the trained update was multiplied; it is in the tensors."""
    words: Sequence[str] = ()
    """What prompts say to call each of several subjects; none where there is one."""

    @property
    def trigger(self) -> str:
        """What prompts say, of several subjects one or the other."""
        return ", ".join(self.words) or trigger_words(self.config)


def metadata(facts: Facts) -> dict[str, str]:
    """The header of the adapter file, without what its tensors tell: `network_fields` and `with_metadata` add that."""
    fields = base_fields(facts.family, facts.prediction_type, facts.config.name)
    return fields | _modelspec(facts) | _kohya_base(facts) | _kohya_training(facts) | _own(facts)


def base_fields(family: str, prediction_type: PredictionType, name: str) -> dict[str, str]:
    """What programs sort and label an adapter by, without a training: its base's kind and its own `name`."""
    row = ARCHITECTURES[family]
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": row.modelspec[prediction_type],
        "implementation": row.implementation,
        "title": name,
        "prediction_type": {"v_prediction": "v"}.get(prediction_type, prediction_type),
    }
    version = row.kohya_version
    if prediction_type == "v_prediction" and not row.has_original_names:
        version += "_v"
    return {f"modelspec.{key}": value for key, value in fields.items()} | {
        "ss_base_model_version": version,
        "ss_v2": str(family == "sd2"),
        "ss_network_module": "networks.lora",
        "ss_output_name": name,
        "ss_clip_skip": "None",
    }


def prediction_of(header: Mapping[str, str]) -> PredictionType:
    """What the base of an adapter predicts, as far as the header tells: noise where it says nothing."""
    said = header.get("modelspec.prediction_type", "")
    if said == "v" or header.get("ss_base_model_version", "").endswith("_v"):
        return "v_prediction"
    return "flow" if said == "flow" else "epsilon"


def network_fields(weights: AdapterWeights) -> dict[str, str]:
    """Rank and alpha of finished weights; "Dynamic" where layers differ, alpha also where ranks do."""
    layers = [low_rank for layers in weights.values() for low_rank in layers.values()]
    ranks = {low_rank.rank for low_rank in layers}
    alphas = {round(low_rank.scale * low_rank.rank, 6) for low_rank in layers}
    has_one_rank = len(ranks) == 1
    return {
        "ss_network_dim": str(ranks.pop()) if has_one_rank else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if has_one_rank and len(alphas) == 1 else "Dynamic",
    }


def carried(fields: Mapping[str, str]) -> dict[str, str]:
    """What still holds of a file's header when its tensors are written anew."""
    return {name: value for name, value in fields.items() if name not in STALE_FIELDS}


def with_metadata(body: bytes, fields: Mapping[str, str]) -> bytes:
    """A safetensors file's bytes with `fields` as its metadata, by name, and the SHA-256 of its data among them.

    The library writes fields in another order each time. The data, and so the hash, do not depend on them.
    """
    end = headers.data_start(body)
    digest = hashlib.sha256(body[end:]).hexdigest()
    fields = {**fields, "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    header = {"__metadata__": dict(sorted(fields.items())), **headers.unchecked(body)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned to 8 bytes, as the library has them
    return len(text).to_bytes(8, "little") + text + body[end:]


def trigger_words(config: Config) -> str:
    """What a prompt must say to call the subject: token and class noun."""
    return f"{config.subject.token} {config.subject.class_noun}"


def resolved_config(config: Config) -> dict[str, Any]:
    """The settings that the result depends on, as JSON values, every path cut to its last part."""
    values = config.model_dump()
    data: dict[str, Any] = {
        section: {key: _shown(values[section][key]) for key in pairs} for section, pairs in settings(config).items()
    }
    data["model"]["base"] = base_name(config.model.base)
    return data


def base_name(base: str) -> str:
    """A hub id as it is; of a path only the last part, whichever system it is from."""
    is_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) and not base.endswith((".safetensors", ".ckpt"))
    parts = [part for part in re.split(r"[/\\]", base) if part]
    return base if is_hub_id or not parts else parts[-1]


def _modelspec(facts: Facts) -> dict[str, str]:
    config, words = facts.config, facts.trigger
    started = datetime.fromtimestamp(int(facts.started_at), UTC)
    fields = {
        "resolution": f"{facts.resolution_px}x{facts.resolution_px}",
        "date": started.strftime("%Y-%m-%dT%H:%M:%S"),
        "trigger_phrase": words,
        "usage_hint": f"Trigger word: {words}",
        "tags": config.subject.class_noun,
    }
    fields |= {key: value for key in ("author", "license") if (value := getattr(config.export, key))}
    return {f"modelspec.{key}": value for key, value in fields.items()}


def _kohya_base(facts: Facts) -> dict[str, str]:
    fields = {"ss_sd_model_name": base_name(facts.config.model.base)}
    return fields


def _kohya_training(facts: Facts) -> dict[str, str]:
    """What programs show in a table. `1_<trigger words>` is the name SD.Next takes repeats and tag from."""
    config, words, count = facts.config, trigger_words(facts.config), facts.num_instance_images
    rate = config.optimizer.learning_rate
    text_rate = config.optimizer.text_encoder_learning_rate if config.adapter.text_encoder else None
    fields: dict[str, object] = {
        "training_started_at": float(facts.started_at),
        "resolution": (facts.resolution_px, facts.resolution_px),
        "num_train_images": count,
        "num_reg_images": facts.num_class_images,
        "steps": facts.steps,
        "learning_rate": rate,
        "unet_lr": rate,
        "text_encoder_lr": text_rate,
        "optimizer": config.optimizer.name,
        "lr_scheduler": config.optimizer.schedule,
        "seed": config.train.seed,
        "batch_size_per_device": config.train.batch_size,
        "noise_offset": config.objective.noise_offset,
        "min_snr_gamma": config.objective.min_snr_gamma,
        "debiased_estimation": config.objective.debiased,
        "prior_loss_weight": config.prior.loss_weight,
        "dataset_dirs": json.dumps({f"1_{words}": {"n_repeats": 1, "img_count": count}}),
        "tag_frequency": json.dumps({f"1_{words}": {words: count}}),
    }
    if facts.buckets:
        fields["bucket_info"] = json.dumps({"buckets": _buckets(facts.buckets), "mean_img_ar_error": 0.0})
    return {f"ss_{key}": str(value) for key, value in fields.items()}


def _buckets(buckets: Mapping[tuple[int, int], int]) -> dict[str, dict[str, Any]]:
    return {str(i): {"resolution": list(size), "count": count} for i, (size, count) in enumerate(buckets.items())}


def _own(facts: Facts) -> dict[str, str]:
    text = json.dumps(resolved_config(facts.config), sort_keys=True)
    if len(text) > _MAX_CONFIG_BYTES:
        text = json.dumps({"left out": f"{len(text)} bytes; a header must stay under {MAX_HEADER_BYTES}"})
    fields = {"lora_booth.config": text, "lora_booth.identity": facts.identity}
    fields |= {"lora_booth.strength": f"{facts.strength:g}"} if facts.strength != 1 else {}
    return fields | {"lora_booth.versions": json.dumps(dict(facts.versions))}


def _shown(value: Any) -> Any:
    if isinstance(value, PurePath):
        return base_name(f"/{value}")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_shown(item) for item in value]
    return value
