"""Pictures and videos: the same picture gives the same pixels whichever way it comes in, or an error."""

import base64
import http.server
import json
import os
import struct
import threading
import time
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import GOLDENS
from PIL import Image, ImageOps
from transformers import pipeline
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from modeling_llava_stf import LlavaSTFImageProcessor, LlavaSTFProcessor, processing_llava_stf
from modeling_llava_stf._bulk import read_input
from modeling_llava_stf.processing_llava_stf import _padded_and_resized, to_rgb

LOSSLESS = {"webp": {"lossless": True}}
MARKER, ROTATED = 274, 6  # EXIF's tag, and "turn it by 90 degrees to the right"
WHITE = {"alpha_background": "white"}


@pytest.fixture(scope="module")
def photo():
    """14 x 9 blocks of colours: wider than high, and no two corners alike."""
    blocks = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(blocks, np.ones((8, 8, 1), dtype=np.uint8)))


@pytest.fixture
def pixels(processor):
    def of(picture, **kwargs):
        return processor(images=picture, text="<image>", return_tensors="pt", **kwargs)["pixel_values"]

    return of


def rotated(photo, path):
    exif = Image.Exif()
    exif[MARKER] = ROTATED
    photo.save(path, exif=exif, **LOSSLESS.get(path.suffix[1:], {}))
    return path


def encoded(path):
    return base64.b64encode(path.read_bytes()).decode()


# One orientation

DOORS = {
    "path": lambda path: str(path),
    "Path": lambda path: path,
    "PIL": Image.open,
    "PIL in RGB": lambda path: Image.open(path).convert("RGB"),
    "bytes": lambda path: path.read_bytes(),
    "base64": encoded,
    "data URL": lambda path: f"data:image/{path.suffix[1:]};base64,{encoded(path)}",
    "dataset's bytes": lambda path: {"bytes": path.read_bytes(), "path": None},
    "dataset's path": lambda path: {"bytes": None, "path": str(path)},
    "list": lambda path: [str(path)],
}


@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("door", DOORS)
def test_a_photo_is_upright_by_every_door_or_by_none(door, ending, turn, photo, pixels, tmp_path):
    path = rotated(photo, tmp_path / f"photo.{ending}")
    lying = Image.open(path).convert("RGB")
    seen = np.asarray(lying.rotate(-90, expand=True) if turn else lying)
    assert torch.equal(pixels(DOORS[door](path), do_exif_transpose=turn), pixels(seen))
    assert not torch.equal(pixels(seen), pixels(np.asarray(lying if turn else lying.rotate(-90, expand=True))))


