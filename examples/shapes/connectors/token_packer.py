# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""TokenPacker (arXiv 2407.02392): a coarse picture asks the fine one, region by region.

The coarse picture is the last tap, reduced to a token per window. Each of its tokens attends to the patches of its
window in all taps. There is no residual from the query, as in the paper's code. That has its sizes fixed to a
24 x 24 grid of 1024 channels; here they are the config's.
"""

import math

import torch
from torch import nn

from modeling_llava_stf import LlavaSTFConfig

from .parts import RegionAttention, last_tap, mlp


class TokenPacker(nn.Module):
    def __init__(self, config: LlavaSTFConfig):
        super().__init__()
        width, text_width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.config = config
        self.query = nn.Sequential(nn.Linear(width, width, bias=False), nn.LayerNorm(width))
        self.key, self.value = (
            nn.Sequential(mlp(len(config.taps) * width, width, width), nn.LayerNorm(width)) for _ in range(2)
        )
        self.attention = RegionAttention(config)
        self.out = mlp(width, text_width, text_width)

    def coarse(self, features: torch.Tensor) -> torch.Tensor:
        """Reduces patches to a token per window, bilinearly: (B, N, C) -> (B, T, C)."""
        side = math.isqrt(self.config.tokens_per_image)
        maps = features.transpose(1, 2).unflatten(2, (self.config.grid_size, self.config.grid_size))
        return nn.functional.interpolate(maps, size=(side, side), mode="bilinear").flatten(2).transpose(1, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, L*C) -> (B, T, D)."""
        queries = self.query(self.coarse(last_tap(features, self.config)))  # (B, T, C)
        return self.out(self.attention(queries, self.key(features), self.value(features)))
