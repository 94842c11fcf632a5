"""The harness: what it compares, what it writes, and what docs/speed.md says of it."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks import convert, gate, gpu, hotspots, load, report, run, serve, workloads
from benchmarks.systems import (
    OURS,
    OURS_COMPILED,
    REFERENCE,
    STOCK,
    STOCK_COMPILED,
    WHOLE,
    System,
    compile_system,
    configs,
    eager_systems,
)
from modeling_llava_stf import LlavaSTFForConditionalGeneration


def as_compiled(system, name, **options):
    """With a cache of fixed length, but not compiled, which takes long; `test_speed.py` compiles."""
    return System(name, system.model, system.vision)


@pytest.fixture
def systems():
    with torch.no_grad():
        systems = eager_systems("tiny", "cpu")
        systems[STOCK_COMPILED] = as_compiled(systems[STOCK], STOCK_COMPILED)
        systems[OURS_COMPILED] = as_compiled(systems[OURS], OURS_COMPILED)
        yield systems


def test_equal_systems_pass_the_gate(systems):
    assert gate.eager(systems, torch.float32)["ours and reference, tokens: equal"] is True
    outcome = gate.compiled(systems)
    assert outcome.keys() == {
        f"{name}{what}: cosine"
        for name in (STOCK_COMPILED, OURS_COMPILED)
        for what in (
            *(" and eager, features", " and eager, logits", " and eager, logits of generate"),
            *(" and eager, logits with 1 tokens kept", ", picture in a cache or not, logits"),
        )
    }
    assert min(outcome.values()) > 0.9999


def other_windows(systems):
    fusion = systems[OURS].model.model.multi_modal_projector.spatial_fusion
    windows = fusion.windows
    fusion.windows = lambda features: windows(features).unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(-2)


def other_taps(systems):
    vision = systems[REFERENCE].vision
    vision.config = type(vision.config)(**vision.config.to_dict() | {"vision_feature_layer": vision.config.taps[::-1]})


@pytest.mark.parametrize("mistake", [other_windows, other_taps])
def test_gate_stops_a_wrong_port(mistake, systems):
    mistake(systems)
    with pytest.raises(SystemExit, match="nothing is timed.*features of one picture: equal': False"):
        gate.eager(systems, torch.float32)


def test_gate_stops_a_compiled_model_that_computes_something_else(systems):
    vision = systems[OURS].vision
    systems[OURS_COMPILED].vision = lambda pixels: [tokens.flip(0) for tokens in vision(pixels)]
    with pytest.raises(SystemExit, match="ours compiled and eager, features: cosine"):
        gate.compiled(systems)


def test_systems_share_their_weights(systems):
    ours, stock = systems[OURS].model, systems[STOCK].model
    assert stock.lm_head.weight is ours.lm_head.weight
    for part in ("language_model", "vision_tower"):
        theirs = dict(getattr(stock.model, part).named_parameters())
        assert all(theirs[name] is weight for name, weight in getattr(ours.model, part).named_parameters())
    assert all(any(w is v for v in ours.parameters()) for w in systems[REFERENCE].tower.parameters())


def test_a_picture_takes_a_quarter_of_the_tokens(systems):
    tokens = {
        name: int((system.prompt(1, 10) == system.model.config.image_token_id).sum())
        for name, system in systems.items()
    }
    assert tokens[STOCK] == 4 * tokens[OURS] == 4 * tokens[REFERENCE]
    assert systems[STOCK].prompt(2, 10).shape == (2, tokens[STOCK] + 10)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A run of the whole harness on a tiny model."""
    monkeypatch.setattr(run, "compile_system", as_compiled)
    out = tmp_path / "run_tiny.json"

    def measure(*options):
        monkeypatch.setattr("sys.argv", ["run", "--size", "tiny", "--rounds", "2", "--output", str(out), *options])
        run.main()

    return measure, out


