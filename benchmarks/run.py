# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Measures LLaVA-STF (144 tokens per picture), the stock LLaVA (576) and a plain port of the original's maths.

python -m benchmarks run --device cpu
python -m benchmarks run --device cuda
python -m benchmarks report    # puts the tables of all results into docs/speed.md

It writes a JSON file and a plot, and prints a table. Widths are those of the 7B and weights are random. On a CPU the
language model has only two of its layers: compare ratios, not times. On CUDA each shape of the 7B takes long to
compile: `--eager` leaves the compiled systems out. You may stop a run; the same command continues with the missing
rows. You may also time only some `--metrics`.
`train`, `load` and `serve` measure training steps, loading and serving.

The outputs are compared first; if they differ, nothing is timed. The systems take turns in one process. The first call
of a compiled system, which compiles, is measured separately.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from benchmarks import gate, machine, output, report
from benchmarks.systems import (
    ANSWER,
    EAGER,
    OURS,
    QUESTION,
    REFERENCE,
    STOCK,
    System,
    compile_system,
    eager_systems,
    fill,
)
from benchmarks.workloads import METRICS, PLANS, SIZES, Case, Plan, Work, cases
from modeling_llava_stf import LlavaSTFImageProcessor


def measure(case: Case, systems: dict[str, System], plan: Plan, device: str) -> dict[str, Any]:
    """Times the systems of a row in turns; records if the memory of the device is too small.

    Each turn also measures the peak that the row is compared with: a machine is not equally fast at all times.

    Raises:
        RuntimeError: if a timed call compiled something, or a compiled system runs without its CUDA graphs.
    """
    runs: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in case.systems}
    peak: dict[str, float] = {}
    for turn in range(plan.rounds):
        for kind, amount in (("flops", case.flops), ("bytes", case.bytes)):
            if amount is not None:
                peak[kind] = max(peak.get(kind, 0), machine.best(kind, device, plan.dtype, plan.product))
        for name, run in runs.items():
            if "error" in run:
                continue
            try:
                if device == "cuda":  # a process does not show memory that it uses again
                    machine.reset_peak(device)
                work = case.work(name, systems)
                if turn == 0:
                    run["first_call_seconds"] = machine.seconds(device, work)
                for _ in range(plan.warm_up):
                    work()
                graphs = _graphs()
                run["seconds"] += turn_of(work, plan, device)
                if device == "cuda":
                    run.setdefault("host_seconds", []).append(machine.host_seconds(device, work))
                    run["peak_bytes"] = machine.peak(device)  # includes the weights of all systems
                    run["clocks"] = machine.clocks()
                if _graphs() > graphs:
                    raise RuntimeError(
                        f"{case.metric}, batch {case.batch}: {name} was compiled again while it was timed."
                    )
                if torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]:
                    raise RuntimeError(f"{case.metric}, batch {case.batch}: {name} runs without CUDA graphs.")
            except torch.OutOfMemoryError:
                run |= {"error": "out of memory", "seconds": []}
            work = None
            machine.free(device)
    for name, run in runs.items():
        for kind, amount in (("flops", case.flops), ("bytes", case.bytes)):
            if amount is not None and name != REFERENCE:
                run[kind] = amount(systems[name])
    return case.row | {"systems": runs, "peak": peak}


def turn_of(work: Work, plan: Plan, device: str) -> list[float]:
    """Returns the seconds of the calls of a turn."""
    seconds: list[float] = []
    while len(seconds) < plan.repeats or (sum(seconds) < plan.turn_seconds and len(seconds) < ANSWER):
        seconds.append(machine.seconds(device, work))
    return seconds


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def memory(systems: dict[str, System], device: str, batch: int) -> dict[str, dict[str, int]]:
    """Returns the bytes of the vision side for `batch` pictures: kept hidden states, and the peak above the weights."""
    result = {}
    for name in (STOCK, REFERENCE, OURS):
        system, kept = systems[name], []
        pixels = system.pictures(batch)
        machine.free(device)
        machine.reset_peak(device)
        before = machine.used(device)
        with system.tower.register_forward_hook(lambda _, args, out, kept=kept: kept.append(_bytes(out.hidden_states))):
            system.vision(pixels)
        result[name] = {
            "batch": batch,
            "hidden_states_bytes": sum(kept) // batch,
            "peak_bytes": machine.peak(device) - before,
        }
    return result


def _bytes(states: tuple[torch.Tensor | None, ...]) -> int:
    return sum(state.nbytes for state in states if state is not None)


def largest_batch(system: System) -> int:
    """Returns how many sequences (picture, 50 tokens, answer of 16) fit into memory, at most 31 too few."""
    length = system.image_tokens + QUESTION + ANSWER

    def fits(batch: int) -> bool:
        machine.free("cuda")
        try:
            cache = fill(system.new_cache(batch, QUESTION), system, batch, length - 1)
            system.forward(cache, input_ids=torch.full((batch, 1), 5, device=system.model.device))
        except torch.OutOfMemoryError:
            return False
        return True

    low, high = 0, 2048
    while high - low > 32:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    machine.free("cuda")
    return low


