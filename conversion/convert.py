# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Writes a finished Hub folder: weights, configs, processor, tokenizer, templates, code, licences and a card."""

import glob
import json
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration, LlavaSTFProcessor

from .config import build_config, build_image_processor, build_text_config, context_length, read_vision_config
from .keys import TOWER_PREFIX, ConversionError, to_hub, to_original
from .source import (
    ADAPTER_CONFIG_FILE,
    MBTF,
    PEFT_PREFIX,
    STF,
    Source,
    commit_of,
    fetch,
    find_run,
    lora_pairs,
    merge_lora,
    read_source,
    read_tower,
)
from .tokenizer import load_tokenizer
from .verify import check_logits
from .weights import (
    Weight,
    Weights,
    check_dtypes,
    compare,
    matrix,
    parse_size,
    plan_shards,
    read_file,
    read_folder,
    read_json,
    shard_names,
    write_folder,
)

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).parent / "chat_templates"
ADAPTER_FILE = "adapter_model.safetensors"
# The source's own config.json, for the way back.
ORIGINAL_CONFIG_FILE = "original_config.json"
LAYERS = TOWER_PREFIX + "vision_model.encoder.layers."
LAYER = re.compile(re.escape(LAYERS) + r"(\d+)\.")
UNFINISHED = ".partial"  # ends the name of a folder that is being written, and of no other
# Tokens that `generate` adds at most, if a call does not say: room for the longest descriptions that LLaVA is trained
# on, and in a small context at most a quarter of it. Without it transformers stops after 20.
LONGEST_ANSWER = 512
EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava_stf
---

# LLaVA-STF, converted

A LLaVA-STF checkpoint (arXiv 2506.07138) in the format of transformers, made from a {kind} of the original trainer.
An image takes {tokens} vision tokens.

This is a note, not yet a model card: `python -m hub_card render` writes one, before you publish.

