# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""LLaVA-STF (arXiv 2506.07138): LLaVA with Multi-Block Token Fusion and Spatial Token Fusion.

Everything but the two fusion modules is the stock LLaVA of transformers. Shapes in the comments:

    B images      C width of the tower      G side of the patch grid      N = G*G patches
    L taps        k side of the window      T = N/(k*k) tokens            D width of the language model

A picture may have fewer than T tokens: `image_tokens` has the number of each, one of `config.allowed_token_budgets`.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate, groupby, islice
from numbers import Integral
from typing import Any

import torch
import transformers
from packaging import version
from torch import nn
from transformers import (
    AutoModel,
    FPQuantConfig,
    GenerationMixin,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import TransformersKwargs, is_tracing, logging, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .configuration_llava_stf import LlavaSTFConfig

logger = logging.get_logger(__name__)

# The vision tower encodes at most this many images or frames at once. This bounds its activations; 32 keep a GPU busy.
IMAGES_PER_PASS = 32
# On a CPU a pass has so few images that a layer's widest activations, in bytes, stay below this. The C library does not
# reuse much larger buffers: mapping them again in each layer costs more time than a larger batch saves.
CPU_BYTES_PER_PASS = 10 * 2**20
# transformers 5.23 accepts a list and keeps only the hidden states in it; 5.17 to 5.22 count them in another way.
SELECTS_HIDDEN_STATES = version.parse(transformers.__version__).release >= (5, 23)
# The name of the cache argument. The stock models accept the old name until 5.40, and warn about it since 5.24.
CACHE = "cache" if version.parse(transformers.__version__).release >= (5, 24) else "past_key_values"
# transformers 5.18 is the first whose `generate` and `forward` take encoded pictures (5.17 does not). Remove the other
# way, by embeddings, when it is the oldest supported version.
TAKES_ENCODED_PICTURES = version.parse(transformers.__version__).release >= (5, 18)
# Before transformers 5.23 (seen in 5.16.1) a chunked prefill takes its first pass for a later one if a cache is given,
# and drops the pictures. Remove the refusal when 5.23 is the oldest supported version.
CHUNKS_SEE_NEW_PICTURES = version.parse(transformers.__version__).release >= (5, 23)
# The stock model takes these in each call; here the weights fit one value.
TAP_ARGUMENTS = ("vision_feature_layer", "vision_feature_select_strategy")
# This is finite, but so far below any other logit that the probability is zero.
NO_ANSWER_LOGIT = -1e4
# These modules stay in 16 bit when the language model is quantised; then the fields of transformers that list them.
NOT_QUANTISED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
# llm-compressor and vLLM (compressed-tensors) take regular expressions instead of names.
NOT_QUANTISED_PATTERNS = [rf"re:.*{name.rpartition('.')[2]}.*" for name in NOT_QUANTISED]
SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
# FPQuantConfig of transformers 5.24 writes this list if its user gives none. Remove it when that stays None.
FP_QUANT_DEFAULT = ["lm_head"]
# This is fetched here because torch.compile cannot trace `property.fget`.
_STOCK_LOSS = LlavaForConditionalGeneration.loss_function.fget


class MultiBlockTokenFusion(nn.Module):
    """Mixes the features of several vision blocks into one feature map (original: `mm_projector_crosslayer`)."""

    def __init__(self, config: LlavaSTFConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        hidden, _ = config.fusion_widths
        self.linear_1 = nn.Linear(len(config.taps) * width, hidden, config.multimodal_projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden, width, config.multimodal_projector_bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features of the tapped blocks, concatenated on channels: (B, N, L*C) -> (B, N, C)."""
        return self.linear_2(self.act(self.linear_1(features)))


class SpatialTokenFusion(nn.Module):
    """Fuses each k x k window of patches into one token of the language model (original: `mm_projector`)."""

    def __init__(self, config: LlavaSTFConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        _, hidden = config.fusion_widths
        self.grid, self.window = config.grid_size, config.fusion_window
        self.linear_1 = nn.Linear(self.window**2 * width, hidden, config.multimodal_projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden, config.text_config.hidden_size, config.multimodal_projector_bias)

    def windows(self, features: torch.Tensor) -> torch.Tensor:
        """Patches in raster order to windows in raster order: (B, N, C) -> (B, T, C*k*k).

        Inside a window the order is channel-major, `out[c*k*k + dy*k + dx]`, that of a convolution's kernel. Any other
        order loads the same weights without complaint and computes something else.
        """
        side, k = self.grid // self.window, self.window
        features = features.reshape(-1, side, k, side, k, features.shape[-1])  # (B, G/k, k, G/k, k, C)
        features = features.permute(0, 1, 3, 5, 2, 4)  # (B, G/k, G/k, C, k, k)
        return features.flatten(3).flatten(1, 2)  # (B, T, C*k*k)

    def pool(self, hidden: torch.Tensor, tokens: int) -> torch.Tensor:
        """Averages w x w windows of tokens, in raster order: (B, T, 16C) -> (B, tokens, 16C).

        An average and a linear layer commute: `linear_2` of this is the pooling of Matryoshka Multimodal Models
        (arXiv 2405.17430), which averages what the last layer returns, for w*w times less work in that layer.
        """
        side = math.isqrt(tokens)
        window = self.grid // self.window // side
        return hidden.reshape(-1, side, window, side, window, hidden.shape[-1]).mean((2, 4)).flatten(1, 2)

    def forward(
        self, features: torch.Tensor, image_tokens: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """(B, N, C) -> (B, T, D), or with the number of tokens of each image a list of (image_tokens[i], D)."""
        hidden = self.act(self.linear_1(self.windows(features)))  # (B, T, 16C)
        if image_tokens is None:
            return self.linear_2(hidden)
        tokens: list[torch.Tensor] = []
        for number, alike in groupby(image_tokens):
            images = hidden[len(tokens) : len(tokens) + len(list(alike))]
            tokens.extend(self.linear_2(self.pool(images, number)).unbind())
        return tokens


class LlavaSTFMultiModalProjector(nn.Module):
    """Fuses eight blocks into one map, then four patches into one token, as in the paper. (B, N, L*C) -> (B, T, D).

    With `image_tokens` it returns a list of (image_tokens[i], D).
    """

    def __init__(self, config: LlavaSTFConfig):
        super().__init__()
        self.block_fusion = MultiBlockTokenFusion(config)
        self.spatial_fusion = SpatialTokenFusion(config)

    def forward(
        self, features: torch.Tensor, image_tokens: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        features = self.block_fusion(features)  # (B, N, L*C) -> (B, N, C)
        return self.spatial_fusion(features, image_tokens)  # (B, N, C) -> (B, T, D)


class _BlocksUpToLastTap(nn.ModuleList):
    """Holds all blocks of the tower; a forward pass iterates only up to the last tap.

    All blocks are stored and indexable. The later ones run if a caller asks for all hidden states or attentions.
    """

    def __init__(self, blocks: Iterable[nn.Module], last_tap: int | None = None):  # None for a slice of blocks
        super().__init__(blocks)
        self.last_tap = last_tap

    def __iter__(self) -> Iterator[nn.Module]:
        return islice(super().__iter__(), self.last_tap)

    @contextmanager
    def all(self) -> Iterator[None]:
        last_tap, self.last_tap = self.last_tap, None
        try:
            yield
        finally:
            self.last_tap = last_tap


class LlavaSTFPreTrainedModel(LlavaPreTrainedModel):
    """Loads and saves as transformers does; quantises the language model alone, and loses no weights of adapters."""

    config: LlavaSTFConfig
    config_class = LlavaSTFConfig
    # `device_map` keeps the fusion on one device: it is small, and all taps are inputs of it.
    _no_split_modules = ["LlavaSTFMultiModalProjector"]

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """Loads a checkpoint (see [`PreTrainedModel.from_pretrained`]).

        Quantisation leaves vision tower, fusion and head in 16 bit, unless `quantization_config` names other modules.
        """
        if quantization_config is not None:
            quantization_config = _language_model_only(quantization_config)
        return super().from_pretrained(*args, quantization_config=quantization_config, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves the model (see [`PreTrainedModel.save_pretrained`]), also one that was read from a quantised folder."""
        if getattr(self, "is_quantized", False):
            # transformers 5.24 cannot undo how it reads quantised weights (`NotImplementedError`), which have the
            # model's own names anyway. Remove this when it saves them without the argument.
            kwargs.setdefault("save_original_format", False)
        super().save_pretrained(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the weights (see [`nn.Module.state_dict`]); those in 4 bit as if they had not run on a CPU."""
        _unpack_4_bit(self)
        return super().state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Sets the mode (see [`nn.Module.train`]); weights in 4 bit train as if they had not run on a CPU."""
        if mode:
            _unpack_4_bit(self)
        return super().train(mode)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a PEFT adapter to the model (see [`PreTrainedModel.load_adapter`]).

        Raises:
            ValueError: if the adapter has weights that the model does not expect, or lacks some. transformers only
                warns about it. 5.24 loses DoRA's magnitudes, 5.16 modules that were trained in full; PEFT loads both.
        """
        found = super().load_adapter(*args, **kwargs)
        unfilled = {name for name in found.missing_keys if ".lora_" in name or ".modules_to_save." in name}
        lost = sorted({*found.unexpected_keys, *unfilled})
        if lost:
            raise ValueError(
                f"transformers {transformers.__version__} cannot load this adapter: {len(lost)} weights would be lost, "
                f"such as {lost[0]!r}. Load it with PEFT: `PeftModel.from_pretrained(model, ADAPTER)`."
            )
        return found

    @classmethod
    def is_custom_code(cls) -> bool:
        # For custom code transformers skips the sub-models' own initialisers when weights are missing from a
        # checkpoint. All initialisation here is transformers' own, so its guarded functions are used throughout.
        return False


class LlavaSTFModel(LlavaSTFPreTrainedModel, LlavaModel):
    """Combines vision tower, fusion and language model, without the language model's head."""

    def __init__(self, config: LlavaSTFConfig):
        # LlavaModel.__init__ is skipped, because it builds the stock projector.
        config.check_fusion()
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        blocks = self.vision_tower.encoder.layers
        self.vision_tower.encoder.layers = _BlocksUpToLastTap(blocks, max(config.taps))
        self.multi_modal_projector = LlavaSTFMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_tokens: Sequence[int] | torch.Tensor | None = None, **kwargs: Any
    ) -> tuple | BaseModelOutputWithPooling:
        """Encodes images or video frames, `IMAGES_PER_PASS` at a time; on a CPU fewer if the tower is wide.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, image_size, image_size)`):
                Normalised pixels. A batch of videos may have the shape `(videos, frames, 3, image_size, image_size)`.
            image_tokens (`list[int]` or integer `torch.Tensor` of shape `(B,)`, *optional*):
                The number of tokens of each image or frame, as the processor returns it, or a list with such a list for
                each prompt; `None` is T for all. A list is a constant of a compiled graph; a tensor is copied to the
                CPU.

        Returns:
            The tower's output. Its `pooler_output` is a list with the fused tokens of each image, `(T, D)` each, or
            `(image_tokens[i], D)`; its `last_hidden_state` is always that of the last tap.

        Raises:
            ValueError: if the pixels have another shape, if there is not one number of tokens for each image or one is
                not allowed, or if a call asks for other taps than those of the config.
        """
        self._check_pixels(pixel_values)
        self._check_taps(kwargs)
        for name in TAP_ARGUMENTS:
            kwargs.pop(name, None)

        images = pixel_values.flatten(0, -4)  # (B, 3, H, W)
        numbers = self._checked_tokens(image_tokens, len(images))
        size, passes = self._images_per_pass(), []
        for start, chunk in enumerate(images.split(size)):
            passes.append(self._encode(chunk, numbers and numbers[size * start : size * (start + 1)], **kwargs))
        return passes[0] if len(passes) == 1 else _concatenate(passes)

    def _check_taps(self, given: dict[str, Any]) -> None:
        for name in TAP_ARGUMENTS:
            if given.get(name) not in (None, getattr(self.config, name)):
                raise ValueError(f"`{name}` is {getattr(self.config, name)} for these weights and cannot be changed.")

    def _checked_tokens(self, image_tokens: Sequence[int] | torch.Tensor | None, images: int) -> list[int] | None:
        """Returns the number of tokens of each image; None if all have T."""
        full, allowed = self.config.tokens_per_image, self.config.allowed_token_budgets
        if image_tokens is None:
            self._warn_of_untrained({full})
            return None
        numbers = _numbers_in(image_tokens)
        whole = all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers)
        if len(numbers) != images or not whole or not {*numbers} <= {*allowed}:
            raise ValueError(
                f"`image_tokens` is {image_tokens} for {images} images or frames, expected one whole number for each, "
                f"and each one of {allowed}. The processor returns it with the pixels."
            )
        self._warn_of_untrained({*numbers})
        return None if {*numbers} == {full} else numbers

    def _warn_of_untrained(self, budgets: set[int]) -> None:
        trained = self.config.token_budgets or [self.config.tokens_per_image]
        if not is_tracing() and not budgets <= {*trained}:
            logger.warning_once(
                f"This checkpoint was trained for {trained} tokens per picture, and is asked for "
                f"{sorted(budgets - {*trained})}: expect worse answers. `token_budgets` of its configuration says what "
                "it was trained for."
            )

    def _images_per_pass(self) -> int:
        if self.device.type != "cpu":
            return IMAGES_PER_PASS
        vision = self.config.vision_config
        widest = self.config.grid_size**2 * vision.intermediate_size * self.dtype.itemsize
        return min(IMAGES_PER_PASS, max(1, CPU_BYTES_PER_PASS // widest))

    def _encode(
        self, images: torch.Tensor, image_tokens: list[int] | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        taps, vision = self.config.taps, self.config.vision_config
        all_hidden_states = kwargs.pop("output_hidden_states", None) or getattr(vision, "output_hidden_states", False)
        attentions = kwargs.get("output_attentions") or getattr(vision, "output_attentions", False)
        blocks = self.vision_tower.encoder.layers.all() if all_hidden_states or attentions else nullcontext()
        # A frozen tower needs no backward pass, not even if gradient checkpointing makes its inputs require gradients.
        tower_learns = torch.is_grad_enabled() and (
            images.requires_grad or any(weight.requires_grad for weight in self.vision_tower.parameters())
        )
        with blocks, torch.set_grad_enabled(tower_learns):
            wanted = taps if SELECTS_HIDDEN_STATES and not all_hidden_states else True
            outputs = self.vision_tower(images, output_hidden_states=wanted, return_dict=True, **kwargs)
        features = [outputs.hidden_states[tap][:, 1:] for tap in taps]  # L x (B, N, C), without the class token
        # Other connectors, such as those of an ablation, have no budgets.
        budgets = () if image_tokens is None else (image_tokens,)
        tokens = self.multi_modal_projector(torch.cat(features, dim=-1), *budgets)  # (B, T, D)
        return BaseModelOutputWithPooling(
            # The tower's own is that of a later block if the caller asks for all hidden states or attentions.
            last_hidden_state=outputs.hidden_states[max(taps)],
            pooler_output=list(tokens),
            hidden_states=outputs.hidden_states if all_hidden_states else None,
            attentions=outputs.attentions,
        )

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        size = self.config.vision_config.image_size
        expected = (self.config.vision_config.num_channels, size, size)
        torch_compilable_check(
            pixel_values.ndim in (4, 5) and tuple(pixel_values.shape[-3:]) == expected,
            lambda: (
                f"`pixel_values` has the shape {tuple(pixel_values.shape)}, expected (images, {expected[0]}, {size}, "
                f"{size}) or (videos, frames, {expected[0]}, {size}, {size}). Use the processor of this checkpoint."
            ),
        )

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Returns a mask of the positions that the images' tokens replace, (batch, sequence, 1).

        `image_features` is (tokens of all images, D) or (images, T, D). Raises a `ValueError` if placeholders and
        tokens differ in number, or if the features are not finite in float16: the answers would be wrong in silence.
        """
        if image_features.dtype == torch.float16 and not self.training:  # in training a scaler skips such steps
            _check(
                image_features.isfinite().all(),
                "The features of an image are not finite in float16, whose largest number is 65504. Load the model "
                "with `dtype=torch.bfloat16` or `torch.float32`.",
            )
        mask = self.find_placeholders(input_ids, inputs_embeds)
        features = image_features.numel() // image_features.shape[-1]
        _check(mask.sum() == features, lambda: self._mismatch(int(mask.sum()), features))
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def _mismatch(self, in_text: int, of_images: int) -> str:
        return (
            f"Image tokens and image features do not match: the text has {in_text} image tokens, the images give "
            f"{of_images} ({self.config.tokens_per_image} tokens each, unless `image_tokens` says otherwise). "
            "Usual causes: the prompt has no `<image>` for an image (or one too many), truncation cut into an "
            "image, `image_tokens` of the processor did not reach the model, or the inputs come from the processor "
            "of another model (LLaVA-1.5 writes 576 tokens per image)."
        )

    def check_places(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor,
        image_tokens: Sequence[int] | torch.Tensor | None,
    ) -> None:
        """Raises a `ValueError` unless the text has the tokens of the images, each image's without text in between.

        The sums may be equal although the numbers are in another order than the images: each image would then see
        tokens of its neighbour.
        """
        self._check_pixels(pixel_values)
        images = len(pixel_values.flatten(0, -4))
        numbers = self._checked_tokens(image_tokens, images) or [self.config.tokens_per_image] * images
        mask = self.find_placeholders(input_ids, inputs_embeds).cpu()
        before_text = mask & ~nn.functional.pad(mask, (0, 1))[:, 1:]  # the last place of each run of placeholders
        ends = mask.flatten().cumsum(0)[before_text.flatten()].tolist()
        self.check_number(input_ids, inputs_embeds, sum(numbers))
        if image_tokens is not None and not {*ends} <= {*accumulate(numbers)}:
            runs = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            raise ValueError(
                f"`image_tokens` is {numbers}, but the text has image tokens in runs of {runs}. Give the numbers in "
                "the order of the images in the text, as the processor returns them."
            )

    def check_number(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, features: int) -> None:
        """Raises a `ValueError` unless the text has as many image tokens as there are features."""
        in_text = int(self.find_placeholders(input_ids, inputs_embeds).sum())
        if in_text != features:
            raise ValueError(self._mismatch(in_text, features))

    def find_placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Returns a mask of the image tokens, (batch, sequence), from the ids or, without ids, the embeddings."""
        if inputs_embeds is None or (input_ids is not None and input_ids.numel()):
            return input_ids == self.config.image_token_id
        image_token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_tokens: Sequence[int] | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaModelOutputWithPast:
        """Runs the model (see [`LlavaModel.forward`]); warns about a prompt with image tokens but no image.

        The cache may be passed by either of its names, `cache` or the older `past_key_values`. `image_tokens` is that
        of [`LlavaSTFModel.get_image_features`]; without `pixel_values` it has no effect.

        In training, a batch without images encodes a blank image and does not use the result, so that every rank of a
        distributed run uses the same parameters (original: the dummy image of its collator).
        """
        self._check_taps(kwargs)
        if attention_mask is None and cache is None and kwargs.get(CACHE) is None and position_ids is not None:
            self._check_gaps(position_ids, kwargs.get("use_cache"))
        has_images = pixel_values is not None or (kwargs.get("mm_encoder_outputs") or {}).get("image") is not None
        if not has_images:
            self._warn_of_missing_images(input_ids)
            if self.training and torch.is_grad_enabled():
                if inputs_embeds is None:
                    inputs_embeds, input_ids = self.get_input_embeddings()(input_ids), None
                inputs_embeds = inputs_embeds + self._blank_image_features(inputs_embeds)[:0].sum()
        # The stock forward passes no `image_tokens` to the encoder; it refuses pixels beside encoded images.
        if pixel_values is not None and image_tokens is not None and not kwargs.get("mm_encoder_outputs"):
            if not is_tracing(pixel_values):
                self.check_places(input_ids, inputs_embeds, pixel_values, image_tokens)
            states = {name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs}
            encoded = self.get_image_features(pixel_values, image_tokens, return_dict=True, **states)
            pixel_values = None
            if TAKES_ENCODED_PICTURES:
                kwargs["mm_encoder_outputs"] = {"image": encoded}
            else:
                inputs_embeds, input_ids = self._embed(input_ids, inputs_embeds, encoded), None
        if cache is not None:
            kwargs[CACHE] = cache
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        encoded: BaseModelOutputWithPooling,
    ) -> torch.Tensor:
        """Returns the embeddings of text and encoded images."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = torch.cat(encoded.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
        mask = self.get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=features)
        return inputs_embeds.masked_scatter(mask, features)

    def _check_gaps(self, position_ids: torch.Tensor, use_cache: bool | None) -> None:
        # transformers (5.16 to 5.24) takes each gap in the positions for the border of two packed sequences if there is
        # neither a mask nor a cache. Remove this when `find_packed_sequence_indices` looks for falling positions only.
        # vLLM's attention makes no mask, and knows the borders of its requests, which it sends as one row.
        if self.config.text_config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            return
        cached = self.config.text_config.use_cache if use_cache is None else use_cache
        if not cached and not is_tracing(position_ids) and (position_ids.diff(dim=-1) > 1).any():
            raise ValueError(
                "`position_ids` has gaps, and there is neither an `attention_mask` nor a cache: transformers would "
                "split the prompt there. Pass the mask that `reduce_image_tokens` returned and, in `generate`, do not "
                "set `use_cache=False`; or choose `positions='compact'`."
            )

    def _warn_of_missing_images(self, input_ids: torch.Tensor | None) -> None:
        # This is no error: the cache may contain the images, and an assistant model drafts without them.
        if input_ids is None or input_ids.shape[1] == 1 or is_tracing(input_ids):
            return
        if (input_ids == self.config.image_token_id).any():
            logger.warning_once(
                "The text has image tokens, but no `pixel_values` were given: unless a cache holds the images, the "
                "model does not see them."
            )

    def _blank_image_features(self, like: torch.Tensor) -> torch.Tensor:
        vision = self.config.vision_config
        blank = like.new_zeros(1, vision.num_channels, vision.image_size, vision.image_size)
        trained = self.config.token_budgets and self.config.token_budgets[:1]
        return self.get_image_features(blank, trained, return_dict=True).pooler_output[0].to(like.device, like.dtype)


class LlavaSTFForConditionalGeneration(LlavaSTFPreTrainedModel, LlavaForConditionalGeneration, GenerationMixin):
    """Adds the language model's head to [`LlavaSTFModel`]: generates text about images, videos and text."""

    def __init__(self, config: LlavaSTFConfig):
        # LlavaForConditionalGeneration.__init__ is skipped, because it builds a stock LlavaModel.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaSTFModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @LlavaForConditionalGeneration.loss_function.getter
    def loss_function(self) -> Callable[..., torch.Tensor]:
        """Computes the stock loss without the token `<image>`, which is neither in the softmax nor a target.

        The original has no such token in its vocabulary, and ignores the labels of images.
        """
        stock_loss = _STOCK_LOSS(self)

        def loss(logits: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            image_token, ignored = self.config.image_token_id, kwargs.get("ignore_index", -100)
            for name in ("labels", "shift_labels"):
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name].masked_fill(kwargs[name] == image_token, ignored)
            column = torch.arange(logits.shape[-1], device=logits.device) == image_token
            return stock_loss(logits=logits.masked_fill(column, NO_ANSWER_LOGIT), **kwargs)

        return loss

    def get_image_features(
        self, pixel_values: torch.Tensor, image_tokens: Sequence[int] | torch.Tensor | None = None, **kwargs: Any
    ) -> tuple | BaseModelOutputWithPooling:
        """Encodes images or video frames (see [`LlavaSTFModel.get_image_features`])."""
        return self.model.get_image_features(pixel_values, image_tokens, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates text (see [`GenerationMixin.generate`]); accepts `cache` before transformers 5.24, too.

        Raises a `ValueError` if the text has not the tokens of the images (see [`LlavaSTFModel.check_places`]), or if
        transformers would answer without them: drafts on a cache, drafts and a chunked prefill of `inputs_embeds`.
        """
        if "cache" in kwargs:
            kwargs[CACHE] = kwargs.pop("cache")
        self._check_images({"input_ids": kwargs.get("inputs", args[0] if args else None), **kwargs})
        return super().generate(*args, **kwargs)

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Answers texts by continuous batching (see [`ContinuousMixin.generate_batch`]).

        Raises a `ValueError` for a text with image tokens: transformers (5.16 to 5.24) passes no images on here, and so
        not in `generate(cache_implementation="paged")` either.
        """
        if any(self.config.image_token_id in ids for ids in inputs):
            raise ValueError(
                f"transformers {transformers.__version__} answers without the images in continuous batching: call "
                "`generate`, and leave `cache_implementation='paged'` out."
            )
        return super().generate_batch(inputs, *args, **kwargs)

    def _check_images(self, given: dict[str, Any]) -> None:
        # transformers 5.23 and 5.24 give each chunk of a chunked prefill as many tokens as it has places, and compare
        # nothing. A cache may hold the images of earlier turns, whose places are in `input_ids`, too.
        ids, embeds, pixels = (given.get(name) for name in ("input_ids", "inputs_embeds", "pixel_values"))
        cache = given.get(CACHE, given.get("past_key_values"))
        encoded = (given.get("mm_encoder_outputs") or {}).get("image")
        drafts = getattr(given.get("generation_config"), "is_assistant", None)  # it gets its images anew in each round
        if drafts or (ids is None and (embeds is None or cache is not None)):
            return
        if ids is not None:
            ids = _unread(ids, given.get("attention_mask"), cache)
        if pixels is not None:
            self.model.check_places(ids, embeds, pixels, given.get("image_tokens"))
        elif encoded is not None:
            self.model.check_number(ids, embeds, sum(len(tokens) for tokens in encoded.pooler_output))

    def _assisted_decoding(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # transformers (5.16 to 5.24) drafts on a given cache as if it were empty: it reads the whole prompt once more,
        # behind what the cache holds, and without the images. With embeddings its first pass leaves out the draft, and
        # other logits are taken for those of the draft. Remove this when that pass reads what is new and the draft.
        cache, given = kwargs.get(CACHE), None
        if cache is not None and cache.get_seq_length() > 0:
            given = "a cache that holds a part of the prompt"
        elif kwargs.get("inputs_embeds") is not None:
            given = "`inputs_embeds`"
        if given:
            raise ValueError(
                f"transformers {transformers.__version__} cannot draft tokens with {given}: leave that out, or "
                "`assistant_model` and `prompt_lookup_num_tokens`."
            )
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        # If a call sets `max_length` and the checkpoint `max_new_tokens`, transformers keeps both, and the
        # checkpoint's value wins.
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for given in (kwargs, vars(generation_config) if generation_config else {}):
            if given.get("max_new_tokens") is not None:
                break
            if given.get("max_length") is not None:
                prepared.max_new_tokens = None
                break
        cache, pixels = model_kwargs.get(CACHE), model_kwargs.get("pixel_values")
        if prepared.prefill_chunk_size and cache is not None and pixels is not None and not CHUNKS_SEE_NEW_PICTURES:
            raise ValueError(
                f"transformers {transformers.__version__} loses new pictures in a chunked prefill on a given cache: "
                "leave `prefill_chunk_size` out, or use 5.23 or newer."
            )
        if cache is not None and not prepared.use_cache and cache.get_seq_length() > 0:
            # transformers (5.16 to 5.24) would read the whole prompt without the cache, and so without the pictures.
            raise ValueError(
                "`use_cache` is False, in the call or in the generation config, but a cache is given that holds a part "
                "of the prompt: leave one of them out."
            )
        if prepared.prefill_chunk_size and model_kwargs.get("inputs_embeds") is not None:
            # 5.16 answers without the embeddings, 5.24 fails. Remove this when the chunks are those of embeddings, too.
            raise ValueError(
                f"transformers {transformers.__version__} cannot prefill `inputs_embeds` in chunks: leave "
                "`prefill_chunk_size` out. `reduce_image_tokens` returns no embeddings from 5.18 on."
            )
        return prepared, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        cache: Any | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        image_tokens: Sequence[int] | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepares a pass (see [`GenerationMixin.prepare_inputs_for_generation`]); images go into the first, always.

        `past_key_values` is the older name of `cache`.
        """
        older_name = kwargs.pop("past_key_values", None)
        cache = older_name if cache is None else cache
        # transformers drops the images from all passes but the first. It mistakes the first pass of an assistant and
        # (before 5.23) of a chunked prefill for a later one; there the cache is still empty. Decoding steps skip this
        # check: their cache is never empty, and reading the length of a static cache would wait for the device.
        prompt = inputs_embeds is None and next_sequence_length != 1
        unseen = prompt and cache is not None and cache.get_seq_length() == 0
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration or unseen,
            image_tokens=image_tokens,
            **{CACHE: cache},
            **kwargs,
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        # Beams and several answers need this. Before transformers 5.18 the pixels arrive here, and the stock method
        # repeats them image by image, which separates the images of a prompt that has several. Since 5.18 (seen in
        # 5.24) it finds the images of a prompt by their places, and counts those of images that a given cache holds.
        images: dict[str, Any] = {}
        embeds, cache = model_kwargs.get("inputs_embeds"), model_kwargs.get(CACHE)
        new_ids = input_ids
        if expand_size > 1 and cache is not None and input_ids is not None:
            new_ids = _unread(input_ids, model_kwargs.get("attention_mask"), cache)
            if model_kwargs.get("mm_encoder_outputs"):
                encoded = model_kwargs.pop("mm_encoder_outputs")
                images["mm_encoder_outputs"] = self._expand_multimodal_outputs(new_ids, encoded, expand_size, embeds)
        if expand_size > 1 and model_kwargs.get("pixel_values") is not None:
            placeholders = self.model.find_placeholders(new_ids, embeds).sum(1)
            pixels, given = model_kwargs.pop("pixel_values").flatten(0, -4), model_kwargs.pop("image_tokens", None)
            numbers = self.model._checked_tokens(given, len(pixels)) or [self.config.tokens_per_image] * len(pixels)
            order = _repeated(placeholders.tolist(), numbers, expand_size)
            images["pixel_values"] = pixels[order]
            if given is not None:
                images["image_tokens"] = [numbers[index] for index in order]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}


def _check(holds: torch.Tensor, message: str | Callable[[], str]) -> None:
    """Raises a `ValueError` with the message if a condition, a tensor with one element, does not hold.

    torch 2.11 cannot trace `torch_compilable_check` (transformers 5.16 to 5.24) of a tensor; torch 2.13 can. Call that
    directly when no older torch is supported. The tests of `benchmarks` compile this model with the check.
    """
    torch_compilable_check(holds.item() if is_tracing() else holds, message)


def _numbers_in(image_tokens: Any) -> list:
    """Returns a tensor or list as a flat list. A pipeline of transformers makes a batch of the lists of its prompts."""
    if hasattr(image_tokens, "tolist"):
        return image_tokens.flatten().tolist()
    prompts = image_tokens if isinstance(image_tokens, (list, tuple)) else []
    return [number for prompt in prompts for number in (prompt if isinstance(prompt, (list, tuple)) else [prompt])]


def _unread(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any | None) -> torch.Tensor:
    """Returns the ids that the cache does not hold; they are given alone if the mask has more places than there are."""
    alone = attention_mask is not None and attention_mask.shape[1] != input_ids.shape[1]
    return input_ids if cache is None or alone else input_ids[:, int(cache.get_seq_length()) :]


def _repeated(placeholders: list[int], image_tokens: list[int], times: int) -> list[int]:
    """Returns the order of the images if each prompt is repeated; the images that fill a prompt belong to it."""
    order: list[int] = []
    first = 0
    for wanted in placeholders:
        end = first
        while sum(image_tokens[first:end]) < wanted and end < len(image_tokens):
            end += 1
        order += times * [*range(first, end)]
        first = end
    return [*order, *range(first, len(image_tokens))]  # the model refuses images too many


def _language_model_only(quantization_config: Any) -> Any:
    """Returns the config with [`NOT_QUANTISED`] as the modules to leave out, if that field has its default."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    settings = inspect.signature(type(quantization_config).__init__).parameters
    for name in SKIP_FIELDS:
        written = FP_QUANT_DEFAULT if isinstance(quantization_config, FPQuantConfig) else None
        if name in settings and getattr(quantization_config, name) in (None, settings[name].default, written):
            quantization_config = copy.copy(quantization_config)
            # The names without the prefix are those of the model without a head.
            in_base = [module.removeprefix("model.") for module in NOT_QUANTISED[:-1]]
            setattr(quantization_config, name, NOT_QUANTISED + in_base)
    return quantization_config


def _unpack_4_bit(model: nn.Module) -> None:
    """Brings 4-bit weights and their scales back to the order in which they are stored.

    bitsandbytes (0.50.2) packs them in another order when a model first answers on a CPU with AVX512-BF16. Weights in
    that order have no gradient; and its `state_dict` restores the weights, but not their scales. Remove this when both
    are mended there.
    """
    for module in model.modules():
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            if not state.original_nested:
                state.absmax = state.absmax.T.reshape(-1).float()
            module.state_dict()


def _concatenate(passes: list[BaseModelOutputWithPooling]) -> BaseModelOutputWithPooling:
    """Joins the outputs of several passes through the tower."""

    def layers(name: str) -> tuple | None:
        if getattr(passes[0], name) is None:
            return None
        by_layer = zip(*(getattr(output, name) for output in passes), strict=True)
        return tuple(None if states[0] is None else torch.cat(states) for states in by_layer)

    return BaseModelOutputWithPooling(
        last_hidden_state=torch.cat([p.last_hidden_state for p in passes]),
        pooler_output=[tokens for p in passes for tokens in p.pooler_output],
        hidden_states=layers("hidden_states"),
        attentions=layers("attentions"),
    )


__all__ = ["LlavaSTFForConditionalGeneration", "LlavaSTFModel", "LlavaSTFPreTrainedModel"]
