# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Reads results: lmms-eval's `*_results.json`, and our own format (as in `results/authors_7b.json`)."""

import json
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

TASK = "image-text-to-text"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
LMMS_EVAL = "https://github.com/EvolvingLMMs-Lab/lmms-eval"
# lmms-eval 0.7 writes these beside `METRIC,FILTER`: standard errors, and the spread of repeated answers.
ERRORS = {"_stderr": "error", "_stderr_clt": "error_clt", "_stderr_clustered": "error_clustered"}
REPEATS = ("_expected_accuracy", "_consensus_accuracy", "_internal_variance", "_consistency_rate")
# These fields of a task are no metrics.
NO_METRICS = ("alias", "samples")
# These `model_args` may name the model; the first one counts, so that an adapter comes before its base.
MODEL_ARGUMENTS = ("peft", "delta", "pretrained", "model", "model_version", "model_name", "model_id", "path", "engine")
# These `model_args` are left out of the command on a card: they are secrets, or paths and addresses of one machine.
# A number of tokens, such as `max_soft_tokens`, is no secret.
PRIVATE = re.compile(r"key|token(?!s)|secret|password", re.IGNORECASE)
# Options without a value that change what the model is asked.
FLAGS = ("apply_chat_template", "fewshot_as_multiturn", "force_simple")
BUDGET = "max_soft_tokens"  # in `model_args`: the number of tokens of each picture
# Those with which weights are evaluated that are not exactly the published ones.
WEIGHT_ARGUMENTS = ("dtype", "torch_dtype", "load_in_8bit", "load_in_4bit", "quantization")


@dataclass(frozen=True)
class Score:
    """Holds one value of one benchmark, in the unit of its source: percentages and fractions are kept."""

    benchmark: str
    dataset: str  # id on the Hub, or a short name
    metric: str  # name in the source
    metric_type: str  # name on the Hub
    value: float
    error: float | None = None  # standard error
    error_clt: float | None = None  # the same by the central limit theorem
    error_clustered: float | None = None  # the same for questions in clusters, such as those about one picture
    baseline: float | None = None  # value of the compared model, from the same source
    samples: str = ""  # number of evaluated samples, if the source gives it
    higher_is_better: bool = True
    dataset_config: str | None = None
    split: str | None = None

    @property
    def gain(self) -> float | None:
        """Returns how much better than the baseline the value is; it is negative if it is worse."""
        if self.baseline is None:
            return None
        return (self.value - self.baseline) * (1 if self.higher_is_better else -1)

    @property
    def errors(self) -> str:
        """Returns the standard errors as text."""
        errors = {"": self.error, "CLT ": self.error_clt, "clustered ": self.error_clustered}
        return ", ".join(f"{kind}± {error:.4g}" for kind, error in errors.items() if error is not None)


@dataclass(frozen=True)
class Evaluation:
    """Holds the scores of one file, and where they come from."""

    source: str
    url: str  # URL of the source; may be empty
    measured_by: str  # empty if the publisher of the card measured it
    evaluated: str  # Hub id or folder of the evaluated weights
    model: str  # used as a heading
    baseline: str
    conditions: str
    scores: list[Score]
    left_out: Sequence[str] = ()  # entries of the file that are no scores, with the reason

    @property
    def worse(self) -> list[str]:
        return [self.label(score) for score in self.scores if score.gain is not None and score.gain < 0]

    @property
    def better(self) -> list[str]:
        return [self.label(score) for score in self.scores if score.gain is not None and score.gain > 0]

    def label(self, score: Score) -> str:
        """Returns the benchmark, with the metric if it has several."""
        same = [other for other in self.scores if other.benchmark == score.benchmark]
        return score.benchmark if len(same) == 1 else f"{score.benchmark}, {score.metric}"


@dataclass(frozen=True)
class Speed:
    """Holds the measurements of one run of a benchmark."""

    command: str
    device: str
    conditions: str
    baseline: str
    rows: list[dict[str, Any]]  # with what, unit, value and optionally baseline


