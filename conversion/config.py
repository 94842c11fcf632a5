# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Our configuration and image processor, out of the original's configuration, the CLIP folder and the shapes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from PIL.ImageColor import getrgb
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFImageProcessor, LlavaSTFProcessor

from .checkpoints.folders import ADAPTER_CONFIG_FILE, TEMPLATES
from .checkpoints.weights import Weights, matrix, read_json, section
from .fusion import MBTF, read_off
from .keys import ConversionError
from .settings import (
    GENERATION,
    PREPROCESSOR,
    VISION,
    check_settings,
    foreign_settings,
    require_activation,
    require_positive,
)

Made = TypeVar("Made")

# The taps behind the first, by the number of taps that the projector's shape shows (the original's two variants).
INNER_TAPS = {8: (21, 18, 15, 12, 9, 6, 3), 4: (18, 12, 6)}
# The numbers that each way to extend the rotary positions needs.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}
ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


def build_config(
    original: dict[str, Any], weights: Weights, vision: CLIPVisionConfig, text: LlamaConfig, image_token_id: int
) -> LlavaSTFConfig:
    """The configuration of a run; window, widths and number of taps are read off its weights (original names).

    Without fusion weights (an initialisation) they are the released model's.
    """
    make = partial(
        built,
        LlavaSTFConfig,
        "The model",
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
    fusion = {}
    if f"{MBTF}0.weight" in weights:
        fusion = read_off(weights, make(vision_feature_layer=[0], fusion_window=1))
    taps = _taps(original, fusion.pop("taps", None), vision.num_hidden_layers)
    dtype = matrix(weights, "model.embed_tokens.weight").dtype
    return make(vision_feature_layer=taps, dtype=dtype, **fusion)


def _taps(original: dict[str, Any], number: int | None, depth: int) -> list[int]:
    """The taps of a run whose projector takes so many (None: it is new).

    The original's config names the first tap, and its code has the others built in. A config that we wrote for other
    taps has them all there, as a list, which the original's code does not take.
    """
    selected = original.get("mm_vision_select_layer", -2)
    if isinstance(selected, list):
        if number not in (None, len(selected)):
            raise ConversionError(f"The config names the taps {selected}, but {MBTF}0.weight takes {number} blocks.")
        taps = selected
    else:
        number = number or max(INNER_TAPS)
        if number not in INNER_TAPS:
            raise ConversionError(
                f"{MBTF}0.weight takes {number} blocks: expected {' or '.join(map(str, INNER_TAPS))}, or their list as "
                "`mm_vision_select_layer` of the config."
            )
        taps = [selected, *INNER_TAPS[number]]
    if not taps or not all(type(tap) is int and -depth - 1 <= tap <= depth for tap in taps):
        raise ConversionError(
            f"The taps are {taps} (the first is `mm_vision_select_layer`), but a vision tower of {depth} layers has "
            f"the hidden states 0 to {depth}, or -{depth + 1} to -1 from its end."
        )
    # -2 of CLIP's 24 layers, said absolutely: the tower may be stored without the layers behind it.
    return [tap % (depth + 1) for tap in taps]


def build_text_config(original: dict[str, Any], place: Path) -> LlamaConfig:
    """The language model's configuration, out of a flat one; `place` is the file, for errors."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names = (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings")
    require_positive(place, original, names, whole=True)
    require_positive(place, original, ["rms_norm_eps", "rope_theta"])
    require_activation(place, original)
    _check_tokens(original, place)
    fields = {**_known_fields(LlamaConfig, original), "rope_parameters": rope_parameters(original, place)}
    text = built(LlamaConfig, place, **fields)
    if text.num_attention_heads % text.num_key_value_heads:
        raise ConversionError(
            f"{place}: `num_key_value_heads` is {text.num_key_value_heads}, expected a divisor of "
            f"`num_attention_heads`, {text.num_attention_heads}."
        )
    return text


def _check_tokens(original: dict[str, Any], place: Path) -> None:
    """Raises a [`ConversionError`] for a BOS or EOS without a row in the tables; a padding id may have none."""
    rows = original.get("vocab_size") or LlamaConfig().vocab_size
    for name in ("bos_token_id", "eos_token_id"):
        value = original.get(name)
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and not (type(token_id) is int and 0 <= token_id < rows):
                raise ConversionError(f"{place}: `{name}` is {value!r}, expected ids from 0 to {rows - 1}.")


def read_generation(
    folder: Path, original: dict[str, Any], text: LlamaConfig
) -> tuple[int | list[int] | None, list[str]]:
    """The ids that end an answer in the original's `generate`, and notes on what else it does to answers.

    Args:
        folder: of the language model. Its generation_config.json counts, as in transformers 4.37.
        original: the run's settings. They count without that file, and where it was made from them and they say more.
        text: the configuration that was made of them.
    """
    file = folder / "generation_config.json"
    settings = read_json(file) if file.exists() else original
    if settings.get("_from_model_config") and foreign_settings(original, GENERATION):
        settings = original
    acting = [f"{name} {settings[name]!r:.100}" for name in foreign_settings(settings, GENERATION)]
    notes = [f"{folder}: settings of `generate` that are not carried over: {', '.join(acting)}"] if acting else []
    end = settings.get("eos_token_id", text.eos_token_id)
    _check_tokens({"eos_token_id": end, "vocab_size": text.vocab_size}, file)
    if end != text.eos_token_id:
        notes.append(f"an answer ends with {end}, as {file} says; config.json says {text.eos_token_id}")
    return end, notes


def rope_parameters(original: dict[str, Any], place: Path) -> dict[str, Any]:
    """The rotary positions as transformers 5 has them: `rope_scaling` and `rope_theta` in one."""
    scaling, new = original.get("rope_scaling"), original.get("rope_parameters")
    if scaling and new and scaling != new:
        raise ConversionError(f"{place} says two things: `rope_scaling` is {scaling}, `rope_parameters` {new}.")
    rope = new or scaling or {}
    if not isinstance(rope, dict):
        raise ConversionError(f"{place}: `rope_scaling` is {rope!r}, expected an object with `type` and `factor`.")
    theta = original.get("rope_theta")
    if theta is not None and rope.get("rope_theta", theta) != theta:
        raise ConversionError(f"{place} says two things: `rope_theta` is {theta} and {rope['rope_theta']}.")
    rope = {"rope_theta": theta or 10000.0, **rope}
    kind = rope.pop("type", None)
    if kind and rope.get("rope_type", kind) != kind:
        raise ConversionError(
            f"{place} says two things: the rope's `type` is {kind}, its `rope_type` {rope['rope_type']}."
        )
    rope.setdefault("rope_type", kind or "default")
    _check_rope(rope, place)
    return rope


def _check_rope(rope: dict[str, Any], place: Path) -> None:
    where, kind = f"{place}: rope", rope["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ConversionError(f"{where}: the type is {kind!r}, expected one of {', '.join(ROPE_TYPES)}.")
    missing = [name for name in ROPE_TYPES[kind] if rope.get(name) is None]
    if missing:
        raise ConversionError(f"{where}: the type {kind!r} needs {', '.join(missing)}.")
    require_positive(where, rope, ROPE_NUMBERS)
    for name in ("short_factor", "long_factor"):
        values = rope[name] if isinstance(rope.get(name), list) else [rope.get(name)]
        factors = {f"{name}[{index}]": value for index, value in enumerate(values)}
        require_positive(where, factors, factors)
    if (rope.get("factor") or 1) < 1:
        raise ConversionError(f"{where}: `factor` is {rope['factor']}, expected 1 or more.")
    other = rope.keys() - {*ROPE_NUMBERS, "rope_type", "short_factor", "long_factor", "truncate", "finetuned"}
    if other - {"partial_rotary_factor"} or rope.get("partial_rotary_factor") not in (None, 1):
        raise ConversionError(f"{where}: {', '.join(f'`{name}`' for name in sorted(other))} is not Llama's.")


def context_length(text: LlamaConfig) -> int:
    """Tokens that the language model was extended to; `max_position_embeddings` may be what it was before."""
    rope, length = text.rope_parameters, text.max_position_embeddings
    if rope["rope_type"] in ("linear", "dynamic"):
        return int(length * rope["factor"])
    if rope["rope_type"] == "yarn":
        return max(length, int((rope.get("original_max_position_embeddings") or length) * rope["factor"]))
    return length


def read_vision_config(folder: Path) -> tuple[CLIPVisionConfig, list[str]]:
    """The tower's configuration, out of a CLIP folder, and notes."""
    place = folder / "config.json"
    config = read_json(place)
    settings = {"model_type": config.get("model_type"), **section(config, "vision_config", place)}
    notes = check_settings(place, settings, VISION)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    require_positive(place, settings, sizes, whole=True)
    require_positive(place, settings, ["layer_norm_eps"])
    require_activation(place, settings)
    fields = _known_fields(CLIPVisionConfig, settings)
    return built(CLIPVisionConfig, place, **{name: value for name, value in fields.items() if value is not None}), notes


def _known_fields(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    """The values of the fields that `config_class` itself defines."""
    common = PreTrainedConfig().to_dict()
    return {name: values[name] for name in config_class().to_dict() if name in values and name not in common}


def read_our_config(folder: Path) -> LlavaSTFConfig:
    """Reads the config of one of our checkpoints, whose weights are whole.

    Raises:
        ConversionError: if the folder holds an adapter, another model or quantised weights.
    """
    if (folder / ADAPTER_CONFIG_FILE).exists():
        raise ConversionError(f"{folder} is an adapter: merge it with its base first (python -m training merge).")
    place = folder / "config.json"
    settings = read_json(place)
    if settings.get("model_type") != LlavaSTFConfig.model_type:
        raise ConversionError(f"{folder} is a {settings.get('model_type')!r} model, expected a converted LLaVA-STF.")
    if settings.get("quantization_config"):
        raise ConversionError(f"{place}: the weights are quantised (`quantization_config`), expected whole ones.")
    return built(LlavaSTFConfig.from_pretrained, place, pretrained_model_name_or_path=folder)


def built(make: Callable[..., Made], place: Path | str, **fields: Any) -> Made:
    """What `make` makes of fields; what transformers finds wrong with them becomes a [`ConversionError`]."""
    try:
        return make(**fields)
    except (StrictDataclassError, ValueError) as error:
        raise ConversionError(f"{place}: {' '.join(str(error).split())}") from error


def build_image_processor(
    original: dict[str, Any], clip_folder: Path, config: LlavaSTFConfig
) -> tuple[LlavaSTFImageProcessor, list[str]]:
    """CLIP's preprocessing, with the padding that the run was trained with, and notes.

    Args:
        original: the run's settings; `image_aspect_ratio` is `pad`, or `square` (resize and crop), also if missing.
        clip_folder: has preprocessor_config.json, which our own image processor may have saved.
        config: of the model, whose tower takes pictures of one size.
    """
    file = preprocessor_file(clip_folder)
    settings = section(read_json(file), "image_processor", file)
    notes = check_settings(file, settings, PREPROCESSOR)
    _refuse_null(file, settings)
    require_positive(file, settings, ["rescale_factor"])
    for name in ("size", "crop_size"):
        sides = settings[name] if isinstance(settings.get(name), dict) else {name: settings.get(name)}
        require_positive(file, sides, sides, whole=True)
    for name in ("image_mean", "image_std"):
        _check_channels(file, name, settings.get(name))
    _check_our_options(file, settings, config)
    # What a CLIP processor takes where the file says nothing.
    settings = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}} | settings
    carried = {name: settings[name] for name in sorted(PREPROCESSOR.carried) if settings.get(name) is not None}
    processor = built(LlavaSTFImageProcessor, file, do_pad=original.get("image_aspect_ratio") == "pad", **carried)
    _check_side(file, processor, config.vision_config.image_size)
    return processor, notes


