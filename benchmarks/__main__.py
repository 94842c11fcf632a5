# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Measures LLaVA-STF beside the stock LLaVA; `benchmarks/README.md` says what each command measures.

python -m benchmarks NAME [OPTIONS]
python -m benchmarks NAME --help
"""

import argparse
import importlib
import sys

COMMANDS = ("run", "count", "train", "convert", "load", "serve", "hotspots", "report", "gate", "gpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=COMMANDS)
    name = parser.parse_args(sys.argv[1:2]).name
    sys.argv = [f"python -m benchmarks {name}", *sys.argv[2:]]
    try:
        importlib.import_module(f"benchmarks.{name}").main()
    except SystemExit as end:
        if not str(end.code).startswith("error: "):
            raise
        print(end.code, file=sys.stderr)
        raise SystemExit(2) from end


if __name__ == "__main__":
    main()
