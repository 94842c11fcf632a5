# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Makes new fusion modules for a trained tower and language model."""

from pathlib import Path

import torch
from torch import nn

from conversion.checkpoints.folders import complete_or_absent, require_empty, save_checkpoint
from modeling_llava_stf import LlavaSTFForConditionalGeneration


def renew(checkpoint: str | Path, out: str | Path, seed: int = 0) -> Path:
    """Writes `checkpoint` with new MBTF and STF into `out`, which must not exist or be empty."""
    out = require_empty(out)
    model = LlavaSTFForConditionalGeneration.from_pretrained(checkpoint)
    initialise(model.model.multi_modal_projector, seed)
    with complete_or_absent(out) as folder:
        save_checkpoint(folder, model, checkpoint)
    return out


def initialise(connector: nn.Module, seed: int) -> None:
    """Initialises linear layers as PyTorch and the original do."""
    torch.manual_seed(seed)
    for module in connector.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
