"""Every number is the original's: pixels, vision stages, logits, greedy tokens, loss and gradients."""

import pytest
import torch

PIXELS, ACTIVATIONS, LOSS = 1e-6, 1e-4, 1e-5


def forward_inputs(case, goldens, golden_tensors, processor):
    """The inputs of a golden forward case in our form: placeholders expanded, with their images' pixels."""
    name, per_image = case["name"], goldens["tokens_per_image"]
    ids = golden_tensors[f"forward.{name}.input_ids"]
    mask = golden_tensors.get(f"forward.{name}.attention_mask", torch.ones_like(ids))
    row_images = rows_of_images(case["images"], ids, mask)
    rows, pixels = [], []
    for row, row_mask, images in zip(ids, mask, row_images, strict=True):
        expanded = []
        for token in row[row_mask.bool()].tolist():
            frames = images.pop(0) if token == goldens["image_token_id"] else None
            expanded += [token] if frames is None else [processor.image_token_id] * per_image * len(frames)
            pixels += frames or []
        rows.append(torch.tensor(expanded))
    inputs = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True),
    }
    if pixels:
        table = pixel_table(goldens, golden_tensors)
        inputs["pixel_values"] = torch.stack([table[pixel] for pixel in pixels])
    return inputs


def rows_of_images(images, ids, mask):
    """Per row, the images of its placeholders, each as a list of frames; unused dummies are left out."""
    images = [image if isinstance(image, list) else [image] for image in images]
    rows = []
    for row, row_mask in zip(ids, mask, strict=True):
        placeholders = int((row[row_mask.bool()] == -200).sum())
        rows.append([images.pop(0) for _ in range(placeholders)])
        if not placeholders and images:
            images.pop(0)
    return rows


def pixel_table(goldens, golden_tensors):
    images = goldens["images"]
    table = dict(zip(images["files"], golden_tensors["pixel_values.pad"], strict=True))
    return table | dict(zip(images["frames"], golden_tensors["pixel_values.frames"], strict=True))


def test_pixels(goldens, golden_tensors, processor, picture):
    pictures = [picture(name) for name in goldens["images"]["files"]]
    for mode, do_pad in (("pad", True), ("none", False)):
        pixels = processor.image_processor(pictures, do_pad=do_pad, return_tensors="pt").pixel_values
        torch.testing.assert_close(pixels, golden_tensors[f"pixel_values.{mode}"], rtol=0, atol=PIXELS)


def test_pixels_of_files(goldens, golden_tensors, processor):
    """Paths, in the mode in which a file is stored (grey, transparent), give the same; padding is the default."""
    from conftest import GOLDENS

    paths = [str(GOLDENS / "images" / name) for name in goldens["images"]["files"]]
    pixels = processor(images=paths, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, golden_tensors["pixel_values.pad"], rtol=0, atol=PIXELS)


def vision_stages(model, pixel_values):
    """concat8, crosslayer, split and image_features of the goldens, caught at the fusion modules."""
    stages = {}
    fusion = model.model.multi_modal_projector
    fusion.block_fusion.register_forward_hook(lambda _, args, out: stages.update(concat8=args[0], crosslayer=out))
    fusion.spatial_fusion.linear_1.register_forward_hook(lambda _, args, out: stages.update(split=args[0]))
    with torch.no_grad():
        stages["image_features"] = torch.stack(model.model.get_image_features(pixel_values).pooler_output)
    return stages


def test_vision_stages(model, golden_tensors):
    stages = vision_stages(model, golden_tensors["pixel_values.pad"])
    for name in ("concat8", "crosslayer", "split", "image_features"):
        torch.testing.assert_close(stages[name], golden_tensors[f"vision.{name}"], rtol=0, atol=ACTIVATIONS)


def wrong_window_order(model):
    def position_major(features):
        side, k = fusion.grid // fusion.window, fusion.window
        return features.unflatten(1, (side, k, side, k)).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)

    fusion = model.model.multi_modal_projector.spatial_fusion
    fusion.windows = position_major


def wrong_tap_order(model):
    model.config.vision_feature_layer = sorted(model.config.vision_feature_layer)


def taps_off_by_one(model):
    model.config.vision_feature_layer = [tap - 1 for tap in model.config.vision_feature_layer]


def wrong_gelu(model):
    fusion = model.model.multi_modal_projector
    for module in (fusion.block_fusion, fusion.spatial_fusion):
        module.act = torch.nn.GELU(approximate="tanh")


@pytest.mark.parametrize("mistake", [wrong_window_order, wrong_tap_order, taps_off_by_one, wrong_gelu])
def test_vision_stages_tell_a_wrong_port(mistake, model, golden_tensors):
    mistake(model)
    stages = vision_stages(model, golden_tensors["pixel_values.pad"])
    error = (stages["image_features"] - golden_tensors["vision.image_features"]).abs().max()
    assert error > ACTIVATIONS


FORWARD_CASES = [
    "single_image",
    "text_only",
    "batch2_right_padded",
    "two_images_one_prompt",
    "two_images_adjacent",
    "image_at_end",
    "video_6d",
    "image_plus_text_row",
    "pretrain_projector",
    "lora_merged",
    "video_and_image",
]


def case_named(cases, name):
    return next(case for case in cases if case["name"] == name)


def test_every_forward_case_is_covered(goldens):
    # `truncated` is a fault of the original: it cuts through images; ours refuses.
    assert {case["name"] for case in goldens["forward"]} == {*FORWARD_CASES, "truncated"}


