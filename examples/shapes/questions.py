# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Writes captions, questions and true answers. The caption of a scene contains nearly all that a question can ask."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import TypeVar

from .pictograms import OBJECTS
from .scenes import Scene, Thing

T = TypeVar("T")

NUMBER_WORDS = ("no", "one", "two", "three", "four", "five")
CAPTION_REQUESTS = ("Describe the picture.", "What is in the picture?", "What does the picture show?")
# The data has both spellings, so that the model knows both.
COLOUR_QUESTIONS = (
    "What color is the object {}?",
    "What colour is the object {}?",
    "Which color does the object {} have?",
)
NAME_QUESTIONS = ("What is {}?", "Which object is {}?")
READ_QUESTIONS = ("What is written in the picture?", "Read the word or number.", "What does the text say?")
ALL_QUESTIONS = ("How many objects are there?", "How many objects are in the picture?", "Count the objects.")

PLURALS = {"mouse": "mice", "wolf": "wolves", "ox": "oxen", "sheep": "sheep", "fish": "fish", "knife": "knives"}
PLURALS |= {"leaf": "leaves", "loaf": "loaves", "die": "dice", "deer": "deer"}
PLURALS |= {"squid": "squid", "shrimp": "shrimp", "blowfish": "blowfish", "cactus": "cacti", "snowman": "snowmen"}
PLURALS |= {"tomato": "tomatoes", "potato": "potatoes", "tornado": "tornadoes", "volcano": "volcanoes"}
ARTICLES = {"hourglass": "an", "unicorn": "a"}  # by sound; all others follow their first letter

CATEGORIES = sorted({one.category for one in OBJECTS} - {""})
ALSO = {one.name: one.also for one in OBJECTS}


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def caption(scene: Scene, rng: Random) -> Question:
    return Question("caption", rng.choice(CAPTION_REQUESTS), describe(scene))


def describe(scene: Scene) -> str:
    """Returns the caption: the objects from left to right, then the print."""
    things = [f"{article(f'{thing.size} {thing.name}')} {thing.place}" for thing in scene.things]
    total = counted(len(things), "object")
    if scene.print is None:
        return f"{total.capitalize()}: {_listed(things)}."
    return f"{total.capitalize()} and the {kind_of_print(scene.print.text)} {scene.print.text}: {_listed(things)}."


def count(scene: Scene, rng: Random) -> Question:
    if rng.random() < 0.5:
        return _count_of(rng.choice(ALL_QUESTIONS), "object", len(scene.things))
    names = Counter(thing.name for thing in scene.things)
    names.update(thing.category for thing in scene.things if thing.category)
    names.update({_absent(scene, rng): 0, rng.choice(CATEGORIES): 0})
    clear = sorted(names.keys() - disputed(scene))
    # The number is drawn before the noun: otherwise nearly all answers would be one.
    number = rng.choice(sorted({names[noun] for noun in clear}))
    noun = rng.choice([noun for noun in clear if names[noun] == number])
    return _count_of(f"How many {plural(noun)} are there?", noun, number)


def _count_of(text: str, noun: str, number: int) -> Question:
    return Question("count", text, f"There {'is' if number == 1 else 'are'} {counted(number, noun)}.")


def name(scene: Scene, rng: Random) -> Question | None:
    thing = _choice(_unique(scene, lambda thing: thing.place), rng)
    if thing is None:
        return None
    text = rng.choice(NAME_QUESTIONS).format(thing.place)
    return Question("name", text, f"{article(thing.name).replace('a', 'A', 1)}.")


def category(scene: Scene, rng: Random) -> Question | None:
    present = {thing.category for thing in scene.things} - {""}
    certain = sorted(present - disputed(scene))
    if not certain:
        return None  # the answer would be no: "no" would be the best guess
    if rng.random() < 0.5:
        noun = rng.choice(certain)
        first = next(thing.name for thing in scene.things if thing.category == noun)
        return Question("category", f"Is there {article(noun)}?", f"Yes, there is {article(noun)}: {article(first)}.")
    noun = rng.choice(sorted({*CATEGORIES} - present - disputed(scene)))
    return Question("category", f"Is there {article(noun)}?", f"No, there is no {noun}.")


def colour(scene: Scene, rng: Random) -> Question | None:
    """Asks by place: the name would give away that a tree is green."""
    thing = _choice([thing for thing in _unique(scene, lambda thing: thing.place) if thing.colour], rng)
    if thing is None:
        return None
    text = rng.choice(COLOUR_QUESTIONS).format(thing.place)
    return Question("colour", text, f"The object {thing.place} is {thing.colour}.")


