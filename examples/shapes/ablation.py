# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Asks the paper's question in miniature: what do Multi-Block and Spatial Token Fusion gain or cost?

Systems that differ only in the connector train in both stages, on the same rows in the same order, from the same tower
and language model, with several seeds. The language model has learned to look things up, from ideal tokens that belong
to no connector (`ideal.py`). Muon and AdamW train all systems, at the rates of `warm_up.py`: AdamW alone did not learn
the names of hundreds of objects. Each run writes its answers' marks, so that systems are compared question by question.
"""

import hashlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm
from transformers import BatchFeature, TrainerCallback

from conversion.checkpoints.folders import complete_or_absent
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration, LlavaSTFProcessor, reduce_image_tokens

from .ablation_report import in_curve, questions_of, report
from .connectors import REFERENCE, SYSTEMS, Asked, System
from .connectors.divt import DiVT
from .connectors.encode_first import encode_first, tower_features
from .connectors.inside import Schedule, dropping
from .connectors.vq_token import filmed
from .evaluate import ask, is_right, prompts
from .processes import start_module
from .recipe import STAGES
from .text import messages_of, read_rows
from .training import DEVICE, optimizer_of
from .warm_up import ADAM_RATE, LANGUAGE_RATE, NEW_RATE, WARM_RATE, shorten

CONNECTOR_RATES = {"stage1": NEW_RATE, "stage2": WARM_RATE}
POINTS = 4  # of a learning curve; the last is the end
FITTED_PICTURES = 256  # training pictures that say how long new tokens are, and on which DiVT's threshold is chosen
SEARCHED = 200  # training questions that a search asks
BATCH = 100  # questions that are answered together
DATA = "data"  # the digest of the rows in a result; the first results have none


@dataclass(frozen=True)
class Run:
    """Describes a training of one system with one seed."""

    system: str
    seed: int
    captions: int
    rows: int
    questions: int  # of each kind in each group
    equal: str = "rows"  # what the systems of a comparison have in common, or "time"

    @property
    def file(self) -> str:
        return f"{self.equal}-{re.sub(r'[^a-z0-9]+', '-', self.system.lower()).strip('-')}-{self.seed}.json"


def ablate(
    work: str | Path,
    out: str | Path,
    seeds: int = 5,
    captions: int = 8000,
    rows: int = 1920,
    questions: int = 50,
    equal: str = "rows",
    systems: list[str] | None = None,
    workers: int | None = None,
) -> Path:
    """Trains and tests every system with every seed, and writes results.json, a table and a plot into `out`.

    It skips what has a result, so that the same command continues a stopped one, and a higher `seeds` adds to it.

    Args:
        work: the folder of `make`, with the data, and the tower and language model that all systems start from.
        out: folder for the results.
        seeds: number of seeds, which set connector and order.
        captions, rows: number of rows in stage 1 and stage 2.
        questions: number of questions of each kind in each group of the test's pictures.
        equal: "rows", or "time": a system then has so many rows that it trains as long as LLaVA-1.5 does with `rows`.
            This needs the results of "rows".
        systems: names of the systems; by default all.
        workers: runs at a time, with one thread each; by default the number of cores.

    Raises:
        ValueError: if a system is unknown, no question is asked, a run fails, or `out` has results of other settings or
            another start.
    """
    work, out = Path(work).resolve(), Path(out).resolve()
    chosen = [system_of(name) for name in dict.fromkeys(systems or [system.name for system in SYSTEMS])]
    if questions < 1:
        raise ValueError(f"`questions` is {questions}, expected 1 or more of each kind in each group.")
    if not (work / "start").exists():
        raise ValueError(f"There is no {work / 'start'}: run `python -m examples.shapes make {work} OUT` first.")
    (out / "runs").mkdir(parents=True, exist_ok=True)
    start = _digest(work / "start" / "model.safetensors")
    for file in sorted((out / "runs").glob("*.json")):  # the table has all of them
        _check(file, {"start": start, "questions": questions}, {"captions": captions, "rows": rows}, work / "data")
    todo = [
        Run(system.name, seed, *_amounts(out, system.name, captions, rows, equal), questions, equal)
        for seed in range(seeds)
        for system in chosen
        if equal == "rows" or system.name != REFERENCE
    ]
    todo = [run for run in todo if not (out / "runs" / run.file).exists()]

    def launch(run: Run) -> int:
        words = ("examples.shapes", "ablation-run", work, out, *astuple(run))
        with (out / "runs" / run.file).with_suffix(".log").open("w", encoding="utf-8") as log:
            return start_module(*words, stdout=log, stderr=log).wait()

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        statuses = list(tqdm(pool.map(launch, todo), total=len(todo), desc="runs", unit="run"))
    failed = [(out / "runs" / run.file).with_suffix(".log") for run, code in zip(todo, statuses, strict=True) if code]
    if failed:
        raise ValueError(f"{len(failed)} runs failed, see {failed[0]}; the others are kept.")
    return report(out, work / "data", questions)


def system_of(name: str) -> System:
    """Returns the system of a name; raises a `ValueError` that lists them."""
    for system in SYSTEMS:
        if system.name == name:
            return system
    raise ValueError(f"There is no system {name!r}, expected some of: {', '.join(one.name for one in SYSTEMS)}.")


def _amounts(out: Path, system: str, captions: int, rows: int, equal: str) -> tuple[int, int]:
    """Returns the rows of both stages; for equal time, more where the results for equal rows were faster."""
    if equal == "rows":
        return captions, rows
    if equal != "time":
        raise ValueError(f"`equal` is {equal!r}, expected 'rows' or 'time'.")
    factor = _training_seconds(out, REFERENCE) / _training_seconds(out, system)
    return round(captions * factor), round(rows * factor)


def _training_seconds(out: Path, system: str) -> float:
    files = sorted((out / "runs").glob(Run(system, 0, 0, 0, 0).file.replace("-0.json", "-[0-9]*.json")))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not runs:
        raise ValueError(f"There is no result of {system} for equal rows: run it first, without `--equal time`.")
    return statistics.median(sum(run["seconds"].values()) for run in runs)


def _check(file: Path, settings: dict[str, object], amounts: dict[str, int], data: Path) -> None:
    """Raises a `ValueError` if a result has other settings or data, or, for equal rows, other amounts of them.

    For equal time the amounts depend on a median, which later results may change.
    """
    found = json.loads(file.read_text(encoding="utf-8"))
    if DATA in found:
        settings = settings | {DATA: _digest_of(data)}
    for name, value in (settings | amounts if found["equal"] == "rows" else settings).items():
        if found.get(name) != value:
            raise ValueError(
                f"{file} has {name} {found.get(name)}, expected {value}: name another folder, or remove it."
            )


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@cache
def _digest_of(data: Path) -> str:
    """Returns a digest of the rows of both stages and of the test."""
    return _digest(*(data / name for name in (*(stage.rows for stage in STAGES[:2]), "test.json")))


def build(
    system: System, start: str | Path, seed: int, data: Path | None = None
) -> tuple[LlavaSTFForConditionalGeneration, LlavaSTFProcessor]:
    """Loads the checkpoint `start` with the system's connector, newly initialised; `data` has pictures to fit it on."""
    settings = {"vision_feature_layer": list(system.taps), "fusion_window": system.window}
    config = LlavaSTFConfig.from_pretrained(start, **settings)
    trained = LlavaSTFForConditionalGeneration.from_pretrained(start, dtype=torch.float32).state_dict()
    model = LlavaSTFForConditionalGeneration(config).float()
    torch.manual_seed(seed)
    model.model.multi_modal_projector = system.projector(config)
    kept = {name: weight for name, weight in trained.items() if ".multi_modal_projector." not in name}
    missing, _ = model.load_state_dict(kept, strict=False)
    assert all(".multi_modal_projector." in name for name in missing)
    processor = LlavaSTFProcessor.from_pretrained(start)
    processor.fusion_window = system.window
    if data is not None:
        fit(model.eval(), processor, system, data)
    return model, processor


