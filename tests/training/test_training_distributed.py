"""Two ranks, each with rows of its own, are one process with the same global batch."""

import json

import pytest
import torch
from commands import here
from training_runs import ROOT, eight_rows, history, options, run, weights_of

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "tests/support/training_rank.py")


def launched(*options: str) -> tuple[str, ...]:
    ranks = ("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0")
    return ("-m", "accelerate.commands.launch", *options, *ranks, "tests/support/training_rank.py")


LAUNCHERS = {
    "ddp": TORCHRUN,
    **{name: launched("--config_file", f"training/accelerate/{name}.yaml") for name in ("fsdp2", "zero2", "zero3")},
}
# torch 2.11 and 2.13 make the mesh of FSDP2 of the GPUs of a machine that has some.
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# Plain steps and no clipping: every weight shows what its gradient was.
PLAIN = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "max_steps": 3,
    "per_device_train_batch_size": 1,
    "group_by_modality_length": False,  # rows with images and without stand side by side
}


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    data = eight_rows(folder)
    result = here("training", *options("finetune", checkpoint, data, folder / "out", **PLAIN))
    assert result.returncode == 0, result.stderr
    assert "1 per device x 1 device(s) x 4 accumulation step(s)" in result.stdout
    return data, folder / "out", parts_of(result.stdout)


def parts_of(printed: str) -> list[str]:
    """The table of what is trained."""
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("part "))
    return lines[start : next(number for number, line in enumerate(lines) if line.startswith("global batch"))]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_equal_one(launcher, alone, checkpoint, tmp_path):
    if launcher.startswith("zero"):
        pytest.importorskip("deepspeed", reason="make test-deepspeed has it")
    data, expected, parts = alone
    arguments = options("finetune", checkpoint, data, tmp_path / "out", **PLAIN)
    result = run(*arguments, launcher=LAUNCHERS[launcher], **ON_CPU)
    assert result.returncode == 0, result.stderr
    assert parts_of(result.stdout) == parts
    assert "1 per device x 2 device(s) x 2 accumulation step(s)" in result.stdout
    assert result.stdout.count("global batch") == 1  # printed by one rank
    one, two = history(expected), history(tmp_path / "out")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-4)
    before, after = weights_of(checkpoint), weights_of(expected)
    for name, weight in weights_of(tmp_path / "out").items():
        step = (after[name] - before[name]).abs().max()
        assert (weight - after[name]).abs().max() <= 1e-2 * step, name
        assert torch.equal(after[name], before[name]) == ("vision_tower" in name), name
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in expected.iterdir()} == files
    assert not [name for name in files if name.startswith("_")]


def test_weights_that_are_not_finite_are_not_saved_from_zero3(alone, checkpoint, tmp_path):
    """DeepSpeed leaves tensors without elements in the place of the weights, and all of none are finite."""
    pytest.importorskip("deepspeed", reason="make test-deepspeed has it")
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    split = {"stage": 3, "stage3_param_persistence_threshold": 0}  # small weights, too
    config = tmp_path / "deepspeed.json"
    config.write_text(json.dumps({"zero_optimization": split, **dict.fromkeys(sizes, "auto")}))
    settings = PLAIN | {"max_steps": 1, "learning_rate": 3e38, "weight_decay": 100}
    result = run(
        *options("finetune", checkpoint, alone[0], tmp_path / "out", **settings),
        launcher=launched("--use_deepspeed", "--deepspeed_config_file", str(config)),
        **ON_CPU,
    )
    assert result.returncode != 0
    assert "is not finite after step 1; it was not saved" in result.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_shipped_configs(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "training" / "accelerate" / f"{name}.yaml"))
    assert config.mixed_precision == "bf16" and config.num_processes == 8


def test_the_shipped_fsdp_config_wraps_a_layer_of_the_model(model):
    import yaml
    from accelerate import FullyShardedDataParallelPlugin

    config = yaml.safe_load((ROOT / "training" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[config["fsdp_transformer_layer_cls_to_wrap"]],
    )
    plugin.set_auto_wrap_policy(model)
    layers = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert {type(layer) for layer in model.model.language_model.layers} == set(layers)


def test_mixed_dtypes_are_refused_under_fsdp(checkpoint, tmp_path):
    arguments = options(
        "finetune_lora", checkpoint, eight_rows(tmp_path), tmp_path / "out", **{**PLAIN, "dtype": "bfloat16"}
    )
    result = run(*arguments, launcher=LAUNCHERS["fsdp2"], **ON_CPU)
    assert result.returncode != 0
    assert "FSDP shards weights of one dtype only, found torch.bfloat16, torch.float32" in result.stderr
