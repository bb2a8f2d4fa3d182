"""Configs read and written: a TOML file and `section.key=value` in, a `Config` out."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lora_booth.config import inputs
from lora_booth.config.config import Config
from lora_booth.config.section import Precision
from lora_booth.config.settings import BASE_ALIASES, ModelConfig
from lora_booth.errors import ConfigError

Values = dict[str, Any]


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config of a TOML file (or of nothing) with `overrides` on top, each "section.key=value" with a TOML value.

    Raises ConfigError listing every fault at once. Relative paths mean: relative to the current folder.
    """
    values = tables(path)
    faults = _apply_(values, overrides)
    if path is not None and path.name == "config.toml" and inputs.is_plain_file(path.parent / "inputs.json"):
        run = values.setdefault("run", {})  # of a run, which lies where it lies
        if isinstance(run, dict):
            run.setdefault("folder", str(path.parent))
    return build(values, source=str(path) if path is not None else "the command line", faults=faults)


def tables(path: Path | None) -> Values:
    """The tables of a TOML file, unchecked; of none, no tables. Raises ConfigError where it cannot be read."""
    return {} if path is None else _read_toml(path)


def build(values: Values, *, source: str, faults: Sequence[str] = ()) -> Config:
    """`values[section][key]` as a checked Config. `faults` found before are reported together with the new ones."""
    found = list(faults)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        found += _messages(error)
        found += _later_messages(values, error)
    found = list(dict.fromkeys(found))
    if found:
        count = f"{len(found)} faults" if len(found) > 1 else "a fault"
        lines = "\n".join(f"  {line}" for line in found)
        raise ConfigError(f"{source} has {count}:\n{lines}\n`lora-booth config --schema` describes every key.")
    return config


def base_named(
    name: str, option: str = "--base", *, precision: Precision = "auto", prediction_type: str = "auto"
) -> ModelConfig:
    """The base that `option` of a verb names, as `model.base`. Raises ConfigError for an empty name, or an unknown
    `prediction_type`."""
    known = get_args(ModelConfig.model_fields["prediction_type"].annotation)
    if prediction_type not in known:
        raise ConfigError(f'--prediction "{inputs.shown(prediction_type)}" is unknown; use {" or ".join(known)}.')
    if not name.strip():
        raise ConfigError(f"{option} is empty; name a base: {', '.join(BASE_ALIASES)}, a hub id, a folder or a file.")
    words: dict[str, Any] = {"precision": precision, "prediction_type": prediction_type}
    return ModelConfig(base=inputs.word(name, option), **words)


def override(key: str, value: str | float) -> str:
    """The override that sets `key` to `value` as it is: a word like 2024 or true stays a word."""
    return f"{key}={tomli_w.dumps({'value': value}).removeprefix('value = ').rstrip()}"


def to_toml(config: Config, *, is_kept: bool = False) -> str:
    """The whole config as TOML that `load` takes back to an equal Config. Settings left at None are left out.

    `is_kept`: for the config.toml of its own run folder, which may be moved to another machine and shown to others:
    neither that folder nor the device that computed is named, and what lies in the user's home begins with "~".
    """
    values = config.model_dump(mode="json", exclude_none=True)
    if is_kept:
        values["run"].pop("folder", None)
        values["memory"].pop("device", None)
        for section, model in config:
            for key, value in model:
                if isinstance(value, Path) and key in values[section]:
                    values[section][key] = from_home(value)
        values["model"]["base"] = (
            from_home(Path(config.model.base)) if Path(config.model.base).is_absolute() else config.model.base
        )
    return tomli_w.dumps(values)


def from_home(path: Path) -> str:
    """`path` as others may see it: what lies in the user's home begins with "~"."""
    try:
        return f"~/{path.relative_to(Path.home()).as_posix()}"
    except (ValueError, RuntimeError):  # it lies elsewhere, or nobody's home is known
        return str(path)


def overridden(values: Values, overrides: Sequence[str], source: str) -> Values:
    """`values[section][key]` with `overrides` on top, as `load` has them. Raises ConfigError for one that is none."""
    found = {section: dict(pairs) if isinstance(pairs, dict) else pairs for section, pairs in values.items()}
    faults = _apply_(found, overrides)
    if faults:
        raise ConfigError(f"{source}: " + "\n".join(faults))
    return found


def differing_keys(one: Config, other: Config, *, ignore: Iterable[str] = ()) -> list[str]:
    """Lines "section.key: old -> new" for every setting that differs, except keys in `ignore`."""
    ignored, lines = set(ignore), []
    theirs = other.model_dump(mode="json")
    for section, pairs in one.model_dump(mode="json").items():
        for key, value in pairs.items():
            name = f"{section}.{key}"
            if name not in ignored and value != theirs[section][key]:
                lines.append(f"{name}: {_shown(value)} -> {_shown(theirs[section][key])}")
    return lines


def _read_toml(path: Path) -> Values:
    names = [] if os.path.lexists(path) else _neighbours(path)
    near = [] if path.name in names else difflib.get_close_matches(path.name, names, n=1)  # in: it may not be read
    hint = f'the nearest name is "{path.parent / near[0]}"' if near else "name a config file, in UTF-8"
    return inputs.read_toml(path, hint, ConfigError)


