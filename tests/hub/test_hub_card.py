"""Cards: what they say comes from files, what they leave out is unknown, and what they claim is checked."""

import importlib
import json
import re
import shlex
import shutil
import sys
import zlib

import pytest
import torch
import yaml
from conftest import CARD_FACTS, GOLDENS
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from conversion import convert, to_hub
from conversion.checkpoints.folders import name_auto_class
from hub_card import Facts, check, freeze, gather
from hub_card.__main__ import main
from hub_card.card import ROOT, name_base, pinned_versions, write_card
from hub_card.check import check_current, check_paths, compare_use
from hub_card.fresh_process import escaped, use
from hub_card.picture import draw_method
from hub_card.results import read_evaluation, read_speed
from hub_card.snippet import snippet_of
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFProcessor

LMMS_EVAL = ROOT / "tests" / "hub" / "lmms_eval_results.json"
AUTHORS = ROOT / "hub_card" / "results" / "authors_7b.json"
SECTIONS = [
    "Use",
    "The model",
    "Intended use and limits",
    "Serve, quantise, fine-tune",
    "Versions",
    "Licences",
    "Citation",
]


@pytest.fixture
def folder(card_folder, tmp_path):
    """A copy of it, to be broken."""
    return shutil.copytree(card_folder, tmp_path / "tiny")


@pytest.fixture(scope="module")
def found(card_folder):
    """What a fresh process says of it."""
    return use(freeze(card_folder), snippet_of((card_folder / "README.md").read_text())[0])


@pytest.fixture
def run(monkeypatch, capsys):
    """`python -m hub_card ...` in this process: exit status, standard output and error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["hub_card", *map(str, arguments)])
        status = main()
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def real_7b(tmp_path_factory):
    """A folder with the shapes of the real 7B; the 14 GB of its weights are a hole in the file."""
    folder = tmp_path_factory.mktemp("real") / "llava-stf-7b"
    folder.mkdir()
    shapes = json.loads((GOLDENS / "keys_7b.json").read_text())
    header, end = {}, 0
    for name, shape in ((name, shapes[old]) for name, old in to_hub({key: key for key in shapes}).items()):
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    LlavaSTFConfig(text_config=LlamaConfig(vocab_size=32000, max_position_embeddings=4096)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor_7b(checkpoint, real_7b):
    """The processor of the 7B: the tiny one's tokenizer, the settings of the real tower."""
    from modeling_llava_stf import LlavaSTFProcessor

    processor = LlavaSTFProcessor.from_pretrained(checkpoint)
    processor.patch_size = 14
    processor.image_processor.size = {"shortest_edge": 336}
    processor.image_processor.crop_size = {"height": 336, "width": 336}
    processor.save_pretrained(real_7b)


def text_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def head_of(text):
    return yaml.safe_load(text.split("---\n")[1])


def sections_of(text):
    outside_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"^## (.+)$", outside_code, re.MULTILINE)


# What a card says


def test_card_of_a_tiny_model(card_folder):
    text = text_of(card_folder)
    assert sections_of(text) == SECTIONS
    head = head_of(text)
    assert head == {
        "license": "cc-by-nc-4.0",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava_stf", "vision-language", "token-fusion", "custom_code"],
    }
    assert "**4 vision tokens** instead of 16" in text
    weights = load_file(card_folder / "model.safetensors")
    assert f"| parameters | {sum(tensor.numel() for tensor in weights.values()):,} |" in text
    assert "| weights | float32, 1.86MB |" in text
    assert "- Code in this repository: Apache-2.0" in text and "- Weights: cc-by-nc-4.0." in text
    assert "- Base" not in text and "None" not in text and "{{" not in text
    assert not re.search(r"\n{3,}", text) and text.endswith("```\n")


def test_card_of_the_real_7b_has_facts_only(real_7b, processor_7b):
    facts = Facts(
        license="cc-by-nc-4.0",
        base_model=["visresearch/LLaVA-STF"],
        base_license="Vicuna-1.5, Llama 2 Community License",
        datasets=["liuhaotian/LLaVA-Pretrain"],
        language=["en"],
    )
    text = gather(real_7b, "some/llava-stf-7b", facts, results=[AUTHORS]).render()
    assert sections_of(text) == [*SECTIONS[:3], "Results", "Training", *SECTIONS[3:]]
    assert "**144 vision tokens** instead of 576" in text
    assert "| parameters | 7,213,915,136 |" in text and "| weights | bfloat16, 14.4GB |" in text
    assert "hidden states of its blocks 23, 21, 18, 15, 12, 9, 6, 3" in text and "12 x 12 = 144" in text
    head = head_of(text)
    assert (head["license"], head["base_model"]) == ("cc-by-nc-4.0", ["visresearch/LLaVA-STF"])
    assert (head["datasets"], head["language"]) == (["liuhaotian/LLaVA-Pretrain"], ["en"])
    # Every measured value is the authors', and says so.
    published = {row["benchmark"]: row["value"] for row in json.loads(AUTHORS.read_text())["results"]}
    entries = ModelCard(text).data.eval_results
    assert {entry.dataset_name: entry.metric_value for entry in entries} == published
    for entry in entries:
        assert (entry.source_name, entry.source_url) == ("arXiv 2506.07138", "https://arxiv.org/abs/2506.07138")
        assert entry.task_type == "image-text-to-text" and entry.metric_type and entry.dataset_type
    assert "**Published by the authors, not measured here**" in text
    assert "it is worse on VQAv2, GQA, TextVQA, MME." in text and "| MME | 1510.7 | 1482.8 | -27.9 |" in text
    assert "- Base language model: Vicuna-1.5, Llama 2 Community License." in text
    assert "prints" not in text and "Speed" not in sections_of(text)


