"""The recipe of the shapes example, from the first picture to a Hub folder."""

import json
import shutil

import torch
from commands import start_here

from examples.shapes import recipe
from examples.shapes.__main__ import main
from examples.shapes.pictograms import SAMPLE
from examples.shapes.questions import KINDS
from examples.shapes.recipe import STAGES, TAPS
from modeling_llava_stf import LlavaSTFForConditionalGeneration


def test_one_command_makes_a_model(tmp_path, monkeypatch):
    """All steps, each for a moment: what it makes is a complete Hub folder that loads without this package."""
    start_module = recipe.start_module

    def start(module, *words, **options):  # the stages run on processes of their own, the rest here
        return (start_module if module == "torch.distributed.run" else start_here)(module, *words, **options)

    monkeypatch.setattr(recipe, "start_module", start)
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
