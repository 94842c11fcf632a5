# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains LLaVA-STF with TRL.

python -m training --config training/recipes/pretrain.yaml --model_name_or_path MODEL --data_path DATA --output_dir DIR
accelerate launch --config_file training/accelerate/ddp.yaml -m training --config training/recipes/finetune.yaml ...
python -m training check DATA [--model_name_or_path MODEL]
python -m training merge ADAPTER DESTINATION

DATA is LLaVA's JSON, or a dataset with `messages` and `images` (a folder, a parquet file or a Hub id). Command-line
options override the recipe. `python -m training --help` lists all options.
"""

import argparse
import sys
from pathlib import Path

import torch

from modeling_llava_stf import LlavaSTFProcessor

from .budgets import ALL, SAMPLE, budgets_of
from .checks import Checker, Report, check_rows
from .merge import commit_of, merge
from .report import draw_lengths
from .rows import load_rows
from .run import train_command
from .saving import SaveError
from .trainer import template_text


def main() -> int:
    commands = {"check": check_command, "merge": merge_command}
    command, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    try:
        if command in commands:
            return commands[command](arguments)
        return train_command(sys.argv[1:] or ["--help"])
    except (OSError, ValueError, ImportError, FloatingPointError, SaveError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"stopped. {interrupt}".rstrip(), file=sys.stderr)
        return 130


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def check_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training check", description="Names what is wrong with the data.")
    parser.add_argument("data_path", metavar="DATA", help="LLaVA's .json or .jsonl, a .parquet, a folder, or a Hub id")
    parser.add_argument(
        "--model_name_or_path",
        "--model-name-or-path",
        "--model",
        required=True,
        metavar="MODEL",
        help="checkpoint to train",
    )
    parser.add_argument("--model_revision", "--model-revision", help="branch, tag or commit of a MODEL on the Hub")
    parser.add_argument("--image_folder", "--image-folder", help="where relative paths of images begin")
    parser.add_argument("--dataset_config", "--dataset-config", help="configuration of a Hub dataset")
    parser.add_argument("--split", default="train", help="split of a folder or a Hub dataset (default: train)")
    parser.add_argument(
        "--max_length", "--max-length", type=positive, default=2048, help="longest row, in tokens (default: 2048)"
    )
    parser.add_argument("--chat_template_name", "--chat-template-name", default="default", help="default or plain")
    parser.add_argument(
        "--token_budgets", "--token-budgets", type=int, nargs="+", metavar="N", help="budgets, such as 144 36"
    )
    parser.add_argument("--token_budget_mode", "--token-budget-mode", choices=[SAMPLE, ALL], help="default: sample")
    parser.add_argument("--num_proc", "--num-proc", type=positive, help="number of processes")
    parser.add_argument("--plot", metavar="FILE", help="draw the lengths as a PNG")
    chosen = parser.parse_args(arguments)
    commit = commit_of(chosen.model_name_or_path, chosen.model_revision)
    processor = LlavaSTFProcessor.from_pretrained(chosen.model_name_or_path, revision=commit)
    if chosen.token_budget_mode and not chosen.token_budgets:
        raise ValueError("`--token_budget_mode` does not act without `--token_budgets`: set that, or leave it out.")
    budgets = budgets_of(chosen.token_budgets, chosen.token_budget_mode or SAMPLE, 0, processor)
    rows = load_rows(chosen.data_path, chosen.image_folder, config=chosen.dataset_config, split=chosen.split)
    template = template_text(processor, chosen.chat_template_name)
    checker = Checker(processor, template, chosen.max_length, decode=True, budgets=budgets)
    report = Report.of(check_rows(rows, checker, chosen.num_proc), budgets)
    print("\n".join(report.lines(checker.allowed)))
    if chosen.plot and report.lengths:
        draw_lengths(report.longest(), checker.allowed, Path(chosen.plot))
        print(f"wrote {chosen.plot}")
    return 1 if report.problems else 0


def merge_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training merge", description="Merges an adapter into its base.")
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a LoRA run")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to write; must not exist, or be empty")
    parser.add_argument("--base", help="folder or Hub id of its base (default: the one that the adapter names)")
    parser.add_argument(
        "--base_revision", "--base-revision", help="commit of the base (default: the one that the adapter names)"
    )
    print(f"wrote {merge(**vars(parser.parse_args(arguments)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
