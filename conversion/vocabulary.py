# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The vocabulary tables: the row of `<image>` and padding, added and taken back."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from modeling_llava_stf import LlavaSTFConfig

from .checkpoints.folders import ORIGINAL_CONFIG_FILE
from .checkpoints.weights import Weight, Weights, matrix
from .keys import ConversionError
from .tokenizer import IMAGE_TOKEN, read_tokenizer

EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def add_rows(
    weights: Weights, config: LlavaSTFConfig, tokenizer: PreTrainedTokenizerFast, multiple: int
) -> tuple[Weights, LlavaSTFConfig]:
    """Gives `<image>`, and what else the tokenizer has beyond both tables, a row there: the mean of the others.

    The placeholder's embedding is never used, and its logit, the mean of all logits, is never the highest. Padding,
    where asked for, gets the same row.

    Args:
        weights: those of the model, under our names.
        config: says how many rows the tables have.
        tokenizer: says how many tokens there are, and which pads.
        multiple: number that the rows are padded to a multiple of.
    """
    rows = matrix(weights, EMBEDDINGS).shape[0]
    for name in (EMBEDDINGS, HEAD):
        if matrix(weights, name).shape[0] != config.text_config.vocab_size:
            raise ConversionError(
                f"{name!r} has {weights[name].shape[0]} rows, but config.json says `vocab_size` "
                f"{config.text_config.vocab_size}."
            )
    needed = -(-max(rows, len(tokenizer)) // multiple) * multiple
    config = copy.deepcopy(config)
    config.text_config.vocab_size = needed
    # Only now, for the tokenizer's may have had no row; transformers warns of that.
    config.pad_token_id = config.text_config.pad_token_id = tokenizer.pad_token_id
    return {**weights, **{name: _with_mean_rows(weights[name], needed) for name in (EMBEDDINGS, HEAD)}}, config


def _with_mean_rows(table: Weight, rows: int) -> Weight:
    if rows == table.shape[0]:
        return table

    def load() -> torch.Tensor:
        old = table.load()
        # In slices: a table of a 7B in float32 would be half a gigabyte.
        mean = torch.stack([part.float().sum(0) for part in old.split(1024)]).sum(0) / len(old)
        return torch.cat([old, mean.to(old.dtype).expand(rows - len(old), -1)])

    return Weight((rows, *table.shape[1:]), table.dtype, load, f"{table.origin} + mean")


def rows_without_placeholder(config: LlavaSTFConfig) -> int:
    rows = config.text_config.vocab_size
    return rows - 1 if config.image_token_id == rows - 1 else rows


def refuse_growth(weights: Weights, rows: int, folder: Path, pad_token_id: int | None) -> None:
    """Raises a [`ConversionError`] if the rows behind the original's are more than `<image>` and padding.

    Nothing ever looks at the embeddings of those, so they are still alike, as the conversion made them.
    """
    table = weights[EMBEDDINGS]
    if rows > table.shape[0]:
        raise ConversionError(
            f"{ORIGINAL_CONFIG_FILE} says `vocab_size` {rows}, but {EMBEDDINGS!r} has {table.shape[0]} rows."
        )
    added = table.load()[rows:]
    tokens = _tokens_behind(folder / "tokenizer.json", rows, pad_token_id)
    if tokens or not torch.equal(added, added[:1].expand_as(added)):
        raise ConversionError(
            f"The tables have {table.shape[0]} rows, the original's {rows}, and what was added is more than "
            f"{IMAGE_TOKEN} and padding{': ' if tokens else ''}{', '.join(tokens)}. The original's vocabulary has no "
            "place for tokens behind its own; nothing was cut."
        )


def _tokens_behind(file: Path, rows: int, pad_token_id: int | None) -> list[str]:
    """Tokens with an id from `rows` on, but for `<image>` and the padding token, which the model never reads."""
    if not file.exists():
        return []
    words = read_tokenizer(file).get_vocab()
    unread = {words.get(IMAGE_TOKEN), pad_token_id}
    return sorted(word for word, index in words.items() if index >= rows and index not in unread)


def first_rows(table: Weight, rows: int) -> Weight:
    return Weight((rows, *table.shape[1:]), table.dtype, lambda: table.load()[:rows], table.origin)
