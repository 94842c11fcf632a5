# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What the original trainer wrote, told apart by its files, as one set of weights under the original's names."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints.folders import ADAPTER_CONFIG_FILE, NON_LORA_FILE, PROJECTOR_FILE
from .checkpoints.weights import Weights, read_file, read_folder, read_json, section
from .fusion import MBTF, STF
from .keys import TOWER_PREFIX, ConversionError
from .lora import PEFT_PREFIX, _check_adapter_config, _require_adapted, lora_target
from .settings import LANGUAGE, check_settings

LAYERS = TOWER_PREFIX + "vision_model.encoder.layers."
LAYER = re.compile(re.escape(LAYERS) + r"(\d+)\.")
# A CLIP tower that transformers 5 saved alone has no `vision_model.` in front of these.
TOWER_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
# llava-hf's names of what an initialisation takes from it, as patterns, in the original's words.
LLAVA_HF_KEYS = (
    (r"(?:model\.)?language_model\.lm_head\.(.+)", r"lm_head.\1"),
    (r"(?:model\.language_model\.|language_model\.model\.)(.+)", r"model.\1"),
    (r"(?:model\.)?vision_tower\.(?!vision_tower\.)(?:vision_model\.)?(.+)", TOWER_PREFIX + r"vision_model.\1"),
    (r"(?:model\.)?multi_modal_projector\.(linear_[12]\..+)", STF + r"\1"),
)


@dataclass
class Source:
    """One run: what it is, its folder and config, and its weights under the original's names."""

    kind: str
    folder: Path
    config: dict[str, Any]
    weights: Weights
    notes: list[str]
    adapter: Weights | None = None
    adapter_config: dict[str, Any] | None = None


def read_source(folder: Path, base: Path | None, init_fusion: bool) -> Source:
    """Reads a run of any kind.

    Args:
        folder: the run, told apart by its files: an adapter, a stage-1 projector, or a model.
        base: the language model that an adapter or a projector was trained on.
        init_fusion: take a plain LLaVA or a language model as initialisation, without fusion weights.
    """
    place = folder / "config.json"
    config = read_json(place)
    notes: list[str] = []
    if init_fusion:
        config, notes = _language_config(config, place)
    notes += check_settings(place, config, LANGUAGE)
    if (folder / ADAPTER_CONFIG_FILE).exists():
        return _read_lora(folder, config, _base(base, folder, config, "a LoRA run"), notes)
    if (folder / PROJECTOR_FILE).exists():
        projector = read_file(folder / PROJECTOR_FILE)
        _require_fusion(projector, folder / PROJECTOR_FILE)
        weights = _base(base, folder, config, "a stage-1 projector") | projector
        return Source("stage-1 projector", folder, config, weights, notes)
    weights = read_folder(folder)
    _refuse_tiles(weights, folder)
    if base is not None:
        raise ConversionError(f"{folder} is a whole model, neither a projector nor a LoRA run: leave out --base.")
    if init_fusion and any(key.startswith(MBTF) for key in weights):
        raise ConversionError(f"{folder} has fusion weights; --init-fusion would throw them away. Leave it out.")
    if init_fusion:
        return Source("initialisation", folder, config, _initialisation(weights), notes)
    _require_fusion(weights, folder)
    return Source("full fine-tune", folder, config, weights, notes)


def _refuse_tiles(weights: Weights, folder: Path) -> None:
    tiles = [key for key in weights if key.endswith("image_newline")]
    if tiles:
        raise ConversionError(
            f"{folder} is a LLaVA-1.6 (LLaVA-NeXT), for it has the weight {tiles[0]!r}: it reads a picture in tiles "
            "(anyres), which LLaVA-STF does not. Begin with a LLaVA-1.5 or with a language model."
        )


def _require_fusion(weights: Weights, place: Path) -> None:
    if not any(key.startswith(MBTF) for key in weights):
        raise ConversionError(
            f"{place} has no {MBTF}* weights: this is not a LLaVA-STF checkpoint. To begin a training with the tower "
            "and the language model of a plain LLaVA (or with a language model alone), pass --init-fusion."
        )