def test_run_writes_every_time_and_its_conditions(measured, monkeypatch, capsys):
    measure, out = measured
    measure()
    result = json.loads(out.read_text())
    cases = {(case["metric"], case["batch"], case["text"]): case["systems"] for case in result["cases"]}
    assert {metric for metric, _, _ in cases} == set(workloads.METRICS)
    assert set(cases["first token", 1, 50]) == {STOCK, REFERENCE, OURS, STOCK_COMPILED, OURS_COMPILED}
    assert all(len(run["seconds"]) == 2 and min(run["seconds"]) > 0 for case in cases.values() for run in case.values())
    assert result["versions"]["torch"] == torch.__version__ and result["device"] and result["gate"]
    states = {name: memory["hidden_states_bytes"] for name, memory in result["memory"].items()}
    assert states[REFERENCE] > states[OURS]
    assert {file.name for file in out.parent.iterdir()} == {out.name, out.with_suffix(".png").name}
    printed = capsys.readouterr().out
    assert f"[{len(cases)}/{len(cases)}]" in printed and "| first token, batch 1, 50 tokens of text |" in printed
    with Image.open(out.with_suffix(".png")) as plot:
        assert plot.size[0] > 400 and len(plot.convert("RGB").getcolors(1 << 20)) > 3

    monkeypatch.setattr(report, "ROOT", out.parent)
    section = report.section(result, out)
    tables = [part.splitlines() for part in section.split("\n\n") if part.startswith("|")]
    reduced = [case for case in cases.values() if "ours, reduced" in case]
    assert [len(rows) for rows in tables] == [len(cases) - len(reduced) + 2, 2 * len(reduced) + 2]
    assert all(len({row.count("|") for row in rows}) == 1 for rows in tables)
    assert result["device"] in section and "float32" in section and "raw numbers in `run_tiny.json`" in section

    monkeypatch.setattr(report, "RESULTS", out.parent)
    page = report.updated(report.PAGE.read_text(encoding="utf-8"))
    assert section in page and report.updated(page) == page

    before = out.read_text()
    with pytest.raises(SystemExit):
        measure()
    assert "exists" in capsys.readouterr().err and out.read_text() == before


def test_eager_systems_alone(measured, monkeypatch):
    measure, out = measured
    monkeypatch.setattr(run, "compile_system", None)
    measure("--eager", "--metrics", "prefill", "first token by budget")
    result = json.loads(out.read_text())
    assert [case["metric"] for case in result["cases"]] == ["prefill", "prefill", "first token by budget"]
    assert all(set(case["systems"]) == {STOCK, OURS} for case in result["cases"]) and "compiling" not in result
    left = next(line for line in report.notes(result) if line.startswith("- Rows that were not timed:"))
    assert "prefill by budget (1)" in left and "decode (2)" in left and "prefill (" not in left
    assert "first token by budget" not in left


def stopped_at_the_third(monkeypatch):
    """Stops a run at its third row; returns the function that measures one."""
    whole, calls = run.measure, []

    def fails_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(run, "measure", fails_at_the_third)
    return whole