@torch.no_grad()
def fit(model: LlavaSTFForConditionalGeneration, processor: LlavaSTFProcessor, system: System, data: Path) -> None:
    """Fits a new connector to some training pictures: DiVT's threshold, and tokens as long as words."""
    rows = read_rows(data / "captions.json")[:FITTED_PICTURES]
    conversations = [messages_of(row, data)[:1] for row in rows]
    inputs = prompts(model, processor, conversations, max_soft_tokens=system.budget)
    connector = model.model.multi_modal_projector
    if isinstance(connector, DiVT):
        full = model.config.tokens_per_image // 4  # as many as windows of 2 x 2 have
        connector.fit(tower_features(model, inputs["pixel_values"]), full)
    shorten(model, torch.cat(_encoded(model, system, inputs)))


def _encoded(model: LlavaSTFForConditionalGeneration, system: System, inputs: BatchFeature) -> list[torch.Tensor]:
    if system.encode is not None:
        return system.encode(model, dict(inputs))
    return model.get_image_features(inputs["pixel_values"], inputs.get("image_tokens")).pooler_output


def run_one(work: str, out: str, **settings: Any) -> None:
    """Trains and tests one system with one seed; [`ablate`] starts it with the settings of a [`Run`]."""
    run = Run(**settings)
    of, seed = system_of(run.system), run.seed
    data, start = Path(work) / "data", Path(work) / "start"
    model, processor = build(of, start, seed, data)
    examiner = Examiner(of, processor, data, run.questions)
    curve = Curve(examiner)
    seconds = {}
    with encoding_first(model, of):
        first, second = STAGES[:2]
        seconds[first.name] = train(model, processor, of, first, data / first.rows, run.captions, seed, None)
        with of.inside(model):
            seconds[second.name] = train(model, processor, of, second, data / second.rows, run.rows, seed, curve)
            asked = {way.name: examiner.ask(model.eval(), way) for way in of.asked}
    result = {
        **asdict(run),
        "start": _digest(start / "model.safetensors"),
        DATA: _digest_of(data),
        "parameters": sum(weight.numel() for weight in model.model.multi_modal_projector.parameters()),
        "seconds": seconds,
        "curve": curve.points,
        "asked": asked,
    }
    with complete_or_absent(Path(out) / "runs" / run.file, file=True) as unfinished:
        unfinished.write_text(json.dumps(result) + "\n", encoding="utf-8")


