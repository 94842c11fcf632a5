"""Rows from every source, what is wrong with them, and the original's labels in batches."""

import json

import datasets
import numpy as np
import pytest
import torch
from conftest import GOLDENS
from PIL import Image
from training_runs import CAPTIONS, CONVERSATIONS, IMAGES, run

from conversion.tokenizer import load_tokenizer
from modeling_llava_stf import LlavaSTFProcessor
from training.data import (
    Checker,
    Collator,
    DataError,
    Report,
    check_rows,
    fit_rows,
    fit_stream,
    load_rows,
    open_image,
    place_media,
)

# The original loses every target of this row, as METHOD's list of faults says; ours keeps both answers.
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
    collator = Collator(processor, assistant_only_loss=True, chat_template=processor.chat_template[template])
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
    return check_rows(rows, Checker(processor, processor.chat_template[template], max_length, decode))


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
    checker = Checker(processor, processor.chat_template["default"], 4096, decode=False)
    rows = list(check_rows(load_rows(str(CONVERSATIONS), str(IMAGES)), checker))
    assert len(rows) == 9
    for row in rows:
        batch = Collator(processor, assistant_only_loss=True)([row])
        assert row["length"] == batch["input_ids"].shape[1]
        assert row["targets"] == (batch["labels"] != -100).sum()
        assert row["vision"] == len(batch.get("pixel_values", []))


def test_rows_are_skipped_only_if_that_is_wanted(broken, processor, caplog):
    found = checked(broken, processor)
    with pytest.raises(DataError, match=r"2 of 9 rows cannot be trained on: missing.*--on-bad-image skip"):
        fit_rows(found, Report.of(found), "error", "skip")
    with pytest.raises(DataError, match="--on-bad-row skip"):
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
    checker = Checker(processor, processor.chat_template["default"], 256, decode=True)
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
        load_rows(path, folder), Checker(processor, processor.chat_template["default"], 4096, decode=True)
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
    assert "There is no file" in run("check", tmp_path / "no.json", "--model", checkpoint).stderr
