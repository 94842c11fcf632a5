# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Runs everything that needs CUDA within the given minutes, the most important first.

python -m benchmarks gpu --minutes 25
python -m benchmarks gpu --minutes 10 --device cpu --size tiny --output FOLDER    # a rehearsal of the same code

Each step runs in its own process and writes a JSON file. Run the same command again to continue: it skips steps that
have their file. `run` continues at the missing rows, other steps start again. A failed step does not stop the others.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks import machine, output
from benchmarks.report import RESULTS
from benchmarks.workloads import SIZES

ROOT = Path(__file__).resolve().parents[1]
GRACE = 30  # seconds for a step that is out of time to write its results so far


@dataclass(frozen=True)
class Step:
    """Holds the command after `python -m`, and the file that it writes when it is done."""

    command: tuple[str, ...]
    result: Path


def steps(device: str, size: str, folder: Path) -> Iterator[Step]:
    """Yields the steps, the most important first."""
    shape = ("--device", device, "--size", size)

    def measured(name: str, *command: str) -> Step:
        result = folder / f"{name}_{device}.json"
        return Step(("benchmarks", *command, "--output", str(result)), result)

    # On a CPU, one test file that needs no CUDA replaces those that do.
    tests = ("tests", "-m", "gpu") if device == "cuda" else ("tests/model/test_config.py",)
    report = folder / f"tests_{device}.xml"
    yield Step(("pytest", *tests, "-q", f"--junitxml={report}"), report)
    for dtype in ("bfloat16", "float16"):
        yield measured(f"gate_{dtype}", "gate", *shape, "--dtype", dtype)
    yield measured("run_eager", "run", "--eager", *shape)
    yield measured("run", "run", *shape)
    layers = ("--layers", "2" if size == "tiny" else "32")
    yield measured("train", "train", *shape, *layers, *(() if size == "tiny" else ("--batch", "8")))
    yield measured("hotspots", "hotspots", "first token", "--batch", "1", *shape)
    yield measured("load", "load", *shape, *layers)


def run_step(step: Step, seconds: float) -> str:
    """Runs a step for at most `seconds`; returns "done", "out of time" or its exit code."""
    process = subprocess.Popen([sys.executable, "-m", *step.command], cwd=ROOT)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
        return "out of time"
    if code and step.result.exists():  # pytest writes its report after failures, too; the next call runs them again
        step.result.replace(step.result.with_suffix(f".failed{step.result.suffix}"))
    return "done" if code == 0 else f"exit code {code}"


def outcome_of_tests(report: Path) -> dict[str, list[str]]:
    """Returns the names of the tests by outcome, from pytest's report."""
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[kind].append(f"{case.get('classname')}::{case.get('name')}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="time for all steps together (default: 25)")
    parser.add_argument("--device", choices=SIZES, default="cuda", help="default: cuda")
    parser.add_argument("--size", choices=["tiny", "slice", "7b"], help="default: 7b on cuda, slice on cpu")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)"
    )
    options = parser.parse_args()
    machine.require(options.device, parser)
    options.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    outcomes: dict[str, str] = {}
    for step in steps(options.device, options.size or SIZES[options.device], options.output.resolve()):
        left = deadline - time.monotonic()
        if step.result.exists():
            outcome = "done before"
        elif left < GRACE:
            outcome = "not started"
        else:
            print(f"== {' '.join(step.command)} ({left:.0f} s left)", flush=True)
            outcome = run_step(step, left - GRACE)
        outcomes[step.result.stem] = outcome
    result = {
        "device": machine.name(options.device),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "command": output.command("gpu"),
        "steps": outcomes,
        "tests": [outcome_of_tests(report) for report in options.output.glob(f"tests_{options.device}*.xml")],
    }
    output.write(result, options.output / f"summary_{options.device}.json")
    print(json.dumps(result, indent=2))
    if any(outcome not in ("done", "done before") for outcome in outcomes.values()):
        raise SystemExit(1)
