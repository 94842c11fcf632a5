# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What the task `shapes` of lmms-eval asks and counts."""

from typing import Any

from examples.shapes.evaluate import is_right


def doc_to_visual(doc: dict[str, Any]) -> list:
    return [doc["image"]]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Returns the score with its cluster: questions about one drawing are not independent."""
    return {"accuracy": {"score": float(is_right(results[0], doc["answer"])), "picture": doc["picture"]}}


def mean_score(scores: list[dict[str, Any]]) -> float:
    return sum(one["score"] for one in scores) / len(scores)
