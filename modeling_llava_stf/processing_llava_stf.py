# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Processor of LLaVA-STF: pictures, videos and text in, pixels and token ids out."""

import copy
import json
import mimetypes
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import BatchFeature, LlavaProcessor
from transformers.image_utils import load_image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, Unpack
from transformers.utils import cached_file
from transformers.video_utils import load_video

from .configuration_llava_stf import LlavaSTFConfig

# What the processor must know of the model.
MODEL_SETTINGS = ("patch_size", "fusion_window", "vision_feature_select_strategy")
# Where a file is sought, of the arguments of `from_pretrained`.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Frames per second that are read from a video file, as the original's evaluation does.
VIDEO_FPS = 1


class LlavaSTFImageProcessor(LlavaImageProcessorPil):
    """The original's preprocessing, to the last bit: PIL's bicubic resize, whether or not torchvision is installed.

    A picture becomes RGB as PIL converts it (transparency is dropped, not painted white), is pasted in the middle of a
    square of CLIP's mean colour (`do_pad`), resized, cropped and normalised (original: `image_aspect_ratio: pad`).

    Raises:
        ValueError: for a picture that cannot be decoded, is not finite, or whose range does not fit `do_rescale`.
    """

    size = {"shortest_edge": 336}
    crop_size = {"height": 336, "width": 336}
    do_pad = True

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> np.ndarray:
        """One picture, of any kind, as (channels, height, width)."""
        if do_convert_rgb and isinstance(image, PIL.Image.Image):
            image = _decoded(image)
            edge, resample = getattr(kwargs.get("size"), "shortest_edge", None), kwargs.get("resample")
            if edge and kwargs.get("do_pad") and kwargs.get("do_resize") and isinstance(resample, int):
                # As the stock class will, but it does so with arrays: a large picture would be copied several times.
                image = _squared(image, kwargs["image_mean"])
                image = image.resize((edge, edge), resample)
        elif do_convert_rgb and kwargs.get("input_data_format") is None:
            image = _three_channels(np.asarray(image))
        array = super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)
        if not np.isfinite(array).all():
            raise ValueError("A picture has NaN or infinite pixels; expected finite numbers. Check how it was made.")
        return array

    def to_dict(self) -> dict[str, Any]:
        """As [`ImageProcessingMixin.to_dict`]; the reference to the code never names another repository."""
        reference = {"AutoImageProcessor": "processing_llava_stf.LlavaSTFImageProcessor"}
        return {**super().to_dict(), "auto_map": reference}

    def _preprocess(self, images: list[np.ndarray], do_rescale: bool, **kwargs: Any) -> BatchFeature:
        for image in images:
            if do_rescale and np.issubdtype(image.dtype, np.floating) and 0 < image.max() <= 1:
                raise ValueError(
                    f"A picture has floating point pixels up to {image.max():.3g}, expected 0 to 255. If it is scaled "
                    "to 0 to 1 already, multiply it by 255."
                )
        return super()._preprocess(images, do_rescale=do_rescale, **kwargs)