def test_a_run_that_stops_goes_on_where_it_was(measured, monkeypatch, capsys):
    measure, out = measured
    whole = stopped_at_the_third(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        measure("--metrics", "prefill", "decode")
    partial = out.with_suffix(".unfinished")
    assert len(json.loads(partial.read_text())["cases"]) == 2
    assert not out.exists() and str(partial) in capsys.readouterr().out
    monkeypatch.setattr(report, "RESULTS", out.parent)
    assert report.files() == []  # half a result is none

    half = partial.read_text()
    with pytest.raises(SystemExit):
        measure("--metrics", "prefill", "decode", "--rounds", "3")
    assert "measured with rounds 2" in capsys.readouterr().err and partial.read_text() == half

    monkeypatch.setattr(run, "measure", whole)
    measure("--metrics", "prefill", "decode")
    cases = json.loads(out.read_text())["cases"]
    assert all(case in cases for case in json.loads(half)["cases"]) and not partial.exists()
    assert [(case["metric"], case["batch"], case["text"]) for case in cases] == [
        ("prefill", 1, 10),
        ("prefill", 1, 50),
        ("decode", 1, 50),
        ("decode", 2, 50),
    ]


def test_a_system_without_memory_is_said_so(systems):
    def prepare(system):
        if system.name == STOCK:
            raise torch.OutOfMemoryError
        return lambda: None

    case = run.Case("decode", 512, 50, (STOCK, OURS), prepare)
    measured = run.measure(case, systems, workloads.PLANS["tiny"], "cpu")
    assert report.cell(measured["systems"][STOCK]) == "out of memory"
    assert report.ratio(measured["systems"], STOCK, OURS) is None
    assert len(measured["systems"][OURS]["seconds"]) == workloads.PLANS["tiny"].rounds


def test_compiling_is_not_timed(systems):
    def prepare(system):
        torch.compiler.reset()
        sizes = iter(range(3, 9))
        work = torch.compile(lambda numbers: numbers + 1, backend="eager", dynamic=False)
        return lambda: work(torch.ones(next(sizes)))

    case = run.Case("decode", 1, 50, (OURS,), prepare)
    with pytest.raises(RuntimeError, match="ours was compiled again"):
        run.measure(case, systems, workloads.PLANS["tiny"], "cpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["run", "--device", "cuda", "--output", str(tmp_path / "run.json")])
    with pytest.raises(SystemExit):
        run.main()
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("name", [OURS, OURS_COMPILED])
def test_a_second_question_reads_the_picture_from_the_cache(name, systems):
    """A growing cache or one of fixed length; its logits are those of a whole pass."""
    pixels = systems[name].pictures(1)
    whole, tokens = gate.greedy(systems[name], pixels)
    cached, _ = gate.greedy(systems[name], pixels, reuse=True, forced=tokens)
    assert gate.error(cached, whole) < gate.FLOAT32_ERROR


def test_compiled_systems_pass_the_gate_and_answer(systems, monkeypatch):
    """Graphs without kernels, which take longest to make."""
    torch.compiler.reset()
    for eager, name in ((OURS, OURS_COMPILED), (STOCK, STOCK_COMPILED)):
        if eager == STOCK and Version(torch.__version__) < Version("2.12"):
            # torch 2.11 cannot trace the check of a tensor in stock LLaVA (transformers 5.24); torch 2.13 can.
            monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
        systems[name] = compile_system(systems[eager], name, backend="eager")
        answers = [workloads.answer(systems[system], batch=1)() for system in (eager, name)]
        assert torch.equal(*answers)
        logits = [workloads.reduced_first_token(systems[system], 1, "merging")() for system in (eager, name)]
        assert gate.error(*logits) < gate.FLOAT32_ERROR
    gate.compiled(systems)
    torch.compiler.reset()


def test_largest_batch_is_found(systems, monkeypatch):
    def fill(cache, system, batch, tokens):
        if batch > 700:
            raise torch.OutOfMemoryError
        return cache

    monkeypatch.setattr(run, "fill", fill)
    assert 700 - 32 < run.largest_batch(systems[OURS]) <= 700


@pytest.mark.parametrize(
    ("stock", "said"),
    [
        ([2.0, 2.0, 2.0], "**2.00x**"),
        ([0.9, 1.1, 1.3], "1.10x, no gain"),  # within the spread
        ([1.04, 1.04, 1.04], "1.04x, no gain"),
        ([0.8, 0.8, 0.8], "0.80x, slower"),
    ],
)
def test_losses_are_named(stock, said):
    runs = {STOCK: {"seconds": stock}, OURS: {"seconds": [1.0] * 3}}
    assert report.verdict(runs, STOCK, OURS) == said
    case = {"metric": "encode", "batch": 1, "text": None, "systems": runs}
    assert report.is_loss(case) is ("**" not in said)


def test_the_page_says_what_the_results_say():
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.updated(page) == page, "run: python -m benchmarks report"


def test_a_page_without_a_place_for_the_tables_is_refused():
    with pytest.raises(ValueError, match="lacks"):
        report.updated("# A page\n")


def test_hotspots_name_the_operators(monkeypatch, tmp_path, capsys):
    out = tmp_path / "hotspots.json"
    options = ["encode", "--batch", "2", "--size", "tiny", "--output", str(out)]
    monkeypatch.setattr("sys.argv", ["hotspots", *options])
    hotspots.main()
    found = json.loads(out.read_text())
    shares = [spot["share"] for spot in found["hotspots"]]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
    assert "aten::addmm" in [spot["name"] for spot in found["hotspots"][:5]]
    assert found["row"] == {"metric": "encode", "batch": 2, "text": None, "system": OURS}
    assert found["command"] == f"python -m benchmarks hotspots {' '.join(options)}"
    assert f"| {found['hotspots'][0]['name']} |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["hotspots", "prefill", "--size", "tiny", "--system", REFERENCE])
    with pytest.raises(SystemExit, match="no such prefill of reference; it times: none"):
        hotspots.main()


@pytest.mark.parametrize("module", [convert, hotspots, load, serve])
def test_a_result_is_not_overwritten(module, monkeypatch, tmp_path, capsys):
    result = tmp_path / "result.json"
    result.write_text("{}")
    needed = ["encode"] if module is hotspots else []
    monkeypatch.setattr("sys.argv", [module.__name__, *needed, "--output", str(result)])
    with pytest.raises(SystemExit):
        module.main()
    assert "exists" in capsys.readouterr().err and result.read_text() == "{}"


@pytest.mark.parametrize(("module", "layers"), [(convert, 4), (load, 2)])
def test_a_result_says_what_was_measured(module, layers, monkeypatch, tmp_path):
    """A rehearsal with few layers is not taken for the 7B."""

    def timed(command):
        if module is convert:
            Path(command[-1]).mkdir(exist_ok=True)
        return {"seconds": 1.0, "peak_anonymous_bytes": 1, "peak_file_backed_bytes": 1}

    monkeypatch.setattr(module, "timed", timed)
    monkeypatch.setattr(module, "drop_page_cache", lambda: False)
    made = "make_source" if module is convert else "make_checkpoint"
    monkeypatch.setattr(module, made, lambda folder, _: folder.mkdir() or folder)
    given = ["--layers", str(layers), "--rounds", "1", "--folder", str(tmp_path), "--output", str(tmp_path / "r.json")]
    given += ["--size", "tiny"] if module is load else []
    monkeypatch.setattr("sys.argv", ["command", *given])
    module.main()
    found = json.loads((tmp_path / "r.json").read_text())
    name = module.__name__.rpartition(".")[2]
    assert found["command"] == f"python -m benchmarks {name} {' '.join(given)}" and f" {layers} layers" in found["what"]
    assert ("tiny widths" in found["what"]) == (module is load)


def test_checkpoint_for_loading_is_complete(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "SHARD_BYTES", 100_000)
    folder = load.make_checkpoint(tmp_path / "checkpoint", configs("tiny")[1])
    assert len(list(folder.glob("*.safetensors"))) > 2
    model, keys = LlavaSTFForConditionalGeneration.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not keys["missing_keys"] and not keys["unexpected_keys"] and not keys["mismatched_keys"]


def test_checkpoints_for_serving_answer(tmp_path):
    """The prompt that vLLM is given, in transformers: a quarter of the stock model's tokens for the picture."""
    folders = serve.make_checkpoints(tmp_path, argparse.Namespace(size="tiny", dtype="float32"))
    picture, tokens = Image.new("RGB", (336, 336)), {}
    for name, folder in folders.items():
        model = AutoModelForImageTextToText.from_pretrained(folder)
        inputs = AutoProcessor.from_pretrained(folder)(images=picture, text=serve.PROMPT, return_tensors="pt")
        tokens[name] = int((inputs["input_ids"] == model.config.image_token_id).sum())
        output = model.generate(**inputs, min_new_tokens=3, max_new_tokens=3)
        assert output.shape[1] == inputs["input_ids"].shape[1] + 3
    assert tokens[STOCK] == 4 * tokens[OURS] > 0


def test_gpu_steps_are_done_once_and_in_order(monkeypatch, tmp_path, capsys):
    """The rehearsal on a CPU: real processes, the first steps only."""
    every_step = gpu.steps
    monkeypatch.setattr(gpu, "steps", lambda *settings: list(every_step(*settings))[:2])
    monkeypatch.setattr(
        "sys.argv", ["gpu", "--device", "cpu", "--size", "tiny", "--minutes", "9", "--output", str(tmp_path)]
    )
    for outcome in ("done", "done before"):
        gpu.main()
        summary = json.loads((tmp_path / "summary_cpu.json").read_text())
        assert summary["steps"] == dict.fromkeys(("tests_cpu", "gate_bfloat16_cpu"), outcome)
    assert summary["tests"][0]["passed"] and not summary["tests"][0]["failed"] and summary["device"]
    assert json.loads((tmp_path / "gate_bfloat16_cpu.json").read_text())["gate"]


def test_gpu_steps_that_fail_or_take_too_long_are_named(tmp_path):
    failing = tmp_path / "test_it.py"
    failing.write_text("def test_it():\n    assert False\n")
    report = tmp_path / "tests_cpu.xml"
    step = gpu.Step(("pytest", str(failing), "-q", "-c", "/dev/null", f"--junitxml={report}"), report)
    assert gpu.run_step(step, 100) == "exit code 1" and not report.exists()
    assert len(gpu.outcome_of_tests(tmp_path / "tests_cpu.failed.xml")["failed"]) == 1
    assert gpu.run_step(gpu.Step(("http.server", "0"), tmp_path / "never"), 1) == "out of time"


def test_rows_that_are_wanted_first_come_first(measured, monkeypatch, capsys):
    measure, out = measured
    measure()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    wanted = [case.wanted_first for case in workloads.cases(workloads.PLANS["tiny"])]
    assert 0 < sum(wanted) < len(wanted) == len(lines)
    assert all("50 tokens" in line and "batch" in line for line in lines[: sum(wanted)])
    rows = [(case["metric"], case["batch"], case["text"]) for case in json.loads(out.read_text())["cases"]]
    assert rows == [(case.metric, case.batch, case.text) for case in workloads.cases(workloads.PLANS["tiny"])]


def test_gate_stops_another_pooling(systems):
    fusion = systems[OURS].model.model.multi_modal_projector.spatial_fusion
    fusion.pool = lambda hidden, tokens: hidden[:, :tokens]
    with pytest.raises(SystemExit, match="features of 1 tokens: error"):
        gate.eager(systems, torch.float32)


def test_rows_of_a_budget(systems):
    """Ours has fewer tokens, stock keeps all; the FLOPs follow, and each row has the peak of its own rounds."""
    plan = workloads.PLANS["tiny"]
    rows = {case.metric: run.measure(case, systems, plan, "cpu") for case in workloads.cases(plan) if case.budget}
    assert rows.keys() == {"prefill by budget", "first token by budget"}
    whole = next(case for case in workloads.cases(plan) if case.key == ("first token", 1, 50, None))
    row = rows["first token by budget"]
    assert report.label(row) == "first token by budget, batch 1, 50 tokens of text, 1 of a picture"
    assert row["systems"][STOCK]["flops"] == whole.flops(systems[STOCK])
    assert row["systems"][OURS]["flops"] < whole.flops(systems[OURS])
    assert row["peak"].keys() == {"flops"}
    assert report.share_of_peak({}, row).endswith("% flops")
    few = systems[OURS].with_budget(1)
    assert systems[STOCK].with_budget(1) is systems[STOCK]
    assert few.prompt(2, 10).shape == (2, 11) and torch.stack(few.vision(few.pictures(2))).shape[:2] == (2, 1)


# Reducers


def reducer_rows(plan):
    return [case for case in workloads.cases(plan) if case.kept]


def test_rows_of_reducers(systems):
    """Whole and reduced systems, eager and compiled, take turns; the language model reads what is kept."""
    rows = reducer_rows(workloads.PLANS["tiny"])
    assert [case.metric for case in rows] == [
        "prefill, reduced",
        *(f"first token, {score}" for score in ("salience", "diverse", "merging", "question")),
    ]
    lengths = []
    for system in systems.values():
        system.model.model.language_model.register_forward_hook(lambda _, args, out: lengths.append(out[0].shape[1]))
    for case in rows:
        assert {*case.systems} == {*WHOLE, *WHOLE.values()}
        for name in case.systems:
            work = case.work(name, systems)
            lengths.clear()
            logits = work()
            whole = systems[WHOLE.get(name, name)]
            assert {*lengths} == {51 if name in WHOLE else 50 + whole.image_tokens}
            assert logits.shape == (1, whole.model.config.text_config.vocab_size)
    row = run.measure(rows[1], systems, workloads.PLANS["tiny"], "cpu")
    assert report.label(row) == "first token, salience, batch 1, 50 tokens of text, 1 of a picture"
    assert run._key(row) == rows[1].key == ("first token, salience", 1, 50, 1) and row["systems"].keys() == {
        *rows[1].systems
    }


def test_reduced_pictures_are_encoded_in_the_row_of_the_first_token_only(systems):
    encoded = []
    systems[OURS].model.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    for case, expected in zip(reducer_rows(workloads.PLANS["tiny"])[:2], (0, 2), strict=True):
        work = case.work(f"{OURS}, reduced", systems)
        encoded.clear()
        for _ in range(2):
            work()
        assert len(encoded) == expected


def test_other_scores_keep_other_tokens(systems):
    """Else the gate could not tell them apart."""
    for name in (STOCK, OURS):
        logits = [workloads.reduced_first_token(systems[name], 2, score)() for score in workloads.SCORES]
        assert all(gate.error(one, logits[0]) > 10 * gate.FLOAT32_ERROR for one in logits[1:])


def compact_positions(inputs):
    inputs["position_ids"] = torch.arange(inputs["position_ids"].shape[1])[None]


def other_features(inputs):
    inputs["inputs_embeds"][0, 1] = 0


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (compact_positions, "1 tokens by salience, and the others masked, logits: error"),
        (other_features, "stock and reference, 1 tokens by salience: error"),
    ],
)
def test_gate_stops_a_wrong_reducer(mistake, message, systems, monkeypatch):
    right = System.reduced

    def wrong(system, ids, pixels, kept, score):
        inputs = right(system, ids, pixels, kept, score)
        mistake(inputs)
        return inputs

    monkeypatch.setattr(System, "reduced", wrong)
    with pytest.raises(SystemExit, match=message):
        gate.eager(systems, torch.float32)