def _base(base: Path | None, folder: Path, config: dict[str, Any], kind: str) -> Weights:
    """The weights of the language model that a run was trained on, which must compute what the run's config says."""
    if base is None:
        raise ConversionError(f"{folder} is {kind}: name the language model that it was trained on with --base.")
    settings = read_json(base / "config.json")
    check_settings(base / "config.json", settings, LANGUAGE)
    for name in ("hidden_act", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"):
        ours, theirs = config.get(name), settings.get(name)
        if ours is not None and theirs is not None and ours != theirs:
            raise ConversionError(
                f"{folder} was trained on another language model than {base}: `{name}` is {ours} here, {theirs} there."
            )
    return {key: weight for key, weight in read_folder(base).items() if not key.startswith((MBTF, STF))}


def _read_lora(folder: Path, config: dict[str, Any], base: Weights, notes: list[str]) -> Source:
    place = folder / ADAPTER_CONFIG_FILE
    adapter_config = read_json(place)
    _check_adapter_config(adapter_config, place)
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise ConversionError(f"{folder} has {ADAPTER_CONFIG_FILE}, but no adapter_model.safetensors or .bin.")
    adapter = read_file(file)
    rest = {key.removeprefix(PEFT_PREFIX): weight for key, weight in read_file(folder / NON_LORA_FILE).items()}
    _require_fusion(rest, folder / NON_LORA_FILE)
    for key in adapter:
        if lora_target(key) not in base:
            raise ConversionError(f"{file}: {key!r} has no counterpart in the base model.")
    _require_adapted({lora_target(key) for key in adapter}, base, adapter_config, file)
    return Source("LoRA run", folder, config, base | rest, notes, adapter, adapter_config)


def read_tower(folder: Path) -> Weights:
    """The vision tower of a CLIP folder (whole CLIP or its vision half) under the original's names."""
    weights = {
        f"vision_model.{key}" if key.startswith(TOWER_PARTS) else key: weight
        for key, weight in read_folder(folder).items()
    }
    tower = {TOWER_PREFIX + key: weight for key, weight in weights.items() if key.startswith("vision_model.")}
    if not tower:
        raise ConversionError(f"{folder} holds no CLIP vision tower: no weight is called vision_model.* or encoder.*.")
    return tower


def _initialisation(weights: Weights) -> Weights:
    """Tower and language model of a plain LLaVA, or a language model, without the projector."""
    named = {_original_name(key): weight for key, weight in weights.items()}
    return {key: weight for key, weight in named.items() if not key.startswith((STF, MBTF))}


def _original_name(key: str) -> str:
    for pattern, name in LLAVA_HF_KEYS:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, name, key)
    return key


def _language_config(config: dict[str, Any], place: Path) -> tuple[dict[str, Any], list[str]]:
    """What an initialisation takes, as a flat config of the original's format, and notes; llava-hf nests it."""
    if "text_config" in config and config.get("model_type") != "llava":
        raise ConversionError(f"{place}: `model_type` is {config.get('model_type')!r}, expected 'llava' or 'llama'.")
    text = section(config, "text_config", place)
    dropped = [name for name in text if name.startswith(("mm_", "image_")) and name != "mm_vision_tower"]
    dropped += sorted(config.keys() - {"text_config", *LANGUAGE.harmless}) if text is not config else []
    notes = [f"{place}: not taken, with the projector: {', '.join(dropped)}"] if dropped else []
    kept = {name: value for name, value in text.items() if name not in dropped}
    return {**kept, "mm_vision_tower": config.get("mm_vision_tower"), "image_aspect_ratio": "pad"}, notes


def _context_note(run: Source, context: int) -> list[str]:
    length = run.config.get("tokenizer_model_max_length")
    if not isinstance(length, int) or length >= context:
        return []
    return [f"the original cuts a prompt at {length} tokens (tokenizer_model_max_length); here it may have {context}"]


def _check_depth(weights: Weights, depth: int, clip_folder: Path) -> None:
    """Raises a [`ConversionError`] if the tower has not the depth that its config says: taps count from its end."""
    found = tower_depth(weights)
    if found != depth:
        raise ConversionError(f"{clip_folder}: `num_hidden_layers` is {depth}, but the tower's weights have {found}.")


def tower_depth(weights: Weights) -> int:
    """Layers of the tower, under the original's names."""
    return 1 + max((int(found[1]) for key in weights if (found := LAYER.match(key))), default=-1)
