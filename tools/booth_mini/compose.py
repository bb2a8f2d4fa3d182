"""Pictures with captions: icons composed on backgrounds, so that every context word has a ground truth.

Plain pictures (about 65 %) show one icon on a named colour; the others are scenes, hats, neighbours, pairs,
stacks and small icons. 15 % of the icons are turned to another hue and called by its word. Colours are
sRGB, pictures are uint8 [64, 64, 3].
"""

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.booth_mini.names import IconName
from tools.booth_mini.nouns import is_training

PICTURE_PX = 64
Pixels = NDArray[np.uint8]

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (18, 18, 22),
    "gray": (140, 142, 148),
    "red": (214, 42, 46),
    "orange": (246, 140, 30),
    "yellow": (250, 214, 60),
    "green": (58, 160, 72),
    "teal": (32, 160, 160),
    "blue": (48, 98, 214),
    "purple": (130, 66, 180),
    "pink": (246, 150, 190),
    "brown": (126, 80, 48),
}
HUES: dict[str, float] = {
    "red": 0.0,
    "orange": 0.08,
    "yellow": 0.145,
    "green": 0.34,
    "teal": 0.49,
    "blue": 0.61,
    "purple": 0.76,
    "pink": 0.91,
}
SCENES: dict[str, str] = {
    "desert": "in a desert",
    "national park": "in a park",
    "cityscape": "in a city",
    "cityscape at dusk": "in a city at dusk",
    "night with stars": "under the stars",
    "sunrise over mountains": "in the mountains at sunrise",
    "sunrise": "at sunrise",
    "sunset": "at sunset",
    "bridge at night": "in front of a bridge at night",
    "milky way": "in front of the milky way",
    "foggy": "in the fog",
}
HATS: dict[str, float] = {
    "top hat": 0.62,
    "crown": 0.56,
    "graduation cap": 0.74,
    "billed cap": 0.66,
    "womans hat": 0.72,
    "rescue workers helmet": 0.66,
}
"""Label of a hat -> its width as a share of the wearer's."""
NEIGHBOURS: tuple[str, ...] = (
    "balloon",
    "soccer ball",
    "rocket",
    "red heart",
    "star",
    "christmas tree",
    "wrapped gift",
)
NEIGHBOURS += (
    "red apple",
    "sunflower",
    "automobile",
    "house",
    "fire",
    "basketball",
    "hot beverage",
    "umbrella",
)
PEDESTALS = (
    "rocket",
    "automobile",
    "soccer ball",
    "wrapped gift",
    "cheese wedge",
    "mushroom",
    "cloud",
    "house",
)
BARE_NAMES = {"red apple": "apple", "green apple": "apple", "red heart": "heart", "automobile": "car"}
BARE_NAMES |= {
    "hot beverage": "cup of coffee",
    "womans hat": "hat",
    "billed cap": "cap",
    "wrapped gift": "present",
}
BARE_NAMES |= {"rescue workers helmet": "helmet", "cheese wedge": "cheese", "sun with face": "sun"}
MEDIA = ("icon", "picture", "emoji")
KINDS: dict[str, float] = {"scene": 0.28, "hat": 0.2, "next to": 0.16, "two": 0.1, "on top": 0.1, "small": 0.16}
"""Compositions and the share of each."""


@dataclass(frozen=True)
class Picture:
    """One training example; `icon` is the index of the main icon and `label` its words (InfoNCE positives)."""

    pixels: Pixels
    caption: str
    label: str
    icon: int


@dataclass(frozen=True)
class Variety:
    """How varied pictures are: shares of compositions and of turned hues; `jitter` of size and place, 0..1."""

    composite_share: float = 0.35
    hue_share: float = 0.15
    jitter: float = 1.0


FULL = Variety()
PLAIN = Variety(composite_share=0.0)


