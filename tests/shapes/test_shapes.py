"""The shapes example: pictograms, scenes, questions, data sets, tokenizer and evaluation."""

import functools
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib
from collections import Counter, defaultdict
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm
from transformers import CLIPVisionModelWithProjection, LlamaForCausalLM, LlamaTokenizer

from conversion import ConversionError
from examples.shapes.__main__ import main
from examples.shapes.clip import (
    PATCH,
    WEIGHTS,
    build_clip,
    measure,
    name_patches,
    naming_loss,
    read_pictures,
    scaled,
    train_clip,
    waves,
)
from examples.shapes.crowds import Crowds
from examples.shapes.evaluate import evaluate, score
from examples.shapes.generate import generate, read_scenes
from examples.shapes.language_model import train_language_model
from examples.shapes.phrases import NOTHING, NUMBERED, UNKNOWN, VALUES, numbers_of, shown_at
from examples.shapes.pictograms import (
    FAMILIES,
    HELD_OUT_FAMILY,
    OBJECTS,
    RENDERED,
    SAMPLE,
    Object,
    Pictogram,
    certain_colour,
    check_objects,
    fetch,
    read_pictograms,
)
from examples.shapes.processes import start_module
from examples.shapes.questions import (
    CATEGORIES,
    KINDS,
    article,
    caption,
    conversation,
    describe,
    furthest_left,
    one_of_each,
    plural,
)
from examples.shapes.recipe import LOGS, Timer, make
from examples.shapes.scenes import GROUPS, RADII, SIDE, Print, Scene, Thing, draw_picture, draw_scene
from examples.shapes.shrink import shrink
from examples.shapes.task import write_task
from examples.shapes.text import CHAT_TEMPLATE, messages_of, read_rows, read_test, read_tokenizer, train_tokenizer
from examples.shapes.tokens import compare
from examples.shapes.training import train
from examples.shapes.warm_up import warm_up
from hub_card.results import read_evaluation
from modeling_llava_stf import LlavaSTFImageProcessor, LlavaSTFProcessor

SCENES, TEST_SCENES = 60, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("shapes") / "data", SCENES, TEST_SCENES, seed=3)