The code in this folder is under Apache-2.0 (LICENSE). The weights stay under the licences of what they were made from
(NOTICE).
"""


@dataclass
class Plan:
    """All that will be written, checked; the weights are still on disk."""

    source: Source
    model: LlavaSTFForConditionalGeneration  # without weights
    weights: Weights
    processor: LlavaSTFProcessor
    adapter: Weights | None
    notes: list[str]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    max_shard_size: str = "5GB",
    verify: bool = False,
    outputs: str | Path | None = None,
    dry_run: bool = False,
    **options: object,
) -> Path:
    """Converts a run of the original trainer, tensor by tensor.

    Args:
        source: folder or Hub id of a full fine-tune, a stage-1 projector or a LoRA run.
        destination: folder to write; must not exist, or be empty. It appears complete or not at all.
        max_shard_size: size of a weight file, such as `5GB`.
        verify: read the result again and compare a checksum of each tensor with its source.
        outputs: recorded outputs to compare logits with (see [`check_logits`]).
        dry_run: only print what would be written.
        options: of [`make_plan`].

    Returns:
        The destination.

    Raises:
        ConversionError: if anything is missing, unknown, damaged or of the wrong shape. Nothing is written then.
    """
    destination = require_empty(destination)
    if outputs and not Path(outputs).is_file():
        raise ConversionError(f"{outputs} is not a file of recorded outputs.")
    limit = parse_size(max_shard_size)
    plan = make_plan(source, **options)  # type: ignore[arg-type]
    for note in plan.notes:
        print(f"- {note}")
    if dry_run:
        print_table(plan, limit)
        return destination
    with complete_or_absent(destination) as unfinished:
        model_folder = unfinished if plan.adapter is None else unfinished / "base"
        _write_model(model_folder, plan, limit)
        if plan.adapter is not None:
            _write_adapter(unfinished, destination, plan)
        if verify or outputs:
            compare(read_folder(model_folder), plan.weights, zlib.crc32)
            if plan.adapter is not None:
                compare(read_file(unfinished / ADAPTER_FILE), plan.adapter, zlib.crc32)
            count = len(plan.weights) + len(plan.adapter or {})
            print(f"- verified: {count} tensors have the checksums of their sources")
        if outputs:
            print(f"- {check_logits(model_folder, unfinished if plan.adapter else None, Path(outputs))}")
    return destination


def require_empty(destination: str | Path) -> Path:
    destination = Path(destination).resolve()
    if destination.name.endswith(UNFINISHED):
        raise ConversionError(f"{destination} has the name of an unfinished folder (*{UNFINISHED}). Choose another.")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConversionError(f"{destination} is not empty, or not a folder. Choose another; nothing was written.")
    return destination


def make_plan(
    source: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    vision_tower_revision: str | None = None,
    tokenizer_revision: str | None = None,
    subfolder: str | None = None,
    keep_adapter: bool = False,
    keep_full_tower: bool = False,
    init_fusion: bool = False,
    taps: list[int] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    pad_vocabulary: int = 1,
) -> Plan:
    """Reads and checks a run.

    Args:
        source: folder or Hub id.
        base: folder or Hub id of the language model that a projector or a LoRA run was trained on.
        vision_tower: folder or Hub id of the CLIP model; by default the one that the source's config names.
        tokenizer: folder of the tokenizer; by default the source's, else the base's.
        revision: branch, tag or commit of the source, if that is a Hub id.
        base_revision: of the base; by default the one that the adapter's config records for it.
        vision_tower_revision: of the CLIP model.
        tokenizer_revision: of the tokenizer.
        subfolder: of a Hub id with several runs.
        keep_adapter: keep a LoRA run as an adapter beside its converted base, instead of merging it.
        keep_full_tower: keep the tower's layers behind the last tap; they never run.
        init_fusion: begin a training: tower and language model are taken, the fusion modules are new.
        taps: blocks of the tower that new fusion modules mix, in their order; by default the released model's.
        seed: of the new fusion modules.
        dtype: of all weights; by default each weight's own.
        pad_vocabulary: pad the vocabulary tables to a multiple of this.
    """
    folder = find_run(fetch(source, revision, subfolder))
    for option, name, given in (("base", base, base_revision), ("tokenizer", tokenizer, tokenizer_revision)):
        if name is None and given is not None:
            raise ConversionError(f"--{option}-revision {given} is given without --{option}.")
    base_folder = None if base is None else fetch(base, base_revision or _recorded_revision(folder, base))
    run = read_source(folder, base_folder, init_fusion)
    if taps is not None:
        if not init_fusion:
            raise ConversionError("The taps of trained fusion weights are given: leave out --taps.")
        run.config["mm_vision_select_layer"] = taps
    notes = [f"{run.folder}: {run.kind}", *run.notes]
    weights = run.weights
    has_tower = any(key.startswith(TOWER_PREFIX) for key in weights)
    if not has_tower and run.config.get("unfreeze_mm_vision_tower"):
        raise ConversionError(f"{run.folder} trained its vision tower (unfreeze_mm_vision_tower) and does not hold it.")
    clip_folder = _tower_folder(run, vision_tower, vision_tower_revision, weights=not has_tower)
    if keep_adapter and run.adapter is None:
        raise ConversionError(f"{run.folder} is a {run.kind}, which has no adapter: leave out --keep-adapter.")
    if not has_tower:
        weights = weights | read_tower(clip_folder)
        notes.append(f"vision tower: {clip_folder}")
    notes += _commits(source=folder, base=base_folder, vision_tower=clip_folder)
    adapter = None
    if run.adapter is not None and run.adapter_config is not None:
        run.adapter_config["revision"] = None if base_folder is None else commit_of(base_folder)
        if keep_adapter:
            adapter = _adapter_weights(lora_pairs(run.adapter, weights, run.adapter_config))
        else:
            weights = merge_lora(weights, run.adapter, run.adapter_config)

    text = build_text_config(run.config, run.folder / "config.json")
    context = context_length(text)
    notes += _context_note(run, context)
    tokenizer_folder = _tokenizer_folder(tokenizer, tokenizer_revision, run, base_folder)
    notes += _commits(tokenizer=tokenizer_folder if tokenizer else None)
    text_tokenizer = load_tokenizer(tokenizer_folder, context)
    text.pad_token_id = text_tokenizer.pad_token_id
    image_token_id = text_tokenizer.image_token_id
    vision, vision_notes = read_vision_config(clip_folder)
    _check_depth(weights, vision.num_hidden_layers, clip_folder)
    config = build_config(run.config, weights, vision, text, image_token_id)
    image_processor, image_notes = build_image_processor(run.config, clip_folder, vision.image_size)
    notes += vision_notes + image_notes
    if init_fusion:
        weights = weights | new_fusion(config, seed)
        notes.append(f"THE FUSION MODULES ARE NEW (seed {seed}): train them before you ask this model anything")
    if not keep_full_tower and config.vision_config.num_hidden_layers > max(config.taps):
        config.vision_config.num_hidden_layers = max(config.taps)
        weights = _without_unused_layers(weights, config)
        notes.append(f"the tower's layers behind the last tap, {max(config.taps)}, are left out: they are never used")
    weights, note = _with_vocabulary(to_hub(weights), config, len(text_tokenizer), pad_vocabulary)
    notes.append(note)
    if dtype is not None:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        adapter = None if adapter is None else {name: weight.to(dtype) for name, weight in adapter.items()}
        config.dtype = dtype
    config.text_config.dtype = config.vision_config.dtype = config.dtype  # as `save_pretrained` writes it
    if adapter is not None:
        adapter |= {PEFT_PREFIX + name: weight for name, weight in weights.items() if ".multi_modal_projector." in name}
    check_dtypes(weights | (run.adapter or {}))

    model = empty_model(config, weights)
    check_complete(weights, model)
    processor = LlavaSTFProcessor(
        image_processor=image_processor,
        tokenizer=text_tokenizer,
        patch_size=config.vision_config.patch_size,
        fusion_window=config.fusion_window,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template={
            "default": (TEMPLATES / "vicuna_v1.jinja").read_text(encoding="utf-8"),
            "plain": (TEMPLATES / "plain.jinja").read_text(encoding="utf-8"),
        },
    )
    return Plan(run, model, weights, processor, adapter, notes)


def _adapter_weights(pairs: dict[str, tuple[Weight, Weight]]) -> Weights:
    """LoRA matrices under PEFT's names for our modules."""
    weights: Weights = {}
    for target, (down, up) in pairs.items():
        (name,) = to_hub({target: None})
        prefix = PEFT_PREFIX + name.removesuffix(".weight")
        weights |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    return weights


