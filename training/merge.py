# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Merges an adapter and its base into one full checkpoint."""

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash

from conversion.checkpoints.folders import TOKEN_BUDGETS, complete_or_absent, require_empty, save_checkpoint
from modeling_llava_stf import LlavaSTFForConditionalGeneration
from modeling_llava_stf._folder import check_loaded

from .saving import readable

logger = logging.get_logger(__name__)


def merge(adapter: str, destination: str, base: str | None = None, base_revision: str | None = None) -> Path:
    """Writes a folder that needs no adapter: weights, code, processor, templates and licence. Dtypes are the base's.

    Args:
        adapter: folder of a LoRA run; the fusion modules that it trained in full replace those of the base, and so do
            the token budgets that it was trained for.
        destination: must not exist, or be empty.
        base: folder or Hub id of the base; by default the one that the adapter names.
        base_revision: branch, tag or commit of a base on the Hub; by default the one that the adapter names.

    Raises:
        ValueError: if the adapter is none, changes nothing or is not of this base, or its base cannot be found or is
            quantised.
    """
    target = require_empty(destination)
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} is not an adapter: it has no adapter_config.json.")
    with readable(Path(adapter) / "adapter_config.json"):
        settings = PeftConfig.from_pretrained(adapter)
    if base in (None, settings.base_model_name_or_path):
        base_revision = base_revision or settings.revision
    base = base or str(settings.base_model_name_or_path)
    if not Path(base).is_dir() and (Path(base).is_absolute() or base.count("/") != 1):
        raise ValueError(f"The adapter names the base {base}, which is not there. Give it with --base.")
    commit = commit_of(base, base_revision)
    model, found = LlavaSTFForConditionalGeneration.from_pretrained(
        base, revision=commit, dtype="auto", output_loading_info=True
    )
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{base} is quantised. Give the checkpoint that it was made from with --base.")
    check_loaded(base, found)
    before, now = model.config.token_budgets, (settings.auto_mapping or {}).get(TOKEN_BUDGETS)
    if before and before != now:
        logger.warning(
            f"The base was trained for {before} tokens per picture, the adapter for {now or 'the full number only'}: "
            "the merged config says what the adapter was trained for."
        )
    model.config.token_budgets = now
    model.config.check_fusion()
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    model = with_adapter(model, settings, adapter).merge_and_unload()
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(dtypes[name])
    with complete_or_absent(target) as folder:
        save_checkpoint(folder, model, adapter)
    return target


def with_adapter(model: LlavaSTFForConditionalGeneration, settings: PeftConfig, adapter: str) -> PeftModel:
    """Gives a model the adapter's weights, each of which must find its place.

    Raises:
        ValueError: if the adapter is empty, changes nothing, or is not of this model.
    """
    files = [Path(adapter) / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    if not next((file for file in files if file.exists()), files[0]).is_file():
        raise ValueError(f"{adapter} is not an adapter: it has no {SAFETENSORS_WEIGHTS_NAME}.")
    with readable(Path(adapter)):
        weights = load_peft_weights(adapter, device=model.device.type)
    adapted = get_peft_model(model, settings)
    places = get_peft_model_state_dict(adapted)
    missing, unknown = sorted(places.keys() - weights.keys()), sorted(weights.keys() - places.keys())
    if missing or unknown:
        raise ValueError(
            f"{adapter} does not fit its base: "
            + "; ".join(
                f"{len(names)} weights {what}, such as {names[0]}"
                for names, what in ((missing, "are missing"), (unknown, "have no place"))
                if names
            )
            + ". Is it complete, and this the base that it was trained on (--base)?"
        )
    for name, weight in weights.items():
        if weight.shape != places[name].shape:
            raise ValueError(
                f"{adapter} does not fit its base: {name} has the shape {tuple(weight.shape)}, expected "
                f"{tuple(places[name].shape)}. Name the base that it was trained on with --base."
            )
        if not torch.isfinite(weight).all():
            raise ValueError(f"{adapter} cannot be merged: {name} is not finite.")
    if not any(weight.any() for name, weight in weights.items() if "lora_A" not in name):
        raise ValueError(f"{adapter} changes nothing: all its weights are zero, or it was never trained.")
    set_peft_model_state_dict(adapted, weights)
    return adapted


def commit_of(name: str, revision: str | None) -> str | None:
    """Returns the commit that a branch, tag or commit of the Hub stands for now; `None` for a folder.

    Raises:
        ValueError: if a revision of a folder is asked for.
        OSError: if there is no such model or revision.
    """
    if Path(name).is_dir():
        if revision not in (None, "main"):
            raise ValueError(f"{name} is a folder, which has no revision {revision!r}: leave that out.")
        return None
    return extract_commit_hash(cached_file(name, "config.json", revision=revision or "main"), None)