def where(scene: Scene, rng: Random) -> Question | None:
    thing = _choice(_named(scene), rng)
    if thing is None:
        return None
    return Question("where", f"Where is the {thing.name}?", f"The {thing.name} is {thing.place}.")


def is_there(scene: Scene, rng: Random) -> Question | None:
    certain = sorted({thing.name for thing in scene.things} - disputed(scene))
    if not certain:
        return None
    if rng.random() < 0.5:
        noun = rng.choice(certain)
        return Question("is there", f"Is there {article(noun)}?", f"Yes, there is {article(noun)}.")
    noun = _absent(scene, rng)
    return Question("is there", f"Is there {article(noun)}?", f"No, there is no {noun}.")


def _absent(scene: Scene, rng: Random) -> str:
    """Picks an object that is certainly not in the scene; about half are of the category of one that is."""
    present = {thing.name for thing in scene.things} | disputed(scene)
    absent = [one for one in OBJECTS if one.name not in present]
    category = rng.choice(scene.things).category
    near = [one for one in absent if one.category == category]
    return rng.choice(near if near and rng.random() < 0.5 else absent).name


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
    return Question(kind, text, f"The {first.name} is {word} the {second.name}.")


def larger(scene: Scene, rng: Random) -> Question | None:
    pair = _choice(_different(scene, lambda thing: thing.size), rng)
    if pair is None:
        return None
    first, second = rng.sample(pair, 2)
    text = f"Which is larger, the {first.name} or the {second.name}?"
    answer = f"The {(first if first.size == 'large' else second).name} is larger."
    return Question("larger", text, answer)


def read(scene: Scene, rng: Random) -> Question | None:
    text = rng.choice(READ_QUESTIONS)
    if scene.print is not None:
        return Question("read", text, f"The {kind_of_print(scene.print.text)} is {scene.print.text}.")
    # This is rare, so that it is not the best guess.
    return Question("read", text, "There is no text.") if rng.random() < 0.05 else None


# Each function returns None if the scene has no clear answer to its kind of question.
KINDS: dict[str, Callable[[Scene, Random], Question | None]] = {
    "caption": caption,
    "count": count,
    "name": name,
    "category": category,
    "colour": colour,
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
    return Question("furthest left", text, answer)


def one_of_each(scene: Scene, rng: Random) -> list[Question]:
    questions = (make(scene, rng) for make in KINDS.values())
    return [question for question in questions if question is not None]


def conversation(scene: Scene, turns: int, rng: Random, without: tuple[str, ...] = ("caption",)) -> list[Question]:
    """Returns up to `turns` different questions; by default without a caption, which would answer all later ones."""
    makers = [make for kind, make in KINDS.items() if kind not in without]
    rounds = (make(scene, rng) for _ in range(3) for make in rng.sample(makers, len(makers)))
    distinct = {question.text: question for question in rounds if question is not None}
    questions = list(distinct.values())[:turns]
    rng.shuffle(questions)
    return questions


def _unique(scene: Scene, key: Callable[[Thing], object]) -> list[Thing]:
    """Returns the objects that one word or place names uniquely."""
    times = Counter(key(thing) for thing in scene.things)
    return [thing for thing in scene.things if times[key(thing)] == 1]


def _named(scene: Scene) -> list[Thing]:
    """Returns the objects that one name names uniquely."""
    return [thing for thing in _unique(scene, lambda thing: thing.name) if thing.name not in disputed(scene)]


def disputed(scene: Scene) -> set[str]:
    """Returns the names and categories that some people would give an object that does not have them here."""
    return {word for thing in scene.things for word in ALSO[thing.name]}


def _different(scene: Scene, key: Callable[[Thing], object]) -> list[tuple[Thing, Thing]]:
    pairs = combinations(_named(scene), 2)
    return [(first, second) for first, second in pairs if key(first) != key(second)]


def _choice(items: list[T], rng: Random) -> T | None:
    return rng.choice(items) if items else None


def article(noun: str) -> str:
    return f"{ARTICLES.get(noun, 'an' if noun[0] in 'aeiouA' else 'a')} {noun}"


def plural(noun: str) -> str:
    """Returns the plural of a noun; of "pair of jeans" it is "pairs of jeans"."""
    head, of, rest = noun.partition(" of ")
    *words, last = head.split(" ")
    if last in PLURALS:
        ending = PLURALS[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        ending = f"{last}es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        ending = f"{last[:-1]}ies"
    else:
        ending = f"{last}s"
    return " ".join([*words, ending]) + of + rest


def counted(number: int, noun: str) -> str:
    return f"{NUMBER_WORDS[number]} {noun if number == 1 else plural(noun)}"


def _listed(items: list[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if items[1:] else items)


def kind_of_print(text: str) -> str:
    return "number" if text.isdigit() else "word"
