# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Compares a converted checkpoint's logits with recorded ones."""

from pathlib import Path

import torch

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration

from .checkpoints.weights import read_file, read_json
from .keys import ConversionError

TOLERANCE = 1e-4
Case = dict[str, torch.Tensor]


def check_logits(folder: Path, adapter: Path | None, outputs: Path) -> str:
    """Runs the checkpoint in float32 and compares.

    Args:
        folder: the converted model.
        adapter: a PEFT adapter to put on it.
        outputs: a safetensors file. Either one recorded case: `input_ids` (1, sequence) with expanded image tokens,
            `pixel_values`, `logits` (1, sequence, vocabulary). Or a goldens.safetensors with its goldens.json beside
            it: its cases with one image are taken, and one of its checkpoints must be this one.

    Returns:
        A line that says what was compared.

    Raises:
        ConversionError: if the logits differ by more than 1e-4, or there is nothing to compare.
    """
    model = LlavaSTFForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    checkpoints = _recorded(outputs, model.config)
    errors = {name: max(_error(model, case) for case in cases) for name, cases in checkpoints.items()}
    best = min(errors, key=lambda name: errors[name])
    if not errors[best] <= TOLERANCE:
        raise ConversionError(
            f"The logits differ from those in {outputs} by {errors[best]:.2e} (allowed: {TOLERANCE})."
        )
    return f"verified: logits equal those of {best!r} in {outputs} (largest difference {errors[best]:.1e})"


def _error(model: torch.nn.Module, case: Case) -> float:
    expected = case["logits"]
    with torch.no_grad():
        logits = model(input_ids=case["input_ids"], pixel_values=case["pixel_values"]).logits
    return (logits[..., : expected.shape[-1]] - expected).abs().max().item()


def _recorded(outputs: Path, config: LlavaSTFConfig) -> dict[str, list[Case]]:
    """Recorded cases by the name of their checkpoint."""
    tensors = {name: weight.load() for name, weight in read_file(outputs).items()}
    if {"input_ids", "pixel_values", "logits"} <= tensors.keys():
        return {outputs.stem: [tensors]}
    goldens = read_json(outputs.with_suffix(".json"))
    if not goldens.keys() >= {"images", "forward", "image_token_id"}:
        raise ConversionError(f"{outputs} has no `input_ids`, `pixel_values` and `logits`, and is no file of goldens.")
    pixels = dict(zip(goldens["images"]["files"], tensors["pixel_values.pad"], strict=True))
    checkpoints: dict[str, list[Case]] = {}
    for case in goldens["forward"]:
        if len(case["images"]) != 1 or str(case["images"][0]) not in pixels or case["truncated_to"]:
            continue
        ids = tensors[f"forward.{case['name']}.input_ids"][0]
        is_image = ids == goldens["image_token_id"]
        ids = torch.where(is_image, config.image_token_id, ids)
        ids = ids.repeat_interleave(torch.where(is_image, config.tokens_per_image, 1))
        recorded = {
            "input_ids": ids[None],
            "pixel_values": pixels[case["images"][0]][None],
            "logits": tensors[f"forward.{case['name']}.logits"],
        }
        checkpoints.setdefault(case["checkpoint"], []).append(recorded)
    return checkpoints
