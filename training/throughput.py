# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""How fast a training is, beside how fast the device could be."""

import math
import time
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .arguments import CONNECTOR, TOWER


def training_flops(model: PreTrainedModel | PeftModel, images: float, tokens: float) -> float:
    """FLOPs of training on so many images and tokens, recomputation of checkpointed layers not counted.

    For each weight of a linear layer and each position two in the forward pass, two for the gradient of the inputs
    (but in the frozen tower), and two for the weight's own, if it is trained. Attention scores are left out.
    """
    config: Any = model.config
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    flops = 0.0
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or "original_module" in name:  # PEFT keeps the untrained copy there
            continue
        learns = layer.weight.requires_grad
        passes = 2 + 2 * (TOWER not in name or learns) + 2 * learns
        if "spatial_fusion" in name:
            positions = images * config.tokens_per_image
        elif TOWER in name or CONNECTOR in name:
            positions = images * patches
        else:
            positions = tokens
        flops += passes * positions * layer.in_features * layer.out_features
    return flops


def now() -> float:
    return time.perf_counter()


def measure_tflops(device: torch.device, bf16: bool, repeats: int = 5) -> float:
    """The speed of a large matrix product, in TFLOP/s: the best of `repeats`."""
    size = 2048 if device.type == "cpu" else 8192  # milliseconds, beside which starting it and waiting are nothing
    factor = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        (factor @ factor)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12
