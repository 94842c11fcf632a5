# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The method's vision side done the plain way, as in the original: what the package's speed is compared with.

Written from the method's description, on the same weights: every layer of the tower runs, all of its hidden states are
kept, pictures and frames go through one by one, and the windows are `unfold`'s.
"""

import torch
from torch.nn import functional
from transformers import CLIPVisionModel

from modeling_llava_stf import LlavaSTFForConditionalGeneration


def share(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Makes the weights of `source` those of `target`, too: the same objects."""
    target.load_state_dict(source.state_dict(keep_vars=True), assign=True)


class ReferenceVision:
    """Vision tower and fusion. The model must hold all the layers of its tower; its weights are shared."""

    def __init__(self, model: LlavaSTFForConditionalGeneration):
        self.config, self.projector = model.config, model.model.multi_modal_projector
        with torch.device(model.device):
            self.tower = CLIPVisionModel(model.config.vision_config).eval()
        share(model.model.vision_tower, self.tower)

    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) -> B x (T, D)."""
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
