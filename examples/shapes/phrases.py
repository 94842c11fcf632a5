# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Makes short captions for the contrast between pictures and texts; each is true for some pictures only."""

from dataclasses import dataclass
from itertools import combinations, product

from .questions import article, counted, kind_of_print
from .scenes import COLOURS, HELD_OUT_PAIRS, NUMBERS, PLACES, RADII, SHAPES, WORDS, Scene, Thing

ATTRIBUTES = {
    "size": tuple(RADII),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "place": tuple(place for row in PLACES for place in row),
}


@dataclass(frozen=True)
class Phrase:
    """States that a picture has an object with these attributes, or so many of them, or this printed text."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None
    place: str | None = None
    number: int | None = None
    printed: str | None = None

    @property
    def text(self) -> str:
        if self.printed is not None:
            return f"the {kind_of_print(self.printed)} {self.printed}"
        noun = " ".join(part for part in (self.size, self.colour, self.shape or "object") if part)
        if self.number is not None:
            return counted(self.number, noun)
        return " ".join(part for part in (article(noun), self.place) if part)

    @property
    def kind(self) -> str:
        """Returns the attributes that it names, such as "place" or "colour + shape"."""
        return " + ".join(name for name, value in vars(self).items() if value is not None)

    @property
    def held_out(self) -> bool:
        return (self.colour, self.shape) in HELD_OUT_PAIRS

    def holds(self, scene: Scene) -> bool:
        if self.printed is not None:
            return scene.print is not None and scene.print.text == self.printed
        number = sum(self.fits(thing) for thing in scene.things)
        return number > 0 if self.number is None else number == self.number

    def fits(self, thing: Thing) -> bool:
        return all(getattr(self, name) in (None, getattr(thing, name)) for name in ATTRIBUTES)


def all_phrases() -> list[Phrase]:
    """Returns phrases of one or two attributes, numbers of objects, and prints; none names a held-out pair."""
    phrases = [Phrase(**{name: value}) for name, values in ATTRIBUTES.items() for value in values]
    for first, second in combinations(ATTRIBUTES, 2):
        values = product(ATTRIBUTES[first], ATTRIBUTES[second])
        phrases += [Phrase(**dict(zip((first, second), pair, strict=True))) for pair in values]
    phrases += [Phrase(number=number) for number in range(1, 6)]
    phrases += [
        Phrase(number=number, **{name: value})
        for name in ("colour", "shape")
        for value in ATTRIBUTES[name]
        for number in range(1, 4)  # higher numbers are rare
    ]
    phrases += [Phrase(printed=text) for text in WORDS + NUMBERS]
    return [phrase for phrase in phrases if not phrase.held_out]
