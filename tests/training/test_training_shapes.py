"""The shapes example's trainings: the recipe from the first picture to a Hub folder, and LoRA on the small model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from examples.shapes.__main__ import main
from examples.shapes.evaluate import evaluate
from examples.shapes.generate import generate
from examples.shapes.pictograms import SAMPLE
from examples.shapes.questions import KINDS
from examples.shapes.recipe import STAGES, TAPS
from modeling_llava_stf import LlavaSTFForConditionalGeneration
from training.merge import merge

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "shapes" / "model"


def test_one_command_makes_a_model(tmp_path, monkeypatch):
    """All steps, each for a moment: what it makes is a complete Hub folder that loads without this package."""
    counts = {
        "scenes": 40,
        "test-scenes": 2,
        "clip-steps": 2,
        "language-model-steps": 2,
        "imitation-steps": 2,
        "warm-up-steps": 2,
    }
    options = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
    out = tmp_path / "model"
    shutil.copytree(SAMPLE, tmp_path / "work" / "pictograms")  # in place of what it would download
    monkeypatch.setattr("sys.argv", ["shapes", "make", str(tmp_path / "work"), str(out), *options])
    assert main() == 0
    model = LlavaSTFForConditionalGeneration.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.float16 and model.config.taps == list(TAPS)
    assert (out / "model.safetensors").stat().st_size < 8e6
    assert {"LICENSE", "README.md", "modeling_llava_stf.py", "processor_config.json", "evaluation.json"} <= {
        file.name for file in out.iterdir()
    }
    shown = tmp_path / "work" / "data" / "images" / "test-000000.png"  # the card asks about it
    assert (out / "example.png").read_bytes() == shown.read_bytes()
    seconds = json.loads((out / "log_seconds.json").read_text())
    steps = (
        "data",
        "tokenizer",
        "clip + language-model",
        "start",
        "warm-up",
        *(stage.name for stage in STAGES),
    )
    assert [*seconds] == [*steps]
    assert json.loads((out / "evaluation.json").read_text())["kinds"].keys() == KINDS.keys()


def test_lora_teaches_a_new_kind_of_question(tmp_path):
    data = generate(tmp_path / "data", scenes=900, test_scenes=100, seed=7)
    command = [
        *("--config", "examples/shapes/recipes/lora.yaml", "--model_name_or_path", str(MODEL)),
        *("--data_path", str(data / "new-train.json"), "--image_folder", str(data)),
        *("--output_dir", str(tmp_path / "adapter"), "--num_train_epochs", "4"),  # few rows, often
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "training", *command], cwd=ROOT, env=environment, check=True, timeout=3600)
    taught = merge(tmp_path / "adapter", tmp_path / "merged")
    before, after = (evaluate(folder, data, new=True)["kinds"]["furthest left"] for folder in (MODEL, taught))
    rights = [sum(part["right"] for part in parts.values()) for parts in (before, after)]
    asked = sum(part["questions"] for part in after.values())
    assert rights[0] < 0.05 * asked and rights[1] > 0.5 * asked
