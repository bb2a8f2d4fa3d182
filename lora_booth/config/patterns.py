"""A user's regular expressions, matched against layer names in bounded time.

Python's `re` goes back and tries again: `(a+)+b` on thirty letters takes minutes. RE2 (github.com/google/re2) reads a
text once, whatever the pattern, and bounds the memory of one, so nothing here needs a clock. What it cannot do, look
around and back-references, is what makes the others slow; it is refused with a word.
"""

from __future__ import annotations

import re2

from lora_booth.config.inputs import shown
from lora_booth.errors import ConfigError

MAX_CHARACTERS = 10_000
"""Of one pattern; a list of the full names of all of SDXL's layers would be better written shorter."""


class Pattern:
    """A checked pattern, matched against whole names; with `is_end` the end of a name after a dot suffices."""

    def __init__(self, text: str, setting: str, *, is_end: bool = False) -> None:
        """Raises ConfigError, naming `setting`, when `text` is no pattern."""
        fault = why_no_pattern(text)
        if fault is not None:
            raise ConfigError(f"{setting} {fault}")
        self._compiled = re2.compile(rf"(?:.*\.)?(?:{text})" if is_end else text, _options())

    def matches(self, name: str) -> bool:
        """Whether `name` is what the pattern says."""
        return self._compiled.fullmatch(name) is not None


def why_no_pattern(text: str) -> str | None:
    """What is wrong with the pattern `text`, and what to do, as the rest of a sentence; None when it is one."""
    if len(text) > MAX_CHARACTERS:
        return f"has a pattern of {len(text):,} characters; write one of at most {MAX_CHARACTERS:,}."
    told = f'has "{shown(text)}", which is not a regular expression that is known here'
    try:
        re2.compile(text, _options())
    except UnicodeError:
        return f"{told}: it is not UTF-8; write it so."
    except re2.error as error:
        said = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        return f"{told}: {shown(said)}; correct it{_instead(said)}."
    return None


def _instead(said: str) -> str:
    """What to write in place of what only slower engines know."""
    if "perl operator" in said or "escape sequence" in said:
        return ' (what looks around, as "(?!…)", and what looks back, as "\\1", is not taken: it can take for ever)'
    return ""


def _options() -> re2.Options:
    options = re2.Options()
    options.log_errors = False
    return options
