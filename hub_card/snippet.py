# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The snippet of a card: where it is, what it names, and whether this package wrote it."""

import re

from modeling_llava_stf import LlavaSTFProcessor

from .card import CARD_FILE, Card, Facts, base_of
from .files import Frozen


def snippet_of(readme: str) -> tuple[str, str]:
    """The first Python block of a card, and the text block right behind it: what it prints, or nothing."""
    found = re.search(r"```python\n(.*?)```(?:\n\n[^\n]+\n\n```text\n(.*?)\n?```)?", readme, re.DOTALL)
    if found is None:
        raise ValueError(f"The card has no snippet: {CARD_FILE} has no Python block.")
    return found[1], found[2] or ""


def named_in(snippet: str) -> tuple[str, str]:
    """The repository and the revision that a card's snippet asks for."""
    found = re.search(r'^repository, revision = "([^"]+)", "([^"]+)"$', snippet, re.MULTILINE)
    if found is None:
        raise ValueError('The snippet of the card has no line `repository, revision = "USER/NAME", "TAG"`.')
    return found[1], found[2]


def is_our_snippet(frozen: Frozen, card: str) -> bool:
    """Whether the snippet is that of a card about the same repository; nothing else of a card shows in it."""
    snippet = snippet_of(card)[0]
    repository, tag = named_in(snippet)
    base, base_revision = base_of(frozen.folder)
    ours = Card(
        repo_id=repository,
        tag=tag,
        facts=Facts(license=""),
        processor=LlavaSTFProcessor.from_pretrained(frozen.folder),
        tokens_per_image=0,
        parameters=0,
        dtypes="",
        size="",
        training={},
        base=base,
        base_revision=base_revision,
    )
    return snippet == snippet_of(ours.render())[0]
