"""Every option of the training's command line acts, or is refused."""

import dataclasses
import json
import os
import sys

import pytest
import torch
import yaml
from training_runs import CONVERSATIONS, RECIPES, eight_rows, options, run, trainer_of, weights_of
from trl import ModelConfig, SFTConfig

from modeling_llava_stf import LlavaSTFForConditionalGeneration
from training import LlavaSTFTrainingArguments, settings
from training.__main__ import main
from training.arguments import DataArguments, Parser
from training.run import recipe_settings
from training.settings import BY_US, DECIDING, NEEDS, PATTERNS, RANGES, REFUSED, UNCHANGED

KINDS = (DataArguments, LlavaSTFTrainingArguments, ModelConfig)
STOCK = {option.name for kind in (SFTConfig, ModelConfig) for option in dataclasses.fields(kind) if option.init}
OURS = {option.name for kind in KINDS for option in dataclasses.fields(kind)}


@pytest.fixture
def command(monkeypatch, capsys, checkpoint, tmp_path):
    """Runs the command in this process: exit code, and the lines on stderr that are its own."""

    def call(*arguments, recipe="finetune", data=CONVERSATIONS, **changes):
        named = options(recipe, checkpoint, data, changes.pop("output", tmp_path / "out"), **changes)
        monkeypatch.setattr(sys, "argv", ["training", *named, *map(str, arguments)])
        code = main()
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "stopped"))]

    return call


def refused(result, *parts):
    code, lines = result
    assert code == 2 and len(lines) == 1, lines
    for part in parts:
        assert part in lines[0], lines[0]


# The table


def test_every_option_is_classified_once():
    groups = (UNCHANGED, BY_US, REFUSED.keys())
    assert set().union(*groups) == STOCK
    assert sum(map(len, groups)) == len(STOCK)


def test_the_other_tables_name_options():
    named = {name for _, _, names in RANGES for name in names.split()}
    needed = {name for names in NEEDS.values() for name in names}
    for names in (named, needed, NEEDS.keys(), PATTERNS, DECIDING):
        assert set(names) <= OURS, set(names) - OURS
        assert not set(names) & REFUSED.keys()


def test_the_help_shows_no_option_that_is_refused():
    shown = Parser(KINDS, prog="training").format_help()
    assert "--chat_template_name" in shown
    for name in REFUSED:
        assert f"--{name} " not in shown, name


