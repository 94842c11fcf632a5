# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint folder is: its files, its weights on disk, its chat templates."""
