# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Provides LLaVA-STF for transformers. Importing the package registers its classes with the Auto classes."""

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
)

# Before transformers 5.18 the top-level name asks for torchvision, which the PIL processors do not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ._ask_many import PictureCache, ask_many, generate_many
from ._reduce import reduce_image_tokens, suggest_budgets
from .configuration_llava_stf import LlavaSTFConfig
from .modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFModel, LlavaSTFPreTrainedModel
from .processing_llava_stf import LlavaSTFImageProcessor, LlavaSTFProcessor

AutoConfig.register(LlavaSTFConfig.model_type, LlavaSTFConfig, exist_ok=True)
AutoImageProcessor.register(LlavaSTFConfig, image_processor_classes={"pil": LlavaSTFImageProcessor}, exist_ok=True)
AutoProcessor.register(LlavaSTFConfig, LlavaSTFProcessor, exist_ok=True)
AutoModel.register(LlavaSTFConfig, LlavaSTFModel, exist_ok=True)
AutoModelForImageTextToText.register(LlavaSTFConfig, LlavaSTFForConditionalGeneration, exist_ok=True)
AutoModelForPreTraining.register(LlavaSTFConfig, LlavaSTFForConditionalGeneration, exist_ok=True)
if "AutoModelForMultimodalLM" in dir(transformers):
    transformers.AutoModelForMultimodalLM.register(LlavaSTFConfig, LlavaSTFForConditionalGeneration, exist_ok=True)

# With these `save_pretrained` copies the code next to the weights, for `trust_remote_code`.
LlavaSTFConfig.register_for_auto_class()
LlavaSTFImageProcessor.register_for_auto_class("AutoImageProcessor")
LlavaSTFProcessor.register_for_auto_class()
LlavaSTFModel.register_for_auto_class("AutoModel")
LlavaSTFForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "LlavaSTFConfig",
    "LlavaSTFForConditionalGeneration",
    "LlavaSTFImageProcessor",
    "LlavaSTFModel",
    "LlavaSTFPreTrainedModel",
    "LlavaSTFProcessor",
    "PictureCache",
    "ask_many",
    "generate_many",
    "reduce_image_tokens",
    "suggest_budgets",
]
