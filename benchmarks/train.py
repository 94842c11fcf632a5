# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Measures training steps of LLaVA-STF (144 tokens per picture) and the stock LLaVA (576) with the same trainer.

python -m benchmarks train [--device cuda] [--layers 32] [--batch 8] [--output benchmarks/results/train_cuda.json]

Widths are those of the 7B, weights are random, and a row is a picture with a question and an answer of --text tokens.
The systems take turns in one process: each round builds and trains every stage of both. By default the language model
has 2 layers and the optimizer is SGD, which a CPU with 16 GB can hold; compare ratios, not times.
"""

import argparse
import gc
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import accelerate
import peft
import torch
import transformers
import trl
from datasets import Dataset, Image, List
from peft import LoraConfig
from PIL import Image as Picture
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    TrainerCallback,
)

from benchmarks import machine, output
from benchmarks.count import clip
from benchmarks.systems import configs
from conversion.checkpoints.folders import TEMPLATES
from conversion.tokenizer import load_tokenizer
from modeling_llava_stf import (
    LlavaSTFConfig,
    LlavaSTFForConditionalGeneration,
    LlavaSTFImageProcessor,
    LlavaSTFProcessor,
)
from training import LlavaSTFTrainer, LlavaSTFTrainingArguments
from training.throughput import measure_tflops, training_flops

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (TEMPLATES / "vicuna_v1.jinja").read_text(encoding="utf-8")
LORA = LoraConfig(
    r=128,
    lora_alpha=256,
    target_modules=r".*language_model\.layers\..*\.(q|k|v|o|gate|up|down)_proj",
    modules_to_save=["multi_modal_projector"],
)
# These are the trained parameters and the dtype of the loaded weights in each recipe.
STAGES: dict[str, tuple[str | None, torch.dtype]] = {
    "stage 1": ("multi_modal_projector", torch.bfloat16),
    "LoRA": (None, torch.bfloat16),
    "full fine-tune": ("multi_modal_projector|language_model|lm_head", torch.float32),
}


def build(system: str, options: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Any]:
    """Builds model and processor of `stf` or `stock`, with random weights."""
    tokenizer = load_tokenizer(ROOT / "tests" / "goldens" / "tokenizer_legacy_false", 4096)
    widths = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2} if options.size == "tiny" else {}
    text = LlamaConfig(
        vocab_size=32001, num_hidden_layers=options.layers, pad_token_id=tokenizer.pad_token_id, **widths
    )
    tower = configs("tiny")[1].vision_config if options.size == "tiny" else clip(layers=24)
    side = {"height": tower.image_size, "width": tower.image_size}
    image_processor = LlavaSTFImageProcessor(size={"shortest_edge": tower.image_size}, crop_size=side)
    sizes = {"patch_size": tower.patch_size, "vision_feature_select_strategy": "default", "chat_template": TEMPLATE}
    image_token_id = tokenizer.image_token_id
    torch.set_default_dtype(dtype)
    with torch.device(options.device):
        if system == "stf":
            config = LlavaSTFConfig(vision_config=tower, text_config=text, image_token_id=image_token_id)
            model: Any = LlavaSTFForConditionalGeneration(config)
            processor: Any = LlavaSTFProcessor(image_processor, tokenizer, fusion_window=config.fusion_window, **sizes)
        else:
            model = LlavaForConditionalGeneration(
                LlavaConfig(vision_config=tower, text_config=text, image_token_id=image_token_id)
            )
            processor = LlavaProcessor(image_processor, tokenizer, num_additional_image_tokens=1, **sizes)
    torch.set_default_dtype(torch.float32)
    return model, processor


class Steps(TrainerCallback):
    """Records the seconds of each step."""

    def __init__(self, device: str):
        self.device, self.seconds = device, []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self.now() - self.started)

    def now(self) -> float:
        machine.wait(self.device)
        return time.perf_counter()


def train(system: str, stage: str, options: argparse.Namespace, rows: Dataset) -> dict[str, float]:
    """Trains a few steps; returns seconds per step (without the first), peak memory and counted FLOPs."""
    trainable, dtype = STAGES[stage]
    machine.reset_peak(options.device)
    model, processor = build(system, options, dtype)
    steps = Steps(options.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = LlavaSTFTrainer(
            model,
            LlavaSTFTrainingArguments(
                folder,
                trainable=trainable,
                per_device_train_batch_size=options.batch,
                max_steps=options.steps + 1,
                optim=options.optim,
                bf16=True,
                use_cpu=options.device == "cpu",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                peak_tflops=1.0,
            ),
            train_dataset=rows,
            processing_class=processor,
            peft_config=LORA if trainable is None else None,
            callbacks=[steps],
        )
        batch = trainer.data_collator([rows[0]])
        tokens = batch["input_ids"].shape[1]
        trainer.train()
        flops = training_flops(trainer.model, options.batch, options.batch * tokens)
        again = recomputed_flops(trainer.model, options.batch * tokens)
    result = {
        "seconds": median(steps.seconds[1:]),
        "peak_gib": machine.peak(options.device) / 2**30,
        "tokens": tokens,
        "tflop": flops / 1e12,
        "tflop_recomputed": again / 1e12,
    }
    del model, trainer
    gc.collect()
    torch.cuda.empty_cache()
    return result


def recomputed_flops(model: torch.nn.Module, tokens: int) -> float:
    """Counts the layers of the language model, which gradient checkpointing runs twice."""
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and "language_model.layers" in name
    ]
    return 2.0 * tokens * sum(layer.in_features * layer.out_features for layer in layers)


def data(options: argparse.Namespace) -> Dataset:
    """Makes rows with a random picture and `text` tokens; half of them are the answer."""
    picture = Picture.effect_noise((640, 480), 60).convert("RGB")
    words = "a " * (options.text // 2)
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": words}]},
        {"role": "assistant", "content": [{"type": "text", "text": words}]},
    ]
    number = options.batch * (options.steps + 1)
    rows = Dataset.from_dict({"messages": [messages] * number, "images": [[picture]] * number})
    return rows.cast_column("images", List(Image(decode=False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--size", choices=["tiny", "slice", "7b"], default="7b", help="widths of the model; tiny is for a rehearsal"
    )
    parser.add_argument("--layers", type=int, default=2, help="layers of the language model (7B: 32)")
    parser.add_argument("--batch", type=int, default=1, help="rows of a step (default: 1)")
    parser.add_argument("--text", type=int, default=100, help="text tokens of a row")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of each turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--optim", default="sgd", help="optimizer of the Trainer, such as adamw_torch")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device in bfloat16 (default: measured)")
    parser.add_argument("--output", type=Path, help="JSON to write; must not exist")
    options = parser.parse_args()
    output.require_absent(options.output, parser)

    if options.peak_tflops is None:
        options.peak_tflops = measure_tflops(torch.device(options.device), bf16=True)
    rows = data(options)
    turns: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for turn in range(options.rounds):
        for stage in options.stages:
            for system in ("stock", "stf"):
                turns[stage, system].append(train(system, stage, options, rows))
                print(f"round {turn + 1}, {stage}, {system}: {turns[stage, system][-1]}", flush=True)
    result = {
        "device": machine.name(options.device),
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl, peft, accelerate)},
        "options": {name: str(value) for name, value in vars(options).items() if name != "output"},
        "command": output.command("train"),
        "stages": {stage: summary(stage, turns, options) for stage in options.stages},
    }
    if options.output is not None:
        output.write(result, options.output)
    print(json.dumps(result["stages"], indent=2))


def summary(stage: str, turns: dict, options: argparse.Namespace) -> dict[str, Any]:
    """Returns medians of the rounds, their spread, and the ratio of stock to STF in time and in counted FLOPs."""
    systems: dict[str, Any] = {}
    for system in ("stock", "stf"):
        rounds = turns[stage, system]
        seconds = [turn["seconds"] for turn in rounds]
        systems[system] = {
            "samples_per_second": options.batch / median(seconds),
            "seconds_of_rounds": seconds,
            "peak_gib": max(turn["peak_gib"] for turn in rounds),
            "tokens_per_row": rounds[0]["tokens"],
            "counted_tflop_per_step": rounds[0]["tflop"],
            "counted_tflop_recomputed": rounds[0]["tflop_recomputed"],
            "mfu": rounds[0]["tflop"] / median(seconds) / options.peak_tflops,
        }
    stock, stf = systems["stock"], systems["stf"]
    return {
        **systems,
        "ratio_measured": stf["samples_per_second"] / stock["samples_per_second"],
        "ratio_counted": work(stock) / work(stf),
    }


def work(system: dict[str, Any]) -> float:
    return system["counted_tflop_per_step"] + system["counted_tflop_recomputed"]