def _recorded_revision(folder: Path, base: str | Path) -> str | None:
    """The revision of the base that an adapter's config records, if it is the same base on the Hub."""
    file = folder / ADAPTER_CONFIG_FILE
    if Path(base).is_dir() or not file.exists():
        return None
    settings = read_json(file)
    return settings.get("revision") if settings.get("base_model_name_or_path") == str(base) else None


def _commits(**folders: Path | None) -> list[str]:
    """Notes with the commits of what came from the Hub."""
    found = {name: commit_of(folder) for name, folder in folders.items() if folder is not None}
    return [f"{name.replace('_', ' ')}: commit {commit}" for name, commit in found.items() if commit is not None]


def _context_note(run: Source, context: int) -> list[str]:
    length = run.config.get("tokenizer_model_max_length")
    if not isinstance(length, int) or length >= context:
        return []
    return [f"the original cuts a prompt at {length} tokens (tokenizer_model_max_length); here it may have {context}"]


def _tower_folder(run: Source, vision_tower: str | Path | None, revision: str | None, weights: bool) -> Path:
    """The folder that describes the tower, and holds its weights where they are needed."""
    if vision_tower is not None:
        return fetch(vision_tower, revision, weights=weights)
    if "vision_config" in read_json(run.folder / "config.json"):  # llava-hf describes its tower itself
        return fetch(run.folder, revision)
    named = run.config.get("mm_vision_tower")
    if not isinstance(named, str):
        raise ConversionError(f"{run.folder} names no vision tower: give its folder or Hub id with --vision-tower.")
    for folder in (Path(named), run.folder / named, run.folder.parent / named):
        if (folder / "config.json").exists():
            return fetch(folder, revision)
    try:
        return fetch(named, revision, weights=weights)
    except ConversionError as error:
        raise ConversionError(f"The vision tower of the config: {error} Give it with --vision-tower.") from error


def _tokenizer_folder(tokenizer: str | Path | None, revision: str | None, run: Source, base: Path | None) -> Path:
    given = None if tokenizer is None else fetch(tokenizer, revision)
    candidates = [given] if given else [folder for folder in (run.folder, base) if folder is not None]
    for folder in candidates:
        if (folder / "tokenizer_config.json").exists():
            return folder
    raise ConversionError(f"No tokenizer_config.json in {' or '.join(str(folder) for folder in candidates)}.")


def new_fusion(config: LlavaSTFConfig, seed: int) -> Weights:
    """New fusion weights under the original's names: PyTorch's initialisation of a linear layer, as in the original."""
    width, window = config.vision_config.hidden_size, config.fusion_window
    block, spatial = config.fusion_widths
    layers = {
        f"{MBTF}0": (len(config.taps) * width, block),
        f"{MBTF}2": (block, width),
        f"{STF}0": (window**2 * width, spatial),
        f"{STF}2": (spatial, config.text_config.hidden_size),
    }
    weights: Weights = {}
    for index, (name, (inputs, outputs)) in enumerate(layers.items()):
        for part, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            load = partial(_new_linear, inputs, outputs, seed + index, part, config.dtype)
            weights[f"{name}.{part}"] = Weight(shape, config.dtype, load, f"new, seed {seed + index}")
    return weights


