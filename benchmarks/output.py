# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The JSON file of a benchmark: never written over another, and written complete or not at all."""

import argparse
import json
from pathlib import Path
from typing import Any

from conversion.checkpoints.folders import complete_or_absent


def require_absent(file: Path | None, parser: argparse.ArgumentParser) -> None:
    """Ends the command, before anything is measured, if `file` is there already."""
    if file is not None and file.exists():
        parser.error(f"{file} exists: move it away, or name another file with --output")


def write(result: dict[str, Any], file: Path) -> None:
    with complete_or_absent(file, file=True) as unfinished:
        unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
