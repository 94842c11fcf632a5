# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Workarounds."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from modeling_llava_stf.modeling_llava_stf import NO_ANSWER_LOGIT

from .rows import DataError
from .sampler import ModalityLengthSampler


class NoEndlessEpochs(TrainerCallback):
    """Stops where an epoch has too few rows for a step, which a stream would repeat for ever."""

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise DataError("The data has no row, or too few for one step: nothing was trained in a whole epoch.")


class SamplerEpoch(TrainerCallback):
    """Tells the sampler its epoch. Where a resumed run skips batches on several ranks, accelerate does not."""

    def __init__(self, sampler: ModalityLengthSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """Within it, a model that FSDP2 gave another class has its own: its code is saved, not that of torch."""
    sharded = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = sharded.__bases__[1]
    try:
        yield
    finally:
        model.__class__ = sharded


@contextmanager
def image_token_masked(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within it, TRL's fused head sees a bias that takes `<image>` out of the softmax.

    TRL multiplies by the head's weight itself, so that the model's own loss, which leaves `<image>` out, is not used.
    The original has no such token.
    """
    network = without_adapter(model)
    head_of = type(network).get_output_embeddings

    def masked_head() -> SimpleNamespace:
        weight = head_of(network).weight
        if isinstance(weight, DTensor):  # FSDP2: averaged over the ranks on the way back (by TRL itself it is not)
            weight = weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
        bias = weight.new_zeros(network.config.get_text_config().vocab_size)
        bias[network.config.image_token_id] = NO_ANSWER_LOGIT
        if is_deepspeed_zero3_enabled():
            from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

            bias.ds_status = ZeroParamStatus.AVAILABLE  # TRL gathers weights and biases that are not
        return SimpleNamespace(weight=weight, bias=bias)

    network.get_output_embeddings = masked_head
    try:
        yield
    finally:
        del network.get_output_embeddings


def without_adapter(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
