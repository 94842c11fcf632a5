# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Computes what training needs from a config and the recipes: memory of each GPU, and hours.

Memory counts weights, gradients and AdamW, the layer inputs that gradient checkpointing keeps, and the one layer that
it computes again. It leaves out CUDA's context (about 1 GB), fragmentation and communication buffers. Hours are the
FLOPs of all rows divided by the assumed FLOP/s of the devices.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.count import (
    Config,
    decoder_weights,
    head_size,
    image_tokens,
    table_weights,
    training_flops,
    vision_parts,
    with_budget,
)
from modeling_llava_stf import LlavaSTFConfig

RECIPES = Path(__file__).resolve().parents[1] / "training" / "recipes"
# Dense bfloat16 TFLOP/s and GB of memory, from the vendor.
GPUS = {"RTX 4090": (165, 24), "L40S": (362, 48), "A100": (312, 80), "H100": (989, 80), "H200": (989, 141)}
# Rows of the paper's data, and the assumed text tokens of a row.
STAGES = {"stage 1": (558_000, 30), "stage 2": (665_000, 200)}
NF4 = 0.516  # bytes of a weight in 4 bits with nested quantisation


@dataclass(frozen=True)
class Way:
    """Describes a recipe and its parallelism. All numbers are bytes per weight, except `residual`."""

    name: str
    recipe: str
    trained: float  # weight, gradient and two moments of AdamW, on each device
    trained_shared: float = 0.0  # part of it that is divided among all devices
    frozen: float = 2.0
    frozen_shared: float = 0.0
    residual: int = 2  # bytes of a number that is kept between layers
    buckets: float = 0.0  # copies of the gradients for the exchange between devices


# Weights, gradients and moments in float32 take 16 bytes; DDP's buckets hold a copy of the gradients. DeepSpeed keeps
# bfloat16 weights and gradients, and a float32 copy of the weights with the moments.
WAYS = (
    Way("stage 1, DDP", "pretrain", trained=16, buckets=4),
    Way("LoRA, DDP", "finetune_lora", trained=16, buckets=4),
    Way("QLoRA, DDP", "finetune_qlora", trained=16, buckets=4),
    Way("full, DDP", "finetune", trained=16, buckets=4, frozen=4, residual=4),
    Way("full, ZeRO-2", "finetune", trained=2, trained_shared=14),
    Way("full, ZeRO-3", "finetune", trained=0, trained_shared=16, frozen=0, frozen_shared=2),
    Way("full, FSDP2", "finetune", trained=0, trained_shared=16, frozen=0, frozen_shared=4, residual=4),
)


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))


def memory(config: Config, way: Way, devices: int, text: int) -> float:
    """Returns the bytes on each device for the recipe's batch per device, with `text` text tokens per row."""
    settings = recipe(way.recipe)
    trained, frozen, quantised = weights(config, settings)
    state = trained * (way.trained + way.trained_shared / devices + way.buckets * (devices > 1))
    state += frozen * (way.frozen + way.frozen_shared / devices) + quantised * NF4
    return state + settings["per_device_train_batch_size"] * activations(config, text, way.residual)


def weights(config: Config, settings: dict[str, Any]) -> tuple[float, float, float]:
    """Counts the weights that a recipe trains, freezes, and keeps in 4 bits."""
    tower, *connector = (part.weights for part in vision_parts(config))
    decoder, tables = decoder_weights(config), table_weights(config)
    if settings.get("use_peft"):
        trained = sum(connector) + lora_weights(config, settings["lora_r"])
        quantised = decoder if settings.get("load_in_4bit") else 0
        return trained, tower + decoder + tables - quantised + sum(connector), quantised  # PEFT keeps the old connector
    if "language_model" in settings["trainable"]:
        return sum(connector) + decoder + tables, tower, 0
    return sum(connector), tower + decoder + tables, 0


