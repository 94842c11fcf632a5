"""lmms-eval asks the model by its two doors, and gets the answers of `generate` by both.

`make test-eval` runs these tests in an environment with lmms-eval. Nothing is downloaded: the tasks are made here.
"""

import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from PIL import Image

from examples.shapes.evaluate import is_right
from examples.shapes.generate import generate
from examples.shapes.task import write_task
from hub_card.results import model_index, read_evaluation
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor

pytestmark = pytest.mark.evaluating

TaskManager = pytest.importorskip("lmms_eval.tasks", reason="make test-eval has it").TaskManager
get_model = pytest.importorskip("lmms_eval.models", reason="make test-eval has it").get_model
messages = importlib.import_module("modeling_llava_stf._lmms_eval").messages

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "shapes" / "model"
TASKS = Path(__file__).parent / "tasks"
QUESTIONS = 200
LONG, SHORT = 40, 3  # tokens
# Two tasks of the same documents: chats of no, one, two and three pictures, with answers of two lengths and ends.
MIXED = """
task: mixed_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: mixed.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function mixed.pictures
doc_to_text: question
doc_to_target: question
process_results: !function mixed.process_results
generation_kwargs: {settings}
metric_list:
  - metric: length
    aggregation: mean
    higher_is_better: true
"""
MIXED_CODE = """
from PIL import Image

def pictures(doc):
    return [Image.open(path) for path in doc["pictures"]]

def process_results(doc, results):
    return {"length": len(results[0])}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The tasks: 200 questions of `shapes`, three of `mixed`, and `both`, whose results have many forms."""
    root = tmp_path_factory.mktemp("lmms-eval")
    data = generate(root / "data", scenes=1, test_scenes=30, seed=3)
    write_task(data, root / "tasks", QUESTIONS)
    shutil.copytree(TASKS, root / "tasks", dirs_exist_ok=True)
    (root / "some").mkdir()
    (root / "some" / "tiny").symlink_to(MODEL)
    asked = json.loads((data / "test.json").read_text(encoding="utf-8"))[:24]
    _write_lines(root / "tasks" / "questions.jsonl", [_question(data, row) for row in asked])
    drawn = sorted(str(path) for path in (data / "images").glob("test-*.png"))
    rows = [
        {"pictures": drawn[start : start + number], "question": question}
        for start, number in enumerate([1, 0, 2, 3, 0, 1, 2, 1])
        for question in ("Which shapes are in this picture?", "How many objects are there?", "Is there a red circle?")
    ]
    _write_lines(root / "tasks" / "mixed.jsonl", rows)
    (root / "tasks" / "mixed.py").write_text(MIXED_CODE, encoding="utf-8")
    for name, settings in {
        "long": {"max_new_tokens": LONG, "until": ["\n\n"]},
        "short": {"max_new_tokens": SHORT},
        "until": {"max_new_tokens": LONG, "until": ["There is", " a ", "object"]},
    }.items():
        text = MIXED.format(name=name, settings=json.dumps(settings))
        (root / "tasks" / f"mixed_{name}.yaml").write_text(text, encoding="utf-8")
    return root


def _question(data, row):
    asked, answered = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
    return {"image": str(data / row["image"]), "question": asked, "answer": answered}


