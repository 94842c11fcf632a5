# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""VisToG (arXiv 2411.17773): learned semantic tokens share the patches among them, each patch to one token.

The paper has no code. Its semantic tokens run through the tower beside the patches. This tower is frozen and equal for
all systems, so one cross-attention stands for that. The grouping layer is the paper's: a hard choice for each patch by
Gumbel-softmax (straight through; noise in training only), and the mean of the patches of a token.
"""

import torch
from torch import nn

from modeling_llava_stf import LlavaSTFConfig

from .parts import HEADS, mlp


class Grouping(nn.Module):
    def __init__(self, config: LlavaSTFConfig):
        super().__init__()
        width, text_width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.tokens = nn.Parameter(torch.randn(config.tokens_per_image, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.look = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = mlp(width, text_width, text_width)

    def assignment(self, tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Returns 1 where a patch belongs to a token, (B, T, N); the gradient is that of the softmax over tokens."""
        logits = self.query(tokens) @ self.key(patches).transpose(1, 2) / tokens.shape[-1] ** 0.5
        if self.training:
            return nn.functional.gumbel_softmax(logits, hard=True, dim=1)
        return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).transpose(1, 2).to(logits.dtype)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, T, D); a token without patches keeps only what it had."""
        patches = self.norm(features)
        tokens = self.tokens.expand(len(features), -1, -1)
        tokens = tokens + self.look(tokens, patches, patches, need_weights=False)[0]
        shares = self.assignment(tokens, patches)
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1)
        return self.out(tokens + shares @ self.value(patches))
