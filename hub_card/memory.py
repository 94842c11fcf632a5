# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Remembers the options of `render`, so that the next call needs only the new ones, and what the card was made of."""

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from conversion.checkpoints.folders import ORIGINAL_CONFIG_FILE, QUANTISATION_FILE

from .card import ADAPTER_CONFIG_FILE, CARD_FILE, weights_of
from .files import Frozen, sha256_of
from .results import read_object
from .training_table import RECIPE_FILE, TRAINER_STATE_FILE

MEMORY_FILE = ".hub_card.json"  # it is never published
RENDERED = "rendered"  # in that file: the SHA-256 of the card and of the weights
LISTS = ("base_model", "datasets", "language", "results", "speeds")
# These options are about the weights that they were given for.
MEASURED = {"results": "--results", "speeds": "--speed", "recipe": "--recipe"}
# The other files that a card's facts come from, as far as a folder has them.
FACTS = (
    "config.json",
    ADAPTER_CONFIG_FILE,
    "processor_config.json",
    ORIGINAL_CONFIG_FILE,
    QUANTISATION_FILE,
    RECIPE_FILE,
    TRAINER_STATE_FILE,
)
# Converter and trainers write a note in place of a card, with one of these tags; our cards have the first.
GENERATED = re.compile(r"^ *- (llava_stf|generated_from_trainer)$", re.MULTILINE)


def recall(folder: Path, names: Collection[str]) -> dict[str, Any]:
    """Returns the remembered options; raises a `ValueError` if `render` did not write them."""
    known = _read(folder)
    known.pop(RENDERED, None)
    for name, value in known.items():
        texts = value if name in LISTS else [value]
        if name not in names or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{folder / MEMORY_FILE} has {name!r}: {value!r}, which `render` did not write: remove it there."
            )
    return known


def rendered(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of the card and of what it was made of when `render` wrote it; empty if it did not."""
    found = _read(folder).get(RENDERED, {})
    if not isinstance(found, dict):
        raise ValueError(f"{folder / MEMORY_FILE} has {RENDERED!r}: {found!r}, expected names and SHA-256: remove it.")
    return found


def remember(folder: Path, options: dict[str, Any], weights: dict[str, str]) -> None:
    """Writes the options and what the card was made of, beside the card."""
    others = {name: _sha256(folder / name) for name in (CARD_FILE, *FACTS) if (folder / name).is_file()}
    text = json.dumps(options | {RENDERED: others | weights}, indent=2) + "\n"
    (folder / MEMORY_FILE).write_text(text, encoding="utf-8")


def weights_sha256(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file of weights."""
    digests = {}
    for name in sorted({weight.origin for weight in weights_of(folder).values()}):
        with (folder / name).open("rb") as file:
            digests[name] = sha256_of(file, (folder / name).stat().st_size, name)
    return digests


def weights_in(known: dict[str, str]) -> dict[str, str]:
    """Returns the part of [`rendered`] that is about weights."""
    return {name: digest for name, digest in known.items() if name not in (CARD_FILE, *FACTS)}


def changed_facts(frozen: Frozen, known: dict[str, str]) -> list[str]:
    """Returns the other files that are not as they were when the card was rendered; `known` is what it was made of."""
    if not known.keys() & set(FACTS):  # an earlier version remembered the weights only
        return []
    here = [frozen.folder / name if name in frozen.files else frozen.source / name for name in FACTS]
    return [path.name for path in here if known.get(path.name) != (_sha256(path) if path.is_file() else None)]


def refuse_edited(folder: Path) -> None:
    """Raises a `ValueError` if the card has changes that `render` would overwrite."""
    card, known = folder / CARD_FILE, rendered(folder)
    if not card.exists() or _sha256(card) == known.get(CARD_FILE):
        return
    if known or not GENERATED.search(card.read_text(encoding="utf-8", errors="replace")):
        raise ValueError(
            f"{card} has text that `render` did not write, and would overwrite. Move it away, render again, and put "
            "your text into the new card."
        )


def refuse_stale(folder: Path, weights: dict[str, str], repeated: Collection[str]) -> None:
    """Raises a `ValueError` if `repeated` options, which are not given anew, are about weights of an earlier card."""
    before = weights_in(rendered(folder))
    stale = [option for name, option in MEASURED.items() if name in repeated]
    if before and before != weights and stale:
        raise ValueError(
            f"The weights are not those that {', '.join(stale)} was given for. Give it again if it is about the new "
            f"weights, or leave it out of the card: {stale[0]} ''"
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    memory = folder / MEMORY_FILE
    return read_object(memory) if memory.is_file() else {}
