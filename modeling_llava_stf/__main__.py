# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Asks a LLaVA-STF model about pictures, and serves it.

python -m modeling_llava_stf ask IMAGE "question" [--model DIR_OR_HUB_ID] [--revision COMMIT]
python -m modeling_llava_stf caption INPUT OUTPUT [--model DIR_OR_HUB_ID] [--prompt "question"] [--shard I/N]
python -m modeling_llava_stf serve DIR_OR_HUB_ID [options of `transformers serve`]
python -m modeling_llava_stf demo
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from jinja2 import TemplateError
from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

from . import LlavaSTFConfig, LlavaSTFForConditionalGeneration, LlavaSTFProcessor, _bulk
from ._folder import checked_config, load_checkpoint
from ._memory import full_gpu

SHAPES = Path(__file__).resolve().parents[1] / "examples" / "shapes"
DEFAULT_MODEL = SHAPES / "model"
DEMO = SHAPES / "demo.json"
# These options of the image processor change what the model sees; the original has none of them.
IMAGE_OPTIONS = ("do_exif_transpose", "alpha_background", "max_soft_tokens")
LESS_MEMORY = (
    "A quantised checkpoint or, for `caption`, a lower --batch-size needs less; with CUDA_VISIBLE_DEVICES= (empty) the "
    "CPU answers."
)


def main() -> int:
    arguments = _parser().parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    try:
        if arguments.command == "demo":
            return demo()
        if arguments.command == "caption":
            return caption(arguments)
        if arguments.command == "serve":
            return serve(arguments.model, arguments.options)
        return ask(
            arguments.image,
            arguments.question,
            arguments.model,
            arguments.revision,
            arguments.max_new_tokens,
            _image_options(arguments),
        )
    except TemplateError as error:
        refuses = type(error) is TemplateError  # that is what a template raises itself
        return _refused(f"The model's chat template {'refuses this' if refuses else 'cannot be used'}: {error}")
    except (OSError, ValueError, StrictDataclassError) as error:
        return _refused(str(error))
    except RuntimeError as error:
        return _refused(full_gpu(error, LESS_MEMORY))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _refused(reason: str) -> int:
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modeling_llava_stf", description="Asks LLaVA-STF about pictures.")
    commands = parser.add_subparsers(dest="command", required=True)
    ask_parser = commands.add_parser("ask", help="answer a question about a picture")
    ask_parser.add_argument("image", help="path or URL of the picture")
    ask_parser.add_argument("question", help="question about the picture")
    ask_parser.add_argument("--model", help="folder or Hub id of a LLaVA-STF checkpoint (default: the small one)")
    ask_parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    ask_parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer in tokens (default: 128)")
    _add_image_options(ask_parser)
    _add_image_options(_bulk.add_parser(commands))
    serve_parser = commands.add_parser("serve", help="answer requests of OpenAI's API, by `transformers serve`")
    serve_parser.add_argument("model", help="folder or Hub id (NAME@REVISION) of a LLaVA-STF checkpoint")
    serve_parser.add_argument(
        "options", nargs=argparse.REMAINDER, help="options of `transformers serve`; `serve MODEL --help` lists them"
    )
    commands.add_parser("demo", help="ask the small model about two pictures that it was not trained on")
    return parser


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--do-exif-transpose",
        action=argparse.BooleanOptionalAction,
        help="rotate a photo upright by its EXIF orientation (default: the setting of the model's processor)",
    )
    parser.add_argument(
        "--alpha-background",
        metavar="COLOUR",
        help="colour behind transparent pixels, such as white (default: the setting of the model's processor)",
    )
    parser.add_argument(
        "--max-soft-tokens",
        type=int,
        help="tokens of the picture: fewer are faster (default: the setting of the model's processor)",
    )


def _image_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in IMAGE_OPTIONS if getattr(arguments, name) is not None}


def ask(
    image: str,
    question: str,
    model: str | None = None,
    revision: str | None = None,
    max_new_tokens: int = 128,
    image_options: dict[str, Any] | None = None,
) -> int:
    """Answers a question about a picture; prints picture, question, answer, vision tokens and time."""
    if not question.strip():
        raise ValueError("The question is empty.")
    question.encode()  # raises a ValueError if the argument is not valid UTF-8
    processor, network = _load(_default_model() if model is None else model, revision)
    _check_numbers(network.config, max_new_tokens, image_options)
    number = (image_options or {}).get("max_soft_tokens", processor.tokens_per_image)
    answer, seconds = _answer(processor, network, image, question, max_new_tokens, image_options)
    print(f"picture   {image}")
    print(f"question  {question}")
    print(f"answer    {answer}")
    print(f"tokens    {_tokens(network.config, number)}")
    print(f"time      {seconds:.2f} s on {network.device.type}, {network.dtype}, model loaded")
    if model is None:
        print("\nThis small model knows drawn objects (emoji) only. For photos name another: ask ... --model NAME")
    return 0


