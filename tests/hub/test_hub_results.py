"""Results on a card: a number stands under its own name, in the table and in what the Hub reads back."""

import json
import re
import shutil

import pytest
from conftest import CARD_FACTS
from huggingface_hub import ModelCard
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from examples.shapes.evaluate import card_results
from examples.shapes.recipe import CARD, RESULTS
from hub_card import Facts, gather
from hub_card.__main__ import main
from hub_card.card import ROOT
from hub_card.results import model_index, read_evaluation
from modeling_llava_stf.modeling_llava_stf import NOT_QUANTISED

AUTHORS = ROOT / "hub_card" / "results" / "authors_7b.json"
SMALL = ROOT / "examples" / "shapes" / "model"
LMMS_EVAL = json.loads((ROOT / "tests" / "hub" / "lmms_eval_results.json").read_text(encoding="utf-8"))
OWN = {
    "source": {"name": "our harness", "url": "https://example.org/harness"},
    "measured_by": "",
    "evaluated": "some/tiny",
    "model": "tiny",
}


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def card_of(card_folder, tmp_path):
    """The card of the tiny model with these files of results: its text, and what the Hub reads from it."""

    def card_of(*contents, facts=CARD_FACTS):
        paths = [write(tmp_path / f"{number}.json", content) for number, content in enumerate(contents)]
        text = gather(card_folder, "some/tiny", facts, results=paths).render()
        return text, ModelCard(text).data.eval_results or []

    return card_of


def lmms_eval(results, **about):
    """A results file of lmms-eval 0.7 with these tasks."""
    configs = {task: {"dataset_path": f"lmms-lab/{task}", "test_split": "test"} for task in results}
    fields = {"configs": configs, "n-samples": {}, "n-shot": {}, "higher_is_better": {}, "group_subtasks": {}}
    return {**LMMS_EVAL, **fields, "results": results, **about}


def own(*rows, **about):
    names = ("benchmark", "dataset", "metric", "metric_type", "value")
    rows = [row if isinstance(row, dict) else dict(zip(names, row, strict=True)) for row in rows]
    return {**OWN, **about, "results": rows}


def read(tmp_path, content, names=("some/tiny",)):
    return read_evaluation(write(tmp_path / "results.json", content), set(names))


def rows_of(text):
    """The cells of the table of results, without its head."""
    lines = text.split("## Results\n")[1].split("\n## ")[0].splitlines()
    return [line[2:-2].split(" | ") for line in lines if line.startswith("| ")][2:]


# The small model's card


@pytest.fixture
def small(tmp_path):
    return shutil.copytree(SMALL, tmp_path / "model")


def render(folder, monkeypatch, *options):
    results = [part for name in RESULTS for part in ("--results", str(folder / name))]
    monkeypatch.setattr("sys.argv", ["hub_card", "render", str(folder), *CARD, *results, *options])
    assert main() == 0
    return (folder / "README.md").read_bytes()


def test_the_whole_card_of_the_small_model(small, monkeypatch):
    assert render(small, monkeypatch) == (SMALL / "README.md").read_bytes(), "run `make sync-model`"


@pytest.mark.parametrize(
    "mistake",
    [
        lambda row: row.update(benchmark="caption"),
        lambda row: row.update(metric="accuracy"),
        lambda row: row.update(dataset_config=None),
        lambda row: row.update(value=row["value"] + 1e-4),
        lambda row: row.update(error=0.01),
    ],
    ids=["benchmark", "metric", "configuration", "value", "error"],
)
def test_the_whole_card_shows_a_mistake(mistake, small, monkeypatch):
    evaluation = json.loads((small / "evaluation.json").read_text(encoding="utf-8"))
    mistake(evaluation["results"][1])
    write(small / "evaluation.json", evaluation)
    assert render(small, monkeypatch) != (SMALL / "README.md").read_bytes()


