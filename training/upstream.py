# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Holds every workaround for a library that the training builds on, one entry each.

An entry names the project with the version that it was seen in, why it is needed, and when it can be removed.
`tests/test_training_upstream.py` shows each fault in the installed version, and fails once an entry is not needed.
"""

import argparse
import copy
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from torch.utils.data import RandomSampler
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback, TrainerState
from transformers.dynamic_module_utils import custom_object_save
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging
from trl import TrlParser

from modeling_llava_stf.modeling_llava_stf import NO_ANSWER_LOGIT

from .rows import DataError
from .sampler import SeededSampler

logger = logging.get_logger(__name__)
PRECISION = "ACCELERATE_MIXED_PRECISION"

# TRL


@contextmanager
def image_token_masked(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Gives TRL's fused head a bias that takes `<image>` out of the softmax.

    Project: TRL 1.16.
    Why: it multiplies by the head's weight itself, past the model's own loss, which leaves `<image>` out. The original
        has no such token.
    Remove when: `SFTTrainer.compute_loss` uses the loss of the model.
    """
    network = without_adapter(model)
    head_of = type(network).get_output_embeddings

    def masked_head() -> SimpleNamespace:
        weight = averaged_over_ranks(head_of(network).weight)
        bias = weight.new_zeros(network.config.get_text_config().vocab_size)
        bias[network.config.image_token_id] = NO_ANSWER_LOGIT
        mark_as_gathered(bias)
        return SimpleNamespace(weight=weight, bias=bias)

    network.get_output_embeddings = masked_head
    try:
        yield
    finally:
        del network.get_output_embeddings


def averaged_over_ranks(weight: torch.Tensor) -> torch.Tensor:
    """Returns the whole weight, whose gradient is averaged over the ranks of FSDP2.

    Project: TRL 1.16.
    Why: its fused head gathers the sharded weight with `full_tensor()`, and each rank keeps its own gradient.
    Remove when: it names `grad_placements`.
    """
    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


def mark_as_gathered(bias: torch.Tensor) -> None:
    """Marks a bias as one that ZeRO-3 has not sharded.

    Project: TRL 1.16.
    Why: it asks weight and bias of the head for `ds_status`, which only parameters of DeepSpeed have.
    Remove when: it takes a head without that.
    """
    if is_deepspeed_zero3_enabled():
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        bias.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]


def leave_out_image_tokens(batch: dict[str, Any], image_token_id: int) -> None:
    """Takes `<image>` out of the labels of a batch.

    Project: TRL 1.16.
    Why: with `assistant_only_loss` off its collator trains the model to answer `<image>`.
    Remove when: `DataCollatorForVisionLanguageModeling` masks the image token.
    """
    batch["labels"][batch["input_ids"] == image_token_id] = -100


