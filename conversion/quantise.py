# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Quantises the language model of a checkpoint and writes a complete Hub folder.

Vision tower, fusion modules and head stay in 16 bit.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from tqdm import tqdm
from transformers import BitsAndBytesConfig, LlamaConfig, TorchAoConfig
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf.modeling_llava_stf import NOT_QUANTISED

from .checkpoints.folders import (
    ORIGINAL_CONFIG_FILE,
    QUANTISATION_FILE,
    ROOT,
    complete_or_absent,
    require_empty,
    save_checkpoint,
)
from .checkpoints.weights import SAFETENSORS_DTYPES, Weights, check_dtypes, check_finite, read_folder
from .config import built, read_our_config
from .keys import ConversionError, to_newest
from .locate import HUB_ID, commit_of, fetch
from .plan import check_complete, empty_model

# The weights that are not quantised get this dtype. In float16 the int8 kernels of torchao 0.18 overflow on a CPU,
# because they scale after the product. When they do not, the source's own dtype can stay.
DTYPE = torch.bfloat16
GROUP = 128  # weights that share a scale in int4
AVAILABLE = {"torchao": is_torchao_available, "bitsandbytes": is_bitsandbytes_available}
NOTE = """---
{head}---

# {name}

The language model of a LLaVA-STF checkpoint (arXiv 2506.07138), quantised to {scheme}. Vision tower, fusion modules and
head are in 16 bit. It was made by `{command}`.

This is a note, not yet a model card, because the checkpoint that it was made from has no card either: `python -m
hub_card render` writes one, before you publish.
"""


@dataclass(frozen=True)
class Scheme:
    """Describes a way to quantise. `settings` makes the config of transformers."""

    package: str
    bits: float  # stored for each weight, its share of the scales included
    settings: Callable[[], Any]


def _torchao(kind: str, **options: Any) -> Callable[[], TorchAoConfig]:
    def settings() -> TorchAoConfig:
        import torchao.quantization  # takes seconds, and prints warnings

        return TorchAoConfig(getattr(torchao.quantization, kind)(**options))

    return settings


def _nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE)


SCHEMES = {
    "int8": Scheme("torchao", 8.25, _torchao("Int8WeightOnlyConfig")),
    "int8-dynamic": Scheme("torchao", 8.25, _torchao("Int8DynamicActivationInt8WeightConfig")),
    "int4": Scheme(
        "torchao",
        4.5,
        # torchao 0.18: this is the layout that needs no other library.
        _torchao("Int4WeightOnlyConfig", group_size=GROUP, int4_packing_format="tile_packed_to_4d"),
    ),
    "fp8": Scheme("torchao", 8.25, _torchao("Float8WeightOnlyConfig")),
    "nf4": Scheme("bitsandbytes", 4.5, _nf4),
}


