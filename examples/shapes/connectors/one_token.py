# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Simulates VoCo-LLaMA (arXiv 2406.12275): text behind the picture sees one token, which alone sees the picture.

The language model itself learns to put the picture into that token, by a mask in stage 2 and in every answer; stage 1
is LLaVA's. All vision tokens run through the model, and nothing is saved: the original then keeps the cache of that
token only. It has a new token of its own. Here the first one behind the picture takes its place, which the chat
template makes the same in every prompt. The original also hides the text before the picture, which says nothing here.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from modeling_llava_stf import LlavaSTFForConditionalGeneration

from .inside import Inside, without


def one_token(model: LlavaSTFForConditionalGeneration) -> AbstractContextManager[None]:
    """Lets text see one token for each picture, in training and answering; it needs the attention "sdpa"."""
    return OneToken(model).acting()


class OneToken(Inside):
    def in_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return args, kwargs | {"attention_mask": without(kwargs, args[0], self.unseen(self.in_prompt(args[0])))}

    def unseen(self, in_prompt: bool) -> torch.Tensor:
        """Marks the pictures that end before the token that sees for a query: (B, prompt, prompt), or (B, 1, prompt).

        Pictures without text between them have one token together.
        """
        seeing = nn.functional.pad(self.pictures, (1, -1)) & ~self.pictures
        ended = seeing.cumsum(1)  # how many such tokens there are up to each place
        before = ended - seeing.long() if in_prompt else ended[:, -1:]
        return self.pictures[:, None] & (before[:, :, None] > ended[:, None])
