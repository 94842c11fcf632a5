# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Processes inputs of LLaVA-STF: turns pictures, videos and text into pixels and token ids."""

import asyncio
import base64
import copy
import enum
import inspect
import json
import math
import os
import re
import struct
import sys
import tempfile
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from io import BytesIO
from itertools import accumulate, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageColor
import PIL.ImageOps
import torch
from transformers import BatchFeature, LlavaProcessor
from transformers.image_utils import ChannelDimension
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.processing_utils import (
    AudioKwargs,
    ImagesKwargs,
    MultiModalData,
    ProcessingKwargs,
    TextKwargs,
    Unpack,
    VideosKwargs,
)
from transformers.utils import cached_file

from .configuration_llava_stf import LlavaSTFConfig, allowed_token_budgets

try:
    from huggingface_hub.utils import httpx  # huggingface-hub 2 installs httpx2, and gives it this name
except ImportError:  # huggingface-hub before 1.31 does not have the name; transformers 5.16 takes 1.5 and newer
    import httpx

# The processor needs these settings of the model.
MODEL_SETTINGS = ("patch_size", "fusion_window", "vision_feature_select_strategy")
# These arguments of `from_pretrained` say where to look for a file.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Folders of version 0.1 have the chat template of training's stage 1, too, which begins like this.
STAGE_1 = "{#- The conversation `plain` of the original's stage 1"
PLAIN = Path(__file__).with_name("plain.jinja")  # that template; only the installed package has it
ORIENTATION = PIL.ExifTags.Base.Orientation
# EXIF's orientations by the display matrix of a video, (a, b), (c, d): it shows the point (x, y) at (ax + cy, bx + dy).
ORIENTATIONS = {(1, 0, 0, 1): 1, (-1, 0, 0, 1): 2, (-1, 0, 0, -1): 3, (1, 0, 0, -1): 4}
ORIENTATIONS |= {(0, 1, 1, 0): 5, (0, 1, -1, 0): 6, (0, -1, -1, 0): 7, (0, -1, 1, 0): 8}
# A video file is read at this many frames per second, as in the original's evaluation.
VIDEO_FPS = 1
# Files of these formats may be animations; a frame without a duration is shown this long, as in browsers.
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF", "FLI")
FRAME_MILLISECONDS = 100
# No step of the preprocessing may handle more pixels than this.
MAX_PIXELS = 2**28
# A download may have at most this size, and take at most this time.
DOWNLOAD_BYTES = 2**28
DOWNLOAD_SECONDS = 30
# PIL raises these for files that are damaged, too large, or of a mode that it cannot convert.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
)


class LlavaSTFImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg] # transformers is not typed
    """
    do_exif_transpose (`bool`, *optional*, defaults to `True`):
        Whether to rotate a photo upright by its EXIF orientation, and the frames of a video file by its display matrix.
        The original does not rotate photos.
    alpha_background (`str`, *optional*):
        Colour behind transparent pixels, as PIL names it: `"white"`, `"#7a7468"`. By default transparency is dropped,
        as in the original.
    max_soft_tokens (`int` or `list[int]`, *optional*):
        Number of tokens of each picture in the language model, or a list with one for each picture; one of
        `processor.allowed_token_budgets`. By default all tokens of Spatial Token Fusion. The pixels do not change, and
        an image processor alone knows neither patches nor window: it refuses only what no model can allow.
    """

    do_exif_transpose: bool | None
    alpha_background: str | None
    max_soft_tokens: Any  # the processors check it


# Options that pictures and videos alone have, and that change pixels or the number of tokens.
OF_PICTURES = LlavaSTFImagesKwargs.__annotations__.keys() | VideosKwargs.__annotations__.keys()
OF_PICTURES -= TextKwargs.__annotations__.keys() | AudioKwargs.__annotations__.keys() | {"device", "image_seq_length"}
# A call of the processor takes these; what `apply_chat_template` takes itself, such as `return_tensors`, is left out.
OPTIONS = {
    *LlavaSTFImagesKwargs.__annotations__,
    *TextKwargs.__annotations__,
    *VideosKwargs.__annotations__,
    *ProcessingKwargs.__annotations__,
} - inspect.signature(LlavaProcessor.apply_chat_template).parameters.keys()


