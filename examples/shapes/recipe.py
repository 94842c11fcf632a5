# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the paper's recipe in miniature, from drawn pictures to a Hub folder, by the usual commands."""

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from conversion.checkpoints.folders import complete_or_absent, require_empty, save_checkpoint
from hub_card.card import EXAMPLE_PICTURE
from hub_card.memory import MEMORY_FILE
from modeling_llava_stf import LlavaSTFForConditionalGeneration

from .clip import LAYERS
from .evaluate import evaluate, write_json
from .processes import start_module

# As in the paper, the first is LLaVA's, the last block but one; shallower ones follow.
TAPS = tuple(range(LAYERS - 1, LAYERS - 5, -1))
RECIPES = Path(__file__).parent / "recipes"
GRACE = 10  # seconds in which a stopped step may end by itself


@dataclass(frozen=True)
class Stage:
    """Describes a training: its folder, its recipe, its rows, and its changes of the recipe."""

    name: str
    recipe: str
    rows: str
    changes: tuple = ()

    @property
    def file(self) -> Path:
        return RECIPES / f"{self.recipe}.yaml"


# These are the paper's two stages, and the one that teaches several token budgets.
STAGES = (
    Stage("stage1", "stage1", "captions.json"),
    Stage("stage2", "stage2", "dialogues.json"),
    Stage("elastic", "elastic", "dialogues.json"),
)
LOGS = dict.fromkeys(("clip", "language-model", "warm-up"), "training_log.json")
LOGS |= {stage.name: "trainer_state.json" for stage in STAGES}
REPO_ID = "YOUR-NAME/llava-stf-shapes"  # used on the card until the model is published
NOTE = (
    "A small model that was trained from nothing: it knows about 300 objects as artists draw them for emoji, and "
    "nothing else. Do not ask it about photographs. It learned from scenes of Noto Emoji and its first version "
    "(Google, Apache-2.0), Twemoji (Twitter and others, CC BY 4.0), Emoji One 2.3 (CC BY 4.0) and Firefox OS Emoji "
    "(Mozilla, Apache-2.0), and was tested with Fluent Emoji Flat (Microsoft, MIT), too."
)
RESULTS = ("evaluation.json", "lmms_eval.json")  # of `evaluate`, and of lmms-eval if it was run
CARD = ("--repo-id", REPO_ID, "--license", "apache-2.0", "--language", "en", "--note", NOTE)


def make(
    work: str | Path,
    out: str | Path,
    scenes: int = 48000,
    test_scenes: int = 900,
    clip_steps: int = 14000,
    language_model_steps: int = 2400,
    imitation_steps: int = 8000,
    warm_up_steps: int = 1600,
    seed: int = 0,
) -> Path:
    """Trains a small LLaVA-STF from nothing and writes it into `out`, which must not exist or be empty.

    Each step writes its own folder in `work`. Steps with a complete folder are skipped, so that the same command
    continues a stopped run.

    Args:
        work: folder for data and intermediate models.
        out: the Hub folder with float16 weights, code, processor, logs and evaluation.
        scenes, test_scenes: number of training and test scenes.
        clip_steps, language_model_steps: steps of the two pre-trainings, which run in parallel.
        imitation_steps, warm_up_steps: steps of the fusion modules alone, and of them and the language model, before
            the paper's stages.
        seed: seed of data, weights and order.

    Raises:
        ValueError: if a step fails, `work` was begun with other settings, or is in `out`.
    """
    settings = {
        "scenes": scenes,
        "test_scenes": test_scenes,
        "clip_steps": clip_steps,
        "language_model_steps": language_model_steps,
        "imitation_steps": imitation_steps,
        "warm_up_steps": warm_up_steps,
        "seed": seed,
    }
    out, work = require_empty(out), Path(work).resolve()
    if out in (work, *work.parents):
        raise ValueError(f"{work} is in the folder of the model, {out}: name another WORK or OUT.")
    work.mkdir(parents=True, exist_ok=True)
    keep_settings(work / "settings.json", settings)
    pictograms, data, tokenizer, clip, language_model = (
        work / name for name in ("pictograms", "data", "tokenizer", "clip", "language-model")
    )
    timer = Timer(work / "seconds.json")
    counts = ("--scenes", scenes, "--test-scenes", test_scenes, "--seed", seed)
    timer.run({pictograms: ("examples.shapes", "pictograms", pictograms)})
    timer.run({data: ("examples.shapes", "generate", data, *counts, "--pictograms", pictograms)})
    timer.run({tokenizer: ("examples.shapes", "tokenizer", data, tokenizer)})
    tower = ("clip", data, clip, "--steps", clip_steps, "--pictograms", pictograms)
    reader = ("language-model", data, tokenizer, language_model, "--steps", language_model_steps)
    timer.run(
        {
            folder: ("examples.shapes", *command, "--seed", seed)
            for folder, command in ((clip, tower), (language_model, reader))
        }
    )
    start, warm = begin(work, timer, seed), work / "warm-up"
    lessons = ("--imitation-steps", imitation_steps, "--steps", warm_up_steps, "--seed", seed)
    timer.run({warm: ("examples.shapes", "warm-up", data, start, warm, *lessons)})
    trained = train(STAGES, warm, data, seed, timer)
    with complete_or_absent(out) as folder:
        pack(trained, folder)
        for step, name in LOGS.items():
            shutil.copyfile(work / step / name, folder / f"log_{step}.json")
        shutil.copyfile(work / "seconds.json", folder / "log_seconds.json")
        shutil.copyfile(trained / "recipe.yaml", folder / "recipe.yaml")
        shutil.copyfile(data / "images" / "test-000000.png", folder / EXAMPLE_PICTURE)
        evaluate(folder, data, folder / "evaluation.json", name=REPO_ID)
        render_card(folder)
    return out