def test_the_hub_reads_each_kind_of_question_under_its_own_name():
    evaluation = json.loads((SMALL / "evaluation.json").read_text(encoding="utf-8"))
    every = ModelCard((SMALL / "README.md").read_text(encoding="utf-8")).data.eval_results
    entries = [entry for entry in every if entry.source_name != "lmms-eval"]
    counted = {
        (kind, f"test, {group}"): part["right"] / part["questions"]
        for kind, parts in evaluation["kinds"].items()
        for group, part in parts.items()
        if part["questions"]
    }
    found = {(entry.dataset_config, entry.dataset_split): entry.metric_value for entry in entries}
    assert len(entries) == len(counted) == 33 and found == pytest.approx(counted, abs=5e-5)
    for entry in entries:
        assert entry.dataset_config in entry.dataset_name and entry.dataset_config in entry.metric_name
        group = entry.dataset_split.removeprefix("test, ")
        assert group in entry.dataset_name and group in entry.metric_name
        assert entry.source_url is None
    assert len({entry.dataset_name for entry in entries}) == len({entry.metric_name for entry in entries}) == 33
    assert "YOUR-NAME" not in (SMALL / "README.md").read_text(encoding="utf-8").split("---\n")[1]


def test_the_hub_reads_the_run_of_lmms_eval():
    """docs/evaluate.md has its commands."""
    content = json.loads((SMALL / "lmms_eval.json").read_text(encoding="utf-8"))
    text = (SMALL / "README.md").read_text(encoding="utf-8")
    (entry,) = (one for one in ModelCard(text).data.eval_results if one.source_name == "lmms-eval")
    values = content["results"]["shapes"]
    assert entry.metric_value == values["accuracy,none"] and content["n-samples"]["shapes"]["effective"] >= 1000
    assert (entry.metric_name, entry.dataset_name, entry.dataset_split) == ("accuracy", "shapes", "test")
    assert (
        f"clustered ± {values['accuracy_stderr_clustered,none']:.4g}" in text and "python -m lmms_eval --model" in text
    )


def test_the_small_model_s_results_are_those_of_its_evaluation():
    evaluation = json.loads((SMALL / "evaluation.json").read_text(encoding="utf-8"))
    assert {**evaluation, **card_results(evaluation["kinds"], evaluation["evaluated"])} == evaluation


# lmms-eval


def test_standard_errors_are_no_scores(card_of):
    values = {
        "alias": "gqa",
        "samples": 12,
        "exact_match,none": 0.25,
        "exact_match_stderr,none": "N/A",
        "exact_match_stderr_clt,none": 0.13,
        "exact_match_stderr_clustered,none": 0.2,
        "f1,none": 0.5,
        "f1_stderr,none": 0.1,
        "f1_stderr_clt,none": 0.11,
        "f1_stderr_clustered,none": "N/A",
    }
    text, entries = card_of(lmms_eval({"gqa": values}))
    assert {entry.metric_name: entry.metric_value for entry in entries} == {"exact_match": 0.25, "f1": 0.5}
    assert rows_of(text) == [
        ["gqa", "exact_match", "0.25", "CLT ± 0.13, clustered ± 0.2", "12"],
        ["gqa", "f1", "0.5", "± 0.1, CLT ± 0.11", "12"],
    ]
    assert "no scores" not in text


def test_what_repeated_answers_show_is_named_and_no_score(card_of):
    varies = {
        f"exact_match_{kind},none": 0.4
        for kind in ("expected_accuracy", "consensus_accuracy", "internal_variance", "consistency_rate")
    }
    text, entries = card_of(lmms_eval({"gqa": {"alias": "gqa", "exact_match,none": 0.25, **varies}}))
    assert [(entry.metric_name, entry.metric_value) for entry in entries] == [("exact_match", 0.25)]
    assert len(rows_of(text)) == 1 and text.count("(of repeated answers)") == 4
    assert "but no scores: gqa exact_match_expected_accuracy (of repeated answers), " in text
    # A metric of that name of its own is one.
    _, entries = card_of(lmms_eval({"gqa": {"vqa_consensus_accuracy,none": 0.3}}))
    assert [entry.metric_name for entry in entries] == ["vqa_consensus_accuracy"]


