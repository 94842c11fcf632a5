# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What has to hold of a folder before it is published; each check gives a line for each thing that is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import transformers
import yaml
from huggingface_hub import ModelCardData, snapshot_download
from packaging import version
from tqdm import tqdm

from conversion import ConversionError
from conversion.checkpoints.weights import check_finite
from modeling_llava_stf import LlavaSTFProcessor
from modeling_llava_stf.configuration_llava_stf import AUTO_MAP

from .card import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CARD_FILE,
    EXAMPLE_PICTURE,
    HUB_ID,
    LICENCES,
    METHOD_PICTURE,
    Card,
    Facts,
    is_adapter,
    named_in,
    snippet_of,
    weights_of,
)
from .files import Frozen, freeze, own_code
from .kinds import check_kind, is_pickle, levels_of, picture_texts, refuse_archive
from .results import TASK, read_object
from .secrets import secrets_in, unescape

# Older ones ask the Hub again for the config.json that an adapter's repository does not have.
ADAPTERS_OFFLINE = version.parse("5.23")
PROBE = Path(__file__).with_name("probe.py")
# What the probe gets of our environment: no tokens, and no address with a password.
PROBE_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
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
WEIGHTS_INDEX = "model.safetensors.index.json"
OBJECTS = ("config.json", ".index.json")
REVISION = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
# Vocabularies have words that look like paths.
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")
BINARY = "\ufffd"  # what a file that is no text has, decoded
REST = r"[^\s\"'`)>\]\x00-\x1f\ufffd]*"
PATH = re.compile(
    r"(?<![\w./:-])(?:file://|/(?:home|Users|root|mnt|media|data|tmp|var|opt|srv|workspace|scratch|content))/" + REST
)
# So short that they stand by chance in what is no text.
SHORT_PATH = re.compile(r"(?<![\w./:-])(?:~/|[A-Za-z]:\\\\?\w)" + REST)
# The most characters of a card's YAML, and brackets in it: PyYAML 6.0.3 takes time with the square of their depth.
MOST_HEAD, MOST_BRACKETS = 200_000, 200


def check(folder: Path | Frozen, **options: Any) -> list[str]:
    """All that is wrong with a folder; nothing, if it may be published.

    Args:
        folder: what [`freeze`] returns, or a folder to freeze.
        options: those of [`freeze`].

    Raises:
        ValueError: if it holds neither a model nor an adapter.
    """
    is_adapter(folder.source if isinstance(folder, Frozen) else folder)
    frozen = folder if isinstance(folder, Frozen) else freeze(folder, **options)
    problems = [*frozen.refused, *check_kinds(frozen)]
    damaged = any(problem.startswith("damaged") for problem in problems)
    if not damaged and {"config.json", ADAPTER_CONFIG_FILE} & frozen.files.keys():  # the other checks read them
        problems += [problem for find in CHECKS for problem in find(frozen)]
    # Loading runs code of the folder, and would only repeat what is known to be missing.
    problems = problems or list(check_use(frozen))
    return [problem.replace(str(frozen.folder), str(frozen.source)) for problem in problems]


# The checks. Each takes what would be published and gives what is wrong.


def check_kinds(frozen: Frozen) -> Iterator[str]:
    """Every file is of the kind that its name says, and nothing else besides."""
    for name, file in frozen.files.items():
        content = frozen.read(name)
        if file.kind in ("text", "code", "sentencepiece") and is_pickle(content):
            yield f"pickle: {name} may run code when it is loaded; remove it"
            continue
        try:
            check_kind(content, file.kind)
            if name.endswith(OBJECTS) and not isinstance(json.loads(content), dict):
                raise ValueError("is no object with named fields")
        except ValueError as error:
            yield f"damaged: {name} {error}"


def check_complete(frozen: Frozen) -> Iterator[str]:
    """Code, configuration, processor, templates, weights, card and pictures are there."""
    adapter = is_adapter(frozen.folder)
    wanted = [CARD_FILE, EXAMPLE_PICTURE, *PROCESSOR_FILES, *(() if adapter else MODEL_FILES)]
    for name in wanted:
        if name not in frozen.files:
            rendered = name in (CARD_FILE, EXAMPLE_PICTURE, METHOD_PICTURE)
            made = f" (python -m hub_card render {frozen.source})" if rendered else ""
            yield f"incomplete: {name} is missing{made}"
    if not any(file.kind == "safetensors" for file in frozen.files.values()):
        expected = ADAPTER_WEIGHTS_FILE if adapter else "model.safetensors, whole or in shards"
        yield f"incomplete: there are no weights; expected {expected}"


