# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What the two pre-trainings share: optimiser, schedule, progress and log."""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARMUP = 0.03  # of the steps
LOG_EVERY = 20  # steps


def train(
    parameters: Iterable[nn.Parameter], loss: Callable[[], torch.Tensor], steps: int, learning_rate: float, name: str
) -> list[dict]:
    """Minimises what `loss` returns for the batch that it draws: AdamW, warmup, then half a cosine to zero.

    Returns:
        The log: step, seconds since the start and mean loss since the last entry.
    """
    parameters = list(parameters)
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    log: list[dict] = []
    losses: list[float] = []
    start = time.perf_counter()
    progress = tqdm(range(1, steps + 1), desc=name, unit="step")
    for step in progress:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
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


def save_log(folder: Path, settings: dict, log: list[dict]) -> None:
    record = {"settings": settings, "device": DEVICE, "threads": torch.get_num_threads(), "log": log}
    (folder / "training_log.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
