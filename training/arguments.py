# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Declares the options of a training, and reads them from a recipe and the command line."""

import argparse
import dataclasses
import difflib
import os
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from trl import SFTConfig

from .budgets import ALL, SAMPLE, check_budgets
from .settings import BY_US, REFUSED, check_optimizer, check_settings
from .upstream import CheckedParser, own_precision

CONNECTOR = "multi_modal_projector"
TOWER = "vision_tower"


@dataclass
class DataArguments:
    """Says where the data is, and what to do with rows that cannot be trained on."""

    data_path: str = field(metadata={"help": "LLaVA's .json or .jsonl, a .parquet, a folder, or a Hub id."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Where relative paths of images begin (default: beside the data)."}
    )
    eval_data_path: str | None = field(default=None, metadata={"help": "Data to evaluate on, of the same kinds."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    split: str = field(default="train", metadata={"help": "Split of a folder or a Hub dataset."})
    streaming: bool = field(default=False, metadata={"help": "Read a Hub dataset while it trains (set max_steps)."})
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "'skip': open every image before training, count and name the rows with bad ones, leave them out. "
            "'error': stop if a file is missing, or, while training, at the first that cannot be read.",
            "choices": ["error", "skip"],
        },
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "The same for rows that are too long, or cannot be trained exactly as they are written.",
            "choices": ["error", "skip"],
        },
    )