def test_versions_are_those_of_the_tests():
    versions = pinned_versions()
    pinned = (ROOT / "constraints.txt").read_text()
    assert all(f"{name}=={versions[name]}" in pinned for name in ("torch", "peft", "huggingface-hub"))
    floor = re.search(r"FLOOR_TRANSFORMERS := (\S+)", (ROOT / "Makefile").read_text())[1]
    assert versions["transformers"].startswith(f"{floor} and ")


def test_results_of_lmms_eval(folder):
    """The file is one that lmms-eval 0.7.3 wrote: a group of two tasks, filters, an object, errors of three kinds."""
    text = gather(folder, "some/tiny", CARD_FACTS, results=[LMMS_EVAL]).render()
    entries = {(entry.dataset_name, entry.metric_name): entry for entry in ModelCard(text).data.eval_results}
    results = json.loads(LMMS_EVAL.read_text(encoding="utf-8"))["results"]
    words, parts, shapes = results["words"], results["parts"], results["shapes"]
    assert {name: entry.metric_value for name, entry in entries.items()} == {
        ("both (group of 2 tasks)", "exact_match (sentence)"): words["exact_match,sentence"],
        ("both (group of 2 tasks)", "exact_match (first_word)"): words["exact_match,first_word"],
        ("words", "exact_match (sentence)"): words["exact_match,sentence"],
        ("words", "exact_match (first_word)"): words["exact_match,first_word"],
        ("parts", "right: short"): parts["right,none"]["short"],
        ("parts", "right: long"): parts["right,none"]["long"],
        ("parts", "letters"): parts["letters,none"],
        ("shapes", "accuracy"): shapes["accuracy,none"],
    }
    entry = entries["shapes", "accuracy"]
    assert (entry.dataset_type, entry.dataset_split, entry.dataset_config) == ("shapes", "test", None)
    assert (entry.source_name, entry.source_url) == ("lmms-eval", "https://github.com/EvolvingLMMs-Lab/lmms-eval")
    clt, clustered = (shapes[f"accuracy_stderr_{kind},none"] for kind in ("clt", "clustered"))
    errors = f"CLT ± {clt:.4g}, clustered ± {clustered:.4g}"
    assert f"| shapes | accuracy | {shapes['accuracy,none']} | {errors} | 12 of 200 |" in text
    error = f"{parts['letters_stderr,none']:.4g}"
    assert (
        f"| parts | letters (lower is better) | {parts['letters,none']} | ± {error}, CLT ± {error} | 12 of 24 |" in text
    )
    assert "but no scores: parts submission (no number)." in text
    assert "ONLY THE FIRST 12.0 SAMPLES of each task" in text
    command = (
        "python -m lmms_eval --model llava_stf --model_args pretrained=some/tiny,dtype=float32 --tasks both,shapes"
    )
    assert f"`{command} --include_path TASKS --batch_size 16 --limit 12`" in text


@pytest.mark.parametrize("path", [LMMS_EVAL, AUTHORS], ids=["lmms-eval", "published"])
def test_results_of_another_model_are_refused(path, folder):
    with pytest.raises(ValueError, match="not of the model of this card.*some/other"):
        gather(folder, "some/other", CARD_FACTS, results=[path])


@pytest.mark.parametrize(
    "content, reason",
    [
        ("[1]", "expected an object"),
        ("{", "Cannot read"),
        ('{"speed": 3}', "no `results`"),
        ('{"results": [{"value": 3}]}', "lacks 'source'"),
        ('{"results": {"gqa": {}}}', "lacks 'config'"),
    ],
)
def test_damaged_results_are_refused(content, reason, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        read_evaluation(tmp_path / "results.json", {"some/tiny"})


def test_speed_has_its_conditions(folder, tmp_path):
    measured = {
        "command": "python benchmarks/speed.py",
        "device": "a CPU of 2 cores",
        "conditions": "batch 1, float32",
        "baseline": "LLaVA-1.5",
        "rows": [{"what": "time to first token", "value": 2, "unit": "ms", "baseline": 3}],
    }
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(measured))
    text = gather(folder, "some/tiny", CARD_FACTS, speeds=[path]).render()
    said = "Measured on a CPU of 2 cores: batch 1, float32. To repeat: `python benchmarks/speed.py`."
    assert said in text and "| time to first token | 3 ms | 2 ms |" in text
    for name in ("command", "device", "conditions", "rows"):
        path.write_text(json.dumps({**measured, name: ""}))
        with pytest.raises(ValueError, match=f"lacks {name}"):
            read_speed(path)


