"""The processor: counting tokens, ordering pixels, and refusing what does not fit."""

import json
import logging

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from PIL import Image
from transformers import CLIPImageProcessorPil, LlamaTokenizer, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from modeling_llava_stf import LlavaSTFImageProcessor, LlavaSTFProcessor


@pytest.fixture
def frames(picture):
    return [picture(f"frame_{index}.png") for index in range(3)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_placeholders_equal_features(count, processor, model, picture):
    inputs = processor(images=[picture("wide.png")] * count, text="<image>\n" * count + "What?", return_tensors="pt")
    placeholders = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert placeholders == count * processor.tokens_per_image == count * model.config.tokens_per_image
    if count:
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        assert sum(len(tokens) for tokens in features) == placeholders


def test_serving_engines_count_the_same(processor, picture):
    data = processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (336, 336)])
    inputs = processor(images=picture("wide.png"), text="<image>")
    assert data["num_image_tokens"] == [inputs["input_ids"][0].count(processor.image_token_id)] * 2
    assert data["num_image_patches"] == [1, 1]
    assert processor.replace_image_token(inputs, 0) == processor.image_token * data["num_image_tokens"][0]


def test_a_video_is_its_frames(processor, frames, goldens, golden_tensors):
    inputs = processor(videos=[frames], text="<video>\nWhat?", return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    tokens = 3 * goldens["tokens_per_image"]
    assert ids[1 : 1 + tokens] == [processor.image_token_id] * tokens
    assert ids.count(processor.image_token_id) == tokens
    torch.testing.assert_close(inputs["pixel_values"], golden_tensors["pixel_values.frames"], rtol=0, atol=1e-6)
    padded = processor(videos=[frames], text="<video>", videos_kwargs={"do_pad": True}, return_tensors="pt")
    assert not torch.equal(padded["pixel_values"], inputs["pixel_values"])


def test_pixels_stand_in_reading_order(processor, picture, frames):
    wide, text = picture("wide.png"), picture("text.png")
    inputs = processor(
        images=[[wide], [text]],
        videos=[frames[:2], frames[2:]],
        text=["<video> then <image>", "<image><video> and text"],
        padding=True,
        return_tensors="pt",
    )
    image = lambda *pictures: processor(images=list(pictures), return_tensors="pt")["pixel_values"]  # noqa: E731
    video = lambda *pictures: processor(videos=[list(pictures)], return_tensors="pt")["pixel_values"]  # noqa: E731
    expected = torch.cat([video(*frames[:2]), image(wide), image(text), video(frames[2])])
    assert torch.equal(inputs["pixel_values"], expected)


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_videos_in_every_form_are_equal(return_tensors, processor, frames):
    sizes = {frame.size for frame in frames}
    assert len(sizes) == 1
    paths = [str(GOLDENS / "images" / f"frame_{index}.png") for index in range(3)]
    arrays = np.stack([np.asarray(frame) for frame in frames])
    forms = [frames, [frames], [paths], arrays, [arrays], torch.from_numpy(arrays).permute(0, 3, 1, 2), arrays[None]]
    results = [processor(videos=form, text="<video>", return_tensors=return_tensors) for form in forms]
    for result in results[1:]:
        np.testing.assert_array_equal(np.asarray(result["pixel_values"]), np.asarray(results[0]["pixel_values"]))
        np.testing.assert_array_equal(np.asarray(result["input_ids"]), np.asarray(results[0]["input_ids"]))


def test_frames_of_different_sizes(processor, picture):
    inputs = processor(videos=[[picture("wide.png"), picture("text.png")]], text="<video>", return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 2


def test_num_frames_are_spread_evenly(processor, frames):
    inputs = processor(videos=[frames], text="<video>", num_frames=2, return_tensors="pt")
    ends = processor(videos=[[frames[0], frames[2]]], text="<video>", return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], ends["pixel_values"])


def test_video_file_gives_one_frame_a_second(processor, frames, tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(12):
            shade = Image.new("RGB", (64, 48), (index * 20, 128, 255 - index * 20))
            container.mux(stream.encode(av.VideoFrame.from_image(shade)))
        container.mux(stream.encode())
    inputs = processor(videos=str(path), text="<video>", return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 3
    assert processor(videos=str(path), text="<video>", num_frames=5, return_tensors="pt")["pixel_values"].shape[0] == 5
    red = inputs["pixel_values"][:, 0].mean((1, 2))
    assert (red.diff() > 0).all()  # frame after frame


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_is_converted_as_pil_does(mode, processor, picture):
    image = picture("wide.png").convert(mode)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"])


def test_arrays_equal_pictures(processor, picture):
    image = picture("wide.png")
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    array = np.asarray(image)
    transparent = np.concatenate([array, np.full_like(array[..., :1], 7)], axis=-1)
    for form in (array, array.transpose(2, 0, 1), torch.from_numpy(array.copy()), transparent, array[None]):
        assert torch.equal(processor(images=form, return_tensors="pt")["pixel_values"], expected)
    grey = np.asarray(image.convert("L"))
    expected = processor(images=image.convert("L"), return_tensors="pt")["pixel_values"]
    for form in (grey, grey[..., None], grey[None]):
        assert torch.equal(processor(images=form, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("size", [(1, 1), (1000, 1), (1, 1000)])
def test_extreme_shapes(size, processor):
    assert processor(images=Image.new("RGB", size), return_tensors="pt")["pixel_values"].isfinite().all()


def test_batch_equals_alone(processor, picture):
    prompts = ["<image>\nWhat is it?", "Only text, and more of it.", "<image> and <image>"]
    images = [[picture("wide.png")], [], [picture("text.png"), picture("shapes.png")]]
    batch = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    for index, prompt in enumerate(prompts):
        alone = processor(images=images[index] or None, text=prompt, return_tensors="pt")
        assert torch.equal(batch["input_ids"][index][batch["attention_mask"][index].bool()], alone["input_ids"][0])
    assert batch["attention_mask"][:, -1].all()  # padded on the left
    assert len(batch["pixel_values"]) == 3


def test_literal_unk_is_not_masked(processor):
    inputs = processor(text=["a <unk> b", "a much longer prompt"], padding=True, return_tensors="pt")
    unknown = inputs["input_ids"][0] == processor.tokenizer.unk_token_id
    assert (inputs["attention_mask"][0][unknown] == 1).sum() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": "<image> <image>", "images": 1}, r"<image> tokens.*found 2 .* and 1 .*takes 4 tokens.*Usual causes"),
        ({"text": "<image>", "images": 2}, r"found 1 .* and 2 "),
        ({"text": "<image>"}, r"found 1 .* and 0 "),
        ({"text": "hello", "images": 1}, r"found 0 .* and 1 "),
        ({"text": "<video>"}, r"<video> tokens.*found 1 .* and 0 "),
        ({"text": ["<image><image>", "<image>"], "images": [1, 2]}, r"\[2, 1\] by prompt.*\[1, 2\] by prompt"),
        ({}, "got nothing"),
        ({"text": 5 * [3]}, "`text` must be a string"),
    ],
)
def test_placeholders_and_images_must_match(call, message, processor, picture):
    call, image = dict(call), picture("wide.png")
    if "images" in call:
        counts = call["images"]
        call["images"] = [image] * counts if isinstance(counts, int) else [[image] * count for count in counts]
    with pytest.raises(ValueError, match=message):
        processor(**call)


def test_a_prompt_does_not_get_the_video_of_another(processor, frames):
    """Lists of videos for each prompt are counted for each, as those of pictures are."""
    one, two = np.stack([np.asarray(frame) for frame in frames]), list(frames[:2])
    for videos, text in (
        ([[one, two], []], ["<video>", "<video>"]),
        ([[one], [two]], ["<video><video>", "no video"]),
    ):
        with pytest.raises(ValueError, match=r"<video> tokens .* by prompt\) and 2 \(\[.* by prompt or in all"):
            processor(videos=videos, text=text)
    expected = processor(videos=[one, two], text=["<video><video>", "no video"])["pixel_values"]
    found = processor(videos=[[one, two], []], text=["<video><video>", "no video"])["pixel_values"]
    assert np.array_equal(found, expected)


def test_more_than_the_context_is_refused_with_the_numbers(processor, frames):
    with pytest.raises(ValueError, match="4803 tokens, 4800 of them of images or frames.*holds 4096.*num_frames"):
        processor(videos=[frames * 400], text="<video>.")
    assert processor(videos=[frames * 400], text="<video>.", num_frames=8)


@pytest.mark.parametrize("max_length", [1, 3, 4])
def test_truncation_never_cuts_an_image(max_length, processor, picture):
    with pytest.raises(ValueError, match=f"cuts through an image.*needs 9 tokens, {max_length} are allowed"):
        processor(images=picture("wide.png"), text="<image> x.", truncation=True, max_length=max_length)


def test_damaged_pictures_are_named(processor, tmp_path):
    whole = (GOLDENS / "images" / "text.png").read_bytes()
    cases = {"cut.png": whole[:900], "not_a_picture.png": b"hello", "empty.png": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            processor(images=str(tmp_path / name), text="<image>")
    with pytest.raises(ValueError, match="missing.png"):
        processor(images=str(tmp_path / "missing.png"), text="<image>")
    with pytest.raises(ValueError, match="cut.png"):
        processor(images=Image.open(tmp_path / "cut.png"), text="<image>")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_refused(value, processor):
    with pytest.raises(ValueError, match="NaN or infinite"):
        processor(images=np.full((60, 60, 3), value, dtype=np.float32), text="<image>")


@pytest.mark.parametrize("shape", [(108, 192), (300, 100), (56, 56), (5, 7)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_mean": None, "do_normalize": False},
        {"resample": Image.Resampling.BILINEAR},
        {"do_resize": False, "crop_size": {"height": 40, "width": 40}},
        {"size": {"height": 60, "width": 50}},
        {"do_pad": False},
    ],
)
def test_pictures_are_padded_and_resized_as_the_stock_class_does(shape, changes, processor):
    """Ours does it before a picture becomes an array, so that a large one is copied less often."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    settings = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "do_pad": True, **changes}
    pixels = LlavaSTFImageProcessor(**settings)(noise, return_tensors="pt").pixel_values
    assert torch.equal(pixels, LlavaImageProcessorPil(**settings)(noise, return_tensors="pt").pixel_values)


def test_resizing_before_padding_gives_other_pixels(processor):
    """Why a picture is padded first, though the other order would be faster."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (108, 192, 3), dtype=np.uint8))
    settings = processor.image_processor
    side = settings.crop_size["height"]
    height = round(side * noise.height / noise.width)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in settings.image_mean))
    square.paste(noise.resize((side, height), Image.Resampling.BICUBIC), (0, (side - height) // 2))
    pixels = settings(noise, return_tensors="pt").pixel_values[0]
    other = settings(square, do_pad=False, return_tensors="pt").pixel_values[0]
    grey_levels = 255 * (pixels - other).abs() * torch.tensor(settings.image_std).view(3, 1, 1)
    middle = grey_levels[:, side // 2 - height // 4 : side // 2 + height // 4]  # far from the border
    assert middle.max() > 2


def test_pictures_scaled_to_one_are_not_scaled_twice(processor, picture):
    array = np.asarray(picture("wide.png")).astype(np.float32) / 255
    with pytest.raises(ValueError, match="up to 0.894, expected 0 to 255.*multiply"):
        processor(images=array, text="<image>")
    whole = processor(images=array * 255, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(whole, processor(images=picture("wide.png"), return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("video", [["no_such_file.mp4"], 7])
def test_bad_videos_are_refused(video, processor):
    with pytest.raises(ValueError, match="no_such_file.mp4|got int"):
        processor(videos=video, text="<video>")


@pytest.mark.parametrize("missing", ["patch_size", "fusion_window", "vision_feature_select_strategy"])
def test_incomplete_settings_refuse_to_load(missing, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    del settings[missing]
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"lacks {missing}"):
        LlavaSTFProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"fusion_window": 3}, "`fusion_window` is 3.*4 x 4"),
        ({"vision_feature_select_strategy": "full"}, "'full', expected 'default'"),
    ],
)
def test_settings_that_do_not_fit_refuse_to_load(setting, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        LlavaSTFProcessor.from_pretrained(checkpoint, **setting)


def test_incomplete_processor_cannot_count(processor, picture):
    bare = LlavaSTFProcessor(image_processor=processor.image_processor, tokenizer=processor.tokenizer)
    with pytest.raises(ValueError, match="lacks patch_size, fusion_window"):
        bare(images=picture("wide.png"), text="<image>")


def test_tokenizer_without_the_image_token_is_refused(processor):
    with pytest.raises(ValueError, match="does not know '<image>'"):
        LlavaSTFProcessor(processor.image_processor, LlamaTokenizer.from_pretrained(GOLDENS / "base"), 14, 2, "default")


def test_stock_processor_on_our_weights_fails_at_once(processor, model, picture):
    crop = processor.image_processor.crop_size
    stock = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": crop["height"]}, crop_size=crop),
        processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    inputs = stock(images=picture("wide.png"), text="<image> x", return_tensors="pt")
    with pytest.raises(ValueError, match="16 image tokens.*give 4.*4 tokens each.*LLaVA-1.5 writes 576"):
        model(**inputs)


def test_our_processor_on_stock_weights_fails_at_once(processor, model, picture):
    from transformers import LlavaConfig

    config = LlavaConfig(
        vision_config=model.config.vision_config.to_dict(),
        text_config=model.config.text_config.to_dict(),
        image_token_index=model.config.image_token_id,
    )
    inputs = processor(images=picture("wide.png"), text="<image> x", return_tensors="pt")
    with pytest.raises(ValueError, match="tokens"):
        LlavaForConditionalGeneration(config)(**inputs)


@pytest.mark.parametrize("shape", [(1, 3, 28, 56), (1, 1, 56, 56), (3, 56, 56), (1, 1, 1, 3, 56, 56), (2, 57, 56)])
def test_pixels_of_the_wrong_shape_are_refused(shape, model):
    with pytest.raises(ValueError, match=r"the shape .*expected \(images, 3, 56, 56\)"):
        model.get_image_features(torch.zeros(shape))


def test_prompt_with_image_tokens_but_no_image_draws_a_warning(processor, model, picture, caplog):
    inputs = processor(images=picture("wide.png"), text="<image> x", return_tensors="pt")
    del inputs["pixel_values"]
    logger = logging.getLogger("modeling_llava_stf.modeling_llava_stf")
    logger.addHandler(caplog.handler)
    model(**inputs)
    logger.removeHandler(caplog.handler)
    assert "image tokens, but no `pixel_values`" in caplog.text
