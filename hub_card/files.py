# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Selects and freezes the files that are published: those on a list, and others that the user names.

`freeze` copies them into a private folder and records the size and the SHA-256 of each. All checks read that copy, and
`publish` uploads it. Weights may be large, so the copy only links to them; what was uploaded is compared with the
SHA-256 before the commit.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from conversion.checkpoints.folders import TEMPLATES as CHAT_TEMPLATES

from .card import ADAPTER_CONFIG_FILE, ROOT
from .kinds import MOST_BYTES, is_pickle
from .secrets import secrets_in
from .training_table import RECIPE_FILE

TEMPLATES = "additional_chat_templates/"
# The files of a model or an adapter on the Hub, and the kind of each.
ALLOWED = (
    (r"README\.md|(LICENSE|NOTICE)(\.md|\.txt)?|merges\.txt", "text"),
    (
        r"(config|generation_config|original_config|quantisation|adapter_config|((video_)?pre)?processor_config|tokenizer|"
        r"tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|model\.safetensors\.index)\.json",
        "JSON",
    ),
    (r"tokenizer\.model", "sentencepiece"),
    (r"(model(-\d{5}-of-\d{5})?|adapter_model)\.safetensors", "safetensors"),
    (r"(method|example)\.png", "PNG"),
    (r"(configuration|modeling|processing)_llava_stf\.py", "code"),
    (rf"chat_template\.jinja|{TEMPLATES}[\w.-]+\.jinja", "code"),
)
# Other files that can be checked, by suffix; `--also` must name them.
KINDS = {
    **dict.fromkeys((".md", ".txt", ".yaml", ".yml", ".csv", ".tsv", ".jsonl", ".bib", ".cff"), "text"),
    **{".json": "JSON", ".model": "sentencepiece", ".safetensors": "safetensors", ".png": "PNG"},
}
# requirements.txt counts as code, because pip runs what it names.
CODE = re.compile(
    r".*\.(py|pyi|pyc|pyd|so|dll|dylib|jinja2?|sh|js|ipynb|c|cc|cpp|cu|cuh|h)|.*requirements[^/]*\.txt", re.IGNORECASE
)
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".keras"}
# Files of trainers, loggers and editors are not uploaded. A folder's name ends in a slash.
LEFT_OUT = (
    (r"\..*|__pycache__/", "hidden"),
    (r"(runs|logs|wandb|mlruns|lightning_logs|completions)/", "logs of a run"),
    (
        r"events\.out\.tfevents.*|.*\.log|log_[\w-]+\.json|((all|train|eval)_results|evaluation|lmms_eval)\.json",
        "logs of a run",
    ),
    (r".*(~|\.(bak|orig|rej|swp|swo|tmp|old))|#.*#", "left by an editor"),
    (
        r"(trainer_state|training_run)\.json|training_args\.(bin|json)|curves\.png|"
        r"(optimizer|scheduler|scaler|rng_state\w*)\.(pt|pth|bin)|zero_to_(fp32|torch)\.py|latest|"
        rf"{re.escape(RECIPE_FILE)}|(checkpoint-\d+|global_step\d+|(pytorch_model_fsdp|optimizer)_\d+)/",
        "state of a training run",
    ),
)
BLOCK = 2**20
BEGINNING = 2**16  # bytes that are read of a file that is not on the list
MOST_REFUSED = 100
MOST_HEADER = 100 * BLOCK  # the limit of safetensors itself


@dataclass(frozen=True)
class File:
    """Describes a file that would be published."""

    size: int
    sha256: str
    kind: str


@dataclass(frozen=True)
class Frozen:
    """Holds the copy of a folder that is checked and uploaded, and the faults found in selecting its files."""

    source: Path
    folder: Path
    files: dict[str, File] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # names of files that are not uploaded, with the reason
    refused: list[str] = field(default_factory=list)  # faults, one line each
    foreign: list[str] = field(default_factory=list)  # Python files that are not this package's
    allow_code: Collection[str] = ()
    run_code: bool = False
    time_limit: float = 1800
    keep: tempfile.TemporaryDirectory | None = None  # deletes the copy together with this object

    def read(self, name: str) -> bytes:
        """Returns the content of a file; of weights only the header, which is JSON."""
        with (self.folder / name).open("rb") as file:
            if self.files[name].kind == "safetensors":
                return file.read(min(int.from_bytes(file.read(8), "little"), MOST_HEADER))
            return file.read()


