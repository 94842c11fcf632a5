"""The report of the ablation: its numbers by hand, from raw results."""

import json
import math
import statistics

import pytest
from matplotlib.figure import Figure
from PIL import Image

from examples.shapes import ablation
from examples.shapes.ablation_report import (
    STUDENT,
    Difference,
    Questions,
    _draw_tokens,
    accuracy,
    budgets,
    curve,
    difference,
    questions_of,
    report,
    table,
)
from examples.shapes.ablation_report import Results as Raw
from examples.shapes.connectors import REFERENCE

# Two pictures; in the mean over the kinds a "count" weighs half of a "where".
ROWS = [("test-000000-count", "count"), ("test-000000-where", "where"), ("test-000001-count", "count")]
QUESTIONS = Questions(*zip(*ROWS, strict=True))


def run(system, seed, right, equal="rows", **changes):
    return {
        "system": system,
        "seed": seed,
        "equal": equal,
        "parameters": 100,
        "seconds": {"stage1": 10.0, "stage2": 20.0 + seed},
        "curve": [{"share": 0.5, "seconds": 5.0, "right": "00"}, {"share": 0.75, "seconds": 7.0, "right": "10"}],
        "asked": {system: {"tokens": 16, "seconds": 3.0, "right": right}},
    } | changes


def folder_of(tmp_path, runs):
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    for index, one in enumerate(runs):
        (tmp_path / "out" / "runs" / f"{index}.json").write_text(json.dumps(one))
    truth = [{"id": "test-000000-caption", "kind": "caption", "group": "seen"}]
    truth += [{"id": name, "kind": kind, "group": "seen"} for name, kind in ROWS]
    (tmp_path / "data" / "truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in truth))
    return tmp_path / "out", tmp_path / "data"


def test_every_kind_counts_the_same():
    weights = QUESTIONS.weights(["count", "where"])
    assert weights == [25.0, 50.0, 25.0]
    assert accuracy("110", weights) == 75.0
    assert QUESTIONS.weights(["where"]) == [0.0, 100.0, 0.0]


def test_differences_are_paired_by_seed_and_have_student_s_interval():
    ours, theirs = {0: "111", 1: "110", 2: "111"}, {0: "110", 1: "100", 2: "011", 9: "000"}
    found = difference(ours, theirs, [25.0, 50.0, 25.0], QUESTIONS.pictures)
    by_seed = [25.0, 50.0, 25.0]  # 100 - 75, 75 - 25, 100 - 75
    assert found.mean == pytest.approx(statistics.mean(by_seed))
    pictures = [(0 + 50 + 25) / 3, (25 + 0 + 0) / 3]  # each one's part of the mean
    over_seeds, over_pictures = statistics.variance(by_seed) / 3, 2 * statistics.variance(pictures)
    assert found.half == pytest.approx(4.303 * math.sqrt(over_seeds + over_pictures))
    unpaired = statistics.variance([100, 75, 100]) + statistics.variance([75, 25, 75])
    assert found.half != pytest.approx(4.303 * math.sqrt(unpaired / 3 + over_pictures))


def test_equal_marks_are_no_difference_and_one_seed_has_no_interval():
    weights, pictures = QUESTIONS.weights(["count", "where"]), QUESTIONS.pictures
    same = difference({0: "101", 1: "010"}, {0: "101", 1: "010"}, weights, pictures)
    assert (same.mean, same.half) == (0, 0)
    assert difference({0: "111"}, {0: "011"}, weights, pictures) == Difference(25.0, None)
    assert difference({0: "111"}, {1: "011"}, weights, pictures) is None


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (2.0, 1.5, "+2.0 ± 1.5"),
        (-2.0, 1.5, "-2.0 ± 1.5"),
        (2.0, 2.5, "+2.0 ± 2.5, not distinguishable"),
        (-2.0, 2.0, "-2.0 ± 2.0, not distinguishable"),
        (0.0, 0.0, "+0.0 ± 0.0, not distinguishable"),
        (4.0, None, "+4.0 (one seed)"),
    ],
)
def test_an_interval_that_holds_zero_is_said_to(mean, half, text):
    assert str(Difference(mean, half)) == text


def test_the_quantiles_are_student_s():
    # P(|t| < q) by Simpson's rule over the density.
    for freedom, quantile in enumerate(STUDENT, start=1):
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        steps, heights = 2000, []
        for step in range(steps + 1):
            x = quantile * step / steps
            heights.append(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2))
        area = quantile / steps / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
        assert 2 * area == pytest.approx(0.95, abs=1e-4), freedom


