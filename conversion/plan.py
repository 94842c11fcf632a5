# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What will be written: one step after the other, on names and shapes alone."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration, LlavaSTFProcessor

from .checkpoints.folders import TEMPLATES
from .checkpoints.weights import Weights, check_dtypes
from .config import build_config, build_image_processor, build_text_config, context_length, read_vision_config
from .fusion import new_fusion
from .keys import TOWER_PREFIX, ConversionError, to_hub
from .locate import _commits, _recorded_revision, _tokenizer_folder, _tower_folder, commit_of, fetch, find_run
from .lora import PEFT_PREFIX, _adapter_weights, lora_pairs, merge_lora
from .source import LAYER, Source, _check_depth, _context_note, read_source, read_tower
from .tokenizer import load_tokenizer
from .vocabulary import _with_vocabulary


@dataclass
class Plan:
    """All that will be written, checked; the weights are still on disk."""

    source: Source
    model: LlavaSTFForConditionalGeneration  # without weights
    weights: Weights
    processor: LlavaSTFProcessor
    adapter: Weights | None
    notes: list[str]


def make_plan(
    source: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    vision_tower_revision: str | None = None,
    tokenizer_revision: str | None = None,
    subfolder: str | None = None,
    keep_adapter: bool = False,
    keep_full_tower: bool = False,
    init_fusion: bool = False,
    taps: list[int] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    pad_vocabulary: int = 1,
) -> Plan:
    """Reads and checks a run.

    Args:
        source: folder or Hub id.
        base: folder or Hub id of the language model that a projector or a LoRA run was trained on.
        vision_tower: folder or Hub id of the CLIP model; by default the one that the source's config names.
        tokenizer: folder of the tokenizer; by default the source's, else the base's.
        revision: branch, tag or commit of the source, if that is a Hub id.
        base_revision: of the base; by default the one that the adapter's config records for it.
        vision_tower_revision: of the CLIP model.
        tokenizer_revision: of the tokenizer.
        subfolder: of a Hub id with several runs.
        keep_adapter: keep a LoRA run as an adapter beside its converted base, instead of merging it.
        keep_full_tower: keep the tower's layers behind the last tap; they never run.
        init_fusion: begin a training: tower and language model are taken, the fusion modules are new.
        taps: blocks of the tower that new fusion modules mix, in their order; by default the released model's.
        seed: of the new fusion modules.
        dtype: of all weights; by default each weight's own.
        pad_vocabulary: pad the vocabulary tables to a multiple of this.
    """
    folder = find_run(fetch(source, revision, subfolder))
    for option, name, given in (("base", base, base_revision), ("tokenizer", tokenizer, tokenizer_revision)):
        if name is None and given is not None:
            raise ConversionError(f"--{option}-revision {given} is given without --{option}.")
    base_folder = None if base is None else fetch(base, base_revision or _recorded_revision(folder, base))
    run = read_source(folder, base_folder, init_fusion)
    if taps is not None:
        if not init_fusion:
            raise ConversionError("The taps of trained fusion weights are given: leave out --taps.")
        run.config["mm_vision_select_layer"] = taps
    notes = [f"{run.folder}: {run.kind}", *run.notes]
    weights = run.weights
    has_tower = any(key.startswith(TOWER_PREFIX) for key in weights)
    if not has_tower and run.config.get("unfreeze_mm_vision_tower"):
        raise ConversionError(f"{run.folder} trained its vision tower (unfreeze_mm_vision_tower) and does not hold it.")
    clip_folder = _tower_folder(run, vision_tower, vision_tower_revision, weights=not has_tower)
    if keep_adapter and run.adapter is None:
        raise ConversionError(f"{run.folder} is a {run.kind}, which has no adapter: leave out --keep-adapter.")
    if not has_tower:
        weights = weights | read_tower(clip_folder)
        notes.append(f"vision tower: {clip_folder}")
    notes += _commits(source=folder, base=base_folder, vision_tower=clip_folder)
    adapter = None
    if run.adapter is not None and run.adapter_config is not None:
        run.adapter_config["revision"] = None if base_folder is None else commit_of(base_folder)
        if keep_adapter:
            adapter = _adapter_weights(lora_pairs(run.adapter, weights, run.adapter_config))
        else:
            weights = merge_lora(weights, run.adapter, run.adapter_config)

    text = build_text_config(run.config, run.folder / "config.json")
    context = context_length(text)
    notes += _context_note(run, context)
    tokenizer_folder = _tokenizer_folder(tokenizer, tokenizer_revision, run, base_folder)
    notes += _commits(tokenizer=tokenizer_folder if tokenizer else None)
    text_tokenizer = load_tokenizer(tokenizer_folder, context)
    text.pad_token_id = text_tokenizer.pad_token_id
    image_token_id = text_tokenizer.image_token_id
    vision, vision_notes = read_vision_config(clip_folder)
    _check_depth(weights, vision.num_hidden_layers, clip_folder)
    config = build_config(run.config, weights, vision, text, image_token_id)
    image_processor, image_notes = build_image_processor(run.config, clip_folder, vision.image_size)
    notes += vision_notes + image_notes
    if init_fusion:
        weights = weights | new_fusion(config, seed)
        notes.append(f"THE FUSION MODULES ARE NEW (seed {seed}): train them before you ask this model anything")
    if not keep_full_tower and config.vision_config.num_hidden_layers > max(config.taps):
        config.vision_config.num_hidden_layers = max(config.taps)
        weights = _without_unused_layers(weights, config)
        notes.append(f"the tower's layers behind the last tap, {max(config.taps)}, are left out: they are never used")
    weights, note = _with_vocabulary(to_hub(weights), config, len(text_tokenizer), pad_vocabulary)
    notes.append(note)
    if dtype is not None:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        adapter = None if adapter is None else {name: weight.to(dtype) for name, weight in adapter.items()}
        config.dtype = dtype
    config.text_config.dtype = config.vision_config.dtype = config.dtype  # as `save_pretrained` writes it
    if adapter is not None:
        adapter |= {PEFT_PREFIX + name: weight for name, weight in weights.items() if ".multi_modal_projector." in name}
    check_dtypes(weights | (run.adapter or {}))

    model = empty_model(config, weights)
    check_complete(weights, model)
    processor = LlavaSTFProcessor(
        image_processor=image_processor,
        tokenizer=text_tokenizer,
        patch_size=config.vision_config.patch_size,
        fusion_window=config.fusion_window,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template={
            "default": (TEMPLATES / "vicuna_v1.jinja").read_text(encoding="utf-8"),
            "plain": (TEMPLATES / "plain.jinja").read_text(encoding="utf-8"),
        },
    )
    return Plan(run, model, weights, processor, adapter, notes)


def _without_unused_layers(weights: Weights, config: LlavaSTFConfig) -> Weights:
    depth = config.vision_config.num_hidden_layers
    return {key: weight for key, weight in weights.items() if not (found := LAYER.match(key)) or int(found[1]) < depth}


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
