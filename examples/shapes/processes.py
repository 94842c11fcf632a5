# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Starts commands as separate processes."""

import os
import subprocess
import sys
from typing import Any

from conversion.checkpoints.folders import ROOT


def start_module(*words: object, **options: Any) -> subprocess.Popen:
    """Starts `python -m words...` with one thread; more threads do not help such small models."""
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)
