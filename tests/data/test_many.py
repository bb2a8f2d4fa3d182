"""Folders of many subjects: which runs they are, and what is refused before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_booth.data.many import read
from lora_booth.errors import ConfigError

USUAL = {"model": {"base": "booth-mini"}, "subject": {"class_noun": "dog"}}


def test_a_folder_of_folders_is_a_subject_each(tmp_path: Path) -> None:
    for name in ("rex", "10_wbv cat", ".hidden"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    cat, rex = read(tmp_path / "photos", USUAL, tmp_path / "out")
    assert (cat.config.subject.token, cat.config.subject.class_noun) == ("wbv", "cat")
    assert rex.config.subject.class_noun == "dog" and rex.config.folder == tmp_path / "out" / "rex"
    (tmp_path / "bare").mkdir()
    with pytest.raises(ConfigError, match="holds no folders"):
        read(tmp_path / "bare", USUAL, tmp_path / "out")


@pytest.mark.parametrize("source", ["missing", "x" * 5000])
def test_a_source_that_is_neither_file_nor_folder_is_told(source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a file of subjects"):
        read(tmp_path / source, USUAL, tmp_path / "out")


def test_a_file_is_no_place_for_runs(tmp_path: Path) -> None:
    (tmp_path / "photos" / "rex").mkdir(parents=True)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match=r"--out .* is no folder"):
        read(tmp_path / "photos", USUAL, tmp_path / "out")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed_is_told(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir(mode=0o300)
    with pytest.raises(ConfigError, match="cannot be listed"):
        read(tmp_path / "photos", USUAL, tmp_path / "out")
