"""Builds the training data: fetch, name and render every icon once (`python -m tools.booth_mini.data --out DIR`).

DIR receives masters.npy (uint8 [N, 128, 128, 4], RGBA), icons.json (N names, in the same order, with the sha256 of each
master), tokenizer/, subjects/ and the network of the perceptual loss. Pictures and captions are made from these on the
fly by compose.py.
"""

import argparse
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

from tools.booth_mini.fetch import fetch_member, fetch_npm, read_members, read_packages
from tools.booth_mini.names import IconName, NameTable, name_icon
from tools.booth_mini.subjects import write_subjects
from tools.booth_mini.tokenizer import write_tokenizer

MASTER_PX = 128
PERCEPTUAL_FILE = "perceptual.pth"
Master = NDArray[np.uint8]


def build_data(out: Path, downloads: Path) -> None:
    """Writes all of the training data under `out`; `downloads` keeps the packages (50 MB)."""
    packages = read_packages()
    table = NameTable(read_members(fetch_npm(packages["names"], downloads)))
    out.mkdir(parents=True, exist_ok=True)
    names: list[IconName] = []
    masters: list[Master] = []
    for entry in packages["icon_sets"]:
        members = read_members(fetch_npm(entry, downloads))
        before = len(names)
        for name, master in _set_icons(entry["name"], members, table):
            names.append(name)
            masters.append(master)
        print(f"{entry['name']:10s} {len(names) - before:5d} icons", flush=True)
    _write_icons(out, names, masters)
    write_tokenizer(fetch_member(packages["tokenizer"], downloads), out / "tokenizer")
    (out / PERCEPTUAL_FILE).write_bytes(fetch_member(packages["perceptual"], downloads))
    write_subjects(out, names, np.stack(masters))


def load_icons(folder: Path) -> tuple[list[IconName], Master]:
    """Names and masters (memory-mapped, [N, 128, 128, 4]) as `build_data` wrote them."""
    rows = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    names = [
        IconName(
            row["set_name"],
            row["slug"],
            row["label"],
            tuple(row["tags"]),
            row["group"],
            row["subgroup"],
            row["subject"],
        )
        for row in rows
    ]
    masters: Master = np.load(folder / "masters.npy", mmap_mode="r")
    assert len(names) == len(masters), "icons.json and masters.npy differ in length"
    return names, masters


def _set_icons(set_name: str, members: dict[str, bytes], table: NameTable) -> Iterator[tuple[IconName, Master]]:
    if "icons.json" not in members:
        yield from _bitmap_icons(set_name, members, table)
        return
    icons = json.loads(members["icons.json"])
    chars = json.loads(members.get("chars.json", b"{}")) or {}
    hex_by_slug = {slug: hexcode for hexcode, slug in chars.items()}
    for slug, icon in icons["icons"].items():
        name = None if icon.get("hidden") else name_icon(table, set_name, slug, hex_by_slug.get(slug))
        if name is not None:
            width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
            left, top = icon.get("left", 0), icon.get("top", 0)
            yield name, render_svg(icon["body"], (left, top, width, height))


def _bitmap_icons(set_name: str, members: dict[str, bytes], table: NameTable) -> Iterator[tuple[IconName, Master]]:
    for path in sorted(p for p in members if p.endswith(".webp")):
        hexcode = Path(path).stem
        name = name_icon(table, set_name, hexcode, hexcode)
        if name is not None and table.find(hexcode, hexcode) is not None:
            image = Image.open(io.BytesIO(members[path])).convert("RGBA")
            yield name, np.asarray(image.resize((MASTER_PX, MASTER_PX), Image.Resampling.LANCZOS))


def render_svg(body: str, view_box: tuple[float, float, float, float], size_px: int = MASTER_PX) -> Master:
    """RGBA pixels [size_px, size_px, 4] of an SVG fragment; a view box that is not square is centred."""
    left, top, width, height = view_box
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size_px}" height="{size_px}" viewBox="{box}">{body}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size_px, height=size_px))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def _write_icons(out: Path, names: list[IconName], masters: list[Master]) -> None:
    np.save(out / "masters.npy", np.stack(masters))
    rows = [
        {**asdict(name), "sha256": hashlib.sha256(master.tobytes()).hexdigest()}
        for name, master in zip(names, masters, strict=True)
    ]
    (out / "icons.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
    held_out = sum(name.subject is not None for name in names)
    print(f"{len(names)} icons, {held_out} of them held out, in {out}", flush=True)


def main() -> None:
    """Command line of the data step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/booth_mini"))
    parser.add_argument("--downloads", type=Path, help="where the packages are kept (default: OUT/downloads)")
    arguments = parser.parse_args()
    build_data(arguments.out, arguments.downloads or arguments.out / "downloads")


if __name__ == "__main__":
    main()