@pytest.mark.parametrize("marker", range(1, 9))
def test_every_orientation(marker, photo, pixels, tmp_path):
    exif = Image.Exif()
    exif[MARKER] = marker
    photo.save(tmp_path / "photo.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "photo.png"))
    for source in (upright, tmp_path / "photo.png", Image.open(tmp_path / "photo.png")):  # the first is turned already
        assert torch.equal(pixels(source), pixels(np.asarray(upright)))


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("marker", range(1, 9))
def test_a_tiff_is_upright_by_every_door(marker, mode, photo, pixels, tmp_path):
    """Pillow garbles some that it opens by their name, and turns all, whatever is asked."""
    exif = Image.Exif()
    exif[MARKER] = marker
    lying = grey_16_bit(photo, mode) if mode == "I;16" else photo.convert(mode)
    lying.save(tmp_path / "photo.tif", exif=exif)
    method = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(marker)
    colours = photo.convert("L") if mode == "I;16" else lying.convert("RGB")
    expected = pixels(np.asarray(colours if method is None else colours.transpose(method)))
    for door in ("path", "PIL", "bytes", "data URL"):
        assert torch.equal(pixels(DOORS[door](tmp_path / "photo.tif")), expected)


@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("key", ["image", "url", "path", "base64"])
def test_a_photo_in_a_chat_is_upright(key, turn, photo, processor, pixels, tmp_path):
    path = rotated(photo, tmp_path / "photo.png")
    source = encoded(path) if key == "base64" else str(path)
    messages = [{"role": "user", "content": [{"type": "image", key: source}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_exif_transpose": turn},
    )
    assert torch.equal(inputs["pixel_values"], pixels(np.asarray(photo.rotate(-90, expand=True) if turn else photo)))


def test_a_photo_in_a_pipeline_is_upright(photo, model, processor, pixels, tmp_path):
    path = rotated(photo, tmp_path / "photo.png")
    pipe = pipeline("image-text-to-text", model=model, processor=processor, device=model.device)
    upright = pixels(np.asarray(photo.rotate(-90, expand=True)))
    for source in (str(path), Image.open(path)):
        assert torch.equal(pipe.preprocess({"images": source, "text": "<image>"})["pixel_values"], upright)


def test_several_photos_and_frames_are_upright(photo, processor, pixels, tmp_path):
    path = rotated(photo, tmp_path / "photo.png")
    upright = np.asarray(photo.rotate(-90, expand=True))
    found = processor(images=[str(path), Image.open(path)], text="<image><image>", return_tensors="pt")
    assert torch.equal(found["pixel_values"], pixels(upright).expand(2, -1, -1, -1))
    for turn, seen in ((True, upright), (False, np.asarray(photo))):
        frames = processor(
            videos=[[str(path), Image.open(path)]], text="<video>", do_exif_transpose=turn, return_tensors="pt"
        )
        assert torch.equal(frames["pixel_values"], pixels(seen, do_pad=False).expand(2, -1, -1, -1))


def test_the_options_are_saved_and_loaded(photo, checkpoint, tmp_path):
    options = {"do_exif_transpose": False, "alpha_background": "white"}
    LlavaSTFProcessor.from_pretrained(checkpoint, **options).save_pretrained(tmp_path / "saved")
    path = rotated(photo, tmp_path / "photo.png")
    for image_processor in (
        LlavaSTFProcessor.from_pretrained(tmp_path / "saved").image_processor,
        LlavaSTFImageProcessor.from_pretrained(tmp_path / "saved"),
        LlavaSTFImageProcessor.from_pretrained(checkpoint, **options),
    ):
        assert {name: getattr(image_processor, name) for name in options} == options
        assert torch.equal(
            image_processor(str(path), return_tensors="pt").pixel_values,
            image_processor(photo, return_tensors="pt").pixel_values,
        )


def test_options_in_a_file_that_is_not_read_are_refused(checkpoint, tmp_path):
    """transformers reads processor_config.json, if there is one."""
    LlavaSTFProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    image_processor = LlavaSTFImageProcessor.from_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    assert LlavaSTFProcessor.from_pretrained(tmp_path).image_processor.do_pad
    image_processor.do_pad = False
    image_processor.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="processor_config.json and preprocessor_config.json have different values of do_pad"
    ):
        LlavaSTFProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("name, value", [("do_pad", False), ("do_exif_transpose", False), ("num_frames", 2)])
def test_options_in_the_wrong_place_are_refused(name, value, photo, checkpoint, processor, tmp_path):
    for scope in ("text_kwargs", "audio_kwargs"):
        with pytest.raises(ValueError, match=f"`{scope}` has {name}: an option of pictures has no effect there"):
            processor(images=photo, text="<image>", **{scope: {name: value}})
    LlavaSTFProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=f"has {name} beside `image_processor`, where it has no effect"):
        LlavaSTFProcessor.from_pretrained(tmp_path)


def test_a_checkpoint_without_the_options_turns_photos_upright(processor):
    assert processor.image_processor.do_exif_transpose is True
    assert processor.image_processor.alpha_background is None


def test_damaged_exif_tags_do_not_matter(photo, pixels, tmp_path):
    exif = Image.Exif()
    exif[MARKER], exif[282] = ROTATED, 1.5
    damaged = exif.tobytes().replace(bytes([1, 26, 0, 5]), bytes([1, 26, 0, 2]))  # a resolution that is a text
    photo.save(tmp_path / "photo.png", exif=damaged)
    with pytest.raises(Exception, match="argument|attribute|encode|operand"):
        ImageOps.exif_transpose(Image.open(tmp_path / "photo.png"))
    assert torch.equal(pixels(tmp_path / "photo.png"), pixels(np.asarray(photo.rotate(-90, expand=True))))
    photo.save(tmp_path / "other.png", exif=b"Exif\0\0XX*\0\x08\0\0\0\x01\0")  # no EXIF at all
    assert torch.equal(pixels(tmp_path / "other.png"), pixels(photo))


# Transparency


def transparent_pictures(photo):
    alpha = Image.fromarray(np.tile(np.arange(112, dtype=np.uint8) * 2, (72, 1)))
    rgba = photo.convert("RGBA")
    rgba.putalpha(alpha)
    palette, keyed, soft = (photo.quantize(17) for _ in range(3))
    keyed.info["transparency"], soft.info["transparency"] = (
        palette.getpixel((56, 36)),
        bytes(range(0, 255, 15)),
    )
    colour, grey = photo.copy(), photo.convert("L")
    colour.info["transparency"], grey.info["transparency"] = (
        photo.getpixel((56, 36)),
        grey.getpixel((56, 36)),
    )
    return {
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "RGBa": rgba.convert("RGBa"),
        "PA": palette.convert("PA"),
        "P": palette,
        "P with a transparent colour": keyed,
        "P with transparencies": soft,
        "RGB with a transparent colour": colour,
        "L with a transparent shade": grey,
    }


@pytest.mark.parametrize("do_pad", [True, False])
def test_transparency_is_dropped_or_painted(do_pad, photo, pixels):
    for name, picture in transparent_pictures(photo).items():
        rgba = picture.convert("RGBA")
        painted = Image.new("RGB", picture.size, "white")
        painted.paste(rgba, mask=rgba.getchannel("A"))
        dropped = np.asarray(rgba.convert("RGB"))
        assert torch.equal(pixels(picture, do_pad=do_pad), pixels(dropped, do_pad=do_pad)), name
        found = pixels(picture, do_pad=do_pad, **WHITE)
        assert torch.equal(found, pixels(np.asarray(painted), do_pad=do_pad)), name
        assert torch.equal(found, pixels(dropped, do_pad=do_pad)) == (name in ("P", "PA")), name


def test_transparent_arrays_and_files_are_painted_too(photo, pixels, tmp_path):
    rgba = transparent_pictures(photo)["RGBA"]
    rgba.save(tmp_path / "a.png")
    array = np.asarray(rgba)
    for source in (tmp_path / "a.png", array, array.transpose(2, 0, 1), torch.from_numpy(array.copy())):
        assert torch.equal(pixels(source, **WHITE), pixels(rgba, **WHITE))


def test_transparency_of_16_bit_grey(photo, pixels, tmp_path):
    grey = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=int(grey[0, 0]))
    painted = np.where(grey == grey[0, 0], 255, grey >> 8).astype(np.uint8)
    assert torch.equal(pixels(tmp_path / "a.png", **WHITE), pixels(painted))
    assert torch.equal(pixels(tmp_path / "a.png"), pixels(photo.convert("L")))


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_transparent_floats_are_not_painted_but_refused(layout, photo, pixels):
    array = np.asarray(photo.convert("RGBA")) / 255
    array = array.transpose(2, 0, 1) if layout == "channels_first" else array
    assert torch.equal(pixels(array, do_rescale=False), pixels(photo))
    with pytest.raises(ValueError, match="of floats .* `alpha_background` is painted behind .* 0 to 255"):
        pixels(array, do_rescale=False, **WHITE)