class LlavaSTFImageProcessor(LlavaImageProcessorPil):
    """Preprocesses pictures bit for bit as the original: with PIL's bicubic resize, with or without torchvision.

    A picture is rotated upright (`do_exif_transpose`) and converted to RGB by PIL: transparency is dropped, unless
    `alpha_background` gives the colour behind it. It is pasted in the middle of a square of CLIP's mean colour
    (`do_pad`), resized, cropped and normalised (original: `image_aspect_ratio: pad`).

    A picture is a PIL image, a path, a URL, the bytes of a file, base64, `{"bytes", "path"}`, or an array or tensor of
    numbers from 0 to 255: (height, width), or with 1, 3 or 4 channels first or last. All of them give the same pixels.
    Of an animated file or one of several pages the first picture is used.

    Raises:
        ValueError: for a picture that cannot be read or decoded, whose numbers are not finite or not from 0 to 255,
            whose layout is ambiguous (set `input_data_format`), or that is so long and thin that it would not fit into
            memory; and for settings that no pixel can be computed with, or a `max_soft_tokens` below 1.
    """

    valid_kwargs = LlavaSTFImagesKwargs
    size = {"shortest_edge": 336}
    crop_size = {"height": 336, "width": 336}
    do_pad = True
    do_exif_transpose = True
    alpha_background = None
    max_soft_tokens = None

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens paths, URLs and bytes, in any nesting; does not rotate or convert them."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, Path, bytes, dict)):
            return load_picture(image_url_or_urls)
        return image_url_or_urls

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list:
        return _flat_images(self.fetch_images(images))

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        do_exif_transpose: bool | None = None,
        alpha_background: str | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Preprocesses one picture of any kind; returns (channels, height, width)."""
        if not isinstance(image, PIL.Image.Image):
            array = _as_array(image)
            layout = kwargs.pop("input_data_format", None)
            if array.dtype.kind == "f" and not kwargs.get("do_rescale"):
                if alpha_background is not None and array.ndim == 3 and 4 in (array.shape[0], array.shape[-1]):
                    raise ValueError(
                        f"A picture of floats has the shape {array.shape}: `alpha_background` is painted behind a "
                        "picture of numbers from 0 to 255. Give these without `do_rescale=False`, or leave alpha out."
                    )
                return _scaled_floats(array, layout, unchanged=not (kwargs.get("do_pad") or kwargs.get("do_resize")))
            image = _as_pictures([array], layout)[0]
        if not do_convert_rgb:
            image = _upright(image) if do_exif_transpose else _decoded(image)
        else:
            image = to_rgb(image, do_exif_transpose, alpha_background)
        self.check_size(image, **kwargs)
        edge, resample = _squares_edge(**kwargs), kwargs.get("resample")
        if image.mode == "RGB" and edge and isinstance(resample, int):
            # The stock class does the same, but copies the whole square several times.
            image = _padded_and_resized(image, _padding(kwargs.get("image_mean")), edge, resample)
        return super().process_image(image, do_convert_rgb=False, **kwargs)

    def pad_to_square(self, image: np.ndarray, background_color: Any = 0) -> np.ndarray:
        """Pads to a square (see [`LlavaImageProcessorPil.pad_to_square`]); floats get a colour from 0 to 1."""
        if image.dtype.kind != "f":
            return super().pad_to_square(image, background_color)
        height, width = image.shape[1:]
        _check_pixels(width, height, max(height, width) ** 2)
        return super().pad_to_square(image, tuple(channel / 255 for channel in background_color or (0, 0, 0)))

    def resize(self, image: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
        """Resizes (see [`LlavaImageProcessorPil.resize`]); floats from 0 to 1 are resized as their 8-bit picture."""
        if image.dtype.kind != "f":
            return super().resize(image, *args, **kwargs)
        return self.rescale(super().resize(np.rint(image * 255).astype(np.uint8), *args, **kwargs), 1 / 255)

    def check_size(self, image: PIL.Image.Image, **kwargs: Any) -> None:
        """Raises a `ValueError` if a picture is empty, or the next steps would make too many pixels of it."""
        settings = {name: kwargs.get(name, getattr(self, name)) for name in ("do_pad", "do_resize", "size")}
        short, long = sorted(image.size)
        if short == 0:
            raise ValueError(f"A picture has {image.width} x {image.height} pixels: it is empty.")
        pixels, edge = 0, _squares_edge(**settings)
        if edge:
            pixels = long * max(image.height, edge)
        elif settings["do_pad"]:
            pixels = long**2
        elif settings["do_resize"] and settings["size"].shortest_edge:
            pixels = settings["size"].shortest_edge ** 2 * long // short
        _check_pixels(image.width, image.height, pixels)

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        if kwargs.get("do_rescale") and not 0 < kwargs["rescale_factor"] < math.inf:
            raise ValueError(f"`rescale_factor` is {kwargs['rescale_factor']}, expected a positive number.")
        for name, least in (("image_mean", -math.inf), ("image_std", 0)):
            values = kwargs.get(name)
            if values is not None and not (np.shape(values) == (3,) and all(least < x < math.inf for x in values)):
                positive = " above 0" if name == "image_std" else ""
                raise ValueError(f"`{name}` is {values}, expected three finite numbers{positive}.")
        resample, layout = kwargs.get("resample"), kwargs.get("data_format")
        if kwargs.get("do_resize") and not isinstance(resample, (int, enum.Enum)):  # the stock class would take another
            raise ValueError(
                f"`resample` is {resample!r}, expected a number of `PIL.Image.Resampling`, such as 3 (bicubic)."
            )
        if layout is not None and ChannelDimension(layout) is not ChannelDimension.FIRST:
            raise ValueError(f"`data_format` is {str(layout)!r}, expected 'channels_first', as the model takes pixels.")
        crop: Any = kwargs.get("crop_size")
        if kwargs.get("do_center_crop") and not min(crop.height or 0, crop.width or 0) > 0:
            raise ValueError(f"`crop_size` is {crop.height} x {crop.width}, expected pixels.")
        if kwargs.get("alpha_background") is not None:
            PIL.ImageColor.getrgb(kwargs["alpha_background"])
        asked = _python_numbers(kwargs.get("max_soft_tokens"))
        if asked is not None and not all(type(number) is int and number > 0 for number in _as_list(asked)):
            raise ValueError(
                f"`max_soft_tokens` is {asked!r}, expected a whole number of at least 1, or a list with one for each "
                "picture. `LlavaSTFProcessor.allowed_token_budgets` has those that the model allows."
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings (see [`ImageProcessingMixin.to_dict`]); the code is that of the same repository."""
        settings = super().to_dict()
        if "max_soft_tokens" in settings:  # JSON has no numbers of numpy
            settings["max_soft_tokens"] = _python_numbers(settings["max_soft_tokens"])
        return {**settings, "auto_map": {"AutoImageProcessor": "processing_llava_stf.LlavaSTFImageProcessor"}}


class _OneAtATime:
    """Lets one thread at a time use a tokenizer.

    The fast tokenizer stores padding and truncation as state before it encodes: two calls at once would both use the
    settings of one (transformers 5.24). Remove this when the settings are arguments of the encoding.
    """

    lock = threading.Lock()

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _OneAtATime.lock:
            return self.tokenizer(*args, **kwargs)


def _new_lock() -> None:
    _OneAtATime.lock = threading.Lock()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_new_lock)  # the thread that holds the lock does not exist in a forked worker


