# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The steps of a small LLaVA-STF, trained from nothing.

python -m examples.shapes generate DATA --scenes N --seed S    pictures, questions and answers
python -m examples.shapes tokenizer DATA OUT                   the language model's tokenizer
python -m examples.shapes clip DATA TOKENIZER OUT              a miniature CLIP
python -m examples.shapes language-model DATA TOKENIZER OUT    a small Llama
python -m examples.shapes evaluate MODEL DATA                  right answers, by kind of question
"""

import argparse
import sys
from collections.abc import Callable

from .clip import train_clip
from .evaluate import evaluate
from .generate import generate
from .language_model import train_language_model
from .text import train_tokenizer


def main() -> int:
    arguments = vars(_parser().parse_args())
    step = arguments.pop("step")
    try:
        step(**arguments)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    data = commands.add_parser("generate", help="draw pictures, ask and answer questions")
    data.add_argument("out", metavar="DATA", help="folder to write; must not exist, or be empty")
    data.add_argument("--scenes", type=int, required=True, metavar="N", help="number of scenes to train on")
    data.add_argument("--test-scenes", type=int, default=500, metavar="N", help="of other scenes (default: 500)")
    data.add_argument("--turns", type=int, default=8, metavar="N", help="questions about a scene, at most (default: 8)")
    data.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: 0)")
    data.set_defaults(step=generate)

    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer on the data's texts")
    tokenizer.add_argument("data", metavar="DATA", help="folder that `generate` wrote")
    tokenizer.add_argument("out", metavar="OUT", help="folder to write; must not exist, or be empty")
    tokenizer.set_defaults(step=train_tokenizer)

    _add_training(commands, "clip", "train a CLIP on pictures and phrases", train_clip)
    _add_training(commands, "language-model", "train a Llama on the data's texts", train_language_model)

    evaluation = commands.add_parser("evaluate", help="ask a checkpoint the test's questions")
    evaluation.add_argument("model", metavar="MODEL", help="folder or Hub id of a checkpoint")
    evaluation.add_argument("data", metavar="DATA", help="folder that `generate` wrote")
    evaluation.add_argument("--output", metavar="FILE", help="write the result as JSON; must not exist")
    evaluation.add_argument("--batch-size", type=int, default=100, metavar="N", help="(default: 100)")
    evaluation.set_defaults(step=evaluate)
    return parser


def _add_training(commands: argparse._SubParsersAction, name: str, summary: str, step: Callable) -> None:
    parser = commands.add_parser(name, help=summary)
    parser.add_argument("data", metavar="DATA", help="folder that `generate` wrote")
    parser.add_argument("tokenizer", metavar="TOKENIZER", help="folder that `tokenizer` wrote")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist, or be empty")
    parser.add_argument("--steps", type=int, required=True, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.set_defaults(step=step)


if __name__ == "__main__":
    sys.exit(main())