def test_the_help_has_our_options_first(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = Parser(KINDS, prog="training").format_help().splitlines()
    places = [
        next(index for index, line in enumerate(lines) if line.startswith(start))
        for start in ("usage: training --config RECIPE", "options of this project", "  --data_path", "options of TRL")
    ]
    assert places == sorted(places) and len(lines) < 300
    shown = "\n".join(lines[places[2] : places[3]])
    own = [option.name for kind in KINDS[:2] for option in dataclasses.fields(kind) if option.name not in STOCK]
    assert all(f"--{name} " in shown for name in own)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_act_is_refused_from_python(name):
    """Also by those who do not come by the command line."""
    kind = ModelConfig if name in {option.name for option in dataclasses.fields(ModelConfig)} else SFTConfig
    kind = LlavaSTFTrainingArguments if kind is SFTConfig else kind
    (option,) = (option for option in dataclasses.fields(kind) if option.name == name)
    default = settings._default(option)
    value = (not default) if isinstance(default, bool) else "other"
    if kind is ModelConfig:
        with pytest.raises(ValueError, match=f"`{name}` does not act here: "):
            settings.check_settings(ModelConfig(**{name: value}))
    else:
        with pytest.raises(ValueError, match=f"`{name}` does not act here: "):
            LlavaSTFTrainingArguments("out", use_cpu=True, bf16=False, **{name: value})


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"chat_template_path": "t.jinja"}, ["`chat_template_path` does not act here", "`chat_template_name`"]),
        ({"packing": True}, ["`packing` does not act here", "`group_by_modality_length`"]),
        ({"eos_token": "</s>"}, ["`eos_token` does not act here", "tokenizer"]),
        ({"completion_only_loss": False}, ["`completion_only_loss`", "`assistant_only_loss`"]),
        ({"model_init_kwargs": '{"dtype": "float16"}'}, ["`model_init_kwargs`", "`dtype`"]),
        ({"lora_task_type": "SEQ_CLS"}, ["`lora_task_type`"]),
        ({"remove_unused_columns": True}, ["`remove_unused_columns`"]),
        ({"accelerator_config": '{"split_batches": true}'}, ["`split_batches`", "`global_batch_size`"]),
        ({"fp16": True}, ["`fp16` does not act on a CPU"]),
        ({"activation_offloading": True}, ["`activation_offloading` does not act on a CPU"]),
        ({"lora_r": 8}, ["`lora_r` does not act without `use_peft`"]),
        ({"load_in_4bit": True}, ["`load_in_4bit` does not act without `use_peft`"]),
        ({"hub_model_id": "some/one"}, ["`hub_model_id` does not act without `push_to_hub`"]),
        ({"eval_steps": 2}, ["`eval_steps` does not act without `eval_strategy`"]),
        ({"eval_data_path": CONVERSATIONS}, ["`eval_data_path` does not act without `eval_strategy`"]),
        ({"gradient_accumulation_steps": 4}, ["`gradient_accumulation_steps` is 4, but 2 follows"]),
        ({"gradient_accumulation_steps": 1}, ["`gradient_accumulation_steps` is 1, but 2 follows"]),
        ({"lora_r": 16, "lora_alpha": 32}, ["does not act without `use_peft`"]),  # TRL's defaults
        ({"token_budget_mode": "sample"}, ["`token_budget_mode` does not act without `token_budgets`"]),
        ({"train_sampling_strategy": "sequential"}, ["`group_by_modality_length` orders"]),
        ({"model_revision": "v1"}, ["is a folder, which has no revision 'v1'"]),
        ({"split": "test"}, ["is a file, which has no configuration and no split"]),
        ({"dataset_config": "en"}, ["is a file, which has no configuration and no split"]),
        ({"report_to": "clearml"}, ["`report_to` clearml is not known or not installed"]),
        ({"report_to": "typo"}, ["`report_to` typo is not known"]),
        ({"attn_implementation": "flash_attention_2"}, ["FlashAttention2"]),
        ({"attn_implementation": "typo"}, ["typo"]),
        ({"trainable": "("}, ["`trainable` '(' is no regular expression"]),
        ({"lora_target_modules": "(", "recipe": "finetune_lora"}, ["`lora_target_modules` '(' is no regular"]),
        ({"loss_reduction": "tokens"}, ["loss_reduction", "token", "microbatch"]),
        ({"optim": "sgd", "adam_beta1": 0.8}, ["`adam_beta1` does not act with `optim` sgd"]),
        ({"optim": "sgd", "optim_args": "momentum=0.9,lr=1"}, ["`optim_args` has 'lr=1', which changes nothing"]),
        ({"optim": "sgd", "optim_args": "weight_decay=0.1"}, ["`optim_args` has `weight_decay`"]),
        ({"optim": "adamw_torch", "optim_args": "beta1=0.8"}, ["'beta1=0.8', which changes nothing", "adamw_torch"]),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": '{"power": 2}'}, ["is not for linear", "'power'"]),
        ({"lr_scheduler_kwargs": "power=2"}, ["`lr_scheduler_kwargs` is 'power=2', expected an object"]),
        (
            {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": '{"power": 2}'},
            ["`lr_scheduler_kwargs` does not act with `lr_scheduler_type` constant_with_warmup"],
        ),
        (
            {
                "projector_learning_rate": 1e-3,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": '{"min_lr": 1e-6}',
            },
            ["`lr_scheduler_kwargs` has 'min_lr'", "`min_lr_rate`"],
        ),
        ({"accelerator_config": '{"gradient_accumulation_kwargs": {"num_steps": 3}}'}, ["`num_steps`"]),
        ({"eval_strategy": "epoch", "eval_steps": 2}, ["`eval_steps` does not act with `eval_strategy` epoch"]),
        (
            {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": '{"use_reentrant": false}'},
            ["`gradient_checkpointing_kwargs` does not act without"],
        ),
    ],
)
def test_what_cannot_be_meant_is_one_line(changes, parts, command):
    refused(command(**changes), *parts)


