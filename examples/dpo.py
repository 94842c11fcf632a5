# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Preference training (DPO) of the language model with LoRA, on pairs of answers about pictures.

python examples/dpo.py --model_name_or_path MODEL --dataset_name DATA --output_dir DIR --learning_rate 5e-6

DATA has `images`, `prompt`, `chosen` and `rejected` in TRL's conversational form, as HuggingFaceH4/rlaif-v_formatted.
"""

from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor


def main() -> None:
    script, args, choice = TrlParser((ScriptArguments, DPOConfig, ModelConfig)).parse_args_and_config()
    args.max_length = None  # a row that is cut could lose a part of its image
    trainer = DPOTrainer(
        LlavaSTFForConditionalGeneration.from_pretrained(choice.model_name_or_path, dtype=choice.dtype),
        args=args,
        train_dataset=load_dataset(script.dataset_name, split=script.dataset_train_split),
        processing_class=LlavaSTFProcessor.from_pretrained(choice.model_name_or_path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