def check_weights(frozen: Frozen) -> Iterator[str]:
    """The safetensors can be read, shards are those of their index, and every value is finite."""
    files = [name for name, file in frozen.files.items() if file.kind == "safetensors"]
    if not files:
        return
    outside = _outside(frozen)
    if outside:
        yield f"weights: {WEIGHTS_INDEX} names {', '.join(map(repr, outside))}, expected files of the folder"
        return
    try:
        weights = weights_of(frozen.folder)
        for name in files:
            if name not in {weight.origin for weight in weights.values()}:
                yield f"weights: {name} does not belong to the checkpoint; transformers might load it instead"
        total = sum(weight.nbytes for weight in weights.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="checking weights", leave=False) as progress:
            for name, weight in weights.items():
                tensor = weight.load()
                # No minimum of eight-bit floats; integers are finite.
                check_finite(name, tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor)
                progress.update(weight.nbytes)
    except ConversionError as error:
        yield f"weights: {error}"


def _outside(frozen: Frozen) -> list[Any]:
    """What the index of the weights names that would not be published."""
    if WEIGHTS_INDEX not in frozen.files:
        return []
    weight_map = json.loads(frozen.read(WEIGHTS_INDEX)).get("weight_map")
    if not isinstance(weight_map, dict):
        return [weight_map]
    return [name for name in weight_map.values() if not isinstance(name, str) or name not in frozen.files][:3]


def check_metadata(frozen: Frozen) -> Iterator[str]:
    """The YAML head is read by huggingface_hub and names licence, pipeline and library."""
    if CARD_FILE not in frozen.files:
        return
    try:
        fields = head_of(_card(frozen))
        metadata = ModelCardData(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        yield f"metadata: {' '.join(str(error).split())}"
        return
    if "licence" in fields:
        yield f"metadata: {CARD_FILE} says `licence`; the Hub reads `license`"
    expected = {"pipeline_tag": TASK, "library_name": "peft" if is_adapter(frozen.folder) else "transformers"}
    for name, value in expected.items():
        if getattr(metadata, name) != value:
            yield f"metadata: `{name}` is {getattr(metadata, name)!r}, expected {value!r}"


def head_of(card: str) -> dict[str, Any]:
    """The YAML head of a card; references are refused, because few lines of them stand for any amount.

    Raises:
        ValueError: if there is none, or it is not valid.
    """
    head = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if head is None:
        raise ValueError(f"{CARD_FILE} does not begin with a YAML block between two lines of `---`")
    if len(head[1]) > MOST_HEAD:
        raise ValueError(f"the YAML of {CARD_FILE} has {len(head[1])} characters; the most is {MOST_HEAD}")
    brackets = head[1].count("[") + head[1].count("{")
    if brackets > MOST_BRACKETS:
        raise ValueError(f"the YAML of {CARD_FILE} has {brackets} opening brackets; the most is {MOST_BRACKETS}")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(head[1], Loader=yaml.SafeLoader)):
            raise ValueError(f"the YAML of {CARD_FILE} has references (`*name`): write out what they stand for")
        fields = yaml.safe_load(head[1])
    except RecursionError as error:
        raise ValueError(f"the YAML of {CARD_FILE} is nested too deep") from error
    except yaml.YAMLError as error:
        raise ValueError(f"the YAML of {CARD_FILE} is not valid: {error}") from error
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise ValueError(f"the YAML of {CARD_FILE} is not valid: expected names with values")
    return fields


def check_licence(frozen: Frozen) -> Iterator[str]:
    """LICENSE and NOTICE are there, and the card names the licence of the weights."""
    for name in LICENCES:
        if name not in frozen.files or not frozen.files[name].size:
            yield f"licence: {name} is missing or empty"
    try:
        licence = head_of(_card(frozen)).get("license")
    except ValueError:  # see `check_metadata`
        return
    if not (isinstance(licence, str) and licence.strip()):
        yield f"licence: `license` in {CARD_FILE} is {licence!r}, expected one of the Hub's identifiers"


