"""Token budgets: how many tokens a picture has is chosen at the call, picture by picture."""

import json
import logging
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from torch.nn.functional import avg_pool2d
from transformers import AutoProcessor, DynamicCache, LlavaProcessor, StaticCache, pipeline

from modeling_llava_stf import (
    LlavaSTFConfig,
    LlavaSTFForConditionalGeneration,
    LlavaSTFImageProcessor,
    LlavaSTFProcessor,
    PictureCache,
    generate_many,
)
from modeling_llava_stf.__main__ import DEFAULT_MODEL, main
from modeling_llava_stf._bulk import Captioner, Row, Server
from modeling_llava_stf.configuration_llava_stf import allowed_token_budgets
from modeling_llava_stf.modeling_llava_stf import CACHE

ONE = "USER: <image>\nWhich color does the circle have? ASSISTANT:"
TWO = "USER: <image> and <image>\nWhat differs? ASSISTANT:"
TEXT_PART = {"type": "text", "text": "What is it?"}
TEXT = "USER: Name a city. ASSISTANT:"
VIDEO = "USER: <video> after <image>\nWhat happens? ASSISTANT:"
EIGHT = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
# In float32 the mean of what a linear layer returns, and what it returns for the mean, differ by rounding only.
ROUNDING = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module")
def small():
    """The small model in float32: 16, 4 or 1 tokens a picture."""
    return LlavaSTFForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype=torch.float32).eval()


@pytest.fixture
def small_processor():
    return LlavaSTFProcessor.from_pretrained(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def pictures(picture):
    return [picture(name) for name in ("shapes.png", "text.png", "wide.png")]


@pytest.fixture
def inputs_of(small_processor, pictures):
    """Inputs of prompts, whose images are the first pictures, in this order."""

    def prepare(*prompts, **kwargs):
        images = pictures[: "".join(prompts).count("<image>")] or None
        inputs = small_processor(images=images, text=list(prompts), padding=True, return_tensors="pt", **kwargs)
        return dict(inputs)

    return prepare


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **EIGHT | kwargs)[:, inputs["input_ids"].shape[1] :]


def placeholders(inputs, processor):
    return [row.count(processor.image_token_id) for row in torch.as_tensor(inputs["input_ids"]).tolist()]


# Which numbers are allowed


def test_budgets_of_the_released_model():
    assert LlavaSTFConfig().allowed_token_budgets == [144, 36, 16, 9, 4, 1]
    assert LlavaSTFConfig().token_budgets is None


