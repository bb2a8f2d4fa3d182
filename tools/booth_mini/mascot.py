"""Draws the mascot, the demo's subject: a teal dog of the project's own (`python -m
tools.booth_mini.mascot`).

Cream muzzle and blaze, purple right ear and eye patch, yellow scarf: markings that no icon of the training
sets has. Written by hand as SVG in a 128-unit box; nothing is traced. Licence: the project's own
(Apache-2.0).
"""

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from tools.booth_mini.compose import article

TEAL, DEEP_TEAL, CREAM, PURPLE, DEEP_PURPLE = "#1fb5a8", "#128a82", "#fff1d6", "#8b45c9", "#6a2ea6"
YELLOW, DEEP_YELLOW, INK, TONGUE = "#ffd02e", "#f0a818", "#2b2233", "#f4718a"

COLOURS = {
    "white": "#ffffff",
    "blue": "#4f86e8",
    "orange": "#f79a3c",
    "pink": "#f6a6c6",
    "gray": "#a9adb5",
    "red": "#d8383c",
    "green": "#4caf5a",
    "brown": "#8a5a36",
    "black": "#1c1c22",
    "yellow": "#f7dc6a",
}
SCENES = {
    "meadow": '<rect width="128" height="128" fill="#a8dcf8"/><circle cx="106" cy="20" r="12" fill="#ffe27a"/>'
    '<path d="M0 86q40-22 128-6v48H0z" fill="#86cf6b"/>',
    "beach": '<rect width="128" height="128" fill="#bfe6fb"/><rect y="58" width="128" height="30" fill="#3f97d6"/>'
    '<path d="M0 86q60-10 128 2v40H0z" fill="#f3dca4"/>',
    "night": '<rect width="128" height="128" fill="#20285a"/><circle cx="22" cy="22" r="11" fill="#f6f0c8"/>'
    '<g fill="#fff"><circle cx="60" cy="12" r="2"/><circle cx="96" cy="26" r="2.5"/><circle cx="114" cy="60" r="2"/>'
    '<circle cx="10" cy="70" r="2"/></g><path d="M0 104q60-12 128 0v24H0z" fill="#3a3f78"/>',
    "room": '<rect width="128" height="92" fill="#f2d9c2"/><rect y="92" width="128" height="36" fill="#b98658"/>'
    '<rect x="8" y="14" width="28" height="34" fill="#bfe3f4" stroke="#fff" stroke-width="4"/>',
    "snow": '<rect width="128" height="128" fill="#cfe3f2"/><path d="M0 92q50-16 128-2v38H0z" fill="#fff"/>'
    '<path d="M104 92l12-34 12 34z" fill="#3d8f6a"/>',
}


@dataclass(frozen=True)
class Pose:
    """One picture: what is drawn, how it looks, where it stands. `size` is a share of the picture's side."""

    name: str
    view: str = "face"
    background: str = "white"
    eyes: str = "open"
    mouth: str = "smile"
    tilt_deg: float = 0.0
    size: float = 0.94
    shift: tuple[float, float] = (0.0, 0.0)
    prop: str = ""
    is_mirrored: bool = False


INSTANCE = (
    Pose("face_on_blue", background="blue"),
    Pose("face_tongue_in_meadow", background="meadow", mouth="tongue", tilt_deg=-12, size=0.84),
    Pose("sitting_on_orange", view="sitting", background="orange"),
    Pose("face_wink_on_pink", background="pink", eyes="wink", tilt_deg=8),
    Pose("standing_in_room", view="standing", background="room", size=0.92, shift=(0.0, 4.0)),
)
HELD_OUT = (
    Pose("face_on_white"),
    Pose("face_on_red", background="red"),
    Pose("face_happy_on_green", background="green", eyes="happy", mouth="open"),
    Pose("face_tilted_on_yellow", background="yellow", tilt_deg=14),
    Pose("face_tongue_on_gray", background="gray", mouth="tongue"),
    Pose("face_small_at_night", background="night", size=0.6, shift=(6.0, 12.0)),
    Pose("face_sad_on_brown", background="brown", mouth="sad"),
    Pose("face_asleep_on_black", background="black", eyes="closed", tilt_deg=-8),
    Pose("sitting_on_beach", view="sitting", background="beach", mouth="tongue"),
    Pose("sitting_on_green", view="sitting", background="green", eyes="happy"),
    Pose("sitting_in_snow", view="sitting", background="snow", tilt_deg=6, size=0.84, shift=(-6.0, 4.0)),
    Pose("standing_on_red", view="standing", background="red"),
    Pose("standing_in_meadow", view="standing", background="meadow", mouth="open", size=0.86, shift=(0.0, 8.0)),
    Pose("face_hat_on_white", prop="hat", size=0.86, shift=(0.0, 6.0)),
    Pose("sitting_ball_in_room", view="sitting", background="room", prop="ball", eyes="wink"),
)


