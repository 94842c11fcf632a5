# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Counts FLOPs, bytes and the roofline of LLaVA-STF and the stock LLaVA from their configs.

python -m benchmarks count [CONFIG ...] [--text 50] [--answer 16] [--tflops 790] [--bandwidth 4.3]
python -m benchmarks count stf-7b --max-soft-tokens 144 36 9 1    # by the tokens that a picture has
python -m benchmarks count stf-7b --training [--mfu 0.4]    # memory and hours of training

CONFIG is a checkpoint's folder, or one of the names below; models whose layers are not those of CLIP and Llama are
refused. One multiply-add is two FLOPs, attention is causal, the head is computed for the last token only, and each
number of weights and cache takes two bytes. The roofline is the larger of compute and memory traffic for each
component. It leaves out norms, softmax, activations and kernel launches.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from conversion import fusion
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration

BYTES = 2  # bytes of a number in bfloat16
Config = LlavaSTFConfig | LlavaConfig


def _vicuna(size: str) -> LlamaConfig:
    if size == "7b":
        return LlamaConfig(vocab_size=32001)
    return LlamaConfig(
        vocab_size=32001, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    )


def clip(layers: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )


NAMED: dict[str, Callable[[], Config]] = {
    "llava-1.5-7b": lambda: LlavaConfig(vision_config=clip(24), text_config=_vicuna("7b")),
    "stf-7b": lambda: LlavaSTFConfig(vision_config=clip(23), text_config=_vicuna("7b")),
    "llava-1.5-13b": lambda: LlavaConfig(vision_config=clip(24), text_config=_vicuna("13b")),
    "stf-13b": lambda: LlavaSTFConfig(
        vision_config=clip(23), text_config=_vicuna("13b"), spatial_fusion_hidden_size=20 * 1024
    ),
}


@dataclass(frozen=True)
class Part:
    """Describes a component: FLOPs of one image or sequence, and weights, which a batch reads once."""

    name: str
    flops: float
    weights: int

    def seconds(self, batch: int, tflops: float, bandwidth: float) -> float:
        return max(self.flops * batch / (tflops * 1e12), self.weights * BYTES / (bandwidth * 1e12))


def image_tokens(config: Config) -> int:
    """Returns the tokens of an image in the language model."""
    if isinstance(config, LlavaSTFConfig):
        return config.image_seq_length  # `with_budget` sets it
    keeps_class = config.vision_feature_select_strategy == "full"
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + keeps_class


def with_budget(config: LlavaSTFConfig, tokens: int) -> LlavaSTFConfig:
    """Returns a copy of the config for pictures of `tokens` tokens; raises a `ValueError` if that is not allowed."""
    if tokens not in config.allowed_token_budgets:
        raise ValueError(f"A picture cannot have {tokens} tokens, expected one of {config.allowed_token_budgets}.")
    config = copy.deepcopy(config)
    config.image_seq_length = tokens
    return config


def vision_parts(config: Config) -> list[Part]:
    """Counts tower and connector for one image."""
    vision = config.vision_config
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    per_layer = 4 * width**2 + 2 * width * vision.intermediate_size
    embedding = vision.num_channels * vision.patch_size**2 * width
    # The stock LLaVA of transformers runs every layer; ours stops at the last tap.
    layers = max(config.taps) if isinstance(config, LlavaSTFConfig) else vision.num_hidden_layers
    sequence = patches + 1  # includes the class token
    attention = 2 * sequence**2 * width
    tower = 2 * (patches * embedding + layers * (sequence * per_layer + attention))
    parts = [Part("vision tower", tower, embedding + vision.num_hidden_layers * per_layer)]
    text_width = config.text_config.hidden_size
    if isinstance(config, LlavaSTFConfig):
        return [*parts, *_fusion_parts(config)]
    taps = config.vision_feature_layer
    projector = width * (1 if isinstance(taps, int) else len(taps)) * text_width + text_width**2
    return [*parts, Part("projector", 2 * image_tokens(config) * projector, projector)]


def _fusion_parts(config: LlavaSTFConfig) -> list[Part]:
    layers = fusion.counted(config)
    parts = []
    for name, module in (("MBTF", "block_fusion"), ("STF", "spatial_fusion")):
        inside = {key: layer for key, layer in layers.items() if key.startswith(module)}
        # Tokens are averaged before the last layer, which then has fewer rows.
        rows = {key: image_tokens(config) if key == "spatial_fusion.linear_2" else inside[key].rows for key in inside}
        flops = 2 * sum(rows[key] * layer.weights for key, layer in inside.items())
        parts.append(Part(name, flops, sum(layer.weights for layer in inside.values())))
    return parts


def head_size(config: Config) -> int:
    """Returns the channels of an attention head of the language model."""
    text = config.text_config
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def decoder_weights(config: Config) -> int:
    """Counts the weights in the linear layers of the language model, without embedding and head."""
    text = config.text_config
    attention = 2 * text.hidden_size * head_size(config) * (text.num_attention_heads + text.num_key_value_heads)
    return text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def head_weights(config: Config) -> int:
    return config.text_config.hidden_size * config.text_config.vocab_size


