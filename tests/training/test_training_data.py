"""Rows from every source, what is wrong with them, and the original's labels in batches."""

import json
import re

import datasets
import numpy as np
import pytest
import torch
from commands import here
from conftest import GOLDENS
from PIL import Image
from training_runs import CAPTIONS, CONVERSATIONS, IMAGES, run

from conversion.tokenizer import load_tokenizer
from modeling_llava_stf import LlavaSTFProcessor
from training.batches import Collator
from training.checks import Checker, Report, check_rows, fit_rows, fit_stream, open_image
from training.rows import DataError, load_rows, place_media
from training.trainer import template_text

# The original loses every target of this row, because its tokens are counted one short; ours keeps both answers.
FAULTY = "answer_contains_separator"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=["legacy_true", "legacy_false"])
def either_processor(request, processor):
    folder = {"legacy_true": "original", "legacy_false": "tokenizer_legacy_false"}[request.param]
    return request.param, LlavaSTFProcessor(
        image_processor=processor.image_processor,
        tokenizer=load_tokenizer(GOLDENS / folder, 4096),
        patch_size=processor.patch_size,
        fusion_window=processor.fusion_window,
        vision_feature_select_strategy="default",
        chat_template=processor.chat_template,
    )


@pytest.mark.parametrize("template", ["default", "plain"])
def test_labels_are_the_original_s(template, either_processor, goldens):
    mode, processor = either_processor
    expected = goldens["sft"][mode] if template == "default" else goldens["sft"]["plain"][mode]
    rows = load_rows(str(CONVERSATIONS if template == "default" else CAPTIONS), str(IMAGES))
    collator = Collator(processor, assistant_only_loss=True, chat_template=template_text(processor, template))
    batch = collator(list(rows))
    assert len(expected) == len(rows) == len(batch["labels"])
    for golden, name, ids, labels, mask in zip(
        expected, rows["id"], batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
    ):
        repeats = [
            goldens["tokens_per_image"] if token == goldens["image_token_id"] else 1 for token in golden["input_ids"]
        ]
        ids_expected = np.repeat(golden["input_ids"], repeats)
        ids_expected[ids_expected == goldens["image_token_id"]] = processor.image_token_id
        assert ids[mask].tolist() == ids_expected.tolist(), name
        assert (labels[~mask] == -100).all()
        if name == FAULTY:
            assert (labels == processor.tokenizer.eos_token_id).sum() == 2
        else:
            assert labels[mask].tolist() == np.repeat(golden["labels"], repeats).tolist(), name


def test_pixels_are_the_original_s(processor, goldens, golden_tensors):
    rows = [row for row in load_rows(str(CONVERSATIONS), str(IMAGES)) if row["images"]]
    batch = Collator(processor, assistant_only_loss=True)(rows)
    files = goldens["images"]["files"]
    for pixels, row in zip(batch["pixel_values"], rows, strict=True):
        expected = golden_tensors["pixel_values.pad"][files.index(row["images"][0]["path"].rsplit("/")[-1])]
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


# Sources


def conversation(text="<image>\nWhat is it?", answer="A shape."):
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def write_json(tmp_path, rows, name="data.json"):
    path = tmp_path / name
    lines = name.endswith(".jsonl")
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return str(path)


def contents(row):
    return [[(part["type"], part["text"]) for part in message["content"]] for message in row["messages"]]


QUESTION = [[("image", None), ("text", "What is it?")], [("text", "A shape.")]]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_json(name, tmp_path):
    rows = [
        {"id": 7, "image": "wide.png", "conversations": conversation()},
        {"conversations": conversation("Hello?")},
        {"image": ["wide.png", "alpha.png"], "conversations": conversation("<image> or <image>?")},
    ]
    one, text, two = load_rows(write_json(tmp_path, rows, name), str(IMAGES))
    assert [one["id"], text["id"], two["id"]] == ["7", "1", "2"]
    assert contents(one) == QUESTION
    assert one["images"] == [{"bytes": None, "path": str(IMAGES / "wide.png")}]
    assert (text["images"], contents(text)[0]) == ([], [("text", "Hello?")])
    assert contents(two)[0] == [("image", None), ("image", None), ("text", "or ?")]
    assert len(two["images"]) == 2


def messages_dataset(pictures):
    structured = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A shape."}]},
    ]
    return datasets.Dataset.from_dict(
        {"messages": [structured] * len(pictures), "images": [[picture] for picture in pictures]}
    ).cast_column("images", datasets.List(datasets.Image()))


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "streaming"])
def test_datasets_of_messages_and_images(kind, tmp_path, picture, processor):
    source = messages_dataset([picture("wide.png"), picture("shapes.png")])
    folder = tmp_path / "source"
    folder.mkdir()
    if kind == "saved":
        source.save_to_disk(folder)
    else:
        source.to_parquet(folder / "train.parquet")
    path = folder / "train.parquet" if kind == "parquet" else folder
    rows = list(load_rows(str(path), streaming=kind == "streaming"))
    assert [contents(row) for row in rows] == [QUESTION] * 2
    assert open_image(rows[1]["images"][0]).tobytes() == picture("shapes.png").tobytes()
    batch = Collator(processor, assistant_only_loss=True)(rows)
    assert batch["pixel_values"].shape[0] == 2