def lora_weights(config: Config, rank: int) -> int:
    """Counts the weights of adapters on all linear layers of the language model, as in the recipes."""
    text = config.text_config
    wide, inner = text.hidden_size, text.intermediate_size
    asked, kept = (heads * head_size(config) for heads in (text.num_attention_heads, text.num_key_value_heads))
    sides = 2 * (wide + asked) + 2 * (wide + kept) + 3 * (wide + inner)  # q and o; k and v; gate, up and down
    return text.num_hidden_layers * rank * sides


def activations(config: Config, text: int, residual: int) -> float:
    """Returns the bytes of one row: inputs of all layers, one recomputed layer in bfloat16, connector and logits."""
    settings = config.text_config
    sequence, wide = image_tokens(config) + text, settings.hidden_size
    inputs = settings.num_hidden_layers * sequence * wide * residual
    layer = sequence * (8 * wide + 4 * settings.intermediate_size) * 2
    logits = 2 * sequence * settings.vocab_size * 4  # with their gradient, in float32
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    connector = patches * 24 * config.vision_config.hidden_size * 4
    return inputs + layer + logits + connector


def hours(config: Config, stage: str, tflops: float, devices: int, mfu: float) -> float:
    """Returns the hours of one epoch of a stage; recomputed layers count as work."""
    rows, text = STAGES[stage]
    return rows * training_flops(config, text, stage == "stage 2") / (devices * tflops * 1e12 * mfu) / 3600


def elastic_lines(config: LlavaSTFConfig, sizes: list[int]) -> Iterator[str]:
    """Yields a Markdown table of what the modes of `token_budgets` take in stage 2, beside one number of tokens."""
    settings, text, way = recipe("finetune_elastic"), STAGES["stage 2"][1], WAYS[-1]
    rows = settings["per_device_train_batch_size"]
    each = [with_budget(config, size) for size in sizes]
    flops = [training_flops(one, text, True) for one in each]
    kept = [activations(one, text, way.residual) for one in each]
    alone = memory(each[0], way, 8, text)
    modes = {
        f"{sizes[0]} only": (sizes[0] + text, flops[0], alone),
        "`sample`": (sum(sizes) / len(sizes) + text, sum(flops) / len(flops), alone),
        "`all`": (sum(sizes) + len(sizes) * text, sum(flops), alone + rows * (sum(kept) - kept[0])),
    }
    ladder = ", ".join(map(str, sizes))
    yield f"| stage 2, tokens of a picture: {ladder} | tokens of a row | time | GB on each of 8 GPUs |"
    yield "| --- | --: | --: | --: |"
    for name, (tokens, work, needed) in modes.items():
        yield f"| {name} | {tokens:.0f} | {work / flops[0]:.2f} | {needed / 1e9:.0f} |"


def lines(config: Config, mfu: float) -> Iterator[str]:
    """Yields Markdown tables: GB on each GPU by way and number of GPUs, hours by GPU, and token budgets."""
    text, counts = STAGES["stage 2"][1], (1, 4, 8)
    yield f"| GB on each GPU | rows on each GPU | {' | '.join(f'{n} GPU(s)' for n in counts)} |"
    yield "| --- | --: |" + " --: |" * len(counts)
    for way in WAYS:
        tokens = STAGES["stage 1"][1] if way.recipe == "pretrain" else text
        numbers = [memory(config, way, n, tokens) / 1e9 for n in counts]
        rows = recipe(way.recipe)["per_device_train_batch_size"]
        yield f"| {way.name} | {rows} | {' | '.join(f'{number:.0f}' for number in numbers)} |"
    yield ""
    columns = [(stage, n) for stage in STAGES for n in counts]
    yield "| hours | memory, GB | " + " | ".join(f"{stage}, {n}" for stage, n in columns) + " |"
    yield "| --- | --: |" + " --: |" * len(columns)
    for name, (tflops, size) in GPUS.items():
        numbers = [hours(config, stage, tflops, n, mfu) for stage, n in columns]
        yield f"| {name} | {size} | {' | '.join(f'{number:.1f}' for number in numbers)} |"
    sizes = recipe("finetune_elastic")["token_budgets"]
    if isinstance(config, LlavaSTFConfig) and {*sizes} <= {*config.allowed_token_budgets}:
        yield ""
        yield from elastic_lines(config, sizes)
