# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Composes scenes of one to five pictograms, some with a printed word, and divides them into splits."""

import math
import zlib
from dataclasses import dataclass
from itertools import combinations, product
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .pictograms import HELD_OUT_FAMILY, Pictogram

SIDE = 128  # side of a picture, in pixels

RADII = {"small": (14.0, 17.0), "large": (21.0, 25.0)}  # half the side of the square around an object, in pixels
CLOSE_UP = (28.0, 62.0)  # the same of a large object that is alone in the middle
CLOSE_UPS = 0.4  # share of the scenes of one object
WORDS = ("box", "cat", "dog", "hat", "key", "map", "sun", "tea")
NUMBERS = tuple(str(number) for number in range(1, 10))

CELL = SIDE / 3  # a picture has 3 x 3 places
# Least distance in pixels of centres from the borders between places, and of objects from each other.
MARGIN, GAP = 5, 2
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
ATTEMPTS = 50  # attempts to place an object before another scene is drawn
SCENES_TRIED = 10_000  # scenes that are drawn in search of one for a split; with 20 objects a few hundred suffice

# Each group of the test asks for something that training never shows. All groups have contents that are not trained.
GROUPS = ("seen", "unseen pair", "unseen artist")
TEST_SHARE = 8  # one in so many contents belongs to the test
PAIR_SHARE = 12  # one in so many pairs of objects is together in no training picture


@dataclass(frozen=True)
class Thing:
    """Describes an object in a scene; centre and radius are in pixels."""

    name: str
    category: str
    colour: str | None
    family: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def column(self) -> int:
        return int(self.x // CELL)

    @property
    def row(self) -> int:
        return int(self.y // CELL)

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]

    @property
    def box(self) -> tuple[float, float, float, float]:
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclass(frozen=True)
class Print:
    """Describes a printed word or number; its box is in pixels."""

    text: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # from left to right
    print: Print | None

    @property
    def content(self) -> str:
        """Returns all that a question can ask; it does not depend on background, artists and exact pixels."""
        things = sorted((thing.name, thing.size, thing.place) for thing in self.things)
        return repr((things, self.print and self.print.text))

    @property
    def split(self) -> str | None:
        """Returns the split, or None for what is in neither.

        It depends on the content, so that no seed or size can mix train and test, and on what training never shows.
        """
        if not zlib.crc32(self.content.encode()) % TEST_SHARE:
            return "test"
        return "train" if self.group == "seen" else None

    @property
    def has_unseen_pair(self) -> bool:
        return any(is_held_out(a.name, b.name) for a, b in combinations(self.things, 2))

    @property
    def group(self) -> str:
        """Returns what is new in the scene for a model that has seen the training."""
        if any(thing.family == HELD_OUT_FAMILY for thing in self.things):
            return "unseen artist"
        return "unseen pair" if self.has_unseen_pair else "seen"


def is_held_out(first: str, second: str) -> bool:
    """Returns whether two objects are together in no training picture; the names decide it, in either order."""
    return first != second and not zlib.crc32(" and ".join(sorted((first, second))).encode()) % PAIR_SHARE


def draw_scene(pictograms: dict[str, list[Pictogram]], split: str, rng: Random) -> Scene:
    """Returns a random scene of a split, `train` or `test`; each group has a third of the test.

    Args:
        pictograms: the pictograms of each family.
        split: "train" or "test".
        rng: source of randomness.

    Raises:
        ValueError: if the split is another, or these pictograms give no such scene, because they are too few.
    """
    if split not in ("train", "test"):
        raise ValueError(f"The split is {split!r}, expected train or test.")
    group = rng.choice(GROUPS) if split == "test" else "seen"
    families = [family for family in pictograms if (family == HELD_OUT_FAMILY) == (group == "unseen artist")]
    by_name: dict[str, list[Pictogram]] = {}
    for pictogram in (pictogram for family in families for pictogram in pictograms[family]):
        by_name.setdefault(pictogram.object.name, []).append(pictogram)
    count = rng.randint(2 if group == "unseen pair" else 1, 5)
    for _ in range(SCENES_TRIED):
        scene = _random_scene(list(by_name.values()), count, rng)
        if scene is not None and (scene.split, scene.group) == (split, group):
            return scene
    raise ValueError(
        f"No {split} scene of {count} objects ({group}) was found in {SCENES_TRIED} attempts with {len(by_name)} "
        "different pictograms: add some."
    )


def _random_scene(objects: list[list[Pictogram]], count: int, rng: Random) -> Scene | None:
    """Returns a scene, or None if its objects do not fit; each of `objects` has the pictograms of one name."""
    if count == 1 and rng.random() < CLOSE_UPS:
        return Scene((_close_up(rng.choice(rng.choice(objects)), rng),), None)
    boxes: list[tuple[float, float, float, float]] = []
    printed = _random_print(rng) if rng.random() < 0.35 else None
    if printed is not None:
        boxes.append(printed.box)
    things: list[Thing] = []
    for _ in range(count):
        thing = _random_thing(rng.choice(_random_object(objects, things, rng)), boxes, rng)
        if thing is None:
            return None
        boxes.append(thing.box)
        things.append(thing)
    return Scene(tuple(sorted(things, key=lambda thing: thing.x)), printed)


def _random_object(objects: list[list[Pictogram]], things: list[Thing], rng: Random) -> list[Pictogram]:
    """Returns one of `objects`; one in four times it has the name of an earlier thing, and as often its category."""
    chance = rng.random()
    if things and chance < 0.5:
        like = rng.choice(things)
        key = "name" if chance < 0.25 or not like.category else "category"
        objects = [one for one in objects if getattr(one[0].object, key) == getattr(like, key)]
    return rng.choice(objects)


def _random_thing(pictogram: Pictogram, boxes: list, rng: Random) -> Thing | None:
    size, what = rng.choice(tuple(RADII)), pictogram.object
    for _ in range(ATTEMPTS):
        radius = rng.uniform(*RADII[size])
        x, y = (_random_centre(radius, rng) for _ in range(2))
        thing = Thing(what.name, what.category, pictogram.colour, pictogram.family, size, x, y, radius)
        if not any(_overlap(thing.box, box) for box in boxes):
            return thing
    return None


def _close_up(pictogram: Pictogram, rng: Random) -> Thing:
    """Returns an object that may fill the picture, as in a screenshot of a single emoji."""
    what, radius = pictogram.object, rng.uniform(*CLOSE_UP)
    room = min(SIDE / 2 - radius, CELL / 2 - MARGIN)  # its centre stays in the middle place
    x, y = (SIDE / 2 + rng.uniform(-room, room) for _ in range(2))
    return Thing(what.name, what.category, pictogram.colour, pictogram.family, "large", x, y, radius)


def _random_centre(radius: float, rng: Random) -> float:
    """Returns one coordinate; it chooses the place first, so that all places are equally frequent."""
    cell = rng.randrange(3)
    low = max(cell * CELL + (MARGIN if cell else 0), radius)
    high = min((cell + 1) * CELL - (MARGIN if cell < 2 else 0), SIDE - radius)
    return rng.uniform(low, high)


def _random_print(rng: Random) -> Print:
    text = rng.choice(WORDS if rng.random() < 0.5 else NUMBERS)
    width, height = _glyphs(text).size
    left, top = rng.randint(1, SIDE - width - 1), rng.randint(1, SIDE - height - 1)
    return Print(text, (left, top, left + width, top + height))


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] + GAP and b[0] < a[2] + GAP and a[1] < b[3] + GAP and b[1] < a[3] + GAP


