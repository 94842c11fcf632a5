"""`python -m conversion quantise`: complete folders that load again, and refusals before any work."""

import copy
import json
import shutil
from collections import namedtuple
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import count, machine
from conversion import ConversionError, quantise
from conversion import __main__ as command_line
from conversion.checkpoints.folders import save_checkpoint
from conversion.quantise import AVAILABLE, SCHEMES, is_quantised, load, quantised_layers
from hub_card import Facts, check, gather, write_card
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes" / "model"


@pytest.fixture(scope="module")
def wide(checkpoint, tmp_path_factory):
    """A checkpoint with random weights whose language model's widths are multiples of 128, with a card."""
    config = LlavaSTFConfig.from_pretrained(checkpoint)
    config.text_config.update({"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4})
    config.text_config.update({"num_key_value_heads": 4, "head_dim": 32})
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide") / "wide"
    save_checkpoint(folder, LlavaSTFForConditionalGeneration(config).to(torch.float16), checkpoint)
    write_card(folder, gather(folder, "some/wide", Facts(license="apache-2.0", language=["en"])))
    return folder


def needs(scheme):
    if not AVAILABLE[SCHEMES[scheme].package]():
        pytest.skip(f"{SCHEMES[scheme].package} is not installed")


@pytest.fixture(scope="module")
def made(wide, tmp_path_factory):
    """Makes a folder of each scheme when it is first asked for."""
    folders = {}

    def make(scheme):
        needs(scheme)
        if scheme not in folders:
            folders[scheme] = quantise(wide, tmp_path_factory.mktemp("quantised") / scheme, scheme)
        return folders[scheme]

    return make


def on_this_machine(scheme):
    return scheme != "int4"


@pytest.mark.parametrize(
    "scheme", [pytest.param(s, marks=[] if on_this_machine(s) else pytest.mark.gpu) for s in SCHEMES]
)
def test_a_folder_loads_again_with_the_language_model_alone_quantised(scheme, made, wide, processor, picture):
    folder = made(scheme)
    model = LlavaSTFForConditionalGeneration.from_pretrained(folder, dtype="auto", device_map=_device(scheme)).eval()
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(quantised_layers(model)) == {name for name in linear if is_quantised(name)} != set()
    assert {w.dtype for n, w in model.named_parameters() if "vision_tower" in n or "projector" in n} == {model.dtype}
    assert model.dtype is torch.bfloat16
    inputs = processor(images=picture("wide.png"), text="<image> What?", return_tensors="pt").to(
        model.device, model.dtype
    )
    whole = LlavaSTFForConditionalGeneration.from_pretrained(wide, dtype=model.dtype, device_map=model.device).eval()
    with torch.no_grad():
        features = [m.model.get_image_features(inputs["pixel_values"]).pooler_output[0] for m in (model, whole)]
        logits = [m(**inputs).logits for m in (model, whole)]
    assert torch.equal(*features)
    assert 0 < (logits[0] - logits[1]).abs().max() < 0.5 * logits[1].abs().max()


def _device(scheme):
    return "cuda" if scheme in ("int4", "nf4") and torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_the_folder_and_its_card_are_complete(scheme, made, wide):
    folder = made(scheme)
    assert {file.name for file in wide.iterdir()} <= {file.name for file in folder.iterdir()}
    card = (folder / "README.md").read_text(encoding="utf-8")
    made_by = json.loads((folder / "quantisation.json").read_text(encoding="utf-8"))
    assert "base_model:\n- some/wide\n" in card and "base_model_relation: quantized" in card
    assert f"python -m conversion quantise some/wide OUT --scheme {scheme}" in card
    assert made_by["scheme"] == scheme and f"torch {version('torch')}" in card
    assert f"| quantised with | {SCHEMES[scheme].package} |" in card
    assert str(wide) not in card and not list(folder.parent.glob(".*"))
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) < (wide / "model.safetensors").stat().st_size
    if scheme == "nf4":  # torchao lies outside the environment here, where the check's own process does not look
        assert check(folder) == []


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_lora_trains_on_a_folder(scheme, made, processor, picture):
    peft = pytest.importorskip("peft")
    model = LlavaSTFForConditionalGeneration.from_pretrained(made(scheme), dtype="auto", device_map=_device(scheme))
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    adapted = peft.get_peft_model(model, lora)
    inputs = processor(images=picture("wide.png"), text="<image> What?", return_tensors="pt").to(
        model.device, model.dtype
    )
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(adapted(**inputs, labels=inputs["input_ids"]).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] and losses[-1].isfinite()


def test_an_adapter_is_not_merged_into_a_quantised_base(made, tmp_path):
    pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    from training.merge import merge

    peft.LoraConfig(base_model_name_or_path=str(made("nf4"))).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is quantised. Give the checkpoint that it was made from with --base"):
        merge(str(tmp_path / "adapter"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_without_a_card_the_folder_gets_a_note(wide, tmp_path):
    needs("nf4")
    source = shutil.copytree(wide, tmp_path / "source", ignore=shutil.ignore_patterns("README.md"))
    folder = quantise(source, tmp_path / "out", "nf4", base_model="some/base")
    note = (folder / "README.md").read_text(encoding="utf-8")
    assert "base_model: some/base\n" in note and "base_model_relation: quantized" in note
    assert "`python -m conversion quantise some/base OUT --scheme nf4`" in note and "hub_card render" in note
    assert "| quantised to | nf4;" in gather(folder, "some/wide-nf4", Facts(license="mit")).render()
    assert "base_model: " not in (quantise(source, tmp_path / "no", "nf4") / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["conversion", "quantise", *map(str, words)])
        status = command_line.main()
        said = capsys.readouterr()
        return status, said.err.strip().splitlines()

    return run


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A folder whose language model has a width that no kernel of 4 bits takes; its weights are not read."""
    folder = shutil.copytree(SHAPES, tmp_path_factory.mktemp("narrow") / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["intermediate_size"] = 344
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def everything_installed(monkeypatch):
    for package in AVAILABLE:
        monkeypatch.setitem(AVAILABLE, package, lambda: True)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("nf4", "nf4 on a CPU does not fit the language model: intermediate_size 344 is not a multiple of 64."),
        ("int4", "int4 needs a GPU"),
    ],
)
def test_what_this_machine_and_these_widths_cannot_do(scheme, expected, run, narrow, tmp_path, everything_installed):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status, errors = run(narrow, tmp_path / "out", "--scheme", scheme)
    assert status == 2 and len(errors) == 1 and expected in errors[0] and "int8" in errors[0]
    assert not list(tmp_path.iterdir())


def test_int4_on_a_gpu(monkeypatch, narrow, tmp_path, everything_installed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ConversionError, match="int4 needs compute capability 8.0, this GPU has 7.5"):
        quantise(narrow, tmp_path / "out", "int4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ConversionError, match="intermediate_size 344 is not a multiple of 128"):
        quantise(narrow, tmp_path / "out", "int4")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_library_that_is_missing(scheme, run, tmp_path, monkeypatch):
    package = SCHEMES[scheme].package
    monkeypatch.setitem(AVAILABLE, package, lambda: False)
    status, (error,) = run(SHAPES, tmp_path / "out", "--scheme", scheme)
    assert status == 2 and f"{scheme} needs {package}, found" in error and f"pip install --upgrade {package}" in error
    assert not list(tmp_path.iterdir())


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.language_model.layers.0.mlp.gate_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def quantised(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


DAMAGE = {
    "a weight is missing": (without_a_weight, "The source has no weight for 'model.language_model.layers.0.mlp.gate"),
    "a weight is not finite": (with_nan, "'model.language_model.norm.weight' has NaN or infinite values"),
    "it is quantised": (quantised, "the weights are quantised"),
    "it is an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is an adapter"),
    "its card is not UTF-8": (lambda folder: (folder / "README.md").write_bytes(b"\xe9"), "README.md is not UTF-8"),
    "it has no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "backend tokenizer"),
    "it has no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_source_that_is_none(damage, wide, run, tmp_path, everything_installed):
    spoil, expected = DAMAGE[damage]
    source = shutil.copytree(wide, tmp_path / "source")
    spoil(source)
    status, errors = run(source, tmp_path / "out", "--scheme", "nf4")
    assert status == 2 and expected in errors[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_that_transformers_does_not_read_are_refused(wide, tmp_path):
    """As those of older names before transformers 5.24: the layers had random weights."""
    needs("nf4")
    source = shutil.copytree(wide, tmp_path / "source")
    without_a_weight(source)
    with pytest.raises(ConversionError, match="did not read 1 weights of .*layers.0.mlp.gate_proj"):
        load(source, "nf4")


OPTIONS = {
    "a revision of a folder": (("--revision", "main"), "has no revision 'main'"),
    "a subfolder that is not there": (("--subfolder", "none"), "is not a folder"),
    "a base that is no id": (("--base-model", "/some/folder"), "is no id of a Hub repository"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_do_not_fit(case, wide, run, tmp_path, everything_installed):
    options, expected = OPTIONS[case]
    status, (error,) = run(wide, tmp_path / "out", "--scheme", "nf4", *options)
    assert status == 2 and expected in error and not list(tmp_path.iterdir())


def test_a_destination_that_is_not_empty(wide, run, tmp_path, everything_installed):
    (tmp_path / "mine").touch()
    status, (error,) = run(wide, tmp_path, "--scheme", "nf4")
    assert status == 2 and "is not empty" in error and [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_disk_that_is_full(wide, run, tmp_path, monkeypatch, everything_installed):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**6, 10**6 - 1000, 1000))
    status, errors = run(wide, tmp_path / "new" / "out", "--scheme", "nf4")
    assert status == 2 and "has 0.000 GB free, but the result needs 0.00" in errors[-1]
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(wide, tmp_path, monkeypatch):
    needs("nf4")
    monkeypatch.setattr(import_module("conversion.quantise"), "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantise(wide, tmp_path / "out", "nf4")
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_full(wide, run, tmp_path, monkeypatch):
    """transformers raises an error of its own for what is raised while it quantises; see `_memory`."""
    needs("nf4")

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 3 MiB "
            "is free. Including non-PyTorch memory, this process has 70.41 GiB memory in use.\nMore."
        )

    monkeypatch.setattr(import_module("bitsandbytes.functional"), "quantize_4bit", full)
    status, errors = run(wide, tmp_path / "out", "--scheme", "nf4")
    assert status == 2 and not list(tmp_path.iterdir())
    assert errors[-1].startswith(
        "error: The GPU has too little free memory: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total "
        "capacity of 79.11 GiB of which 3 MiB is free. `nvidia-smi` lists the programs that use it. Nothing was"
    )
    with pytest.raises(RuntimeError, match="some issues during automatic conversion") as found:
        quantise(wide, tmp_path / "out", "nf4")
    assert found.value.__cause__ is None and found.value.__context__ is None  # else `_memory` can be shorter


def test_another_fault_keeps_its_traceback(wide, run, tmp_path, monkeypatch):
    needs("nf4")

    def wrong(*args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(LlavaSTFForConditionalGeneration, "from_pretrained", wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(wide, tmp_path / "out", "--scheme", "nf4")


def test_torchao_s_int8_overflows_in_float16():
    """torchao 0.18 on a CPU. When this fails, folders can keep the dtype of their source (`DTYPE`)."""
    needs("int8")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = torch.nn.Sequential(torch.nn.Linear(256, 128, bias=False))
    torch.nn.init.constant_(layer[0].weight, 0.1)
    inputs = torch.full((4, 256), 10.0)  # the exact result is 256
    finite = {}
    for dtype in (torch.float16, torch.bfloat16):
        quantised_layer = copy.deepcopy(layer).to(dtype)
        quantize_(quantised_layer, Int8WeightOnlyConfig())
        finite[dtype] = quantised_layer(inputs.to(dtype)).isfinite().all().item()
    assert finite == {torch.float16: False, torch.bfloat16: True}


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_memory_and_speed_on_a_gpu(scheme, tmp_path, record_property):
    """The figures go into the report of `python -m benchmarks gpu`."""
    needs(scheme)
    config = count.NAMED["stf-7b"]()
    config.text_config.num_hidden_layers = 4
    whole, folder = tmp_path / "whole", tmp_path / "quantised"
    with torch.device("cuda"):  # random numbers for so many weights take long on a CPU
        LlavaSTFForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(whole)
    load(whole, scheme).save_pretrained(folder)
    used = {}
    for name, place in (("whole", whole), (scheme, folder)):
        machine.free("cuda")
        before = machine.used("cuda")
        network = LlavaSTFForConditionalGeneration.from_pretrained(place, dtype="auto", device_map="cuda").eval()
        used[name] = machine.used("cuda") - before
        record_property(f"{name}, bytes", used[name])
        for kind, tokens in (("prefill", 1), ("64 tokens", 64)):
            answer = partial(
                network.generate,
                torch.full((1, 256), 5, device="cuda"),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
            )
            answer()
            record_property(f"{name}, {kind}, seconds", machine.seconds("cuda", answer))
        del network, answer
    assert used[scheme] < used["whole"]