@pytest.mark.parametrize("grid, window", [(24, 2), (24, 1), (24, 3), (16, 2), (14, 2), (8, 8), (10, 2)])
def test_budgets_are_all_squares_that_tile_the_grid(grid, window):
    config = LlavaSTFConfig(
        vision_config={"image_size": 14 * grid, "patch_size": 14}, vision_feature_layer=[1], fusion_window=window
    )
    side = grid // window
    expected = [(side // width) ** 2 for width in range(1, side + 1) if side % width == 0]
    assert config.allowed_token_budgets == expected
    assert expected[0] == config.tokens_per_image and expected[-1] == 1


def test_budgets_of_a_grid_that_is_no_square():
    assert allowed_token_budgets(6, 4) == [24, 6]


@pytest.mark.parametrize("given, stored", [([1, 144, 36, 36], [144, 36, 1]), ((9,), [9]), (None, None)])
def test_trained_budgets_are_stored_once_and_in_order(given, stored, tmp_path):
    config = LlavaSTFConfig(token_budgets=given)
    assert config.token_budgets == stored
    config.save_pretrained(tmp_path)
    assert LlavaSTFConfig.from_pretrained(tmp_path).token_budgets == stored


@pytest.mark.parametrize("budgets", [[], [144, 35], [576], [0], [-1]])
def test_trained_budgets_must_be_allowed(budgets, tmp_path):
    message = "token_budgets.*expected some of .144, 36, 16, 9, 4, 1."
    with pytest.raises(ValueError, match=message):
        LlavaSTFConfig(token_budgets=budgets)
    LlavaSTFConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        LlavaSTFConfig.from_pretrained(tmp_path, token_budgets=budgets)


BAD = [5, 0, -4, 16.0, "4", True, [], [4], [4, 4, 4], [4, 5], [4, None], {"4": 4}]


@pytest.mark.parametrize("asked", BAD, ids=str)
@pytest.mark.parametrize("scope", [None, "images_kwargs"])
def test_other_budgets_are_refused(asked, scope, inputs_of):
    kwargs = {"max_soft_tokens": asked}
    with pytest.raises(ValueError, match=r"max_soft_tokens.*\[16, 4, 1\]"):
        inputs_of(TWO, **({scope: kwargs} if scope else kwargs))


@pytest.mark.parametrize("asked", [asked for asked in BAD if asked != []], ids=str)
@pytest.mark.parametrize("scope", [None, "images_kwargs", "videos_kwargs", "common_kwargs"])
def test_other_budgets_are_refused_without_pictures(asked, scope, inputs_of):
    kwargs = {"max_soft_tokens": asked}
    with pytest.raises(ValueError, match=r"max_soft_tokens.*0 pictures.*\[16, 4, 1\]"):
        inputs_of(TEXT, **({scope: kwargs} if scope else kwargs))


@pytest.mark.parametrize("asked", [None, 16, 4, torch.tensor(1), []], ids=str)
def test_budgets_without_pictures_change_nothing(asked, inputs_of):
    inputs, default = inputs_of(TEXT, TEXT, max_soft_tokens=asked), inputs_of(TEXT, TEXT)
    assert [*default] == [*inputs] == ["input_ids", "attention_mask"]
    assert all(torch.equal(inputs[name], default[name]) for name in default)


def test_budgets_of_what_is_not_there_are_checked(inputs_of, small_processor, pictures, picture):
    """Images without videos, with text and alone, and the other way round; a flat list is that of what is there."""
    wrong, right = {"max_soft_tokens": 5}, {"max_soft_tokens": 4}
    with pytest.raises(ValueError, match=r"5 for 0 pictures.*\[16, 4, 1\]"):
        inputs_of(ONE, videos_kwargs=wrong)
    with pytest.raises(ValueError, match=r"5 for 0 pictures.*\[16, 4, 1\]"):
        small_processor(images=pictures, videos_kwargs=wrong)
    with pytest.raises(ValueError, match=r"5 for 0 pictures.*\[16, 4, 1\]"):
        small_processor(videos=[[picture("frame_0.png")]], text="<video>", images_kwargs=wrong)
    assert "image_tokens" not in inputs_of(ONE, videos_kwargs=right)
    assert inputs_of(TWO, max_soft_tokens=[4, 1])["image_tokens"] == [4, 1]


@pytest.mark.parametrize("asked", [0, -4, 16.0, "4", True, [4, None], {"4": 4}], ids=str)
def test_an_image_processor_alone_refuses_what_no_model_allows(asked, small_processor, pictures):
    """It knows neither patches nor window, so that it cannot refuse 5; its pixels never depend on the number."""
    image_processor = small_processor.image_processor
    with pytest.raises(ValueError, match="max_soft_tokens.*at least 1.*allowed_token_budgets"):
        image_processor(pictures, max_soft_tokens=asked)
    default = image_processor(pictures, return_tensors="pt")
    for number in (4, [1, 16, 4], torch.tensor(4), 5):
        outputs = image_processor(pictures, max_soft_tokens=number, return_tensors="pt")
        assert [*outputs] == [*default] == ["pixel_values"]
        assert torch.equal(outputs["pixel_values"], default["pixel_values"])


@pytest.mark.parametrize("numbers", [[4], [4, 4, 4], [4, 5], [0, 4], torch.tensor([4, 5])], ids=str)
def test_the_model_refuses_other_budgets(numbers, small, inputs_of):
    inputs = inputs_of(TWO)
    with pytest.raises(ValueError, match=r"image_tokens.*2 images.*\[16, 4, 1\]"):
        small.get_image_features(inputs["pixel_values"], numbers)
    with pytest.raises(ValueError, match=r"image_tokens.*2 images.*\[16, 4, 1\]"):
        small(**inputs | {"image_tokens": numbers})


@pytest.mark.parametrize(
    "numbers",
    [[4.0, 4.0], torch.tensor([4.0, 4.0]), np.array([4.0, 4.0]), [True, 4], [[[4], [4]]], iter([4, 4]), "44", 4],
    ids=["floats", "tensor", "array", "true", "nested twice", "iterator", "text", "one number"],
)
def test_the_model_refuses_what_are_no_whole_numbers(numbers, small, inputs_of):
    """A collator of torch puts the first pictures of all prompts into one tensor: that is another order."""
    inputs = inputs_of(TWO, max_soft_tokens=4)
    for call in (small, small.generate):
        for wrong in (numbers, [torch.tensor([4, 4])]):
            with pytest.raises(
                ValueError, match=r"(?s)image_tokens.*2 images.*one whole number for each.*\[16, 4, 1\]"
            ):
                call(**inputs | {"image_tokens": wrong})


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_budgets_may_be_in_a_list_for_each_prompt(kwargs, small, inputs_of):
    inputs = inputs_of(TWO, TEXT, ONE, max_soft_tokens=[1, 16, 4])
    for numbers in ([[1, 16], [], [4]], ([1, 16], (4,)), [np.int64(1), 16, 4], np.array([1, 16, 4])):
        nested = inputs | {"image_tokens": numbers}
        assert torch.equal(small(**nested).logits, small(**inputs).logits)
        assert torch.equal(generate(small, nested, **kwargs), generate(small, inputs, **kwargs))
    with pytest.raises(ValueError, match="in runs of"):
        small(**inputs | {"image_tokens": [[16, 1], [4]]})


def test_pixels_without_their_budget_are_refused(small, inputs_of):
    inputs = inputs_of(ONE, max_soft_tokens=4)
    del inputs["image_tokens"]
    with pytest.raises(ValueError, match="4 image tokens, the images give 16.*`image_tokens`"):
        small(**inputs)


# Processor


@pytest.mark.parametrize("asked", [None, 16, [16, 16]])
def test_full_budget_is_the_default_call(asked, inputs_of, small_processor):
    inputs, default = inputs_of(TWO, max_soft_tokens=asked), inputs_of(TWO)
    assert [*default] == [*inputs] == ["input_ids", "attention_mask", "pixel_values"]
    assert all(torch.equal(inputs[name], default[name]) for name in default)


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
@pytest.mark.parametrize(
    "asked, expected", [(4, [4, 4, 4]), (1, [1, 1, 1]), ([1, 16, 4], [1, 16, 4]), ((4, 1, 16), [4, 1, 16])]
)
def test_pictures_have_the_tokens_asked_for(asked, expected, return_tensors, small_processor, pictures):
    call = {"images": pictures, "text": [TWO, ONE], "padding": True, "return_tensors": return_tensors}
    inputs, default = small_processor(**call, max_soft_tokens=asked), small_processor(**call)
    assert inputs["image_tokens"] == expected
    assert all(type(number) is int for number in inputs["image_tokens"])
    assert placeholders(inputs, small_processor) == [sum(expected[:2]), expected[2]]
    assert torch.equal(torch.as_tensor(inputs["pixel_values"]), torch.as_tensor(default["pixel_values"]))
    scoped = small_processor(**call, images_kwargs={"max_soft_tokens": asked})
    assert scoped["image_tokens"] == expected


@pytest.mark.parametrize(
    "images, videos, expected",
    [
        (4, 1, [4, 1, 1, 4]),
        (None, 4, [16, 4, 4, 16]),
        (1, None, [1, 16, 16, 1]),
        ([4, 1], [16], [4, 16, 16, 1]),
        ([16, 4], [1, 4], [16, 1, 4, 4]),
    ],
)
def test_frames_have_a_budget_of_their_own(images, videos, expected, small_processor, pictures, picture):
    frames = [picture(f"frame_{index}.png") for index in range(2)]
    inputs = small_processor(
        images=pictures[:2],
        videos=[frames],
        text="<image> <video> <image>",
        images_kwargs={"max_soft_tokens": images},
        videos_kwargs={"max_soft_tokens": videos},
        return_tensors="pt",
    )
    expected = [16 if number is None else number for number in expected]
    assert inputs.get("image_tokens", [16] * 4) == expected
    runs = "".join("x" if token == small_processor.image_token_id else " " for token in inputs["input_ids"][0]).split()
    assert [len(run) for run in runs] == [expected[0], sum(expected[1:3]), expected[3]]


def test_a_flat_number_is_for_pictures_and_frames(small_processor, pictures, picture):
    media = {"images": pictures[0], "videos": [[picture("frame_0.png")]], "text": "<video><image>"}
    assert small_processor(**media, max_soft_tokens=4)["image_tokens"] == [4, 4]
    with pytest.raises(ValueError, match="images_kwargs.*videos_kwargs"):
        small_processor(**media, max_soft_tokens=[4])


def test_frames_of_the_default_budget_add_no_key(small_processor, picture):
    frames = [picture("frame_0.png"), picture("frame_1.png")]
    assert [*small_processor(videos=[frames], text="<video>")] == ["input_ids", "attention_mask", "pixel_values"]


@pytest.fixture
def saved_default(small_processor, tmp_path):
    """A folder whose processor gives each picture 4 tokens by default."""
    folder = shutil.copytree(DEFAULT_MODEL, tmp_path / "four")
    small_processor.image_processor.max_soft_tokens = 4
    small_processor.save_pretrained(folder)
    return folder


def test_default_budget_is_saved_and_loaded(saved_default, small_processor, pictures):
    assert '"max_soft_tokens": 4' in (saved_default / "processor_config.json").read_text(encoding="utf-8")
    processor = LlavaSTFProcessor.from_pretrained(saved_default)
    assert processor.tokens_per_image == 4
    for kwargs, expected in (({}, [4]), ({"max_soft_tokens": 1}, [1])):
        inputs = processor(images=pictures[0], text=ONE, **kwargs)
        assert inputs["image_tokens"] == expected
        assert processor._get_num_multimodal_tokens([(9, 9)], **kwargs)["num_image_tokens"] == expected
    assert "image_tokens" not in processor(images=pictures[0], text=ONE, max_soft_tokens=16)


def test_a_default_that_is_not_allowed_is_refused_when_loaded(saved_default):
    file = saved_default / "processor_config.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"max_soft_tokens": 4', '"max_soft_tokens": 5'))
    with pytest.raises(ValueError, match=r"max_soft_tokens.*\[16, 4, 1\]"):
        LlavaSTFProcessor.from_pretrained(saved_default)


@pytest.mark.parametrize("number", [4, np.int64(4), torch.tensor(4)], ids=["int", "numpy", "torch"])
def test_a_default_given_when_loading_is_saved_in_one_place(number, tmp_path):
    processor = LlavaSTFProcessor.from_pretrained(DEFAULT_MODEL, max_soft_tokens=number, alpha_background="white")
    assert processor.tokens_per_image == 4
    processor.save_pretrained(tmp_path)
    assert LlavaSTFProcessor.from_pretrained(tmp_path).tokens_per_image == 4
    settings = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.glob("*.json")}
    for name in ("max_soft_tokens", "alpha_background"):
        assert [file for file, text in settings.items() if f'"{name}"' in text] == ["processor_config.json"]


def test_the_error_says_what_was_given_and_what_its_pictures_allow(small_processor, pictures, picture):
    small = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    with pytest.raises(ValueError, match=r"is 16 for 1 pictures or frames, expected one of \[4, 1\]"):
        small_processor(images=pictures[0], max_soft_tokens=16, **small)
    frames = [picture("frame_0.png"), picture("frame_1.png")]
    with pytest.raises(ValueError, match=r"is \[\[4, 1\], \[4\]\] for 3 pictures or frames"):
        small_processor(videos=[frames, frames[:1]], text="<video><video>", max_soft_tokens=[[4, 1], [4]])


def test_nothing_about_budgets_is_saved_by_default(small_processor, tmp_path):
    small_processor.save_pretrained(tmp_path)
    assert "max_soft_tokens" not in (tmp_path / "processor_config.json").read_text(encoding="utf-8")
    LlavaSTFConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")).get("token_budgets") is None


def test_serving_engines_count_budgets(small_processor):
    sizes = [(10, 20), (336, 336)]
    for kwargs in ({"max_soft_tokens": 4}, {"images_kwargs": {"max_soft_tokens": 4}}):
        data = small_processor._get_num_multimodal_tokens(image_sizes=sizes, **kwargs)
        assert (data["num_image_tokens"], data["num_image_patches"]) == ([4, 4], [1, 1])
    assert small_processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] == [16, 16]
    with pytest.raises(ValueError, match=r"\[16, 4, 1\]"):
        small_processor._get_num_multimodal_tokens(image_sizes=sizes, max_soft_tokens=7)