class LlavaSTFProcessor(LlavaProcessor):
    r"""
    Turns prompts with `<image>` and `<video>` placeholders, pictures and videos into the inputs of LLaVA-STF.

    Every image, and every frame of a video, becomes (image size / patch size / fusion window)^2 image tokens (144 for
    the released model), or as many as `max_soft_tokens` says. The tokens of all frames of a video replace its one
    placeholder, in order. `pixel_values` contains images and frames in the order of their placeholders: (images +
    frames, 3, height, width).

    Threads may share a processor, also through `apply_chat_template`. They may not share its `tokenizer` in direct
    calls that pad or truncate: give each thread a `copy.deepcopy` of it.

    Args:
        image_processor ([`LlavaSTFImageProcessor`]): gives the pixels. Videos are not padded to a square by default,
            as in the original's evaluation; pass `videos_kwargs={"do_pad": True}` to pad them.
        tokenizer ([`PreTrainedTokenizerFast`]): has `<image>` as one token; pads on the left.
        patch_size (`int`): side of a patch of the vision tower, in pixels.
        fusion_window (`int`): side of the fusion window, in patches; the `fusion_window` of the model's config.
        vision_feature_select_strategy (`str`): `"default"`, patches without the class token.
        chat_template (`str` or `dict[str, str]`, *optional*): the default template and named ones.
        image_token (`str`, defaults to `"<image>"`): placeholder of an image.
        video_token (`str`, defaults to `"<video>"`): placeholder of a video; never reaches the tokenizer.

    Raises:
        ValueError: if patch size, window or strategy are missing or do not fit the image processor, or if the
            tokenizer does not know the image token, or the image processor is another one.
    """

    # Each video has one entry; their lengths differ. They are merged with the images before the processor returns.
    # The numbers of tokens stay a list: reading them waits for no device, and they are constants for `torch.compile`.
    skip_tensor_conversion = [
        *LlavaProcessor.skip_tensor_conversion,
        "pixel_values_videos",
        "image_tokens",
        "image_tokens_videos",
    ]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        fusion_window: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
    ):
        self.fusion_window = fusion_window
        self.video_token = video_token
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
        )
        if not hasattr(image_processor, "max_soft_tokens"):  # not `isinstance`: its code may come from a model's folder
            raise ValueError(
                f"The image processor is a {type(image_processor).__name__}, expected a LlavaSTFImageProcessor: others "
                "give other pixels. In a folder, `image_processor_type` names it."
            )
        if self.tokenizer.convert_tokens_to_ids(self.image_token) in (None, self.tokenizer.unk_token_id):
            raise ValueError(
                f"The tokenizer does not know {self.image_token!r}. Use the tokenizer of a converted checkpoint, or "
                "add it as a special token."
            )

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        """Reads the settings (see [`ProcessorMixin.get_processor_dict`]); the model's config gives missing ones.

        A pipeline's `save_pretrained` writes tokenizer and image processor, but no processor_config.json.

        Raises:
            ValueError: if processor_config.json and preprocessor_config.json have different options of pictures.
        """
        settings, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if not any(name in settings for name in MODEL_SETTINGS):
            settings |= _settings_of_model(pretrained_model_name_or_path, where)
        if "image_processor" in settings and not os.path.isfile(pretrained_model_name_or_path):
            _refuse_other_settings(settings["image_processor"], pretrained_model_name_or_path, where)
        return settings, unused

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the loaded processor (see [`ProcessorMixin.from_args_and_dict`]).

        Raises:
            ValueError: for incomplete settings, and for options that transformers (5.16 to 5.24) would drop: those of a
                call, such as `images_kwargs`, and options of pictures beside `image_processor` in the file.
        """
        _refuse_dropped(processor_dict, kwargs)
        loaded = super().from_args_and_dict(args, processor_dict, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        processor.check_settings()
        # This says how the tokenizer was loaded, not what it is; if saved, it would differ from load to load, and name
        # settings of pictures that may have changed since.
        for name in ("dtype", "is_local", "local_files_only", *LlavaSTFImagesKwargs.__annotations__):
            processor.tokenizer.init_kwargs.pop(name, None)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves the processor (see [`ProcessorMixin.save_pretrained`]) without the chat template of stage 1.

        vLLM (seen in 0.32.0) does not start if there are several. Older folders have that one beside the default.

        Raises:
            ValueError: for settings that could not be loaded again; nothing is written then.
        """
        self.check_settings()
        parts = (self, self.tokenizer)
        loaded = [part.chat_template for part in parts]
        for part, templates in zip(parts, loaded, strict=True):
            part.chat_template = _without_stage_1(templates)
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            for part, templates in zip(parts, loaded, strict=True):
                part.chat_template = templates

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Writes a conversation as a prompt (see [`ProcessorMixin.apply_chat_template`]).

        Args:
            chat_template: the text of a template, a name among the processor's templates, or "plain" for that of
                training's stage 1, which the installed package has.

        Raises:
            ValueError: if it is a name that there is no template of, and would be the prompt.
        """
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        if chat_template is not None and re.fullmatch(r"[\w.-]+", chat_template) and chat_template not in named:
            if chat_template != "plain" or not PLAIN.exists():
                raise ValueError(
                    f"The processor has no chat template {chat_template!r}: expected one of {', '.join(named)}, or a "
                    "template's text. That of training's stage 1, `plain`, comes with the installed package."
                )
            chat_template = PLAIN.read_text(encoding="utf-8")
        if kwargs.get("processor_kwargs"):
            # transformers 5.16 drops these options if the call has some beside them; 5.24 writes into the dictionary.
            # Remove this when the oldest supported version does neither.
            beside = {name: kwargs.pop(name) for name in OPTIONS & kwargs.keys()}
            kwargs["processor_kwargs"] = kwargs["processor_kwargs"] | beside
        return super().apply_chat_template(conversation, chat_template, *args, **kwargs)

    def check_settings(self) -> None:
        """Raises a `ValueError` if a setting that the token count needs is missing or does not fit."""
        missing = [name for name in MODEL_SETTINGS if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"The processor lacks {', '.join(missing)}: without them it cannot count image tokens. A complete "
                "processor_config.json has all three; these files may belong to a plain LLaVA."
            )
        for name in ("patch_size", "fusion_window"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` is {value!r}, expected a whole number of at least 1.")
        if self.vision_feature_select_strategy != "default":
            raise ValueError(
                f"`vision_feature_select_strategy` is {self.vision_feature_select_strategy!r}, expected 'default': the "
                "class token has no place in a window of patches."
            )
        crop = self.image_processor.crop_size
        if any(side // self.patch_size % self.fusion_window for side in (crop["height"], crop["width"])):
            raise ValueError(
                f"`fusion_window` is {self.fusion_window}, but {crop['height']} x {crop['width']} pixels in patches of "
                f"{self.patch_size} give a grid of {crop['height'] // self.patch_size} x "
                f"{crop['width'] // self.patch_size}, which it does not divide."
            )
        default, allowed = _python_numbers(self.image_processor.max_soft_tokens), self.allowed_token_budgets
        if default is not None and not (type(default) is int and default in allowed):
            raise ValueError(f"`max_soft_tokens` is {default!r} for all pictures, expected one of {allowed}.")

    @property
    def video_processor(self) -> LlavaSTFImageProcessor:
        """Returns the image processor: frames are pictures, so that videos need no other one and no torchvision."""
        return self.image_processor

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Unpack[ProcessingKwargs]
    ) -> BatchFeature:
        """Prepares a batch for the model.

        Args:
            images: a picture, a list of pictures in the order of the placeholders, or one list per prompt. A picture
                is whatever [`LlavaSTFImageProcessor`] takes.
            text (`str` or `list[str]`): prompts, with one `<image>` per image and one `<video>` per video. Those that a
                chat template wrote begin with BOS, and get no second one, unless `add_special_tokens` says so.
            videos: a video or a list of videos; a video is a list of frames, a 4-D array, an animated GIF, WebP, PNG
                or AVIF, or a file that PyAV reads. A file is read at one frame per second, unless `fps` or
                `num_frames` says otherwise; an animation by the durations of its frames, and no frame twice.
            kwargs: options of the tokenizer and the image processor, such as `padding`, `return_tensors`, `do_pad`.
                `max_soft_tokens` is the number of tokens of each image and frame; a list has one for each image, in
                `videos_kwargs` one for each video or frame.

        Returns:
            [`BatchFeature`] with `input_ids`, `attention_mask` and `pixel_values`; also with `image_tokens`, a list of
            the number of tokens of each image and frame, if one of them has not all tokens.

        Raises:
            ValueError: if placeholders and images differ in number, a picture is unreadable, `max_soft_tokens` is not
                allowed, a prompt with images is longer than the model's context, or only some prompts begin with BOS.
        """
        text = text if text is None or isinstance(text, str) else [*text]
        if "add_special_tokens" not in kwargs | (kwargs.get("text_kwargs") or {}) and self.begin_with_bos(text):
            kwargs["add_special_tokens"] = False
        offsets_wanted = kwargs.pop("return_text_replacement_offsets", False)
        guarded = copy.copy(self)
        guarded.tokenizer = _OneAtATime(self.tokenizer)
        outputs = super(LlavaSTFProcessor, guarded).__call__(
            images=images, text=text, videos=videos, return_text_replacement_offsets=True, **kwargs
        )
        places = outputs["text_replacement_offsets"] if offsets_wanted else outputs.pop("text_replacement_offsets", [])
        if "pixel_values_videos" in outputs:
            types = [place["type"] for row in places for place in row]
            for name in ("pixel_values", "image_tokens"):
                outputs[name] = _in_reading_order(types, outputs.get(name, []), outputs.pop(f"{name}_videos"))
        if outputs.get("image_tokens") == self._full_tokens(outputs.get("pixel_values", [])):
            del outputs["image_tokens"]
        if "offset_mapping" in outputs and not offsets_wanted:
            outputs["offset_mapping"] = _offsets_in_prompt(outputs["offset_mapping"], places)
        elif isinstance(outputs.get("offset_mapping"), torch.Tensor):
            # `apply_chat_template` iterates over these pairs for its mask, which is several times faster in lists.
            outputs["offset_mapping"] = outputs["offset_mapping"].tolist()
        if text is not None:
            self._check_context(outputs["input_ids"])
        return outputs

    def begin_with_bos(self, text: str | Sequence[str] | None) -> bool:
        """Returns whether prompts begin with the BOS token; raises a `ValueError` if only some of them do."""
        bos, prompts = self.tokenizer.bos_token, [text] if isinstance(text, str) else text or ()
        found = [bos is not None and isinstance(prompt, str) and prompt.startswith(bos) for prompt in prompts]
        if any(found) and not all(found):
            raise ValueError(
                f"{sum(found)} of {len(found)} prompts begin with {bos}, which the tokenizer would write twice. "
                "Remove it from them, or write it in all of them, as the chat template does."
            )
        return any(found)

    # One function counts tokens, both to replace placeholders and for serving engines.

    def num_image_tokens(self, height: int, width: int) -> int:
        """Returns the tokens of an image or frame of `height` x `width` pixels at the input of the vision tower."""
        self.check_settings()
        patch_and_window = self.patch_size * self.fusion_window
        return (height // patch_and_window) * (width // patch_and_window)

    @property
    def tokens_per_image(self) -> int:
        """Returns the tokens of one image or video frame, from the settings of processor and image processor."""
        crop = self.image_processor.crop_size
        return self._image_tokens([(crop["height"], crop["width"])])[0]

    @property
    def allowed_token_budgets(self) -> list[int]:
        """Returns the numbers of tokens that `max_soft_tokens` may ask for, largest first."""
        crop = self.image_processor.crop_size
        return self._allowed_tokens(crop["height"], crop["width"])

    def _allowed_tokens(self, height: int, width: int) -> list[int]:
        patch_and_window = self.patch_size * self.fusion_window
        return allowed_token_budgets(height // patch_and_window, width // patch_and_window)

    def _full_tokens(self, pixels: Any) -> list[int]:
        return [self.num_image_tokens(*picture.shape[-2:]) for picture in pixels]

    def _image_tokens(self, sizes: Sequence[tuple[int, int]], asked: Any = None) -> list[int]:
        """Returns the tokens of pictures of (height, width) pixels; `asked` is `max_soft_tokens` of a call."""
        asked = _python_numbers(self.image_processor.max_soft_tokens if asked is None else asked)
        if asked is None:
            return [self.num_image_tokens(*size) for size in sizes]
        numbers = [*asked] if isinstance(asked, (list, tuple)) else [asked] * len(sizes)
        # Without pictures it is the number itself that is checked, by the budgets of the configured size.
        allowed = [self._allowed_tokens(*size) for size in sizes] or [self.allowed_token_budgets]
        checked = zip(numbers or _as_list(asked), allowed, strict=False)
        if len(numbers) != len(sizes) or not all(type(number) is int and number in ok for number, ok in checked):
            raise ValueError(
                f"`max_soft_tokens` is {asked!r} for {len(sizes)} pictures or frames, expected one of {allowed[0]}, or "
                "a list with one of them for each picture."
            )
        return numbers

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Returns the image tokens that replace the placeholder of image `image_idx`."""
        tokens = image_inputs.get("image_tokens") or self._full_tokens(image_inputs["pixel_values"])
        return self.image_token * tokens[image_idx]

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        """Returns the image tokens that replace the placeholder of video `video_idx`: those of all its frames."""
        return self.image_token * sum(video_inputs["image_tokens_videos"][video_idx])

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        options = kwargs | kwargs.get("images_kwargs", {})
        crop = options.get("crop_size") or self.image_processor.crop_size
        sizes = [(crop["height"], crop["width"])] * len(image_sizes)
        tokens = self._image_tokens(sizes, options.get("max_soft_tokens"))
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(image_sizes))

    # `ProcessorMixin.__call__` calls these hooks in this order: `prepare_inputs_layout`, `validate_inputs`,
    # `_process_images`, `_process_videos` (both also return the replacements of the placeholders), and after the
    # tokenizer `_check_special_mm_tokens`.

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple:
        """Loads pictures, and flattens videos to one list; pictures in a list per prompt stay so, to be counted."""
        images = self.image_processor.fetch_images([] if images is None else images)
        if videos is not None:
            per_prompt = isinstance(videos, (list, tuple)) and all(_is_list_of_videos(item) for item in videos)
            groups = [list(_flat_videos(item)) for item in (videos if per_prompt else [videos])]
            if per_prompt and text is not None:
                self._check_count(self.video_token, [text] if isinstance(text, str) else text, [*map(len, groups)])
            videos = [video for group in groups for video in group]
        has_images = bool(_flat_images(images))
        return super().prepare_inputs_layout(
            images=images if has_images else None, text=text, videos=videos or None, audio=audio, **kwargs
        )

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Raises a `ValueError` if placeholders and images, or videos, differ in number, or a budget is not allowed."""
        if images is None and text is None and videos is None:
            raise ValueError(f"{type(self).__name__} got nothing: give images, videos or text.")
        _refuse_misplaced(kwargs)
        self._check_unused_budgets(images is not None, videos is not None, kwargs)
        if text is None:
            return
        if not all(isinstance(prompt, str) for prompt in text):
            raise ValueError(f"`text` must be a string or a list of strings, got {text!r:.100}.")
        if (
            images is not None
            and videos is not None
            and isinstance(_python_numbers(kwargs.get("max_soft_tokens")), (list, tuple))
        ):
            raise ValueError(
                "`max_soft_tokens` is a list, and there are images and videos: give the list of the images in "
                "`images_kwargs` and that of the videos in `videos_kwargs`."
            )
        images = [] if images is None else images
        per_prompt = isinstance(images, (list, tuple)) and all(isinstance(item, (list, tuple)) for item in images)
        n_images = [len(_flat_images(item)) for item in images] if per_prompt else [len(_flat_images(images))]
        self._check_count(self.image_token, text, n_images)
        self._check_count(self.video_token, text, [len(videos or [])])

    def _check_count(self, token: str, text: list[str], given: list[int]) -> None:
        expected = [prompt.count(token) for prompt in text if isinstance(prompt, str)]
        if expected == given or (len(given) != len(expected) and sum(expected) == sum(given)):
            return
        raise ValueError(
            f"The number of {token} tokens in the prompts should be the same as the number of images or videos given: "
            f"found {sum(expected)} ({expected} by prompt) and {sum(given)} ({given} by prompt or in all). Each image "
            f"or frame takes {self.tokens_per_image} tokens by default; write one {token} for it. "
            "Usual causes: the chat template was not applied, or a placeholder is missing from the text or twice in it."
        )

    def _check_unused_budgets(self, has_images: bool, has_videos: bool, kwargs: dict[str, Any]) -> None:
        """Raises a `ValueError` for a wrong `max_soft_tokens` of images or videos that are not there."""
        unused = [] if has_images else [kwargs.get("images_kwargs")]
        unused += [] if has_videos else [kwargs.get("videos_kwargs")]
        unused += [] if has_images or has_videos else [kwargs, kwargs.get("common_kwargs")]
        for options in unused:
            if options and options.get("max_soft_tokens") is not None:
                self._image_tokens([], options["max_soft_tokens"])

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict, list[str]]:
        asked = kwargs.pop("max_soft_tokens", None)
        outputs = self.image_processor(images, **kwargs)
        sizes = [picture.shape[-2:] for picture in outputs["pixel_values"]]
        outputs["image_tokens"] = self._image_tokens(sizes, asked)
        return outputs, [self.replace_image_token(outputs, index) for index in range(len(outputs["pixel_values"]))]

    def _process_videos(self, videos: list, **kwargs: Any) -> tuple[dict, list[str]]:
        sampling = {name: kwargs.get(name) for name in ("num_frames", "fps")}
        known = LlavaSTFImagesKwargs.__annotations__.keys() - {"max_soft_tokens"}
        image_kwargs = {name: value for name, value in kwargs.items() if name in known}
        image_kwargs.setdefault("do_pad", False)
        pixels = []
        for video in videos:
            if kwargs.get("do_sample_frames") is False and (
                isinstance(video, (str, Path, PIL.Image.Image))
                or any(number is not None for number in sampling.values())
            ):
                raise ValueError(
                    "`do_sample_frames` is False, but a file or an animation is sampled, and so are frames with "
                    "`num_frames`. Give a list of all frames alone, or say with `fps` or `num_frames` how many to take."
                )
            frames = _frames(video, **sampling)
            if image_kwargs.get("do_rescale", self.image_processor.do_rescale) and not any(
                isinstance(frame, PIL.Image.Image) for frame in frames
            ):
                # The range is that of all frames together, because a single frame may be black or nearly so.
                frames = _as_pictures([_as_array(frame) for frame in frames], image_kwargs.get("input_data_format"))
            pixels.append(self.image_processor(frames, **image_kwargs)["pixel_values"])
        tokens = self._image_tokens(
            [frame.shape[-2:] for video in pixels for frame in video],
            _for_each_frame(_python_numbers(kwargs.get("max_soft_tokens")), [len(video) for video in pixels]),
        )
        next_tokens = iter(tokens)
        outputs = {
            "pixel_values_videos": pixels,
            "image_tokens_videos": [[*islice(next_tokens, len(video))] for video in pixels],
        }
        return outputs, [self.replace_video_token(outputs, index) for index in range(len(videos))]

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        try:
            super()._check_special_mm_tokens(text, text_inputs, modalities)
        except ValueError as error:
            needed = max(len(ids) for ids in self.tokenizer(text)["input_ids"])
            allowed = max(len(ids) for ids in text_inputs["input_ids"])
            raise ValueError(
                f"Truncation cuts through an image: the longest prompt needs {needed} tokens, {allowed} are allowed. "
                "Raise `max_length`, or leave the example out."
            ) from error

    def _check_context(self, input_ids: Any) -> None:
        limit = self.tokenizer.model_max_length
        rows = input_ids if isinstance(input_ids[0], (list, tuple, np.ndarray, torch.Tensor)) else [input_ids]
        for index, row in enumerate(rows):
            vision = (row.tolist() if hasattr(row, "tolist") else row).count(self.image_token_id)
            if vision and len(row) > limit:
                raise ValueError(
                    f"Prompt {index} has {len(row)} tokens, {vision} of them of images or frames, but the context "
                    f"holds {limit}. Give fewer images, fewer frames (`num_frames=`) or less text."
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings (see [`ProcessorMixin.to_dict`]); the code is that of the same repository."""
        return {**super().to_dict(), "auto_map": {"AutoProcessor": "processing_llava_stf.LlavaSTFProcessor"}}


