# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What will be written: a list of steps on weights and config, which look at names and shapes alone."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration

from .checkpoints.weights import Weights, check_castable, check_dtypes
from .fusion import CONNECTOR, new_fusion
from .keys import ConversionError, to_hub
from .lora import PEFT_PREFIX, lora_pairs, merge_lora, peft_weights
from .options import Options
from .source import LAYER, Run, Source
from .vocabulary import add_rows

Step = Callable[[Weights, LlavaSTFConfig], tuple[Weights, LlavaSTFConfig]]


@dataclass(frozen=True)
class Plan:
    """All that will be written, checked; the weights are still on disk."""

    source: Source
    config: LlavaSTFConfig
    weights: Weights
    adapter: Weights  # empty, unless a LoRA run stays one
    notes: list[str]


def plan(source: Source, options: Options) -> Plan:
    """Sends weights and config of a source through the steps.

    Raises:
        ConversionError: if the weights do not fit each other or the model.
    """
    weights, config = source.weights, source.config
    for step in steps(source, options).values():
        weights, config = step(weights, config)
    adapter = _adapter(source, weights, options.dtype) if options.keep_adapter else {}
    return Plan(source, config, weights, adapter, [*source.notes, *_notes(source, options, config)])


def steps(source: Source, options: Options) -> dict[str, Step]:
    """The steps in their order. The weights have the original's names before `names`, and ours behind it."""
    return {
        "lora": partial(_lora, run=source.run, keep=options.keep_adapter),
        "fusion": partial(_fusion, new=options.init_fusion, seed=options.seed),
        "tower": partial(_tower, full=options.keep_full_tower),
        "names": _names,
        "vocabulary": partial(add_rows, tokenizer=source.processor.tokenizer, multiple=options.pad_vocabulary),
        "dtype": partial(_dtype, dtype=options.dtype),
        "complete": _complete,
    }


def _lora(weights: Weights, config: LlavaSTFConfig, run: Run, keep: bool) -> tuple[Weights, LlavaSTFConfig]:
    """Merges a LoRA run into its base, unless it is kept."""
    if run.adapter is None or run.adapter_config is None or keep:
        return weights, config
    check_dtypes(run.adapter)
    return merge_lora(weights, run.adapter, run.adapter_config), config


def _fusion(weights: Weights, config: LlavaSTFConfig, new: bool, seed: int) -> tuple[Weights, LlavaSTFConfig]:
    return weights | new_fusion(config, seed) if new else weights, config


def _tower(weights: Weights, config: LlavaSTFConfig, full: bool) -> tuple[Weights, LlavaSTFConfig]:
    """Leaves out the tower's layers behind the last tap."""
    depth = max(config.taps)
    if full or config.vision_config.num_hidden_layers <= depth:
        return weights, config
    config = copy.deepcopy(config)
    config.vision_config.num_hidden_layers = depth
    used = {key: weight for key, weight in weights.items() if not (layer := LAYER.match(key)) or int(layer[1]) < depth}
    return used, config


def _names(weights: Weights, config: LlavaSTFConfig) -> tuple[Weights, LlavaSTFConfig]:
    return to_hub(weights), config


def _dtype(weights: Weights, config: LlavaSTFConfig, dtype: torch.dtype | None) -> tuple[Weights, LlavaSTFConfig]:
    """Gives all weights a dtype, and the sub-models' configs the model's, as `save_pretrained` writes it."""
    config = copy.deepcopy(config)
    if dtype is not None:
        check_castable(weights)
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        config.dtype = dtype
    config.text_config.dtype = config.vision_config.dtype = config.dtype
    return weights, config


def _complete(weights: Weights, config: LlavaSTFConfig) -> tuple[Weights, LlavaSTFConfig]:
    """Checks that the weights are those of the model."""
    check_dtypes(weights)
    check_complete(weights, empty_model(config, weights))
    return weights, config


def _adapter(source: Source, weights: Weights, dtype: torch.dtype | None) -> Weights:
    """The weights of a LoRA run that is kept: its matrices, and the fusion modules, which PEFT saves whole."""
    run = source.run
    assert run.adapter is not None and run.adapter_config is not None  # `read` refuses another run
    check_dtypes(run.adapter)
    matrices = peft_weights(lora_pairs(run.adapter, source.weights, run.adapter_config))
    fusion = {PEFT_PREFIX + name: weight for name, weight in weights.items() if name.startswith(CONNECTOR)}
    return {name: weight.to(dtype or weight.dtype) for name, weight in matrices.items()} | fusion


def _notes(source: Source, options: Options, config: LlavaSTFConfig) -> list[str]:
    """What the steps changed, in words."""
    notes = []
    if options.init_fusion:
        notes.append(f"THE FUSION MODULES ARE NEW (seed {options.seed}): train them before you ask this model anything")
    depth = config.vision_config.num_hidden_layers
    if depth != source.config.vision_config.num_hidden_layers:
        notes.append(f"the tower's layers behind the last tap, {depth}, are left out: they are never used")
    rows, needed = source.config.text_config.vocab_size, config.text_config.vocab_size
    added = f"{needed - rows} added to each table, the mean of the others" if needed > rows else "none added"
    image_token = f"<image> is {config.image_token_id}"
    return [*notes, f"vocabulary: {image_token}, {rows} rows in the source, {added}; no other id changes"]


def empty_model(config: LlavaSTFConfig, weights: Weights) -> LlavaSTFForConditionalGeneration:
    """A model without memory for its weights, which are under our names.

    Raises:
        ConversionError: if the config has more layers than there are weights: it might take hours to build them.
    """
    for name, part in (("language_model", config.text_config), ("vision_tower.encoder", config.vision_config)):
        found = {match[1] for key in weights if (match := re.match(rf"model\.{name}\.layers\.(\d+)\.", key))}
        if part.num_hidden_layers > len(found):
            raise ConversionError(
                f"The config has {part.num_hidden_layers} layers of model.{name} (num_hidden_layers, or the last tap), "
                f"but there are weights of {len(found)}."
            )
    with torch.device("meta"):
        return LlavaSTFForConditionalGeneration(config)


def check_complete(weights: Weights, model: nn.Module) -> None:
    """Raises a [`ConversionError`] unless `weights`, under our names, are those of the model, in its shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() - weights.keys()):
        raise ConversionError(f"The source has no weight for {name!r}.")
    for name, weight in weights.items():
        if name not in expected:
            raise ConversionError(f"The source has the weight {name!r}, for which the model has no place.")
        if weight.shape != expected[name]:
            raise ConversionError(f"{name!r} has the shape {weight.shape}, expected {expected[name]}.")
