# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""States what a patch of a picture shows, for the training of the tower."""

from .pictograms import HUES, OBJECTS, Object
from .questions import CATEGORIES, kind_of_print
from .scenes import NUMBERS, PLACES, RADII, WORDS, Scene, Thing

NOTHING = "nothing"
PRINTS = {text: f"the {kind_of_print(text)} {text}" for text in (*WORDS, *NUMBERS)}
# For each kind, one of these is true of a patch, or none.
VALUES: dict[str, list[str]] = {
    "name": [*(one.name for one in OBJECTS), *PRINTS.values(), NOTHING],
    "category": CATEGORIES,
    "colour": list(HUES),
    "size": list(RADII),
    "place": [place for row in PLACES for place in row],
}
NUMBERED = {kind: {value: number for number, value in enumerate(values)} for kind, values in VALUES.items()}
UNKNOWN = -100  # the number of what is not known; PyTorch's losses leave it out


def shown_at(scene: Scene, x: float, y: float) -> dict[str, str | None]:
    """Returns what is at a point, in pixels: by kind, what is known of the object, the print, or nothing."""
    for thing in scene.things:
        if _holds(thing.box, x, y):
            return known_of(thing, thing.colour) | {"size": thing.size, "place": thing.place}
    if scene.print is not None and _holds(scene.print.box, x, y):
        return {"name": PRINTS[scene.print.text]}
    return {"name": NOTHING}


def known_of(what: Object | Thing, colour: str | None) -> dict[str, str | None]:
    return {"name": what.name, "category": what.category, "colour": colour}


def numbers_of(shown: dict[str, str | None]) -> list[int]:
    """Returns a number per kind: that of its value, or UNKNOWN."""
    return [numbers.get(shown.get(kind) or "", UNKNOWN) for kind, numbers in NUMBERED.items()]


def _holds(box: tuple[float, float, float, float], x: float, y: float) -> bool:
    return box[0] <= x < box[2] and box[1] <= y < box[3]
