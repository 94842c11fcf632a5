# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Our configuration and image processor, out of the original's configuration, the CLIP folder and the shapes."""

from math import isqrt
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFImageProcessor

from .keys import ConversionError
from .source import read_json

# The taps behind the first, by the number of taps that the projector's shape shows (the original's two variants).
INNER_TAPS = {8: (21, 18, 15, 12, 9, 6, 3), 4: (18, 12, 6)}


def build_config(
    original: dict[str, Any],
    state: dict[str, torch.Tensor],
    vision: CLIPVisionConfig,
    image_token_id: int,
    pad_token_id: int,
) -> LlavaSTFConfig:
    """Widths, window and number of taps are read off the shapes of the weights (original names)."""
    mbtf, stf = "model.mm_projector_crosslayer", "model.mm_projector"
    if f"{mbtf}.0.weight" not in state or f"{stf}.2.weight" not in state:
        raise ConversionError(
            f"There is no {mbtf}.0.weight: this is not a LLaVA-STF checkpoint (a plain LLaVA has no fusion weights)."
        )
    width = vision.hidden_size
    block_hidden, block_in = state[f"{mbtf}.0.weight"].shape
    spatial_hidden, spatial_in = state[f"{stf}.0.weight"].shape
    taps, window = block_in // width, isqrt(spatial_in // width)
    if taps not in INNER_TAPS or block_in != taps * width or spatial_in != window**2 * width:
        raise ConversionError(
            f"{mbtf}.0.weight takes {block_in} channels and {stf}.0.weight {spatial_in}, but the vision tower has "
            f"{width}: expected {' or '.join(str(n) for n in INNER_TAPS)} times that, and a square number of times."
        )
    first_tap = original.get("mm_vision_select_layer", -2) % (vision.num_hidden_layers + 1)
    fields = _known_fields(LlamaConfig, original)
    rope = original.get("rope_parameters") or {
        "rope_theta": original.get("rope_theta", 10000.0),
        **(original.get("rope_scaling") or {"rope_type": "default"}),
    }
    vocabulary = max(state["model.embed_tokens.weight"].shape[0], image_token_id + 1)
    text = LlamaConfig(**{**fields, "rope_parameters": rope, "vocab_size": vocabulary, "pad_token_id": pad_token_id})
    return LlavaSTFConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        pad_token_id=pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        vision_feature_layer=[first_tap, *INNER_TAPS[taps]],
        fusion_window=window,
        block_fusion_hidden_size=None if block_hidden == 4 * width else block_hidden,
        spatial_fusion_hidden_size=None if spatial_hidden == 16 * width else spatial_hidden,
        dtype=state["model.embed_tokens.weight"].dtype,
    )


def read_vision_config(folder: Path) -> CLIPVisionConfig:
    config = read_json(folder / "config.json")
    config = config.get("vision_config", config)
    return CLIPVisionConfig(**_known_fields(CLIPVisionConfig, config))


def _known_fields(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    """The values of the fields that `config_class` itself defines."""
    common = PreTrainedConfig().to_dict()
    return {name: values[name] for name in config_class().to_dict() if name in values and name not in common}


def build_image_processor(original: dict[str, Any], clip_folder: Path) -> LlavaSTFImageProcessor:
    """CLIP's preprocessing, with the padding that the run was trained with (`image_aspect_ratio`)."""
    settings = read_json(clip_folder / "preprocessor_config.json")
    names = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    return LlavaSTFImageProcessor(
        do_pad=original.get("image_aspect_ratio", "pad") == "pad",
        **{name: settings[name] for name in names if name in settings},
    )