def table_weights(config: Config) -> int:
    """Counts the weights of embedding and head, which may be one table."""
    is_tied = config.tie_word_embeddings or config.text_config.tie_word_embeddings
    return head_weights(config) * (1 if is_tied else 2)


def prefill(config: Config, text: int, heads: int = 1) -> Part:
    """Counts the language model for an image and `text` tokens, with the head for `heads` of them."""
    sequence = image_tokens(config) + text
    settings = config.text_config
    width = head_size(config) * settings.num_attention_heads
    attention = sequence**2 * width * settings.num_hidden_layers  # causal: half of the square, for two products
    linear = sequence * decoder_weights(config) + heads * head_weights(config)
    return Part("language model", 2 * (linear + attention), decoder_weights(config) + head_weights(config))


def first_token(config: Config, text: int) -> list[Part]:
    """Returns all components up to the first token."""
    return [*vision_parts(config), prefill(config, text)]


def cache_bytes(config: Config, text: int) -> int:
    """Returns the bytes of the key-value cache for an image and `text` tokens."""
    settings = config.text_config
    per_token = 2 * settings.num_hidden_layers * settings.num_key_value_heads * head_size(config) * BYTES
    return per_token * (image_tokens(config) + text)


def decode_seconds(config: Config, context: int, batch: int, tflops: float, bandwidth: float) -> float:
    """Returns the time of a decoding step of `batch` sequences with an image and `context` other tokens."""
    weights = decoder_weights(config) + head_weights(config)
    traffic = weights * BYTES + batch * cache_bytes(config, context)
    return max(2 * weights * batch / (tflops * 1e12), traffic / (bandwidth * 1e12))


def training_flops(config: Config, text: int, decoder_learns: bool) -> float:
    """Counts a training step on one row, with gradient checkpointing of the language model and a frozen tower."""
    tower, *connector = vision_parts(config)
    sequence = prefill(config, text, heads=image_tokens(config) + text).flops
    # Forward, forward again, gradient of the inputs, and gradient of the weights if they are trained.
    return tower.flops + 3 * sum(part.flops for part in connector) + (3 + decoder_learns) * sequence


def weight_bytes(config: Config) -> int:
    """Returns the bytes of all matrices, including the embeddings, without norms, biases and positions."""
    parts = sum(part.weights for part in vision_parts(config))
    return BYTES * (parts + decoder_weights(config) + table_weights(config))


def rows(configs: dict[str, Config], options: argparse.Namespace) -> list[tuple[str, list[float]]]:
    """Yields the rows of the table: what is counted, and its number for each config."""
    text, answer = options.text, options.answer
    table: list[tuple[str, list[float]]] = []

    def add(name: str, of: Callable[[Config], float]) -> None:
        table.append((name, [of(config) for config in configs.values()]))

    add("tokens of an image", image_tokens)
    for name in ("vision tower", "projector", "MBTF", "STF", "language model"):
        add(f"GFLOP, {name}", lambda config, name=name: _sum(first_token(config, text), name) / 1e9)
    add("GFLOP to the first token", lambda config: sum(part.flops for part in first_token(config, text)) / 1e9)
    add("GB of weights", lambda config: weight_bytes(config) / 1e9)
    add("KV KiB a token", lambda config: (cache_bytes(config, 1) - cache_bytes(config, 0)) / 1024)
    add(f"KV MB, image + {text} + {answer}", lambda config: cache_bytes(config, text + answer) / 1e6)
    add("training TFLOP, full fine-tune", lambda config: training_flops(config, text, True) / 1e12)
    add("training TFLOP, connector only", lambda config: training_flops(config, text, False) / 1e12)
    for batch in options.batch:
        first = partial(first_seconds, batch=batch, options=options)
        step = partial(step_seconds, batch=batch, options=options)
        add(f"roofline: first token, ms, batch {batch}", lambda config, first=first: 1e3 * first(config))
        add(f"roofline: tokens/s in decoding, batch {batch}", lambda config, b=batch, step=step: b / step(config))
        add(
            f"roofline: requests/s, {text} in {answer} out, batch {batch}",
            lambda config, b=batch, first=first, step=step: b / (first(config) + (answer - 1) * step(config)),
        )
    return table


def first_seconds(config: Config, batch: int, options: argparse.Namespace) -> float:
    return sum(part.seconds(batch, options.tflops, options.bandwidth) for part in first_token(config, options.text))


