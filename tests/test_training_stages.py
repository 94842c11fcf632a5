"""The commands one after the other: stage 1, stage 2, LoRA, merge, reload, answer; and what comes after SFT."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch
from conftest import GOLDENS
from datasets import Dataset, Image, List
from peft import PeftModel
from PIL import Image as Picture
from training_runs import CAPTIONS, CONVERSATIONS, IMAGES, ROOT, options, run, weights_of

from conversion import convert
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from training.__main__ import main
from training.merge import merge

pytestmark = pytest.mark.xdist_group("stages")  # one worker makes them

CONNECTOR = "multi_modal_projector"


def done(result):
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The recipe in miniature, from a language model and a tower: the folders of its stages, and what was printed."""
    root = tmp_path_factory.mktemp("stages")
    start = convert(GOLDENS / "base", root / "start", init_fusion=True, vision_tower=GOLDENS / "clip")
    printed = {}
    for recipe, begin, data, changes in (
        ("pretrain", start, CAPTIONS, {}),
        ("finetune", root / "pretrain", CONVERSATIONS, {"learning_rate": 1e-3}),
        ("finetune_lora", root / "finetune", CONVERSATIONS, {"learning_rate": 1e-2, "save_steps": 2, "lora_r": 8}),
    ):
        printed[recipe] = printed_by(options(recipe, begin, data, root / recipe, **changes))
    printed_by(["merge", str(root / "finetune_lora"), str(root / "merged")])
    return root, printed


def printed_by(arguments):
    """What `python -m training` prints; in this process, for speed."""
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as out, redirect_stdout(out):
        patch.setattr(sys, "argv", ["training", *arguments])
        assert main() == 0
        return out.getvalue()


def test_each_stage_moves_what_it_trains(stages):
    root, _ = stages
    folders = [root / name for name in ("start", "pretrain", "finetune", "merged")]
    weights = [weights_of(folder) for folder in folders]
    trained = [(CONNECTOR,), (CONNECTOR, "language_model", "lm_head"), (CONNECTOR, "proj.weight")]
    for before, after, parts in zip(weights, weights[1:], trained, strict=False):
        assert before.keys() == after.keys()
        for name in before:
            learns = any(part in name for part in parts) and "vision_tower" not in name
            assert torch.equal(before[name], after[name]) != learns, name


def test_what_a_run_prints(stages):
    _, printed = stages
    assert re.search(r"multi_modal_projector +135,904 +float32 +trained, learning rate 0.001", printed["pretrain"])
    assert re.search(r"vision_tower +[\d,]+ +float32 +frozen", printed["pretrain"])
    assert re.search(r"language_model \(LoRA\) +[\d,]+ +float32 +trained, learning rate 0.01", printed["finetune_lora"])
    assert re.search(r"multi_modal_projector +135,904 +float32 +trained, learning rate 2e-05", printed["finetune_lora"])
    for recipe in ("pretrain", "finetune", "finetune_lora"):
        assert "global batch: 4 rows = 2 per device x 1 device(s) x 2 accumulation step(s)" in printed[recipe]
        assert re.search(r"a step: about \d+ images and \d+ tokens \(\d+ of them trained\)", printed[recipe])
        assert "'images_per_second'" in printed[recipe] and "'mfu'" in printed[recipe]


def test_curves_are_a_picture(stages):
    root, _ = stages
    assert Picture.open(root / "finetune" / "curves.png").size[0] == 1000


def inputs_of(processor):
    row = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))[0]
    question = row["conversations"][0]["value"].replace("<image>", "").strip()
    content = [{"type": "image", "image": str(IMAGES / row["image"])}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_adapter_merged_and_reloaded_give_the_same_logits(stages):
    root, _ = stages
    inputs = inputs_of(LlavaSTFProcessor.from_pretrained(root / "merged"))
    base = LlavaSTFForConditionalGeneration.from_pretrained(root / "finetune").eval()
    with torch.no_grad():
        plain = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, root / "finetune_lora").eval()(**inputs).logits
        merged = LlavaSTFForConditionalGeneration.from_pretrained(root / "merged").eval()(**inputs).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    assert (adapted - plain).abs().max() > 1e-2


ANSWER = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, picture = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
print(output[0, inputs["input_ids"].shape[1]:].tolist())
"""


@pytest.mark.parametrize("name", ["pretrain", "merged", "finetune_lora/checkpoint-2"])
def test_folders_load_by_themselves_and_answer(name, stages, tmp_path):
    """In a fresh process, away from the clone, with nothing but transformers (and PEFT, for the adapter)."""
    root, _ = stages
    result = subprocess.run(
        [sys.executable, "-I", "-c", ANSWER, root / name, IMAGES / "wide.png"],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout.strip().splitlines()[-1])) == 5


def test_adapters_know_their_base(stages):
    root, _ = stages
    for folder in (root / "finetune_lora", root / "finetune_lora" / "checkpoint-2"):
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(root / "finetune")


def test_merge_refuses(stages, tmp_path):
    root, _ = stages
    for arguments, message in (
        ((root / "finetune", tmp_path / "new"), "is not an adapter"),
        ((root / "finetune_lora", root / "merged"), "is not empty"),
        ((root / "finetune_lora", tmp_path / "new", "/nowhere"), "names the base /nowhere, which is not"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(*arguments)
    assert not (tmp_path / "new").exists()


# After SFT


def user(text):
    return [{"role": "user", "content": text}]


def dpo_rows(picture):
    rows = {
        "images": [[picture("wide.png")], [picture("shapes.png")], []],
        "prompt": [user("What is it?"), user("How many?"), user("Hello?")],
        "chosen": [[{"role": "assistant", "content": text}] for text in ("A shape.", "3", "Hi.")],
        "rejected": [[{"role": "assistant", "content": text}] for text in ("No.", "4", "Go.")],
    }
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


def grpo_rows(picture):
    rows = {
        "image": [picture("wide.png"), picture("shapes.png")],
        "prompt": [user("What is it?"), user("How many?")],
        "solution": ["shape", "3"],
    }
    return Dataset.from_dict(rows).cast_column("image", Image())


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_preference_and_reinforcement_learning_run(method, checkpoint, tmp_path, picture):
    data = tmp_path / "data"
    data.mkdir()
    (dpo_rows if method == "dpo" else grpo_rows)(picture).to_parquet(data / "train.parquet")
    settings = {
        "model_name_or_path": checkpoint,
        "dataset_name": data,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        **({"num_generations": 2, "max_completion_length": 6, "beta": 0.1} if method == "grpo" else {}),
    }
    named = [part for name, value in settings.items() for part in (f"--{name}", value)]
    done(run(*named, launcher=(ROOT / "examples" / f"{method}.py",)))
    adapter = weights_of(tmp_path / "out")
    assert adapter and not any("vision_tower" in name for name in adapter)
    moved = [name for name, weight in adapter.items() if "lora_B" in name and weight.abs().max() > 0]
    assert moved or method == "grpo"  # with no reward but zero there is nothing to learn from
