"""Pictures of training rows: the pixels are those of inference, and a check finds what a batch would not take."""

import json
import os
from fractions import Fraction
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_pictures import SHADES, animation, film, png, rotated
from transformers import LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from training.batches import Collator
from training.checks import Checker, check_rows, open_image
from training.rows import DataError, load_rows
from training.trainer import template_text

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A photo."}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))


def rows_of(tmp_path, **media):
    (tmp_path / "data.json").write_text(json.dumps([{**media, "conversations": TURNS}]))
    return load_rows(str(tmp_path / "data.json"))


def checked(rows, processor):
    (row,) = check_rows(rows, Checker(processor, template_text(processor, "default"), 4096, decode=True))
    return row


def batch(row, processor):
    return Collator(processor, assistant_only_loss=True)([row])


@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("source", ["json", "parquet with bytes", "row of PIL images"])
def test_a_photo_is_upright_in_training_as_in_inference(source, turn, photo, processor, tmp_path):
    path = rotated(photo, tmp_path / "photo.png")
    if source == "json":
        (row,) = rows_of(tmp_path, image="photo.png")
    else:
        content = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
        answer = [{"type": "text", "text": "A photo."}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        row = {"messages": messages, "images": [Image.open(path)]}
    if source == "parquet with bytes":
        given = {"messages": [messages], "images": [[{"bytes": path.read_bytes(), "path": None}]]}
        column = datasets.List(datasets.Image(decode=False))
        datasets.Dataset.from_dict(given).cast_column("images", column).to_parquet(tmp_path / "data.parquet")
        (row,) = load_rows(str(tmp_path / "data.parquet"))
    processor.image_processor.do_exif_transpose = turn
    seen = np.asarray(photo.rotate(-90, expand=True) if turn else photo)
    expected = processor.image_processor(seen, return_tensors="pt").pixel_values
    assert torch.equal(batch(row, processor)["pixel_values"], expected)
    assert torch.equal(processor.image_processor(str(path), return_tensors="pt").pixel_values, expected)


def test_transparency_and_16_bits_in_training(photo, processor, tmp_path):
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.tile(np.arange(70, dtype=np.uint8) * 3, (40, 1))))
    alpha.save(tmp_path / "alpha.png")
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(tmp_path / "grey.png")
    for name in ("alpha.png", "grey.png"):
        for colour in (None, "white"):
            processor.image_processor.alpha_background = colour
            (row,) = rows_of(tmp_path, image=name)
            expected = processor.image_processor(str(tmp_path / name), return_tensors="pt").pixel_values
            assert torch.equal(batch(row, processor)["pixel_values"], expected)


