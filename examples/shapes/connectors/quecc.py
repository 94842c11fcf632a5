# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""QueCC, Inference Optimal VLMs (arXiv 2411.03312): TokenPacker's regions, with the question in the query.

The question is what the language model makes of the text without the picture: its last hidden state at the end of the
question, without a gradient. The original finds that end by an argmin that fails without padding, decodes ids to text
and searches for "ASSISTANT", and has the width 4096 fixed; here the labels and the mask say where the answer begins.
Like the original, a conversation of several questions is encoded for its first one: later ones would give answers
away. Captions of stage 1 have no question; there the vector is that of an empty prompt.
"""

from typing import Any

import torch
from torch import nn

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration

from .encode_first import tower_features
from .parts import RegionAttention, last_tap, mlp


class QueCC(nn.Module):
    def __init__(self, config: LlavaSTFConfig):
        super().__init__()
        width, text_width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.config, window = config, config.fusion_window
        self.question = nn.Sequential(nn.Linear(text_width, width), nn.LayerNorm(width))
        self.mixed = nn.Sequential(mlp(width, width, width), nn.LayerNorm(width))
        self.reduce = nn.Conv2d(width, width, window, stride=window, groups=width)
        self.key_value = nn.Sequential(mlp(len(config.taps) * width, width, width), nn.LayerNorm(width))
        self.attention = RegionAttention(config)
        self.out = mlp(width, text_width, text_width)

    def forward(self, features: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
        """(B, N, L*C) and vectors of the questions (B, D) -> (B, T, D)."""
        asked = last_tap(features, self.config) + self.question(questions).unsqueeze(1)
        maps = self.mixed(asked).transpose(1, 2).unflatten(2, (self.config.grid_size, self.config.grid_size))
        queries = self.reduce(maps).flatten(2).transpose(1, 2)  # (B, T, C)
        both = self.key_value(features)
        return self.out(self.attention(queries, both, both))


def encode(model: LlavaSTFForConditionalGeneration, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Returns the tokens of each picture, (T, D) each; every prompt has one picture."""
    features = tower_features(model, inputs["pixel_values"])
    return list(model.model.multi_modal_projector(features, question_vectors(model, inputs)))


@torch.no_grad()
def question_vectors(model: LlavaSTFForConditionalGeneration, inputs: dict[str, Any]) -> torch.Tensor:
    """Returns the language model's last hidden state at the end of each first question, (B, D)."""
    ids, text = inputs["input_ids"], inputs["attention_mask"].bool()
    if inputs.get("labels") is not None:
        text = text & ((inputs["labels"] != -100).cumsum(1) == 0)  # before the first answer
    text = text & (ids != model.config.image_token_id)
    ids = ids.masked_fill(ids == model.config.image_token_id, model.config.text_config.pad_token_id or 0)
    states = model.model.language_model(input_ids=ids, attention_mask=text.long(), use_cache=False).last_hidden_state
    last = (text * torch.arange(text.shape[1], device=ids.device)).argmax(1)
    return states[torch.arange(len(ids), device=ids.device), last]