def build_processor(
    config: LlavaSTFConfig, image_processor: LlavaSTFImageProcessor, tokenizer: PreTrainedTokenizerFast
) -> LlavaSTFProcessor:
    """The processor with the chat template: the only one, since vLLM does not start if there are several."""
    return LlavaSTFProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        fusion_window=config.fusion_window,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=(TEMPLATES / "vicuna_v1.jinja").read_text(encoding="utf-8"),
    )


def preprocessor_file(folder: Path) -> Path:
    """The file with the settings of the pictures; transformers 5 saves them as a part of the processor's."""
    file = folder / "preprocessor_config.json"
    return file if file.exists() else folder / "processor_config.json"


def _refuse_null(file: Path, settings: dict[str, Any]) -> None:
    """Raises a [`ConversionError`] for a step that is null: off in transformers 4.37, its default in transformers 5."""
    for name in ("do_center_crop", "do_normalize", "do_rescale", "do_resize", "resample", "rescale_factor"):
        if settings.get(name, ...) is None:
            raise ConversionError(
                f"{file}: `{name}` is null, which the original reads otherwise than transformers 5: write what is "
                "meant, or leave it out for the default."
            )


def _check_channels(file: Path, name: str, values: Any) -> None:
    if values is None:
        return
    if not isinstance(values, list) or len(values) != 3:
        raise ConversionError(f"{file}: `{name}` is {values!r}, expected three numbers.")
    channels = {f"{name}[{index}]": value for index, value in enumerate(values)}
    if name == "image_mean":  # which may be zero
        channels = {key: value or 1 for key, value in channels.items()}
    require_positive(file, channels, channels)


