# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Quantises a checkpoint's language model to the format that vLLM serves (compressed-tensors), with llm-compressor.

make quantise-vllm                       makes .venv-quantise, because llm-compressor pins an older transformers
PYTHONPATH=. .venv-quantise/bin/python examples/quantise_vllm.py examples/shapes/model OUT --scheme W8A8

OUT becomes a complete Hub folder, or is not written. Vision tower, fusion modules and head stay in 16 bit (float32
becomes bfloat16). The three schemes need no calibration data: FP8_DYNAMIC (8-bit floats), W8A8 (8-bit integers), W4A16
(4-bit weights).
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

from conversion import ConversionError
from conversion.checkpoints.folders import complete_or_absent, require_empty, save_checkpoint
from conversion.config import read_our_config
from conversion.locate import commit_of, fetch
from conversion.quantise import finish, named_by, read_whole, require_multiples, require_read
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf.modeling_llava_stf import NOT_QUANTISED_PATTERNS

SCHEMES = ("FP8_DYNAMIC", "W8A8", "W4A16")
GROUP = 128  # weights that share a scale in W4A16


def quantise_vllm(
    source: str, destination: str, scheme: str, revision: str | None = None, base_model: str | None = None
) -> Path:
    """Writes the folder; raises a `ConversionError` before any work if source or widths do not allow the scheme."""
    target = require_empty(destination)
    folder = fetch(source, revision, also=("*.jinja", "README.md"))
    config = read_our_config(folder)
    if scheme == "W4A16":
        require_multiples(scheme, config.text_config, GROUP, 1, "Choose W8A8 or FP8_DYNAMIC.")
    read_whole(folder, config)
    dtype = torch.bfloat16 if config.dtype is torch.float32 else "auto"
    model, found = LlavaSTFForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    require_read(folder, found)
    model.eval()
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=NOT_QUANTISED_PATTERNS)
    oneshot(model=model, processor=LlavaSTFProcessor.from_pretrained(folder), recipe=recipe)
    base = base_model or named_by(source, folder)
    command = f"python examples/quantise_vllm.py {base or 'SOURCE'} OUT --scheme {scheme}"
    facts = {"base_model": base, "base_revision": commit_of(folder), "scheme": scheme, "command": command}
    facts["versions"] = {name: version(name) for name in ("torch", "transformers", "llmcompressor")}
    with complete_or_absent(target) as unfinished:
        save_checkpoint(unfinished, model, folder)
        (unfinished / "recipe.yaml").unlink()  # llm-compressor's own; here this name is a training's recipe
        finish(unfinished, folder, target.name, facts)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of one of our checkpoints")
    parser.add_argument("destination", metavar="OUT", help="folder to write; must not exist, or be empty")
    parser.add_argument("--scheme", choices=SCHEMES, required=True, help="format of the weights")
    parser.add_argument("--revision", help="branch, tag or commit of SOURCE, if that is a Hub id")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of SOURCE, for the card (default: its card's)")
    try:
        print(f"wrote {quantise_vllm(**vars(parser.parse_args()))}")
    except (ConversionError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
