# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Short captions for the contrast between pictures and texts: each is true of some pictures and false of others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from .questions import article, counted, kind_of_print
from .scenes import COLOURS, HELD_OUT_PAIRS, NUMBERS, PLACES, RADII, SHAPES, WORDS, Scene, Thing

T = TypeVar("T")

ATTRIBUTES = {
    "size": tuple(RADII),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "place": tuple(place for row in PLACES for place in row),
}
# Attributes that a phrase names: mostly few, because those are learned first.
NAMED = (1, 1, 1, 2, 2, 2, 3, 4)


@dataclass(frozen=True)
class Phrase:
    """Says of a picture that it has an object with these attributes, or so many of them, or this print."""

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
    def held_out(self) -> bool:
        return (self.colour, self.shape) in HELD_OUT_PAIRS

    def holds(self, scene: Scene) -> bool:
        if self.printed is not None:
            return scene.print is not None and scene.print.text == self.printed
        number = sum(self.fits(thing) for thing in scene.things)
        return number > 0 if self.number is None else number == self.number

    def fits(self, thing: Thing) -> bool:
        return all(getattr(self, name) in (None, getattr(thing, name)) for name in ATTRIBUTES)


def true_phrase(scene: Scene, rng: Random) -> Phrase:
    """Something that is true of a scene: of one object, of a number of objects, or of the print."""
    kind = rng.random()
    if scene.print is not None and kind < 0.2:
        return Phrase(printed=scene.print.text)
    thing = rng.choice(scene.things)
    if kind > 0.8:
        named = rng.choice(((), ("colour",), ("shape",)))
        group = Phrase(**{name: getattr(thing, name) for name in named})
        return replace(group, number=sum(group.fits(other) for other in scene.things))
    return Phrase(**{name: getattr(thing, name) for name in rng.sample(sorted(ATTRIBUTES), rng.choice(NAMED))})


def altered(phrase: Phrase, rng: Random) -> Phrase:
    """The phrase with one thing changed: most often no longer true, and hard to tell from what is."""
    if phrase.printed is not None:
        texts = NUMBERS if phrase.printed.isdigit() else WORDS
        return replace(phrase, printed=_other(texts, phrase.printed, rng))
    if phrase.number is not None:
        return replace(phrase, number=_other(range(1, 6), phrase.number, rng))
    name = rng.choice([name for name in ATTRIBUTES if getattr(phrase, name) is not None])
    changed = replace(phrase, **{name: _other(ATTRIBUTES[name], getattr(phrase, name), rng)})
    return altered(phrase, rng) if changed.held_out else changed


def _other(values: Sequence[T], value: T, rng: Random) -> T:
    return rng.choice([other for other in values if other != value])
