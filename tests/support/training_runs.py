"""Runs of `python -m training` for tests: the shipped recipes on the golden data, cut down to a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

from commands import ROOT
from conftest import GOLDENS
from safetensors.torch import load_file
from trl import ModelConfig

from training import LlavaSTFTrainer, LlavaSTFTrainingArguments
from training.arguments import DataArguments, Parser
from training.run import make_trainer

RECIPES = ROOT / "training" / "recipes"
IMAGES = GOLDENS / "images"
CONVERSATIONS = GOLDENS / "sft_conversations.json"
CAPTIONS = GOLDENS / "sft_plain.json"
# What a recipe for GPUs needs to run on a CPU, quickly; two steps of four rows are an epoch of eight.
ON_CPU = {
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "global_batch_size": 4,
    "per_device_train_batch_size": 2,
    "dataloader_num_workers": 0,
    "max_steps": 4,
    "report_to": "none",
    "peak_tflops": 1,
    "disable_tqdm": True,
    "image_folder": IMAGES,
}


def options(recipe: str, model: Path, data: Path, output: Path, **changes) -> list[str]:
    settings = {"model_name_or_path": model, "data_path": data, "output_dir": output, **ON_CPU, **changes}
    values = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    named = [part for name, several in values.items() for part in (f"--{name}", *map(str, several))]
    return ["--config", str(RECIPES / f"{recipe}.yaml"), *named]


def trainer_of(recipe: str, model: Path, data: Path, output: Path, **changes) -> LlavaSTFTrainer:
    """The trainer that the command would use."""
    parser = Parser((DataArguments, LlavaSTFTrainingArguments, ModelConfig))
    return make_trainer(*parser.parse_args_and_config(options(recipe, model, data, output, **changes)))[0]


def run(*arguments, launcher=("-m", "training"), **environment) -> subprocess.CompletedProcess:
    """Runs `python -m training`, or a launcher, in a process of its own; output and errors are captured."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *map(str, launcher), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=3600,
    )


def eight_rows(folder: Path) -> Path:
    """The golden conversations but the last, two epochs of which are four steps."""
    rows = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))[:8]
    path = folder / "eight.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def weights_of(folder: Path) -> dict:
    (file,) = (path for path in folder.glob("*model.safetensors"))
    return load_file(file)


def history(folder: Path) -> list[dict]:
    """Loss, gradient norm and rate of each step that a run logged."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    kept = ("step", "loss", "grad_norm", "learning_rate")
    return [{name: row[name] for name in kept} for row in state["log_history"] if "loss" in row]
