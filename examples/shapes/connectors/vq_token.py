# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""VQToken's clusters (arXiv 2503.16980): the tokens of all frames of a film become the means of some clusters.

The original learns a decoder that mixes into each mean where its cluster was; here nothing is trained, and a cluster
stands where its first token does. Its k-means begins at random; here each centre begins as the token that is least like
those before it. There are no films with questions, so a test picture is filmed by a shaking camera. Its questions keep
their answers: no object is so near to another place. The model has learned from single pictures only.
"""

from typing import Any

import torch
from PIL import Image, ImageChops
from torch import nn

from modeling_llava_stf import LlavaSTFForConditionalGeneration

MOVES = ((0, 0), (3, -2), (-2, 4), (-4, -3))  # of the frames, in pixels
ROUNDS = 10  # of k-means


def filmed(conversation: list[dict]) -> list[dict]:
    """Returns the conversation with a film in place of each picture, which is a path."""
    return [
        message | {"content": [_film(part) if part["type"] == "image" else part for part in message["content"]]}
        for message in conversation
    ]


def _film(part: dict) -> dict:
    with Image.open(part["image"]) as picture:
        frames = [ImageChops.offset(picture.convert("RGB"), *move) for move in MOVES]
    return {"type": "video", "video": frames}


def encode(model: LlavaSTFForConditionalGeneration, inputs: dict[str, Any], number: int) -> list[torch.Tensor]:
    """Returns at most `number` tokens of each film, (K, D) each; every prompt has one film."""
    frames = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)  # (B*F, T, D)
    return [clusters(film, number) for film in frames.unflatten(0, (-1, len(MOVES))).flatten(1, 2)]


def clusters(tokens: torch.Tensor, number: int) -> torch.Tensor:
    """Returns the means of k-means' clusters by cosine, in the order of their first tokens: (M, D) -> (K, D).

    There are fewer than `number` if the tokens fall into fewer.
    """
    directions = nn.functional.normalize(tokens, dim=-1)
    centres = directions[:1]
    while len(centres) < number:
        least_like = (directions @ centres.T).amax(1).argmin()
        centres = torch.cat([centres, directions[least_like][None]])
    for _ in range(ROUNDS):
        members = nn.functional.one_hot((directions @ centres.T).argmax(1), number).T.to(tokens.dtype)  # (K, M)
        members = members[members.any(1)]
        number, centres = len(members), nn.functional.normalize(members @ directions, dim=-1)
    order = members.argmax(1).argsort()
    return (members @ tokens / members.sum(1, keepdim=True))[order]
