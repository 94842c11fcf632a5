# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Measures what fewer vision tokens cost: budgets, suggested budgets and reducers, on the same questions.

The first model gives a row for all its tokens, which is the reference; for each token budget; for the suggested ones;
and for each reducer and count. Each further model, such as one that was trained for one budget alone, gives one row.
"""

import hashlib
import json
import platform
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from conversion.checkpoints.folders import complete_or_absent
from modeling_llava_stf import reduce_image_tokens, suggest_budgets

from .evaluate import ask, prompts, score
from .questions import KINDS
from .text import messages_of, read_test
from .training import DEVICE

SCORES = ("salience", "diverse", "merging", "question", "even", "random", "pool")
MODEL = re.compile(r"(?:(?P<name>[^=]+)=)?(?P<folder>[^=]+?)(?:@(?P<budget>\d+))?")


@dataclass(frozen=True)
class System:
    """Describes a row of the table: a model, and how many of its tokens a question gets."""

    name: str
    model: str
    budget: int | str | None = None  # of the processor; "suggested" asks `suggest_budgets`
    keep: int | str | None = None  # of `reduce_image_tokens`, as `score` and `positions`
    score: str = ""
    positions: str = ""

    @property
    def file(self) -> str:
        return f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}.json"

    @property
    def family(self) -> str:
        """Returns what the rows of one line in the plot have in common."""
        if self.keep is not None:
            return f"{self.score}, {self.positions} positions"
        return "budgets" if isinstance(self.budget, int) else self.name


class Loaded:
    """Holds the model and the processor of a folder, and the prompts that a system makes with them."""

    def __init__(self, folder: str):
        self.processor = AutoProcessor.from_pretrained(folder)
        self.network = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval().to(DEVICE)

    def inputs(self, system: System, conversations: list[list[dict]]) -> BatchFeature:
        """Returns what `generate` gets for conversations of the chat template."""
        prepare = partial(prompts, self.network, self.processor, conversations)
        if system.budget == "suggested":
            return prepare(max_soft_tokens=suggest_budgets(self.network, prepare()))
        inputs = prepare() if system.budget is None else prepare(max_soft_tokens=system.budget)
        if system.keep is None:
            return inputs
        return reduce_image_tokens(
            self.network, inputs, keep=system.keep, score=system.score, positions=system.positions
        )

    def trained(self, system: System) -> bool:
        """Returns whether the config names the row's budget, or all tokens, as trained."""
        config = self.network.config
        budgets = getattr(config, "token_budgets", None)
        if system.budget == "suggested":
            return budgets is not None
        return (system.budget or config.image_seq_length) in (budgets or [config.image_seq_length])


def compare(
    out: str | Path,
    data: str | Path,
    models: list[str],
    keep: list[int] | None = None,
    scores: list[str] | None = None,
    questions: int | None = None,
    batch_size: int = 100,
    timed: int = 0,
) -> Path:
    """Asks every system the test's questions, and writes results.json, a table and a plot into `out`.

    A stopped run continues: it keeps the rows in `out`/rows, and the times in `out`/first_tokens.json.

    Args:
        out: folder for the results.
        data: folder that `generate` made.
        models: FOLDER, NAME=FOLDER or NAME=FOLDER@BUDGET, first the model whose tokens become fewer.
        keep: counts of the reducers; by default a half, a quarter, an eighth and a sixteenth of the tokens.
        scores: reducers; by default all.
        questions: only so many of the first questions.
        batch_size: number of questions that are answered together.
        timed: measure the time to the first token with so many questions, one at a time, the systems in turns.

    Raises:
        ValueError: if an argument is wrong, or `out` has rows of other questions or another model.
    """
    out, data = Path(out), Path(data)
    rows, truth = (part[:questions] for part in read_test(data))
    loaded = {system.model: Loaded(system.model) for system in _further(models)}
    systems = list(_systems(models, loaded, keep, scores))
    for system in systems:
        _check_counts(system, loaded[system.model].network.config)
    _check_names(systems)
    (out / "rows").mkdir(parents=True, exist_ok=True)
    times = out / "first_tokens.json"
    results = []
    for system in systems:
        file = out / "rows" / system.file
        of = {"questions": _digest(json.dumps(rows).encode()), "model": _weights(system.model)}
        if not file.exists():
            print(system.name, flush=True)
            result = _row(system, loaded[system.model], data, rows, truth, batch_size) | {"of": of}
            times.unlink(missing_ok=True)  # they may be those of another model with this name
            _write(json.dumps(result) + "\n", file)
        results.append(json.loads(file.read_text(encoding="utf-8")))
        if results[-1]["of"] != of:
            raise ValueError(f"{file} has other questions or another model: name another folder, or remove it.")
    if timed:
        times.unlink(missing_ok=True)  # the systems of one file took turns
        _write(json.dumps(_first_tokens(systems, loaded, data, rows, timed)) + "\n", times)
    seconds = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
    if {system.name for system in systems} <= seconds.keys():
        results = [row | {"first_token_seconds": seconds[row["name"]]} for row in results]
    kinds = {row["id"]: row["kind"] for row in truth}
    return report(out, {"conditions": _conditions(), "questions": kinds, "rows": results})


