"""The shapes example: scenes, questions, data sets, tokenizer and evaluation."""

import json
import math
from collections import Counter, defaultdict
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm
from transformers import CLIPModel, LlamaForCausalLM, LlamaTokenizer

from conversion import ConversionError
from examples.shapes.__main__ import main
from examples.shapes.clip import build_clip, contrast, encode, measure, similarity, train_clip, waves
from examples.shapes.evaluate import evaluate, score
from examples.shapes.generate import generate, read_scenes
from examples.shapes.language_model import train_language_model
from examples.shapes.phrases import Phrase, all_phrases
from examples.shapes.questions import KINDS, caption, conversation, describe, furthest_left, one_of_each
from examples.shapes.recipe import Timer
from examples.shapes.scenes import COLOURS, HELD_OUT_PAIRS, SIDE, Print, Scene, Thing, draw_picture, draw_scene
from examples.shapes.task import write_task
from examples.shapes.text import CHAT_TEMPLATE, messages_of, read_rows, read_tokenizer, train_tokenizer
from examples.shapes.training import train
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


def scenes(split, number):
    return [draw_scene(split, Random(f"{split}/{index}")) for index in range(number)]


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


def test_pictures_show_what_the_scene_says():
    """The colour at an object's heart, or on its ring, and the colour it leaves free at its corner."""
    for index, scene in enumerate(scenes("train", 60)):
        pixels = np.asarray(draw_picture(scene, Random(index))).astype(int)
        for thing in scene.things:
            inside = thing.radius * 0.75 if thing.shape == "ring" else 0
            assert nearest_colour(pixels[round(thing.y - 0.5), round(thing.x - 0.5 + inside)]) == thing.colour
            if thing.shape != "square":  # all others leave the corner of their box free
                corner = pixels[int(thing.box[1]), int(thing.box[0])]
                assert np.ptp(corner) < 60, (thing, corner)
        if scene.print:
            left, top, right, bottom = (int(side) for side in scene.print.box)
            grey = pixels[top:bottom, left:right].mean(-1)
            assert np.ptp(grey) > 100


def nearest_colour(pixel):
    return min(COLOURS, key=lambda name: math.dist(COLOURS[name], pixel))


def test_objects_lie_inside_the_picture_and_apart():
    for scene in scenes("train", 200):
        boxes = [thing.box for thing in scene.things] + ([scene.print.box] if scene.print else [])
        assert 1 <= len(scene.things) <= 5
        for index, a in enumerate(boxes):
            assert 0 <= min(a) and max(a) <= SIDE
            for b in boxes[:index]:
                assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


def test_splits_share_no_content_and_held_out_pairs_are_in_the_test_only():
    train, test = scenes("train", 1500), scenes("test", 300)
    assert not {scene.content for scene in train} & {scene.content for scene in test}
    assert not {thing.pair for scene in train for thing in scene.things} & set(HELD_OUT_PAIRS)
    assert {thing.pair for scene in test for thing in scene.things} >= set(HELD_OUT_PAIRS)
    assert {len(scene.things) for scene in test} == {1, 2, 3, 4, 5}


def test_training_asks_nothing_about_held_out_pairs():
    rng = Random(0)
    asked = [q for scene in scenes("train", 500) for q in [*conversation(scene, 8, rng), *one_of_each(scene, rng)]]
    assert not any(question.unseen for question in asked)
    for colour, shape in HELD_OUT_PAIRS:
        assert not any(f"{colour} {shape}" in question.text + question.answer for question in asked)
    assert any(question.unseen for scene in scenes("test", 50) for question in one_of_each(scene, rng))


SCENE = Scene(
    (
        Thing("red", "ring", "large", 14, 14, 13),
        Thing("blue", "cross", "small", 48, 80, 8),
        Thing("orange", "circle", "small", 80, 48, 8),
    ),
    Print("42", (40, 40, 64, 62)),
)


def answers(scene, kind):
    """Every question of a kind, with its answers."""
    found = defaultdict(set)
    for seed in range(400):
        question = KINDS[kind](scene, Random(seed))
        if question:
            found[question.text].add(question.answer)
    return {text: one.pop() for text, one in found.items() if len(one) == 1 or pytest.fail(f"{text}: {one}")}


