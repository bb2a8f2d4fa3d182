"""What is broken is found, named and mended by one line; what works is not blamed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_booth.run import versions
from lora_booth.run.versions import Need
from lora_booth.verbs import doctor

PACKAGE = Path(doctor.__file__).parents[1]
Findings = list[dict[str, Any]]


def real(
    folder: Path, *words: str, start: tuple[str, ...] = ("-m", "lora_booth", "doctor"), **environment: str
) -> tuple[int, Findings]:
    """Exit code and findings of a real command, with `folder` first among the places of modules."""
    path = os.pathsep.join([str(folder), str(PACKAGE.parent)])
    done = subprocess.run(
        [sys.executable, *start, "--json", *words],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def asked(*needs: Need, monkeypatch: pytest.MonkeyPatch) -> Findings:
    """Findings where lora_booth asks for these packages only, so that little is imported."""
    monkeypatch.setattr(versions, "needs", lambda: list(needs))
    return [vars(finding) for finding in doctor.findings()]


def broken(findings: Findings) -> list[str]:
    return [finding["about"] for finding in findings if finding["level"] == "broken"]


def about(findings: Findings, name: str) -> dict[str, Any]:
    (found,) = [finding for finding in findings if finding["about"] == name]
    return found


def module(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)


def metadata_of(folder: Path, name: str, version: str) -> None:
    path = folder / f"{name}-{version}.dist-info"
    path.mkdir(parents=True)
    (path / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_an_installation_that_works_is_told_with_its_versions_and_devices(tmp_path: Path) -> None:
    code, findings = real(tmp_path)
    assert code == 0 and broken(findings) == [], findings
    assert about(findings, "lora-booth")["values"]["torch"] == versions.installed("torch")
    assert about(findings, "device cpu")["values"]["precision"] == "fp32"
    assert {finding["about"] for finding in findings} >= {"packages", "compiler", "cache", "bases", "hub"}
    assert not any(str(Path.home()) + os.sep in json.dumps(finding) for finding in findings), "paths name the user"


def test_a_torch_that_cannot_be_imported_is_found_and_nothing_else_is_blamed(tmp_path: Path) -> None:
    module(tmp_path, "torch", "raise OSError('libtorch_cpu.so: cannot open shared object file')")
    code, findings = real(tmp_path)
    assert code == 2 and broken(findings) == ["torch"]
    told = about(findings, "torch")
    assert "libtorch_cpu.so" in told["text"] and "is taken for it" in told["text"]
    assert "rename that file" in told["remedy"]


def test_a_package_that_kills_its_process_is_found_and_the_rest_is_still_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(tmp_path, "alpha", "print('talkative')")
    module(tmp_path, "killer", "import os; os.abort()")
    module(tmp_path, "quitter", "raise SystemExit('bye')")
    module(tmp_path, "zeta", "import missing_from_here")
    for name in ("alpha", "killer", "quitter", "zeta"):
        metadata_of(tmp_path, name, "1.0")
    monkeypatch.syspath_prepend(tmp_path)
    needs = [Need(name, ">=1") for name in ("alpha", "killer", "quitter", "zeta")]
    findings = asked(*needs, monkeypatch=monkeypatch)
    assert broken(findings) == ["killer", "quitter", "zeta"]
    assert "ended with SIGABRT" in about(findings, "killer")["text"] or os.name == "nt"
    assert "missing_from_here" in about(findings, "zeta")["text"]
    assert about(findings, "zeta")["remedy"] == 'python -m pip install --force-reinstall "zeta>=1"'


def test_a_missing_package_and_a_wrong_version_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    metadata_of(tmp_path, "oldish", "1.4")
    module(tmp_path, "oldish", "")
    monkeypatch.setattr(doctor, "_ask", lambda names, asks_devices: ([], ""))
    monkeypatch.setattr(versions, "tested", lambda: {"oldish": "2.1"})
    needs = [Need("absent", ">=3"), Need("oldish", ">=2,<3"), Need("extra-thing", ">=1", "heic")]
    findings = asked(*needs, monkeypatch=monkeypatch)
    assert broken(findings) == ["absent"]
    assert about(findings, "absent")["remedy"] == 'python -m pip install "absent>=3"'
    old = about(findings, "oldish")
    assert (old["level"], old["remedy"]) == ("warning", 'python -m pip install "oldish>=2,<3"') and "1.4" in old["text"]
    assert "oldish 1.4 (2.1)" in about(findings, "tested")["text"]
    assert "lora-booth[heic]" in about(findings, "lora-booth[heic]")["remedy"]


def test_it_works_where_no_package_is_installed_at_all(tmp_path: Path) -> None:
    code, findings = real(tmp_path, start=("-S", "-m", "lora_booth.verbs.doctor"))
    assert code == 2 and findings[0]["about"] == "lora-booth"
    assert broken(findings), findings


def test_it_imports_nothing_but_pythons_own_library() -> None:
    checked = 0
    for path in (PACKAGE / "verbs" / "doctor.py", PACKAGE / "run" / "versions.py"):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for dotted in names:
                assert dotted.split(".")[0] in {*sys.stdlib_module_names, "lora_booth"}, (path, dotted)
                checked += 1
    assert checked > 15


def test_folders_that_cannot_be_written_or_are_nearly_full_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    blocked = doctor._disk("cache", tmp_path / "file" / "cache")
    assert (blocked.level, blocked.remedy) == ("broken", "set run.cache to a folder of yours.")
    assert doctor._disk("bases", tmp_path / "file").level == "warning"
    assert doctor._disk("cache", tmp_path / "new" / "folder").level == "ok"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**30}))
    full = doctor._disk("cache", tmp_path)
    assert full.level == "warning" and "2 GiB" in full.remedy


def test_a_current_folder_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    *_, last = doctor.findings()
    assert (last.level, last.about) == ("broken", "the current folder") and "go to a folder" in last.remedy


def test_the_hub_is_never_asked_but_its_settings_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (offline,) = doctor._hub()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (online,) = doctor._hub()
    assert "only bases that are on this machine" in offline.text and "not tried" in online.text


def test_a_card_that_torch_cannot_see_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {"device": "cpu", "name": "the CPU", "lacks": {}, "precision": "fp32", "optimizer": "adamw", "free_gib": None}
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    found = list(doctor._devices({"devices": [cpu], "torch": "2.13.0+cpu"}))
    assert found[-1].about == "device cuda" and "2.13.0+cpu finds no card" in found[-1].text
    card = cpu | {"device": "cuda:0", "name": "RTX 3060", "free_gib": 11.2, "lacks": {"compiling": "no triton"}}
    first, *_ = doctor._devices({"devices": [card, cpu], "torch": "2.13.0"})
    assert "RTX 3060, 11.2 GiB free" in first.text and "without compiling (no triton)" in first.text
