"""README and docs: what they show runs as pasted, and their numbers are those of the results."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from benchmarks import count, report, training_needs
from benchmarks.workloads import SCORES
from examples.shapes.shrink import shrink_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
    + [*ROOT.glob("examples/*/*.md")]
)


def snippets(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/use.md"])
def test_the_first_snippet_runs_as_pasted(page):
    snippet = snippets((ROOT / page).read_text(encoding="utf-8"), "python")[0]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        [sys.executable, "-c", snippet], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600
    )
    assert printed.returncode == 0, printed.stderr
    assert f"# {printed.stdout.strip()}" == snippet.strip().splitlines()[-1]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^):\s]+)\)", text) + re.findall(r'<img src="([^":]+)"', text)
    wrong = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    """Paths of the repository in backticks, such as `training/recipes/`; `build/` is written by the pages' commands."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {"build"}
    top = "|".join(sorted(folders))
    paths = re.findall(rf"`((?:{top})/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_commands_that_a_page_names_exist():
    names = {name for page in PAGES for name in re.findall(r"python -m benchmarks ([a-z]+)", page.read_text("utf-8"))}
    assert names and all((ROOT / "benchmarks" / f"{name}.py").exists() for name in names)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text("utf-8"))}
    assert named <= targets


def test_training_needs_are_those_of_the_count():
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    section = page.split("<!-- needs:")[1].split("<!-- needs: end -->")[0]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert shown == [line for line in training_needs.lines(count.NAMED["stf-7b"](), mfu=0.4) if line]


def test_the_readme_s_results_are_those_of_the_files():
    run = report.read(report.RESULTS / "run_cpu.json")

    def faster(metric):
        (case,) = [c for c in run["cases"] if (c["metric"], c["batch"], c["text"]) == (metric, 1, 50)]
        stock, ours = (median(case["systems"][name]["seconds"]) for name in (report.STOCK, report.OURS))
        return f"{stock / ours:.2f}x"

    rows = {cells[1].strip(): cells[2] for line in README.splitlines() if len(cells := line.split("|")) > 4}
    assert rows["Prefill, 50 tokens of text"].strip() == f"{faster('prefill')} faster than stock LLaVA-1.5"
    assert rows["First token, 50 tokens of text"].strip() == f"{faster('first token')} faster"
    stock, ours = (count.cache_bytes(count.NAMED[name](), 66) for name in ("llava-1.5-7b", "stf-7b"))
    assert rows["Cache of a request"].strip() == f"{stock / ours:.2f}x less"
    training = json.loads((report.RESULTS / "train_cpu.json").read_text("utf-8"))["stages"]["LoRA"]
    assert rows["Training step, LoRA"].strip() == f"{training['ratio_measured']:.1f}x faster"
    converted = json.loads((report.RESULTS / "convert_7b.json").read_text("utf-8"))
    gib = converted["peak_anonymous_bytes"] / 2**30
    assert (
        rows["Conversion of a 7B"].strip()
        == f"{converted['ratio']:.2f} times the time of `cp`, {gib:.2f} GiB of memory"
    )
    kinds = json.loads((ROOT / "examples" / "shapes" / "model" / "evaluation.json").read_text("utf-8"))["kinds"]
    seen, stranger = (
        {kind: f"{100 * groups[group]['accuracy']:.0f} %" for kind, groups in kinds.items()}
        for group in ("seen", "unseen artist")
    )
    assert rows["Small model, 900 scenes"].strip() == (
        f"names an object: {seen['name']}, where: {seen['where']}, count: {seen['count']}, "
        f"captions: {seen['caption']}; "
        f"names one by an artist that it never saw: {stranger['name']}"
    )


def test_the_size_of_a_server_is_that_of_the_count():
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    both = [count.NAMED[name]() for name in ("llava-1.5-7b", "stf-7b")]
    cache = [count.cache_bytes(config, 66) for config in both]
    rows = {
        "weights, GB": [f"{count.weight_bytes(config) / 1e9:.2f}" for config in both],
        "cache of a request (one picture, 50 tokens of text, 16 of the answer), MB": [f"{b / 1e6:.1f}" for b in cache],
        "such requests in 50 GB of cache": [f"{50e9 // b:.0f}" for b in cache],
    }
    assert [row for row, cells in rows.items() if f"| {row} | {' | '.join(cells)} |" not in page] == []


def test_commands_that_serve_are_complete():
    """The server's own options are its own to check: those of the package's command begin behind the model."""
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:vllm serve|python -m modeling_llava_stf serve) .*", page, re.MULTILINE)
    assert len(commands) == 3 and all(re.search(r" serve MODEL\b", command) for command in commands)
    assert all("--trust-remote-code" in command for command in commands if command.startswith("vllm"))
    assert "--chat-template" not in page


def test_the_numbers_of_the_evaluation_page_are_those_of_the_files():
    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    authors = json.loads((ROOT / "hub_card" / "results" / "authors_7b.json").read_text(encoding="utf-8"))["results"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    shown = {cells[0]: cells[3:] for cells in rows if len(cells) == 5}
    assert len(authors) == 9
    assert {row["benchmark"]: [str(row["value"]), str(row["baseline"])] for row in authors}.items() <= shown.items()
    measured = json.loads((ROOT / "examples" / "shapes" / "model" / "lmms_eval.json").read_text(encoding="utf-8"))
    values, count = measured["results"]["shapes"], measured["n-samples"]["shapes"]["effective"]
    error = values["accuracy_stderr_clustered,none"]
    assert f"the accuracy was {values['accuracy,none']:.3f} ± {error:.3f} on {count} questions" in page


@pytest.mark.parametrize("device, mark", [("cpu", "shrink"), ("cuda", "shrink on a GPU")])
def test_the_accuracy_of_quantised_models_is_that_of_the_results(device, mark):
    page = (ROOT / "docs" / "quantise.md").read_text(encoding="utf-8")
    shown = page.split(f"<!-- {mark}:")[1].split(f"<!-- {mark}: end -->")[0]
    result = json.loads((report.RESULTS / f"quantise_{device}.json").read_text("utf-8"))
    assert [line for line in shown.splitlines() if line.startswith("|")][2:] == shrink_table(result)
    assert f"{result['questions']} questions" in page and result["questions"] >= 1000


def test_the_speed_of_reducers_is_that_of_the_results():
    cases = json.loads((report.RESULTS / "reducers_cpu.json").read_text("utf-8"))["cases"]
    found = {(case["metric"], case["kept"]): case["systems"] for case in cases}
    for kept in (144, 36, 9, 1):
        runs = [found[metric, kept] for metric in ("prefill, reduced", "first token, salience")]
        gains = [report.verdict(run, "stock", f"{name}, reduced") for name in ("stock", "ours") for run in runs]
        row = f"| {kept} | {' | '.join(gains)} |".replace("**", "")
        assert row in (ROOT / "docs" / "reduce.md").read_text(encoding="utf-8")
    for score in SCORES:  # all 144 of LLaVA-STF, with and without a reducer
        assert report.verdict(found[f"first token, {score}", 144], "ours", "ours, reduced").endswith("no gain")
