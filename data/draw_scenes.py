"""Draw a small captioned data set, so that the whole pipeline runs without any download.

    python data/draw_scenes.py                                 # 400 images in data/scenes
    python data/draw_scenes.py --output OUT --images 50 --seed 1

The folder has the layout of Kaggle's Flickr8k: ``Images/*.jpg`` and ``captions.csv``
(columns image, caption, split), five captions per image. One image in ten is for
validation, one for the test. The same seed and Pillow version give the same bytes.

``compose`` chooses a ``Scene`` at random; ``draw`` and ``write_captions`` both work from
it alone, so a caption says only what the image shows. The tables below hold what can
appear. A drawing is a list of shapes in a box of 100 x 100, the y axis
pointing down, an animal looking to the right: "oval FILL x0 y0 x1 y1", "box" the same,
"area FILL x y x y ..." (a polygon), "line FILL THICKNESS x y x y ...", "dots FILL WIDTH
HEIGHT x y x y ..." (round boxes). FILL is a colour that Pillow knows, or "main" (the
object's own), "dark" (a darker main), "skin", "hair".
"""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
from PIL import Image, ImageColor, ImageDraw

WIDTH, HEIGHT = 320, 240
SMOOTH = 2  # drawn this many times larger, then reduced, for smooth edges
COLOURS = {
    "red": "#d63031", "blue": "#2d69d7", "yellow": "#fad232", "green": "#37a046",
    "black": "#26262b", "white": "#fafafa", "brown": "#8c552d", "orange": "#f0862a",
    "pink": "#f582af", "purple": "#8c4bbe", "gray": "#8c8c91",
}  # fmt: skip
COUNTS = {1: "one", 2: "two", 3: "three"}
PLURALS = {
    "man": "men", "woman": "women", "lady": "ladies", "child": "children", "puppy": "puppies",
    "fish": "fish",
}  # fmt: skip
WEAR = {"man": "shirt", "boy": "shirt", "woman": "dress", "girl": "dress"}
SIZES = {"small": (0.75, ("small", "little")), "big": (1.3, ("big", "large"))}
ACTIONS = {  # they do, it does, is doing
    "stand": "stand stands standing", "sit": "sit sits sitting", "run": "run runs running",
    "jump": "jump jumps jumping", "fly": "fly flies flying", "swim": "swim swims swimming",
    "sail": "sail sails sailing", "drive": "drive drives driving", "hold": "hold holds holding",
}  # fmt: skip

MAN = "oval skin 39 2 61 23; area hair 38 13 40 3 50 -2 60 3 62 13 56 7 44 7; "
MAN += "box main 37 24 63 60"
WOMAN = "area hair 34 38 38 2 50 -2 62 2 66 38; oval skin 40 3 60 24; "
WOMAN += "area hair 38 12 42 0 58 0 62 12 50 5; area main 40 24 60 24 78 74 22 74"
BOY = "oval skin 35 2 65 31; box main 37 31 63 64; "
BOY += "area main 33 13 37 2 50 -3 63 2 67 13; box dark 60 9 80 14"  # a cap
GIRL = "oval hair 22 8 38 34; oval hair 62 8 78 34; oval hair 34 -2 66 26; "
GIRL += "oval skin 37 5 63 31; area main 41 31 59 31 82 76 18 76"
FACE = "oval black 52 10 55 13; oval black 45 10 48 13; line #b03030 1 46 18 50 19 54 18; "
TROUSERS = "line #303a5c 11 43 58 42 98; line #303a5c 11 57 58 58 98; "
TROUSERS_RUN = "line #303a5c 11 44 58 30 76 8 80; line #303a5c 11 56 58 76 72 70 98; "
TROUSERS_JUMP = "line #303a5c 11 44 58 24 72 30 94; line #303a5c 11 56 58 78 70 74 92; "
LEGS = "line skin 7 43 70 42 99; line skin 7 57 70 58 99; "
LEGS_RUN = "line skin 7 43 70 26 84 8 84; line skin 7 57 70 76 80 74 99; "
LEGS_JUMP = "line skin 7 40 70 20 84 30 98; line skin 7 60 70 82 82 76 96; "
ARMS = "; line skin 7 38 29 26 58; line skin 7 62 29 74 58; "
ARMS_RUN = "; line skin 7 38 29 20 44 28 56; line skin 7 62 29 78 46 92 34; "
ARMS_JUMP = "; line skin 7 38 29 14 4; line skin 7 62 29 86 4; "
ARM_UP = "; line skin 7 38 29 26 58; line skin 7 62 29 88 8; "
DOG_HEAD = "oval main 60 14 90 48; oval main 76 27 102 46; oval dark 58 14 72 50; "
DOG_HEAD += "oval black 95 28 103 37; oval white 77 20 85 29; oval black 80 22 85 28"


