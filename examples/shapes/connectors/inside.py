# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Simulates methods that drop vision tokens inside the language model: later layers cannot attend to what is dropped.

This shows what the accuracy becomes, and saves no time. FastV (arXiv 2403.06764) ranks by the attention of the layer
before the cut, PyramidDrop (arXiv 2410.17247) by that of the layer behind it. Both take the row of the prompt's last
token, as the mean over the heads. Positions stay; PyramidDrop moves them together after each cut. FastV's places are
constants of one prompt, and its code is for one row; here they are those of `<image>`, in any batch. A cut behind so
many of 32 layers is at the same depth of a small model. `Inside` is the base of other such methods, too.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from modeling_llava_stf import LlavaSTFForConditionalGeneration


@dataclass(frozen=True)
class Schedule:
    """Says which share of a picture's tokens is kept behind each depth, and which layer ranks them."""

    kept: dict[float, float]  # share of the layers before a cut: share of the tokens behind it
    ranked_before: bool  # by the layer before the cut, or by the one behind it


FAST_V = Schedule({3 / 32: 0.5}, ranked_before=True)
PYRAMID_DROP = Schedule({8 / 32: 0.5, 16 / 32: 0.25, 24 / 32: 0.125}, ranked_before=False)


class Inside:
    """Acts before and behind each layer of the language model, and knows where the prompts have their pictures."""

    def __init__(self, model: LlavaSTFForConditionalGeneration):
        self.model = model
        self.pictures = torch.zeros(0, 0, dtype=torch.bool)  # (B, prompt)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Acts in every forward pass, and so in every `generate`; the model needs the attention "sdpa"."""
        hooks = [self.model.register_forward_pre_hook(self.begin, with_kwargs=True)]
        for number, layer in enumerate(self.model.model.language_model.layers):
            hooks.append(layer.register_forward_pre_hook(partial(self.in_layer, number), with_kwargs=True))
            hooks.append(layer.register_forward_hook(partial(self.behind_layer, number)))
        with ExitStack() as stack:
            for hook in hooks:
                stack.callback(hook.remove)
            yield

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes the places of the pictures, in the pass over the prompt; later passes have one token."""
        if kwargs["input_ids"].shape[1] > 1:
            self.pictures = kwargs["input_ids"] == self.model.config.image_token_id

    def in_prompt(self, hidden: torch.Tensor) -> bool:
        """Returns whether this is the pass over the prompt, or one of the training."""
        return hidden.shape[1] == self.pictures.shape[1]

    def in_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Returns what the layer gets; `args` has its input, (B, S, D)."""
        return args, kwargs

    def behind_layer(self, number: int, layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Returns what the layer's output becomes, (B, S, D)."""
        return output


def dropping(model: LlavaSTFForConditionalGeneration, schedule: Schedule) -> AbstractContextManager[None]:
    """Lets the model drop vision tokens by a schedule in every `generate`; it needs the attention "sdpa"."""
    return Drops(model, schedule).acting()


class Drops(Inside):
    """Holds which keys are dropped for the prompts that are answered now."""

    def __init__(self, model: LlavaSTFForConditionalGeneration, schedule: Schedule):
        super().__init__(model)
        depth = model.config.text_config.num_hidden_layers
        # The first layer sees all tokens: there must be one that ranks them.
        cuts = {max(1, round(depth * share)): kept for share, kept in schedule.kept.items()}
        self.ranking = {cut - schedule.ranked_before: (cut, kept) for cut, kept in cuts.items()}
        self.by_cut: dict[int, torch.Tensor] = {}  # (B, prompt): the keys that are dropped from this layer on

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        super().begin(model, args, kwargs)
        if kwargs["input_ids"].shape[1] > 1:
            self.by_cut = {}

    def in_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        hidden = args[0]
        if number in self.ranking and self.in_prompt(hidden):
            cut, kept = self.ranking[number]
            self.by_cut[cut] = self.dropped(last_row(layer, hidden, kwargs), kept)
        gone = [dropped for cut, dropped in self.by_cut.items() if cut <= number]
        if not gone:
            return args, kwargs
        return args, kwargs | {"attention_mask": without(kwargs, hidden, torch.stack(gone).any(0)[:, None])}

    def dropped(self, scores: torch.Tensor, kept: float) -> torch.Tensor:
        """Marks the picture tokens of least score, (B, prompt); tokens that are dropped already have none."""
        for earlier in self.by_cut.values():
            scores = scores.masked_fill(earlier, -1.0)
        return all_but_highest(self.pictures, scores, kept)


def all_but_highest(pictures: torch.Tensor, scores: torch.Tensor, kept: float) -> torch.Tensor:
    """Marks each prompt's picture tokens but for the share `kept` that has the highest scores; all are (B, prompt)."""
    ranks = scores.masked_fill(~pictures, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return pictures & (ranks >= (pictures.sum(1, keepdim=True) * kept).round().clamp(min=1))


def last_row(layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Returns how the prompt's last token attends in this layer, as the mean over the heads: (B, S, D) -> (B, S)."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    queries, keys = (project(normed).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
    queries, keys = apply_rotary_pos_emb(queries, keys, *kwargs["position_embeddings"])
    scores = queries[:, :, -1:] @ repeat_kv(keys, attention.num_key_value_groups).transpose(2, 3) * attention.scaling
    if kwargs["attention_mask"] is not None:
        scores = scores.masked_fill(~kwargs["attention_mask"][:, :, -1:], -torch.inf)
    return scores.softmax(-1).mean((1, 2))


def without(kwargs: dict[str, Any], hidden: torch.Tensor, unseen: torch.Tensor) -> torch.Tensor:
    """Returns the mask of a layer, (B, 1, Q, K), without keys of the prompt: (B, Q, prompt), or (B, 1, prompt)."""
    mask = kwargs["attention_mask"]
    if mask is None:  # no prompt is padded
        queries, keys = hidden.shape[1], int(kwargs["position_ids"].max()) + 1
        mask = torch.ones(len(hidden), 1, queries, keys, dtype=torch.bool, device=hidden.device).tril(keys - queries)
    if mask.dtype != torch.bool:
        raise ValueError(f"The attention's mask is of {mask.dtype}, expected bool: load the model with 'sdpa'.")
    answer = mask.shape[-1] - unseen.shape[-1]
    return mask & ~nn.functional.pad(unseen, (0, answer))[:, None]
