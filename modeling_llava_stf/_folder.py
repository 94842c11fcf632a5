# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint, and checks its folder before; errors name the file that is damaged, missing or of a wrong type.

transformers trusts these files. It waits forever at a pipe, builds 20000 layers although the weights have four, and
raises a `KeyError` if a table is missing.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers.activations import ACT2FN

from .configuration_llava_stf import LlavaSTFConfig
from .modeling_llava_stf import LlavaSTFForConditionalGeneration
from .processing_llava_stf import LlavaSTFProcessor

PROCESSORS = ("processor_config.json", "preprocessor_config.json")  # one of them is enough
INDEX = "model.safetensors.index.json"
SIZES = (
    "hidden_size",
    "image_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "num_key_value_heads",
    "patch_size",
    "vocab_size",
)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "max_new_tokens")


def check_folder(folder: Path) -> None:
    """Raises a `ValueError` that names the first file that cannot belong to a LLaVA-STF checkpoint, and why."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".jinja", ".json", ".safetensors") and not path.is_file():
            raise ValueError(f"{path} is not a file, but a {'folder' if path.is_dir() else 'pipe or a device'}.")
    _need(folder, "config.json")
    config = _settings(folder, "config.json")
    if config.get("model_type") != LlavaSTFConfig.model_type:
        return  # the configuration class raises the better error
    _check_config(folder / "config.json", config)
    _need(folder, "tokenizer.json")
    _need(folder, "tokenizer_config.json")
    _need(folder, *PROCESSORS)
    generation = _settings(folder, "generation_config.json")
    for name in TOKENS:
        _expect(folder / "generation_config.json", name, _are_integers(generation.get(name)), "whole numbers")
    for name in PROCESSORS:
        images = _settings(folder, name).get("image_processor", {})
        _expect(folder / name, "image_processor", isinstance(images, dict), "a JSON object")
    length = _settings(folder, "tokenizer_config.json").get("model_max_length", 0)
    _expect(folder / "tokenizer_config.json", "model_max_length", isinstance(length, (int, float)), "a number")
    try:
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises a plain Exception for a wrong file
        raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}.") from error


def _need(folder: Path, *names: str) -> None:
    if not any((folder / name).exists() for name in names):
        raise ValueError(f"{folder} is not a complete checkpoint: it has no {names[0]}.")


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """Returns the JSON object in a file; it is empty if there is no file."""
    if not (folder / name).exists():
        return {}
    try:
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / name} is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / name} holds a {type(settings).__name__}, expected a JSON object.")
    return settings


def _expect(path: Path, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` in {path} is wrong: expected {expected}.")


def _are_integers(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(value is None or type(value) is int for value in values)


def _check_config(path: Path, config: dict[str, Any]) -> None:
    _expect(path, "auto_map", isinstance(config.get("auto_map", {}), dict), "a JSON object")
    for part in ("text_config", "vision_config"):
        _expect(path, part, isinstance(config.get(part), dict), "a JSON object")
        for name in SIZES:
            size = config[part].get(name, 1)
            _expect(path, f"{part}.{name}", size is None or (type(size) is int and size > 0), "a number above 0")
        _expect(path, f"{part}.hidden_act", config[part].get("hidden_act", "gelu") in ACT2FN, f"one of {[*ACT2FN]}")
    dtype = config.get("dtype") or "float32"
    _expect(path, "dtype", isinstance(getattr(torch, str(dtype), None), torch.dtype), "a type of torch")


def check_weights(folder: Path, config: LlavaSTFConfig) -> None:
    """Raises a `ValueError` if weight files are missing or unreadable, or have fewer layers than the config."""
    names = set(_stored(folder))
    for part, settings in (("language_model", config.text_config), ("vision_tower", config.vision_config)):
        found = [re.search(rf"\b{part}\b.*\blayers\.(\d+)\.", name) for name in names]
        layers = 1 + max((int(match[1]) for match in found if match), default=-1)
        if layers < settings.num_hidden_layers:
            raise ValueError(
                f"The configuration in {folder} has {settings.num_hidden_layers} layers in the {part}, but there are "
                f"weights of {layers} only: the two do not belong together, or a file is missing."
            )


def _stored(folder: Path) -> Iterator[str]:
    """Returns the names of the stored weights."""
    files = {"model.safetensors"}
    if (folder / INDEX).exists():
        table = _settings(folder, INDEX).get("weight_map")
        holds = isinstance(table, dict) and all(isinstance(file, str) for file in table.values())
        _expect(folder / INDEX, "weight_map", holds, "the name of a file for each weight")
        files = set(table.values()) if table else files
    for file in sorted(files):
        _need(folder, file)
        try:
            with safe_open(folder / file, framework="pt") as weights:
                yield from weights.keys()
        except SafetensorError as error:
            raise ValueError(f"Cannot read the weights in {folder / file}: {error}. Are they complete?") from error


def checked_config(folder: str, revision: str | None) -> LlavaSTFConfig:
    """Loads the configuration; raises a `ValueError` or an `OSError` if this is no LLaVA-STF checkpoint, or damaged."""
    if not Path(folder).is_dir() and (Path(folder).is_absolute() or folder.count("/") > 1 or folder.startswith(".")):
        raise ValueError(f"There is no folder {folder!r}.")
    if Path(folder).is_dir() and revision is not None:
        raise ValueError(f"--revision is for a Hub id, but {folder} is a folder.")
    if Path(folder).is_dir():
        check_folder(Path(folder))
    # The configuration is loaded first, because its error names what kind of model a foreign folder has.
    config = LlavaSTFConfig.from_pretrained(folder, revision=revision)
    if Path(folder).is_dir():
        check_weights(Path(folder), config)
    return config


def load_checkpoint(
    folder: str, revision: str | None, **options: Any
) -> tuple[LlavaSTFProcessor, LlavaSTFForConditionalGeneration]:
    """Loads a checkpoint that is complete.

    Args:
        folder: folder or Hub id.
        revision: branch, tag or commit of a Hub id.
        options: of `from_pretrained` of the model, such as `dtype`.

    Raises:
        ValueError: if it is damaged, or its weights are not those of its config.json.
    """
    checked_config(folder, revision)
    processor = LlavaSTFProcessor.from_pretrained(folder, revision=revision)
    try:
        network, found = LlavaSTFForConditionalGeneration.from_pretrained(
            folder, revision=revision, output_loading_info=True, **options
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(f"The weights in {folder} have other shapes than its config.json says.") from error
    check_loaded(folder, found)
    return processor, network


def check_loaded(folder: str, found: dict[str, Any]) -> None:
    """Raises a `ValueError` unless `from_pretrained` found each weight; `found` is its `loading_info`.

    transformers warns of a missing weight and goes on with random numbers.
    """
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights, among them {missing[0]!r}: it is not complete.")
    surplus = sorted(found["unexpected_keys"])
    if surplus:
        raise ValueError(f"{folder} has {len(surplus)} weights that its config.json has no place for: {surplus[0]!r}.")