def draw_picture(scene: Scene, pictograms: dict[str, list[Pictogram]], rng: Random) -> Image.Image:
    """Draws a scene, (SIDE, SIDE) in RGB; `rng` sets the background, and how each pictogram is turned and lit."""
    canvas, ink = _background(rng)
    for thing in scene.things:
        picture = next(one.picture for one in pictograms[thing.family] if one.object.name == thing.name)
        varied = _varied(picture, round(2 * thing.radius), rng)
        canvas.paste(varied, (round(thing.x - varied.width / 2), round(thing.y - varied.height / 2)), varied)
    if scene.print is not None:
        left, top = (int(side) for side in scene.print.box[:2])
        glyphs = _glyphs(scene.print.text)
        canvas.paste(ink, (left, top, left + glyphs.width, top + glyphs.height), glyphs)
    return canvas


def _varied(picture: Image.Image, side: int, rng: Random) -> Image.Image:
    """Returns a pictogram of about `side` pixels, perhaps mirrored, a little turned, squeezed and lit otherwise."""
    colours = np.asarray(picture.convert("RGB"), dtype=np.float32)
    grey = colours.mean(-1, keepdims=True)
    light = [rng.uniform(0.9, 1.1) for _ in range(3)]
    colours = (grey + (colours - grey) * rng.uniform(0.8, 1.3)) * light + rng.uniform(-15, 15)
    varied = Image.fromarray(colours.clip(0, 255).astype(np.uint8)).convert("RGBA")
    varied.putalpha(picture.getchannel("A"))
    if rng.random() < 0.5:
        varied = varied.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    varied = varied.rotate(rng.gauss(0, 8), Image.Resampling.BICUBIC)
    width, height = (round(side * rng.uniform(0.85, 1)) for _ in range(2))
    return varied.resize((width, height), Image.Resampling.BOX)


def _background(rng: Random) -> tuple[Image.Image, tuple[int, ...]]:
    """Returns a pale or dark background, and a readable colour of print."""
    pale = rng.random() < 0.7
    tone = rng.randint(185, 245) if pale else rng.randint(15, 60)
    tint = [rng.randint(-10, 10) for _ in range(3)]
    kind = rng.choice(("plain", "gradient", "stripes", "blotches"))
    angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(5, 14)
    cells = 12
    picture = Image.new("RGB", (cells, cells))
    for x, y in product(range(cells), repeat=2):
        along = (math.cos(angle) * (x - cells / 2) + math.sin(angle) * (y - cells / 2)) / (cells / 2)
        relief = {"plain": 0.0, "gradient": along, "stripes": math.sin(9 * along), "blotches": rng.uniform(-1, 1)}[kind]
        picture.putpixel((x, y), tuple(round(min(255, max(0, tone + t + depth * relief))) for t in tint))
    return picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR), (20, 20, 20) if pale else (240, 240, 240)


def _glyphs(text: str) -> Image.Image:
    """Returns print as a mask, in Pillow's own bitmap font at twice its size; it is equal on every machine."""
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = (int(side) for side in font.getbbox(text))
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font)
    return mask.resize((2 * mask.width, 2 * mask.height), Image.Resampling.NEAREST)
