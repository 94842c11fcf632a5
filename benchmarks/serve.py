# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Measures requests per second of LLaVA-STF (144 tokens per picture) and the stock LLaVA (576) in vLLM, offline.

python -m benchmarks serve [--size slice] [--requests 32] [--rounds 3] [--output FILE]

Install vLLM first. Both models run in vLLM's Transformers backend with random weights, in turns, each in its own
process. Each request has a new picture, about 50 tokens of text, and an answer of 16; nothing is cached between
requests. The time includes preparing the pictures, which vLLM does.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from benchmarks import machine, output
from benchmarks.systems import ANSWER, OURS, STOCK, configs
from conversion.tokenizer import load_tokenizer
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFImageProcessor, LlavaSTFProcessor

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "USER: <image>\n" + "a " * 40 + "ASSISTANT:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "slice", "7b"], default="slice", help="default: slice")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device that this vLLM is built for")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the models (default: bfloat16)")
    parser.add_argument("--requests", type=int, default=32, help="requests of a turn (default: 32)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--output", type=Path, help="JSON to write; must not exist")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # one turn, which runs in its own process
    options = parser.parse_args()
    output.require_absent(options.output, parser)
    if options.serve is not None:
        (options.serve / "turn.json").write_text(json.dumps(serve(options)), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_checkpoints(Path(scratch), options)
        turns: dict[str, list[dict[str, Any]]] = {STOCK: [], OURS: []}
        for turn in range(options.rounds):
            for name, folder in folders.items():
                turns[name].append(_in_a_process(folder))
                print(f"round {turn + 1}, {name}: {turns[name][-1]}", flush=True)
    rates = {name: median(turn["requests_per_second"] for turn in runs) for name, runs in turns.items()}
    result = {
        "device": machine.name(options.device),
        "options": {name: str(value) for name, value in vars(options).items() if name not in ("output", "serve")},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "command": output.command("serve"),
        "turns": turns,
        "ratio": rates[OURS] / rates[STOCK],
    }
    if options.output is not None:
        output.write(result, options.output)
    print(json.dumps(result, indent=2))


def _in_a_process(folder: Path) -> dict[str, Any]:
    """Runs one turn in its own process, because an engine cannot be restarted in the same process."""
    subprocess.run([sys.executable, "-m", "benchmarks", "serve", *sys.argv[1:], "--serve", str(folder)], check=True)
    return json.loads((folder / "turn.json").read_text(encoding="utf-8"))


def make_checkpoints(scratch: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Writes the folders of both models with random weights, as vLLM reads them."""
    tokenizer = load_tokenizer(ROOT / "tests" / "goldens" / "tokenizer_legacy_false", 4096)
    folders = {}
    for name, kind, config in zip(
        (STOCK, OURS),
        (LlavaForConditionalGeneration, LlavaSTFForConditionalGeneration),
        configs(options.size),
        strict=True,
    ):
        config.image_token_id = tokenizer.image_token_id
        config.text_config.vocab_size = max(config.text_config.vocab_size, len(tokenizer))
        side = config.vision_config.image_size
        sizes: dict[str, Any] = {
            "image_processor": LlavaSTFImageProcessor(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}
            ),
            "tokenizer": tokenizer,
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": "default",
        }
        if name == OURS:
            processor: Any = LlavaSTFProcessor(**sizes, fusion_window=config.fusion_window)
        else:
            processor = LlavaProcessor(**sizes, num_additional_image_tokens=1)
        folders[name] = scratch / name
        kind(config).to(getattr(torch, options.dtype)).save_pretrained(folders[name])
        processor.save_pretrained(folders[name])
    return folders


def serve(options: argparse.Namespace) -> dict[str, Any]:
    """Answers all requests at once, after a few for warm-up."""
    import vllm

    engine = vllm.LLM(
        str(options.serve),
        trust_remote_code=True,
        model_impl="transformers",
        dtype=options.dtype,
        max_model_len=1024,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        enforce_eager=options.device == "cpu",
    )
    # The tokenizer knows few of the model's ids, so answers are not decoded.
    sampling = vllm.SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
    random = np.random.default_rng(0)

    def requests(number: int) -> list[dict[str, Any]]:
        pictures = random.integers(0, 256, (number, 336, 336, 3), dtype=np.uint8)
        return [{"prompt": PROMPT, "multi_modal_data": {"image": Image.fromarray(picture)}} for picture in pictures]

    engine.generate(requests(4), sampling)
    batch = requests(options.requests)
    outputs: list[Any] = []
    seconds = machine.seconds(options.device, lambda: outputs.extend(engine.generate(batch, sampling)))
    if any(len(output.outputs[0].token_ids) != ANSWER for output in outputs):
        raise SystemExit(f"error: an answer has other than {ANSWER} tokens")
    return {
        "requests_per_second": options.requests / seconds,
        "prompt_tokens": len(outputs[0].prompt_token_ids),
        "seconds": seconds,
        "vllm": vllm.__version__,
    }
