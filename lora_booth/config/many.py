"""Many runs in one file: what they share, a table for each subject, lists as a grid.

What lives here: from a file's tables to a checked config for each run. What does not: folders of pictures
(`data/many.py`).
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from lora_booth.config import inputs, names, toml
from lora_booth.config.config import Config
from lora_booth.config.section import Section
from lora_booth.config.settings import SubjectConfig
from lora_booth.errors import ConfigError

MAX_RUNS = 100_000
MAX_FAULTS = 5
"""Of runs whose faults are told; the others mostly have the same."""
Tables = dict[str, Any]


@dataclass(frozen=True)
class NamedRun:
    """A run of many: its name, which its folder has too, and its settings."""

    name: str
    config: Config


def load(path: Path, usual: Tables, out: Path, overrides: Sequence[str] = ()) -> list[NamedRun]:
    """The runs of a TOML file, each in a folder of its name in `out`: `[defaults.SECTION]` as sections of a config, and
    for each subject a table `[[subject]]` with the keys of [subject], a `name` (by default that of its pictures'
    folder), and sections of its own where it differs. `overrides`, "section.key=value", win over all, and all over the
    sections of `usual`.

    Raises ConfigError that tells the faults of all runs at once.
    """
    values = inputs.read_toml(path, "name a file of subjects, in UTF-8", ConfigError)
    subjects, faults = values.get("subject", []), [_unknown(key, ["defaults", "subject"]) for key in _others(values)]
    if not isinstance(values.get("defaults", {}), dict):
        faults.append("defaults is no table; write sections as [defaults.train].")
    if not isinstance(subjects, list) or not subjects or not all(isinstance(one, dict) for one in subjects):
        faults.append("it names no subject; write a table [[subject]] for each, with images and class_noun.")
    if faults:
        raise ConfigError(f"{inputs.shown_path(path)}: " + "\n".join(faults))
    defaults = _over(usual, values.get("defaults", {}))
    return runs(subjects, defaults, out, source=inputs.shown_path(path), overrides=overrides)


def runs(
    subjects: Sequence[Tables], defaults: Tables, out: Path, *, source: str, overrides: Sequence[str] = ()
) -> list[NamedRun]:
    """`load`, of tables that were read from `source`."""
    found: dict[str, NamedRun] = {}
    faults: list[str] = []
    for number, table in enumerate(subjects, start=1):
        where = f"{source}, subject {number}"
        try:
            name, values = _laid(table, defaults, where)
            where = f"{source}, subject {inputs.shown(name)}"
            for one in _grid(name, values, out, overrides, where):
                if one.name.casefold() in found:
                    raise ConfigError(f'{where}: another run is called "{one.name}" too; give one a name of its own.')
                found[one.name.casefold()] = one
                if len(found) > MAX_RUNS:
                    raise ConfigError(f"{source} describes more than {MAX_RUNS:,} runs; leave some to another file.")
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        more = len(faults) - MAX_FAULTS
        shown = faults[:MAX_FAULTS] + ([f"And {more} more subjects with faults."] if more > 0 else [])
        raise ConfigError("\n".join(shown))
    return list(found.values())


def _laid(table: Tables, defaults: Tables, where: str) -> tuple[str, Tables]:
    """The name of a subject, and its sections over those of `defaults`."""
    own, sections = dict(table), {key: dict(v) if isinstance(v, dict) else v for key, v in defaults.items()}
    name = own.pop("name", None)
    if name is None and isinstance(own.get("images"), str):
        name = Path(own["images"]).name
    if not isinstance(name, str) or not name:
        raise ConfigError(f'{where} has neither images nor a name; write images = "a folder of its pictures".')
    subject = sections.setdefault("subject", {})
    for key, value in own.items():
        if key in Config.model_fields and key != "subject" and isinstance(value, dict):
            section = sections.setdefault(key, {})
            if isinstance(section, dict):
                section.update(value)
        elif isinstance(subject, dict):
            if key in Config.model_fields:
                how = "write its keys without it" if key == "subject" else f"write a table [subject.{key}]"
                raise ConfigError(f"{where}: {key} is a section; {how}.")
            if key not in SubjectConfig.model_fields:
                known = [*SubjectConfig.model_fields, "name", *Config.model_fields]
                raise ConfigError(f"{where}: {_unknown(key, known)}")
            subject[key] = value
    return name, sections


def _over(usual: Tables, defaults: Tables) -> Tables:
    """The sections of `defaults`, and of `usual` what they leave open."""
    found = usual | defaults
    for section in usual.keys() & defaults.keys():
        if isinstance(defaults[section], dict):
            found[section] = usual[section] | defaults[section]
    return found


def _grid(name: str, values: Tables, out: Path, overrides: Sequence[str], where: str) -> Iterator[NamedRun]:
    """A run for each combination of the values that are lists where one value belongs."""
    values = toml.overridden(values, overrides, where)
    swept = {(section, key): options for section, key, options in _swept(values)}
    for (section, key), options in swept.items():
        if not options:
            raise ConfigError(f"{where}: {section}.{key} is an empty list; write a value, or several to try.")
    for chosen in itertools.product(*swept.values()):
        varied = {section: dict(pairs) if isinstance(pairs, dict) else pairs for section, pairs in values.items()}
        parts = [name]
        for (section, key), value in zip(swept, chosen, strict=True):
            varied[section][key] = value
            parts.append(f"{key}_{_spelled(value)}")
        called = "-".join(parts)
        if (why := names.fault(called)) is not None:
            raise ConfigError(f'{where}: its folder would be called "{inputs.shown(called)}", which {why}; rename it.')
        run = varied.setdefault("run", {})
        if isinstance(run, dict):
            if "folder" in run:
                raise ConfigError(f"{where}: run.folder is set, but each run has its own in --out; leave it out.")
            run["folder"] = str(out / called)
        yield NamedRun(called, toml.build(varied, source=f"{where}, run {called}" if swept else where))


def _swept(values: Tables) -> Iterator[tuple[str, str, list[Any]]]:
    """Section, key and values of each setting that a list stands for: of lists, where a list is its value."""
    for section, pairs in values.items():
        kind = Config.model_fields[section].annotation if section in Config.model_fields else None
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, Section) else {}
        for key, value in pairs.items() if isinstance(pairs, dict) else ():
            if key not in fields or not isinstance(value, list):
                continue
            takes_lists = get_origin(fields[key].annotation) is tuple
            if not takes_lists or (value and all(isinstance(one, list) for one in value)):
                yield section, key, value


def _spelled(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isalnum() or letter in "-+." else "_" for letter in text).strip(".") or "_"


def _others(values: Mapping[str, Any]) -> list[str]:
    return [key for key in values if key not in ("defaults", "subject")]


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known)}."
    return f'"{inputs.shown(key)}" has no meaning here; {hint}'
