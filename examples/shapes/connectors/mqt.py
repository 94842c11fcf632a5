# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Matryoshka Query Transformer (MQT-LLaVA, arXiv 2405.19315): learned queries, of which a prefix is enough.

Its keys are position embeddings only, so that every picture has the same pattern of attention; here they have the
content of the patches, too. The original draws the count from all even numbers; here it is one of `token_budgets`,
drawn for each row. Its released checkpoints draw a random count at inference; here the processor sets the count.
"""

import math

import torch
from torch import nn

from modeling_llava_stf import LlavaSTFConfig

from ..clip import waves
from .parts import HEADS


class MatryoshkaQueries(nn.Module):
    def __init__(self, config: LlavaSTFConfig):
        super().__init__()
        width, number = config.vision_config.hidden_size, config.tokens_per_image
        side = math.isqrt(number)
        positions = waves(side, width)  # (T, C)
        maps = positions.T.unflatten(1, (side, side)).unsqueeze(0)
        finer = nn.functional.interpolate(maps, size=(config.grid_size, config.grid_size), mode="bicubic")
        self.register_buffer("query_positions", positions, persistent=False)
        self.register_buffer("key_positions", finer[0].flatten(1).T.contiguous(), persistent=False)  # (N, C)
        self.queries = nn.Parameter(torch.randn(number, width) * 0.02)
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.out = nn.Linear(width, config.text_config.hidden_size, bias=False)

    def forward(
        self, features: torch.Tensor, image_tokens: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """(B, N, C) -> (B, T, D), or with the number of tokens of each image a list of (image_tokens[i], D)."""
        queries = self.query_norm(self.queries + self.query_positions).expand(len(features), -1, -1)
        keys, values = self.key_norm(features + self.key_positions), self.value_norm(features)
        tokens = self.out(self.attention(queries, keys, values, need_weights=False)[0])
        if image_tokens is None:
            return tokens
        return [of_image[:number] for of_image, number in zip(tokens, image_tokens, strict=True)]
