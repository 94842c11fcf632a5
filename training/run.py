# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Runs a training, from its options to its folder."""

import argparse
import gc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import BitsAndBytesConfig
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging
from trl import ModelConfig, get_peft_config

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf._folder import check_loaded
from modeling_llava_stf._memory import full_gpu

from .arguments import DataArguments, LlavaSTFTrainingArguments, Parser, read_recipe
from .budgets import budgets_of
from .checks import Checker, Report, check_rows, fit_rows, fit_stream
from .merge import commit_of
from .report import draw_curves, start_lines
from .rows import load_rows
from .saving import LENGTHS, way_back
from .settings import DECIDING, LORA, NEEDS, check_given, check_settings
from .trainer import LlavaSTFTrainer, template_text
from .upstream import keep_commit

logger = logging.get_logger(__name__)
# Options of the command line that say what was trained; others, such as paths, are not for a card.
TOLD = {"global_batch_size", "max_length", "token_budget_mode", "use_peft", *DECIDING, *LENGTHS}
TOLD |= {"load_best_model_at_end", "metric_for_best_model"}
TOLD |= {name for name, needed in NEEDS.items() if needed == LORA}
KINDS: Any = (DataArguments, LlavaSTFTrainingArguments, ModelConfig)
STREAM_BUFFER = 1000  # rows of a stream that are shuffled among each other
LESS_MEMORY = (
    "A lower `per_device_train_batch_size` needs less, and with `global_batch_size` it trains the same; docs/train.md "
    "has the memory of each recipe."
)


def train_command(arguments: list[str]) -> int:
    # As all other options: TRL looks for the name alone.
    arguments = [
        part for text in arguments for part in (text.split("=", 1) if text.startswith("--config=") else [text])
    ]
    read_recipe(arguments)
    data, args, choice = Parser(KINDS, prog="python -m training").parse_args_and_config(arguments)
    for settings in (args, choice):
        check_given(settings, {*recipe_of(arguments), *given_options(arguments)})
    train(data, args, choice, recipe_settings(arguments, data, args, choice))
    # The trainer is gone by now: DDP's reducer must not outlive the process group. It would take that down with the
    # interpreter locked, for which gloo's threads now and then wait for ever (torch 2.13).
    gc.collect()
    PartialState().destroy_process_group()
    return 0


def train(data: DataArguments, args: LlavaSTFTrainingArguments, choice: ModelConfig, used: dict[str, Any]) -> None:
    """Trains and saves the model; `used` is written beside it, for the model card."""
    resume = resume_from(args)
    try:
        trainer, report = make_trainer(data, args, choice)
        if args.should_save:
            print("\n".join(start_lines(trainer, report)), flush=True)
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(way_back(args.output_dir)) from None
    except RuntimeError as error:
        raise torch.OutOfMemoryError(full_gpu(error, f"{LESS_MEMORY} {way_back(args.output_dir)}")) from error
    curves = Path(args.output_dir) / "curves.png"
    if args.should_save:  # first, to be pushed with the model
        curves.parent.mkdir(parents=True, exist_ok=True)
        trainer.save_state()
        if used:
            text = yaml.safe_dump(used, sort_keys=False)
            (curves.parent / "recipe.yaml").write_text(text, encoding="utf-8")
        draw_curves(trainer.state.log_history, curves)
    trainer.save_model()
    if args.should_save:
        print(f"wrote {args.output_dir}; curves: {curves}", flush=True)


def recipe_settings(
    arguments: list[str], data: DataArguments, args: LlavaSTFTrainingArguments, choice: ModelConfig
) -> dict[str, Any]:
    """Returns the settings that the recipe names, and those of the command line that say what was trained, as used."""
    names = [name for name in given_options(arguments) if name in TOLD]
    names = [*recipe_of(arguments), *names]
    used = {**asdict(data), **asdict(choice), **args.to_dict()}
    return {name: used[name] for name in names if name in used}


def recipe_of(arguments: list[str]) -> dict[str, Any]:
    """Returns what the recipe says, if there is one."""
    if "--config" not in arguments:
        return {}
    return yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text(encoding="utf-8"))


def given_options(arguments: list[str]) -> list[str]:
    """Returns the names of the options that the command line gives, also as `--no_NAME` or shortened."""
    parser = Parser(KINDS)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return list(vars(parser.parse_known_args(arguments)[0]))


