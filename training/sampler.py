# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Orders rows into batches of one modality and of similar lengths."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from .budgets import ALL, TokenBudgets


class ModalityLengthSampler(Sampler[int]):
    """Orders rows so that a global batch is either all images or all text, and long rows stand beside long ones.

    The order is that of the original (`group_by_modality_length`), but for its random numbers: they depend on seed
    and epoch only, so that all ranks agree and a resumed run goes on as the unbroken one.

    Args:
        lengths: tokens of each row.
        has_images: whether a row has images; as many as `lengths`.
        batch_size: rows of one device in one step.
        batches: number of batches in a global batch: devices times accumulation steps.
        seed: the seed of the run; the epoch is added to it.
    """

    def __init__(self, lengths: Sequence[int], has_images: Sequence[bool], batch_size: int, batches: int, seed: int):
        if len(lengths) != len(has_images):
            raise ValueError(f"{len(lengths)} lengths and {len(has_images)} modalities: expected as many of each.")
        self.lengths, self.has_images = lengths, has_images
        self.batch_size, self.batches = batch_size, batches
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(modality_length_order(self.lengths, self.has_images, self.batch_size, self.batches, generator))


class BudgetLengthSampler(ModalityLengthSampler):
    """Orders rows by the lengths that their budgets give them in this epoch; with `all`, by the largest.

    Args:
        lengths: tokens of each row without budgets.
        vision: pictures and frames of each row.
        keys: what [`training.budgets.row_key`] returns for each row.
        budgets: of the run.
        **kwargs: those of [`ModalityLengthSampler`].
    """

    def __init__(
        self, lengths: Sequence[int], vision: Sequence[int], keys: Sequence[str], budgets: TokenBudgets, **kwargs: Any
    ):
        super().__init__(lengths, [pictures > 0 for pictures in vision], **kwargs)
        self.full_lengths, self.vision, self.keys, self.budgets = lengths, vision, keys, budgets

    def __iter__(self) -> Iterator[int]:
        self.lengths = [
            self.budgets.length(length, pictures, self._budget(key))
            for length, pictures, key in zip(self.full_lengths, self.vision, self.keys, strict=True)
        ]
        return super().__iter__()

    def _budget(self, key: str) -> int:
        return self.budgets.sizes[0] if self.budgets.mode == ALL else self.budgets.draw(key, self.epoch)


class SeededSampler(Sampler[int]):
    """Gives rows an order that depends on seed and epoch only, as above.

    Args:
        rows: number of rows.
        order: makes their order with a generator.
        seed: the seed of the run; the epoch is added to it.
    """

    def __init__(self, rows: int, order: Callable[[torch.Generator], list[int]], seed: int):
        self.rows, self.order = rows, order
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(torch.Generator().manual_seed(self.seed + self.epoch)))


def modality_length_order(
    lengths: Sequence[int], has_images: Sequence[bool], batch_size: int, batches: int, generator: torch.Generator | None
) -> list[int]:
    """Orders all rows: global batches of one modality in random order, and the rest of both at the end."""
    modalities = [
        [index for index, image in enumerate(has_images) if bool(image) == wanted] for wanted in (True, False)
    ]
    if not all(modalities):
        return length_order(lengths, batch_size, batches, generator)
    size = batch_size * batches
    full, rest = [], []
    for rows in modalities:
        order = length_order([lengths[row] for row in rows], batch_size, batches, generator)
        ordered = [rows[index] for index in order]
        chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        full += chunks[:-1]
        rest += chunks[-1]
    shuffled = torch.randperm(len(full), generator=generator).tolist()
    return [row for index in shuffled for row in full[index]] + sorted(rest)


def length_order(lengths: Sequence[int], batch_size: int, batches: int, generator: torch.Generator | None) -> list[int]:
    """Orders rows at random; deals each global batch out to its batches, so that they are of similar size."""
    size = batch_size * batches
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    order = []
    for start in range(0, len(shuffled), size):
        chunk = sorted(shuffled[start : start + size], key=lambda row: lengths[row], reverse=True)
        order += [row for batch in deal(chunk, lengths, batches) for row in batch]
    return order


def deal(rows: list[int], lengths: Sequence[int], batches: int) -> list[list[int]]:
    """Deals rows, longest first, to the batch that is shortest so far and not full."""
    if len(rows) % batches:
        return [rows[start::batches] for start in range(batches)]
    hands: list[list[int]] = [[] for _ in range(batches)]
    totals = [0.0] * batches
    for row in rows:
        shortest = totals.index(min(totals))
        hands[shortest].append(row)
        full = len(hands[shortest]) == len(rows) // batches
        totals[shortest] = math.inf if full else totals[shortest] + lengths[row]
    return hands
