# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The paper's recipe in miniature: from drawn pictures to a Hub folder, by the commands that one would give by hand."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from conversion.convert import ROOT, complete_or_absent, copy_licences, require_empty
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor

from .clip import LAYERS
from .evaluate import evaluate

# As the paper's: the first is LLaVA's, the last block but one; then shallower ones.
TAPS = tuple(range(LAYERS - 1, LAYERS - 5, -1))
RECIPES = Path(__file__).parent / "recipes"
LOGS = {"clip": "training_log.json", "language-model": "training_log.json", "stage1": "trainer_state.json"}
LOGS["stage2"] = LOGS["stage1"]
REPO_ID = "YOUR-NAME/llava-stf-shapes"  # on the card, until it is published
NOTE = "A small model that was trained from nothing: it knows drawn shapes and nothing else."


def make(
    work: str | Path,
    out: str | Path,
    scenes: int = 24000,
    test_scenes: int = 500,
    clip_steps: int = 3000,
    language_model_steps: int = 900,
    epochs: float = 2,
    seed: int = 0,
) -> Path:
    """Trains a small LLaVA-STF from nothing and writes it into `out`, which must not exist or be empty.

    Each step writes a folder of its own into `work`. A step whose folder is complete is not done again, so that the
    same command goes on where another one stopped.

    Args:
        work: folder for data and intermediate models.
        out: the Hub folder: float16 weights, code, processor, and beside them the logs and the evaluation.
        scenes, test_scenes: to train on, to test with.
        clip_steps, language_model_steps: of the two pre-trainings, which run side by side.
        epochs: of stage 2.
        seed: of data, weights and order.
    """
    out, work = require_empty(out), Path(work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    data, tokenizer, clip, language_model, start, stage1, stage2 = (
        work / name for name in ("data", "tokenizer", "clip", "language-model", "start", "stage1", "stage2")
    )
    shapes, train = ("examples.shapes",), ("training", "--image_folder", data, "--seed", seed)
    timer = Timer(work / "seconds.json")
    counts = ("--scenes", scenes, "--test-scenes", test_scenes, "--seed", seed)
    timer.run({data: (*shapes, "generate", data, *counts)})
    timer.run({tokenizer: (*shapes, "tokenizer", data, tokenizer)})
    steps = {clip: ("clip", clip_steps), language_model: ("language-model", language_model_steps)}
    timer.run(
        {
            folder: (*shapes, command, data, tokenizer, folder, "--steps", number, "--seed", seed)
            for folder, (command, number) in steps.items()
        }
    )
    towers = ("--init-fusion", "--vision-tower", clip, "--keep-full-tower", "--taps", *TAPS, "--seed", seed)
    timer.run({start: ("conversion", language_model, start, *towers)})
    captions = ("--config", RECIPES / "stage1.yaml", "--data_path", data / "captions.json")
    timer.run({stage1: (*train, *captions, "--model_name_or_path", start, "--output_dir", stage1)})
    questions = ("--config", RECIPES / "stage2.yaml", "--data_path", data / "train.json")
    last = ("--model_name_or_path", stage1, "--output_dir", stage2, "--num_train_epochs", epochs)
    timer.run({stage2: (*train, *questions, *last)})
    with complete_or_absent(out) as folder:
        pack(stage2, folder)
        for step, name in LOGS.items():
            shutil.copyfile(work / step / name, folder / f"log_{step}.json")
        shutil.copyfile(work / "seconds.json", folder / "log_seconds.json")
        shutil.copyfile(RECIPES / "stage2.yaml", folder / "recipe.yaml")
    evaluate(out, data, out / "evaluation.json")
    described = ("--repo-id", REPO_ID, "--license", "apache-2.0", "--language", "en", "--note", NOTE)
    words = ("hub_card", "render", out, *described, "--results", out / "evaluation.json")
    subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, check=True)
    return out


def pack(trained: Path, folder: Path) -> None:
    """A checkpoint in float16: half the size, and closer to the trained weights than bfloat16."""
    model = LlavaSTFForConditionalGeneration.from_pretrained(trained, dtype=torch.float16)
    model.save_pretrained(folder)
    LlavaSTFProcessor.from_pretrained(trained).save_pretrained(folder)
    copy_licences(folder)


class Timer:
    """Runs steps as processes and notes how long each took, in a file that outlives an interruption."""

    def __init__(self, file: Path):
        self.file = file

    def run(self, steps: dict[Path, tuple]) -> None:
        """Runs side by side the commands whose folders are not there yet, each with its share of the cores."""
        todo = {folder: command for folder, command in steps.items() if not _complete(folder)}
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, len(todo)))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        started = time.perf_counter()
        running = {}
        for folder, command in todo.items():
            print(f"\n{folder.name}: python -m {' '.join(map(str, command))}", flush=True)
            words = [sys.executable, "-m", *map(str, command)]
            running[folder] = subprocess.Popen(words, cwd=ROOT, env=environment)
        failed = [folder.name for folder, process in running.items() if process.wait()]
        if failed:
            raise ValueError(
                f"{' and '.join(failed)} failed, see above; what is complete is kept for the next attempt."
            )
        if todo:
            seconds = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
            name = " + ".join(folder.name for folder in todo)
            seconds[name] = round(time.perf_counter() - started, 1)
            self.file.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")


def _complete(folder: Path) -> bool:
    """Models are complete when their config is there, which is written last; the others appear complete."""
    return (folder / "config.json").exists() if folder.name.startswith("stage") else folder.exists()
