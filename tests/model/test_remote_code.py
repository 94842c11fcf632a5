"""A checkpoint is a complete Hub folder: it runs without this package, and saving what was loaded changes nothing."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load, load_file, save_file

from conversion.checkpoints.folders import TEMPLATES as CHAT_TEMPLATES
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor

ROOT = Path(__file__).parents[2]
HUB_ID = "some-user/llava-stf-1.0"
CODE = ["configuration_llava_stf.py", "modeling_llava_stf.py", "processing_llava_stf.py"]
WEIGHTS = "model.safetensors"
FILES = sorted(
    [*CODE, "chat_template.jinja", "config.json", "generation_config.json", WEIGHTS]
    + ["processor_config.json", "tokenizer.json", "tokenizer_config.json"]
)
FUSION = "model.multi_modal_projector.spatial_fusion.linear_1"
CLIP_OUT = "model.vision_tower.encoder.layers.0.self_attn.out_proj.weight"


def golden_case(goldens, name):
    return next(case for case in goldens["generate"] if case["name"] == name)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_alone(function, home, *arguments):
    """What `function` returns in a fresh process: no network, empty caches, this package not installed."""
    program = (
        "import json, sys\n"
        "sys.modules.update(modeling_llava_stf=None, conversion=None)  # importing them fails\n"
        f"{inspect.getsource(function)}\n"
        f"print(json.dumps({function.__name__}(*sys.argv[1:])))"
    )
    caches = {"HF_HOME": home, "HF_HUB_CACHE": home / "hub", "HF_MODULES_CACHE": home / "modules"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", program, *map(str, arguments)],
        cwd=home,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | {name: str(path) for name, path in caches.items()},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def with_auto_classes(folder, picture, prompt, max_new_tokens, destination):
    import transformers

    try:
        import modeling_llava_stf  # noqa: F401
    except ImportError:
        package = None
    else:
        package = "importable"

    def loaded(name, **kwargs):
        return getattr(transformers, name).from_pretrained(folder, trust_remote_code=True, **kwargs)

    config, processor = loaded("AutoConfig"), loaded("AutoProcessor")
    base, info = loaded("AutoModel", output_loading_info=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    classes, tokens = [type(thing) for thing in (config, processor, processor.image_processor, base)], {}
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForPreTraining"):
        model = loaded(name)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=int(max_new_tokens))
        tokens[name] = output[0, inputs["input_ids"].shape[1] :].tolist()
        classes.append(type(model))
    model.save_pretrained(destination)
    processor.save_pretrained(destination)
    try:
        causal = type(loaded("AutoModelForCausalLM")).__name__
    except ValueError as error:
        causal = str(error)
    return {
        "package": package,
        "classes": [kind.__name__ for kind in classes],
        "modules": [kind.__module__ for kind in classes],
        "missing": sorted(info["missing_keys"]),
        "tokens": tokens,
        "causal": causal,
    }


def with_a_pipeline(model, picture, question, max_new_tokens, destination):
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=model, trust_remote_code=True)
    content = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    answer = pipe(chat, max_new_tokens=int(max_new_tokens), do_sample=False, return_full_text=False)
    pipe.model.save_pretrained(destination)
    pipe.processor.save_pretrained(destination)
    return {"answer": answer[0]["generated_text"], "module": type(pipe.model).__module__}


@pytest.fixture(scope="module")
def saved_by_package(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    LlavaSTFForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(folder)
    LlavaSTFProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(checkpoint, goldens, tmp_path_factory):
    """A converted checkpoint in a folder `x`, with the Auto classes; and the folder to which it was saved again."""
    home = tmp_path_factory.mktemp("alone")
    case = golden_case(goldens, "short_image")
    shutil.copytree(checkpoint, home / "x")
    picture = GOLDENS / "images" / case["images"][0]
    arguments = [picture, case["prompt"], case["max_new_tokens"], home / "saved"]
    return run_alone(with_auto_classes, home, home / "x", *arguments), home / "saved"


@pytest.fixture(scope="module", params=["folder", "hub_id"])
def piped(request, saved_by_package, goldens, tmp_path_factory):
    """A saved checkpoint in a pipeline, from a folder or from the cache of the Hub; and where it was saved again."""
    home = tmp_path_factory.mktemp("piped")
    case = golden_case(goldens, "single_image")
    question = case["prompt"].split("<image>\n")[1].removesuffix(" ASSISTANT:")
    folder, model = home / "x", home / "x"
    if request.param == "hub_id":
        cache, commit = home / "hub" / f"models--{HUB_ID.replace('/', '--')}", "0" * 40
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(commit)
        folder, model = cache / "snapshots" / commit, HUB_ID
    shutil.copytree(saved_by_package, folder)
    arguments = [GOLDENS / "images" / case["images"][0], question, case["max_new_tokens"], home / "saved"]
    return run_alone(with_a_pipeline, home, model, *arguments), home / "saved"


def test_loads_without_the_package(alone):
    found, _ = alone
    assert found["package"] is None
    assert all(module.startswith("transformers_modules.x.") for module in found["modules"])
    generator = "LlavaSTFForConditionalGeneration"
    processors = ["LlavaSTFProcessor", "LlavaSTFImageProcessor"]
    assert found["classes"] == ["LlavaSTFConfig", *processors, "LlavaSTFModel", *[generator] * 3]
    assert not found["missing"]


def test_greedy_tokens_without_the_package(alone, goldens):
    expected = golden_case(goldens, "short_image")["new_tokens"]
    found, _ = alone
    assert found["tokens"] == dict.fromkeys(found["tokens"], expected) and len(found["tokens"]) == 3


def test_is_not_a_model_of_text_alone(alone):
    assert "AutoModelForImageTextToText" in alone[0]["causal"]  # a hint, where people look first


def test_pipeline_answers(piped, goldens, processor):
    found, _ = piped
    assert found["module"].startswith("transformers_modules.")
    expected = golden_case(goldens, "single_image")["new_tokens"]
    assert found["answer"] == processor.decode(expected, skip_special_tokens=True)


def test_converter_writes_what_the_model_saves(checkpoint, saved_by_package):
    """The same tensors, maybe in another order, the same other files, and more: a card, licences."""
    converted, saved = files_of(checkpoint), files_of(saved_by_package)
    tensors, saved_tensors = load(converted.pop(WEIGHTS)), load(saved.pop(WEIGHTS))
    assert tensors.keys() == saved_tensors.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in saved_tensors.items())
    assert {name: converted.get(name) for name in saved} == saved


def test_saved_folder_is_complete(saved_by_package):
    assert sorted(files_of(saved_by_package)) == FILES


def test_saved_code_is_that_of_the_package(saved_by_package):
    for name in CODE:
        code = (ROOT / "modeling_llava_stf" / name).read_bytes()
        assert (saved_by_package / name).read_bytes() == code


@pytest.mark.parametrize("name", CODE)
def test_code_imports_nothing_outside_the_folder(name):
    """The Hub's loader follows `from .file import name` alone, and finds it by a pattern, in docstrings too."""
    source = (ROOT / "modeling_llava_stf" / name).read_text(encoding="utf-8")
    local = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in CODE
            local.append(node.module)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {module.split(".")[0] for module in modules} & {"conversion", "modeling_llava_stf", "training"}
    assert re.findall(r"^\s*(?:from|import)\s+\.(\S*)", source, re.MULTILINE) == local


