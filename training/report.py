# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Prints what a run is about before it starts, and draws its curves at the end."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from torch import nn

from .budgets import SAMPLE
from .checks import Report
from .trainer import LlavaSTFTrainer
from .upstream import size_of

matplotlib.use("Agg")  # draws to files, with or without a screen

PARTS = ("vision_tower", "multi_modal_projector", "language_model", "lm_head")
CURVES = {
    "loss": "loss",
    "eval_loss": "loss (evaluation)",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "mean_token_accuracy": "token accuracy",
    "tokens_per_second": "tokens/s",
}


def start_lines(trainer: LlavaSTFTrainer, data: Report | None) -> Iterator[str]:
    """Says what trains and how much one step takes; `data` is unknown for a stream."""
    args = trainer.args
    parts: dict[tuple[str, bool, str], int] = defaultdict(int)
    for name, weight in trainer.model.named_parameters():
        if ".original_module." in name:  # PEFT's untrained copy of a module that is trained in full
            continue
        part = next((part for part in PARTS if part in name), name)
        part = f"{part} (LoRA)" if "lora_" in name else part
        parts[part, weight.requires_grad, str(weight.dtype).removeprefix("torch.")] += size_of(weight)
    yield "part                          parameters  dtype"
    for (part, trained, dtype), number in sorted(parts.items(), key=lambda item: not item[0][1]):
        rate = args.learning_rate
        if "multi_modal_projector" in part and args.projector_learning_rate is not None:
            rate = args.projector_learning_rate
        yield f"{part:26} {number:13,}  {dtype:9} " + (f"trained, learning rate {rate:g}" if trained else "frozen")
    yield from adapted_lines(trainer.model)
    rows = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    yield (
        f"global batch: {rows} rows = {args.per_device_train_batch_size} per device x {args.world_size} device(s) x "
        f"{args.gradient_accumulation_steps} accumulation step(s); loss by {args.loss_reduction}"
    )
    if args.token_budgets:
        sizes = ", ".join(map(str, args.token_budgets))
        yield f"tokens for each picture: {sizes}; " + (
            "a row has one of them in each epoch"
            if args.token_budget_mode == SAMPLE
            else "a row with pictures is in its batch once with each of them"
        )
    if data is not None:
        share = rows / data.kept
        yield (
            f"a step: about {share * data.epoch_images:.0f} images and {share * data.epoch_tokens:,.0f} tokens "
            f"({share * data.epoch_targets:,.0f} of them trained); {data.kept:,} rows an epoch"
        )


def adapted_lines(model: nn.Module) -> Iterator[str]:
    """Lists the modules that LoRA adapts, those of all layers in one line, and those that are trained in full."""
    names = [name.removeprefix("base_model.model.") for name, _ in model.named_parameters()]
    adapted = list(dict.fromkeys(name.split(".lora_")[0] for name in names if ".lora_" in name))
    if not adapted:
        return
    yield f"LoRA adapts {len(adapted)} modules, the first of them {adapted[0]}:"
    for name, number in Counter(re.sub(r"\.\d+\.", ".*.", name) for name in adapted).items():
        yield f"  {number:3} x {name}"
    whole = dict.fromkeys(name.split(".modules_to_save.")[0] for name in names if ".modules_to_save." in name)
    if whole:
        yield f"trained in full beside it: {', '.join(whole)}"


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Draws what a trainer logged, `state.log_history`, over its steps."""
    curves = {name: [(row["step"], row[name]) for row in history if name in row] for name in CURVES}
    curves = {name: points for name, points in curves.items() if points}
    figure = Figure(figsize=(10, 2.6 * ((len(curves) + 1) // 2)), layout="constrained")
    for index, (name, points) in enumerate(curves.items(), 1):
        axes = figure.add_subplot((len(curves) + 1) // 2, 2, index)
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "")
        axes.set(title=CURVES[name], xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def draw_lengths(lengths: list[int], max_length: int, path: Path) -> None:
    """Draws the lengths of rows beside the longest that is allowed."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(lengths, bins=50)
    axes.axvline(max_length, color="tab:red", label=f"allowed: {max_length}")
    axes.set(title="Rows by length", xlabel="tokens, those of images included", ylabel="rows")
    axes.legend()
    figure.savefig(path, dpi=100)
