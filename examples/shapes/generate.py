# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Writes a data set: pictures, conversations in LLaVA's JSON, and the true answers."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from random import Random

from tqdm import tqdm

from conversion.checkpoints.folders import complete_or_absent, require_empty

from .pictograms import SAMPLE, read_pictograms
from .questions import Question, caption, conversation, describe, furthest_left, one_of_each
from .scenes import Print, Scene, Thing, draw_picture, draw_scene
from .text import PLACEHOLDER, read_rows


def generate(
    out: str | Path,
    scenes: int,
    test_scenes: int = 500,
    turns: int = 8,
    seed: int = 0,
    pictograms: str | Path = SAMPLE,
) -> Path:
    """Draws `scenes` training scenes and `test_scenes` other scenes for the test, with the pictograms of a folder.

    It writes these files into `out`, which must not exist or be empty. The folder appears complete or not at all.

    - images/: a picture per scene, PNG
    - captions.json: picture and caption, for stage 1
    - dialogues.json: picture, up to `turns` questions and answers, and at the end the caption, for stage 2
    - train.json: picture and other questions; text.json: the caption instead of the picture, and other questions. The
      tokenizer learns from these two, and they are there for trainings of your own.
    - test.json: one question of each kind per test scene, each in its own conversation
    - truth.jsonl: for each row of test.json the kind, and the group of its scene
    - new-train.json, new-test.json, new-truth.jsonl: a kind of question that none of these ask, to fine-tune with
    - scenes.jsonl: the objects and the print of every scene, positions and radii in pixels

    The same arguments give the same files.
    """
    out = require_empty(out)
    families = read_pictograms(pictograms)
    with complete_or_absent(out) as folder:
        (folder / "images").mkdir()
        train = _draw_split(folder, families, "train", scenes, seed)
        test = _draw_split(folder, families, "test", test_scenes, seed)
        rng = Random(f"{seed}/questions")
        rows = {name: _row(name, True, [caption(scene, rng)]) for name, scene in train.items()}
        _write_json(folder / "captions.json", rows.values())
        rows = {name: _row(name, True, conversation(scene, turns, rng)) for name, scene in train.items()}
        _write_json(folder / "train.json", rows.values())
        untold = ("caption", "colour")  # the caption stands for the picture, and has no colours
        rows = {name: _row(name, False, conversation(scene, turns, rng, untold)) for name, scene in train.items()}
        for name, scene in train.items():
            first = rows[name]["conversations"][0]
            first["value"] = f"{describe(scene)}\n{first['value']}"
        _write_json(folder / "text.json", rows.values())
        _write_test(folder, "", test, {name: one_of_each(scene, rng) for name, scene in test.items()})
        rng = Random(f"{seed}/dialogues")
        rows = {
            name: _row(name, True, [*conversation(scene, turns, rng), caption(scene, rng)])
            for name, scene in train.items()
        }
        _write_json(folder / "dialogues.json", rows.values())
        new = {name: furthest_left(scene) for name, scene in (train | test).items()}
        new_train = (_row(name, True, [new[name]]) for name in train if new[name])
        _write_json(folder / "new-train.json", new_train)
        _write_test(folder, "new-", test, {name: [new[name]] for name in test if new[name]})
        truth = ({"id": name, "split": scene.split, **asdict(scene)} for name, scene in (train | test).items())
        _write_lines(folder / "scenes.jsonl", truth)
    return out


def _draw_split(folder: Path, pictograms: dict, split: str, number: int, seed: int) -> dict[str, Scene]:
    scenes = {}
    for index in tqdm(range(number), desc=f"{split} pictures"):
        rng = Random(f"{seed}/{split}/{index}")
        name = f"{split}-{index:06}"
        scenes[name] = draw_scene(pictograms, split, rng)
        draw_picture(scenes[name], pictograms, rng).save(folder / "images" / f"{name}.png")
    return scenes


def _row(name: str, picture: bool, questions: list[Question], image_name: str | None = None) -> dict:
    turns = [
        {"from": role, "value": text}
        for question in questions
        for role, text in (("human", question.text), ("gpt", question.answer))
    ]
    if not picture:
        return {"id": name, "conversations": turns}
    turns[0]["value"] = PLACEHOLDER + turns[0]["value"]
    return {"id": name, "image": f"images/{image_name or name}.png", "conversations": turns}


def _write_test(folder: Path, prefix: str, scenes: dict[str, Scene], questions: dict[str, list[Question]]) -> None:
    asked = [(f"{name}-{question.kind}", name, question) for name, several in questions.items() for question in several]
    _write_json(
        folder / f"{prefix}test.json", (_row(row_id, True, [question], name) for row_id, name, question in asked)
    )
    truth = ({"id": row_id, "kind": question.kind, "group": scenes[name].group} for row_id, name, question in asked)
    _write_lines(folder / f"{prefix}truth.jsonl", truth)


def _write_json(file: Path, rows: Iterable[dict]) -> None:
    file.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")


def _write_lines(file: Path, rows: Iterable[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_scenes(data: str | Path, split: str) -> dict[str, Scene]:
    """Returns the scenes of a split, by the names of their pictures in images/."""
    rows = (row for row in read_rows(Path(data) / "scenes.jsonl") if row["split"] == split)
    return {row["id"]: Scene(tuple(Thing(**thing) for thing in row["things"]), _print(row["print"])) for row in rows}


def _print(row: dict | None) -> Print | None:
    return Print(row["text"], tuple(row["box"])) if row else None