NONSENSE = {
    "per_device_train_batch_size": ["0", "-1", "two", "1.5"],
    "global_batch_size": ["0", "-4"],
    "learning_rate": ["nan", "-1e-3", "inf", "fast"],
    "projector_learning_rate": ["nan", "-1"],
    "weight_decay": ["nan", "-0.1"],
    "max_length": ["0", "-1"],
    "max_steps": ["0", "-2"],
    "num_train_epochs": ["0", "-1", "nan"],
    "save_steps": ["0", "-1", "nan"],
    "logging_steps": ["0", "-1"],
    "save_total_limit": ["0", "-1"],
    "warmup_steps": ["-1", "nan"],
    "max_grad_norm": ["nan", "-1"],
    "adam_beta1": ["1", "-0.1", "nan"],
    "adam_epsilon": ["0", "nan"],
    "dataloader_num_workers": ["-1"],
    "dataset_num_proc": ["0"],
    "pad_to_multiple_of": ["0", "-8", "many"],
    "neftune_noise_alpha": ["nan"],
    "peak_tflops": ["0", "nan"],
    "seed": ["-1"],
    "lr_scheduler_type": ["cosin"],
    "optim": ["adam"],
    "on_bad_row": ["drop"],
    "dtype": ["int8"],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in NONSENSE.items() for value in values])
def test_nonsense_is_named(name, value, command, tmp_path):
    refused(command(**{name: value}), name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, value", [("lora_r", "0"), ("lora_alpha", "-1"), ("lora_dropout", "1.5")])
def test_nonsense_of_lora_is_named(name, value, command):
    refused(command(recipe="finetune_lora", **{name: value}), name)


@pytest.mark.parametrize("name, meant", [("--warmup_ratio=0.1", "--warmup_steps"), ("--learn_rate", "--learning_rate")])
def test_an_unknown_option_is_named(name, meant, command):
    refused(command(name, "0.03"), f"unknown option {name!r}. Is {meant} meant?")


def test_no_longest_length_is_the_tokenizer_s(command, tmp_path):
    """TRL's advice for models with images is `--max_length None`; a recipe has `max_length: null`."""
    assert command(max_length=None, max_steps=1) == (0, [])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_length: null\nuse_cpu: true\nbf16: false\n")
    made = Parser(KINDS).parse_args_and_config(["--config", str(recipe), "--data_path", "x", "--output_dir", "x"])[1]
    settings.check_settings(made)
    assert made.max_length is None


# Those that act by us


def test_padding_to_a_multiple_acts(checkpoint, tmp_path):
    made = trainer_of("finetune", checkpoint, CONVERSATIONS, tmp_path / "out", pad_to_multiple_of=64)
    batch = made.data_collator([made.train_dataset[0], made.train_dataset[1]])
    assert batch["input_ids"].shape[1] % 64 == 0
    assert batch["labels"].shape == batch["input_ids"].shape
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["labels"][padding] == -100).all()


def test_the_loss_of_whole_rows_leaves_the_image_out(checkpoint, tmp_path):
    """`<image>` as an answer made it hundreds."""
    made = trainer_of("finetune", checkpoint, CONVERSATIONS, tmp_path / "out", assistant_only_loss=False)
    batch = made.data_collator([made.train_dataset[0]])
    expected = batch["input_ids"].masked_fill(batch["input_ids"] == made.model.config.image_token_id, -100)
    assert torch.equal(batch["labels"], expected)
    loss = made.compute_loss(made.model.eval(), dict(batch))
    assert loss.item() == pytest.approx(made.model(**batch).loss.item(), rel=1e-6) and loss < 20


