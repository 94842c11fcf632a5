# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Encodes pictures before the prompt has its final length, for what needs the question or has no fixed count."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging import version
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_llava_stf import LlavaSTFForConditionalGeneration

Encode = Callable[[LlavaSTFForConditionalGeneration, dict[str, Any]], list[torch.Tensor]]


@torch.no_grad()
def tower_features(model: LlavaSTFForConditionalGeneration, pixels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Returns what the frozen tower gives the connector: (B, 3, H, W) -> (B, N, L*C)."""
    states = model.model.vision_tower(pixels, output_hidden_states=True, **kwargs).hidden_states
    return torch.cat([states[tap][:, 1:] for tap in model.config.taps], dim=-1)


def encode_first(model: LlavaSTFForConditionalGeneration, inputs: dict[str, Any], encode: Encode) -> BatchFeature:
    """Returns the inputs with the pictures' tokens in place of the pixels; every prompt has one picture.

    Placeholders that its tokens do not fill are cut out, and the prompts are padded again: on the left for an answer,
    and on the right for a training (with labels), where padding attends to the text before it. On Hopper cuDNN's
    attention has NaN gradients where a token attends to none (torch 2.11 and 2.13, pytorch/pytorch#196678).

    Raises:
        ValueError: if a prompt has fewer placeholders than its picture has tokens, or transformers is older than 5.18.
    """
    if version.parse(transformers.__version__).release < (5, 18):  # it would ignore the tokens
        raise ValueError(f"transformers is {transformers.__version__}, but encoded pictures need 5.18 or later.")
    tokens = encode(model, inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    is_image = ids == model.config.image_token_id
    counts = torch.tensor([len(of_image) for of_image in tokens], device=ids.device).unsqueeze(1)
    if (is_image.sum(1, keepdim=True) < counts).any():
        raise ValueError(
            f"The prompts have {is_image.sum(1).tolist()} placeholders for {counts.flatten().tolist()} tokens: each "
            "prompt needs one picture, and at least as many placeholders as it has tokens."
        )
    left = mask & ~(is_image & (is_image.cumsum(1) > counts))
    trained, length = inputs.get("labels") is not None, int(left.sum(1).max())
    order = (left ^ trained).long().argsort(dim=1, stable=True)  # what is cut out comes first, in a training last
    order = order[:, :length] if trained else order[:, -length:]
    gone = ~left.gather(1, order)
    fill = {"input_ids": model.config.text_config.pad_token_id or 0, "labels": -100}
    shorter = {
        name: inputs[name].gather(1, order).masked_fill(gone, value)
        for name, value in fill.items()
        if inputs.get(name) is not None
    }
    others = {name: value for name, value in inputs.items() if name not in (*fill, "attention_mask", "pixel_values")}
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
    return BatchFeature({**others, **shorter, "attention_mask": (~gone).long(), "mm_encoder_outputs": encoded})