@dataclass
class LlavaSTFTrainingArguments(SFTConfig):
    """TRL's `SFTConfig` with the settings of LLaVA's recipe.

    Options that would not act, or have no possible value, are refused (see `training.settings`).

    Raises:
        ValueError: if an option is refused, or the global batch is no multiple of what the devices take in one step.
    """

    trainable: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression: parameters whose name it matches are trained, all others are frozen. By "
            "default all but the vision tower. Not with LoRA, which has `lora_target_modules` and "
            "`lora_modules_to_save`."
        },
    )
    projector_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the fusion modules; by default `learning_rate`."},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of one optimizer step, on all devices together. `gradient_accumulation_steps` follows from "
            "it, so that a recipe is the same on any number of devices."
        },
    )
    gradient_accumulation_steps: int | None = field(
        default=None,
        metadata={"help": "Micro-batches of one step, by default 1; not beside `global_batch_size`, which says them."},
    )
    group_by_modality_length: bool = field(
        default=False,
        metadata={"help": "Make each global batch of rows with images or of text rows, of similar lengths."},
    )
    loss_reduction: str = field(
        default="token",
        metadata={
            "help": "'token': mean over all trained tokens of a global batch. 'microbatch': mean of the means of its "
            "micro-batches, as the original.",
            "choices": ["token", "microbatch"],
        },
    )
    chat_template_name: str = field(
        default="default",
        metadata={
            "help": "Chat template to train with: 'default', that of the processor (vicuna_v1), or 'plain' (stage 1)."
        },
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={
            "help": "TFLOP/s of one device, to measure model FLOPs utilisation (MFU) by. By default the speed of a "
            "large matrix product, measured at the start."
        },
    )
    image_aspect_ratio: str = field(
        default="pad",
        metadata={
            "help": "'pad': pictures are padded to a square, in training and by the saved processor. 'square': they "
            "are cut to one in training only, as in the original's stage 1.",
            "choices": ["pad", "square"],
        },
    )
    do_exif_transpose: bool | None = field(
        default=None,
        metadata={
            "help": "Turn photos upright, as their EXIF orientation says; the original does not. By default as the "
            "model's processor does. What is trained with is saved with the model."
        },
    )
    alpha_background: str | None = field(
        default=None,
        metadata={
            "help": "Colour to paint behind transparent pixels, such as 'white'; the original drops transparency. By "
            "default as the model's processor does. What is trained with is saved with the model."
        },
    )
    token_budgets: list[int] | None = field(
        default=None,
        metadata={
            "help": "Train for several numbers of tokens per picture, such as 144 36 9 1, of which a user chooses one "
            "(`max_soft_tokens`). They are saved with the model. By default the model's full number only."
        },
    )
    token_budget_mode: str = field(
        default=SAMPLE,
        metadata={
            "help": "'sample': each row has one of the `token_budgets` in each epoch, for all of its pictures. 'all': "
            "each row with pictures is trained with every budget in the same step (M3, arXiv 2405.17430).",
            "choices": [SAMPLE, ALL],
        },
    )
    max_length: int | None = field(
        default=2048,
        metadata={"help": "Longest row in tokens, those of its images included. Longer rows are never cut."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to go on from: its folder, or 'last' for the newest of `output_dir`."},
    )
    assistant_only_loss: bool = field(default=True, metadata={"help": "Train on the answers only."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs all columns."})
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Not needed: batches without images send a blank one through the tower and the fusion."},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_budgets()
        if self.global_batch_size is not None:
            steps = accumulation_steps(self.global_batch_size, self.per_device_train_batch_size, launched_processes())
            if self.gradient_accumulation_steps not in (None, steps):
                raise ValueError(
                    f"`gradient_accumulation_steps` is {self.gradient_accumulation_steps}, but {steps} follows from "
                    "`global_batch_size`: leave one of them out."
                )
            self.gradient_accumulation_steps = steps
        self.gradient_accumulation_steps = self.gradient_accumulation_steps or 1
        with own_precision(self):
            super().__post_init__()
        if self.accelerator_config.split_batches:
            raise ValueError("`split_batches` does not act here: `global_batch_size` is that of all devices together.")
        if not self.accelerator_config.use_seedable_sampler:
            raise ValueError("`use_seedable_sampler` false does not act here: the order of the rows has a seed.")
        if "num_steps" in (self.accelerator_config.gradient_accumulation_kwargs or {}):
            raise ValueError("`num_steps` of `accelerator_config` is refused: it is `gradient_accumulation_steps`.")
        if self.eval_strategy == "epoch" and self.eval_steps is not None:
            raise ValueError("`eval_steps` does not act with `eval_strategy` epoch: leave it out, or choose steps.")
        if self.gradient_checkpointing_kwargs and not self.gradient_checkpointing:
            raise ValueError("`gradient_checkpointing_kwargs` does not act without `gradient_checkpointing`.")
        check_optimizer(self)
        for name in ("fp16", "activation_offloading"):
            if getattr(self, name) and self.device.type == "cpu":
                raise ValueError(f"`{name}` does not act on a CPU: leave it out.")
        if self.torch_compile and len(self.token_budgets or ()) > 1:
            raise ValueError(
                "`torch_compile` would compile the model anew for each mix of `token_budgets` in a batch: leave one of "
                "them out."
            )
        if self.group_by_modality_length and self.train_sampling_strategy != "random":
            raise ValueError(
                f"`train_sampling_strategy` is {self.train_sampling_strategy!r}, but `group_by_modality_length` orders "
                "the rows: set that to false."
            )

    def _check_budgets(self) -> None:
        if self.token_budgets is None:
            return
        check_budgets(self.token_budgets)
        self.token_budgets = sorted(self.token_budgets, reverse=True)
        if self.token_budget_mode == ALL and self.loss_type == "dft":
            raise ValueError(
                "`loss_type` is 'dft', but the loss of `token_budget_mode` 'all' is the mean of the budgets' "
                "cross-entropies: leave `loss_type` out, or choose 'sample'."
            )

    @property
    def order_seed(self) -> int:
        """The seed of the row order."""
        return self.seed if self.data_seed is None else self.data_seed


def launched_processes() -> int:
    """Returns the number of processes that the launcher started, whether or not they are connected yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation_steps(global_batch: int, per_device: int, devices: int) -> int:
    """Returns the number of steps to accumulate for a global batch.

    Raises:
        ValueError: if the devices do not divide it.
    """
    if global_batch % (per_device * devices):
        raise ValueError(
            f"`global_batch_size` is {global_batch}, but {devices} device(s) with {per_device} rows each take "
            f"{per_device * devices} rows at a time, which does not divide it. Change `per_device_train_batch_size`."
        )
    return global_batch // (per_device * devices)


FIRST = ("model_name_or_path", "data_path", "output_dir")
OURS = {
    *FIRST,
    *BY_US,
    *(option.name for option in dataclasses.fields(DataArguments)),
    *LlavaSTFTrainingArguments.__annotations__,
}


class ShortHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Names each option once, and its default if it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[0]
        return name if action.nargs == 0 else f"{name} {self._format_args(action, action.dest)}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(CheckedParser):
    """Reads a recipe and the command line; its help has our options first, and none that are refused.

    Raises:
        ValueError: for arguments that cannot be used, in one line.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(
            *args, usage="%(prog)s --config RECIPE [--OPTION VALUE ...]", formatter_class=ShortHelp, **kwargs
        )
        ours = self.add_argument_group(
            "options of this project",
            "They come from the YAML file RECIPE, such as those of training/recipes; options of the command line "
            "override it. A hyphen may stand for an underscore.",
        )
        stock = self.add_argument_group(
            "options of TRL and transformers", "The first sentence about each; their documentation says the rest."
        )
        actions = self._optionals._group_actions[1:]  # the first one is -h
        del self._optionals._group_actions[1:]
        actions.sort(key=lambda action: FIRST.index(action.dest) if action.dest in FIRST else len(FIRST))
        for action in actions:
            group = ours if action.dest in OURS else stock
            group._group_actions.append(action)
            _shorten(action, group is stock)

    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (`{self.prog} --help` lists the options)")

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple:
        """Parses as [`HfArgumentParser.parse_args_into_dataclasses`] does, and names what is not known."""
        *made, unknown = super().parse_args_into_dataclasses(*args, **{**kwargs, "return_remaining_strings": True})
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            meant = f" Is {near[0]} meant?" if near else ""
            raise ValueError(f"The unknown option {unknown[0]!r}.{meant} `{self.prog} --help` lists the options.")
        return tuple(made)

    def set_defaults_with_config(self, **recipe: Any) -> list[str]:
        names = {action.dest for action in self._actions}
        for name in recipe:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                meant = f" Is {near[0]!r} meant?" if near else ""
                raise ValueError(f"The recipe has the unknown option {name!r}.{meant}")
        return super().set_defaults_with_config(**recipe)


def _shorten(action: argparse.Action, first_sentence: bool) -> None:
    """Makes what the help says about an option short; options that are refused, and `--no_...`, are not in it."""
    if action.dest in REFUSED or action.nargs == 0:
        action.help = argparse.SUPPRESS
    elif first_sentence:
        action.help = textwrap.shorten(re.split(r"\. |; ", f"{action.help} ")[0].strip(), 100, placeholder=" ...")
    if action.choices is None or len(list(action.choices)) > 5:
        kinds = {"int": "INT", "float": "FLOAT", "string_to_bool": "BOOL"}
        action.metavar = kinds.get(getattr(action.type, "__name__", ""), "VALUE")


def read_recipe(arguments: list[str]) -> None:
    """Checks that the recipe which `--config` names can be read; the parser reads it.

    Raises:
        ValueError: if it is no file with options in YAML, each of them once.
    """
    if "--config" not in arguments:
        return
    name = (arguments[arguments.index("--config") + 1 :] or [""])[0]
    if not Path(name).is_file():
        raise ValueError(f"`--config` {name!r} is no file: name a recipe, such as training/recipes/finetune.yaml.")
    try:
        text = Path(name).read_text(encoding="utf-8")
        recipe, written = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {name} is not YAML: {error}") from error
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise ValueError(f"The recipe {name} has no options: expected lines such as `learning_rate: 2.0e-5`.")
    options = [key.value for key, _ in written.value]
    twice = sorted({option for option in options if options.count(option) > 1})
    if twice:
        raise ValueError(f"The recipe {name} has {', '.join(twice)} twice: remove one, for only the last would act.")
