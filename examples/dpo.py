# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains the language model on preferences (DPO, with LoRA): pairs of answers about pictures.

python -m examples.dpo --model_name_or_path MODEL --dataset_name DATA --output_dir DIR --learning_rate 5e-6

DATA has `images`, `prompt`, `chosen` and `rejected` in TRL's conversational form, like
HuggingFaceH4/rlaif-v_formatted.
"""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser
from trl.data_utils import prepare_multimodal_messages

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from training.checks import check_tokens
from training.rows import DataError, to_row


@dataclass
class PreferenceCollator:
    """Makes a batch of whole conversations: all with the chosen answer, then all with the rejected one.

    TRL 1.16 tokenizes the answer without the prompt, which adds a `▁` that does not occur in inference.
    """

    processor: LlavaSTFProcessor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and `completion_mask` are (2 * rows, sequence).

        Raises:
            DataError: if a row cannot be trained exactly as it is written.
        """
        conversations = [self._conversation(row, answer) for answer in ("chosen", "rejected") for row in rows]
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        batch["completion_mask"] = _last_run(batch.pop("assistant_masks"))
        return batch

    def _conversation(self, row: dict[str, Any], answer: str) -> list[dict[str, Any]]:
        """The prompt with one of the answers and the images, checked as the rows of `training`."""
        prompt, answers = row.get("prompt"), row.get(answer)
        if not isinstance(prompt, list) or not isinstance(answers, list) or len(answers) != 1:
            raise DataError(
                f"`prompt` is {prompt!r:.100} and `{answer}` is {answers!r:.100}, expected a list of messages and a "
                "list of one message."
            )
        media = {name: value for name, value in row.items() if name in ("image", "images")}
        checked = to_row({"messages": prompt + answers, **media}, 0, "")
        if checked["problem"]:
            raise DataError(checked["problem"])
        check_tokens(checked["messages"], self.processor.tokenizer.all_special_tokens)
        return prepare_multimodal_messages(checked["messages"], images=checked["images"])


def _last_run(mask: torch.Tensor) -> torch.Tensor:
    """Keeps the last run of ones in each row, because answers of earlier turns belong to the prompt."""
    runs = (mask.diff(dim=1, prepend=torch.zeros_like(mask[:, :1])) == 1).cumsum(1)
    return mask * (runs == runs[:, -1:])


def main() -> None:
    script, args, choice = TrlParser((ScriptArguments, DPOConfig, ModelConfig)).parse_args_and_config()
    args.max_length = None  # truncation could cut through an image
    processor = LlavaSTFProcessor.from_pretrained(choice.model_name_or_path)
    trainer = DPOTrainer(
        LlavaSTFForConditionalGeneration.from_pretrained(choice.model_name_or_path, dtype=choice.dtype),
        args=args,
        train_dataset=load_dataset(script.dataset_name, split=script.dataset_train_split),
        processing_class=processor,
        data_collator=PreferenceCollator(processor),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
