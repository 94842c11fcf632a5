# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Compares the outputs of the systems of `benchmarks run` before they are measured; differences stop the run.

python -m benchmarks gate --device cuda --dtype float16    # compares only
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import machine, output
from benchmarks.reference import pooled, salient
from benchmarks.systems import EAGER, OURS, QUESTION, REFERENCE, STOCK, System, cast, cropped, eager_systems
from benchmarks.workloads import PLANS, SCORES, SIZES, reduced_cache

STEPS = 8
FLOAT32_ERROR = 1e-4  # relative to the largest number
COSINE = 0.998  # for results in a lower precision or of compiled systems; the whole 7B in bfloat16 has 0.9988


def eager(systems: dict[str, System], dtype: torch.dtype) -> dict[str, Any]:
    """Compares ours with the reference in float32, then casts all weights and compares ours with itself.

    Raises:
        SystemExit: if outputs differ.
    """
    ours, reference = systems[OURS], systems[REFERENCE]
    pixels = ours.pictures(2)
    one, both = pixels[:1], torch.stack(ours.vision(pixels))
    features = torch.stack(reference.vision(pixels))
    logits, tokens = greedy(ours, one)
    their_logits, their_tokens = greedy(reference, one)
    _, cached_tokens = greedy(ours, one, reuse=True)
    outcome = {
        "ours and reference, features of one picture: equal": torch.equal(
            torch.stack(ours.vision(one)), torch.stack(reference.vision(one))
        ),
        "ours and reference, features of two pictures: error": error(both, features),
        "ours and reference, logits: error": error(logits, their_logits),
        "ours and reference, tokens: equal": torch.equal(tokens, their_tokens),
        "picture in a cache or not, tokens: equal": torch.equal(tokens, cached_tokens),
    }
    for budget in ours.model.config.allowed_token_budgets[1:]:
        few = torch.stack(ours.with_budget(budget).vision(pixels))
        outcome[f"ours and reference, features of {budget} tokens: error"] = error(few, pooled(features, budget))
    for name in (STOCK, OURS):
        outcome |= reduced(systems[name], ours.model.config.allowed_token_budgets[1])
    cast(systems.values(), dtype)
    again, _ = greedy(ours, one.to(dtype), forced=tokens)
    outcome[f"ours, {str(dtype).removeprefix('torch.')} and float32, logits: cosine"] = cosine(again, logits)
    return checked(outcome)


def reduced(system: System, kept: int) -> dict[str, Any]:
    """Compares prompts whose picture keeps some tokens with whole prompts, in which the other places are masked."""
    ids, pixels, name = system.prompt(1, QUESTION), system.pictures(1), system.name
    every = system.reduced(ids, pixels, system.image_tokens, "salience")
    whole = system.forward(system.new_cache(1, QUESTION), inputs_embeds=system.embed(ids, pixels))
    prompts = {score: system.reduced(ids, pixels, kept, score) for score in SCORES}
    chosen = prompts["salience"]["inputs_embeds"][0, 1 : 1 + kept]
    expected = salient(system.vision(pixels)[0], kept)
    outcome = {
        f"{name}, all tokens kept, logits: error": error(system.forward(reduced_cache(system, kept), **every), whole),
        f"{name} and reference, {kept} tokens by salience: error": error(chosen, expected),
    }
    for score, inputs in prompts.items():
        logits = system.forward(reduced_cache(system, kept), **inputs)
        masked = system.forward(system.new_cache(1, QUESTION), **with_masked_places(inputs, ids.shape[1]))
        outcome[f"{name}, {kept} tokens by {score}, and the others masked, logits: error"] = error(logits, masked)
    return outcome