def _further(models: list[str]) -> list[System]:
    """Returns a system for each model that the command line names."""
    found = []
    for text in models:
        match = MODEL.fullmatch(text)
        if match is None or not Path(match["folder"]).is_dir():
            raise ValueError(f"{text} names no folder: write FOLDER, NAME=FOLDER or NAME=FOLDER@BUDGET.")
        budget = None if match["budget"] is None else int(match["budget"])
        found.append(System(match["name"] or Path(match["folder"]).name, match["folder"], budget))
    repeated = {system.name for system in found if [other.name for other in found].count(system.name) > 1}
    if repeated:
        raise ValueError(f"Several models have the name {sorted(repeated)[0]}: write NAME=FOLDER.")
    if found[0].budget is not None:
        raise ValueError(
            f"{models[0]} is the first model, which all others are compared with at all its tokens: leave out "
            f"@{found[0].budget}."
        )
    return found


def _systems(
    models: list[str], loaded: dict[str, Loaded], keep: list[int] | None, scores: list[str] | None
) -> Iterator[System]:
    first, *others = _further(models)
    yield first
    config = loaded[first.model].network.config
    every = config.image_seq_length
    budgets = [budget for budget in getattr(config, "allowed_token_budgets", []) if budget != every]
    for budget in budgets:
        yield System(f"budget {budget}", first.model, budget)
    if budgets:
        yield System("suggested budgets", first.model, "suggested")
    for name in dict.fromkeys(SCORES if scores is None else scores):
        for count in dict.fromkeys(keep or [every // share for share in (2, 4, 8, 16) if share <= every]):
            if name != "pool" or count in (budgets or [count]):
                yield System(f"{name} {count}", first.model, None, count, name, "original")
            elif keep and scores:
                raise ValueError(f"--keep is {count}, but pool averages to one of {budgets}: leave out one of the two.")
            if name == "salience":
                yield System(f"{name} {count}, compact", first.model, None, count, name, "compact")
    yield System("adaptive", first.model, None, "adaptive", "salience", "original")
    yield from others


def _check_counts(system: System, config: Any) -> None:
    """Raises a `ValueError` if the model cannot have the system's tokens, before hours of other rows."""
    every = config.image_seq_length
    allowed = getattr(config, "allowed_token_budgets", [every])
    if isinstance(system.budget, int) and system.budget not in allowed:
        raise ValueError(
            f"{system.model}@{system.budget}: a picture cannot have {system.budget} tokens in this model, expected one "
            f"of {allowed}."
        )
    if isinstance(system.keep, int) and not 1 <= system.keep <= every:
        raise ValueError(f"--keep is {system.keep}, expected 1 to {every}, the tokens of a picture.")


def _check_names(systems: list[System]) -> None:
    """Raises a `ValueError` if two rows would have one file, so that one would get the other's answers."""
    names: dict[str, str] = {}
    for system in systems:
        if system.file in names:
            raise ValueError(
                f"The rows {names[system.file]!r} and {system.name!r} would be one file, {system.file}: choose another "
                "name for the model (NAME=FOLDER)."
            )
        names[system.file] = system.name


def _row(system: System, loaded: Loaded, data: Path, rows: list[dict], truth: list[dict], batch_size: int) -> dict:
    """Asks one system, and returns its answers' marks in the order of the questions."""
    tokens: list[int] = []

    def inputs_of(conversations: list[list[dict]]) -> BatchFeature:
        inputs = loaded.inputs(system, conversations)
        tokens.extend((inputs["input_ids"] == loaded.network.config.image_token_id).sum(1).tolist())
        return inputs

    started = time.perf_counter()
    answers = ask(loaded.network, loaded.processor, data, rows, batch_size, inputs_of)
    wrong = {mistake["id"] for mistake in score(answers, rows, truth)["mistakes"]}
    return asdict(system) | {
        "family": system.family,
        "trained": loaded.trained(system),
        "vision_tokens": statistics.mean(tokens),
        "seconds": round(time.perf_counter() - started, 1),
        "right": "".join("01"[row["id"] not in wrong] for row in truth),
    }


def _first_tokens(
    systems: list[System], loaded: dict[str, Loaded], data: Path, rows: list[dict], timed: int
) -> dict[str, list[float]]:
    """Times from the question with its picture's file to the first token, one question at a time."""
    asked = random.Random(0).sample(rows, min(timed, len(rows)))
    seconds: dict[str, list[float]] = {system.name: [] for system in systems}
    for turn, row in enumerate([asked[0], *asked]):  # the first turn only warms up
        for system in systems:
            started = time.perf_counter()
            inputs = loaded[system.model].inputs(system, [messages_of(row, data)[:1]])
            # `cpu` waits for the device.
            loaded[system.model].network.generate(**inputs, do_sample=False, max_new_tokens=1).cpu()
            if turn:
                seconds[system.name].append(time.perf_counter() - started)
    return seconds


def _conditions() -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "-m", "examples.shapes", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
    }


def _weights(folder: str) -> str:
    files = [Path(folder) / "config.json", *sorted(Path(folder).glob("*.safetensors"))]
    return _digest(b"".join(file.read_bytes() for file in files))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _write(text: str, file: Path) -> None:
    with complete_or_absent(file, file=True) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def report(out: Path, results: dict[str, Any]) -> Path:
    """Writes results.json, results.md and results.png into `out`."""
    for name, text in (("results.json", json.dumps(results, indent=1)), ("results.md", table(results))):
        (out / name).unlink(missing_ok=True)  # of a run with fewer rows
        _write(text + "\n", out / name)
    draw(results, out / "results.png")
    return out


def difference(row: dict, reference: dict, questions: Iterable[str]) -> tuple[float, float]:
    """Returns the difference of two rows' accuracy, and half of its 95 % interval, in points.

    The questions are paired. Questions about one picture are not independent, so the pictures are the sample.
    """
    pairs = list(zip(questions, row["right"], reference["right"], strict=True))
    mean = statistics.mean(int(ours) - int(theirs) for _, ours, theirs in pairs)
    by_picture: dict[str, float] = {}
    for name, ours, theirs in pairs:
        picture = "-".join(name.split("-")[:2])  # an id is SPLIT-NUMBER-KIND
        by_picture[picture] = by_picture.get(picture, 0) + int(ours) - int(theirs) - mean
    error = sum(value**2 for value in by_picture.values()) ** 0.5 / len(pairs)
    return 100 * mean, 196 * error


def accuracy(row: dict, questions: dict[str, str], kind: str | None = None) -> float:
    """Returns the right answers in percent, of one kind or of all questions; `questions` has the kind of each."""
    marks = [mark == "1" for mark, of in zip(row["right"], questions.values(), strict=True) if kind in (None, of)]
    return 100 * statistics.mean(marks)


def table(results: dict[str, Any]) -> str:
    """Returns a Markdown table: a row for each system, with its paired difference to the first."""
    rows, questions = results["rows"], results["questions"]
    kinds = [kind for kind in KINDS if kind in questions.values()]
    timed = "first_token_seconds" in rows[0]
    heads = ["system", "vision tokens", "all", "against all tokens", *kinds, *["first token, ms"][: int(timed)]]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --: |" * (len(heads) - 1)]
    for row in rows:
        mean, half = difference(row, rows[0], questions)
        untrained = "" if row["trained"] else " (untrained)"
        cells = [
            f"{row['name']}{untrained}",
            f"{row['vision_tokens']:.1f}".removesuffix(".0"),
            f"{accuracy(row, questions):.1f}",
        ]
        cells.append("" if row is rows[0] else f"{mean:+.1f} ± {half:.1f}")
        cells += [f"{accuracy(row, questions, kind):.0f}" for kind in kinds]
        if timed:
            cells.append(f"{1e3 * statistics.median(row['first_token_seconds']):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws accuracy against vision tokens and, if it was measured, against the time to the first token."""
    from matplotlib.figure import Figure  # imported here because only this command needs it

    rows, height = results["rows"], partial(accuracy, questions=results["questions"])
    axes_of: list[tuple[str, Callable[[dict], float]]] = [("vision tokens of a picture", lambda r: r["vision_tokens"])]
    if "first_token_seconds" in rows[0]:
        axes_of.append(("time to the first token, ms", lambda r: 1e3 * statistics.median(r["first_token_seconds"])))
    figure = Figure(figsize=(7 * len(axes_of), 5.5), layout="constrained")
    for index, (label, value) in enumerate(axes_of):
        axes = figure.add_subplot(1, len(axes_of), index + 1)
        for family in dict.fromkeys(row["family"] for row in rows):
            of_family = [row for row in rows if row["family"] == family]
            line = "-" if len(of_family) > 1 else ""
            axes.plot([*map(value, of_family)], [*map(height, of_family)], f"o{line}", label=family, alpha=0.8)
        axes.set(xlabel=label, ylabel="right answers, %", ylim=(0, 100))
        axes.grid(alpha=0.3)
        if index == 0:
            axes.set_xscale("log", base=2)
            figure.legend(*axes.get_legend_handles_labels(), ncols=2 * len(axes_of), loc="outside lower center")
    figure.savefig(path, dpi=110)