def test_training_is_read_from_the_run(folder):
    state = {
        "global_step": 20,
        "max_steps": 20,
        "epoch": 1.0,
        "train_batch_size": 8,
        "log_history": [
            {"step": 1, "loss": 6.5, "learning_rate": 1e-3},
            {"step": 20, "loss": 2.25, "learning_rate": 5e-4},
            {"step": 20, "train_runtime": 3.0},
        ],
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "recipe.yaml").write_text("lora_r: 128\nmodules: q|k\ndata_path: /data/mine\nepochs: null\n")
    text = gather(folder, "some/tiny", CARD_FACTS).render()
    training = text.split("## Training\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| (\S.*?) \| (.*) \|$", training, re.MULTILINE)[1:] == [
        ("`lora_r`", "`128`"),
        ("`modules`", r"`q\|k`"),
        ("steps", "20 of 20"),
        ("epochs", "1"),
        ("batch size of a device", "8"),
        ("highest learning rate", "0.001"),
        ("loss", "6.5 at step 1, 2.25 at step 20"),
    ]


def test_the_weights_may_be_those_of_an_earlier_step(folder):
    """With `load_best_model_at_end`; a checkpoint within a run has those of its own step."""
    state = {"global_step": 20, "max_steps": 20, "best_global_step": 5, "best_model_checkpoint": "/out/checkpoint-4"}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    for settings, said in (
        ("load_best_model_at_end: true", "those of step 4, the best by loss in evaluation"),
        ("load_best_model_at_end: true\nmetric_for_best_model: f1", "those of step 4, the best by f1 in evaluation"),
        ("load_best_model_at_end: false", None),
    ):
        (folder / "recipe.yaml").write_text(settings)
        facts = gather(folder, "some/tiny", CARD_FACTS)
        assert facts.training.get("weights") == said
        assert (f"| weights | {said} |" in facts.render()) == (said is not None)
    (folder / "recipe.yaml").write_text("load_best_model_at_end: true")
    (folder / "training_run.json").write_text("{}")
    assert "weights" not in gather(folder, "some/tiny", CARD_FACTS).training


def test_a_picture_that_is_cropped_is_said_to_be(folder):
    """As in a converted run of stage 1."""
    assert "- The processor pads a picture to a square and scales it to 56 x 56 pixels." in text_of(folder)
    processor = LlavaSTFProcessor.from_pretrained(folder)
    processor.image_processor.do_pad = False
    processor.save_pretrained(folder)
    text = gather(folder, "some/tiny", CARD_FACTS).render()
    assert "keeps its middle square of 56 x 56 pixels: the model does not see the rest.\n- On a GPU" in text
    assert "pads a picture" not in text


def test_picture_has_the_grids_of_the_config():
    """Counted along a line through each grid: the lines between the cells of 24 patches and of 12 tokens."""
    picture = draw_method(LlavaSTFConfig()).convert("L")
    assert picture.size == (1200, 430)

    def cells(left, right):
        row = [picture.getpixel((x, 265)) < 190 for x in range(left, right)]
        return sum(1 for before, here in zip(row, row[1:], strict=False) if here and not before)

    assert (cells(42, 249), cells(614, 821), cells(884, 1091)) == (23, 23, 11)


def test_pictures_and_licences_are_written(card_folder):
    for name in ("method.png", "example.png"):
        with Image.open(card_folder / name) as picture:
            picture.verify()
        assert name in text_of(card_folder)
    for name in ("LICENSE", "NOTICE"):
        assert (card_folder / name).read_bytes() == (ROOT / name).read_bytes()


def test_what_a_snippet_prints_can_stand_on_a_card():
    assert escaped("fox \x1a\x00\r \u00e9 \U0001f98a\n2 ") == "fox \\x1a\\x00\\r \u00e9 \U0001f98a\n2 "


def test_an_example_of_one_s_own_stays(folder):
    Image.new("RGB", (9, 9), "red").save(folder / "example.png")
    write_card(folder, gather(folder, "some/tiny", CARD_FACTS))
    with Image.open(folder / "example.png") as picture:
        assert picture.size == (9, 9)


