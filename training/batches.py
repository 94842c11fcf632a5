# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Makes batches of rows, whose images are opened at that time."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_llava_stf.processing_llava_stf import is_animated_file, is_picture

from .budgets import TokenBudgets
from .checks import check_tokens, open_image
from .rows import NO_TARGET, TOO_LONG, DataError, is_row, to_row
from .upstream import leave_out_image_tokens, with_options

logger = logging.get_logger(__name__)


# Batches
@dataclass
class Collator(DataCollatorForVisionLanguageModeling):
    """Makes batches as TRL's collator does; opens the images of `training.rows`, in the worker that makes the batch.

    With `budgets`, the pictures and frames of a row have as many tokens as its budget, and a row with several budgets
    is in the batch once with each.

    Raises:
        DataError: names the image that cannot be read, or a row of more than `longest` tokens or of none to train.
    """

    budgets: TokenBudgets | None = None
    longest: int | None = None  # TRL's `max_length` would cut a row

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [self._row(example) for example in examples]
        collator = self
        if self.budgets is not None:
            copies = [(row, budget) for row in rows for budget in self.budgets.of_row(row)]
            rows = [row for row, _ in copies]
            images = [budget for row, budget in copies for _ in row["images"]]
            videos = [budget for row, budget in copies for _ in row["videos"]]
            kinds = {"images_kwargs": images, "videos_kwargs": videos}
            options = {name: {"max_soft_tokens": numbers} for name, numbers in kinds.items() if numbers}
            collator = dataclasses.replace(self, processor=with_options(self.processor, **options))
        batch = super(Collator, collator).torch_call([self._with_media(row) for row in rows])
        leave_out_image_tokens(batch, self.processor.image_token_id)
        self._check_batch(batch, rows)
        return batch

    def _check_batch(self, batch: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        lengths, targets = batch["attention_mask"].sum(1).tolist(), (batch["labels"] != -100).sum(1).tolist()
        for row, length, trained in zip(rows, lengths, targets, strict=True):
            if not trained:
                raise DataError(f"Row {row['id']} cannot be trained on: {NO_TARGET}.")
            if self.longest is not None and length > self.longest:
                raise DataError(
                    f"Row {row['id']} cannot be trained on: {TOO_LONG}: {length} tokens, {self.longest} are allowed."
                )

    def _row(self, example: dict[str, Any]) -> dict[str, Any]:
        row = example if is_row(example) else self._checked(example)  # or a row of TRL, as it is
        if row["problem"]:
            raise DataError(f"Row {row['id']} cannot be trained on: {row['problem']}.")
        return row

    def _with_media(self, row: dict[str, Any]) -> dict[str, Any]:
        videos = iter(row["videos"])
        messages = [
            {
                **message,
                "content": [
                    {**part, "video": self._frames_or_file(next(videos))} if part["type"] == "video" else part
                    for part in message["content"]
                ],
            }
            for message in row["messages"]
        ]
        image_processor = self.processor.image_processor
        return {"messages": messages, "images": [open_image(image, image_processor) for image in row["images"]]}

    def _checked(self, example: dict[str, Any]) -> dict[str, Any]:
        row = to_row(example, "without an id", "")
        check_tokens(row["messages"], self.processor.tokenizer.all_special_tokens)
        for note in row["notes"]:
            logger.warning_once(f"note: {note}")
        return row

    def _frames_or_file(self, video: list[str]) -> Any:
        if not is_picture(video[0]) or (len(video) == 1 and is_animated_file(video[0])):
            return video[0]
        return [open_image({"path": frame, "bytes": None}, self.processor.image_processor) for frame in video]
