# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Turns a run of the original LLaVA-STF trainer into a Hub folder of transformers, and back.

python -m conversion SOURCE DESTINATION                        a full fine-tune
python -m conversion SOURCE DESTINATION --base VICUNA          a stage-1 projector or a LoRA run (merged)
python -m conversion SOURCE DESTINATION --init-fusion          a plain LLaVA-1.5 or Vicuna, to begin a training
python -m conversion OURS DESTINATION --to-original --vision-tower CLIP
python -m conversion quantise OURS DESTINATION --scheme int8   8 or 4 bit for the language model (quantise --help)

SOURCE is a folder or a Hub id; its files say which kind it is. DESTINATION appears complete or not at all.
"""

import argparse
import inspect
import sys

import torch

from modeling_llava_stf._memory import full_gpu

from . import ConversionError, convert, convert_back
from .quantise import SCHEMES, quantise

WAY_BACK = inspect.signature(convert_back).parameters
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LESS_MEMORY = (
    "Nothing was written. int8, int8-dynamic and fp8 need no GPU; with CUDA_VISIBLE_DEVICES= (empty) nf4 needs none."
)


def main() -> int:
    try:
        return _quantise(sys.argv[2:]) if sys.argv[1:2] == ["quantise"] else _convert()
    except (ConversionError, OSError) as error:
        return _refused(str(error))
    except RuntimeError as error:
        return _refused(full_gpu(error, LESS_MEMORY))
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def _refused(reason: str) -> int:
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _convert() -> int:
    parser = _parser()
    arguments = vars(parser.parse_args())
    if arguments["dtype"] is not None:
        arguments["dtype"] = DTYPES[arguments["dtype"]]
    way_back = arguments.pop("to_original")
    if way_back:
        for name in [name for name in arguments if name not in WAY_BACK]:
            if arguments.pop(name) != parser.get_default(name):
                parser.error(f"--to-original does not go with --{name.replace('_', '-')}")
    folder = (convert_back if way_back else convert)(**arguments)
    if not arguments["dry_run"]:
        print(f"wrote {folder}")
    return 0


def _quantise(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m conversion quantise",
        description="Quantises the language model; vision tower, fusion modules and head stay in 16 bit.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of one of our checkpoints")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to write; must not exist, or be empty")
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument("--revision", help="branch, tag or commit of SOURCE, if that is a Hub id")
    parser.add_argument("--subfolder", help="folder of a Hub id that holds several checkpoints")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of SOURCE, for the card (default: its card's)")
    print(f"wrote {quantise(**vars(parser.parse_args(words)))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to write; must not exist, or be empty")

    source = parser.add_argument_group("source")
    source.add_argument("--base", metavar="NAME", help="language model of a stage-1 projector or a LoRA run")
    source.add_argument("--vision-tower", metavar="NAME", help="CLIP model (default: the one that the config names)")
    source.add_argument("--tokenizer", metavar="NAME", help="tokenizer (default: the source's, else the base's)")
    source.add_argument("--revision", help="branch, tag or commit of SOURCE, if that is a Hub id")
    source.add_argument("--base-revision", metavar="REVISION", help="commit of --base (default: the adapter's)")
    source.add_argument("--vision-tower-revision", metavar="REVISION", help="commit of the CLIP model")
    source.add_argument("--tokenizer-revision", metavar="REVISION", help="commit of --tokenizer")
    source.add_argument("--subfolder", help="folder of a Hub id that holds several runs")
    source.add_argument("--init-fusion", action="store_true", help="SOURCE has no fusion weights: make new ones")
    source.add_argument(
        "--taps",
        type=int,
        nargs="+",
        metavar="N",
        help="blocks of the tower that new fusion weights combine, in this order",
    )
    source.add_argument("--seed", type=int, default=0, help="seed of the new fusion weights (default: 0)")

    target = parser.add_argument_group("target")
    target.add_argument("--keep-adapter", action="store_true", help="keep a LoRA run as a PEFT adapter beside its base")
    target.add_argument("--keep-full-tower", action="store_true", help="keep the tower's layers that are never used")
    target.add_argument("--dtype", choices=DTYPES, help="dtype of all weights (default: each weight's own)")
    target.add_argument("--pad-vocabulary", type=int, default=1, metavar="N", help="pad it to a multiple of N")
    target.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="size of a file (default: 5GB)")
    target.add_argument("--to-original", action="store_true", help="SOURCE is ours: write the original's layout")

    check = parser.add_argument_group("check")
    check.add_argument("--dry-run", action="store_true", help="print the key table and the sizes; write nothing")
    check.add_argument("--verify", action="store_true", help="read the result again and compare checksums")
    check.add_argument("--outputs", metavar="FILE", help="recorded outputs or goldens.safetensors: compare logits, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