def _refuse_dropped(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises a `ValueError` for options in the wrong place of processor_config.json or of `from_pretrained`."""
    of_calls = [name for name, value in given.items() if name.endswith("_kwargs") and value]
    if of_calls:
        raise ValueError(
            f"`from_pretrained` got {', '.join(of_calls)}, which a processor takes at its calls only. Give a default "
            "for all pictures and frames without that dictionary, such as `from_pretrained(..., max_soft_tokens=36)`."
        )
    misplaced = saved.keys() & OF_PICTURES
    if misplaced:
        raise ValueError(
            f"processor_config.json has {', '.join(sorted(misplaced))} beside `image_processor`, where it has no "
            "effect. Move it into `image_processor`."
        )


def _refuse_other_settings(used: dict[str, Any], folder: Any, where: dict[str, Any]) -> None:
    """Raises a `ValueError` if the image processor was also saved alone, with other options, which no class reads."""
    file = cached_file(folder, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **where)
    saved = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    first, second = (LlavaSTFImageProcessor.from_dict(dict(settings)).to_dict() for settings in (used, saved))
    other = [name for name in sorted(saved.keys() & OF_PICTURES) if first.get(name) != second.get(name)]
    if other:
        raise ValueError(
            f"processor_config.json and preprocessor_config.json have different values of {', '.join(other)}, and "
            "transformers reads only the first file. Write the values there, into `image_processor`, and remove the "
            "second file."
        )


def _refuse_misplaced(given: dict[str, Any]) -> None:
    """Raises a `ValueError` for options of pictures among those of text or sound, where they have no effect."""
    for scope in ("text_kwargs", "audio_kwargs"):
        misplaced = (given.get(scope) or {}).keys() & OF_PICTURES
        if misplaced:
            raise ValueError(
                f"`{scope}` has {', '.join(sorted(misplaced))}: an option of pictures has no effect there. Give it in "
                "`images_kwargs` and `videos_kwargs`, or to the call itself."
            )


def _without_stage_1(templates: str | dict[str, str] | None) -> str | dict[str, str] | None:
    """Removes the template of stage 1 from named templates; returns the default one as a string if it is alone."""
    if not isinstance(templates, dict):
        return templates
    kept = {name: text for name, text in templates.items() if not text.startswith(STAGE_1)}
    return kept["default"] if kept.keys() == {"default"} else kept


def _settings_of_model(folder: Any, where: dict[str, Any]) -> dict[str, Any]:
    """Reads the three settings from the config.json in the same folder; returns none if it is of another model."""
    file = cached_file(folder, "config.json", _raise_exceptions_for_missing_entries=False, **where)
    found = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    if found.get("model_type") != LlavaSTFConfig.model_type:
        return {}
    config = LlavaSTFConfig.from_dict(found)
    return {
        "patch_size": config.vision_config.patch_size,
        "fusion_window": config.fusion_window,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }


# Read pictures from files and arrays, and convert them to RGB


def load_picture(source: Any) -> PIL.Image.Image:
    """Reads a picture with PIL, without rotation or conversion; uses the first of several frames or pages.

    Args:
        source: a path, a URL, base64 with or without `data:image/...;base64,`, the bytes of a file, or a dictionary
            with `bytes` or `path`, as in an undecoded column of `datasets`.

    Raises:
        ValueError: names what cannot be read, and says why.
    """
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else Path(source.get("path") or "")
    name = f"of {len(source)} bytes" if isinstance(source, bytes) else repr(str(source))
    name = name if len(name) <= 200 else f"{name[:200]}..."
    try:
        picture = PIL.Image.open(_readable(source))
        _load(picture)
    except PIL.UnidentifiedImageError as error:  # whose own words name an object in memory, if these are bytes
        raise ValueError(f"Cannot read the picture {name}: it is of no kind that PIL knows") from error
    except UNREADABLE as error:
        raise ValueError(f"Cannot read the picture {name}: {error or type(error).__name__}") from error
    return picture


def _readable(source: str | Path | bytes) -> Any:
    """Returns what `PIL.Image.open` accepts; opens only regular files, because a pipe would block."""
    if isinstance(source, bytes):
        return BytesIO(source)
    if os.path.isfile(source):
        return source
    if os.path.exists(source):
        raise ValueError("it is not a regular file")
    if isinstance(source, Path):
        raise ValueError("no such file")
    if source.startswith(("http://", "https://")):
        return BytesIO(_downloaded(source))
    try:
        encoded = source.partition(",")[2] if source.startswith("data:image/") else source
        return BytesIO(base64.b64decode("".join(encoded.split()), validate=True))
    except ValueError as error:
        raise ValueError(f"no such file, and neither a URL nor base64 ({error})") from error


def _downloaded(url: str) -> bytes:
    """Downloads a URL in a thread with its own event loop: only there one time limit covers the whole download."""
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(asyncio.run, _download(url)).result()
        except TimeoutError as error:
            raise ValueError(f"it took more than {DOWNLOAD_SECONDS} seconds; download it yourself") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"it cannot be downloaded: {reason}") from error


async def _download(url: str) -> bytes:
    content = bytearray()
    async with (
        asyncio.timeout(DOWNLOAD_SECONDS),
        httpx.AsyncClient(follow_redirects=True, timeout=None) as client,
        client.stream("GET", url) as response,
    ):
        response.raise_for_status()
        async for piece in response.aiter_bytes():
            content += piece
            if len(content) > DOWNLOAD_BYTES:
                raise ValueError(f"it has more than {DOWNLOAD_BYTES} bytes; download it yourself")
    return bytes(content)


def to_rgb(
    picture: PIL.Image.Image, do_exif_transpose: bool | None = True, alpha_background: str | None = None
) -> PIL.Image.Image:
    """Converts a picture to RGB with 8 bits per channel, without metadata that could change the pixels later.

    16-bit grey keeps its upper 8 bits, as PIL does for 16-bit colours. [`LlavaSTFImagesKwargs`] documents the options.

    Raises:
        ValueError: for a picture that cannot be decoded, or whose numbers have no known range (PIL's modes I and F,
            unless they are from 0 to 255).
    """
    picture = _with_8_bits(_upright(picture) if do_exif_transpose else _decoded(picture))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if alpha_background is not None and picture.mode == "RGBA":
        painted = PIL.Image.new("RGB", picture.size, alpha_background)
        painted.paste(picture, mask=picture.getchannel("A"))
        return painted
    try:
        picture = picture.convert("RGB")
    except ValueError as error:
        raise ValueError(f"A picture of the mode {picture.mode} has no colours that PIL knows: {error}.") from error
    picture.info = {}
    return picture


def _load(picture: PIL.Image.Image) -> None:
    """Decodes a picture.

    Pillow (seen in 13.0) maps an uncompressed TIFF with a name into memory, with the sides that it has upright although
    its rows lie: a turned one is garbled.
    """
    if picture.format != "TIFF":
        picture.load()
        return
    name = getattr(picture, "filename", "")
    picture.filename = ""  # type: ignore[attr-defined] # the class of the plugin has it
    try:
        picture.load()
    finally:
        picture.filename = name  # type: ignore[attr-defined]


def _decoded(picture: PIL.Image.Image) -> PIL.Image.Image:
    try:
        _load(picture)
    except UNREADABLE as error:
        name, reason = getattr(picture, "filename", "") or "a picture", error or type(error).__name__
        raise ValueError(f"Cannot decode {name}: {reason}. The file is damaged or not complete.") from error
    return picture


def orientation_of(picture: PIL.Image.Image) -> int | None:
    """Returns the EXIF orientation, 1 if there is none; None if the tags cannot be read."""
    try:
        return picture.getexif().get(ORIENTATION, 1)
    except (*UNREADABLE, AttributeError):  # Pillow 10.0 raises the last for a TIFF of several pages
        return None


def _upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Rotates a picture by its EXIF orientation. It reads no other tag: damaged ones are common in photos."""
    picture = _decoded(picture)
    orientation = orientation_of(picture)
    if orientation in (1, None):
        return picture
    picture = picture.copy()
    for tags in ("exif", "Raw profile type exif"):
        picture.info.pop(tags, None)
    picture.getexif()[ORIENTATION] = orientation
    return PIL.ImageOps.exif_transpose(picture)


def _with_8_bits(picture: PIL.Image.Image) -> PIL.Image.Image:
    # Pillow before 10.4 opens a 16-bit PNG in the mode I; remove this when Pillow 10.4 is the oldest supported one.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        array = np.asarray(picture)
        grey = PIL.Image.fromarray((array >> 8).astype(np.uint8))
        if "transparency" in picture.info:
            opaque = array != picture.info["transparency"]
            grey.putalpha(PIL.Image.fromarray(opaque.astype(np.uint8) * 255))
        return grey
    if picture.mode in ("I", "F"):
        return PIL.Image.fromarray(_eight_bits([np.asarray(picture)])[0])
    # These are premultiplied by their alpha; PIL converts them to the plain modes only.
    return picture.convert(picture.mode.upper()) if picture.mode in ("RGBa", "La") else picture


def _as_array(image: Any) -> np.ndarray:
    """Converts a tensor of any dtype and device, or what numpy can read, to an array."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    array = np.asarray(image)
    if array.dtype.kind not in "buif" or 0 in array.shape:
        raise ValueError(
            f"A picture is an array of {array.dtype} of the shape {array.shape}, expected numbers, and at least one."
        )
    return array


def _as_pictures(arrays: list[np.ndarray], layout: str | ChannelDimension | None) -> list[PIL.Image.Image]:
    arrays = _eight_bits([_channels_last(array, layout) for array in arrays])
    return [PIL.Image.fromarray(np.ascontiguousarray(array)) for array in arrays]


def _channels_last(array: np.ndarray, layout: str | ChannelDimension | None) -> np.ndarray:
    """Returns (height, width) or (height, width, 3 or 4); without `layout` the side of 1, 3 or 4 is the channels."""
    if array.ndim == 2:
        return array
    sides = [array.shape[axis] in (1, 3, 4) for axis in (0, -1)]
    if layout is None and all(sides):
        raise ValueError(
            f"A picture has the shape {array.shape}: its channels may be the first or the last number. Say which: "
            '`input_data_format="channels_first"` or `"channels_last"`.'
        )
    first = sides[0] if layout is None else ChannelDimension(layout) is ChannelDimension.FIRST
    if array.ndim != 3 or not sides[0 if first else 1]:
        raise ValueError(
            f"A picture has the shape {array.shape}, expected (height, width), or 1, 3 or 4 channels before or after "
            "them."
        )
    array = np.moveaxis(array, 0, -1) if first else array
    return array[..., 0] if array.shape[-1] == 1 else array


def _eight_bits(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Rounds arrays of numbers from 0 to 255 to whole ones; `True` becomes 255."""
    arrays = [array.astype(np.uint8) * 255 if array.dtype.kind == "b" else array for array in arrays]
    if not all(array.dtype.kind != "f" or np.isfinite(array).all() for array in arrays):
        raise ValueError("A picture has NaN or infinite pixels; expected finite numbers. Check how it was made.")
    low, high = min(array.min() for array in arrays), max(array.max() for array in arrays)
    if 0 < high < 2:  # resizing by a cubic goes a little beyond 1
        raise ValueError(
            f"A picture has pixels up to {high:.3g}, expected 0 to 255. If it is scaled to 0 to 1, or a mask of 0 and "
            "1, multiply it by 255. If it is that dark, give it as a PIL image of 8 bits."
        )
    if np.rint(low) < 0 or np.rint(high) > 255:
        raise ValueError(
            f"A picture has pixels from {low:.6g} to {high:.6g}, expected 0 to 255. Scale it: 16-bit numbers are "
            "divided by 256."
        )
    return [array if array.dtype == np.uint8 else np.rint(array).astype(np.uint8) for array in arrays]


def _scaled_floats(array: np.ndarray, layout: str | ChannelDimension | None, unchanged: bool) -> np.ndarray:
    """Returns numbers that the caller has scaled (`do_rescale=False`) as (3, height, width).

    They must be 0 to 1, unless they stay `unchanged` by padding and resizing.
    """
    if not np.isfinite(array).all():
        raise ValueError("A picture has NaN or infinite pixels; expected finite numbers. Check how it was made.")
    if not (unchanged or (array.min() >= 0 and array.max() <= 1)):
        raise ValueError(
            f"A picture has pixels from {array.min():.6g} to {array.max():.6g}. Floats that are padded or resized with "
            "`do_rescale=False` are expected from 0 to 1: clip them, or give 0 to 255 without `do_rescale=False`."
        )
    array = _channels_last(array, layout)
    return np.stack([array] * 3) if array.ndim == 2 else np.moveaxis(array[..., :3], -1, 0)


def _check_pixels(width: int, height: int, pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"A picture has {width} x {height} pixels: padded or resized, {pixels} would be computed, {MAX_PIXELS} are "
            "allowed. Crop it, or make it smaller."
        )


def _squares_edge(do_pad: bool | None, do_resize: bool | None, size: Any, **kwargs: Any) -> int | None:
    """Returns the side that a padded square is resized to; None if it is not resized so."""
    return size.shortest_edge if do_pad and do_resize and not size.longest_edge else None


def _padding(mean: Sequence[float] | None) -> tuple[int, ...]:
    """Returns the colour of the padding: the mean colour, or black."""
    return tuple(int(255 * channel) for channel in mean) if mean else (0, 0, 0)


def _padded_and_resized(image: PIL.Image.Image, colour: tuple[int, ...], edge: int, resample: int) -> PIL.Image.Image:
    """Pads a picture to a square and resizes it to (edge, edge), without making the large square.

    PIL resizes all rows, then all columns. This resizes only the rows of the picture, some at a time; the rows above
    and below have one colour and need no resizing. The result has the same bits.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    rows = PIL.Image.new("RGB", (edge, side), colour)
    for start in range(0, image.height, 512):
        end = min(start + 512, image.height)
        band = PIL.Image.new("RGB", (side, end - start), colour)
        band.paste(image.crop((0, start, image.width, end)), (left, 0))
        rows.paste(band.resize((edge, end - start), resample), (0, top + start))
    return rows.resize((edge, edge), resample)


def _flat_images(images: Any) -> list:
    """Flattens a picture, a list of pictures, lists of pictures, or a 4-D array to one list."""
    if isinstance(images, (list, tuple)):
        return [picture for item in images for picture in _flat_images(item)]
    if isinstance(images, PIL.Image.Image) or getattr(images, "ndim", None) in (2, 3):
        return [images]
    if getattr(images, "ndim", None) == 4:
        return list(images)
    raise ValueError(
        "Expected a picture (PIL image, array, tensor, path, URL, base64 or bytes), got "
        f"{type(images).__name__}{getattr(images, 'shape', '')}."
    )


# Read videos from files and animations, and split them into frames


def is_picture(path: Any) -> bool:
    """Returns whether this is the path or URL of a picture (a frame or an animation, no video), by its suffix."""
    if not isinstance(path, (str, Path)):
        return False
    if str(path).startswith("data:image/"):
        return True
    suffix = os.path.splitext(urlparse(str(path)).path if "://" in str(path) else path)[1].lower()
    kind = PIL.Image.registered_extensions().get(suffix)
    return kind == "MPO" or (kind in PIL.Image.OPEN and kind != "MPEG")  # PIL opens the first as a JPEG, the last never


def is_animation(picture: PIL.Image.Image) -> bool:
    """Returns whether a picture is an animated GIF, WebP, PNG or AVIF; a photo of several parts is none."""
    try:
        return picture.format in ANIMATED and getattr(picture, "is_animated", False)
    except UNREADABLE:  # the file is damaged after its first frame
        return True


def is_animated_file(path: str) -> bool:
    """Returns whether a file is an animation, and so a video; reads its header only."""
    try:
        if not os.path.isfile(path):
            return False
        with PIL.Image.open(path) as picture:
            return is_animation(picture)
    except UNREADABLE:
        return False


def shown_frames(animation: PIL.Image.Image, num_frames: int | None = None, fps: float | None = None) -> list[int]:
    """Returns the indices of the frames that are shown at the sampled times: `fps` a second, or `num_frames` in all."""
    milliseconds = []
    _seek_end(animation)
    first = int(getattr(animation, "default_image", False))  # a PNG may begin with a picture for old viewers alone
    for index in range(first, animation.n_frames):  # type: ignore[attr-defined] # the class of the plugin has it
        animation.seek(index)
        animation.load()
        # Formats write a number of ticks; PIL gives a float, with which a frame's end and a sampled time would differ.
        duration = Fraction(animation.info.get("duration") or FRAME_MILLISECONDS)
        milliseconds.append(duration.limit_denominator(2**16))
    ends = [*accumulate(milliseconds)]
    if num_frames is not None and num_frames >= len(ends):
        return list(range(first, first + len(ends)))
    # A millisecond is the shortest time that a frame is shown.
    count = num_frames or max(1, min(_frames_in(ends[-1] / 1000, fps or VIDEO_FPS), int(ends[-1])))
    return sorted({first + bisect_right(ends, ends[-1] * place / count) for place in range(count)})


def _frames_in(seconds: Fraction, fps: float) -> int:
    """Returns how many frames are sampled, at least one; with floats 29 frames at 25.0 a second would give 28."""
    return max(1, int(seconds * Fraction(str(fps))))


def _seek_end(animation: PIL.Image.Image) -> None:
    """Seeks the last frame: Pillow 13.0 miscounts the frames of an animated PNG that is rewound earlier."""
    animation.seek(animation.n_frames - 1)  # type: ignore[attr-defined]
    animation.load()


def _flat_videos(videos: Any) -> Iterator[Any]:
    """Yields single videos from any nesting: a file, an animation, a 4-D array, or a list of loaded frames."""
    if is_picture(videos):
        videos = load_picture(videos)
    if isinstance(videos, PIL.Image.Image):
        yield videos if is_animation(videos) else [videos]
    elif isinstance(videos, (str, Path)) or getattr(videos, "ndim", None) == 4:
        yield videos
    elif isinstance(videos, (list, tuple)) and videos and _is_frame(videos[0]):
        frames = [load_picture(item) if isinstance(item, (str, Path)) else item for item in videos]
        yield from _separated(frames)
    elif isinstance(videos, (list, tuple)) or getattr(videos, "ndim", None) == 5:
        for item in videos:
            yield from _flat_videos(item)
    else:
        raise ValueError(f"Expected a video (list of frames, 4-D array or file), got {type(videos).__name__}.")


def _is_frame(item: Any) -> bool:
    return is_picture(item) or isinstance(item, PIL.Image.Image) or getattr(item, "ndim", None) in (2, 3)


def _is_list_of_videos(item: Any) -> bool:
    """Returns whether this may be the list of a prompt's videos: it is a list, but not one of frames."""
    return isinstance(item, (list, tuple)) and not (item and _is_frame(item[0]))


def _separated(frames: list) -> list:
    """Returns one video of these frames or, if they are animations, each of them."""
    animations = [isinstance(frame, PIL.Image.Image) and is_animation(frame) for frame in frames]
    if any(animations) and not all(animations):
        raise ValueError(
            f"{sum(animations)} of the {len(frames)} frames of a video are animations, which are videos themselves. "
            "Give videos in one list, and the frames of one video in a list of their own."
        )
    return frames if any(animations) else [frames]


def _frames(video: Any, num_frames: int | None, fps: float | None) -> list:
    """Returns the frames of one video: `fps` per second of a file or animation, or `num_frames` evenly spread."""
    if fps is not None and num_frames is not None:
        raise ValueError(f"`fps` is {fps} and `num_frames` is {num_frames}: give one of them.")
    if not (fps is None or 0 < fps < math.inf) or not (num_frames is None or num_frames > 0):
        raise ValueError(f"`fps` is {fps} and `num_frames` is {num_frames}, expected a positive number.")
    clock = VIDEO_FPS if fps is None and num_frames is None else fps
    if isinstance(video, PIL.Image.Image):
        return _animation_frames(video, num_frames, clock)
    if isinstance(video, (str, Path)):
        return _file_frames(str(video), num_frames, clock)
    if fps is not None:
        raise ValueError(f"`fps` is {fps}, but a list of frames has no clock. Use `num_frames`, or give a video file.")
    if num_frames is None or num_frames >= len(video):
        return list(video)
    return [video[index] for index in np.linspace(0, len(video) - 1, num_frames).round().astype(int)]


def _animation_frames(animation: PIL.Image.Image, num_frames: int | None, fps: float | None) -> list[PIL.Image.Image]:
    position, frames = animation.tell(), []
    try:
        for index in shown_frames(animation, num_frames, fps):
            animation.seek(index)
            frames.append(animation.copy())
        _seek_end(animation)
        animation.seek(position)
    except UNREADABLE as error:
        name = getattr(animation, "filename", "") or "an animation"
        raise ValueError(f"Cannot decode {name}: {error}. The file is damaged or not complete.") from error
    return frames


def _file_frames(video: str, num_frames: int | None, fps: float | None) -> list[PIL.Image.Image]:
    try:
        if video.startswith(("http://", "https://")):
            with tempfile.NamedTemporaryFile() as file:
                file.write(_downloaded(video))
                file.flush()
                return _file_frames(file.name, num_frames, fps)
        if is_animated_file(video):  # whatever its name; PyAV would take other frames
            return _animation_frames(load_picture(Path(video)), num_frames, fps)
        return _decoded_frames(video, num_frames, fps)
    except (OSError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"Cannot read the video {video!r}: {error}") from error


def number_of_samples(
    path: str, num_frames: int | None, fps: float | None, found: int | None = None
) -> tuple[int, int]:
    """Returns how many frames are taken of a video file, and how many it has: `found`, or else they are counted.

    Raises:
        ValueError: if it has fewer than are asked for, no frame rate, or ends before the time that its header names.
    """
    found = found or _number_of_frames(path)
    with _opened_video(path) as container:
        rate = container.streams.video[0].average_rate
    if not num_frames and not rate:
        raise ValueError("it has no frame rate. Use `num_frames`.")
    count = num_frames or _frames_in(found / rate, fps or VIDEO_FPS)
    if count > found:
        raise ValueError(f"it has {found} frames, but `num_frames` or `fps` asks for {count}.")
    return count, found


def _decoded_frames(path: str, num_frames: int | None, fps: float | None) -> list[PIL.Image.Image]:
    """Decodes evenly spread frames of a file. They have its rotation as EXIF orientation, which turns them later."""
    count, found = number_of_samples(path, num_frames, fps)
    wanted, frames = {index * found // count for index in range(count)}, []
    with _opened_video(path) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                frames.append(PIL.Image.fromarray(frame.to_ndarray(format="rgb24")))
                frames[-1].getexif()[ORIENTATION] = _orientation(frame)
            if len(frames) == count:
                return frames
    raise ValueError(f"{len(frames)} of {count} frames can be decoded. The file is damaged or not complete.")


def _opened_video(path: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("A video file is decoded by PyAV, which is not installed: `pip install av`.") from error
    if not os.path.isfile(path):  # PyAV would open other protocols, too
        raise FileNotFoundError("there is no such file.")
    container = av.open(path)
    if not container.streams.video:
        container.close()
        raise ValueError("it has no pictures.")
    return container


def _number_of_frames(path: str) -> int:
    """Counts the frames of a file without decoding them: the headers of WebM, Matroska and MPEG do not name a number.

    Raises:
        ValueError: if it ends before the time that its header names.
    """
    with _opened_video(path) as container:
        stream, number, end = container.streams.video[0], 0, 0.0
        for packet in container.demux():
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            number += packet.stream == stream and packet.size > 0 and not packet.is_discard
        # Other formats have no seconds in their header, and what PyAV then says is a guess.
        named = container.format.name.split(",")[0] in ("asf", "avi", "flv", "matroska", "mov")
        seconds = (container.duration or 0) / 1e6 if named else 0
        last = float(1 / stream.average_rate) if stream.average_rate else 0  # the last frame may not say how long it is
        if end + last + 0.5 < seconds:
            raise ValueError(f"it ends after {end:.1f} of {seconds:.1f} seconds. The file is damaged or not complete.")
    return number


def _orientation(frame: Any) -> int:
    """Returns how a decoded frame is to be turned, as an EXIF orientation; phones film sideways and say so."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1
    (a, b, _), (c, d, _), _ = np.frombuffer(bytes(matrix), np.int32).reshape(3, 3) // 2**16
    return ORIENTATIONS.get((a, b, c, d), 1)


def _python_numbers(numbers: Any) -> Any:
    """Returns whole numbers of numpy and torch as Python's."""
    if isinstance(numbers, (list, tuple)):
        return [_python_numbers(number) for number in numbers]
    return numbers.tolist() if isinstance(numbers, (np.generic, np.ndarray, torch.Tensor)) else numbers


def _as_list(numbers: Any) -> list:
    return [*numbers] if isinstance(numbers, (list, tuple)) else [numbers]


def _for_each_frame(max_soft_tokens: Any, frames: list[int]) -> Any:
    """Returns the option with one number for each frame, if it is a list with one for each video."""
    if not isinstance(max_soft_tokens, list) or len(max_soft_tokens) != len(frames):
        return max_soft_tokens
    if not all(isinstance(number, int) for number in max_soft_tokens):
        return max_soft_tokens  # so that the error names what was given
    return [number for number, count in zip(max_soft_tokens, frames, strict=True) for _ in range(count)]


def _in_reading_order(types: list[str], images: Any, videos: list) -> Any:
    """Merges images and frames, or their tokens, in the order of their placeholders; without text, images are first.

    Returns (images + frames, 3, H, W): a tensor, an array or a list, the type of the pixels of each video.
    """
    next_image, next_video = iter(images), iter(videos)
    pixels: list = []
    for kind in types or ["image"] * len(images) + ["video"] * len(videos):
        pixels.extend([next(next_image)] if kind == "image" else next(next_video))
    if isinstance(videos[0], torch.Tensor):
        return torch.stack(pixels)
    return np.stack(pixels) if isinstance(videos[0], np.ndarray) else pixels


def _offsets_in_prompt(offset_mapping: Any, places: list[list[dict]]) -> Any:
    """Converts character offsets in the expanded text to offsets in the original prompt.

    Before transformers 5.18 the assistant mask of a chat template needs them.
    """

    def in_prompt(offsets: tuple[int, int], row: list[dict]) -> tuple[int, int]:
        start, end = offsets
        for place in reversed(row):
            if start >= place["new_span"][1]:
                shift = place["new_span"][1] - place["span"][1]
                return start - shift, end - shift
            if start >= place["new_span"][0]:
                return place["span"]
        return start, end

    if isinstance(offset_mapping, list):
        return [[in_prompt(offsets, row) for offsets in ids] for ids, row in zip(offset_mapping, places, strict=True)]
    rows = _offsets_in_prompt(offset_mapping.tolist(), places)
    return torch.tensor(rows) if isinstance(offset_mapping, torch.Tensor) else np.array(rows)


__all__ = ["LlavaSTFImageProcessor", "LlavaSTFProcessor"]
