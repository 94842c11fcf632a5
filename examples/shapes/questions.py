# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Writes captions, questions and true answers. The caption of a scene contains all that a question can ask."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import TypeVar

from .scenes import COLOURS, HELD_OUT_PAIRS, PAIRS, SHAPES, Scene, Thing

T = TypeVar("T")

NUMBER_WORDS = ("no", "one", "two", "three", "four", "five")
CAPTION_REQUESTS = ("Describe the picture.", "What is in the picture?", "What does the picture show?")
# The data has both spellings, so that the model knows both.
COLOUR_QUESTIONS = ("What color is the {}?", "What colour is the {}?", "Which color does the {} have?")
SHAPE_QUESTIONS = ("What shape is the {} object?", "Which shape does the {} object have?")
READ_QUESTIONS = ("What is written in the picture?", "Read the word or number.", "What does the text say?")
ALL_QUESTIONS = ("How many objects are there?", "How many objects are in the picture?", "Count the objects.")


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    about: frozenset[tuple[str, str]]  # the colour-shape pairs in the question

    @property
    def unseen(self) -> bool:
        """Returns whether the question is about a pair that no training picture shows."""
        return not self.about.isdisjoint(HELD_OUT_PAIRS)


def caption(scene: Scene, rng: Random) -> Question:
    return Question("caption", rng.choice(CAPTION_REQUESTS), describe(scene), frozenset(t.pair for t in scene.things))


def describe(scene: Scene) -> str:
    """Returns the caption: the objects from left to right, then the print."""
    things = [f"{article(f'{thing.size} {thing.name}')} {thing.place}" for thing in scene.things]
    total = counted(len(things), "object")
    if scene.print is None:
        return f"{total.capitalize()}: {_listed(things)}."
    return f"{total.capitalize()} and the {kind_of_print(scene.print.text)} {scene.print.text}: {_listed(things)}."


def count(scene: Scene, rng: Random) -> Question:
    if rng.random() < 0.5:
        return _count_of(rng.choice(ALL_QUESTIONS), "object", list(scene.things))
    part, values = rng.choice(((0, tuple(COLOURS)), (1, SHAPES)))
    present = Counter(thing.pair[part] for thing in scene.things)
    # The number is drawn before the object: otherwise nearly all answers would be none or one.
    by_number: dict[int, list[str]] = {}
    for value in values:
        by_number.setdefault(present[value], []).append(value)
    value = rng.choice(by_number[rng.choice(sorted(by_number))])
    noun = f"{value} object" if part == 0 else value
    things = [thing for thing in scene.things if thing.pair[part] == value]
    return _count_of(f"How many {_plural(noun)} are there?", noun, things)


def _count_of(text: str, noun: str, things: list[Thing]) -> Question:
    verb = "is" if len(things) == 1 else "are"
    answer = f"There {verb} {counted(len(things), noun)}."
    return Question("count", text, answer, frozenset(thing.pair for thing in things))


def colour(scene: Scene, rng: Random) -> Question | None:
    thing = _choice(_unique(scene, lambda thing: thing.shape), rng)
    if thing is None:
        return None
    text = rng.choice(COLOUR_QUESTIONS).format(thing.shape)
    return Question("colour", text, f"The {thing.shape} is {thing.colour}.", frozenset([thing.pair]))


def shape(scene: Scene, rng: Random) -> Question | None:
    thing = _choice(_unique(scene, lambda thing: thing.colour), rng)
    if thing is None:
        return None
    text = rng.choice(SHAPE_QUESTIONS).format(thing.colour)
    return Question("shape", text, f"The {thing.colour} object is {article(thing.shape)}.", frozenset([thing.pair]))


def where(scene: Scene, rng: Random) -> Question | None:
    thing = _choice(_unique(scene, lambda thing: thing.pair), rng)
    if thing is None:
        return None
    answer = f"The {thing.name} is {thing.place}."
    return Question("where", f"Where is the {thing.name}?", answer, frozenset([thing.pair]))


def is_there(scene: Scene, rng: Random) -> Question:
    present = {thing.pair for thing in scene.things}
    if rng.random() < 0.5:
        pair = rng.choice(sorted(present))
        answer = f"Yes, there is {article(' '.join(pair))}."
    else:
        pair = _absent_pair(present, rng)
        answer = f"No, there is no {' '.join(pair)}."
    return Question("is there", f"Is there {article(' '.join(pair))}?", answer, frozenset([pair]))