def read_evaluation(path: Path, names: set[str], base_model: Iterable[str] = ()) -> Evaluation:
    """Reads a results file of lmms-eval or of our own format.

    Args:
        path: the file.
        names: allowed names of the evaluated model: the repository's id and the folder.
        base_model: Hub ids of its base models; published scores may be about these.

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
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not evaluation.evaluated:
        raise ValueError(
            f"{path} does not say which model it is about: expected its name in `evaluated`, or with lmms-eval in "
            "`model_args` (pretrained=NAME)."
        )
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
    source = _object(content, "source")
    url = _text(source, "url")
    if url and not re.match(r"https?://\w", url):
        raise ValueError(f"The source's url is {url!r}: expected a web address, or '' if there is none.")
    return Evaluation(
        source=_text(source, "name"),
        url=url,
        measured_by=_text(content, "measured_by"),
        evaluated=_text(content, "evaluated"),
        model=_text(content, "model"),
        baseline=_text({"baseline": "", **content}, "baseline"),
        conditions=_text({"conditions": "", **content}, "conditions"),
        scores=[_own_score(row, f"Row {number} of `results`") for number, row in enumerate(content["results"], 1)],
    )


def _own_score(row: Any, place: str) -> Score:
    known = [field.name for field in fields(Score)]
    needed = [field.name for field in fields(Score) if field.default is MISSING]
    if not isinstance(row, dict):
        raise ValueError(f"{place} is a {type(row).__name__}: expected an object with {', '.join(needed)}.")
    wrong = [f"lacks {name!r}" for name in needed if name not in row]
    wrong += [f"has {name!r}" for name in row if name not in known]
    if wrong:
        raise ValueError(
            f"{place} {' and '.join(wrong)}: it needs {', '.join(needed)}, and may have {', '.join(known)}."
        )
    for name in ("benchmark", "dataset", "metric", "metric_type", "dataset_config", "split"):
        if (name in needed or row.get(name) is not None) and len(_text(row, name).strip().splitlines()) != 1:
            raise ValueError(f"{place}: the {name} is {row[name]!r}, expected a name of one line.")
    if not isinstance(row.get("higher_is_better", True), bool):
        raise ValueError(f"{place}: higher_is_better is {row['higher_is_better']!r}, expected true or false.")
    for name in ("value", "baseline", *ERRORS.values()):
        if not is_number(row.get(name)) and (name == "value" or row.get(name) is not None):
            raise ValueError(f"{place}: the {name} of {row['benchmark']} is {row[name]!r}, expected a finite number.")
    return Score(**row)


def _read_lmms_eval(content: dict[str, Any]) -> Evaluation:
    settings = _object(content, "model_configs" if "model_configs" in content else "config")  # lmms-eval 0.1 and later
    arguments = _model_arguments(settings["model_args"])
    named = [arguments[name] for name in MODEL_ARGUMENTS if arguments.get(name)]
    found = [item for task in content["results"] for item in _task_scores(task, content)]
    return Evaluation(
        source="lmms-eval",
        url=LMMS_EVAL,
        measured_by="",
        evaluated=named[0] if named else _unquoted(content.get("model_name") or ""),
        model="",
        baseline="",
        conditions=", ".join(_conditions(content, settings, arguments)),
        scores=[_at_budget(item, arguments.get(BUDGET)) for item in found if isinstance(item, Score)],
        left_out=[item for item in found if isinstance(item, str)],
    )


def _at_budget(score: Score, tokens: str | None) -> Score:
    """Names the number of tokens of a picture, if the model was not asked with its default."""
    return replace(score, metric=f"{score.metric}, {tokens} tokens of a picture") if tokens else score


def _model_arguments(given: Any) -> dict[str, str]:
    """Parses `model_args`: NAME=VALUE,NAME=VALUE, with or without quotes, or an object, also as text."""
    if given is None:  # the model was given as an object
        return {}
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = yaml.safe_load(given)
        except yaml.YAMLError as error:
            raise ValueError(f"`model_args` looks like an object, but is none: {given}") from error
    if isinstance(given, str):
        given = dict(item.partition("=")[::2] for item in given.split(","))
    if not isinstance(given, dict):
        raise ValueError(f"`model_args` is {given!r}: expected NAME=VALUE,NAME=VALUE or an object.")
    return {_unquoted(name): _unquoted(value) for name, value in given.items()}


def _unquoted(value: Any) -> str:
    return str(value).strip(" \"'")


def _conditions(content: dict[str, Any], settings: dict[str, Any], arguments: dict[str, str]) -> Iterator[str]:
    limit = _number(settings.get("limit")) or -1  # -1 means all
    versions = {task: number for task, number in _object(content, "versions", {}).items() if is_number(number)}
    yield f"`{_command(content, settings, arguments)}`"
    if arguments.get("revision"):
        yield f"revision `{arguments['revision']}`"
    for name in WEIGHT_ARGUMENTS:
        if arguments.get(name) and arguments[name] not in ("False", "auto"):
            yield f"{name} `{arguments[name]}`"
    if limit >= 1:
        yield f"ONLY THE FIRST {limit} SAMPLES of each task"
    elif limit > 0:
        yield f"ONLY THE FIRST {100 * limit:g} % OF THE SAMPLES of each task"
    if _number(settings.get("offset")):
        yield f"BEGINNING AT SAMPLE {settings['offset']} of each task"
    if versions:
        yield "versions of the tasks " + ", ".join(f"{task} {number}" for task, number in versions.items())
    if content.get("git_hash"):
        yield f"commit {content['git_hash']} of the evaluating repository"
    if content.get("date"):
        yield f"date {content['date']}"


def _command(content: dict[str, Any], settings: dict[str, Any], arguments: dict[str, str]) -> str:
    """Returns the command that measured, without what is private or belongs to one machine."""
    shown = [
        f"{name}={value}"
        for name, value in arguments.items()
        if not PRIVATE.search(name) and ("/" not in value or HUB_ID.fullmatch(value))
    ]
    said = _object(settings, "resolved_cli_args", {})  # since lmms-eval 0.7
    groups = _object(content, "group_subtasks", {}).values()
    members = [task for tasks in groups if isinstance(tasks, list) for task in tasks]
    options = {
        "model": settings["model"],
        "model_args": ",".join(shown),
        "tasks": said.get("tasks") or ",".join(task for task in content["results"] if task not in members),
        "include_path": "TASKS" if said.get("include_path") else None,
        "batch_size": settings.get("batch_size"),
        "limit": _number(settings.get("limit")),
        "gen_kwargs": settings.get("gen_kwargs"),
        "num_fewshot": said.get("num_fewshot"),
        "system_instruction": said.get("system_instruction"),
        "offset": said.get("offset") or None,
        "repeats": said.get("repeats") if said.get("repeats") != 1 else None,
    }
    if isinstance(options["gen_kwargs"], dict):
        options["gen_kwargs"] = ",".join(f"{name}={value}" for name, value in options["gen_kwargs"].items())
    given = [
        f"--{name} {f'{value:g}' if isinstance(value, float) else shlex.quote(str(value))}"
        for name, value in options.items()
        if value not in (None, "", -1)
    ]
    return " ".join(["python -m lmms_eval", *given, *(f"--{name}" for name in FLAGS if said.get(name) is True)])


def _task_scores(task: str, content: dict[str, Any]) -> Iterator[Score | str]:
    """Yields the scores of a task or group of tasks, and as text the other entries of its object."""
    values = _object(content["results"], task)
    for key in values:
        metric, comma, filter_name = key.partition(",")
        varies = [f"{metric.removesuffix(suffix)},{filter_name}" for suffix in REPEATS if metric.endswith(suffix)]
        if key in NO_METRICS or metric.endswith(tuple(ERRORS)) or not metric.strip():
            continue  # lmms-eval writes a blank for a group that has no value
        if not comma:
            yield f"{task} {key} (no metric)"
        elif set(varies) & values.keys():
            yield f"{task} {metric} (of repeated answers)"
        else:
            yield from _metric_scores(task, metric, filter_name, content)


def _metric_scores(task: str, metric: str, filter_name: str, content: dict[str, Any]) -> Iterator[Score | str]:
    """Yields the value of a metric with its errors, or several values if it is an object."""
    values, shots = content["results"][task], _object(content, "n-shot", {}).get(task)
    details = [filter_name] * (filter_name != "none") + [f"{shots}-shot"] * bool(shots)
    errors = {
        field: dict(_numbers(metric, values.get(f"{metric}{suffix},{filter_name}"))) for suffix, field in ERRORS.items()
    }
    higher_is_better = _object(_object(content, "higher_is_better", {}), task, {})
    facts = _task_facts(task, content) | {
        "metric_type": metric,
        "higher_is_better": higher_is_better.get(metric) is not False,
    }
    for name, number in _numbers(metric, values[f"{metric},{filter_name}"]):
        if number is None:
            yield f"{task} {name} (no number)"
        else:
            facts |= {field: of_metric.get(name) for field, of_metric in errors.items()}
            yield Score(metric=f"{name} ({', '.join(details)})" if details else name, value=number, **facts)


def _task_facts(task: str, content: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a [`Score`] that all metrics of a task share."""
    values, config = content["results"][task], _object(_object(content, "configs"), task, {})
    alias = str(values.get("alias", task)).lstrip(" -")  # lmms-eval indents it if the task belongs to a group
    members = _object(content, "group_subtasks", {}).get(task)
    notes = [task] * (alias != task) + (
        [f"group of {len(members)} tasks"] if isinstance(members, list) and members else []
    )
    samples = _object(_object(content, "n-samples", {}), task, {})
    counted = str(values["samples"]) if is_number(values.get("samples")) else ""
    split = config.get("test_split") or config.get("validation_split")
    path = str(config.get("dataset_path"))
    return {
        "benchmark": f"{alias} ({', '.join(notes)})" if notes else task,
        "dataset": path if HUB_ID.fullmatch(path) else task,  # otherwise it is a format, such as json, or a folder
        "samples": f"{samples['effective']} of {samples['original']}" if samples else counted,
        "dataset_config": str(config["dataset_name"]) if config.get("dataset_name") else None,
        "split": str(split) if split else None,
    }


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float | None]]:
    """Yields a metric's number, or those of its parts if it is an object; yields None if there is no number."""
    if isinstance(value, dict) and value:
        for part, number in value.items():
            yield from _numbers(f"{name}: {part}", number)
    else:
        yield name, _number(value)


