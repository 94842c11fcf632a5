# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The conversion: look, read, plan, write."""

import zlib
from pathlib import Path

from .checkpoints.folders import ADAPTER_FILE, complete_or_absent, require_empty
from .checkpoints.weights import compare, parse_size, read_file, read_folder
from .keys import ConversionError
from .plan import make_plan
from .verify import check_logits
from .write import _write_adapter, _write_model, print_table


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    max_shard_size: str = "5GB",
    verify: bool = False,
    outputs: str | Path | None = None,
    dry_run: bool = False,
    **options: object,
) -> Path:
    """Converts a run of the original trainer, tensor by tensor.

    Args:
        source: folder or Hub id of a full fine-tune, a stage-1 projector or a LoRA run.
        destination: folder to write; must not exist, or be empty. It appears complete or not at all.
        max_shard_size: size of a weight file, such as `5GB`.
        verify: read the result again and compare a checksum of each tensor with its source.
        outputs: recorded outputs to compare logits with (see [`check_logits`]).
        dry_run: only print what would be written.
        options: of [`make_plan`].

    Returns:
        The destination.

    Raises:
        ConversionError: if anything is missing, unknown, damaged or of the wrong shape. Nothing is written then.
    """
    destination = require_empty(destination)
    if outputs and not Path(outputs).is_file():
        raise ConversionError(f"{outputs} is not a file of recorded outputs.")
    limit = parse_size(max_shard_size)
    plan = make_plan(source, **options)  # type: ignore[arg-type]
    for note in plan.notes:
        print(f"- {note}")
    if dry_run:
        print_table(plan, limit)
        return destination
    with complete_or_absent(destination) as unfinished:
        model_folder = unfinished if plan.adapter is None else unfinished / "base"
        _write_model(model_folder, plan, limit)
        if plan.adapter is not None:
            _write_adapter(unfinished, destination, plan)
        if verify or outputs:
            compare(read_folder(model_folder), plan.weights, zlib.crc32)
            if plan.adapter is not None:
                compare(read_file(unfinished / ADAPTER_FILE), plan.adapter, zlib.crc32)
            count = len(plan.weights) + len(plan.adapter or {})
            print(f"- verified: {count} tensors have the checksums of their sources")
        if outputs:
            print(f"- {check_logits(model_folder, unfinished if plan.adapter else None, Path(outputs))}")
    return destination
