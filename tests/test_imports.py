"""A module imports from the floors below its own only (see CONTRIBUTING.md)."""

import ast
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
