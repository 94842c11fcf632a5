"""What the tower is never told: marks on objects, and questions about them."""

import json
from dataclasses import replace
from random import Random

import pytest
from PIL import Image

from examples.shapes.generate import generate, read_scenes
from examples.shapes.phrases import VALUES
from examples.shapes.scenes import SIDE, Scene, Thing
from examples.shapes.text import PLACEHOLDER, read_rows
from examples.shapes.untold import FRAME, NO_TEXT, UNTOLD, Marks, add_untold, draw, frame_width, questions

FOX = Thing("fox", "animal", "orange", "noto", "large", 40.0, 60.0, 22.3)
SOLID = Marks("solid", 44, "up", "7")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("untold")
    data = generate(root / "data", 20, 10, seed=2)
    return data, add_untold(data, root / "out")


def test_only_stage_2_and_the_test_change(folders):
    data, out = folders
    changed = {file.name for file in data.glob("*.json*") if file.read_bytes() != (out / file.name).read_bytes()}
    assert changed == {"dialogues.json", "test.json", "truth.jsonl"}
    assert {file.name for file in (data / "images").iterdir()} == {file.name for file in (out / "images").iterdir()}
    before, after = read_rows(data / "dialogues.json"), read_rows(out / "dialogues.json")
    for old, new in zip(before, after, strict=True):
        added = len(new["conversations"]) - len(old["conversations"])
        no_text = [turn["value"] for turn in old["conversations"]].count(NO_TEXT)
        assert added + 2 * no_text in (0, 4) and new["conversations"][-1] == old["conversations"][-1]
        assert NO_TEXT not in [turn["value"] for turn in new["conversations"]]
        assert [turn["value"].startswith(PLACEHOLDER) for turn in new["conversations"]].count(True) == 1
        assert new["conversations"][0]["value"].startswith(PLACEHOLDER)
        assert [turn["from"] for turn in new["conversations"]] == ["human", "gpt"] * (len(new["conversations"]) // 2)
        left = [pair for pair in pairs_of(old) if pair[1] != NO_TEXT]
        marked = [pair for pair in pairs_of(new) if pair not in left]
        assert [pair for pair in pairs_of(new) if pair in left] == left and len(marked) in (0, 2)


def pairs_of(row):
    texts = [turn["value"].removeprefix(PLACEHOLDER) for turn in row["conversations"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_the_test_asks_each_kind_and_its_answers_are_those_of_the_marks(folders):
    data, out = folders
    truth = {row["id"]: row for row in read_rows(out / "truth.jsonl")}
    rows, scenes = read_rows(out / "test.json"), read_scenes(out, "test")
    marks = {row["id"]: row["marks"] for row in read_rows(out / "marks.jsonl")}
    assert truth.keys() == {row["id"] for row in rows}
    asked = [row for row in rows if truth[row["id"]]["kind"] in UNTOLD]
    assert {truth[row["id"]]["kind"] for row in asked} == {*UNTOLD}
    for row in asked:
        name = row["image"].removeprefix("images/").removesuffix(".png")
        text, answer = (turn["value"] for turn in row["conversations"])
        (index,) = [i for i, thing in enumerate(scenes[name].things) if f"the {thing.name} " in text.replace("?", " ")]
        field = {"outline": "outline", "width": "width", "arrow": "arrow", "small digit": "digit"}
        assert str(marks[name][index][field[truth[row["id"]]["kind"]]]) in answer.rstrip(".").split()
        assert truth[row["id"]]["group"] == scenes[name].group


def test_the_tower_is_not_told():
    said = " ".join(value for values in VALUES.values() for value in values)
    assert not any(word in said.split() for word in ("solid", "dashed", "arrow", "frame", "digit", "wide"))


def test_a_told_size_has_several_exact_widths():
    for size, radii in (("small", (14.0, 15.9, 17.0)), ("large", (21.0, 22.5, 25.0))):
        widths = {frame_width(replace(FOX, size=size, radius=radius)) for radius in radii}
        assert len(widths) >= 2 and all(width <= 2 * max(radii) for width in widths)


@pytest.mark.parametrize("change", [{"outline": "dashed"}, {"width": 40}, {"arrow": "left"}, {"digit": "1"}])
def test_every_mark_is_seen(change):
    scene, plain = Scene((FOX,), None), Image.new("RGB", (SIDE, SIDE), "grey")
    ours, theirs = draw(plain, scene, [SOLID]), draw(plain, scene, [replace(SOLID, **change)])
    assert ours.tobytes() != theirs.tobytes() != plain.tobytes()
    assert ours.getpixel((40 - 22, 60)) == ours.getpixel((40 + 21, 60)) == FRAME  # a frame 44 wide


def test_objects_of_one_name_are_not_asked_about():
    assert questions(Scene((FOX, FOX), None), [SOLID, SOLID], Random(0)) == []
    texts = [question.text for question in questions(Scene((FOX,), None), [SOLID], Random(0))]
    assert len(texts) == len(UNTOLD) and all("fox" in text for text in texts)


def test_a_folder_that_is_not_empty_is_refused(folders):
    data, out = folders
    with pytest.raises(ValueError, match="empty"):
        add_untold(data, out)
    assert json.loads((out / "dialogues.json").read_text())


def test_marks_are_not_drawn_over_marks(folders, tmp_path):
    """The test would have two answers to a question, and a picture both marks."""
    with pytest.raises(ValueError, match="has marks already: name a folder that `generate` wrote"):
        add_untold(folders[1], tmp_path / "twice", seed=1)
    assert not (tmp_path / "twice").exists()
