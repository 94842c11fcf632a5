# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""A LoRA run: its matrices merged into the base, or kept under PEFT's names."""

import re
from pathlib import Path
from typing import Any

import torch

from .checkpoints.folders import ADAPTER_CONFIG_FILE
from .checkpoints.weights import Weight, Weights
from .keys import ConversionError, to_hub
from .settings import ADAPTER, check_settings, foreign_settings, require_positive, unknown_settings

PEFT_PREFIX = "base_model.model."


def check_adapter_config(config: dict[str, Any], place: Path) -> None:
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


def require_adapted(adapted: set[str], base: Weights, config: dict[str, Any], file: Path) -> None:
    """Raises a [`ConversionError`] if there is no matrix for a weight that the adapter's config names."""
    if not adapted:
        raise ConversionError(f"{file} holds no LoRA matrices: there is nothing to merge.")
    layers = config.get("layers_to_transform")
    if not isinstance(layers, (int, list, type(None))):
        raise ConversionError(f"{ADAPTER_CONFIG_FILE}: `layers_to_transform` is {layers!r}, expected layer numbers.")
    # With a pattern, or with modules that are left out, PEFT's own rules decide.
    listed = isinstance(config.get("target_modules"), list) and not config.get("exclude_modules")
    for key in base if listed else ():
        match = re.fullmatch(r"(model\.layers\..+)\.weight", key)
        if match and key not in adapted and _is_named(match[1], config):
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
        if not _is_named(target.removesuffix(".weight"), config):
            raise ConversionError(
                f"The adapter has matrices of {target!r}, which {ADAPTER_CONFIG_FILE} does not name (`target_modules`, "
                "`exclude_modules`, `layers_to_transform`): PEFT leaves them out."
            )
    return {target: (pair["A"], pair["B"]) for target, pair in found.items()}


def _is_named(module: str, config: dict[str, Any]) -> bool:
    """Whether an adapter's config names a module, by the rules of PEFT."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if targets in (None, "all-linear"):
        return True
    if _fits(module, config.get("exclude_modules") or []):
        return False
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return _fits(module, targets)
    layers = [layers] if isinstance(layers, int) else layers
    layer = re.match(r".*\.layers\.(\d+)\.", module)
    return _fits(module, targets) and layer is not None and int(layer[1]) in layers


def _fits(module: str, names: str | list[str]) -> bool:
    """Whether a module has one of these names, or one that fits a pattern."""
    if isinstance(names, list):
        return any(module == name or module.endswith(f".{name}") for name in names)
    try:
        return re.fullmatch(names, module) is not None
    except (TypeError, re.error) as error:
        raise ConversionError(f"{ADAPTER_CONFIG_FILE}: {names!r} is no pattern of modules: {error}.") from error


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


def peft_weights(pairs: dict[str, tuple[Weight, Weight]]) -> Weights:
    """The LoRA matrices under PEFT's names for our modules."""
    weights: Weights = {}
    for target, (down, up) in pairs.items():
        (name,) = to_hub({target: None})
        prefix = PEFT_PREFIX + name.removesuffix(".weight")
        weights |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    return weights
