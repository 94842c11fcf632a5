# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Input downsampling: a smaller picture, and no other change. VTC-Bench (arXiv 2510.07143) asks for this baseline."""

from typing import Any

import torch
from torch import nn

from modeling_llava_stf import LlavaSTFForConditionalGeneration

from .encode_first import tower_features


def encode(model: LlavaSTFForConditionalGeneration, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Returns the tokens of each picture at half its size; the tower's positions are interpolated."""
    pixels = nn.functional.interpolate(inputs["pixel_values"], scale_factor=0.5, mode="bilinear", antialias=True)
    return list(model.model.multi_modal_projector(tower_features(model, pixels, interpolate_pos_encoding=True)))
