"""The command lines: what they print, and that an error is one line that names the file."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import GOLDENS
from drawings import drawn
from photos import save_photos
from PIL import Image
from safetensors.torch import load_file, save_file

from conversion import convert
from conversion.__main__ import main as conversion_main
from examples.shapes.questions import KINDS
from modeling_llava_stf import LlavaSTFProcessor
from modeling_llava_stf.__main__ import DEMO
from modeling_llava_stf.__main__ import main as ask_main

ROOT = Path(__file__).parents[2]
PICTURE = GOLDENS / "images" / "shapes.png"


def run(*arguments):
    """`python -m ...` in a process of its own, in the clone, without a network."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=3600,
    )


@pytest.fixture
def run_here(monkeypatch, capsys):
    """The same in this process, which saves the imports: exit status, standard output and error."""
    from transformers.utils import logging

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        status = main()
        return status, *capsys.readouterr()

    verbosity = logging.get_verbosity()
    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def assert_one_line_about(name, status, output, errors):
    assert (status, output) == (2, "")
    assert re.fullmatch(r"error: [^\n]*\n", errors), errors
    assert str(name) in errors


def answer_of(model, processor, picture, question, max_new_tokens):
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def shown(output):
    """The report as a dict; what comes before its first line and after its last is left out."""
    report = r"picture   (.*)\nquestion  (.*)\nanswer    (.*)\ntokens    (.*)\ntime      (.*)\n"
    found = re.search(report, output, re.DOTALL)
    assert found, output
    return dict(zip(("picture", "question", "answer", "tokens", "time"), found.groups(), strict=True))


def test_ask_prints_the_answer(checkpoint, model, processor, goldens):
    case = next(case for case in goldens["generate"] if case["name"] == "single_image")
    picture = GOLDENS / "images" / case["images"][0]
    question = case["prompt"].split("<image>\n")[1].removesuffix(" ASSISTANT:")
    limit = case["max_new_tokens"]
    result = run("modeling_llava_stf", "ask", picture, question, "--model", checkpoint, "--max-new-tokens", limit)
    assert (result.returncode, result.stderr) == (0, "")
    report = shown(result.stdout)
    assert (report["picture"], report["question"]) == (str(picture), question)
    assert report["answer"] == answer_of(model, processor, picture, question, limit)
    assert report["answer"] == processor.decode(case["new_tokens"], skip_special_tokens=True).strip()
    tokens = goldens["tokens_per_image"]
    assert report["tokens"].startswith(f"{tokens} ") and report["tokens"].endswith(f" {4 * tokens}")
    assert re.match(r"\d+\.\d\d s on cpu, torch\.float32", report["time"])
    assert "small" not in result.stdout


PICTURES = json.loads(DEMO.read_text(encoding="utf-8"))


def test_demo_gives_right_answers_about_pictures_that_it_never_saw():
    result = run("modeling_llava_stf", "demo")
    assert result.returncode == 0, result.stderr
    assert [len(truth["questions"]) for truth in PICTURES] == [3, 1]
    for truth in PICTURES:
        assert f"picture   {DEMO.parent / truth['picture']}" in result.stdout
        for turn in truth["questions"]:
            assert f"question  {turn['question']}\nanswer    {turn['answer']}\n          right" in result.stdout
    assert "4 of 4 right" in result.stdout


@pytest.mark.parametrize(("truth", "group"), list(zip(PICTURES, ("seen", "unseen artist"), strict=True)))
def test_the_demo_s_pictures_and_truth_are_of_the_test_set(truth, group):
    scene, picture = drawn(Random(truth["seed"]))
    assert scene.group == group
    shown = Image.open(DEMO.parent / truth["picture"])
    assert picture.tobytes() == shown.tobytes()
    for turn in truth["questions"]:
        made = (KINDS[turn["kind"]](scene, Random(seed)) for seed in range(300))
        assert (turn["question"], turn["answer"]) in {(question.text, question.answer) for question in made if question}


def test_ask_without_a_model_uses_the_small_one(run_here):
    truth = PICTURES[0]
    turn = truth["questions"][0]
    status, output, _ = run_here(ask_main, "ask", DEMO.parent / truth["picture"], turn["question"])
    assert (status, shown(output)["answer"]) == (0, turn["answer"])
    assert "knows drawn objects (emoji) only" in output


def test_missing_picture_ends_with_one_line(checkpoint):
    result = run("modeling_llava_stf", "ask", "nowhere.png", "What is this?", "--model", checkpoint)
    assert_one_line_about("nowhere.png", result.returncode, result.stdout, result.stderr)


def cut(path):
    path.write_bytes(PICTURE.read_bytes()[:300])


