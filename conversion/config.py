# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Our configuration and image processor, out of the original's configuration, the CLIP folder and the shapes."""

from math import isqrt
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFImageProcessor

from .keys import ConversionError
from .source import MBTF, STF
from .weights import Weights, read_json

# The taps behind the first, by the number of taps that the projector's shape shows (the original's two variants).
INNER_TAPS = {8: (21, 18, 15, 12, 9, 6, 3), 4: (18, 12, 6)}


def build_config(
    original: dict[str, Any], weights: Weights, vision: CLIPVisionConfig, text: LlamaConfig, image_token_id: int
) -> LlavaSTFConfig:
    """The configuration of a run; window, widths and number of taps are read off its weights (original names).

    Without fusion weights (an initialisation) they are the released model's.
    """
    fusion = _fusion_fields(weights, vision.hidden_size) if f"{MBTF}0.weight" in weights else {}
    taps = _taps(original, fusion.pop("taps", None), vision.num_hidden_layers)
    return LlavaSTFConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        vision_feature_layer=taps,
        dtype=weights["model.embed_tokens.weight"].dtype,
        **fusion,
    )


def _taps(original: dict[str, Any], number: int | None, depth: int) -> list[int]:
    """The taps of a run whose projector takes so many (None: it is new).

    The original's config names the first tap, and its code has the others built in. A config that we wrote for other
    taps has them all there, as a list, which the original's code does not take.
    """
    selected = original.get("mm_vision_select_layer", -2)
    if isinstance(selected, list):
        if number not in (None, len(selected)):
            raise ConversionError(f"The config names the taps {selected}, but {MBTF}0.weight takes {number} blocks.")
        return selected
    number = number or max(INNER_TAPS)
    if number not in INNER_TAPS:
        raise ConversionError(
            f"{MBTF}0.weight takes {number} blocks: expected {' or '.join(map(str, INNER_TAPS))}, or their list as "
            "`mm_vision_select_layer` of the config."
        )
    # -2 of CLIP's 24 layers, said absolutely: the tower may be stored without the layers behind it.
    return [selected % (depth + 1), *INNER_TAPS[number]]


def _fusion_fields(weights: Weights, width: int) -> dict[str, Any]:
    block_hidden, block_in = weights[f"{MBTF}0.weight"].shape
    spatial_hidden, spatial_in = weights[f"{STF}0.weight"].shape
    taps, window = block_in // width, isqrt(spatial_in // width)
    if block_in != taps * width or spatial_in != window**2 * width:
        raise ConversionError(
            f"{MBTF}0.weight takes {block_in} channels and {STF}0.weight {spatial_in}, but the vision tower has "
            f"{width}: expected a multiple of that, and a square number of times."
        )
    return {
        "taps": taps,
        "fusion_window": window,
        "block_fusion_hidden_size": None if block_hidden == 4 * width else block_hidden,
        "spatial_fusion_hidden_size": None if spatial_hidden == 16 * width else spatial_hidden,
    }


def build_text_config(original: dict[str, Any]) -> LlamaConfig:
    rope = original.get("rope_parameters") or {
        "rope_theta": original.get("rope_theta", 10000.0),
        **(original.get("rope_scaling") or {"rope_type": "default"}),
    }
    return LlamaConfig(**{**_known_fields(LlamaConfig, original), "rope_parameters": rope})


def read_vision_config(folder: Path) -> CLIPVisionConfig:
    config = read_json(folder / "config.json")
    return CLIPVisionConfig(**_known_fields(CLIPVisionConfig, config.get("vision_config", config)))


def _known_fields(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    """The values of the fields that `config_class` itself defines."""
    common = PreTrainedConfig().to_dict()
    return {name: values[name] for name in config_class().to_dict() if name in values and name not in common}


def build_image_processor(original: dict[str, Any], clip_folder: Path) -> LlavaSTFImageProcessor:
    """CLIP's preprocessing, with the padding that the run was trained with (`image_aspect_ratio`)."""
    file = clip_folder / "preprocessor_config.json"
    if not file.exists():  # transformers 5 saves it as a part of the processor's
        file = clip_folder / "processor_config.json"
    settings = read_json(file)
    settings = settings.get("image_processor", settings)
    names = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    return LlavaSTFImageProcessor(
        do_pad=original.get("image_aspect_ratio", "pad") == "pad",
        **{name: settings[name] for name in names if name in settings},
    )