def step_seconds(config: Config, batch: int, options: argparse.Namespace) -> float:
    """Returns the time of a decoding step in the middle of the answer."""
    return decode_seconds(config, options.text + options.answer // 2, batch, options.tflops, options.bandwidth)


def _sum(parts: list[Part], name: str) -> float:
    return sum(part.flops for part in parts if part.name == name)


def read_all(names: list[str], budgets: list[int]) -> dict[str, Config]:
    """Returns the configs by their names; LLaVA-STF's once for each number of tokens that it allows."""
    configs: dict[str, Config] = {}
    found = {name: read(name) for name in names}
    if budgets and not any(isinstance(config, LlavaSTFConfig) for config in found.values()):
        raise SystemExit(f"error: --max-soft-tokens is for LLaVA-STF, found only {', '.join(names)}: leave it out.")
    for name, config in found.items():
        if not (budgets and isinstance(config, LlavaSTFConfig)):
            configs[name] = config
            continue
        try:
            configs |= {f"{name}, {tokens} tokens": with_budget(config, tokens) for tokens in budgets}
        except ValueError as error:
            raise SystemExit(f"error: {name}: {error}") from error
    return configs


def read(name: str) -> Config:
    if name in NAMED:
        return NAMED[name]()
    if not (Path(name) / "config.json").is_file():
        raise SystemExit(f"error: {name} is no folder of a checkpoint, and none of {', '.join(NAMED)}")
    try:
        config: Any = AutoConfig.from_pretrained(name)
        if not isinstance(config, LlavaSTFConfig | LlavaConfig):
            raise ValueError(f"it is a {config.model_type}, expected llava_stf or llava")
        refuse_uncounted(config)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {name}: {' '.join(str(error).split())}") from error
    if getattr(config, "quantization_config", None):
        print(f"note: {name} is quantised, and is counted as the 16-bit model that it was made from", file=sys.stderr)
    return config


def refuse_uncounted(config: Config) -> None:
    """Raises a `ValueError` for a model whose layers are not those that are counted: CLIP's and Llama's."""
    tower, text = config.vision_config.model_type, config.text_config.model_type
    if tower != "clip_vision_model":
        raise ValueError(f"its vision tower is a {tower}, expected a clip_vision_model: others are not counted.")
    kind = LlavaSTFForConditionalGeneration if isinstance(config, LlavaSTFConfig) else LlavaForConditionalGeneration
    try:
        with torch.device("meta"):
            network = kind(copy.deepcopy(config))
        counted = weight_bytes(config) // BYTES
    except AttributeError as error:
        raise ValueError(f"its language model, a {text}, is not made as Llama: {error}") from error
    weights = sum(w.numel() for name, w in network.named_parameters() if w.ndim > 1 and "position" not in name)
    if counted != weights:
        raise ValueError(
            f"its matrices have {weights:,} weights, and {counted:,} would be counted: the layers of its "
            f"language model, a {text}, are not those of Llama."
        )


def main() -> None:
    from benchmarks import training_needs  # it counts with the functions above

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "configs", nargs="*", default=["llava-1.5-7b", "stf-7b"], metavar="CONFIG", help=", ".join(NAMED)
    )
    parser.add_argument(
        "--max-soft-tokens", type=int, nargs="+", default=[], help="tokens of a picture, for LLaVA-STF (default: all)"
    )
    parser.add_argument("--text", type=_whole(0), default=50, help="text tokens of the prompt (default: 50)")
    parser.add_argument("--answer", type=_whole(1), default=16, help="tokens of the answer (default: 16)")
    parser.add_argument("--batch", type=_whole(1), nargs="+", default=[1, 8, 32, 128], help="default: 1 8 32 128")
    parser.add_argument(
        "--tflops",
        type=_positive,
        default=790,
        help="peak of the device in bfloat16 (default: 790, a matrix product on an H200; its vendor says 989)",
    )
    parser.add_argument(
        "--bandwidth",
        type=_positive,
        default=4.3,
        help="memory bandwidth in TB/s (default: 4.3, a sum on an H200; its vendor says 4.8)",
    )
    parser.add_argument(
        "--training", action="store_true", help="print memory and hours of training instead of inference"
    )
    parser.add_argument(
        "--mfu", type=_positive, default=0.4, help="assumed share of the peak in training (default: 0.4)"
    )
    options = parser.parse_args()
    others = ("text", "answer", "batch", "tflops", "bandwidth") if options.training else ("mfu",)
    for name in others:
        if getattr(options, name) != parser.get_default(name):
            how = "with --training, which has rows and GPUs of its own" if options.training else "without --training"
            parser.error(f"--{name.replace('_', '-')} does not act {how}: leave it out")
    configs = read_all(options.configs, options.max_soft_tokens)
    if options.training:
        for name, config in configs.items():
            print(f"{name}:\n\n" + "\n".join(training_needs.lines(config, options.mfu)) + "\n")
        return
    print("| |" + "".join(f" {name} |" for name in configs))
    print("| --- |" + " --: |" * len(configs))
    for name, numbers in rows(configs, options):
        print(f"| {name} |" + "".join(f" {number:,.{_digits(number)}f} |" for number in numbers))


def _whole(least: int) -> Callable[[str], int]:
    """Returns the type of an option that is a whole number and not below `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text}, expected {least} or more")
        return int(text)

    return number


def _positive(text: str) -> float:
    """Is the type of an option that is a number above zero."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"found {text}, expected a number above zero")
    return float(text)


def _digits(number: float) -> int:
    if 0 < number < 0.1:
        return 1 - math.floor(math.log10(number))
    return 0 if number >= 1000 or number == int(number) else 1 if number >= 100 else 2
