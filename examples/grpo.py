# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains the language model by reinforcement learning (GRPO, with LoRA), which rewards right answers about pictures.

python examples/grpo.py --model_name_or_path MODEL --dataset_name DATA --output_dir DIR --num_generations 8

DATA has `image`, `prompt` in TRL's conversational form, and the right answer as `solution`.
"""

from typing import Any

from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor


def right_answer(completions: list[list[dict[str, str]]], solution: list[str], **kwargs: Any) -> list[float]:
    """Returns 1 / (number of words) for an answer that contains the solution, else 0."""
    answers = [completion[0]["content"].lower() for completion in completions]
    return [
        float(right.lower() in answer) / max(1, len(answer.split()))
        for answer, right in zip(answers, solution, strict=True)
    ]


def main() -> None:
    script, args, choice = TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config()
    trainer = GRPOTrainer(
        LlavaSTFForConditionalGeneration.from_pretrained(choice.model_name_or_path, dtype=choice.dtype),
        reward_funcs=right_answer,
        args=args,
        train_dataset=load_dataset(script.dataset_name, split=script.dataset_train_split),
        processing_class=LlavaSTFProcessor.from_pretrained(choice.model_name_or_path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
