# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Reads what the original trainer wrote, under the original's names, with its tower and its tokenizer."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFProcessor

from .checkpoints.folders import ADAPTER_CONFIG_FILE, ADAPTER_FILE, NON_LORA_FILE, PROJECTOR_FILE
from .checkpoints.weights import Weights, is_whole, read_file, read_folder, read_json, section
from .config import (
    build_config,
    build_image_processor,
    build_processor,
    build_text_config,
    context_length,
    read_generation,
    read_vision_config,
    rope_parameters,
)
from .fusion import MBTF, STF
from .keys import TOWER_PREFIX, ConversionError, renamed
from .locate import Places, commit_of
from .lora import PEFT_PREFIX, check_adapter_config, lora_target, require_adapted
from .options import Options
from .settings import LANGUAGE, check_settings
from .tokenizer import different_parts, load_tokenizer, tokenizer_notes

# In the order in which PEFT looks for them.
ADAPTER_FILES = (ADAPTER_FILE, "adapter_model.bin")
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


@dataclass(frozen=True)
class Run:
    """What the trainer wrote: its kind, its config, and its weights, which may lack the vision tower."""

    kind: str
    folder: Path
    config: dict[str, Any]
    weights: Weights
    notes: list[str]
    adapter: Weights | None = None
    adapter_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Source:
    """All that is converted. The weights are still on disk, under the original's names."""

    run: Run
    weights: Weights  # with the tower's
    config: LlavaSTFConfig  # of these weights
    processor: LlavaSTFProcessor
    end: int | list[int] | None  # the ids that end an answer
    notes: list[str]


def read(places: Places, options: Options) -> Source:
    """Reads a run with its tower and its tokenizer, and builds our config and processor.

    Raises:
        ConversionError: if a file is missing or damaged, if a setting is one that this model does not compute, or if
            an option does not fit this kind of run.
    """
    run = read_run(places.run, places.base, options.init_fusion)
    _refuse_options(run, options)
    tower, weights = _with_tower(run, places)
    settings = run.config if options.taps is None else {**run.config, "mm_vision_select_layer": options.taps}
    text = build_text_config(settings, run.folder / "config.json")
    end, generation_notes = read_generation(places.base or run.folder, run.config, text)
    context = context_length(text)
    tokenizer_folder = places.tokenizer()
    tokenizer = load_tokenizer(tokenizer_folder, context)
    if options.tokenizer is None and places.base is not None:
        _refuse_another_tokenizer(tokenizer, tokenizer_folder, places.base)
    vision, vision_notes = read_vision_config(tower)
    _check_depth(weights, vision.num_hidden_layers, tower)
    config = build_config(settings, weights, vision, text, tokenizer.image_token_id)
    image_processor, image_notes = build_image_processor(settings, tower, config)
    notes = [
        f"{run.folder}: {run.kind}",
        *run.notes,
        *_left_over(run),
        *_tower_note(run, weights, tower),
        *_commits(source=places.run, base=places.base, vision_tower=tower),
        *_context_note(run, context),
        *generation_notes,
        *_commits(tokenizer=tokenizer_folder if options.tokenizer else None),
        *tokenizer_notes(tokenizer_folder),
        *vision_notes,
        *image_notes,
    ]
    return Source(run, weights, config, build_processor(config, image_processor, tokenizer), end, notes)


def _refuse_another_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, base: Path) -> None:
    """Raises a [`ConversionError`] if a run has a tokenizer that is not its base's, which the original reads."""
    if folder == base or not (base / "tokenizer_config.json").exists():
        return
    try:
        theirs = load_tokenizer(base, tokenizer.model_max_length).backend_tokenizer
    except ConversionError as error:
        difference = str(error)
    else:
        parts = different_parts(tokenizer.backend_tokenizer, theirs)
        difference = f"their {' and '.join(parts)} differ." if parts else ""
    if difference:
        raise ConversionError(
            f"{folder} holds another tokenizer than {base}, which the original reads: {difference} Name the one that "
            "the run was trained with (--tokenizer)."
        )


def _left_over(run: Run) -> list[str]:
    """Notes on files of other kinds of runs, which nothing is read from."""
    adapters = [name for name in ADAPTER_FILES if (run.folder / name).exists()]
    left = adapters + [NON_LORA_FILE] if run.adapter is None else adapters[1:] + [PROJECTOR_FILE]
    return [f"{run.folder / name} is not read ({run.kind})" for name in left if (run.folder / name).exists()]


def _refuse_options(run: Run, options: Options) -> None:
    if options.taps is not None and not options.init_fusion:
        raise ConversionError("The taps of trained fusion weights are given: leave out --taps.")
    if options.seed and not options.init_fusion:
        raise ConversionError("All weights are given, and none is random: leave out --seed.")
    if options.keep_adapter and run.adapter is None:
        raise ConversionError(f"{run.folder} is a {run.kind}, which has no adapter: leave out --keep-adapter.")


def _with_tower(run: Run, places: Places) -> tuple[Path, Weights]:
    """The folder that describes the tower, and the run's weights with those of the tower."""
    if any(key.startswith(TOWER_PREFIX) for key in run.weights):
        return places.tower(run.config, weights=False), run.weights
    if run.config.get("unfreeze_mm_vision_tower"):
        raise ConversionError(f"{run.folder} trained its vision tower (unfreeze_mm_vision_tower) and does not hold it.")
    folder = places.tower(run.config, weights=True)
    return folder, run.weights | read_tower(folder)


