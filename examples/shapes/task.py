# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Writes the test questions as a task of lmms-eval."""

import json
import shutil
from pathlib import Path
from typing import Any

from conversion.checkpoints.folders import complete_or_absent, require_empty

from .text import PLACEHOLDER, read_test

SHIPPED = Path(__file__).parent / "lmms_eval"
FILES = ("shapes.yaml", "utils.py")


def write_task(data: str | Path, out: str | Path, questions: int | None = None) -> Path:
    """Writes a folder for `python -m lmms_eval --include_path OUT --tasks shapes`.

    Args:
        data: folder that `generate` made.
        out: folder to write; must not exist, or be empty.
        questions: how many of test.json, from its start; by default all.

    Raises:
        ValueError: if there are fewer questions, or files are missing.
    """
    out, data = require_empty(out), Path(data)
    rows, truth = read_test(data)
    if questions is not None and not 0 < questions <= len(rows):
        raise ValueError(f"--questions is {questions}, expected 1 to {len(rows)}: {data} has no more.")
    kinds = {row["id"]: row["kind"] for row in truth}
    with complete_or_absent(out) as folder:
        for name in FILES:
            shutil.copyfile(SHIPPED / name, folder / name)
        _write_parquet(folder / "test.parquet", [_document(row, kinds, data) for row in rows[:questions]])
    return out


def _document(row: dict[str, Any], kinds: dict[str, str], data: Path) -> dict[str, Any]:
    asked, answered = row["conversations"]
    return {
        "id": row["id"],
        "kind": kinds[row["id"]],
        "picture": row["image"],
        "image": {"bytes": (data / row["image"]).read_bytes(), "path": row["image"]},
        "question": asked["value"].removeprefix(PLACEHOLDER),
        "answer": answered["value"],
    }


def _write_parquet(file: Path, documents: list[dict[str, Any]]) -> None:
    """Writes documents so that `datasets` decodes the pictures."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("The task is a parquet file, which needs pyarrow: pip install '.[bulk]'") from error
    table = pyarrow.Table.from_pylist(documents)
    text = {"dtype": "string", "_type": "Value"}
    features = {name: {"_type": "Image"} if name == "image" else text for name in table.column_names}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, file)
