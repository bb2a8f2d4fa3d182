"""All settings of a run as one model, and contradictions between them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from lora_booth.config import inputs, names
from lora_booth.config.inputs import shown
from lora_booth.config.machine import MemoryConfig, RunConfig
from lora_booth.config.patterns import why_no_pattern
from lora_booth.config.results import EvaluateConfig, ExportConfig, PreviewConfig
from lora_booth.config.section import Section
from lora_booth.config.settings import (
    TARGET_PRESETS,
    AdapterConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PriorConfig,
    SubjectConfig,
    TrainConfig,
)
from lora_booth.errors import ConfigError


class Config(Section):
    """All settings of one run."""

    model: ModelConfig
    subject: SubjectConfig
    data: DataConfig = DataConfig()
    prior: PriorConfig = PriorConfig()
    adapter: AdapterConfig = AdapterConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    preview: PreviewConfig = PreviewConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    memory: MemoryConfig = MemoryConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _contradictions(self) -> Config:
        faults = contradictions(self)
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def has_prior(self) -> bool:
        """True when rows of the prior join the instance rows: class images, or pictures of the model's own prior."""
        return self.prior.mode in ("images", "model") and self.prior.loss_weight > 0

    @property
    def has_class_images(self) -> bool:
        """True when these rows are class images."""
        return self.has_prior and self.prior.mode == "images"

    @property
    def has_model_prior(self) -> bool:
        """True when these rows are held to what the base predicts."""
        return self.has_prior and self.prior.mode == "model"

    @property
    def name(self) -> str:
        """File-name-safe name of the result: `export.name`, else token and class noun."""
        if self.export.name is not None:
            return self.export.name
        words = f"{self.subject.token}_{self.subject.class_noun}"
        return "".join(c if c.isalnum() or c in "-_" else "_" for c in words)

    @property
    def folder(self) -> Path:
        """The run folder: `run.folder`, or runs/<name> in the current folder."""
        return self.run.folder or Path("runs") / self.name

    def fill(self, template: str) -> str:
        """`template` with the slots {token} and {class} replaced."""
        return template.replace("{token}", self.subject.token).replace("{class}", self.subject.class_noun)

    def with_values(self, values: Mapping[str, Mapping[str, Any]]) -> Self:
        """A copy with `values[section][key]` set and every check made again."""
        data = self.model_dump()
        for section, pairs in values.items():
            data[section].update(pairs)
        return type(self).model_validate(data)


def contradictions(config: Config) -> list[str]:
    """All faults that lie between the settings of `config`. Each line starts with the key to change."""
    prior, adapter, faults = config.prior, config.adapter, _prior_faults(config)
    if not adapter.targets.startswith("regex:") and adapter.targets not in TARGET_PRESETS:
        faults.append(f'adapter.targets is "{adapter.targets}"; use one of {", ".join(TARGET_PRESETS)}, or "regex:…".')
    faults += _pattern_faults(adapter)
    if config.objective.loss == "mse" and config.objective.huber_delta != 0.1:
        faults.append('objective.huber_delta is set but objective.loss is "mse"; set objective.loss = "huber".')
    faults += _embedding_faults(config)
    rates = config.optimizer.learning_rate, config.optimizer.text_encoder_learning_rate
    if config.optimizer.name == "prodigy" and config.optimizer.lora_plus_ratio != 1:
        faults.append(
            f'optimizer.name is "prodigy" but optimizer.lora_plus_ratio is {config.optimizer.lora_plus_ratio:g}; '
            "prodigy finds one rate for all, so set the ratio to 1."
        )
    if config.optimizer.name == "schedulefree" and config.optimizer.ema_decay is not None:
        faults.append(
            'optimizer.ema_decay is set but optimizer.name is "schedulefree", which averages by itself; leave one out.'
        )
    if config.optimizer.name == "prodigy" and adapter.text_encoder and rates[0] != rates[1]:
        faults.append(
            f"optimizer.text_encoder_learning_rate is {rates[1]:g} but optimizer.learning_rate is {rates[0]:g}; "
            "prodigy finds one rate for all, so set both to the same number (1 is usual)."
        )
    if adapter.dora and config.model.quantize != "none":
        faults.append(
            f'adapter.dora is true but model.quantize is "{config.model.quantize}"; DoRA needs the base\'s own '
            'weights, so set model.quantize = "none".'
        )
    if config.memory.offload_activations and config.train.gradient_checkpointing == 0:
        faults.append(
            "memory.offload_activations is true but train.gradient_checkpointing is 0, so no block has inputs to wait "
            "elsewhere; set train.gradient_checkpointing = 1, or memory.offload_activations = false."
        )
    faults += _objective_faults(config)
    own = [("subject.prompt", config.subject.prompt), *(("subject.templates", t) for t in config.subject.templates)]
    faults += [f'{key} "{shown(text)}" lacks the slot {{class}}; add it.' for key, text in own if "{class}" not in text]
    faults += _place_faults(config)
    templates = [(key, text, {"token", "class"}) for key, text in own]
    templates += [("prior.prompts", p, {"class"}) for p in prior.prompts]
    templates += [("prior.captions", p, {"class"}) for p in prior.captions]
    templates += [("preview.prompts", p, {"token", "class"}) for p in config.preview.prompts]
    templates += [("preview.negative_prompt", config.preview.negative_prompt, {"token", "class"})]
    for key, template, allowed in templates:
        faults.extend(slot_faults(key, template, allowed))
    if config.preview.images_per_prompt and not config.preview.prompts:
        faults.append(
            f"preview.prompts is empty but preview.images_per_prompt is {config.preview.images_per_prompt}; write a "
            "prompt, or set preview.images_per_prompt = 0."
        )
    return faults + _unwritable_words(config)


