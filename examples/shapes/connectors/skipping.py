# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Simulates VideoLLM-MoD (arXiv 2408.16730): in every second layer only a fifth of the vision tokens takes part.

A router of each such layer, which learns in stage 2, scores the picture's tokens. The highest take part with the text;
the others are no keys in this layer and leave it as they came, and the next layer has all again. The paper has no code.
As in Mixture-of-Depths (arXiv 2404.02258) the score multiplies what the layer adds, so that the router has a gradient;
here as 2 sigmoid(score), because a trained layer should begin with a factor near 1. Masks stand for tokens that are
left out, which shows the accuracy and saves no time.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration

from .inside import Inside, all_but_highest, without

KEPT = 0.2  # share of a picture's tokens that take part in a layer that others skip


class RoutedProjector(LlavaMultiModalProjector):
    """Has LLaVA's projector, and the routers of every second layer of the language model.

    The last layer has none: nothing attends to what it adds to a vision token, so a router would not learn.
    """

    def __init__(self, config: LlavaSTFConfig):
        super().__init__(config)
        layers = range(0, config.text_config.num_hidden_layers - 1, 2)
        self.routers = nn.ModuleDict({str(number): nn.Linear(config.text_config.hidden_size, 1) for number in layers})


def skipping(model: LlavaSTFForConditionalGeneration) -> AbstractContextManager[None]:
    """Lets vision tokens skip layers, in training and answering; it needs the attention "sdpa"."""
    return Skips(model).acting()


class Skips(Inside):
    """Holds what each layer adds to each token: nothing to those that skip it."""

    def __init__(self, model: LlavaSTFForConditionalGeneration):
        super().__init__(model)
        self.routers = {int(number): router for number, router in model.model.multi_modal_projector.routers.items()}
        self.factors: dict[int, torch.Tensor] = {}  # (B, prompt), by layer

    def in_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        if number not in self.routers:
            return args, kwargs
        if self.in_prompt(args[0]):
            scores = self.routers[number](args[0]).squeeze(-1).float()
            skipped = all_but_highest(self.pictures, scores, KEPT)
            factors = torch.where(self.pictures, 2 * scores.sigmoid(), 1.0)
            self.factors[number] = factors.masked_fill(skipped, 0.0)
        skipped = self.factors[number] == 0
        return args, kwargs | {"attention_mask": without(kwargs, args[0], skipped[:, None])}

    def behind_layer(self, number: int, layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if number not in self.routers or not self.in_prompt(output):
            return output
        return args[0].lerp(output, self.factors[number].unsqueeze(-1))