def _neighbours(path: Path) -> list[str]:
    """Names of config files in the folder of `path`."""
    try:
        return [other.name for other in path.parent.glob("*.toml")]
    except (OSError, ValueError):  # a NUL in the name, or a folder that cannot be listed
        return []


def _apply_(values: Values, overrides: Sequence[str]) -> list[str]:
    """Set each override in `values`; returns the faults of those that cannot be read."""
    faults = []
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and section and key):
            faults.append(
                f'"{inputs.shown(override)}" is not an override; write section.key=value, e.g. train.steps=400.'
            )
            continue
        table = values.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = _toml_value(text.strip())
        else:
            faults.append(f'"{inputs.shown(override)}": {inputs.shown(section)} is not a section.')
    return faults


def _toml_value(text: str) -> Any:
    """The TOML value that `text` spells, or `text` itself, so that words need no quotes on a command line."""
    try:
        value = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # ValueError: also a number of thousands of digits
        return text
    return value["value"] if set(value) == {"value"} else text


def _messages(error: ValidationError) -> list[str]:
    lines: list[str] = []
    places = [fault["loc"] for fault in error.errors()]
    for fault in error.errors():
        if fault["type"] == "too_short" and any(place[:-1] == fault["loc"] for place in places):
            continue  # pydantic counts valid entries alone
        if fault["type"] == "value_error" and fault["loc"] == ():
            lines += str(fault["ctx"]["error"]).splitlines()
        elif fault["type"] == "missing" and len(fault["loc"]) == 1:
            section = str(fault["loc"][0])
            lines += [_missing([section, key]) for key in _required_keys(section)]
        else:
            lines.append(_message(fault))
    return lines


def _message(fault: ErrorDetails) -> str:
    """One line: key, value, what is wrong, what is allowed."""
    location = [str(part) for part in fault["loc"]]
    name, kind = ".".join(location), fault["type"]
    if kind == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f'did you mean "{".".join([*location[:-1], near[0]])}"?' if near else f"known: {', '.join(known)}."
        return f"{name} is not a setting; {hint}"
    if kind == "missing":
        return _missing(location)
    if kind == "literal_error":
        expected = fault["ctx"]["expected"].replace("'", '"').replace("True, False", "true, false")
        near = difflib.get_close_matches(
            str(fault["input"]), expected.replace('"', "").replace(" or ", ", ").split(", "), n=1
        )
        hint = f' Did you mean "{near[0]}"?' if near else ""
        return f"{name} is {_shown(fault['input'])}; use {expected}.{hint}"
    text = fault["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if kind in ("too_short", "too_long"):
        bounds = {"too_short": ("at least", "min_length"), "too_long": ("at most", "max_length")}[kind]
        text = f"should have {bounds[0]} {fault['ctx'][bounds[1]]} items"
    if kind == "tuple_type":
        text = "should be a list"
    return f"{name} is {_shown(fault['input'])}, but it {text}. {_description(location)}".rstrip()


def _missing(location: Sequence[str]) -> str:
    return f"{'.'.join(location)} is missing; set it. {_description(location)}".rstrip()


def _later_messages(values: Values, error: ValidationError) -> list[str]:
    """Contradictions between the settings that are valid, which pydantic reports only once all fields are."""
    pruned = {section: dict(pairs) for section, pairs in values.items() if isinstance(pairs, dict)}
    for _ in range(3):  # pruning a faulty required key makes it a missing one, which the next round fills
        _prune_(pruned, error)
        try:
            Config.model_validate(pruned)
            return []
        except ValidationError as later:
            if any(fault["loc"] == () for fault in later.errors()):
                return _messages(later)
            error = later
    return []


def _prune_(values: Values, error: ValidationError) -> None:
    """Take every faulty key out of `values`; put a placeholder for every missing one."""
    for fault in error.errors():
        location = [str(part) for part in fault["loc"][:2]]
        if fault["type"] == "missing":
            keys = location[1:] or _required_keys(location[0])
            values.setdefault(location[0], {}).update(dict.fromkeys(keys, "placeholder"))
        elif len(location) == 2:
            values[location[0]].pop(location[1], None)
        elif location:
            values.pop(location[0], None)


def _required_keys(section: str) -> list[str]:
    model = _section([section])
    return [key for key, field in model.model_fields.items() if field.is_required()] if model is not None else []


def _known_keys(location: Sequence[str]) -> list[str]:
    model = _section(location)
    return list(model.model_fields) if model is not None else []


def _description(location: Sequence[str]) -> str:
    model = _section(location[:1])
    field = model.model_fields.get(location[1]) if model is not None and len(location) > 1 else None
    return (field.description or "") if field is not None else ""


def _section(location: Sequence[str]) -> type[BaseModel] | None:
    if not location:
        return Config
    field = Config.model_fields.get(location[0])
    annotation = field.annotation if field is not None else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f'"{inputs.shown(value)}"'
    return "unset" if value is None else inputs.shown(value)
