"""What transformers itself opens: Auto classes, pipelines, serving, answers' lengths, threads, versions, devices."""

import ast
import copy
import inspect
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from test_native import second_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoProcessor,
    DynamicCache,
    GenerationConfig,
    pipeline,
)

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf import modeling_llava_stf as code
from modeling_llava_stf import processing_llava_stf as processing
from modeling_llava_stf._ask_many import prompt_ids
from modeling_llava_stf.configuration_llava_stf import SUPPORTED_TRANSFORMERS
from modeling_llava_stf.modeling_llava_stf import CACHE
from modeling_llava_stf.processing_llava_stf import MODEL_SETTINGS

ROOT = Path(__file__).parents[2]
PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"


@pytest.fixture
def inputs(processor, picture):
    return processor(images=picture("wide.png"), text=PROMPT, return_tensors="pt")


def in_a_process(program, *arguments, **environment):
    """Runs Python where only what `environment` says is different."""
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=3600,
    )
    assert result.returncode == 0, result.stderr
    return result


# The cache has two names


def by_either_name():
    """`cache`, and the older name, which is deprecated where transformers has the newer one."""
    return pytest.mark.parametrize("name", ["cache", "past_key_values"])


@by_either_name()
@torch.no_grad()
def test_forward_takes_the_cache_by_either_name(name, model, inputs):
    token, cache = torch.tensor([[5]]), DynamicCache(config=model.config.text_config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model(**inputs, **{name: cache})
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        continued = model(input_ids=token, **{name: cache}).logits
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 1
        cache.crop(-1)
        of_the_base = model.model(input_ids=token, **{name: cache}).last_hidden_state
    whole = model(torch.cat([inputs["input_ids"], token], dim=1), pixel_values=inputs["pixel_values"]).logits
    torch.testing.assert_close(continued[:, -1], whole[:, -1], rtol=0, atol=2e-5)
    torch.testing.assert_close(model.lm_head(of_the_base)[:, -1], whole[:, -1], rtol=0, atol=2e-5)


@by_either_name()
def test_an_empty_cache_has_not_seen_the_images(name, model, inputs):
    """By either name: an assistant's first pass is none of transformers' first iterations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        cache = DynamicCache(config=model.config.text_config)
        prepared = model.prepare_inputs_for_generation(**inputs, use_cache=True, **{name: cache})
        assert prepared["pixel_values"] is inputs["pixel_values"] and prepared[CACHE] is cache
        with torch.no_grad():
            model(**inputs, **{CACHE: cache})
        prepared = model.prepare_inputs_for_generation(**inputs, use_cache=True, **{name: cache})
    assert "pixel_values" not in prepared


@by_either_name()
def test_generate_takes_the_cache_by_either_name(name, model, inputs):
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    cache = DynamicCache(config=model.config.text_config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=8, **{name: cache})
    assert torch.equal(tokens, expected) and cache.get_seq_length() == tokens.shape[1] - 1


def test_our_own_calls_are_not_deprecated():
    """A filter of pytest makes an error of every one."""
    with pytest.raises(FutureWarning):
        warnings.warn("`gradient` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
    with pytest.raises(FutureWarning):
        warnings.warn("Both `a` and `b` are set for `f`.", FutureWarning, stacklevel=1)


# Auto classes and serving


def test_auto_class_for_pretraining(checkpoint, model):
    loaded = AutoModelForPreTraining.from_pretrained(checkpoint)
    assert type(loaded) is LlavaSTFForConditionalGeneration
    assert type(AutoModelForPreTraining.from_config(model.config)) is LlavaSTFForConditionalGeneration
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_wrong_auto_class_names_the_right_one(checkpoint, model):
    """Without the package, too: `test_remote_code.py`."""
    with pytest.raises(ValueError, match="AutoModelForImageTextToText"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="AutoModelForImageTextToText"):
        AutoModelForCausalLM.from_config(model.config)


SERVING = """
import sys
from transformers.cli.serving.model_manager import ModelManager
manager = ModelManager(device="cpu", trust_remote_code=True)
model = manager._load_model(sys.argv[1] + "@main")
print(type(model).__name__, ModelManager.get_model_modality(model).name)
"""


@pytest.mark.parametrize("package", [True, False], ids=["package in reach", "remote code only"])
def test_transformers_serve_loads_the_model(package, checkpoint, tmp_path):
    """What `transformers serve DIR --trust-remote-code` does to load; its server needs more packages."""
    path = str(ROOT) if package else str(tmp_path)
    result = in_a_process(SERVING, checkpoint, PYTHONPATH=path, HF_HOME=str(tmp_path / "hub"))
    assert result.stdout.split() == ["LlavaSTFForConditionalGeneration", "MULTIMODAL"]


# A folder that a pipeline saved


@pytest.fixture(scope="module")
def piped_folder(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("piped") / "saved"
    pipeline("image-text-to-text", model=str(checkpoint)).save_pretrained(folder)
    return folder


def assert_same_processor(found, expected):
    assert type(found).__name__ == "LlavaSTFProcessor"
    assert found.to_dict() == expected.to_dict()
    assert found.chat_template == expected.chat_template
    assert found.image_processor.to_dict() == expected.image_processor.to_dict()
    for text in (PROMPT, "a  b", "Ünï \n code"):
        assert found.tokenizer(text) == expected.tokenizer(text)


def test_a_pipeline_leaves_out_the_processor_s_settings(piped_folder):
    """transformers 5.16 to 5.24. When this fails, the fallback to config.json can go."""
    assert not (piped_folder / "processor_config.json").exists()


@pytest.mark.parametrize("load", [LlavaSTFProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_processor_of_a_pipeline_s_folder(load, piped_folder, processor):
    assert_same_processor(load(piped_folder), processor)


def test_pipeline_of_a_pipeline_s_folder(piped_folder, processor):
    assert_same_processor(
        pipeline("image-text-to-text", model=str(piped_folder), trust_remote_code=True).processor, processor
    )


def test_processor_in_a_subfolder(piped_folder, processor):
    found = LlavaSTFProcessor.from_pretrained(piped_folder.parent, subfolder=piped_folder.name)
    assert [getattr(found, name) for name in MODEL_SETTINGS] == [getattr(processor, name) for name in MODEL_SETTINGS]


REMOTE = """
import sys
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
processor.save_pretrained(sys.argv[2])
print(type(processor).__module__.split(".")[0])
"""


def test_processor_of_a_pipeline_s_folder_without_the_package(piped_folder, checkpoint, tmp_path):
    environment = {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "hub")}
    result = in_a_process(REMOTE, piped_folder, tmp_path / "saved", **environment)
    assert result.stdout.strip() == "transformers_modules"
    saved, expected = (json.loads((f / "processor_config.json").read_text()) for f in (tmp_path / "saved", checkpoint))
    assert saved == expected


def test_settings_follow_the_model(piped_folder, tmp_path):
    """They are read, not guessed; and values that do not fit are refused as ever."""
    folder = shutil.copytree(piped_folder, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"fusion_window": 1}))
    assert LlavaSTFProcessor.from_pretrained(folder).fusion_window == 1


def test_other_processors_are_still_refused(piped_folder, tmp_path):
    """A plain LLaVA's processor_config.json, and a folder whose config.json is of another model."""
    folder = shutil.copytree(piped_folder, tmp_path / "saved")
    (folder / "processor_config.json").write_text(json.dumps({"patch_size": 14}))
    with pytest.raises(ValueError, match="fusion_window"):
        LlavaSTFProcessor.from_pretrained(folder)
    (folder / "processor_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match="patch_size"):
        LlavaSTFProcessor.from_pretrained(folder)


# How long an answer may be


@pytest.fixture
def endless(model):
    """A model that never ends an answer."""
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def no_length_warnings(caplog):
    import logging

    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert "max_length" not in caplog.text


def test_checkpoints_say_how_long_an_answer_may_be(checkpoint):
    assert GenerationConfig.from_pretrained(checkpoint).max_new_tokens == 512
    small = GenerationConfig.from_pretrained(ROOT / "examples" / "shapes" / "model")
    assert small.max_new_tokens == 128  # a quarter of its context
    small.validate(strict=True)


@pytest.mark.parametrize(
    ("given", "new_tokens"),
    [
        ({}, 30),
        ({"max_new_tokens": 3}, 3),
        ({"max_length": lambda prompt: prompt + 5}, 5),
        ({"generation_config": lambda prompt: GenerationConfig(max_length=prompt + 6)}, 6),
        ({"generation_config": lambda prompt: GenerationConfig(max_new_tokens=4)}, 4),
        ({"generation_config": lambda prompt: GenerationConfig(do_sample=False)}, 30),
    ],
)
def test_the_length_that_a_call_gives_counts(given, new_tokens, endless, inputs, no_length_warnings):
    endless.generation_config.max_new_tokens = 30
    prompt = inputs["input_ids"].shape[1]
    arguments = {name: value(prompt) if callable(value) else value for name, value in given.items()}
    assert endless.generate(**inputs, **arguments).shape[1] == prompt + new_tokens


def test_generation_settings_are_saved_again(model, checkpoint, tmp_path):
    model.save_pretrained(tmp_path)
    saved, first = (GenerationConfig.from_pretrained(folder).to_dict() for folder in (tmp_path, checkpoint))
    assert saved == first
    model.generation_config.validate(strict=True)


# The tower's output is one, whatever is asked for


def towers():
    """Towers that keep layers behind the last tap, and one that keeps none."""
    configs = {"one layer more": second_config(), "many": second_config(vision_feature_layer=[1, 0])}
    return configs | {"none": second_config(vision_feature_layer=[5, 2])}


@pytest.mark.parametrize("images", [1, 40])
@pytest.mark.parametrize("config", towers().values(), ids=towers())
@torch.no_grad()
def test_image_features_are_the_same_whatever_is_asked_for(config, images):
    torch.manual_seed(0)
    model = LlavaSTFForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    pixels = torch.randn(images, 3, config.vision_config.image_size, config.vision_config.image_size)
    plain = model.get_image_features(pixels)
    depth = config.vision_config.num_hidden_layers
    for asked in ({"output_hidden_states": True}, {"output_attentions": True}):
        asked |= {"output_attentions": True} if images == 40 else {}
        found = model.get_image_features(pixels, **asked)
        torch.testing.assert_close(found.last_hidden_state, plain.last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.pooler_output, plain.pooler_output, rtol=0, atol=1e-5)
        if "output_hidden_states" in asked:
            assert len(found.hidden_states) == depth + 1
            last = found.hidden_states[max(config.taps)]
            torch.testing.assert_close(found.last_hidden_state, last, rtol=0, atol=0)
        if "output_attentions" in asked:
            assert len(found.attentions) == depth
    assert plain.hidden_states is None and plain.attentions is None


# Threads share a processor

WORDS = [" ".join(["red"] * count) for count in (1, 7, 30, 90)]


def chat(text):
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def calls_of(processor, tokenizer):
    """Calls with every kind of padding and cutting, and what each must return."""
    settings = [{}, {"padding": "max_length", "max_length": 200}, {"truncation": True, "max_length": 5}]
    settings += [{"padding": True, "pad_to_multiple_of": 64}]
    for text in WORDS:
        yield lambda t=text: prompt_ids(processor, [chat(t)], [])[0]  # of a `PictureCache`, and of `caption`
        for kwargs in settings:
            yield lambda t=text, k=kwargs: processor(text=t, **k)["input_ids"][0]
            yield lambda t=text, k=kwargs: processor.apply_chat_template(
                chat(t), tokenize=True, return_dict=True, processor_kwargs=dict(k)
            )["input_ids"][0]
            yield lambda t=text, k=kwargs: tokenizer()(t, **k)["input_ids"]


def wrong_answers(processor, tokenizer, rounds=40):
    """How many calls of eight threads return another call's length."""
    calls = list(calls_of(processor, tokenizer))
    expected = [call() for call in calls]
    wrong = []

    def work(offset):
        for step in range(rounds):
            index = (offset * 11 + step * 7) % len(calls)
            if calls[index]() != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return len(wrong)


@pytest.fixture
def own_tokenizer(processor):
    """As the docs say: a copy for each thread."""
    own = threading.local()

    def get():
        if not hasattr(own, "tokenizer"):
            own.tokenizer = copy.deepcopy(processor.tokenizer)
        return own.tokenizer

    return get


@pytest.mark.parametrize("how", ["loaded", "deepcopy", "pickle", "saved"])
def test_threads_share_a_processor(how, processor, own_tokenizer, tmp_path):
    if how == "deepcopy":
        processor = copy.deepcopy(processor)
    elif how == "pickle":
        processor = pickle.loads(pickle.dumps(processor))
    elif how == "saved":
        processor.save_pretrained(tmp_path)
        processor = LlavaSTFProcessor.from_pretrained(tmp_path)
    assert wrong_answers(processor, own_tokenizer) == 0


def test_without_its_guard_threads_disturb_one_another(processor, own_tokenizer, monkeypatch):
    """The control: when this fails, transformers needs no guard any more."""
    guard = sys.modules[LlavaSTFProcessor.__module__]._OneAtATime
    monkeypatch.setattr(guard, "__call__", lambda self, *args, **kwargs: self.tokenizer(*args, **kwargs))
    assert any(wrong_answers(processor, own_tokenizer, rounds=300) for _ in range(5))


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_worker_does_not_wait_for_a_thread_that_it_does_not_have(processor):
    guard = sys.modules[LlavaSTFProcessor.__module__]._OneAtATime
    with guard.lock:
        child = os.fork()
        if not child:
            length = len(processor(text="red")["input_ids"][0])
            os._exit(length)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(processor(text="red")["input_ids"][0])


# Versions


def test_supported_versions_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers{SUPPORTED_TRANSFORMERS}" in project["dependencies"]
    floors = dict(re.findall(r"FLOOR_(\w+) := (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert SUPPORTED_TRANSFORMERS.startswith(f">={floors['TRANSFORMERS']},")
    assert f"huggingface-hub>={floors['HUB'].removesuffix('.0')}" in project["dependencies"]


LOAD = """
import os, sys, transformers
transformers.AutoProcessor, transformers.LlavaProcessor  # without torchvision it imports transformers anew
transformers.LlavaForConditionalGeneration
checkpoint, folder, *found = sys.argv[1:]
for version in found:
    for door in ("package", "remote code"):
        child = os.fork()  # which saves the imports
        if child:
            _, status = os.waitpid(child, 0)
            assert status == 0, (version, door)
            continue
        os.dup2(os.open(f"{folder}/{version} {door}", os.O_WRONLY | os.O_CREAT), 2)
        sys.modules["transformers"].__version__ = version
        if door == "package":
            import modeling_llava_stf
        for _ in range(2):
            transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
        sys.exit()
"""


def test_other_versions_are_warned_of_once(checkpoint, tmp_path):
    versions = {"5.30.1": True, "5.16.0": True, "5.24.0": False}
    in_a_process(LOAD, checkpoint, tmp_path, *versions, HF_HOME=str(tmp_path / "hub"))
    for found, warned in versions.items():
        for door in ("package", "remote code"):
            errors = (tmp_path / f"{found} {door}").read_text(encoding="utf-8")
            assert errors.count(f"transformers {found}") == int(warned), errors
            # What is tested, and what to install.
            assert errors.count(SUPPORTED_TRANSFORMERS) == 2 * int(warned), errors


@pytest.mark.parametrize("version", ["2.4", "1.30"])
def test_the_http_client_is_that_of_huggingface_hub(version, monkeypatch):
    """huggingface-hub 2 installs httpx2 alone; before 1.31, until transformers 5.18, it did not name its client."""
    (choice,) = (node for node in ast.parse(inspect.getsource(processing)).body if isinstance(node, ast.Try))
    client, hub = object(), ModuleType("huggingface_hub.utils")
    if version == "2.4":
        hub.httpx = client
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", hub)
    monkeypatch.setitem(sys.modules, "httpx", client if version == "1.30" else None)
    names = {}
    exec(compile(ast.unparse(choice), "choice", "exec"), names)
    assert names["httpx"] is client


def test_transformers_of_tomorrow_are_tried_on_a_schedule():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "transformers-main.yml").read_text(encoding="utf-8"))
    assert workflow[True]["schedule"]  # YAML 1.1 reads the key `on` as true
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert "make test-main" in steps
    planned = subprocess.run(["make", "-n", "test-main"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert "github.com/huggingface/transformers" in planned.stdout and "pytest" in planned.stdout


# Devices


class Devices(TorchDispatchMode):
    """Where tensors are made."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(output, torch.Tensor):
                self.found.add(output.device.type)
        return outputs


def devices_of_every_pass(monkeypatch, hook=None):
    """Inference, training and a batch without images, on the meta device, where no other device hides."""
    monkeypatch.setattr(code, "torch_compilable_check", lambda *args: None)  # looks at values
    monkeypatch.setattr(code.LlavaSTFModel, "_warn_of_missing_images", lambda *args: None)  # too
    config = second_config()
    with torch.device("meta"):
        model = LlavaSTFForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
        ids = torch.full((2, config.tokens_per_image + 5), 5)
        pixels = torch.zeros(2, 3, config.vision_config.image_size, config.vision_config.image_size)
    if hook:
        model.model.multi_modal_projector.register_forward_hook(hook)
    with Devices() as devices:
        model(input_ids=ids, pixel_values=pixels, use_cache=True)
        model.get_image_features(pixels, output_hidden_states=True)
        model.train()
        model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
        model(input_ids=ids, labels=ids).loss.backward()
    return devices.found


def test_no_tensor_is_made_on_a_fixed_device(monkeypatch):
    assert devices_of_every_pass(monkeypatch) == {"meta"}


def test_a_tensor_on_a_fixed_device_would_be_seen(monkeypatch):
    assert "cpu" in devices_of_every_pass(monkeypatch, lambda module, inputs, output: output + torch.zeros(3).sum())


def test_no_code_names_a_device():
    """`.cuda()`, numbered devices, `.to("...")`: only a choice by what there is may name one."""
    named = re.compile(r"""\.cuda\(|\.mps\(|["'](cuda|mps):\d|device\s*=\s*["'](cuda|cpu|mps)|\.to\(\s*["'](?!meta)""")
    allowed = re.compile(r"is_available\(\)|device=\"meta\"")
    folders = ("modeling_llava_stf", "conversion", "training", "examples", "hub_card")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    lines = [(path, line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(files) > 20
    found = [f"{path}: {line.strip()}" for path, line in lines if named.search(line) and not allowed.search(line)]
    assert not found
    assert all(named.search(line) for line in ("x.cuda()", "x.to('cuda')", 'device="cuda"', '"cuda:0"'))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@torch.no_grad()
def test_two_devices_answer_as_one(load_model, inputs):
    one = load_model(device_map={"": 0})
    size = sum(weight.nbytes for weight in one.parameters())
    two = load_model(device_map="auto", max_memory={0: int(0.6 * size), 1: size})
    assert {weight.device.index for weight in two.parameters()} == {0, 1}
    on_the_first = {name: value.to(0) for name, value in inputs.items()}
    expected, found = one(**on_the_first).logits, two(**on_the_first).logits
    torch.testing.assert_close(found.to(0), expected, rtol=0, atol=1e-4)
    answers = [model.generate(**on_the_first, do_sample=False, max_new_tokens=8) for model in (one, two)]
    assert torch.equal(answers[0], answers[1].to(0))