def first_losses(checkpoint, tmp_path, recipe="finetune", **changes):
    made = trainer_of(recipe, checkpoint, CONVERSATIONS, tmp_path / "out", max_steps=2, **changes)
    made.train()
    return [(row["loss"], row["grad_norm"]) for row in made.state.log_history if "loss" in row]


ORDERED = {"group_by_modality_length": False}
ACTING = {
    "loss_type": {"loss_type": "dft"},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5},
    "max_grad_norm": {"max_grad_norm": 1e-3, "warmup_steps": 0},
    "optim": {"optim": "sgd", "warmup_steps": 0},
    "data_seed": {"data_seed": 7},
    "seed": {"seed": 7},
    "train_sampling_strategy": {"train_sampling_strategy": "sequential", **ORDERED},
    "group_by_length": {"train_sampling_strategy": "group_by_length", **ORDERED},
    "batch_rebalance": {"train_sampling_strategy": "batch_rebalance", **ORDERED, "data_seed": 3},
    "data_seed of a plain order": {"data_seed": 7, **ORDERED},
}


@pytest.mark.parametrize("name", ACTING)
def test_what_trl_and_transformers_say_acts_here_too(name, checkpoint, tmp_path):
    changes = ACTING[name]
    others = {option: value for option, value in changes.items() if option in ("warmup_steps", *ORDERED)}
    assert first_losses(checkpoint, tmp_path, **changes) != first_losses(checkpoint, tmp_path, **others)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"torch_compile_backend": "eager", "save_steps": 2}, marks=pytest.mark.slow),
        {"skip_memory_metrics": False},
        {"debug": "underflow_overflow"},
        {"include_num_input_tokens_seen": True},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1},
        {"activation_checkpointing": False},
    ],
)
def test_what_changes_no_number_does_not(changes, checkpoint, tmp_path):
    changed, expected = (torch.tensor(first_losses(checkpoint, tmp_path, **each)) for each in (changes, {}))
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=0)
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        assert weights_of(folder).keys() == weights_of(checkpoint).keys()
        LlavaSTFForConditionalGeneration.from_pretrained(folder)


# Recipes and files


RECIPE_FAULTS = {
    "unknown": ("learning_rat: 1e-4\n", "unknown option 'learning_rat'. Is 'learning_rate' meant?"),
    "refused": ("packing: true\n", "`packing` does not act here"),
    "choice": ("loss_reduction: tokens\n", "loss_reduction"),
    "number": ("per_device_train_batch_size: 2.5\n", "per_device_train_batch_size"),
    "list": ("per_device_train_batch_size: [2]\n", "per_device_train_batch_size"),
    "null": ("per_device_train_batch_size: null\n", "per_device_train_batch_size"),
    "boolean": ("use_peft: perhaps\n", "use_peft"),
    "no way of padding": ("image_aspect_ratio: null\n", "`image_aspect_ratio` is None, expected one of pad, square"),
    "no way with bad rows": ("on_bad_row: null\n", "`on_bad_row` is None, expected one of error, skip"),
    "neither true nor false": ("assistant_only_loss: null\n", "`assistant_only_loss` is None, expected one of True"),
    "a list of patterns": ("trainable: [lm_head]\n", "`trainable` is ['lm_head'], expected one value and no list"),
    "not YAML": ("a: [1\n", "is not YAML"),
    "not text": (b"\xff\xfe\x00", "is not YAML"),
    "a list": ("- a\n- b\n", "has no options"),
    "empty": ("", "has no options"),
    "numbers": ("1: 2\n", "has no options"),
}