def _check_our_options(file: Path, settings: dict[str, Any], config: LlavaSTFConfig) -> None:
    """Raises a [`ConversionError`] for a colour that PIL does not know, or a budget that the model does not have."""
    colour, budget = settings.get("alpha_background"), settings.get("max_soft_tokens")
    if colour is not None and not isinstance(colour, str):
        raise ConversionError(f"{file}: `alpha_background` is {colour!r}, expected a colour such as 'white'.")
    if colour is not None:
        built(getrgb, f"{file}: `alpha_background`", color=colour)
    if budget is not None and not (type(budget) is int and budget in config.allowed_token_budgets):
        raise ConversionError(
            f"{file}: `max_soft_tokens` is {budget!r}, expected one of {config.allowed_token_budgets}, or none."
        )


def _check_side(file: Path, processor: LlavaSTFImageProcessor, side: int) -> None:
    """Raises a [`ConversionError`] if not every picture gets the tower's size."""
    size, crop = processor.size, processor.crop_size
    sides: set[int | None]
    if processor.do_resize and not (size["shortest_edge"] or size["height"] and size["width"]):
        sides = set()
    elif processor.do_center_crop:
        sides = {crop["height"], crop["width"]}
    elif processor.do_resize and size["shortest_edge"] and processor.do_pad:
        sides = {size["shortest_edge"]}
    else:
        sides = {size["height"], size["width"]} if processor.do_resize else {None}
    if sides != {side}:
        raise ConversionError(
            f"{file} does not give every picture {side} x {side} pixels, which the vision tower expects: found "
            f"size {dict(size)}, crop_size {dict(crop)}, do_resize {processor.do_resize}, do_center_crop "
            f"{processor.do_center_crop}, padding {processor.do_pad}."
        )
