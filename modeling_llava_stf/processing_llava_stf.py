# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Processor of LLaVA-STF: pictures, videos and text in, pixels and token ids out."""

import mimetypes
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import BatchFeature, LlavaProcessor
from transformers.image_utils import load_image, make_flat_list_of_images
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.processing_utils import ImagesKwargs, MultiModalData
from transformers.video_utils import load_video

# Frames per second that are read from a video file, as the original's evaluation does.
VIDEO_FPS = 1


class LlavaSTFImageProcessor(LlavaImageProcessorPil):
    """The original's preprocessing, to the last bit: PIL's bicubic resize, whether or not torchvision is installed.

    A picture becomes RGB as PIL converts it (transparency is dropped, not painted white), is pasted in the middle of a
    square of CLIP's mean colour (`do_pad`), resized, cropped and normalised (original: `mm_utils.py`).
    """

    size = {"shortest_edge": 336}
    crop_size = {"height": 336, "width": 336}
    do_pad = True

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> np.ndarray:
        """One picture as (channels, height, width); a `ValueError` if it cannot be decoded or is not finite."""
        if isinstance(image, PIL.Image.Image) and do_convert_rgb:
            image = _decoded(image)
        array = super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)
        if not np.isfinite(array).all():
            raise ValueError("A picture has NaN or infinite pixels. Check how it was made; expected finite numbers.")
        return array


