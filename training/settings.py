# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Says of every option of TRL's `SFTConfig` and `ModelConfig` who acts on it, or why it is refused.

An option is in exactly one of `UNCHANGED`, `BY_US` and `REFUSED`; a test holds that against the installed TRL, so
that an option which comes with a new version has to be looked at.
"""

import copy
import dataclasses
import math
import re
import typing
from collections.abc import Callable
from typing import Any

import PIL.ImageColor
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from .upstream import number_of

# TRL, transformers, accelerate or PEFT act on these, as they say.
UNCHANGED = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    average_tokens_across_devices max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs activation_offloading torch_compile torch_compile_backend
    torch_compile_mode neftune_noise_alpha torch_empty_cache_steps loss_type
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id debug skip_memory_metrics
    eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start eval_use_gather_object
    eval_accumulation_steps do_eval
    save_only_model save_strategy save_steps save_on_each_node save_total_limit load_best_model_at_end
    metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    full_determinism seed use_cpu accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
    fsdp_config deepspeed
    use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save use_rslora use_dora
    """.split()
)
# `training` itself acts on these.
BY_US = frozenset(
    """
    model_name_or_path model_revision dtype attn_implementation load_in_8bit load_in_4bit bnb_4bit_quant_type
    use_bnb_nested_quant bnb_4bit_quant_storage gradient_accumulation_steps assistant_only_loss max_length
    pad_to_multiple_of dataset_num_proc data_seed resume_from_checkpoint
    """.split()
)
NO_PACKING = "rows with images are padded, not packed; `group_by_modality_length` makes batches of similar lengths"
OF_THE_TOKENIZER = "it belongs to the checkpoint's tokenizer, which the chat templates use: change it there"
LOSS_ONLY = "evaluation computes the loss, and nothing else that this could change"
NO_LIGER = "Liger has no kernels for this model; `attn_implementation` chooses those of attention"
IN_TRAINING = "evaluation runs between the steps of a training, in its precision (`bf16`)"
# These would do nothing here, or something else than they say: refused, with what to use instead.
REFUSED = {
    "auto_find_batch_size": "it would change the global batch: lower `per_device_train_batch_size`, the accumulation "
    "steps follow from `global_batch_size`",
    "batch_eval_metrics": LOSS_ONLY,
    "bf16_full_eval": IN_TRAINING,
    "chat_template_path": "rows are written with the template of the checkpoint's processor, or with stage 1's: "
    "name it with `chat_template_name`",
    "completion_only_loss": "`assistant_only_loss` trains on the answers",
    "dataset_kwargs": "rows are prepared when their batch is made",
    "dataset_text_field": "rows have `messages` or `conversations`",
    "do_predict": "this command trains; `eval_data_path` with `eval_strategy` evaluates",
    "do_train": "this command always trains",
    "enable_jit_checkpoint": "its checkpoint can be seen before it is complete: lower `save_steps`",
    "eos_token": OF_THE_TOKENIZER,
    "eval_do_concat_batches": LOSS_ONLY,
    "eval_packing": NO_PACKING,
    "fp16_full_eval": IN_TRAINING,
    "include_for_metrics": LOSS_ONLY,
    "label_names": "the labels are `labels`, which the collator makes",
    "label_smoothing_factor": "TRL would smooth over `<image>`, which is no answer; leave it out",
    "length_column_name": "the rows' lengths are in the column `length`",
    "liger_kernel_config": NO_LIGER,
    "local_rank": "launch with `accelerate launch` or `torchrun`, which say it in the environment",
    "lora_target_parameters": "name modules with `lora_target_modules`",
    "lora_task_type": "the model answers in text, which is `CAUSAL_LM`",
    "model_init_kwargs": "the model is loaded by `dtype`, `attn_implementation`, `model_revision` and `load_in_4bit`",
    "optim_target_modules": "GaLore and APOLLO are not supported; `trainable` says what is trained",
    "packing": NO_PACKING,
    "packing_strategy": NO_PACKING,
    "pad_token": OF_THE_TOKENIZER,
    "padding_free": NO_PACKING,
    "parallelism_config": "use DDP, FSDP or DeepSpeed by a file of training/accelerate",
    "prediction_loss_only": LOSS_ONLY,
    "remove_unused_columns": "the collator needs all columns",
    "router_aux_loss_coef": "the model has no experts",
    "shuffle_dataset": "rows are shuffled in each epoch, by `data_seed`; `train_sampling_strategy` is the order",
    "truncation_mode": "rows are never cut; those longer than `max_length` are found before the training",
    "trust_remote_code": "the checkpoint's code is not run: the model and the processor are this package's",
    "use_cache": "a training keeps no cache",
    "use_liger_kernel": NO_LIGER,
}
# Options that act only beside another one, any of these.
LORA = ("use_peft",)
EVALUATION = ("eval_strategy", "eval_on_start")
NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"), LORA),
    **dict.fromkeys(("use_rslora", "use_dora", "load_in_8bit", "load_in_4bit"), LORA),
    **dict.fromkeys(("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), ("load_in_4bit",)),
    **dict.fromkeys(("eval_steps", "eval_delay", "do_eval"), ("eval_strategy",)),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_use_gather_object", "eval_accumulation_steps"), EVALUATION),
    **dict.fromkeys(
        ("metric_for_best_model", "greater_is_better"), ("load_best_model_at_end", "save_strategy", "lr_scheduler_type")
    ),
    **dict.fromkeys(("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), ("push_to_hub",)),
    **dict.fromkeys(("hub_always_push", "hub_revision"), ("push_to_hub",)),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), ("report_to",)),
    **dict.fromkeys(("run_name", "project"), ("report_to",)),
    "fsdp_config": ("fsdp",),
    "token_budget_mode": ("token_budgets",),
    "optim_args": ("optim",),
}
# What a number must be, and the options that it holds for.
RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    (
        "1 or more",
        lambda number: number >= 1,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps global_batch_size "
        "save_total_limit dataloader_prefetch_factor dataset_num_proc max_length pad_to_multiple_of "
        "torch_empty_cache_steps eval_accumulation_steps ddp_bucket_cap_mb ddp_timeout lora_r",
    ),
    (
        "above 0",
        lambda number: number > 0,
        "num_train_epochs logging_steps save_steps eval_steps adam_epsilon lora_alpha peak_tflops",
    ),
    (
        "0 or more",
        lambda number: number >= 0,
        "learning_rate projector_learning_rate weight_decay max_grad_norm warmup_steps eval_delay neftune_noise_alpha "
        "dataloader_num_workers seed data_seed",
    ),
    ("from 0 to below 1", lambda number: 0 <= number < 1, "adam_beta1 adam_beta2 lora_dropout"),
    ("-1 (not set), or 1 or more", lambda number: number == -1 or number >= 1, "max_steps"),
]
PATTERNS = ("trainable", "lora_target_modules")
# Schedules that multiply all rates by one number, which follows from `learning_rate`.
RELATIVE = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial")
OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
# What decides the numbers of a run: a resumed run has these as they were.
DECIDING = sorted(
    """
    per_device_train_batch_size gradient_accumulation_steps learning_rate projector_learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    average_tokens_across_devices bf16 fp16 neftune_noise_alpha loss_type loss_reduction trainable
    assistant_only_loss chat_template_name image_aspect_ratio do_exif_transpose alpha_background seed data_seed
    full_determinism dataloader_drop_last train_sampling_strategy group_by_modality_length token_budgets
    accelerator_config
    """.split()
)


