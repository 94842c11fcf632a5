# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Makes short captions of patches, for the contrast between pictures and texts; each is true for some patches only."""

from dataclasses import dataclass

from .pictograms import HUES, OBJECTS
from .questions import CATEGORIES, article, kind_of_print
from .scenes import NUMBERS, PLACES, RADII, WORDS, Scene, Thing

NOTHING = "nothing"


@dataclass(frozen=True)
class Phrase:
    """States what a patch shows: an object with this attribute, a printed text, or nothing."""

    kind: str  # a field of `Thing`, or "print"
    value: str

    @property
    def text(self) -> str:
        if self.kind == "print":
            return self.value if self.value == NOTHING else f"the {kind_of_print(self.value)} {self.value}"
        if self.kind in ("name", "category"):
            return article(self.value)
        return f"an object {self.value}" if self.kind == "place" else article(f"{self.value} object")


def all_phrases() -> list[Phrase]:
    """Returns a phrase for each name, category, colour, size, place and print, and one for nothing."""
    values = {
        "name": [one.name for one in OBJECTS],
        "category": CATEGORIES,
        "colour": list(HUES),
        "size": list(RADII),
        "place": [place for row in PLACES for place in row],
        "print": [NOTHING, *WORDS, *NUMBERS],
    }
    return [Phrase(kind, value) for kind, several in values.items() for value in several]


def shown_at(scene: Scene, x: float, y: float) -> Thing | str:
    """Returns what is at a point, in pixels: an object, the print, or nothing."""
    for thing in scene.things:
        if _holds(thing.box, x, y):
            return thing
    return scene.print.text if scene.print is not None and _holds(scene.print.box, x, y) else NOTHING


def _holds(box: tuple[float, float, float, float], x: float, y: float) -> bool:
    return box[0] <= x < box[2] and box[1] <= y < box[3]


def true_phrases(shown: Thing | str) -> set[Phrase]:
    """Returns the phrases that are true of what a patch shows."""
    if isinstance(shown, str):
        return {Phrase("print", shown)}
    kinds = ("name", "category", "colour", "size", "place")
    return {Phrase(kind, getattr(shown, kind)) for kind in kinds if getattr(shown, kind)}
