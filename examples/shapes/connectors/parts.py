# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Has what several connectors share."""

import torch
from torch import nn

from modeling_llava_stf import LlavaSTFConfig

HEADS = 8  # of every cross-attention, as in TokenPacker, QueCC and DiVT


def last_tap(features: torch.Tensor, config: LlavaSTFConfig) -> torch.Tensor:
    """Returns the channels of LLaVA's own layer, the first tap: (B, N, L*C) -> (B, N, C)."""
    return features[..., : config.vision_config.hidden_size]


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Builds two linear layers with a GELU between them."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class RegionAttention(nn.Module):
    """Lets each of T queries attend to the k x k patches of its own window."""

    def __init__(self, config: LlavaSTFConfig):
        super().__init__()
        self.grid, self.window = config.grid_size, config.fusion_window
        self.attention = nn.MultiheadAttention(config.vision_config.hidden_size, HEADS, batch_first=True)

    def regions(self, features: torch.Tensor) -> torch.Tensor:
        """Patches to windows, both in raster order: (B, N, C) -> (B*T, k*k, C)."""
        side, k = self.grid // self.window, self.window
        windows = features.unflatten(1, (side, k, side, k)).transpose(2, 3)  # (B, G/k, G/k, k, k, C)
        return windows.flatten(3, 4).flatten(0, 2)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(B, T, C), (B, N, C), (B, N, C) -> (B, T, C)."""
        alone = queries.flatten(0, 1).unsqueeze(1)  # (B*T, 1, C)
        attended, _ = self.attention(alone, self.regions(keys), self.regions(values), need_weights=False)
        return attended.view_as(queries)