def test_caption_names_everything_from_left_to_right():
    assert describe(SCENE) == (
        "Three objects and the number 42: a large red ring at the top left, a small blue cross at the bottom and a "
        "small orange circle on the right."
    )
    one = replace(SCENE, things=SCENE.things[2:], print=Print("cat", SCENE.print.box))
    assert describe(one) == "One object and the word cat: a small orange circle on the right."
    assert caption(SCENE, Random(0)).answer == describe(SCENE)


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("count", "How many objects are there?", "There are three objects."),
        ("count", "How many crosses are there?", "There is one cross."),
        ("count", "How many blue objects are there?", "There is one blue object."),
        ("count", "How many squares are there?", "There are no squares."),
        ("colour", "What color is the ring?", "The ring is red."),
        ("colour", "What colour is the circle?", "The circle is orange."),
        ("shape", "What shape is the orange object?", "The orange object is a circle."),
        ("where", "Where is the red ring?", "The red ring is at the top left."),
        ("where", "Where is the orange circle?", "The orange circle is on the right."),
        (
            "left/right",
            "Is the blue cross left or right of the red ring?",
            "The blue cross is right of the red ring.",
        ),
        (
            "above/below",
            "Is the orange circle above or below the blue cross?",
            "The orange circle is above the blue cross.",
        ),
        ("is there", "Is there an orange circle?", "Yes, there is an orange circle."),
        ("is there", "Is there a red circle?", "No, there is no red circle."),
        ("larger", "Which is larger, the blue cross or the red ring?", "The red ring is larger."),
        ("read", "Read the word or number.", "The number is 42."),
    ],
)
def test_answers_are_true(kind, text, answer):
    assert answers(SCENE, kind)[text] == answer


def test_what_has_no_clear_answer_is_not_asked():
    twins = Scene((SCENE.things[0], replace(SCENE.things[0], x=80, y=80)), None)
    for kind in ("colour", "shape", "where", "left/right", "above/below", "larger"):
        assert not answers(twins, kind), kind
    assert set(answers(twins, "read").values()) == {"There is no text."}
    assert answers(twins, "count")["How many rings are there?"] == "There are two rings."


def test_a_blind_guess_wins_no_kind():
    """The most frequent answer to each question, known from training, is right less than 55 % of the time."""
    rng = Random(1)
    known = defaultdict(Counter)
    for scene in scenes("train", 3000):
        for question in conversation(scene, 8, rng):
            known[question.text][question.answer] += 1
    right, asked = Counter(), Counter()
    for scene in scenes("test", 600):
        for question in one_of_each(scene, rng):
            if question.unseen:
                continue
            asked[question.kind] += 1
            right[question.kind] += known[question.text].most_common(1)[:1] != [] and (
                known[question.text].most_common(1)[0][0] == question.answer
            )
    assert asked.keys() == KINDS.keys() and min(asked.values()) > 100
    for kind in KINDS:
        assert right[kind] / asked[kind] < 0.55, kind


def test_is_there_is_yes_half_of_the_time_for_unseen_pairs_too():
    yes = defaultdict(list)
    for index, scene in enumerate(scenes("test", 800)):
        question = KINDS["is there"](scene, Random(index))
        yes[question.unseen].append(question.answer.startswith("Yes"))
    for marks in yes.values():
        assert len(marks) > 100 and 0.4 < sum(marks) / len(marks) < 0.6


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
    assert max(len(row["conversations"]) for row in read_rows(data / "train.json")) == 16


def test_tokenizer_suits_the_processor(data, tokenizer, tmp_path):
    processor = LlavaSTFProcessor(
        image_processor=LlavaSTFImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=8,
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
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.image_token_id) == 36
    spoken = processor.decode([token for token, mark in zip(ids, marks, strict=True) if mark])
    given = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
    assert [text.strip() for text in spoken.split("</s>")[:-1]] == given
    assert tokenizer.unk_token_id not in ids


