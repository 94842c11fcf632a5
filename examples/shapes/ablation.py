# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Asks the paper's question in miniature: what do Multi-Block and Spatial Token Fusion gain or cost?

Systems that differ only in the connector train in both stages, on the same rows in the same order, from the same tower
and language model, with several seeds. The language model is the final one of `make`: like Vicuna it can look up and
compare the content of tokens, which it would not learn in the minutes of a run. It learned this from tokens of MBTF +
STF; all connectors are new.
"""

import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn
from tqdm import tqdm
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from conversion.checkpoints.folders import complete_or_absent
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf.modeling_llava_stf import (
    LlavaSTFMultiModalProjector,
    MultiBlockTokenFusion,
    SpatialTokenFusion,
)

from .evaluate import ask, score
from .processes import start_module
from .questions import KINDS
from .recipe import AGAIN, STAGES, TAPS
from .renew import initialise
from .text import read_rows


class PooledProjector(LlavaMultiModalProjector):
    """Applies LLaVA's projector to the mean of each window of patches."""

    def __init__(self, config: LlavaSTFConfig):
        super().__init__(config)
        self.grid, self.window = config.grid_size, config.fusion_window

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Pools and projects: (B, N, C) -> (B, T, D)."""
        maps = features.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B, C, G, G)
        pooled = nn.functional.avg_pool2d(maps, self.window)
        return super().forward(pooled.flatten(2).transpose(1, 2))


class MixedProjector(nn.Sequential):
    """Applies Multi-Block Token Fusion, then LLaVA's projector to every patch: (B, N, L*C) -> (B, N, D)."""

    def __init__(self, config: LlavaSTFConfig):
        one_layer = copy.deepcopy(config)
        one_layer.vision_feature_layer = config.taps[:1]
        super().__init__(MultiBlockTokenFusion(config), LlavaMultiModalProjector(one_layer))


@dataclass(frozen=True)
class System:
    """Describes a connector between tower and language model."""

    name: str
    taps: tuple[int, ...]
    window: int
    projector: Callable[[LlavaSTFConfig], nn.Module]

    def build(self, start: str | Path, seed: int) -> tuple[LlavaSTFForConditionalGeneration, LlavaSTFProcessor]:
        """Loads the checkpoint `start` with this connector, newly initialised as PyTorch's linear layers."""
        settings = {"vision_feature_layer": list(self.taps), "fusion_window": self.window}
        config = LlavaSTFConfig.from_pretrained(start, **settings)
        trained = LlavaSTFForConditionalGeneration.from_pretrained(start, dtype=torch.float32).state_dict()
        model = LlavaSTFForConditionalGeneration(config).float()
        model.model.multi_modal_projector = self.projector(config)
        initialise(model.model.multi_modal_projector, seed)
        kept = {name: weight for name, weight in trained.items() if ".multi_modal_projector." not in name}
        missing, _ = model.load_state_dict(kept, strict=False)
        assert all(".multi_modal_projector." in name for name in missing)
        processor = LlavaSTFProcessor.from_pretrained(start)
        processor.fusion_window = self.window
        return model, processor


SYSTEMS = (
    System("LLaVA-1.5", TAPS[:1], 1, LlavaMultiModalProjector),
    System("average pooling 2x2", TAPS[:1], 2, PooledProjector),
    System("STF alone", TAPS[:1], 2, SpatialTokenFusion),
    System("MBTF alone", TAPS, 1, MixedProjector),
    System("MBTF + STF", TAPS, 2, LlavaSTFMultiModalProjector),
    System("MBTF + STF, window 4", TAPS, 4, LlavaSTFMultiModalProjector),
)
# Captions are not compared, because they are right only as a whole.
ASKED = tuple(kind for kind in KINDS if kind != "caption")


def ablate(work: str | Path, out: str | Path, seeds: int = 3, captions: int = 4800, rows: int = 2560) -> Path:
    """Trains and tests every system with every seed, and writes results.json, a table and a plot into `out`.

    It runs as many processes as there are cores, with one thread each. It skips runs that have a result.

    Args:
        work: the folder of `make` with data, tower and language model.
        out: folder for the results.
        seeds: number of seeds, which set connector and order.
        captions, rows: number of rows in stage 1 and stage 2.
    """
    work, runs = Path(work).resolve(), Path(out).resolve() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    todo = [
        (runs / f"{index}-{seed}.json", index, seed)
        for seed in range(seeds)
        for index in range(len(SYSTEMS))
        if not (runs / f"{index}-{seed}.json").exists()
    ]

    def launch(run: tuple[Path, int, int]) -> int:
        file, index, seed = run
        words = ("examples.shapes", "ablation-run", work, file, index, seed, captions, rows)
        with file.with_suffix(".log").open("w", encoding="utf-8") as log:
            return start_module(*words, stdout=log, stderr=log).wait()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        statuses = list(tqdm(pool.map(launch, todo), total=len(todo), desc="runs", unit="run"))
    failed = [run[0].with_suffix(".log") for run, status in zip(todo, statuses, strict=True) if status]
    if failed:
        raise ValueError(f"{len(failed)} runs failed, see {failed[0]}; the others are kept.")
    return report(Path(out))