def text(path):
    path.write_text("not a picture", encoding="utf-8")


def huge(path):
    """A small file of a picture with more pixels than PIL is willing to open."""
    Image.new("1", (60000, 3200)).save(path)


@pytest.mark.parametrize("damage", [cut, text, huge])
def test_damaged_picture_ends_with_one_line(damage, checkpoint, tmp_path, run_here):
    picture = tmp_path / "damaged.png"
    damage(picture)
    assert_one_line_about(picture, *run_here(ask_main, "ask", picture, "What is this?", "--model", checkpoint))


def nothing(folder, checkpoint):
    pass


def no_checkpoint(folder, checkpoint):
    folder.mkdir()
    (folder / "notes.txt").write_text("hello", encoding="utf-8")


def another_model(folder, checkpoint):
    shutil.copytree(GOLDENS / "base", folder)


def cut_weights(folder, checkpoint):
    shutil.copytree(checkpoint, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def no_fusion_weights(folder, checkpoint):
    """It would load, with random weights in their place."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "spatial_fusion" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (nothing, "folder"),
        (no_checkpoint, " config.json"),
        (another_model, "llava_stf"),
        (cut_weights, "weights"),
        (no_fusion_weights, "spatial_fusion"),
    ],
)
def test_wrong_model_ends_with_one_line(make, word, checkpoint, tmp_path, run_here):
    folder = tmp_path / "model"
    make(folder, checkpoint)
    assert_one_line_about(word, *run_here(ask_main, "ask", PICTURE, "What is this?", "--model", folder))


def test_conversion_writes_a_checkpoint(checkpoint, tmp_path):
    result = run("conversion", GOLDENS / "original", tmp_path / "hub")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"wrote {tmp_path / 'hub'}"
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
    for path in checkpoint.iterdir():
        assert path.is_dir() or (tmp_path / "hub" / path.name).read_bytes() == path.read_bytes(), path.name


def test_conversion_leaves_a_full_folder_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    result = run("conversion", GOLDENS / "original", tmp_path)
    assert_one_line_about(f"{tmp_path} is not empty", result.returncode, result.stdout, result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_conversion_asks_for_the_base(tmp_path, run_here):
    result = run_here(conversion_main, GOLDENS / "pretrain", tmp_path / "hub")
    assert_one_line_about("--base", *result)
    assert not list(tmp_path.iterdir())


def test_conversion_that_fails_leaves_nothing(tmp_path, run_here):
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "original", source)
    shard = source / "pytorch_model-00003-of-00003.bin"
    weights = torch.load(shard, weights_only=True)
    weights["model.mm_projector.0.weight"][0, 0] = float("nan")
    torch.save(weights, shard)
    status, _, errors = run_here(conversion_main, source, tmp_path / "hub", "--vision-tower", GOLDENS / "clip")
    assert status == 2 and "Traceback" not in errors
    assert re.match(r"error: .*linear.* has NaN", errors.splitlines()[-1]), errors
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_conversion_without_space_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(LlavaSTFProcessor, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert(GOLDENS / "original", tmp_path / "hub")
    assert not list(tmp_path.iterdir())


def test_ask_turns_a_photo_and_paints_transparency_as_asked(run_here, tmp_path):
    """The demo's drawing lies on its side, or is drawn on nothing."""
    drawing, question = Image.open(DEMO.parent / PICTURES[0]["picture"]).convert("RGB"), "Describe the picture."
    save_photos(drawing, tmp_path)

    def answer(name, *options):
        status, output, _ = run_here(ask_main, "ask", tmp_path / name, question, *options)
        assert status == 0
        return shown(output)["answer"]

    assert answer("lying.png") == answer("upright.png") != answer("as_it_lies.png")
    assert answer("lying.png", "--no-do-exif-transpose") == answer("as_it_lies.png")
    assert answer("nothing.png") == answer("as_it_lies.png")
    assert answer("nothing.png", "--alpha-background", "white") == answer("white.png") != answer("nothing.png")


@pytest.mark.parametrize(
    ("picture", "options"),
    [
        ("http://127.0.0.1:1/a.png", ()),
        ("file:///etc/hostname", ()),
        ("data:image/png;base64,AAAA", ()),
        (PICTURE, ("--alpha-background", "no-such-colour")),
    ],
)
def test_ask_says_in_one_line_what_is_wrong_with_a_picture(picture, options, run_here):
    name = options[1] if options else picture
    assert_one_line_about(name, *run_here(ask_main, "ask", picture, "What is this?", *options))


def test_ask_does_not_wait_for_a_pipe(run_here, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert_one_line_about("pipe.png", *run_here(ask_main, "ask", tmp_path / "pipe.png", "What is this?"))