def test_a_metric_that_is_an_object_is_shown_part_by_part(card_of):
    values = {
        "alias": "mme",
        "mme_score,none": {"perception": 700.5, "cognition": {"code": 40, "text": "55.5"}, "none": {}},
        "mme_score_stderr,none": {"perception": 3.5, "cognition": "N/A"},
    }
    text, entries = card_of(lmms_eval({"mme": values}))
    found = {entry.metric_name: (entry.metric_type, entry.metric_value) for entry in entries}
    assert found == {
        "mme_score: perception": ("mme_score", 700.5),
        "mme_score: cognition: code": ("mme_score", 40),
        "mme_score: cognition: text": ("mme_score", 55.5),
    }
    assert ["mme", "mme_score: perception", "700.5", "± 3.5", ""] in rows_of(text)
    assert "no scores: mme mme_score: none (no number)." in text


@pytest.mark.parametrize(
    "value", [None, "N/A", " ", "", True, False, float("nan"), float("inf"), "nan", "61 %", [1, 2], {}]
)
def test_what_is_no_number_is_named(value, card_of):
    text, entries = card_of(lmms_eval({"gqa": {"exact_match,none": 0.25, "other,none": value}}))
    assert [entry.metric_name for entry in entries] == ["exact_match"] and len(rows_of(text)) == 1
    assert "Also in the file of results, but no scores: gqa other (no number)." in text


@pytest.mark.parametrize("value", [0.619, 61.9, "0.619", "61.9", 0, 1, 1482.75, 1e-05])
def test_values_are_not_rescaled(value, card_of):
    text, (entry,) = card_of(lmms_eval({"gqa": {"exact_match,none": value}}))
    assert entry.metric_value == float(value) and float(rows_of(text)[0][2]) == float(value)


def test_filters_shots_versions_and_direction_belong_to_the_name(card_of):
    values = {
        "alias": "chart",
        "acc,strict": 0.25,
        "acc,flexible": 0.5,
        "acc_stderr,flexible": 0.1,
        "wer,none": 12.5,
    }
    about = {
        "n-shot": {"chart": 5},
        "versions": {"chart": 1.0, "gqa": "Yaml"},
        "higher_is_better": {"chart": {"wer": False}},
        "n-samples": {"chart": {"original": 100, "effective": 90}},
    }
    text, entries = card_of(lmms_eval({"chart": values}, **about))
    assert [(entry.metric_name, entry.metric_value) for entry in entries] == [
        ("acc (strict, 5-shot)", 0.25),
        ("acc (flexible, 5-shot)", 0.5),
        ("wer (5-shot)", 12.5),
    ]
    assert rows_of(text)[1:] == [
        ["chart", "acc (flexible, 5-shot)", "0.5", "± 0.1", "90 of 100"],
        ["chart", "wer (5-shot) (lower is better)", "12.5", "", "90 of 100"],
    ]
    assert "versions of the tasks chart 1.0" in text


def test_a_group_and_its_tasks_are_told_apart(card_of):
    """Also where the tasks share a dataset, or have only a format as its name."""
    results = {
        "mmb": {"alias": "mmb", "acc,none": 0.3, "samples": 30},
        "mmb_en": {"alias": " - mmb_en", "acc,none": 0.2},
        "mmb_cn": {"alias": " - Chinese", "acc,none": 0.4},
        "empty": {" ": " ", " ,none": " ", "alias": "empty", "samples": []},
        "mine": {"alias": "mine", "acc,none": 0.6},
    }
    path = {"dataset_path": "lmms-lab/MMB", "dataset_name": None}
    configs = {"mmb_en": path, "mmb_cn": {**path, "validation_split": "dev"}, "mine": {"dataset_path": "json"}}
    content = lmms_eval(results, configs=configs, group_subtasks={"mmb": ["mmb_en", "mmb_cn"], "mine": []})
    text, entries = card_of(content)
    assert [(entry.dataset_name, entry.dataset_type, entry.dataset_split, entry.metric_value) for entry in entries] == [
        ("mmb (group of 2 tasks)", "mmb", None, 0.3),
        ("mmb_en", "lmms-lab/MMB", None, 0.2),
        ("Chinese (mmb_cn)", "lmms-lab/MMB", "dev", 0.4),
        ("mine", "mine", None, 0.6),
    ]
    assert [row[0] for row in rows_of(text)] == [entry.dataset_name for entry in entries]
    assert [row[4] for row in rows_of(text)] == ["30", "", "", ""] and "no scores" not in text


