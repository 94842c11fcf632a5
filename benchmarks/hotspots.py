# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Profiles one row of `benchmarks run`: lists its operators (on CUDA its kernels) by the time that they take.

python -m benchmarks hotspots encode --batch 8 [--system ours] [--device cuda] [--output FILE]

The profiler itself takes time: compare the shares, not the milliseconds.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine, output
from benchmarks.report import SYSTEMS, label
from benchmarks.run import conditions
from benchmarks.systems import EAGER, OURS, WHOLE, cast, compile_system, eager_systems
from benchmarks.workloads import METRICS, PLANS, SIZES, Case, Work, cases


def hotspots(work: Work, device: str) -> list[dict[str, Any]]:
    """Returns name, calls, milliseconds and share of each operator or kernel, the longest first."""
    for _ in range(3):
        work()
    machine.wait(device)
    activity, kind = {
        "cpu": (ProfilerActivity.CPU, DeviceType.CPU),
        "cuda": (ProfilerActivity.CUDA, DeviceType.CUDA),
    }[device]
    with profile(activities=[activity]) as profiler:
        work()
        machine.wait(device)
    times = {
        event.key: (event.count, event.self_cpu_time_total if device == "cpu" else event.self_device_time_total)
        for event in profiler.key_averages()
        if event.device_type == kind
    }
    total = sum(microseconds for _, microseconds in times.values())
    return [
        {"name": name, "calls": calls, "milliseconds": microseconds / 1e3, "share": microseconds / total}
        for name, (calls, microseconds) in sorted(times.items(), key=lambda item: -item[1][1])
    ]


def choose(rows: list[Case], metric: str, batch: int, text: int | None, system: str) -> Case:
    """Returns the row with this metric, batch and system; without `text` the first one."""
    of_system = [case for case in rows if case.metric == metric and system in case.systems]
    for case in of_system:
        if case.batch == batch and text in (None, case.text):
            return case
    there = ", ".join(f"batch {case.batch} with text {case.text}" for case in of_system)
    raise SystemExit(f"error: run.py times no such {metric} of {system}; it times: {there or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metric", choices=METRICS, help="what is profiled")
    parser.add_argument("--batch", type=int, default=1, help="batch size of the row (default: 1)")
    parser.add_argument("--text", type=int, help="text tokens of the row (default: those of the first row)")
    parser.add_argument("--system", choices=(*SYSTEMS, *WHOLE), default=OURS, help=f"default: {OURS}")
    parser.add_argument("--device", choices=SIZES, default="cpu", help="default: cpu")
    parser.add_argument("--size", choices=PLANS, help="default: slice on a CPU, 7b on CUDA")
    parser.add_argument("--rows", type=int, default=12, help="number of operators to print (default: 12)")
    parser.add_argument("--output", type=Path, help="JSON to write; must not exist")
    options = parser.parse_args()
    output.require_absent(options.output, parser)
    machine.require(options.device, parser)
    size = options.size or SIZES[options.device]
    plan = PLANS[size]
    case = choose(list(cases(plan)), options.metric, options.batch, options.text, options.system)
    with torch.no_grad():
        systems = eager_systems(size, options.device)
        cast(systems.values(), plan.dtype)
        name = WHOLE.get(options.system, options.system)
        if name in EAGER:
            systems[name] = compile_system(systems[EAGER[name]], name, **plan.compile_options(options.device))
        found = hotspots(case.work(options.system, systems), options.device)
    print(f"{label(case.row)}, {options.system}\n")
    print("| operator | calls | ms | share |\n| --- | --: | --: | --: |")
    for spot in found[: options.rows]:
        print(f"| {spot['name'][:80]} | {spot['calls']} | {spot['milliseconds']:.1f} | {spot['share']:.1%} |")
    if options.output is not None:
        result = {
            **conditions(options.device, size),
            "row": case.row | {"system": options.system},
            "command": output.command("hotspots"),
            "hotspots": found,
        }
        output.write(result, options.output)
