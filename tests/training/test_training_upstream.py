"""Each workaround of `training/upstream.py` is still needed: the installed libraries have the fault that it is for.

A test that fails here is good news: its entry can go.
"""

import contextlib
import itertools
import os
import sys
import types
from dataclasses import fields

import pytest
import torch
import yaml
from accelerate import DistributedType, PartialState, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset
from training_runs import CONVERSATIONS, ROOT, eight_rows, run, trainer_of, weights_of
from transformers import Trainer, TrainerCallback
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.dynamic_module_utils import custom_object_save
from transformers.integrations.deepspeed import _load_state_dict_into_zero3_model
from trl import SFTConfig, TrlParser
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from trl.trainer.utils import maybe_gather_lm_head_ctx

from training import DataError, LlavaSTFTrainingArguments
from training.sampler import ModalityLengthSampler
from training.upstream import GivenSteps, NoEndlessEpochs, wait_for_everyone


@pytest.fixture
def trainer(checkpoint, tmp_path):
    def make(data=CONVERSATIONS, **changes):
        return trainer_of("finetune", checkpoint, data, tmp_path / "out", **changes)

    return make


# TRL


def test_image_token_masked(trainer, monkeypatch):
    made = trainer()
    batch = made.data_collator([made.train_dataset[0]])
    expected = made.model.eval()(**batch).loss
    assert made.compute_loss(made.model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-6)
    monkeypatch.setattr("training.trainer.image_token_masked", contextlib.nullcontext)
    assert made.compute_loss(made.model, dict(batch)).item() != pytest.approx(expected.item(), rel=1e-6)


def test_with_options():
    assert not [option for option in fields(DataCollatorForVisionLanguageModeling) if "kwargs" in option.name]


