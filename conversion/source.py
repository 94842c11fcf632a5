# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Reading what the original trainer wrote. Tensors stay on disk (memory-mapped) until they are used."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .keys import TOWER_PREFIX, ConversionError

PROJECTOR_FILE = "mm_projector.bin"
LORA_CONFIG_FILE = "adapter_config.json"
LORA_REST_FILE = "non_lora_trainables.bin"
LORA_PREFIX = "base_model.model."

State = dict[str, torch.Tensor]


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"Cannot read {path}: {error}") from error


def read_file(path: Path) -> State:
    """The tensors of one .bin or .safetensors file, memory-mapped."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # each format has its own exceptions for a damaged file
        raise ConversionError(f"Cannot read {path}: {error}. Is it complete?") from error


def read_folder(folder: Path) -> State:
    """All tensors of a checkpoint folder, single or sharded, .safetensors or .bin."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.exists():
            weight_map = read_json(index)["weight_map"]
            shards = {name: read_file(folder / name) for name in sorted(set(weight_map.values()))}
            missing = [key for key, name in weight_map.items() if key not in shards[name]]
            if missing:
                raise ConversionError(f"{index} lists {missing[0]!r} in {weight_map[missing[0]]}, which lacks it.")
            return {key: shards[name][key] for key, name in weight_map.items()}
        if (folder / f"{stem}.{suffix}").exists():
            return read_file(folder / f"{stem}.{suffix}")
    raise ConversionError(
        f"{folder} has no weights: expected model.safetensors or pytorch_model.bin, whole or with an index of shards."
    )


def read_tower(folder: Path) -> State:
    """The vision tower of a CLIP folder (whole CLIP or its vision half) under the original's names."""
    return {
        TOWER_PREFIX + key: tensor for key, tensor in read_folder(folder).items() if key.startswith("vision_model.")
    }


def read_source(source: Path, base: Path | None) -> State:
    """A run of the original as one full state dict under the original's names; the tower may still be missing.

    Args:
        source: a full fine-tune, a stage-1 projector or a LoRA run, told apart by their files.
        base: the language model that a projector or a LoRA run was trained on.
    """
    kinds = {"a stage-1 projector": PROJECTOR_FILE, "a LoRA run": LORA_CONFIG_FILE}
    kind = next((kind for kind, file in kinds.items() if (source / file).exists()), None)
    if kind is None:
        return read_folder(source)
    if base is None:
        raise ConversionError(f"{source} is {kind}: name the language model that it was trained on with --base.")
    state = read_folder(base)
    if kind == "a stage-1 projector":
        return state | read_file(source / PROJECTOR_FILE)
    rest = {key.removeprefix(LORA_PREFIX): tensor for key, tensor in read_file(source / LORA_REST_FILE).items()}
    return merge_lora(state, _read_adapter(source), read_json(source / LORA_CONFIG_FILE)) | rest


def _read_adapter(source: Path) -> State:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (source / name).exists():
            return read_file(source / name)
    raise ConversionError(f"{source} has {LORA_CONFIG_FILE} but no adapter_model.safetensors or adapter_model.bin.")


def merge_lora(state: State, adapter: State, config: dict[str, Any]) -> State:
    """`W + scale * B @ A` for each adapted weight, computed in float32 and stored in the weight's dtype."""
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    merged = dict(state)
    for key, down in adapter.items():
        if ".lora_A." not in key:
            continue
        target = key.removeprefix(LORA_PREFIX).split(".lora_A.")[0] + ".weight"
        if target not in state or key.replace(".lora_A.", ".lora_B.") not in adapter:
            raise ConversionError(f"The adapter weight {key!r} has no counterpart: expected {target!r} in the base.")
        up = adapter[key.replace(".lora_A.", ".lora_B.")]
        merged[target] = (state[target].float() + scale * (up.float() @ down.float())).to(state[target].dtype)
    unused = [key for key in adapter if ".lora_A." not in key and ".lora_B." not in key]
    if unused:
        raise ConversionError(f"The adapter holds {unused[0]!r}, which is not a LoRA matrix.")
    return merged
