# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The conversion: options -> locate -> read -> plan -> write."""

import zlib
from pathlib import Path
from typing import Any

from .checkpoints.folders import ADAPTER_FILE, complete_or_absent, require_empty
from .checkpoints.weights import compare, parse_size, read_file, read_folder
from .keys import ConversionError
from .locate import locate
from .options import Options
from .plan import Plan, plan
from .source import read
from .verify import check_logits
from .write import print_table, write


def convert(source: str | Path, destination: str | Path, **options: Any) -> Path:
    """Converts a run of the original trainer, tensor by tensor.

    Args:
        source: folder or Hub id of a full fine-tune, a stage-1 projector or a LoRA run.
        destination: folder to write; must not exist, or be empty. It appears complete or not at all.
        options: see [`Options`].

    Returns:
        The destination.

    Raises:
        ConversionError: if anything is missing, unknown, damaged or of the wrong shape. Nothing is written then.
    """
    asked = Options(**options)
    destination = require_empty(destination)
    if asked.outputs and not Path(asked.outputs).is_file():
        raise ConversionError(f"{asked.outputs} is not a file of recorded outputs.")
    limit = parse_size(asked.max_shard_size)
    planned = plan(read(locate(source, asked), asked), asked)
    for note in planned.notes:
        print(f"- {note}")
    if asked.dry_run:
        print_table(planned, limit)
        return destination
    with complete_or_absent(destination) as unfinished:
        model_folder = write(unfinished, destination, planned, limit)
        if asked.verify or asked.outputs:
            _verify(unfinished, model_folder, planned)
        if asked.outputs:
            adapter_folder = unfinished if planned.adapter else None
            print(f"- {check_logits(model_folder, adapter_folder, Path(asked.outputs))}")
    return destination


def _verify(folder: Path, model_folder: Path, planned: Plan) -> None:
    """Compares what was written with its sources."""
    compare(read_folder(model_folder), planned.weights, zlib.crc32)
    if planned.adapter:
        compare(read_file(folder / ADAPTER_FILE), planned.adapter, zlib.crc32)
    count = len(planned.weights) + len(planned.adapter)
    print(f"- verified: {count} tensors have the checksums of their sources")