class LlavaSTFProcessor(LlavaProcessor):
    r"""
    Turns prompts with `<image>` and `<video>` placeholders, pictures and videos into the inputs of LLaVA-STF.

    Every image, and every frame of a video, becomes (image size / patch size / fusion window)^2 image tokens (144 for
    the released model); the frames of a video stand one after the other in the place of its one placeholder.
    `pixel_values` holds images and frames in the order of their placeholders: (images + frames, 3, height, width).

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

    # One array per video, of different lengths: merged with the images before they leave the processor.
    skip_tensor_conversion = [*LlavaProcessor.skip_tensor_conversion, "pixel_values_videos"]

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        fusion_window=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        video_token="<video>",
        **kwargs,
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
        self._check_settings()

    def _check_settings(self) -> None:
        settings = {
            "patch_size": self.patch_size,
            "fusion_window": self.fusion_window,
            "vision_feature_select_strategy": self.vision_feature_select_strategy,
        }
        missing = [name for name, value in settings.items() if value is None]
        if missing:
            raise ValueError(
                f"The processor lacks {', '.join(missing)}: without them it cannot count image tokens. A complete "
                "processor_config.json has all three; these files may belong to a plain LLaVA."
            )
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
        if self.tokenizer.convert_tokens_to_ids(self.image_token) in (None, self.tokenizer.unk_token_id):
            raise ValueError(
                f"The tokenizer does not know {self.image_token!r}. Use the tokenizer of a converted checkpoint, or add "
                "it as a special token."
            )

    @property
    def video_processor(self) -> LlavaSTFImageProcessor:
        """A video is its frames, and a frame is a picture: there is no other processor (and no torchvision needed)."""
        return self.image_processor

    def __call__(self, images=None, text=None, videos=None, **kwargs: Any) -> BatchFeature:
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
        prompts = [text] if isinstance(text, str) else text
        images = self._flat_media(images, prompts, self.image_token)
        videos = self._flat_media(videos, prompts, self.video_token)
        outputs = super().__call__(images=images, text=text, videos=videos, **kwargs)
        if videos is not None:
            outputs["pixel_values"] = self._in_reading_order(
                prompts, outputs.get("pixel_values"), outputs.pop("pixel_values_videos")
            )
        if prompts is not None:
            self._check_context(outputs["input_ids"])
        return outputs

    # Counting tokens: one helper for the placeholders' replacement and for serving engines.

    def num_image_tokens(self, height: int, width: int) -> int:
        """Tokens of an image, or of a frame, of `height` x `width` pixels as it enters the vision tower."""
        patch_and_window = self.patch_size * self.fusion_window
        return (height // patch_and_window) * (width // patch_and_window)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The placeholders that stand for image `image_idx`."""
        return self.image_token * self.num_image_tokens(*image_inputs["pixel_values"][image_idx].shape[-2:])

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        """The placeholders that stand for video `video_idx`: those of its frames, one after the other."""
        frames = video_inputs["pixel_values_videos"][video_idx]
        return self.image_token * sum(self.num_image_tokens(*frame.shape[-2:]) for frame in frames)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        crop = kwargs.get("crop_size") or self.image_processor.crop_size
        tokens = self.num_image_tokens(crop["height"], crop["width"])
        return MultiModalData(
            num_image_tokens=[tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    # Pixels

    def _process_videos(self, videos: list, **kwargs: Any) -> tuple[dict, list[str]]:
        sampling = {name: kwargs.get(name) for name in ("num_frames", "fps")}
        image_kwargs = {name: value for name, value in kwargs.items() if name in ImagesKwargs.__annotations__}
        image_kwargs.setdefault("do_pad", False)
        pixels = [
            self.image_processor(_frames(video, **sampling), **image_kwargs)["pixel_values"] for video in videos
        ]
        outputs = {"pixel_values_videos": pixels}
        return outputs, [self.replace_video_token(outputs, index) for index in range(len(videos))]

    def _in_reading_order(self, prompts: list[str] | None, images: Any, videos: list) -> Any:
        """Images and frames in the order of their placeholders: (images + frames, 3, H, W), in the type of `videos`."""
        images = [] if images is None else images
        if prompts is None:
            pixels = [*images, *(frame for video in videos for frame in video)]
        else:
            next_image, next_video = iter(images), iter(videos)
            either = f"{re.escape(self.image_token)}|{re.escape(self.video_token)}"
            pixels = []
            for placeholder in (token for prompt in prompts for token in re.findall(either, prompt)):
                pixels += [next(next_image)] if placeholder == self.image_token else next(next_video)
        if isinstance(videos[0], torch.Tensor):
            return torch.stack(pixels)
        return np.stack(pixels) if isinstance(videos[0], np.ndarray) else pixels

    # Input checks

    def _flat_media(self, media: Any, prompts: list[str] | None, token: str) -> list | None:
        """Images or videos as one flat list; a `ValueError` if their number is not that of the placeholders."""
        flatten = _flat_images if token == self.image_token else _flat_videos
        flat = [] if media is None else list(flatten(media))
        if prompts is not None:
            expected = [prompt.count(token) for prompt in prompts]
            per_prompt = isinstance(media, (list, tuple)) and all(isinstance(item, (list, tuple)) for item in media)
            given = [len(list(flatten(item))) for item in media] if per_prompt and token == self.image_token else None
            if sum(expected) != len(flat) or (given is not None and len(given) == len(expected) != 1 and given != expected):
                crop = self.image_processor.crop_size
                tokens = self.num_image_tokens(crop["height"], crop["width"])
                raise ValueError(
                    f"The prompts have {sum(expected)} {token} placeholders (per prompt: {expected}), but {len(flat)} "
                    f"were given" + (f" (per prompt: {given})" if given else "") + f"; each image or frame takes "
                    f"{tokens} tokens. Write one {token} for each, in order. Usual causes: the chat template was not "
                    "applied, or a placeholder is missing from the text or stands twice."
                )
        return flat or None

    def _check_context(self, input_ids: Any) -> None:
        limit = self.tokenizer.model_max_length
        rows = input_ids if isinstance(input_ids[0], (list, tuple, np.ndarray, torch.Tensor)) else [input_ids]
        for index, row in enumerate(rows):
            vision = int((np.asarray(row) == self.image_token_id).sum())
            if vision and len(row) > limit:
                raise ValueError(
                    f"Prompt {index} has {len(row)} tokens, {vision} of them of images or frames, but the context holds "
                    f"{limit}. Give fewer images, fewer frames (`num_frames=`) or less text."
                )

    def to_dict(self) -> dict[str, Any]:
        """As [`ProcessorMixin.to_dict`]; the references to the code are those of this file, wherever it was loaded."""
        output = super().to_dict()
        if self._auto_class is not None:
            module = type(self).__module__.split(".")[-1]
            output["auto_map"] = {"AutoProcessor": f"{module}.{type(self).__name__}"}
            output["image_processor"]["auto_map"] = {"AutoImageProcessor": f"{module}.{type(self.image_processor).__name__}"}
        return output


def _decoded(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        name = getattr(image, "filename", "") or "a picture"
        raise ValueError(f"Cannot decode {name}: {error}. The file is damaged or not complete.") from error


def _loaded(image: Any) -> Any:
    if not isinstance(image, (str, Path)):
        return image
    try:
        return load_image(str(image))
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read the picture {str(image)!r}: {error}") from error


def _flat_images(images: Any) -> list:
    """A picture, a list of pictures, lists of pictures, or a 4-D array, as one list of loaded pictures."""
    if isinstance(images, (list, tuple)):
        return [picture for item in images for picture in _flat_images(item)]
    return list(make_flat_list_of_images(_loaded(images)))


def _is_frame(item: Any) -> bool:
    if isinstance(item, (str, Path)):
        return (mimetypes.guess_type(str(item))[0] or "").startswith("image/")
    return isinstance(item, PIL.Image.Image) or getattr(item, "ndim", None) == 3


def _flat_videos(videos: Any) -> Iterator[Any]:
    """Single videos out of any nesting; a video is a file, a 4-D array, or a list of frames."""
    if isinstance(videos, (str, Path)) or getattr(videos, "ndim", None) == 4:
        yield videos
    elif isinstance(videos, (list, tuple)) and videos and _is_frame(videos[0]):
        yield videos
    else:
        for item in videos:
            yield from _flat_videos(item)


def _frames(video: Any, num_frames: int | None, fps: float | None) -> Sequence[Any]:
    """The frames of one video, at most `num_frames` of them, evenly spread."""
    if isinstance(video, (str, Path)):
        fps = VIDEO_FPS if fps is None and num_frames is None else fps
        return list(load_video(str(video), num_frames=num_frames, fps=fps, backend="pyav")[0])
    if fps is not None:
        raise ValueError(f"`fps` is {fps}, but a list of frames has no clock. Use `num_frames`, or give a video file.")
    frames = [_loaded(frame) for frame in video]
    if num_frames is None or num_frames >= len(frames):
        return frames
    return [frames[index] for index in np.linspace(0, len(frames) - 1, num_frames).round().astype(int)]


__all__ = ["LlavaSTFImageProcessor", "LlavaSTFProcessor"]