def train(
    model: LlavaSTFForConditionalGeneration,
    processor: LlavaSTFProcessor,
    system: System,
    stage: Any,
    file: Path,
    limit: int,
    seed: int,
    curve: "Curve | None",
) -> float:
    """Trains one stage on the first `limit` rows of a file, over again if it has fewer; returns seconds of a core."""
    # These imports are here because only this command needs TRL.
    from training import LlavaSTFTrainer, LlavaSTFTrainingArguments
    from training.rows import load_rows

    dataset = load_rows(str(file), str(file.parent))
    dataset = dataset.select([index % len(dataset) for index in range(limit)])
    settings = yaml.safe_load(stage.file.read_text(encoding="utf-8"))
    # Grouping by length would order the rows by a system's own lengths.
    settings |= {"num_train_epochs": 1, "dataloader_num_workers": 0, "group_by_modality_length": False}
    # The speed of the processor is not measured, because that would take longer than some stages.
    settings |= {"seed": seed, "report_to": "none", "peak_tflops": 1.0, **system.settings}
    settings["use_cpu"] = DEVICE == "cpu"
    settings.pop("dtype")  # of loading
    with tempfile.TemporaryDirectory() as scratch:
        args = LlavaSTFTrainingArguments(output_dir=scratch, **settings)
        trainer = LlavaSTFTrainer(
            model.train(),
            args,
            train_dataset=dataset,
            processing_class=processor,
            callbacks=[curve] if curve else None,
        )
        rates = {"multi_modal_projector": CONNECTOR_RATES[stage.name], ".language_model.layers.": LANGUAGE_RATE}
        trainer.optimizer = optimizer_of(model, rates, ADAM_RATE)  # what it trains is known now
        started = time.process_time()
        trainer.train()
        return round(time.process_time() - started - (curve.paused if curve else 0), 1)


