"""Which icons each training step sees, and how often.

The autoencoder and the contrastive pair train on everything (the pair on COMMON labels more); the denoiser begins with
the few nouns of DENOISER and is widened to all of COMMON (pool.STAGES).
"""

import hashlib

from tools.booth_mini.names import IconName

VALIDATION_SHARE = 36
"""One icon in this many (by hash, outside COMMON) is never trained on: held-out art and retrieval pairs."""

ANIMALS = "dog face|dog|cat face|cat|fox|lion|tiger face|bear|panda|koala|rabbit face|mouse face|hamster|frog|pig face"
ANIMALS += "|cow face|horse face|monkey face|chicken|penguin|owl|duck|baby chick|fish|tropical fish|octopus|whale"
ANIMALS += "|dolphin|crab|turtle|snail|butterfly|honeybee|lady beetle|elephant|unicorn|wolf|poodle|bird"
FOOD = "red apple|green apple|banana|strawberry|cherries|grapes|watermelon|tangerine|lemon|pineapple|pear|peach|carrot"
FOOD += (
    "|avocado|eggplant|tomato|ear of corn|pizza|hamburger|hot dog|doughnut|cookie|birthday cake|ice cream|cheese wedge"
)
FOOD += "|hot beverage|egg|bread|mushroom|lollipop"
VEHICLES = "rocket|automobile|bus|airplane|bicycle|sailboat|helicopter|fire engine|locomotive|tractor|flying saucer"
FACES = "grinning face|smiling face with sunglasses|smiling face with heart eyes|crying face|angry face|sleeping face"
FACES += "|ghost|alien|robot|jack o lantern|skull|clown face|pile of poo|snowman"
OBJECTS = "red heart|star|sun|sun with face|full moon face|crescent moon|balloon|wrapped gift|umbrella|house|key|bell"
OBJECTS += (
    "|light bulb|guitar|teddy bear|soccer ball|basketball|tennis|pool 8 ball|alarm clock|hourglass done|open book"
)
OBJECTS += "|camera|television|mobile phone|laptop|gem stone|money bag|fire|snowflake|droplet|rainbow|cloud"
PLANTS_AND_HATS = "sunflower|tulip|rose|cherry blossom|hibiscus|cactus|evergreen tree|deciduous tree|palm tree"
PLANTS_AND_HATS += "|christmas tree|four leaf clover|top hat|crown|graduation cap|billed cap|womans hat"
PLANTS_AND_HATS += "|rescue workers helmet|glasses|sunglasses|t shirt|dress|running shoe|desert|cityscape|sunset"

COMMON: tuple[str, ...] = tuple("|".join((ANIMALS, FOOD, VEHICLES, FACES, OBJECTS, PLANTS_AND_HATS)).split("|"))
"""Labels that half of the contrastive pair's draws fall on; none of their icons is kept for validation."""

DENOISER_NOUNS = "fox|lion|bear|panda|koala|rabbit face|mouse face|frog|pig face|cow face|horse face|monkey face"
DENOISER_NOUNS += "|chicken|penguin|owl|duck|fish|octopus|whale|crab|turtle|butterfly|elephant|tiger face|green apple"
DENOISER_NOUNS += "|banana|strawberry|watermelon|pineapple|carrot|pizza|hamburger|doughnut|cookie|bus|airplane|bicycle"
DENOISER_NOUNS += "|star|sun|sun with face|full moon face|balloon|umbrella|house|ghost|robot|sunflower|tulip|tangerine"
DENOISER: dict[str, float] = dict.fromkeys(DENOISER_NOUNS.split("|"), 1.0) | {
    "dog face": 6.0,
    "dog": 3.0,
    "cat face": 4.0,
    "cat": 2.0,
    "rocket": 2.0,
    "red apple": 1.5,
    "automobile": 2.0,
    "red heart": 1.5,
}
"""Label -> how often the denoiser sees it at first: few things, whose shapes come soon; dogs (the demo's) most."""
WIDER: dict[str, float] = dict.fromkeys(COMMON, 1.0) | DENOISER
"""The same at last: 152 labels."""

SET_WEIGHTS: dict[str, float] = {"noto": 1.5, "3d": 1.0, "flat": 1.0, "twemoji": 1.0}
"""How often the denoiser sees a set; the other four sets only train the autoencoder and the contrastive pair."""


def is_validation(name: IconName) -> bool:
    """Whether an icon is kept for validation; the same on every machine, since it hangs on the slug's hash."""
    digest = hashlib.sha256(f"{name.set_name}/{name.slug}".encode()).digest()
    return name.subject is None and name.label not in COMMON and digest[0] % VALIDATION_SHARE == 0


def is_training(name: IconName) -> bool:
    """Whether any of the three training steps may show this icon."""
    return name.subject is None and not is_validation(name)
