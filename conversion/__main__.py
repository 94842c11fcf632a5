# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""python -m conversion SOURCE DESTINATION: a run of the original trainer becomes a Hub folder."""

import argparse
import sys

from . import ConversionError, convert


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conversion", description=__doc__)
    parser.add_argument("source", help="folder of a full fine-tune, a stage-1 projector or a LoRA run")
    parser.add_argument("destination", help="folder to write; must not exist, or be empty")
    parser.add_argument("--base", help="folder of the language model of a stage-1 projector or a LoRA run")
    parser.add_argument("--vision-tower", help="folder of the CLIP model (default: the one the source's config names)")
    parser.add_argument("--tokenizer", help="folder of the tokenizer (default: the source's, else the base's)")
    parser.add_argument(
        "--keep-full-tower", action="store_true", help="keep the tower's layers behind the last tap, which never run"
    )
    arguments = parser.parse_args()
    try:
        print(f"wrote {convert(**vars(arguments))}")
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