@contextmanager
def encoding_first(model: LlavaSTFForConditionalGeneration, system: System) -> Iterator[None]:
    """Lets a system that encodes before the prompt has its final length do so in every forward pass with pixels."""

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if system.encode is None or kwargs.get("pixel_values") is None:
            return None
        return args, dict(encode_first(model, kwargs, system.encode))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Examiner:
    """Asks a model questions of the test, except for captions, which are right only as a whole."""

    system: System
    processor: LlavaSTFProcessor
    data: Path
    questions: int  # of each kind in each group
    rows: list[dict] = field(init=False)

    def __post_init__(self) -> None:
        chosen = {row["id"] for row in questions_of(self.data, self.questions)}
        self.rows = [row for row in read_rows(self.data / "test.json") if row["id"] in chosen]

    def ask(self, model: LlavaSTFForConditionalGeneration, way: Asked, some: bool = False) -> dict[str, Any]:
        """Returns the mean number of tokens, seconds of a core, and a mark for each question, or for `some`.

        After a search it also returns which share of the tokens is kept behind which share of the layers.
        """
        rows = [row for row in self.rows if not some or in_curve(row["id"])]
        schedule = self.searched(model, way) if callable(way.inside) else way.inside
        started = time.process_time()
        tokens, right = self.marks(model, way, schedule, rows)
        found = {
            "tokens": statistics.mean(tokens),
            "seconds": round(time.process_time() - started, 1),
            "right": right,
        }
        return found | {"kept": schedule.kept} if callable(way.inside) else found

    def searched(self, model: LlavaSTFForConditionalGeneration, way: Asked) -> Schedule:
        """Returns what the way's search makes of the first questions about training pictures."""
        rows = read_rows(self.data / STAGES[1].rows)[:SEARCHED]
        return way.inside(model, lambda schedule: self.marks(model, way, schedule, rows)[1].count("1"))

    def marks(
        self, model: LlavaSTFForConditionalGeneration, way: Asked, schedule: Schedule | None, rows: list[dict]
    ) -> tuple[list[int], str]:
        """Returns the number of tokens of each prompt, and a mark for each row in its order."""
        tokens: list[int] = []

        def inputs_of(conversations: list[list[dict]]) -> BatchFeature:
            inputs = self.inputs(model, way, conversations)
            tokens.extend((inputs["input_ids"] == model.config.image_token_id).sum(1).tolist())
            return inputs

        with torch.inference_mode(), dropping(model, schedule) if schedule else nullcontext():
            answers = ask(model, self.processor, self.data, rows, BATCH, inputs_of)
        right = (is_right(answers[row["id"]], row["conversations"][1]["value"]) for row in rows)
        return tokens, "".join("01"[mark] for mark in right)

    def inputs(self, model: LlavaSTFForConditionalGeneration, way: Asked, conversations: list) -> BatchFeature:
        """Returns what `generate` gets."""
        if way.film:
            conversations = [filmed(conversation) for conversation in conversations]
        prepare = partial(prompts, model, self.processor, conversations)
        if way.budget is not None:
            return prepare(max_soft_tokens=way.budget)
        if way.encode is not None:
            return encode_first(model, prepare(), way.encode)
        if way.keep is not None:
            return reduce_image_tokens(model, prepare(), keep=way.keep, score=way.score)
        return prepare()


class Curve(TrainerCallback):
    """Asks some questions at several points of a training; the last point is left to the test."""

    def __init__(self, examiner: Examiner):
        self.examiner, self.paused, self.started = examiner, 0.0, 0.0
        self.points: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        ends = {round(state.max_steps * point / POINTS) for point in range(1, POINTS)} - {0, state.max_steps}
        if state.global_step not in ends:
            return
        begun = time.process_time()
        answers = self.examiner.ask(model.eval(), self.examiner.system.asked[0], some=True)
        model.train()
        share, seconds = state.global_step / state.max_steps, begun - self.started - self.paused
        self.points.append(
            {
                "share": round(share, 4),
                "seconds": round(seconds, 1),
                "right": answers["right"],
            }
        )
        self.paused += time.process_time() - begun