def person(body: str, legs: tuple[str, str, str]) -> dict[str, str]:
    """Return the drawings of one kind of person, by action."""
    arms = {"stand": ARMS, "run": ARMS_RUN, "jump": ARMS_JUMP, "hold": ARM_UP}
    by_action = dict(zip(("stand", "run", "jump", "hold"), (*legs, legs[0]), strict=True))
    return {action: by_action[action] + body + arms[action] + FACE for action in arms}


class Kind(NamedTuple):
    """An object: height in pixels, width / height, colours, drawings by action, words."""

    height: int
    aspect: float
    colours: str
    drawings: dict[str, str]
    names: tuple[str, ...]


CLOTHES = "red blue yellow green white orange pink purple"
KINDS = {
    "dog": Kind(92, 1.25, "brown black white orange gray", {
        "run": "area main 20 50 -10 30 -6 22 28 42; line dark 9 30 62 12 92; "
        "line dark 9 66 60 88 92; oval main 14 36 78 70; line main 9 24 58 -4 80; "
        "line main 9 70 56 102 78; " + DOG_HEAD,
        "jump": "area main 20 60 -6 62 -6 54 28 50; line dark 9 28 70 2 88; "
        "line dark 9 68 58 98 66; area main 12 72 20 48 64 26 80 52 40 78; "
        "line main 9 24 68 4 98; line main 9 70 52 104 54; " + DOG_HEAD,
        "sit": "area main 26 92 2 74 6 66 34 82; area main 60 34 84 46 74 84 60 98 24 98 22 76; "
        "oval main 18 62 56 100; box dark 56 62 64 100; box main 66 56 75 100; "
        "box main 36 93 58 100; " + DOG_HEAD,
    }, ("dog", "dog", "puppy")),
    "cat": Kind(92, 0.9, "black orange gray white brown", {
        "sit": "line main 9 62 94 94 92 100 70 90 54; oval main 24 42 76 100; "
        "area main 26 30 26 -4 48 14; area main 74 30 74 -4 52 14; area pink 31 20 30 5 42 14; "
        "area pink 69 20 70 5 58 14; oval main 24 8 76 54; oval #c8e650 33 22 46 35; "
        "oval #c8e650 54 22 67 35; box black 38 23 41 34; box black 59 23 62 34; "
        "area #f582af 46 38 54 38 50 43; line #999999 1 4 34 34 40; line #999999 1 4 46 34 43; "
        "line #999999 1 96 34 66 40; line #999999 1 96 46 66 43; oval dark 34 90 48 100; "
        "oval dark 52 90 66 100",
    }, ("cat", "cat", "kitten")),
    "man": Kind(140, 0.6, CLOTHES, person(MAN, (TROUSERS, TROUSERS_RUN, TROUSERS_JUMP)), ("man",)),
    "woman": Kind(136, 0.6, CLOTHES, person(WOMAN, (LEGS, LEGS_RUN, LEGS_JUMP)), ("woman", "lady")),
    "boy": Kind(98, 0.7, CLOTHES, person(BOY, (LEGS, LEGS_RUN, LEGS_JUMP)), ("boy", "child")),
    "girl": Kind(98, 0.7, CLOTHES, person(GIRL, (LEGS, LEGS_RUN, LEGS_JUMP)), ("girl", "child")),
    "bird": Kind(62, 1.4, "red blue yellow black white", {
        "fly": "oval main 24 34 78 72; oval main 62 22 88 50; area orange 86 32 104 38 86 43; "
        "oval white 74 28 81 36; oval black 76 30 81 35; area main 30 50 0 40 4 64; "
        "area dark 34 48 62 48 40 -6 22 0",
    }, ("bird",)),
    "fish": Kind(70, 1.6, "red yellow orange purple pink white", {
        "swim": "area main 30 50 0 14 4 86; area dark 40 30 66 2 70 26; "
        "area dark 46 74 62 98 66 70; oval main 18 18 98 82; line dark 4 66 26 60 50 66 74; "
        "oval white 76 32 88 48; oval black 81 36 87 44; line black 2 90 60 97 56",
    }, ("fish",)),
    "boat": Kind(125, 1.1, "red blue brown green white", {
        "sail": "line #5a3a20 3 48 2 48 76; area #fdf6e3 52 6 52 66 92 66; "
        "area #e8dcc0 44 14 44 66 14 66; area main 0 72 100 72 84 98 16 98; "
        "area dark 0 72 100 72 97 79 3 79",
    }, ("boat", "boat", "sailboat")),
    "car": Kind(76, 2.1, "red blue yellow green white black", {
        "drive": "area main 20 44 32 6 68 6 82 44; area #bfe6f7 27 42 36 14 48 14 48 42; "
        "area #bfe6f7 52 42 52 14 65 14 74 42; box main 2 40 98 80; box dark 2 68 98 80; "
        "oval #ffe680 91 46 99 60; oval #1d1d20 14 58 36 104; oval #1d1d20 66 58 88 104; "
        "oval #b9b9c0 20 70 30 92; oval #b9b9c0 72 70 82 92",
    }, ("car",)),
    "ball": Kind(50, 1.0, "red blue yellow orange pink purple", {
        "": "oval main 0 0 100 100; area white 30 8 50 0 62 50 50 100 30 92 42 50; "
        "oval #ffffff 68 16 82 30",
    }, ("ball",)),
    "tree": Kind(185, 0.85, "green", {
        "": "box #7a4a24 44 46 56 100; oval dark 2 20 60 58; oval dark 42 18 98 58; "
        "oval main 0 12 54 50; oval main 46 14 100 52; oval main 18 -2 82 46",
    }, ("tree",)),
    "house": Kind(150, 1.15, "red yellow white blue pink brown", {
        "": "box #6b3d2e 72 4 84 34; box main 8 40 92 100; area #8a3324 -4 42 50 0 104 42; "
        "box #4a2c17 42 62 58 100; box #cfeaf7 16 54 34 74; box #cfeaf7 66 54 84 74; "
        "line white 1 25 54 25 74; line white 1 75 54 75 74; oval #f0c040 54 80 57 83",
    }, ("house",)),
    "kite": Kind(66, 0.8, "red blue yellow green orange pink purple", {
        "": "area main 50 0 100 40 50 100 0 40; area dark 50 0 100 40 50 40; "
        "area dark 0 40 50 40 50 100; line white 2 0 40 100 40",
    }, ("kite",)),
    "balloon": Kind(70, 0.8, "red blue yellow green orange pink purple", {
        "": "area dark 42 100 58 100 50 88; oval main 2 0 98 94; oval white 22 14 38 34",
    }, ("balloon",)),
    "umbrella": Kind(185, 1.1, "red blue yellow green pink purple", {
        "": "line #6b4a2c 3 50 10 50 100; area main 0 40 6 22 22 8 50 0 78 8 94 22 100 40; "
        "area white 33 40 36 18 50 0 64 18 67 40; area main 43 40 45 18 50 0 55 18 57 40",
    }, ("umbrella",)),
    "snowman": Kind(125, 0.75, "white", {
        "": "line #6b4a2c 3 26 50 -4 32; line #6b4a2c 3 74 50 104 32; oval #dfe9f2 12 56 88 102; "
        "oval #eef4f9 22 32 78 68; oval white 30 12 70 40; box #222228 34 -8 66 10; "
        "box #222228 24 9 76 14; area #f0862a 49 24 49 29 72 29; oval black 40 20 45 24; "
        "oval black 54 20 59 24; box #d63031 34 37 66 43",
    }, ("snowman",)),
    "flower": Kind(95, 0.6, "red yellow pink purple orange", {
        "": "line #2f7d32 5 50 30 50 100; area #2f7d32 50 86 88 62 82 80; "
        "area #2f7d32 50 92 12 70 18 86; oval main 4 12 48 40; oval main 52 12 96 40; "
        "oval main 30 -6 70 24; oval main 14 28 56 56; oval main 44 28 86 56; "
        "oval #7a4a10 34 16 66 38",
    }, ("flower",)),
    "plant": Kind(105, 0.6, "green", {
        "": "line main 10 50 100 40 70 56 44 46 10; line main 8 40 100 18 76 26 52 10 30; "
        "line main 8 60 100 82 78 72 54 90 30",
    }, ("plant",)),
}  # fmt: skip