@pytest.fixture(scope="module")
def tokenizer_folder(data, tmp_path_factory):
    return train_tokenizer(data, tmp_path_factory.mktemp("shapes") / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return read_tokenizer(tokenizer_folder)


SAMPLES = read_pictograms(SAMPLE)
BLOCKS = {
    "red": (220, 20, 20),
    "yellow": (250, 220, 30),
    "green": (30, 160, 60),
    "blue": (40, 90, 220),
    None: (99, 99, 99),
}


def block(one, family):
    """Stands for any pictogram: its colour depends on the artist."""
    colour = list(BLOCKS.values())[zlib.crc32(f"{one.name}{family}".encode()) % len(BLOCKS)]
    return Pictogram(one, family, Image.new("RGBA", (RENDERED, RENDERED), (*colour, 255)))


EVERYTHING = {family: [block(one, family) for one in OBJECTS] for family in FAMILIES}


@functools.cache
def drawn(split, index, everything):
    return draw_scene(EVERYTHING if everything else SAMPLES, split, Random(f"{split}/{index}"))


def scenes(split, number, everything=False):
    return [drawn(split, index, everything) for index in range(number)]


def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_seed_gives_the_same_files_and_another_seed_others(data, tmp_path):
    again = generate(tmp_path / "again", SCENES, TEST_SCENES, seed=3)
    assert files(again) == files(data)
    other = generate(tmp_path / "other", 2, 1, seed=4)
    picture = "images/train-000000.png"
    assert (other / picture).read_bytes() != (data / picture).read_bytes()


def test_the_first_scenes_do_not_depend_on_how_many_follow(data, tmp_path):
    fewer = generate(tmp_path / "fewer", 5, 1, seed=3)
    for file, content in files(fewer).items():
        if file.suffix == ".png":
            assert files(data)[file] == content


def test_refuses_a_folder_that_is_not_empty(data):
    with pytest.raises(ConversionError, match="not empty"):
        generate(data, 1)


def drawn_apart(scene, pictograms, index):
    """The picture, and where it differs from the same background alone."""
    alone = replace(scene, things=(), print=None)
    picture, background = (
        np.asarray(draw_picture(one, pictograms, Random(index))).astype(int) for one in (scene, alone)
    )
    return picture, (picture != background).any(-1)


def shown_colours(scene, picture, changed):
    """For each thing, the mean colour of what is drawn in its box, which must be enough to see."""
    for thing in scene.things:
        left, top, right, bottom = (round(side) for side in thing.box)
        inside = changed[top:bottom, left:right]
        assert inside.mean() > 0.1, thing
        yield thing, picture[top:bottom, left:right][inside].mean(0)


def mean_colour(thing):
    (found,) = (one.picture for one in SAMPLES[thing.family] if one.object.name == thing.name)
    pixels = np.asarray(found).reshape(-1, 4)
    return pixels[pixels[:, 3] > 200, :3].mean(0)


def test_pictures_show_what_the_scene_says():
    """Nothing changes outside the boxes; what a box shows has its object's colours, and not those of the next."""
    right, wrong = [], []
    for index, scene in enumerate(scenes("train", 60)):
        picture, changed = drawn_apart(scene, SAMPLES, index)
        if scene.print:
            left, top, _, bottom = (int(side) for side in scene.print.box)
            right_edge = int(scene.print.box[2])
            assert np.ptp(picture[top:bottom, left:right_edge].mean(-1)) > 100
            changed[top:bottom, left:right_edge] = False
        found = list(shown_colours(scene, picture, changed))
        right += [np.abs(colour - mean_colour(thing)).max() for thing, colour in found]
        others = [thing for thing, _ in found[1:]]
        wrong += [np.abs(colour - mean_colour(next)).max() for (_, colour), next in zip(found, others, strict=False)]
        for thing in scene.things:
            left, top, right_edge, bottom = thing.box
            changed[int(top) : int(bottom) + 2, int(left) : int(right_edge) + 2] = False
        assert not changed.any()
    assert np.median(right) < 25 and np.quantile(right, 0.9) < 50 < np.median(wrong)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_colour_is_certain_only_if_nearly_all_has_it(name):
    picture = Image.new("RGBA", (RENDERED, RENDERED), (*BLOCKS[name], 255))
    assert certain_colour(picture) == name
    picture.paste((120, 120, 120, 255), (0, 0, RENDERED, RENDERED // 4))
    assert certain_colour(picture) == name
    picture.paste((120, 120, 120, 255), (0, 0, RENDERED, RENDERED // 2))
    assert certain_colour(picture) is None


@pytest.mark.parametrize(
    "colour", [(150, 90, 50), (240, 160, 90), (255, 120, 150), (255, 172, 51), (40, 170, 170), (10, 25, 60)]
)
def test_what_people_would_call_differently_has_no_colour(colour):
    """Brown, tan, pink, gold, teal and nearly black."""
    assert certain_colour(Image.new("RGBA", (RENDERED, RENDERED), (*colour, 255))) is None


def test_a_family_without_pictures_is_named(tmp_path):
    with pytest.raises(ValueError, match="noto has no picture of an object: fetch them first"):
        read_pictograms(tmp_path)
    shutil.copytree(SAMPLE, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / HELD_OUT_FAMILY)
    with pytest.raises(ValueError, match=HELD_OUT_FAMILY):
        read_pictograms(tmp_path)


def damaged(file):
    file.write_bytes(file.read_bytes()[:200])


def enlarged(file):
    Image.new("RGBA", (2 * RENDERED, RENDERED), "red").save(file)


def emptied(file):
    Image.new("RGBA", (RENDERED, RENDERED)).save(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, r"could not be read as a picture \(.*\): fetch or draw it again"),
        (enlarged, "has 128 x 64 pixels, expected 64 x 64: resize it"),
        (emptied, "is transparent everywhere, expected a drawn object"),
    ],
)
def test_a_pictogram_that_shows_no_object_is_named(change, message, tmp_path):
    shutil.copytree(SAMPLE, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "noto" / "cat.png")
    with pytest.raises(ValueError, match=f"noto/cat.png {message}"):
        read_pictograms(tmp_path)


@pytest.mark.parametrize("name", ["noto/catt.png", "me/cat.png"])
def test_a_pictogram_that_no_scene_would_have_is_named(name, tmp_path):
    shutil.copytree(SAMPLE, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(SAMPLE / "noto" / "cat.png", tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is of no known object or family: add its row to .*objects.csv"):
        read_pictograms(tmp_path)


def test_too_few_objects_for_a_scene_are_refused(monkeypatch):
    """One object has no pair, so that an unseen pair would be searched for ever."""
    monkeypatch.setattr("examples.shapes.scenes.SCENES_TRIED", 500)
    few = {family: [one for one in of_family if one.object.name == "cat"] for family, of_family in SAMPLES.items()}
    with pytest.raises(ValueError, match=r"No test scene .*\(unseen pair\) .* with 1 different pictograms: add some"):
        for index in range(20):
            draw_scene(few, "test", Random(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "cat"}, "has 2 rows of 'cat', expected one"),
        ({"also": ("fruit", "anmal")}, "has 'anmal' in `also` of 'hen', expected names and categories"),
    ],
)
def test_a_wrong_row_of_the_table_is_named(change, message):
    table = [Object("cat", "animal", ()), Object("tomato", "fruit", ()), Object("hen", "animal", ("fruit",))]
    check_objects(table)
    table[2] = replace(table[2], **change)
    with pytest.raises(ValueError, match=f"objects.csv {message}"):
        check_objects(table)


def test_the_table_of_objects():
    names = [one.name for one in OBJECTS]
    assert len(set(names)) == len(names) > 300
    assert not {*names} & {*CATEGORIES}
    for one in OBJECTS:
        assert one.category in ("", *CATEGORIES)
        assert {*one.also} <= {*names, *CATEGORIES} - {one.name, one.category}, one
        # A caption is compared by its parts, see `is_right`.
        assert not any(mark in one.name for mark in (" and ", ",", ":", ".")), one
    assert {"tomato", "fox", "guitar"} < {*names} and "fruit" in next(
        one.also for one in OBJECTS if one.name == "tomato"
    )


def test_the_sample_has_every_artist():
    named = {family: {one.object.name for one in pictograms} for family, pictograms in SAMPLES.items()}
    assert named.keys() == FAMILIES.keys() and named[HELD_OUT_FAMILY] == set().union(*named.values())
    for family in FAMILIES:
        assert {file.stem for file in (SAMPLE / family).iterdir()} == named[family]
        assert all(one.picture.size == (RENDERED, RENDERED) for one in SAMPLES[family])


@pytest.fixture
def offline(monkeypatch):
    """Two objects, npm without a network, and a resvg that draws a green bar."""

    bar = io.BytesIO()
    picture = Image.new("RGBA", (2 * RENDERED, 2 * RENDERED))
    picture.paste((0, 200, 0, 255), (10, 30, 118, 40))
    picture.save(bar, "PNG")
    seen = []

    def pack(command, cwd, **_):
        icons = {name: {"body": f"<path d='{name}'/>", "width": 36} for name in ("cat-a", "dog-a")}
        data = json.dumps({"icons": icons, "width": 128, "height": 64}).encode()
        with tarfile.open(f"{cwd}/package.tgz", "w:gz") as archive:
            entry = tarfile.TarInfo("package/icons.json")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        seen.append(command[-1])

    rows = [
        {"name": "cat", **dict.fromkeys(FAMILIES, "cat-a")},
        {"name": "dog", **dict.fromkeys(FAMILIES, "dog-a"), "fxemoji": ""},
    ]
    monkeypatch.setattr("examples.shapes.pictograms._rows", lambda: rows)
    monkeypatch.setattr("examples.shapes.pictograms.subprocess.run", pack)
    svgs = []
    resvg = SimpleNamespace(svg_to_bytes=lambda svg_string, **_: svgs.append(svg_string) or bar.getvalue())
    monkeypatch.setitem(sys.modules, "resvg_py", resvg)
    return SimpleNamespace(packages=seen, svgs=svgs)


def test_fetch_draws_every_object_of_every_family(offline, tmp_path):
    out = fetch(tmp_path / "pictograms")
    assert offline.packages == [f"@iconify-json/{family}@{version}" for family, version in FAMILIES.items()]
    expected = {f"{family}/{name}.png" for family in FAMILIES for name in ("cat", "dog")} - {"fxemoji/dog.png"}
    assert {str(file) for file in files(out)} == expected
    assert 'viewBox="0 0 36 64"' in offline.svgs[0] and "cat-a" in offline.svgs[0]
    picture = Image.open(out / "noto" / "cat.png")  # cut to what is drawn, in the middle of a square
    assert picture.size == (RENDERED, RENDERED) and picture.getpixel((RENDERED // 2,) * 2) == (0, 200, 0, 255)
    assert picture.getpixel((0, RENDERED // 2))[3] > 200 and picture.getpixel((RENDERED // 2, RENDERED // 4))[3] == 0
    assert {one.object.name for one in read_pictograms(out)["noto"]} == {"cat", "dog"}
    with pytest.raises(ConversionError, match="not empty"):
        fetch(out)


@pytest.mark.parametrize("lacking", ["npm", "package", "resvg"])
def test_fetch_says_what_is_missing_and_writes_nothing(lacking, offline, tmp_path, monkeypatch):

    failures = {"npm": FileNotFoundError(), "package": subprocess.CalledProcessError(1, "npm", stderr="E404")}

    def fail(*_, **__):
        raise failures[lacking]

    if lacking == "resvg":
        monkeypatch.setitem(sys.modules, "resvg_py", None)
    else:
        monkeypatch.setattr("examples.shapes.pictograms.subprocess.run", fail)
    messages = {"npm": "Install it", "package": r"noto@.*E404", "resvg": "pip install resvg-py"}
    with pytest.raises(ValueError, match=messages[lacking]):
        fetch(tmp_path / "pictograms")
    assert not (tmp_path / "pictograms").exists()


def test_fetch_names_a_picture_that_a_family_lacks_or_that_shows_nothing(offline, tmp_path, monkeypatch):
    empty = io.BytesIO()
    Image.new("RGBA", (2 * RENDERED, 2 * RENDERED)).save(empty, "PNG")
    monkeypatch.setattr(sys.modules["resvg_py"], "svg_to_bytes", lambda **_: empty.getvalue())
    with pytest.raises(ValueError, match="picture 'cat-a' of noto could not be drawn: it shows nothing"):
        fetch(tmp_path / "pictograms")
    monkeypatch.setattr("examples.shapes.pictograms._rows", lambda: [{"name": "ox", **dict.fromkeys(FAMILIES, "ox")}])
    with pytest.raises(ValueError, match="noto has no picture 'ox': correct its name in .*objects.csv"):
        fetch(tmp_path / "pictograms")
    assert not [*tmp_path.iterdir()]


def test_objects_lie_inside_the_picture_and_apart():
    for scene in scenes("train", 200):
        boxes = [thing.box for thing in scene.things] + ([scene.print.box] if scene.print else [])
        assert 1 <= len(scene.things) <= 5
        for index, a in enumerate(boxes):
            assert 0 <= min(a) and max(a) <= SIDE
            for b in boxes[:index]:
                assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


@pytest.mark.parametrize("everything", [False, True], ids=["sample", "everything"])
def test_splits_share_no_content_and_the_test_has_what_training_never_shows(everything):
    train, test = scenes("train", 1500, everything), scenes("test", 300, everything)
    assert not {scene.content for scene in train} & {scene.content for scene in test}
    assert {scene.split for scene in train} == {"train"} and {scene.split for scene in test} == {"test"}
    assert HELD_OUT_FAMILY not in {thing.family for scene in train for thing in scene.things}
    together = pairs(train)
    for scene in test:
        artists = {thing.family for thing in scene.things}
        assert (artists == {HELD_OUT_FAMILY}) == (scene.group == "unseen artist") == (HELD_OUT_FAMILY in artists)
        if scene.group == "unseen pair":
            assert pairs([scene]) - together
    if not everything:  # so few objects that nearly all other pairs are in the training
        assert not pairs(scene for scene in test if scene.group == "seen") - together
    shares = Counter(scene.group for scene in test)
    assert shares.keys() == {*GROUPS} and min(shares.values()) > 50
    assert {len(scene.things) for scene in test} == {1, 2, 3, 4, 5}


def pairs(several):
    return {
        frozenset((a.name, b.name)) for scene in several for a in scene.things for b in scene.things if a.name != b.name
    }


def thing(name, category, size, x, y, radius, colour=None):
    return Thing(name, category, colour, "noto", size, x, y, radius)


SCENE = Scene(
    (
        thing("unicorn", "", "large", 20, 20, 18, "red"),
        thing("elephant", "animal", "small", 64, 110, 14, "blue"),
        thing("tomato", "vegetable", "small", 110, 64, 14),
    ),
    Print("42", (40, 40, 64, 62)),
)


def answers(scene, kind, seeds=400):
    """Every question of a kind, with its answers."""
    found = defaultdict(set)
    for seed in range(seeds):
        question = KINDS[kind](scene, Random(seed))
        if question:
            found[question.text].add(question.answer)
    return {text: one.pop() for text, one in found.items() if len(one) == 1 or pytest.fail(f"{text}: {one}")}


def test_caption_names_everything_from_left_to_right():
    assert describe(SCENE) == (
        "Three objects and the number 42: a large unicorn at the top left, a small elephant at the bottom and a small "
        "tomato on the right."
    )
    one = replace(SCENE, things=SCENE.things[2:], print=Print("cat", SCENE.print.box))
    assert describe(one) == "One object and the word cat: a small tomato on the right."
    assert caption(SCENE, Random(0)).answer == describe(SCENE)


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("count", "How many objects are there?", "There are three objects."),
        ("count", "How many elephants are there?", "There is one elephant."),
        ("count", "How many vegetables are there?", "There is one vegetable."),
        ("count", "How many vehicles are there?", "There are no vehicles."),
        ("name", "What is on the right?", "A tomato."),
        ("name", "Which object is at the bottom?", "An elephant."),
        ("category", "Is there a vegetable?", "Yes, there is a vegetable: a tomato."),
        ("category", "Is there a vehicle?", "No, there is no vehicle."),
        ("colour", "What color is the object at the top left?", "The object at the top left is red."),
        ("colour", "What colour is the object at the bottom?", "The object at the bottom is blue."),
        ("where", "Where is the unicorn?", "The unicorn is at the top left."),
        ("where", "Where is the tomato?", "The tomato is on the right."),
        ("left/right", "Is the elephant left or right of the unicorn?", "The elephant is right of the unicorn."),
        ("above/below", "Is the tomato above or below the elephant?", "The tomato is above the elephant."),
        ("is there", "Is there an elephant?", "Yes, there is an elephant."),
        ("is there", "Is there a unicorn?", "Yes, there is a unicorn."),
        ("is there", "Is there an airplane?", "No, there is no airplane."),
        ("larger", "Which is larger, the elephant or the unicorn?", "The unicorn is larger."),
        ("read", "Read the word or number.", "The number is 42."),
    ],
)
def test_answers_are_true(kind, text, answer):
    assert answers(SCENE, kind, seeds=3000)[text] == answer


def test_what_has_no_clear_answer_is_not_asked():
    twins = Scene((SCENE.things[0], replace(SCENE.things[0], x=110, y=110)), None)
    for kind in ("where", "left/right", "above/below", "larger"):
        assert not answers(twins, kind), kind
    assert set(answers(twins, "read").values()) == {"There is no text."}
    assert answers(twins, "count")["How many unicorns are there?"] == "There are two unicorns."
    here = Scene((SCENE.things[0], replace(SCENE.things[1], x=22)), None)  # in one column, and in the same place
    assert not answers(here, "left/right")
    same_place = Scene((SCENE.things[0], replace(SCENE.things[1], x=22, y=22)), None)
    assert not answers(same_place, "name") and not answers(same_place, "colour")


def test_what_people_would_dispute_is_not_asked():
    """A hen is a bird: with a hen, "the bird" is not clear, and whether a tomato is a fruit is not asked."""
    hen, bird = thing("hen", "animal", "large", 20, 20, 18), thing("bird", "animal", "small", 64, 110, 14)
    scene = Scene((hen, bird, SCENE.things[2]), None)
    for kind in KINDS:
        for text in answers(scene, kind, seeds=2000):
            assert "fruit" not in text and "bird" not in text, text
    assert "Where is the hen?" in answers(scene, "where")
    assert answers(replace(scene, things=(bird,)), "is there")["Is there a bird?"] == "Yes, there is a bird."
    assert "Where is the bird?" in answers(replace(scene, things=(bird,)), "where")


def test_plurals_and_articles():
    several = {
        "fox": "foxes", "mouse": "mice", "computer mouse": "computer mice", "bunch of grapes": "bunches of grapes",
        "pair of cherries": "pairs of cherries", "tomato": "tomatoes", "maple leaf": "maple leaves",
        "snowman": "snowmen", "strawberry": "strawberries", "monkey": "monkeys", "watch": "watches", "die": "dice",
        "loaf of bread": "loaves of bread", "piece of clothing": "pieces of clothing", "bus": "buses",
        "wolf": "wolves", "piano": "pianos",
        "high-heeled shoe": "high-heeled shoes", "glass of wine": "glasses of wine", "fish": "fish", "taxi": "taxis",
        "crocodile": "crocodiles", "cactus": "cacti", "hourglass": "hourglasses", "dish": "dishes", "ox": "oxen",
    }  # fmt: skip
    assert {noun: plural(noun) for noun in several} == several
    assert {*several} <= {one.name for one in OBJECTS} | {*CATEGORIES}
    for right in ("an hourglass", "a small hourglass", "a unicorn", "an American football", "an umbrella", "a t-shirt"):
        assert article(right.split(" ", 1)[1]) == right
    tree = Scene((thing("Christmas tree", "", "small", 20, 20, 14),), None)
    assert answers(tree, "name")["What is at the top left?"] == "A Christmas tree."


def test_a_blind_guess_wins_no_kind():
    """The most frequent answer to each question, known from training, is right less than 55 % of the time."""
    rng = Random(1)
    known = defaultdict(Counter)
    for scene in scenes("train", 2500, everything=True):
        for question in conversation(scene, 8, rng):
            known[question.text][question.answer] += 1
    right, asked = Counter(), Counter()
    for scene in scenes("test", 450, everything=True):
        for question in one_of_each(scene, rng):
            asked[question.kind] += 1
            right[question.kind] += known[question.text].most_common(1)[:1] != [] and (
                known[question.text].most_common(1)[0][0] == question.answer
            )
    assert asked.keys() == KINDS.keys() and min(asked.values()) > 100
    for kind in KINDS:
        assert right[kind] / asked[kind] < 0.55, kind


@pytest.mark.parametrize("kind", ["is there", "category"])
def test_yes_and_no_are_equally_frequent_in_every_group(kind):
    yes = defaultdict(list)
    for index, scene in enumerate(scenes("test", 450, everything=True)):
        if question := KINDS[kind](scene, Random(index)):
            yes[scene.group].append(question.answer.startswith("Yes"))
    assert yes.keys() == {*GROUPS}
    for of_group in yes.values():
        assert len(of_group) > 100 and 0.4 < sum(of_group) / len(of_group) < 0.6


def test_files_fit_together(data):
    truth = {row["id"]: row for row in read_rows(data / "truth.jsonl")}
    test = read_rows(data / "test.json")
    assert [row["id"] for row in test] == list(truth)
    assert {row["kind"] for row in truth.values()} == set(KINDS)
    pictured = [*read_rows(data / "captions.json"), *read_rows(data / "train.json"), *test]
    for row in pictured:
        assert Image.open(data / row["image"]).size == (SIDE, SIDE)
        assert row["conversations"][0]["value"].startswith("<image>\n")
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(row["conversations"]) // 2)
    assert {row["image"] for row in pictured} == {f"images/{file.name}" for file in (data / "images").iterdir()}
    splits = Counter(row["split"] for row in read_rows(data / "scenes.jsonl"))
    assert splits == {"train": SCENES, "test": TEST_SCENES}
    captions = {row["id"]: row["conversations"][1]["value"] for row in read_rows(data / "captions.json")}
    for row in read_rows(data / "text.json"):
        assert "image" not in row and row["conversations"][0]["value"].startswith(captions[row["id"]] + "\n")
        assert not any("color" in turn["value"] or "colour" in turn["value"] for turn in row["conversations"])
    assert max(len(row["conversations"]) for row in read_rows(data / "train.json")) == 16


def test_tokenizer_suits_the_processor(data, tokenizer, tmp_path):
    processor = LlavaSTFProcessor(
        image_processor=LlavaSTFImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=16,
        fusion_window=2,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(tmp_path)
    processor = LlavaSTFProcessor.from_pretrained(tmp_path)
    row = read_rows(data / "train.json")[0]
    encoded = processor.apply_chat_template(
        messages_of(row, data), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, marks = encoded["input_ids"][0], encoded["assistant_masks"][0]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.image_token_id) == 16
    spoken = processor.decode([token for token, mark in zip(ids, marks, strict=True) if mark])
    given = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
    assert [text.strip() for text in spoken.split("</s>")[:-1]] == given
    assert tokenizer.unk_token_id not in ids


def test_tokenizer_has_a_token_per_word_and_digit_and_bytes_for_the_rest(data, tokenizer):
    assert tokenizer.tokenize("There are two objects 46.") == ["▁There", "▁are", "▁two", "▁objects", "▁4", "6", "."]
    text = "Привет, zebra 漢\nx"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_scenes_are_read_as_they_were_drawn(data):
    seventh = draw_scene(SAMPLES, "train", Random("3/train/7"))
    assert read_scenes(data, "train")["train-000007"] == seventh
    assert len(read_scenes(data, "test")) == TEST_SCENES


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ((20, 20), {"name": "unicorn", "colour": "red", "size": "large", "place": "at the top left"}),
        (
            (64, 110),
            {"name": "elephant", "category": "animal", "colour": "blue", "size": "small", "place": "at the bottom"},
        ),
        ((110, 64), {"name": "tomato", "category": "vegetable", "size": "small", "place": "on the right"}),
        ((50, 50), {"name": "the number 4"}),
        ((100, 100), {"name": NOTHING}),
    ],
)
def test_what_a_patch_shows(place, values):
    scene = replace(SCENE, print=replace(SCENE.print, text="4"))  # 42 is in no picture
    shown = shown_at(scene, *place)
    assert {kind: value for kind, value in shown.items() if value} == values
    numbers = dict(zip(VALUES, numbers_of(shown), strict=True))
    assert {kind: VALUES[kind][number] for kind, number in numbers.items() if number != UNKNOWN} == values


def test_phrases_differ_and_name_everything():
    assert all(len({*values}) == len(values) for values in VALUES.values())
    assert VALUES.keys() == WEIGHTS.keys()
    assert {"fox", "cat", "the word cat", "the number 7", NOTHING} <= {*VALUES["name"]}
    for scene in scenes("train", 50):
        for thing in scene.things:
            numbers = numbers_of(shown_at(scene, thing.x, thing.y))
            assert [number == UNKNOWN for number in numbers] == [
                False,
                not thing.category,
                thing.colour is None,
                False,
                False,
            ]


def test_the_tower_scores_every_phrase_of_every_patch_and_pictures_alone_as_together():
    torch.manual_seed(0)
    model, pixels = build_clip(), torch.randn(3, 3, SIDE, SIDE)
    with torch.inference_mode():
        together = name_patches(model, pixels)
        torch.testing.assert_close(together[1:2], name_patches(model, pixels[1:2]), rtol=1e-4, atol=1e-5)
    assert together.shape == (3, (SIDE // PATCH) ** 2, sum(map(len, VALUES.values())))


def test_the_naming_loss_is_cross_entropy_by_kind_where_the_kind_is_known():
    torch.manual_seed(0)
    scores = torch.randn(4, sum(map(len, VALUES.values())))
    truth = torch.full((4, len(VALUES)), UNKNOWN)
    truth[:, 0] = torch.tensor([5, 0, UNKNOWN, 311])
    truth[1, 4] = 8
    names, places = scores[:, : len(VALUES["name"])], scores[:, -len(VALUES["place"]) :]
    of_names = -names.log_softmax(-1)[[0, 1, 3], [5, 0, 311]].mean()
    expected = of_names - WEIGHTS["place"] * places[1].log_softmax(-1)[8]
    torch.testing.assert_close(naming_loss(scores, truth), expected)


def test_the_truth_of_pictures_is_read_from_their_places(data):
    pixels, truth = read_pictures(data, "train")
    assert pixels.shape == (SCENES, SIDE, SIDE, 3) and truth.shape == (SCENES, (SIDE // PATCH) ** 2, len(VALUES))
    for index, (name, scene) in enumerate(list(read_scenes(data, "train").items())[:10]):
        picture = np.array(Image.open(data / "images" / f"{name}.png"))
        assert torch.equal(pixels[index], torch.from_numpy(picture))
        assert torch.equal(scaled(pixels[index : index + 1])[0, :, 5, 9], torch.from_numpy(picture[5, 9]) / 255)
        for patch, numbers in enumerate(truth[index].tolist()):
            y, x = divmod(patch, SIDE // PATCH)
            assert numbers == numbers_of(shown_at(scene, (x + 0.5) * PATCH, (y + 0.5) * PATCH))


def test_a_crowd_shows_what_it_says():
    """Squares of pure colours: the patches of a pictogram have its colour at their centres, wherever it is."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    one = [Pictogram(OBJECTS[0], "noto", Image.new("RGBA", (RENDERED, RENDERED), (*rgb, 255))) for rgb in colours]
    torch.manual_seed(0)
    right = []
    for _ in range(5):
        pictures, shown = Crowds(one).draw(8, PATCH)
        assert pictures.shape == (8, 3, SIDE, SIDE) and 0 <= pictures.min() and pictures.max() <= 1
        centres = pictures[:, :, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].flatten(2)  # (P, 3, N)
        assert shown.unique().tolist() == [0, 1, 2, 3]
        strongest = centres.argmax(1)
        clear = centres.max(1).values - centres.min(1).values > 0.3  # not the background at the edge of a square
        right.append((strongest == shown)[clear & (shown < 3)].float().mean())
        empty = (centres.max(1).values - centres.min(1).values)[shown == 3]
        assert empty.quantile(0.9) < 0.3
    assert min(right) > 0.98


def test_some_objects_are_alone_and_fill_the_picture():
    alone = [thing for scene in scenes("train", 400) if len(scene.things) == 1 for thing in scene.things]
    close = [thing for thing in alone if thing.radius > max(radius for _, radius in RADII.values())]
    assert 0.2 < len(close) / len(alone) < 0.6 and max(thing.radius for thing in close) > 50
    for thing in close:
        assert (thing.size, thing.place) == ("large", "in the middle")
        assert min(thing.box) >= 0 and max(thing.box) <= SIDE


def test_a_crowd_is_never_repeated_but_by_its_seed():
    crowds = Crowds(SAMPLES["noto"])
    torch.manual_seed(1)
    first, second = crowds.draw(2, PATCH)[0], crowds.draw(2, PATCH)[0]
    torch.manual_seed(1)
    assert torch.equal(first, crowds.draw(2, PATCH)[0]) and not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_measure_counts_patches_by_group_and_leaves_out_what_shows_nothing(tmp_path, monkeypatch):
    """A model that knows all is right; one that calls everything nothing, or knows every other patch, is not."""
    data = generate(tmp_path / "data", scenes=1, test_scenes=30, seed=4)
    _, truth = read_pictures(data, "test")
    known = torch.cat(
        [
            torch.nn.functional.one_hot(truth[..., index].long().clamp(min=0), len(values))
            for index, values in enumerate(VALUES.values())
        ],
        dim=-1,
    ).float()
    processor = LlavaSTFImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})

    def told(scores):
        monkeypatch.setattr("examples.shapes.clip.name_patches", lambda model, pixels: scores)
        return measure(None, data, processor)

    perfect = told(known)
    assert perfect.keys() == {scene.group for scene in read_scenes(data, "test").values()}
    assert {share for shares in perfect.values() for share in shares.values()} == {1.0}
    assert any("print" in shares for shares in perfect.values())
    silent = known.clone()
    silent[..., NUMBERED["name"][NOTHING]] = 2
    assert {shares.get("print", 0.0) for shares in told(silent).values()} == {0.0}
    assert {shares["name"] for shares in told(silent).values()} == {0.0}
    flawed = known.clone()
    flawed[:, ::2] = 0  # ties: the first phrase of a kind
    assert all(0.3 < shares["name"] < 0.7 for shares in told(flawed).values())


def test_waves_tell_near_patches_from_far_ones():
    distance = torch.cdist(waves(8, 64), waves(8, 64))
    assert distance[0].argsort()[1:3].sort().values.tolist() == [1, 8]  # right of and below the first
    assert (distance + torch.eye(64)).min() > 0.1


def test_clip_training_learns_and_repeats(data, tmp_path):
    folder = train_clip(data, tmp_path / "clip", steps=24, batch_size=4)
    record = json.loads((folder / "training_log.json").read_text())
    first, last = record["log"]
    assert last["step"] == record["settings"]["steps"] == 24 and last["loss"] < first["loss"]
    model = CLIPVisionModelWithProjection.from_pretrained(folder)
    assert LlavaSTFImageProcessor.from_pretrained(folder).crop_size["height"] == model.config.image_size
    assert record["told"].keys() == {scene.group for scene in read_scenes(data, "test").values()}
    assert all(shares.keys() >= {"name", "size", "place"} for shares in record["told"].values())

    short = [train_clip(data, tmp_path / name, steps=2, batch_size=2) for name in ("a", "b")]
    assert (short[0] / "model.safetensors").read_bytes() == (short[1] / "model.safetensors").read_bytes()


def test_the_tower_never_sees_the_held_out_artist(data, tmp_path, monkeypatch):
    seen = []
    real = Crowds.__post_init__

    def spy(self):
        seen.extend(one.family for one in self.pictograms)
        real(self)

    monkeypatch.setattr(Crowds, "__post_init__", spy)
    train_clip(data, tmp_path / "clip", steps=1, batch_size=4)
    assert {*seen} == {*FAMILIES} - {HELD_OUT_FAMILY}


def test_language_model_training_learns(data, tokenizer_folder, tmp_path):
    folder = train_language_model(data, tokenizer_folder, tmp_path / "llama", steps=40, batch_size=2)
    first, last = json.loads((folder / "training_log.json").read_text())["log"]
    assert last["loss"] < first["loss"] - 0.5
    model, words = LlamaForCausalLM.from_pretrained(folder), LlamaTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(words) and model.config.eos_token_id == words.eos_token_id


def test_score_counts_right_answers(data):
    rows, truth = read_rows(data / "test.json"), read_rows(data / "truth.jsonl")
    given = {row["id"]: row["conversations"][1]["value"] for row in rows}
    perfect = score(given, rows, truth)
    assert perfect["mistakes"] == []
    counts = [part for kind in perfect["kinds"].values() for part in kind.values()]
    assert sum(part["questions"] for part in counts) == len(rows) == sum(part["right"] for part in counts)
    assert {part["accuracy"] for part in counts if part["questions"]} == {1.0}

    wrong = next(row["id"] for row in truth if row["kind"] == "name" and row["group"] == "seen")
    flawed = score({**given, wrong: "A stone."}, rows, truth)
    before, after = (result["kinds"]["name"]["seen"] for result in (perfect, flawed))
    assert after["right"] == before["right"] - 1 and after["questions"] == before["questions"]
    assert [mistake["id"] for mistake in flawed["mistakes"]] == [wrong]
    for group in ("unseen pair", "unseen artist"):
        assert flawed["kinds"]["name"][group] == perfect["kinds"]["name"][group]


def test_a_caption_may_name_the_objects_in_another_order():
    rows = [{"id": "x", "conversations": [{}, {"value": "Two objects: a red ring and a blue cross."}]}]
    truth = [{"id": "x", "kind": "caption", "group": "seen"}]
    right = {"Two objects: a blue cross and a red ring.": 1, "Two objects: a blue ring and a red cross.": 0}
    for answer, expected in right.items():
        assert score({"x": answer}, rows, truth)["kinds"]["caption"]["seen"]["right"] == expected


def test_score_refuses_files_of_different_data(data):
    rows, truth = read_rows(data / "test.json"), read_rows(data / "truth.jsonl")
    given = {row["id"]: "" for row in rows}
    with pytest.raises(ValueError, match="one run of `generate`"):
        score(given, rows, truth[1:])


ASKING = {
    "evaluate": lambda model, data, out: evaluate(model, data, out),
    "shrink": lambda model, data, out: shrink(model, data, out),
    "task": lambda model, data, out: write_task(data, out),
    "tokens": lambda model, data, out: compare(out, data, [str(model)]),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize(
    ("rows", "message"),
    [("[{", "test.json is no JSON"), ("[]", "test.json has no question"), ('[{"id": "a"}]', "must come from one run")],
)
def test_a_damaged_test_is_named_before_the_questions(ask, rows, message, data, checkpoint, tmp_path):
    (tmp_path / "test.json").write_text(rows)
    shutil.copyfile(data / "truth.jsonl", tmp_path / "truth.jsonl")
    with pytest.raises(ValueError, match=message):
        ask(checkpoint, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_a_model_that_is_not_there_is_named(data, tmp_path):
    for step in (
        lambda model: evaluate(model, data),
        lambda model: shrink(model, data, tmp_path / "result.json"),
        lambda model: warm_up(data, model, tmp_path / "warm", steps=1),
    ):
        with pytest.raises(ValueError, match="There is no folder '/nowhere/model'"):
            step("/nowhere/model")


def test_evaluates_a_checkpoint(data, checkpoint, tmp_path, capsys):
    """The golden model knows nothing: what counts is that each question is asked and counted."""
    output = tmp_path / "result.json"
    result = evaluate(checkpoint, data, output)
    assert json.loads(output.read_text()) == result
    asked = Counter(row["kind"] for row in read_rows(data / "truth.jsonl"))
    for kind, parts in result["kinds"].items():
        assert sum(parts[group]["questions"] for group in GROUPS) == asked[kind]
        assert kind in capsys.readouterr().out or kind != "caption"
    on_a_card = read_evaluation(output, {str(checkpoint)})
    assert sum(int(score.samples) for score in on_a_card.scores) == asked.total()
    with pytest.raises(ValueError, match="exists"):
        evaluate(checkpoint, data, output)


@pytest.mark.parametrize("ask", [evaluate, shrink])
def test_a_result_that_could_not_be_written_is_refused_before_the_questions(ask, data, tmp_path):
    with pytest.raises(ValueError, match="There is no folder for .*missing/result.json. Make it, or choose another"):
        ask("not loaded", data, output=tmp_path / "missing" / "result.json")


def test_command_line(tmp_path, capsys, monkeypatch):
    out = tmp_path / "data"
    monkeypatch.setattr("sys.argv", ["shapes", "generate", str(out), "--scenes", "2", "--test-scenes", "1"])
    assert main() == 0 and len(read_rows(out / "train.json")) == 2
    assert main() == 2 and "not empty" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["shapes", "tokenizer", str(tmp_path), str(tmp_path / "tokenizer")])
    assert main() == 2 and "make the data first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "least"),
    [
        ("generate DATA", "--scenes", 1),
        ("generate DATA --scenes 1", "--test-scenes", 1),
        ("generate DATA --scenes 1", "--turns", 1),
        ("generate DATA --scenes 1", "--seed", 0),
        ("clip DATA OUT", "--steps", 1),
        ("evaluate MODEL DATA", "--batch-size", 1),
        ("shrink MODEL DATA --output FILE", "--questions", 1),
        ("make WORK OUT", "--clip-steps", 1),
        ("ablation WORK OUT", "--seeds", 1),
        ("tokens OUT DATA MODEL", "--questions", 1),
        ("tokens OUT DATA MODEL", "--batch-size", 1),
        ("tokens OUT DATA MODEL", "--timed", 0),
    ],
)
def test_a_number_that_is_too_small_is_refused(command, option, least, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["shapes", *command.split(), option, str(least - 1)])
    with pytest.raises(SystemExit, match="2"):
        main()
    expected = f"error: argument {option}: found {least - 1}, expected {least} or more\n"
    assert capsys.readouterr().err.endswith(expected) and not [*tmp_path.iterdir()]


def test_the_new_kind_asks_for_an_object_that_is_alone_on_the_left():
    asked = {scene: furthest_left(scene) for scene in scenes("train", 200)}
    assert len([question for question in asked.values() if question]) > 50
    for scene, question in asked.items():
        first = min(scene.things, key=lambda thing: thing.x)
        alone = len(scene.things) > 1 and [thing.column for thing in scene.things].count(first.column) == 1
        assert (question is not None) == alone
        assert question is None or question.answer == f"The {first.name} is furthest to the left."


def test_evaluates_the_new_kind(data, checkpoint):
    assert {row["kind"] for row in read_rows(data / "new-truth.jsonl")} == {"furthest left"}
    texts = {row["conversations"][0]["value"] for row in read_rows(data / "train.json")}
    assert not any("furthest" in text for text in texts)
    assert evaluate(checkpoint, data, new=True)["kinds"].keys() == {"furthest left"}


def test_steps_that_are_complete_are_not_done_again_and_failed_ones_are_named(tmp_path, monkeypatch):
    timer = Timer(tmp_path / "seconds.json")
    monkeypatch.setattr("examples.shapes.processes.ROOT", tmp_path)
    (tmp_path / "touch.py").write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir()")
    steps = {tmp_path / name: ("touch", tmp_path / name) for name in ("a", "b")}
    timer.run(steps)
    first = (tmp_path / "seconds.json").read_text()
    assert json.loads(first).keys() == {"a + b"}
    timer.run(steps)  # would fail: the folders are there
    assert (tmp_path / "seconds.json").read_text() == first
    (tmp_path / "stage1").mkdir()  # of a training that was interrupted
    with pytest.raises(ValueError, match="stage1 failed"):
        timer.run({tmp_path / "a": ("touch", tmp_path / "a"), tmp_path / "stage1": ("touch", tmp_path / "stage1")})


def test_a_folder_of_other_settings_is_not_continued(tmp_path, monkeypatch):
    """Otherwise a model would have the data of one command, and its name and log the settings of another."""
    steps = []
    monkeypatch.setattr(Timer, "run", lambda self, commands: steps.append(commands) or sys.exit("stopped"))
    for _ in range(2):  # a stopped run goes on
        with pytest.raises(SystemExit):
            make(tmp_path / "work", tmp_path / "out", scenes=40)
    with pytest.raises(ValueError, match="work was begun with scenes 40, and not 41: give the same settings"):
        make(tmp_path / "work", tmp_path / "out", scenes=41)
    assert len(steps) == 2


@pytest.mark.parametrize("out", [".", "work"])
def test_a_model_is_not_written_around_its_own_steps(out, tmp_path):
    """Its folder would not be empty at the end, after all trainings."""
    with pytest.raises(ValueError, match="work is in the folder of the model"):
        make(tmp_path / "work", tmp_path / out)


def test_a_training_shows_progress_under_its_own_name(monkeypatch):
    shown = []
    monkeypatch.setattr("examples.shapes.training.tqdm", lambda steps, desc, **_: shown.append(desc) or tqdm(steps))
    layer = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})
    learner = torch.nn.ModuleDict({"net": layer, "head": torch.nn.Linear(2, 1)})
    batch = torch.ones(1, 2)
    step = lambda: learner["head"](layer["layers"][0](batch)).square().mean()  # noqa: E731
    train(learner, step, steps=1, muon_rates={".layers.": 1e-3}, adam_rate=1e-3, name="language model")
    assert shown == ["language model"]


# The task of lmms-eval


def test_the_task_has_the_questions_of_the_test(data, tmp_path):
    """`datasets` decodes the pictures; lmms-eval itself runs the task in tests/eval."""
    parquet = pytest.importorskip("pyarrow.parquet")
    out = write_task(data, tmp_path / "task")
    assert {file.name for file in out.iterdir()} == {"shapes.yaml", "utils.py", "test.parquet"}
    table = parquet.read_table(out / "test.parquet")
    rows, truth = read_rows(data / "test.json"), read_rows(data / "truth.jsonl")
    for found, row, kind in zip(table.to_pylist(), rows, truth, strict=True):
        asked, answered = (turn["value"] for turn in row["conversations"])
        assert (found["id"], found["kind"], f"<image>\n{found['question']}") == (row["id"], kind["kind"], asked)
        assert found["answer"] == answered and found["image"]["bytes"] == (data / row["image"]).read_bytes()
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features.keys() == {*table.column_names} and features["image"] == {"_type": "Image"}
    few = parquet.read_table(write_task(data, tmp_path / "few", 5) / "test.parquet")
    assert few.to_pylist() == table.to_pylist()[:5]


@pytest.mark.parametrize("questions", [0, -1, 10**6])
def test_a_task_of_other_questions_is_refused(questions, data, tmp_path):
    with pytest.raises(ValueError, match=f"--questions is {questions}, expected 1 to "):
        write_task(data, tmp_path / "task", questions)
    assert not (tmp_path / "task").exists()


def test_a_task_is_not_written_over_another(data, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises((ValueError, ConversionError)):
        write_task(data, tmp_path)
    with pytest.raises(ValueError, match="make the data first"):
        write_task(tmp_path, tmp_path / "task")


# What stops on the way


def test_seconds_are_those_of_all_attempts(tmp_path, monkeypatch):
    timer = Timer(tmp_path / "seconds.json")
    monkeypatch.setattr("examples.shapes.processes.ROOT", tmp_path)
    (tmp_path / "step.py").write_text("import sys; sys.exit(1)")
    clock = iter([0.0, 5.0, 10.0, 12.0])
    monkeypatch.setattr("examples.shapes.recipe.time.perf_counter", lambda: next(clock))
    for seconds in (5, 7):
        with pytest.raises(ValueError, match="a failed"):
            timer.run({tmp_path / "a": ("step",)})
        assert json.loads((tmp_path / "seconds.json").read_text()) == {"a": seconds}


def test_a_stopped_run_leaves_no_step_behind(tmp_path, monkeypatch):
    """Otherwise the same command would run a step beside itself."""
    monkeypatch.setattr("examples.shapes.processes.ROOT", tmp_path)
    monkeypatch.setattr("examples.shapes.recipe.GRACE", 0.01)
    (tmp_path / "step.py").write_text("import time; time.sleep(60)")
    started = []

    def start(*command):
        if started:
            raise KeyboardInterrupt
        started.append(start_module(*command))
        return started[0]

    monkeypatch.setattr("examples.shapes.recipe.start_module", start)
    with pytest.raises(KeyboardInterrupt):
        Timer(tmp_path / "seconds.json").run({tmp_path / name: ("step",) for name in ("a", "b")})
    assert started[0].poll() == -signal.SIGTERM


def test_ctrl_c_is_one_line(monkeypatch, capsys, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.shapes.__main__.write_task", stop)
    monkeypatch.setattr("sys.argv", ["examples.shapes", "task", "DATA", "OUT"])
    assert main() == 130 and capsys.readouterr().err == "error: stopped\n"


@pytest.mark.parametrize("step", ["evaluate", "render_card"])
def test_a_model_appears_with_its_results_and_card_or_not_at_all(step, tmp_path, monkeypatch):
    """A folder without them would stop the command that is to go on."""
    work, out = tmp_path / "work", tmp_path / "out"
    names = [f"{folder}/{name}" for folder, name in LOGS.items()]
    for name in (*names, "elastic/recipe.yaml", "data/images/test-000000.png", "seconds.json"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("x")
    monkeypatch.setattr("examples.shapes.recipe.Timer.run", lambda *_: None)
    monkeypatch.setattr("examples.shapes.recipe.pack", lambda *_: None)
    monkeypatch.setattr("examples.shapes.recipe.evaluate", lambda *_, **__: None)
    monkeypatch.setattr("examples.shapes.recipe.render_card", lambda *_: None)
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(f"examples.shapes.recipe.{step}", Mock(side_effect=KeyboardInterrupt))
        make(work, out)
    assert not out.exists()
    assert (make(work, out) / "log_stage1.json").is_file()


@pytest.mark.parametrize("schemes", [["int8"], ["W4A16", "W4A16"]])
def test_two_models_of_one_scheme_have_no_row(schemes, data, tmp_path):
    folders = [tmp_path / str(number) for number, _ in enumerate(schemes)]
    for folder, scheme in zip(folders, schemes, strict=True):
        folder.mkdir()
        (folder / "quantisation.json").write_text(json.dumps({"scheme": scheme}))
    with pytest.raises(ValueError, match=f"{folders[-1]} is a second model in {schemes[0]}"):
        shrink("nowhere", data, tmp_path / "result.json", also=folders)


def test_a_question_that_is_there_twice_is_refused(data, tmp_path):
    for name in ("test.json", "truth.jsonl"):
        rows = read_rows(data / name)
        text = json.dumps([*rows, rows[0]]) if name == "test.json" else "\n".join(map(json.dumps, [*rows, rows[0]]))
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="or their ids differ or repeat"):
        read_test(tmp_path)