def _number(value: Any) -> float | None:
    """Returns a finite number or None; lmms-eval writes NumPy's float32 as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if is_number(value) else None


def model_index(evaluations: Iterable[Evaluation]) -> list[EvalResult]:
    """Returns the entries of a card's `model-index`, each under its own name.

    The Hub groups values by dataset, configuration and split, and shows the name and the source of the first value for
    the whole group. Therefore the configuration distinguishes benchmarks or sources that share all three.

    Raises:
        ValueError: if two values have the same name.
    """
    entries = [(evaluation, score) for evaluation in evaluations for score in evaluation.scores]
    _refuse_repeated(entries)
    benchmarks, sources = defaultdict(set), defaultdict(set)
    for evaluation, score in entries:
        benchmarks[_place(score)].add(score.benchmark)
        sources[_place(score)].add(evaluation.source)
    results = []
    for evaluation, score in entries:
        apart = [score.benchmark] * (len(benchmarks[_place(score)]) > 1)
        apart += [evaluation.source] * (len(sources[_place(score)]) > 1)
        results.append(
            EvalResult(
                task_type=TASK,
                dataset_type=score.dataset,
                dataset_name=score.benchmark,
                dataset_config=", ".join(filter(None, [score.dataset_config, *apart])) or None,
                dataset_split=score.split,
                metric_type=score.metric_type,
                metric_name=score.metric,
                metric_value=score.value,
                source_name=evaluation.source if evaluation.url else None,
                source_url=evaluation.url or None,
            )
        )
    _refuse_renamed(results)
    return results


def _place(score: Score) -> tuple[str, str | None, str | None]:
    return score.dataset, score.dataset_config, score.split


def _refuse_repeated(entries: list[tuple[Evaluation, Score]]) -> None:
    values = defaultdict(list)
    for evaluation, score in entries:
        values[f"{score.benchmark}, {score.metric}, of {evaluation.source}"].append(str(score.value))
    for name, of_name in values.items():
        if len(of_name) > 1:
            raise ValueError(
                f"{name} has {len(of_name)} values, {' and '.join(of_name)}: a card has room for one. Leave out the "
                "others (--results), or give each a name of its own."
            )


def _refuse_renamed(results: list[EvalResult]) -> None:
    _, read_back = model_index_to_eval_results(eval_results_to_model_index("model", results))
    for result in results:
        if result not in read_back:
            raise ValueError(
                f"The Hub would show {result.metric_name} of {result.dataset_name} under another name: another "
                f"benchmark has the dataset {result.dataset_type}, too, with the configuration "
                f"{result.dataset_config!r} and the split {result.dataset_split!r}. Change one of the three."
            )


def read_speed(path: Path) -> Speed:
    """Reads speed results: a `command`, a `device`, `conditions`, and `rows` of `what`, `value` and `unit`.

    Raises:
        ValueError: if one of them is missing.
    """
    content = read_object(path)
    missing = [name for name in ("command", "device", "conditions", "rows") if not content.get(name)]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: a measured speed without them says nothing.")
    for row in content["rows"] if isinstance(content["rows"], list) else [content["rows"]]:
        if not isinstance(row, dict) or not {"what", "value", "unit"} <= row.keys():
            raise ValueError(f"{path}: a row is {row!r}, expected an object with what, value and unit.")
        for name in {"value", "baseline"} & row.keys():
            if not is_number(row[name]):
                raise ValueError(f"{path}: the {name} of {row['what']!r} is {row[name]!r}, expected a finite number.")
        if "baseline" in row and not content.get("baseline"):
            raise ValueError(f"{path}: {row['what']!r} has a baseline, but `baseline` does not name what that is.")
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


def _object(content: dict[str, Any], name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns a field that is an object; a field without a default is required."""
    value = content[name] if default is None else content.get(name) or default
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` is a {type(value).__name__}, expected an object with named fields.")
    return value


def _text(content: dict[str, Any], name: str) -> str:
    if not isinstance(content[name], str):
        raise ValueError(f"`{name}` is {content[name]!r}, expected text.")
    return content[name]


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number; a boolean is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
