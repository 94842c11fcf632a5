# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The way back: from our Hub folder to the layout of the original trainer."""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFImageProcessor

from .checkpoints.folders import (
    ORIGINAL_CONFIG_FILE,
    TEMPLATES,
    complete_or_absent,
    require_empty,
)
from .checkpoints.weights import Weights, check_dtypes, compare, parse_size, read_folder, read_json, write_folder
from .config import (
    INNER_TAPS,
    build_image_processor,
    build_text_config,
    context_length,
    preprocessor_file,
    read_our_config,
    read_vision_config,
)
from .keys import TOWER_PREFIX, ConversionError, to_newest, to_original
from .locate import fetch
from .plan import check_complete, empty_model
from .settings import LANGUAGE, OUR_OPTIONS, PREPROCESSOR, check_settings
from .source import LAYERS, read_tower, tower_depth
from .tokenizer import different_parts, load_tokenizer, read_tokenizer
from .vocabulary import EMBEDDINGS, HEAD, first_rows, refuse_growth, rows_without_placeholder
from .write import print_shards

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# What the original's code reads, beside the language model's settings; a checkpoint that we converted has its own.
NEW_CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "image_aspect_ratio": "pad",
    "mm_patch_merge_type": "flat",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "tokenizer_padding_side": "right",
    "use_mm_proj": True,
}


def convert_back(
    source: str | Path,
    destination: str | Path,
    *,
    vision_tower: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    vision_tower_revision: str | None = None,
    tokenizer_revision: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = False,
    dry_run: bool = False,
) -> Path:
    """Writes the original's layout: its names, its config, its vocabulary.

    Args:
        source: folder or Hub id of one of our checkpoints.
        destination: folder to write; must not exist, or be empty.
        vision_tower: the CLIP folder, to restore the tower's layers that were left out.
        tokenizer: folder with the original's tokenizer.model, which ours does not hold; it must read texts as ours.
        revision: branch, tag or commit of the source, if that is a Hub id.
        vision_tower_revision: of the CLIP model.
        tokenizer_revision: of the tokenizer.
        max_shard_size: size of a weight file.
        verify: read the result again and compare checksums.
        dry_run: only print what would be written.

    Raises:
        ConversionError: if a weight is missing, unknown, damaged or of the wrong shape; if tokens were added since the
            conversion, for which the original's vocabulary has no place; if the tower lacks layers and there is no CLIP
            folder to take them from; or if the CLIP folder holds another tower, or the tokenizer's another tokenizer.
            Nothing is written then.
    """
    destination = require_empty(destination)
    limit = parse_size(max_shard_size)
    folder = fetch(source, revision)
    clip_folder = _fetch_named("vision-tower", vision_tower, vision_tower_revision)
    tokenizer_folder = _fetch_named("tokenizer", tokenizer, tokenizer_revision)
    original, weights = _in_original_layout(folder, clip_folder, vision_tower)
    files = _tokenizer_files(tokenizer_folder, folder)
    if dry_run:
        for name, weight in weights.items():
            print(f"{name}  {'x'.join(map(str, weight.shape))} {weight.dtype}  ({weight.origin})")
        print(f"would write {', '.join(['config.json', *(file.name for file in files)])}")
        print_shards(weights, limit)
        return destination
    with complete_or_absent(destination) as unfinished:
        write_folder(unfinished, weights, limit)
        (unfinished / "config.json").write_text(json.dumps(original, indent=2) + "\n", encoding="utf-8")
        for file in files:
            shutil.copyfile(file, unfinished / file.name)
        if verify:
            compare(read_folder(unfinished), weights, zlib.crc32)
            print(f"- verified: {len(weights)} tensors have the checksums of their sources")
    return destination


