# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What has to hold of a folder before it is published; each check gives a line for each thing that is wrong."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import transformers
import yaml
from huggingface_hub import ModelCard, get_token, snapshot_download
from packaging import version
from tqdm import tqdm

from conversion import ConversionError
from conversion.weights import check_finite
from modeling_llava_stf.configuration_llava_stf import AUTO_MAP

from .card import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CARD_FILE,
    EXAMPLE_PICTURE,
    HUB_ID,
    LICENCES,
    METHOD_PICTURE,
    RECIPE_FILE,
    is_adapter,
    named_in,
    snippet_of,
    weights_of,
)
from .results import TASK, read_object

# Older ones ask the Hub again for the config.json that an adapter's repository does not have.
ADAPTERS_OFFLINE = version.parse("5.23")
PROBE = Path(__file__).with_name("probe.py")
# What a trainer leaves in its folder to go on with: of no use to others, and partly pickles. It stays at home.
RUN_STATE = re.compile(
    r"trainer_state\.json|training_args\.(bin|json)|(optimizer|scheduler|scaler|rng_state\w*)\.(pt|pth|bin)|"
    + re.escape(RECIPE_FILE)
)
PROCESSOR_FILES = (
    "processing_llava_stf.py",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
MODEL_FILES = ("config.json", "generation_config.json", METHOD_PICTURE) + tuple(
    sorted({f"{reference.split('.')[0]}.py" for reference in AUTO_MAP.values()})
)
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
ZIP, PICKLE = b"PK\x03\x04", re.compile(rb"\x80[\x02-\x05]")
# Vocabularies have words that look like paths.
VOCABULARY = "tokenizer.json"
BINARY = "\ufffd"  # what a file that is no text has, decoded
REST = r"[^\s\"'`)>\]\x00-\x1f\ufffd]*"
PATH = re.compile(
    r"(?<![\w./:-])(?:file://|/(?:home|Users|root|mnt|media|data|tmp|var|opt|srv|workspace|scratch|content))/" + REST
)
# So short that they stand by chance in what is no text.
SHORT_PATH = re.compile(r"(?<![\w./:-])(?:~/|[A-Za-z]:\\\\?\w)" + REST)
SECRETS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{40,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}|\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a password in a URL": r"\b[a-z][a-z0-9+.-]*://[^\s/:@]+:[^\s/:@]+@",
}


def check(folder: Path) -> list[str]:
    """All that is wrong with a folder; nothing, if it may be published.

    Raises:
        ValueError: if it holds neither a model nor an adapter.
    """
    is_adapter(folder)
    problems = list(check_json(folder)) or [problem for find in CHECKS for problem in find(folder)]
    # Loading runs code of the folder, and would only repeat what is known to be missing.
    return problems or list(check_use(folder))


def published_files(folder: Path) -> list[Path]:
    """The files that make up the repository, relative to the folder, sorted."""
    return sorted(path for path, reason in _sorted_out(folder) if not reason)


def files_left_out(folder: Path) -> dict[str, str]:
    """The other files, or the sub-folders of them, and why they are not published."""
    return {
        path.parts[0] + ("/" if len(path.parts) > 1 else ""): reason for path, reason in _sorted_out(folder) if reason
    }


def _sorted_out(folder: Path) -> Iterator[tuple[Path, str]]:
    own = {"config.json", ADAPTER_CONFIG_FILE}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file():
            continue
        if any(part.startswith(".") or part == "__pycache__" for part in inside.parts):
            yield inside, "hidden"
        elif len(inside.parts) > 1 and own & {file.name for file in (folder / inside.parts[0]).iterdir()}:
            yield inside, "a checkpoint of its own"
        elif inside.parts[0] == "runs":
            yield inside, "logs of a run"
        elif RUN_STATE.fullmatch(path.name):
            yield inside, "state of a training run"
        else:
            yield inside, ""


# The checks. Each takes the folder and gives what is wrong.


def check_complete(folder: Path) -> Iterator[str]:
    """Code, configuration, processor, templates, weights, card and pictures are there."""
    wanted = [CARD_FILE, EXAMPLE_PICTURE, *PROCESSOR_FILES, *(() if is_adapter(folder) else MODEL_FILES)]
    for name in wanted:
        if not (folder / name).is_file():
            made = (
                f" (python -m hub_card render {folder})" if name in (CARD_FILE, EXAMPLE_PICTURE, METHOD_PICTURE) else ""
            )
            yield f"incomplete: {name} is missing{made}"
    if not any(folder.glob("*.safetensors")):
        expected = ADAPTER_WEIGHTS_FILE if is_adapter(folder) else "model.safetensors, whole or in shards"
        yield f"incomplete: there are no weights; expected {expected}"


