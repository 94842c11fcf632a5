"""The options of the four command lines. They are listed here because to add, rename or drop one is a decision."""

import argparse
from dataclasses import fields
from importlib import import_module

import pytest

OPTIONS = {
    "modeling_llava_stf ask": "image question --model --revision --max-new-tokens --do-exif-transpose "
    "--alpha-background --max-soft-tokens",
    "modeling_llava_stf caption": "input output --model --revision --prompt --images --max-new-tokens --batch-size "
    "--part-size --shard --workers --server --concurrency --do-exif-transpose --alpha-background --max-soft-tokens",
    "modeling_llava_stf serve": "model options",
    "modeling_llava_stf demo": "",
    "conversion": "source destination --base --vision-tower --tokenizer --revision --base-revision "
    "--vision-tower-revision --tokenizer-revision --subfolder --init-fusion --taps --seed --keep-adapter "
    "--keep-full-tower --dtype --pad-vocabulary --max-shard-size --to-original --dry-run --verify --outputs",
    "conversion quantise": "source destination --scheme --revision --subfolder --base-model",
    # Ours only: those of TRL, transformers and PEFT are theirs to change.
    "training": "--data_path --image_folder --eval_data_path --dataset_config --split --streaming --on_bad_image "
    "--on_bad_row --trainable --projector_learning_rate --global_batch_size --group_by_modality_length "
    "--loss_reduction --chat_template_name --peak_tflops --image_aspect_ratio --do_exif_transpose --alpha_background "
    "--token_budgets --token_budget_mode",
    "training check": "data_path --model_name_or_path --model_revision --image_folder --dataset_config --split "
    "--max_length --chat_template_name --token_budgets --token_budget_mode --num_proc --plot",
    "training merge": "adapter destination --base --base_revision",
    "hub_card render": "folder --repo-id --tag --run --license --base-model --dataset --language --base-license --note "
    "--results --speed --recipe --base --base-revision",
    "hub_card check": "folder --also --allow-code --run-code --time-limit",
    "hub_card publish": "folder repo_id --also --allow-code --run-code --time-limit --private --revision --pr "
    "--collection --dry-run",
}


class Asked(Exception):
    """Carries the parser that a command line reads its arguments with."""


def options(command, monkeypatch):
    """The options and positional arguments of a command, which ends where it would parse them."""

    def parse(parser, *args, **kwargs):
        raise Asked(parser)

    module, *subcommand = command.split()
    monkeypatch.setattr("sys.argv", [module, *(subcommand if module in ("training", "conversion") else ())])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    with pytest.raises(Asked) as asked:
        import_module(f"{module}.__main__").main()
    parser = asked.value.args[0]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert {name.split()[1] for name in OPTIONS if name.startswith(f"{module} ")} == set(action.choices)
            parser = action.choices[subcommand[0]]
    return [action for action in parser._actions if action.dest != "help"]


def names(actions):
    """The first spelling of each."""
    return {(action.option_strings or [action.dest])[0] for action in actions}


@pytest.mark.parametrize("command", [name for name in OPTIONS if name != "training"])
def test_options(command, monkeypatch):
    if command.startswith("training"):
        pytest.importorskip("trl")
    assert names(options(command, monkeypatch)) == set(OPTIONS[command].split())


def test_options_of_training(monkeypatch):
    trl = pytest.importorskip("trl")
    theirs = {field.name for kind in (trl.SFTConfig, trl.ModelConfig) for field in fields(kind)} | {"config"}
    ours = [action for action in options("training", monkeypatch) if action.dest.removeprefix("no_") not in theirs]
    assert names(ours) == set(OPTIONS["training"].split())
