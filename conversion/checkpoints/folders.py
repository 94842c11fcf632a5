# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder: complete or absent, and what lies in it beside the weights."""

import glob
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor

from ..keys import ConversionError
from .weights import read_json

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = Path(__file__).parent / "chat_templates"
PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_CONFIG_FILE = "adapter_config.json"
TOKEN_BUDGETS = "token_budgets"  # in the `auto_mapping` of an adapter
ADAPTER_FILE = "adapter_model.safetensors"
NON_LORA_FILE = "non_lora_trainables.bin"
# The source's own config.json, for the way back.
ORIGINAL_CONFIG_FILE = "original_config.json"
# How a checkpoint was quantised, and from what.
QUANTISATION_FILE = "quantisation.json"
UNFINISHED = ".partial"  # ends the name of a folder or file that is being written, and of no other
NOTE = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava_stf
---

# LLaVA-STF, converted

A LLaVA-STF checkpoint (arXiv 2506.07138) in the format of transformers, made from {source}.
An image takes {tokens} vision tokens.

This is a note, not yet a model card: `python -m hub_card render` writes one, before you publish.

The code in this folder is under Apache-2.0 (LICENSE). The weights stay under the licences of what they were made from
(NOTICE).
"""


def require_empty(destination: str | Path) -> Path:
    """The absolute path of a folder that may be written.

    Raises:
        ConversionError: if it is there and not empty, if nothing can take its place because it is a mount point, or if
            it has the name of something unfinished or one that is not UTF-8.
    """
    destination = Path(destination).resolve()
    try:
        str(destination).encode()
    except UnicodeEncodeError as error:
        raise ConversionError(f"The name {str(destination)!r} is not UTF-8, as safetensors needs it.") from error
    if destination.is_mount():
        raise ConversionError(f"{destination} is a mount point, which is not replaced: name a new folder in it.")
    if destination.name.endswith(UNFINISHED):
        raise ConversionError(f"{destination} has the name of an unfinished folder (*{UNFINISHED}). Choose another.")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConversionError(f"{destination} is not empty, or not a folder. Choose another; nothing was written.")
    return destination


@contextmanager
def complete_or_absent(destination: Path, file: bool = False) -> Iterator[Path]:
    """A sibling to write to, renamed to the destination at the end: an empty folder, or the free name of a file.

    Its name says for which destination, on which host and in which process it is written: what a killed run of this
    host left for this destination is removed.

    Args:
        destination: a folder that is empty or absent, or a file, which is written over.
        file: whether the destination is a file.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}@{socket.gethostname()}@"
    for left in destination.parent.glob(f"{glob.escape(prefix)}*{UNFINISHED}"):
        process = left.name.removeprefix(prefix).removesuffix(UNFINISHED)
        if process == str(os.getpid()) or (process.isdecimal() and not _runs(int(process))):
            _remove(left)
    unfinished = destination.with_name(f"{prefix}{os.getpid()}{UNFINISHED}")
    if not file:
        unfinished.mkdir()
    try:
        yield unfinished
        os.replace(unfinished, destination)
    except BaseException:
        _remove(unfinished)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_note(folder: Path, kind: str, tokens: int) -> None:
    """Writes a note in place of a card: what the weights were made from, and how many tokens an image takes."""
    new = "other models, with new fusion modules: they are not trained yet"
    source = new if kind == "initialisation" else f"a {kind} of the original trainer"
    (folder / "README.md").write_text(NOTE.format(source=source, tokens=tokens), encoding="utf-8")


def save_checkpoint(folder: Path, model: LlavaSTFForConditionalGeneration, processor: str | Path) -> None:
    """Writes a model, the processor of another checkpoint, and the licence of the code."""
    model.save_pretrained(folder)
    LlavaSTFProcessor.from_pretrained(processor).save_pretrained(folder)
    copy_licences(folder)


def copy_licences(folder: Path) -> None:
    """Lays the licence of the code beside the code that a checkpoint carries."""
    for name in ("LICENSE", "NOTICE"):
        shutil.copyfile(ROOT / name, folder / name)


def name_auto_class(folder: Path, token_budgets: list[int] | None = None) -> None:
    """Lets `AutoPeftModel` load a PEFT adapter's base with transformers' Auto class.

    `token_budgets` are those that the adapter was trained for. PEFT keeps unknown keys in `auto_mapping` only.

    PEFT 0.21 names the module of the base's class, which with `trust_remote_code` exists in one cache only, and
    imports nothing outside transformers. A task type would make `AutoPeftModel` refuse the adapter.
    """
    path = folder / ADAPTER_CONFIG_FILE
    auto_class = {"base_model_class": "AutoModelForImageTextToText", "parent_library": "transformers"}
    settings = read_json(path)
    mapping: dict[str, Any] = {**(settings.get("auto_mapping") or {}), **auto_class}
    if token_budgets is not None:
        mapping[TOKEN_BUDGETS] = token_budgets
    settings |= {"task_type": None, "auto_mapping": mapping}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
