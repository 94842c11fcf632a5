# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The way back: from our Hub folder to the layout of the original trainer."""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch

from modeling_llava_stf import LlavaSTFConfig

from .config import INNER_TAPS
from .convert import EMBEDDINGS, HEAD, ORIGINAL_CONFIG_FILE, complete_or_absent, require_empty
from .keys import TOWER_PREFIX, ConversionError, to_original
from .source import fetch, read_tower
from .weights import Weight, Weights, compare, parse_size, read_folder, read_json, write_folder

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def convert_back(
    source: str | Path,
    destination: str | Path,
    *,
    vision_tower: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = False,
    dry_run: bool = False,
) -> Path:
    """Writes the original's layout: its names, its config, its vocabulary.

    Args:
        source: folder or Hub id of one of our checkpoints.
        destination: folder to write; must not exist, or be empty.
        vision_tower: the CLIP folder, to restore the tower's layers that were left out.
        tokenizer: folder with the original's tokenizer.model, which ours does not hold.
        revision: of a Hub id.
        max_shard_size: size of a weight file.
        verify: read the result again and compare checksums.
        dry_run: only print what would be written.

    Raises:
        ConversionError: if the tower lacks layers and there is no CLIP folder to take them from, or if the CLIP folder
            holds another tower.
    """
    destination = require_empty(destination)
    folder = fetch(source, revision)
    settings = read_json(folder / "config.json")
    if settings.get("model_type") != LlavaSTFConfig.model_type:
        raise ConversionError(f"{folder} is a {settings.get('model_type')!r} model, expected a converted LLaVA-STF.")
    config = LlavaSTFConfig.from_pretrained(folder)
    original = read_json(folder / ORIGINAL_CONFIG_FILE) if (folder / ORIGINAL_CONFIG_FILE).exists() else None
    weights = read_folder(folder)
    rows = original["vocab_size"] if original else _rows_without_placeholder(config)
    for name in (EMBEDDINGS, HEAD):
        weights[name] = _first_rows(weights[name], rows)
    weights = to_original(weights)
    weights = _with_whole_tower(weights, config, None if vision_tower is None else fetch(vision_tower))
    if original is None:
        original = _original_config(config, rows, vision_tower)
    if config.taps[1:] != list(INNER_TAPS.get(len(config.taps), ())):
        # The original's code would tap other blocks. On a list it fails, instead of computing something else.
        original["mm_vision_select_layer"] = config.taps
        print(f"- the taps {config.taps} are not those of the original's code: only this converter reads the result")
    if dry_run:
        for name, weight in weights.items():
            print(f"{name}  {'x'.join(map(str, weight.shape))} {weight.dtype}  ({weight.origin})")
        return destination
    with complete_or_absent(destination) as unfinished:
        write_folder(unfinished, weights, parse_size(max_shard_size))
        (unfinished / "config.json").write_text(json.dumps(original, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer_folder = fetch(tokenizer)
            for name in TOKENIZER_FILES:
                if (tokenizer_folder / name).exists():
                    shutil.copyfile(tokenizer_folder / name, unfinished / name)
        else:
            print("- no tokenizer was written: ours does not hold the original's tokenizer.model (--tokenizer FOLDER)")
        if verify:
            compare(read_folder(unfinished), weights, zlib.crc32)
            print(f"- verified: {len(weights)} tensors have the checksums of their sources")
    return destination


def _rows_without_placeholder(config: LlavaSTFConfig) -> int:
    rows = config.text_config.vocab_size
    return rows - 1 if config.image_token_id == rows - 1 else rows


def _first_rows(table: Weight, rows: int) -> Weight:
    return Weight((rows, *table.shape[1:]), table.dtype, lambda: table.load()[:rows], table.origin)


def _with_whole_tower(weights: Weights, config: LlavaSTFConfig, clip_folder: Path | None) -> Weights:
    """Adds the layers behind the last tap again, from CLIP, whose other layers must be those that are here."""
    depth = config.vision_config.num_hidden_layers
    if clip_folder is None:
        if depth == max(config.taps):
            raise ConversionError(
                f"The tower is stored without its layers behind the last tap ({depth}): give the CLIP folder with "
                "--vision-tower to restore them, or convert with --keep-full-tower."
            )
        return weights
    tower = read_tower(clip_folder)
    for key in sorted(weights.keys() & tower.keys()):
        if weights[key].shape != tower[key].shape:
            raise ConversionError(f"{clip_folder} holds another tower: {key!r} is {tower[key].shape} there.")
    known = TOWER_PREFIX + "vision_model.embeddings.position_embedding.weight"
    if not torch.equal(weights[known].load(), tower[known].load().to(weights[known].dtype)):
        raise ConversionError(f"{clip_folder} holds another tower: its weights are not those of {known!r} here.")
    missing = {key: weight for key, weight in tower.items() if key not in weights and "position_ids" not in key}
    dtype = weights[TOWER_PREFIX + "vision_model.post_layernorm.weight"].dtype
    return weights | {key: weight.to(dtype) for key, weight in missing.items()}


def _original_config(config: LlavaSTFConfig, rows: int, vision_tower: str | Path | None) -> dict[str, Any]:
    """What the original's code reads, from ours; a checkpoint that we converted carries its own."""
    text = config.text_config.to_dict()
    rope = text.pop("rope_parameters")
    return {
        **text,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": rows,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "image_aspect_ratio": "pad",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(vision_tower) if vision_tower else "openai/clip-vit-large-patch14-336",
        "tokenizer_model_max_length": text["max_position_embeddings"],
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
