# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The shapes of the fusion modules: read off weights, and made new."""

from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import nn

from modeling_llava_stf import LlavaSTFConfig

from .checkpoints.weights import Weight, Weights, matrix
from .keys import ConversionError

MBTF, STF = "model.mm_projector_crosslayer.", "model.mm_projector."


def _fusion_fields(weights: Weights, width: int) -> dict[str, Any]:
    block_hidden, block_in = matrix(weights, f"{MBTF}0.weight").shape
    spatial_hidden, spatial_in = matrix(weights, f"{STF}0.weight").shape
    taps, window = block_in // width, isqrt(spatial_in // width)
    if block_in != taps * width or spatial_in != window**2 * width:
        raise ConversionError(
            f"{MBTF}0.weight takes {block_in} channels and {STF}0.weight {spatial_in}, but the vision tower has "
            f"{width}: expected a multiple of that, and a square number of times."
        )
    return {
        "taps": taps,
        "fusion_window": window,
        "block_fusion_hidden_size": None if block_hidden == 4 * width else block_hidden,
        "spatial_fusion_hidden_size": None if spatial_hidden == 16 * width else spatial_hidden,
    }


def new_fusion(config: LlavaSTFConfig, seed: int) -> Weights:
    """New fusion weights under the original's names: PyTorch's initialisation of a linear layer, as in the original."""
    width, window = config.vision_config.hidden_size, config.fusion_window
    block, spatial = config.fusion_widths
    layers = {
        f"{MBTF}0": (len(config.taps) * width, block),
        f"{MBTF}2": (block, width),
        f"{STF}0": (window**2 * width, spatial),
        f"{STF}2": (spatial, config.text_config.hidden_size),
    }
    weights: Weights = {}
    for index, (name, (inputs, outputs)) in enumerate(layers.items()):
        for part, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            load = partial(_new_linear, inputs, outputs, seed + index, part, config.dtype)
            weights[f"{name}.{part}"] = Weight(shape, config.dtype, load, f"new, seed {seed + index}")
    return weights


def _new_linear(inputs: int, outputs: int, seed: int, part: str, dtype: torch.dtype) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(nn.Linear(inputs, outputs), part).detach().to(dtype)