def demo() -> int:
    """Asks the small model about two pictures that it was not trained on, and compares with the known answers."""
    folder, pictures = _default_model(), json.loads(DEMO.read_text(encoding="utf-8"))
    processor, network = _load(folder, None)
    print(f"tokens    {_tokens(network.config, processor.tokens_per_image)}")
    marks = []
    for truth in pictures:
        picture = str(SHAPES / truth["picture"])
        print(f"\npicture   {picture}  ({truth['note']})")
        for turn in truth["questions"]:
            answer, seconds = _answer(processor, network, picture, turn["question"], max_new_tokens=64)
            marks.append(answer == turn["answer"])
            print(f"\nquestion  {turn['question']}")
            print(f"answer    {answer}")
            print(f"          {'right' if marks[-1] else 'wrong: ' + turn['answer']}, {seconds:.2f} s")
    print(f"\n{sum(marks)} of {len(marks)} right. How the model was made: examples/shapes/README.md")
    return 0


def caption(arguments: argparse.Namespace) -> int:
    """Prints how many pictures were asked about; their answers are in the parts.

    If a server refused some, the last line says how many; that is an error if it answered none.
    """
    if not arguments.server:
        arguments.model = arguments.model or _default_model()
    image_options = _image_options(arguments)

    def load() -> tuple[LlavaSTFProcessor, LlavaSTFForConditionalGeneration]:
        processor, network = _load(arguments.model, arguments.revision)
        _check_numbers(network.config, arguments.max_new_tokens, image_options)
        return processor, network

    done = _bulk.caption(arguments, load, image_options)
    print(done.summary)
    if not done.refused:
        return 0
    refusal = (
        f"The server refused {done.refused} requests and answered {done.answered}. The first reason: {done.reason}. "
        f"All are in the parts; to ask again, name another folder than {arguments.output}."
    )
    if not done.answered:
        return _refused(refusal)
    print(refusal)
    return 0


def serve(model: str, options: list[str]) -> int:
    """Runs `transformers serve` until it is stopped; `options` are its own. Code of the checkpoint is not run."""
    if not is_serve_available():
        raise ValueError(
            'The server needs more packages: pip install "transformers[serving]". If that brings a torchvision that '
            "does not fit torch, uninstall it: this package needs none."
        )
    folder, _, revision = (model, "", "") if Path(model).exists() else model.partition("@")
    checked_config(folder, revision or None)
    # This command alone: the others need more packages in transformers 5.16, and `main` looks for newer versions.
    import typer
    from transformers.cli.serve import Serve

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(Serve)
    try:
        app([model, *options], prog_name="python -m modeling_llava_stf serve")
    except ImportError as error:
        raise ValueError(str(error)) from error
    return 0


def _answer(
    processor: LlavaSTFProcessor,
    network: LlavaSTFForConditionalGeneration,
    image: str,
    question: str,
    max_new_tokens: int,
    image_options: dict[str, Any] | None = None,
) -> tuple[str, float]:
    """Returns the greedy answer and the seconds that it took."""
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
    ]
    started = time.perf_counter()
    inputs = processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=image_options,
    ).to(network.device, network.dtype)
    output = network.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return answer, time.perf_counter() - started


def _check_numbers(config: LlavaSTFConfig, max_new_tokens: int, image_options: dict[str, Any] | None) -> None:
    context, allowed = config.text_config.max_position_embeddings, config.allowed_token_budgets
    if not 0 < max_new_tokens < context:
        raise ValueError(
            f"--max-new-tokens is {max_new_tokens}, expected 1 to {context - 1}: the model's context holds {context} "
            "tokens, those of the picture and the question included."
        )
    budget = (image_options or {}).get("max_soft_tokens", allowed[0])
    if budget not in allowed:
        raise ValueError(f"--max-soft-tokens is {budget}, expected one of {allowed}.")


def _tokens(config: LlavaSTFConfig, number: int) -> str:
    return f"{number} for the picture, LLaVA-1.5 would take {config.grid_size**2}"


def _default_model() -> str:
    if not DEFAULT_MODEL.exists():
        raise ValueError("There is no model outside a clone of the repository: name a checkpoint with --model.")
    return str(DEFAULT_MODEL)


def _load(folder: str, revision: str | None) -> tuple[LlavaSTFProcessor, LlavaSTFForConditionalGeneration]:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a quantised model cannot be moved later
    return load_checkpoint(folder, revision, dtype="auto", device_map=device)


if __name__ == "__main__":
    sys.exit(main())
