# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Simulates G-Search (arXiv 2412.00556): the trained model is asked how few vision tokens each layer needs.

It goes from the shallow layers to the deep ones, and gives each the smallest number with which training questions are
still answered as well as with all tokens. The paper has no code. It found that all layers but the first rank the tokens
alike, so what one layer drops stays dropped, and the number never rises. As in FastV the layer before ranks them, and
each layer keeps a token at least. As there, masks hide what is dropped, which saves no time (`inside.py`).
"""

from bisect import bisect_left
from collections.abc import Callable

from modeling_llava_stf import LlavaSTFForConditionalGeneration

from .inside import Schedule


def search(model: LlavaSTFForConditionalGeneration, right: Callable[[Schedule], int]) -> Schedule:
    """Returns the schedule of the smallest numbers; `right` counts the right answers under a schedule.

    It asks about once for each doubling of the tokens in each layer: more tokens are taken to be no worse.
    """
    depth, tokens = model.config.text_config.num_hidden_layers, model.config.tokens_per_image
    whole, least, kept = right(Schedule({}, ranked_before=True)), tokens, dict[float, float]()
    for layer in range(1, depth):
        fewer = [Schedule(kept | {layer / depth: number / tokens}, ranked_before=True) for number in range(1, least)]
        least = 1 + bisect_left(fewer, True, key=lambda schedule: right(schedule) >= whole)
        kept[layer / depth] = least / tokens
    return Schedule(kept, ranked_before=True)