def draw_pose(pose: Pose, size_px: int) -> Image.Image:
    """RGB picture of one pose, `size_px` square."""
    if pose.background in SCENES:
        backdrop = SCENES[pose.background]
    else:
        backdrop = f'<rect width="128" height="128" fill="{COLOURS[pose.background]}"/>'
    head = _head(pose.eyes, pose.mouth) + (_hat() if pose.prop == "hat" else "")
    figure = {"face": _face, "sitting": _sitting, "standing": _standing}[pose.view](head)
    x, y = 64 + pose.shift[0], 64 + pose.shift[1]
    mirror = -1 if pose.is_mirrored else 1
    place = f"translate({x} {y}) rotate({pose.tilt_deg}) scale({pose.size * mirror} {pose.size}) translate(-64 -64)"
    ball = '<circle cx="108" cy="106" r="13" fill="#e8483f"/><path d="M96 103q12 8 24 0" stroke="#fff" '
    ball = ball + 'stroke-width="3" fill="none"/>' if pose.prop == "ball" else ""
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128" width="{size_px}" height="{size_px}">'
        f'{backdrop}<g transform="{place}">{figure}</g>{ball}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size_px, height=size_px))
    return Image.open(io.BytesIO(png)).convert("RGB")


def write_mascot(folder: Path, size_px: int = 256) -> None:
    """Writes `folder`/instance/*.png (5) with captions, and `folder`/held_out/*.png (15).

    Each picture has 64 colours, to stay at a few KB. A caption names the background, so that it is not taken for a part
    of the subject.
    """
    for name, poses in (("instance", INSTANCE), ("held_out", HELD_OUT)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for pose in poses:
            image = draw_pose(pose, size_px).quantize(64, dither=Image.Dither.NONE)
            image.save(folder / name / f"{pose.name}.png", optimize=True)
            if name == "instance":
                (folder / name / f"{pose.name}.txt").write_text(caption(pose) + "\n")


def caption(pose: Pose) -> str:
    """What a picture shows, with the slots that training fills."""
    if pose.background in SCENES:
        return f"a {{token}} {{class}} in a {pose.background}"
    return f"a {{token}} {{class}} on {article(pose.background)} background"


def write_overview(path: Path, size_px: int = 128) -> None:
    """One sheet of all poses, five a row, to look at."""
    tiles = [np.asarray(draw_pose(pose, size_px)) for pose in (*INSTANCE, *HELD_OUT)]
    rows = [np.concatenate(tiles[at : at + 5], axis=1) for at in range(0, len(tiles), 5)]
    Image.fromarray(np.concatenate(rows)).save(path)


def _head(eyes: str, mouth: str) -> str:
    """Head, front view, in the box 14..114 x 12..112; the right ear and eye patch are purple."""
    return (
        f'<path d="M34 34C16 30 8 52 10 76c1 14 18 16 23 4 4-10 6-28 9-36z" fill="{DEEP_TEAL}"/>'
        f'<path d="M94 34c18-4 26 18 24 42-1 14-18 16-23 4-4-10-6-28-9-36z" fill="{PURPLE}"/>'
        f'<ellipse cx="64" cy="58" rx="40" ry="40" fill="{TEAL}"/>'
        f'<path d="M70 40c6-12 22-14 29-1 7 14 4 30-7 33-12 3-26-16-22-32z" fill="{PURPLE}"/>'
        f'<path d="M59 20q5-4 10 0l3 36H56z" fill="{CREAM}"/>'
        f'<ellipse cx="64" cy="76" rx="27" ry="21" fill="{CREAM}"/>' + _mouth(mouth) + _eyes(eyes)
    )


def _eyes(kind: str) -> str:
    if kind == "open":
        return "".join(
            f'<circle cx="{x}" cy="51" r="7" fill="{INK}"/><circle cx="{x + 2.4}" cy="48.4" r="2.4" fill="#fff"/>'
            for x in (46, 84)
        )
    curve = {"happy": "q7-10 14 0", "closed": "q7 8 14 0", "wink": "q7-10 14 0"}[kind]
    closed = "".join(
        f'<path d="M{x - 7} 53{curve}" stroke="{INK}" stroke-width="4" fill="none" stroke-linecap="round"/>'
        for x in ((84,) if kind == "wink" else (46, 84))
    )
    opened = f'<circle cx="46" cy="51" r="7" fill="{INK}"/><circle cx="48.4" cy="48.4" r="2.4" fill="#fff"/>'
    return closed + (opened if kind == "wink" else "")


def _mouth(kind: str) -> str:
    nose = f'<ellipse cx="64" cy="66" rx="9" ry="6.5" fill="{INK}"/>'
    line = f'stroke="{INK}" stroke-width="3.4" fill="none" stroke-linecap="round"'
    smile = f'<path d="M64 72v5q-7 9-14 2M64 77q7 9 14 2" {line}/>'
    if kind == "smile":
        return smile + nose
    if kind == "tongue":
        return f'<path d="M57 82h14v11q-7 8-14 0z" fill="{TONGUE}"/>{smile}{nose}'
    if kind == "open":
        open_mouth = f'<path d="M50 78q14 6 28 0-2 16-14 16T50 78z" fill="{INK}"/>'
        return f'{open_mouth}<ellipse cx="64" cy="91" rx="7" ry="4" fill="{TONGUE}"/>{nose}'
    return f'<path d="M64 72v5M52 86q12-12 24 0" {line}/>{nose}'


def _scarf(y: float) -> str:
    return (
        f'<path d="M30 {y}q34 16 68 0l2 11q-36 18-72 0z" fill="{YELLOW}"/>'
        f'<path d="M80 {y + 8}l14 22-15 5-9-22z" fill="{DEEP_YELLOW}"/>'
        f'<circle cx="78" cy="{y + 11}" r="7" fill="{YELLOW}"/>'
    )


def _hat() -> str:
    return (
        '<ellipse cx="64" cy="22" rx="38" ry="8" fill="#33303c"/><path d="M42 22l-3-34h50l-3 34z" fill="#33303c"/>'
        '<path d="M41 10h46l1 10q-24 5-48 0z" fill="#d8383c"/>'
    )


def _face(head: str) -> str:
    return f'<g transform="translate(0 2)">{_scarf(90)}{head}</g>'


def _sitting(head: str) -> str:
    return (
        f'<path d="M92 108c20 2 26-14 20-26" stroke="{DEEP_TEAL}" stroke-width="9" fill="none" stroke-linecap="round"/>'
        f'<path d="M40 66h48c14 20 16 56 4 56H36c-12 0-10-36 4-56z" fill="{TEAL}"/>'
        f'<ellipse cx="64" cy="96" rx="15" ry="22" fill="{CREAM}"/>'
        f'<ellipse cx="36" cy="114" rx="14" ry="10" fill="{DEEP_TEAL}"/>'
        f'<ellipse cx="92" cy="114" rx="14" ry="10" fill="{DEEP_TEAL}"/>'
        f'<ellipse cx="53" cy="117" rx="9" ry="7" fill="{CREAM}"/>'
        f'<ellipse cx="75" cy="117" rx="9" ry="7" fill="{CREAM}"/>'
        f'<g transform="translate(64 74) scale(.72) translate(-64 -92)">{_scarf(88)}</g>'
        f'<g transform="translate(64 40) scale(.72) translate(-64 -58)">{head}</g>'
    )


def _standing(head: str) -> str:
    legs = "".join(
        f'<rect x="{x}" y="84" width="13" height="36" rx="6" fill="{fill}"/>'
        f'<rect x="{x}" y="109" width="13" height="11" rx="5" fill="{CREAM}"/>'
        for x, fill in ((62, DEEP_TEAL), (96, DEEP_TEAL), (48, TEAL), (84, TEAL))
    )
    return (
        f'<path d="M108 74c14-4 16-20 10-30" stroke="{PURPLE}" stroke-width="9" fill="none" stroke-linecap="round"/>'
        f'{legs}<rect x="42" y="60" width="72" height="40" rx="20" fill="{TEAL}"/>'
        f'<ellipse cx="96" cy="72" rx="14" ry="10" fill="{PURPLE}"/>'
        f'<path d="M52 96q24 8 50 0-22 12-50 0z" fill="{CREAM}"/>'
        f'<g transform="translate(40 78) scale(.56) translate(-64 -92)">{_scarf(88)}</g>'
        f'<g transform="translate(40 46) scale(.6) translate(-64 -58)">{head}</g>'
    )


def main() -> None:
    """Command line: writes the mascot's pictures into the package's assets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("lora_booth/assets/mascot"))
    parser.add_argument("--overview", type=Path, help="also write a sheet of all poses here")
    arguments = parser.parse_args()
    write_mascot(arguments.out)
    if arguments.overview is not None:
        write_overview(arguments.overview)


if __name__ == "__main__":
    main()