def check_snippet(frozen: Frozen) -> Iterator[str]:
    """The card has a snippet, and it names a repository and a revision."""
    try:
        if CARD_FILE in frozen.files:
            named_in(snippet_of(_card(frozen))[0])
    except ValueError as error:
        yield f"snippet: {error}"


def check_archives(frozen: Frozen) -> Iterator[str]:
    """No archive is hidden in the weights."""
    for name, file in frozen.files.items():
        if file.kind == "safetensors":
            try:
                with (frozen.folder / name).open("rb") as weights:
                    refuse_archive(weights)
            except ValueError as error:
                yield f"weights: {name} {error}"


def check_code(frozen: Frozen) -> Iterator[str]:
    """No configuration takes code from another repository, or has a chat template of its own in it."""
    for name, value in _json_of(frozen):
        for key, item in _pairs(value):
            if key in ("auto_map", "custom_pipelines"):
                for reference in sorted({text for text in _strings(item) if "--" in text}):
                    yield f"code: {name} takes code from another repository, {reference!r}; copy it here"
            elif key == "chat_template" and name not in frozen.allow_code and not _is_our_template(item):
                yield f"code: {name} has a chat template that differs from this package's; see --allow-code {name}"


def _is_our_template(value: Any) -> bool:
    return isinstance(value, str) and value.encode() in own_code(".jinja")


