# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Multi-Block Token Fusion alone (arXiv 2506.07138): a mix of several blocks, and LLaVA's projector of each patch."""

import copy

from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from modeling_llava_stf import LlavaSTFConfig
from modeling_llava_stf.modeling_llava_stf import MultiBlockTokenFusion


class MixedProjector(nn.Sequential):
    """Applies Multi-Block Token Fusion, then LLaVA's projector to every patch: (B, N, L*C) -> (B, N, D)."""

    def __init__(self, config: LlavaSTFConfig):
        one_layer = copy.deepcopy(config)
        one_layer.vision_feature_layer = config.taps[:1]
        super().__init__(MultiBlockTokenFusion(config), LlavaMultiModalProjector(one_layer))
