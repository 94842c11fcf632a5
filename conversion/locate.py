# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Looks for everything that a conversion reads: on this machine or on the Hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from .checkpoints.folders import ADAPTER_CONFIG_FILE
from .checkpoints.weights import is_whole, read_json
from .keys import ConversionError
from .options import Options

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Places:
    """The folders of a run: its own, that of its base, and where its tower and its tokenizer are to be found."""

    run: Path
    base: Path | None
    options: Options

    def tower(self, config: dict[str, Any], weights: bool) -> Path:
        """The folder that describes the tower.

        Args:
            config: the run's settings, which may name the tower.
            weights: whether the tower's weights are needed, too.
        """
        given, revision = self.options.vision_tower, self.options.vision_tower_revision
        if given is not None:
            return fetch(given, revision, weights=weights)
        if "vision_config" in read_json(self.run / "config.json"):  # llava-hf describes its tower itself
            return fetch(self.run, revision)
        named = config.get("mm_vision_tower")
        if not isinstance(named, str):
            raise ConversionError(f"{self.run} names no vision tower: give its folder or Hub id with --vision-tower.")
        for folder in (Path(named), self.run / named, self.run.parent / named):
            if (folder / "config.json").exists():
                return fetch(folder, revision)
        try:
            return fetch(named, revision, weights=weights)
        except ConversionError as error:
            raise ConversionError(f"The vision tower of the config: {error} Give it with --vision-tower.") from error

    def tokenizer(self) -> Path:
        """The folder of the tokenizer: the one that is asked for, else the run's, else the base's."""
        folders = [folder for folder in (self.run, self.base) if folder is not None]
        if self.options.tokenizer is not None:
            folders = [fetch(self.options.tokenizer, self.options.tokenizer_revision)]
        for folder in folders:
            if (folder / "tokenizer_config.json").exists():
                return folder
        raise ConversionError(f"No tokenizer_config.json in {' or '.join(str(folder) for folder in folders)}.")


def locate(source: str | Path, options: Options) -> Places:
    """Finds the run and its base.

    Raises:
        ConversionError: if one of them is not there, if `source` holds several runs, or if a revision is asked for of
            something that is not.
    """
    run = find_run(fetch(source, options.revision, options.subfolder))
    for name in ("base", "tokenizer"):
        revision = getattr(options, f"{name}_revision")
        if getattr(options, name) is None and revision is not None:
            raise ConversionError(f"--{name}-revision {revision} is given without --{name}.")
    if options.base is None:
        return Places(run, None, options)
    revision = options.base_revision or _recorded_revision(run, options.base)
    return Places(run, fetch(options.base, revision), options)


def fetch(
    name: str | Path,
    revision: str | None = None,
    subfolder: str | None = None,
    weights: bool = True,
    also: tuple[str, ...] = (),
) -> Path:
    """A local folder as it is, or the files of a Hub repository, downloaded.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit of a Hub id.
        subfolder: folder in it.
        weights: whether the weights are needed.
        also: patterns of other files that are needed.
    """
    folder = Path(name)
    if folder.is_dir() and revision is not None:
        raise ConversionError(f"{folder} is a folder here, which has no revision {revision!r}: leave it out.")
    if not folder.is_dir():
        if not HUB_ID.fullmatch(str(name)):
            raise ConversionError(f"{str(name)!r} is neither a folder here nor the id of a Hub repository.")
        patterns = ["*.json", "*.model", *(["*.bin", "*.safetensors"] if weights else []), *also]
        if subfolder:
            patterns = [f"{subfolder}/{pattern}" for pattern in patterns]
        try:
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConversionError(f"{str(name)!r} is no folder here, and the Hub says: {reason}") from error
    folder = folder / subfolder if subfolder else folder
    if not folder.is_dir():
        raise ConversionError(f"{folder} is not a folder.")
    return folder


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the cache of the Hub's client (`snapshots/COMMIT`); None for any other folder."""
    match = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", folder.as_posix())
    return match[1] if match else None


def find_run(folder: Path) -> Path:
    """The folder itself, or the one run in the folders below it (the nested layout of the authors' repository).

    Of several runs the only complete model is taken; a projector or an adapter beside it is left.
    """
    if _has_run(folder):
        return folder
    runs = [path.parent for path in sorted(folder.rglob("config.json")) if _has_run(path.parent)]
    whole = [run for run in runs if is_whole(run) and not (run / ADAPTER_CONFIG_FILE).exists()]
    chosen = whole if len(whole) == 1 else runs
    if len(chosen) == 1:
        return chosen[0]
    if not runs:
        raise ConversionError(f"{folder} holds no run: no config.json with weights beside it, nor in a folder below.")
    names = ", ".join(str(run.relative_to(folder)) for run in runs)
    raise ConversionError(f"{folder} holds several runs ({names}): name one of them (--subfolder for a Hub id).")


def _has_run(folder: Path) -> bool:
    weights = ("*.safetensors", "*.bin", "*.index.json")
    config = folder / "config.json"
    if not config.exists() or str(read_json(config).get("model_type")).startswith("clip"):
        return False
    return any(next(folder.glob(pattern), None) for pattern in weights)


def _recorded_revision(folder: Path, base: str | Path) -> str | None:
    """The revision of the base that an adapter's config records, if it is the same base on the Hub."""
    file = folder / ADAPTER_CONFIG_FILE
    if Path(base).is_dir() or not file.exists():
        return None
    settings = read_json(file)
    return settings.get("revision") if settings.get("base_model_name_or_path") == str(base) else None
