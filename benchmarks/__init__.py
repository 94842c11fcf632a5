# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Measurements of LLaVA-STF beside the stock LLaVA; README.md lists the commands."""
