# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Writes model cards from the facts in a folder, checks folders, and publishes them on the Hub.

python -m hub_card --help
"""

from .card import Card, Facts, gather, write_card
from .check import check
from .files import Frozen, freeze
from .publish import HubError, Upload, plan, publish

__all__ = [
    "Card",
    "Facts",
    "Frozen",
    "HubError",
    "Upload",
    "check",
    "freeze",
    "gather",
    "plan",
    "publish",
    "write_card",
]
