# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""TRL's SFT with what LLaVA's recipe adds: what trains, at which rates, in which order, and saved whole."""

import copy
import json
import os
import re
import shutil
import signal
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, TrainerState
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging
from trl import SFTTrainer

from conversion.convert import copy_licences, name_auto_class

from .arguments import CONNECTOR, TOWER, LlavaSTFTrainingArguments, launched_processes
from .batches import Collator
from .rows import DataError
from .sampler import ModalityLengthSampler
from .saving import (
    ADAPTER,
    CARD,
    LENGTHS,
    OPTIMIZER,
    RUN,
    UNFINISHED,
    SaveError,
    _replace,
    base_commit,
    check_checkpoint,
    check_optimizer,
    rows_of,
    way_back,
)
from .settings import DECIDING
from .throughput import measure_tflops, now, training_flops
from .upstream import NoEndlessEpochs, SamplerEpoch, image_token_masked, own_class, without_adapter

logger = logging.get_logger(__name__)


class LlavaSTFTrainer(SFTTrainer):
    """[`~trl.SFTTrainer`] for LLaVA-STF, and for the stock LLaVA: rows of `training.data` in, loadable folders out.

    Frozen weights keep the dtype that they were loaded in; what is trained is float32, or else small steps would be
    lost in bfloat16 (DeepSpeed keeps float32 copies itself).

    Raises:
        ValueError: if a pattern matches no parameter, an adapter would change the vision tower, or the dtypes do not
            fit the way of distribution.
        FloatingPointError: if the loss or a weight is no longer finite.
    """

    args: LlavaSTFTrainingArguments
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
        processor = processing_class
        template = template_text(processor, args.chat_template_name)
        for name in ("do_exif_transpose", "alpha_background"):
            if getattr(args, name) is not None:
                setattr(processor.image_processor, name, getattr(args, name))
        if args.image_aspect_ratio == "square":  # in training only: the saved processor pads
            processor = copy.deepcopy(processor)
            processor.image_processor.do_pad = False
        assert not isinstance(args.pad_to_multiple_of, str)  # TRL has made a number of it
        # Rows are checked against `max_length` before training; a collator that truncates could cut an image.
        collator = Collator(
            processor,
            assistant_only_loss=args.assistant_only_loss,
            pad_to_multiple_of=args.pad_to_multiple_of,
            chat_template=template,
        )
        super().__init__(
            model, args, processing_class=processing_class, data_collator=data_collator or collator, **kwargs
        )
        if isinstance(self.train_dataset, IterableDataset):
            if args.group_by_modality_length:
                raise ValueError("A streamed dataset cannot be grouped: set `group_by_modality_length` to false.")
            if args.train_sampling_strategy != "random":
                raise ValueError("A streamed dataset has its own order: leave out `train_sampling_strategy`.")
        if isinstance(self.model, PeftModel):  # an adapter remembers the commit, not a branch that moves
            for adapter in self.model.peft_config.values():
                adapter.revision = adapter.revision or base_commit(without_adapter(self.model))
        self.add_callback(NoEndlessEpochs())
        self._choose_trained()
        self._images = self._tokens = 0
        self._clock = now()
        self._staging = False

    # What trains

    def _choose_trained(self) -> None:
        if isinstance(self.model, PeftModel):
            if self.args.trainable is not None:
                raise ValueError("`trainable` is not for LoRA: name `lora_target_modules` and `lora_modules_to_save`.")
            adapted = [name for name, w in self.model.named_parameters() if w.requires_grad and TOWER in name]
            if adapted:
                raise ValueError(
                    f"The adapter would change the frozen vision tower ({len(adapted)} weights, such as {adapted[0]}). "
                    "Let `lora_target_modules` match the language model only, "
                    r"'.*language_model.*\.(q|k|v|o)_proj', and `lora_modules_to_save` not the tower."
                )
            for name in self.model.peft_config["default"].modules_to_save or ():
                if not any(f"{name}.modules_to_save" in parameter for parameter, _ in self.model.named_parameters()):
                    raise ValueError(f"`lora_modules_to_save` {name!r} matches no module; expected {CONNECTOR!r}.")
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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As [`Trainer.create_optimizer`], the fusion modules in groups of their own rate."""
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

    # Order and loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(rows)
        if not {"length", "vision"} <= set(rows.column_names or ()):
            raise ValueError(
                "`group_by_modality_length` needs the columns `length` and `vision`: check the rows first (see "
                "`training.data.check_rows`), or set it to false."
            )
        sampler = ModalityLengthSampler(
            rows["length"][:],
            [vision > 0 for vision in rows["vision"][:]],
            self.args.train_batch_size,
            self.args.world_size * self.args.gradient_accumulation_steps,
            self.args.order_seed,
        )
        self.add_callback(SamplerEpoch(sampler))
        return sampler

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        if self.args.loss_reduction == "microbatch":
            return None  # each micro-batch is averaged by itself
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As [`SFTTrainer.compute_loss`]; `<image>` is no answer, as in the model's own loss."""
        with image_token_masked(self.accelerator.unwrap_model(self.model)):
            return super().compute_loss(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As [`Trainer.training_step`]; stops at a loss that is not finite, before the weights change."""
        pixels = inputs.get("pixel_values")
        self._images += 0 if pixels is None else pixels.shape[0]
        self._tokens += int(inputs["attention_mask"].sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} in step {self.state.global_step + 1}; nothing was changed by it. "
                f"{self._way_back()} Usual causes: a learning rate that is too high, or float16 (use bfloat16)."
            )
        return loss

    # Speed

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As [`Trainer.train`]; a run that had done all its steps is loaded, and nothing is added to it.

        Raises:
            CheckpointError: if the checkpoint is incomplete, damaged or of another run.
        """
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir) / UNFINISHED, ignore_errors=True)
            if self.args.push_to_hub:
                # Pushes in between copy the weights, but not the code, which must be there already.
                os.makedirs(self.args.output_dir, exist_ok=True)
                network = without_adapter(self.accelerator.unwrap_model(self.model))
                custom_object_save(network, self.args.output_dir, config=network.config)
        if self.args.peak_tflops is None:
            self.args.peak_tflops = measure_tflops(self.args.device, bool(self.args.bf16))
        if resume_from_checkpoint is True:  # transformers' way to say "the last"
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            self._check_checkpoint(Path(resume_from_checkpoint))
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, "trainer_state.json"))
            if 0 < self.args.max_steps <= state.global_step:
                self.state = state
                self._load_from_checkpoint(resume_from_checkpoint)
                return TrainOutput(state.global_step, 0.0, {})
        self._clock = now()
        try:
            with StopByHand(self):
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except DataError as error:  # with the traceback of a worker in front
            message = str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
            raise DataError(f"{message}. {self._way_back()}") from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As [`SFTTrainer.log`], with the throughput of all devices since the last line."""
        if "loss" in logs:
            seconds = now() - self._clock
            counts = torch.tensor([self._images, self._tokens], device=self.args.device)
            images, tokens = self.accelerator.reduce(counts, "sum").tolist()
            flops = training_flops(self.accelerator.unwrap_model(self.model), images, tokens)
            assert self.args.peak_tflops is not None  # measured at the start
            peak = self.args.peak_tflops * 1e12 * self.args.world_size
            logs |= {
                "images_per_second": images / seconds,
                "tokens_per_second": tokens / seconds,
                "mfu": flops / seconds / peak,
            }
            self._images = self._tokens = 0
            self._clock = now()
        super().log(logs, start_time)

    # Going on

    @cached_property
    def run(self) -> dict[str, Any]:
        """What decides the numbers of this run, as it is written beside each checkpoint."""
        settings = self.args.to_dict()
        network = without_adapter(self.model)
        adapter = self.model.peft_config["default"].to_dict() if isinstance(self.model, PeftModel) else {}
        run = {
            "processes": self.args.world_size,
            **{name: settings[name] for name in (*DECIDING, *LENGTHS)},
            "base": network.name_or_path,
            "revision": base_commit(network),
            "dtype": str(next(self.model.parameters()).dtype),
            **{name: adapter.get(name) for name in ADAPTER if adapter},
            **rows_of(self.train_dataset),
        }
        return json.loads(json.dumps(run, default=sorted))  # sets as lists, as they will be read

    def _check_checkpoint(self, folder: Path) -> None:
        shapes = None
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            adapter = isinstance(self.model, PeftModel)
            weights = get_peft_model_state_dict(self.model) if adapter else self.model.state_dict()
            shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
            if self.model.config.get_text_config().tie_word_embeddings:
                shapes.pop("lm_head.weight", None)
        for note in check_checkpoint(folder, self.run, shapes, self.accelerator.scaler is not None):
            logger.warning(note)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            scaled = self.accelerator.scaler is not None
            check_optimizer(Path(checkpoint) / OPTIMIZER, self.optimizer, self.state.global_step, scaled)
        super()._load_optimizer_and_scheduler(checkpoint)

    # Saving: complete or absent

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite()
        run = Path(self._get_output_dir(trial))
        staging, name = run / UNFINISHED, f"checkpoint-{self.state.global_step}"
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (staging / name / RUN).write_text(json.dumps(self.run, indent=2) + "\n", encoding="utf-8")
                self._name_best(staging, run, name)
                _replace(staging / name, run / name)
        except Exception as error:
            raise SaveError(f"Could not save {run / name}: {error}. {self._way_back()}") from error
        finally:
            self._staging = False
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._finish_current_push()  # it reads the files that the next one overwrites
            super()._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not yet: the checkpoint has still to get its name, see [`_save_checkpoint`]."""

    def _name_best(self, staging: Path, run: Path, name: str) -> None:
        if self.state.best_model_checkpoint == str(staging / name):
            self.state.best_model_checkpoint = str(run / name)
            self.state.save_to_json(str(staging / name / "trainer_state.json"))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self._staging:
            return self._write(folder, state_dict)
        self._check_finite()
        staging = folder / UNFINISHED
        try:
            self._write(staging, state_dict)
            if self.args.should_save:
                # A folder without its config does not load: it comes last.
                for path in sorted(staging.iterdir(), key=lambda path: path.name.endswith("config.json")):
                    _replace(path, folder / path.name)
        except Exception as error:
            raise SaveError(f"Could not save {folder}: {error}. {self._way_back()}") from error
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    def _write(self, folder: Path, state_dict: dict | None) -> None:
        with own_class(self.model):
            super()._save(str(folder), state_dict)
        if self.args.should_save:
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's, which knows less than ours
            if isinstance(self.model, PeftModel):
                name_auto_class(folder)
            copy_licences(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A note in place of a card, where there is none: what a card needs to know, a run does not."""
        card = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and not card.exists():
            card.parent.mkdir(parents=True, exist_ok=True)
            card.write_text(CARD, encoding="utf-8")

    def _check_finite(self) -> None:
        for name, weight in self.model.named_parameters():
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            if weight.requires_grad and not torch.isfinite(local).all():
                raise FloatingPointError(
                    f"{name} is not finite after step {self.state.global_step}; it was not saved. {self._way_back()}"
                )

    def _way_back(self) -> str:
        return way_back(self.args.output_dir)


def template_text(processor: Any, name: str) -> str:
    """The chat template of this name; a `ValueError` that lists the names if there is none."""
    templates = processor.chat_template
    templates = templates if isinstance(templates, dict) else {"default": templates}
    if name not in templates:
        raise ValueError(f"The processor has no chat template {name!r}; it has {', '.join(templates)}.")
    return templates[name]


class StopByHand(TrainerCallback):
    """Within it Ctrl-C stops the training after the micro-batch; a second one at once.

    Raised at once, it is lost where the workers of an epoch are taken down: torch (2.13 seen) does that in a
    `__del__`, and Python drops what is raised there.
    """

    def __init__(self, trainer: LlavaSTFTrainer):
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
