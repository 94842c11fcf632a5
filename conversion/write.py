# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Writes a finished Hub folder: weights, configs, processor, tokenizer, templates, code, licences and a card."""

import json
from pathlib import Path

from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from .checkpoints.folders import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CARD,
    ORIGINAL_CONFIG_FILE,
    copy_licences,
    name_auto_class,
)
from .checkpoints.weights import Weights, plan_shards, shard_names, write_folder
from .keys import to_original
from .lora import PEFT_PREFIX
from .plan import Plan

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


def _write_model(folder: Path, plan: Plan, max_shard_size: int) -> None:
    folder.mkdir(exist_ok=True)
    config = plan.model.config
    write_folder(folder, plan.weights, max_shard_size)
    custom_object_save(plan.model, folder, config=config)
    config.architectures = [type(plan.model).__name__]
    config.save_pretrained(folder)
    plan.processor.save_pretrained(folder)
    GenerationConfig(
        max_new_tokens=min(LONGEST_ANSWER, plan.processor.tokenizer.model_max_length // 4),
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        suppress_tokens=[config.image_token_id],
    ).save_pretrained(folder)
    if plan.source.kind != "initialisation":
        original = json.dumps(plan.source.config, indent=2) + "\n"
        (folder / ORIGINAL_CONFIG_FILE).write_text(original, encoding="utf-8")
    copy_licences(folder)
    (folder / "README.md").write_text(
        CARD.format(kind=plan.source.kind, tokens=config.tokens_per_image), encoding="utf-8"
    )


def _write_adapter(folder: Path, destination: Path, plan: Plan) -> None:
    """The LoRA run as a PEFT adapter of the converted base in `destination/base`; the fusion modules are in both."""
    assert plan.adapter is not None and plan.source.adapter_config is not None
    write_folder(folder, plan.adapter, max_shard_size=sum(weight.nbytes for weight in plan.adapter.values()))
    (folder / "model.safetensors").rename(folder / ADAPTER_FILE)
    adapted = {name.removeprefix(PEFT_PREFIX).split(".lora_")[0] for name in plan.adapter if ".lora_" in name}
    settings = {
        **plan.source.adapter_config,
        "base_model_name_or_path": str(destination.resolve() / "base"),
        "target_modules": sorted(adapted),
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": ["multi_modal_projector"],
    }
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    name_auto_class(folder)
    plan.processor.save_pretrained(folder)
