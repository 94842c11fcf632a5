# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Reads evaluations and measurements: lmms-eval's `*_results.json`, and our own format (`results/authors_7b.json`)."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

TASK = "image-text-to-text"


@dataclass(frozen=True)
class Score:
    """One value of one benchmark."""

    benchmark: str
    dataset: str  # id on the Hub, or a short name
    metric: str  # as the source calls it
    metric_type: str  # the Hub's word for it
    value: float
    error: float | None = None  # standard error
    baseline: float | None = None  # of the compared model, in the same source
    samples: str = ""  # how many were evaluated, if the source says it
    higher_is_better: bool = True
    dataset_config: str | None = None
    split: str | None = None

    @property
    def gain(self) -> float | None:
        """How much better than the baseline; negative where it is worse."""
        if self.baseline is None:
            return None
        return (self.value - self.baseline) * (1 if self.higher_is_better else -1)


@dataclass(frozen=True)
class Evaluation:
    """The scores of one file, and where they come from."""

    source: str
    url: str  # of the source; of the model itself, if it was measured here
    measured_by: str  # empty: by whoever publishes the card
    evaluated: str  # Hub id, or folder, of the evaluated weights
    model: str  # as a heading
    baseline: str
    conditions: str
    scores: list[Score]

    @property
    def worse(self) -> list[str]:
        return [score.benchmark for score in self.scores if score.gain is not None and score.gain < 0]

    @property
    def better(self) -> list[str]:
        return [score.benchmark for score in self.scores if score.gain is not None and score.gain > 0]

    def eval_results(self, repo_id: str) -> list[EvalResult]:
        """The entries of the card's `model-index`."""
        return [
            EvalResult(
                task_type=TASK,
                dataset_type=score.dataset,
                dataset_name=score.benchmark,
                dataset_config=score.dataset_config,
                dataset_split=score.split,
                metric_type=score.metric_type,
                metric_name=score.metric,
                metric_value=score.value,
                source_name=self.source,
                source_url=self.url or f"https://huggingface.co/{repo_id}",
            )
            for score in self.scores
        ]


@dataclass(frozen=True)
class Speed:
    """Measurements of one run of a benchmark."""

    command: str
    device: str
    conditions: str
    baseline: str
    rows: list[dict[str, Any]]  # what, unit, value, perhaps baseline


def read_evaluation(path: Path, names: set[str], base_model: Iterable[str] = ()) -> Evaluation:
    """Reads a file of lmms-eval or of our own.

    Args:
        path: the file.
        names: what the evaluated model may be called: the repository's id and the folder.
        base_model: Hub ids of what the model was made from; scores that somebody published may be of these.

    Raises:
        ValueError: if the file is neither, lacks something, or is about another model.
    """
    content = read_object(path)
    if not isinstance(content.get("results"), dict | list):
        raise ValueError(f"{path} has no `results`: expected a results file of lmms-eval, or our own format.")
    try:
        is_own = isinstance(content["results"], list)
        evaluation = _read_own(content) if is_own else _read_lmms_eval(content)
    except KeyError as missing:
        raise ValueError(f"{path} lacks {missing}: the card needs it to say where a value comes from.") from missing
    allowed = names | set(base_model if evaluation.measured_by else ())
    if not {evaluation.evaluated, str(Path(evaluation.evaluated).resolve())} & allowed:
        raise ValueError(
            f"{path} has the results of {evaluation.evaluated!r}, not of the model of this card: expected one of "
            f"{', '.join(sorted(allowed))}."
        )
    if not evaluation.scores:
        raise ValueError(f"{path} has no value: are these predictions only (`--predict_only`)?")
    return evaluation


def _read_own(content: dict[str, Any]) -> Evaluation:
    return Evaluation(
        source=content["source"]["name"],
        url=content["source"]["url"],
        measured_by=content["measured_by"],
        evaluated=content["evaluated"],
        model=content["model"],
        baseline=content.get("baseline", ""),
        conditions=content.get("conditions", ""),
        scores=[Score(**score) for score in content["results"]],
    )


def _read_lmms_eval(content: dict[str, Any]) -> Evaluation:
    settings = content["config"]
    arguments = dict(item.partition("=")[::2] for item in str(settings["model_args"]).split(","))
    limit = settings.get("limit")
    said = [
        f"model class `{settings['model']}`",
        f"batch size {settings['batch_size']}" if settings.get("batch_size") else "",
        f"ONLY THE FIRST {limit} SAMPLES of each task" if limit else "",
        f"commit {content['git_hash']} of the evaluating repository" if content.get("git_hash") else "",
        f"date {content['date']}" if content.get("date") else "",
    ]
    return Evaluation(
        source="lmms-eval",
        url="",
        measured_by="",
        evaluated=content.get("model_name") or arguments.get("pretrained", ""),
        model="",
        baseline="",
        conditions=", ".join(item for item in said if item),
        scores=[score for task in content["results"] for score in _task_scores(task, content)],
    )


def _task_scores(task: str, content: dict[str, Any]) -> list[Score]:
    """The numbers of a task: keys are `metric,filter`; `metric_stderr,filter` is the error of one."""
    values, config = content["results"][task], content["configs"].get(task, {})
    samples = content.get("n-samples", {}).get(task)
    scores = []
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not is_number(value):
            continue
        error = values.get(f"{metric}_stderr,{filter_name}")
        scores.append(
            Score(
                benchmark=str(values.get("alias", task)).strip(" -"),
                dataset=config.get("dataset_path", task),
                metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                metric_type=metric,
                value=value,
                error=error if is_number(error) else None,
                samples=f"{samples['effective']} of {samples['original']}" if samples else "",
                dataset_config=config.get("dataset_name"),
                split=config.get("test_split"),
                higher_is_better=content.get("higher_is_better", {}).get(task, {}).get(metric) is not False,
            )
        )
    return scores


def read_speed(path: Path) -> Speed:
    """Reads measurements: a `command`, a `device`, `conditions`, and `rows` of `what`, `value` and `unit`.

    Raises:
        ValueError: if one of them is missing.
    """
    content = read_object(path)
    missing = [name for name in ("command", "device", "conditions", "rows") if not content.get(name)]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: a measured speed without them says nothing.")
    for row in content["rows"]:
        if not {"what", "value", "unit"} <= row.keys():
            raise ValueError(f"{path}: a row has {', '.join(row)}, expected what, value and unit.")
    return Speed(
        content["command"], content["device"], content["conditions"], content.get("baseline", ""), content["rows"]
    )


def read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object with named fields.")
    return content


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
