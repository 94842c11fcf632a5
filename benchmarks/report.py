# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/speed.md from the results of `benchmarks run`, `benchmarks/results/run_*.json`.

python -m benchmarks report
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from matplotlib.figure import Figure

from benchmarks import count
from benchmarks.systems import ANSWER, OURS, OURS_COMPILED, QUESTION, REFERENCE, STOCK, STOCK_COMPILED, WHOLE, configs
from benchmarks.workloads import PLANS, cases

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- speed: written by benchmarks/report.py -->\n", "<!-- speed: end -->"
PAIRS = ((STOCK, OURS), (STOCK_COMPILED, OURS_COMPILED))
SYSTEMS = (STOCK, REFERENCE, OURS, STOCK_COMPILED, OURS_COMPILED)
REDUCED = {whole: name for name, whole in WHOLE.items()}
EVEN = 1.05  # treat ratios up to this one as no difference
LONG_ANSWER = 512  # tokens
ACROSS = ("first token", "decode", "answer", "second question", "second answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def files() -> list[Path]:
    return sorted(RESULTS.glob("run_*.json"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def updated(page: str) -> str:
    """Returns the page with a section for each result."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} lacks {BEGIN.strip()!r} or {END!r}, between which the tables go.")
    sections = [section(read(path), path) for path in files()]
    return before + begin + "\n" + "\n".join(sections or ["No result is there yet.\n"]) + "\n" + end + after


def section(result: dict[str, Any], path: Path) -> str:
    return "\n".join(
        [
            f"**{conditions(result)}** (`{result['command']}`, raw numbers in `{path.relative_to(ROOT)}`, "
            f"[plot]({os.path.relpath(path.with_suffix('.png'), PAGE.parent)})):",
            "",
            *tables(result),
            *notes(result),
            "",
        ]
    )


def conditions(result: dict[str, Any]) -> str:
    layers = {"7b": "the whole 7B", "slice": "full width, 2 layers of the language model"}
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, {layers.get(result['size'], 'tiny')}, "
        f"random weights; {versions}"
    )


def tables(result: dict[str, Any]) -> Iterator[str]:
    """Yields the table of the rows of whole systems and that of the rows with reduced ones, if there are any."""
    for lines in (table(result), table_of_reducers(result)):
        header, line, *rows = lines
        if rows:
            yield from (header, line, *rows, "")


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yields rows with median milliseconds, half the interquartile range, and how many times faster ours is."""
    yield "| ms | " + " | ".join(SYSTEMS) + " | ours vs stock | both compiled | ours vs reference | ours, of peak |"
    yield "| --- |" + " --: |" * (len(SYSTEMS) + 4)
    for case in result["cases"]:
        if "kept" in case:
            continue
        runs = case["systems"]
        cells = [cell(runs.get(name)) for name in SYSTEMS]
        ratios = [verdict(runs, *pair) for pair in (*PAIRS, (REFERENCE, OURS))]
        yield "| " + " | ".join([label(case), *cells, *ratios, share_of_peak(result, case)]) + " |"


def table_of_reducers(result: dict[str, Any]) -> Iterator[str]:
    """Yields rows of whole and reduced systems, eager and compiled, and how many times faster fewer tokens are."""
    yield (
        "| ms | stock | stock, reduced | ours | ours, reduced | stock: reduced vs whole | ours: reduced vs whole "
        "| ours, reduced vs stock | both reduced: ours vs stock |"
    )
    yield "| --- |" + " --: |" * 8
    for case in result["cases"]:
        runs = case["systems"]
        for how, (stock, ours) in zip(("", ", compiled"), PAIRS, strict=True):
            if "kept" not in case or stock not in runs:
                continue
            names = (stock, REDUCED[stock], ours, REDUCED[ours])
            pairs = (names[:2], names[2:], (stock, REDUCED[ours]), (REDUCED[stock], REDUCED[ours]))
            cells = [*(cell(runs.get(name)) for name in names), *(verdict(runs, *pair) for pair in pairs)]
            yield "| " + " | ".join([label(case) + how, *cells]) + " |"


def label(case: dict[str, Any]) -> str:
    text = "" if case["text"] is None else f", {case['text']} tokens of text"
    picture = "".join(f", {case[name]} of a picture" for name in ("budget", "kept") if name in case)
    return f"{case['metric']}, batch {case['batch']}{text}{picture}"


def cell(run: dict[str, Any] | None) -> str:
    if run is None:
        return ""
    if "error" in run:
        return run["error"]
    low, middle, high = (1e3 * seconds for seconds in quartiles(run["seconds"]))
    return f"{digits(middle)} ± {digits((high - low) / 2)}"


def quartiles(seconds: list[float]) -> list[float]:
    return quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds


def digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def ratio(runs: dict[str, Any], baseline: str, ours: str) -> float | None:
    """Returns how many times faster ours is; None if one of them has no time."""
    times = [runs.get(name, {}).get("seconds") for name in (baseline, ours)]
    return median(times[0]) / median(times[1]) if all(times) else None


def gains(runs: dict[str, Any], baseline: str, ours: str) -> bool:
    """Returns whether ours is faster by more than `EVEN` and by more than the spread: the quartiles do not overlap."""
    faster = ratio(runs, baseline, ours)
    if faster is None:
        return False
    (low, _, _), (_, _, high) = quartiles(runs[baseline]["seconds"]), quartiles(runs[ours]["seconds"])
    return faster > EVEN and low > high


def verdict(runs: dict[str, Any], baseline: str, ours: str) -> str:
    faster = ratio(runs, baseline, ours)
    if faster is None:
        return ""
    if gains(runs, baseline, ours):
        return f"**{faster:.2f}x**"
    return f"{faster:.2f}x, slower" if gains(runs, ours, baseline) else f"{faster:.2f}x, no gain"


def share_of_peak(result: dict[str, Any], case: dict[str, Any]) -> str:
    """Returns our fastest system's share of the peak: of the FLOP/s of a matrix product, or the bytes/s of a sum.

    The peak is that of the row's own rounds; results before 0.2 have one for all rows.
    """
    peak = case["peak"] if "peak" in case else result["peak"]
    for name in (OURS_COMPILED, OURS):
        run = case["systems"].get(name, {})
        for kind in ("flops", "bytes"):
            if kind in run and run["seconds"]:
                return f"{run[kind] / median(run['seconds']) / peak[kind]:.0%} {kind}"
    return ""


def notes(result: dict[str, Any]) -> Iterator[str]:
    """Yields notes on what is no row of the table: memory, the second question, preparing pictures, and the losses."""
    memory = result["memory"]
    batch = memory[OURS]["batch"]
    kept = {name: memory[name]["hidden_states_bytes"] / 1e6 for name in (REFERENCE, OURS)}
    peaks = ", ".join(f"{name} {memory[name]['peak_bytes'] / 1e6:.0f} MB" for name in (STOCK, REFERENCE, OURS))
    yield (
        f"- Hidden states that the tower keeps of a picture: reference {kept[REFERENCE]:.1f} MB, ours {kept[OURS]:.1f} "
        f"MB ({kept[REFERENCE] / kept[OURS]:.1f}x less). Peak above the weights while encoding {batch}: {peaks}."
    )
    stock, ours = (count.cache_bytes(config, QUESTION + ANSWER) / 1e6 for config in configs(result["size"]))
    yield (
        f"- Cache of a request (picture, {QUESTION} and {ANSWER} tokens; counted, 16 bit): stock {stock:.3g} MB, ours "
        f"{ours:.3g} MB, {stock / ours:.2f}x less."
    )
    # As they are stored: without the tower's last layer, which the method never uses.
    stock, ours = (count.weight_bytes(count.NAMED[name]()) / 1e9 for name in ("llava-1.5-7b", "stf-7b"))
    yield (
        f"- Weights of the 7B (counted, 16 bit): stock {stock:.2f} GB, ours {ours:.2f} GB, "
        f"{100 * (ours / stock - 1):.1f} % more."
    )
    if "largest_batch" in result and result["size"] == "7b":  # smaller models reach the end of the search
        fits = result["largest_batch"]
        yield f"- Largest batch (picture, {QUESTION} and {ANSWER} tokens): stock {fits[STOCK]}, ours {fits[OURS]}."
    for batch in sorted({case["batch"] for case in result["cases"]}):
        yield from across_rows(result, batch)
    for size, works in result["processor"].items():
        stock_one, one, eight, threads = (
            f"{1e3 * median(works[name]):.0f} ms" for name in ("stock, one", "one", "eight", "eight, threads")
        )
        yield (
            f"- Preparing a picture of {size}, not in the times above: {one} on the CPU (stock's class for the same "
            f"pixels: {stock_one}); eight in {eight}, with threads in {threads}."
        )
    losses = [label(case) for case in result["cases"] if "kept" not in case and is_loss(case)]
    yield f"- No gain over stock, or a loss: {'; '.join(losses) or 'nowhere'}."
    losses = [label(case) for case in result["cases"] if "kept" in case and is_loss(case)]
    if losses:
        yield f"- Reduced, but no gain over all tokens of the same system, or a loss: {'; '.join(losses)}."
    done = {(case["metric"], case["batch"], case["text"], tokens(case)) for case in result["cases"]}
    rows = cases(PLANS[result["size"]], eager=result.get("eager", False))
    left = Counter(case.metric for case in rows if case.key not in done)
    if left:
        yield f"- Rows that were not timed: {', '.join(f'{metric} ({number})' for metric, number in left.items())}."
    if "compiling" in result and not result["compiling"]["kernels_from_disk"]:
        seconds = result["compiling"]["seconds"]
        yield f"- Compiling took {seconds:.0f} s for the first graphs; it is in none of the times."


def tokens(case: dict[str, Any]) -> int | None:
    """Returns the tokens of a picture in a row that has a budget or a reducer."""
    return case.get("budget", case.get("kept"))


def is_loss(case: dict[str, Any]) -> bool:
    runs, pairs = case["systems"], REDUCED.items() if "kept" in case else PAIRS
    return any(ratio(runs, *pair) is not None and not gains(runs, *pair) for pair in pairs)


def median_seconds(result: dict[str, Any], name: str, metric: str, batch: int) -> float | None:
    """Returns the median time of a system in the row with a picture and a question."""
    for case in result["cases"]:
        if (case["metric"], case["batch"], case["text"]) == (metric, batch, QUESTION):
            times = case["systems"].get(name, {}).get("seconds")
            return median(times) if times else None
    return None


def across_rows(result: dict[str, Any], batch: int) -> Iterator[str]:
    """Yields ratios of times in different rows: a picture in the cache, a long answer. It prefers compiled times."""
    compiled = median_seconds(result, OURS_COMPILED, "first token", batch) is not None
    stock, ours = (STOCK_COMPILED, OURS_COMPILED) if compiled else (STOCK, OURS)
    theirs, mine = (
        {metric: median_seconds(result, name, metric, batch) for metric in ACROSS} for name in (stock, ours)
    )
    whole, second = mine["first token"], mine["second question"]
    if whole and second:
        yield (
            f"- A second question about a picture, batch {batch}, is {whole / second:.1f}x faster to the first token "
            f"than the first one was ({ours}, picture in the cache)."
        )
    whole, second = theirs["answer"], mine["second answer"]
    if whole and second:
        yield (
            f"- An answer of {ANSWER} tokens to a second question, batch {batch}: {whole / second:.2f}x as fast as "
            f"{stock}'s with a whole pass ({ours}, picture in the cache)."
        )
    if all(times[metric] for times in (theirs, mine) for metric in ("first token", "decode")):
        their_long, my_long = (times["first token"] + (LONG_ANSWER - 1) * times["decode"] for times in (theirs, mine))
        yield (
            f"- An answer of {LONG_ANSWER} tokens, batch {batch}, computed from the rows of first token and decode: "
            f"{their_long / my_long:.2f}x ({ours} against {stock})."
        )


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws how many times faster ours, reduced where it can be, is than the stock model, as bars, row by row."""
    cases = result["cases"]
    figure = Figure(figsize=(8, 0.45 * len(cases) + 1.5), layout="constrained")
    axes = figure.subplots()
    for offset, (name, pair) in enumerate(zip(("eager", "compiled"), PAIRS, strict=True)):
        places = [place + 0.4 * offset - 0.2 for place in range(len(cases))]
        axes.barh(places, [gain_over_stock(case, *pair) or 0 for case in cases], height=0.4, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(cases)), [label(case) for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the stock LLaVA (left of the line: slower)")
    axes.set_title(f"{result['device']}, {result['dtype']}, {result['size']}")
    axes.legend()
    figure.savefig(path)


def gain_over_stock(case: dict[str, Any], stock: str, ours: str) -> float | None:
    return ratio(case["systems"], stock, REDUCED[ours] if "kept" in case else ours)
