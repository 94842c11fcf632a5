"""A run that is stopped and goes on is the run that was never stopped, to the bit."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from commands import here
from training_runs import CAPTIONS, CONVERSATIONS, ROOT, eight_rows, history, options, run, trainer_of, weights_of

from training.run import resume_from
from training.saving import CheckpointError

# Four steps of four rows, with a checkpoint within the first epoch: the captions have three rows, the eight
# conversations have two steps an epoch. Dropout makes the random state matter.
RUNS = {
    "pretrain": {},
    "finetune": {},
    "finetune_lora": {"lora_r": 4, "lora_dropout": 0.3},
}


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("recipe", RUNS)
def test_resume_is_exact_also_across_an_epoch(recipe, stop, checkpoint, tmp_path):
    data = CAPTIONS if recipe == "pretrain" else eight_rows(tmp_path)
    settings = {**RUNS[recipe], "save_steps": 1, "save_total_limit": 4}
    whole = trainer_of(recipe, checkpoint, data, tmp_path / "whole", **settings)
    whole.train()
    stopped = tmp_path / "whole" / f"checkpoint-{stop}"
    resumed = trainer_of(recipe, checkpoint, data, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(stopped))
    assert history(tmp_path / "resumed" / "checkpoint-4") == history(tmp_path / "whole" / "checkpoint-4")
    expected = weights_of(tmp_path / "whole" / "checkpoint-4")
    for name, weight in weights_of(tmp_path / "resumed" / "checkpoint-4").items():
        assert torch.equal(weight, expected[name]), name
    assert any(not torch.equal(weight, expected[name]) for name, weight in weights_of(stopped).items())


def test_a_run_that_was_done_is_not_trained_further(checkpoint, tmp_path):
    """Killed after its last checkpoint, it has only to be saved; with more steps it goes on, and is saved again."""
    trainer_of("finetune", checkpoint, CONVERSATIONS, tmp_path / "out", save_steps=2).train()
    done = weights_of(tmp_path / "out" / "checkpoint-4")
    for steps in (4, 5):
        wanted = {"max_steps": steps, "resume_from_checkpoint": "last"}
        result = here("training", *options("finetune", checkpoint, CONVERSATIONS, tmp_path / "out", **wanted))
        assert result.returncode == 0, result.stderr
        assert [row["step"] for row in history(tmp_path / "out")] == list(range(1, steps + 1))
        if steps == 4:
            assert all(torch.equal(weight, done[name]) for name, weight in weights_of(tmp_path / "out").items())


def test_two_ranks_resume_exactly(checkpoint, tmp_path):
    def ranks(output, **settings):
        settings |= {"per_device_train_batch_size": 1, "save_steps": 3}
        arguments = options("finetune", checkpoint, eight_rows(tmp_path), output, **settings)
        launcher = (
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "tests/support/training_rank.py",
        )
        result = run(*arguments, launcher=launcher)
        assert result.returncode == 0, result.stderr

    ranks(tmp_path / "whole")
    ranks(tmp_path / "resumed", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3")
    assert history(tmp_path / "resumed") == history(tmp_path / "whole")
    expected = weights_of(tmp_path / "whole")
    for name, weight in weights_of(tmp_path / "resumed").items():
        assert torch.equal(weight, expected[name]), name


def test_a_killed_run_goes_on(checkpoint, tmp_path):
    """Killed with something half saved, it refuses to start over, and goes on from the last whole checkpoint."""
    out = tmp_path / "out"
    arguments = options("finetune", checkpoint, CONVERSATIONS, out, save_steps=1, save_total_limit=3, max_steps=10_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "training", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("checkpoint-*"))) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    for path in out.glob("checkpoint-*"):
        assert (path / "trainer_state.json").exists() and weights_of(path)
    (out / "_unfinished" / f"checkpoint-{last + 1}").mkdir(parents=True, exist_ok=True)

    changes = {"save_steps": 1, "max_steps": last + 2}
    refused = here("training", *options("finetune", checkpoint, CONVERSATIONS, out, **changes))
    assert refused.returncode == 2 and "has the checkpoints of an earlier run" in refused.stderr
    wanted = options("finetune", checkpoint, CONVERSATIONS, out, resume_from_checkpoint="last", **changes)
    result = here("training", *wanted)
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in history(out)] == list(range(1, last + 3))
    assert not (out / "_unfinished").exists()
    assert (out / "curves.png").exists()


def test_a_folder_with_a_model_is_not_written_to(checkpoint, tmp_path, monkeypatch, capsys):
    from training.__main__ import main

    monkeypatch.setattr(sys, "argv", ["training", *options("finetune", checkpoint, CONVERSATIONS, checkpoint)])
    assert main() == 2
    assert "has a model already (config.json)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wanted, message",
    [("last", "has no complete checkpoint"), ("nowhere", "nowhere is not a checkpoint of a run")],
)
def test_nothing_to_resume(wanted, message, checkpoint, tmp_path, monkeypatch, capsys):
    from training.__main__ import main

    arguments = options("finetune", checkpoint, CONVERSATIONS, tmp_path / "out", resume_from_checkpoint=wanted)
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    assert main() == 2
    assert message in capsys.readouterr().err


def test_the_steps_that_a_resumed_run_is_given_act(checkpoint, tmp_path):
    """Those of the checkpoint won, and the count of tokens began anew."""
    settings = {"data": eight_rows(tmp_path), "save_total_limit": 4}
    whole = trainer_of("finetune", checkpoint, output=tmp_path / "whole", save_steps=2, **settings)
    whole.train()
    resumed = trainer_of("finetune", checkpoint, output=tmp_path / "resumed", save_steps=1, logging_steps=2, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert (tmp_path / "resumed" / "checkpoint-3").is_dir()
    assert [row["step"] for row in resumed.state.log_history if "loss" in row] == [1, 2, 4]
    tokens = [[row["num_tokens"] for row in made.state.log_history if "loss" in row] for made in (whole, resumed)]
    assert tokens[1] == [tokens[0][index] for index in (0, 1, 3)]


def test_a_done_run_is_loaded_as_it_ended(checkpoint, tmp_path):
    """A part of an epoch was done once more, and the best weights became the last ones."""
    data = eight_rows(tmp_path)
    settings = {
        "max_steps": -1,
        "num_train_epochs": 1.5,
        "eval_data_path": data,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # the worst: the first
        "learning_rate": 1e-3,
        "save_total_limit": 4,
    }
    trainer_of("finetune", checkpoint, data, tmp_path / "out", **settings).train()
    again = trainer_of("finetune", checkpoint, data, tmp_path / "out", **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    best, last = (weights_of(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 3))
    assert all(torch.equal(weight, best[name]) for name, weight in again.model.state_dict().items())
    assert any(not torch.equal(weight, last[name]) for name, weight in best.items())


def test_a_checkpoint_from_elsewhere_does_not_overwrite_a_run(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "checkpoint-2").mkdir(parents=True)
        (tmp_path / folder / "checkpoint-2" / "trainer_state.json").write_text("{}")
    wanted = str(tmp_path / "one" / "checkpoint-2")
    for folder in ("one", "three"):
        assert resume_from(SimpleNamespace(output_dir=tmp_path / folder, resume_from_checkpoint=wanted)) == wanted
    with pytest.raises(ValueError, match="two has the checkpoints of an earlier run"):
        resume_from(SimpleNamespace(output_dir=tmp_path / "two", resume_from_checkpoint=wanted))


@pytest.mark.parametrize("wanted", [True, "last"])
def test_from_python_a_checkpoint_that_is_wanted_is_there_or_named(wanted, checkpoint, tmp_path):
    """A folder without one was trained into from the beginning, and so was whatever the arguments name."""
    made = trainer_of("finetune", checkpoint, CONVERSATIONS, tmp_path / "out")
    for _ in range(2):  # also in a folder that exists
        with pytest.raises(CheckpointError, match="out has no complete checkpoint to go on from"):
            made.train(resume_from_checkpoint=wanted)
        (tmp_path / "out").mkdir(exist_ok=True)
    made.args.resume_from_checkpoint = wanted
    with pytest.raises(CheckpointError, match="out has no complete checkpoint to go on from"):
        made.train()


@pytest.mark.parametrize(
    "order", [{"train_sampling_strategy": "group_by_length"}, {"accelerator_config": '{"dispatch_batches": true}'}]
)
def test_other_orders_go_on_exactly_in_a_later_epoch(order, checkpoint, tmp_path):
    """The third step is the first of the second epoch; the rows behind it were others."""
    settings = {"group_by_modality_length": False, "save_steps": 3, "save_total_limit": 2, **order}
    data = eight_rows(tmp_path)
    trainer_of("finetune", checkpoint, data, tmp_path / "whole", **settings).train()
    resumed = trainer_of("finetune", checkpoint, data, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert history(tmp_path / "resumed" / "checkpoint-4") == history(tmp_path / "whole" / "checkpoint-4")
