# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Writes the JSON file of a benchmark, completely or not at all, and never over another file."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from conversion.checkpoints.folders import complete_or_absent


def require_absent(file: Path | None, parser: argparse.ArgumentParser) -> None:
    """Ends the command before it measures anything if `file` exists."""
    if file is not None and file.exists():
        parser.error(f"{file} exists: move it away, or name another file with --output")


def command(name: str) -> str:
    """Returns the command that is running, with all its options: the one that repeats a result."""
    return shlex.join(["python", "-m", "benchmarks", name, *sys.argv[1:]])


def write(result: dict[str, Any], file: Path) -> None:
    with complete_or_absent(file, file=True) as unfinished:
        unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
