# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Chooses how many tokens the pictures of a row have while it trains.

`sample` draws one budget for each row and epoch. `all` trains each row with pictures once with every budget, in the
same step: the loss of Matryoshka Multimodal Models (M3, arXiv 2405.17430), which is the mean over the budgets.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import ProcessorMixin, TrainerCallback, TrainerState

from modeling_llava_stf import LlavaSTFProcessor

SAMPLE, ALL = "sample", "all"


def _shared_epoch() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64).share_memory_()


@dataclass
class TokenBudgets:
    """Gives the budgets of rows: tokens for each of a row's pictures and frames.

    Args:
        sizes: budgets that are trained, without repetition.
        full: tokens of a picture without a budget.
        mode: `"sample"` or `"all"`.
        seed: seed of the draws.
    """

    sizes: tuple[int, ...]
    full: int
    mode: str = SAMPLE
    seed: int = 0
    # Workers that live longer than an epoch see it change, because its memory is shared.
    epoch: torch.Tensor = field(default_factory=_shared_epoch)

    def __post_init__(self) -> None:
        self.sizes = tuple(sorted(self.sizes, reverse=True))

    def of_row(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        """Returns the budgets with which a row of `training.rows` is trained in this epoch, one for each copy of it."""
        if not (row["images"] or row["videos"]):
            return self.sizes[:1]  # nothing in it depends on the budget
        return self.sizes if self.mode == ALL else (self.draw(row_key(row["id"], row["messages"]), int(self.epoch)),)

    def draw(self, key: str, epoch: int) -> int:
        """Returns the budget of a row in an epoch, which depends on these and the seed only."""
        digest = hashlib.blake2b(f"{self.seed} {epoch} {key}".encode(), digest_size=8).digest()
        return self.sizes[int.from_bytes(digest, "big") % len(self.sizes)]

    def length(self, length: int, vision: int, budget: int) -> int:
        """Returns the tokens of a row with this budget; `length` are those without one, `vision` its pictures."""
        return length - vision * (self.full - budget)

    def copies(self, vision: int) -> int:
        """Returns how often a row of so many pictures is in its batch."""
        return len(self.sizes) if vision and self.mode == ALL else 1

    def expected(self, length: int, vision: int) -> float:
        """Returns the tokens of a row in one epoch, those of its copies included; for `sample`, the mean."""
        mean = sum(self.length(length, vision, budget) for budget in self.sizes) / len(self.sizes)
        return self.copies(vision) * mean


def check_budgets(budgets: Any) -> None:
    """Raises a `ValueError` if these are no budgets of any model: none at all, one twice, or no whole number."""
    if isinstance(budgets, str) or not isinstance(budgets, Iterable):
        raise ValueError(f"`token_budgets` is {budgets!r}, expected a list of whole numbers.")
    for budget in budgets:
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
            raise ValueError(f"`token_budgets` has {budget!r}, expected whole numbers of tokens, 1 or more.")
        if list(budgets).count(budget) > 1:
            raise ValueError(f"`token_budgets` has {budget} twice, expected each budget once.")
    if not budgets:
        raise ValueError("`token_budgets` is empty: name one or more, or leave it out.")


def budgets_of(sizes: Sequence[int] | None, mode: str, seed: int, processor: ProcessorMixin) -> TokenBudgets | None:
    """Returns the budgets of a training, `None` without `sizes`.

    Raises:
        ValueError: if the model of this processor cannot have them; lists those that it can have.
    """
    if sizes is None:
        return None
    check_budgets(sizes)
    if not isinstance(processor, LlavaSTFProcessor):
        raise ValueError(f"`token_budgets` is for LLaVA-STF, found a {type(processor).__name__}: leave it out.")
    allowed = processor.allowed_token_budgets
    for size in sizes:
        if size not in allowed:
            raise ValueError(
                f"`token_budgets` has {size}, expected some of {', '.join(map(str, allowed))} (this model's)."
            )
    return TokenBudgets(tuple(sizes), allowed[0], mode, seed)


def row_key(name: str, messages: list[Any]) -> str:
    """Returns a digest of a row's `id` and `messages`: rows of the same name are not drawn alike."""
    return hashlib.blake2b(json.dumps([name, messages]).encode(), digest_size=16).hexdigest()


class BudgetEpoch(TrainerCallback):
    """Tells the budgets their epoch: how often the rows were gone through, also before a run was stopped."""

    def __init__(self, budgets: TokenBudgets):
        self.budgets = budgets

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.budgets.epoch.fill_(int(state.epoch or 0) - 1)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.budgets.epoch += 1  # not from `state.epoch`, which a stream counts otherwise