def test_the_table_has_a_row_for_each_way_of_asking(tmp_path):
    reduced = {"STF": {"tokens": 16, "seconds": 3.0, "right": "111"}}
    reduced |= {"STF, salience 4": {"tokens": 4.5, "seconds": 1.0, "right": "100"}}
    runs = [run("LLaVA-1.5", seed, "100") for seed in (0, 1)]
    runs += [run("STF", seed, "", asked=reduced) for seed in (0, 1)]
    runs += [run("STF", 0, "", "time", asked=reduced | {"STF": reduced["STF"] | {"right": "110"}})]
    out, data = folder_of(tmp_path, runs)
    report(out, data, 9)
    whole, between = (out / "results.md").read_text().split("\n\n")
    header, _, *rows = (line.split(" | ") for line in whole.splitlines())
    assert header[:8] == ["| system", "tokens", "parameters", "seeds", "all", "against LLaVA-1.5", "count", "where"]
    assert header[8:12] == ["last quarter", "training, s", "answering, s", "equal time: all"]
    llava, stf, fewer = (dict(zip(header[:-1], row[:-1], strict=True)) for row in rows)
    assert [row["| system"] for row in (llava, stf, fewer)] == ["| LLaVA-1.5", "| STF", "| STF, salience 4"]
    assert (llava["all"], llava["against LLaVA-1.5"], llava["count"], llava["where"]) == ("25.0", "", "50", "0")
    # The two seeds agree; the pictures' parts of the difference are 50 and 25.
    assert stf["all"] == "100.0"
    assert (
        stf["against LLaVA-1.5"]
        == f"+75.0 ± {12.706 * math.sqrt(2 * statistics.variance([50, 25])):.1f}, not distinguishable"
    )
    assert (stf["training, s"], stf["equal time: all"], stf["seeds"]) == ("30", "75.0", "2")
    assert (fewer["tokens"], fewer["last quarter"], fewer["answering, s"]) == ("4.5", "", "1")
    assert between.splitlines() == [
        "| points above | LLaVA-1.5 | STF |",
        "| --- | --: | --: |",
        f"| LLaVA-1.5 |  | {stf['against LLaVA-1.5'].replace('+', '-')} |",
        f"| STF | {stf['against LLaVA-1.5']} |  |",
    ]
    assert Image.open(out / "results.png").width > 500
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 5


def test_the_elastic_model_is_compared_at_each_budget_with_what_has_as_many_tokens():
    def asked(**marks):
        return {row: {"tokens": tokens, "seconds": 1.0, "right": right} for row, (tokens, right) in marks.items()}

    elastic = {"elastic MBTF + STF": (16, "111"), "elastic MBTF + STF at 4": (4, "110")}
    elastic |= {
        "elastic MBTF + STF, film in 4 clusters": (4, "000"),
        "elastic MBTF + STF, film at 4 a frame": (16, "0" * 3),
    }
    systems = {"LLaVA-1.5": {"LLaVA-1.5": (64, "111"), "LLaVA-1.5, pool 4": (4, "100")}}
    systems |= {"elastic MBTF + STF": elastic, "MBTF + STF for 4": {"MBTF + STF for 4": (4, "111")}}
    runs = [run(name, seed, "", asked=asked(**rows)) for name, rows in systems.items() for seed in (0, 1)]
    between = f"± {12.706 * math.sqrt(2 * statistics.variance([50, 0])):.1f}, not distinguishable"
    assert budgets(Raw(QUESTIONS, runs)).splitlines()[2:] == [
        f"| 4 | elastic MBTF + STF at 4 | 75.0 | LLaVA-1.5, pool 4 | 25.0 | +50.0 {between} |",
        "| 4 | elastic MBTF + STF at 4 | 75.0 | MBTF + STF for 4 | 100.0 | -25.0 "
        f"± {12.706 * math.sqrt(2 * statistics.variance([0, 25])):.1f}, not distinguishable |",
    ]
    assert budgets(Raw(QUESTIONS, runs[:2])) == ""


def test_what_the_tower_was_not_told_is_reported_apart():
    questions = Questions(("test-000000-where", "test-000000-arrow", "test-000001-arrow"), ("where", "arrow", "arrow"))
    runs = [run("LLaVA-1.5", seed, "100", curve=[]) for seed in (0, 1)]
    runs += [run("STF", seed, right, curve=[]) for seed, right in ((0, "110"), (1, "101"))]
    header, _, llava, stf = (line.split(" | ") for line in table(Raw(questions, runs)).splitlines())
    assert header[4:10] == ["all", "against LLaVA-1.5", "untold", "against LLaVA-1.5", "where", "arrow"]
    assert llava[4:10] == ["100.0", "", "0.0", "", "100", "0"]
    assert stf[4:10] == ["100.0", "+0.0 ± 0.0, not distinguishable", "50.0", "+50.0 ± 0.0", "100", "50"]