class Composer:
    """Makes pictures from icons; holds the lists of scenes, hats, neighbours and pedestals among them."""

    def __init__(self, names: list[IconName], masters: Pixels) -> None:
        self.names, self.masters = names, masters
        self.by_label: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            if is_training(name):
                self.by_label.setdefault(name.label, []).append(index)

    def draw(
        self,
        icon: int,
        rng: np.random.Generator,
        variety: Variety = FULL,
        *,
        colour: str | None = None,
        kind: str | None = None,
    ) -> Picture:
        """One picture of `icon`, on `colour` or any, of a kind of KINDS or any; by the generator's state alone."""
        if kind is None:
            is_composed = rng.random() < variety.composite_share
            kind = str(rng.choice(list(KINDS), p=list(KINDS.values()))) if is_composed else "plain"
        words, master = self._main_icon(icon, rng, variety.hue_share)
        canvas, place = self._background(kind, rng, colour)
        noun = article(words)
        if kind == "hat":
            noun = f"{noun} wearing {self._wear(canvas, master, rng)}"
        elif kind == "next to":
            noun = f"{noun} next to {self._beside(canvas, master, rng)}"
        elif kind == "on top":
            noun = f"{noun} on top of {self._stack(canvas, master, rng)}"
        elif kind == "two":
            noun = f"two {plural(words)}"
            for centre in (0.27, 0.73):
                paste(canvas, master, rng.uniform(0.46, 0.54), (centre, rng.uniform(0.45, 0.55)))
        else:
            small, size = kind == "small", 0.89 + 0.11 * variety.jitter * rng.uniform(-1, 1)
            size = rng.uniform(0.3, 0.45) if small else rng.uniform(0.6, 0.8) if kind == "scene" else size
            noun = article(f"small {words}") if small else noun
            drift = 0.5 + (1 - size) * rng.uniform(-0.4, 0.4, size=2) * (0.9 if small else 0.5) * variety.jitter
            paste(canvas, master, size, (float(drift[0]), float(drift[1])))
        caption = f"{self._lead(icon, noun, kind, rng)}{' ' + place if place else ''}"
        return Picture(np.asarray(canvas), caption, self.names[icon].label, icon)

    def _main_icon(self, icon: int, rng: np.random.Generator, hue_share: float) -> tuple[str, Image.Image]:
        """Words and RGBA image of the icon: perhaps a tag or a shorter name, mirrored, another hue."""
        name = self.names[icon]
        words = BARE_NAMES.get(name.label, name.label) if rng.random() < 0.6 else name.label
        if name.subgroup.startswith("animal") and words.endswith(" face") and rng.random() < 0.35:
            words = words.removesuffix(" face")
        if name.tags and rng.random() < 0.1:
            words = clean_tag(str(rng.choice(name.tags))) or words
        pixels = np.asarray(self.masters[icon])
        if rng.random() < hue_share:
            colour = str(rng.choice(list(HUES)))
            turned = turn_hue(pixels, HUES[colour])
            if turned is not None:
                pixels, words = turned, f"{colour} {drop_colour(words)}"
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return words, Image.fromarray(np.ascontiguousarray(pixels), "RGBA")

    def _background(self, kind: str, rng: np.random.Generator, colour: str | None) -> tuple[Image.Image, str]:
        scenes = [label for label in SCENES if label in self.by_label] if kind == "scene" else []
        if scenes:
            label = str(rng.choice(scenes))
            scene = Image.fromarray(self.masters[int(rng.choice(self.by_label[label]))], "RGBA")
            canvas = Image.new("RGB", (PICTURE_PX, PICTURE_PX), COLOURS["white"])
            canvas.paste(*_with_mask(scene.crop((16, 16, 112, 112)).resize((PICTURE_PX, PICTURE_PX))))
            return canvas, SCENES[label]
        if colour is None:
            colour = "white" if rng.random() < 0.25 else str(rng.choice(list(COLOURS)))
        rgb = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 7, size=3), 0, 255)
        rgb = np.array(COLOURS["white"]) if colour == "white" else rgb
        canvas = Image.new("RGB", (PICTURE_PX, PICTURE_PX), tuple(int(value) for value in rgb))
        is_named = colour != "white" or rng.random() < 0.3
        return canvas, f"on a{'n' if colour == 'orange' else ''} {colour} background" if is_named else ""

    def _lead(self, icon: int, noun: str, kind: str, rng: np.random.Generator) -> str:
        """The caption's start: bare noun, or "an emoji of", or with the set's style word."""
        style = rng.random()
        if style < 0.45 or (kind != "plain" and style < 0.7):
            return noun
        medium = str(rng.choice(MEDIA))
        if style < 0.6:
            return f"{article(medium)} of {noun}"
        return f"{article(f'{self.names[icon].set_name} {medium}')} of {noun}"

    def _pick(self, labels: tuple[str, ...], rng: np.random.Generator) -> tuple[str, Image.Image]:
        label = str(rng.choice([label for label in labels if label in self.by_label]))
        master = Image.fromarray(self.masters[int(rng.choice(self.by_label[label]))], "RGBA")
        return BARE_NAMES.get(label, label), master

    def _wear(self, canvas: Image.Image, master: Image.Image, rng: np.random.Generator) -> str:
        label = str(rng.choice([label for label in HATS if label in self.by_label]))
        hat = Image.fromarray(self.masters[int(rng.choice(self.by_label[label]))], "RGBA")
        hat, body = hat.crop(hat.getbbox()), master.crop(master.getbbox())
        size = rng.uniform(0.68, 0.78)
        scale = size * PICTURE_PX / max(body.size)
        width, height = (max(1, round(side * scale)) for side in body.size)
        left, top = (PICTURE_PX - width) // 2, PICTURE_PX - height - int(rng.integers(1, 4))
        canvas.paste(*_with_mask(body.resize((width, height)), (left, top)))
        hat_width = max(8, round(width * HATS[label]))
        hat_height = max(4, round(hat_width * hat.height / hat.width))
        at = (left + (width - hat_width) // 2, max(0, top - round(hat_height * 0.66)))
        canvas.paste(*_with_mask(hat.resize((hat_width, hat_height)), at))
        return article(BARE_NAMES.get(label, label))

    def _beside(self, canvas: Image.Image, master: Image.Image, rng: np.random.Generator) -> str:
        label, neighbour = self._pick(NEIGHBOURS, rng)
        centre = float(rng.choice([0.3, 0.7]))
        paste(canvas, master, rng.uniform(0.52, 0.6), (centre, rng.uniform(0.45, 0.55)))
        paste(canvas, neighbour, rng.uniform(0.38, 0.46), (1 - centre, rng.uniform(0.52, 0.62)))
        return article(label)

    def _stack(self, canvas: Image.Image, master: Image.Image, rng: np.random.Generator) -> str:
        label, pedestal = self._pick(PEDESTALS, rng)
        paste(canvas, pedestal.crop(pedestal.getbbox()), 0.5, (0.5, 0.74))
        paste(canvas, master.crop(master.getbbox()), 0.5, (0.5, 0.27))
        return article(label)


def paste(canvas: Image.Image, icon: Image.Image, size: float, centre: tuple[float, float]) -> None:
    """Draws `icon` onto `canvas`, its longer side `size` of the canvas, centred at shares of width and height."""
    scale = size * canvas.width / max(icon.size)
    width, height = max(1, round(icon.width * scale)), max(1, round(icon.height * scale))
    at = (round(centre[0] * canvas.width - width / 2), round(centre[1] * canvas.height - height / 2))
    canvas.paste(*_with_mask(icon.resize((width, height), Image.Resampling.BILINEAR), at))


def turn_hue(master: Pixels, hue: float) -> Pixels | None:
    """The icon with its main hue turned to `hue` (0..1), or None when it has hardly any colour of its own."""
    rgb = master[..., :3].astype(np.float32) / 255
    alpha = master[..., 3].astype(np.float32) / 255
    value, low = rgb.max(-1), rgb.min(-1)
    chroma = value - low
    weight = alpha * chroma
    if weight.sum() < 0.12 * max(float(alpha.sum()), 1.0):
        return None
    safe = np.where(chroma > 1e-6, chroma, 1)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sector = np.where(value == red, ((green - blue) / safe) % 6, np.where(value == green, (blue - red) / safe + 2, 0))
    sector = np.where((value == blue) & (value != red) & (value != green), (red - green) / safe + 4, sector)
    angle = sector / 6 * 2 * np.pi
    main = np.arctan2((weight * np.sin(angle)).sum(), (weight * np.cos(angle)).sum()) / (2 * np.pi)
    turned = (sector / 6 + (hue - main)) % 1.0 * 6
    position = np.stack([(n + turned) % 6 for n in (5.0, 3.0, 1.0)], -1)
    wave = np.clip(np.minimum(position, 4 - position), 0, 1)
    out = value[..., None] - chroma[..., None] * wave
    return np.concatenate([np.round(out * 255).astype(np.uint8), master[..., 3:]], -1)


def drop_colour(words: str) -> str:
    """The words without a leading colour word, so that a turned "red apple" is not "a blue red apple"."""
    first, _, rest = words.partition(" ")
    return rest if first in COLOURS and rest else words


def clean_tag(tag: str) -> str:
    """A usable keyword in lower case, or "" for one that is no name of a thing."""
    tag = tag.lower().replace("-", " ").strip()
    return tag if tag.replace(" ", "").isalpha() and len(tag) > 2 else ""


def article(words: str) -> str:
    """The words after "a" or "an"; a plural such as "grapes" or "glasses" takes none."""
    last = words.split()[-1] if words.split() else ""
    if last.endswith("s") and not last.endswith(("ss", "us", "is", "as")):
        return words
    return f"an {words}" if words[:1] in "aeiou" else f"a {words}"


def plural(words: str) -> str:
    """The words in the plural, by the regular rules ("fox face" -> "fox faces", "fox" -> "foxes")."""
    if words.endswith("s") and not words.endswith(("ss", "us")):
        return words
    if words.endswith(("s", "x", "ch", "sh")):
        return words + "es"
    if words.endswith("y") and words[-2:-1] not in "aeiou":
        return words[:-1] + "ies"
    return words + "s"


def mean_hue(rgb: tuple[int, int, int]) -> float:
    """Hue 0..1 of one colour, for tests and for naming."""
    return colorsys.rgb_to_hsv(*(value / 255 for value in rgb))[0]


def _with_mask(icon: Image.Image, at: tuple[int, int] = (0, 0)) -> tuple[Image.Image, tuple[int, int], Image.Image]:
    return icon, at, icon
