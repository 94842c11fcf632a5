# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Checks a folder before it is published; each check yields a line for each fault."""

import json
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCardData
from tqdm import tqdm

from conversion import ConversionError
from conversion.checkpoints.weights import Weights, check_finite
from conversion.vocabulary import EMBEDDINGS, HEAD
from modeling_llava_stf.configuration_llava_stf import AUTO_MAP

from .card import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CARD_FILE,
    EXAMPLE_PICTURE,
    HUB_ID,
    LICENCE,
    LICENCES,
    METHOD_PICTURE,
    Facts,
    gather,
    is_adapter,
    weights_of,
)
from .files import Frozen, freeze, own_code
from .fresh_process import use
from .kinds import check_kind, is_pickle, levels_of, picture_texts, refuse_archive
from .memory import changed_facts, rendered, weights_in
from .results import TASK, read_object
from .secrets import secrets_in, unescape
from .snippet import is_our_snippet, named_in, snippet_of

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
OLD_PROCESSOR = "preprocessor_config.json"
WEIGHTS_INDEX = "model.safetensors.index.json"
OBJECTS = ("config.json", ".index.json")
# Vocabularies contain words that look like paths.
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")
BINARY = "\ufffd"  # appears in a binary file that is decoded as text
REST = r"[^\s\"'`)>\]\x00-\x1f\ufffd]*"
PATH = re.compile(
    r"(?<![\w./:-])(?:file://|/(?:home|Users|root|mnt|media|data|tmp|var|opt|srv|work|workspace|scratch|content|kaggle|"
    r"lustre|gpfs|fsx|nfs|raid|Volumes|users|projects?|storage|cluster|gscratch|beegfs|ceph|efs|nvme|ssd|disk)\d*)/"
    + REST
)
# These are so short that binary files contain them by chance.
SHORT_PATH = re.compile(r"(?<![\w./:-])(?:~/|[A-Za-z]:(?:\\\\?|/)\w)" + REST)
# Limits of a card's YAML: characters, and brackets (PyYAML 6.0.3 takes time with the square of their depth).
MOST_HEAD, MOST_BRACKETS = 200_000, 200


def check(folder: Path | Frozen, **options: Any) -> list[str]:
    """Returns all faults of a folder; the list is empty if it may be published.

    Args:
        folder: what [`freeze`] returns, or a folder to freeze.
        options: options of [`freeze`].

    Raises:
        ValueError: if it holds neither a model nor an adapter.
    """
    is_adapter(folder.source if isinstance(folder, Frozen) else folder)
    frozen = folder if isinstance(folder, Frozen) else freeze(folder, **options)
    problems = [*frozen.refused, *check_kinds(frozen)]
    damaged = any(problem.startswith("damaged") for problem in problems)
    if not damaged and {"config.json", ADAPTER_CONFIG_FILE} & frozen.files.keys():  # the other checks read them
        problems += [problem for find in CHECKS for problem in find(frozen)]
    # Loading runs code of the folder, and would only repeat the faults that are known.
    problems = problems or list(check_use(frozen))
    return [problem.replace(str(frozen.folder), str(frozen.source)) for problem in problems]


# Each check takes the files that would be published and yields the faults.


def check_kinds(frozen: Frozen) -> Iterator[str]:
    """Checks that every file is of the kind that its name says, and of no other kind, too."""
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
    """Checks that code, configuration, processor, templates, weights, card and pictures are there."""
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
    """Checks that weights can be read, that shards match their index, and that every value is finite."""
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
        unlisted = sorted(weights.keys() - _listed(frozen, weights))
        if unlisted:
            yield f"weights: {WEIGHTS_INDEX} lacks {len(unlisted)} weights of its files, among them {unlisted[0]!r}"
        total = sum(weight.nbytes for weight in weights.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="checking weights", leave=False) as progress:
            for name, weight in weights.items():
                tensor = weight.load()
                # torch has no minimum of eight-bit floats; integers are always finite.
                check_finite(name, tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor)
                progress.update(weight.nbytes)
        if not is_adapter(frozen.folder):
            yield from _misread(json.loads(frozen.read("config.json")), weights)
    except ConversionError as error:
        yield f"weights: {error}"


def _listed(frozen: Frozen, weights: Weights) -> Collection[str]:
    """Returns the weights that the index names; all of them, if they were not read by an index."""
    if WEIGHTS_INDEX not in frozen.files or "model.safetensors" in frozen.files:
        return weights.keys()
    return json.loads(frozen.read(WEIGHTS_INDEX))["weight_map"].keys()