def _tower_note(run: Run, weights: Weights, tower: Path) -> list[str]:
    if weights is not run.weights:
        return [f"vision tower: {tower}"]
    if tower == run.folder:
        return []
    return [f"vision tower: the source's own weights; {tower} gives its settings, and those of the pictures"]


def _commits(**folders: Path | None) -> list[str]:
    """Notes with the commits of what came from the Hub."""
    found = {name: commit_of(folder) for name, folder in folders.items() if folder is not None}
    return [f"{name.replace('_', ' ')}: commit {commit}" for name, commit in found.items() if commit is not None]


def read_run(folder: Path, base: Path | None, init_fusion: bool) -> Run:
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
    projector_file = folder / PROJECTOR_FILE
    if (folder / ADAPTER_CONFIG_FILE).exists():
        weights = _base(base, folder, config, "a LoRA run")
        return _read_lora(folder, config, weights, notes, None if base is None else commit_of(base))
    if projector_file.exists() and _has_projector(folder):
        notes.append(f"{projector_file} is not read: the whole model beside it has a projector of its own")
    elif projector_file.exists():
        projector = read_file(projector_file)
        _require_fusion(projector, projector_file)
        weights = _base(base, folder, config, "a stage-1 projector") | projector
        return Run("stage-1 projector", folder, config, weights, notes)
    weights = read_folder(folder)
    _refuse_tiles(weights, folder)
    if base is not None:
        raise ConversionError(f"{folder} is a whole model, neither a projector nor a LoRA run: leave out --base.")
    if init_fusion and any(key.startswith(MBTF) for key in weights):
        raise ConversionError(f"{folder} has fusion weights; --init-fusion would throw them away. Leave it out.")
    if init_fusion:
        return Run("initialisation", folder, config, _initialisation(weights), notes)
    _require_fusion(weights, folder)
    return Run("full fine-tune", folder, config, weights, notes)


def _has_projector(folder: Path) -> bool:
    return is_whole(folder) and any(key.startswith((STF, MBTF)) for key in read_folder(folder))


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
    names = ("hidden_act", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
    compared = {name: (config.get(name), settings.get(name)) for name in names}
    rope, base_rope = rope_parameters(config, folder / "config.json"), rope_parameters(settings, base / "config.json")
    compared["rope_theta"] = rope["rope_theta"], base_rope["rope_theta"]
    if base_rope["rope_type"] != "default":  # a run may extend the positions of its base, and keeps what that has
        compared["rope_scaling"] = rope, base_rope
    for name, (ours, theirs) in compared.items():
        if ours is not None and theirs is not None and ours != theirs:
            raise ConversionError(
                f"{folder} was trained on another language model than {base}: `{name}` is {ours} here, {theirs} there."
            )
    return {key: weight for key, weight in read_folder(base).items() if not key.startswith((MBTF, STF))}


def _read_lora(folder: Path, config: dict[str, Any], base: Weights, notes: list[str], commit: str | None) -> Run:
    """Reads the adapter and the fusion modules beside it; `commit` is that of the base, if it came from the Hub."""
    place = folder / ADAPTER_CONFIG_FILE
    if is_whole(folder):
        raise ConversionError(
            f"{folder} has both {ADAPTER_CONFIG_FILE} and the weights of a whole model: move away what is not meant."
        )
    adapter_config = read_json(place)
    check_adapter_config(adapter_config, place)
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).exists()), None)
    if file is None:
        raise ConversionError(f"{folder} has {ADAPTER_CONFIG_FILE}, but no adapter_model.safetensors or .bin.")
    adapter = read_file(file)
    rest = renamed(read_file(folder / NON_LORA_FILE), lambda key: key.removeprefix(PEFT_PREFIX))
    _require_fusion(rest, folder / NON_LORA_FILE)
    for key in adapter:
        if lora_target(key) not in base:
            raise ConversionError(f"{file}: {key!r} has no counterpart in the base model.")
    require_adapted({lora_target(key) for key in adapter}, base, adapter_config, file)
    return Run("LoRA run", folder, config, base | rest, notes, adapter, {**adapter_config, "revision": commit})


def read_tower(folder: Path) -> Weights:
    """The vision tower of a CLIP folder (whole CLIP or its vision half) under the original's names."""
    weights = renamed(read_folder(folder), lambda key: f"vision_model.{key}" if key.startswith(TOWER_PARTS) else key)
    tower = {TOWER_PREFIX + key: weight for key, weight in weights.items() if key.startswith("vision_model.")}
    if not tower:
        raise ConversionError(f"{folder} holds no CLIP vision tower: no weight is called vision_model.* or encoder.*.")
    return tower


def _initialisation(weights: Weights) -> Weights:
    """Tower and language model of a plain LLaVA, or a language model, without the projector."""
    named = renamed(weights, _original_name)
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
    kept = {name: value for name, value in text.items() if name not in dropped}
    # Beside the language model's settings; `vocab_size`, for one, may stand in both places.
    dropped += sorted(config.keys() - {"text_config", *LANGUAGE.harmless}) if text is not config else []
    notes = [f"{place}: not taken, with the projector: {', '.join(dropped)}"] if dropped else []
    return {**kept, "mm_vision_tower": config.get("mm_vision_tower"), "image_aspect_ratio": "pad"}, notes


def _context_note(run: Run, context: int) -> list[str]:
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