def test_quantised_model_says_so(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    text = gather(folder, "some/tiny-4bit", Facts(license="llama2", base_model=["some/tiny"])).render()
    assert "| quantised with | bitsandbytes |" in text and "**Quantise**" not in text
    assert head_of(text)["base_model_relation"] == "quantized"


# The command line


def test_render_remembers_what_it_was_told(folder, run):
    status, _, errors = run("render", folder)
    assert status == 2 and "--repo-id USER/NAME --license" in errors
    assert run("render", folder, "--repo-id", "some/tiny", "--license", "llama2", "--note", "Random weights.")[0] == 0
    once = text_of(folder)
    assert run("render", folder)[0] == 0 and text_of(folder) == once
    assert run("render", folder, "--tag", "v2")[0] == 0
    assert text_of(folder) == once.replace('"v1"', '"v2"').replace("--revision v1", "--revision v2")
    assert "> Random weights." in once
    assert ".hub_card.json" in freeze(folder).left_out


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--repo-id", "some"], "'some' is no id"),
        (["--base-model", "/home/me/vicuna"], "'/home/me/vicuna' is no id"),
        (["--base", "some/base"], "is for adapters"),
        (["--recipe", "nowhere.yaml"], "no recipe"),
        (["--results", "nowhere.json"], "nowhere.json"),
    ],
)
def test_render_refuses(arguments, reason, folder, run):
    before = text_of(folder)
    status, output, errors = run("render", folder, "--repo-id", "some/tiny", "--license", "llama2", *arguments)
    assert (status, output) == (2, "") and re.fullmatch(r"error: [^\n]*\n", errors) and reason in errors
    assert text_of(folder) == before


@pytest.mark.parametrize("command", ["render", "check"])
def test_a_folder_without_a_model_is_refused(command, tmp_path, run):
    for place in (tmp_path, tmp_path / "nowhere"):
        status, _, errors = run(command, place)
        assert status == 2 and str(place) in errors


# The checks: each finds its fault, and nothing else finds anything


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_card(folder, old, new):
    text = text_of(folder)
    assert old in text
    (folder / "README.md").write_text(text.replace(old, new), encoding="utf-8")


def put_in_weights(folder, **changes):
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", **changes})


def write_chunk(path, name, data):
    """Puts a chunk into a PNG, in front of its end."""
    content = path.read_bytes()
    chunk = len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    path.write_bytes(content[:-12] + chunk + content[-12:])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


