# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Finds the snippet of a card, reads what it names, and compares it with the one of this package."""

import re

from modeling_llava_stf import LlavaSTFProcessor

from .card import CARD_FILE, Card, Facts, base_of
from .files import Frozen


def snippet_of(readme: str) -> tuple[str, str]:
    """Returns the first Python block of a card, and the text block after it (its output), which may be empty."""
    found = re.search(r"```python\n(.*?)```(?:\n\n[^\n]+\n\n```text\n(.*?)\n?```)?", readme, re.DOTALL)
    if found is None:
        raise ValueError(f"The card has no snippet: {CARD_FILE} has no Python block.")
    return found[1], found[2] or ""


def named_in(snippet: str) -> tuple[str, str]:
    """Returns the repository and the revision that a card's snippet loads."""
    found = re.search(r'^repository, revision = "([^"]+)", "([^"]+)"$', snippet, re.MULTILINE)
    if found is None:
        raise ValueError('The snippet of the card has no line `repository, revision = "USER/NAME", "TAG"`.')
    return found[1], found[2]


def is_our_snippet(frozen: Frozen, card: str) -> bool:
    """Returns whether the snippet is what this package writes for the same repository, base and processor."""
    snippet = snippet_of(card)[0]
    repository, tag = named_in(snippet)
    base, base_revision = base_of(frozen.folder)
    ours = Card(
        repo_id=repository,
        tag=tag,
        facts=Facts(license=""),
        processor=LlavaSTFProcessor.from_pretrained(frozen.folder),
        tokens_per_image=0,
        token_budgets=[0],
        parameters=0,
        dtypes="",
        size="",
        training={},
        base=base,
        base_revision=base_revision,
    )
    return snippet == snippet_of(ours.render())[0]
