# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Converts a full-size random 7B of the original's layout, and measures time and memory against a plain copy.

python -m benchmarks convert [--folder SCRATCH] [--rounds 2] [--layers 32]

It needs about 45 GB of disk in SCRATCH and 8 GB of memory (to make the source; the conversion itself takes far less).
Each round copies and converts the same bytes in turn. It drops the page cache first if that is allowed, and measures
the time until the bytes are on the disk (sync).
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from sentencepiece import sentencepiece_model_pb2
from tqdm import tqdm

from benchmarks import machine, output

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens"
RESULT = ROOT / "benchmarks" / "results" / "convert_7b.json"
SHARD_BYTES = 5_000_000_000
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
LLAMA = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "image_aspect_ratio": "pad",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "clip",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="scratch folder (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side (default: 2)")
    parser.add_argument("--layers", type=int, default=32, help="layers of the language model (32: the 7B)")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON to write; must not exist")
    arguments = parser.parse_args()
    output.require_absent(arguments.output, parser)
    scratch = Path(tempfile.mkdtemp(prefix="convert-", dir=arguments.folder))
    try:
        source = make_source(scratch / "source", arguments.layers)
        result = measure(source, scratch, arguments.rounds, arguments.layers)
    finally:
        shutil.rmtree(scratch)
    output.write(result, arguments.output)
    print(json.dumps(result, indent=2))


def make_source(folder: Path, layers: int) -> Path:
    """Writes random bfloat16 weights with the keys and shapes of the real 7B, in .bin shards as the original does."""
    keys = json.loads((GOLDENS / "keys_7b.json").read_text(encoding="utf-8"))
    shapes = {key: shape for key, shape in keys.items() if _layer(key) < layers}
    noise = torch.randn((1 << 22) + 1).mul_(0.02).to(torch.bfloat16)
    folder.mkdir(parents=True)
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    for position, (key, shape) in enumerate(tqdm(shapes.items(), desc="making the source")):
        count = torch.Size(shape).numel()
        shard[key] = noise.repeat(-(-count // len(noise)))[:count].reshape(shape).clone()
        full = sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES
        if full or position == len(shapes) - 1:
            torch.save(shard, folder / f"shard-{len(shards)}.bin")
            shards.append(list(shard))
            shard = {}
    weight_map = {}
    for index, names in enumerate(shards):
        name = f"pytorch_model-{index + 1:05d}-of-{len(shards):05d}.bin"
        (folder / f"shard-{index}.bin").rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": layers}))
    _write_tokenizer(folder)
    (folder / "clip").mkdir()
    (folder / "clip" / "config.json").write_text(json.dumps(CLIP))
    shutil.copy(GOLDENS / "clip" / "preprocessor_config.json", folder / "clip")
    return folder


def _layer(key: str) -> int:
    return int(key.split(".")[2]) if key.startswith("model.layers.") else -1


def _write_tokenizer(folder: Path) -> None:
    """Writes the golden tokenizer, extended to the 32000 pieces of the real one, so that `<image>` is a new row."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((GOLDENS / "original" / "tokenizer.model").read_bytes())
    for index in range(len(model.pieces), LLAMA["vocab_size"]):
        model.pieces.add(piece=f"▁filler{index}", score=-index)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    shutil.copy(GOLDENS / "original" / "tokenizer_config.json", folder)


def measure(source: Path, scratch: Path, rounds: int, layers: int) -> dict:
    size = sum(file.stat().st_size for file in source.glob("*.bin"))
    copies, conversions = [], []
    for _ in range(rounds):
        target = scratch / "copy"
        target.mkdir()
        copies.append(timed(["cp", *map(str, source.glob("*.bin")), str(target)]))
        shutil.rmtree(target)
        target = scratch / "converted"
        conversions.append(timed([sys.executable, "-m", "conversion", str(source), str(target)]))
        written = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
        shutil.rmtree(target)
    copy, conversion = (median(run["seconds"] for run in runs) for runs in (copies, conversions))
    return {
        "what": f"full fine-tune in .bin shards, bfloat16, {layers} layers, to safetensors; against cp of the same "
        "shards",
        "source_bytes": size,
        "bytes_written": written,
        "copy_seconds": copy,
        "conversion_seconds": conversion,
        "ratio": conversion / copy,
        "peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in conversions),
        "peak_file_backed_bytes": max(run["peak_file_backed_bytes"] for run in conversions),
        "runs": {"copy": copies, "conversion": conversions},
        "page_cache_dropped": drop_page_cache(),
        "machine": {"processor": machine.name("cpu"), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": output.command("convert"),
    }


def timed(command: list[str]) -> dict:
    """Runs a command; returns the seconds until all is on the disk, and the peak memory by kind."""
    drop_page_cache()
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    anonymous = file_backed = 0
    while process.poll() is None:
        memory = _memory(process.pid)
        anonymous = max(anonymous, memory.get("RssAnon", 0))
        file_backed = max(file_backed, memory.get("RssFile", 0))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    os.sync()
    return {
        "seconds": time.perf_counter() - start,
        "peak_anonymous_bytes": anonymous,
        "peak_file_backed_bytes": file_backed,
    }


def _memory(process: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}


def drop_page_cache() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True