def test_a_changed_file_is_read_again(tmp_path):
    path = write_json(tmp_path, [{"conversations": conversation("Hello?")}])
    assert len(load_rows(path)) == 1
    write_json(tmp_path, [{"conversations": conversation("Hello?")}] * 3)
    assert len(load_rows(path)) == 3


def test_images_beside_the_data_by_default(tmp_path, picture):
    picture("wide.png").save(tmp_path / "here.png")
    (row,) = load_rows(write_json(tmp_path, [{"image": "here.png", "conversations": conversation()}]))
    assert open_image(row["images"][0]).size == picture("wide.png").size


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("none.json", None, "There is no file"),
        ("bad.json", "[{", "is not valid JSON"),
        ("list.jsonl", "[1, 2]", "expected an object"),
        ("none.json", "[]", "an empty one"),
        ("none.jsonl", "", "none.jsonl"),
    ],
)
def test_unreadable_sources(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / name))


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"conversations": conversation("Hello?")}]), encoding="utf-8-sig")
    assert len(load_rows(str(path))) == 1


def test_columns_of_another_kind_are_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="has the columns .*text.*, expected `messages` and `images`"):
        load_rows(str(tmp_path / "train.parquet"))


# Placeholders


def placed(*texts, images=0, videos=0, **kwargs):
    turns = [(role, text) for role, text in zip(["user", "assistant"] * len(texts), texts, strict=False)]
    return [
        [part["type"] if part["text"] is None else part["text"] for part in message["content"]]
        for message in place_media(turns, images, videos, **kwargs)
    ]


def test_placeholders_go_to_the_front_of_their_message():
    assert placed("Look at <image> this", "yes", images=1)[0] == ["image", "Look at  this"]
    assert placed("Hello", "yes", "And <image>", "no", images=1)[2] == ["image", "And"]


def test_placeholders_for_one_image_are_one_and_for_two_two():
    assert placed("<image> with <image>", "yes", images=1)[0] == ["image", "with"]
    assert placed("<image> with <image>", "yes", images=2)[0] == ["image", "image", "with"]


def test_a_video_may_be_marked_as_an_image():
    assert placed("<image>\nWhat happens?", "x", videos=1)[0] == ["video", "What happens?"]
    assert placed("<video>\n<image>\nSame?", "x", images=1, videos=1)[0] == ["image", "video", "Same?"]


def test_images_that_no_text_mentions_belong_to_the_first_question():
    assert placed("What is it?", "x", images=1, at_front=True)[0] == ["image", "What is it?"]


@pytest.mark.parametrize(
    "texts, images", [(("Hello", "x"), 1), (("<image>", "x"), 0), (("<image>", "x", "<image>"), 1)]
)
def test_placeholders_must_fit_the_images(texts, images):
    with pytest.raises(DataError, match="placeholder mismatch"):
        placed(*texts, images=images)


# Checks


@pytest.fixture
def broken(tmp_path, picture):
    """Rows with one fault each, by the kind of the fault."""
    picture("wide.png").save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((IMAGES / "shapes.png").read_bytes()[:-200])
    rows = {
        "fine": {"image": "good.png", "conversations": conversation()},
        "text": {"conversations": conversation("Hello?")},
        "missing": {"image": "gone.png", "conversations": conversation()},
        "cut": {"image": "cut.png", "conversations": conversation()},
        "unplaced": {"image": "good.png", "conversations": conversation("What is it?")},
        "long": {"image": "good.png", "conversations": conversation(answer="very " * 200)},
        "silent": {"image": "good.png", "conversations": conversation()[:1]},
        "twice": {"conversations": [*conversation("Hello?"), {"from": "gpt", "value": "More."}]},
        "stranger": {"conversations": [{"from": "robot", "value": "Hello?"}]},
    }
    return write_json(tmp_path, [{"id": name, **row} for name, row in rows.items()])


