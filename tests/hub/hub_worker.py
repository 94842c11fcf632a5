"""What a user's own processes do with a Hub, for test_hub_publish; each command ends with a line of JSON.

push CHECKPOINT REPOSITORY                   `push_to_hub` of model and processor
train TRAINER CHECKPOINT REPOSITORY OUTPUT   two steps, saved and pushed one by one, and the end
load QUESTIONS                               what repositories answer; a question is {"kind", "repository", "revision"}
"""

import contextlib
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = str(ROOT / "tests" / "goldens" / "images" / "shapes.png")


def push(checkpoint, repository):
    sys.path.insert(0, str(ROOT))
    from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor

    LlavaSTFForConditionalGeneration.from_pretrained(checkpoint).push_to_hub(repository)
    LlavaSTFProcessor.from_pretrained(checkpoint).push_to_hub(repository)


def train(trainer, checkpoint, repository, output):
    sys.path.insert(0, str(ROOT))
    settings = {
        "output_dir": output,
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "push_to_hub": True,
        "hub_model_id": repository,
        "hub_strategy": "every_save",
        "hub_always_push": True,  # else a save is left out while the one before is still on its way
    }
    {"transformers": train_with_transformers, "ours": train_with_ours}[trainer](checkpoint, settings)


def train_with_ours(checkpoint, settings):
    from training.run import train_command

    data = Path(settings["output_dir"]).with_suffix(".json")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    data.write_text(json.dumps([{"id": str(row), "image": PICTURE, "conversations": turns} for row in range(2)]))
    settings |= {"model_name_or_path": checkpoint, "data_path": data, "per_device_train_batch_size": 1}
    train_command([word for name, value in settings.items() for word in (f"--{name}", str(value))])


def train_with_transformers(checkpoint, settings):
    """The stock trainer, and the two things that it needs to push folders that load."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.dynamic_module_utils import custom_object_save

    from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor

    model = LlavaSTFForConditionalGeneration.from_pretrained(checkpoint)
    model.model.vision_tower.requires_grad_(False)
    processor = LlavaSTFProcessor.from_pretrained(checkpoint)
    inputs = processor(images=PICTURE, text="USER: <image>\nWhat is it? ASSISTANT: A square.</s>", return_tensors="pt")
    row = {name: value[0] for name, value in inputs.items()} | {"labels": inputs["input_ids"][0]}
    # 1. Pushes in between copy weights and config, but not the code: it has to be in the folder from the start.
    Path(settings["output_dir"]).mkdir(parents=True)
    custom_object_save(model, settings["output_dir"], config=model.config)
    arguments = TrainingArguments(**settings, remove_unused_columns=False, per_device_train_batch_size=1)
    trainer = Trainer(model, arguments, train_dataset=[row] * 2, processing_class=processor)

    class WaitForPush(TrainerCallback):
        """2. A save changes the files of the push before it, which has to be done with them."""

        def on_save(self, *_, **__):
            trainer._finish_current_push()

    trainer.add_callback(WaitForPush())
    trainer.train()
    trainer.push_to_hub()


def load(questions):
    """Loads with nothing but the Hub: this package is not importable, and the cache is empty."""
    for name in ("modeling_llava_stf", "conversion", "hub_card", "training"):
        sys.modules[name] = None
    answers = {"snippet": run_snippet, "model": ask_model, "pipeline": ask_pipeline, "adapter": ask_adapter}
    return [answers[question.pop("kind")](**question) for question in json.loads(questions)]


def run_snippet(repository, revision):
    """The first Python block of the card, as it is."""
    from huggingface_hub import hf_hub_download

    card = Path(hf_hub_download(repository, "README.md", revision=revision)).read_text(encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(card.split("```python\n")[1].split("```")[0], {})
    return output.getvalue().rstrip("\n")


def ask_model(repository, revision):
    import transformers

    pin = {"revision": revision, "trust_remote_code": True}
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(repository, output_loading_info=True, **pin)
    assert not any(info.values()), info
    processor = transformers.AutoProcessor.from_pretrained(repository, **pin)
    return answer(model, processor)


def ask_adapter(repository, revision):
    """The way of transformers itself, which finds the base by the adapter's configuration."""
    import transformers

    pin = {"revision": revision, "trust_remote_code": True}
    model = transformers.AutoModelForImageTextToText.from_pretrained(repository, **pin)
    assert list(model.peft_config) == ["default"]
    return answer(model, transformers.AutoProcessor.from_pretrained(repository, **pin))


def answer(model, processor):
    content = [{"type": "image", "path": PICTURE}, {"type": "text", "text": "What is shown?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def ask_pipeline(repository, revision):
    from transformers import pipeline

    ask = pipeline("image-text-to-text", model=repository, revision=revision, trust_remote_code=True)
    content = [{"type": "image", "path": PICTURE}, {"type": "text", "text": "What is shown?"}]
    generation = {"do_sample": False, "max_new_tokens": 8}
    chat = [{"role": "user", "content": content}]
    return ask(text=chat, generate_kwargs=generation, return_full_text=False)[0]["generated_text"]


if __name__ == "__main__":
    result = {"push": push, "train": train, "load": load}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(result))