def freeze(
    folder: Path,
    also: Collection[str] = (),
    allow_code: Collection[str] = (),
    run_code: bool = False,
    time_limit: float = 1800,
) -> Frozen:
    """Copies what would be published into a private folder. It runs no code and follows no link.

    Args:
        folder: a checkpoint or an adapter.
        also: files to publish that are not on the list, relative to the folder.
        allow_code: files of code to publish that is not this package's.
        run_code: whether `check` may run code that is not this package's, in a separate process.
        time_limit: time limit of that process, in seconds.

    Raises:
        ValueError: if there is no such folder, or the extra `publish` is not installed.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    keep = tempfile.TemporaryDirectory(prefix="hub_card-")
    frozen = Frozen(folder, Path(keep.name), allow_code=allow_code, run_code=run_code, time_limit=time_limit, keep=keep)
    wanted = {*also, *allow_code}
    for found in _look(folder, wanted):
        if len(frozen.refused) == MOST_REFUSED:
            frozen.refused.append(f"unknown: there is more in {folder} that is not on the list")
            return frozen
        wanted.discard(found.name)
        hidden = secrets_in(found.name)
        if found.left_out:
            frozen.left_out[f"{found.name[:4]}..." if hidden else found.name] = found.left_out
        elif hidden:
            frozen.refused.append(f"secret: the name of a file holds {hidden[0]} ({found.name[:4]}...)")
        elif problem := found.refused or _take(frozen, found.name, also):
            frozen.refused.append(problem)
    frozen.refused.extend(f"unknown: {shown(name)} is not there, but was asked for" for name in sorted(wanted))
    return frozen


def is_read(name: str) -> bool:
    """Returns whether a file is on the list and read when a model is loaded: all but texts and pictures."""
    kind = _kind_on_list(name)
    return kind not in ("", "text", "PNG") or name == "merges.txt"


def _kind_on_list(name: str) -> str:
    return next((kind for pattern, kind in ALLOWED if re.fullmatch(pattern, name)), "")


def shown(name: str) -> str:
    """Returns a name that can be printed on one line."""
    return name if name.isprintable() else ascii(name)


@dataclass(frozen=True)
class Found:
    """Describes an entry of a folder; it is a regular file if it is neither left out nor refused."""

    name: str
    left_out: str = ""
    refused: str = ""


def _look(folder: Path, wanted: Collection[str], inside: str = "") -> Iterator[Found]:
    """Yields all entries of a folder; a folder that is left out or refused is one entry."""
    with os.scandir(folder / inside) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            is_folder = entry.is_dir(follow_symlinks=False)
            name = f"{inside}{entry.name}{'/' if is_folder else ''}"
            asked = any(other.startswith(name) if is_folder else other == name for other in wanted)
            left_out = "" if asked else _why_left_out(folder / name, is_folder)
            if left_out:
                yield Found(name, left_out=left_out)
            elif entry.is_symlink():
                advice = "put the file itself there (cp -L), or remove it"
                yield Found(name, refused=f"link: {shown(name)} is a symbolic link, which is not followed; {advice}")
            elif is_folder and (asked or name == TEMPLATES):
                yield from _look(folder, wanted, name)
            elif is_folder:
                yield Found(name, refused=_unknown(name))
            elif not entry.is_file(follow_symlinks=False):
                yield Found(name, refused=f"special: {shown(name)} is no regular file (a pipe, socket or device)")
            else:
                yield Found(name)


def _why_left_out(path: Path, is_folder: bool) -> str:
    name = path.name + ("/" if is_folder else "")
    why = next((reason for pattern, reason in LEFT_OUT if re.fullmatch(pattern, name, re.DOTALL)), "")
    if is_folder and why != "hidden" and any((path / own).exists() for own in ("config.json", ADAPTER_CONFIG_FILE)):
        return "a checkpoint of its own"
    return why


def _unknown(name: str) -> str:
    yes = "name its files with --also or --allow-code" if name.endswith("/") else f"say --also {shown(name)}"
    advice = f"move it away, or {yes}"
    return f"unknown: {shown(name)} is not on the list of what a model's folder has; {advice}"


def _take(frozen: Frozen, name: str, also: Collection[str]) -> str:
    """Adds a regular file to the copy, or returns the reason why not."""
    kind = _kind_on_list(name)
    if not kind and name in frozen.allow_code:
        kind = "code"
    if not kind and name in also and not CODE.fullmatch(name):
        kind = KINDS.get(Path(name).suffix, "")
    try:
        with _open(frozen.source, name) as file:
            if not kind:
                return _refuse(name, file.read(BEGINNING), name in also)
            if kind == "safetensors":
                return _link(frozen, name, file)
            return _copy(frozen, name, kind, file)
    except OSError as error:
        return f"unreadable: {shown(name)}: {error.strerror}"


def _open(folder: Path, name: str) -> BinaryIO:
    """Opens a file in a folder; follows no links and does not wait for a pipe."""
    *folders, last = name.split("/")
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for inside in folders:
            there = os.open(inside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = there
        return os.fdopen(os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here), "rb")
    finally:
        os.close(here)


def _refuse(name: str, start: bytes, asked: bool) -> str:
    """Returns the fault of a file that is not on the list."""
    if is_pickle(start) or Path(name).suffix.lower() in PICKLE_SUFFIXES:
        return f"pickle: {shown(name)} may run code when it is loaded; convert it to safetensors, or remove it"
    secrets = secrets_in(start)
    if secrets:
        return f"secret: {shown(name)} holds {secrets[0]}"
    if CODE.fullmatch(name):
        return (
            f"code: {shown(name)} is not this package's; move it away, or look at it and say --allow-code {shown(name)}"
        )
    if asked:
        return f"unknown: {shown(name)} is of no kind that can be checked: {', '.join(KINDS)}"
    return _unknown(name)


def _copy(frozen: Frozen, name: str, kind: str, file: BinaryIO) -> str:
    content = file.read(MOST_BYTES[kind] + 1)
    if len(content) > MOST_BYTES[kind]:
        return f"too large: {shown(name)} has more than {MOST_BYTES[kind]} bytes, the most for {kind}"
    copy = frozen.folder / name
    copy.parent.mkdir(exist_ok=True, parents=True)
    copy.write_bytes(content)
    frozen.files[name] = File(len(content), hashlib.sha256(content).hexdigest(), kind)
    if kind != "code" or content in own_code(name):
        return ""
    if not name.endswith(".jinja"):  # templates run in a sandbox
        frozen.foreign.append(name)
    if name in frozen.allow_code:
        return ""
    if name.startswith(TEMPLATES):
        return (
            f"code: {shown(name)} is a second chat template, with which vLLM does not start; remove it (training has a "
            f"`plain` of its own), or say --allow-code {shown(name)}"
        )
    return f"code: {shown(name)} differs from this package's; look at it, and say --allow-code {shown(name)}"


@cache
def own_code(name: str) -> list[bytes]:
    """Returns this package's content for a file of code: the file of that name, or the chat template."""
    package = [ROOT / "modeling_llava_stf" / name] if re.fullmatch(r"\w+_llava_stf\.py", name) else []
    is_template = name.endswith(".jinja") and not name.startswith(TEMPLATES)
    templates = CHAT_TEMPLATES.glob("*.jinja") if is_template else []
    return [path.read_bytes() for path in (*package, *templates) if path.is_file()]


def _link(frozen: Frozen, name: str, file: BinaryIO) -> str:
    copy = frozen.folder / name
    copy.parent.mkdir(exist_ok=True, parents=True)
    copy.symlink_to(frozen.source.resolve() / name)
    size = os.fstat(file.fileno()).st_size
    frozen.files[name] = File(size, sha256_of(file, size, name) if _is_whole(copy) else "", "safetensors")
    return ""


def _is_whole(path: Path) -> bool:
    """Returns whether safetensors can read a file; `check_weights` reports why not."""
    try:
        safe_open(path, framework="pt")
    except (SafetensorError, OSError):
        return False
    return True


def sha256_of(file: BinaryIO, size: int, name: str) -> str:
    """Returns the SHA-256 of a large file in hexadecimal digits, with a progress bar."""
    digest = hashlib.sha256()
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"reading {name}", leave=False, delay=1) as progress:
        while block := file.read(BLOCK):
            digest.update(block)
            progress.update(len(block))
    return digest.hexdigest()