def processor_seconds(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Times the preprocessing of one picture by its size, and of eight pictures with a thread for each core."""
    process = LlavaSTFImageProcessor()
    stock = LlavaImageProcessorPil(size=process.size, crop_size=process.crop_size, do_pad=True)
    result = {}
    for width, height in ((640, 480), (1920, 1080)):
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            works = {
                "stock, one": partial(stock, picture, return_tensors="pt"),
                "one": partial(process, picture, return_tensors="pt"),
                "eight": lambda picture=picture: [process(picture) for _ in range(8)],
                "eight, threads": lambda picture=picture, threads=threads: list(threads.map(process, [picture] * 8)),
            }
            result[f"{width} x {height}"] = {
                name: [machine.seconds("cpu", work) for _ in range(rounds)] for name, work in works.items()
            }
    return result


def conditions(device: str, size: str) -> dict[str, Any]:
    """Returns the conditions that the numbers of a result depend on."""
    return {
        "device": machine.name(device),
        "threads": torch.get_num_threads(),
        "size": size,
        "dtype": str(PLANS[size].dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, transformers)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cpu", help="default: cpu")
    parser.add_argument("--size", choices=PLANS, help="default: slice on a CPU, 7b on CUDA")
    parser.add_argument("--rounds", type=int, help="turns of each system (default: set by the size)")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=METRICS, help="metrics to time (default: all)")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled systems")
    parser.add_argument("--output", type=Path, help="JSON to write; must not exist (default: results/run_DEVICE.json)")
    options = parser.parse_args()
    out = options.output or report.RESULTS / f"run_{options.device}.json"
    output.require_absent(out, parser)
    machine.require(options.device, parser)
    size = options.size or SIZES[options.device]
    plan = PLANS[size] if options.rounds is None else replace(PLANS[size], rounds=options.rounds)
    partial_out = out.with_suffix(
        ".unfinished"
    )  # the suffix is not .json, because `report.py` would read it as a result
    found = {**conditions(options.device, size), "rounds": plan.rounds, "eager": options.eager}
    kept = json.loads(partial_out.read_text(encoding="utf-8")) if partial_out.exists() else {"cases": []}
    others = [f"{name} {kept[name]}" for name in found if kept.get(name, found[name]) != found[name]]
    if others:
        parser.error(f"{partial_out} was measured with {', '.join(others)}: move it away, or measure the rest so, too")
    result: dict[str, Any] = {
        **found,
        "command": output.command("run"),
        "cases": kept["cases"],
    }
    torch.backends.cudnn.allow_tf32 = False  # the gate's comparison in float32 really uses float32
    started = time.perf_counter()
    try:
        with torch.no_grad():
            for part in run(size, plan, options.device, options.metrics, options.eager, kept["cases"]):
                result.update(part)
                result["total_seconds"] = kept.get("total_seconds", 0) + time.perf_counter() - started
                output.write(result, partial_out)
    except BaseException:
        if partial_out.exists():
            print(f"stopped; results so far are in {partial_out}; run the same command again to continue")
        raise
    partial_out.replace(out)
    print("\n".join(report.tables(result)))
    print(f"{out} is written, {result['total_seconds']:.0f} s")
    report.draw(result, out.with_suffix(".png"))


def run(
    size: str, plan: Plan, device: str, metrics: Sequence[str], eager: bool, kept: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Runs all parts, except the cases `kept` from a stopped run; each part is a field of the result."""
    systems = eager_systems(size, device)
    outcome = gate.eager(systems, plan.dtype)
    print(f"gate: {outcome}", flush=True)
    yield {"gate": outcome}
    yield {"memory": memory(systems, device, max(plan.images))}
    if device == "cuda":  # comes before CUDA graphs reserve memory
        yield {"largest_batch": {name: largest_batch(systems[name]) for name in (STOCK, OURS)}}
    if not eager:
        yield compiled(systems, plan, device, outcome)
    yield {"processor": processor_seconds(plan.rounds)}
    measured = list(kept)
    done = {_key(case) for case in kept}
    order = [case.key for case in cases(plan)]
    todo = [case for case in cases(plan, eager) if case.metric in metrics and case.key not in done]
    todo.sort(key=lambda case: not case.wanted_first)  # the run may be stopped here
    for position, case in enumerate(todo):
        measured.append(measure(case, systems, plan, device))
        print(f"[{position + 1}/{len(todo)}] {_line(measured[-1])}", flush=True)
        yield {"cases": sorted(measured, key=lambda row: order.index(_key(row)))}


def compiled(systems: dict[str, System], plan: Plan, device: str, outcome: dict[str, Any]) -> dict[str, Any]:
    """Adds the compiled systems and compares them with the eager ones; returns fields of the result."""
    for name, eager in EAGER.items():
        systems[name] = compile_system(systems[eager], name, **plan.compile_options(device))
    started = time.perf_counter()
    found = gate.compiled(systems)
    compiling = {
        "seconds": time.perf_counter() - started,
        "kernels_from_disk": torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"],
    }
    print(f"gate, compiled: {found}, {compiling['seconds']:.0f} s", flush=True)
    return {"gate": outcome | found, "compiling": compiling}


def _key(measured: dict[str, Any]) -> tuple:
    return measured["metric"], measured["batch"], measured["text"], report.tokens(measured)


def _line(measured: dict[str, Any]) -> str:
    times = [
        f"{name} {run.get('error') or format(1e3 * median(run['seconds']), '.1f') + ' ms'}"
        for name, run in measured["systems"].items()
    ]
    return f"{report.label(measured)}: {', '.join(times)}"
