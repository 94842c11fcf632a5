# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Makes batches of rows, whose images are opened at that time."""

from dataclasses import dataclass
from typing import Any

from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_llava_stf.processing_llava_stf import is_picture

from .checks import check_tokens, open_image
from .rows import DataError, is_animated, to_row
from .upstream import leave_out_image_tokens

logger = logging.get_logger(__name__)


# Batches
@dataclass
class Collator(DataCollatorForVisionLanguageModeling):
    """Makes batches as TRL's collator does; opens the images of `training.rows`, in the worker that makes the batch.

    Raises:
        DataError: names the image that cannot be read.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call([self._with_media(example) for example in examples])
        leave_out_image_tokens(batch, self.processor.image_token_id)
        return batch

    def _with_media(self, example: dict[str, Any]) -> dict[str, Any]:
        row = example if "problem" in example else self._checked(example)  # or a row of TRL, as it is
        if row["problem"]:
            raise DataError(f"Row {row['id']} cannot be trained on: {row['problem']}.")
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
        row = to_row(example, 0, "")
        check_tokens(row["messages"], self.processor.tokenizer.all_special_tokens)
        for note in row["notes"]:
            logger.warning_once(f"note: {note}")
        return row

    def _frames_or_file(self, video: list[str]) -> Any:
        if not is_picture(video[0]) or (len(video) == 1 and is_animated(video[0])):
            return video[0]
        return [open_image({"path": frame, "bytes": None}, self.processor.image_processor) for frame in video]
