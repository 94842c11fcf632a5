# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What a conversion is asked for: the fields of the command line, typed."""

from dataclasses import dataclass
from pathlib import Path

import torch

from .keys import ConversionError


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `convert`, which are those of the command line.

    Args:
        base: folder or Hub id of the language model that a projector or a LoRA run was trained on.
        vision_tower: folder or Hub id of the CLIP model; by default the one that the source's config names.
        tokenizer: folder of the tokenizer; by default the source's, else the base's.
        revision: branch, tag or commit of the source, if that is a Hub id.
        base_revision: revision of the base; by default the one that the adapter's config records for it.
        vision_tower_revision: revision of the CLIP model.
        tokenizer_revision: revision of the tokenizer.
        subfolder: folder of a Hub id that holds several runs.
        init_fusion: begin a training: take tower and language model, and make new fusion modules.
        taps: blocks of the tower that new fusion modules mix, in their order; by default the released model's.
        seed: random seed of the new fusion modules.
        keep_adapter: keep a LoRA run as an adapter beside its converted base, instead of merging it.
        keep_full_tower: keep the tower's layers behind the last tap; they never run.
        dtype: dtype of all weights; by default each weight keeps its own.
        pad_vocabulary: pad the vocabulary tables to a multiple of this.
        max_shard_size: size of a weight file, such as `5GB`.
        dry_run: only print what would be written.
        verify: read the result again and compare a checksum of each tensor with its source.
        outputs: recorded outputs to compare logits with (see [`check_logits`]).

    Raises:
        ConversionError: for a seed or a multiple that is out of bounds.
    """

    base: str | Path | None = None
    vision_tower: str | Path | None = None
    tokenizer: str | Path | None = None
    revision: str | None = None
    base_revision: str | None = None
    vision_tower_revision: str | None = None
    tokenizer_revision: str | None = None
    subfolder: str | None = None
    init_fusion: bool = False
    taps: list[int] | None = None
    seed: int = 0
    keep_adapter: bool = False
    keep_full_tower: bool = False
    dtype: torch.dtype | None = None
    pad_vocabulary: int = 1
    max_shard_size: str = "5GB"
    dry_run: bool = False
    verify: bool = False
    outputs: str | Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63 - 4:  # torch's largest; each of the four layers has its own
            raise ConversionError(f"--seed is {self.seed}, expected a number from 0 to 2**63 - 5.")
        if not 1 <= self.pad_vocabulary <= 2**16:
            raise ConversionError(f"--pad-vocabulary is {self.pad_vocabulary}, expected a number from 1 to {2**16}.")
