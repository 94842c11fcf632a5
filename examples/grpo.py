# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains the language model by reinforcement learning (GRPO, with LoRA), which rewards right answers about pictures.

python -m examples.grpo --model_name_or_path MODEL --dataset_name DATA --output_dir DIR --num_generations 8

DATA has `image`, `prompt` in TRL's conversational form, and the right answer as `solution`. `--use_peft false` trains
the whole model but its vision tower.
"""

from typing import Any

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from examples.dpo import load
from modeling_llava_stf import LlavaSTFProcessor
from training.rows import undecoded
from training.trainer import check_tower


def right_answer(completions: list[list[dict[str, str]]], solution: list[str], **kwargs: Any) -> list[float]:
    """Returns 1 / (number of words) for an answer that contains the solution, else 0."""
    answers = [completion[0]["content"].lower() for completion in completions]
    return [
        float(right.lower() in answer) / max(1, len(answer.split()))
        for answer, right in zip(answers, solution, strict=True)
    ]


def main() -> None:
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
    parser.set_defaults(use_peft=True, disable_dropout=True)
    script, args, choice = parser.parse_args_and_config()
    model = load(choice)
    data = load_dataset(script.dataset_name, script.dataset_config, streaming=script.dataset_streaming)
    trainer = GRPOTrainer(
        model,
        reward_funcs=right_answer,
        args=args,
        train_dataset=undecoded(data[script.dataset_train_split]),
        eval_dataset=None if args.eval_strategy == "no" else undecoded(data[script.dataset_test_split]),
        processing_class=LlavaSTFProcessor.from_pretrained(choice.model_name_or_path, revision=choice.model_revision),
        peft_config=get_peft_config(choice),
    )
    check_tower(trainer.model)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