def check_settings(settings: Any) -> None:
    """Checks the options of a dataclass as they were given, before anything is derived from them.

    Raises:
        ValueError: if one would not act, or cannot be meant: names it, its value, and what is expected.
    """
    types = typing.get_type_hints(type(settings))  # the parser takes None out of those of the options
    for option in dataclasses.fields(settings):
        if not option.init:
            continue
        value = getattr(settings, option.name)
        given = value != _default(option)
        if given and option.name in REFUSED:
            raise ValueError(f"`{option.name}` does not act here: {REFUSED[option.name]}.")
        kind = types[option.name]
        choices = option.metadata.get("choices") or ((True, False) if kind is bool else None)
        if choices and value not in choices and not (value is None and "None" in str(kind)):
            raise ValueError(f"`{option.name}` is {value!r}, expected one of {', '.join(map(str, choices))}.")
        if isinstance(value, list) and "list" not in str(kind):
            raise ValueError(f"`{option.name}` is {value!r}, expected one value and no list.")
        if given and option.name in NEEDS:
            _check_company(settings, option.name)
    _check_numbers(settings)
    _check_texts(settings)


def _default(option: dataclasses.Field) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _check_company(settings: Any, name: str) -> None:
    defaults = {option.name: _default(option) for option in dataclasses.fields(settings)}
    if all(getattr(settings, other) == defaults[other] for other in NEEDS[name]):
        others = " or ".join(f"`{other}`" for other in NEEDS[name])
        raise ValueError(f"`{name}` does not act without {others}: set that, or leave it out.")