def keep_settings(file: Path, settings: dict[str, int]) -> None:
    """Writes the settings of a folder's first run; raises a `ValueError` if those of a later run differ."""
    if not file.exists():
        write_json(file, settings)
    begun = json.loads(file.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if begun.get(name) != value:
            raise ValueError(
                f"{file.parent} was begun with {name} {begun.get(name)}, and not {value}: give the same settings to "
                "continue, or name another WORK."
            )


def begin(work: Path, timer: "Timer", seed: int) -> Path:
    """Returns the checkpoint that all else begins with: tower, language model and new fusion modules."""
    start = work / "start"
    towers = ("--init-fusion", "--vision-tower", work / "clip", "--keep-full-tower", "--taps", *TAPS, "--seed", seed)
    timer.run({start: ("conversion", work / "language-model", start, *towers)})
    return start


def render_card(model: str | Path) -> None:
    """Writes the card of the finished model into its folder."""
    results = [file for name in RESULTS if (file := Path(model) / name).exists()]
    options = (*CARD, *(part for file in results for part in ("--results", file)))
    if start_module("hub_card", "render", model, *options, stdout=subprocess.DEVNULL).wait():
        raise ValueError("The card could not be written, see above.")
    (Path(model) / MEMORY_FILE).unlink()  # these options are here, and paths in it would change with the folder


def train(stages: tuple[Stage, ...], start: Path, data: Path, seed: int, timer: "Timer") -> Path:
    """Trains the stages, each from the result of the one before; returns the folder of the last."""
    for stage in stages:
        out = start.parent / stage.name
        paths = ("--data_path", data / stage.rows, "--image_folder", data, "--output_dir", out)
        options = ("--model_name_or_path", start, "--seed", seed, *stage.changes)
        timer.run({out: (*trainer(stage.file), *options, *paths)})
        start = out
    return start


def trainer(recipe: Path) -> tuple:
    """Returns the arguments of `python -m` for a stage; on a CPU up to eight processes share a batch."""
    if torch.cuda.is_available():
        return ("training", "--config", recipe)
    processes = 2 ** min(3, len(os.sched_getaffinity(0)).bit_length() - 1)
    batch = yaml.safe_load(recipe.read_text(encoding="utf-8"))["global_batch_size"]
    launch = ("torch.distributed.run", "--nproc-per-node", processes, "-m", "training", "--use_cpu", "true")
    shared = ("--per_device_train_batch_size", batch // processes, "--dataloader_num_workers", 0)
    return (*launch, "--config", recipe, *shared)


def pack(trained: Path, folder: Path) -> None:
    """Saves a checkpoint in float16, which has half the size and is closer to the weights than bfloat16."""
    model = LlavaSTFForConditionalGeneration.from_pretrained(trained, dtype=torch.float16)
    save_checkpoint(folder, model, trained)


class Timer:
    """Runs steps as processes, and records how long each took in all attempts, in a file that survives them."""

    def __init__(self, file: Path):
        self.file = file

    def run(self, steps: dict[Path, tuple]) -> None:
        """Runs in parallel the commands whose folders do not exist; a stopped run stops them, too."""
        todo = {folder: command for folder, command in steps.items() if not _complete(folder)}
        if not todo:
            return
        started = time.perf_counter()
        running = {}
        try:
            for folder, command in todo.items():
                print(f"\n{folder.name}: python -m {' '.join(map(str, command))}", flush=True)
                running[folder] = start_module(*command)
            failed = [folder.name for folder, process in running.items() if process.wait()]
        finally:
            for process in running.values():
                _end(process)
            self._add(" + ".join(folder.name for folder in todo), time.perf_counter() - started)
        if failed:
            raise ValueError(
                f"{' and '.join(failed)} failed, see above; what is complete is kept for the next attempt."
            )

    def _add(self, name: str, elapsed: float) -> None:
        """Adds seconds to those that a step took in earlier attempts."""
        seconds = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        seconds[name] = round(seconds.get(name, 0) + elapsed, 1)
        write_json(self.file, seconds)


def _end(process: subprocess.Popen) -> None:
    """Waits for a process, which Ctrl-C may have reached, too; ends it if it does not end by itself."""
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def _complete(folder: Path) -> bool:
    """Returns whether a folder is complete. A training writes its config last; other folders appear complete."""
    return (folder / "config.json").exists() if folder.name in {stage.name for stage in STAGES} else folder.exists()