class _OneAtATime:
    """A tokenizer that serves one thread after the other.

    The fast tokenizer holds padding and truncation as state, from setting them to encoding: two calls at once would pad
    and cut as one of them asks (transformers 5.24). Can go when the settings are arguments of the encoding.
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
    os.register_at_fork(after_in_child=_new_lock)  # the thread that holds it is not in a forked worker


class LlavaSTFProcessor(LlavaProcessor):
    r"""
    Turns prompts with `<image>` and `<video>` placeholders, pictures and videos into the inputs of LLaVA-STF.

    Every image, and every frame of a video, becomes (image size / patch size / fusion window)^2 image tokens (144 for
    the released model); the frames of a video stand one after the other in the place of its one placeholder.
    `pixel_values` holds images and frames in the order of their placeholders: (images + frames, 3, height, width).

    Threads may share a processor, also through `apply_chat_template`. They may not share its `tokenizer` in calls of
    their own that pad or truncate: give each thread a `copy.deepcopy` of it.

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
            tokenizer does not know the image token.
    """

    # One entry per video, of different lengths: merged with the images before they leave the processor.
    skip_tensor_conversion = [*LlavaProcessor.skip_tensor_conversion, "pixel_values_videos"]

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
        **kwargs: Any,
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
            **kwargs,
        )
        if self.tokenizer.convert_tokens_to_ids(self.image_token) in (None, self.tokenizer.unk_token_id):
            raise ValueError(
                f"The tokenizer does not know {self.image_token!r}. Use the tokenizer of a converted checkpoint, or "
                "add it as a special token."
            )

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        """As [`ProcessorMixin.get_processor_dict`]; what no processor_config.json says comes from the model's config.

        A pipeline's `save_pretrained` writes tokenizer and image processor, but not that file.
        """
        settings, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if not any(name in settings for name in MODEL_SETTINGS):
            where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            settings |= _settings_of_model(pretrained_model_name_or_path, where)
        return settings, unused

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As [`ProcessorMixin.from_args_and_dict`], the last step of loading; incomplete settings are refused."""
        loaded = super().from_args_and_dict(args, processor_dict, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        processor.check_settings()
        # How the tokenizer was loaded, not what it is: saved, it would differ from load to load.
        for name in ("dtype", "is_local", "local_files_only"):
            processor.tokenizer.init_kwargs.pop(name, None)
        return loaded

    def check_settings(self) -> None:
        """Raises a `ValueError` if a setting is missing, without which tokens cannot be counted, or does not fit."""
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

    @property
    def video_processor(self) -> LlavaSTFImageProcessor:
        """A video is its frames, and a frame is a picture: there is no other processor (and no torchvision needed)."""
        return self.image_processor

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Unpack[ProcessingKwargs]
    ) -> BatchFeature:
        """Prepares a batch for the model.

        Args:
            images: a picture, a list of pictures in the order of the placeholders, or one list per prompt. A picture
                is a PIL image, an array, a tensor, a path or a URL.
            text (`str` or `list[str]`): prompts, with one `<image>` per image and one `<video>` per video.
            videos: a video or a list of videos; a video is a list of frames, a 4-D array or a file (read with PyAV,
                one frame per second unless `fps` or `num_frames` say otherwise).
            kwargs: of the tokenizer and the image processor, such as `padding`, `return_tensors`, `do_pad`.

        Returns:
            [`BatchFeature`] with `input_ids`, `attention_mask` and `pixel_values`.

        Raises:
            ValueError: if placeholders and images differ in number, a picture is unreadable, or a prompt with images
                is longer than the model's context.
        """
        offsets_wanted = kwargs.pop("return_text_replacement_offsets", False)
        guarded = copy.copy(self)
        guarded.tokenizer = _OneAtATime(self.tokenizer)
        outputs = super(LlavaSTFProcessor, guarded).__call__(
            images=images, text=text, videos=videos, return_text_replacement_offsets=True, **kwargs
        )
        places = outputs["text_replacement_offsets"] if offsets_wanted else outputs.pop("text_replacement_offsets", [])
        if "pixel_values_videos" in outputs:
            types = [place["type"] for row in places for place in row]
            outputs["pixel_values"] = _in_reading_order(
                types, outputs.get("pixel_values", []), outputs.pop("pixel_values_videos")
            )
        if "offset_mapping" in outputs and not offsets_wanted:
            outputs["offset_mapping"] = _offsets_in_prompt(outputs["offset_mapping"], places)
        elif isinstance(outputs.get("offset_mapping"), torch.Tensor):
            # `apply_chat_template` walks them pair by pair for its mask: several times as fast in lists.
            outputs["offset_mapping"] = outputs["offset_mapping"].tolist()
        if text is not None:
            self._check_context(outputs["input_ids"])
        return outputs

    # Counting tokens: one helper for the placeholders' replacement and for serving engines.

    def num_image_tokens(self, height: int, width: int) -> int:
        """Tokens of an image, or of a frame, of `height` x `width` pixels as it enters the vision tower."""
        self.check_settings()
        patch_and_window = self.patch_size * self.fusion_window
        return (height // patch_and_window) * (width // patch_and_window)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The placeholders that stand for image `image_idx`."""
        return self.image_token * self.num_image_tokens(*image_inputs["pixel_values"][image_idx].shape[-2:])

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        """The placeholders that stand for video `video_idx`: those of its frames, one after the other."""
        frames = video_inputs["pixel_values_videos"][video_idx]
        return self.image_token * sum(self.num_image_tokens(*frame.shape[-2:]) for frame in frames)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        crop = kwargs.get("crop_size") or self.image_processor.crop_size
        tokens = self.num_image_tokens(crop["height"], crop["width"])
        return MultiModalData(num_image_tokens=[tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes))

    # The steps of `ProcessorMixin.__call__`

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple:
        """Loads pictures, and brings videos to one list; pictures given per prompt stay so, to be counted."""
        images = _loaded(images) if images is not None else None
        videos = list(_flat_videos(videos)) if videos is not None else None
        has_images = images is not None and bool(len(_flat_images(images)))
        return super().prepare_inputs_layout(
            images=images if has_images else None, text=text, videos=videos or None, audio=audio, **kwargs
        )

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Raises a `ValueError` if placeholders and images, or videos, differ in number."""
        if images is None and text is None and videos is None:
            raise ValueError(f"{type(self).__name__} got nothing: give images, videos or text.")
        if text is None:
            return
        if not all(isinstance(prompt, str) for prompt in text):
            raise ValueError(f"`text` must be a string or a list of strings, got {text!r:.100}.")
        per_prompt = isinstance(images, (list, tuple)) and all(isinstance(item, (list, tuple)) for item in images)
        n_images = [len(_flat_images(item)) for item in images] if per_prompt else [len(_flat_images(images))]
        self._check_count(self.image_token, text, n_images)
        self._check_count(self.video_token, text, [len(videos or [])])

    def _check_count(self, token: str, text: list[str], given: list[int]) -> None:
        expected = [prompt.count(token) for prompt in text]
        if expected == given or (len(given) != len(expected) and sum(expected) == sum(given)):
            return
        crop = self.image_processor.crop_size
        raise ValueError(
            f"The number of {token} tokens in the prompts should be the same as the number of images or videos given: "
            f"found {sum(expected)} ({expected} by prompt) and {sum(given)} ({given} by prompt or in all). Each image "
            f"or frame takes {self.num_image_tokens(crop['height'], crop['width'])} tokens; write one {token} for it. "
            "Usual causes: the chat template was not applied, or a placeholder is missing from the text or twice in it."
        )

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict, list[str]]:
        return super()._process_images(_flat_images(images), **kwargs)

    def _process_videos(self, videos: list, **kwargs: Any) -> tuple[dict, list[str]]:
        sampling = {name: kwargs.get(name) for name in ("num_frames", "fps")}
        image_kwargs = {name: value for name, value in kwargs.items() if name in ImagesKwargs.__annotations__}
        image_kwargs.setdefault("do_pad", False)
        pixels = [self.image_processor(_frames(video, **sampling), **image_kwargs)["pixel_values"] for video in videos]
        outputs = {"pixel_values_videos": pixels}
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
            vision = int((np.asarray(row) == self.image_token_id).sum())
            if vision and len(row) > limit:
                raise ValueError(
                    f"Prompt {index} has {len(row)} tokens, {vision} of them of images or frames, but the context "
                    f"holds {limit}. Give fewer images, fewer frames (`num_frames=`) or less text."
                )

    def to_dict(self) -> dict[str, Any]:
        """As [`ProcessorMixin.to_dict`]; the reference to the code never names another repository."""
        return {**super().to_dict(), "auto_map": {"AutoProcessor": "processing_llava_stf.LlavaSTFProcessor"}}


def _settings_of_model(folder: Any, where: dict[str, Any]) -> dict[str, Any]:
    """The three settings as the config.json beside the processor's files has them; none if that is not of our model."""
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


def _decoded(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        name = getattr(image, "filename", "") or "a picture"
        raise ValueError(f"Cannot decode {name}: {error}. The file is damaged or not complete.") from error


def _squared(image: PIL.Image.Image, mean: Sequence[float] | None) -> PIL.Image.Image:
    """In the middle of a square of the mean colour, or of a black one."""
    side = max(image.size)
    square = PIL.Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in mean) if mean else 0)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _three_channels(array: np.ndarray) -> np.ndarray:
    """Grey or transparent arrays, channels first or last, as RGB."""
    axis = -1 if array.shape[-1] in (1, 3, 4) else 0
    if array.shape[axis] == 1:
        return np.repeat(array, 3, axis)
    return np.take(array, range(3), axis) if array.shape[axis] == 4 else array


