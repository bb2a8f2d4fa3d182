"""The pages of docs/: the settings are the fields', what the guide names exists, and the site has no dead links."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_booth.config.config import Config
from tools import settings_page

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
SECTIONS = Config.model_fields
NAMED = sorted(set(re.findall(r"`(\w+)\.(\w+)(?: = [^`]*)?`", GUIDE)))


def test_the_settings_page_is_that_of_the_fields() -> None:
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page()


def test_the_settings_page_has_every_setting() -> None:
    page = settings_page.page()
    for name, section in SECTIONS.items():
        part = page.partition(f"\n## [{name}]\n")[2].partition("\n## ")[0]
        kind = section.annotation
        assert kind is not None
        assert re.findall(r"^\| `(\w+)` ", part, re.M) == list(kind.model_fields), name


@pytest.mark.parametrize(("section", "key"), [pair for pair in NAMED if pair[0] in SECTIONS])
def test_a_setting_that_the_guide_names_exists(section: str, key: str) -> None:
    kind = SECTIONS[section].annotation
    assert kind is not None and key in kind.model_fields


def test_the_guide_names_settings_of_many_sections() -> None:
    assert {section for section, _ in NAMED} >= {"subject", "prior", "train", "optimizer", "adapter", "evaluate"}


def test_every_advice_says_what_it_rests_on() -> None:
    remedies = GUIDE.partition("## When it went wrong")[2]
    for line in re.split(r"\n(?=- )|\n\n", remedies):
        is_advice = line.startswith("- ") and "Look at the pictures" not in line
        assert not is_advice or re.search(r"(?i)\*\((measured|paper|usual)", line) or "install" in line, line


def test_the_site_has_no_dead_links_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    pages = sorted((tmp_path / "site").rglob("index.html"))
    assert len(pages) == len(list((ROOT / "docs").glob("*.md")))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*(?:https?:)?//""", text)
