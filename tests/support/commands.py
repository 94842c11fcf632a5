"""Commands of this repository without a new process for each: importing its libraries takes longer than they run."""

import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
from commands import here
module, commands = json.loads(sys.argv[1])
results = [here(module, *words) for words in commands]
print(json.dumps([(result.args, result.returncode, result.stdout, result.stderr) for result in results]))
"""


def here(module: str, *words) -> subprocess.CompletedProcess:
    """Runs `python -m MODULE WORDS` in this process; output and errors are captured."""
    arguments, output, errors = [*map(str, words)], io.StringIO(), io.StringIO()
    main = importlib.import_module(f"{module}.__main__").main
    with patch.object(sys, "argv", [module, *arguments]), redirect_stdout(output), redirect_stderr(errors):
        try:
            status = main()
        except SystemExit as left:
            status = left.code
    return subprocess.CompletedProcess(arguments, status, output.getvalue(), errors.getvalue())


class Finished:
    """What `start_module` of examples/shapes gives, once it has ended."""

    def __init__(self, status: int):
        self.status = status

    def wait(self, timeout: float | None = None) -> int:
        return self.status


def start_here(module: str, *words, **options) -> Finished:
    """Takes the place of `start_module`."""
    return Finished(here(module, *words).returncode)


def elsewhere(
    module: str, commands: Iterable[Iterable], environment: Mapping[str, str]
) -> list[subprocess.CompletedProcess]:
    """Runs `python -m MODULE` with each of these words, one after another, in one process with this environment."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "tests", "tests/support"))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([module, [[*map(str, words)] for words in commands]])],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert result.returncode == 0, result.stderr
    return [subprocess.CompletedProcess(*values) for values in json.loads(result.stdout.splitlines()[-1])]
