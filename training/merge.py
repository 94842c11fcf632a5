# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""An adapter and its base as one full checkpoint."""

from pathlib import Path

from peft import PeftConfig, PeftModel

from conversion.convert import complete_or_absent, require_empty, save_checkpoint
from modeling_llava_stf import LlavaSTFForConditionalGeneration


def merge(adapter: str, destination: str, base: str | None = None) -> Path:
    """Writes a folder that needs no adapter: weights, code, processor, templates and licence. Dtypes are the base's.

    Args:
        adapter: folder of a LoRA run; the fusion modules that it trained in full replace those of the base.
        destination: must not exist, or be empty.
        base: folder or Hub id of the base; by default the one that the adapter names.

    Raises:
        ValueError: if the adapter is none, or its base cannot be found.
    """
    target = require_empty(destination)
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} is not an adapter: it has no adapter_config.json.")
    settings = PeftConfig.from_pretrained(adapter)
    revision = None if base else settings.revision
    base = base or settings.base_model_name_or_path
    if not Path(base).is_dir() and (Path(base).is_absolute() or base.count("/") != 1):
        raise ValueError(f"The adapter names the base {base}, which is not there. Give it with --base.")
    model = LlavaSTFForConditionalGeneration.from_pretrained(base, revision=revision, dtype="auto")
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(dtypes[name])
    with complete_or_absent(target) as folder:
        save_checkpoint(folder, model, adapter)
    return target
