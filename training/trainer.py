# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""TRL's SFT with what LLaVA's recipe adds: what trains, at which rates, in which order, and by which loss."""

import copy
import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, ProcessorMixin, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFProcessor
from modeling_llava_stf.processing_llava_stf import PLAIN

from .arguments import CONNECTOR, TOWER, LlavaSTFTrainingArguments, launched_processes
from .batches import Collator
from .budgets import ALL, BudgetEpoch, TokenBudgets, budgets_of, row_key
from .checks import longest_row
from .rows import DataError, undecoded
from .sampler import BudgetLengthSampler, ModalityLengthSampler
from .saving import CheckpointError, SavingTrainer
from .throughput import Meter, measure_tflops
from .upstream import (
    GivenSteps,
    NoEndlessEpochs,
    SamplerEpoch,
    StopByHand,
    finished,
    image_token_masked,
    keep_as_loaded,
    message_of,
    name_base_commit,
    seeded,
    without_adapter,
)

logger = logging.get_logger(__name__)


class LlavaSTFTrainer(SavingTrainer):
    """[`~trl.SFTTrainer`] for LLaVA-STF, and for the stock LLaVA: rows of `training.rows` in, loadable folders out.

    Frozen weights keep the dtype that they were loaded in; what is trained is float32, or else small steps would be
    lost in bfloat16 (DeepSpeed keeps float32 copies itself).

    Raises:
        ValueError: if a pattern matches no parameter, an adapter would change the vision tower, or the dtypes do not
            fit the way of distribution.
        FloatingPointError: if the loss or a weight is no longer finite.
    """

    _tag_names = ["llava-stf"]
    _name = "SFT"

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: LlavaSTFTrainingArguments,
        *,
        processing_class: ProcessorMixin,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        launched = launched_processes()
        if launched != args.world_size:
            raise ValueError(
                f"{launched} processes were launched, but each would train by itself (world size {args.world_size}): "
                "without GPUs pass `--use_cpu true`."
            )
        self.budgets = budgets_of(args.token_budgets, args.token_budget_mode, args.order_seed, processing_class)
        if self.budgets is not None and data_collator is not None:
            raise ValueError("`token_budgets` does not act on a `data_collator` of your own: leave one of them out.")
        if kwargs.get("formatting_func") is not None:
            raise ValueError("`formatting_func` does not act: write rows of `messages` and `images`, and leave it out.")
        if kwargs.get("optimizers", (None, None))[0] is not None and args.projector_learning_rate is not None:
            raise ValueError(
                "`projector_learning_rate` does not act on an optimizer of your own: leave one of them out."
            )
        collator = collator_of(processing_class, args, self.budgets)
        super().__init__(
            model, args, processing_class=processing_class, data_collator=data_collator or collator, **kwargs
        )
        self._name_budgets(processing_class)
        if self.budgets is not None:
            self.add_callback(BudgetEpoch(self.budgets))
        self._check_stream()
        if args.lr_scheduler_type == "constant" and args.warmup_steps and args.should_log:
            logger.warning(
                f"`warmup_steps` {args.warmup_steps:g} does not act: `lr_scheduler_type` constant has no warmup, "
                "constant_with_warmup has one."
            )
        if isinstance(self.model, PeftModel):
            name_base_commit(self.model)
            if kwargs.get("peft_config") is not None and not self.is_deepspeed_enabled:
                keep_as_loaded(self.model)
        self.add_callback(NoEndlessEpochs())
        self.add_callback(GivenSteps())
        self._choose_trained()
        self._meter = Meter()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains as [`Trainer.train`] does; a run that had done all its steps is loaded, and nothing is added to it.

        Args:
            resume_from_checkpoint: checkpoint to go on from, `"last"` or `True` for the newest; by default that of the
                arguments.
            **kwargs: those of [`Trainer.train`].

        Raises:
            CheckpointError: if the checkpoint is missing, incomplete, damaged or of another run.
            ValueError: if weights of two dtypes would meet.
        """
        self.prepare_folder()
        if self.args.peak_tflops is None:
            self.args.peak_tflops = measure_tflops(self.args.device, bool(self.args.bf16))
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if str(resume_from_checkpoint).lower() in ("last", "true"):  # True is transformers' way to say it
            resume_from_checkpoint = self._last_checkpoint()
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            self.check_checkpoint(Path(resume_from_checkpoint))
            self._check_pass(resume_from_checkpoint)
            if done := finished(self, resume_from_checkpoint):
                return done
        self._check_precision()
        self._meter.restart()
        try:
            with StopByHand(self):
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except DataError as error:
            raise DataError(f"{message_of(error)}. {self._way_back()}") from error

    def _last_checkpoint(self) -> str:
        folder = str(self.args.output_dir)
        last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        if last is None:
            raise CheckpointError(f"{folder} has no complete checkpoint to go on from.")
        return last

    # Rows

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Leaves rows of texts as they are, too: TRL would cut them, and leave out those without an answer then."""
        return dataset

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """Makes a loader as [`Trainer`] does; photos are turned if the processor says so, not by `datasets`."""
        turns = getattr(self.processing_class.image_processor, "do_exif_transpose", True)
        return super()._get_dataloader(dataset if turns else undecoded(dataset), *args, **kwargs)

    # What trains

    def _choose_trained(self) -> None:
        if isinstance(self.model, PeftModel):
            self._check_adapter(self.model)
        else:
            pattern = self.args.trainable or rf"^(?!.*\b{TOWER}\b)"
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(re.search(pattern, name) is not None)
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        if not trained:
            parts = sorted({".".join(name.split(".")[:2]) for name, _ in self.model.named_parameters()})
            raise ValueError(f"`trainable` {self.args.trainable!r} matches no parameter of {', '.join(parts)}.")
        if not self.is_deepspeed_enabled:
            for weight in trained.values():
                weight.data = weight.data.float()
        dtypes = {weight.dtype for weight in self.model.parameters()}
        if self.is_fsdp_enabled and len(dtypes) > 1:
            raise ValueError(
                f"FSDP shards weights of one dtype only, found {', '.join(sorted(map(str, dtypes)))}. Load the model "
                "with `--dtype float32`; `bf16: true` still computes in bfloat16."
            )

    def _check_precision(self) -> None:
        """Raises a `ValueError` if weights of two dtypes would meet.

        PEFT's own matrices cast what they get; quantised weights may be stored as any dtype.
        """
        weights = [each for each in self.model.named_parameters() if not hasattr(each[1], "quant_state")]
        own = {weight.dtype for name, weight in weights if weight.requires_grad and ".lora_" not in name}
        others = {weight.dtype for _, weight in weights if weight.is_floating_point()} - own
        if own and others and self.args.mixed_precision == "no":
            found = f"{', '.join(map(str, own))} and {', '.join(map(str, others))}".replace("torch.", "")
            raise ValueError(
                f"Weights that are trained and weights that are frozen are {found}, which compute together only with "
                "`bf16` or `fp16`: set that, or load the model with `--dtype float32`."
            )

    def _check_adapter(self, model: PeftModel) -> None:
        if self.args.trainable is not None:
            raise ValueError("`trainable` is not for LoRA: name `lora_target_modules` and `lora_modules_to_save`.")
        check_tower(model)
        for name in model.peft_config["default"].modules_to_save or ():
            if not any(f"{name}.modules_to_save" in parameter for parameter, _ in model.named_parameters()):
                raise ValueError(f"`lora_modules_to_save` {name!r} matches no module; expected {CONNECTOR!r}.")
        whole = [name for name, _ in model.named_parameters() if ".modules_to_save." in name]
        parted = [name for name in whole if "lm_head" in name or "embed_tokens" in name]
        if parted and without_adapter(model).config.get_text_config().tie_word_embeddings:
            raise ValueError(
                f"`lora_modules_to_save` would train {parted[0]} alone, but embeddings and `lm_head` of this model are "
                f"one matrix: name only {CONNECTOR!r}."
            )

    # Rates

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates the optimizer as [`Trainer.create_optimizer`] does, with the fusion modules in groups of their own.

        Raises:
            ValueError: if the fusion modules have a rate, but are not trained.
        """
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rate = self.args.projector_learning_rate
        if not created or rate is None:
            return optimizer
        network = self.model if model is None else model
        connector = {id(weight) for name, weight in network.named_parameters() if CONNECTOR in name}
        trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        if not trained & connector:
            raise ValueError(f"`projector_learning_rate` is {rate}, but no parameter of {CONNECTOR} is trained.")
        groups = []
        for group in optimizer.param_groups:
            own = [weight for weight in group["params"] if id(weight) in connector]
            others = [weight for weight in group["params"] if id(weight) not in connector]
            groups += [{**group, "params": others}, {**group, "params": own, "lr": rate}]
        optimizer.param_groups[:] = [group for group in groups if group["params"]]
        return optimizer

    # Order

    def _check_stream(self) -> None:
        if isinstance(self.train_dataset, IterableDataset):
            if self.args.group_by_modality_length:
                raise ValueError("A streamed dataset cannot be grouped: set `group_by_modality_length` to false.")
            if self.args.train_sampling_strategy != "random":
                raise ValueError("A streamed dataset has its own order: leave out `train_sampling_strategy`.")

    def _check_pass(self, checkpoint: str) -> None:
        """Raises a [`CheckpointError`] in the second pass over a stream: transformers would skip rows of the first."""
        epoch = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json")).epoch
        if isinstance(self.train_dataset, IterableDataset) and (epoch or 0) >= 1:
            raise CheckpointError(
                f"{checkpoint} is in pass {int(epoch or 0) + 1} over a stream, and a run over a stream goes on in "
                "its first pass only. Begin a new run from its weights with another `--output_dir`, or do not stream."
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.group_by_modality_length:
            sampler = seeded(super()._get_train_sampler(rows), self.args.order_seed)
            return self._with_epoch(sampler) if hasattr(sampler, "set_epoch") else sampler
        if not {"length", "vision"} <= set(rows.column_names or ()):
            raise ValueError(
                "`group_by_modality_length` needs the columns `length` and `vision`: check the rows first (see "
                "`training.checks.check_rows`), or set it to false."
            )
        lengths, vision = rows["length"][:], rows["vision"][:]
        batches: Any = {
            "batch_size": self.args.train_batch_size,
            "batches": self.args.world_size * self.args.gradient_accumulation_steps,
            "seed": self.args.order_seed,
        }
        if self.budgets is None:
            sampler = ModalityLengthSampler(lengths, [pictures > 0 for pictures in vision], **batches)
        else:
            named = rows.select_columns(["id", "messages"]).iter(1000)
            keys = [row_key(*row) for batch in named for row in zip(batch["id"], batch["messages"], strict=True)]
            sampler = BudgetLengthSampler(lengths, vision, keys, self.budgets, **batches)
        return self._with_epoch(sampler)

    def _with_epoch(self, sampler: Any) -> Sampler:
        self.remove_callback(SamplerEpoch)  # that of a loader that was made before
        self.add_callback(SamplerEpoch(sampler))
        return sampler

    # Budgets

    def _name_budgets(self, processor: ProcessorMixin) -> None:
        """Writes into the config which budgets this run trains; says so if they are others than before.

        Raises:
            ValueError: if there is no picture to train new ones on.
        """
        config = without_adapter(self.model).config
        if not isinstance(config, LlavaSTFConfig) or not isinstance(processor, LlavaSTFProcessor):
            return
        full, default = processor.allowed_token_budgets[0], processor.tokens_per_image
        before = list(config.token_budgets or [full])
        config.token_budgets = self.args.token_budgets or (None if default == full else [default])
        now = list(config.token_budgets or [full])
        self._check_pictures(set(now) - set(before))
        if set(before) - set(now) and self.args.should_log:
            both = " ".join(map(str, sorted({*before, *now}, reverse=True)))
            logger.warning(
                f"The checkpoint was trained for {before} tokens per picture. This run trains {now}, and its config "
                f"will name no others. To keep them: --token_budgets {both}"
            )
        if default not in now and self.args.should_log:
            logger.warning(
                f"This run trains {now} tokens per picture, and not {default}: a call that does not pass "
                "`max_soft_tokens` will have a number of tokens that the model was not trained for."
            )

    def _check_pictures(self, new: set[int]) -> None:
        """Raises a `ValueError` if the rows have no picture, from which new budgets could be learnt."""
        rows = self.train_dataset
        known = self.budgets is not None and isinstance(rows, Dataset) and "vision" in rows.column_names
        if new and known and not any(rows["vision"][:]):
            raise ValueError(
                f"No row has a picture, so nothing would train {sorted(new, reverse=True)} tokens per picture: leave "
                "`token_budgets` out, or name those that the checkpoint was trained for."
            )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Returns the loader of [`Trainer.get_eval_dataloader`]: each row is there once, with the largest budget."""
        with self._largest_budget():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Returns the loader of [`Trainer.get_test_dataloader`], with rows as for evaluation."""
        with self._largest_budget():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _largest_budget(self) -> Iterator[None]:
        collator = self.data_collator  # type: ignore[has-type]
        if self.budgets is not None:
            largest = TokenBudgets(self.budgets.sizes[:1], self.budgets.full)
            self.data_collator = dataclasses.replace(collator, budgets=largest)
        try:
            yield
        finally:
            self.data_collator = collator

    # Loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        if self.args.loss_reduction == "microbatch":
            return None  # each micro-batch is averaged by itself
        if self._repeats_text:  # a text row counts as often as the others are there
            batch_samples = [
                {"labels": batch["labels"].repeat_interleave(self._weights(batch), 0)} for batch in batch_samples
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Computes the loss as [`SFTTrainer.compute_loss`] does, but `<image>` is no answer.

        With `token_budget_mode` 'all' it is M3's: the mean of the losses that the batch has with each budget.
        """
        if self._repeats_text and self.model.training:
            model = self._weighted(model, inputs)
        with image_token_masked(self.accelerator.unwrap_model(self.model)):
            return super().compute_loss(model, inputs, *args, **kwargs)

    @property
    def _repeats_text(self) -> bool:
        """Whether a text row, which is computed once, stands for as many rows as there are budgets."""
        return self.budgets is not None and self.budgets.mode == ALL

    def _weights(self, batch: dict[str, Any]) -> torch.Tensor:
        """Returns how many rows of M3's batches each row stands for, (rows,)."""
        pictures = (batch["input_ids"] == self.model.config.image_token_id).any(1)
        return torch.where(pictures, 1, len(self.args.token_budgets or ()))

    def _weighted(self, model: Any, inputs: dict[str, Any]) -> Callable[..., Any]:
        """Returns the model with log-probabilities that count as often as their row does."""
        weights = self._weights(inputs)
        if self.args.loss_reduction == "microbatch":  # TRL divides by the number of tokens that are there
            tokens = (inputs["labels"][:, 1:] != -100).sum(1)
            weights = weights * tokens.sum() / (weights * tokens).sum().clamp(min=1)

        def weighted(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            outputs.log_probs = outputs.log_probs * weights[:, None]
            return outputs

        return weighted

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trains on a micro-batch as [`Trainer.training_step`] does.

        Raises:
            FloatingPointError: if the loss is not finite; the weights have not changed yet.
        """
        self._meter.count(inputs, self.model.config.image_token_id)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} in step {self.state.global_step + 1}; nothing was changed by it. "
                f"{self._way_back()} Usual causes: a learning rate that is too high, or float16 (use bfloat16)."
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as [`SFTTrainer.log`] does, with the throughput of all devices since the last line.

        The seconds of evaluations and checkpoints are not in it.
        """
        if "loss" in logs:
            assert self.args.peak_tflops is not None  # measured at the start
            peak = self.args.peak_tflops * 1e12 * self.args.world_size
            logs |= self._meter.read(self.accelerator.unwrap_model(self.model), self._sum_over_ranks, peak)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates as [`Trainer.evaluate`] does; no throughput has its seconds."""
        with self._meter.paused():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._meter.paused():
            super()._save_checkpoint(*args, **kwargs)

    def _sum_over_ranks(self, numbers: list[int]) -> list[int]:
        return self.accelerator.reduce(torch.tensor(numbers, device=self.args.device), "sum").tolist()


def check_tower(model: nn.Module) -> None:
    """Raises a `ValueError` if a training of this model with an adapter would change the vision tower."""
    adapted = [name for name, weight in model.named_parameters() if weight.requires_grad and TOWER in name]
    if adapted:
        raise ValueError(
            f"The adapter would change the frozen vision tower ({len(adapted)} weights, such as {adapted[0]}). "
            "Let `lora_target_modules` match the language model only, "
            r"'.*language_model.*\.(q|k|v|o)_proj', and `lora_modules_to_save` not the tower."
        )


def collator_of(
    processor: ProcessorMixin, args: LlavaSTFTrainingArguments, budgets: TokenBudgets | None = None
) -> Collator:
    """Makes the collator of a training; what `args` say about pictures is set in `processor`, too."""
    template = template_text(processor, args.chat_template_name)
    for name in ("do_exif_transpose", "alpha_background"):
        if getattr(args, name) is not None:
            setattr(processor.image_processor, name, getattr(args, name))
    if args.image_aspect_ratio == "pad":  # the processor of a converted stage-1 run does not
        processor.image_processor.do_pad = True
    else:  # in training only: the saved processor stays as it is
        processor = copy.deepcopy(processor)
        processor.image_processor.do_pad = False
    assert not isinstance(args.pad_to_multiple_of, str)  # TRL has made a number of it
    # Rows are checked against `max_length` before training; a collator that truncates could cut an image.
    return Collator(
        processor,
        assistant_only_loss=args.assistant_only_loss,
        pad_to_multiple_of=args.pad_to_multiple_of,
        chat_template=template,
        budgets=budgets,
        longest=longest_row(args.max_length, processor),
    )


def template_text(processor: Any, name: str) -> str:
    """Returns the chat template of this name: one of the processor's, or `plain`, that of stage 1.

    Raises:
        ValueError: if there is none; lists the names.
    """
    templates = processor.chat_template
    templates = templates if isinstance(templates, dict) else {"default": templates}
    templates = {"plain": PLAIN.read_text(encoding="utf-8"), **templates}
    if name not in templates:
        raise ValueError(f"The training has no chat template {name!r}; it has {', '.join(sorted(templates))}.")
    return templates[name]
