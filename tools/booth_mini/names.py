"""What each icon is called: code points and slugs of eight sets -> one lower-case label, tags, group.

Also decides which icons are dropped (flags, keycaps, arrows, clocks, buttons, skin tones) and which are
held out.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

DROPPED_GROUPS = ("flags", "component")
"""emojibase groups; of "symbols" only KEPT_SYMBOLS stay."""
KEPT_SYMBOLS = ("geometric",)
DROPPED_LABEL = re.compile(
    r"flag|keycap|button|arrow|o.clock|oclock|thirty|clockface|\bsign\b|symbol|squared|indicator|letter [a-z]$|"
    r"ideograph|katakana|number|digit|japanese|^\d+$|mark$|multiplication|regional"
)
SKIN_TONE = re.compile(r"1f3f[b-f]|skin-tone|-(light|medium|dark)$|-(medium-light|medium-dark)$")

HELD_OUT: dict[str, tuple[str, str]] = {
    "emojione": ("tabby", r"^(cat-face-with.*|(crying|grinning|kissing|pouting|weary|smiling)-cat-face.*)$"),
    "noto": ("noto_monkey", r"^(monkey|monkey-face|(see|hear|speak)-no-evil-monkey)$"),
    "firefox": ("fx_monkey", r"^monkey(face|see|hear|speak)?$"),
    "flat": ("moon_face", r"^(first-quarter|last-quarter|full|new)-moon-face$"),
    "3d": ("mailbox", r"^(closed|open)-mailbox-with-(lowered|raised)-flag$"),
    "twemoji": ("police_car", r"^(police-car|oncoming-police-car)$"),
}
"""Set -> (subject name, pattern of slugs) whose icons never enter training."""


@dataclass(frozen=True)
class IconName:
    """One icon's place in a set and its words; `subject` is set when it is held out of training."""

    set_name: str
    slug: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    subject: str | None


class NameTable:
    """Looks labels up by code point, by slug and by shortcode in emojibase-data."""

    def __init__(self, members: dict[str, bytes]) -> None:
        records = json.loads(members["en/data.json"])
        messages = json.loads(members["en/messages.json"])
        groups = {row["order"]: row["key"] for row in messages["groups"]}
        subgroups = {row["order"]: row["key"] for row in messages["subgroups"]}
        self.by_hex: dict[str, dict[str, Any]] = {}
        self.by_word: dict[str, dict[str, Any]] = {}
        for record in records:
            record["group_key"] = groups.get(record.get("group"), "")
            record["subgroup_key"] = subgroups.get(record.get("subgroup"), "")
            self.by_hex[_bare_hex(record["hexcode"])] = record
            self.by_word.setdefault(_squash(record["label"]), record)
        for record_hex, codes in json.loads(members["en/shortcodes/emojibase.json"]).items():
            record = self.by_hex.get(_bare_hex(record_hex))
            for code in [codes] if isinstance(codes, str) else codes:
                if record is not None:
                    self.by_word.setdefault(_squash(code), record)

    def find(self, slug: str, hexcode: str | None) -> dict[str, Any] | None:
        """The emojibase record of an icon, or None when neither its code point nor its slug is known."""
        if hexcode is not None and _bare_hex(hexcode) in self.by_hex:
            return self.by_hex[_bare_hex(hexcode)]
        return self.by_word.get(_squash(slug))


def name_icon(table: NameTable, set_name: str, slug: str, hexcode: str | None) -> IconName | None:
    """The icon's name, or None when the icon is one of the dropped kinds."""
    if SKIN_TONE.search(hexcode or "") or SKIN_TONE.search(slug):
        return None
    words = re.sub(r"(?<=[a-z])(-\d+|side)$", "", slug)
    record = table.find(words, hexcode)
    label = clean_label(record["label"] if record else words)
    group = record["group_key"] if record else ""
    subgroup = record["subgroup_key"] if record else ""
    if group in DROPPED_GROUPS or (group == "symbols" and subgroup not in KEPT_SYMBOLS):
        return None
    if DROPPED_LABEL.search(label) and "mailbox" not in label and group != "people-body":
        return None
    tags = tuple(t for t in (record.get("tags", []) if record else []) if t.isascii())
    subject_name, pattern = HELD_OUT.get(set_name, ("", r"^$"))
    slug_key = slug if hexcode is None or not label else re.sub(r"[^a-z0-9]+", "-", label)
    is_held_out = re.match(pattern, slug) or re.match(pattern, slug_key)
    return IconName(set_name, slug, label, tags, group, subgroup, subject_name if is_held_out else None)


def clean_label(text: str) -> str:
    """Lower-case words and digits only: "woman: red hair" -> "woman red hair"."""
    plain = text.lower().replace("\u2019", "").replace("-", " ").replace("_", " ")
    return " ".join(re.sub(r"[^a-z0-9 ]+", " ", plain).split())


def _bare_hex(hexcode: str) -> str:
    return hexcode.lower().replace("-fe0f", "").replace("_", "-")


def _squash(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