def check_paths(frozen: Frozen) -> Iterator[str]:
    """No file names a place on the machine where it was made."""
    for name in frozen.files:
        if name in VOCABULARIES:
            continue
        advice = " (render again with --base USER/NAME)" if name == ADAPTER_CONFIG_FILE else ""
        for found in sorted({found for text in _texts(frozen, name) for found in _paths_in(text)}):
            yield f"path: {name} names {found!r}, a place on this machine{advice}"
    if is_adapter(frozen.folder):
        base = read_object(frozen.folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path") or ""
        if not HUB_ID.fullmatch(str(base)) and not list(_paths_in(str(base))):
            yield f"path: the adapter's base is {base!r}, expected a Hub id (render again with --base USER/NAME)"


def _paths_in(text: str) -> Iterator[str]:
    if "\n" not in text and PurePosixPath(text).is_absolute() and len(PurePosixPath(text).parts) > 2:
        yield text
    else:
        patterns = (PATH,) if BINARY in text else (PATH, SHORT_PATH)
        yield from (found[0] for pattern in patterns for found in pattern.finditer(text))


def check_secrets(frozen: Frozen) -> Iterator[str]:
    """No file has a token, a key or a password in it; the message does not repeat it."""
    for name, file in frozen.files.items():
        content = frozen.read(name)
        found = secrets_in(content)
        if file.kind == "PNG":
            found += [kind for text in picture_texts(content) for kind in secrets_in(text)]
        yield from (f"secret: {name} holds {kind}" for kind in sorted(set(found)))


def _texts(frozen: Frozen, name: str) -> Iterator[str]:
    """What a file says: the names and strings of JSON, the text of others, with and without escapes."""
    content, kind = frozen.read(name), frozen.files[name].kind
    if kind in ("JSON", "safetensors"):
        yield from _strings(_loaded(content))
        return
    text = content.decode("utf-8", "replace")
    yield from dict.fromkeys((text, unescape(text)))
    if kind == "PNG":
        yield from picture_texts(content)


def _loaded(content: bytes) -> Any:
    """JSON, or nothing where it is the header of damaged weights, see `check_weights`."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _json_of(frozen: Frozen) -> Iterator[tuple[str, Any]]:
    return ((name, _loaded(frozen.read(name))) for name, file in frozen.files.items() if file.kind == "JSON")


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    return (pair for level in levels_of(value) for pair in level)


def _strings(value: Any) -> Iterator[str]:
    for name, item in _pairs(value):
        yield from (text for text in (name, item) if isinstance(text, str))


def _card(frozen: Frozen) -> str:
    return frozen.read(CARD_FILE).decode() if CARD_FILE in frozen.files else ""


CHECKS: tuple[Callable[[Frozen], Iterator[str]], ...] = (
    check_complete,
    check_metadata,
    check_licence,
    check_snippet,
    check_code,
    check_paths,
    check_secrets,
    check_weights,
    check_archives,
)


def check_use(frozen: Frozen) -> Iterator[str]:
    """In a process of its own and offline: the folder loads, the snippet runs, and both do what the card says.

    Code that is not this package's is run only after a yes.
    """
    card = _card(frozen)
    if frozen.foreign and not frozen.run_code:
        names = ", ".join(frozen.foreign)
        print(f"- not loaded: {names} is not this package's code (--run-code loads it)", file=sys.stderr, flush=True)
        return
    try:
        if not frozen.run_code and not _is_our_snippet(frozen, card):
            yield "snippet: it is not what this package writes, and was not run; render again, or say --run-code"
            return
        found = use(frozen, snippet_of(card)[0])
    except (OSError, ValueError) as error:
        yield f"use: {' '.join(str(error).split())}"
        return
    yield from compare_use(card, found)


def _is_our_snippet(frozen: Frozen, card: str) -> bool:
    """Whether the snippet is that of a card about the same repository; nothing else of a card shows in it."""
    snippet = snippet_of(card)[0]
    repository, tag = named_in(snippet)
    base, base_revision = _base_of(frozen)
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


def _base_of(frozen: Frozen) -> tuple[str, str]:
    """The base of an adapter and its revision; nothing for a model."""
    if not is_adapter(frozen.folder):
        return "", ""
    settings = read_object(frozen.folder / ADAPTER_CONFIG_FILE)
    return settings["base_model_name_or_path"], settings.get("revision") or "main"


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


def use(frozen: Frozen, snippet: str) -> dict[str, Any]:
    """Loads a folder and runs the card's snippet in a fresh process: offline, with nothing of this package.

    The process finds the files that would be published under the repository's name, in a cache of its own. The base
    of an adapter has to be on the Hub, or in the usual cache.

    Returns:
        `wrong` (weights that are missing or have no place), `tokens_per_image`, `printed`, and `on` (device, dtype).

    Raises:
        ValueError: with the last line of its error, if that process fails, or if it takes longer than the time limit.
    """
    repository, revision = named_in(snippet)
    base, base_revision = _base_of(frozen)
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
        return _probe(Path(home), json.dumps({"load": asked, "snippet": snippet}), frozen.time_limit)


def _refuse_foreign(base: str, folder: Path, files: list[Path], run_code: bool) -> None:
    for path in files:
        if path.suffix not in (".py", ".pyc", ".so", ".pyd") or run_code:
            continue
        if (folder / path).read_bytes() not in own_code(path.name):
            raise ValueError(f"{path} of the base {base} is not this package's code, and was not run: see --run-code")


def _probe(home: Path, request: str, time_limit: float) -> dict[str, Any]:
    """Runs the probe; its standard input stays open while this process lives, and it ends when that closes."""
    environment = {name: os.environ[name] for name in PROBE_ENVIRONMENT if name in os.environ}
    places = {
        "HOME": home,
        "TMPDIR": home,
        "HF_HOME": home,
        "HF_HUB_CACHE": home / "hub",
        "HF_MODULES_CACHE": home / "code",
    }
    environment |= {"HF_HUB_OFFLINE": "1", **{name: str(place) for name, place in places.items()}}
    answer, errors = home / "answer", home / "errors"
    with answer.open("wb") as output, errors.open("wb") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-I", str(PROBE)],
            cwd=home,
            env=environment,
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


def _send(process: subprocess.Popen, request: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(request.encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:  # it has ended, and its errors say why
        pass


def _end(process: subprocess.Popen) -> None:
    """Ends a process with all that it has started, whether or not it is done."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _last_line(path: Path) -> str:
    """The last line of what a process wrote, which may be long."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**20))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""


def _put_in_cache(home: Path, repository: str, revision: str, folder: Path, files: list[Path]) -> None:
    """Lays files out as huggingface_hub's cache does after a download, by links.

    Raises:
        ValueError: for names that would lie outside of the cache.
    """
    if not (HUB_ID.fullmatch(repository) and REVISION.fullmatch(str(revision))):
        raise ValueError(f"{repository!r} with the revision {revision!r} is no place on the Hub")
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