def test_an_unknown_colour_is_refused(photo, pixels):
    with pytest.raises(ValueError, match="unknown color specifier: 'nothing'"):
        pixels(photo, alpha_background="nothing")


@pytest.mark.parametrize("form", ["P", "P with a transparent colour", "P with transparencies"])
@pytest.mark.parametrize("do_pad", [True, False])
def test_a_palette_picture_equals_the_original_s_steps(form, do_pad, photo, processor, recwarn):
    """PIL's own: `convert("RGB")`, pad, resize, crop; then scaled and normalised in float32."""
    picture, settings = transparent_pictures(photo)[form], processor.image_processor
    edge = settings.crop_size["height"]
    with warnings.catch_warnings(action="ignore"):
        image = picture.convert("RGB")
    if do_pad:
        square = Image.new("RGB", (112, 112), (122, 116, 104))
        square.paste(image, (0, (112 - 72) // 2))
        image = square.resize((edge, edge), Image.Resampling.BICUBIC)
    else:
        width = int(edge * 112 / 72)
        left = (width - edge) // 2
        image = image.resize((width, edge), Image.Resampling.BICUBIC).crop((left, 0, left + edge, edge))
    expected = (np.asarray(image, dtype=np.float32) / 255 - settings.image_mean) / settings.image_std
    found = processor(images=picture, text="<image>", do_pad=do_pad, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), rtol=0, atol=1e-6)
    assert not [warning for warning in recwarn if "Palette" in str(warning.message)]


# Numbers


def grey_16_bit(photo, mode):
    values = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    return Image.frombytes(mode, photo.size, values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())


@pytest.mark.parametrize("do_pad", [True, False])
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bit_grey_keeps_its_upper_bits(mode, do_pad, photo, pixels, tmp_path):
    picture, expected = grey_16_bit(photo, mode), pixels(photo.convert("L"), do_pad=do_pad)
    files = [tmp_path / "grey.tif", *([tmp_path / "grey.png"] if mode == "I;16" else [])]
    for file in files:
        picture.save(file)
    for source in (picture, *files):
        assert torch.equal(pixels(source, do_pad=do_pad), expected)


def test_16_bit_png_as_old_pillow_opens_it(photo, pixels):
    """Pillow before 10.4; the test goes with the workaround, when that is the oldest supported one."""
    picture = Image.fromarray(np.asarray(photo.convert("L")).astype(np.int32) * 257)
    assert picture.mode == "I"
    picture.format = "PNG"
    assert torch.equal(pixels(picture), pixels(photo.convert("L")))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_known_range(mode, photo, pixels, tmp_path):
    grey = np.asarray(photo.convert("L")).astype({"I": np.int32, "F": np.float32}[mode])
    assert torch.equal(pixels(Image.fromarray(grey)), pixels(photo.convert("L")))
    with pytest.raises(ValueError, match=r"pixels from \d+ to \d+, expected 0 to 255. Scale it: 16-bit"):
        pixels(Image.fromarray(grey * 257))
    with pytest.raises(ValueError, match="up to 1, expected 0 to 255.*multiply it by 255"):
        pixels(Image.fromarray(grey.clip(0, 1)))
    Image.fromarray(grey * 257).save(tmp_path / "depth.tif")
    with pytest.raises(ValueError, match="expected 0 to 255"):
        pixels(str(tmp_path / "depth.tif"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.float16, np.float32, np.float64])
def test_arrays_of_every_dtype(dtype, photo, pixels):
    assert torch.equal(pixels(np.asarray(photo).astype(dtype)), pixels(photo))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_every_dtype(dtype, photo, pixels):
    tensor = torch.from_numpy(np.array(photo)).to(dtype)
    for form in (tensor, tensor.permute(2, 0, 1), tensor[None]):
        assert torch.equal(pixels(form), pixels(photo))
    if tensor.is_floating_point():
        assert torch.equal(pixels(tensor.requires_grad_()), pixels(photo))


def test_arrays_of_every_memory_layout(photo, pixels, processor):
    array = np.array(photo)
    fixed = array.copy()
    fixed.setflags(write=False)
    for form in (array[::-1][::-1], np.asfortranarray(array), fixed):
        assert torch.equal(pixels(form), pixels(photo))
    assert torch.equal(pixels(array[:, ::-1]), pixels(ImageOps.mirror(photo)))
    grey = np.asarray(photo.convert("L"))
    for form in (grey, grey[None], grey[..., None]):
        assert torch.equal(pixels(form), pixels(photo.convert("L")))
        alone = processor.image_processor([form], return_tensors="pt").pixel_values
        assert torch.equal(alone, pixels(photo.convert("L")))
    batch = processor(images=np.stack([array, array]), text="<image><image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, pixels(photo).expand(2, -1, -1, -1))


def test_true_is_white(photo, pixels):
    two = photo.convert("1")
    assert torch.equal(pixels(np.asarray(two)), pixels(two))
    assert torch.equal(pixels(torch.from_numpy(np.array(two))), pixels(two))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.ones((20, 20), np.uint8), r"up to 1, expected 0 to 255.*mask of 0 and 1, multiply"),
        (np.eye(20, dtype=np.int64), "mask of 0 and 1"),
        (np.full((20, 20), 1000), r"from 1000 to 1000, expected 0 to 255"),
        (np.full((20, 20), -3), r"from -3 to -3"),
        (np.zeros((0, 20, 3)), r"shape \(0, 20, 3\)"),
        (torch.zeros(3, 20, 0), r"shape \(3, 20, 0\)"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels: it is empty"),
        (np.full((20, 20), "a"), "array of <U1"),
        (np.full((20, 20), 1j), "array of complex128"),
        (np.full((20, 30, 2), 9), r"shape \(20, 30, 2\), expected \(height, width\), or 1, 3 or 4 channels"),
        (np.full(20, 9), "Expected a picture"),
        ([[1, 2], [3, 4]], "Expected a picture .* got int"),
        ([None], "Expected a picture .* got NoneType"),
        ({}, "Cannot read the picture"),
    ],
)
def test_what_is_no_picture_is_refused(picture, message, pixels):
    with pytest.raises(ValueError, match=message):
        pixels(picture)


