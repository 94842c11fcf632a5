# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The JSON file of a benchmark: never written over another, and written complete or not at all."""

import argparse
import json
from pathlib import Path
from typing import Any


def require_absent(file: Path | None, parser: argparse.ArgumentParser) -> None:
    """Ends the command, before anything is measured, if `file` is there already."""
    if file is not None and file.exists():
        parser.error(f"{file} exists: move it away, or name another file with --output")


def write(result: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".partial")  # no .json: `report.py` would take it for a result
    unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(file)
