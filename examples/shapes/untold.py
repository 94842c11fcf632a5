# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Adds to a data set what its vision tower is never told, and questions about it for the stages.

Multi-Block Token Fusion should pay where the last block of a frozen tower has lost what a question asks. Here each
object gets marks: a frame of a style and an exact width, an arrow, and a small digit. They are in all pictures, so that
a tower that is trained on them has seen them; but no phrase of its training names them, and no caption does.
"""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from conversion.checkpoints.folders import complete_or_absent, require_empty

from .generate import read_scenes
from .questions import Question
from .scenes import Scene, Thing
from .text import PLACEHOLDER, read_rows

STYLES = ("solid", "dashed")
ARROWS = {"up": ((0, 6), (6, 6), (3, 0)), "down": ((0, 0), (6, 0), (3, 6))}  # corners, in pixels
ARROWS |= {"left": ((6, 0), (6, 6), (0, 3)), "right": ((0, 0), (0, 6), (6, 3))}
DIGITS = "123456789"
STEP = 4  # pixels between two widths of frames; a size that is told has three or more of them
DASH = 3  # pixels of a dash, and of the gap behind it
FRAME = (200, 0, 200)
MARKS = "marks.jsonl"  # the file with all marks
NO_TEXT = "There is no text."  # an answer that a small digit makes wrong
UNTOLD = ("outline", "width", "arrow", "small digit")  # kinds of questions
TURNS = 2  # questions of these kinds about a training picture


@dataclass(frozen=True)
class Marks:
    """Describes what is drawn on an object; the frame's width is in pixels."""

    outline: str
    width: int
    arrow: str
    digit: str


def add_untold(data: str | Path, out: str | Path, seed: int = 0) -> Path:
    """Copies a data set of `generate` into `out`, which must not exist or be empty, with marks on all objects.

    dialogues.json has two more questions a picture, test.json and truth.jsonl one more of each kind, and marks.jsonl
    has the truth. Only stage 2 asks about marks; all other files are as they were. Questions whose answer is that there
    is no text are left out.

    Raises:
        ValueError: if files are missing, or `data` has marks already.
    """
    data, out = Path(data), require_empty(out)
    if (data / MARKS).exists():
        raise ValueError(f"{data} has marks already: name a folder that `generate` wrote.")
    scenes = read_scenes(data, "train") | read_scenes(data, "test")
    marks = {name: draw_marks(scene, Random(f"{seed}/marks/{name}")) for name, scene in scenes.items()}
    with complete_or_absent(out) as folder:
        shutil.copytree(data, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("images"))
        (folder / "images").mkdir()
        for name, scene in tqdm(scenes.items(), desc="pictures"):
            with Image.open(data / "images" / f"{name}.png") as picture:
                draw(picture, scene, marks[name]).save(folder / "images" / f"{name}.png")
        dialogues = [
            longer(row, scenes[row["id"]], marks[row["id"]], Random(f"{seed}/untold/{row['id']}"))
            for row in read_rows(data / "dialogues.json")
        ]
        _write(folder / "dialogues.json", json.dumps(dialogues, indent=1) + "\n")
        _add_test(folder, read_scenes(data, "test"), marks, seed)
        lines = ({"id": name, "marks": [vars(one) for one in several]} for name, several in marks.items())
        _write(folder / MARKS, "".join(json.dumps(line) + "\n" for line in lines))
    return out


def draw_marks(scene: Scene, rng: Random) -> list[Marks]:
    """Returns random marks for each object of a scene."""
    return [
        Marks(rng.choice(STYLES), frame_width(thing), rng.choice([*ARROWS]), rng.choice(DIGITS))
        for thing in scene.things
    ]


def frame_width(thing: Thing) -> int:
    """Returns the width of an object's frame: that of its box, rounded down to a whole step."""
    return int(2 * thing.radius) // STEP * STEP