def _embedding_faults(config: Config) -> list[str]:
    """What is wrong with a word that is learnt, and what it cannot be combined with."""
    adapter, optimizer, token = config.adapter, config.optimizer, config.subject.token
    if adapter.embedding == "none":
        if adapter.embedding_vectors is None:
            return []
        told = f'adapter.embedding_vectors is {adapter.embedding_vectors} but adapter.embedding is "none"'
        return [f'{told}; set adapter.embedding = "too" or "only", or leave it out.']
    faults, because = [], f'but adapter.embedding is "{adapter.embedding}"'
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", token) or names.fault(token):
        faults.append(
            f'subject.token is "{shown(token)}" {because}, and programs call a learnt word by the name of its file; '
            "choose one of letters and digits."
        )
    if config.name.casefold() == token.casefold():
        faults.append(
            f'the adapter would be called "{config.name}", as the learnt word is; set export.name to another.'
        )
    if optimizer.name == "prodigy" and optimizer.embedding_learning_rate != optimizer.learning_rate:
        faults.append(
            f"optimizer.embedding_learning_rate is {optimizer.embedding_learning_rate:g} but optimizer.learning_rate "
            f"is {optimizer.learning_rate:g}; prodigy finds one rate for all, so set both to the same number."
        )
    if adapter.embedding == "too":
        if adapter.continue_from is not None:
            faults.append(f"adapter.continue_from is set {because}, whose word would begin anew; leave one out.")
        return faults
    own = ("embedding", "embedding_vectors")
    changed = [key for key, field in type(adapter).model_fields.items() if getattr(adapter, key) != field.default]
    faults += [
        f"adapter.{key} is set {because}, which trains no layers; leave it out." for key in changed if key not in own
    ]
    if optimizer.lora_plus_ratio != 1:
        faults.append(f"optimizer.lora_plus_ratio is set {because}, which trains no layers; leave it out.")
    if config.has_prior or config.prior.norm_weight > 0:
        faults.append(
            f'prior.mode is "{config.prior.mode}" {because}, and no prompt without the word can be forgotten then; set '
            'prior.mode = "none".'
        )
    return faults


def _objective_faults(config: Config) -> list[str]:
    """What is wrong between the settings of [objective]."""
    objective, faults = config.objective, []
    lowest, highest = objective.timestep_range
    if lowest >= highest:
        faults.append(
            f"objective.timestep_range is [{lowest:g}, {highest:g}], which holds no level; write the lower one first."
        )
    if objective.debiased and objective.min_snr_gamma is not None:
        faults.append(
            "objective.debiased is true and objective.min_snr_gamma is set, which are two weights of one loss; leave "
            "one out."
        )
    return faults


