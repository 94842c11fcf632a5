"""What a run may go on from, what an adapter may be merged into, and what is left of a run that is stopped."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import elsewhere, here
from hub_server import File, Hub
from peft import PeftModel
from safetensors.torch import load_file, save_file
from training_runs import CAPTIONS, CONVERSATIONS, IMAGES, ROOT, eight_rows, options, run, trainer_of, weights_of
from trl import ModelConfig

from modeling_llava_stf import LlavaSTFForConditionalGeneration
from training import LlavaSTFTrainer
from training.__main__ import main
from training.merge import merge
from training.run import load_model
from training.saving import CheckpointError

SETTINGS = {"save_steps": 1, "max_steps": 3, "save_total_limit": 3}
LORA = {**SETTINGS, "lora_r": 4}


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory):
    """Folders of three runs with their checkpoints: a full one, LoRA, and one of shards."""
    root = tmp_path_factory.mktemp("runs")
    trainer_of("finetune", checkpoint, CONVERSATIONS, root / "full", **SETTINGS).train()
    adapted = trainer_of("finetune_lora", checkpoint, CONVERSATIONS, root / "lora", **LORA)
    adapted.train()
    adapted.save_model()
    shutil.copytree(root / "full" / "checkpoint-2", root / "shards" / "checkpoint-2")
    (root / "shards" / "checkpoint-2" / "model.safetensors").unlink()
    model = LlavaSTFForConditionalGeneration.from_pretrained(root / "full" / "checkpoint-2")
    model.save_pretrained(root / "shards" / "checkpoint-2", max_shard_size="1MB")
    return root


@pytest.fixture(scope="module")
def resume(runs, checkpoint, tmp_path_factory):
    """Goes on from a checkpoint, by the trainer that has its settings."""
    out = tmp_path_factory.mktemp("resumed")
    full = trainer_of("finetune", checkpoint, CONVERSATIONS, out / "full", **SETTINGS)
    lora = trainer_of("finetune_lora", checkpoint, CONVERSATIONS, out / "lora", **LORA)
    return lambda folder, kind="full": (lora if kind == "lora" else full).train(resume_from_checkpoint=str(folder))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def noise(path):
    path.write_bytes(b"\x93nothing of the kind" * 50)


def folder(path):
    path.unlink()
    path.mkdir()


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def gone(path):
    path.unlink()


def other_pickle(path):
    torch.save(["something", "else"], path)


def plain_pickle(path):
    path.write_bytes(pickle.dumps({"state": {}, "param_groups": []}))


def running_pickle(path):
    """One that would run a command."""
    path.write_bytes(b"cos\nsystem\n(S'touch /tmp/llava-stf-ran'\ntR.")


DAMAGES = [
    *(("trainer_state.json", damage) for damage in (cut, empty, noise, folder, fifo, gone)),
    *(("model.safetensors", damage) for damage in (cut, empty, noise, folder, fifo, gone)),
    *(("optimizer.pt", damage) for damage in (cut, empty, noise, folder, fifo, gone, other_pickle, plain_pickle)),
    ("optimizer.pt", running_pickle),
    *(("scheduler.pt", damage) for damage in (cut, empty, noise, folder, fifo, gone, other_pickle)),
    *(("rng_state.pth", damage) for damage in (cut, empty, noise, folder, fifo, gone, other_pickle)),
    *(("training_run.json", damage) for damage in (cut, empty, noise, folder, fifo, gone)),
    *(("config.json", damage) for damage in (cut, empty, noise)),
]


@pytest.mark.parametrize("name, damage", DAMAGES, ids=[f"{name}-{damage.__name__}" for name, damage in DAMAGES])
def test_a_damaged_checkpoint_is_named(name, damage, runs, resume, tmp_path):
    copy = shutil.copytree(runs / "full" / "checkpoint-2", tmp_path / "checkpoint-2")
    damage(copy / name)
    with pytest.raises(CheckpointError, match=rf"(?s){copy}.*{name}|{name}.*{copy}"):
        resume(copy)
    assert not Path("/tmp/llava-stf-ran").exists()


@pytest.mark.parametrize("damage", [cut, noise, folder, gone])
def test_a_damaged_adapter_is_named(damage, runs, resume, tmp_path):
    copy = shutil.copytree(runs / "lora" / "checkpoint-2", tmp_path / "checkpoint-2")
    damage(copy / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=str(copy)):
        resume(copy, "lora")


@pytest.mark.parametrize("damage", [None, cut, gone, fifo])
def test_a_damaged_shard_is_named(damage, runs, resume, tmp_path):
    copy = shutil.copytree(runs / "shards" / "checkpoint-2", tmp_path / "checkpoint-2")
    shards = sorted(copy.glob("model-*.safetensors"))
    assert len(shards) > 1
    if damage is None:
        return resume(copy)
    damage(shards[-1])
    with pytest.raises(CheckpointError, match=shards[-1].name):
        resume(copy)


def edit_state(copy, **changes):
    path = copy / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path, edit):
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def reshape(content):
    content["state"][0]["exp_avg"] = torch.zeros(3, 5)


def one_less(content):
    content["param_groups"][0]["params"].pop()


def edit_weights(path, edit):
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


MIXED = {
    "a state that is a list": (lambda copy: (copy / "trainer_state.json").write_text("[]"), "expected an object"),
    "no step": (lambda copy: edit_state(copy, global_step=None), "`global_step`"),
    "a text as step": (lambda copy: edit_state(copy, global_step="2"), "`global_step`"),
    "an unknown key": (lambda copy: edit_state(copy, colour="red"), "colour"),
    "no history": (lambda copy: edit_state(copy, log_history=None), "`log_history`"),
    "another step": (lambda copy: edit_state(copy, global_step=1), "of step 2, expected 1"),
    "optimizer of other shapes": (lambda copy: edit_tensors(copy / "optimizer.pt", reshape), "shape (3, 5)"),
    "optimizer of fewer weights": (
        lambda copy: edit_tensors(copy / "optimizer.pt", one_less),
        "of another run: groups",
    ),
    "optimizer without state": (
        lambda copy: edit_tensors(copy / "optimizer.pt", lambda content: content["state"].clear()),
        "no state of any weight",
    ),
    "optimizer of another step": (
        lambda copy: shutil.copy(copy.parent / "checkpoint-1" / "optimizer.pt", copy),
        "of another checkpoint: of step 1, expected 2",
    ),
    "scheduler of another step": (
        lambda copy: shutil.copy(copy.parent / "checkpoint-1" / "scheduler.pt", copy),
        "of another checkpoint: of step 1, expected 2",
    ),
    "a weight missing": (
        lambda copy: edit_weights(copy / "model.safetensors", lambda weights: weights.pop("lm_head.weight")),
        "1 are missing (such as lm_head.weight)",
    ),
    "a weight too many": (
        lambda copy: edit_weights(copy / "model.safetensors", lambda weights: weights.update(new=torch.ones(2))),
        "1 unknown (such as new)",
    ),
    "a weight of another shape": (
        lambda copy: edit_weights(
            copy / "model.safetensors", lambda weights: weights.update({"lm_head.weight": torch.ones(2, 2)})
        ),
        "lm_head.weight has the shape (2, 2)",
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_checkpoint_of_mixed_files_is_named(name, runs, resume, tmp_path):
    copies = shutil.copytree(runs / "full", tmp_path / "copies")
    damage, message = MIXED[name]
    damage(copies / "checkpoint-2")
    with pytest.raises(CheckpointError) as caught:
        resume(copies / "checkpoint-2")
    assert message in str(caught.value)


CHANGED = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "seed": 7,
    "data_seed": 7,
    "weight_decay": 0.1,
    "loss_reduction": "microbatch",
    "trainable": "lm_head",
    "group_by_modality_length": False,
    "image_aspect_ratio": "square",
    "do_exif_transpose": True,
    "alpha_background": "white",
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("name", [*CHANGED, "batch", "data", "lora"])
def test_another_run_is_not_gone_on_with(name, runs, checkpoint, tmp_path):
    data, changes = CONVERSATIONS, {name: CHANGED.get(name)}
    if name == "batch":
        changes = {"per_device_train_batch_size": 1}
    if name == "data":
        rows = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))
        rows[0]["conversations"][1]["value"] += " Yes."
        (tmp_path / "other.json").write_text(json.dumps(rows))
        data, changes = tmp_path / "other.json", {}
    kind, recipe, settings = ("lora", "finetune_lora", LORA) if name == "lora" else ("full", "finetune", SETTINGS)
    if name == "lora":
        changes = {"lora_alpha": 3}
    other = trainer_of(recipe, checkpoint, data, tmp_path / "out", **{**settings, **changes})
    with pytest.raises(CheckpointError, match="is of another run: ") as caught:
        other.train(resume_from_checkpoint=str(runs / kind / "checkpoint-2"))
    named = {"batch": "per_device_train_batch_size", "data": "digest of the rows", "lora": "lora_alpha"}
    assert f"`{named.get(name, name)}` was " in str(caught.value)


def test_a_lora_run_is_not_gone_on_with_on_quantised_weights(runs, checkpoint, tmp_path):
    other = trainer_of("finetune_lora", checkpoint, CONVERSATIONS, tmp_path / "out", **LORA, load_in_4bit=True)
    assert other.run["quantisation"]["load_in_4bit"] is True
    with pytest.raises(CheckpointError, match="`quantisation` was None, is {.*nf4"):
        other.train(resume_from_checkpoint=str(runs / "lora" / "checkpoint-2"))


def test_another_number_of_ranks_is_not_gone_on_with(runs, checkpoint, tmp_path):
    wanted = {**SETTINGS, "per_device_train_batch_size": 1, "resume_from_checkpoint": runs / "full" / "checkpoint-2"}
    arguments = options("finetune", checkpoint, CONVERSATIONS, tmp_path / "out", **wanted)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "tests/support/training_rank.py")
    result = run(*arguments, launcher=launcher)
    assert result.returncode != 0 and "`processes` was 1, is 2" in result.stderr


def test_a_longer_run_says_so(runs, checkpoint, tmp_path, caplog):
    """The learning rates follow from the number of steps."""
    longer = trainer_of("finetune", checkpoint, CONVERSATIONS, tmp_path / "out", **{**SETTINGS, "max_steps": 4})
    longer.train(resume_from_checkpoint=str(runs / "full" / "checkpoint-2"))
    assert "`max_steps` was 3, is 4: the learning rates from here on" in caplog.text
    assert longer.state.global_step == 4


def test_where_the_data_lies_does_not_matter(runs, checkpoint, tmp_path):
    moved = shutil.copy(CONVERSATIONS, tmp_path / "moved.json")
    other = trainer_of("finetune", checkpoint, moved, tmp_path / "out", **SETTINGS)
    other.train(resume_from_checkpoint=str(runs / "full" / "checkpoint-2"))
    assert other.state.global_step == 3


@pytest.mark.parametrize("damage", [gone, cut])
def test_the_command_ends_in_one_line(damage, runs, checkpoint, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(runs / "full" / "checkpoint-2", tmp_path / "checkpoint-2")
    damage(copy / "optimizer.pt")
    arguments = options(
        "finetune", checkpoint, CONVERSATIONS, tmp_path / "out", **SETTINGS, resume_from_checkpoint=copy
    )
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    assert main() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "optimizer.pt" in line and "Go on from another checkpoint" in line


def test_a_checkpoint_without_state_is_not_gone_on_with(checkpoint, tmp_path):
    made = trainer_of("finetune", checkpoint, CONVERSATIONS, tmp_path / "out", **SETTINGS, save_only_model=True)
    made.train()
    with pytest.raises(CheckpointError, match="it has no optimizer.pt, scheduler.pt, rng_state.pth .*save_only_model"):
        made.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


# Merging


@pytest.fixture
def adapter(runs, tmp_path):
    return shutil.copytree(runs / "lora", tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*"))


FAULTS = {
    "empty": (lambda weights: weights.clear(), "weights are missing"),
    "no connector": (
        lambda weights: [weights.pop(name) for name in list(weights) if "multi_modal_projector" in name],
        "weights are missing, such as base_model.model.model.multi_modal_projector",
    ),
    "no LoRA": (lambda weights: [weights.pop(name) for name in list(weights) if "lora_" in name], "are missing"),
    "one half": (
        lambda weights: weights.pop(next(name for name in weights if "lora_B" in name)),
        "1 weights are missing",
    ),
    "other names": (
        lambda weights: [
            weights.update({name.replace("layers", "blocks"): weights.pop(name)}) for name in list(weights)
        ],
        "have no place",
    ),
    "another layer": (
        lambda weights: weights.update({"base_model.model.model.language_model.layers.9.q_proj": torch.ones(2)}),
        "1 weights have no place, such as base_model.model.model.language_model.layers.9",
    ),
    "other shapes": (
        lambda weights: weights.update({next(name for name in weights if "lora_A" in name): torch.ones(4, 7)}),
        "has the shape (4, 7), expected",
    ),
    "not finite": (
        lambda weights: next(w for n, w in weights.items() if "lora_B" in n).fill_(float("nan")),
        "is not finite",
    ),
    "untrained": (lambda weights: [w.zero_() for n, w in weights.items() if "lora_A" not in n], "changes nothing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_is_not_whole_is_not_merged(fault, adapter, tmp_path):
    damage, message = FAULTS[fault]
    edit_weights(adapter / "adapter_model.safetensors", damage)
    with pytest.raises(ValueError) as caught:
        merge(str(adapter), str(tmp_path / "merged"))
    assert message in str(caught.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("damage", [cut, empty, noise, folder, fifo, gone])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_not_merged(name, damage, adapter, tmp_path, monkeypatch, capsys):
    damage(adapter / name)
    monkeypatch.setattr(sys, "argv", ["training", "merge", str(adapter), str(tmp_path / "merged")])
    assert main() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert str(adapter) in line
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("damage", ["lacks 1 weights", "has 1 weights that"])
def test_a_base_that_is_not_whole_is_neither_trained_nor_merged(damage, adapter, checkpoint, tmp_path):
    """transformers warns, and goes on with random weights in place of those that it did not find."""
    base, name = shutil.copytree(checkpoint, tmp_path / "base"), "model.language_model.layers.0.mlp.up_proj.weight"
    change = {name + "s": torch.ones(2)}
    edit_weights(
        base / "model.safetensors", lambda found: found.pop(name) if "lacks" in damage else found.update(change)
    )
    with pytest.raises(ValueError, match=damage):
        load_model(ModelConfig(model_name_or_path=str(base)))
    with pytest.raises(ValueError, match=damage):
        merge(str(adapter), str(tmp_path / "merged"), base=str(base))
    assert not (tmp_path / "merged").exists()


def test_merged_weights_are_those_of_peft(adapter, checkpoint, tmp_path):
    base = LlavaSTFForConditionalGeneration.from_pretrained(checkpoint)
    expected = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    for name, weight in weights_of(merge(str(adapter), str(tmp_path / "merged"))).items():
        assert torch.equal(weight, expected[name]), name


# Revisions


@pytest.fixture(scope="module")
def hub(checkpoint, tmp_path_factory):
    """`some/tiny`, whose branch `main` has moved on from the tag `v1`."""
    moved = shutil.copytree(checkpoint, tmp_path_factory.mktemp("moved") / "tiny")
    edit_weights(moved / "model.safetensors", lambda weights: [weight.mul_(2) for weight in weights.values()])
    with Hub() as hub:
        hub.add("some/tiny", checkpoint)
        repository = hub.repositories["some/tiny"]
        repository.refs["refs/tags/v1"] = before = repository.refs["refs/heads/main"]
        files = {**before.files, "model.safetensors": File((moved / "model.safetensors").read_bytes(), True)}
        repository.commit("refs/heads/main", "moved on", files)
        yield hub


def with_hub(hub, home, *commands):
    """Exit status and errors of each command."""
    results = elsewhere("training", commands, hub.environment(home))
    return [(result.returncode, result.stderr) for result in results]


def test_the_revision_of_the_base_is_kept(hub, checkpoint, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    commits = {name: hub.repositories["some/tiny"].find(name).oid for name in ("v1", "main")}
    changes = {"lora_r": 4, "max_steps": 2, "save_steps": 1, "model_revision": "v1", "warmup_steps": 0}
    moved = {**changes, "model_revision": "main", "resume_from_checkpoint": out / "checkpoint-1"}
    merged = {
        "named": [],
        "the same": ["--base", "some/tiny"],
        "main": ["--base_revision", "main"],
        "v1": ["--base", "some/tiny", "--base-revision", "v1"],
    }
    (status, errors), *merges, unknown, folder, resumed = with_hub(
        hub,
        tmp_path / "home",
        options("finetune_lora", "some/tiny", CAPTIONS, out, **changes),
        *(["merge", out, tmp_path / name, *arguments] for name, arguments in merged.items()),
        ["merge", out, tmp_path / "none", "--base-revision", "no-such"],
        ["merge", out, tmp_path / "none", "--base", checkpoint, "--base-revision", "v1"],
        options("finetune_lora", "some/tiny", CAPTIONS, other, **moved),
    )
    assert status == 0, errors
    for place in (out, out / "checkpoint-2"):
        settings = json.loads((place / "adapter_config.json").read_text())
        assert (settings["base_model_name_or_path"], settings["revision"]) == ("some/tiny", commits["v1"])

    frozen = "model.language_model.embed_tokens.weight"
    base = weights_of(checkpoint)[frozen]
    for name, (status, errors) in zip(merged, merges, strict=True):
        assert status == 0, errors
        assert torch.equal(weights_of(tmp_path / name)[frozen], 2 * base if name == "main" else base), name
    for (status, errors), message in (
        (unknown, "no-such"),
        (folder, "is a folder, which has no revision 'v1'"),
        (resumed, f"`revision` was {commits['v1']}, is {commits['main']}"),
    ):
        assert status == 2 and message in errors.splitlines()[-1]
    assert not (tmp_path / "none").exists()


def test_check_takes_a_revision(hub, tmp_path):
    words = ["check", CONVERSATIONS, "--image_folder", IMAGES, "--model", "some/tiny", "--model_revision"]
    (known, errors), (unknown, message) = with_hub(hub, tmp_path, [*words, "v1"], [*words, "no-such"])
    assert known == 0, errors
    assert unknown == 2 and "no-such" in message.splitlines()[-1]


# Stopped by hand


class LostInterrupt:
    """Is interrupted while it is taken down, where Python drops what is raised."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_stops_the_run(checkpoint, tmp_path):
    made = trainer_of("finetune", checkpoint, CONVERSATIONS, tmp_path / "out", **SETTINGS)
    before, step = signal.getsignal(signal.SIGINT), made.training_step

    def interrupted(*args, **kwargs):
        LostInterrupt()
        return step(*args, **kwargs)

    made.training_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert made.state.global_step == 0 and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_by_hand_names_its_last_checkpoint(workers, checkpoint, tmp_path):
    out = tmp_path / "out"
    changes = {"save_steps": 1, "save_total_limit": 2, "max_steps": 10_000, "dataloader_num_workers": workers}
    arguments = options("finetune", checkpoint, eight_rows(tmp_path), out, **changes)
    process = subprocess.Popen(
        [sys.executable, "-m", "training", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(list(out.glob("checkpoint-*"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert errors.splitlines()[-1].startswith(f"stopped. The last complete checkpoint is {last}: go on from it")
    assert "Traceback" not in errors
    assert (last / "training_run.json").is_file() and not (out / "_unfinished").exists()
    with pytest.raises(ProcessLookupError):  # no process of it is left
        os.killpg(process.pid, 0)
    step = int(last.name.split("-")[1])
    again = {**changes, "max_steps": step + 1, "resume_from_checkpoint": "last"}
    result = here("training", *options("finetune", checkpoint, eight_rows(tmp_path), out, **again))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("another fault")])
def test_a_full_gpu_ends_the_run_with_one_line(error, checkpoint, tmp_path, monkeypatch, capsys):
    """It names the checkpoint to go on from; another fault of torch keeps its traceback."""
    step, calls = LlavaSTFTrainer.training_step, iter(range(2))  # those of the first step

    def full(*args, **kwargs):
        if next(calls, None) is None:
            raise error
        return step(*args, **kwargs)

    monkeypatch.setattr(LlavaSTFTrainer, "training_step", full)
    named = options("finetune", checkpoint, CONVERSATIONS, tmp_path / "out", save_steps=1, max_steps=2)
    monkeypatch.setattr(sys, "argv", ["training", *named])
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError, match="another fault"):
            main()
        return
    assert main() == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: The GPU has too little free memory: CUDA out of memory. `nvidia-smi` lists")
    assert "A lower `per_device_train_batch_size` needs less" in line
    assert f"go on from it with --resume_from_checkpoint {tmp_path / 'out' / 'checkpoint-1'}." in line


def test_the_best_of_the_saved_steps_is_loaded(checkpoint, tmp_path):
    """A better step that was not saved left the last weights."""
    settings = {"eval_data_path": CONVERSATIONS, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 2}
    settings |= {"load_best_model_at_end": True, "save_total_limit": 4}
    made = trainer_of("finetune", checkpoint, CONVERSATIONS, tmp_path / "out", **settings)
    losses, evaluate = iter([1.0, 2.0, 3.0, 4.0]), made.evaluate
    made.evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_loss": next(losses)}
    made.train()
    best = weights_of(tmp_path / "out" / "checkpoint-2")
    assert all(torch.equal(weight, best[name]) for name, weight in made.model.state_dict().items())
    made.args.metric_for_best_model, made.control.should_save = "accuracy", True
    with pytest.raises(ValueError, match="`metric_for_best_model` is 'accuracy', expected one of eval_loss"):
        made._determine_best_metric({"eval_loss": 1.0}, None)
