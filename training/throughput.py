# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Measures how fast a training is, and how fast the device could be."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from conversion import fusion
from modeling_llava_stf import LlavaSTFConfig

from .arguments import CONNECTOR, TOWER

LAST_OF_FUSION = "spatial_fusion.linear_2"


class Meter:
    """Counts images and tokens of this device since the last reading, and the seconds of the training."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.images = self.image_tokens = self.tokens = 0
        self.clock = now()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the seconds that are spent within it."""
        begun = now()
        yield
        self.clock += now() - begun

    def count(self, inputs: dict[str, Any], image_token_id: int) -> None:
        """Adds a micro-batch."""
        pixels = inputs.get("pixel_values")
        self.images += 0 if pixels is None else pixels.shape[0]
        self.image_tokens += int((inputs["input_ids"] == image_token_id).sum())
        self.tokens += int(inputs["attention_mask"].sum())

    def read(
        self, model: PreTrainedModel | PeftModel, sum_over_ranks: Callable[[list[int]], list[int]], peak: float
    ) -> dict[str, float]:
        """Returns the throughput of all devices together, and begins anew.

        Args:
            model: gives the FLOPs.
            sum_over_ranks: adds up the numbers of all devices.
            peak: FLOP/s of all devices together, to measure model FLOPs utilisation (MFU) by.
        """
        seconds = now() - self.clock
        images, image_tokens, tokens = sum_over_ranks([self.images, self.image_tokens, self.tokens])
        flops = training_flops(model, images, tokens, image_tokens)
        self.restart()
        return {
            "images_per_second": images / seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / peak,
        }


def training_flops(
    model: PreTrainedModel | PeftModel, images: float, tokens: float, image_tokens: float | None = None
) -> float:
    """Counts the FLOPs of training on so many images and tokens, without recomputing checkpointed layers.

    `tokens` are all tokens, `image_tokens` those of the images, by default as many as they have without a budget.
    Each weight of a linear layer takes, for each position, two in the forward pass, two for the gradient of the inputs
    (but in the frozen tower), and two for the weight's own, if it is trained. Attention scores are left out.
    """
    config: Any = model.config
    fused = fusion.counted(config) if isinstance(config, LlavaSTFConfig) else {}
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    flops = 0.0
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or "original_module" in name:  # PEFT keeps the untrained copy there
            continue
        learns = layer.weight.requires_grad
        passes = 2 + 2 * (TOWER not in name or learns) + 2 * learns
        in_fusion = next((counted for key, counted in fused.items() if key in name), None)
        if in_fusion is not None and image_tokens is not None and LAST_OF_FUSION in name:
            positions = image_tokens  # the average over windows comes before it
        elif in_fusion is not None:
            positions = images * in_fusion.rows
        elif TOWER in name or CONNECTOR in name:
            positions = images * patches
        else:
            positions = tokens
        flops += passes * positions * layer.in_features * layer.out_features
    return flops


def now() -> float:
    return time.perf_counter()


def measure_tflops(device: torch.device, bf16: bool, repeats: int = 5) -> float:
    """Measures the speed of a large matrix product, in TFLOP/s: the best of `repeats`."""
    size = 2048 if device.type == "cpu" else 8192  # milliseconds, beside which starting it and waiting are nothing
    factor = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        (factor @ factor)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12
