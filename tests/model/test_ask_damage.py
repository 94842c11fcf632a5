"""`ask` with a damaged model folder, picture or option: one line that names it, exit code 2, no hang."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file, save_file

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf import __main__ as command
from modeling_llava_stf._memory import full_gpu

PICTURE = GOLDENS / "images" / "shapes.png"
UP = "model.language_model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def ask(monkeypatch, capsys):
    """`python -m modeling_llava_stf ask ...` in this process: exit status, standard output and error."""
    from transformers.utils import logging

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["command", "ask", *map(str, arguments)])
        status = command.main()
        return status, *capsys.readouterr()

    verbosity = logging.get_verbosity()
    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def assert_one_line(result, *words):
    status, output, errors = result
    assert (status, output) == (2, "")
    assert re.fullmatch(r"error: [^\n]*\n", errors), errors
    for word in words:
        assert str(word) in errors


def edit(name, **changes):
    """Sets values in a JSON file, by their path with two underscores between; None takes one away."""

    def damage(folder):
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        for path, value in changes.items():
            *parents, last = path.split("__")
            inner = settings
            for parent in parents:
                inner = inner[parent]
            if value is None:
                inner.pop(last)
            else:
                inner[last] = value
        (folder / name).write_text(json.dumps(settings), encoding="utf-8")

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def remove(name):
    return lambda folder: (folder / name).unlink()


def pipe(name):
    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def folder_of_name(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def weights(change):
    def damage(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def index(text):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    return damage


DAMAGED = {
    "weights empty": (write("model.safetensors", b""), "model.safetensors"),
    "weights cut": (cut("model.safetensors", 9000), "model.safetensors"),
    "weights are text": (write("model.safetensors", b"git-lfs pointer " * 9), "model.safetensors"),
    "weights missing": (remove("model.safetensors"), "model.safetensors"),
    "weights a pipe": (pipe("model.safetensors"), "model.safetensors"),
    "weights a folder": (folder_of_name("model.safetensors"), "model.safetensors"),
    "shards missing": (index(json.dumps({"weight_map": {UP: "model-00002-of-00002.safetensors"}})), "model-00002"),
    "index a list": (index("[]"), "index.json"),
    "index without a table": (index("{}"), "weight_map"),
    "index cut": (index('{"weight_map": {'), "index.json"),
    "a weight missing": (weights(lambda state: state.pop(UP)), UP),
    "a weight too many": (weights(lambda state: state.update(extra=torch.zeros(2))), "extra"),
    "a weight of another shape": (weights(lambda state: state.update({UP: state[UP][:, 1:].clone()})), "shapes"),
    "config cut": (cut("config.json", 100), "config.json"),
    "config empty": (write("config.json", b""), "config.json"),
    "config a list": (write("config.json", b"[]"), "config.json"),
    "config a number": (write("config.json", b"3"), "config.json"),
    "config binary": (write("config.json", b"\xff\xfe\x81"), "config.json"),
    "config a pipe": (pipe("config.json"), "config.json"),
    "config a folder": (folder_of_name("config.json"), "config.json"),
    "20000 layers": (edit("config.json", text_config__num_hidden_layers=20000), 20000),
    "20000 layers of the tower": (edit("config.json", vision_config__num_hidden_layers=20000), 20000),
    "no text config": (edit("config.json", text_config=None), "text_config"),
    "text config a word": (edit("config.json", text_config="llama"), "text_config"),
    "hidden size a word": (edit("config.json", text_config__hidden_size="many"), "hidden_size"),
    "no heads": (edit("config.json", text_config__num_attention_heads=0), "num_attention_heads"),
    # A GPU has no room for it, before any shape is compared.
    "a huge vocabulary": (
        edit("config.json", text_config__vocab_size=10**9),
        "memory" if torch.cuda.is_available() else "shapes",
    ),
    "taps a word": (edit("config.json", vision_feature_layer="all"), "vision_feature_layer"),
    "window a word": (edit("config.json", fusion_window="two"), "fusion_window"),
    "patches of 0": (edit("config.json", vision_config__patch_size=0), "patch_size"),
    "unknown activation": (edit("config.json", projector_hidden_act="nope"), "projector_hidden_act"),
    "another tower": (edit("config.json", vision_config__model_type="llama"), "clip_vision_model"),
    "unknown dtype": (edit("config.json", dtype="float99"), "dtype"),
    "tokenizer missing": (remove("tokenizer.json"), "tokenizer.json"),
    "tokenizer cut": (cut("tokenizer.json", 500), "tokenizer.json"),
    "tokenizer a list": (write("tokenizer.json", b"[]"), "tokenizer.json"),
    "tokenizer an empty object": (write("tokenizer.json", b"{}"), "tokenizer.json"),
    "tokenizer a pipe": (pipe("tokenizer.json"), "tokenizer.json"),
    "tokenizer settings missing": (remove("tokenizer_config.json"), "tokenizer_config.json"),
    "tokenizer settings a list": (write("tokenizer_config.json", b"[]"), "tokenizer_config.json"),
    "context a word": (edit("tokenizer_config.json", model_max_length="long"), "model_max_length"),
    "processor missing": (remove("processor_config.json"), "processor_config.json"),
    "processor a list": (write("processor_config.json", b"[]"), "processor_config.json"),
    "processor cut": (cut("processor_config.json", 40), "processor_config.json"),
    "processor's patch a word": (edit("processor_config.json", patch_size="big"), "patch_size"),
    "processor's window 0": (edit("processor_config.json", fusion_window=0), "fusion_window"),
    "image processor a word": (edit("processor_config.json", image_processor="clip"), "image_processor"),
    "template missing": (remove("chat_template.jinja"), "template"),
    "template broken": (write("chat_template.jinja", b"{% for x in %}"), "template"),
    "template that fails": (write("chat_template.jinja", b"{{ messages.nope.nope }}"), "template"),
    "template without image": (write("chat_template.jinja", b"hello"), "<image>"),
    "template a pipe": (pipe("chat_template.jinja"), "chat_template.jinja"),
    "generation settings a list": (write("generation_config.json", b"[]"), "generation_config.json"),
    "generation settings cut": (cut("generation_config.json", 10), "generation_config.json"),
    "end of text a word": (edit("generation_config.json", eos_token_id="</s>"), "eos_token_id"),
}


@pytest.mark.parametrize(("damage", "word"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_folder_ends_with_one_line(damage, word, checkpoint, tmp_path, ask):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    damage(folder)
    assert_one_line(ask(PICTURE, "What is this?", "--model", folder), word)


def test_undamaged_folder_answers(checkpoint, ask):
    status, output, errors = ask(PICTURE, "What is this?", "--model", checkpoint, "--max-new-tokens", 2)
    assert (status, errors) == (0, "") and "answer " in output


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_folder_ends_with_one_line(checkpoint, tmp_path, ask):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    folder.chmod(0)
    assert_one_line(ask(PICTURE, "What is this?", "--model", folder), folder)
    folder.chmod(0o700)


OPTIONS = {
    "endless answer": ([PICTURE, "What?", "--max-new-tokens", "100000"], "4096"),
    "no answer": ([PICTURE, "What?", "--max-new-tokens", "0"], "--max-new-tokens"),
    "negative answer": ([PICTURE, "What?", "--max-new-tokens", "-1"], "--max-new-tokens"),
    "no question": ([PICTURE, ""], "question"),
    "blank question": ([PICTURE, " \n"], "question"),
    "question in another encoding": ([PICTURE, "caf\udce9"], "utf-8"),
    "no picture": (["nowhere.png", "What?"], "nowhere.png"),
    "picture a folder": ([GOLDENS, "What?"], GOLDENS),
    "revision of a folder": ([PICTURE, "What?", "--revision", "main"], "--revision"),
}


@pytest.mark.parametrize(("arguments", "word"), OPTIONS.values(), ids=OPTIONS)
def test_wrong_options_end_with_one_line(arguments, word, checkpoint, ask):
    assert_one_line(ask(*arguments, "--model", checkpoint), word)


def test_picture_that_is_a_pipe_ends_with_one_line(checkpoint, tmp_path, ask):
    os.mkfifo(tmp_path / "pipe.png")
    assert_one_line(ask(tmp_path / "pipe.png", "What?", "--model", checkpoint), "pipe.png")


def test_model_that_is_a_file_ends_with_one_line(tmp_path, ask):
    assert_one_line(ask(PICTURE, "What?", "--model", PICTURE), PICTURE)


@pytest.mark.parametrize("place", ["_load", "_answer"])
def test_interrupt_ends_with_130(place, checkpoint, monkeypatch, ask):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, place, interrupted)
    assert ask(PICTURE, "What?", "--model", checkpoint) == (130, "", "interrupted\n")


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, RuntimeError, AssertionError])
@pytest.mark.parametrize("owner", [LlavaSTFProcessor, LlavaSTFForConditionalGeneration])
def test_faults_of_the_program_stay_tracebacks(owner, error, checkpoint, monkeypatch, ask):
    def faulty(*args, **kwargs):
        raise error("ours")

    monkeypatch.setattr(owner, "from_pretrained", faulty)
    with pytest.raises(error, match="ours"):
        ask(PICTURE, "What?", "--model", checkpoint)


def test_weights_that_do_not_fit_are_never_random_in_silence(checkpoint, tmp_path, caplog):
    """By the class itself, too: other shapes are refused, missing weights are reported."""
    import logging

    folder = shutil.copytree(checkpoint, tmp_path / "model")
    DAMAGED["a weight of another shape"][0](folder)
    with pytest.raises(RuntimeError, match="mismatch"):
        LlavaSTFForConditionalGeneration.from_pretrained(folder)
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    DAMAGED["a weight missing"][0](folder)
    logger = logging.getLogger("transformers")
    logger.setLevel(logging.WARNING)  # `ask` and `demo` make it quieter, in this process, too
    logger.addHandler(caplog.handler)
    LlavaSTFForConditionalGeneration.from_pretrained(folder)
    logger.removeHandler(caplog.handler)
    assert "mlp.up_proj.weight" in caplog.text and "MISSING" in caplog.text


def test_too_little_memory_on_the_gpu_ends_with_one_line(ask, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1")

    monkeypatch.setattr(command, "load_checkpoint", full)
    assert_one_line(ask(PICTURE, "What is this?"), "too little free memory", "CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    "message, shown",
    [
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 GiB is "
            "free. Including non-PyTorch memory, this process has 77.61 GiB memory in use. Of the allocated memory ...",
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 GiB is "
            "free. `nvidia-smi`",
        ),
        (
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call.",
            "CUDA error: out of memory. `nvidia-smi`",
        ),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`. `nvidia-smi`",
        ),
    ],
)
def test_a_full_gpu_has_several_errors(message, shown):
    """The second and the third are those of a GPU that others have filled."""
    assert full_gpu(RuntimeError(message), "Wait.").startswith(f"The GPU has too little free memory: {shown} lists")
    fault = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError) as found:
        full_gpu(fault, "Wait.")
    assert found.value is fault
