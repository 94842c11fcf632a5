"""The table of what fewer vision tokens cost: its rows, its intervals, and that it continues."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import LlavaConfig

from examples.shapes.generate import generate
from examples.shapes.tokens import System, _check_counts, compare, difference, table

MODEL = str(Path(__file__).parents[2] / "examples" / "shapes" / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("tokens") / "data", scenes=1, test_scenes=2, seed=3)


def row(right, name="row", seconds=None):
    timed = {} if seconds is None else {"first_token_seconds": seconds}
    return {"name": name, "right": right, "vision_tokens": 4, "trained": True, "budget": None, "family": name} | timed


# Two about each of 8 pictures.
QUESTIONS = {f"test-{number:06}-{kind}": kind for number in range(8) for kind in ("count", "name")}


def test_differences_are_paired_and_pictures_are_the_sample():
    reference = row("1111" * 4)
    assert difference(reference, reference, QUESTIONS) == (0, 0)
    mean, half = difference(row("1110" * 4), reference, QUESTIONS)
    assert mean == -25
    # Of 8 pictures 4 differ by -1 of 2 questions: the sum of squares is 8 * 0.5**2.
    assert half == pytest.approx(196 * (8 * 0.5**2) ** 0.5 / 16)
    both_of_a_picture, one_of_each = row("1100" * 4), row("1010" * 4)
    assert difference(both_of_a_picture, reference, QUESTIONS)[1] > 0
    assert difference(one_of_each, reference, QUESTIONS)[1] == 0


def test_the_table_has_kinds_intervals_and_times():
    rows = [row("1111" * 4, "all", [0.02]), row("1110" * 4, "few", [0.01])]
    lines = table({"rows": rows, "questions": QUESTIONS}).splitlines()
    assert lines[0] == "| system | vision tokens | all | against all tokens | count | name | first token, ms |"
    assert lines[2] == "| all | 4 | 100.0 |  | 100 | 100 | 20.0 |"
    assert lines[3].startswith("| few | 4 | 75.0 | -25.0 ± ") and lines[3].endswith(" | 100 | 50 | 10.0 |")


def test_every_system_is_asked_once_and_a_stopped_run_continues(data, tmp_path, monkeypatch):
    arguments = {"models": [f"STF={MODEL}", f"at four={MODEL}@4"], "keep": [8], "scores": ["salience"], "questions": 4}
    out = compare(tmp_path / "out", data, **arguments, timed=1)
    results = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert {name: row["vision_tokens"] for name, row in rows.items() if row["budget"] != "suggested"}.items() >= {
        "STF": 16,
        "budget 4": 4,
        "budget 1": 1,
        "salience 8": 8,
        "salience 8, compact": 8,
        "at four": 4,
    }.items()
    assert {"suggested budgets", "adaptive"} < set(rows)
    assert all(len(row["right"]) == 4 and len(row["first_token_seconds"]) == 1 for row in rows.values())
    assert Image.open(out / "results.png").width > 1000
    monkeypatch.setattr("examples.shapes.tokens._row", None)  # no row is asked for again
    compare(out, data, **arguments)
    again = json.loads((out / "results.json").read_text())
    assert again["rows"] == results["rows"]
    with pytest.raises(ValueError, match="has other questions or another model"):
        compare(out, data, **arguments | {"questions": 3})
    # Times stay with the rows that they were measured with.
    monkeypatch.undo()
    (out / "rows" / "at-four.json").unlink()
    compare(out, data, **arguments)
    assert not any("first_token_seconds" in row for row in json.loads((out / "results.json").read_text())["rows"])


def test_models_that_are_refused(data, tmp_path):
    for models, message in (
        (["nowhere"], "nowhere names no folder"),
        ([MODEL, MODEL], "Several models have the name model"),
        ([MODEL, f"five={MODEL}@5"], r"cannot have 5 tokens in this model, expected one of \[16, 4, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(tmp_path / "out", data, models)
    for models, message in (
        ([f"{MODEL}@4"], "is the first model, .* leave out @4"),
        ([MODEL, f"budget 4={MODEL}"], "The rows 'budget 4' and 'budget 4' would be one file, budget-4.json"),
        ([MODEL, f"a b={MODEL}@4", f"A-B={MODEL}@1"], "The rows 'a b' and 'A-B' would be one file, a-b.json"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(tmp_path / "out", data, models)
    with pytest.raises(ValueError, match=r"--keep is 3, but pool averages to one of \[4, 1\]"):
        compare(tmp_path / "out", data, [MODEL], keep=[3], scores=["pool"])
    for keep in (0, 17):
        with pytest.raises(ValueError, match=f"--keep is {keep}, expected 1 to 16"):
            compare(tmp_path / "out", data, [MODEL], keep=[8, keep])
    assert not (tmp_path / "out").exists()


def test_a_stock_model_has_no_budgets():
    config = LlavaConfig(image_seq_length=64)
    _check_counts(System("stock", "folder"), config)
    with pytest.raises(ValueError, match=r"folder@4: a picture cannot have 4 tokens .* of \[64\]"):
        _check_counts(System("stock", "folder", 4), config)
