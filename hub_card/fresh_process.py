# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Loads a folder and runs its card's snippet in a separate, offline process, as a user of the Hub would."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from packaging import version

from .card import HUB_ID, base_of
from .files import Frozen, own_code
from .snippet import named_in

# Older versions ask the Hub again for the config.json that an adapter's repository does not have.
ADAPTERS_OFFLINE = version.parse("5.23")
PROBE = Path(__file__).with_name("probe.py")
# The probe gets only these variables: no token, and no URL with a password.
PROBE_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
REVISION = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")


def use(frozen: Frozen, snippet: str) -> dict[str, Any]:
    """Loads a folder and runs the card's snippet in a fresh process that is offline and cannot import this package.

    The process has its own cache, which contains the files that would be published under the repository's name. The
    base of an adapter must be on the Hub or in the usual cache.

    Returns:
        `wrong` (missing and unexpected weights), `tokens_per_image`, `printed`, and `on` (device, dtype).

    Raises:
        ValueError: if that process fails (with the last line of its error) or takes longer than the time limit.
    """
    repository, revision = named_in(snippet)
    base, base_revision = base_of(frozen.folder)
    if base and version.parse(transformers.__version__) < ADAPTERS_OFFLINE:
        raise ValueError(
            f"transformers {transformers.__version__} cannot load an adapter offline: use {ADAPTERS_OFFLINE}"
        )
    print("- loading it in a fresh process, and running the card's snippet", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as home:
        _put_in_cache(Path(home), repository, revision, frozen.folder, [Path(name) for name in frozen.files])
        if base:
            base_folder = _fetch(base, base_revision)
            files = [path.relative_to(base_folder) for path in base_folder.rglob("*") if path.is_file()]
            _refuse_foreign(base, base_folder, files, frozen.run_code)
            _put_in_cache(Path(home), base, base_revision, base_folder, files)
        asked = {"repository": repository, "revision": revision, "base": base, "base_revision": base_revision}
        found = _probe(Path(home), json.dumps({"load": asked, "snippet": snippet}), frozen.time_limit)
        return found | {"printed": escaped(found["printed"])}


def escaped(text: str) -> str:
    """Escapes characters that cannot be printed, except line breaks: a card must not contain them."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _refuse_foreign(base: str, folder: Path, files: list[Path], run_code: bool) -> None:
    for path in files:
        if path.suffix not in (".py", ".pyc", ".so", ".pyd") or run_code:
            continue
        if (folder / path).read_bytes() not in own_code(path.name):
            raise ValueError(f"{path} of the base {base} is not this package's code, and was not run: see --run-code")


def _probe(home: Path, request: str, time_limit: float) -> dict[str, Any]:
    """Runs the probe; it ends when its standard input closes, which is at the latest when this process ends."""
    answer, errors = home / "answer", home / "errors"
    with answer.open("wb") as output, errors.open("wb") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-I", str(PROBE)],
            cwd=home,
            env=_environment(home),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=complaints,
            start_new_session=True,
        )
        try:
            _send(process, request)
            process.wait(time_limit)
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"it took longer than {time_limit:.0f} seconds in a fresh process (--time-limit)"
            ) from error
        finally:
            _end(process)
    if process.returncode:
        said = _last_line(errors) or f"exit code {process.returncode}"
        raise ValueError(f"it does not load in a fresh process: {said}")
    try:
        return json.loads(_last_line(answer))
    except ValueError as error:
        raise ValueError("it does not load in a fresh process: that ended without an answer") from error


def _environment(home: Path) -> dict[str, str]:
    """Returns the environment of the probe: offline, with every cache in `home`."""
    places = {
        "HOME": home,
        "TMPDIR": home,
        "HF_HOME": home,
        "HF_HUB_CACHE": home / "hub",
        "HF_MODULES_CACHE": home / "code",
    }
    kept = {name: os.environ[name] for name in PROBE_ENVIRONMENT if name in os.environ}
    return kept | {"HF_HUB_OFFLINE": "1"} | {name: str(place) for name, place in places.items()}


def _send(process: subprocess.Popen, request: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(request.encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:  # the process has ended, and its errors say why
        pass


def _end(process: subprocess.Popen) -> None:
    """Kills a process and all processes that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _last_line(path: Path) -> str:
    """Returns the last line of a process's output, which may be long."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**20))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""


def _put_in_cache(home: Path, repository: str, revision: str, folder: Path, files: list[Path]) -> None:
    """Links files into a cache, in the layout of huggingface_hub after a download.

    Raises:
        ValueError: if names would lead out of the cache.
    """
    if not (HUB_ID.fullmatch(repository) and REVISION.fullmatch(str(revision))):
        raise ValueError(f"{repository!r} with the revision {revision!r} is no place on the Hub")
    commit = "0" * 40
    cache = home / "hub" / f"models--{repository.replace('/', '--')}"
    (cache / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (cache / "refs" / revision).write_text(commit)
    if Path("config.json") not in files:  # for an adapter, the cache also records which files do not exist
        (cache / ".no_exist" / commit).mkdir(parents=True)
        (cache / ".no_exist" / commit / "config.json").touch()
    for path in files:
        link = cache / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((folder / path).resolve())


def _fetch(base: str, revision: str) -> Path:
    try:
        return Path(snapshot_download(base, revision=revision))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the adapter's base {base} (revision {revision}) is not on the Hub: {reason}") from error
