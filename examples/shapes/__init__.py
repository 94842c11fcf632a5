# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a small LLaVA-STF from scratch on generated pictures with known answers.

python -m examples.shapes --help
"""