def _write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(folder, *options, launcher=()):
    """Runs lmms-eval as a user does, offline; returns what it printed, its results and its answers by task."""
    environment = os.environ | {
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
        "PYTHONPATH": str(ROOT),
        "LMMS_EVAL_HOME": str(folder / "hub"),
    }
    out = folder / f"out{time.time_ns()}"
    command = [sys.executable, *launcher, "-m", "lmms_eval", "--include_path", str(folder / "tasks"), *options]
    command += ["--log_samples", "--output_path", str(out)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600)
    results, samples = list(out.rglob("*_results.json")), {}
    for file in out.rglob("*_samples_*.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        name = file.stem.split("_samples_")[1]
        samples[name] = [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return done, results[0] if results else None, samples


def adapter(folder, tasks, **options):
    settings = {"pretrained": MODEL, "dtype": "float32"} | options.pop("model_args", {})
    arguments = [
        "--model",
        "llava_stf",
        "--model_args",
        ",".join(f"{name}={value}" for name, value in settings.items()),
    ]
    launcher = options.pop("launcher", ())
    arguments += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return run(folder, *arguments, "--tasks", tasks, "--batch_size", "16", launcher=launcher)


@pytest.fixture(scope="session")
def server(folder):
    """The model behind `transformers serve`: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["import modeling_llava_stf; from transformers.cli.transformers import main; main()", "serve", str(MODEL)]
    command += ["--trust-remote-code", "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    environment = os.environ | {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", *command], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, (folder / "server.log").read_text(encoding="utf-8")[-4000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="session")
def served(folder, server):
    """What the route without an adapter gives."""
    arguments = f"model_version={MODEL},base_url={server},num_concurrent=4"
    tasks = "shapes,mixed_long,mixed_short,mixed_until"
    return run(folder, "--model", "openai", "--model_args", arguments, "--tasks", tasks, "--batch_size", "1")


@pytest.fixture(scope="session")
def adapted(folder):
    return adapter(folder, "shapes,mixed_long,mixed_short,mixed_until")


@pytest.fixture(scope="session")
def generated(folder):
    """What `generate` answers to each question alone, in float32."""
    processor = LlavaSTFProcessor.from_pretrained(MODEL)
    network = LlavaSTFForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()

    def answer(pictures, question, longest):
        content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = network.generate(**inputs, do_sample=False, max_new_tokens=longest)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    return answer


@pytest.fixture(scope="session")
def questions(folder):
    """The documents of `shapes`, in their order."""
    rows = json.loads((folder / "data" / "test.json").read_text(encoding="utf-8"))[:QUESTIONS]
    return [tuple(_question(folder / "data", row).values()) for row in rows]


@pytest.fixture(scope="session")
def mixed(folder):
    return [json.loads(line) for line in (folder / "tasks" / "mixed.jsonl").read_text(encoding="utf-8").splitlines()]


def test_both_doors_and_generate_give_the_same_answers_to_200_questions(adapted, served, generated, questions):
    expected = [generated([Image.open(path)], question, 80) for path, question, _ in questions]
    for done, _, answers in (adapted, served):
        assert done.returncode == 0, done.stderr[-4000:]
        assert answers["shapes"] == expected
    assert len(expected) == QUESTIONS and len({*expected}) > QUESTIONS / 2


def test_the_score_is_the_share_of_right_answers(adapted, questions):
    _, results, answers = adapted
    right = [is_right(answer, truth) for answer, (_, _, truth) in zip(answers["shapes"], questions, strict=True)]
    scores = json.loads(results.read_text(encoding="utf-8"))["results"]["shapes"]
    assert scores["accuracy,none"] == pytest.approx(sum(right) / QUESTIONS) and sum(right) > QUESTIONS / 2


def test_several_pictures_and_text_alone(adapted, served, generated, mixed):
    """In one batch: the eight first documents have no, one, two and three pictures."""
    expected = [generated(map(Image.open, row["pictures"]), row["question"], LONG) for row in mixed]
    assert adapted[2]["mixed_long"] == served[2]["mixed_long"] == expected
    assert len({*expected}) > 8


def test_answers_end_where_their_task_says(adapted, generated, mixed):
    """Tasks of one run have their own settings. `--model openai` of lmms-eval 0.7.3 does not send `until`."""
    long = adapted[2]["mixed_long"]
    short = [generated(map(Image.open, row["pictures"]), row["question"], SHORT) for row in mixed]
    assert adapted[2]["mixed_short"] == short != long
    cut = [answer.split("There is")[0].split(" a ")[0].split("object")[0].strip() for answer in long]
    assert adapted[2]["mixed_until"] == cut != long


def test_the_server_route_of_lmms_eval_does_not_send_until(served):
    """lmms-eval 0.7.3; docs/evaluate.md says so. When this fails, it can go from there."""
    assert served[2]["mixed_until"] == served[2]["mixed_long"]


def test_two_processes_share_the_questions(folder, adapted):
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done, _, answers = adapter(folder, "shapes", launcher=launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    assert answers["shapes"] == adapted[2]["shapes"]


def test_gen_kwargs_of_the_command_line_count(folder, adapted):
    done, _, answers = adapter(folder, "mixed_long", gen_kwargs=f"max_new_tokens={SHORT}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert answers["mixed_long"] == adapted[2]["mixed_short"]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (f"pretrained={MODEL},load_in_4bits=True", "have load_in_4bits; --model llava_stf takes pretrained, revision,"),
        ("pretrained=/no/such/folder", "There is no folder '/no/such/folder'"),
        (f"pretrained={MODEL},batch_size=auto", "The batch size is 'auto'"),
        ("batch_size=2", "lack `pretrained`"),
        (f"pretrained={MODEL},num_frames=0", "`num_frames` is 0, expected a positive number"),
        (f"pretrained={MODEL},num_frames=2.5", "`num_frames` is 2.5, expected .* a whole one"),
        (f"pretrained={MODEL},fps=0", "`fps` is 0, expected a positive number"),
        (f"pretrained={MODEL},fps=1,num_frames=4", "Give `fps` .1. or `num_frames` .4., not both"),
    ],
)
def test_a_wrong_argument_is_said(arguments, reason):
    """lmms-eval 0.7.3 prints the error, and ends with exit code 0."""
    with pytest.raises(ValueError, match=reason):
        get_model("llava_stf").create_from_arg_string(arguments)


@pytest.fixture(scope="module")
def model():
    """The adapter in this process, in batches of four."""
    return get_model("llava_stf").create_from_arg_string(f"pretrained={MODEL},device=cpu,dtype=float32,batch_size=4")


def ask(model, *chats, doc_to_messages=lambda chat: chat, context="", **settings):
    """The answers to chats: each is a list of messages, or the parts of one message of the user."""
    chats = [chat if "role" in chat[0] else [{"role": "user", "content": chat}] for chat in chats]
    model.task_dict = {"task": {"test": chats}}
    return model.generate_until(
        [
            SimpleNamespace(args=(context, doc_to_messages, settings, place, "task", "test"))
            for place in range(len(chats))
        ]
    )


def text(words):
    return {"type": "text", "text": words}


def test_the_room_of_an_answer_is_that_of_its_own_prompt(model):
    """It does not depend on what else is in the batch: a prompt of nearly the whole context, for example."""
    short, long = [text("Describe a picture with many objects.")], [text("red circle " * 112)]
    alone = [ask(model, chat, min_new_tokens=60, max_new_tokens=60)[0] for chat in (short, long)]
    assert ask(model, short, long, min_new_tokens=60, max_new_tokens=60) == alone
    lengths = [len(model.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in alone]
    assert lengths[1] < 40 < lengths[0]  # the room is that of the longer prompt, which would have cut both answers
    with pytest.raises(ValueError, match="Among the documents task 0, task 1: A prompt has .* the context holds 512"):
        ask(model, short, [text("red circle " * 200)])


def test_a_document_that_the_template_refuses_is_named(model):
    with pytest.raises(ValueError, match="Among the documents task 0: A text has the placeholder <image>"):
        ask(model, [text("What is <image>?")])


def test_a_system_instruction_is_refused(model):
    """lmms-eval 0.7.3 puts it into the context of a task only, which models of chats do not read."""
    task = SimpleNamespace(
        config=SimpleNamespace(num_fewshot=None), fewshot_context=lambda document, shots: "What is it?"
    )
    chats = MethodType(lambda self, chat: chat, task)
    plain = ask(model, [text("What is it?")], doc_to_messages=chats, context="What is it?", max_new_tokens=4)
    assert len(plain) == 1
    with pytest.raises(ValueError, match="The --system_instruction 'Be brief.' would not reach the model"):
        ask(model, [text("What is it?")], doc_to_messages=chats, context="Be brief.What is it?", max_new_tokens=4)


def test_the_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    for number in range(1, 12):
        (tmp_path / f"{number}.png").touch()
    (found,) = messages([{"role": "user", "content": [{"type": "video", "url": str(tmp_path)}]}])
    assert [Path(frame).name for frame in found["content"][0]["video"]] == [f"{number}.png" for number in range(1, 12)]


def test_log_likelihoods_are_refused(model):
    with pytest.raises(NotImplementedError, match="output_type: generate_until"):
        model.loglikelihood([])


def test_the_results_go_into_a_card(adapted):
    evaluation = read_evaluation(adapted[1], {str(MODEL)})
    found = {entry.dataset_name: entry for entry in model_index([evaluation])}
    score = json.loads(adapted[1].read_text(encoding="utf-8"))["results"]["shapes"]
    assert found["shapes"].metric_value == score["accuracy,none"] and found["shapes"].metric_name == "accuracy"
    (shapes,) = (one for one in evaluation.scores if one.benchmark == "shapes")
    assert shapes.error_clt == score["accuracy_stderr_clt,none"]
    assert shapes.error_clustered == score["accuracy_stderr_clustered,none"] and shapes.error is None


def test_the_tasks_of_the_page_exist():
    """Also each task of the table of docs/evaluate.md."""
    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    named = {name for cells in rows if len(cells) == 7 for name in re.findall(r"`(\w+)`", cells[2])} | {
        name for line in re.findall(r"--tasks ([\w,]+)", page) for name in line.split(",")
    }
    manager = TaskManager()
    assert len(named) > 9 and named - {"shapes"} <= {*manager.all_tasks}


def form(value):
    """A result's structure: keys, and the types of what is no number."""
    if isinstance(value, dict):
        return {key: form(part) for key, part in value.items()}
    return float if isinstance(value, int | float) else type(value)


@pytest.mark.parametrize("limit", [None, 12])
def test_the_shipped_results_have_the_form_of_today(limit, folder, adapted):
    """The files that the fast tests read were written by this version: of the default model, and of `some/tiny`."""
    shipped, written = MODEL / "lmms_eval.json", adapted[1]
    if limit:
        shipped = ROOT / "tests" / "hub" / "lmms_eval_results.json"
        done, written, _ = adapter(folder, "both,shapes", model_args={"pretrained": "some/tiny"}, limit=limit)
        assert done.returncode == 0 and written, done.stderr[-4000:]
    assert version("lmms_eval") == "0.7.3"
    shipped, written = (json.loads(file.read_text(encoding="utf-8")) for file in (shipped, written))
    for name in ("results", "n-samples", "higher_is_better", "versions") if limit else ():
        assert form(shipped[name]) == form(written[name])
    assert form(shipped["results"]["shapes"]) == form(written["results"]["shapes"])
    assert shipped["config"].keys() == written["config"].keys()
    assert shipped.keys() - {"groups"} <= written.keys() | {"groups"}