def _misread(config: dict[str, Any], weights: Weights) -> Iterator[str]:
    """Yields what the config makes of weights that are something else."""
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in weights.values()}
    said = config.get("dtype") or config.get("torch_dtype")
    if said and said not in dtypes and "quantization_config" not in config:
        yield f"weights: they are {' and '.join(sorted(dtypes))}, but are loaded as {said}, the `dtype` of config.json"
    text = config.get("text_config")
    is_tied = config.get("tie_word_embeddings") or (isinstance(text, dict) and text.get("tie_word_embeddings"))
    if (
        is_tied
        and {HEAD, EMBEDDINGS} <= weights.keys()
        and not torch.equal(weights[HEAD].load(), weights[EMBEDDINGS].load())
    ):
        yield (
            f"weights: {HEAD} differs from {EMBEDDINGS}, but config.json has `tie_word_embeddings`: transformers "
            "would use both, vLLM only one"
        )


def _outside(frozen: Frozen) -> list[Any]:
    """Returns the files in the index of the weights that would not be published."""
    if WEIGHTS_INDEX not in frozen.files:
        return []
    weight_map = json.loads(frozen.read(WEIGHTS_INDEX)).get("weight_map")
    if not isinstance(weight_map, dict):
        return [weight_map]
    return [name for name in weight_map.values() if not isinstance(name, str) or name not in frozen.files][:3]


def check_metadata(frozen: Frozen) -> Iterator[str]:
    """Checks that huggingface_hub reads the YAML head, and that it names pipeline and library."""
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
    for name in ("base_model", "datasets", "language", "tags"):
        value = fields.get(name, [])
        if not all(isinstance(text, str) for text in (value if isinstance(value, list) else [value])):
            yield f"metadata: `{name}` is {value!r}, expected text or a list of texts (quote `no` and numbers)"
    expected = {"pipeline_tag": TASK, "library_name": "peft" if is_adapter(frozen.folder) else "transformers"}
    for name, value in expected.items():
        if getattr(metadata, name) != value:
            yield f"metadata: `{name}` is {getattr(metadata, name)!r}, expected {value!r}"