def with_options(processor: ProcessorMixin, **options: Any) -> Any:
    """Returns a processor that applies chat templates with more options of its call.

    Project: TRL 1.16.
    Why: its collator gives the processor the options of texts only.
    Remove when: `DataCollatorForVisionLanguageModeling` passes others on.
    """
    applied = copy.copy(processor)

    def apply_chat_template(*args: Any, processor_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        return processor.apply_chat_template(*args, processor_kwargs={**processor_kwargs, **options}, **kwargs)

    applied.apply_chat_template = apply_chat_template
    return applied


def keep_as_loaded(model: PeftModel) -> None:
    """Gives modules that are trained in full beside an adapter the weights that they were loaded with.

    Project: TRL 1.16.
    Why: beside a quantised model it rounds them to bfloat16.
    Remove when: it rounds the adapter's own weights only.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for trained in module.modules_to_save.values():
                trained.float().load_state_dict(module.original_module.state_dict())


def go_on_counting(trainer: Trainer, tokens: int) -> None:
    """Tells how many tokens a run was trained on before it was stopped.

    Project: TRL 1.16.
    Why: `num_tokens` of its logs begins at 0 again in a resumed run.
    Remove when: `SFTTrainer` keeps its count in the checkpoint.
    """
    trainer._total_train_tokens = tokens


def number_of(text: str) -> Any:
    """Reads a number, where it is one.

    Project: TRL 1.16.
    Why: `pad_to_multiple_of` is a text when it comes from the command line, and is read after our checks.
    Remove when: its parser makes a number of it.
    """
    try:
        return int(text)
    except ValueError:
        return text


class CheckedParser(TrlParser):
    """Checks the values of a recipe like those of a command line.

    Project: TRL 1.16.
    Why: `TrlParser` takes a value of any type from the YAML file, and ignores the choices.
    Remove when: it parses them.
    """

    def set_defaults_with_config(self, **recipe: Any) -> list[str]:
        actions = {action.dest: action for action in reversed(self._actions)}
        return super().set_defaults_with_config(**{n: self._checked(actions[n], value) for n, value in recipe.items()})

    def _checked(self, action: argparse.Action, value: Any) -> Any:
        if isinstance(value, dict):
            return json.dumps(value)
        if value is None or isinstance(value, list) and action.nargs != "+":
            return value  # no text stands for it on a command line
        values = []
        for item in value if isinstance(value, list) else [value]:
            try:
                values.append(self._get_value(action, str(item)))
                self._check_value(action, values[-1])
            except argparse.ArgumentError as error:
                raise ValueError(f"The recipe's {error}.") from error
        return values if action.nargs == "+" else values[0]


# transformers


class NoEndlessEpochs(TrainerCallback):
    """Stops a run after an epoch without a step.

    Project: transformers 5.24.
    Why: a stream with too few rows for a step is repeated for ever, since only steps count towards `max_steps`.
    Remove when: `Trainer` raises an error for it.
    """

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise DataError(
                "The data has no row, or too few for one step: nothing was trained in a whole epoch. (Or a checkpoint "
                "at the end of a pass over a stream: a run goes on from within the first pass only.)"
            )


class GivenSteps(TrainerCallback):
    """Lets `logging_steps`, `eval_steps` and `save_steps` of a resumed run act.

    Project: transformers 5.24.
    Why: those of the checkpoint win, and only a warning says that they differ.
    Remove when: `Trainer._init_training_state` calls `compute_steps` behind the loading.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


def seeded(sampler: Any, seed: int) -> Any:
    """Lets a sampler of transformers order rows by the seed and the epoch alone.

    Project: transformers 5.24, with accelerate 1.15.
    Why: `group_by_length` draws from the random numbers of everything else, so that `data_seed` does not act and a
        resumed run has another order; `batch_rebalance` has the same seed in every run, and the same order in every
        epoch; with `dispatch_batches` a random order does not know its epoch where a run is resumed.
    Remove when: `Trainer._get_train_sampler` gives them seed and epoch.
    """
    rows = len(sampler) if sampler is not None else 0
    if isinstance(sampler, RandomSampler):  # as accelerate's SeedableRandomSampler
        return SeededSampler(rows, lambda generator: torch.randperm(rows, generator=generator).tolist(), seed)
    if isinstance(sampler, LengthGroupedSampler):
        of_batches = partial(get_length_grouped_indices, sampler.lengths, sampler.batch_size)
        return SeededSampler(rows, lambda generator: of_batches(generator=generator), seed)
    if hasattr(sampler, "seed"):
        sampler.seed = seed
    return sampler


@contextmanager
def own_precision(args: Any) -> Iterator[None]:
    """Lets `bf16` and `fp16` say the precision where arguments are made, also if both are false.

    Project: transformers 5.24.
    Why: then the launcher's `mixed_precision` acts, such as the bf16 of the files in `training/accelerate`.
    Remove when: `TrainingArguments` trains in float32 if neither is set.
    """
    launched = os.environ.get(PRECISION)
    own = "fp16" if args.fp16 else "no" if args.bf16 is False else "bf16"  # None is TRL's bf16
    if launched not in (None, "no", own):
        logger.warning(f"The launcher's `mixed_precision` {launched} does not act: by `bf16` and `fp16` it is {own}.")
    os.environ[PRECISION] = own
    try:
        yield
    finally:
        del os.environ[PRECISION]
        os.environ |= {PRECISION: launched} if launched is not None else {}


def finished(trainer: Trainer, checkpoint: str) -> TrainOutput | None:
    """Loads a checkpoint in which all steps are done, and trains nothing; returns `None` for another one.

    The weights are those that the run ended with: of the best checkpoint, with `load_best_model_at_end`.

    Project: transformers 5.24.
    Why: `Trainer.train` does one step more if the last epoch was not a whole one.
    Remove when: it stops before the first step.
    """
    state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    with torch.random.fork_rng(devices=[]):
        *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    if state.global_step < steps:
        return None
    trainer.state = state
    trainer._load_from_checkpoint(checkpoint)
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()
    return TrainOutput(state.global_step, 0.0, {})


def save_code(model: PreTrainedModel | PeftModel, folder: str) -> None:
    """Saves the model's code before the training.

    Project: transformers 5.24.
    Why: pushes during a training copy weights and config of a checkpoint, but not the code that they load with.
    Remove when: `Trainer._push_from_checkpoint` copies it.
    """
    os.makedirs(folder, exist_ok=True)
    network = without_adapter(model)
    custom_object_save(network, folder, config=network.config)


def wait_for_push(trainer: Trainer) -> None:
    """Waits until the push before this one is done.

    Project: transformers 5.24.
    Why: with `hub_always_push` the next push overwrites the files that the one before is still reading.
    Remove when: `Trainer._push_from_checkpoint` waits.
    """
    trainer._finish_current_push()


def keep_commit(model: PreTrainedModel, commit: str | None) -> None:
    """Notes in the config which commit of the Hub the weights are from; `None` for a folder.

    Project: transformers 5.24.
    Why: `from_pretrained` no longer sets `config._commit_hash`.
    Remove when: another attribute of a loaded model has the commit.
    """
    model.config._commit_hash = commit


def keep_names(model: PreTrainedModel) -> None:
    """Lets DeepSpeed's ZeRO-3 save the weights by the names that other trainings give them.

    Project: transformers 5.24.
    Why: it notes every way in which older files are renamed, also one that these files did not need, and saving goes it
        back.
    Remove when: `_load_state_dict_into_zero3_model` notes only what it used, as all other loading does.
    """
    if is_deepspeed_zero3_enabled():
        model._weight_conversions = []


# PEFT


def name_base_commit(model: PeftModel) -> None:
    """Notes in the adapters which commit of the Hub their base is.

    Project: PEFT 0.21.
    Why: an adapter remembers the name of its base only, whose branch may move.
    Remove when: `get_peft_model` sets `revision`.
    """
    for adapter in model.peft_config.values():
        adapter.revision = adapter.revision or base_commit(without_adapter(model))


def remove_card(folder: Path) -> None:
    """Removes the README.md that PEFT writes beside an adapter.

    Project: PEFT 0.21.
    Why: it would be taken for a model card, and it says nothing about this model.
    Remove when: `save_pretrained` can leave it out.
    """
    (folder / "README.md").unlink(missing_ok=True)


# accelerate


class SamplerEpoch(TrainerCallback):
    """Tells the sampler its epoch.

    Project: accelerate 1.15.
    Why: where a resumed run skips batches on several ranks, `DataLoaderShard.set_epoch` does not reach the sampler.
    Remove when: it does.
    """

    def __init__(self, sampler: Any):
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


def wait_for_everyone() -> None:
    """Waits for all ranks, if there are several.

    Project: accelerate 1.15.
    Why: `PartialState.wait_for_everyone` names the GPU of the rank's number on the CPU, too; a machine may have fewer.
    Remove when: it names none with `cpu`.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


# torch


class StopByHand(TrainerCallback):
    """Within it, Ctrl-C stops the training after the micro-batch; a second one stops it at once.

    Project: torch 2.13.
    Why: it takes the workers of an epoch down in a `__del__`, and Python drops an interrupt that is raised there.
    Remove when: workers are taken down elsewhere.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.asked = trainer, False

    def __enter__(self) -> None:
        self.trainer.add_callback(self)
        self.before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *exception: object) -> None:
        self.trainer.remove_callback(self)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.before)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            signal.default_int_handler(number, frame)
        self.asked = True

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt

    on_substep_end = on_step_begin


