# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a module, for both pre-trainings: optimiser, schedule, progress and log."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARMUP = 0.03  # share of the steps
LOG_EVERY = 20  # steps between two entries of the log


def train(
    model: nn.Module,
    loss: Callable[[], torch.Tensor],
    steps: int,
    muon_rates: dict[str, float],
    adam_rate: float,
    name: str,
) -> list[dict]:
    """Minimises what `loss` returns for the batch that it draws, with a warmup and half a cosine to zero.

    [`optimizer_of`] says what the rates are for. The weights are float32, products of matrices are computed in
    bfloat16.

    Returns:
        The log with step, seconds since the start, and mean loss since the last entry.
    """
    optimizer = optimizer_of(model, muon_rates, adam_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    log: list[dict] = []
    losses: list[float] = []
    start = time.perf_counter()
    progress = tqdm(range(1, steps + 1), desc=name, unit="step")
    for step in progress:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            value = loss()
        model.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        if step % LOG_EVERY == 0 or step == steps:
            mean = sum(losses) / len(losses)
            log.append({"step": step, "seconds": round(time.perf_counter() - start, 1), "loss": round(mean, 4)})
            progress.set_postfix(loss=f"{mean:.3f}")
            losses.clear()
    return log


def _rate(done: float) -> float:
    return min((done + 1e-3) / WARMUP, 0.5 * (1 + math.cos(math.pi * done)))


class MuonAndAdamW(torch.optim.Optimizer):
    """Steps Muon and AdamW as one optimizer: a schedule finds the groups of both, a checkpoint the state of both."""

    def __init__(self, muon: torch.optim.Muon, adam: torch.optim.AdamW):
        self.parts = (muon, adam)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:
        """Steps both; `closure` is there because torch's optimizers have it, and is not called."""
        for part in self.parts:
            # Loading a state, which accelerate does at the start, makes new dictionaries.
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if part.defaults.keys() <= group.keys()]
            part.step()


def optimizer_of(model: nn.Module, muon_rates: dict[str, float], adam_rate: float) -> MuonAndAdamW:
    """Builds the optimizer for what is trained of a model.

    Muon (https://kellerjordan.github.io/posts/muon) optimises the matrices of linear layers, at the rate of the first
    part of `muon_rates` that is in their names: in short trainings everything learns several times as fast as with
    AdamW. AdamW optimises all else: embeddings, heads, vectors, convolutions, and learned tokens and positions.
    """
    matrices: dict[str, list[nn.Parameter]] = {part: [] for part in muon_rates}
    others = []
    for key, weight in model.named_parameters():
        is_matrix = weight.ndim == 2 and key.endswith("weight")
        part = next((part for part in muon_rates if part in key and is_matrix), None)
        if weight.requires_grad:
            (others if part is None else matrices[part]).append(weight)
    groups = [{"params": weights, "lr": muon_rates[part]} for part, weights in matrices.items()]
    adam = torch.optim.AdamW([{"params": others}], lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return MuonAndAdamW(torch.optim.Muon(groups, weight_decay=0.05), adam)


def save_log(folder: Path, settings: dict, log: list[dict], **results: dict) -> None:
    record = {"settings": settings, "device": DEVICE, "threads": torch.get_num_threads(), **results, "log": log}
    (folder / "training_log.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
