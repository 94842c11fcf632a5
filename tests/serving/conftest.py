"""Servers that the tests of serving share, and the answers that they must give.

`make test-serving` runs these tests in an environment with vLLM. A server takes a minute to start, so the tests share
one without compiling; a test file that needs another server starts it for itself.
"""

import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prompts import generated, prompts
from vllm_server import Server

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "shapes" / "model"
TRAINING_PYTHON = ROOT / ".venv" / "bin" / "python"
FIGURES = ROOT / ".cache" / "serving.json"
FIGURES_KEY = pytest.StashKey[dict[str, Any]]()


@pytest.fixture(scope="session")
def figures(request) -> dict[str, Any]:
    """What the tests measured; printed at the end, and written to `.cache/serving.json`."""
    return request.config.stash.setdefault(FIGURES_KEY, {})


def pytest_terminal_summary(terminalreporter, config) -> None:
    figures = config.stash.get(FIGURES_KEY, {})
    if figures:
        terminalreporter.section("serving")
        for name, value in figures.items():
            terminalreporter.write_line(f"{name}: {value}")
        FIGURES.parent.mkdir(exist_ok=True)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def serve(tmp_path_factory, figures):
    """Starts a server that takes four pictures: `with serve("name", model, *options, VARIABLE="...") as server`."""

    @contextmanager
    def serve(name: str, model: Path, *options: str, **environment: str):
        options = ("--limit-mm-per-prompt", '{"image": 4}', *options)
        with Server(model, tmp_path_factory.mktemp(name), *options, **environment) as server:
            figures[f"{name}: seconds to start"] = round(server.seconds_to_start)
            yield server
            figures[f"{name}: MiB at the end"] = round(server.memory())

    return serve


@pytest.fixture(scope="session")
def eager(serve, adapter):
    """The server without compiling: blocks of 32 tokens, and the adapter `shapes`."""
    options = ["--enforce-eager", "--block-size", "32", "--enable-prompt-tokens-details"]
    options += ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"shapes={adapter}"]
    with serve("eager", MODEL, *options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as server:
        yield server


@pytest.fixture(scope="session")
def reference():
    """Answers of `generate` in float32 by a folder's model: `reference(folder)(messages)`."""
    loaded: dict[Path, Any] = {}

    def reference(folder: Path = MODEL):
        if folder not in loaded:
            model = LlavaSTFForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
            loaded[folder] = LlavaSTFProcessor.from_pretrained(folder), model
        return lambda messages, **image_options: generated(*loaded[folder], messages, **image_options)

    return reference


@pytest.fixture(scope="session")
def conversations() -> list[list[dict]]:
    return prompts()


@pytest.fixture(scope="session")
def answers(reference, conversations) -> list[dict[str, Any]]:
    """What `generate` answers to the conversations, one by one."""
    return [reference()(messages) for messages in conversations]


def train(folder: Path, recipe: str, **settings: Any) -> Path:
    """Trains an adapter with a recipe of ours, in the environment that has TRL: it answers with one word."""
    data, output = folder / "data", folder / "adapter"
    run_there("examples.shapes", "generate", data, "--scenes", 256, "--test-scenes", 1)
    rows = json.loads((data / "train.json").read_text(encoding="utf-8"))
    for turn in (turn for row in rows for turn in row["conversations"] if turn["from"] == "gpt"):
        turn["value"] = turn["value"].split()[-1]
    (data / "words.json").write_text(json.dumps(rows), encoding="utf-8")
    on_cpu = {"use_cpu": True, "bf16": False, "dtype": "float32", "report_to": "none", "peak_tflops": 1}
    on_cpu |= {"disable_tqdm": True, "dataloader_num_workers": 0, "per_device_train_batch_size": 16}
    options = {"model_name_or_path": MODEL, "data_path": data / "words.json", "output_dir": output}
    options |= {**on_cpu, "global_batch_size": 16, **settings}
    named = [part for name, value in options.items() for part in (f"--{name}", value)]
    run_there("training", "--config", recipe, *named)
    return output


def run_there(module: str, *arguments: Any) -> None:
    """Runs a command of this clone in `.venv`, where `make setup` puts what training needs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [str(part) for part in (TRAINING_PYTHON, "-m", module, *arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    """A LoRA adapter of the language model, trained with a recipe of ours."""
    return train(tmp_path_factory.mktemp("lora"), "examples/shapes/recipes/lora.yaml")