class Setting(NamedTuple):
    """A background: shapes over the whole image, the shadow's colour, its objects and words."""

    shapes: str
    shadow: str
    subjects: str  # "kind:action,action ..."
    others: str  # "kind:relation ..."
    avoid: str  # colours that would hardly be visible
    places: tuple[str, ...]
    skies: tuple[str, ...]  # places for what flies
    sunny: bool


PEOPLE = "man:{0} woman:{0} boy:{0} girl:{0} "
SUN = "oval #ffe14d 0 0 100 100"
CLOUD = "oval white 0 40 55 100; oval white 25 5 75 90; oval white 50 35 100 98"
SETTINGS = {
    "field": Setting(
        "box #8fd0f5 0 0 100 100; box #6fbf4a 0 56 100 100", "#47902d",
        PEOPLE.format("stand,run,jump") + "dog:run,sit,jump dog:run,sit cat:sit bird:fly",
        "tree:under house:front ball:next flower:next kite:hold balloon:hold bird:above", "green",
        ("in the grass", "on the grass", "in a green field", "in a field"),
        ("in the blue sky", "over the grass", "over a green field"), True),
    "beach": Setting(
        "box #a9def9 0 0 100 100; box #1f7fc4 0 36 100 100; box white 0 55 100 59; "
        "box #f3d9a0 0 58 100 100", "#cdb078",
        PEOPLE.format("stand,run,jump") + "dog:run,jump,sit bird:fly",
        "umbrella:under ball:next kite:hold balloon:hold", "yellow",
        ("on the beach", "on the sand", "by the water", "on a beach"),
        ("over the beach", "in the sky over the water"), True),
    "night": Setting(
        "box #141b45 0 0 100 100; oval #fdf6c8 80 6 94 25; oval #141b45 76 3 89 21; "
        "box #1f3b34 0 64 100 100; dots white 2 3 10 10 28 22 45 8 62 18 70 38 18 40 52 34",
        "#142822", PEOPLE.format("stand,run") + "dog:sit,run cat:sit car:drive",
        "house:front tree:under", "black blue brown purple gray green",
        ("at night", "in the dark", "under the moon", "on a dark night"), (), False),
    "snow": Setting(
        "box #c3d2df 0 0 100 100; area #93a9bd 0 56 22 16 44 56; area #a3b6c8 34 56 64 8 96 56; "
        "area white 16 28 22 16 29 28; area white 54 24 64 8 74 24; box #f4f8fc 0 54 100 100",
        "#ccd8e4",
        PEOPLE.format("stand,run,jump") + "dog:run,jump,sit cat:sit",
        "snowman:next tree:under house:front ball:next", "white gray",
        ("in the snow", "in the white snow", "on the snow"), (), False),
    "room": Setting(
        "box #f0dcc0 0 0 100 100; box #a9713f 0 66 100 100; box #fbf3e6 0 63 100 67; "
        "box white 8 8 36 44; box #9ad4f2 10 11 21 41; box #9ad4f2 23 11 34 41; "
        "oval #c0504d 14 74 86 98", "#7d4f29",
        PEOPLE.format("stand,jump") + "cat:sit cat:sit dog:sit",
        "flower:next ball:next balloon:hold", "white brown",
        ("in a room", "inside the house", "in the room", "on the floor"), (), False),
    "street": Setting(
        "box #cfe3ee 0 0 100 100; box #b98d72 0 8 26 58; box #8d99ae 27 20 52 58; "
        "box #c9a66b 53 2 74 58; box #7f8c8d 75 16 100 58; "
        "dots #fff3b0 6 10 5 16 15 16 5 34 15 34 32 28 42 28 57 12 65 12 57 32 65 32 80 24 89 24; "
        "box #d5d5d5 0 56 100 64; box #55555c 0 64 100 100; "
        "dots #f5f5f5 16 3 4 79 30 79 56 79 82 79", "#3c3c42",
        PEOPLE.format("stand,run") + "car:drive car:drive dog:run,sit",
        "car:front ball:next balloon:hold", "black gray",
        ("on the street", "on the road", "in the city", "on a city street"), (), False),
    "lake": Setting(
        "box #fbd9a5 0 0 100 100; area #7aa874 0 46 26 22 52 46; area #6a9a68 40 46 74 16 100 46; "
        "box #2b8fb8 0 46 100 100; line #7cc8e4 1 8 60 24 60; line #7cc8e4 1 60 56 78 56; "
        "line #7cc8e4 1 70 92 90 92; line #7cc8e4 1 12 94 30 94", "#1f6f94",
        "boat:sail boat:sail boat:sail bird:fly", "bird:above boat:next", "blue white",
        ("on the lake", "on the water", "on a lake"), ("over the lake", "over the water"), True),
    "sea": Setting(
        "box #0e6fb0 0 0 100 100; box #0b5a94 0 45 100 100; "
        "area #d9c08a 0 100 0 88 30 84 60 90 100 85 100 100; "
        "dots #9fd8f0 3 4 10 12 88 30 48 6 92 62 5 60", "",
        "fish:swim", "plant:next fish:next", "blue purple",
        ("in the water", "in the sea", "in the blue water", "under water"), (), False),
}  # fmt: skip
TEMPLATES_ALONE = (
    "{full} {be} {ing} {place}", "{bare} {does} {place}", "{full} {place}", "{bare} {ing} {place}",
    "there {be} {full} {ing} {place}", "{place} {full} {be} {ing}", "{full} {be} {ing} {when}",
    "{full} {does} {place}",
)  # fmt: skip
TEMPLATES_PAIRED = (
    "{full} {be} {ing} {near}", "{bare} {does} {place} {near}", "{bare} {near}", "{back} {when}",
    "{bare} {ing} {place} {near}", "there {be} {bare} {ing} {near}", "{bare} and {other} {when}",
    "{full} {be} {ing} {place} {near}", "{back}", "{place} {full} {be} {ing} {near}",
)  # fmt: skip