def test_gate_stops_a_compiled_model_that_reads_reduced_prompts_otherwise(systems):
    class Backwards(System):
        def forward(self, cache, position_ids=None, **inputs):
            if position_ids is not None:
                inputs["inputs_embeds"] = inputs["inputs_embeds"].flip(1)
            return super().forward(cache, **inputs)

    compiled = systems[OURS_COMPILED]
    systems[OURS_COMPILED] = Backwards(compiled.name, compiled.model, compiled.vision)
    with pytest.raises(SystemExit, match="ours compiled and eager, logits with 1 tokens kept: cosine"):
        gate.compiled(systems)


def test_rows_of_several_counts_go_on_where_they_were(measured, monkeypatch):
    """`kept` tells them apart."""
    measure, out = measured
    monkeypatch.setitem(workloads.PLANS, "tiny", replace(workloads.PLANS["tiny"], kept=(4, 1)))
    whole = stopped_at_the_third(monkeypatch)
    metrics = ("--metrics", "prefill, reduced", "first token, diverse")
    with pytest.raises(KeyboardInterrupt):
        measure(*metrics)
    half = json.loads(out.with_suffix(".unfinished").read_text())["cases"]
    monkeypatch.setattr(run, "measure", whole)
    measure(*metrics)
    cases = json.loads(out.read_text())["cases"]
    assert [(case["metric"], case["kept"]) for case in cases] == [
        (metric, kept) for metric in metrics[1:] for kept in (4, 1)
    ]
    assert cases[:2] == half


