# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Implements the vision side of the method plainly, as the original does, to compare the package's speed with it.

It follows the method's description and uses the same weights. Every layer of the tower runs, all hidden states are
kept, pictures and frames are encoded one by one, and `unfold` makes the windows.
"""

import math

import torch
from torch.nn import functional
from transformers import CLIPVisionModel

from modeling_llava_stf import LlavaSTFForConditionalGeneration


def share(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Lets `target` use the weights of `source`: both hold the same objects."""
    target.load_state_dict(source.state_dict(keep_vars=True), assign=True)


def pooled(features: torch.Tensor, tokens: int) -> torch.Tensor:
    """Averages the tokens of pictures over square windows, as Matryoshka Multimodal Models do: (B, T, D)."""
    side = math.isqrt(features.shape[1])
    maps = features.transpose(1, 2).unflatten(2, (side, side))
    return functional.avg_pool2d(maps, side // math.isqrt(tokens)).flatten(2).transpose(1, 2)


def salient(features: torch.Tensor, tokens: int) -> torch.Tensor:
    """Keeps the tokens of a picture that are farthest from their mean, in their order: (T, D) -> (tokens, D)."""
    return features[(features - features.mean(0)).norm(dim=1).topk(tokens).indices.sort().values]


class ReferenceVision:
    """Runs vision tower and fusion with the weights of a model, which must have all layers of its tower."""

    def __init__(self, model: LlavaSTFForConditionalGeneration):
        self.config, self.projector = model.config, model.model.multi_modal_projector
        with torch.device(model.device):
            self.tower = CLIPVisionModel(model.config.vision_config).eval()
        share(model.model.vision_tower, self.tower)

    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Encodes pictures: (B, 3, H, W) -> B x (T, D)."""
        return [self.encode(frame[None])[0] for frame in pixels]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        features = torch.cat([states[tap][:, 1:] for tap in self.config.taps], dim=-1)
        features = self._two_layers(self.projector.block_fusion, features)
        grid, window = self.config.grid_size, self.config.fusion_window
        maps = features.transpose(1, 2).unflatten(2, (grid, grid))
        windows = functional.unfold(maps, window, stride=window).transpose(1, 2).contiguous()
        return self._two_layers(self.projector.spatial_fusion, windows)

    @staticmethod
    def _two_layers(module: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
        return module.linear_2(functional.gelu(module.linear_1(features)))
