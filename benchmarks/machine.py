# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Measures the machine itself: its name, its clock, its memory and its peak speed."""

import argparse
import ctypes
import gc
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def require(device: str, parser: argparse.ArgumentParser) -> None:
    """Ends the command if there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here: run with --device cpu, or with a CUDA build of PyTorch")


def name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def seconds(device: str, work: Callable[[], object]) -> float:
    """Returns the seconds of `work`; the device is idle before and after."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def host_seconds(device: str, work: Callable[[], object]) -> float:
    """Returns the seconds that the host needs to launch `work` on an idle device."""
    wait(device)
    started = time.perf_counter()
    work()
    busy = time.perf_counter() - started
    wait(device)
    return busy


def clocks() -> str:
    """Returns clocks, power and temperature of the GPU now, if the driver reports them."""
    gpu = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    fields = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        command = ["nvidia-smi", gpu, fields, "--format=csv,noheader"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Frees unused memory of the device."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory counts as used until the C library returns it
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Returns the peak of the memory in bytes since `reset_peak`, of the device or the process."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def used(device: str) -> int:
    """Returns the memory in use in bytes, of the device or the process."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def _status(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def best(kind: str, device: str, dtype: torch.dtype, product: int) -> float:
    """Returns the peak of the device: `flops` or `bytes` a second."""
    return best_flops(device, dtype, product) if kind == "flops" else best_bandwidth(device)


def best_flops(device: str, dtype: torch.dtype, size: int) -> float:
    """Returns the FLOP/s of the product of two square matrices, the best of three."""
    factor = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(device, lambda: factor @ factor) for _ in range(3))


def best_bandwidth(device: str) -> float:
    """Returns the bytes/s that a sum reads from memory, the best of three."""
    block = torch.ones(2**28 if device == "cpu" else 2**32, device=device, dtype=torch.int8).view(torch.float32)
    return block.nbytes / min(seconds(device, block.sum) for _ in range(3))