def with_masked_places(inputs: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Returns a prompt of `length` tokens with those of `inputs` at their positions, and the mask of the others."""
    embeddings, places = inputs["inputs_embeds"], inputs["position_ids"][0]
    whole = embeddings.new_zeros(1, length, embeddings.shape[-1])
    whole[:, places] = embeddings
    mask = places.new_zeros(1, length)
    mask[:, places] = 1
    return {
        "inputs_embeds": whole,
        "attention_mask": mask,
        "position_ids": torch.arange(length, device=mask.device)[None],
    }


def compiled(systems: dict[str, System]) -> dict[str, Any]:
    """Compares the compiled systems with the eager ones: features, and the logits of prefill, decoding and `generate`.

    Raises:
        SystemExit: if outputs differ.
    """
    outcome = {}
    for name, eager_name in EAGER.items():
        eager_system, system = systems[eager_name], systems[name]
        pixels = system.pictures(1)
        outcome[f"{name} and eager, features: cosine"] = cosine(
            torch.cat(system.vision(pixels)), torch.cat(eager_system.vision(pixels))
        )
        logits, tokens = greedy(system, pixels)
        outcome[f"{name} and eager, logits: cosine"] = cosine(logits, greedy(eager_system, pixels, forced=tokens)[0])
        cached, _ = greedy(system, pixels, reuse=True, forced=tokens)
        outcome[f"{name}, picture in a cache or not, logits: cosine"] = cosine(cached, logits)
        ids = system.prompt(1, QUESTION)
        answer = system.generate(system.new_cache(1, QUESTION), ids, STEPS, pixel_values=pixels)
        forced, logits = answer.sequences[:, ids.shape[1] :], torch.stack(answer.logits, dim=1)
        expected, _ = greedy(eager_system, pixels, forced=forced)
        outcome[f"{name} and eager, logits of generate: cosine"] = cosine(logits, expected)
        kept = systems[OURS].model.config.allowed_token_budgets[1]
        inputs = eager_system.reduced(ids, pixels, kept, "salience")  # for both: rounding may tip what is chosen
        outcome[f"{name} and eager, logits with {kept} tokens kept: cosine"] = cosine(
            *(one.forward(reduced_cache(one, kept), **inputs) for one in (system, eager_system))
        )
    return checked(outcome)


def greedy(
    system: System, pixels: torch.Tensor, reuse: bool = False, forced: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits (1, steps, vocabulary) and tokens (1, steps) of an answer.

    With `reuse` another question has filled the picture's part of the cache; `forced` gives the tokens of the answer.
    """
    ids = system.prompt(1, QUESTION)
    cache, inputs = system.new_cache(1, QUESTION), {"inputs_embeds": system.embed(ids, pixels)}
    if reuse:
        seen = 1 + system.image_tokens
        other = torch.cat([ids[:, :seen], ids[:, seen:].flip(1)], dim=1)
        system.forward(cache, inputs_embeds=system.embed(other, pixels))
        cache, inputs = cropped(cache, seen), {"input_ids": ids[:, seen:]}
    all_logits, tokens = [], []
    for step in range(STEPS):
        all_logits.append(system.forward(cache, **inputs).clone())
        tokens.append(all_logits[-1].argmax(-1, keepdim=True) if forced is None else forced[:, step : step + 1])
        inputs = {"input_ids": tokens[-1]}
    return torch.stack(all_logits, dim=1), torch.cat(tokens, dim=1)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference, relative to the largest number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the lowest cosine over all pairs of corresponding vectors."""
    return torch.cosine_similarity(found.double(), expected.double(), dim=-1).min().item()


def checked(outcome: dict[str, Any]) -> dict[str, Any]:
    passed = {"equal": lambda value: value is True, "error": lambda value: value < FLOAT32_ERROR}
    passed["cosine"] = lambda value: value > COSINE
    failed = {name: value for name, value in outcome.items() if not passed[name.rpartition(": ")[2]](value)}
    if failed:
        raise SystemExit(
            f"error: outputs differ, nothing is timed: {failed}. Expected equality, an error below {FLOAT32_ERROR}, "
            f"a cosine above {COSINE}."
        )
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cpu", help="default: cpu")
    parser.add_argument("--size", choices=PLANS, help="default: slice on cpu, 7b on cuda")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="default: bfloat16"
    )
    parser.add_argument("--output", type=Path, help="JSON to write; must not exist")
    options = parser.parse_args()
    output.require_absent(options.output, parser)
    machine.require(options.device, parser)
    torch.backends.cudnn.allow_tf32 = False  # comparisons in float32 really use float32
    size = options.size or SIZES[options.device]
    with torch.no_grad():
        outcome = eager(eager_systems(size, options.device), getattr(torch, options.dtype))
    result = {
        "device": machine.name(options.device),
        "size": size,
        "dtype": options.dtype,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "command": output.command("gate"),
        "gate": outcome,
    }
    if options.output is not None:
        output.write(result, options.output)
    print(json.dumps(result, indent=2))