def test_tasks_that_share_a_dataset_stay_apart(card_of):
    shared = {"dataset_path": "lmms-lab/textvqa", "dataset_name": "default", "test_split": "validation"}
    results = {task: {"acc,none": value} for task, value in {"text": 0.25, "text_lite": 0.5, "text_ocr": 0.75}.items()}
    _, entries = card_of(lmms_eval(results, configs=dict.fromkeys(results, shared)))
    assert {entry.dataset_name: entry.metric_value for entry in entries} == {
        "text": 0.25,
        "text_lite": 0.5,
        "text_ocr": 0.75,
    }
    assert {entry.dataset_config for entry in entries} == {"default, text", "default, text_lite", "default, text_ocr"}
    assert {entry.dataset_type for entry in entries} == {"lmms-lab/textvqa"}


@pytest.mark.parametrize(
    "limit, said",
    [(None, None), (-1, None), (8.0, "ONLY THE FIRST 8.0 SAMPLES"), (0.1, "ONLY THE FIRST 10 % OF THE SAMPLES")],
)
def test_a_limit_is_said(limit, said, card_of):
    content = lmms_eval({"gqa": {"acc,none": 0.5}}, config={**LMMS_EVAL["config"], "limit": limit})
    text, _ = card_of(content)
    assert said in text if said else "ONLY" not in text


@pytest.mark.parametrize(
    "model_args",
    [
        "pretrained=some/tiny,trust_remote_code=True",
        'pretrained="some/tiny",trust_remote_code=True',
        "pretrained='some/tiny' , attn_implementation=sdpa",
        '"trust_remote_code=True,pretrained=some/tiny"',
        "model=some/tiny,tensor_parallel_size=1",
        "model_version=some/tiny",
        'device_map=auto,model="some/tiny"',
        {"pretrained": "some/tiny", "trust_remote_code": True},
        {"model": "some/tiny"},
        '{"pretrained": "some/tiny", "trust_remote_code": true}',
        "{'pretrained': 'some/tiny', 'trust_remote_code': True}",
        "pretrained=some/base,peft=some/tiny",
        "pretrained=some/tiny,model_name=llava_qwen",
    ],
)
@pytest.mark.parametrize("model_name", ["", '"some/tiny"', None])
def test_the_model_is_read_from_its_arguments(model_args, model_name, tmp_path):
    config = {**LMMS_EVAL["config"], "model_args": model_args}
    content = lmms_eval({"gqa": {"acc,none": 0.5}}, config=config, model_name=model_name)
    assert read(tmp_path, content).evaluated == "some/tiny"
    with pytest.raises(ValueError, match="'some/tiny', not of the model of this card: expected one of some/base"):
        read(tmp_path, content, ["some/base"])


