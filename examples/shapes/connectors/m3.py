# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Matryoshka Multimodal Models (M3, arXiv 2405.17430): LLaVA's tokens, averaged over windows to any of some counts.

It has no parameters of its own. The training chooses the counts (`token_budgets`); one training of all counts in each
step is the paper's. The original's evaluation ignores the count in a plain forward pass, and returns another one
without a word if it is no square fraction; here a count that is not allowed is refused.
"""

import math

import torch
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from modeling_llava_stf import LlavaSTFConfig


class M3Projector(LlavaMultiModalProjector):
    """Projects every patch, and averages windows of the result."""

    def __init__(self, config: LlavaSTFConfig):
        super().__init__(config)
        self.grid = config.grid_size

    def forward(
        self, features: torch.Tensor, image_tokens: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """(B, N, C) -> (B, N, D), or with the number of tokens of each image a list of (image_tokens[i], D)."""
        tokens = super().forward(features)
        if image_tokens is None:
            return tokens
        return [self.pool(of_image, number) for of_image, number in zip(tokens, image_tokens, strict=True)]

    def pool(self, tokens: torch.Tensor, number: int) -> torch.Tensor:
        """Averages square windows, in raster order: (N, D) -> (number, D)."""
        side = math.isqrt(number)
        window = self.grid // side
        return tokens.unflatten(0, (side, window, side, window)).mean((1, 3)).flatten(0, 1)
