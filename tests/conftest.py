"""Goldens of the original, and checkpoints that our own converter makes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conversion import convert
from hub_card import Facts, gather, write_card
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor

GOLDENS = Path(__file__).parent / "goldens"
CARD_FACTS = Facts(license="cc-by-nc-4.0")


@pytest.fixture(scope="session")
def goldens() -> dict[str, Any]:
    return json.loads((GOLDENS / "goldens.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden_tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "goldens.safetensors")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of a converted golden run, by its name in the goldens; converted when first asked for."""
    root = tmp_path_factory.mktemp("checkpoints")
    bases = {"pretrain": GOLDENS / "base", "lora": GOLDENS / "base"}
    done: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in done:
            done[name] = convert(GOLDENS / name, root / name, base=bases.get(name))
        return done[name]

    return checkpoint


@pytest.fixture(scope="session")
def checkpoint(checkpoints) -> Path:
    """The converted full fine-tune."""
    return checkpoints("original")


@pytest.fixture
def load_model(checkpoints):
    """Loads the model of a golden run: eval mode, float32."""

    def load(name: str = "original", **kwargs) -> LlavaSTFForConditionalGeneration:
        return LlavaSTFForConditionalGeneration.from_pretrained(checkpoints(name), **kwargs).eval()

    return load


@pytest.fixture
def model(load_model) -> LlavaSTFForConditionalGeneration:
    return load_model()


@pytest.fixture
def processor(checkpoint) -> LlavaSTFProcessor:
    return LlavaSTFProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def picture():
    """Opens a golden picture as the original does."""
    return lambda name: Image.open(GOLDENS / "images" / name).convert("RGB")


@pytest.fixture
def counters():
    """What torch.compile counts, from zero."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch.compiler.reset()


@pytest.fixture(scope="session")
def card_folder(checkpoint, tmp_path_factory) -> Path:
    """The full fine-tune with its card, as `python -m hub_card render` writes it for `some/tiny`."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("card") / "tiny")
    write_card(folder, gather(folder, "some/tiny", CARD_FACTS))
    return folder
