# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Loads a full-size random checkpoint from safetensors, and measures time and memory against reading its files.

python -m benchmarks load [--folder SCRATCH] [--layers 32] [--device cuda] [--output FILE]

It needs 15 GB of disk in SCRATCH. It drops the page cache before each turn if that is allowed. Loading ends when every
page of every weight has been read, because a file that is only mapped has not been read.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks import count, machine, output
from benchmarks.convert import SHARD_BYTES, drop_page_cache, timed
from benchmarks.systems import configs
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration

START = """
import sys
import torch
from modeling_llava_stf import LlavaSTFForConditionalGeneration as Model
torch.zeros(1, device=sys.argv[2])
"""
LOAD = """
model = Model.from_pretrained(sys.argv[1], dtype="auto", device_map=sys.argv[2])
print(sum(weight.flatten()[::1024].float().sum() for weight in model.parameters()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="scratch folder (default: a temporary one)")
    parser.add_argument("--layers", type=int, default=32, help="layers of the language model (32: the 7B)")
    parser.add_argument(
        "--size", choices=["tiny", "slice", "7b"], default="7b", help="widths of the model; tiny is for a rehearsal"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device to load to (default: cpu)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--output", type=Path, help="JSON to write; must not exist")
    options = parser.parse_args()
    output.require_absent(options.output, parser)
    machine.require(options.device, parser)
    scratch = Path(tempfile.mkdtemp(prefix="load-", dir=options.folder))
    try:
        config = configs("tiny")[1] if options.size == "tiny" else count.NAMED["stf-7b"]()
        config.text_config.num_hidden_layers = options.layers
        checkpoint = make_checkpoint(scratch / "checkpoint", config)
        result = measure(checkpoint, options)
    finally:
        shutil.rmtree(scratch)
    if options.output is not None:
        output.write(result, options.output)
    print(json.dumps(result, indent=2))


def make_checkpoint(folder: Path, config: LlavaSTFConfig) -> Path:
    """Writes random bfloat16 weights in shards, as `save_pretrained` does."""
    with torch.device("meta"):
        shapes = LlavaSTFForConditionalGeneration(config).state_dict()
    folder.mkdir(parents=True)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map = {}
    for name, weight in tqdm(shapes.items(), desc="making the checkpoint"):
        shards[-1][name] = torch.randn(weight.shape, dtype=torch.bfloat16).mul_(0.02)
        weight_map[name] = f"model-{len(shards):05d}.safetensors"
        if sum(tensor.nbytes for tensor in shards[-1].values()) > SHARD_BYTES or len(weight_map) == len(shapes):
            save_file(shards[-1], folder / weight_map[name], {"format": "pt"})
            shards[-1].clear()
            shards.append({})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def measure(checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    shards = [str(file) for file in checkpoint.glob("*.safetensors")]
    commands = {
        "read": ["cat", *shards],
        "start": [sys.executable, "-c", START, str(checkpoint), options.device],
        "load": [sys.executable, "-c", START + LOAD, str(checkpoint), options.device],
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            runs[name].append(timed(command))
    seconds = {name: median(run["seconds"] for run in turns) for name, turns in runs.items()}
    loading = seconds["load"] - seconds["start"]
    return {
        "what": f"safetensors, bfloat16, {'tiny widths, ' * (options.size == 'tiny')}{options.layers} layers, to "
        f"{options.device}; against cat of the same files",
        "device": machine.name(options.device),
        "bytes": sum(Path(shard).stat().st_size for shard in shards),
        "read_seconds": seconds["read"],
        "load_seconds": loading,
        "ratio": loading / seconds["read"],
        "peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in runs["load"]),
        "peak_file_backed_bytes": max(run["peak_file_backed_bytes"] for run in runs["load"]),
        "page_cache_dropped": drop_page_cache(),
        "runs": runs,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "command": output.command("load"),
    }