class Relation(NamedTuple):
    """How subject and other object are placed: words both ways, offsets from the middle."""

    near: tuple[str, ...]
    back: tuple[str, ...]
    other_x: float  # pixels away from the subject's side
    other_foot: float  # share of the height; 0: as the subject
    other_scale: float
    subject_x: float  # pixels towards the subject's side
    subject_height: float  # at most


RELATIONS = {
    "next": Relation(("next to {other}", "beside {other}", "near {other}"),
                     ("{other} next to {bare}", "{bare} on the {side} and {other} on the {far}"),
                     86, 0, 1.1, 80, 125),
    "front": Relation(("in front of {other}",),
                      ("{other} behind {bare}", "{other} with {bare} in front"),
                      30, 0.81, 1.07, 45, 100),
    "under": Relation(("under {other}",), ("{other} over {bare}", "{other} with {bare} under it"),
                      0, 0, 1.15, 42, 98),
    "above": Relation(("with {other} flying above",), ("{other} flying over {bare}",),
                      20, 0.32, 1.0, 0, 115),
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What one image shows."""

    setting: str
    kind: str
    action: str
    colour: str
    count: int
    size: str  # "small", "big" or ""
    side: str  # where the subject is: "left", "right"
    sunny: bool
    other: str = ""  # another kind, or none
    other_colour: str = ""
    relation: str = ""  # a key of RELATIONS, or "hold"


def compose(rng: random.Random) -> Scene:
    """Choose the contents of an image."""
    name = rng.choice(list(SETTINGS))
    setting = SETTINGS[name]
    kind, actions = rng.choice(setting.subjects.split()).split(":")
    action, other, other_colour, relation = rng.choice(actions.split(",")), "", "", ""
    colour = rng.choice([c for c in KINDS[kind].colours.split() if c not in setting.avoid.split()])
    others = [entry.split(":") for entry in setting.others.split()]
    if kind not in WEAR:  # only people hold things
        others = [entry for entry in others if entry[1] != "hold"]
    if action not in ("fly", "drive") and rng.random() < 0.65:
        other, relation = rng.choice(others)
        action = "hold" if relation == "hold" else action
        every = KINDS[other].colours.split()
        # At night even a green tree is better pale than absent.
        other_colour = rng.choice(
            [c for c in every if c != colour and c not in setting.avoid.split()] or every
        )
    count = rng.choice((1, 1, 2) if other else (1, 1, 1, 2, 3))
    count = 1 if relation == "hold" or other == kind else count
    size = rng.choice(("", *SIZES)) if count == 1 and kind not in WEAR else ""
    side, sunny = rng.choice(("left", "right")), setting.sunny and rng.random() < 0.5
    return Scene(
        name, kind, action, colour, count, size, side, sunny, other, other_colour, relation
    )


def write_captions(scene: Scene, rng: random.Random) -> list[str]:
    """Return five captions, all different and true of ``scene``."""
    templates = TEMPLATES_PAIRED if scene.relation in RELATIONS else TEMPLATES_ALONE
    captions: dict[str, str] = {}
    while len(captions) < 5:
        for template in rng.sample(templates, 5 - len(captions)):
            text = template.format_map(_phrases(scene, rng))
            end = rng.choice(("", "", "", " .", "."))  # the habits of different writers
            captions.setdefault(text, (text.capitalize() if end == "." else text) + end)
    return list(captions.values())


def _phrases(scene: Scene, rng: random.Random) -> dict[str, str]:
    """Return words for a template's fields, chosen anew for each caption."""
    setting, one, twins = SETTINGS[scene.setting], scene.count == 1, scene.other == scene.kind
    full = _noun(scene.kind, scene.count, scene.colour, scene.size, rng)
    plural, singular, ing = ACTIONS["fly" if scene.other == "kite" else scene.action].split()
    place = rng.choice(setting.skies if scene.action == "fly" else setting.places)
    # Of two boats the colours are what tells them apart.
    bare = full if twins else _noun(scene.kind, scene.count, "", "", rng)
    say_colour = twins or rng.random() < 0.6
    other = _noun(scene.other, 1, scene.other_colour if say_colour else "", "", rng)
    phrases = {
        "full": full, "bare": bare, "other": other, "be": "is" if one else "are", "place": place,
        "ing": ing, "does": singular if one else plural,
        "when": "on a sunny day" if scene.sunny else place,
        "side": scene.side, "far": "right" if scene.side == "left" else "left",
    }  # fmt: skip
    if scene.relation == "hold":
        phrases |= {"ing": f"{ing} {other}", "does": f"{singular} {other}"}
    elif scene.relation:
        relation = RELATIONS[scene.relation]
        phrases["near"] = rng.choice(relation.near).format_map(phrases)
        phrases["back"] = rng.choice(relation.back).format_map(phrases)
    return phrases


def _noun(kind: str, count: int, colour: str, size: str, rng: random.Random) -> str:
    """Return for example "a small brown dog" or "two men in red shirts"; "" for no kind."""
    if not kind:
        return ""
    name, wear, tail = rng.choice(KINDS[kind].names), WEAR.get(kind), ""
    name = name if count == 1 else PLURALS.get(name, name + "s")
    if colour and wear:
        wear += "" if count == 1 else "es" if wear == "dress" else "s"
        tail = f" in {_counted(f'{colour} {wear}', 1) if count == 1 else f'{colour} {wear}'}"
    elif colour and len(KINDS[kind].colours.split()) > 1:  # no one says "a white snowman"
        name = f"{colour} {name}"
    return _counted(f"{rng.choice(SIZES[size][1])} {name}" if size else name, count) + tail


def _counted(words: str, count: int) -> str:
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article if count == 1 else COUNTS[count]} {words}"