def logits_error(model, case, inputs, goldens, golden_tensors):
    expected = golden_tensors[f"forward.{case['name']}.logits"]
    with torch.no_grad():
        logits = model(**inputs).logits[..., : expected.shape[-1]]
    mask = inputs["attention_mask"].bool()
    assert logits.shape == expected.shape
    return (logits - expected)[mask].abs().max()


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_logits(name, goldens, golden_tensors, processor, load_model):
    case = case_named(goldens["forward"], name)
    inputs = forward_inputs(case, goldens, golden_tensors, processor)
    model = load_model(case["checkpoint"])
    assert logits_error(model, case, inputs, goldens, golden_tensors) < ACTIVATIONS


@pytest.mark.parametrize("mistake", [wrong_window_order, wrong_tap_order, taps_off_by_one, wrong_gelu])
def test_logits_tell_a_wrong_port(mistake, goldens, golden_tensors, processor, model):
    case = case_named(goldens["forward"], "single_image")
    inputs = forward_inputs(case, goldens, golden_tensors, processor)
    mistake(model)
    assert logits_error(model, case, inputs, goldens, golden_tensors) > ACTIVATIONS


def media_of(case, picture):
    """Prompt, images and videos of a golden case as a user gives them."""
    prompts, images, videos = [], [], []
    media = list(case["images"])
    for prompt in case.get("prompts") or [case["prompt"]]:
        pieces = prompt.split("<image>")
        text = pieces[0]
        for piece in pieces[1:]:
            item = media.pop(0)
            if isinstance(item, list):
                videos.append([picture(frame) for frame in item])
            else:
                images.append(picture(item))
            text += ("<video>" if isinstance(item, list) else "<image>") + piece
        prompts.append(text)
    return prompts, images or None, videos or None


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_logits_from_pictures_and_prompts(name, goldens, golden_tensors, processor, load_model, picture):
    """From a picture and a prompt to the original's logits, through the processor, padded on the left."""
    case = case_named(goldens["forward"], name)
    prompts, images, videos = media_of(case, picture)
    inputs = processor(images=images, text=prompts, videos=videos, padding=True, return_tensors="pt")
    model = load_model(case["checkpoint"])
    expected = golden_tensors[f"forward.{name}.logits"]
    with torch.no_grad():
        logits = model(**inputs).logits[..., : expected.shape[-1]]
    for row, mask, row_expected, length in zip(
        logits, inputs["attention_mask"].bool(), expected, case["row_lengths"], strict=True
    ):
        torch.testing.assert_close(row[mask], row_expected[:length], rtol=0, atol=ACTIVATIONS)


def test_greedy_tokens(goldens, processor, load_model, picture):
    for case in goldens["generate"]:
        prompts, images, videos = media_of(case, picture)
        inputs = processor(images=images, text=prompts, videos=videos, return_tensors="pt")
        output = load_model(case["checkpoint"]).generate(
            **inputs, do_sample=False, max_new_tokens=case["max_new_tokens"], **case["extra_generate_arguments"]
        )
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == case["new_tokens"], case["name"]


def loss_inputs(batch, goldens, golden_tensors, processor):
    """A golden training batch with its placeholders expanded; labels of image tokens are -100."""
    name = batch["name"]
    per_image = goldens["tokens_per_image"]
    rows, labels = [], []
    mask = golden_tensors[f"loss.{name}.attention_mask"].bool()
    for ids, targets, keep in zip(
        golden_tensors[f"loss.{name}.input_ids"], golden_tensors[f"loss.{name}.labels"], mask, strict=True
    ):
        repeats = torch.where(ids[keep] == goldens["image_token_id"], per_image, 1)
        row = ids[keep].repeat_interleave(repeats)
        rows.append(torch.where(row == goldens["image_token_id"], processor.image_token_id, row))
        labels.append(targets[keep].repeat_interleave(repeats))
    pad = torch.nn.utils.rnn.pad_sequence
    table = pixel_table(goldens, golden_tensors)
    return {
        "input_ids": pad(rows, batch_first=True, padding_value=0),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "pixel_values": torch.stack([table[image] for image in batch["images"] if image != "zeros"]),
    }


@pytest.mark.parametrize("name", ["sft_v1", "plain"])
def test_loss_and_connector_gradients(name, goldens, golden_tensors, processor, load_model):
    from conversion import to_original

    batch = case_named(goldens["loss"], name)
    model = load_model(batch["checkpoint"])
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    loss = model(**loss_inputs(batch, goldens, golden_tensors, processor)).loss
    assert abs(loss.item() - batch["loss"]) < LOSS
    loss.backward()
    gradients = to_original({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients.keys() == batch["grad_norms"].keys()
    for key, norm in batch["grad_norms"].items():
        assert gradients[key].norm().item() == pytest.approx(norm, rel=1e-4)
        if f"loss.{name}.grad.{key}" in golden_tensors:
            expected = golden_tensors[f"loss.{name}.grad.{key}"]
            torch.testing.assert_close(gradients[key], expected, atol=1e-5, rtol=1e-3)


def test_labels_of_images_are_ignored(processor, model, picture):
    """Collators that only mask the padding leave them in."""
    inputs = processor(images=picture("wide.png"), text="<image> What is it?", return_tensors="pt")
    everything = inputs["input_ids"].clone()
    text = everything.masked_fill(everything == processor.image_token_id, -100)
    assert model(**inputs, labels=everything).loss == model(**inputs, labels=text).loss
    shifted = torch.nn.functional.pad(everything, (0, 1), value=-100)[:, 1:]
    assert model(**inputs, labels=everything, shift_labels=shifted).loss == model(**inputs, labels=text).loss
