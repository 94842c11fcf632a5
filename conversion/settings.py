# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What becomes of every setting of the files that a conversion reads: one table for each kind of file."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.processing_utils import ImagesKwargs

from modeling_llava_stf import LlavaSTFImageProcessor

from .keys import ConversionError


@dataclass(frozen=True)
class Table:
    """The settings of one kind of file; a setting that is in none of the three is unknown."""

    carried: frozenset[str]
    # Without effect on what the model computes, or read only where a required setting has another value.
    harmless: frozenset[str]
    # Settings that this model computes for these values only; where they are missing or null, the first one counts.
    required: Mapping[str, tuple[Any, ...]]


COMMON = frozenset({*PreTrainedConfig().to_dict(), *GenerationConfig().to_dict()}) | {
    # Of all models, in the files of transformers 4.
    "_attn_implementation_autoset",
    "_flash_attn_2_enabled",
    "add_cross_attention",
    "attn_implementation",
    "auto_map",
    "cross_attention_hidden_size",
    "finetuning_task",
    "is_decoder",
    "prefix",
    "pruned_heads",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "use_bfloat16",
}
LANGUAGE = Table(
    carried=frozenset({*LlamaConfig().to_dict()} - {*PreTrainedConfig().to_dict()})
    | {"dtype", "image_aspect_ratio", "mm_vision_select_layer", "mm_vision_tower", "rope_scaling", "rope_theta"},
    harmless=COMMON
    | {
        # Of the original's trainer.
        "freeze_mm_mlp_adapter",
        "freeze_mm_vision_resampler",
        "mm_hidden_size",
        "mm_projector_lr",
        "mm_vision_tower_lr",
        "pretrain_mm_mlp_adapter",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        "tune_mm_mlp_adapter",
        "tune_mm_vision_resampler",
        "unfreeze_mm_vision_tower",
        "use_mm_proj",
        # Of pictures in tiles, which `image_aspect_ratio` asks for.
        "image_crop_resolution",
        "image_grid_pinpoints",
        "image_split_resolution",
        # Of FastChat's trainer.
        "max_sequence_length",
    },
    required={
        "model_type": ("llama", "llava_llama", "llava"),
        "quantization_config": (),
        "tie_word_embeddings": (False,),
        # The original's prompt and pixels.
        "image_aspect_ratio": ("square", "pad"),
        "mm_patch_merge_type": ("flat",),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_resampler_type": (),
        "mm_use_im_patch_token": (False,),
        "mm_use_im_start_end": (False,),
        "mm_vision_select_feature": ("patch",),
        "s2": (False,),
        # What other language models compute with layers of Llama's names.
        "attention_chunk_size": (),
        "attention_multiplier": (),
        "attn_logit_softcapping": (),
        "clip_qkv": (),
        "dim_model_base": (),
        "embedding_multiplier": (1,),
        "final_logit_softcapping": (),
        "layer_types": (),
        "logit_scale": (1,),
        "logits_scaling": (1,),
        "no_rope_layers": (),
        "num_experts": (),
        "num_local_experts": (),
        "partial_rotary_factor": (1,),
        "qk_layernorm": (False,),
        "query_pre_attn_scalar": (),
        "residual_multiplier": (1,),
        "rope_interleaved": (False,),
        "scale_depth": (),
        "scale_emb": (1,),
        "sliding_window": (),
        "use_parallel_residual": (False,),
        "use_qk_norm": (False,),
        "use_qkv_bias": (False,),
        "use_sliding_window": (False,),
    },
)
# What `generate` does to an answer that is not sampled; each call of the original's says how it samples.
GENERATION = Table(
    carried=frozenset({"eos_token_id"}),
    harmless=COMMON,
    required={
        "bad_words_ids": ([],),
        "begin_suppress_tokens": ([],),
        "encoder_no_repeat_ngram_size": (0,),
        "encoder_repetition_penalty": (1,),
        "exponential_decay_length_penalty": (),
        "forced_bos_token_id": (),
        "forced_decoder_ids": ([],),
        "forced_eos_token_id": (),
        "guidance_scale": (1,),
        "min_length": (0,),
        "min_new_tokens": (0,),
        "no_repeat_ngram_size": (0,),
        "num_beams": (1,),
        "repetition_penalty": (1,),
        "sequence_bias": ({}, []),
        "stop_strings": ([],),
        "suppress_tokens": ([],),
    },
)
VISION = Table(
    carried=frozenset({*CLIPVisionConfig().to_dict()} - {*PreTrainedConfig().to_dict()}),
    # `dropout` and `vocab_size` stand in files of CLIP and of llava-hf; no version of its tower reads them.
    harmless=COMMON | {"dropout", "vocab_size"},
    required={"model_type": ("clip_vision_model", "clip", "llava"), "num_channels": (3,), "quantization_config": ()},
)
# What our image processor has beside the settings of the stock one; the original's code reads none of it.
OUR_OPTIONS = frozenset({*LlavaSTFImageProcessor.valid_kwargs.__annotations__} - {*ImagesKwargs.__annotations__})
PREPROCESSOR = Table(
    carried=OUR_OPTIONS
    | frozenset(
        {"crop_size", "image_mean", "image_std", "resample", "rescale_factor", "size"}
        | {"do_center_crop", "do_normalize", "do_rescale", "do_resize"}
    ),
    # The run says whether a picture is padded; the original's loader makes every picture RGB.
    harmless=frozenset(
        {"_valid_processor_keys", "auto_map", "data_format", "default_to_square", "device", "disable_grouping"}
        | {"do_convert_rgb", "do_pad", "image_seq_length", "input_data_format", "pad_size", "patch_size"}
        | {"processor_class", "return_tensors"}
    ),
    required={
        "image_processor_type": (
            *("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "LlavaSTFImageProcessor"),
            *("LlavaImageProcessor", "LlavaImageProcessorFast", "LlavaImageProcessorPil"),
            "CLIPFeatureExtractor",  # its name before transformers 4.26
        ),
        "feature_extractor_type": ("CLIPFeatureExtractor", "CLIPImageProcessor"),
        **dict.fromkeys(
            ("do_center_crop", "do_exif_transpose", "do_normalize", "do_rescale", "do_resize"), (True, False)
        ),
        "resample": (3, 0, 1, 2, 4, 5),
    },
)
ADAPTER = Table(
    carried=frozenset({"exclude_modules", "layers_to_transform", "lora_alpha", "r", "target_modules", "use_rslora"}),
    harmless=frozenset(
        {"auto_mapping", "base_model_name_or_path", "inference_mode", "layers_pattern", "lora_dropout", "peft_version"}
        | {"corda_config", "eva_config", "loftq_config", "megatron_config", "megatron_core", "qalora_group_size"}
        | {"revision", "runtime_config", "task_type"}
    ),
    required={
        "peft_type": ("LORA",),
        "bias": ("none",),
        "fan_in_fan_out": (False,),
        # The others of PEFT change the base's weights, too.
        "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
        "alpha_pattern": ({},),
        "rank_pattern": ({},),
        "layer_replication": ([],),
        "lora_bias": (False,),
        "modules_to_save": ([],),
        "use_dora": (False,),
    },
)


def check_settings(place: Path, settings: Mapping[str, Any], table: Table) -> list[str]:
    """The settings of a file that are unknown, as notes.

    Raises:
        ConversionError: for a setting that this model cannot compute, and for numbers that are not finite.
    """
    for name in foreign_settings(settings, table):
        expected = " or ".join(map(repr, table.required[name])) or "none"
        raise ConversionError(
            f"{place}: `{name}` is {settings[name]!r}, expected {expected}: this model computes nothing else."
        )
    for name in table.carried & settings.keys():
        if isinstance(settings[name], float) and not math.isfinite(settings[name]):
            raise ConversionError(f"{place}: `{name}` is {settings[name]}, expected a finite number.")
    unknown = unknown_settings(settings, table)
    return [f"{place}: not carried over, for this package does not know them: {', '.join(unknown)}"] if unknown else []


def foreign_settings(settings: Mapping[str, Any], table: Table) -> list[str]:
    """The settings with a value that this model does not compute."""
    found = {name: settings[name] for name in table.required if settings.get(name) is not None}
    return [name for name, value in found.items() if value not in table.required[name]]


def unknown_settings(settings: Mapping[str, Any], table: Table) -> list[str]:
    return sorted(settings.keys() - table.carried - table.harmless - table.required.keys())


def require_positive(place: Path | str, settings: Mapping[str, Any], names: Iterable[str], whole: bool = False) -> None:
    """Raises a [`ConversionError`] for a number that is there, but is not positive, too large, or not a whole one."""
    for name in names:
        value = settings.get(name)
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        limit = 2**30 if whole else 1e30  # torch cannot compute with larger sizes
        if value is not None and not (number and 0 < value < limit):
            kind = f"a positive {'whole number' if whole else 'number'} below {limit}"
            raise ConversionError(f"{place}: `{name}` is {value!r}, expected {kind}.")


def require_activation(place: Path, settings: Mapping[str, Any]) -> None:
    """Raises a [`ConversionError`] for an activation that transformers does not have."""
    name = settings.get("hidden_act")
    if name is not None and (not isinstance(name, str) or name not in ACT2FN):
        raise ConversionError(f"{place}: `hidden_act` is {name!r}, which is no activation function of transformers.")