@pytest.mark.parametrize("model_args", ["", "device_map=auto", {}, "pretrained="])
def test_results_of_a_model_without_a_name_are_refused(model_args, tmp_path, monkeypatch):
    config = {**LMMS_EVAL["config"], "model_args": model_args}
    content = lmms_eval({"gqa": {"acc,none": 0.5}}, config=config, model_name="")
    monkeypatch.chdir(tmp_path)  # the folder that no name would mean
    with pytest.raises(ValueError, match="does not say which model it is about"):
        read(tmp_path, content, [str(tmp_path)])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"config": []}, "`config` is a list"),
        ({"configs": None}, "`configs` is a NoneType"),
        ({"results": {"gqa": [0.5]}}, "`gqa` is a list"),
        ({"config": {**LMMS_EVAL["config"], "model_args": ["pretrained=x"]}}, "`model_args` is .'pretrained=x'."),
        ({"config": {**LMMS_EVAL["config"], "model_args": "{pretrained: [x"}}, "looks like an object"),
        ({"results": {"gqa": {"submission,none": None}}}, "has no value"),
    ],
)
def test_damaged_results_of_lmms_eval_are_refused(change, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        read(tmp_path, {**lmms_eval({"gqa": {"acc,none": 0.5}}), **change})


@pytest.mark.parametrize(
    "change, command",
    [
        ({}, "pretrained=some/tiny,dtype=float32 --tasks both,shapes --include_path TASKS --batch_size 16"),
        (
            {"model_args": "model_version=some/tiny,base_url=http://127.0.0.1:8000/v1,api_key=x"},
            "model_version=some/tiny ",
        ),
        ({"model_args": "pretrained=some/tiny,hub_token=abc", "batch_size": None}, "pretrained=some/tiny --tasks"),
        ({"gen_kwargs": "max_new_tokens=5", "limit": 0.25}, "--limit 0.25 --gen_kwargs max_new_tokens=5`"),
        ({"gen_kwargs": {"temperature": 0.9, "do_sample": True}}, "--gen_kwargs temperature=0.9,do_sample=True`"),
        ({"resolved_cli_args": {"repeats": 3, "offset": 0}}, "--limit 12 --repeats 3`"),
        ({"resolved_cli_args": {}, "limit": None}, "--tasks gqa --batch_size 16`"),
        # As a shell reads it, with all that the model was told.
        ({"gen_kwargs": "until=a b;c"}, "--gen_kwargs 'until=a b;c'`"),
        ({"model_args": {"pretrained": "some/tiny", "prompt": "Be brief"}}, "'pretrained=some/tiny,prompt=Be brief' "),
        (
            {"resolved_cli_args": {"system_instruction": "Be brief.", "fewshot_as_multiturn": True}},
            "--limit 12 --system_instruction 'Be brief.' --fewshot_as_multiturn`",
        ),
    ],
)
def test_the_command_is_said_without_what_is_private(change, command, tmp_path):
    content = lmms_eval({"gqa": {"exact_match,none": 0.5}}, config={**LMMS_EVAL["config"], **change})
    conditions = read(tmp_path, content).conditions
    assert conditions.startswith("`python -m lmms_eval --model llava_stf --model_args ") and command in conditions
    assert not re.search("127.0.0.1|api_key|abc", conditions)


def test_a_local_folder_is_no_part_of_the_command(tmp_path):
    config = {**LMMS_EVAL["config"], "model_args": f"pretrained={tmp_path},dtype=float32"}
    evaluation = read(tmp_path, lmms_eval({"gqa": {"acc,none": 0.5}}, config=config), [str(tmp_path)])
    assert "--model_args dtype=float32 " in evaluation.conditions and str(tmp_path) not in evaluation.conditions


def test_the_first_lmms_eval_calls_its_configuration_otherwise(tmp_path):
    """Version 0.1, and the branches that were made of it."""
    content = lmms_eval({"gqa": {"exact_match,none": 0.5}})
    older = {**content, "model_configs": content["config"]}
    del older["config"]
    assert read(tmp_path, older).evaluated == "some/tiny"


def test_a_model_that_was_given_as_an_object_is_known_by_its_name(tmp_path):
    config = {**LMMS_EVAL["config"], "model_args": None}
    content = lmms_eval({"gqa": {"exact_match,none": 0.5}}, config=config, model_name="some/tiny")
    assert read(tmp_path, content).evaluated == "some/tiny"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model_args": "pretrained=some/tiny,load_in_4bit=True"}, "load_in_4bit `True`"),
        ({"model_args": {"pretrained": "some/tiny", "dtype": "float16"}}, "dtype `float16`"),
        ({"model_args": "pretrained=some/tiny,load_in_4bit=False,dtype=auto"}, None),
        ({"limit": 8, "offset": 100}, "BEGINNING AT SAMPLE 100 of each task"),
        ({"offset": 0, "model_args": "pretrained=some/tiny"}, None),
    ],
)
def test_other_weights_and_other_samples_are_said(change, said, tmp_path):
    content = lmms_eval({"gqa": {"exact_match,none": 0.5}}, config={**LMMS_EVAL["config"], **change})
    _, _, conditions = read(tmp_path, content).conditions.partition("`, ")  # after the command
    assert said in conditions if said else not re.search("load_in|dtype|BEGINNING", conditions)


def damaged(content):
    """The same, with one field after the other replaced by what does not belong there."""
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        for other in (None, "x", 3, True, [1], {"a": 1}):
            copied = content.copy()
            copied[name] = other
            yield copied
        if isinstance(value, dict | list):
            for other in damaged(value):
                copied = content.copy()
                copied[name] = other
                yield copied