def _loaded(images: Any) -> Any:
    """Opens paths and URLs, in any nesting; leaves other pictures as they are."""
    if isinstance(images, (list, tuple)):
        return [_loaded(image) for image in images]
    if not isinstance(images, (str, Path)):
        return images
    try:
        return load_image(str(images))
    except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read the picture {str(images)!r}: {error}") from error


def _flat_images(images: Any) -> list:
    """A picture, a list of pictures, lists of pictures, or a 4-D array, as one list."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [picture for item in images for picture in _flat_images(item)]
    if isinstance(images, PIL.Image.Image) or getattr(images, "ndim", None) == 3:
        return [images]
    if getattr(images, "ndim", None) == 2:
        return [images[..., None]]
    if getattr(images, "ndim", None) == 4:
        return list(images)
    raise ValueError(f"Expected a picture (PIL image, array, tensor, path or URL), got {type(images).__name__}.")


def _is_frame(item: Any) -> bool:
    if isinstance(item, (str, Path)):
        return (mimetypes.guess_type(str(item))[0] or "").startswith("image/")
    return isinstance(item, PIL.Image.Image) or getattr(item, "ndim", None) == 3


def _flat_videos(videos: Any) -> Iterator[Any]:
    """Single videos out of any nesting; a video is a file, a 4-D array, or a list of frames, which are loaded."""
    if isinstance(videos, (str, Path)) or getattr(videos, "ndim", None) == 4:
        yield videos
    elif isinstance(videos, (list, tuple)) and videos and _is_frame(videos[0]):
        yield _loaded(videos)
    elif isinstance(videos, (list, tuple)) or getattr(videos, "ndim", None) == 5:
        for item in videos:
            yield from _flat_videos(item)
    else:
        raise ValueError(f"Expected a video (list of frames, 4-D array or file), got {type(videos).__name__}.")


def _frames(video: Any, num_frames: int | None, fps: float | None) -> list:
    """The frames of one video: `fps` per second of a file, or `num_frames` evenly spread."""
    if isinstance(video, (str, Path)):
        fps = VIDEO_FPS if fps is None and num_frames is None else fps
        try:
            return list(load_video(str(video), num_frames=num_frames, fps=fps, backend="pyav")[0])
        except (OSError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"Cannot read the video {str(video)!r}: {error}") from error
    if fps is not None:
        raise ValueError(f"`fps` is {fps}, but a list of frames has no clock. Use `num_frames`, or give a video file.")
    if num_frames is None or num_frames >= len(video):
        return list(video)
    return [video[index] for index in np.linspace(0, len(video) - 1, num_frames).round().astype(int)]


def _in_reading_order(types: list[str], images: Any, videos: list) -> Any:
    """Images and frames in the order of their placeholders (without text: images first), as (images + frames, 3, H, W).

    The result is a tensor, an array or a list, as the pixels of each video are.
    """
    next_image, next_video = iter(images), iter(videos)
    pixels: list = []
    for kind in types or ["image"] * len(images) + ["video"] * len(videos):
        pixels.extend([next(next_image)] if kind == "image" else next(next_video))
    if isinstance(videos[0], torch.Tensor):
        return torch.stack(pixels)
    return np.stack(pixels) if isinstance(videos[0], np.ndarray) else pixels


def _offsets_in_prompt(offset_mapping: Any, places: list[list[dict]]) -> Any:
    """Character offsets in the expanded text as offsets in the prompt that was given.

    Before transformers 5.18 the assistant mask of a chat template is found by these.
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