def check_given(settings: Any, names: set[str]) -> None:
    """Checks options that were given, also those with the value that is their default.

    Raises:
        ValueError: if one acts only beside another, which is not set.
    """
    for option in dataclasses.fields(settings):
        if option.name in NEEDS.keys() & names and getattr(settings, option.name) not in (None, False):
            _check_company(settings, option.name)


def check_optimizer(args: Any) -> None:
    """Checks the options of the optimizer and of its schedule, by making them.

    Raises:
        ValueError: if one changes nothing, or is not known: names it, and what to use.
    """
    texts = [text.strip() for text in (args.optim_args or "").split(",") if text.strip()]
    for text in texts:
        name = text.partition("=")[0].strip()
        if name == "weight_decay":
            raise ValueError("`optim_args` has `weight_decay`, which does not act there: it is an option of its own.")
        if "=" not in text or not _acts(args, "optim_args", ",".join(other for other in texts if other != text)):
            raise ValueError(
                f"`optim_args` has {text!r}, which changes nothing with `optim` {args.optim.value}: leave it out."
            )
    for option in dataclasses.fields(args):
        if option.name in OF_ADAM and getattr(args, option.name) != option.default:
            if not _acts(args, option.name, option.default):
                raise ValueError(f"`{option.name}` does not act with `optim` {args.optim.value}: leave it out.")
    _check_schedule(args)


def _acts(args: Any, name: str, otherwise: Any) -> bool:
    """Tells whether the optimizer would be another one if this option had another value."""
    changed = copy.copy(args)
    setattr(changed, name, otherwise)
    return Trainer.get_optimizer_cls_and_kwargs(changed) != Trainer.get_optimizer_cls_and_kwargs(args)


def _check_schedule(args: Any) -> None:
    kind, given = args.lr_scheduler_type.value, args.lr_scheduler_kwargs or {}
    if not isinstance(given, dict):
        raise ValueError(f"`lr_scheduler_kwargs` is {given!r}, expected an object, such as '{{\"num_cycles\": 2}}'.")
    if given and kind in ("constant", "constant_with_warmup"):
        raise ValueError(f"`lr_scheduler_kwargs` does not act with `lr_scheduler_type` {kind}: leave it out.")
    least = {"min_lr", "lr_end"} & given.keys()
    if least and kind in RELATIVE and args.projector_learning_rate not in (None, args.learning_rate):
        raise ValueError(
            f"`lr_scheduler_kwargs` has {min(least)!r}, but `projector_learning_rate` would fall to the same share of "
            "itself as `learning_rate`: choose cosine_with_min_lr, and `min_lr_rate` to say that share."
        )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    try:
        made = get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=2, scheduler_specific_kwargs=given)
        if isinstance(made, LambdaLR):
            made.lr_lambdas[0](1)  # a text, such as `1e-1` in YAML, is not read in the warmup
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"`lr_scheduler_kwargs` {given} is not for {kind}: {error}.") from error


def _check_numbers(settings: Any) -> None:
    options = {option.name: option for option in dataclasses.fields(settings)}
    types = typing.get_type_hints(type(settings))  # the parser takes None out of those of the options
    for expected, fits, names in RANGES:
        for name in names.split():
            if name not in options:
                continue
            value = getattr(settings, name)
            if value == _default(options[name]) or value is None and "None" in str(types[name]):
                continue
            if isinstance(value, str) and name == "pad_to_multiple_of":  # TRL's comes as text from the command line
                value = number_of(value)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not fits(value):
                raise ValueError(f"`{name}` is {value!r}, expected a number: {expected}.")


def _check_texts(settings: Any) -> None:
    for name in PATTERNS:
        pattern = getattr(settings, name, None)
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"`{name}` {pattern!r} is no regular expression: {error}.") from error
    colour = getattr(settings, "alpha_background", None)
    if colour is not None:
        try:
            PIL.ImageColor.getrgb(colour)
        except ValueError as error:
            raise ValueError(f"`alpha_background` is {colour!r}, expected a colour, such as 'white'.") from error
    storage = getattr(settings, "bnb_4bit_quant_storage", None)
    if storage is not None and not isinstance(getattr(torch, storage, None), torch.dtype):
        raise ValueError(f"`bnb_4bit_quant_storage` is {storage!r}, expected a dtype of torch, such as 'uint8'.")
    wanted = getattr(settings, "report_to", None) or []
    missing = {*([wanted] if isinstance(wanted, str) else wanted)} - {"all", "none"}
    missing -= set(get_available_reporting_integrations())
    if missing:
        raise ValueError(f"`report_to` {', '.join(sorted(missing))} is not known or not installed.")