@pytest.mark.parametrize("name", ["lmms-eval", "own"])
def test_any_damage_is_one_line(name, tmp_path):
    row = {"benchmark": "GQA", "dataset": "gqa", "metric": "accuracy", "metric_type": "accuracy", "value": 0.5}
    whole = {"lmms-eval": LMMS_EVAL, "own": own({**row, "split": "test"}, baseline="", conditions="")}[name]
    refused = 0
    for content in damaged(whole):
        try:
            assert model_index([read(tmp_path, content)])
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 30


def test_two_values_of_one_name_are_refused_and_two_sources_are_shown(card_of):
    first, second = (lmms_eval({"gqa": {"acc,none": value}}) for value in (0.25, 0.5))
    with pytest.raises(ValueError, match="gqa, acc, of lmms-eval has 2 values, 0.25 and 0.5"):
        card_of(first, second)
    # Another source has the same benchmark, and the same dataset: both stand under their own.
    row = {"benchmark": "gqa", "dataset": "lmms-lab/gqa", "metric": "acc", "metric_type": "acc", "value": 0.75}
    text, entries = card_of(first, own({**row, "split": "test"}))
    assert {(entry.source_name, entry.metric_value) for entry in entries} == {
        ("lmms-eval", 0.25),
        ("our harness", 0.75),
    }
    assert "Measured with lmms-eval" in text and "Measured with our harness" in text


def test_one_benchmark_of_two_sources_keeps_both(card_of):
    row = {"benchmark": "GQA", "dataset": "gqa", "metric": "score", "metric_type": "score", "value": 60.5}
    authors = json.loads(AUTHORS.read_text(encoding="utf-8"))
    facts = Facts(license="cc-by-nc-4.0", base_model=["visresearch/LLaVA-STF"])
    text, entries = card_of(own(row), authors, facts=facts)
    found = {(entry.source_name, entry.metric_value) for entry in entries if entry.dataset_name == "GQA"}
    assert found == {("our harness", 60.5), ("arXiv 2506.07138", 61.9)} and len(entries) == 10
    assert "**Published by the authors, not measured here**" in text


# Our own format


def test_benchmarks_of_one_dataset_stay_apart(card_of):
    values = {"colour": 0.25, "shape": 0.5, "no": 0.75}
    text, entries = card_of(own(*((name, "drawings", "accuracy", "accuracy", value) for name, value in values.items())))
    assert {entry.dataset_name: entry.metric_value for entry in entries} == values
    assert {entry.dataset_type for entry in entries} == {"drawings"}
    assert {row[0]: float(row[2]) for row in rows_of(text)} == values


def test_metrics_of_one_benchmark_stay_together(card_of):
    rows = [("GQA", "gqa", "accuracy", "accuracy", 0.5), ("GQA", "gqa", "loss | nats", "loss", 1.5)]
    text, entries = card_of(own(*rows))
    assert [(entry.metric_name, entry.metric_value) for entry in entries] == [("accuracy", 0.5), ("loss | nats", 1.5)]
    assert ["GQA", r"loss \| nats", "1.5", "", ""] in rows_of(text)
    # With a comparison, the table names the metric where the benchmark alone would not do.
    names = ("benchmark", "dataset", "metric", "metric_type", "value", "baseline", "higher_is_better")
    compared = [dict(zip(names, (*row, 1.0, row[2] == "accuracy"), strict=True)) for row in rows]
    text, _ = card_of(own(*compared, baseline="LLaVA-1.5"))
    assert ["GQA, accuracy", "1.0", "0.5", "-0.5"] in rows_of(text)
    assert [r"GQA, loss \| nats (lower is better)", "1.0", "1.5", "+0.5"] in rows_of(text)
    assert "worse on GQA, accuracy, GQA, loss | nats" in text


