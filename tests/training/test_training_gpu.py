"""The shipped launches on the GPUs of a machine: run with `-m gpu`."""

import pytest
import torch
from training_runs import CAPTIONS, CONVERSATIONS, IMAGES, RECIPES, ROOT, run

from modeling_llava_stf import LlavaSTFForConditionalGeneration

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "config, recipe",
    [
        ("ddp", "pretrain"),
        ("ddp", "finetune_lora"),
        ("ddp", "finetune_qlora"),
        ("fsdp2", "finetune"),
        ("zero2", "finetune"),
        ("zero3", "finetune"),
    ],
)
def test_the_shipped_launches(config, recipe, checkpoint, tmp_path):
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    if recipe == "finetune_qlora":
        pytest.importorskip("bitsandbytes")
    launcher = (
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "training" / "accelerate" / f"{config}.yaml",
    )
    arguments = {
        "config": RECIPES / f"{recipe}.yaml",
        "model_name_or_path": checkpoint,
        "data_path": CAPTIONS if recipe == "pretrain" else CONVERSATIONS,
        "image_folder": IMAGES,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "global_batch_size": 4 * torch.cuda.device_count(),
    }
    named = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    result = run("-m", "training", *named, launcher=(*launcher, "--num_processes", torch.cuda.device_count()))
    assert result.returncode == 0, result.stderr
    if "lora" not in recipe:
        model = LlavaSTFForConditionalGeneration.from_pretrained(tmp_path / "out")
        assert all(torch.isfinite(weight).all() for weight in model.parameters())