def _in_original_layout(
    folder: Path, clip_folder: Path | None, vision_tower: str | Path | None
) -> tuple[dict[str, Any], Weights]:
    """The config and the weights in the original's words."""
    config = _read_config(folder)
    weights = to_newest(read_folder(folder))
    check_complete(weights, empty_model(config, weights))
    check_dtypes(weights)
    original = _original_config(config, folder, vision_tower)
    original["dtype" if "dtype" in original else "torch_dtype"] = str(weights[EMBEDDINGS].dtype).removeprefix("torch.")
    refuse_growth(weights, original["vocab_size"], folder, config.text_config.pad_token_id)
    for name in (EMBEDDINGS, HEAD):
        weights[name] = first_rows(weights[name], original["vocab_size"])
    weights = _with_whole_tower(to_original(weights), config, clip_folder)
    original["mm_vision_select_layer"] = _select_layer(original, config.taps, weights)
    if config.token_budgets is not None:
        print(f"- token_budgets {config.token_budgets} are not written: the original's code has one number of tokens")
    if clip_folder is None:
        print(
            f"- not compared (--vision-tower does): the original's code takes tower and preprocessor from "
            f"{original.get('mm_vision_tower')}, whatever is written here"
        )
    _check_pictures(original, config, folder, clip_folder)
    return original, weights


def _fetch_named(option: str, name: str | Path | None, revision: str | None) -> Path | None:
    if name is None and revision is not None:
        raise ConversionError(f"--{option}-revision {revision} is given without --{option}.")
    return None if name is None else fetch(name, revision)


def _read_config(folder: Path) -> LlavaSTFConfig:
    config = read_our_config(folder)
    if config.projector_hidden_act != "gelu":
        raise ConversionError(
            f"{folder / 'config.json'}: `projector_hidden_act` is {config.projector_hidden_act!r}, expected 'gelu' "
            "(`mlp2x_gelu`): the original's code has no other."
        )
    return config


def _original_config(config: LlavaSTFConfig, folder: Path, vision_tower: str | Path | None) -> dict[str, Any]:
    """The config that the conversion kept, or a new one, with what ours says otherwise by now."""
    settings, generation = config.text_config.to_dict(), folder / "generation_config.json"
    if generation.exists():  # the result has none: the original's `generate` takes from config.json what ends an answer
        settings["eos_token_id"] = read_json(generation).get("eos_token_id", settings["eos_token_id"])
    text = build_text_config(settings, folder / "config.json")
    fields = {*LlamaConfig().to_dict()} - {*PreTrainedConfig().to_dict(), "vocab_size"}
    now = {name: value for name, value in text.to_dict().items() if name in fields}
    file = folder / ORIGINAL_CONFIG_FILE
    if file.exists():
        original = read_json(file)
        check_settings(file, original, LANGUAGE)
        before = build_text_config(original, file)
        # The conversion took the tokenizer's padding.
        known = {**before.to_dict(), "pad_token_id": text.pad_token_id}
        now = {name: value for name, value in now.items() if value != known[name]}
        original["vocab_size"] = before.vocab_size
    else:
        original = {**NEW_CONFIG, "mm_hidden_size": config.vision_config.hidden_size}
        original["tokenizer_model_max_length"] = context_length(text)
        original["vocab_size"] = rows_without_placeholder(config)
        original |= {"mm_vision_tower": str(vision_tower)} if vision_tower else {}
    rope = now.pop("rope_parameters", None)
    if rope is not None:
        original.pop("rope_parameters", None)
        now |= _original_rope(rope)
    return original | now


def _original_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The rotary positions in the words of transformers 4, which takes no other key beside these two."""
    kind = rope["rope_type"]
    if kind not in ("default", "linear", "dynamic"):
        raise ConversionError(f"The original's code has no rotary positions of the type {kind!r}.")
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if kind == "default" else {"type": kind, "factor": rope["factor"]},
    }


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
    for key in sorted(key for key in weights if key.startswith(TOWER_PREFIX)):
        if key not in tower or weights[key].shape != tower[key].shape:
            found = tower[key].shape if key in tower else "missing"
            raise ConversionError(f"{clip_folder} holds another tower: {key!r} is {found} there.")
        if not _same_but_for_rounding(weights[key].load(), tower[key].load()):
            raise ConversionError(
                f"{clip_folder} holds another tower: its weights are not those of {key!r} here. The original's code "
                "would take the tower from there."
            )
    missing = _layers_behind(tower, weights, depth, _tower_depth(clip_folder, config))
    check_dtypes(missing)
    dtype = weights[TOWER_PREFIX + "vision_model.post_layernorm.weight"].dtype
    return weights | {key: weight.to(dtype) for key, weight in missing.items()}


def _same_but_for_rounding(here: torch.Tensor, there: torch.Tensor) -> bool:
    """Whether these are the same weights, which training may have kept in 16 bits before they got their dtype here."""
    kept = (there.dtype, torch.bfloat16, torch.float16)
    return any(torch.equal(here, there.to(dtype).to(here.dtype)) for dtype in kept)


def _tower_depth(clip_folder: Path, config: LlavaSTFConfig) -> int:
    """Layers of CLIP's tower, which must compute as ours does."""
    vision, _ = read_vision_config(clip_folder)
    for name in ("hidden_act", "layer_norm_eps", "num_attention_heads", "image_size", "patch_size"):
        here, there = getattr(config.vision_config, name), getattr(vision, name)
        if here != there:
            raise ConversionError(f"{clip_folder} holds another tower: `{name}` is {there} there, {here} here.")
    return vision.num_hidden_layers