class Canvas:
    """An image being drawn; shades of its setting, of skin and of hair are random."""

    def __init__(self, setting: Setting, rng: random.Random) -> None:
        self.image = Image.new("RGB", (WIDTH * SMOOTH, HEIGHT * SMOOTH))
        self.pen = ImageDraw.Draw(self.image)
        self.shadow = setting.shadow
        self.tints = {"skin": rng.choice(("#f3c9a5", "#d9a074", "#8d5a3a")),
                      "hair": rng.choice(("#2b1d14", "#6b4423", "#e0b24c"))}  # fmt: skip
        self.shapes(setting.shapes, shade=rng.uniform(0.94, 1.04))

    def put(
        self, kind: str, action: str, colour: str, x: float, y: float, height: float, flip: bool
    ) -> None:
        """Draw one object; ``x`` is its middle, ``y`` its lower edge."""
        drawings, width = KINDS[kind].drawings, height * KINDS[kind].aspect
        self.tints |= {"main": COLOURS[colour], "dark": _scaled(COLOURS[colour], 0.72)}
        if self.shadow and kind not in ("bird", "kite", "balloon", "boat"):
            self.shapes(f"oval {self.shadow} 0 0 100 100", (x - width / 2, y - 5, width, 11))
        y -= height * 0.28 if action == "jump" else 0
        drawing = drawings.get(action) or next(iter(drawings.values()))
        self.shapes(drawing, (x - width / 2, y - height, width, height), flip)

    def shapes(
        self, drawing: str, box: tuple[float, float, float, float] = (0, 0, WIDTH, HEIGHT),
        flip: bool = False, shade: float = 1.0,
    ) -> None:  # fmt: skip
        """Draw a list of shapes into ``box`` (left, top, width, height)."""
        left, top, width, height = (side * SMOOTH / 100 for side in box)
        for form, fill, *words in map(str.split, drawing.rstrip("; ").split(";")):
            colour = _scaled(self.tints.get(fill, fill), shade)
            numbers = [float(word) for word in words]
            sizes = [numbers.pop(0) for _ in range({"line": 1, "dots": 2}.get(form, 0))]
            xs = [left * 100 + (100 - x if flip else x) * width for x in numbers[::2]]
            points = list(zip(xs, [top * 100 + y * height for y in numbers[1::2]], strict=True))
            if form == "line":
                thick = max(1, round(sizes[0] * height))
                self.pen.line(points, colour, thick, joint="curve")
            elif form == "area":
                self.pen.polygon(points, colour)
            elif form == "dots":
                for x, y in points:
                    corner = (x + sizes[0] * width, y + sizes[1] * height)
                    self.pen.rounded_rectangle((x, y, *corner), 8, colour)
            else:
                pen = self.pen.ellipse if form == "oval" else self.pen.rectangle
                (x0, y0), (x1, y1) = points
                pen((min(x0, x1), y0, max(x0, x1), y1), colour)


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw ``scene``, with random exact places and shades."""
    canvas = Canvas(SETTINGS[scene.setting], rng)
    for _ in range(rng.randrange(3) if SETTINGS[scene.setting].sunny else 0):
        canvas.shapes(CLOUD, (rng.uniform(10, 180), rng.uniform(4, 40), 70, 28))
    if scene.sunny:
        canvas.shapes(SUN, (262, 8, 46, 46))
    flip, side = rng.random() < 0.5, -1 if scene.side == "left" else 1
    x, foot = rng.uniform(0.46, 0.54) * WIDTH, rng.uniform(0.91, 0.97) * HEIGHT
    foot *= {"fly": 0.48, "swim": 0.74, "sail": 0.9}.get(scene.action, 1)
    height = KINDS[scene.kind].height * (1.15, 0.95, 0.75)[scene.count - 1]
    height *= SIZES[scene.size][0] if scene.size else 1
    spread: float = (0, 140, 105)[scene.count - 1]
    if scene.relation == "hold":
        ahead, height = -1 if flip else 1, min(height, 128)
        x -= ahead * 40
        reach = ahead * KINDS[scene.kind].aspect * height * 0.38
        hand, end = (x + reach, foot - height * 0.92), (x + reach * 2.6, foot - 150)
        canvas.pen.line([v * SMOOTH for v in (*hand, *end)], "#333333", 3)
        canvas.put(
            scene.other,
            "",
            scene.other_colour,
            end[0],
            end[1] + 20,
            KINDS[scene.other].height,
            flip,
        )
    elif scene.relation:
        relation = RELATIONS[scene.relation]
        canvas.put(
            scene.other, "", scene.other_colour, x - side * relation.other_x,
            relation.other_foot * HEIGHT or foot + (35 if scene.other == "plant" else -3),
            KINDS[scene.other].height * relation.other_scale, flip,
        )  # fmt: skip
        height = min(height, relation.subject_height)
        spread = max(84, height * KINDS[scene.kind].aspect)
        x += side * relation.subject_x * (scene.relation != "under" or scene.count == 1)
    else:
        x += side * (60, 20, 0)[scene.count - 1]
    half = spread * (scene.count - 1) / 2 + height * KINDS[scene.kind].aspect / 2
    x = min(max(x, half), WIDTH - half)
    for number in range(scene.count):
        y = foot + (rng.uniform(-14, 14) if scene.action in ("fly", "swim") else 0)
        middle = x + (number - (scene.count - 1) / 2) * spread
        canvas.put(scene.kind, scene.action, scene.colour, middle, y, height, flip)
    return canvas.image.reduce(SMOOTH)


def _scaled(colour: str, factor: float) -> str:
    """Return ``colour`` made darker or lighter."""
    parts = (min(255, round(part * factor)) for part in ImageColor.getrgb(colour)[:3])
    return "#{:02x}{:02x}{:02x}".format(*parts)


def generator(seed: int, index: int) -> random.Random:
    """Return an image's own generator: however many are drawn, the first ones are the same."""
    return random.Random(f"{seed}-{index}")


