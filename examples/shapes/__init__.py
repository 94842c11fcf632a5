# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""A small LLaVA-STF trained from nothing on pictures whose truth is known.

python -m examples.shapes --help
"""