# Features


def matryoshka(features, budget):
    """M3 (arXiv 2405.17430): the projector's tokens, (T, D), averaged over windows of their grid."""
    side = math.isqrt(len(features))
    grid = features.T.unflatten(1, (side, side))[None]
    return avg_pool2d(grid, side // math.isqrt(budget))[0].flatten(1).T


@torch.no_grad()
@pytest.mark.parametrize("budget", [4, 1])
def test_pooling_before_the_last_layer_is_that_of_m3(budget, small, inputs_of):
    pixels = inputs_of(TWO)["pixel_values"]
    full = small.get_image_features(pixels).pooler_output
    pooled = small.get_image_features(pixels, [budget] * 2).pooler_output
    scale = max(tokens.abs().max() for tokens in full)
    for tokens, few in zip(full, pooled, strict=True):
        expected = matryoshka(tokens, budget)
        assert few.shape == (budget, tokens.shape[1])
        torch.testing.assert_close(few / scale, expected / scale, **ROUNDING)
        wrong = tokens.unflatten(0, (budget, -1)).mean(1)  # runs of tokens instead of windows
        assert budget == 1 or (few - wrong).abs().max() > 0.01 * scale


@torch.no_grad()
def test_full_budget_is_today_s_path_bit_for_bit(small, inputs_of):
    inputs = inputs_of(TWO)
    for numbers in ([16, 16], torch.tensor([16, 16])):
        features = small.get_image_features(inputs["pixel_values"], numbers).pooler_output
        expected = small.get_image_features(inputs["pixel_values"]).pooler_output
        assert all(torch.equal(found, tokens) for found, tokens in zip(features, expected, strict=True))
        assert torch.equal(small(**inputs, image_tokens=numbers).logits, small(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("numbers", [[4, 4, 4], [1, 16, 1], [16, 4, 1], [4, 4, 1]], ids=str)
def test_pictures_of_several_budgets_at_once(numbers, small, inputs_of, monkeypatch):
    pixels = inputs_of(TWO, ONE)["pixel_values"]
    alone = [
        small.get_image_features(image[None], [n]).pooler_output[0] for image, n in zip(pixels, numbers, strict=True)
    ]
    for images_per_pass in (32, 2, 1):
        monkeypatch.setattr(type(small.model), "_images_per_pass", lambda self, size=images_per_pass: size)
        for form in (numbers, tuple(numbers), torch.tensor(numbers)):
            together = small.get_image_features(pixels, form).pooler_output
            for found, expected in zip(together, alone, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_videos_of_frames_and_their_budgets(small, inputs_of):
    pixels = inputs_of(TWO)["pixel_values"]
    flat = small.get_image_features(pixels, [4, 1]).pooler_output
    nested = small.get_image_features(pixels[None], torch.tensor([[4, 1]])).pooler_output
    assert all(torch.equal(a, b) for a, b in zip(flat, nested, strict=True))


def test_an_untrained_budget_warns_once(inputs_of, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    messages = []
    for budgets in ([16, 4], None):
        model = LlavaSTFForConditionalGeneration.from_pretrained(DEFAULT_MODEL, token_budgets=budgets)
        module = __import__(type(model).__module__, fromlist=["logger"])
        type(module.logger).warning_once.cache_clear()
        caplog.clear()
        for asked in (4, 4, 16, [1, 4], [1, 1]):
            inputs = inputs_of(TWO, max_soft_tokens=asked)
            model.get_image_features(inputs["pixel_values"].to(model.dtype), inputs.get("image_tokens"))
        messages.append([record.message for record in caplog.records if "was trained for" in record.message])
    assert len(messages[0]) == 1 and "[16, 4]" in messages[0][0] and "asked for [1]" in messages[0][0]
    assert len(messages[1]) == 3 and "trained for [16]" in messages[1][0]


# Every way to generate


BUDGETS = {"one for all": ((TWO, TEXT, ONE), 4), "one each": ((TWO, TEXT, ONE), [1, 16, 4])}


@pytest.fixture(params=BUDGETS.values(), ids=BUDGETS)
def batch(request, inputs_of):
    prompts, asked = request.param
    return inputs_of(*prompts, max_soft_tokens=asked)


def test_batch_equals_each_prompt_alone(small, small_processor, pictures, inputs_of):
    tokens = generate(small, inputs_of(TWO, TEXT, ONE, max_soft_tokens=[1, 16, 4]))
    alone = [
        inputs_of(TWO, max_soft_tokens=[1, 16]),
        inputs_of(TEXT),
        dict(small_processor(images=pictures[2], text=ONE, max_soft_tokens=4, return_tensors="pt")),
    ]
    for row, inputs in zip(tokens, alone, strict=True):
        assert torch.equal(row, generate(small, inputs)[0])


def test_fewer_tokens_are_another_prompt(small, inputs_of):
    logits = [small(**inputs_of(ONE, max_soft_tokens=budget)).logits[0, -1] for budget in (16, 4, 1)]
    assert all((one - other).abs().max() > 0.1 for one, other in zip(logits, logits[1:], strict=False))
    lengths = [inputs_of(ONE, max_soft_tokens=budget)["input_ids"].shape[1] for budget in (16, 4, 1)]
    assert lengths[0] - lengths[1] == 12 and lengths[1] - lengths[2] == 3


@pytest.mark.parametrize("kwargs", [{"cache_implementation": "static"}, {"use_cache": False}], ids=["static", "none"])
def test_every_cache_gives_the_same_tokens(kwargs, batch, small):
    assert torch.equal(generate(small, batch, **kwargs), generate(small, batch))


@pytest.mark.parametrize("tensor", [False, True])
def test_beams_equal_those_of_each_prompt_alone(tensor, small, small_processor, pictures, inputs_of):
    beams = {"num_beams": 3, "num_return_sequences": 2}
    inputs = inputs_of(TWO, ONE, max_soft_tokens=[1, 16, 4])
    if tensor:
        inputs["image_tokens"] = torch.tensor(inputs["image_tokens"])
    rows = generate(small, inputs, **beams)
    assert torch.equal(rows[:2], generate(small, inputs_of(TWO, max_soft_tokens=[1, 16]), **beams))
    alone = small_processor(images=pictures[2], text=ONE, max_soft_tokens=4, return_tensors="pt")
    assert torch.equal(rows[2:], generate(small, dict(alone), **beams))


@pytest.mark.parametrize("size", [3, 1000])
def test_chunked_prefill_is_right_or_refused(size, batch, small):
    try:
        tokens = generate(small, batch, prefill_chunk_size=size)
    except ValueError as error:  # see test_generation.py
        assert "image tokens" in str(error) and Version(transformers.__version__) < Version("5.23")
    else:
        assert torch.equal(tokens, generate(small, batch))


def test_assisted_decoding_equals_greedy(small, inputs_of):
    inputs = inputs_of(TWO, max_soft_tokens=[4, 1])
    for kwargs in ({"assistant_model": small}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(generate(small, inputs, **kwargs), generate(small, inputs))


def test_samples_see_the_images_of_their_prompt(batch, small):
    expected = small(**batch).logits[:, -1]
    kwargs = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 1, "min_new_tokens": 1}
    output = small.generate(**batch, **kwargs, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(output.logits[0], expected.repeat_interleave(2, dim=0), rtol=0, atol=1e-4)


def test_a_cache_is_continued_without_pixels(small, inputs_of):
    inputs = inputs_of(ONE, max_soft_tokens=4)
    outputs = small(**inputs, use_cache=True)
    token = outputs.logits[:, -1:].argmax(-1)
    step = small(token, image_tokens=inputs["image_tokens"], **{CACHE: outputs[CACHE]}).logits
    ids = torch.cat([inputs["input_ids"], token], dim=1)
    full = small(ids, pixel_values=inputs["pixel_values"], image_tokens=[4]).logits
    torch.testing.assert_close(step[:, -1], full[:, -1], rtol=0, atol=1e-4)


@pytest.fixture(params=[[16, 16], [4, 16], [4, 1]], ids=str)
def later_turn(request, small, small_processor, pictures):
    """Inputs of the second turn of two conversations on a cache; and those of the whole conversations."""
    turns = [ONE, f"{ONE} Red.</s>{ONE}"]
    first, second = pictures[:2], [pictures[1], pictures[0]]
    call = {"return_tensors": "pt", "padding": True}
    begun = small_processor(images=first, text=turns[:1] * 2, max_soft_tokens=request.param[0], **call)
    both = [picture for pair in zip(first, second, strict=True) for picture in pair]
    whole = dict(small_processor(images=both, text=turns[1:] * 2, max_soft_tokens=request.param * 2, **call))
    cache = DynamicCache(config=small.config.text_config)
    with torch.no_grad():
        small(**begun, use_cache=True, **{CACHE: cache})
    new = dict(small_processor(images=second, max_soft_tokens=request.param[1], **call))
    return {name: whole[name] for name in ("input_ids", "attention_mask")} | new | {CACHE: cache}, whole


@pytest.mark.parametrize("beams", [1, 2])
def test_later_turns_with_new_pictures_on_the_same_cache(beams, later_turn, small):
    """Its ids have the places of the first turn's pictures, too."""
    inputs, whole = later_turn
    if beams > 1:
        inputs[CACHE].batch_repeat_interleave(beams)
    assert torch.equal(generate(small, inputs, num_beams=beams), generate(small, whole, num_beams=beams))


@pytest.mark.parametrize("size", [3, 1000])
def test_later_turns_in_a_chunked_prefill_are_right_or_refused(size, later_turn, small):
    inputs, whole = later_turn
    if Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(ValueError, match="loses new pictures in a chunked prefill on a given cache"):
            generate(small, inputs, prefill_chunk_size=size)
    else:
        assert torch.equal(generate(small, inputs, prefill_chunk_size=size), generate(small, whole))


def test_static_cache_of_a_compiled_length(small, inputs_of):
    inputs = inputs_of(ONE, max_soft_tokens=4)
    cache = StaticCache(config=small.config.text_config, max_cache_len=64)
    assert torch.equal(generate(small, inputs, cache=cache), generate(small, inputs))


def test_pipeline(small, small_processor, pictures):
    chat = [{"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "What?"}]}]
    options = {"max_soft_tokens": 4}
    inputs = small_processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
    )
    assert inputs["image_tokens"] == [4] and placeholders(inputs, small_processor) == [4]
    tokens = generate(small, dict(inputs))
    piped = pipeline("image-text-to-text", model=small, processor=small_processor, device=small.device)
    kwargs = {"generate_kwargs": EIGHT, "return_full_text": False}
    answer = piped(text=chat, processor_kwargs=options, **kwargs)[0]["generated_text"]
    assert answer.strip() == small_processor.decode(tokens[0], skip_special_tokens=True).strip()
    assert answer != piped(text=chat, **kwargs)[0]["generated_text"]


def test_pipeline_of_batches(small, small_processor, pictures):
    """Its batch has a list of numbers for each prompt."""
    chats = [
        [{"role": "user", "content": [*({"type": "image", "image": picture} for picture in images), TEXT_PART]}]
        for images in (pictures[:1], pictures[1:])
    ]
    piped = pipeline("image-text-to-text", model=small, processor=small_processor)
    options = {"processor_kwargs": {"max_soft_tokens": 4, "padding": True}, "generate_kwargs": EIGHT}
    answers = piped(text=chats, batch_size=2, **options)
    assert [answer[0]["generated_text"] for answer in answers] == [
        piped(text=chat, **options)[0]["generated_text"] for chat in chats
    ]


# Training and compiling


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_mixed_batch(checkpointing, inputs_of):
    model = LlavaSTFForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype=torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = inputs_of(TWO, ONE, max_soft_tokens=[1, 16, 4])
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    with torch.no_grad():
        expected = model.eval()(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for weight in model.model.multi_modal_projector.parameters():
        assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("budget", [4, 1])
def test_a_budget_compiles_to_one_graph(budget, small, inputs_of, counters):
    inputs = inputs_of(TWO, ONE, max_soft_tokens=budget)
    with torch.no_grad():
        expected = small(**inputs).logits
        compiled = torch.compile(small, fullgraph=True, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-5, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_images_of_any_kind_give_their_budget_alone(small_processor):
    """Without text, as a cache of features needs it."""
    inputs = small_processor(images=[Image.new("RGB", (40, 20)), Image.new("L", (5, 50))], max_soft_tokens=[1, 4])
    assert inputs["image_tokens"] == [1, 4] and len(inputs["pixel_values"]) == 2


# Pictures that are read once, and the command lines


QUESTIONS = ("Which color does the circle have?", "Is there a star?")


def chat_inputs(processor, picture, question, **kwargs):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=kwargs,
    )


def test_many_questions_about_pictures_of_several_budgets(small, small_processor, pictures):
    caches = [PictureCache(small, small_processor, pictures[0], max_soft_tokens=budget) for budget in (4, 1, None)]
    inputs = [
        chat_inputs(small_processor, pictures[0], question, max_soft_tokens=budget)
        for budget in (4, 1, None)
        for question in QUESTIONS
    ]
    rows = [(cache, question) for cache in caches for question in QUESTIONS]
    tokens = generate_many(*zip(*rows, strict=True), **EIGHT)
    for (cache, question), whole, row in zip(rows, inputs, tokens, strict=True):
        assert cache.prompt(question) == whole["input_ids"][0].tolist()
        assert torch.equal(row, generate(small, whole)[0])
    later = caches[0].after(QUESTIONS[0], "Red.")
    assert later.prompt("Why?").count(small_processor.image_token_id) == 4
    both = PictureCache(small, small_processor, pictures[:2], max_soft_tokens=[16, 1])
    assert both.prompt("Why?").count(small_processor.image_token_id) == 17
    with pytest.raises(ValueError, match=r"\[16, 4, 1\]"):
        PictureCache(small, small_processor, pictures[0], max_soft_tokens=9)


def test_default_budget_acts_everywhere(small, saved_default, pictures):
    processor = LlavaSTFProcessor.from_pretrained(saved_default)
    cache = PictureCache(small, processor, pictures[0])
    inputs = chat_inputs(processor, pictures[0], QUESTIONS[0])
    assert inputs["image_tokens"] == [4] and cache.prompt(QUESTIONS[0]) == inputs["input_ids"][0].tolist()
    assert torch.equal(generate_many([cache], QUESTIONS[:1], **EIGHT), generate(small, inputs))


def test_a_call_asks_for_all_tokens_over_a_default_budget(small, saved_default, pictures):
    processor = LlavaSTFProcessor.from_pretrained(saved_default)
    inputs = chat_inputs(processor, pictures[0], QUESTIONS[0], max_soft_tokens=16)
    cache = PictureCache(small, processor, pictures[0], max_soft_tokens=16)
    assert cache.prompt(QUESTIONS[0]) == inputs["input_ids"][0].tolist()
    assert torch.equal(generate_many([cache], QUESTIONS[:1], **EIGHT), generate(small, inputs))
    captioner = Captioner(processor, small, 8, {"max_soft_tokens": 16})
    prepared = captioner.prepare(Row("one", QUESTIONS[0], DEFAULT_MODEL.parent / "demo_stranger.png"))
    whole = chat_inputs(processor, DEFAULT_MODEL.parent / "demo_stranger.png", QUESTIONS[0], max_soft_tokens=16)
    assert prepared.ids == whole["input_ids"][0].tolist() and captioner.answer([prepared])[0].error is None


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        return main(), *capsys.readouterr()

    yield run
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.enable_progress_bar()


def test_ask_with_a_budget(command):
    picture = DEFAULT_MODEL.parent / "demo.png"
    status, output, _ = command("ask", picture, QUESTIONS[0], "--max-soft-tokens", 4)
    assert status == 0 and "tokens    4 for the picture, LLaVA-1.5 would take 64" in output
    status, output, error = command("ask", picture, QUESTIONS[0], "--max-soft-tokens", 9)
    assert (status, output, error.count("\n")) == (2, "", 1) and "[16, 4, 1]" in error


def test_caption_with_a_budget(command, small_processor, pictures, tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "in").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "in" / f"{number}.png")
    arguments = ("caption", tmp_path / "in", tmp_path / "out", "--max-new-tokens", 4)
    status, output, error = command(*arguments, "--max-soft-tokens", 9)
    assert (status, output) == (2, "") and "[16, 4, 1]" in error and not (tmp_path / "out").exists()
    assert command(*arguments, "--max-soft-tokens", 1)[0] == 0
    lengths = [
        chat_inputs(small_processor, picture, "Describe the picture.", max_soft_tokens=1)["input_ids"].shape[1]
        for picture in pictures
    ]
    table = pyarrow_rows(tmp_path / "out" / "part-00000.parquet")
    assert [row["prompt_tokens"] for row in table] == lengths and not any(row["error"] for row in table)
    for options, now in ((("--max-soft-tokens", 4), 4), ((), None)):
        status, _, error = command(*arguments, *options)
        assert status == 2 and f"max_soft_tokens was 1, is {now}" in error


def pyarrow_rows(file):
    return pytest.importorskip("pyarrow.parquet").read_table(file).to_pylist()


def test_caption_asks_a_server_for_the_budget(monkeypatch, pictures, tmp_path):
    sent = []
    monkeypatch.setattr(Server, "_request", lambda self, path, content: sent.append(content) or {"choices": []})
    pictures[0].save(tmp_path / "one.png")
    for options in ({"max_soft_tokens": 4}, None):
        Server("http://127.0.0.1:1", "model", image_options=options).answer(Row("one", "What?", tmp_path / "one.png"))
    assert sent[0]["mm_processor_kwargs"] == {"max_soft_tokens": 4} and "mm_processor_kwargs" not in sent[1]


@pytest.mark.parametrize(
    "number", [np.int64(4), np.array(4), torch.tensor(4), [np.int32(4)] * 2, np.array([4, 4]), torch.tensor([4, 4])]
)
def test_numbers_of_numpy_and_torch(number, inputs_of):
    assert inputs_of(TWO, max_soft_tokens=number)["image_tokens"] == [4, 4]
    assert {type(tokens) for tokens in inputs_of(TWO, max_soft_tokens=number)["image_tokens"]} == {int}


@pytest.mark.parametrize("number", [np.int64(2), np.bool_(True), np.float64(4), torch.tensor(4.0), np.array([4, 2])])
def test_other_numbers_of_numpy_and_torch_are_refused(number, inputs_of):
    with pytest.raises(ValueError, match=r"expected one of \[16, 4, 1\]"):
        inputs_of(TWO, max_soft_tokens=number)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_beams": 2},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=["greedy", "beams", "chunks", "static", "lookup"],
)
def test_no_search_answers_without_the_budgets(kwargs, small, inputs_of):
    inputs = inputs_of(TWO, max_soft_tokens=[4, 1])
    inputs.pop("image_tokens")
    with pytest.raises(ValueError, match="the text has 5 image tokens, the images give 32"):
        small.generate(**inputs, **EIGHT, **kwargs)
    with pytest.raises(ValueError, match="the text has 5 image tokens, the images give 32"):
        small.generate(inputs.pop("input_ids"), **inputs, **EIGHT, **kwargs)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("prompts", [[TWO], [ONE, ONE]], ids=["one prompt", "two prompts"])
def test_budgets_in_another_order_are_refused(prompts, tensor, small, inputs_of):
    inputs = inputs_of(*prompts, max_soft_tokens=[4, 1])
    inputs["image_tokens"] = torch.tensor([1, 4]) if tensor else [1, 4]
    for call in (small, small.generate):
        with pytest.raises(ValueError, match=r"is \[1, 4\], but the text has image tokens in runs of \[4, 1\]"):
            call(**inputs)


def test_neighbours_have_no_text_in_between(small, inputs_of):
    inputs = inputs_of("USER: <image><image>\nWhat differs? ASSISTANT:", max_soft_tokens=[4, 1])
    by_embeddings = {**inputs, "inputs_embeds": small.get_input_embeddings()(inputs["input_ids"])}
    del by_embeddings["input_ids"]
    assert torch.equal(small(**inputs).logits, small(**by_embeddings).logits)
    assert torch.equal(generate(small, inputs), small.generate(**by_embeddings, **EIGHT))


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="outputs have no images of their own")
def test_outputs_have_the_encoded_images(small, inputs_of):
    inputs = inputs_of(TWO, max_soft_tokens=[4, 1])
    outputs = small.model(**inputs)
    encoded = outputs.image_outputs.pooler_output if "image_outputs" in outputs else outputs.image_hidden_states
    assert len(torch.cat([*encoded])) == 5


# An option has an effect, or is refused


@pytest.mark.parametrize("option", [{"max_soft_tokens": 4}, {"alpha_background": "white"}, {"do_pad": False}], ids=str)
@pytest.mark.parametrize("scope", ["text_kwargs", "audio_kwargs"])
def test_options_of_pictures_among_those_of_text_are_refused(scope, option, inputs_of, small_processor, pictures):
    message = f"`{scope}` has {[*option][0]}: an option of pictures has no effect there. .*`images_kwargs`"
    for prompt in (ONE, TEXT):
        with pytest.raises(ValueError, match=message):
            inputs_of(prompt, **{scope: option})
    with pytest.raises(ValueError, match=message):
        chat_inputs(small_processor, pictures[0], "What?", **{scope: option})
    assert "image_tokens" not in inputs_of(ONE, text_kwargs={"add_special_tokens": True}, audio_kwargs={})


@pytest.mark.parametrize("loader", [LlavaSTFProcessor, AutoProcessor], ids=["class", "auto"])
@pytest.mark.parametrize(
    "scope", ["images_kwargs", "videos_kwargs", "text_kwargs", "common_kwargs", "processor_kwargs"]
)
def test_a_default_in_a_dictionary_is_refused_when_loaded(scope, loader):
    """transformers keeps none of these dictionaries; it writes them to the tokenizer's settings."""
    with pytest.raises(ValueError, match=rf"`from_pretrained` got {scope}, .*from_pretrained\(..., max_soft_tokens=36"):
        loader.from_pretrained(DEFAULT_MODEL, **{scope: {"max_soft_tokens": 4}})
    assert loader.from_pretrained(DEFAULT_MODEL, **{scope: {}}).tokens_per_image == 16


def test_transformers_keeps_no_dictionary_of_a_call(small_processor):
    """The refusal can become a default of pictures alone when this fails on the oldest supported version."""
    parts = [small_processor.image_processor, small_processor.tokenizer]
    stock = LlavaProcessor.from_args_and_dict(parts, {}, images_kwargs={"do_pad": False})
    assert not getattr(stock, "images_kwargs", None)


def test_a_processor_is_built_without_unknown_options(small_processor):
    parts = (small_processor.image_processor, small_processor.tokenizer, small_processor.patch_size, 2, "default")
    assert LlavaSTFProcessor(*parts).tokens_per_image == 16
    with pytest.raises(TypeError, match="max_soft_tokens"):
        LlavaSTFProcessor(*parts, max_soft_tokens=4)


def test_a_default_beside_the_image_processor_is_refused_when_loaded(saved_default):
    file = saved_default / "processor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for name, value in (("max_soft_tokens", 4), ("do_pad", False)):
        file.write_text(json.dumps(settings | {name: value}), encoding="utf-8")
        with pytest.raises(ValueError, match=f"{name} beside `image_processor`, where it has no effect"):
            LlavaSTFProcessor.from_pretrained(saved_default)


def test_a_default_that_is_saved_where_nobody_reads_it_is_refused_when_loaded(saved_default):
    """An image processor that is saved alone writes a file that transformers does not read beside the other one."""
    image_processor = LlavaSTFImageProcessor.from_pretrained(saved_default)
    image_processor.save_pretrained(saved_default)
    file = saved_default / "preprocessor_config.json"
    alike = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(alike | {"size": 128, "crop_size": 128}), encoding="utf-8")  # as CLIP's files have them
    assert LlavaSTFProcessor.from_pretrained(saved_default).tokens_per_image == 4
    image_processor.max_soft_tokens, image_processor.do_pad = 1, False
    image_processor.save_pretrained(saved_default)
    assert LlavaSTFImageProcessor.from_pretrained(saved_default).max_soft_tokens == 4
    with pytest.raises(ValueError, match=r"different values of do_pad, max_soft_tokens.*reads only the first file"):
        LlavaSTFProcessor.from_pretrained(saved_default)


@pytest.mark.parametrize("number", [np.int64(4), torch.tensor(4)], ids=["numpy", "torch"])
def test_a_default_that_is_set_later_is_saved(number, small_processor, tmp_path):
    small_processor.image_processor.max_soft_tokens = number
    small_processor.save_pretrained(tmp_path)
    assert LlavaSTFProcessor.from_pretrained(tmp_path).image_processor.max_soft_tokens == 4


@pytest.mark.parametrize("number", [5, [4], True, 4.0], ids=str)
def test_a_default_that_could_not_be_loaded_is_not_saved(number, small_processor, tmp_path):
    small_processor.image_processor.max_soft_tokens = number
    with pytest.raises(ValueError, match=r"max_soft_tokens.*\[16, 4, 1\]"):
        small_processor.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]
