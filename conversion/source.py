# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What the original trainer wrote, told apart by its files, as one set of weights under the original's names."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from .keys import TOWER_PREFIX, ConversionError
from .settings import ADAPTER, LANGUAGE, check_settings, foreign_settings, require_positive, unknown_settings
from .weights import Weight, Weights, read_file, read_folder, read_json, section

PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_CONFIG_FILE = "adapter_config.json"
NON_LORA_FILE = "non_lora_trainables.bin"
PEFT_PREFIX = "base_model.model."
# A CLIP tower that transformers 5 saved alone has no `vision_model.` in front of these.
TOWER_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
MBTF, STF = "model.mm_projector_crosslayer.", "model.mm_projector."
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


def fetch(name: str | Path, revision: str | None = None, subfolder: str | None = None, weights: bool = True) -> Path:
    """A local folder as it is, or the files of a Hub repository, downloaded (without weights, where not needed)."""
    folder = Path(name)
    if folder.is_dir() and revision is not None:
        raise ConversionError(f"{folder} is a folder here, which has no revision {revision!r}: leave it out.")
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
            raise ConversionError(f"{str(name)!r} is neither a folder here nor the id of a Hub repository.")
        patterns = ["*.json", "*.model", *(["*.bin", "*.safetensors"] if weights else [])]
        if subfolder:
            patterns = [f"{subfolder}/{pattern}" for pattern in patterns]
        try:
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConversionError(f"{str(name)!r} is no folder here, and the Hub says: {reason}") from error
    folder = folder / subfolder if subfolder else folder
    if not folder.is_dir():
        raise ConversionError(f"{folder} is not a folder.")
    return folder


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the cache of the Hub's client (`snapshots/COMMIT`); None for any other folder."""
    match = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", folder.as_posix())
    return match[1] if match else None


def find_run(folder: Path) -> Path:
    """The folder itself, or the one run in the folders below it (the nested layout of the authors' repository).

    Of several runs the only complete model is taken; a projector or an adapter beside it is left.
    """
    if _has_run(folder):
        return folder
    runs = [path.parent for path in sorted(folder.rglob("config.json")) if _has_run(path.parent)]
    whole = [run for run in runs if not any((run / name).exists() for name in (PROJECTOR_FILE, ADAPTER_CONFIG_FILE))]
    chosen = whole if len(whole) == 1 else runs
    if len(chosen) == 1:
        return chosen[0]
    if not runs:
        raise ConversionError(f"{folder} holds no run: no config.json with weights beside it, nor in a folder below.")
    names = ", ".join(str(run.relative_to(folder)) for run in runs)
    raise ConversionError(f"{folder} holds several runs ({names}): name one of them (--subfolder for a Hub id).")


def _has_run(folder: Path) -> bool:
    weights = ("*.safetensors", "*.bin", "*.index.json")
    config = folder / "config.json"
    if not config.exists() or str(read_json(config).get("model_type")).startswith("clip"):
        return False
    return any(next(folder.glob(pattern), None) for pattern in weights)


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


def _check_adapter_config(config: dict[str, Any], place: Path) -> None:
    missing = [name for name in ("r", "lora_alpha") if config.get(name) is None]
    # PEFT alone writes this file, so a setting that is unknown and says something belongs to a newer kind of adapter.
    special = foreign_settings(config, ADAPTER) + [name for name in unknown_settings(config, ADAPTER) if config[name]]
    if missing or special:
        found = ", ".join(f"{name} {config[name]!r}" for name in special) or f"no {' and no '.join(missing)}"
        raise ConversionError(
            f"{place}: expected plain LoRA with `r` and `lora_alpha`, which is all that is merged, found {found}."
        )
    check_settings(place, config, ADAPTER)
    require_positive(place, config, ["r"], whole=True)
    require_positive(place, config, ["lora_alpha"])


def _require_adapted(adapted: set[str], base: Weights, config: dict[str, Any], file: Path) -> None:
    """Raises a [`ConversionError`] if there is no matrix for a weight that the adapter's config names."""
    if not adapted:
        raise ConversionError(f"{file} holds no LoRA matrices: there is nothing to merge.")
    targets, layers = config.get("target_modules") or (), config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if not isinstance(layers, (list, type(None))):
        raise ConversionError(f"{ADAPTER_CONFIG_FILE}: `layers_to_transform` is {layers!r}, expected layer numbers.")
    for key in base if isinstance(targets, list) else ():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", key)
        if match is None or not (layers is None or int(match[1]) in layers):
            continue
        if any(match[2] == target or match[2].endswith(f".{target}") for target in targets) and key not in adapted:
            raise ConversionError(f"{file} has no LoRA matrices for {key!r}, which `target_modules` names.")


def lora_target(key: str) -> str:
    """The weight that an adapter's matrix belongs to, under the original's name."""
    match = re.fullmatch(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_[AB](?:\.default)?\.weight", key)
    if match is None:
        raise ConversionError(f"The adapter weight {key!r} is not a LoRA matrix.")
    return match[1] + ".weight"


def lora_pairs(adapter: Weights, weights: Weights, config: dict[str, Any]) -> dict[str, tuple[Weight, Weight]]:
    """The matrices A and B of each adapted weight, checked against it."""
    found: dict[str, dict[str, Weight]] = {}
    for key, weight in adapter.items():
        pair, side = found.setdefault(lora_target(key), {}), "A" if ".lora_A." in key else "B"
        if side in pair:
            raise ConversionError(f"The adapter has two matrices {side} of {lora_target(key)!r}.")
        pair[side] = weight
    for target, pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise ConversionError(f"The adapter has only the matrix {min(pair)} of {target!r}.")
        rows, *columns = weights[target].shape
        expected = (config["r"], *columns), (rows, config["r"])
        if (pair["A"].shape, pair["B"].shape) != expected:
            raise ConversionError(
                f"The LoRA matrices of {target!r} have the shapes {pair['A'].shape} and {pair['B'].shape}, expected "
                f"{expected[0]} and {expected[1]}."
            )
    return {target: (pair["A"], pair["B"]) for target, pair in found.items()}


def merge_lora(weights: Weights, adapter: Weights, config: dict[str, Any]) -> Weights:
    """`W + scale * B @ A` for each adapted weight, computed in float32 when it is written, in the weight's dtype."""
    pairs = lora_pairs(adapter, weights, config)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    return weights | {target: _merged(weights[target], *pair, scale) for target, pair in pairs.items()}


def _merged(weight: Weight, down: Weight, up: Weight, scale: float) -> Weight:
    def load() -> torch.Tensor:
        update = torch.mm(up.load().float(), down.load().float()).mul_(scale)
        return update.add_(weight.load()).to(weight.dtype)

    return Weight(weight.shape, weight.dtype, load, f"{weight.origin} + LoRA")


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