def check_weights(folder: Path) -> Iterator[str]:
    """The safetensors can be read, shards are those of their index, and every value is finite."""
    if not any(folder.glob("*.safetensors")):
        return
    try:
        weights = weights_of(folder)
        for path in published_files(folder):
            if path.suffix == ".safetensors" and str(path) not in {weight.origin for weight in weights.values()}:
                yield f"weights: {path} does not belong to the checkpoint; transformers might load it instead"
        total = sum(weight.nbytes for weight in weights.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="checking weights", leave=False) as progress:
            for name, weight in weights.items():
                tensor = weight.load()
                # No minimum of eight-bit floats; integers are finite.
                check_finite(name, tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor)
                progress.update(weight.nbytes)
    except ConversionError as error:
        yield f"weights: {error}"


def check_metadata(folder: Path) -> Iterator[str]:
    """The YAML head is read by huggingface_hub and names licence, pipeline and library."""
    card = _card(folder)
    if card is None:
        return
    head = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if head is None:
        yield f"metadata: {CARD_FILE} does not begin with a YAML block between two lines of `---`"
        return
    try:
        fields = yaml.safe_load(head[1])
        metadata = ModelCard(card).data
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        yield f"metadata: the YAML of {CARD_FILE} is not valid: {' '.join(str(error).split())}"
        return
    if "licence" in fields:
        yield f"metadata: {CARD_FILE} says `licence`; the Hub reads `license`"
    expected = {"pipeline_tag": TASK, "library_name": "peft" if is_adapter(folder) else "transformers"}
    for name, value in expected.items():
        if getattr(metadata, name) != value:
            yield f"metadata: `{name}` is {getattr(metadata, name)!r}, expected {value!r}"


def check_licence(folder: Path) -> Iterator[str]:
    """LICENSE and NOTICE are there, and the card names the licence of the weights."""
    for name in LICENCES:
        if not (folder / name).is_file() or not (folder / name).stat().st_size:
            yield f"licence: {name} is missing or empty"
    fields = _metadata(folder)
    if fields is not None and not (isinstance(fields.get("license"), str) and fields["license"].strip()):
        yield f"licence: `license` in {CARD_FILE} is {fields.get('license')!r}, expected one of the Hub's identifiers"


def check_snippet(folder: Path) -> Iterator[str]:
    """The card has a snippet, and it names a repository and a revision."""
    card = _card(folder)
    try:
        if card is not None:
            named_in(snippet_of(card)[0])
    except ValueError as error:
        yield f"snippet: {error}"


def check_pickles(folder: Path) -> Iterator[str]:
    """No file can run code when it is loaded."""
    for path in published_files(folder):
        with (folder / path).open("rb") as file:
            start = file.read(4)
        if path.suffix in PICKLE_SUFFIXES or start == ZIP or PICKLE.match(start):
            yield f"pickle: {path} may run code when it is loaded; convert it to safetensors, or remove it"