def _new_linear(inputs: int, outputs: int, seed: int, part: str, dtype: torch.dtype) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(nn.Linear(inputs, outputs), part).detach().to(dtype)


def _check_depth(weights: Weights, depth: int, clip_folder: Path) -> None:
    """Raises a [`ConversionError`] if the tower has not the depth that its config says: taps count from its end."""
    found = tower_depth(weights)
    if found != depth:
        raise ConversionError(f"{clip_folder}: `num_hidden_layers` is {depth}, but the tower's weights have {found}.")


def tower_depth(weights: Weights) -> int:
    """Layers of the tower, under the original's names."""
    return 1 + max((int(found[1]) for key in weights if (found := LAYER.match(key))), default=-1)


def _without_unused_layers(weights: Weights, config: LlavaSTFConfig) -> Weights:
    depth = config.vision_config.num_hidden_layers
    return {key: weight for key, weight in weights.items() if not (found := LAYER.match(key)) or int(found[1]) < depth}


def _with_vocabulary(weights: Weights, config: LlavaSTFConfig, vocabulary: int, multiple: int) -> tuple[Weights, str]:
    """Gives `<image>`, and what else the tokenizer has beyond both tables, a row there: the mean of the others.

    The placeholder's embedding is never used, and its logit, the mean of all logits, is never the highest. Padding,
    where asked for, gets the same row.
    """
    rows, image_token_id = matrix(weights, EMBEDDINGS).shape[0], config.image_token_id
    if multiple < 1:
        raise ConversionError(f"--pad-vocabulary is {multiple}, expected a positive number.")
    for name in (EMBEDDINGS, HEAD):
        if matrix(weights, name).shape[0] != config.text_config.vocab_size:
            raise ConversionError(
                f"{name!r} has {weights[name].shape[0]} rows, but config.json says `vocab_size` "
                f"{config.text_config.vocab_size}."
            )
    needed = -(-max(rows, vocabulary) // multiple) * multiple
    config.text_config.vocab_size = needed
    weights = {**weights, **{name: _with_mean_rows(weights[name], needed) for name in (EMBEDDINGS, HEAD)}}
    added = f"{needed - rows} added to each table, the mean of the others" if needed > rows else "none added"
    note = f"vocabulary: <image> is {image_token_id}, {rows} rows in the source, {added}; no other id changes"
    return weights, note


def _with_mean_rows(table: Weight, rows: int) -> Weight:
    if rows == table.shape[0]:
        return table

    def load() -> torch.Tensor:
        old = table.load()
        # In slices: a table of a 7B in float32 would be half a gigabyte.
        mean = torch.stack([part.float().sum(0) for part in old.split(1024)]).sum(0) / len(old)
        return torch.cat([old, mean.to(old.dtype).expand(rows - len(old), -1)])

    return Weight((rows, *table.shape[1:]), table.dtype, load, f"{table.origin} + mean")


def empty_model(config: LlavaSTFConfig, weights: Weights) -> LlavaSTFForConditionalGeneration:
    """A model without memory for its weights, which are under our names.

    Raises:
        ConversionError: if the config has more layers than there are weights: it might take hours to build them.
    """
    for name, part in (("language_model", config.text_config), ("vision_tower.encoder", config.vision_config)):
        found = {match[1] for key in weights if (match := re.match(rf"model\.{name}\.layers\.(\d+)\.", key))}
        if part.num_hidden_layers > len(found):
            raise ConversionError(
                f"The config has {part.num_hidden_layers} layers of model.{name} (num_hidden_layers, or the last tap), "
                f"but there are weights of {len(found)}."
            )
    with torch.device("meta"):
        return LlavaSTFForConditionalGeneration(config)


def check_complete(weights: Weights, model: nn.Module) -> None:
    """Raises a [`ConversionError`] unless `weights`, under our names, are those of the model, in its shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() - weights.keys()):
        raise ConversionError(f"The source has no weight for {name!r}.")
    for name, weight in weights.items():
        if name not in expected:
            raise ConversionError(f"The source has the weight {name!r}, for which the model has no place.")
        if weight.shape != expected[name]:
            raise ConversionError(f"{name!r} has the shape {weight.shape}, expected {expected[name]}.")


def print_table(plan: Plan, max_shard_size: int) -> None:
    """The key table, and the files that would be written."""
    for (theirs, weight), name in zip(to_original(plan.weights).items(), plan.weights, strict=True):
        shape = "x".join(str(side) for side in weight.shape)
        dtype = str(weight.dtype).removeprefix("torch.")
        print(f"{theirs} -> {name}  {shape} {dtype}  ({weight.origin})")
    print_shards(plan.weights, max_shard_size)


def print_shards(weights: Weights, max_shard_size: int) -> None:
    shards = plan_shards(weights, max_shard_size)
    for file, names in zip(shard_names(len(shards)), shards, strict=True):
        print(f"would write {file}: {sum(weights[name].nbytes for name in names) / 1e9:.3f} GB")
    total = sum(weight.nbytes for weight in weights.values())
    print(f"{len(weights)} tensors, {total / 1e9:.3f} GB; nothing was written")


@contextmanager
def complete_or_absent(destination: Path) -> Iterator[Path]:
    """A sibling folder to write into, renamed to the destination at the end.

    Its name says for which destination, on which host and in which process it is written: what a killed run of this
    host left for this destination is removed.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}@{socket.gethostname()}@"
    for left in destination.parent.glob(f"{glob.escape(prefix)}*{UNFINISHED}"):
        process = left.name.removeprefix(prefix).removesuffix(UNFINISHED)
        if process == str(os.getpid()) or (process.isdecimal() and not _runs(int(process))):
            shutil.rmtree(left, ignore_errors=True)
    unfinished = destination.with_name(f"{prefix}{os.getpid()}{UNFINISHED}")
    unfinished.mkdir()
    try:
        yield unfinished
        os.replace(unfinished, destination)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_model(folder: Path, plan: Plan, max_shard_size: int) -> None:
    folder.mkdir(exist_ok=True)
    config = plan.model.config
    write_folder(folder, plan.weights, max_shard_size)
    custom_object_save(plan.model, folder, config=config)
    config.architectures = [type(plan.model).__name__]
    config.save_pretrained(folder)
    plan.processor.save_pretrained(folder)
    GenerationConfig(
        max_new_tokens=min(LONGEST_ANSWER, plan.processor.tokenizer.model_max_length // 4),
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        suppress_tokens=[config.image_token_id],
    ).save_pretrained(folder)
    if plan.source.kind != "initialisation":
        original = json.dumps(plan.source.config, indent=2) + "\n"
        (folder / ORIGINAL_CONFIG_FILE).write_text(original, encoding="utf-8")
    copy_licences(folder)
    (folder / "README.md").write_text(
        CARD.format(kind=plan.source.kind, tokens=config.tokens_per_image), encoding="utf-8"
    )


def save_checkpoint(folder: Path, model: LlavaSTFForConditionalGeneration, processor: str | Path) -> None:
    """Writes a model, the processor of another checkpoint, and the licence of the code."""
    model.save_pretrained(folder)
    LlavaSTFProcessor.from_pretrained(processor).save_pretrained(folder)
    copy_licences(folder)


def copy_licences(folder: Path) -> None:
    """Lays the licence of the code beside the code that a checkpoint carries."""
    for name in ("LICENSE", "NOTICE"):
        shutil.copyfile(ROOT / name, folder / name)


def name_auto_class(folder: Path) -> None:
    """Lets `AutoPeftModel` load a PEFT adapter's base with transformers' Auto class.

    PEFT 0.21 names the module of the base's class, which with `trust_remote_code` exists in one cache only, and
    imports nothing outside transformers. A task type would make `AutoPeftModel` refuse the adapter.
    """
    path = folder / ADAPTER_CONFIG_FILE
    auto_class = {"base_model_class": "AutoModelForImageTextToText", "parent_library": "transformers"}
    settings = {**read_json(path), "task_type": None, "auto_mapping": auto_class}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_adapter(folder: Path, destination: Path, plan: Plan) -> None:
    """The LoRA run as a PEFT adapter of the converted base in `destination/base`; the fusion modules are in both."""
    assert plan.adapter is not None and plan.source.adapter_config is not None
    write_folder(folder, plan.adapter, max_shard_size=sum(weight.nbytes for weight in plan.adapter.values()))
    (folder / "model.safetensors").rename(folder / ADAPTER_FILE)
    adapted = {name.removeprefix(PEFT_PREFIX).split(".lora_")[0] for name in plan.adapter if ".lora_" in name}
    settings = {
        **plan.source.adapter_config,
        "base_model_name_or_path": str(destination.resolve() / "base"),
        "target_modules": sorted(adapted),
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": ["multi_modal_projector"],
    }
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    name_auto_class(folder)
    plan.processor.save_pretrained(folder)