def test_a_small_difference_is_not_rounded_away(card_of):
    row = {"benchmark": "GQA", "dataset": "gqa", "metric": "accuracy", "metric_type": "accuracy", "value": 0.45}
    text, _ = card_of(own({**row, "baseline": 0.44}, {**row, "benchmark": "POPE"}, baseline="LLaVA-1.5"))
    assert rows_of(text) == [["GQA", "0.44", "0.45", "+0.01"], ["POPE", "", "0.45", ""]]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"value": "0.5"}, "Row 1 of `results`: the value of GQA is '0.5', expected a finite number"),
        ({"value": True}, "the value of GQA is True"),
        ({"value": None}, "the value of GQA is None"),
        ({"value": float("nan")}, "the value of GQA is nan"),
        ({"baseline": "60"}, "the baseline of GQA is '60'"),
        ({"stderr": 0.1}, "has 'stderr': it needs benchmark, dataset, metric, metric_type, value"),
        ({"benchmark": " "}, "the benchmark is ' '"),
        ({"metric": 3}, "`metric` is 3, expected text"),
        ({"benchmark": "GQA\nPOPE"}, "expected a name of one line"),
        ({"higher_is_better": "no"}, "higher_is_better is .no., expected true or false"),
        ({"dataset_config": ["a"]}, "`dataset_config` is .'a'., expected text"),
    ],
)
def test_damaged_rows_are_refused(change, reason, tmp_path):
    row = {"benchmark": "GQA", "dataset": "gqa", "metric": "accuracy", "metric_type": "accuracy", "value": 0.5}
    with pytest.raises(ValueError, match=reason):
        read(tmp_path, own({**row, **change}))
    del row["metric"]
    with pytest.raises(ValueError, match="Row 1 of `results` lacks 'metric': it needs benchmark, dataset, metric"):
        read(tmp_path, own(row))
    with pytest.raises(ValueError, match="Row 1 of `results` is a list"):
        read(tmp_path, {**OWN, "results": [[]]})


def test_a_name_twice_in_a_file_is_refused(card_of):
    row = ("GQA", "gqa", "accuracy", "accuracy")
    with pytest.raises(ValueError, match="GQA, accuracy, of our harness has 2 values, 0.5 and 0.75"):
        card_of(own((*row, 0.5), (*row, 0.75)))


def test_what_the_hub_would_rename_is_refused(card_of):
    row = {"dataset": "gqa", "metric": "accuracy", "metric_type": "accuracy", "value": 0.5}
    rows = [{**row, "benchmark": "a"}, {**row, "benchmark": "b"}, {**row, "benchmark": "c", "dataset_config": "a"}]
    with pytest.raises(ValueError, match="The Hub would show accuracy of c under another name"):
        card_of(own(*rows))


def test_a_source_has_a_real_address_or_none(card_of, tmp_path):
    row = ("GQA", "gqa", "accuracy", "accuracy", 0.5)
    _, (entry,) = card_of(own(row, source={"name": "by hand", "url": ""}))
    assert (entry.source_name, entry.source_url) == (None, None)
    with pytest.raises(ValueError, match="The source's url is 'later'"):
        read(tmp_path, own(row, source={"name": "by hand", "url": "later"}))


def test_what_a_file_does_not_say_leaves_no_gap(card_of):
    row = {"benchmark": "GQA", "dataset": "gqa", "metric": "accuracy", "metric_type": "accuracy", "value": 0.5}
    text, (entry,) = card_of(own({**row, "samples": None, "split": None}))
    assert "\nMeasured with our harness.\n" in text and "None" not in text
    assert rows_of(text) == [["GQA", "accuracy", "0.5", "", ""]] and entry.dataset_split is None


# What somebody measured of the base is not this model's


@pytest.fixture
def derived(card_folder, tmp_path):
    folder = shutil.copytree(card_folder, tmp_path / "derived")
    facts = Facts(license="cc-by-nc-4.0", base_model=["visresearch/LLaVA-STF"])
    return folder, lambda: gather(folder, "some/tiny", facts, results=[AUTHORS]).render()


def test_results_of_the_base_are_none_of_a_model_that_was_trained_from_it(derived):
    folder, card = derived
    write(folder / "trainer_state.json", {"global_step": 2, "max_steps": 2})
    # Converted: the weights are those of the base, and the state is of its training.
    assert len(ModelCard(card()).data.eval_results) == 9 and "not of this model" not in card()
    (folder / "original_config.json").unlink()
    text = card()
    assert ModelCard(text).data.eval_results is None and "model-index" not in text
    assert "results of visresearch/LLaVA-STF, which this model was made from, not of this model" in text