def test_the_table_of_reducers():
    seconds = {STOCK: 4.0, f"{STOCK}, reduced": 2.0, OURS: 1.0, f"{OURS}, reduced": 1.0}
    runs = {name: {"seconds": [value] * 3} for name, value in seconds.items()}
    case = {"metric": "first token, diverse", "batch": 1, "text": 50, "kept": 9, "systems": runs}
    *_, row = report.table_of_reducers({"cases": [case, {**case, "systems": {}}]})
    assert row == (
        "| first token, diverse, batch 1, 50 tokens of text, 9 of a picture | 4e+03 ± 0 | 2e+03 ± 0 | 1e+03 ± 0 "
        "| 1e+03 ± 0 | **2.00x** | 1.00x, no gain | **4.00x** | **2.00x** |"
    ).replace("4e+03", "4000").replace("2e+03", "2000").replace("1e+03", "1000")
    assert report.is_loss(case) and report.gain_over_stock(case, STOCK, OURS) == 4
    runs[f"{OURS}, reduced"] = {"seconds": [0.5] * 3}
    assert not report.is_loss(case)


def test_hotspots_of_a_reduced_system(monkeypatch, tmp_path):
    out = tmp_path / "hotspots.json"
    options = ["first token, merging", "--size", "tiny", "--system", "stock, reduced", "--output", str(out)]
    monkeypatch.setattr("sys.argv", ["hotspots", *options])
    hotspots.main()
    found = json.loads(out.read_text())
    assert found["row"]["system"] == "stock, reduced" and found["row"]["kept"] == 1
    assert "aten::index_add" in [spot["name"] for spot in found["hotspots"]]  # of the merging
