# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Exports vision tower and fusion, pictures in and tokens out, for any number of pictures; runs the files and compares.

pip install onnx onnxscript onnxruntime
python examples/export.py MODEL OUT

OUT gets vision.pt2 (torch.export) and vision.onnx. It appears complete or not at all: each file is loaded again, and
its tokens must be those of the model within 1e-4, in float32, for one, two and five pictures.
"""

import argparse
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from conversion import ConversionError
from conversion.checkpoints.folders import complete_or_absent, require_empty
from conversion.config import read_our_config
from conversion.locate import fetch
from modeling_llava_stf import LlavaSTFForConditionalGeneration
from modeling_llava_stf._folder import check_loaded

TOLERANCE = 1e-4
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
BATCHES = (1, 2, 5)  # pictures
SHAPES = {"pixel_values": {0: torch.export.Dim("pictures", min=1, max=1024)}}


class Vision(nn.Module):
    """Computes `get_image_features` without its loops over pictures, which would fix their number in a graph."""

    def __init__(self, model: LlavaSTFForConditionalGeneration):
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.taps = model.config.taps

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, image_size, image_size) -> (B, T, D)."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        return self.projector(torch.cat([states[tap][:, 1:] for tap in self.taps], dim=-1))


def export(source: str, destination: str, revision: str | None = None) -> Path:
    """Writes both files.

    Raises:
        ValueError: if the checkpoint lacks weights, or one of the files computes something else than the model.
    """
    target = require_empty(destination)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConversionError(f"The export needs {', '.join(missing)}: pip install {' '.join(missing)}")
    folder = fetch(source, revision)
    read_our_config(folder)
    model, found = LlavaSTFForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    check_loaded(str(folder), found)
    vision = Vision(model.eval()).eval()
    example = pictures(model, 2)
    with complete_or_absent(target) as unfinished, torch.no_grad():
        torch.export.save(to_program(vision, example), unfinished / "vision.pt2")
        torch.onnx.export(
            vision,
            (example,),
            unfinished / "vision.onnx",
            input_names=["pixel_values"],
            output_names=["tokens"],
            dynamic_shapes=SHAPES,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        compare(model, torch.export.load(unfinished / "vision.pt2").module(), "vision.pt2")
        compare(model, onnx_runner(unfinished / "vision.onnx"), "vision.onnx")
    return target


def to_program(vision: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(vision, (example,), dynamic_shapes=SHAPES)


def pictures(model: LlavaSTFForConditionalGeneration, number: int) -> torch.Tensor:
    """Returns random pixels, (number, 3, image_size, image_size)."""
    vision = model.config.vision_config
    noise = torch.Generator().manual_seed(number)
    return torch.randn(number, vision.num_channels, vision.image_size, vision.image_size, generator=noise)


def onnx_runner(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        (tokens,) = session.run(None, {"pixel_values": pixel_values.numpy()})
        return torch.from_numpy(np.asarray(tokens))

    return run


def compare(model: LlavaSTFForConditionalGeneration, run: Callable[[torch.Tensor], torch.Tensor], name: str) -> None:
    """Compares the tokens of `run` with the model's own; prints the largest difference."""
    differences = []
    for number in BATCHES:
        pixels = pictures(model, number)
        expected = torch.stack(model.model.get_image_features(pixels, return_dict=True).pooler_output)
        found = run(pixels)
        if found.shape != expected.shape:
            raise ConversionError(f"{name} gives {tuple(found.shape)}, expected {tuple(expected.shape)}.")
        differences.append((found - expected).abs().max().item())
    if not max(differences) <= TOLERANCE:
        raise ConversionError(f"{name} differs from the model by {max(differences):.1e}, allowed is {TOLERANCE:.0e}.")
    print(f"- {name}: largest difference {max(differences):.1e} for {', '.join(map(str, BATCHES))} pictures")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="MODEL", help="folder or Hub id of one of our checkpoints, not quantised")
    parser.add_argument("destination", metavar="OUT", help="folder to write; must not exist, or be empty")
    parser.add_argument("--revision", help="branch, tag or commit of a MODEL on the Hub")
    warnings.filterwarnings("ignore", category=FutureWarning)  # PyTorch 2.13 about itself
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        print(f"wrote {export(**vars(parser.parse_args()))}")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