def _layers_behind(tower: Weights, weights: Weights, start: int, end: int) -> Weights:
    """The layers `start` to `end` of CLIP, each with the weights and shapes of the first one here."""
    layers: Weights = {}
    for index in range(start, end):
        for key in [key for key in weights if key.startswith(f"{LAYERS}0.")]:
            name = key.replace(f"{LAYERS}0.", f"{LAYERS}{index}.")
            if name not in tower or tower[name].shape != weights[key].shape:
                found = tower[name].shape if name in tower else "none"
                raise ConversionError(f"The CLIP folder has for {name!r} the shape {found}, not {weights[key].shape}.")
            layers[name] = tower[name]
    return layers


def _select_layer(original: dict[str, Any], taps: list[int], weights: Weights) -> int | list[int]:
    """`mm_vision_select_layer` for these taps, of which the original's code has all but the first built in."""
    if taps[1:] != list(INNER_TAPS.get(len(taps), ())):
        # The original's code would tap other blocks. On a list it fails, instead of computing something else.
        print(f"- the taps {taps} are not those of the original's code: only this converter reads the result")
        return taps
    states = tower_depth(weights) + 1
    selected = original.get("mm_vision_select_layer", -2)
    return selected if isinstance(selected, int) and selected % states == taps[0] else taps[0] - states


def _check_pictures(original: dict[str, Any], config: LlavaSTFConfig, folder: Path, clip_folder: Path | None) -> None:
    """Sets `image_aspect_ratio`; the original reads all else about pictures from CLIP, which must say the same."""
    if not preprocessor_file(folder).exists():
        return
    ours = LlavaSTFImageProcessor.from_pretrained(folder)
    if bool(ours.do_pad) != (original.get("image_aspect_ratio") == "pad"):
        original["image_aspect_ratio"] = "pad" if ours.do_pad else "square"
    lost = [f"{name} {value}" for name in sorted(OUR_OPTIONS) if (value := getattr(ours, name))]
    if lost:
        print(f"- not carried over, for the original's code has no such options: {', '.join(lost)}")
    if clip_folder is not None:
        clip, _ = build_image_processor(original, clip_folder, config)
        for name in sorted(PREPROCESSOR.carried - OUR_OPTIONS):
            if getattr(ours, name) != getattr(clip, name):
                raise ConversionError(
                    f"The pictures' `{name}` is {getattr(ours, name)} in {folder}, but {getattr(clip, name)} in "
                    f"{clip_folder}, where the original reads it."
                )
    template = folder / "chat_template.jinja"
    if template.exists() and template.read_bytes() != (TEMPLATES / "vicuna_v1.jinja").read_bytes():
        print("- the chat template is not that of the conversion; the original has its own, in its code")


def _tokenizer_files(folder: Path | None, ours: Path) -> list[Path]:
    """The files of the original's tokenizer, which must read texts as the one in `ours`, if there is one."""
    if folder is None:
        print("- no tokenizer is written: ours does not hold the original's tokenizer.model (--tokenizer FOLDER)")
        return []
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    if folder / "tokenizer.model" not in files:
        raise ConversionError(f"{folder} has no tokenizer.model, from which the original makes its tokenizer.")
    if (ours / "tokenizer.json").exists():
        theirs = load_tokenizer(folder, 1, original=True).backend_tokenizer
        different = different_parts(read_tokenizer(ours / "tokenizer.json"), theirs)
        if different:
            raise ConversionError(
                f"{folder} holds another tokenizer than {ours}: their {' and '.join(different)} differ."
            )
    return files
