"""What is installed where: ranges for users, exact versions for the README's commands, bounds for `make test-…`."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import lock, requirements

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_requirement_has_one_exact_version_within_its_range() -> None:
    versions, asked = pinned(), [Requirement(line) for line in requirements.requirements("newest", TEXT)]
    assert len(asked) > 20
    outside = [str(r) for r in asked if not r.specifier.contains(versions.get(r.name, "none"))]
    assert not outside, "run `make lock`"
    builder = Requirement(tomllib.loads(TEXT)["build-system"]["requires"][0])
    assert builder.specifier.contains(versions[builder.name])


def test_exact_versions_name_no_build_and_no_place() -> None:
    assert all(set(version) <= set("0123456789.abcrpostdev") for version in pinned().values())
    assert lock.constraints("B==1.0+cpu\na_b==2\n") == f"{lock.HEAD}a-b==2\nb==1.0\n"
    with pytest.raises(ValueError, match="from the index"):
        lock.constraints("a @ file:///somewhere/a.whl")


def test_each_way_to_try_other_versions_asks_for_them() -> None:
    text = (
        '[project]\ndependencies = ["a>=1.2,<3", "b>=4"]\n[project.optional-dependencies]\n'
        "dev = [\"c==5; python_version < '4'\"]\noptim = []\ntracking = []\nheic = []\nlikeness = []\nminiature = []\n"
    )
    marker = "c==5; python_version < '4'"
    assert requirements.requirements("oldest", text) == ["a==1.2", "b==4", marker]
    assert requirements.requirements("newest", text) == ["a>=1.2,<3", "b>=4", marker]
    assert requirements.requirements("next", text) == ["a>=1.2", "b>=4", marker]
    with pytest.raises(ValueError, match="oldest, newest or next"):
        requirements.requirements("latest", text)
