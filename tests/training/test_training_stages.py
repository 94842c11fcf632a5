"""The commands one after the other: stage 1, stage 2, LoRA, merge, reload, answer; and what comes after SFT."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, Image, List
from peft import LoraConfig, PeftModel, get_peft_model
from photos import save_photos
from PIL import Image as Picture
from training_runs import CONVERSATIONS, IMAGES, ROOT, run, trainer_of, weights_of
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from examples import dpo, grpo
from examples.dpo import PreferenceCollator
from hub_card import freeze
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from training import DataError
from training.merge import merge
from training.trainer import check_tower

CONNECTOR = "multi_modal_projector"


def done(result):
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Runs the commands of docs/train.md as they are written, but for the folder; gives the folder and the output."""
    root = tmp_path_factory.mktemp("stages")
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(OUT=build/tiny\n.*?)```", page, re.DOTALL)
    result = subprocess.run(
        ["bash", "-e"],
        input=block.replace("OUT=build/tiny", f"OUT={root}"),
        cwd=ROOT,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    return root, done(result).stdout


def test_each_stage_moves_what_it_trains(stages):
    root, _ = stages
    folders = [root / name for name in ("start", "stage1", "stage2", "merged")]
    weights = [weights_of(folder) for folder in folders]
    trained = [(CONNECTOR,), (CONNECTOR, "language_model", "lm_head"), (CONNECTOR, "proj.weight")]
    for before, after, parts in zip(weights, weights[1:], trained, strict=False):
        assert before.keys() == after.keys()
        for name in before:
            learns = any(part in name for part in parts) and "vision_tower" not in name
            assert torch.equal(before[name], after[name]) != learns, name


def test_what_the_runs_print(stages):
    _, printed = stages
    assert "9 rows, 9 of them fit to train on" in printed
    for part, rate in (
        ("multi_modal_projector", "0.001"),
        ("multi_modal_projector", "2e-05"),
        ("language_model", "2e-05"),
        ("language_model \\(LoRA\\)", "0.0001"),
    ):
        assert re.search(rf"{part} +[\d,]+ +float32 +trained, learning rate {rate}", printed), part
    assert len(re.findall(r"vision_tower +[\d,]+ +float32 +frozen", printed)) == 3
    assert printed.count("global batch: 4 rows = 2 per device x 1 device(s) x 2 accumulation step(s)") == 3
    assert len(re.findall(r"a step: about \d+ images and \d+ tokens \(\d+ of them trained\)", printed)) == 3
    assert "'images_per_second'" in printed and "'mfu'" in printed
    assert re.search(r"answer +\S", printed)


def test_curves_are_a_picture(stages):
    root, _ = stages
    assert Picture.open(root / "stage2" / "curves.png").size[0] == 1000


def test_the_recipe_is_kept_as_it_was_used(stages):
    root, _ = stages
    recipe = yaml.safe_load((root / "stage2" / "recipe.yaml").read_text(encoding="utf-8"))
    assert (recipe["learning_rate"], recipe["global_batch_size"], recipe["lr_scheduler_type"]) == (2e-5, 4, "cosine")


@pytest.mark.parametrize("name", ["start", "stage2", "stage2/checkpoint-4", "lora", "lora/checkpoint-4", "merged"])
def test_what_a_run_leaves_can_be_published_as_it_is(name, stages):
    root, _ = stages
    assert freeze(root / name).refused == []


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
    base = LlavaSTFForConditionalGeneration.from_pretrained(root / "stage2").eval()
    with torch.no_grad():
        plain = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, root / "lora").eval()(**inputs).logits
        merged = LlavaSTFForConditionalGeneration.from_pretrained(root / "merged").eval()(**inputs).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    assert (adapted - plain).abs().max() > 1e-3


ANSWER = """
import sys
from peft import AutoPeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, picture, loader = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = globals()[loader].from_pretrained(folder, trust_remote_code=True)
network = model.get_base_model() if loader == "AutoPeftModel" else model
assert type(network).__module__.startswith("transformers_modules")
content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
print(output[0, inputs["input_ids"].shape[1]:].tolist())
"""


@pytest.mark.parametrize(
    "name, loader",
    [
        ("stage1", "AutoModelForImageTextToText"),
        ("merged", "AutoModelForImageTextToText"),
        ("lora/checkpoint-4", "AutoModelForImageTextToText"),
        ("lora", "AutoPeftModel"),
    ],
)
def test_folders_load_by_themselves_and_answer(name, loader, stages, tmp_path):
    """In a fresh process, away from the clone, with nothing but transformers (and PEFT, for the adapter)."""
    root, _ = stages
    result = subprocess.run(
        [sys.executable, "-I", "-c", ANSWER, root / name, IMAGES / "wide.png", loader],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout.strip().splitlines()[-1])) == 5


def test_adapters_know_their_base(stages):
    root, _ = stages
    for folder in (root / "lora", root / "lora" / "checkpoint-4"):
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(root / "stage2")


def test_merge_refuses(stages, tmp_path):
    root, _ = stages
    for arguments, message in (
        ((root / "stage2", tmp_path / "new"), "is not an adapter"),
        ((root / "lora", root / "merged"), "is not empty"),
        ((root / "lora", tmp_path / "new", "/nowhere"), "names the base /nowhere, which is not"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(*arguments)
    assert not (tmp_path / "new").exists()


def test_qlora_keeps_tower_and_fusion_as_they_are(stages, tmp_path):
    pytest.importorskip("bitsandbytes")
    root, _ = stages
    settings = {"dtype": "bfloat16", "bf16": True, "lora_r": 4, "learning_rate": 1e-2, "max_steps": 2}
    run = trainer_of("finetune_qlora", root / "stage2", CONVERSATIONS, tmp_path / "qlora", **settings)
    for name, weight in run.model.named_parameters():
        quantised = "language_model.layers" in name and "proj" in name and "lora_" not in name
        expected = torch.uint8 if quantised else torch.float32 if weight.requires_grad else torch.bfloat16
        assert weight.dtype == expected, name
        assert weight.requires_grad == ("lora_" in name or "modules_to_save" in name), name
    run.train()
    run.save_model()
    merged = weights_of(merge(tmp_path / "qlora", tmp_path / "merged"))
    base = weights_of(root / "stage2")
    assert merged.keys() == base.keys()
    for name, weight in merged.items():
        assert torch.equal(weight, base[name]) != (CONNECTOR in name or "proj" in name and "language" in name), name


# After SFT


def user(text):
    return [{"role": "user", "content": text}]


def answer(text):
    return [{"role": "assistant", "content": text}]


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
        "solution": ["", ""],  # which is in every answer: the shorter one is worth more
    }
    return Dataset.from_dict(rows).cast_column("image", Image())


def test_preferences_train_the_ids_of_the_template(processor, picture):
    """TRL's own collator gives an answer a `▁` that no inference has."""
    rows = list(dpo_rows(picture))
    rows[1]["prompt"] = [*user("How many?"), {"role": "assistant", "content": "2"}, *user("Are you sure?")]
    ours, theirs = PreferenceCollator(processor), DataCollatorForVisionPreference(processor)
    batch = ours(rows)
    for index, (row, answer) in enumerate([(row, name) for name in ("chosen", "rejected") for row in rows]):
        whole = processor.apply_chat_template(
            prepare_multimodal_messages(row["prompt"] + row[answer], images=row["images"]),
            tokenize=True,
            return_dict=True,
        )["input_ids"][0]
        prompt = processor.apply_chat_template(
            prepare_multimodal_messages(row["prompt"], images=row["images"]),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"][0]
        seen = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][seen].tolist() == whole
        trained = batch["completion_mask"][index].bool()
        assert batch["input_ids"][index][trained].tolist() == whole[len(prompt) :]
    assert batch["pixel_values"].shape[0] == 4
    trained = theirs([{**row} for row in dpo_rows(picture)])
    assert trained["input_ids"][trained["completion_mask"].bool()].tolist() != (
        batch["input_ids"][batch["completion_mask"].bool()].tolist()
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "What is it?", "chosen": "A shape."}, "`chosen` is 'A shape.', expected a list of messages"),
        ({"prompt": None}, "`prompt` is None .* expected a list of messages"),
        ({"chosen": [*answer("A"), *user("Sure?"), *answer("B")]}, "a list of one message"),
        ({"chosen": answer("")}, "an answer is empty or blank"),
        ({"chosen": answer("A</s>")}, "a text has '</s>'"),
        ({"rejected": answer(4)}, "what a turn of assistant says is 4"),
    ],
)
def test_preferences_that_cannot_be_trained_as_written_are_refused(change, reason, processor, picture):
    row = next(iter(dpo_rows(picture)))
    with pytest.raises(DataError, match=reason):
        PreferenceCollator(processor)([{**row, **change}])


def test_preferences_may_have_one_picture_each(processor, picture):
    row = next(iter(dpo_rows(picture)))
    image = row.pop("images")[0]
    assert PreferenceCollator(processor)([{**row, "image": image}])["pixel_values"].shape[0] == 2


def test_preferences_are_not_longer_than_allowed_and_padded_as_wanted(processor, picture):
    rows = list(dpo_rows(picture))
    batch = PreferenceCollator(processor, pad_to_multiple_of=64)(rows)
    assert batch["input_ids"].shape[1] % 64 == 0
    longest = int(batch["attention_mask"].sum(1).max())
    PreferenceCollator(processor, max_length=longest)(rows)
    with pytest.raises(DataError, match=f"A row has {longest} tokens, `max_length` allows {longest - 1}"):
        PreferenceCollator(processor, max_length=longest - 1)(rows)


@pytest.mark.parametrize("turn", [True, False])
def test_photos_of_preferences_are_turned_only_if_the_processor_turns_them(turn, processor, picture, tmp_path):
    save_photos(picture("wide.png").resize((40, 40)), tmp_path)
    processor.image_processor.do_exif_transpose = turn
    row = {**next(iter(dpo_rows(picture))), "images": [{"path": str(tmp_path / "lying.png"), "bytes": None}]}
    wanted = Picture.open(tmp_path / ("upright.png" if turn else "as_it_lies.png"))
    expected = processor.image_processor(wanted, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(PreferenceCollator(processor)([row])["pixel_values"][0], expected)


class Made(Exception):
    """Stops an example once its trainer is made."""


@pytest.mark.parametrize("method", [dpo, grpo])
def test_options_of_the_examples_act(method, checkpoint, tmp_path, picture, monkeypatch):
    """LoRA's, the splits and the base's were taken, and nothing was done with them."""
    rows = (dpo_rows if method is dpo else grpo_rows)(picture)
    for split in ("mine", "validation"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: own\n  data_files:\n"
        "  - {split: mine, path: mine.parquet}\n  - {split: validation, path: validation.parquet}\n---\n"
    )
    made = {}

    def trainer(model, **given):
        made.update(given, model=model)
        raise Made

    monkeypatch.setattr(method, f"{method.__name__.rsplit('.')[-1].upper()}Trainer", trainer)
    named = f"--model_name_or_path {checkpoint} --dataset_name {tmp_path} --dataset_config own --output_dir out "
    named += "--dataset_train_split mine --dataset_test_split validation --eval_strategy steps --eval_steps 1 "
    named += "--lora_r 3 --use_rslora true --attn_implementation eager --use_cpu true --bf16 false --report_to none"
    monkeypatch.setattr(sys, "argv", ["example", *named.split()])
    with pytest.raises(Made):
        method.main()
    adapter = made["peft_config"]
    assert (adapter.r, adapter.use_rslora, adapter.target_modules) == (3, True, dpo.LORA)
    assert made["model"].config._attn_implementation == "eager"
    assert not any(weight.requires_grad for weight in made["model"].model.vision_tower.parameters())
    assert len(made["train_dataset"]) == len(made["eval_dataset"]) == len(rows)
    with pytest.raises(ValueError, match="would change the frozen vision tower"):
        check_tower(get_peft_model(made["model"], LoraConfig(target_modules=["q_proj"])))


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
    assert moved


@pytest.mark.parametrize("method", [dpo, grpo])
def test_the_examples_go_on_from_a_checkpoint(method, checkpoint, tmp_path, picture, monkeypatch):
    """They began anew."""
    (dpo_rows if method is dpo else grpo_rows)(picture).to_parquet(tmp_path / "train.parquet")
    asked = {}

    def trainer(model, **given):
        return SimpleNamespace(model=model, train=lambda **options: asked.update(options), save_model=lambda: None)

    monkeypatch.setattr(method, f"{method.__name__.rsplit('.')[-1].upper()}Trainer", trainer)
    named = f"--model_name_or_path {checkpoint} --dataset_name {tmp_path} --output_dir out --use_peft false "
    named += "--use_cpu true --bf16 false --report_to none --resume_from_checkpoint out/checkpoint-1"
    monkeypatch.setattr(sys, "argv", ["example", *named.split()])
    method.main()
    assert asked == {"resume_from_checkpoint": "out/checkpoint-1"}
