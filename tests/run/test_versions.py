from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lora_booth import __version__
from lora_booth.run import versions


def test_versions_are_those_of_the_packages_that_are_installed() -> None:
    found = versions.versions()
    assert found["lora-booth"] == __version__ and found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == metadata.version("torch") and found["pillow"] == metadata.version("pillow")
    assert "ruff" not in found and "pytest" not in found
    assert versions.installed("no-such-package-anywhere") is None


def test_versions_are_known_without_importing_anything() -> None:
    program = "import sys; from lora_booth.run import versions as v; v.versions(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "pydantic", "packaging", "typer"} & set(done.stdout.split())


def test_needs_are_told_with_the_extra_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch<3,>=2.10",
        "colorama>=1; sys_platform == 'never'",
        'pillow-heif>=1.3; extra == "heic"',
        'ruff==1; extra == "dev"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda _: lines)
    torch, heif = versions.needs()
    assert torch == versions.Need("torch", "<3,>=2.10") and heif == versions.Need("pillow-heif", ">=1.3", "heic")
    assert versions.is_allowed("2.13.0+cpu", torch) and versions.is_allowed("2.14.0.dev1", torch)
    assert not versions.is_allowed("2.9.1", torch)


def test_tested_versions_are_read_from_the_constraints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("# made\ntorch==2.13.0\ntomli_w==1.2.0 ; python_version > '3'\n\nPillow == 13.0.0  # newest\n")
    monkeypatch.setattr(versions, "CONSTRAINTS", path)
    assert versions.tested() == {"torch": "2.13.0", "tomli-w": "1.2.0", "pillow": "13.0.0"}
    monkeypatch.setattr(versions, "CONSTRAINTS", None)
    assert versions.tested() == {}