@pytest.mark.parametrize("thickness", [1, 3, 4])
def test_an_array_that_may_be_either_way_round_is_refused(thickness, photo, pixels):
    strip = photo.crop((0, 0, 50, thickness))
    array = np.asarray(strip)
    with pytest.raises(ValueError, match=r"may be the first or the last.*input_data_format"):
        pixels(array)
    assert torch.equal(pixels(array, input_data_format="channels_last"), pixels(strip))
    assert torch.equal(pixels(array.transpose(2, 0, 1), input_data_format="channels_first"), pixels(strip))
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        pixels(np.asarray(photo), input_data_format="channels_first")


def test_none_among_pictures_is_refused(photo, processor):
    with pytest.raises(ValueError, match="got NoneType"):
        processor(images=[photo, None], text="<image><image>")


def test_scaled_numbers_stay_as_they_are(photo, processor):
    """`do_rescale=False` says that the caller has scaled them."""
    settings = {"do_rescale": False, "do_resize": False, "do_center_crop": False, "do_pad": False}
    scaled = np.asarray(photo) / np.float32(255)
    found = processor.image_processor(scaled, return_tensors="pt", **settings).pixel_values
    stock = LlavaImageProcessorPil()(scaled, return_tensors="pt", **settings).pixel_values
    assert torch.equal(found, stock)


def test_numbers_a_little_beyond_1_are_not_a_black_picture(pixels):
    """A cubic resize of a tensor from 0 to 1 overshoots."""
    with pytest.raises(ValueError, match="pixels up to 1.03, expected 0 to 255"):
        pixels(np.linspace(-0.03, 1.03, 100 * 60 * 3).reshape(100, 60, 3))


@pytest.mark.parametrize("do_pad", [True, False])
@pytest.mark.parametrize("kind", ["photo", "black and white", "nearly black"])
def test_scaled_numbers_are_padded_and_resized_as_their_picture_is(kind, do_pad, photo, pixels):
    """Tensors from 0 to 1, as torchvision's `ToTensor` gives them."""
    array = {"photo": 1.0, "black and white": 0.5, "nearly black": 0.004}[kind] * np.asarray(photo)
    array = np.where(array > 60, 255, 0).astype("u1") if kind == "black and white" else array.round().astype("u1")
    scaled = torch.tensor(array).permute(2, 0, 1) / 255
    found = pixels(scaled, do_rescale=False, do_pad=do_pad)
    assert torch.equal(found, pixels(Image.fromarray(array), do_pad=do_pad))


@pytest.mark.parametrize("least, most", [(-0.2, 1.0), (0.0, 1.02), (-2.0, 2.0)])
def test_scaled_numbers_beyond_0_to_1_are_not_resized(least, most, photo, pixels):
    array = np.linspace(least, most, 100 * 60 * 3).reshape(100, 60, 3)
    with pytest.raises(ValueError, match="expected from 0 to 1"):
        pixels(array, do_rescale=False)