def test_the_stock_processor_gets_the_same_pictures(processor, tmp_path):
    """It paints transparency white itself, so it must not see it; nor does it turn a photo."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 70, 4), dtype=np.uint8)
    path = rotated(Image.fromarray(noise), tmp_path / "photo.png")
    ours = processor.image_processor
    stock = LlavaProcessor(
        LlavaImageProcessorPil(size=ours.size, crop_size=ours.crop_size, do_pad=True),
        processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    )
    (row,) = rows_of(tmp_path, image="photo.png")
    expected = ours(str(path), return_tensors="pt").pixel_values
    assert torch.equal(batch(row, stock)["pixel_values"], expected)


@pytest.mark.parametrize("kind", ["pipe", "long", "depth", "half", "pipe as video", "half animation"])
def test_a_check_finds_what_a_batch_would_not_take(kind, photo, processor, tmp_path):
    path = tmp_path / ("bad.mp4" if kind == "pipe as video" else "bad.gif" if "animation" in kind else "bad.png")
    if "pipe" in kind:
        os.mkfifo(path)
    elif kind == "long":
        path.write_bytes(png(1, 60000))
    elif kind == "depth":
        path = tmp_path / "bad.tif"
        Image.fromarray(np.full((20, 20), 70000, np.int32)).save(path)
    elif kind == "half":
        photo.save(path)
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.write_bytes(animation(path).read_bytes()[:700])
    column = "video" if path.suffix in (".mp4", ".gif") else "image"
    rows = rows_of(tmp_path, **{column: path.name})
    row = checked(rows, processor)
    assert row["problem"].startswith(f"bad image: {path}: "), row["problem"]
    with pytest.raises(ValueError, match=path.name):
        batch(rows[0], processor)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
@pytest.mark.parametrize("count", [1, 2])
def test_an_animation_in_a_row_is_a_video(count, ending, processor, tmp_path):
    path = animation(tmp_path / f"a.{ending}")
    turns = [{**TURNS[0], "value": "<video>" * count + "What?"}, TURNS[1]]
    for video in ([path.name] * count, path.name)[: 3 - count]:
        (tmp_path / "data.json").write_text(json.dumps([{"video": video, "conversations": turns}]))
        row = checked(load_rows(str(tmp_path / "data.json")), processor)
        assert (row["problem"], row["vision"], len(row["videos"])) == ("", 3 * count, count)
        found = batch(row, processor)
        assert found["input_ids"].shape[1] == row["length"]
        expected = processor(videos=[str(path)] * count, text="<video>" * count, return_tensors="pt")
        assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_still_gifs_are_the_frames_of_one_video(processor, tmp_path):
    names = ["0.gif", "1.gif"]
    for name in names:
        Image.new("RGB", (20, 20), "red").save(tmp_path / name)
    row = checked(rows_of(tmp_path, video=names), processor)
    assert (row["problem"], row["vision"], len(row["videos"])) == ("", 2, 1)


@pytest.mark.parametrize("order", [1, -1])
def test_an_animation_among_frames_is_refused(order, processor, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "still.gif")
    names = [animation(tmp_path / "a.gif").name, "still.gif"][::order]
    row = checked(rows_of(tmp_path, video=names), processor)
    assert row["problem"] == f"bad image: {tmp_path / 'a.gif'}: an animation among frames; it is a video of its own"


@pytest.mark.parametrize("video", [["a.mp4", "b.mp4"], ["a.png", "b.mp4"], ["b.mp4", "a.png"], ["a", "b"]])
def test_a_list_of_files_is_no_video(video, processor, tmp_path):
    """The files after the first one would be left out."""
    problem = checked(rows_of(tmp_path, video=[video]), processor)["problem"]
    assert problem.startswith(f"bad image: the video {video} is a list in which not all are pictures"), problem


@pytest.mark.parametrize("decode", [True, False])
def test_a_video_of_any_kind_has_as_many_frames_as_its_batch(decode, processor, tmp_path):
    files = [film(tmp_path / "a.mp4"), film(tmp_path / "a.mov"), str(tmp_path / "an animation")]
    Path(files[-1]).write_bytes(animation(tmp_path / "a.gif", [100, 2900, 500, 500], SHADES[:4]).read_bytes())
    for file in files:
        rows = rows_of(tmp_path, video=file)
        (row,) = check_rows(rows, Checker(processor, template_text(processor, "default"), 4096, decode))
        assert (row["problem"], row["vision"]) == ("", 3)
        assert batch(row, processor)["input_ids"].shape[1] == row["length"]


@pytest.mark.parametrize("kind", ["cut", "slow"])
def test_a_check_finds_a_video_that_has_too_few_frames(kind, processor, tmp_path):
    """Its header names as many as there should be."""
    path = film(tmp_path / "a.mp4", rate=Fraction(1, 2) if kind == "slow" else 4, codec="mpeg4", movflags="faststart")
    if kind == "cut":
        Path(path).write_bytes(Path(path).read_bytes()[: -os.path.getsize(path) // 3])
    rows = rows_of(tmp_path, video=path)
    reason = "it ends after" if kind == "cut" else "it has 12 frames, but"
    assert checked(rows, processor)["problem"].startswith(f"bad image: {path}: {reason}")
    with pytest.raises(ValueError, match=reason):
        batch(rows[0], processor)


def test_a_picture_without_options_is_as_the_class_has_it(photo, tmp_path):
    path = rotated(photo, tmp_path / "photo.png")
    opened = open_image({"path": str(path), "bytes": None})
    assert np.array_equal(np.asarray(opened), np.asarray(photo.convert("RGB").rotate(-90, expand=True)))
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        open_image({"path": str(tmp_path / "gone.png"), "bytes": None})
