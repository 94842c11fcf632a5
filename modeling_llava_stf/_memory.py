# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Says in one line that a GPU is full, for all command lines."""

import traceback
from collections.abc import Iterator

# Not only `torch.OutOfMemoryError` says so: torch 2.13 raises others at the first use of a GPU that is full already.
FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def full_gpu(error: RuntimeError, advice: str) -> str:
    """Returns a line on a full GPU: what was found, and what to do.

    Args:
        error: what torch or transformers raised.
        advice: what the user of this command can do, in whole sentences.

    Raises:
        RuntimeError: the error itself, if it is about something else.
    """
    lines = [line for text in (str(error), *_of_weights(error)) for line in text.splitlines()]
    found = [line for line in lines if any(text in line for text in FULL)]
    if not found:
        raise error
    sentences = ". ".join(found[-1].rstrip(". ").split(". ")[:3])  # the asked, the total and the free memory
    return f"The GPU has too little free memory: {sentences}. `nvidia-smi` lists the programs that use it. {advice}"


def _of_weights(error: RuntimeError) -> Iterator[str]:
    """Yields the errors of single weights.

    transformers 5.24 only logs what is raised while it quantises a weight, and at the end raises an error without
    cause, from a function that has them all. Remove when that error has a cause.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield from getattr(frame.f_locals.get("loading_info"), "conversion_errors", {}).values()