def test_averaged_over_ranks():
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "tests/support/upstream_worker.py")
    result = run(launcher=launcher, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("averaged: False") == 2


def test_mark_as_gathered(monkeypatch):
    partition = types.SimpleNamespace(ZeroParamStatus=types.SimpleNamespace(AVAILABLE=1))
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero.partition_parameters", partition)
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(AttributeError, match="ds_status"):
        maybe_gather_lm_head_ctx(torch.zeros(2))


def test_leave_out_image_tokens(trainer):
    made = trainer(assistant_only_loss=False)
    collator = DataCollatorForVisionLanguageModeling(
        made.data_collator.processor, chat_template=made.data_collator.chat_template
    )
    row = next(row for row in made.train_dataset if row["vision"])
    batch = collator([made.data_collator._with_media(row)])
    assert (batch["labels"] == made.model.config.image_token_id).any()


def test_keep_as_loaded(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    base = weights_of(checkpoint)

    def kept(folder):
        made = trainer_of("finetune_qlora", checkpoint, CONVERSATIONS, tmp_path / folder)  # loads float32
        whole = get_peft_model_state_dict(made.model)
        names = {name: name.removeprefix("base_model.model.") for name in whole if "multi_modal_projector" in name}
        return names and all(torch.equal(whole[name], base[of_base]) for name, of_base in names.items())

    assert kept("ours")
    monkeypatch.setattr("training.trainer.keep_as_loaded", lambda model: None)
    assert not kept("theirs")


def test_go_on_counting(trainer, tmp_path):
    settings = {"save_steps": 1, "data": eight_rows(tmp_path)}
    whole = trainer(**settings)
    whole.train()
    again = trainer(**settings)
    Trainer.train(again, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert again._total_train_tokens < whole._total_train_tokens


def test_number_of():
    parsed = TrlParser((SFTConfig,)).parse_args(["--output_dir", "out", "--pad_to_multiple_of", "8"])
    assert parsed.pad_to_multiple_of == "8"


def test_checked_parser(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"output_dir": "out", "max_steps": 2.5}))
    (args,) = TrlParser((SFTConfig,)).parse_args_and_config(
        ["--config", str(recipe), "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    )
    assert args.max_steps == 2.5


# transformers


class Endless(TrainerCallback):
    """Ends a training in its third epoch."""

    epochs = 0

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epochs += 1
        control.should_training_stop = self.epochs == 3


def test_no_endless_epochs(trainer):
    made = trainer(group_by_modality_length=False, max_steps=1)
    made.train_dataset = made.train_dataset.select([0]).to_iterable_dataset()
    made.remove_callback(NoEndlessEpochs)
    made.add_callback(endless := Endless())
    made.train()
    assert (endless.epochs, made.state.global_step) == (3, 0)


def test_given_steps(trainer, tmp_path):
    settings = {"max_steps": 3, "data": eight_rows(tmp_path)}
    trainer(**settings, save_steps=2).train()
    again = trainer(**settings, save_steps=1)
    again.remove_callback(GivenSteps)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert again.state.save_steps == 2


def test_finished(trainer, tmp_path):
    settings = {"max_steps": 3, "save_steps": 3, "data": eight_rows(tmp_path)}
    trainer(**settings).train()
    again = trainer(**settings)
    Trainer.train(again, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert again.state.global_step > 3


@pytest.fixture
def pushed(trainer, tmp_path, monkeypatch):
    """A trainer whose pushes never end, and the files that each of them had."""
    made, pushes = trainer(), []

    class Hub:
        def upload_folder(self, folder_path, **kwargs):
            pushes.append({path.name for path in (tmp_path / "out").iterdir()})
            return types.SimpleNamespace(done=lambda: False)  # whoever waits for it fails

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    made.hub_model_id, made.args.hub_always_push = "some/one", True
    made.model.save_pretrained(tmp_path / "checkpoint-1")
    (tmp_path / "out").mkdir(exist_ok=True)
    made.processing_class = made.push_in_progress = None
    for _ in range(2):
        Trainer._push_from_checkpoint(made, str(tmp_path / "checkpoint-1"))
    return pushes


def test_save_code(pushed):
    assert "model.safetensors" in pushed[0] and "modeling_llava_stf.py" not in pushed[0]


def test_wait_for_push(pushed):
    assert len(pushed) == 2  # the second one began, and the first one was not done


def test_keep_commit(checkpoint, tmp_path):
    from hub_server import Hub

    with Hub() as hub:
        hub.add("some/tiny", checkpoint)
        code = (
            "from modeling_llava_stf import LlavaSTFForConditionalGeneration as Model;"
            "print('commit', getattr(Model.from_pretrained('some/tiny').config, '_commit_hash', None))"
        )
        result = run("-c", code, launcher=(), **hub.environment(tmp_path))
    assert "commit None" in result.stdout, result.stderr


def test_keep_names(model):
    mapping = types.SimpleNamespace(weight_mapping=get_model_conversion_mapping(model))
    _load_state_dict_into_zero3_model(model, dict(model.state_dict()), mapping)
    assert model._weight_conversions  # though no name needed one


# PEFT


@pytest.fixture
def adapted(model):
    model.config._commit_hash = "0" * 40
    return get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj"))


def test_name_base_commit(adapted):
    assert adapted.peft_config["default"].revision is None


def test_remove_card(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").exists()


# accelerate


def test_sampler_epoch():
    sampler = ModalityLengthSampler(list(range(8)), [True] * 8, batch_size=1, batches=2, seed=0)
    rows = DataLoader(range(8), sampler=sampler, batch_size=1)
    shard = prepare_data_loader(rows, num_processes=2, process_index=0)
    shard.set_epoch(1)
    assert sampler.epoch == 1
    skip_first_batches(shard, 1).set_epoch(2)
    assert sampler.epoch == 1


def test_wait_for_everyone(monkeypatch):
    named = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "barrier", lambda device_ids=None: named.append(device_ids))
    state = PartialState(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_CPU)
    state.wait_for_everyone()
    wait_for_everyone()
    assert named == [[0], None]


# torch


class Interrupted(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return index


def test_stop_by_hand(monkeypatch):
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(unraisable.exc_type))
    workers = iter(DataLoader(Interrupted(), num_workers=1))
    kind, shut_down = type(workers), type(workers)._shutdown_workers

    def interrupted(self):
        shut_down(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "_shutdown_workers", interrupted)
    del workers
    assert dropped == [KeyboardInterrupt]


class Broken(Interrupted):
    def __getitem__(self, index):
        raise DataError("no such file")


def test_message_of():
    with pytest.raises(DataError) as caught:
        list(DataLoader(Broken(), num_workers=1))
    assert "Traceback" in str(caught.value)


def test_own_class(model, tmp_path):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
        custom_object_save(model, tmp_path)
    finally:
        distributed.destroy_process_group()
    assert not (tmp_path / "modeling_llava_stf.py").exists()


STRATEGIES = next(field for field in fields(SFTConfig) if field.name == "train_sampling_strategy").metadata["choices"]


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "batch_rebalance"])
def test_seeded(strategy, trainer):
    if strategy not in STRATEGIES:
        pytest.skip("of a newer transformers")
    orders = set()
    for seed, epoch in itertools.product((1, 7), (0, 1)):
        made = trainer(train_sampling_strategy=strategy, group_by_modality_length=False, data_seed=seed)
        sampler = made._get_train_sampler()
        sampler.set_epoch(epoch)
        assert str(list(sampler)) == str(list(sampler))
        orders.add(str(list(sampler)))
    assert len(orders) == 4
    theirs = Trainer._get_train_sampler(made)
    assert getattr(theirs, "generator", None) is None and getattr(theirs, "seed", 42) == 42


def test_own_precision(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    settings = {"use_cpu": True, "report_to": "none", "fp16": False}
    for bf16, expected in ((False, "no"), (True, "bf16")):
        assert SFTConfig("out", bf16=bf16, **settings).mixed_precision == "bf16"
        assert LlavaSTFTrainingArguments("out", bf16=bf16, **settings).mixed_precision == expected
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


# All of them


def test_every_entry_has_a_test():
    entries = [line for line in (ROOT / "training" / "upstream.py").read_text().splitlines() if "Project: " in line]
    tests = [name for name in globals() if name.startswith("test_")]
    assert len(entries) == len(tests) - 1
