# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Ask a LLaVA-STF model about a picture.

python -m modeling_llava_stf ask IMAGE "question" [--model DIR_OR_HUB_ID] [--revision COMMIT]
python -m modeling_llava_stf caption INPUT OUTPUT [--model DIR_OR_HUB_ID] [--prompt "question"] [--shard I/N]
python -m modeling_llava_stf demo
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from . import LlavaSTFConfig, LlavaSTFForConditionalGeneration, LlavaSTFProcessor, bulk

SHAPES = Path(__file__).resolve().parents[1] / "examples" / "shapes"
DEFAULT_MODEL = SHAPES / "model"
DEMO = SHAPES / "demo.json"


def main() -> int:
    arguments = _parser().parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if arguments.command == "demo":
            return demo()
        if arguments.command == "caption":
            return caption(arguments)
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
    ask_parser.add_argument("--model", help="folder or Hub id of a LLaVA-STF checkpoint (default: the small one)")
    ask_parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    ask_parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer, in tokens (default: 128)")
    bulk.add_parser(commands)
    commands.add_parser("demo", help="ask the small model about a picture that it has never seen")
    return parser


def ask(
    image: str, question: str, model: str | None = None, revision: str | None = None, max_new_tokens: int = 128
) -> int:
    """Prints picture, question, answer, vision tokens and time."""
    processor, network = _load(model or _default_model(), revision)
    answer, seconds = _answer(processor, network, image, question, max_new_tokens)
    print(f"picture   {image}")
    print(f"question  {question}")
    print(f"answer    {answer}")
    print(f"tokens    {_tokens(network.config)}")
    print(f"time      {seconds:.2f} s on {network.device.type}, {network.dtype}, model loaded")
    if model is None:
        print("\nThis small model knows drawn shapes and nothing else. For photos name another: ask ... --model NAME")
    return 0


def demo() -> int:
    """Asks the small model about a drawing of its test set, whose truth is known."""
    folder, truth = _default_model(), json.loads(DEMO.read_text(encoding="utf-8"))
    processor, network = _load(folder, None)
    picture = str(SHAPES / truth["picture"])
    print(f"picture   {picture}  (not among those that the model was trained on)")
    print(f"tokens    {_tokens(network.config)}")
    right = 0
    for turn in truth["questions"]:
        answer, seconds = _answer(processor, network, picture, turn["question"], max_new_tokens=64)
        correct = answer == turn["answer"]
        right += correct
        print(f"\nquestion  {turn['question']}")
        print(f"answer    {answer}")
        print(f"          {'right' if correct else 'wrong: ' + turn['answer']}, {seconds:.2f} s")
    print(f"\n{right} of {len(truth['questions'])} right. How the model was made: examples/shapes/README.md")
    return 0


def caption(arguments: argparse.Namespace) -> int:
    """Prints how many pictures were asked about; their answers are in the parts."""
    if not arguments.server:
        arguments.model = arguments.model or _default_model()
    print(bulk.caption(arguments, lambda: _load(arguments.model, arguments.revision)))
    return 0


def _answer(
    processor: LlavaSTFProcessor,
    network: LlavaSTFForConditionalGeneration,
    image: str,
    question: str,
    max_new_tokens: int,
) -> tuple[str, float]:
    """The greedy answer, and the seconds that it took."""
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
    ]
    started = time.perf_counter()
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(network.device, network.dtype)
    output = network.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return answer, time.perf_counter() - started


def _tokens(config: LlavaSTFConfig) -> str:
    return f"{config.tokens_per_image} for the picture, LLaVA-1.5 would take {config.grid_size**2}"


def _default_model() -> str:
    if not DEFAULT_MODEL.exists():
        raise ValueError("There is no model outside a clone of the repository: name a checkpoint with --model.")
    return str(DEFAULT_MODEL)


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
    return processor, network.to("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main())
