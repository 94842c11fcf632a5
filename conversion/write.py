# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Writes a finished Hub folder: weights, configs, processor, tokenizer, templates, code, licences and a card."""

import copy
import json
from pathlib import Path

from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from .checkpoints.folders import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    ORIGINAL_CONFIG_FILE,
    copy_licences,
    name_auto_class,
    write_note,
)
from .checkpoints.weights import Weights, plan_shards, shard_names, write_folder
from .keys import to_original
from .lora import PEFT_PREFIX
from .plan import Plan, empty_model

# Tokens that `generate` adds at most, if a call does not say: room for the longest descriptions that LLaVA is trained
# on, and in a small context at most a quarter of it. Without it transformers stops after 20.
LONGEST_ANSWER = 512


def print_table(plan: Plan, max_shard_size: int) -> None:
    """The key table, and the files that would be written."""
    for (theirs, weight), name in zip(to_original(plan.weights).items(), plan.weights, strict=True):
        shape = "x".join(str(side) for side in weight.shape)
        dtype = str(weight.dtype).removeprefix("torch.")
        print(f"{theirs} -> {name}  {shape} {dtype}  ({weight.origin})")
    print_shards(plan.weights, max_shard_size)


def print_shards(weights: Weights, max_shard_size: int) -> None:
    shards = plan_shards(weights, max_shard_size)
    for file, names in zip(shard_names(len(shards)), shards, strict=True):
        print(f"would write {file}: {sum(weights[name].nbytes for name in names) / 1e9:.3f} GB")
    total = sum(weight.nbytes for weight in weights.values())
    print(f"{len(weights)} tensors, {total / 1e9:.3f} GB; nothing was written")


def write(folder: Path, destination: Path, plan: Plan, max_shard_size: int) -> Path:
    """Writes a plan, and returns the model's folder: `folder` itself, or `base` in it beside an adapter.

    Args:
        folder: an empty folder.
        destination: the name that `folder` gets in the end.
        plan: what is written.
        max_shard_size: bytes of a weight file.
    """
    model_folder = folder / "base" if plan.adapter else folder
    _write_model(model_folder, plan, max_shard_size)
    if plan.adapter:
        _write_adapter(folder, destination, plan)
    return model_folder


def _write_model(folder: Path, plan: Plan, max_shard_size: int) -> None:
    folder.mkdir(exist_ok=True)
    run, processor = plan.source.run, plan.source.processor
    write_folder(folder, plan.weights, max_shard_size)
    model = empty_model(copy.deepcopy(plan.config), plan.weights)
    config = model.config
    custom_object_save(model, folder, config=config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    GenerationConfig(
        max_new_tokens=min(LONGEST_ANSWER, processor.tokenizer.model_max_length // 4),
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=plan.source.end,
        pad_token_id=config.text_config.pad_token_id,
        suppress_tokens=[config.image_token_id],
    ).save_pretrained(folder)
    if run.kind != "initialisation":
        original = json.dumps(run.config, indent=2) + "\n"
        (folder / ORIGINAL_CONFIG_FILE).write_text(original, encoding="utf-8")
    copy_licences(folder)
    write_note(folder, run.kind, config.tokens_per_image)


def _write_adapter(folder: Path, destination: Path, plan: Plan) -> None:
    """The LoRA run as a PEFT adapter of the converted base in `destination/base`; the fusion modules are in both."""
    assert plan.source.run.adapter_config is not None
    write_folder(folder, plan.adapter, max_shard_size=sum(weight.nbytes for weight in plan.adapter.values()))
    (folder / "model.safetensors").rename(folder / ADAPTER_FILE)
    adapted = {name.removeprefix(PEFT_PREFIX).split(".lora_")[0] for name in plan.adapter if ".lora_" in name}
    settings = {
        **plan.source.run.adapter_config,
        "base_model_name_or_path": str(destination.resolve() / "base"),
        "target_modules": sorted(adapted),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": ["multi_modal_projector"],
    }
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    name_auto_class(folder)
    plan.source.processor.save_pretrained(folder)