def resume_from(args: LlavaSTFTrainingArguments) -> str | None:
    """Returns the checkpoint to go on from.

    Raises:
        ValueError: if the output folder has a model or checkpoints already, or there is none to go on from.
    """
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"`--output_dir` {folder} cannot be a folder: {nearest} is a file.")
    last = get_last_checkpoint(args.output_dir) if folder.is_dir() else None
    if wanted is None:
        check_unused(args.output_dir, last)
        return None
    if str(wanted).lower() in ("last", "true"):
        if last is None:
            raise ValueError(f"{args.output_dir} has no complete checkpoint to go on from.")
        return last
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise ValueError(f"{wanted} is not a checkpoint of a run: it has no trainer_state.json.")
    if Path(wanted).resolve().parent != folder.resolve():
        check_unused(args.output_dir, last)
    return wanted


def check_unused(folder: str, last: str | None) -> None:
    """Raises a `ValueError` if another run has written into the folder; its newest checkpoint is `last`."""
    if last is not None:
        raise ValueError(
            f"{folder} has the checkpoints of an earlier run. Go on from {last} with "
            "`--resume_from_checkpoint last`, or choose another `--output_dir`."
        )
    for name in ("config.json", "adapter_config.json"):
        if (Path(folder) / name).exists():
            raise ValueError(f"{folder} has a model already ({name}). Choose another `--output_dir`.")


def make_trainer(
    data: DataArguments, args: LlavaSTFTrainingArguments, choice: ModelConfig
) -> tuple[LlavaSTFTrainer, Report | None]:
    """Makes the trainer of a run, and says what is known of its rows."""
    if choice.model_name_or_path is None:
        raise ValueError("Name the checkpoint to begin with: `--model_name_or_path`.")
    for settings in (data, choice):
        check_settings(settings)
    if data.eval_data_path and args.eval_strategy == "no" and not args.eval_on_start:
        raise ValueError("`eval_data_path` does not act without `eval_strategy` or `eval_on_start`: set that, too.")
    if data.eval_data_path == data.data_path:
        logger.warning("`eval_data_path` is `data_path`: evaluation is on the rows that are trained.")
    commit = commit_of(choice.model_name_or_path, choice.model_revision)
    processor = LlavaSTFProcessor.from_pretrained(choice.model_name_or_path, revision=commit)
    rows, report = prepare(data.data_path, data, args, processor)
    eval_rows = prepare(data.eval_data_path, data, args, processor)[0] if data.eval_data_path else None
    trainer = LlavaSTFTrainer(
        load_model(choice),
        args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=get_peft_config(choice),
    )
    return trainer, report


def load_model(choice: ModelConfig) -> LlavaSTFForConditionalGeneration:
    """Loads the checkpoint to train; with `load_in_4bit` or `load_in_8bit` its language model is quantised.

    Raises:
        ValueError: if it is an adapter, or its weights are not those of its config.json.
    """
    quantisation = None
    name = str(choice.model_name_or_path)
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(f"{name} is an adapter. Merge it first: python -m training merge {name} DESTINATION")
    # An adapter remembers where its base is: not relative to the folder that this was started in.
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    commit = commit_of(name, choice.model_revision)
    dtype = getattr(torch, choice.dtype) if choice.dtype not in (None, "auto") else choice.dtype
    if choice.load_in_4bit or choice.load_in_8bit:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=choice.load_in_4bit,
            load_in_8bit=choice.load_in_8bit,
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
            bnb_4bit_quant_storage=choice.bnb_4bit_quant_storage,
            bnb_4bit_quant_type=choice.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=choice.use_bnb_nested_quant,
        )
    model, found = LlavaSTFForConditionalGeneration.from_pretrained(
        name,
        revision=commit,
        dtype=dtype,
        attn_implementation=choice.attn_implementation,
        quantization_config=quantisation,
        output_loading_info=True,
    )
    check_loaded(name, found)
    keep_commit(model, commit)
    return model


def prepare(
    path: str, data: DataArguments, args: LlavaSTFTrainingArguments, processor: LlavaSTFProcessor
) -> tuple[Dataset | IterableDataset, Report | None]:
    """Loads the rows that can be trained on. All ranks get the same; the first one checks them."""
    budgets = budgets_of(args.token_budgets, args.token_budget_mode, args.order_seed, processor)
    checker = Checker(
        processor,
        template_text(processor, args.chat_template_name),
        args.max_length,
        decode=data.on_bad_image == "skip",
        budgets=budgets,
    )
    with args.main_process_first(desc="checking the data"):
        rows = load_rows(
            path, data.image_folder, config=data.dataset_config, split=data.split, streaming=data.streaming
        )
        if isinstance(rows, IterableDataset):
            stream = fit_stream(rows, checker, data.on_bad_image, data.on_bad_row)
            return stream.shuffle(seed=args.order_seed, buffer_size=STREAM_BUFFER), None
        checked = check_rows(rows, checker, args.dataset_num_proc, reuse=args.local_process_index > 0)
        report = Report.of(checked, budgets)
        return fit_rows(checked, report, data.on_bad_image, data.on_bad_row), report
