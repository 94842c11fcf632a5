# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Draws scenes of one to five objects, some with a printed word, and divides them into splits."""

import math
import zlib
from dataclasses import dataclass
from itertools import product
from random import Random

from PIL import Image, ImageDraw, ImageFont

SIDE = 96  # side of a picture, in pixels
OVERSAMPLING = 4  # drawn this much larger, then averaged for smooth edges

COLOURS = {
    "red": (215, 35, 35),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 170),
    "orange": (245, 130, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PAIRS = tuple(product(COLOURS, SHAPES))
# Each shape occurs once; only the test has pictures of these pairs.
HELD_OUT_PAIRS = (
    ("red", "triangle"),
    ("green", "cross"),
    ("blue", "circle"),
    ("yellow", "ring"),
    ("purple", "square"),
)
RADII = {"small": (8.0, 9.5), "large": (13.0, 15.0)}  # half the side of the square around an object, in pixels
WORDS = ("box", "cat", "dog", "hat", "key", "map", "sun", "tea")
NUMBERS = tuple(str(number) for number in range(1, 10))

CELL = SIDE / 3  # a picture has 3 x 3 places
# Least distance in pixels of centres from the borders between places, and of objects from each other.
MARGIN, GAP = 4, 2
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
ATTEMPTS = 50  # attempts to place an object before another scene is drawn

SPLITS = ("train", "test")
TEST_SHARE = 8  # one in so many contents belongs to the test


@dataclass(frozen=True)
class Thing:
    """Describes an object; centre and radius are in pixels."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

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
        """Returns all that a question can ask; it does not depend on background and exact pixels."""
        things = sorted((thing.name, thing.size, thing.place) for thing in self.things)
        return repr((things, self.print and self.print.text))

    @property
    def split(self) -> str:
        """Returns the split; it depends only on the content, so that no seed or size can mix train and test."""
        return "train" if zlib.crc32(self.content.encode()) % TEST_SHARE else "test"


def draw_scene(split: str, rng: Random) -> Scene:
    """Returns a random scene of a split, `train` or `test`; half of the test scenes have a held-out pair."""
    if split not in SPLITS:
        raise ValueError(f"The split is {split!r}, expected one of {', '.join(SPLITS)}.")
    held_out = split == "test" and rng.random() < 0.5
    count = rng.randint(1, 5)
    while True:
        scene = _random_scene(count, held_out, rng)
        if scene is not None and scene.split == split:
            return scene


def _random_scene(count: int, held_out: bool, rng: Random) -> Scene | None:
    """Returns a scene, or None if its objects do not fit."""
    boxes: list[tuple[float, float, float, float]] = []
    printed = _random_print(rng) if rng.random() < 0.35 else None
    if printed is not None:
        boxes.append(printed.box)
    things: list[Thing] = []
    for index in range(count):
        pair = rng.choice(HELD_OUT_PAIRS) if held_out and index == 0 else _random_pair(things, rng)
        thing = _random_thing(pair, boxes, rng)
        if thing is None:
            return None
        boxes.append(thing.box)
        things.append(thing)
    return Scene(tuple(sorted(things, key=lambda thing: thing.x)), printed)


def _random_pair(things: list[Thing], rng: Random) -> tuple[str, str]:
    """Returns a pair of the training; in half of the cases it shares colour or shape with an earlier object."""
    pairs = [pair for pair in PAIRS if pair not in HELD_OUT_PAIRS]
    if things and rng.random() < 0.5:
        like, part = rng.choice(things).pair, rng.randrange(2)
        pairs = [pair for pair in pairs if pair[part] == like[part]]
    return rng.choice(pairs)


def _random_thing(pair: tuple[str, str], boxes: list, rng: Random) -> Thing | None:
    size = rng.choice(tuple(RADII))
    for _ in range(ATTEMPTS):
        radius = rng.uniform(*RADII[size])
        x, y = (_random_centre(radius, rng) for _ in range(2))
        thing = Thing(*pair, size, x, y, radius)
        if not any(_overlap(thing.box, box) for box in boxes):
            return thing
    return None


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


def draw_picture(scene: Scene, rng: Random) -> Image.Image:
    """Draws a scene, (SIDE, SIDE) in RGB; `rng` sets the background and the exact colours."""
    background, ink = _background(rng)
    canvas = background.resize((SIDE * OVERSAMPLING,) * 2, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(pen, thing, _near(COLOURS[thing.colour], rng))
    if scene.print is not None:
        glyphs = _glyphs(scene.print.text)
        mask = glyphs.resize([side * OVERSAMPLING for side in glyphs.size], Image.Resampling.NEAREST)
        left, top = (int(side) * OVERSAMPLING for side in scene.print.box[:2])
        canvas.paste(ink, (left, top, left + mask.width, top + mask.height), mask)
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, colour: tuple[int, ...]) -> None:
    left, top, right, bottom = (side * OVERSAMPLING for side in thing.box)
    x, y, radius = thing.x * OVERSAMPLING, thing.y * OVERSAMPLING, thing.radius * OVERSAMPLING
    if thing.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif thing.shape == "ring":
        pen.ellipse((left, top, right, bottom), outline=colour, width=round(radius * 0.45))
    elif thing.shape == "square":
        inset = radius * 0.12  # gives about the area of the circle
        pen.rectangle((left + inset, top + inset, right - inset, bottom - inset), fill=colour)
    elif thing.shape == "cross":
        arm = radius * 0.36
        pen.rectangle((left, y - arm, right, y + arm), fill=colour)
        pen.rectangle((x - arm, top, x + arm, bottom), fill=colour)
    else:
        pen.polygon([(x, top), (right, bottom), (left, bottom)], fill=colour)


def _background(rng: Random) -> tuple[Image.Image, tuple[int, ...]]:
    """Returns a pale or dark background in few pixels, to be enlarged, and a readable colour of print."""
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
    return picture, (20, 20, 20) if pale else (240, 240, 240)


def _near(colour: tuple[int, ...], rng: Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, part + rng.randint(-15, 15))) for part in colour)


def _glyphs(text: str) -> Image.Image:
    """Returns print as a mask, in Pillow's own bitmap font at twice its size; it is equal on every machine."""
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = (int(side) for side in font.getbbox(text))
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font)
    return mask.resize((2 * mask.width, 2 * mask.height), Image.Resampling.NEAREST)