FAULTS = {
    "processor": (lambda f: (f / "processor_config.json").unlink(), "incomplete: processor_config.json"),
    "code": (lambda f: (f / "modeling_llava_stf.py").unlink(), "incomplete: modeling_llava_stf.py"),
    "card": (lambda f: (f / "README.md").unlink(), "incomplete: README.md is missing (python -m hub_card render"),
    "picture": (lambda f: (f / "example.png").unlink(), "incomplete: example.png"),
    "weights": (lambda f: (f / "model.safetensors").unlink(), "incomplete: there are no weights"),
    "not finite": (put_in_weights, "NaN or infinite values"),
    "truncated": (lambda f: truncate(f / "model.safetensors"), "weights: Cannot read"),
    "not downloaded": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a pointer of Git LFS, not the file itself",
    ),
    "old weights": (
        lambda f: shutil.copy(f / "model.safetensors", f / "model-00001-of-00002.safetensors"),
        "weights: model-00001-of-00002.safetensors does not belong",
    ),
    "no yaml": (lambda f: edit_card(f, "---\nlibrary", "library"), "metadata: README.md does not begin"),
    "bad yaml": (lambda f: edit_card(f, "tags:\n", "tags: [\n"), "metadata: the YAML of README.md is not valid"),
    "pipeline": (lambda f: edit_card(f, "pipeline_tag: image-text-to-text", "pipeline_tag: x"), "metadata: `pipeline_"),
    "spelling": (lambda f: edit_card(f, "tags:\n", "licence: mit\ntags:\n"), "metadata: README.md says `licence`"),
    "no licence": (lambda f: edit_card(f, "license: cc-by-nc-4.0\n", ""), "licence: `license` in README.md is None"),
    "no LICENSE": (lambda f: (f / "LICENSE").unlink(), "licence: LICENSE is missing"),
    "empty NOTICE": (lambda f: (f / "NOTICE").write_text(""), "licence: NOTICE is missing or empty"),
    "no snippet": (lambda f: edit_card(f, "```python", "```"), "snippet: The card has no snippet"),
    "unpinned": (lambda f: edit_card(f, "repository, revision =", "repository, other ="), "snippet: The snippet of"),
    "pickle": (lambda f: torch.save({}, f / "extra.pt"), "pickle: extra.pt"),
    "hidden pickle": (lambda f: torch.save({}, f / "extra.data"), "pickle: extra.data"),
    "path": (
        lambda f: edit_json(f / "config.json", _name_or_path="/home/me/run 1"),
        "path: config.json names '/home/me/run 1'",
    ),
    "path in text": (
        lambda f: edit_card(f, "## Use", "See /home/me/x.\n\n## Use"),
        "path: README.md names '/home/me/x.",
    ),
    "windows path": (
        lambda f: edit_json(f / "generation_config.json", made="in C:\\Users\\me"),
        "path: generation_config.json names 'C:\\\\Users\\\\me'",
    ),
    "token": (
        lambda f: edit_json(f / "config.json", x="hf_" + "a" * 34),
        "secret: config.json holds a Hugging Face token",
    ),
    "secret in weights": (
        lambda f: save_file(load_file(f / "model.safetensors"), f / "model.safetensors", {"key": "AKIA" + "A" * 16}),
        "secret: model.safetensors holds an AWS key",
    ),
    "key": (lambda f: (f / "id").write_text("-----BEGIN PRIVATE KEY-----\n"), "secret: id holds a private key"),
    "own token": (lambda f: (f / "notes.md").write_text("so-secret-1"), "secret: notes.md holds the token that you"),
    "json": (lambda f: truncate(f / "tokenizer.json"), "damaged: tokenizer.json is not JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_alone(fault, folder, monkeypatch):
    break_it, expected = FAULTS[fault]
    monkeypatch.setenv("HF_TOKEN", "so-secret-1")
    break_it(folder)
    (problem,) = check(folder)
    assert expected in problem
    assert "hf_a" not in problem and "AKIAA" not in problem and "so-secret" not in problem


def test_what_only_looks_like_a_path_is_none(folder):
    edit_json(folder / "tokenizer.json", merges=["/home/me x"])  # words of a vocabulary
    write_chunk(folder / "example.png", b"hIST", b"\xff ~/x C:\\x")  # by chance
    edit_card(folder, "## Use", "See https://some.org/data/x, `a/b/c` and USER:\\n.\n\n## Use")
    assert not list(check_paths(freeze(folder)))


def test_all_faults_are_listed(folder, run):
    edit_json(folder / "config.json", _name_or_path="/home/me/run")
    (folder / "LICENSE").unlink()
    status, output, errors = run("check", folder)
    assert (status, output) == (2, "")
    lines = errors.replace("\r", "\n").splitlines()
    assert [line for line in lines if line.startswith("- ")] == [
        "- licence: LICENSE is missing or empty",
        "- path: config.json names '/home/me/run', a place on this machine",
    ]
    assert lines[-1].startswith("error: ") and "wrong: 2" in lines[-1]


def test_state_of_a_run_is_left_out(folder):
    names = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    for name in (*names, "training_run.json"):
        (folder / name).write_bytes(b"\x80\x02")
    (folder / "checkpoint-1").mkdir()
    shutil.copy(folder / "config.json", folder / "checkpoint-1")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("")
    frozen = freeze(folder)
    assert frozen.left_out == {
        **dict.fromkeys([*names, "training_run.json"], "state of a training run"),
        "checkpoint-1/": "a checkpoint of its own",
        ".git/": "hidden",
    }
    assert not any(name.startswith(("checkpoint", "train", "opt", ".git")) for name in frozen.files)


# Use: in a fresh process


def test_snippet_prints_what_the_model_says(card_folder, found, processor, model):
    content = [
        {"type": "image", "path": str(card_folder / "example.png")},
        {"type": "text", "text": "What is in the picture?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=32)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found == {"wrong": [], "tokens_per_image": 4, "on": "cpu, float32", "printed": escaped(expected)}


def test_what_the_card_claims_is_compared(card_folder, found):
    text = text_of(card_folder)
    assert not list(compare_use(text, found))
    more = text.replace("**4 vision tokens**", "**5 vision tokens**")
    assert list(compare_use(more, found)) == ["tokens: an image takes 4 vision tokens, the card says 5"]
    end = text.index("```\n", text.index("```python")) + len("```\n")
    for printed, problems in ((found["printed"], 0), ("a cat", 1)):
        shown = f"{text[:end]}\nprints (on cpu, float32)\n\n```text\n{printed}\n```\n{text[end:]}"
        assert len(list(compare_use(shown, found))) == problems


def test_missing_weights_and_broken_snippets_are_found(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.multi_modal_projector.spatial_fusion.linear_1.weight"
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert check(folder) == [f"use: missing weight: {name}"]
    edit_card(folder, "from transformers import pipeline", "from transformers import pipelines as pipeline")
    (problem,) = check(folder)
    assert problem.startswith("snippet: it is not what this package writes, and was not run")
    (problem,) = check(folder, run_code=True)
    assert problem.startswith("use: it does not load in a fresh process: TypeError")


def test_an_adapter_without_a_base_on_the_hub_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base"}')
    with pytest.raises(ValueError, match="The adapter's base is '/home/me/base'.*--base USER/NAME"):
        gather(folder, "some/lora", CARD_FACTS)
    with pytest.raises(ValueError, match="'/home/me/base' is no id"):
        name_base(folder, "/home/me/base", "v1")
    name_base(folder, "some/base", "v2")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings == {
        "base_model_name_or_path": "some/base",
        "revision": "v2",
        "task_type": None,
        "auto_mapping": {"base_model_class": "AutoModelForImageTextToText", "parent_library": "transformers"},
    }


def test_the_command_that_serves_needs_no_other_file(card_folder):
    """It works with a Hub id from an empty folder, and names the tag of the snippet."""
    card = (card_folder / "README.md").read_text(encoding="utf-8")
    (serve,) = re.findall(r"^- \*\*Serve\*\*.*?(?=^- )", card, re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"`([^`]+)`", serve)
    assert shlex.split(command) == ["vllm", "serve", "some/tiny", "--revision", "v1", "--trust-remote-code"]


def test_card_of_a_processor_whose_default_was_not_trained(folder):
    processor = LlavaSTFProcessor.from_pretrained(folder, max_soft_tokens=1)
    processor.save_pretrained(folder)
    text = gather(folder, "some/tiny", CARD_FACTS).render()
    assert "**1 vision tokens**" in text and "trained for 4 tokens" in text and '{"max_soft_tokens": 4}' in text


def test_card_of_an_adapter_names_its_budgets(tmp_path):
    folder = convert(GOLDENS / "lora", tmp_path / "lora", base=GOLDENS / "base", keep_adapter=True)
    name_base(folder, "some/base", "v1")
    before = gather(folder, "some/lora", CARD_FACTS).render()
    assert "**4 vision tokens**" in before and "max_soft_tokens" not in before
    name_auto_class(folder, [4, 1])
    assert "The model was trained for 4, 1 tokens" in gather(folder, "some/lora", CARD_FACTS).render()


def test_card_of_an_adapter_names_its_kind(tmp_path):
    folder = convert(GOLDENS / "lora", tmp_path / "lora", base=GOLDENS / "base", keep_adapter=True)
    name_base(folder, "some/base", "v1")
    lora = gather(folder, "some/lora", CARD_FACTS).render()
    assert head_of(lora)["tags"][-1] == "lora" and "## Serve, quantise, fine-tune\n\n- **Merge**" in lora
    edit_json(folder / "adapter_config.json", peft_type="IA3")
    other = gather(folder, "some/lora", CARD_FACTS).render()
    assert head_of(other)["tags"][-1] == "ia3" and "## Serve, quantise, fine-tune\n\n- **Fine-tune**" in other


@pytest.fixture
def load():
    """What a fresh process does first, in this one."""
    with pytest.MonkeyPatch.context() as hidden:
        for name in ("modeling_llava_stf", "conversion", "hub_card"):  # the probe forgets them
            hidden.setitem(sys.modules, name, sys.modules[name])
        return importlib.import_module("hub_card.probe").load


def test_weights_of_an_adapter_that_have_no_place_are_found(load, tmp_path):
    """PEFT leaves them out in silence, such as layers that the named base does not have."""
    folder = convert(GOLDENS / "lora", tmp_path / "lora", base=GOLDENS / "base", keep_adapter=True)
    assert load(str(folder), "main", str(folder / "base"), "main")["wrong"] == []
    weights = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in weights if ".layers.1." in name)
    weights[first.replace(".layers.1.", ".layers.9.")] = weights[first].clone()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (wrong,) = load(str(folder), "main", str(folder / "base"), "main")["wrong"]
    assert re.fullmatch(r"unexpected weight: .*\.layers\.9\..*", wrong)


def test_card_names_the_budgets_that_the_model_was_trained_for(folder):
    def card(budgets):
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(settings | {"token_budgets": budgets}), encoding="utf-8")
        return gather(folder, "some/tiny", CARD_FACTS).render()

    before = (folder / "README.md").read_text(encoding="utf-8")
    assert card(None) == card([4]) == before
    elastic = card([4, 1])
    assert "**4 vision tokens**" in elastic and "trained for 4, 1 tokens" in elastic
    assert '{"max_soft_tokens": 1}' in elastic and "was not trained" not in elastic
    assert "**Without that, a picture has 4 tokens, for which the model was not trained.**" in card([1])
    found = {"wrong": [], "tokens_per_image": 4, "printed": ""}
    assert list(compare_use(elastic, found)) == list(compare_use(before, found)) == []


# What a card says stays true, and what somebody wrote into it stays there


RENDER = ("--repo-id", "some/tiny", "--license", "llama2")


def change_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_card_of_other_weights_is_refused(folder, run):
    assert run("render", folder, *RENDER)[0] == 0 and not list(check_current(freeze(folder)))
    change_weights(folder)
    assert [line.partition(" (python")[0] for line in check_current(freeze(folder))] == [
        "card: it was rendered for other weights"
    ]
    assert run("render", folder)[0] == 0 and not list(check_current(freeze(folder)))
    # Without the memory of `render`, the table of the card still says what the weights are.
    (folder / ".hub_card.json").unlink()
    half = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", dtype="bfloat16")
    (problem,) = check_current(freeze(folder))
    assert problem.startswith("card: weights is 'float32, 1.86MB' on it, but 'bfloat16, 928kB' in the folder")


@pytest.mark.parametrize(
    "change",
    [
        lambda f: edit_json(f / "config.json", token_budgets=[4, 1]),
        lambda f: (f / "recipe.yaml").write_text("learning_rate: 1.0\n"),
        lambda f: (f / "original_config.json").unlink(),
    ],
    ids=["config.json", "recipe.yaml", "original_config.json"],
)
def test_a_card_of_other_facts_is_refused(change, folder, run, request):
    """What a card says in sentences and in the table of the training comes from these files."""
    assert run("render", folder, *RENDER)[0] == 0 and not list(check_current(freeze(folder)))
    change(folder)
    (problem,) = check_current(freeze(folder))
    assert problem.startswith(f"card: it was rendered before {request.node.callspec.id} changed (python -m hub_card")
    assert run("render", folder)[0] == 0 and not list(check_current(freeze(folder)))


def test_a_tokenizer_of_another_model_is_refused(folder):
    processor = LlavaSTFProcessor.from_pretrained(folder)
    before = len(processor.tokenizer)
    processor.tokenizer.add_tokens(["new"])
    processor.save_pretrained(folder)
    problems = list(check_current(freeze(folder)))
    assert f"vocabulary: the tokenizer has {before + 1} tokens, but the embedding has {before} rows" in problems[0]


def test_results_of_other_weights_are_not_repeated(folder, run):
    assert run("render", folder, *RENDER, "--results", LMMS_EVAL)[0] == 0
    change_weights(folder)
    status, _, errors = run("render", folder, "--tag", "v2")
    assert status == 2 and "The weights are not those that --results was given for" in errors
    assert run("render", folder, "--results", LMMS_EVAL)[0] == run("render", folder)[0] == 0
    change_weights(folder)
    assert run("render", folder, "--results", "")[0] == 0 and "Results" not in sections_of(text_of(folder))


def test_an_edited_card_is_not_overwritten(folder, run):
    assert run("render", folder, *RENDER)[0] == 0
    edit_card(folder, "## Use", "My own words.\n\n## Use")
    status, _, errors = run("render", folder, "--tag", "v2")
    assert status == 2 and "has text that `render` did not write" in errors and "My own words." in text_of(folder)
    (folder / ".hub_card.json").unlink()
    (folder / "README.md").write_text("# My model\n")
    assert run("render", folder, *RENDER)[0] == 2 and text_of(folder) == "# My model\n"
    (folder / "README.md").unlink()
    assert run("render", folder, *RENDER)[0] == 0


def test_an_empty_text_removes_an_option(folder, run):
    assert run("render", folder, *RENDER, "--note", "Two\nlines", "--language", "en")[0] == 0
    assert "> Two\n> lines\n" in text_of(folder)
    assert run("render", folder, "--note", "", "--language", "")[0] == 0
    assert "> " not in text_of(folder) and "language" not in head_of(text_of(folder))


@pytest.mark.parametrize("wrong", [{"licence": "x"}, {"language": "en"}, {"tag": 7}, {"rendered": 3}], ids=str)
def test_a_memory_that_render_did_not_write_is_refused(wrong, folder, run):
    (folder / ".hub_card.json").write_text(json.dumps({"repo_id": "some/tiny", "license": "mit", **wrong}))
    status, _, errors = run("render", folder)
    assert status == 2 and re.fullmatch(r"error: [^\n]*\.hub_card\.json has [^\n]*remove it[^\n]*\n", errors)


@pytest.mark.parametrize(
    ("fact", "reason"),
    [
        ({"language": "en"}, "`language` is the text 'en'"),
        ({"datasets": "some/data"}, "`datasets` is the text 'some/data'"),
        ({"license": "CC BY-NC 4.0"}, "'CC BY-NC 4.0' is no licence of the Hub"),
        ({"language": ["english"]}, "'english' is no language code"),
        ({"language": ["en,zh"]}, "'en,zh' is no language code"),
        ({"datasets": ["https://huggingface.co/datasets/some/data"]}, "is no id of a dataset"),
    ],
)
def test_facts_that_the_hub_would_read_otherwise_are_refused(fact, reason, folder):
    with pytest.raises(ValueError, match=reason):
        gather(folder, "some/tiny", Facts(**{"license": "mit", **fact}))
    card = gather(folder, "some/tiny", Facts(license="mit", language=["en", "zh-TW"], datasets=["squad", "some/data"]))
    assert head_of(card.render())["language"] == ["en", "zh-TW"]


def test_a_revision_without_a_base_has_an_effect_or_is_refused(folder, run):
    status, _, errors = run("render", folder, *RENDER, "--base-revision", "v2")
    assert status == 2 and "is a whole model: --base is for adapters, and so is --base-revision" in errors


def test_an_adapter_keeps_the_base_that_it_was_trained_on(tmp_path, run):
    folder = convert(GOLDENS / "lora", tmp_path / "lora", base=GOLDENS / "base", keep_adapter=True)
    config = folder / "adapter_config.json"

    def base():
        settings = json.loads(config.read_text())
        return settings["base_model_name_or_path"], settings["revision"]

    assert run("render", folder, *RENDER, "--base", "some/base")[0] == 0 and base() == ("some/base", "v1")
    assert run("render", folder, "--base-revision", "v2")[0] == run("render", folder)[0] == 0
    assert base() == ("some/base", "v2")
    for trained_on in (("some/base", "a" * 40), ("/home/me/other", None)):
        edit_json(config, base_model_name_or_path=trained_on[0], revision=trained_on[1])
        status, _, errors = run("render", folder)
        assert status == 2 and "when its card was rendered: give --base again" in errors and base() == trained_on
    edit_json(config, base_model_name_or_path="some/base", revision="a" * 40)
    assert run("render", folder, "--base", "some/base")[0] == 0 and base() == ("some/base", "a" * 40)
    edit_card(folder, "base_model:\n- some/base", "base_model:\n- some/other")
    assert any(
        "`base_model` is ['some/other'], the adapter's base is" in line for line in check_current(freeze(folder))
    )


# What transformers and vLLM read otherwise than it is meant


def part_of_an_index(folder):
    """Makes a shard of the weights, and an index that leaves one out."""
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    weights = dict.fromkeys(load_file(folder / shard), shard)
    del weights["lm_head.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


MISREAD = {
    "dtype": (
        lambda f: edit_json(f / "config.json", dtype="float16"),
        "weights: they are float32, but are loaded as float16",
    ),
    "tied": (
        lambda f: edit_json(f / "config.json", tie_word_embeddings=True),
        "config.json has `tie_word_embeddings`",
    ),
    "NaN": (
        lambda f: (f / "generation_config.json").write_text('{"temperature": NaN}'),
        "damaged: generation_config.json is not JSON: NaN is no number of JSON",
    ),
    "pointer": (
        lambda f: (f / "merges.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "damaged: merges.txt is a pointer of Git LFS",
    ),
    "twice": (
        lambda f: edit_card(f, "license: cc-by-nc-4.0", "license: mit\nlicense: cc-by-nc-4.0"),
        "metadata: the YAML of README.md has license twice",
    ),
    "Norwegian": (lambda f: edit_card(f, "tags:\n", "language: no\ntags:\n"), "metadata: `language` is False"),
    "licence": (
        lambda f: edit_card(f, "license: cc-by-nc-4.0", "license: CC BY-NC"),
        "licence: `license` in README.md",
    ),
    "second processor": (
        lambda f: (f / "preprocessor_config.json").write_text('{"do_pad": false, "size": {"shortest_edge": 56}}'),
        "processor: `do_pad` is False in preprocessor_config.json, but True in processor_config.json",
    ),
    "index": (
        part_of_an_index,
        "weights: model.safetensors.index.json lacks 1 weights of its files, among them 'lm_head",
    ),
    "mount": (
        lambda f: edit_card(f, "## Use", "See /lustre/me/x.\n\n## Use"),
        "path: README.md names '/lustre/me/x.'",
    ),
    "numbered mount": (
        lambda f: edit_card(f, "## Use", "See /data1/me/x.\n\n## Use"),
        "path: README.md names '/data1/me/x.'",
    ),
    "drive": (
        lambda f: edit_card(f, "## Use", "See C:/Users/me/x.\n\n## Use"),
        "path: README.md names 'C:/Users/me/x.'",
    ),
}


@pytest.mark.parametrize("fault", MISREAD)
def test_what_is_read_otherwise_is_found(fault, folder):
    break_it, expected = MISREAD[fault]
    break_it(folder)
    (problem,) = check(folder)
    assert expected in problem


def test_speed_has_its_place_in_the_table(folder, tmp_path):
    measured = {"command": "x", "device": "y", "conditions": "z"}
    rows = [{"what": "p50|p90\nof a step", "value": 2, "unit": "ms", "baseline": 3}]
    (tmp_path / "speed.json").write_text(json.dumps({**measured, "rows": rows}))
    with pytest.raises(ValueError, match="has a baseline, but `baseline` does not name what that is"):
        read_speed(tmp_path / "speed.json")
    (tmp_path / "speed.json").write_text(json.dumps({**measured, "rows": rows, "baseline": "stock|eager"}))
    text = gather(folder, "some/tiny", CARD_FACTS, speeds=[tmp_path / "speed.json"]).render()
    assert "| | stock\\|eager | this model |\n| --- | --: | --: |\n| p50\\|p90 of a step | 3 ms | 2 ms |\n" in text


def test_speed_is_a_number(tmp_path):
    measured = {"command": "x", "device": "y", "conditions": "z"}
    for rows in (3, ["x"], [{"what": "a", "value": "fast", "unit": "ms"}], [{"what": "a", "value": True, "unit": ""}]):
        (tmp_path / "speed.json").write_text(json.dumps({**measured, "rows": rows}))
        with pytest.raises(ValueError, match="a row is|expected a finite number"):
            read_speed(tmp_path / "speed.json")


def test_a_setting_of_several_parts_is_on_the_card(folder):
    (folder / "recipe.yaml").write_text("lr_scheduler_kwargs: {min_lr_rate: 0.1, num_cycles: 2}\n")
    training = gather(folder, "some/tiny", CARD_FACTS).training
    assert training == {"`lr_scheduler_kwargs`": "`min_lr_rate: 0.1, num_cycles: 2`"}
