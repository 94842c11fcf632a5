# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Ask a LLaVA-STF model about a picture.

python -m modeling_llava_stf ask IMAGE "question" [--model DIR_OR_HUB_ID] [--revision COMMIT]
python -m modeling_llava_stf demo
"""

import argparse
import io
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from . import LlavaSTFConfig, LlavaSTFForConditionalGeneration, LlavaSTFProcessor

CLONE = Path(__file__).resolve().parents[1]
DEMO_SOURCE = CLONE / "tests" / "goldens" / "original"
DEMO_MODEL = CLONE / "build" / "demo-model"
DEMO_IMAGE = CLONE / "tests" / "goldens" / "images" / "shapes.png"
DEMO_QUESTION = "What is shown in the picture?"


def main() -> int:
    arguments = _parser().parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if arguments.command == "demo":
            return ask(str(DEMO_IMAGE), DEMO_QUESTION, max_new_tokens=12)
        return ask(arguments.image, arguments.question, arguments.model, arguments.revision, arguments.max_new_tokens)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modeling_llava_stf", description="Ask about a picture.")
    commands = parser.add_subparsers(dest="command", required=True)
    ask_parser = commands.add_parser("ask", help="answer a question about a picture")
    ask_parser.add_argument("image", help="path or URL of the picture")
    ask_parser.add_argument("question")
    ask_parser.add_argument("--model", help="folder or Hub id of a LLaVA-STF checkpoint (default: the demo's model)")
    ask_parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    ask_parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer, in tokens (default: 128)")
    commands.add_parser("demo", help="ask the demo's model about a picture of this repository")
    return parser


def ask(
    image: str, question: str, model: str | None = None, revision: str | None = None, max_new_tokens: int = 128
) -> int:
    """Prints picture, question, answer, vision tokens and time."""
    folder = model or str(_demo_model())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor, network = _load(folder, revision)
    network.to(device)
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
    ]
    started = time.perf_counter()
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(device)
    inputs["pixel_values"] = inputs["pixel_values"].to(network.dtype)
    output = network.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    seconds = time.perf_counter() - started

    config = network.config
    print(f"picture   {image}")
    print(f"question  {question}")
    print(f"answer    {answer}")
    print(f"tokens    {config.tokens_per_image} for the picture, LLaVA-1.5 would take {config.grid_size**2}")
    print(f"time      {seconds:.2f} s on {device}, {network.dtype}, model loaded")
    if model is None:
        print("\nThese weights are random: a tiny checkpoint of the original's code, converted. The answer is the one")
        print("that the original gives with them, and means nothing. Name a trained checkpoint: ask ... --model NAME")
    return 0


def _load(folder: str, revision: str | None) -> tuple[LlavaSTFProcessor, LlavaSTFForConditionalGeneration]:
    if not Path(folder).is_dir() and (Path(folder).is_absolute() or folder.count("/") > 1 or folder.startswith(".")):
        raise ValueError(f"There is no folder {folder!r}.")
    if Path(folder).is_dir() and not (Path(folder) / "config.json").exists():
        raise ValueError(f"{folder} is not a checkpoint: it has no config.json.")
    # The configuration comes first: it says best what a folder is, if it is not ours.
    LlavaSTFConfig.from_pretrained(folder, revision=revision)
    processor = LlavaSTFProcessor.from_pretrained(folder, revision=revision)
    try:
        network, found = LlavaSTFForConditionalGeneration.from_pretrained(
            folder, revision=revision, dtype="auto", output_loading_info=True
        )
    except SafetensorError as error:
        raise ValueError(f"Cannot read the weights in {folder}: {error}. Are they complete?") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights, among them {missing[0]!r}: it is not complete.")
    return processor, network


def _demo_model() -> Path:
    if not DEMO_SOURCE.exists():
        raise ValueError("There is no demo model outside a clone of the repository: name a checkpoint with --model.")
    sys.path.insert(0, str(CLONE))
    from conversion import convert

    if DEMO_MODEL.exists():  # made by another version of the converter, perhaps
        shutil.rmtree(DEMO_MODEL)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return convert(DEMO_SOURCE, DEMO_MODEL)


if __name__ == "__main__":
    sys.exit(main())