def draw(picture: Image.Image, scene: Scene, marks: list[Marks]) -> Image.Image:
    """Returns the picture with a frame around each object, and in it a digit at the left and an arrow at the right."""
    marked = picture.convert("RGB")
    pen = ImageDraw.Draw(marked)
    font = ImageFont.load_default_imagefont()
    for thing, mark in zip(scene.things, marks, strict=True):
        left, top = round(thing.x - mark.width / 2), round(thing.y - mark.width / 2)
        _frame(pen, left, top, mark)
        pen.rectangle((left + 1, top + 1, left + 7, top + 11), fill="white")
        pen.text((left + 1, top + 1), mark.digit, fill="black", font=font)
        x, y = left + mark.width - 9, top + 2
        pen.rectangle((x - 1, y - 1, x + 7, y + 7), fill="white")
        pen.polygon([(x + dx, y + dy) for dx, dy in ARROWS[mark.arrow]], fill="black")
    return marked


def _frame(pen: ImageDraw.ImageDraw, left: int, top: int, mark: Marks) -> None:
    length = DASH if mark.outline == "dashed" else mark.width
    for start in range(0, mark.width, 2 * length):
        end = min(start + length, mark.width) - 1
        for side in (0, mark.width - 1):
            pen.line((left + start, top + side, left + end, top + side), fill=FRAME)
            pen.line((left + side, top + start, left + side, top + end), fill=FRAME)


def questions(scene: Scene, marks: list[Marks], rng: Random) -> list[Question]:
    """Returns a question of each kind about an object whose name is unique; none if there is no such object."""
    times = Counter(thing.name for thing in scene.things)
    named = [(thing.name, mark) for thing, mark in zip(scene.things, marks, strict=True) if times[thing.name] == 1]
    if not named:
        return []
    asked = {kind: rng.choice(named) for kind in UNTOLD}
    (first, outline), (second, width), (third, arrow), (fourth, digit) = (asked[kind] for kind in UNTOLD)
    return [
        Question("outline", f"Which frame does the {first} have?", f"The frame is {outline.outline}."),
        Question("width", f"How wide is the frame of the {second}?", f"It is {width.width} wide."),
        Question("arrow", f"Where does the arrow at the {third} point?", f"It points {arrow.arrow}."),
        Question("small digit", f"Which digit is at the {fourth}?", f"The digit is {digit.digit}."),
    ]


def longer(row: dict, scene: Scene, marks: list[Marks], rng: Random) -> dict:
    """Returns a conversation with more questions at random places before the last, which is the caption."""
    first, *others = row["conversations"]
    turns = [first | {"value": first["value"].removeprefix(PLACEHOLDER)}, *others]
    pairs = [turns[index : index + 2] for index in range(0, len(turns), 2) if turns[index + 1]["value"] != NO_TEXT]
    several = questions(scene, marks, rng)
    for question in rng.sample(several, min(TURNS, len(several))):
        pairs.insert(rng.randrange(len(pairs)), _turns(question))
    first, *others = [turn for pair in pairs for turn in pair]
    return row | {"conversations": [first | {"value": PLACEHOLDER + first["value"]}, *others]}


def _turns(question: Question) -> list[dict]:
    return [{"from": "human", "value": question.text}, {"from": "gpt", "value": question.answer}]


def _add_test(folder: Path, scenes: dict[str, Scene], marks: dict[str, list[Marks]], seed: int) -> None:
    rows = [row for row in read_rows(folder / "test.json") if row["conversations"][1]["value"] != NO_TEXT]
    asked_before = {row["id"] for row in rows}
    truth = [row for row in read_rows(folder / "truth.jsonl") if row["id"] in asked_before]
    for name, scene in scenes.items():
        for question in questions(scene, marks[name], Random(f"{seed}/untold/{name}")):
            asked, answer = _turns(question)
            turns = [asked | {"value": PLACEHOLDER + asked["value"]}, answer]
            row_id = f"{name}-{question.kind}"
            rows.append({"id": row_id, "image": f"images/{name}.png", "conversations": turns})
            truth.append({"id": row_id, "kind": question.kind, "group": scene.group})
    _write(folder / "test.json", json.dumps(rows, indent=1) + "\n")
    _write(folder / "truth.jsonl", "".join(json.dumps(row) + "\n" for row in truth))


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
