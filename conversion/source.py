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
from .weights import Weight, Weights, read_file, read_folder, read_json

PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_CONFIG_FILE = "adapter_config.json"
NON_LORA_FILE = "non_lora_trainables.bin"
PEFT_PREFIX = "base_model.model."
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
    adapter: Weights | None = None
    adapter_config: dict[str, Any] | None = None


def fetch(name: str | Path, revision: str | None = None, subfolder: str | None = None, weights: bool = True) -> Path:
    """A local folder as it is, or the files of a Hub repository, downloaded (without weights, where not needed)."""
    folder = Path(name)
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
    if not (folder / "config.json").exists() or read_json(folder / "config.json").get("model_type", "").startswith(
        "clip"
    ):
        return False
    return any(next(folder.glob(pattern), None) for pattern in weights)


def read_source(folder: Path, base: Path | None, init_fusion: bool) -> Source:
    """Reads a run of any kind.

    Args:
        folder: the run, told apart by its files: an adapter, a stage-1 projector, or a model.
        base: the language model that an adapter or a projector was trained on.
        init_fusion: take a plain LLaVA or a language model as initialisation, without fusion weights.
    """
    config = read_json(folder / "config.json")
    if config.get("tie_word_embeddings"):
        raise ConversionError(f"{folder}: tied embeddings (tie_word_embeddings) are not a LLaVA-STF; untie them first.")
    if (folder / ADAPTER_CONFIG_FILE).exists():
        return _read_lora(folder, config, _base(base, folder, "a LoRA run"))
    if (folder / PROJECTOR_FILE).exists():
        projector = read_file(folder / PROJECTOR_FILE)
        _require_fusion(projector, folder / PROJECTOR_FILE)
        weights = _base(base, folder, "a stage-1 projector") | projector
        return Source("stage-1 projector", folder, config, weights)
    weights = read_folder(folder)
    if base is not None:
        raise ConversionError(f"{folder} is a whole model, neither a projector nor a LoRA run: leave out --base.")
    if init_fusion and any(key.startswith(MBTF) for key in weights):
        raise ConversionError(f"{folder} has fusion weights; --init-fusion would throw them away. Leave it out.")
    if init_fusion:
        weights = _initialisation(weights)
        return Source("initialisation", folder, _language_config(config), weights)
    _require_fusion(weights, folder)
    return Source("full fine-tune", folder, config, weights)


def _require_fusion(weights: Weights, place: Path) -> None:
    if not any(key.startswith(MBTF) for key in weights):
        raise ConversionError(
            f"{place} has no {MBTF}* weights: this is not a LLaVA-STF checkpoint. To begin a training with the tower "
            "and the language model of a plain LLaVA (or with a language model alone), pass --init-fusion."
        )


def _base(base: Path | None, folder: Path, kind: str) -> Weights:
    if base is None:
        raise ConversionError(f"{folder} is {kind}: name the language model that it was trained on with --base.")
    return {key: weight for key, weight in read_folder(base).items() if not key.startswith((MBTF, STF))}


def _read_lora(folder: Path, config: dict[str, Any], base: Weights) -> Source:
    adapter_config = read_json(folder / ADAPTER_CONFIG_FILE)
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
    return Source("LoRA run", folder, config, base | rest, adapter, adapter_config)


def lora_target(key: str) -> str:
    """The weight that an adapter's matrix belongs to, under the original's name."""
    match = re.fullmatch(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_[AB](?:\.default)?\.weight", key)
    if match is None:
        raise ConversionError(f"The adapter weight {key!r} is not a LoRA matrix.")
    return match[1] + ".weight"


def lora_pairs(adapter: Weights, weights: Weights, config: dict[str, Any]) -> dict[str, tuple[Weight, Weight]]:
    """The matrices A and B of each adapted weight, checked against it."""
    special = [name for name in ("alpha_pattern", "rank_pattern", "fan_in_fan_out", "use_dora") if config.get(name)]
    if special or "r" not in config or "lora_alpha" not in config:
        raise ConversionError(
            f"{ADAPTER_CONFIG_FILE}: expected plain LoRA with `r` and `lora_alpha`"
            + (f", found {', '.join(special)}." if special else ".")
        )
    found: dict[str, dict[str, Weight]] = {}
    for key, weight in adapter.items():
        found.setdefault(lora_target(key), {})["A" if ".lora_A." in key else "B"] = weight
    for target, pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise ConversionError(f"The adapter has only the matrix {min(pair)} of {target!r}.")
        rows, columns = weights[target].shape
        if pair["A"].shape != (config["r"], columns) or pair["B"].shape != (rows, config["r"]):
            raise ConversionError(
                f"The LoRA matrices of {target!r} have the shapes {pair['A'].shape} and {pair['B'].shape}, expected "
                f"{(config['r'], columns)} and {(rows, config['r'])}."
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
    return {
        TOWER_PREFIX + key: weight for key, weight in read_folder(folder).items() if key.startswith("vision_model.")
    }


def _initialisation(weights: Weights) -> Weights:
    """Tower and language model of a plain LLaVA, or a language model, without the projector."""
    named = {_original_name(key): weight for key, weight in weights.items()}
    return {key: weight for key, weight in named.items() if not key.startswith((STF, MBTF))}


def _original_name(key: str) -> str:
    for pattern, name in LLAVA_HF_KEYS:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, name, key)
    return key


def _language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The flat config of the original's format; llava-hf nests the language model's."""
    return {**config.get("text_config", config), "mm_vision_tower": config.get("mm_vision_tower")}