def quantise(
    source: str | Path,
    destination: str | Path,
    scheme: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Quantises the language model of one of our checkpoints.

    The other weights become bfloat16. The result has a model card if the source has one, and a note otherwise.

    Args:
        source: folder or Hub id of a checkpoint in 16 or 32 bit.
        destination: folder to write; must not exist, or be empty. It appears complete or not at all.
        scheme: one of `SCHEMES`.
        revision: branch, tag or commit of the source, if that is a Hub id.
        subfolder: folder of a Hub id that holds several checkpoints.
        base_model: Hub id of the source, for the card; by default the id that the source or its card has.

    Returns:
        The destination.

    Raises:
        ConversionError: if the source is no such checkpoint, or is quantised already; or if library, machine, widths
            or disk do not allow the scheme. Nothing is computed or written then.
    """
    destination = require_empty(destination)
    if scheme not in SCHEMES:
        raise ConversionError(f"There is no scheme {scheme!r}: expected one of {', '.join(SCHEMES)}.")
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise ConversionError(f"{base_model!r} is no id of a Hub repository: expected USER/NAME.")
    require_package(scheme)
    folder = fetch(source, revision, subfolder, also=("*.jinja", "README.md"))
    config = read_our_config(folder)
    require_kernel(scheme, config.text_config)
    weights = read_whole(folder, config)
    built(LlavaSTFProcessor.from_pretrained, folder, pretrained_model_name_or_path=folder)
    _require_disk(destination, _bytes(weights, scheme))
    facts = _facts(source, folder, scheme, base_model)
    model = load(folder, scheme)
    with complete_or_absent(destination) as unfinished:
        save_checkpoint(unfinished, model, folder)
        finish(unfinished, folder, destination.name, facts)
    return destination


def require_package(scheme: str) -> None:
    """Raises a [`ConversionError`] if the library of a scheme is not installed."""
    package = SCHEMES[scheme].package
    if not AVAILABLE[package]():
        try:
            found = f"{package} {version(package)}, which transformers does not accept"
        except PackageNotFoundError:
            found = "none"
        raise ConversionError(f"{scheme} needs {package}, found {found}: pip install --upgrade {package}")


def require_kernel(scheme: str, text: LlamaConfig) -> None:
    """Raises a [`ConversionError`] if this machine has no kernel for a scheme, or none for these widths."""
    if scheme == "int4":
        if not torch.cuda.is_available():
            raise ConversionError(f"int4 needs a GPU: torchao's kernel for it is CUDA's. {_others(scheme)}")
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            found = ".".join(map(str, capability))
            raise ConversionError(f"int4 needs compute capability 8.0, this GPU has {found}. {_others(scheme)}")
        require_multiples(scheme, text, GROUP, 1, _others(scheme))
    if scheme == "nf4" and not torch.cuda.is_available():
        # bitsandbytes 0.50.2 on a CPU: 32 outputs are packed together, and 64 inputs share a scale. Its CUDA kernels
        # take any width.
        require_multiples("nf4 on a CPU", text, 64, 32, _others(scheme))


def require_multiples(scheme: str, text: LlamaConfig, inputs: int, outputs: int, advice: str) -> None:
    """Raises a [`ConversionError`] unless the widths of the language model's layers are multiples of these."""
    both = math.lcm(inputs, outputs)
    widths = {
        "hidden_size": (text.hidden_size, both),
        "intermediate_size": (text.intermediate_size, both),
        "num_attention_heads x head_dim": (text.num_attention_heads * text.head_dim, both),
        "num_key_value_heads x head_dim": (text.num_key_value_heads * text.head_dim, outputs),
    }
    wrong = [f"{name} {width} is not a multiple of {step}" for name, (width, step) in widths.items() if width % step]
    if wrong:
        raise ConversionError(f"{scheme} does not fit the language model: {', '.join(wrong)}. {advice}")


def _others(scheme: str) -> str:
    return f"Choose another --scheme: {', '.join(name for name in SCHEMES if name != scheme)}."


def read_whole(folder: Path, config: LlavaSTFConfig) -> Weights:
    """Returns the weights of one of our checkpoints; raises a [`ConversionError`] if one is missing or not finite."""
    weights = to_newest(read_folder(folder))
    check_dtypes(weights)
    check_complete(weights, empty_model(config, weights))
    total = sum(weight.nbytes for weight in weights.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading") as progress:
        for name, weight in weights.items():
            check_finite(name, weight.load())
            progress.update(weight.nbytes)
    return weights


def _bytes(weights: Weights, scheme: str) -> int:
    """Returns about how many bytes the quantised weights will have."""
    bits = (SCHEMES[scheme].bits if is_quantised(name) and len(w.shape) == 2 else 16 for name, w in weights.items())
    return int(sum(math.prod(w.shape) * bit / 8 for w, bit in zip(weights.values(), bits, strict=True)))


def is_quantised(name: str) -> bool:
    """Returns whether a module or weight belongs to the layers that are quantised by default."""
    return not any(name.startswith(kept) for kept in NOT_QUANTISED) and ".layers." in name


def _require_disk(destination: Path, needed: int) -> None:
    place = next(parent for parent in destination.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConversionError(f"{place} has {free / 1e9:.3f} GB free, but the result needs {needed / 1e9:.3f} GB.")


def load(folder: Path, scheme: str) -> LlavaSTFForConditionalGeneration:
    """Loads a checkpoint with its language model quantised.

    Raises:
        ConversionError: if transformers does not read all weights, or if the library skipped a layer.
    """
    # On a GPU only what needs it: the others give the same weights on a CPU, which has more memory.
    device = "cuda" if scheme in ("int4", "nf4") and torch.cuda.is_available() else "cpu"
    settings = SCHEMES[scheme].settings()
    model, found = LlavaSTFForConditionalGeneration.from_pretrained(
        folder, dtype=DTYPE, quantization_config=settings, device_map=device, output_loading_info=True
    )
    require_read(folder, found)
    left = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and is_quantised(name)}
    left -= set(quantised_layers(model))
    if left:
        raise ConversionError(f"{SCHEMES[scheme].package} left {len(left)} layers as they were, such as {min(left)}.")
    return model.eval()


def require_read(folder: Path, found: dict[str, Any]) -> None:
    """Raises a [`ConversionError`] unless transformers read all weights; `found` is its `loading_info`.

    transformers before 5.24 does not know older names, which `read_whole` reads, and goes on with random weights.
    """
    missing = sorted({*found["missing_keys"], *found["unexpected_keys"]})
    if missing:
        raise ConversionError(
            f"transformers {version('transformers')} did not read {len(missing)} weights of {folder}, such as "
            f"{missing[0]}: they have names of another version."
        )


def quantised_layers(model: nn.Module) -> Iterator[str]:
    """Yields the names of the linear layers whose weight is of another class, or of whole numbers."""
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        weight = getattr(layer, "weight", None)  # compressed-tensors packs it under another name
        if weight is None or type(weight.data) is not torch.Tensor or weight.dtype not in SAFETENSORS_DTYPES:
            yield name


def _facts(source: str | Path, folder: Path, scheme: str, base_model: str | None) -> dict[str, Any]:
    """Returns what the card says about the way from the source to the result."""
    base = base_model or named_by(source, folder)
    command = f"python -m conversion quantise {base or 'SOURCE'} OUT --scheme {scheme}"
    packages = ("torch", "transformers", SCHEMES[scheme].package)
    versions = {name: version(name) for name in packages}
    return {
        "base_model": base,
        "base_revision": commit_of(folder),
        "scheme": scheme,
        "command": command,
        "versions": versions,
    }


def named_by(source: str | Path, folder: Path) -> str | None:
    """Returns the Hub id of a source: its own, or the one that its card's snippet loads."""
    if not Path(source).is_dir():
        return str(source)
    found = re.search(r'^repository, revision = "([^"]+)"', _read_card(folder / "README.md"), re.MULTILINE)
    return found[1] if found else None


def _read_card(card: Path) -> str:
    """Returns the text of a card, which is empty if there is none."""
    try:
        return card.read_text(encoding="utf-8") if card.is_file() else ""
    except UnicodeDecodeError as error:
        raise ConversionError(f"{card} is not UTF-8: {error}") from error


def finish(folder: Path, source: Path, name: str, facts: dict[str, Any]) -> None:
    """Lays the other files of a Hub folder beside quantised weights: where they come from, and a card or a note.

    Args:
        folder: folder with weights, code, processor and licence.
        source: folder of the checkpoint that was quantised.
        name: the name that `folder` gets in the end.
        facts: what `quantisation.json` says.
    """
    if (source / ORIGINAL_CONFIG_FILE).is_file():
        shutil.copyfile(source / ORIGINAL_CONFIG_FILE, folder / ORIGINAL_CONFIG_FILE)
    (folder / QUANTISATION_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    head = _head(source / "README.md")
    if facts["base_model"] and head.get("license"):
        _render_card(folder, head, facts)
    else:
        tags = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["llava_stf"]}
        base = {"base_model": facts["base_model"]} if facts["base_model"] else {}
        lines = yaml.safe_dump({**tags, **base, "base_model_relation": "quantized"}, sort_keys=False)
        (folder / "README.md").write_text(NOTE.format(head=lines, name=name, **facts), encoding="utf-8")


def _head(card: Path) -> dict[str, Any]:
    """Returns the YAML of the source's card, if it has one."""
    found = re.match(r"---\n(.*?)\n---\n", _read_card(card), re.DOTALL)
    try:
        head = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise ConversionError(f"{card} begins with YAML that is not valid: {error}") from error
    return head if isinstance(head, dict) else {}


def _render_card(folder: Path, head: dict[str, Any], facts: dict[str, Any]) -> None:
    """Renders the card as a user would: `hub_card` builds on this package, not this package on it."""
    options = ["--repo-id", f"{facts['base_model']}-{facts['scheme']}", "--license", str(head["license"])]
    for option, field in (("--language", "language"), ("--dataset", "datasets")):
        values = head.get(field) or []
        options += [word for value in ([values] if isinstance(values, str) else values) for word in (option, value)]
    command = [sys.executable, "-m", "hub_card", "render", str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ConversionError(f"The card could not be written: {done.stderr.strip().splitlines()[-1]}")
