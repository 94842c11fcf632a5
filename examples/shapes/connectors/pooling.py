# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Average pooling: LLaVA's projector of the mean of each window (DeCo, arXiv 2405.20985, and the paper's own row)."""

import torch
from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from modeling_llava_stf import LlavaSTFConfig


class PooledProjector(LlavaMultiModalProjector):
    """Applies LLaVA's projector to the mean of each window of patches."""

    def __init__(self, config: LlavaSTFConfig):
        super().__init__(config)
        self.grid, self.window = config.grid_size, config.fusion_window

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, T, D)."""
        maps = features.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B, C, G, G)
        pooled = nn.functional.avg_pool2d(maps, self.window)
        return super().forward(pooled.flatten(2).transpose(1, 2))