def _absent_pair(present: set[tuple[str, str]], rng: Random) -> tuple[str, str]:
    """Picks a pair that is not in the scene; about half have a colour and a shape of the scene.

    It is held out as often as in questions with the answer "yes".
    """
    unseen = rng.choice(sorted(present)) in HELD_OUT_PAIRS
    absent = [pair for pair in PAIRS if pair not in present and (pair in HELD_OUT_PAIRS) == unseen]
    colours, shapes = zip(*present, strict=True)
    near = [pair for pair in absent if pair[0] in colours and pair[1] in shapes]
    return rng.choice(near if near and rng.random() < 0.5 else absent)


def side(scene: Scene, rng: Random) -> Question | None:
    return _relation(scene, rng, "left/right", ("left of", "right of"), "left or right of", lambda thing: thing.column)


def height(scene: Scene, rng: Random) -> Question | None:
    return _relation(scene, rng, "above/below", ("above", "below"), "above or below", lambda thing: thing.row)


def _relation(
    scene: Scene, rng: Random, kind: str, words: tuple[str, str], choice: str, order: Callable[[Thing], int]
) -> Question | None:
    pair = _choice(_different(scene, order), rng)
    if pair is None:
        return None
    first, second = rng.sample(pair, 2)
    word = words[order(first) > order(second)]
    text = f"Is the {first.name} {choice} the {second.name}?"
    return Question(kind, text, f"The {first.name} is {word} the {second.name}.", frozenset([first.pair, second.pair]))


def larger(scene: Scene, rng: Random) -> Question | None:
    pair = _choice(_different(scene, lambda thing: thing.size), rng)
    if pair is None:
        return None
    first, second = rng.sample(pair, 2)
    text = f"Which is larger, the {first.name} or the {second.name}?"
    answer = f"The {(first if first.size == 'large' else second).name} is larger."
    return Question("larger", text, answer, frozenset([first.pair, second.pair]))


def read(scene: Scene, rng: Random) -> Question | None:
    text = rng.choice(READ_QUESTIONS)
    if scene.print is not None:
        answer = f"The {kind_of_print(scene.print.text)} is {scene.print.text}."
        return Question("read", text, answer, frozenset())
    # This is rare, so that it is not the best guess.
    return Question("read", text, "There is no text.", frozenset()) if rng.random() < 0.05 else None


# Each function returns None if the scene has no clear answer to its kind of question.
KINDS: dict[str, Callable[[Scene, Random], Question | None]] = {
    "caption": caption,
    "count": count,
    "colour": colour,
    "shape": shape,
    "where": where,
    "left/right": side,
    "above/below": height,
    "is there": is_there,
    "larger": larger,
    "read": read,
}


def furthest_left(scene: Scene) -> Question | None:
    """Makes a question of the new kind, which a trained model can learn later."""
    first, *others = scene.things
    if not others or any(thing.column == first.column for thing in others):
        return None
    text, answer = "Which object is furthest to the left?", f"The {first.name} is furthest to the left."
    return Question("furthest left", text, answer, frozenset([first.pair]))


def one_of_each(scene: Scene, rng: Random) -> list[Question]:
    questions = (make(scene, rng) for make in KINDS.values())
    return [question for question in questions if question is not None]


def conversation(scene: Scene, turns: int, rng: Random) -> list[Question]:
    """Returns up to `turns` different questions without a caption, which would answer all later ones."""
    makers = [make for kind, make in KINDS.items() if kind != "caption"]
    rounds = (make(scene, rng) for _ in range(3) for make in rng.sample(makers, len(makers)))
    distinct = {question.text: question for question in rounds if question is not None}
    questions = list(distinct.values())[:turns]
    rng.shuffle(questions)
    return questions


def _unique(scene: Scene, key: Callable[[Thing], object]) -> list[Thing]:
    """Returns the objects that one word or pair of words names uniquely."""
    times = Counter(key(thing) for thing in scene.things)
    return [thing for thing in scene.things if times[key(thing)] == 1]


def _different(scene: Scene, key: Callable[[Thing], object]) -> list[tuple[Thing, Thing]]:
    pairs = combinations(_unique(scene, lambda thing: thing.pair), 2)
    return [(first, second) for first, second in pairs if key(first) != key(second)]


def _choice(items: list[T], rng: Random) -> T | None:
    return rng.choice(items) if items else None


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("ss") else f"{noun}s"


def counted(number: int, noun: str) -> str:
    return f"{NUMBER_WORDS[number]} {noun if number == 1 else _plural(noun)}"


def _listed(items: list[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if items[1:] else items)


def kind_of_print(text: str) -> str:
    return "number" if text.isdigit() else "word"
