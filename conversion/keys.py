# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Names of the weights, in the original's files and in ours: one table, two directions."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

Tensor = TypeVar("Tensor")

# Original name to ours. `{}` stands for the rest of the name or a layer number; None: known, dropped on purpose
# (buffers that older versions of transformers saved). The first pattern that fits counts.
KEY_MAP: dict[str, str | None] = {
    "model.layers.{}.self_attn.rotary_emb.inv_freq": None,
    "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": None,
    "model.embed_tokens.{}": "model.language_model.embed_tokens.{}",
    "model.layers.{}": "model.language_model.layers.{}",
    "model.norm.{}": "model.language_model.norm.{}",
    "lm_head.{}": "lm_head.{}",
    "model.vision_tower.vision_tower.vision_model.{}": "model.vision_tower.{}",
    "model.mm_projector_crosslayer.0.{}": "model.multi_modal_projector.block_fusion.linear_1.{}",
    "model.mm_projector_crosslayer.2.{}": "model.multi_modal_projector.block_fusion.linear_2.{}",
    "model.mm_projector.0.{}": "model.multi_modal_projector.spatial_fusion.linear_1.{}",
    "model.mm_projector.2.{}": "model.multi_modal_projector.spatial_fusion.linear_2.{}",
}
# Older names of our weights to those of today. transformers 5.24 reads both, and its ZeRO-3 writes the older.
OLDER_KEYS: dict[str, str | None] = {
    "model.language_model.model.{}": "model.language_model.{}",
    "model.vision_tower.vision_model.{}": "model.vision_tower.{}",
    "{}": "{}",
}
TOWER_PREFIX = "model.vision_tower.vision_tower."


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message names the key or file."""


def to_hub(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a full fine-tune of the original under our names.

    Args:
        state_dict: original name -> tensor. The tensors themselves are not touched.

    Raises:
        ConversionError: for a name that is neither mapped nor on the dropped list.
    """
    return renamed(state_dict, partial(_rename, table=KEY_MAP))


def to_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back of [`to_hub`]."""
    table = {ours: theirs for theirs, ours in KEY_MAP.items() if ours is not None}
    return renamed(state_dict, partial(_rename, table=table))


def to_newest(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one of our checkpoints under the names that this version gives them."""
    return renamed(state_dict, partial(_rename, table=OLDER_KEYS))


def renamed(state_dict: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The tensors under other names, without those whose name becomes None.

    Raises:
        ConversionError: if two tensors get one name.
    """
    result: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = rename(key)
        if name in result:
            raise ConversionError(f"{key!r} and another weight both become {name!r}.")
        if name is not None:
            result[name] = tensor
    return result


def _rename(key: str, table: Mapping[str, str | None]) -> str | None:
    for pattern, target in table.items():
        match = re.fullmatch(re.escape(pattern).replace(r"\{\}", "(.+)"), key)
        if match:
            return target.format(*match.groups()) if target is not None else None
    raise ConversionError(
        f"Unknown weight {key!r}: it is neither mapped nor on the list of weights to drop (conversion/keys.py). Is "
        "this a LLaVA-STF checkpoint?"
    )