def run_one(work: str, file: str, index: int, seed: int, captions: int, rows: int) -> None:
    """Trains and tests one system with one seed; [`ablate`] starts it."""
    # This import is here because only this command needs TRL.
    from training import LlavaSTFTrainer, LlavaSTFTrainingArguments
    from training.rows import load_rows

    data, target = Path(work) / "data", Path(file)
    system = SYSTEMS[index]
    model, processor = system.build(Path(work) / AGAIN[-1].name, seed)
    seconds = {}
    for stage, limit in zip(STAGES, (captions, rows), strict=True):
        dataset = load_rows(data / stage.rows, data).select(range(limit))
        settings = yaml.safe_load(stage.file.read_text(encoding="utf-8"))
        settings |= {"num_train_epochs": 1, "dataloader_num_workers": 0, "seed": seed, "report_to": "none"}
        settings.pop("dtype")  # of loading
        with tempfile.TemporaryDirectory() as scratch:
            args = LlavaSTFTrainingArguments(output_dir=scratch, **settings)
            started = time.perf_counter()
            LlavaSTFTrainer(model, args, train_dataset=dataset, processing_class=processor).train()
            seconds[stage.name] = round(time.perf_counter() - started, 1)
    questions, truth = read_rows(data / "test.json"), read_rows(data / "truth.jsonl")
    started = time.perf_counter()
    answers = ask(model.eval(), processor, data, questions)
    seconds["test"] = round(time.perf_counter() - started, 1)
    result = {
        "system": system.name,
        "seed": seed,
        "vision_tokens": model.config.tokens_per_image,
        "connector_parameters": sum(weight.numel() for weight in model.model.multi_modal_projector.parameters()),
        "captions": captions,
        "rows": rows,
        "questions": len(questions),
        "seconds": seconds,
        "kinds": score(answers, questions, truth)["kinds"],
    }
    with complete_or_absent(target, file=True) as unfinished:
        unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def report(out: Path) -> Path:
    """Writes results.json, results.md and results.png from the runs in `out`/runs."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((out / "runs").glob("*.json"))]
    systems = {system.name: [run for run in runs if run["system"] == system.name] for system in SYSTEMS}
    accuracies = {
        name: {kind: [accuracy(run, [kind]) for run in of_system] for kind in ASKED}
        | {"all": list(map(accuracy, of_system))}
        for name, of_system in systems.items()
    }
    (out / "results.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(table(systems, accuracies), encoding="utf-8")
    draw(accuracies, out / "results.png")
    return out


def accuracy(run: dict, kinds: tuple[str, ...] | list[str] = ASKED) -> float:
    """Returns the right answers in percent, over seen and unseen pairs, as the mean over the kinds."""
    shares = []
    for kind in kinds:
        parts = run["kinds"][kind].values()
        shares.append(100 * sum(part["right"] for part in parts) / sum(part["questions"] for part in parts))
    return statistics.mean(shares)


def table(systems: dict[str, list[dict]], accuracies: dict[str, dict[str, list[float]]]) -> str:
    """Returns a Markdown table: a row for each system, with mean and standard deviation over the seeds."""
    kinds = [*ASKED, "all"]
    lines = [
        "| connector | tokens | " + " | ".join(kinds) + " | training, s | test, s |",
        "| --- | --: |" + " --: |" * (len(kinds) + 2),
    ]
    for name, runs in systems.items():
        cells = [
            f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" for values in accuracies[name].values()
        ]
        training = statistics.median(sum(run["seconds"][stage.name] for stage in STAGES) for run in runs)
        testing = statistics.median(run["seconds"]["test"] for run in runs)
        cells = [str(runs[0]["vision_tokens"]), *cells, f"{training:.0f}", f"{testing:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(accuracies: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draws bars of mean accuracy by kind and system; each seed is a point."""
    from matplotlib.figure import Figure  # imported here because only this command needs it

    kinds = [*ASKED, "all"]
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(accuracies)
    for index, (name, values) in enumerate(accuracies.items()):
        places = [position + (index - (len(accuracies) - 1) / 2) * width for position in range(len(kinds))]
        axes.bar(places, [statistics.mean(values[kind]) for kind in kinds], width, label=name)
        for place, kind in zip(places, kinds, strict=True):
            axes.plot([place] * len(values[kind]), values[kind], "k.", markersize=3)
    axes.set(
        ylabel="right answers, %", ylim=(0, 105), title="Same tower, language model, rows and order; each seed a point"
    )
    axes.set_xticks(range(len(kinds)), kinds)
    figure.legend(ncols=len(accuracies), loc="outside lower center")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)
