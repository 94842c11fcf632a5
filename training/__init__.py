# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Training of LLaVA-STF with TRL."""

from .data import DataError
from .trainer import LlavaSTFTrainer, LlavaSTFTrainingArguments

__all__ = ["DataError", "LlavaSTFTrainer", "LlavaSTFTrainingArguments"]