def test_tokenizer_has_a_token_per_word_and_digit_and_bytes_for_the_rest(data, tokenizer):
    assert tokenizer.tokenize("The red circle is 46.") == ["▁The", "▁red", "▁circle", "▁is", "▁4", "6", "."]
    text = "Привет, zebra 漢\nx"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_scenes_are_read_as_they_were_drawn(data):
    drawn = draw_scene("train", Random("3/train/7"))
    assert read_scenes(data, "train")["train-000007"] == drawn
    assert len(read_scenes(data, "test")) == TEST_SCENES


@pytest.mark.parametrize(
    ("phrase", "text", "holds"),
    [
        (Phrase(colour="red"), "a red object", True),
        (Phrase(colour="green"), "a green object", False),
        (Phrase(size="small", shape="circle"), "a small circle", True),
        (Phrase(size="large", shape="circle"), "a large circle", False),
        (Phrase(shape="circle", place="on the right"), "a circle on the right", True),
        (Phrase(colour="orange", place="at the bottom"), "an orange object at the bottom", False),
        (Phrase(colour="red", shape="cross"), "a red cross", False),
        (Phrase(number=3), "three objects", True),
        (Phrase(number=1, colour="blue"), "one blue object", True),
        (Phrase(number=2, shape="ring"), "two rings", False),
        (Phrase(printed="42"), "the number 42", True),
        (Phrase(printed="cat"), "the word cat", False),
    ],
)
def test_phrases(phrase, text, holds):
    assert phrase.text == text and phrase.holds(SCENE) is holds


def test_phrases_differ_and_none_is_held_out():
    phrases = all_phrases()
    assert len({phrase.text for phrase in phrases}) == len(phrases)
    assert not any(phrase.held_out for phrase in phrases)
    assert {"size", "colour + shape", "number", "colour + number", "printed"} <= {phrase.kind for phrase in phrases}
    for scene in scenes("train", 50):
        truths = [phrase.holds(scene) for phrase in phrases]
        assert any(truths) and not all(truths)


def test_clip_compares_pictures_with_texts(tokenizer):
    model, phrases = build_clip(tokenizer), all_phrases()
    # Padding changes nothing: a text means the same alone.
    pixels = torch.randn(3, 3, SIDE, SIDE)
    together = similarity(model, pixels, encode(tokenizer, phrases))
    assert together.shape == (3, len(phrases)) and together.abs().max() <= 1
    torch.testing.assert_close(together[:, :1], similarity(model, pixels, encode(tokenizer, phrases[:1])))


def test_contrast_is_clip_s_loss_where_each_picture_has_one_caption():
    logits = torch.randn(4, 4)
    labels = torch.arange(4)
    expected = sum(torch.nn.functional.cross_entropy(rows, labels) for rows in (logits, logits.T))
    torch.testing.assert_close(contrast(logits, torch.eye(4, dtype=torch.bool)), expected)


def test_contrast_with_several_true_captions_is_lower_the_better_they_are_told_apart():
    truth = torch.tensor([[True, True, False], [False, True, True]])
    right, wrong = torch.where(truth, 5.0, -5.0), torch.where(truth, -5.0, 5.0)
    assert contrast(right, truth) < 0.01 < 5 < contrast(wrong, truth)
    raised = right.clone()
    raised[0, 0] += 3
    assert contrast(raised, truth) < contrast(right, truth)


def test_measure_counts_pictures_whose_true_captions_all_suit_better(monkeypatch):
    phrases = [Phrase(colour="red"), Phrase(colour="blue"), Phrase(number=1), Phrase(number=2)]
    truth = torch.tensor([[True, False, True, False], [True, True, False, True], [False, True, True, False]])
    cosines = torch.tensor([[0.9, 0.1, 0.3, 0.5], [0.5, 0.6, 0.1, 0.2], [0.8, 0.2, 0.9, 0.8]])
    monkeypatch.setattr("examples.shapes.clip.similarity", lambda model, pixels, texts: cosines)
    # Both colours of the second picture are there: none is false, and none can be worse.
    assert measure(None, torch.zeros(3, 1), truth, {}, phrases) == {"colour": 0.6667, "number": 0.6667}


def test_waves_tell_near_patches_from_far_ones():
    distance = torch.cdist(waves(8, 64), waves(8, 64))
    assert distance[0].argsort()[1:3].sort().values.tolist() == [1, 8]  # right of and below the first
    assert (distance + torch.eye(64)).min() > 0.1