def head_of(card: str) -> dict[str, Any]:
    """Returns the YAML head of a card; refuses references, because a few lines of them can expand without limit.

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
    names = [name.value for name, _ in yaml.compose(head[1], yaml.SafeLoader).value]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the YAML of {CARD_FILE} has {', '.join(twice)} twice: remove one")
    return fields


def check_licence(frozen: Frozen) -> Iterator[str]:
    """Checks that LICENSE and NOTICE are there, and that the card names the licence of the weights."""
    for name in LICENCES:
        if name not in frozen.files or not frozen.files[name].size:
            yield f"licence: {name} is missing or empty"
    try:
        licence = head_of(_card(frozen)).get("license")
    except ValueError:  # see `check_metadata`
        return
    if not (isinstance(licence, str) and LICENCE.fullmatch(licence)):
        yield f"licence: `license` in {CARD_FILE} is {licence!r}, expected one of the Hub's identifiers"


def check_snippet(frozen: Frozen) -> Iterator[str]:
    """Checks that the card has a snippet, and that it names a repository and a revision."""
    try:
        if CARD_FILE in frozen.files:
            named_in(snippet_of(_card(frozen))[0])
    except ValueError as error:
        yield f"snippet: {error}"


def check_archives(frozen: Frozen) -> Iterator[str]:
    """Checks that the weights hide no archive."""
    for name, file in frozen.files.items():
        if file.kind == "safetensors":
            try:
                with (frozen.folder / name).open("rb") as weights:
                    refuse_archive(weights)
            except ValueError as error:
                yield f"weights: {name} {error}"


def check_code(frozen: Frozen) -> Iterator[str]:
    """Checks that no configuration takes code from another repository or contains an unknown chat template."""
    for name, value in _json_of(frozen):
        for key, item in _pairs(value):
            if key in ("auto_map", "custom_pipelines"):
                for reference in sorted({text for text in _strings(item) if "--" in text}):
                    yield f"code: {name} takes code from another repository, {reference!r}; copy it here"
            elif key == "chat_template" and name not in frozen.allow_code and not _is_our_template(item):
                yield f"code: {name} has a chat template that differs from this package's; see --allow-code {name}"


def _is_our_template(value: Any) -> bool:
    return isinstance(value, str) and value.encode() in own_code(".jinja")


def check_processor(frozen: Frozen) -> Iterator[str]:
    """Checks that image settings of an earlier version, which are not read, say what those that are read say."""
    files = dict(_json_of(frozen))
    read, other = files.get("processor_config.json"), files.get(OLD_PROCESSOR)
    read = read.get("image_processor") if isinstance(read, dict) else None
    if not (isinstance(read, dict) and isinstance(other, dict)):
        return
    for name in sorted(read.keys() & other.keys() - {"auto_map"}):
        if read[name] != other[name]:
            yield (
                f"processor: `{name}` is {other[name]!r} in {OLD_PROCESSOR}, but {read[name]!r} in "
                f"processor_config.json, which transformers reads: remove {OLD_PROCESSOR}"
            )


def check_paths(frozen: Frozen) -> Iterator[str]:
    """Checks that no file names a path on the machine where it was made."""
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
    """Checks that no file contains a token, a key or a password; the message does not repeat it."""
    for name, file in frozen.files.items():
        content = frozen.read(name)
        found = secrets_in(content)
        if file.kind == "PNG":
            found += [kind for text in picture_texts(content) for kind in secrets_in(text)]
        yield from (f"secret: {name} holds {kind}" for kind in sorted(set(found)))


def _texts(frozen: Frozen, name: str) -> Iterator[str]:
    """Yields the texts of a file: names and strings of JSON, else the whole text, with and without escapes."""
    content, kind = frozen.read(name), frozen.files[name].kind
    if kind in ("JSON", "safetensors"):
        yield from _strings(_loaded(content))
        return
    text = content.decode("utf-8", "replace")
    yield from dict.fromkeys((text, unescape(text)))
    if kind == "PNG":
        yield from picture_texts(content)


def _loaded(content: bytes) -> Any:
    """Parses JSON; returns None for the header of damaged weights, which `check_weights` reports."""
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
    check_processor,
    check_paths,
    check_secrets,
    check_weights,
    check_archives,
)


def check_use(frozen: Frozen) -> Iterator[str]:
    """Checks that the folder loads, that the snippet runs, and that both agree with the card.

    A separate process does this, offline. It runs code that is not this package's only with `run_code`.
    """
    card = _card(frozen)
    if frozen.foreign and not frozen.run_code:
        names = ", ".join(frozen.foreign)
        print(f"- not loaded: {names} is not this package's code (--run-code loads it)", file=sys.stderr, flush=True)
        return
    try:
        if not frozen.run_code and not is_our_snippet(frozen, card):
            yield "snippet: it is not what this package writes, and was not run; render again, or say --run-code"
            return
        found = use(frozen, snippet_of(card)[0])
    except (OSError, ValueError) as error:
        yield f"use: {' '.join(str(error).split())}"
        return
    yield from list(compare_use(card, found)) or check_current(frozen)


def compare_use(card: str, found: dict[str, Any]) -> Iterator[str]:
    """Compares the card with what [`use`] found."""
    yield from (f"use: {problem}" for problem in found["wrong"])
    tokens = re.search(r"\*\*(\d+) vision tokens\*\*", card)
    if tokens is None or int(tokens[1]) != found["tokens_per_image"]:
        said = f"says {tokens[1]}" if tokens else "does not say how many"
        yield f"tokens: an image takes {found['tokens_per_image']} vision tokens, the card {said}"
    printed = snippet_of(card)[1]
    if printed and printed != found["printed"]:
        yield f"snippet: it prints {found['printed']!r}, the card shows {printed!r} (render again with --run)"


def check_current(frozen: Frozen) -> Iterator[str]:
    """Checks that the card is about these weights: it was rendered for them, and its table says what they are."""
    card, again = _card(frozen), f"(python -m hub_card render {frozen.source})"
    try:
        known = rendered(frozen.source)
        weights = {name: file.sha256 for name, file in frozen.files.items() if file.kind == "safetensors"}
        if known and weights != weights_in(known):
            yield f"card: it was rendered for other weights {again}"
        elif changed := changed_facts(frozen, known):
            yield f"card: it was rendered before {', '.join(changed)} changed {again}"
        named, tag = named_in(snippet_of(card)[0])
        base_model = head_of(card).get("base_model") or []
        said = [base_model] if isinstance(base_model, str) else base_model
        ours = gather(frozen.folder, named, Facts(license="", base_model=said), tag)
    except ValueError as error:
        yield f"card: {error}"
        return
    tokens = len(ours.processor.tokenizer)
    if ours.config and tokens > (places := ours.config.text_config.vocab_size):
        yield f"vocabulary: the tokenizer has {tokens} tokens, but the embedding has {places} rows: too few"
    if ours.base and said != [ours.base]:
        yield f"metadata: `base_model` is {said}, the adapter's base is {ours.base!r} {again}"
    rows = _rows(card)
    for name, value in _rows(ours.render()).items():
        if rows.get(name, value) != value:
            yield f"card: {name} is {rows[name]!r} on it, but {value!r} in the folder {again}"


def _rows(card: str) -> dict[str, str]:
    """Returns the table of "The model", by the names of its rows."""
    table = card.partition("\n## The model\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", table, re.MULTILINE))