def _prior_faults(config: Config) -> list[str]:
    """What is wrong between the settings of [prior], and between them and others."""
    prior, faults = config.prior, []
    if config.has_class_images and prior.folder is None:
        if prior.num_images == 0:
            faults.append(
                f"prior.num_images is 0 but prior.loss_weight is {prior.loss_weight:g}; "
                'set prior.mode = "none", or draw some class images (200 is usual).'
            )
        if not prior.prompts or not all(p.strip() for p in prior.prompts):
            faults.append('prior.prompts has an empty prompt; write the class prompt, e.g. ["a photo of {class}"].')
    if prior.folder is not None and prior.mode != "images":
        faults.append(
            f'prior.folder is set but prior.mode is "{prior.mode}", which takes no class images; set prior.mode = '
            '"images", or leave prior.folder out.'
        )
    if config.has_model_prior:
        if not all(caption.strip() for caption in prior.captions):
            faults.append("prior.captions has an empty caption, which is asked for anyway; remove it.")
        named = [caption for caption in prior.captions if without_token(caption, config.subject.token) != caption]
        faults += [
            f'prior.captions "{shown(caption)}" names the subject, which the prior would keep from being learnt; write '
            "captions of other things."
            for caption in named[:3]
        ]
    if prior.mode == "weights" and prior.norm_weight == 0:
        faults.append('prior.norm_weight is 0 but prior.mode is "weights"; set it, 3e-4 or 3e-3 for a start.')
    if prior.mode == "none" and prior.norm_weight > 0:
        faults.append(
            f'prior.norm_weight is {prior.norm_weight:g} but prior.mode is "none"; set prior.mode = "weights".'
        )
    if prior.norm_weight > 0 and config.adapter.dora:
        faults.append(
            f"prior.norm_weight is {prior.norm_weight:g} but adapter.dora is true, whose update is no product of two "
            "factors; set prior.norm_weight = 0, or adapter.dora = false."
        )
    return faults


def without_token(text: str, token: str) -> str:
    """`text` without the word `token`, and without the space that it leaves."""
    rest, count = re.subn(rf"(?<!\w){re.escape(token)}(?!\w) ?", "", text, flags=re.IGNORECASE)
    return rest.rstrip() if count else text


def slot_faults(where: str, template: str, allowed: Collection[str]) -> list[str]:
    """What is wrong with the slots of a prompt or caption, one line each that begins with `where`."""
    slots = ", ".join("{" + name + "}" for name in sorted(allowed))
    rest = template
    for name in allowed:
        rest = rest.replace("{" + name + "}", "")
    unknown = re.findall(r"\{[^{}]*\}", rest)
    if unknown:
        return [f'{where} "{shown(template)}" has the slot {shown(slot)}; the slots are {slots}.' for slot in unknown]
    if "{" in rest or "}" in rest:
        return [f'{where} "{shown(template)}" has a broken slot, a brace without its partner; the slots are {slots}.']
    return []


def _pattern_faults(adapter: AdapterConfig) -> list[str]:
    targets = [adapter.targets.removeprefix("regex:")] if adapter.targets.startswith("regex:") else []
    patterns = {"targets": targets, "rank_pattern": adapter.rank_pattern, "alpha_pattern": adapter.alpha_pattern}
    found = ((key, why_no_pattern(text)) for key, texts in patterns.items() for text in texts)
    return [f"adapter.{key} {fault}" for key, fault in found if fault is not None]


def _place_faults(config: Config) -> list[str]:
    """Why the run folder and the files in it cannot have the names that they would have, on this system or another."""
    faults, name, folder = [], config.name, config.run.folder
    why = None if folder is None else names.folder_fault(folder)
    if folder is not None and why is not None:
        faults.append(f'run.folder "{shown(folder.name)}" {why}; choose another name.')
    if name.casefold() in names.OF_A_RUN:
        faults.append(f'the result would be called "{name}", as another file of a run is; set export.name to another.')
    elif (why := names.fault(name)) is not None:
        which = "export.name" if config.export.name is not None else "the name that subject.token and class_noun make"
        faults.append(f'{which} "{shown(name)}" {why}; set export.name to another.')
    return faults


def _unwritable_words(config: Config) -> list[str]:
    """Words and paths that no config file or file name can hold; see `inputs.word`."""
    faults = []
    for section, pairs in config:
        for key, value in pairs:
            words = value if isinstance(value, tuple | dict) else (value,)
            for word in words:
                try:
                    inputs.word(str(word) if isinstance(word, str | Path) else "", f"{section}.{key}")
                except ConfigError as error:
                    faults.append(str(error))
    return faults
