# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the steps that make a small LLaVA-STF from scratch.

python -m examples.shapes pictograms OUT                       fetches pictures of objects by several artists
python -m examples.shapes generate DATA --scenes N --seed S    draws scenes, writes questions and answers
python -m examples.shapes untold DATA OUT                      adds marks that only stage 2 asks about
python -m examples.shapes tokenizer DATA OUT                   trains the language model's tokenizer
python -m examples.shapes clip DATA OUT                        trains a miniature of CLIP's vision tower
python -m examples.shapes language-model DATA TOKENIZER OUT    trains a small Llama
python -m examples.shapes warm-up DATA START OUT               teaches it and new fusion modules a common language
python -m examples.shapes evaluate MODEL DATA                  counts right answers by kind of question
python -m examples.shapes shrink MODEL DATA --output FILE      quantises, and compares answers with bfloat16
python -m examples.shapes task DATA OUT                        writes the test questions as a task of lmms-eval
python -m examples.shapes make WORK OUT                        runs all steps: makes the model of this repository
python -m examples.shapes ablation WORK OUT                    trains and tests with other connectors and several seeds
python -m examples.shapes tokens OUT DATA MODEL                measures what fewer vision tokens cost
"""

import argparse
import inspect
import sys
from collections.abc import Callable

from .ablation import ablate, run_one
from .clip import train_clip
from .evaluate import evaluate
from .generate import generate
from .language_model import train_language_model
from .pictograms import SAMPLE, fetch
from .recipe import make
from .shrink import shrink
from .task import write_task
from .text import train_tokenizer
from .tokens import SCORES, compare
from .untold import add_untold
from .warm_up import warm_up


def main() -> int:
    arguments = vars(_parser().parse_args())
    step = arguments.pop("step")
    try:
        step(**arguments)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    fetching = commands.add_parser("pictograms", help="fetch the pictures of objects (needs npm and resvg-py)")
    fetching.add_argument("out", metavar="OUT", help="folder to write; must not exist, or be empty")
    fetching.set_defaults(step=fetch)

    data = commands.add_parser("generate", help="draw pictures, ask and answer questions")
    data.add_argument("out", metavar="DATA", help="folder to write; must not exist, or be empty")
    data.add_argument("--scenes", type=_at_least(1), required=True, metavar="N", help="number of training scenes")
    data.add_argument(
        "--test-scenes", type=_at_least(1), default=500, metavar="N", help="number of test scenes (default: 500)"
    )
    data.add_argument(
        "--turns", type=_at_least(1), default=8, metavar="N", help="maximum of questions about a scene (default: 8)"
    )
    data.add_argument("--seed", type=_at_least(0), default=0, help="the same seed gives the same files (default: 0)")
    _add_pictograms(data)
    data.set_defaults(step=generate)

    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer on the data's texts")
    tokenizer.add_argument("data", metavar="DATA", help="folder that `generate` wrote")
    tokenizer.add_argument("out", metavar="OUT", help="folder to write; must not exist, or be empty")
    tokenizer.set_defaults(step=train_tokenizer)

    tower = commands.add_parser("clip", help="train CLIP's vision tower on pictures whose content is known")
    tower.add_argument("data", metavar="DATA", help="folder that `generate` wrote")
    _add_pictograms(tower)
    _add_training(tower, train_clip)

    language_model = commands.add_parser("language-model", help="train a Llama on ideal tokens")
    language_model.add_argument("data", metavar="DATA", help="folder that `generate` wrote")
    language_model.add_argument("tokenizer", metavar="TOKENIZER", help="folder that `tokenizer` wrote")
    _add_training(language_model, train_language_model)

    evaluation = commands.add_parser("evaluate", help="ask a checkpoint the questions of the test set")
    evaluation.add_argument("model", metavar="MODEL", help="folder or Hub id of a checkpoint")
    evaluation.add_argument("data", metavar="DATA", help="folder that `generate` wrote")
    evaluation.add_argument("--output", metavar="FILE", help="write the result as JSON; must not exist")
    evaluation.add_argument("--new", action="store_true", help="ask only the kind of question that `make` never trains")
    evaluation.add_argument(
        "--batch-size", type=_at_least(1), default=100, metavar="N", help="questions of a batch (default: 100)"
    )
    evaluation.set_defaults(step=evaluate)

    shrinking = commands.add_parser("shrink", help="quantise by every scheme, and compare the answers with bfloat16")
    shrinking.add_argument("model", metavar="MODEL", help="folder of a checkpoint")
    shrinking.add_argument("data", metavar="DATA", help="folder that `generate` wrote")
    shrinking.add_argument("--output", metavar="FILE", required=True, help="write the result as JSON; must not exist")
    shrinking.add_argument(
        "--questions", type=_at_least(1), default=1100, metavar="N", help="number of them (default: 1100)"
    )
    shrinking.add_argument(
        "--workers", type=_at_least(1), default=2, metavar="N", help="models asked at a time (default: 2)"
    )
    shrinking.add_argument("--also", metavar="DIR", nargs="+", default=(), help="folders that were quantised elsewhere")
    shrinking.set_defaults(step=shrink)
    task = commands.add_parser("task", help="write the questions of the test set as a task of lmms-eval")
    task.add_argument("data", metavar="DATA", help="folder that `generate` wrote")
    task.add_argument("out", metavar="OUT", help="folder to write; must not exist, or be empty")
    task.add_argument("--questions", type=int, metavar="N", help="write only the first N (default: all)")
    task.set_defaults(step=write_task)

    warming = commands.add_parser("warm-up", help="train fusion modules and language model before the stages")
    warming.add_argument("data", metavar="DATA", help="folder that `generate` wrote")
    warming.add_argument("start", metavar="START", help="checkpoint with new fusion modules")
    _add_training(warming, warm_up)
    _add_numbers(warming, warm_up, imitation_steps="steps of the fusion modules alone, on ideal tokens")

    untold = commands.add_parser("untold", help="draw marks that the tower is not told, and ask about them")
    untold.add_argument("data", metavar="DATA", help="folder that `generate` wrote")
    untold.add_argument("out", metavar="OUT", help="folder to write; must not exist, or be empty")
    untold.add_argument("--seed", type=_at_least(0), default=0, help="seed of the marks and questions (default: 0)")
    untold.set_defaults(step=add_untold)

    recipe = commands.add_parser("make", help="generate, train every part, and write a Hub folder")
    recipe.add_argument(
        "work", metavar="WORK", help="folder for data and intermediate models; a stopped run continues there"
    )
    recipe.add_argument("out", metavar="OUT", help="folder to write; must not exist, or be empty")
    _add_numbers(
        recipe,
        make,
        scenes="training scenes",
        test_scenes="test scenes",
        clip_steps="steps of the vision tower",
        language_model_steps="steps of the language model",
        imitation_steps="steps of the fusion modules alone, on ideal tokens",
        warm_up_steps="steps of fusion modules and language model, before the stages",
    )
    recipe.add_argument("--seed", type=_at_least(0), default=0, help="seed of data, weights and order (default: 0)")
    recipe.set_defaults(step=make)

    ablation = commands.add_parser("ablation", help="train and test with other connectors")
    ablation.add_argument("work", metavar="WORK", help="WORK folder of `make`")
    ablation.add_argument("out", metavar="OUT", help="folder for the results; a stopped run continues there")
    _add_numbers(
        ablation,
        ablate,
        seeds="trainings of each system",
        captions="rows of stage 1",
        rows="rows of stage 2",
        questions="test questions of each kind in each group of pictures",
    )
    ablation.add_argument(
        "--workers", type=_at_least(1), metavar="N", help="trainings at a time (default: the number of cores)"
    )
    ablation.add_argument(
        "--equal", choices=("rows", "time"), default="rows", help="what is equal for all systems (default: rows)"
    )
    ablation.add_argument("--systems", nargs="+", metavar="NAME", help="train only these (default: all)")
    ablation.set_defaults(step=ablate)
    run = commands.add_parser("ablation-run")  # `ablation` starts it for each of its runs
    for name in ("work", "out", "system"):
        run.add_argument(name)
    for name in ("seed", "captions", "rows", "questions"):
        run.add_argument(name, type=int)
    run.add_argument("equal")
    run.set_defaults(step=run_one)

    tokens = commands.add_parser("tokens", help="compare token budgets and reducers, in a table and a plot")
    tokens.add_argument("out", metavar="OUT", help="folder for the results; a stopped run continues there")
    tokens.add_argument("data", metavar="DATA", help="folder that `generate` wrote")
    tokens.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="FOLDER, NAME=FOLDER or NAME=FOLDER@BUDGET; the first gives rows for every budget and reducer, each "
        "other one row, such as a model that was trained for one budget, or a stock LLaVA",
    )
    tokens.add_argument(
        "--keep",
        type=_at_least(1),
        nargs="+",
        metavar="N",
        help="tokens that the reducers keep (default: 1/2 to 1/16 of all)",
    )
    tokens.add_argument("--scores", nargs="+", choices=SCORES, help="reducers (default: all)")
    tokens.add_argument("--questions", type=_at_least(1), metavar="N", help="ask only the first N (default: all)")
    tokens.add_argument(
        "--batch-size", type=_at_least(1), default=100, metavar="N", help="questions of a batch (default: 100)"
    )
    tokens.add_argument(
        "--timed",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="also time the first token of N questions, one at a time, the systems in turns (default: 0)",
    )
    tokens.set_defaults(step=compare)
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    """Returns the type of an option that is a whole number and not below `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text}, expected {least} or more")
        return int(text)

    return number


def _add_numbers(parser: argparse.ArgumentParser, step: Callable, **helps: str) -> None:
    """Adds an option for arguments of `step`: whole numbers with its defaults, 1 or more."""
    for name, text in helps.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=_at_least(1),
            default=inspect.signature(step).parameters[name].default,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )


def _add_training(parser: argparse.ArgumentParser, step: Callable) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist, or be empty")
    parser.add_argument("--steps", type=_at_least(1), required=True, metavar="N", help="number of batches")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="seed of weights and batches (default: 0)")
    parser.set_defaults(step=step)


def _add_pictograms(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pictograms",
        default=SAMPLE,
        metavar="FOLDER",
        help="folder that `pictograms` wrote (default: a small sample)",
    )


if __name__ == "__main__":
    sys.exit(main())
