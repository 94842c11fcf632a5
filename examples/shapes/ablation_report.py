# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Compares the runs of the ablation: paired differences with their intervals, a table, and a plot.

A system and LLaVA-1.5 are compared seed by seed and question by question. All kinds of question count the same. The
interval is Student's, for as many seeds; its variance is the sum of that over the seeds and that over the pictures, so
that it covers other seeds and other pictures. Each interval is for itself: one in twenty is wrong.
"""

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from conversion.checkpoints.folders import complete_or_absent

from .connectors import ELASTIC, REFERENCE, SYSTEMS, Asked
from .text import read_rows
from .untold import UNTOLD

# The 97.5 % quantiles of Student's distribution for 1 to 30 degrees of freedom; more are taken as normal.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
STUDENT += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
NORMAL = 1.96
AGAINST, NO_SEED = f"against {REFERENCE}", "no common seed"
MARKERS = {"salience": "v", "diverse": "D", "merging": "^", "pool": "s"}  # of the reducers' scores, in the plot
CURVE_PICTURES = 5  # the questions about one in so many pictures make the learning curves


@dataclass(frozen=True)
class Difference:
    """Holds a mean difference in points, and half of its 95 % interval; that needs two seeds."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        if self.half is None:
            return f"{self.mean:+.1f} (one seed)"
        text = f"{self.mean:+.1f} ± {self.half:.1f}"
        return text if abs(self.mean) > self.half else f"{text}, not distinguishable"


@dataclass(frozen=True)
class Questions:
    """Holds kind and picture of each question, in the order of the marks."""

    ids: tuple[str, ...]
    kinds: tuple[str, ...]

    @cached_property
    def pictures(self) -> list[str]:
        return ["-".join(name.split("-")[:2]) for name in self.ids]  # an id is SPLIT-NUMBER-KIND

    def weights(self, kinds: Sequence[str]) -> list[float]:
        """Returns the weight of each question in the mean over `kinds`; they sum to 100, for percent."""
        numbers = {kind: self.kinds.count(kind) for kind in kinds}
        return [100 / len(numbers) / numbers[kind] if kind in numbers else 0.0 for kind in self.kinds]

    def where(self, holds: Callable[[str], bool]) -> "Questions":
        """Returns the questions whose id suits."""
        chosen = [index for index, name in enumerate(self.ids) if holds(name)]
        return Questions(tuple(self.ids[index] for index in chosen), tuple(self.kinds[index] for index in chosen))


def questions_of(data: Path, number: int) -> list[dict]:
    """Returns the rows of truth of the test: the first `number` of each kind in each group, without captions."""
    chosen, taken = [], Counter[tuple[str, str]]()
    for row in read_rows(data / "truth.jsonl"):
        taken[row["kind"], row["group"]] += 1
        if row["kind"] != "caption" and taken[row["kind"], row["group"]] <= number:
            chosen.append(row)
    return chosen


def in_curve(question: str) -> bool:
    """Returns whether the learning curve has a question; its id is SPLIT-NUMBER-KIND."""
    return int(question.split("-")[1]) % CURVE_PICTURES == 0


def accuracy(right: str, weights: Sequence[float]) -> float:
    """Returns the weighted share of right answers in percent; `right` has a mark, 0 or 1, for each question."""
    return sum(weight for mark, weight in zip(right, weights, strict=True) if mark == "1")