def test_saving_again_changes_nothing(saved_by_package, tmp_path):
    model = LlavaSTFForConditionalGeneration.from_pretrained(saved_by_package)
    processor = LlavaSTFProcessor.from_pretrained(saved_by_package)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        assert files_of(folder) == files_of(saved_by_package)


def test_remote_code_saves_what_the_package_saves(alone, saved_by_package):
    assert files_of(alone[1]) == files_of(saved_by_package)


def test_pipeline_saves_what_it_loaded(piped, saved_by_package):
    """Also from a Hub id, which the loader writes into the references to the code."""
    assert files_of(piped[1]) == files_of(saved_by_package)


def test_code_references_name_files_of_the_folder(piped):
    references = []
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        settings = json.loads((piped[1] / name).read_text(encoding="utf-8"))
        inner = settings.get("image_processor", {})
        references += [*settings["auto_map"].items(), *inner.get("auto_map", {}).items()]
    assert {kind for kind, _ in references} == {
        "AutoConfig",
        "AutoImageProcessor",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoModelForPreTraining",
        "AutoProcessor",
    }
    for _, reference in references:
        module, name = reference.split(".")
        assert re.search(rf"^class {name}\b", (piped[1] / f"{module}.py").read_text(encoding="utf-8"), re.MULTILINE)


def test_references_to_another_repository_are_not_kept(saved_by_package, tmp_path):
    shutil.copytree(saved_by_package, tmp_path / "copied")
    for path in (tmp_path / "copied").glob("*.json"):
        settings = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r'"(\w+_llava_stf\.LlavaSTF)', r'"some/one--\1', settings), encoding="utf-8")
    assert "some/one--" in (tmp_path / "copied" / "config.json").read_text(encoding="utf-8")
    LlavaSTFForConditionalGeneration.from_pretrained(tmp_path / "copied").save_pretrained(tmp_path / "saved")
    LlavaSTFProcessor.from_pretrained(tmp_path / "copied").save_pretrained(tmp_path / "saved")
    assert files_of(tmp_path / "saved") == files_of(saved_by_package)


def test_the_chat_template_is_a_file(saved_by_package, processor):
    template = (CHAT_TEMPLATES / "vicuna_v1.jinja").read_text(encoding="utf-8")
    assert (saved_by_package / "chat_template.jinja").read_text(encoding="utf-8") == template
    for name in ("tokenizer_config.json", "processor_config.json"):
        assert "chat_template" not in json.loads((saved_by_package / name).read_text(encoding="utf-8"))
    assert processor.chat_template == processor.tokenizer.chat_template == template


def test_every_tensor_of_the_file_is_loaded(checkpoint, model):
    weights = load_file(checkpoint / WEIGHTS)
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, tensor in weights.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def test_shards_hold_every_tensor(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again, info = LlavaSTFForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_missing_weights_are_named_and_initialised(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    weights = load_file(checkpoint / WEIGHTS)
    missing = {f"{FUSION}.weight", f"{FUSION}.bias", CLIP_OUT}
    kept = {name: tensor for name, tensor in weights.items() if name not in missing}
    save_file(kept, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model, info = LlavaSTFForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == missing
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert state[f"{FUSION}.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert state[f"{FUSION}.bias"].abs().max() == 0
    assert state[CLIP_OUT].std().item() == pytest.approx(len(state[CLIP_OUT]) ** -0.5, rel=0.1)  # CLIP's own scale
