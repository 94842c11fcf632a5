# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The shapes of the connector, asked of its modules: read off weights, made new, and counted.

The modules are built without memory (on the meta device). Outside the model nothing else knows these shapes.
"""

import copy
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import nn

from modeling_llava_stf import LlavaSTFConfig
from modeling_llava_stf.modeling_llava_stf import LlavaSTFMultiModalProjector

from .checkpoints.weights import Weight, Weights, matrix
from .keys import ConversionError, to_original

CONNECTOR = "model.multi_modal_projector."
MBTF, STF = "model.mm_projector_crosslayer.", "model.mm_projector."


class Layer(NamedTuple):
    """A linear layer of the connector: the rows that it computes for one image, and the numbers of its matrix."""

    rows: int
    weights: int


def empty_connector(config: LlavaSTFConfig) -> LlavaSTFMultiModalProjector:
    """The connector without memory for its weights."""
    with torch.device("meta"):
        return LlavaSTFMultiModalProjector(config)


def read_off(weights: Weights, config: LlavaSTFConfig) -> dict[str, Any]:
    """The number of taps, the window and the widths with which the modules have the shapes of these weights.

    Args:
        weights: fusion weights under the original's names.
        config: one with the run's tower and language model, one tap and the default widths.

    Raises:
        ConversionError: if there is not exactly one number of taps and one window.
    """
    block_hidden, block_in = matrix(weights, f"{MBTF}0.weight").shape
    spatial_hidden, spatial_in = matrix(weights, f"{STF}0.weight").shape
    taps, rest = divmod(block_in, empty_connector(config).block_fusion.linear_1.in_features)
    windows = [window for window in range(1, isqrt(spatial_in) + 1) if _inputs(config, window) == spatial_in]
    if rest or len(windows) != 1:
        raise ConversionError(
            f"{MBTF}0.weight takes {block_in} channels and {STF}0.weight {spatial_in}, but the vision tower has "
            f"{config.vision_config.hidden_size}: expected a multiple of that, and a square number of times."
        )
    default_block, default_spatial = config.fusion_widths
    return {
        "taps": taps,
        "fusion_window": windows[0],
        "block_fusion_hidden_size": None if block_hidden == default_block else block_hidden,
        "spatial_fusion_hidden_size": None if spatial_hidden == default_spatial else spatial_hidden,
    }


def _inputs(config: LlavaSTFConfig, window: int) -> int:
    """Channels that Spatial Token Fusion takes with this window."""
    config = copy.copy(config)
    config.fusion_window = window
    return empty_connector(config).spatial_fusion.linear_1.in_features


def new_fusion(config: LlavaSTFConfig, seed: int) -> Weights:
    """New fusion weights under the original's names: PyTorch's initialisation of a linear layer, as in the original."""
    weights: Weights = {}
    for index, (name, layer) in enumerate(_linear_layers(empty_connector(config)).items()):
        for part, tensor in layer.named_parameters():
            load = partial(_new_linear, layer.in_features, layer.out_features, seed + index, part, config.dtype)
            made = Weight(tuple(tensor.shape), config.dtype, load, f"new, seed {seed + index}")
            weights[f"{CONNECTOR}{name}.{part}"] = made
    return to_original(weights)


def _new_linear(inputs: int, outputs: int, seed: int, part: str, dtype: torch.dtype) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(nn.Linear(inputs, outputs), part).detach().to(dtype)


def counted(config: LlavaSTFConfig) -> dict[str, Layer]:
    """The linear layers of the connector, by their names in it; one image is sent through the empty modules."""
    connector, layers = empty_connector(config), {}

    def note(layer: nn.Linear, inputs: Any, output: torch.Tensor, name: str) -> None:
        layers[name] = Layer(output.shape[:-1].numel(), layer.weight.numel())

    for name, layer in _linear_layers(connector).items():
        layer.register_forward_hook(partial(note, name=name))
    connector(_features(config))
    return layers


def token_grid(config: LlavaSTFConfig) -> int:
    """Side of the grid of tokens that the connector makes of an image."""
    return isqrt(empty_connector(config)(_features(config)).shape[1])


def _features(config: LlavaSTFConfig) -> torch.Tensor:
    """The features of one image that the tower's tapped blocks give, without numbers: (1, N, L*C)."""
    channels = len(config.taps) * config.vision_config.hidden_size
    return torch.empty(1, config.grid_size**2, channels, device="meta")


def _linear_layers(connector: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in connector.named_modules() if isinstance(module, nn.Linear)}