def message_of(error: DataError) -> str:
    """Returns the message of an error, also of one that was raised in a worker.

    Project: torch 2.13.
    Why: `ExceptionWrapper.reraise` puts the worker's traceback into the message.
    Remove when: the message stays as it was.
    """
    return str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """Gives a model that FSDP2 made another class of its own class back.

    Project: torch 2.13, with transformers 5.24.
    Why: `save_pretrained` saves the code beside the class, which is torch's then.
    Remove when: it finds the code of a sharded model.
    """
    sharded = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = sharded.__bases__[1]
    try:
        yield
    finally:
        model.__class__ = sharded


# What the entries share


def part_of(weight: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of a weight: FSDP2 and DeepSpeed's ZeRO-3 split weights over the ranks."""
    return weight.to_local() if isinstance(weight, DTensor) else getattr(weight, "ds_tensor", weight)


def size_of(weight: torch.Tensor) -> int:
    """Returns the number of elements of a weight on all ranks: ZeRO-3 leaves a tensor of none in its place."""
    return getattr(weight, "ds_numel", weight.numel())


def without_adapter(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base_commit(network: PreTrainedModel) -> str | None:
    """Returns the commit of the Hub that the weights are from; `None` for a folder."""
    return getattr(network.config, "_commit_hash", None)