@pytest.mark.parametrize("fault", RECIPE_FAULTS)
def test_a_recipe_is_checked(fault, tmp_path, monkeypatch, capsys, checkpoint):
    content, message = RECIPE_FAULTS[fault]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["--config", recipe, "--model_name_or_path", checkpoint, "--data_path", CONVERSATIONS]
    arguments += ["--use_cpu", "true", "--bf16", "false", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["training", *map(str, arguments)])
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "none"])
def test_a_recipe_must_be_a_file(kind, tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    if kind == "folder":
        path.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    monkeypatch.setattr(sys, "argv", ["training", "--config", *([] if kind == "none" else [str(path)])])
    assert main() == 2
    assert "is no file: name a recipe" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet", "data"])
def test_data_must_be_a_file_or_a_folder(name, command, tmp_path):
    os.mkfifo(tmp_path / name)
    refused(command(data=tmp_path / name), name)


@pytest.mark.parametrize("output", ["file", "file/below/it"])
def test_the_output_cannot_be_a_file(output, command, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(command(output=tmp_path / output), "cannot be a folder", "is a file")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_acts_with_an_optimizer_is_taken():
    for given in (
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"optim": "adamw_torch", "adam_beta2": 0.95},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2, "lr_end": 0.0}},
        {
            "projector_learning_rate": 1e-3,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        },
    ):
        LlavaSTFTrainingArguments("out", use_cpu=True, bf16=False, report_to="none", **given)


def test_a_warmup_that_does_not_act_is_named(checkpoint, tmp_path, caplog):
    trainer_of("finetune", checkpoint, CONVERSATIONS, tmp_path / "out", lr_scheduler_type="constant")
    assert "`warmup_steps` 0.03 does not act: `lr_scheduler_type` constant has no warmup" in caplog.text


def test_options_are_kept_for_the_card_however_they_are_written(checkpoint):
    given = ["--no_assistant_only_loss", "--max_grad", "0.5", "--weight-decay=0.1", "--output_dir", "out"]
    named = ["--model_name_or_path", str(checkpoint), "--data_path", "x", "--use_cpu", "true", "--bf16", "no", *given]
    kept = recipe_settings(named, *Parser(KINDS).parse_args_and_config(named))
    assert kept == {"bf16": False, "assistant_only_loss": False, "max_grad_norm": 0.5, "weight_decay": 0.1}
    best = [*named[:-2], "--load_best_model_at_end", "--save_strategy", "steps", "--eval_strategy", "steps"]
    kept = recipe_settings(best, *Parser(KINDS).parse_args_and_config(best))
    assert kept["load_best_model_at_end"] is True  # the card says whose step the weights are of


def test_a_fault_of_ours_is_a_traceback(command, monkeypatch):
    def fault(*args, **kwargs):
        raise TypeError("ours")

    monkeypatch.setattr("training.run.load_model", fault)
    with pytest.raises(TypeError, match="ours"):
        command()


@pytest.mark.parametrize("option", ["--max_length", "--num_proc"])
def test_check_refuses_nonsense(option, checkpoint, capsys, monkeypatch):
    arguments = ["check", str(CONVERSATIONS), "--model", str(checkpoint), option, "0"]
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and "0 is not 1 or more" in capsys.readouterr().err


# What a LoRA run adapts


def test_a_lora_run_lists_what_it_adapts(checkpoint, tmp_path):
    changes = {"max_steps": 1, "lora_target_modules": r".*language_model.*\.(q|v)_proj"}
    result = run(*options("finetune_lora", checkpoint, eight_rows(tmp_path), tmp_path / "out", **changes))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    first = lines.index(
        "LoRA adapts 4 modules, the first of them model.language_model.layers.0.self_attn.q_proj:",
    )
    assert lines[first + 1 : first + 4] == [
        "    2 x model.language_model.layers.*.self_attn.q_proj",
        "    2 x model.language_model.layers.*.self_attn.v_proj",
        "trained in full beside it: model.multi_modal_projector",
    ]
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["revision"] is None  # of a folder


def test_the_shipped_recipes_pass(checkpoint, tmp_path):
    for recipe in RECIPES.glob("*.yaml"):
        named = options(recipe.stem, checkpoint, CONVERSATIONS, tmp_path / "out")
        used = Parser(KINDS).parse_args_and_config(named)
        written = yaml.safe_load(recipe.read_text())
        assert used[1].learning_rate == written["learning_rate"]
