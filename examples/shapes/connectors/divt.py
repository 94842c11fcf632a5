# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""DiVT (arXiv 2605.17954): as many tokens as a picture has groups of similar patches.

A greedy cover chooses seeds: the patch with most similar patches comes first, and these leave. Each seed asks the
patches that are most similar to it; positions are in the values only. The count is unknown before the picture is
encoded, so placeholders that a picture does not fill are cut out afterwards (`encode_first`): a fixed number of padded
tokens would be another method. The original loops over pictures; here all seeds of a batch are found together.
"""

from typing import Any

import torch
from torch import nn

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration

from .encode_first import tower_features
from .parts import HEADS, mlp


class DiVT(nn.Module):
    def __init__(self, config: LlavaSTFConfig):
        super().__init__()
        width, text_width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.register_buffer("threshold", torch.tensor(0.65))
        self.positions = nn.Parameter(torch.randn(config.grid_size**2, width) * 0.02)
        self.query = nn.Sequential(nn.Linear(width, width, bias=False), nn.LayerNorm(width))
        self.key, self.value = (nn.Sequential(mlp(width, width, width), nn.LayerNorm(width)) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.out = mlp(width, text_width, text_width)

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """(B, N, C) -> a list of (seeds of the picture, D), in raster order."""
        cosines = similarities(features)
        seeds = cover(cosines > self.threshold)
        seed_of = cosines.masked_fill(~seeds.unsqueeze(1), -torch.inf).argmax(-1)  # (B, N)
        patches = torch.arange(features.shape[1], device=features.device)
        others = seed_of.unsqueeze(1) != patches.unsqueeze(1)  # (B, N, N): the key is in another seed's group
        others = others & ~torch.eye(len(patches), dtype=torch.bool, device=features.device)  # a row needs a key
        tokens, _ = self.attention(
            self.query(features),
            self.key(features),
            self.value(features + self.positions),
            attn_mask=others.repeat_interleave(HEADS, 0),
            need_weights=False,
        )
        return list(self.out(tokens[seeds]).split(seeds.sum(1).tolist()))

    @torch.no_grad()
    def fit(self, features: torch.Tensor, tokens: float) -> None:
        """Sets the threshold for which the pictures of `features`, (B, N, C), have `tokens` on average."""
        low, high = -1.0, 1.0
        cosines = similarities(features)
        for _ in range(20):
            middle = (low + high) / 2
            few = cover(cosines > middle).sum(1).float().mean() < tokens
            low, high = (middle, high) if few else (low, middle)
        self.threshold.fill_((low + high) / 2)


def similarities(features: torch.Tensor) -> torch.Tensor:
    """Returns the cosines of a picture's patches, (B, N, N)."""
    directions = nn.functional.normalize(features, dim=-1)
    return directions @ directions.transpose(1, 2)


def cover(similar: torch.Tensor) -> torch.Tensor:
    """Chooses patches so that each patch is similar to one of them: (B, N, N) -> (B, N), both bool."""
    similar = similar | torch.eye(similar.shape[1], dtype=torch.bool, device=similar.device)
    neighbours, pictures = similar.sum(-1), torch.arange(len(similar), device=similar.device)
    seeds = torch.zeros_like(neighbours, dtype=torch.bool)
    covered = seeds.clone()
    while not covered.all():
        best = neighbours.masked_fill(covered, -1).argmax(1)
        seeds[pictures, best] |= ~covered.all(1)
        covered |= similar[pictures, best]
    return seeds


def encode(model: LlavaSTFForConditionalGeneration, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Returns the tokens of each picture, (seeds, D)."""
    return model.model.multi_modal_projector(tower_features(model, inputs["pixel_values"]))
