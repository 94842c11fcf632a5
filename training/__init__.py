# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains LLaVA-STF with TRL."""

from .arguments import LlavaSTFTrainingArguments
from .rows import DataError
from .trainer import LlavaSTFTrainer

__all__ = ["DataError", "LlavaSTFTrainer", "LlavaSTFTrainingArguments"]