def difference(
    ours: dict[int, str], theirs: dict[int, str], weights: Sequence[float], pictures: Sequence[str]
) -> Difference | None:
    """Compares the marks of two systems by seed; None if they have no seed in common."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    by_seed = [accuracy(ours[seed], weights) - accuracy(theirs[seed], weights) for seed in seeds]
    mean = statistics.mean(by_seed)
    if len(seeds) == 1:
        return Difference(mean, None)
    by_picture: dict[str, float] = defaultdict(float)
    for seed in seeds:
        for mine, other, weight, picture in zip(ours[seed], theirs[seed], weights, pictures, strict=True):
            by_picture[picture] += weight * (int(mine) - int(other)) / len(seeds)
    over_pictures = len(by_picture) * statistics.variance(by_picture.values()) if len(by_picture) > 1 else 0.0
    error = math.sqrt(statistics.variance(by_seed) / len(seeds) + over_pictures)
    freedom = len(seeds) - 1
    return Difference(mean, error * (STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL))


class Results:
    """Holds the marks of all runs by row of the table and seed."""

    def __init__(self, questions: Questions, runs: list[dict]):
        self.questions = questions
        self.runs = {equal: [run for run in runs if run["equal"] == equal] for equal in ("rows", "time")}

    def marks(self, row: str, equal: str = "rows") -> dict[int, str]:
        return {run["seed"]: run["asked"][row]["right"] for run in self.runs[equal] if row in run["asked"]}

    def accuracy(self, row: str, kinds: Sequence[str], equal: str = "rows") -> float:
        weights = self.questions.weights(kinds)
        return statistics.mean(accuracy(right, weights) for right in self.marks(row, equal).values())

    def difference(
        self, row: str, kinds: Sequence[str], equal: str = "rows", other: str = REFERENCE
    ) -> Difference | None:
        weights = self.questions.weights(kinds)
        return difference(self.marks(row, equal), self.marks(other), weights, self.questions.pictures)

    def tokens(self, row: str) -> float:
        return self.median(row, lambda run: run["asked"][row]["tokens"])

    def median(self, row: str, value: Callable[[dict], float]) -> float:
        return statistics.median(value(run) for run in self.runs["rows"] if row in run["asked"])


def report(out: str | Path, data: str | Path, number: int) -> Path:
    """Writes results.json, results.md and results.png into `out`, from its runs and the questions in `data`.

    `number` is that of [`questions_of`].

    Raises:
        ValueError: if the marks of a run are not one for each question.
    """
    out = Path(out)
    files = sorted((out / "runs").glob("*.json"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    asked = questions_of(Path(data), number)
    for file, run in zip(files, runs, strict=True):
        wrong = {len(way["right"]) for way in run["asked"].values()} - {len(asked)}
        if wrong:
            raise ValueError(f"{file} has marks of {wrong.pop()} questions, but {data} has {len(asked)} for the test.")
    return write(out, {"questions": {row["id"]: row["kind"] for row in asked}, "runs": runs})


def write(out: Path, results: dict) -> Path:
    """Writes results.json, and from it the table and the plot."""
    questions = Questions(tuple(results["questions"]), tuple(results["questions"].values()))
    found = Results(questions, results["runs"])
    for name, text in (("results.json", json.dumps(results)), ("results.md", tables(found))):
        (out / name).unlink(missing_ok=True)  # of fewer runs
        with complete_or_absent(out / name, file=True) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")
    draw(found, out / "results.png")
    return out


def tables(results: Results) -> str:
    """Returns all tables of the results as Markdown."""
    return "\n\n".join(filter(None, (table(results), pairs(results), budgets(results))))


def ways_of(results: Results) -> dict[str, tuple[str, Asked]]:
    """Returns system and way of asking of each row of the table, in its order, as far as there are results."""
    found = {row for run in results.runs["rows"] for row in run["asked"]}
    return {way.name: (system.name, way) for system in SYSTEMS for way in system.asked if way.name in found}


def rows_of(results: Results) -> list[str]:
    """Returns the rows of the table."""
    return list(ways_of(results))


def told(results: Results) -> list[str]:
    """Returns the kinds of questions whose answers the vision tower has learned to tell."""
    return [kind for kind in dict.fromkeys(results.questions.kinds) if kind not in UNTOLD]


def table(results: Results) -> str:
    """Returns a Markdown table: a row for each system, and for each other way of asking it.

    "all" is the mean of the kinds that the tower was told about; "untold" is that of the others, if there are any.
    """
    kinds = told(results)
    untold = [kind for kind in UNTOLD if kind in results.questions.kinds]
    heads = ["system", "tokens", "parameters", "seeds", "all", AGAINST]
    heads += [*(["untold", AGAINST] if untold else []), *kinds, *untold, "last quarter"]
    heads += ["training, s", "answering, s", *(["equal time: all", AGAINST] if results.runs["time"] else [])]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --: |" * (len(heads) - 1)]
    for row in rows_of(results):
        cells = [row, _number(results.tokens(row)), f"{results.median(row, lambda run: run['parameters']):.0f}"]
        cells += [str(len(results.marks(row))), f"{results.accuracy(row, kinds):.1f}", _against(results, row, kinds)]
        cells += [f"{results.accuracy(row, untold):.1f}", _against(results, row, untold)] if untold else []
        cells += [f"{results.accuracy(row, [kind]):.0f}" for kind in [*kinds, *untold]]
        cells += [_rise(results, row), f"{results.median(row, lambda run: sum(run['seconds'].values())):.0f}"]
        cells += [f"{results.median(row, lambda run, row=row: run['asked'][row]['seconds']):.0f}"]
        cells += _equal_time(results, row, kinds)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pairs(results: Results) -> str:
    """Returns a Markdown table of the trained systems: each row's points above each column's, on equal rows."""
    kinds, names = told(results), _trained(results)
    lines = [f"| points above | {' | '.join(names)} |", "| --- |" + " --: |" * len(names)]
    for row in names:
        found = (results.difference(row, kinds, other=name) for name in names if name != row)
        cells = [str(one or NO_SEED) for one in found]
        cells.insert(names.index(row), "")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def budgets(results: Results) -> str:
    """Returns a Markdown table of the elastic model at each budget against all else with as many tokens.

    It is empty without the elastic model. Answers about films are left out: they are about other pictures.
    """
    heads = ("tokens", "elastic", "all", "with as many tokens", "all", "elastic is above by")
    lines = [f"| {' | '.join(heads)} |", "| --: | --- | --: | --- | --: | --: |"]
    kinds, ways = told(results), ways_of(results)
    pairs_of_rows = [
        (row, other)
        for row, (system, way) in ways.items()
        for other, (_, another) in ways.items()
        if system == ELASTIC and row != other and results.tokens(row) == results.tokens(other)
        if not way.film and not another.film
    ]
    for row, other in pairs_of_rows:
        cells = [_number(results.tokens(row)), row, f"{results.accuracy(row, kinds):.1f}", other]
        cells += [f"{results.accuracy(other, kinds):.1f}", str(results.difference(row, kinds, other=other) or NO_SEED)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if pairs_of_rows else ""


def _number(tokens: float) -> str:
    return f"{tokens:.1f}".removesuffix(".0")


def _trained(results: Results) -> list[str]:
    """Returns the rows that have runs of their own; others are further ways of asking."""
    return [row for row in rows_of(results) if any(run["system"] == row for run in results.runs["rows"])]


def _equal_time(results: Results, row: str, kinds: Sequence[str]) -> list[str]:
    if not results.runs["time"]:
        return []
    if not results.marks(row, "time"):
        return ["", ""]
    return [f"{results.accuracy(row, kinds, 'time'):.1f}", _against(results, row, kinds, "time")]


def _against(results: Results, row: str, kinds: Sequence[str], equal: str = "rows") -> str:
    if row == REFERENCE:
        return ""
    found = results.difference(row, kinds, equal)
    return str(found or NO_SEED)


def curve(results: Results, row: str) -> list[tuple[float, float]]:
    """Returns share of stage 2 and mean accuracy on the questions of the curve, at each of its points."""
    few = results.questions.where(in_curve)
    weights = few.weights([kind for kind in told(results) if kind in few.kinds])
    chosen = [in_curve(name) for name in results.questions.ids]
    by_share: dict[float, list[float]] = defaultdict(list)
    for run in results.runs["rows"]:
        if run["system"] == row:
            for point in run["curve"]:
                by_share[point["share"]].append(accuracy(point["right"], weights))
            end = "".join(mark for mark, use in zip(run["asked"][row]["right"], chosen, strict=True) if use)
            by_share[1.0].append(accuracy(end, weights))
    return [(share, statistics.mean(values)) for share, values in sorted(by_share.items())]


def _rise(results: Results, row: str) -> str:
    """Returns how many points the last quarter of the training brought; other ways of asking have no curve."""
    points = curve(results, row)
    if len(points) < 2:
        return ""
    _, before = min(points, key=lambda point: abs(point[0] - 0.75))
    return f"{points[-1][1] - before:+.1f}"


def draw(results: Results, path: Path) -> None:
    """Draws the differences with their intervals, the answers by tokens, and the learning curves."""
    from matplotlib.figure import Figure  # imported here because only this command needs it

    figure = Figure(figsize=(15, max(9, 2 + 0.25 * len(rows_of(results)))), layout="constrained")
    axes = figure.subplot_mosaic([["differences", "tokens"], ["differences", "curves"]])
    _draw_differences(results, axes["differences"])
    _draw_tokens(results, axes["tokens"])
    for index, row in enumerate(_trained(results)):
        points = curve(results, row)
        axes["curves"].plot(*zip(*points, strict=True), "o-", markersize=3, color=_color(index))
    title = "Learning curves, mean of the seeds, in the colours above"
    axes["curves"].set(xlabel="share of stage 2", ylabel="right answers, %", title=title)
    for one in axes.values():
        one.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _color(index: int) -> Any:
    """Returns one of twenty colours: ten dark ones, then ten light ones."""
    from matplotlib import colormaps

    return colormaps["tab20"](2 * index % 20 + index // 10 % 2)


def _draw_differences(results: Results, axes: Any) -> None:
    kinds = told(results)
    others = [
        (row, found) for row in rows_of(results) if row != REFERENCE and (found := results.difference(row, kinds))
    ]
    for place, (_, found) in enumerate(others):
        axes.errorbar(found.mean, -place, xerr=found.half or 0, fmt="o", color="tab:blue", capsize=3)
    axes.set_yticks([-place for place in range(len(others))], [row for row, _ in others])
    axes.axvline(0, color="k", linewidth=0.8)
    axes.set(xlabel=f"points against {REFERENCE}, 95 % interval", title="Same tower, language model, rows and order")


def _draw_tokens(results: Results, axes: Any) -> None:
    """Draws what a system was trained for as full points, and other ways of asking it hollow, in the same colour."""
    kinds, ways = told(results), ways_of(results)
    places = {row: (results.tokens(row), results.accuracy(row, kinds)) for row in ways}
    for index, name in enumerate(_trained(results)):
        color = _color(index)
        own = {row: way for row, (system, way) in ways.items() if system == name and not way.film}
        full = [row for row, way in own.items() if row == name or not way.changed]
        axes.plot(*zip(*(places[row] for row in full), strict=True), "o-", color=color, label=name)
        for row in own.keys() - full:
            axes.plot(*places[row], MARKERS.get(own[row].score, "o"), color=color, fillstyle="none", alpha=0.7)
    for score, marker in MARKERS.items():
        axes.plot([], [], marker, color="gray", fillstyle="none", label=score)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="vision tokens of a picture", ylabel="right answers, %", title="Hollow: not trained for it")
    axes.legend(fontsize="small", ncols=2)