def check_paths(folder: Path) -> Iterator[str]:
    """No file names a place on the machine where it was made."""
    for path, text in _texts(folder):
        if path.name == VOCABULARY:
            continue
        advice = " (render again with --base USER/NAME)" if path.name == ADAPTER_CONFIG_FILE else ""
        values = _strings(json.loads(text)) if path.suffix == ".json" else [text]
        for found in sorted({found for value in values for found in _paths_in(value)}):
            yield f"path: {path} names {found!r}, a place on this machine{advice}"
    if is_adapter(folder):
        base = read_object(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path") or ""
        if not HUB_ID.fullmatch(base) and not list(_paths_in(base)):
            yield f"path: the adapter's base is {base!r}, expected a Hub id (render again with --base USER/NAME)"


def _paths_in(text: str) -> Iterator[str]:
    if "\n" not in text and PurePosixPath(text).is_absolute() and len(PurePosixPath(text).parts) > 2:
        yield text
    else:
        patterns = (PATH,) if BINARY in text else (PATH, SHORT_PATH)
        yield from (found[0] for pattern in patterns for found in pattern.finditer(text))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def check_json(folder: Path) -> Iterator[str]:
    """Every JSON file is JSON."""
    for path in published_files(folder):
        if path.suffix == ".json":
            try:
                json.loads((folder / path).read_bytes())
            except ValueError as error:
                yield f"damaged: {path} is not JSON: {error}"


def check_secrets(folder: Path) -> Iterator[str]:
    """No file has a token, a key or a password in it; the message does not repeat it."""
    token = get_token()
    for path, text in _texts(folder):
        found = [kind for kind, pattern in SECRETS.items() if re.search(pattern, text)]
        if token and token in text:
            found.append("the token that you are logged in with")
        yield from (f"secret: {path} holds {kind}" for kind in found)


def _texts(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each file as text, with replacement characters where it is none; of weights their header only."""
    for path in published_files(folder):
        if path.suffix in PICKLE_SUFFIXES:  # perhaps large, and refused anyway
            continue
        with (folder / path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if path.suffix == ".safetensors":  # 8 bytes with the length of the header, the header, the weights
                size = min(size, int.from_bytes(file.read(8), "little"))
            content = file.read(size)
        yield path, content.decode("utf-8", "replace")


def _card(folder: Path) -> str | None:
    path = folder / CARD_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _metadata(folder: Path) -> dict[str, Any] | None:
    head = re.match(r"---\n(.*?)\n---\n", _card(folder) or "", re.DOTALL)
    try:
        fields = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return None
    return fields if isinstance(fields, dict) else None


CHECKS: tuple[Callable[[Path], Iterator[str]], ...] = (
    check_complete,
    check_metadata,
    check_licence,
    check_snippet,
    check_pickles,
    check_paths,
    check_secrets,
    check_weights,
)


def check_use(folder: Path) -> Iterator[str]:
    """In a process of its own and offline: the folder loads, the snippet runs, and both do what the card says."""
    card = _card(folder) or ""
    try:
        found = use(folder, snippet_of(card)[0])
    except ValueError as error:
        yield f"use: {error}"
        return
    yield from compare_use(card, found)


def compare_use(card: str, found: dict[str, Any]) -> Iterator[str]:
    """What the card says, against what [`use`] found."""
    yield from (f"use: {problem}" for problem in found["wrong"])
    tokens = re.search(r"\*\*(\d+) vision tokens\*\*", card)
    if tokens is None or int(tokens[1]) != found["tokens_per_image"]:
        said = f"says {tokens[1]}" if tokens else "does not say how many"
        yield f"tokens: an image takes {found['tokens_per_image']} vision tokens, the card {said}"
    printed = snippet_of(card)[1]
    if printed and printed != found["printed"]:
        yield f"snippet: it prints {found['printed']!r}, the card shows {printed!r} (render again with --run)"


def use(folder: Path, snippet: str) -> dict[str, Any]:
    """Loads a folder and runs the card's snippet in a fresh process: offline, with nothing of this package.

    The process finds the files that would be published under the repository's name, in a cache of its own. The base
    of an adapter has to be on the Hub, or in the usual cache.

    Returns:
        `wrong` (weights that are missing or have no place), `tokens_per_image`, `printed`, and `on` (device, dtype).

    Raises:
        ValueError: with the last line of its error, if that process fails.
    """
    repository, revision = named_in(snippet)
    base, base_revision = "", ""
    if is_adapter(folder) and version.parse(transformers.__version__) < ADAPTERS_OFFLINE:
        raise ValueError(
            f"transformers {transformers.__version__} cannot load an adapter offline: use {ADAPTERS_OFFLINE}"
        )
    print("- loading it in a fresh process, and running the card's snippet", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as home:
        _put_in_cache(Path(home), repository, revision, folder, published_files(folder))
        if is_adapter(folder):
            settings = read_object(folder / ADAPTER_CONFIG_FILE)
            base, base_revision = settings["base_model_name_or_path"], settings.get("revision") or "main"
            base_folder = _fetch(base, base_revision)
            _put_in_cache(Path(home), base, base_revision, base_folder, published_files(base_folder))
        asked = {"repository": repository, "revision": revision, "base": base, "base_revision": base_revision}
        result = subprocess.run(
            [sys.executable, "-I", str(PROBE)],
            cwd=home,
            env={name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_ENDPOINT")}
            | {
                "HF_HUB_OFFLINE": "1",
                "HF_HOME": home,
                "HF_HUB_CACHE": f"{home}/hub",
                "HF_MODULES_CACHE": f"{home}/code",
            },
            input=json.dumps({"load": asked, "snippet": snippet}),
            capture_output=True,
            encoding="utf-8",
        )
    if result.returncode:
        said = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise ValueError(f"it does not load in a fresh process: {said[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def _put_in_cache(home: Path, repository: str, revision: str, folder: Path, files: list[Path]) -> None:
    """Lays files out as huggingface_hub's cache does after a download, by links."""
    commit = "0" * 40
    cache = home / "hub" / f"models--{repository.replace('/', '--')}"
    (cache / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (cache / "refs" / revision).write_text(commit)
    if Path("config.json") not in files:  # an adapter: the cache remembers, too, which files there are not
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
