# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Compares the answers of quantised models with those of the model in bfloat16, on the same questions."""

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch

from conversion import ConversionError, quantise
from conversion.quantise import SCHEMES
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf._folder import checked_config

from .evaluate import ask, require_new, score, write_json
from .text import read_test
from .training import DEVICE

REFERENCE = "bfloat16"  # the whole model that the others are compared with
LIBRARIES = ("torch", "transformers", "torchao", "bitsandbytes")  # some schemes need the last two
Z = 1.96  # normal quantile of a 95 % interval


def shrink(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    questions: int = 1100,
    also: Sequence[str | Path] = (),
    workers: int = 2,
) -> dict[str, Any]:
    """Quantises a checkpoint by every scheme, loads the results again, and asks each a random part of the questions.

    Args:
        model: folder of a checkpoint that is not quantised.
        data: folder that `generate` made.
        output: file for the result as JSON; must not exist.
        questions: number of questions.
        also: folders of the same model that were quantised elsewhere (`examples/quantise_vllm.py`).
        workers: number of models that are asked at the same time.

    Returns:
        `rows`: for each scheme bytes on disk, right answers, and how many answers are those of the whole model
        in bfloat16; or why the scheme is refused.

    Raises:
        ValueError: if a file is missing, two models have one scheme, or `output` exists or cannot be written.
    """
    require_new(output)
    others = _by_scheme(also)
    checked_config(str(model), None)
    rows, truth = read_test(Path(data))
    chosen = {row["id"] for row in Random(0).sample(rows, min(questions, len(rows)))}
    rows, truth = ([row for row in part if row["id"] in chosen] for part in (rows, truth))
    table: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work, ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        folders: dict[str, tuple[str | Path, str]] = {REFERENCE: (model, REFERENCE)}
        for scheme in SCHEMES:
            try:
                folders[scheme] = (quantise(model, Path(work) / scheme, scheme), "auto")
            except ConversionError as error:
                table[scheme] = {"refused": str(error)}
        folders |= {scheme: (folder, "auto") for scheme, folder in others.items()}
        waiting = {name: pool.submit(_answers, *place, Path(data), rows) for name, place in folders.items()}
        answers = {name: future.result() for name, future in waiting.items()}
        for name, (folder, dtype) in folders.items():
            table[name] = _row(answers[name], answers[REFERENCE], rows, truth) | {"bytes": _bytes(folder, dtype)}
    result = {
        "command": f"python -m examples.shapes shrink MODEL DATA --output FILE --questions {questions}",
        "device": DEVICE,
        "questions": len(chosen),
        "versions": {name: version(name) for name in LIBRARIES if find_spec(name)},
        "rows": table,
    }
    write_json(output, result)
    print("\n".join(shrink_table(result)))
    return result


def _by_scheme(folders: Sequence[str | Path]) -> dict[str, str | Path]:
    """Returns the folders that were quantised elsewhere, by their schemes; a row of the table has one model."""
    found: dict[str, str | Path] = {}
    for folder in folders:
        scheme = json.loads((Path(folder) / "quantisation.json").read_text(encoding="utf-8"))["scheme"]
        if scheme in (*found, *SCHEMES, REFERENCE):
            raise ValueError(f"{folder} is a second model in {scheme}: leave one out of --also.")
        found[scheme] = folder
    return found


def _answers(folder: str | Path, dtype: str, data: Path, rows: list[dict]) -> dict[str, str]:
    network = LlavaSTFForConditionalGeneration.from_pretrained(folder, dtype=dtype, device_map=DEVICE).eval()
    return ask(network, LlavaSTFProcessor.from_pretrained(folder), data, rows, batch_size=50)


def _row(answers: dict[str, str], reference: dict[str, str], rows: list, truth: list) -> dict[str, Any]:
    kinds = score(answers, rows, truth)["kinds"]
    right = sum(part["right"] for parts in kinds.values() for part in parts.values())
    same = sum(answers[name] == answer for name, answer in reference.items())
    interval = [round(end, 4) for end in wilson(same, len(answers))]
    agreement = {"same": same, "agreement": round(same / len(answers), 4), "interval": interval}
    return {"right": right, "accuracy": round(right / len(answers), 4), **agreement}


def _bytes(folder: str | Path, dtype: str) -> int:
    """Returns the bytes of the weights; of the whole model as they would be in this dtype."""
    files = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    stored = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["dtype"]
    widths = [getattr(torch, stored if name == "auto" else name).itemsize for name in (dtype, stored)]
    return files * widths[0] // widths[1]


def wilson(hits: int, of: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share (Wilson, Journal of the American Statistical Association 22, 1927)."""
    share = hits / of
    middle = share + Z**2 / (2 * of)
    half = Z * (share * (1 - share) / of + Z**2 / (4 * of**2)) ** 0.5
    return (middle - half) / (1 + Z**2 / of), (middle + half) / (1 + Z**2 / of)


def shrink_table(result: dict[str, Any]) -> list[str]:
    """Returns a Markdown row for each model that was asked: bytes, accuracy, agreement and its 95 % interval."""
    return [
        f"| {name} | {row['bytes'] / 1e6:.2f} MB | {100 * row['accuracy']:.1f} | {100 * row['agreement']:.1f} | "
        f"{100 * row['interval'][0]:.1f} to {100 * row['interval'][1]:.1f} |"
        for name, row in result["rows"].items()
        if "refused" not in row
    ]
