# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains the language model on preferences (DPO, with LoRA): pairs of answers about pictures.

python -m examples.dpo --model_name_or_path MODEL --dataset_name DATA --output_dir DIR --learning_rate 5e-6

DATA has `images`, `prompt`, `chosen` and `rejected` in TRL's conversational form, like
HuggingFaceH4/rlaif-v_formatted. `--use_peft false` trains the whole model but its vision tower.
"""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config
from trl.data_utils import prepare_multimodal_messages

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from training.checks import check_tokens, open_image
from training.rows import DataError, to_row, undecoded
from training.run import load_model
from training.settings import check_settings
from training.trainer import check_tower

LORA = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


@dataclass
class PreferenceCollator:
    """Makes a batch of whole conversations: all with the chosen answer, then all with the rejected one.

    TRL 1.16 tokenizes the answer without the prompt, which adds a `▁` that does not occur in inference.
    """

    processor: LlavaSTFProcessor
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and `completion_mask` are (2 * rows, sequence).

        Raises:
            DataError: if a row cannot be trained exactly as it is written, or is longer than `max_length`.
        """
        conversations = [self._conversation(row, answer) for answer in ("chosen", "rejected") for row in rows]
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "padding": True,
                "padding_side": "right",
                "pad_to_multiple_of": self.pad_to_multiple_of,
            },
        )
        longest = int(batch["attention_mask"].sum(1).max())
        if self.max_length is not None and longest > self.max_length:
            raise DataError(f"A row has {longest} tokens, `max_length` allows {self.max_length}, and none is cut.")
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
        images = [open_image(image, self.processor.image_processor) for image in checked["images"]]
        return prepare_multimodal_messages(checked["messages"], images=images)


def _last_run(mask: torch.Tensor) -> torch.Tensor:
    """Keeps the last run of ones in each row, because answers of earlier turns belong to the prompt."""
    runs = (mask.diff(dim=1, prepend=torch.zeros_like(mask[:, :1])) == 1).cumsum(1)
    return mask * (runs == runs[:, -1:])


def load(choice: ModelConfig) -> LlavaSTFForConditionalGeneration:
    """Loads the model to train, with a frozen vision tower; without other options LoRA adapts the language model."""
    if choice.use_peft and choice.lora_target_modules is None:
        choice.lora_target_modules = LORA
    check_settings(choice)
    model = load_model(choice)
    model.model.vision_tower.requires_grad_(False)
    return model


def main() -> None:
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
    parser.set_defaults(use_peft=True, max_length=None)
    script, args, choice = parser.parse_args_and_config()
    model = load(choice)
    processor = LlavaSTFProcessor.from_pretrained(choice.model_name_or_path, revision=choice.model_revision)
    data = load_dataset(script.dataset_name, script.dataset_config, streaming=script.dataset_streaming)
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=undecoded(data[script.dataset_train_split]),
        eval_dataset=None if args.eval_strategy == "no" else undecoded(data[script.dataset_test_split]),
        processing_class=processor,
        data_collator=PreferenceCollator(processor, args.max_length, args.pad_to_multiple_of),
        peft_config=get_peft_config(choice),
    )
    check_tower(trainer.model)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