MALFORMED = {
    "no image": {"image": [None], "conversations": conversation()},
    "number": {"image": 3, "conversations": conversation()},
    "empty": {"conversations": []},
    "text alone": {"conversations": "Hello"},
    "string turn": {"conversations": ["Hello"]},
    "string part": {"messages": [{"role": "user", "content": ["Hello"]}]},
    "untyped part": {"messages": [{"role": "user", "content": [{"text": "Hello"}]}]},
    "no frame": {"video": [[]], "conversations": conversation("<video>")},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_rows_are_named(name, tmp_path, processor):
    path = write_json(tmp_path, [{"id": name, **MALFORMED[name]}, {"conversations": conversation("Hello?")}])
    report = Report.of(checked(path, processor))
    (problem,) = (row for rows in report.problems.values() for row in rows)
    assert problem.startswith(f"{name}: bad ") and report.kept == 1


KINDS = {
    "bad image": ["missing", "cut"],
    "placeholder mismatch": ["unplaced"],
    "too long": ["long"],
    "no trainable token": ["silent"],
    "bad conversation": ["twice", "stranger"],
}


def checked(path, processor, decode=True, max_length=256, template="default"):
    rows = load_rows(path)
    return check_rows(rows, Checker(processor, template_text(processor, template), max_length, decode))


def test_every_fault_is_found_and_named(broken, processor):
    report = Report.of(checked(broken, processor))
    assert {kind: [row.split(":")[0] for row in rows] for kind, rows in report.problems.items()} == KINDS
    assert (report.rows, report.kept, report.text_only, report.images) == (9, 2, 1, 1)
    assert "gone.png: no such file" in report.problems["bad image"][0]
    assert "cut.png" in report.problems["bad image"][1]
    text = "\n".join(report.lines(256))
    for kind, rows in KINDS.items():
        assert f"{kind}: {len(rows)} row(s)" in text
    assert text.count("#") > 0 and "256 allowed" in text


def test_the_quick_check_opens_no_image(broken, processor):
    problems = {row["id"]: row["problem"] for row in checked(broken, processor, decode=False)}
    assert problems["cut"] == "" and "no such file" in problems["missing"]


def test_lengths_are_those_of_the_batch(processor):
    checker = Checker(processor, template_text(processor, "default"), 4096, decode=False)
    rows = list(check_rows(load_rows(str(CONVERSATIONS), str(IMAGES)), checker))
    assert len(rows) == 9
    for row in rows:
        batch = Collator(processor, assistant_only_loss=True)([row])
        assert row["length"] == batch["input_ids"].shape[1]
        assert row["targets"] == (batch["labels"] != -100).sum()
        assert row["vision"] == len(batch.get("pixel_values", []))


def test_rows_are_skipped_only_if_that_is_wanted(broken, processor, caplog):
    found = checked(broken, processor)
    with pytest.raises(DataError, match=r"2 of 9 rows cannot be trained on: missing.*--on_bad_image skip"):
        fit_rows(found, Report.of(found), "error", "skip")
    with pytest.raises(DataError, match="--on_bad_row skip"):
        fit_rows(found, Report.of(found), "skip", "error")
    caplog.clear()
    assert fit_rows(found, Report.of(found), "skip", "skip")["id"][:] == ["fine", "text"]
    for kind, rows in KINDS.items():
        (line,) = (line for line in caplog.messages if f"({kind})" in line)
        assert line.startswith(f"{len(rows)} of 9 rows are left out") and all(f"{row}: " in line for row in rows)


def test_nothing_left_is_an_error(broken, processor):
    found = checked(broken, processor).filter(lambda row: bool(row["problem"]))
    with pytest.raises(DataError, match="None of the 7 rows"):
        fit_rows(found, Report.of(found), "skip", "skip")


def test_a_stream_is_checked_row_by_row(broken, processor):
    checker = Checker(processor, template_text(processor, "default"), 256, decode=True)
    rows = load_rows(broken).to_iterable_dataset()
    assert [row["id"] for row in fit_stream(rows, checker, "skip", "skip")] == ["fine", "text"]
    with pytest.raises(DataError, match="Row missing cannot be trained on: bad image"):
        list(fit_stream(rows, checker, "error", "skip"))


def test_plain_needs_an_image(broken, processor):
    report = Report.of(checked(broken, processor, template="plain"))
    assert any(row.startswith("text: ") for row in report.problems["placeholder mismatch"])


def test_a_broken_image_stops_the_batch_with_its_path(broken, processor):
    rows = {row["id"]: row for row in load_rows(broken)}
    with pytest.raises(DataError, match="cut.png"):
        Collator(processor, assistant_only_loss=True)([rows["fine"], rows["cut"]])


# Videos


@pytest.mark.parametrize("kind", ["frames", "nested frames", "file", "short file"])
def test_video_rows(kind, tmp_path, processor, picture):
    frames = [f"frame_{index}.png" for index in range(3)]
    video, folder = [frames] if kind == "nested frames" else frames, str(IMAGES)
    if "file" in kind:
        write_video(tmp_path / "clip.mp4", [picture(frame) for frame in frames], rate=4 if kind == "short file" else 1)
        video, folder = "clip.mp4", str(tmp_path)
    row = {"video": video, "conversations": conversation("<image>\nWhat happens?")}
    path = write_json(tmp_path, [row])
    (found,) = check_rows(
        load_rows(path, folder), Checker(processor, template_text(processor, "default"), 4096, decode=True)
    )
    expected = 1 if kind == "short file" else 3
    assert (found["problem"], found["vision"]) == ("", expected)
    batch = Collator(processor, assistant_only_loss=True)([found])
    assert batch["pixel_values"].shape[0] == expected
    assert batch["input_ids"].shape[1] == found["length"]


def test_a_video_that_cannot_be_counted_is_named(tmp_path, processor, picture):
    write_video(tmp_path / "clip.mkv", [picture("frame_0.png")] * 3)
    path = write_json(tmp_path, [{"video": "clip.mkv", "conversations": conversation("<video>\nWhat?")}])
    (problem,) = Report.of(checked(path, processor)).problems["bad image"]
    assert "clip.mkv: it does not say how many frames it has" in problem


def write_video(path, frames, rate=1):
    """`rate` frames a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_image(frame.resize((64, 64)))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


# The command


def test_check_command(broken, checkpoint, tmp_path):
    plot = tmp_path / "lengths.png"
    result = run("check", broken, "--model_name_or_path", checkpoint, "--max_length", 256, "--plot", plot)
    assert result.returncode == 1, result.stderr
    assert "9 rows, 2 of them fit to train on" in result.stdout
    assert "cut.png" in result.stdout and "gone.png" in result.stdout
    assert Image.open(plot).size[0] > 500
    assert "There is no file" in here("training", "check", tmp_path / "no.json", "--model", checkpoint).stderr


# Rows are trained exactly as they are written, or refused by name


def human(text, **keys):
    return {"from": "human", "value": text, **keys}


def gpt(text, **keys):
    return {"from": "gpt", "value": text, **keys}


def says(role, content, **keys):
    return {"role": role, "content": content, **keys}


def text(value, /, **keys):
    return {"type": "text", "text": value, **keys}


def llava(*turns, **keys):
    return {"conversations": list(turns), **keys}


def trl(question, answer="A shape.", **keys):
    return {"messages": [says("user", question), says("assistant", answer)], **keys}


ONE = {"image": "wide.png"}
TWO = {"images": ["wide.png", "alpha.png"]}
PICTURE = {"type": "image"}
HI = human("Hi"), gpt("Ho")

REFUSED = {
    "a number as text": (trl("Hi", [text(4)]), "the text of a part of assistant is 4, expected a text"),
    "a bool as text": (trl([text(True)]), "the text of a part of user is True, expected a text"),
    "null as text": (trl("Hi", [text(None)]), "is None, expected a text"),
    "no text": (trl("Hi", [{"type": "text"}]), "is None, expected a text"),
    "a list as text": (trl("Hi", [text(["a"])]), r"is \['a'\], expected a text"),
    "an object as text": (trl("Hi", [text({"a": 1})]), "expected a text"),
    "value for text": (trl("Hi", [{"type": "text", "value": "Ho"}]), "a part has 'value': 'Ho'"),
    "value beside text": (trl("Hi", [text("Ho", value="Hm")]), "a part has 'value': 'Hm'"),
    "a number as answer": (llava(human("Hi"), gpt(4)), "what a turn of assistant says is 4, expected a text"),
    "null as answer": (llava(human("Hi"), gpt(None)), "what a turn of assistant says is None"),
    "an unknown part": (
        trl([{"type": "audio", "audio": "a.wav"}]),
        "expected an object of the type text, image or video",
    ),
    "a part with an odd type": (trl([{"type": ["text"], "text": "Hi"}]), "expected an object of the type text"),
    "a picture with a text": (trl([{"type": "image", "text": "A cat"}, text("Hi")], **ONE), "has a text: 'A cat'"),
    "a system text of the row": (llava(*HI, system="Be brief."), "a row has 'system': 'Be brief.'.*first turn"),
    "tools of the row": (llava(*HI, tools=[{"name": "f"}]), "a row has 'tools'"),
    "a template of the row": (llava(*HI, chat_template="{{ x }}"), "a row has 'chat_template'"),
    "a call of a tool": (llava(human("Hi"), gpt("Ho", tool_calls=[{"name": "f"}])), "a turn has 'tool_calls'"),
    "a name": (llava(human("Hi", name="Eve"), gpt("Ho")), "a turn has 'name': 'Eve'"),
    "a thought": (llava(human("Hi"), gpt("Ho", reasoning_content="Hm")), "a turn has 'reasoning_content'"),
    "an answer of weight 0": (llava(human("Hi"), gpt("Ho", weight=0)), "a turn of assistant has 'weight': 0"),
    "an answer of weight 0.5": (llava(human("Hi"), gpt("Ho", weight=0.5)), "'weight': 0.5"),
    "an answer without loss": (llava(human("Hi"), gpt("Ho", loss=False)), "'loss': False"),
    "an answer not to train": (llava(human("Hi"), gpt("Ho", train=False)), "'train': False"),
    "a masked answer": (llava(human("Hi"), gpt("Ho", mask=True)), "'mask': True"),
    "a question to train": (llava(human("Hi", train=True), gpt("Ho")), "a turn of user has 'train': True"),
    "a row of weight 0": (llava(*HI, weight=0), "a row has 'weight': 0"),
    "image and images": (llava(human("<image>\nHi"), gpt("Ho"), **ONE, **TWO), "both `image` and `images`"),
    "video and videos": (llava(*HI, video="a.mp4", videos=["b.mp4"]), "both `video` and `videos`"),
    "a picture in a part": (trl([{"type": "image", "image": "alpha.png"}, text("Hi")], **ONE), "a part has 'image'"),
    "a URL in a part": (trl([{"type": "image", "url": "alpha.png"}, text("Hi")]), "a part has 'url'"),
    "a picture in a turn": (llava(human("<image>\nHi", image="wide.png"), gpt("Ho")), "a turn has 'image'"),
    "parts out of order": (trl([{**PICTURE, "index": 1}, {**PICTURE, "index": 0}], **TWO), "the index 1, expected 0"),
    "an empty answer": (llava(human("Hi"), gpt("")), "an answer is empty or blank"),
    "a blank answer": (llava(*HI, human("More"), gpt(" \n")), "an answer is empty or blank"),
    "an answer without parts": (trl("Hi", []), "an answer is empty or blank"),
    "a lone surrogate": (llava(human("Hi"), gpt("x \ud83d y")), r"has '\\ud83d' at character 2"),
    "a list as role": (llava({"from": ["human"], "value": "Hi"}, gpt("Ho")), r"the role \['human'\]"),
    "null as role": (llava({"from": None, "value": "Hi"}, gpt("Ho")), "the role None"),
    "prompt and completion": ({"prompt": "Hi", "completion": "Ho"}, '"content": prompt.*"content": completion'),
    "query and response": ({"query": "Hi", "response": "Ho"}, 'expected `messages` and `images`.*"content": query'),
    "instruction and output": ({"instruction": "Hi", "output": "Ho"}, '"content": instruction.*"content": output'),
    "preferences": ({"prompt": "Hi", "chosen": "Ho", "rejected": "Hm"}, "examples/dpo.py"),
    "a text alone": ({"text": "Hi Ho"}, "it has the columns id, text, but no turns, expected `messages`"),
    "conversations and messages": ({**llava(*HI), **trl("Hi")}, "both `conversations` and `messages`"),
    "value and content": (llava(human("Hi"), gpt("Ho", content="Hm")), "both 'value' .'Ho'. and 'content' .'Hm'."),
    "from and role": (llava(human("Hi"), gpt("Ho", role="user")), "both 'from' .'gpt'. and 'role' .'user'."),
    "two questions": (llava(human("Hi"), *HI), "Two messages in a row are from 'user'"),
    "a late system text": ({"messages": [*trl("Hi")["messages"], says("system", "S")]}, "The role is 'system'"),
    "an end token": (llava(human("Hi"), gpt("Ho</s>")), "a text has '</s>'"),
    "a start token": (llava(human("Hi <s>"), gpt("Ho")), "a text has '<s>'"),
    "an unknown token": (llava(human("Hi"), gpt("<unk>")), "a text has '<unk>'"),
    "a placeholder in an answer": (llava(human("Hi"), gpt("a <image>"), **ONE), "outside of the turns of the user"),
    "a picture in an answer": (trl("Hi", [PICTURE, text("Ho")], **ONE), "outside of the turns of the user"),
    "a placeholder too many": (trl([PICTURE, text("See <image>")], **ONE), "2 <image> for 1 images"),
    "a literal video": (llava(human("Hi <video>"), gpt("Ho")), "1 <video> for 0 videos"),
    "text for bytes": (llava(human("<image>\nHi"), gpt("Ho"), image={"bytes": "abc"}), "bad image: {'bytes': 'abc'}"),
    "a path that is no text": (llava(human("<image>\nHi"), gpt("Ho"), image="a\udc00.png"), r"bad image: a path has"),
    "null": (None, "it is None, expected an object"),
    "a number": (7, "it is 7, expected an object"),
}
USED = {
    "quotes": (trl("Hi", [text('Yes.\nIt is "so".')]), ["Hi", 'Yes.\nIt is "so".']),
    "digits": (trl("Hi", [text("4")]), ["Hi", "4"]),
    "a word of JSON": (trl([text("null")], "true"), ["null", "true"]),
    "quoted": (trl("Hi", '"STOP"'), ["Hi", '"STOP"']),
    "a date": (trl("Hi", "2020-01-01 00:00:00"), ["Hi", "2020-01-01 00:00:00"]),
    "an empty system text": (llava(*HI, system=""), ["Hi", "Ho"]),
    "weights as they are": (llava(human("Hi", weight=0), gpt("Ho", weight=1)), ["Hi", "Ho"]),
    "masks as they are": (llava(human("Hi", masked=True), gpt("Ho", masked=False)), ["Hi", "Ho"]),
    "no name": (llava(human("Hi", name=None), gpt("Ho", tool_calls=[])), ["Hi", "Ho"]),
    "numbered parts": (trl([{**PICTURE, "index": 0, "text": None}, text("Hi", index=None)], **ONE), ["Hi", "A shape."]),
    "both kinds of keys": (llava({"from": "human", "content": "Hi"}, says("assistant", "Ho")), ["Hi", "Ho"]),
    "an empty question": (llava(human(""), gpt("Ho")), ["", "Ho"]),
    "a question at the end": (llava(*HI, human("More?")), ["Hi", "Ho", "More?"]),
    "a system text": ({"messages": [says("system", "S"), *trl("Hi")["messages"]]}, ["S", "Hi", "A shape."]),
}


def checked_rows(rows, processor, folder, name="data.json"):
    named = [{"id": key, **row} if isinstance(row, dict) else row for key, row in rows.items()]
    found = load_rows(write_json(folder, named, name), str(IMAGES))
    return list(check_rows(found, Checker(processor, template_text(processor, "default"), 4096, decode=True)))


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_row_is_used_as_it_is_written_or_refused_by_name(name, processor, tmp_path):
    """All in one file: no row changes another, and none but its own row is refused."""
    refused = {key: row for key, (row, _) in REFUSED.items()}
    used = {key: row for key, (row, _) in USED.items()}
    rows = checked_rows({**refused, **used}, processor, tmp_path, name)
    for row, (key, (source, reason)) in zip(rows, REFUSED.items(), strict=False):
        assert row["id"] == (key if isinstance(source, dict) else str(rows.index(row)))
        assert re.search(reason, row["problem"]), (key, row["problem"])
    kept = rows[len(REFUSED) :]
    for row, (key, (_, texts)) in zip(kept, USED.items(), strict=True):
        assert row["problem"] == "" and row["notes"] == [], key
        assert [
            part["text"] for turn in row["messages"] for part in turn["content"] if part["text"] is not None
        ] == texts
    Collator(processor, assistant_only_loss=True)(kept)


def test_what_the_check_accepts_and_refuses_the_batch_does_too(processor, tmp_path):
    """Rows that never saw the check, as TRL gives them."""
    collator = Collator(processor, assistant_only_loss=True)
    for name in (
        "a number as text",
        "an answer of weight 0",
        "a blank answer",
        "an end token",
        "prompt and completion",
    ):
        row, reason = REFUSED[name]
        with pytest.raises(DataError, match=f"bad conversation: .*{reason}"):
            collator([{"images": [], **row}])


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_json_in_a_folder_is_read_as_json(name, streaming, tmp_path):
    """`datasets` 5.2.0 makes JSON of texts beside a number: a quoted text loses its marks, `4` becomes a number."""
    answers = ["Yes.\nIt is.", '"STOP"', "4", 4, "2020-01-01 00:00:00"]
    folder = tmp_path / "data"  # the cache is beside it
    folder.mkdir()
    write_json(folder, [trl([text("Hi")], [text(answer)]) for answer in answers], name)
    rows = list(load_rows(str(folder), streaming=streaming))
    assert [row["problem"] != "" for row in rows] == [False, False, False, True, False]
    assert [row["messages"][1]["content"][0]["text"] for row in rows if not row["problem"]] == [
        answer for answer in answers if answer != 4
    ]
    with pytest.raises(DataError, match="has no split 'other', only train"):
        load_rows(str(folder), split="other", streaming=streaming)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_datasets_whose_rows_differ_in_kind(kind, tmp_path):
    answers = ["Yes.\nIt is.", [text("Parts.")], [text(4)], [text(True)], [{"type": "text", "value": "x"}]]
    source = datasets.Dataset.from_list([trl("Hi", answer) for answer in answers], on_mixed_types="use_json")
    path = tmp_path / ("train.parquet" if kind == "parquet" else "saved")
    source.to_parquet(path) if kind == "parquet" else source.save_to_disk(path)
    rows = list(load_rows(str(path)))
    assert [row["problem"] != "" for row in rows] == [False, False, True, True, True]
    assert [contents(row)[1] for row in rows[:2]] == [[("text", "Yes.\nIt is.")], [("text", "Parts.")]]


def test_columns_that_a_dataset_gives_to_all_rows(tmp_path):
    """Arrow fills what a row does not have with null."""
    turns = [says("user", "Hi", name=None), says("assistant", "Ho", weight=1)]
    rows = [{"messages": turns, "system": None}, {"messages": turns, "system": "Be brief."}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    plain, system = load_rows(str(tmp_path / "train.parquet"))
    assert plain["problem"] == "" and "'system': 'Be brief.'" in system["problem"]


@pytest.mark.parametrize(
    "columns, hint",
    [
        (["prompt", "completion"], '"content": prompt.*"content": completion'),
        (["question", "answer"], '"content": question.*"content": answer'),
        (["prompt", "chosen", "rejected"], "examples/dpo.py"),
    ],
)
def test_datasets_of_other_formats_name_the_columns_wanted(columns, hint, tmp_path):
    datasets.Dataset.from_dict({column: ["a"] for column in columns}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=f"expected `messages` and `images` .*{hint}"):
        load_rows(str(tmp_path / "train.parquet"))


def test_damage_in_a_file_is_that_of_its_row(tmp_path):
    good = json.dumps(llava(*HI))
    lines = tmp_path / "data.jsonl"
    twice = '{"conversations": [{"from": "human", "value": "Hi", "value": "Hm"}, {"from": "gpt", "value": "Ho"}]}'
    latin = good.replace("Ho", "\xf6").encode("latin-1")
    lines.write_bytes(b"\n".join([good.encode(), b"{broken", twice.encode(), latin, b'{"id": NaN}']))
    problems = [row["problem"] for row in load_rows(str(lines))]
    expected = ["^$", "line 2 is not valid JSON", "the keys from, value twice", r"has '\\udcf6'.*no UTF-8", "no turns"]
    assert all(re.search(*pair) for pair in zip(expected, problems, strict=True)), problems
    assert [row["id"] for row in load_rows(str(lines))] == list("01234")
    whole = tmp_path / "object.json"
    whole.write_text(json.dumps({"data": []}, indent=1))
    with pytest.raises(DataError, match="object.json has no row, expected an object for each, in a list or one a line"):
        load_rows(str(whole))


FRONT, ONE_KEPT, DIVIDED, LEFT_OUT = "comes first", "one is kept", "divided by a line break", "leaves out a text"
IMAGES_FIRST = "its images come first"
CHANGED = {
    "two places": (llava(human("First <image> then <image>"), gpt("Ho"), **TWO), [FRONT]),
    "the end": (llava(human("What is it?\n<image>"), gpt("Ho"), **ONE), [FRONT]),
    "blanks": (llava(human("<image>\n What is it? "), gpt("Ho"), **ONE), [FRONT]),
    "one picture twice": (llava(human("<image>\nSame as <image>?"), gpt("Ho"), **ONE), [ONE_KEPT, FRONT]),
    "between parts": (trl([text("one "), PICTURE, text("two")], **ONE), [FRONT]),
    "between words": (trl([text("one"), PICTURE, text("two"), PICTURE, text("cmp")], **TWO), [DIVIDED, FRONT]),
    "two texts": (trl([text("one"), text("two")]), [DIVIDED]),
    "a video before a picture": (
        llava(human("<video>\n<image>\nSame?"), gpt("Ho"), **ONE, video=["frame_0.png", "frame_1.png"]),
        [IMAGES_FIRST],
    ),
    "an answer first": (llava(gpt("Welcome."), *HI), [LEFT_OUT]),
    "words of the system text": (llava(gpt("a curious user"), *HI), [LEFT_OUT]),
    "at the front": (llava(human("<image>\nWhat is it?"), gpt("Ho"), **ONE), []),
    "two at the front": (llava(human("<image>\n<image>\nWhat is it?"), gpt("Ho"), **TWO), []),
    "nothing but a picture": (llava(human("<image>"), gpt("Ho"), **ONE), []),
    "parts at the front": (trl([PICTURE, text("What is it?")], **ONE), []),
    "no place at all": (trl("What is it?", **ONE), []),
    "texts with a blank": (trl([text("one "), text("two")]), []),
}


def test_changes_are_counted_and_named(processor, tmp_path):
    rows = checked_rows({key: row for key, (row, _) in CHANGED.items()}, processor, tmp_path)
    for row, (key, (_, notes)) in zip(rows, CHANGED.items(), strict=True):
        assert row["problem"] == "" and len(row["notes"]) == len(notes), (key, row["notes"])
        assert all(label in note for label, note in zip(notes, row["notes"], strict=True)), (key, row["notes"])
    report = Report.of(datasets.Dataset.from_list(rows))
    front = sum(FRONT in labels for _, labels in CHANGED.values())
    (line,) = (line for line in report.lines(4096) if FRONT in line)
    assert line.endswith(f"as in the original: {front} row(s), the first is two places")


def test_the_question_that_stage_1_leaves_out_is_counted(processor):
    checker = Checker(processor, template_text(processor, "plain"), 4096, decode=False)
    notes = [row["notes"] for row in check_rows(load_rows(str(CAPTIONS), str(IMAGES)), checker)]
    assert [any(LEFT_OUT in note for note in found) for found in notes] == [True, False, True]


@pytest.mark.parametrize("max_length", [None, 4096])
def test_no_row_is_longer_than_the_context(max_length, processor, tmp_path):
    """Without pictures it was trained, at positions that the model does not have."""
    processor.tokenizer.model_max_length = 100
    rows = load_rows(write_json(tmp_path, [llava(human("Hi"), gpt("very " * 100 + "long")), llava(*HI)]))
    checker = Checker(processor, template_text(processor, "default"), max_length, decode=False)
    long, short = check_rows(rows, checker)
    assert long["problem"].startswith("too long: ") and long["problem"].endswith(" tokens, 100 are allowed")
    assert short["problem"] == ""


def test_a_key_that_nothing_reads_is_named_once(processor, tmp_path, caplog):
    rows = {f"row {number}": llava(human("Hi", mood="good"), gpt("Ho"), source="web") for number in range(30)}
    path = write_json(tmp_path, [{"id": name, **row} for name, row in rows.items()])
    found = checked(path, processor)
    report = Report.of(found)
    fit_rows(found, report, "error", "error")
    for key, where in (("source", "a row"), ("mood", "a turn")):
        line = f"note: nothing reads the key '{key}' of {where}: 30 row(s), the first is row 0"
        assert line in report.lines(256) and caplog.messages.count(line) == 1
    caplog.clear()
    checker = Checker(processor, template_text(processor, "default"), 256, decode=True)
    assert len(list(fit_stream(load_rows(path).to_iterable_dataset(), checker, "error", "error"))) == 30
    assert sum("'source'" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("roles", [["system", "user", "assistant"], ["user", "assistant"] * 2, ["assistant", "user"]])
def test_stage_1_has_one_question_and_one_caption(roles, processor, tmp_path):
    turns = [says(role, "<image>" if role == "user" and place < 2 else "x") for place, role in enumerate(roles)]
    path = write_json(tmp_path, [{"messages": turns, **ONE}])
    rows = load_rows(path, str(IMAGES))
    (row,) = check_rows(rows, Checker(processor, template_text(processor, "plain"), 4096, decode=False))
    assert re.search("expected one message of 'user' with the image and one of 'assistant'", row["problem"])


def test_a_video_in_stage_1_is_a_video(processor, tmp_path):
    row = {"video": ["frame_0.png", "frame_1.png"], "conversations": conversation("<image>")}
    checker = Checker(processor, template_text(processor, "plain"), 4096, decode=True)
    (found,) = check_rows(load_rows(write_json(tmp_path, [row]), str(IMAGES)), checker)
    batch = Collator(processor, assistant_only_loss=True, chat_template=template_text(processor, "plain"))([found])
    assert found["problem"] == "" and batch["pixel_values"].shape[0] == 2
    assert found["length"] == batch["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["json", "saved"])
def test_parts_and_sums_of_splits(kind, tmp_path):
    """In the notation of `datasets`."""
    folder = tmp_path / "data"
    folder.mkdir()
    splits = {"train": [llava(human("Hi"), gpt(answer)) for answer in "abcd"], "test": [llava(*HI)]}
    if kind == "json":
        for name, rows in splits.items():
            write_json(folder, rows, f"{name}.jsonl")
    else:
        saved = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        datasets.DatasetDict(saved).save_to_disk(folder)
    for split, answers in {"train[:50%]": ["a", "b"], "train[3:]+test": ["d", "Ho"], "test": ["Ho"]}.items():
        assert [contents(row)[1][0][1] for row in load_rows(str(folder), split=split)] == answers
    for split in ("val[:1]", "train[:"):
        with pytest.raises(DataError, match=r"split '(val|train\[:)"):
            load_rows(str(folder), split=split)


@pytest.mark.parametrize("kind", ["numpy", "pandas", "torch"])
def test_a_format_that_was_saved_with_a_dataset_changes_nothing(kind, tmp_path):
    source = datasets.Dataset.from_list([trl([PICTURE, text("Hi")], [text("Ho")], images=["wide.png"])])
    source.with_format(kind).save_to_disk(tmp_path / "saved")
    (row,) = load_rows(str(tmp_path / "saved"), str(IMAGES))
    assert row["problem"] == "" and contents(row) == [[("image", None), ("text", "Hi")], [("text", "Ho")]]


@pytest.mark.parametrize("image", ["http://example.org/a.png", "data:image/png;base64,AA", "iVBOR" + "A" * 10**5])
def test_a_picture_that_is_no_file_is_named_shortly(image, processor, tmp_path):
    (row,) = checked_rows({"a": llava(human("<image>\nHi"), gpt("Ho"), image=image)}, processor, tmp_path)
    assert "is no path, expected a file" in row["problem"] and len(row["problem"]) < 250


def test_an_array_for_a_picture_is_refused(processor):
    row = trl([PICTURE, text("Hi")], "Ho", images=[np.zeros((9, 9, 3), np.uint8)])
    with pytest.raises(DataError, match="bad image: array.*"):
        Collator(processor, assistant_only_loss=True)([row])


@pytest.mark.parametrize("mask", ["", [], {}])
def test_an_empty_mask_is_none(mask, processor, tmp_path):
    (row,) = checked_rows({"a": llava(*HI, mask=mask)}, processor, tmp_path)
    assert row["problem"] == ""


def numbered(folder, files, **more):
    """Parquet files of three rows each, whose question is their number."""
    folder.mkdir()
    for file in range(files):
        questions = [str(number) for number in range(3 * file, 3 * file + 3)]
        turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "A."}] for text in questions]
        rows = {"messages": turns, **{name: [value + text for text in questions] for name, value in more.items()}}
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"train-{file:05}-of-{files:05}.parquet")
    return folder


@pytest.mark.parametrize("files, more", [(1, {}), (2, {}), (2, {"id": "row"})])
def test_a_streamed_row_has_one_name_with_any_number_of_workers(files, more, tmp_path):
    """Its name decides its budget."""
    folder = numbered(tmp_path / "rows", files, **more)
    stream = load_rows(str(folder), streaming=True).shuffle(seed=0, buffer_size=4)
    names = []
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
        names.append({row["messages"][0]["content"][0]["text"]: row["id"] for row in loader})
    assert names[0] == names[1] and len(set(names[0].values())) == len(names[0]) == 3 * files
    if files == 1 or more:
        assert names[0] == {row["messages"][0]["content"][0]["text"]: row["id"] for row in load_rows(str(folder))}


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_several_files_have_a_name_each(streaming, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(2):
        write_json(folder, [llava(*HI), {"id": "mine", **llava(*HI)}], f"train-{number}.jsonl")
    names = [row["id"] for row in load_rows(str(folder), streaming=streaming)]
    assert names == ["train-0.jsonl:0", "mine", "train-1.jsonl:0", "mine"]


def test_a_row_from_python_without_an_answer_is_refused(processor):
    """It was trained on nothing."""
    rows = [{"messages": [says("user", "Hi")]}, trl("Hi", "Ho")]
    with pytest.raises(DataError, match="Row without an id cannot be trained on: no trainable token"):
        Collator(processor, assistant_only_loss=True)(rows)