def draw_scenes(folder: Path, images: int, seed: int) -> None:
    """Write the data set into ``folder``; images of an earlier run there are replaced.

    Raises ``ValueError`` for fewer than one image, and ``OSError`` if ``folder`` cannot be
    written.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, not {images}")
    image_folder = folder / "Images"
    image_folder.mkdir(parents=True, exist_ok=True)
    names = [f"scene_{index:05d}.jpg" for index in range(images)]
    rows = [("image", "caption", "split")]
    for index, name in enumerate(names):
        rng = generator(seed, index)
        scene = compose(rng)
        part = image_folder / f".{name}.part"
        draw(scene, rng).save(part, "JPEG", quality=90)
        part.replace(image_folder / name)
        split = {8: "val", 9: "test"}.get(index % 10, "train")
        rows += [(name, caption, split) for caption in write_captions(scene, rng)]
    for stale in set(image_folder.glob("scene_*.jpg")) - {image_folder / name for name in names}:
        stale.unlink()  # from a larger run; it has no captions now
    part = folder / ".captions.csv.part"
    with part.open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, lineterminator="\n").writerows(rows)
    part.replace(folder / "captions.csv")


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default="data/scenes",
              show_default=True, help="Folder to write.")  # fmt: skip
@click.option("--images", type=click.IntRange(min=1), default=400, show_default=True,
              help="Images to draw. The decoder needs some 300 to learn the words.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, other scenes.")
def main(output: Path, images: int, seed: int) -> None:
    """Draw the scenes; the command's help is the module's first line."""
    draw_scenes(output, images, seed)
    click.echo(f"{images} images with five captions each are in {output}", err=True)


if __name__ == "__main__":
    main()
