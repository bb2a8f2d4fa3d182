"""docs/settings.md: every setting with its meaning, its range and what it is when nobody sets it.

python -m tools.settings_page            prints it
python -m tools.settings_page --write    writes it

What lives here: a page made of the fields of `config/`, through their JSON Schema. What does not: any word
about a setting; those are the fields' own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_booth.config.config import Config

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """# Settings

Made by `python -m tools.settings_page --write` from the fields of `lora_booth/config/`; do not edit.

A config file is TOML with these sections; `configs/` has one for each base and card. Every setting can be given on the
command line too, as `section.key=value`. `lora-booth config FILE` prints a config complete and checked, and
`lora-booth config --schema` all of this for editors.
"""
KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "object": "table"}
LIMITS = (("minimum", "≥ {}"), ("exclusiveMinimum", "> {}"), ("maximum", "≤ {}"), ("exclusiveMaximum", "< {}"))


def page() -> str:
    """The whole page."""
    schema = Config.model_json_schema()
    sections = schema["properties"].items()
    return HEAD + "".join(line + "\n" for name, found in sections for line in _section(name, _target(found, schema)))


def kind(field: Mapping[str, Any]) -> str:
    """What values a field of the schema takes, in words."""
    if "anyOf" in field:
        return " or ".join(kind(each) for each in field["anyOf"] if each.get("type") != "null")
    if "enum" in field or "const" in field:
        return " or ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])}: {kind(field['prefixItems'][0])}, each"
        return f"list of {kind(field['items'])}"
    if field.get("format") == "path":
        return "path"
    limits = [text.format(f"{field[key]:,}") for key, text in LIMITS if key in field]
    return ", ".join([KINDS[field["type"]], *limits])


def _section(name: str, section: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n## [{name}]\n"
    says = section["description"].partition(" — ")[2].strip()
    yield says[0].upper() + says[1:]
    yield "\n| key | what it is | values | default |\n|---|---|---|---|"
    for key, field in section["properties"].items():
        if key in section.get("required", ()):
            default = "none: it has to be given"
        elif field.get("default") is None:
            default = ""
        else:
            default = f"`{json.dumps(field['default'], ensure_ascii=False)}`"
        cells = (f"`{key}`", field["description"], kind(field), default)
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _target(field: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section that a property of the whole refers to."""
    reference = field.get("$ref") or field["allOf"][0]["$ref"]
    found: Mapping[str, Any] = schema["$defs"][reference.rpartition("/")[2]]
    return found


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