def test_every_system_has_a_full_point_and_what_it_was_not_trained_for_a_hollow_one():
    asked = {"STF": {"tokens": 16, "right": "111"}, "STF, pool 4": {"tokens": 4, "right": "100"}}
    axes = Figure().subplots()
    _draw_tokens(Raw(QUESTIONS, [run("STF", 0, "", asked=asked), run("QueCC", 0, "111")]), axes)
    points = [(*line.get_xydata().tolist(), line.get_fillstyle()) for line in axes.lines]
    assert [point for point in points if len(point) > 1] == [
        ([16, 100], "full"),
        ([4, 25], "none"),
        ([16, 100], "full"),
    ]
    assert {"STF", "QueCC"} <= set(axes.get_legend_handles_labels()[1])


def test_a_curve_ends_with_the_test_on_the_same_questions():
    # Of the pictures 0 and 1 only the first is in the curve.
    found = curve(Raw(QUESTIONS, [run("STF", 0, "110"), run("STF", 1, "011")]), "STF")
    assert found == [(0.5, 0.0), (0.75, 50.0), (1.0, 75.0)]


def test_the_test_has_the_first_questions_of_each_kind_in_each_group(tmp_path):
    rows = [(0, "caption", "seen"), (0, "count", "seen"), (0, "where", "seen"), (1, "count", "unseen pair")]
    rows += [(2, "count", "seen"), (3, "where", "seen"), (4, "count", "seen")]
    names = ("id", "kind", "group")
    (tmp_path / "truth.jsonl").write_text(
        "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    )
    assert [row["id"] for row in questions_of(tmp_path, 1)] == [0, 0, 1]
    assert [row["id"] for row in questions_of(tmp_path, 2)] == [0, 0, 1, 2, 3]
    assert len(questions_of(tmp_path, 9)) == 6


def test_marks_of_other_questions_are_refused(tmp_path):
    out, data = folder_of(tmp_path, [run("LLaVA-1.5", 0, "10")])
    with pytest.raises(ValueError, match="has marks of 2 questions, but .* has 3 for the test"):
        report(out, data, 9)


@pytest.mark.parametrize("changed", ["captions", "rows", "questions", "start"])
def test_a_system_joins_only_results_of_the_same_settings(changed, tmp_path, monkeypatch):
    """The table has all results of the folder, those of other systems, too."""
    monkeypatch.setattr(ablation, "start_module", lambda *_, **__: pytest.fail("A run was started."))
    (tmp_path / "work" / "start").mkdir(parents=True)
    (tmp_path / "work" / "start" / "model.safetensors").write_bytes(b"weights")
    settings = {"captions": 32, "rows": 64, "questions": 9}
    found = {"equal": "rows", "start": ablation._digest(tmp_path / "work" / "start" / "model.safetensors"), **settings}
    file = tmp_path / "out" / "runs" / ablation.Run(REFERENCE, seed=0, **settings).file
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(found | {changed: "another"}))
    with pytest.raises(ValueError, match=f"has {changed} another, expected .*: name another folder, or remove it"):
        ablation.ablate(tmp_path / "work", tmp_path / "out", systems=["STF"], **settings)


def test_a_run_on_other_data_is_not_mixed_in(tmp_path, monkeypatch):
    """Marks stand in the order of the questions, so those of other questions would be read as theirs."""
    monkeypatch.setattr(ablation, "start_module", lambda *_, **__: pytest.fail("A run was started."))
    work, out = tmp_path / "work", tmp_path / "out"
    for name in ("start/model.safetensors", "data/captions.json", "data/dialogues.json", "data/test.json"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(b"here")
    settings = {"captions": 32, "rows": 64, "questions": 9}
    found = {"equal": "rows", "start": ablation._digest(work / "start" / "model.safetensors"), **settings}
    (out / "runs").mkdir(parents=True)
    file = out / "runs" / ablation.Run(REFERENCE, seed=0, **settings).file
    file.write_text(json.dumps(found | {"data": "another"}))
    with pytest.raises(ValueError, match="has data another, expected .*: name another folder, or remove it"):
        ablation.ablate(work, out, systems=["STF"], **settings)
    monkeypatch.setattr(ablation, "report", lambda *_: out)
    for known in ({"data": ablation._digest_of(work / "data")}, {}):  # the first results have none
        file.write_text(json.dumps(found | known))
        assert ablation.ablate(work, out, seeds=1, systems=[REFERENCE], **settings) == out