def test_results_of_the_base_are_none_of_an_adapter(derived):
    folder, card = derived
    write(folder / "adapter_config.json", {"base_model_name_or_path": "some/base", "revision": "v1"})
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    assert ModelCard(card()).data.eval_results is None and "not of this model" in card()


def test_results_of_the_base_are_none_of_a_quantised_model(derived):
    folder, card = derived
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    write(folder / "config.json", config)
    assert ModelCard(card()).data.eval_results is None and "not of this model" in card()


# What a card has to say


def test_card_has_the_vocabulary_and_what_does_not_work(card_folder, processor):
    text = gather(card_folder, "some/tiny", CARD_FACTS).render()
    rows = json.loads((card_folder / "config.json").read_text(encoding="utf-8"))["text_config"]["vocab_size"]
    tokenizer = processor.tokenizer
    assert f"| vocabulary | {len(tokenizer):,} tokens; embedding and head have {rows:,} rows |" in text
    assert f"| image token | `<image>`, id {processor.image_token_id}, 4 times per picture |" in text
    assert f"| padding token | `{tokenizer.pad_token}`, id {tokenizer.pad_token_id} |" in text
    words = " ".join(text.split())
    assert "A long answer at batch 1 gains little" in words
    assert "GGUF and llama.cpp are not supported: they have no projector that fuses windows of tokens" in words
    assert "fusion modules can be exported to ONNX" in words
    assert "without bfloat16 (NVIDIA's before Ampere) load the model with `dtype=torch.float16`" in words


def test_card_counts_the_rows_that_pad_the_tables(card_folder, tmp_path):
    folder = shutil.copytree(card_folder, tmp_path / "padded")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] += 7
    write(folder / "config.json", config)
    text = gather(folder, "some/tiny", CARD_FACTS).render()
    assert f"embedding and head have {config['text_config']['vocab_size']:,} rows, of which 7 are padding |" in text


def test_the_three_spellings_of_quantisation_are_those_of_transformers(card_folder):
    """Each config of the card takes the list, and keeps it."""
    text = " ".join(gather(card_folder, "some/tiny", CARD_FACTS).render().split())
    modules = json.loads(re.search(r"`modules = (\[[^]]+\])`", text)[1])
    assert modules == NOT_QUANTISED
    found = dict(re.findall(r"`(\w+Config)\((?:[^()]|\(\))*?(\w+)=modules\)`", text))
    assert found == {
        "BitsAndBytesConfig": "llm_int8_skip_modules",
        "TorchAoConfig": "modules_to_not_convert",
        "QuantoConfig": "modules_to_not_convert",
    }
    for build in (BitsAndBytesConfig, QuantoConfig):
        assert getattr(build(**{found[build.__name__]: modules}), found[build.__name__]) == modules
    assert found["TorchAoConfig"] in TorchAoConfig.__init__.__annotations__


@pytest.mark.parametrize(
    ("method", "package"),
    [("bitsandbytes", "accelerate bitsandbytes"), ("torchao", "torchao"), ("quanto", "accelerate optimum-quanto")],
)
def test_the_card_of_a_quantised_model_names_what_loads_it(method, package, derived):
    folder, card = derived
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method}
    write(folder / "config.json", config)
    (line,) = re.findall('pip install "transformers.*', card())
    assert line.endswith(f"torch pillow {package}")


def test_a_score_at_another_budget_says_so(card_of):
    """A number of tokens is no secret; the same benchmark at two budgets has two names."""
    files = [
        lmms_eval(
            {"gqa": {"acc,none": 0.25 * (1 + (tokens == 4))}},
            config={**LMMS_EVAL["config"], "model_args": f"pretrained=some/tiny,max_soft_tokens={tokens}"},
        )
        for tokens in (4, 1)
    ]
    text, entries = card_of(*files)
    assert {entry.metric_name: entry.metric_value for entry in entries} == {
        "acc, 4 tokens of a picture": 0.5,
        "acc, 1 tokens of a picture": 0.25,
    }
    assert "--model_args pretrained=some/tiny,max_soft_tokens=1 " in text
