# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Writes a finished Hub folder: weights, configs, processor, tokenizer, templates and code."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration, LlavaSTFProcessor

from .config import build_config, build_image_processor, read_vision_config
from .keys import ConversionError, to_hub
from .source import TOWER_PREFIX, State, read_json, read_source, read_tower
from .tokenizer import load_tokenizer

TEMPLATES = Path(__file__).parent / "chat_templates"
VOCABULARY_TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def convert(
    source: str | Path,
    destination: str | Path,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    tokenizer: str | Path | None = None,
    keep_full_tower: bool = False,
) -> Path:
    """Converts a run of the original trainer.

    Args:
        source: folder of a full fine-tune, of a stage-1 projector or of a LoRA run (merged into the base).
        destination: folder to write; must not exist, or be empty.
        base: folder of the language model that a projector or a LoRA run was trained on.
        vision_tower: folder of the CLIP model; by default the one that the source's config names.
        tokenizer: folder of the tokenizer; by default the source's, else the base's.
        keep_full_tower: keep the layers of the tower that lie behind the last tap; they never run.

    Returns:
        The destination.

    Raises:
        ConversionError: if anything is missing, unknown or of the wrong shape. Nothing is written then.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and any(destination.iterdir()):
        raise ConversionError(f"{destination} is not empty. Choose another folder; nothing was written.")
    original = read_json(source / "config.json")
    base = None if base is None else Path(base)
    state = read_source(source, base)
    clip_folder = _find_tower(source, original, vision_tower)
    if not any(key.startswith(TOWER_PREFIX) for key in state):
        state |= read_tower(clip_folder)

    tokenizer_folder = _find_tokenizer(tokenizer, source, base)
    text_tokenizer = load_tokenizer(tokenizer_folder, original["max_position_embeddings"])
    config = build_config(
        original,
        state,
        read_vision_config(clip_folder),
        text_tokenizer.image_token_id,
        text_tokenizer.pad_token_id,
    )
    if not keep_full_tower:
        config.vision_config.num_hidden_layers = max(config.taps)
        state = _without_unused_layers(state, config)
    weights = _with_image_row(to_hub(state), config)
    with torch.device("meta"):
        model = LlavaSTFForConditionalGeneration(config)
    _check_complete(weights, {name: tensor.shape for name, tensor in model.state_dict().items()})
    processor = LlavaSTFProcessor(
        image_processor=build_image_processor(original, clip_folder),
        tokenizer=text_tokenizer,
        patch_size=config.vision_config.patch_size,
        fusion_window=config.fusion_window,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template={
            "default": (TEMPLATES / "vicuna_v1.jinja").read_text(encoding="utf-8"),
            "plain": (TEMPLATES / "plain.jinja").read_text(encoding="utf-8"),
        },
    )
    _write(destination, model, weights, processor)
    return destination


def _find_tower(source: Path, original: dict, vision_tower: str | Path | None) -> Path:
    named = vision_tower or original.get("mm_vision_tower")
    if named is None:
        raise ConversionError("The source names no vision tower: give its folder with --vision-tower.")
    candidates = [Path(named), source / named, source.parent / named]
    for folder in candidates:
        if (folder / "config.json").exists():
            return folder
    raise ConversionError(f"The vision tower {str(named)!r} is not a folder here: give its folder with --vision-tower.")


def _find_tokenizer(tokenizer: str | Path | None, source: Path, base: Path | None) -> Path:
    candidates = [Path(tokenizer)] if tokenizer else [folder for folder in (source, base) if folder is not None]
    for folder in candidates:
        if (folder / "tokenizer_config.json").exists():
            return folder
    raise ConversionError(f"No tokenizer_config.json in {' or '.join(str(folder) for folder in candidates)}.")


def _without_unused_layers(state: State, config: LlavaSTFConfig) -> State:
    prefix = TOWER_PREFIX + "vision_model.encoder.layers."
    depth = config.vision_config.num_hidden_layers
    return {
        key: tensor
        for key, tensor in state.items()
        if not key.startswith(prefix) or int(key.removeprefix(prefix).split(".")[0]) < depth
    }


def _with_image_row(weights: State, config: LlavaSTFConfig) -> State:
    """Gives `<image>` its row in both tables: the mean of the others.

    The placeholder's embedding is never used, and its logit, the mean of all logits, is never the highest.
    """
    weights = dict(weights)
    for name in VOCABULARY_TABLES:
        table, row = weights[name], config.image_token_id
        mean = table.float().mean(0, keepdim=True).to(table.dtype)
        weights[name] = torch.cat([table[:row], mean, table[row + 1 :]])
    return weights


def _check_complete(weights: State, expected: dict[str, torch.Size]) -> None:
    for name in expected.keys() - weights.keys():
        raise ConversionError(f"The source has no weight for {name!r}.")
    for name, tensor in weights.items():
        if name not in expected:
            raise ConversionError(f"The source has the weight {name!r}, for which the model has no place.")
        if tensor.shape != expected[name]:
            raise ConversionError(f"{name!r} has the shape {tuple(tensor.shape)}, expected {tuple(expected[name])}.")
        if not torch.isfinite(tensor).all():
            raise ConversionError(f"{name!r} has NaN or infinite values.")


def _write(
    destination: Path, model: LlavaSTFForConditionalGeneration, weights: State, processor: LlavaSTFProcessor
) -> None:
    """Writes everything into a sibling folder and renames it at the end: complete or absent."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        save_torch_state_dict(weights, partial, max_shard_size="5GB")
        custom_object_save(model, partial, config=model.config)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(partial)
        processor.save_pretrained(partial)
        _generation_config(model.config).save_pretrained(partial)
        partial.chmod(0o755)
        if destination.exists():
            destination.rmdir()
        os.replace(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _generation_config(config: LlavaSTFConfig) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        suppress_tokens=[config.image_token_id],
    )