def test_a_strip_of_scaled_numbers_is_not_padded_to_its_square(pixels):
    with pytest.raises(ValueError, match="60000 x 1 pixels: padded or resized, 3600000000 would be computed"):
        pixels(np.full((1, 60000), 0.5), do_rescale=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"rescale_factor": value}, "`rescale_factor` is") for value in (float("nan"), float("inf"), 0.0, -1.0)),
        ({"image_mean": [float("nan"), 0.5, 0.5]}, "`image_mean` is .* three finite numbers"),
        ({"image_mean": [0.5, 0.5]}, "`image_mean` is .* three finite numbers"),
        ({"image_std": [0.0, 0.5, 0.5]}, "`image_std` is .* above 0"),
        ({"image_std": [-1.0, 0.5, 0.5]}, "`image_std` is .* above 0"),
        ({"image_std": [0.5, 0.5, float("inf")]}, "`image_std` is .* above 0"),
        ({"crop_size": {"height": 0, "width": 56}}, "`crop_size` is 0 x 56"),
        *(({"resample": value}, "`resample` is .* such as 3") for value in ("bicubic", 3.0)),  # became bilinear
        ({"data_format": "channels_last"}, "`data_format` is 'channels_last'"),
    ],
)
def test_settings_that_give_no_pixels_are_refused(settings, message, photo, processor):
    for call in (
        lambda: processor(images=photo, text="<image>", **settings),
        lambda: LlavaSTFImageProcessor(**settings)(photo),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Files


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "L", "1"])
def test_other_colours_are_converted_by_pil(mode, photo, pixels, tmp_path):
    picture = photo.convert(mode)
    assert torch.equal(pixels(picture), pixels(np.asarray(picture.convert("RGB"))))
    if mode in ("CMYK", "L"):
        picture.save(tmp_path / "a.jpg")
        read = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
        assert torch.equal(pixels(str(tmp_path / "a.jpg")), pixels(read))


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif", "mpo"])
def test_of_several_pictures_in_a_file_the_first_is_taken(ending, photo, pixels, tmp_path):
    path = tmp_path / f"many.{ending}"
    photo.save(path, save_all=True, append_images=[photo.rotate(180)], **LOSSLESS.get(ending, {}))
    first = Image.open(path)
    assert first.n_frames == 2
    assert torch.equal(pixels(str(path)), pixels(np.asarray(first.convert("RGB"))))
    assert torch.equal(pixels(Image.open(path)), pixels(str(path)))


def test_an_mpo_is_a_picture_in_a_folder_and_among_frames(photo, processor, tmp_path):
    """Cameras with two lenses write them. PIL has no opener for their name."""
    photo.save(tmp_path / "photo.MPO", save_all=True, append_images=[photo.rotate(180)])
    (row,) = read_input(tmp_path, "What?")
    assert row.picture == tmp_path / "photo.MPO"
    frames = processor(videos=[[row.picture]], text="<video>", return_tensors="pt", do_pad=True)
    assert torch.equal(frames["pixel_values"], processor(images=row.picture, return_tensors="pt")["pixel_values"])


