"""A module imports from the floors below its own only (see CONTRIBUTING.md)."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "modeling_llava_stf": set(),
    "conversion": {"modeling_llava_stf"},
    "training": {"modeling_llava_stf", "conversion"},
    "hub_card": {"modeling_llava_stf", "conversion"},
    "benchmarks": {"modeling_llava_stf", "conversion", "training", "hub_card"},
    "examples": {"modeling_llava_stf", "conversion", "training", "hub_card"},
}
HOUSE = {*BELOW, "tests"}


def imported(source):
    """The packages of this repository that a module imports, also inside of functions."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names} & HOUSE


@pytest.mark.parametrize("package", BELOW)
def test_imports_follow_the_floors(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        str(file.relative_to(ROOT)): imported(file.read_text("utf-8")) - BELOW[package] - {package} for file in files
    }
    assert not {name: packages for name, packages in wrong.items() if packages}


def test_every_form_of_an_import_is_seen():
    for line in (
        "import training",
        "import training.rows as rows",
        "from training import rows",
        "from training.x import y",
    ):
        assert imported(f"def function():\n    {line}") == {"training"}
    assert imported("from . import training") == imported("import json, trainings") == set()


DISTRIBUTIONS = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}
CHECKED_BEFORE_USE = {"lmms_eval"}  # its command imports this module, and nothing else does


def imported_at_once(source):
    """What an import of the module takes: imports outside of functions and of `try`."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names


@pytest.mark.parametrize("file", sorted((ROOT / "modeling_llava_stf").glob("*.py")), ids=lambda file: file.name)
def test_the_wheel_asks_for_what_it_imports(file):
    """What another package happens to bring may be gone in its next version, as httpx was in huggingface-hub 2."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    declared = {re.match(r"[\w-]+", line)[0] for line in lines}
    imports = imported_at_once(file.read_text("utf-8")) - CHECKED_BEFORE_USE
    assert {DISTRIBUTIONS.get(name, name) for name in imports} <= declared