def test_clip_training_learns_and_repeats(data, tokenizer_folder, tmp_path):
    folder = train_clip(data, tokenizer_folder, tmp_path / "clip", steps=40, batch_size=4)
    record = json.loads((folder / "training_log.json").read_text())
    first, last = record["log"]
    assert last["step"] == record["settings"]["steps"] == 40 and last["loss"] < first["loss"]
    model = CLIPModel.from_pretrained(folder)
    assert LlavaSTFImageProcessor.from_pretrained(folder).crop_size["height"] == model.config.vision_config.image_size
    assert record["told_apart"].keys() >= {"colour", "shape", "place"}

    short = [train_clip(data, tokenizer_folder, tmp_path / name, steps=2, batch_size=2) for name in ("a", "b")]
    assert (short[0] / "model.safetensors").read_bytes() == (short[1] / "model.safetensors").read_bytes()


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

    wrong = next(row["id"] for row in truth if row["kind"] == "colour" and not row["unseen"])
    flawed = score({**given, wrong: "The circle is grey."}, rows, truth)
    before, after = (result["kinds"]["colour"]["seen"] for result in (perfect, flawed))
    assert after["right"] == before["right"] - 1 and after["questions"] == before["questions"]
    assert [mistake["id"] for mistake in flawed["mistakes"]] == [wrong]
    assert flawed["kinds"]["colour"]["unseen"] == perfect["kinds"]["colour"]["unseen"]


def test_a_caption_may_name_the_objects_in_another_order():
    rows = [{"id": "x", "conversations": [{}, {"value": "Two objects: a red ring and a blue cross."}]}]
    truth = [{"id": "x", "kind": "caption", "unseen": False}]
    right = {"Two objects: a blue cross and a red ring.": 1, "Two objects: a blue ring and a red cross.": 0}
    for answer, expected in right.items():
        assert score({"x": answer}, rows, truth)["kinds"]["caption"]["seen"]["right"] == expected


def test_score_refuses_files_of_different_data(data):
    rows, truth = read_rows(data / "test.json"), read_rows(data / "truth.jsonl")
    given = {row["id"]: "" for row in rows}
    with pytest.raises(ValueError, match="one run of `generate`"):
        score(given, rows, truth[1:])


def test_evaluates_a_checkpoint(data, checkpoint, tmp_path, capsys):
    """The golden model knows nothing: what counts is that each question is asked and counted."""
    output = tmp_path / "result.json"
    result = evaluate(checkpoint, data, output)
    assert json.loads(output.read_text()) == result
    asked = Counter(row["kind"] for row in read_rows(data / "truth.jsonl"))
    for kind, parts in result["kinds"].items():
        assert parts["seen"]["questions"] + parts["unseen"]["questions"] == asked[kind]
        assert kind in capsys.readouterr().out or kind != "caption"
    on_a_card = read_evaluation(output, {str(checkpoint)})
    assert sum(int(score.samples) for score in on_a_card.scores) == asked.total()
    with pytest.raises(ValueError, match="exists"):
        evaluate(checkpoint, data, output)


def test_command_line(tmp_path, capsys, monkeypatch):
    out = tmp_path / "data"
    monkeypatch.setattr("sys.argv", ["shapes", "generate", str(out), "--scenes", "2", "--test-scenes", "1"])
    assert main() == 0 and len(read_rows(out / "train.json")) == 2
    assert main() == 2 and "not empty" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["shapes", "tokenizer", str(tmp_path), str(tmp_path / "tokenizer")])
    assert main() == 2 and "make the data first" in capsys.readouterr().err


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


def test_a_training_shows_progress_under_its_own_name(monkeypatch):
    shown = []
    monkeypatch.setattr("examples.shapes.training.tqdm", lambda steps, desc, **_: shown.append(desc) or tqdm(steps))
    layer = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})
    learner = torch.nn.ModuleDict({"net": layer, "head": torch.nn.Linear(2, 1)})
    batch = torch.ones(1, 2)
    step = lambda: learner["head"](layer["layers"][0](batch)).square().mean()  # noqa: E731
    train(learner, step, steps=1, muon_rate=1e-3, adam_rate=1e-3, name="language model")
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