def test_half_a_jpeg_is_refused_by_every_door(photo, pixels, tmp_path):
    path = tmp_path / "cut.jpg"
    photo.save(path)
    path.write_bytes(path.read_bytes()[:1500])
    for door in DOORS:
        with suppress(OSError):  # PIL's own, where the test converts the picture itself
            with pytest.raises(ValueError, match=r"cut\.jpg|1500 bytes|truncated"):
                pixels(DOORS[door](path))


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_a_pipe_does_not_block(kind, processor, tmp_path):
    for name in ("a.png", "a.mp4"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            processor(**{kind: str(tmp_path / name)}, text="<image>" if kind == "images" else "<video>")


def test_a_bomb_is_refused(photo, pixels, tmp_path, monkeypatch):
    photo.save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png.*exceeds limit"):
        pixels(str(tmp_path / "bomb.png"))


# Long and thin pictures


def png(width, height):
    """A black picture in a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("settings", [{}, {"do_pad": False}, {"do_resize": False}])
def test_what_would_become_too_large_is_refused_with_the_numbers(settings):
    process = LlavaSTFImageProcessor()
    small = png(1, 60000)
    assert len(small) < 200
    with pytest.raises(ValueError, match=r"1 x 60000 pixels: .* \d{9,} would be computed, 268435456 are allowed"):
        process(small, **settings)


def test_a_wide_strip_costs_no_more_than_its_rows():
    assert LlavaSTFImageProcessor()(png(60000, 1), return_tensors="pt").pixel_values.shape == (1, 3, 336, 336)


def test_padding_never_makes_the_square_and_gives_its_bits():
    """For random sizes, edges and filters; a wrong offset must show."""
    rng, colour, told_apart = np.random.default_rng(0), (122, 116, 104), 0
    for _ in range(300):
        width, height = (int(2 ** rng.uniform(0, 9.5)) for _ in range(2))
        edge, resample = int(rng.choice([28, 31, 56, 224, 336])), int(rng.choice([3, 3, 3, 0, 1, 2, 4, 5]))
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found = _padded_and_resized(noise, colour, edge, resample).tobytes()
        side = max(width, height)
        for shift in (0, 1):
            square = Image.new("RGB", (side, side), colour)
            square.paste(noise, ((side - width) // 2 + shift, (side - height) // 2 + shift))
            equal = found == square.resize((edge, edge), resample).tobytes()
            assert equal or shift, (width, height, edge, resample)
            told_apart += not equal
    assert told_apart > 250


# URLs


class Server(http.server.BaseHTTPRequestHandler):
    files: dict = {}

    def log_message(self, *_):
        pass

    def do_GET(self):  # noqa: N802
        with suppress(OSError):
            self.answer(self.path.partition("?")[0])

    def answer(self, path):
        if path == "/away":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            return self.end_headers()
        if path == "/dripping-headers":
            return self.drip(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 10**6)
        if path not in ("/dripping", "/endless") and path[1:] not in self.files:
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        if path == "/dripping":
            return self.drip(b"x" * 10**6)
        if path == "/endless":
            while True:
                self.wfile.write(bytes(2**20))
        self.wfile.write(self.files[path[1:]])

    def drip(self, content):
        for byte in content:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.1)


@pytest.fixture
def server(monkeypatch):
    """Its address; a download may take a second, and be a megabyte large."""
    monkeypatch.setattr(processing_llava_stf, "DOWNLOAD_BYTES", 2**20)
    monkeypatch.setattr(processing_llava_stf, "DOWNLOAD_SECONDS", 1)
    Server.files = {}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        running.block_on_close = False
        thread.join()


def test_a_photo_behind_a_url_is_upright(server, photo, pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(processing_llava_stf, "DOWNLOAD_SECONDS", 60)
    Server.files["photo.png"] = rotated(photo, tmp_path / "photo.png").read_bytes()
    for turn, seen in ((True, photo.rotate(-90, expand=True)), (False, photo)):
        assert torch.equal(pixels(f"{server}/photo.png", do_exif_transpose=turn), pixels(np.asarray(seen)))


@pytest.mark.parametrize("kind", ["images", "videos"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("dripping", "more than 1 seconds; download it yourself"),
        ("dripping-headers", "more than 1 seconds; download it yourself"),
        ("endless", "more than 1048576 bytes"),
        ("away", "cannot be downloaded: .*unsupported protocol 'file://'"),
        ("missing", "cannot be downloaded: .*404"),
    ],
)
def test_a_url_has_a_size_and_a_time(path, message, kind, server, processor, monkeypatch):
    if "seconds" not in message:
        monkeypatch.setattr(processing_llava_stf, "DOWNLOAD_SECONDS", 60)
    with pytest.raises(ValueError, match=f"{path}.*({message})"):
        processor(**{kind: f"{server}/{path}"}, text="<image>" if kind == "images" else "<video>")


def test_an_unreachable_url_is_a_value_error(pixels):
    for url in ("http://127.0.0.1:1/a.png", "https:///a.png", "http://[::a/a.png"):
        with pytest.raises(ValueError, match="cannot be downloaded"):
            pixels(url)


# Videos of pictures

SHADES = [Image.new("RGB", (64, 48), (20 * index, 30, 200 - 15 * index)) for index in range(12)]


def animation(path, duration=250, frames=SHADES, **kwargs):
    settings = {**LOSSLESS.get(path.suffix[1:], {}), **kwargs}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, **settings)
    return path


def shades(processor, videos, text="<video>", **kwargs):
    """Which of the shades the frames are."""
    found = processor(videos=videos, text=text, return_tensors="pt", **kwargs)["pixel_values"][:, 0].mean((1, 2))
    settings = processor.image_processor
    return ((found * settings.image_std[0] + settings.image_mean[0]) * 255 / 20).round().int().tolist()


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_an_animation_is_a_video_of_its_frames(ending, processor, tmp_path):
    """Twelve frames of a quarter of a second each."""
    path = str(animation(tmp_path / f"a.{ending}"))
    for form in (path, Path(path), [path], [[path]], Image.open(path), [Image.open(path)]):
        assert shades(processor, form) == [0, 4, 8]
    opened = Image.open(path)
    opened.seek(5)
    assert shades(processor, opened) == shades(processor, opened) == [0, 4, 8]
    assert (opened.tell(), opened.convert("RGB").getpixel((0, 0))[0]) == (5, 100)
    assert shades(processor, path, fps=2) == [0, 2, 4, 6, 8, 10]
    assert shades(processor, path, fps=4) == list(range(12))
    assert shades(processor, path, fps=1000) == list(range(12))  # none twice
    assert shades(processor, path, num_frames=4) == [0, 3, 6, 9]
    assert shades(processor, path, num_frames=99) == list(range(12))
    two = [path, path]
    assert shades(processor, two, "<video><video>") == shades(processor, [two], "<video><video>") == [0, 4, 8] * 2


def test_an_animated_png_loses_count_when_it_goes_back_early(tmp_path):
    """Pillow 13.0: why we go to its end first."""
    opened = Image.open(animation(tmp_path / "a.png"))
    with pytest.raises(SyntaxError, match="sequence errors"):
        for index in (4, 0, 4):
            opened.seek(index)
            opened.load()


def test_an_animation_is_read_by_the_durations_of_its_frames(processor, tmp_path):
    path = animation(tmp_path / "a.gif", [100, 2900, 500, 500], SHADES[:4])
    assert shades(processor, path) == [0, 1, 2]  # at 0, 1, 2 and 3 seconds; the second frame is shown at two of them
    assert shades(processor, path, fps=2) == [0, 1, 2, 3]
    assert shades(processor, animation(tmp_path / "b.gif", 0)) == [0]  # 12 tenths of a second, as browsers have it
    assert shades(processor, animation(tmp_path / "b.gif", 0), fps=5) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "avif"])
@pytest.mark.parametrize("name", ["a", "a.mp4"])
def test_an_animation_of_any_name_is_read_by_its_durations(name, ending, processor, tmp_path):
    path = tmp_path / name
    path.write_bytes(animation(tmp_path / f"a.{ending}", [100, 2900, 500, 500], SHADES[:4]).read_bytes())
    assert shades(processor, str(path)) == shades(processor, path) == [0, 1, 2]


def test_a_picture_before_an_animation_is_no_frame_of_it(processor, tmp_path):
    """Viewers that know no animated PNG show it."""
    path = animation(tmp_path / "a.png", default_image=True)
    assert Image.open(path).n_frames == 12
    assert shades(processor, path) == [1, 6]  # 2.75 seconds
    assert shades(processor, path, num_frames=99) == list(range(1, 12))
    assert torch.equal(
        processor.image_processor(path, return_tensors="pt")["pixel_values"],
        processor.image_processor(SHADES[0], return_tensors="pt")["pixel_values"],
    )


def test_an_animation_in_a_chat(processor, tmp_path):
    path = str(animation(tmp_path / "a.gif"))
    for key in ("video", "url", "path"):
        content = [{"type": "video", key: path}, {"type": "text", "text": "What?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert len(inputs["pixel_values"]) == 3


def test_an_animation_behind_a_url(server, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(processing_llava_stf, "DOWNLOAD_SECONDS", 60)
    Server.files["a.gif"] = animation(tmp_path / "a.gif").read_bytes()
    assert shades(processor, f"{server}/a.gif?size=1") == [0, 4, 8]


def test_pictures_of_one_frame_are_the_frames_of_one_video(processor, tmp_path):
    paths = [str(tmp_path / f"{index}.gif") for index in range(3)]
    for path, shade in zip(paths, SHADES, strict=False):
        shade.save(path)
    assert shades(processor, paths) == [0, 1, 2]
    assert shades(processor, paths[2]) == [2]
    with pytest.raises(ValueError, match="1 of the 4 frames of a video are animations"):
        shades(processor, [*paths, str(animation(tmp_path / "a.gif"))])


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"fps": 1, "num_frames": 2}, "give one of them"),
        ({"fps": 0.0}, "expected a positive number"),
        ({"fps": float("nan")}, "expected a positive number"),
        ({"num_frames": 0}, "expected a positive number"),
        ({"do_sample_frames": False}, "`do_sample_frames` is False, but a file"),
    ],
)
def test_a_sampling_that_makes_no_sense_is_refused(sampling, message, processor, tmp_path):
    with pytest.raises(ValueError, match=message):
        shades(processor, animation(tmp_path / "a.gif"), **sampling)


def test_all_frames_of_a_file_are_not_asked_for_in_vain(processor, tmp_path):
    """transformers takes all of them then."""
    for video, sampling in (
        (film(tmp_path / "a.mp4"), {}),
        (animation(tmp_path / "a.gif"), {}),
        (SHADES, {"num_frames": 3}),
    ):
        with pytest.raises(ValueError, match="`do_sample_frames` is False, but"):
            shades(processor, video, do_sample_frames=False, **sampling)
    assert shades(processor, SHADES, do_sample_frames=False) == list(range(12))


def test_frames_are_read_as_pictures_are(processor, photo, pixels, tmp_path):
    grey, expected = grey_16_bit(photo, "I;16"), pixels(photo.convert("L"), do_pad=False)
    grey.save(tmp_path / "grey.png")
    for frames in ([grey], [str(tmp_path / "grey.png")], np.asarray(photo.convert("L"))[None, None]):
        found = processor(videos=[frames], text="<video>", return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="mask of 0 and 1"):
        processor(videos=np.ones((3, 20, 20, 3), np.uint8), text="<video>")


def test_a_nearly_black_frame_is_no_mask(processor):
    dark = np.stack([np.full((20, 20, 3), value, np.uint8) for value in (0, 1, 200)])
    for video in (dark, list(dark), torch.from_numpy(dark)):
        assert shades(processor, [video]) == [0, 0, 10]


# Video files

# How a point (x, y) of a frame is shown: at (ax + cy, bx + dy).
SHOWN = [(1, 0, 0, 1), (-1, 0, 0, 1), (-1, 0, 0, -1), (1, 0, 0, -1), (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0)]
SHOWN += [(0, -1, 1, 0)]


def film(path, frames=SHADES, rate=4, matrix=None, codec="libx264", pix_fmt="yuv420p", **options):
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, pix_fmt
        if matrix:
            a, b, c, d = (number * 2**16 for number in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 2**30])
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return str(path)


def shown(frame, matrix):
    """The frame with each point where the matrix says."""
    a, b, c, d = matrix
    pixels = np.asarray(frame)
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    columns, rows = a * x + c * y, b * x + d * y
    moved = np.zeros((np.ptp(rows) + 1, np.ptp(columns) + 1, 3), np.uint8)
    moved[rows - rows.min(), columns - columns.min()] = pixels
    return moved


@pytest.mark.parametrize("matrix", SHOWN)
def test_a_video_is_shown_as_its_file_says(matrix, photo, processor, tmp_path):
    """Phones film sideways, and name the rotation in the file."""
    path = film(tmp_path / "a.mp4", [photo] * 4, matrix=matrix)
    with av.open(film(tmp_path / "plain.mp4", [photo] * 4)) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    chat = [{"role": "user", "content": [{"type": "video", "path": path}]}]
    for turn, expected in ((True, shown(frame, matrix)), (False, frame)):
        expected = processor(videos=[expected[None]], text="<video>", return_tensors="pt")["pixel_values"]
        found = processor(videos=path, text="<video>", do_exif_transpose=turn, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected)
        settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        found = processor.apply_chat_template(chat, **settings, processor_kwargs={"do_exif_transpose": turn})
        assert torch.equal(found["pixel_values"], expected)


@pytest.mark.parametrize(
    ("ending", "settings"),
    [
        ("mp4", {}),
        ("mov", {}),
        ("avi", {"codec": "mpeg4"}),
        ("flv", {}),
        ("mkv", {}),
        ("webm", {"codec": "libvpx-vp9"}),
        ("mpg", {"codec": "mpeg2video", "rate": 24}),
        ("ts", {}),
        ("mp4", {"movflags": "frag_keyframe+empty_moov"}),
    ],
)
def test_every_container_gives_the_same_frames(ending, settings, processor, tmp_path):
    """The headers of some have no number of frames."""
    if settings.get("rate"):  # MPEG-2 has no 4 frames a second
        path = film(tmp_path / f"a.{ending}", [shade for shade in SHADES for _ in range(6)], **settings)
    else:
        path = film(tmp_path / f"a.{ending}", **settings)
    assert shades(processor, path) == [0, 4, 8]
    assert shades(processor, path, num_frames=5) == [0, 2, 4, 7, 9]
    assert shades(processor, path, fps=2) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("ending", ["mp4", "avi", "mkv"])
def test_a_video_that_was_cut_off_is_refused(ending, photo, processor, tmp_path):
    """Its first frames can be decoded, and would be taken for all."""
    noise = [
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (48, 64, 3), np.uint8)) for index in range(24)
    ]
    whole = Path(film(tmp_path / f"a.{ending}", noise, codec="mpeg4", movflags="faststart"))
    assert len(processor(videos=str(whole), text="<video>")["pixel_values"]) == 6
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cut.{ending}.*ends after .* of .* seconds. The file is damaged"):
        processor(videos=str(cut), text="<video>")


@pytest.mark.parametrize(("rate", "number"), [(25, 29), (30, 12), (15, 13), (24, 20)])
def test_rounding_loses_no_frame(rate, number, processor, tmp_path):
    """With floats, 29 frames of a 25th of a second are less than 29 at 25.0 a second."""
    frames = [SHADES[index % 12] for index in range(number)]
    expected = [index % 12 for index in range(number)]
    png = {"codec": "apng", "pix_fmt": "rgb24"}  # PIL writes whole milliseconds
    files = [film(tmp_path / "a.mkv", frames, rate), film(tmp_path / "a.apng", frames, rate, **png)]
    files += [animation(tmp_path / "a.gif", 40, frames)] if rate == 25 else []
    for path in files:
        assert shades(processor, path, fps=float(rate)) == shades(processor, path, fps=rate) == expected


def test_what_a_video_file_cannot_give_is_refused(processor, tmp_path):
    short = film(tmp_path / "short.mp4", SHADES[:3])
    assert shades(processor, short) == [0]
    for sampling in ({"num_frames": 4}, {"fps": 8}):
        with pytest.raises(ValueError, match="short.mp4.*it has 3 frames, but `num_frames` or `fps` asks for [46]"):
            processor(videos=short, text="<video>", **sampling)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(ValueError, match="sound.mp4.*it has no pictures"):
        processor(videos=str(tmp_path / "sound.mp4"), text="<video>")


def test_the_goldens_pictures_do_not_move(processor):
    """By the steps of the stock class, which the original's pixels were compared with."""
    settings = processor.image_processor
    stock = LlavaImageProcessorPil(size=settings.size, crop_size=settings.crop_size)
    for path in sorted((GOLDENS / "images").glob("*.png")):
        for do_pad in (True, False):
            expected = stock(Image.open(path).convert("RGB"), do_pad=do_pad, return_tensors="pt").pixel_values
            for source in (str(path), Image.open(path), to_rgb(Image.open(path))):
                assert torch.equal(settings(source, do_pad=do_pad, return_tensors="pt").pixel_values, expected)
