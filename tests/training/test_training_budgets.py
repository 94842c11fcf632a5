"""One training for several numbers of tokens per picture: what is drawn, trained, counted, saved and refused."""

import itertools
import json
import re
import shutil
import sys
from collections import Counter

import pytest
import torch
from peft import PeftConfig
from torch.utils.flop_counter import FlopCounterMode
from training_runs import CONVERSATIONS, IMAGES, eight_rows, history, options, run, trainer_of, weights_of
from trl import ModelConfig

from conversion.checkpoints.folders import name_auto_class
from examples.dpo import PreferenceCollator
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from training import LlavaSTFTrainer, LlavaSTFTrainingArguments
from training.__main__ import main
from training.arguments import DataArguments, Parser
from training.batches import Collator
from training.budgets import TokenBudgets, row_key
from training.checks import Checker, check_rows
from training.merge import merge
from training.rows import load_rows
from training.run import recipe_settings
from training.saving import CheckpointError
from training.throughput import training_flops
from training.trainer import template_text

BUDGETS = [4, 1]  # those of the golden tower, a grid of four patches a side
ALL = {"token_budget_mode": "all"}


@pytest.fixture
def trainer(checkpoint, tmp_path):
    """Makes the trainer of the elastic recipe on the golden conversations, or of another recipe."""

    def make(recipe="finetune_elastic", **changes):
        settings = {"token_budgets": BUDGETS, **changes}
        settings = {name: value for name, value in settings.items() if value is not None}
        output, model = settings.pop("output", tmp_path / "out"), settings.pop("model", checkpoint)
        return trainer_of(recipe, model, settings.pop("data", CONVERSATIONS), output, **settings)

    return make


def collate(trainer, rows):
    return trainer.data_collator([trainer.train_dataset[row] for row in rows])


# What is drawn


def test_a_budget_follows_from_seed_epoch_and_row():
    keys = [row_key("same", [{"role": "user", "content": number}]) for number in range(300)]

    def drawn(seed, epoch):
        budgets = TokenBudgets((1, 144, 9, 36), 144, seed=seed)
        return [budgets.draw(key, epoch) for key in keys]

    first = drawn(0, 0)
    assert first == drawn(0, 0) and len({tuple(first), tuple(drawn(0, 1)), tuple(drawn(1, 0))}) == 3
    counts = Counter(itertools.chain.from_iterable(drawn(0, epoch) for epoch in range(20)))
    assert set(counts) == {144, 36, 9, 1} and all(1350 < count < 1650 for count in counts.values())  # of 6000


@pytest.mark.parametrize("mode", ["sample", "all"])
def test_the_collator_gives_each_row_its_budgets(mode, trainer):
    run = trainer(token_budget_mode=mode)
    run.budgets.epoch.fill_(3)
    token = run.model.config.image_token_id
    for index, row in enumerate(run.train_dataset):
        batch = collate(run, [index])
        expected = run.budgets.of_row(row)
        found = [int((ids == token).sum()) for ids in batch["input_ids"]]
        assert found == [row["vision"] * budget for budget in expected], row["id"]
        assert len(found) == (2 if mode == "all" and row["vision"] else 1)
        counts = [budget for budget in expected for _ in range(row["vision"])]
        assert batch.get("image_tokens", [4] * len(counts)) == counts
        lengths = [run.budgets.length(row["length"], row["vision"], budget) for budget in expected]
        assert batch["attention_mask"].sum(1).tolist() == lengths
        assert len(set((batch["labels"] != -100).sum(1).tolist())) == 1


def test_pictures_and_frames_of_a_row_have_its_budget(trainer, tmp_path):
    frames = [str(IMAGES / f"frame_{number}.png") for number in range(2)]
    turns = [{"from": "human", "value": "<image>\n<video>\nWhat?"}, {"from": "gpt", "value": "It."}]
    rows = [{"id": "both", "image": frames[0], "video": [frames], "conversations": turns}]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    batch = collate(trainer(data=data, **ALL), [0])
    assert batch["image_tokens"] == [4, 4, 4, 1, 1, 1]


# What is trained


def m3(model, processor, micro_batches, reduction):
    """M3's loss by its definition: the mean over the budgets of the loss that all rows have with it, text rows too."""
    losses = []
    for budget in BUDGETS:
        processor.image_processor.max_soft_tokens = budget
        collator = Collator(processor, assistant_only_loss=True, chat_template=template_text(processor, "default"))
        batches = [collator(rows) for rows in micro_batches]
        tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        means = [model(**batch).loss for batch in batches]
        shares = [number / sum(tokens) if reduction == "token" else 1 / len(tokens) for number in tokens]
        losses.append(sum(share * mean for share, mean in zip(shares, means, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("reduction", ["token", "microbatch"])
def test_all_is_the_loss_of_m3(reduction, trainer, checkpoint, monkeypatch):
    """The micro-batches have a text row beside one with a picture, and one row of each kind alone."""
    run = trainer(
        loss_reduction=reduction, max_steps=1, max_grad_norm=0, optim="sgd", learning_rate=1.0, warmup_steps=0,
        lr_scheduler_type="constant", group_by_modality_length=False, **ALL,
    )  # fmt: skip
    rows = {row["id"]: row for row in run.train_dataset}
    micro_batches = [[rows["single_front"], rows["text_only_multi"]], [rows["text_only"], rows["multi_turn_end"]]]
    batches, collator = iter(micro_batches), run.data_collator
    run.data_collator = lambda _: collator(next(batches))
    run.train()
    reference = LlavaSTFForConditionalGeneration.from_pretrained(checkpoint, token_budgets=BUDGETS).train()
    reference.model.vision_tower.requires_grad_(False)
    expected = m3(reference, LlavaSTFProcessor.from_pretrained(checkpoint), micro_batches, reduction)
    expected.backward()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)
    before = dict(LlavaSTFForConditionalGeneration.from_pretrained(checkpoint).named_parameters())
    for (name, weight), (_, other) in zip(run.model.named_parameters(), reference.named_parameters(), strict=True):
        if other.grad is not None:  # the step of plain SGD with the rate 1 is the gradient
            torch.testing.assert_close(before[name] - weight, other.grad, atol=2e-6, rtol=1e-3)


def test_text_rows_that_count_once_are_not_m3(trainer, checkpoint, monkeypatch):
    run = trainer(max_steps=1, group_by_modality_length=False, learning_rate=0.0, **ALL)
    monkeypatch.setattr(LlavaSTFTrainer, "_repeats_text", False)
    rows = {row["id"]: row for row in run.train_dataset}
    micro_batches = [[rows["single_front"], rows["text_only_multi"]], [rows["text_only"], rows["multi_turn_end"]]]
    batches, collator = iter(micro_batches), run.data_collator
    run.data_collator = lambda _: collator(next(batches))
    run.train()
    reference = LlavaSTFForConditionalGeneration.from_pretrained(checkpoint, token_budgets=BUDGETS).train()
    with torch.no_grad():
        expected = m3(reference, LlavaSTFProcessor.from_pretrained(checkpoint), micro_batches, "token")
    assert abs(run.state.log_history[0]["loss"] - expected.item()) > 1e-4


def test_evaluation_has_the_largest_budget(trainer, checkpoint):
    evaluation = {"eval_data_path": CONVERSATIONS, "eval_strategy": "steps", "per_device_eval_batch_size": 9}
    run = trainer(**evaluation, **ALL)
    (batch,) = run.get_eval_dataloader()
    assert "image_tokens" not in batch and len(batch["input_ids"]) == 9
    plain = trainer("finetune", token_budgets=None, **evaluation)
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    assert run.data_collator.budgets is run.budgets


def test_the_sampler_has_the_lengths_of_the_batches(trainer):
    run = trainer()
    loader = run.get_train_dataloader()
    sampler = loader.base_dataloader.batch_sampler.sampler
    seen = set()
    for epoch in range(4):
        sampler.set_epoch(epoch)
        run.budgets.epoch.fill_(epoch)
        list(sampler)
        lengths = [int(collate(run, [row])["attention_mask"].sum()) for row in range(len(run.train_dataset))]
        assert sampler.lengths == lengths
        seen.add(tuple(lengths))
    assert len(seen) > 1


def test_workers_that_live_longer_than_an_epoch_see_it_change(trainer):
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    run = trainer(max_steps=6, learning_rate=0.0, group_by_modality_length=False, **settings)
    drawn, step = [], run.training_step

    def note(model, inputs, *args):
        drawn.append((int(run.state.epoch or 0), inputs["attention_mask"].sum(1).tolist()))
        return step(model, inputs, *args)

    run.training_step = note
    run.train()
    possible = []
    for epoch in range(3):
        run.budgets.epoch.fill_(epoch)
        lengths = [run.budgets.length(r["length"], r["vision"], run.budgets.of_row(r)[0]) for r in run.train_dataset]
        possible.append(sorted(lengths))
    assert len(set(map(tuple, possible))) == 3
    for epoch in range(2):
        assert sorted(sum((lengths for own, lengths in drawn if own == epoch), [])) == possible[epoch]


def test_flops_are_those_of_pytorch(trainer):
    """What a budget saves in the connector; the language model's follow from the number of tokens."""
    model = trainer().model.train()
    connector = model.model.multi_modal_projector
    features = torch.zeros(1, 16, connector.block_fusion.linear_1.in_features, requires_grad=True)
    found = []
    for budget in BUDGETS:
        counter = FlopCounterMode(display=False)
        with counter:
            connector(features, [budget])[0].sum().backward()
        found.append(counter.get_total_flops())
    counted = [training_flops(model, 1, 50, budget) for budget in BUDGETS]
    assert counted[0] - counted[1] == found[0] - found[1] > 0
    assert counted[0] == training_flops(model, 1, 50)


# Going on, and several ranks


@pytest.mark.parametrize("recipe, mode", [("finetune_elastic", "sample"), ("finetune_lora", "all")])
def test_resume_is_exact(recipe, mode, trainer, tmp_path):
    """Stopped within an epoch, the first one or the second; the eight rows are two steps each."""
    settings = {"data": eight_rows(tmp_path), "token_budget_mode": mode, "save_steps": 1, "save_total_limit": 4}
    if recipe == "finetune_lora":
        settings |= {"lora_r": 4, "lora_dropout": 0.3}
    whole = tmp_path / "whole"
    trainer(recipe, output=whole, **settings).train()
    stop = 1 if mode == "all" else 3
    trainer(recipe, **settings).train(resume_from_checkpoint=str(whole / f"checkpoint-{stop}"))
    last = tmp_path / "out" / "checkpoint-4"
    assert history(last) == history(whole / "checkpoint-4")
    expected = weights_of(whole / "checkpoint-4")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(last).items())


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "tests/support/training_rank.py")


@pytest.mark.parametrize("mode", [pytest.param("sample", marks=pytest.mark.slow), "all"])
def test_two_ranks_equal_one(mode, trainer, checkpoint, tmp_path):
    settings = {
        "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0,
        "max_steps": 3, "per_device_train_batch_size": 1, "token_budgets": BUDGETS, "token_budget_mode": mode,
        "group_by_modality_length": False,
    }  # fmt: skip
    data = eight_rows(tmp_path)
    alone = trainer(data=data, **settings)
    alone.train()
    alone.save_model()
    result = run(*options("finetune_elastic", checkpoint, data, tmp_path / "two", **settings), launcher=TORCHRUN)
    assert result.returncode == 0, result.stderr
    two = [row["loss"] for row in history(tmp_path / "two")]
    assert two == pytest.approx([row["loss"] for row in alone.state.log_history if "loss" in row], rel=1e-4)
    before, after = weights_of(checkpoint), weights_of(tmp_path / "out")
    for name, weight in weights_of(tmp_path / "two").items():
        step = (after[name] - before[name]).abs().max()
        assert (weight - after[name]).abs().max() <= 1e-2 * step, name


# What is saved


def test_the_budgets_are_saved(checkpoint, tmp_path, caplog):
    """In the config of each checkpoint; in an adapter, from which they come into the merged config."""
    elastic = trainer_of(
        "finetune_elastic",
        checkpoint,
        CONVERSATIONS,
        tmp_path / "elastic",
        token_budgets=[1, 4],
        max_steps=1,
        save_steps=1,
    )
    elastic.train()
    elastic.save_model()
    for folder in (tmp_path / "elastic", tmp_path / "elastic" / "checkpoint-1"):
        assert LlavaSTFConfig.from_pretrained(folder).token_budgets == [4, 1]
        assert json.loads((folder / "config.json").read_text())["token_budgets"] == [4, 1]
    lora = {"lora_r": 2, "max_steps": 1, "learning_rate": 0.1}
    for budgets in ([1], None):
        changes = {"token_budgets": budgets} if budgets else {}
        folder = tmp_path / f"lora-{budgets}"
        caplog.clear()
        adapter = trainer_of("finetune_lora", tmp_path / "elastic", CONVERSATIONS, folder, **lora, **changes)
        assert f"trained for [4, 1] tokens per picture. This run trains {budgets or [4]}, and its config" in caplog.text
        assert "To keep them: --token_budgets 4 1" in caplog.text
        assert ("and not 4: a call that does not pass `max_soft_tokens`" in caplog.text) == (budgets == [1])
        adapter.train()
        adapter.save_model()
        assert (PeftConfig.from_pretrained(folder).auto_mapping.get("token_budgets")) == budgets
        name_auto_class(folder)  # as rendering its card does
        caplog.clear()
        merge(str(folder), str(tmp_path / f"merged-{budgets}"))
        assert LlavaSTFConfig.from_pretrained(tmp_path / f"merged-{budgets}").token_budgets == budgets
        assert "The base was trained for [4, 1] tokens per picture" in caplog.text


def test_a_run_without_budgets_saves_none(checkpoint, tmp_path, caplog):
    plain = trainer_of("finetune_lora", checkpoint, CONVERSATIONS, tmp_path / "plain", lora_r=2, max_steps=1)
    plain.train()
    plain.save_model()
    assert plain.data_collator.budgets is None and "tokens per picture" not in caplog.text
    settings = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert settings["auto_mapping"].keys() == {"base_model_class", "parent_library"}


def test_a_processor_with_a_default_of_its_own(checkpoint, tmp_path, caplog):
    """Without `token_budgets` it is what is trained, and so what the config says. A call that passes none has it."""
    model = shutil.copytree(checkpoint, tmp_path / "one")
    processor = LlavaSTFProcessor.from_pretrained(model)
    processor.image_processor.max_soft_tokens = 1
    processor.save_pretrained(model)
    run = trainer_of("finetune", model, CONVERSATIONS, tmp_path / "out")
    assert run.model.config.token_budgets == [1]
    assert collate(run, [0])["image_tokens"] == [1]
    assert int(collate(run, [0])["attention_mask"].sum()) == run.train_dataset[0]["length"]
    assert "a call that does not pass" not in caplog.text
    trainer_of("finetune", model, CONVERSATIONS, tmp_path / "full", token_budgets=[4])
    assert "This run trains [4] tokens per picture, and not 1: a call that does not pass" in caplog.text


def test_a_run_below_the_full_number_has_no_warning(trainer, caplog):
    """Nor has the blank image of a text row, which would have all tokens."""
    run = trainer(token_budgets=[1], max_steps=2, group_by_modality_length=False)
    run.train()
    assert "expect worse answers" not in caplog.text


def test_preferences_have_the_number_of_tokens_of_the_processor(processor, model, picture):
    """DPO passes on all that the collator returns."""
    processor.image_processor.max_soft_tokens = 1
    images, prompt = [picture("wide.png")], [{"role": "user", "content": "What is it?"}]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    batch = PreferenceCollator(processor)([{"images": images, "prompt": prompt, **answers}])
    assert batch["image_tokens"] == [1, 1]
    batch.pop("completion_mask")
    assert torch.isfinite(model(**batch).logits).all()


def test_what_the_command_line_says_is_kept_for_the_card(checkpoint):
    """Beside what the recipe names; no paths."""
    given = {"token_budgets": [1, 4], "token_budget_mode": "all", "lora_r": 2, "max_steps": 1}
    arguments = options("finetune_lora", checkpoint, CONVERSATIONS, "out", **given)
    parser = Parser((DataArguments, LlavaSTFTrainingArguments, ModelConfig))
    made = parser.parse_args_and_config(arguments)
    kept = recipe_settings(arguments, *made)
    assert {name: kept[name] for name in given} == {**given, "token_budgets": [4, 1]}
    assert kept["lora_alpha"] == 256 and not {"output_dir", "data_path", "model_name_or_path"} & set(kept)
    assert "token_budgets" in recipe_settings(arguments[2:], *made)  # without a recipe


# What is refused


@pytest.fixture
def command(monkeypatch, capsys, checkpoint, tmp_path):
    """Runs the command; returns its exit code and its own lines on stderr."""

    def call(*arguments, **changes):
        model, data = changes.pop("model", checkpoint), changes.pop("data", CONVERSATIONS)
        named = options("finetune", model, data, tmp_path / "out", **changes)
        monkeypatch.setattr(sys, "argv", ["training", *named, *arguments])
        code = main()
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]

    return call


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"token_budgets": [4, 3]}, "`token_budgets` has 3, expected some of 4, 1 (this model's)"),
        ({"token_budgets": [144, 36]}, "`token_budgets` has 144, expected some of 4, 1"),
        ({"token_budgets": [4, 1, 4]}, "`token_budgets` has 4 twice"),
        ({"token_budgets": [0]}, "`token_budgets` has 0, expected whole numbers"),
        ({"token_budgets": [-1]}, "`token_budgets` has -1, expected whole numbers"),
        ({"token_budgets": "many"}, "invalid int value: 'many'"),
        ({"token_budget_mode": "all"}, "`token_budget_mode` does not act without `token_budgets`"),
        ({"token_budgets": [4], "token_budget_mode": "both"}, "invalid choice: 'both'"),
        ({"token_budgets": BUDGETS, "loss_type": "dft", **ALL}, "`loss_type` is 'dft'"),
        ({"token_budgets": BUDGETS, "torch_compile": True}, "`torch_compile` would compile the model anew"),
        ({"token_budgets": BUDGETS, "packing": True}, "`packing` does not act here"),
        ({"token_budgets": BUDGETS, "padding_free": True}, "`padding_free` does not act here"),
        ({"token_budgets": BUDGETS, "use_liger_kernel": True}, "`use_liger_kernel` does not act here"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(changes, message, command, tmp_path):
    code, lines = command(**changes)
    assert code == 2 and len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_an_empty_list_in_a_recipe_is_refused():
    with pytest.raises(ValueError, match="`token_budgets` is empty"):
        LlavaSTFTrainingArguments(output_dir="none", use_cpu=True, bf16=False, token_budgets=[])
    with pytest.raises(ValueError, match="`token_budgets` has 4.0, expected whole numbers"):
        LlavaSTFTrainingArguments(output_dir="none", use_cpu=True, bf16=False, token_budgets=[4.0])
    for wrong in (4, "41"):
        with pytest.raises(ValueError, match=f"`token_budgets` is {wrong!r}, expected a list"):
            LlavaSTFTrainingArguments(output_dir="none", use_cpu=True, bf16=False, token_budgets=wrong)


def test_a_collator_of_one_s_own_is_refused(trainer, tmp_path):
    run = trainer()
    with pytest.raises(ValueError, match="does not act on a `data_collator` of your own"):
        LlavaSTFTrainer(
            run.model, run.args, processing_class=run.processing_class, data_collator=lambda rows: rows,
            train_dataset=run.train_dataset,
        )  # fmt: skip


def test_budgets_that_no_row_has_pictures_for(trainer, checkpoint, tmp_path):
    """New ones are refused. Those that the checkpoint was trained for are kept."""
    rows = [row for row in json.loads(CONVERSATIONS.read_text(encoding="utf-8")) if "image" not in row]
    data = tmp_path / "text.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(ValueError, match=r"No row has a picture, so nothing would train \[1\] tokens per picture"):
        trainer(data=data)
    elastic = shutil.copytree(checkpoint, tmp_path / "elastic")
    config = LlavaSTFConfig.from_pretrained(checkpoint, token_budgets=BUDGETS)
    config.save_pretrained(elastic)
    assert trainer(data=data, model=elastic).model.config.token_budgets == BUDGETS
    assert trainer("finetune", data=data, token_budgets=None).model.config.token_budgets is None


def test_a_checkpoint_of_other_budgets_is_refused(trainer, tmp_path):
    trainer(max_steps=2, save_steps=1).train()
    stopped = str(tmp_path / "out" / "checkpoint-1")
    for changes, message in (
        ({"token_budgets": [1]}, "`token_budgets` was [4, 1], is [1]"),
        ({"token_budgets": None}, "`token_budgets` was [4, 1], is None"),
        (ALL, "`token_budget_mode` was sample, is all"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            recipe = "finetune_elastic" if changes.get("token_budgets", BUDGETS) else "finetune"
            trainer(recipe, output=tmp_path / "other", **changes).train(resume_from_checkpoint=stopped)


# Lengths


def test_check_says_how_long_rows_are(checkpoint, monkeypatch, capsys):
    def check(*more):
        arguments = ["check", str(CONVERSATIONS), "--model", str(checkpoint), "--image_folder", str(IMAGES), *more]
        monkeypatch.setattr(sys, "argv", ["training", *arguments])
        return main(), capsys.readouterr()

    code, output = check("--token_budgets", "4", "1", "--token-budget-mode", "all")
    lines = output.out.splitlines()
    assert code == 0, output.err
    rows = list(check_rows(load_rows(str(CONVERSATIONS), str(IMAGES)), checker(checkpoint, None)))
    lengths = [[row["length"] - row["vision"] * saved for row in rows] for saved in (0, 3)]
    for budget, own in zip(BUDGETS, lengths, strict=True):
        mean = f"{sum(own) / len(own):.1f}"
        assert f"  with {budget} tokens for each picture: {min(own)} to {max(own)}, {mean} on average" in lines
    copies = sum(map(sum, lengths)) - sum(row["length"] for row in rows if not row["vision"])
    assert f"an epoch by `all`: about {copies:,} tokens" in lines
    code, output = check("--token_budgets", "4", "2")
    assert code == 2 and "`token_budgets` has 2, expected some of 4, 1" in output.err
    code, output = check("--token_budget_mode", "all")
    assert code == 2 and "does not act without `--token_budgets`" in output.err


def checker(checkpoint, budgets, max_length=4096):
    processor = LlavaSTFProcessor.from_pretrained(checkpoint)
    return Checker(processor, template_text(processor, "default"), max_length, decode=False, budgets=budgets)


def test_a_row_is_too_long_if_it_is_with_its_largest_budget(checkpoint):
    rows = load_rows(str(CONVERSATIONS), str(IMAGES))
    longest = max(check_rows(rows, checker(checkpoint, None)), key=lambda row: row["length"] * (row["vision"] > 0))
    assert longest["vision"] == 1
    for sizes, limit, fits in (((4, 1), 0, True), ((4, 1), -1, False), ((1,), -3, True), ((1,), -4, False)):
        allowed = checker(checkpoint, TokenBudgets(sizes, 4), longest["length"] + limit)
        (row,) = (row for row in check_rows(rows, allowed) if row["id"] == longest["id"])
        assert (row["problem"] == "") == fits and row["length"] == longest["length"]


# Streams


def test_a_stream_has_budgets_and_resumes_exactly(checkpoint, tmp_path):
    """Within the first of its passes, which are four steps; a checkpoint of the second pass is refused."""
    folder = tmp_path / "rows"
    folder.mkdir()
    eight_rows(folder).rename(folder / "train.json")

    def train(output, stopped=None, workers=0):
        run = trainer_of(
            "finetune_elastic", checkpoint, folder, tmp_path / output, streaming=True, token_budgets=BUDGETS,
            max_steps=5, save_steps=1, save_total_limit=5, group_by_modality_length=False, global_batch_size=2,
            dataloader_num_workers=workers,
        )  # fmt: skip
        run.train(resume_from_checkpoint=stopped and str(tmp_path / "whole" / f"checkpoint-{stopped}"))
        return run

    assert int(train("whole").budgets.epoch) == 1
    train("resumed", stopped=2)
    assert history(tmp_path / "resumed" / "checkpoint-5") == history(tmp_path / "whole" / "checkpoint-5")
    with pytest.raises(CheckpointError, match="checkpoint-5 is in pass 2 over a stream"):
        train("refused", stopped=5)
    with pytest.raises(CheckpointError, match="`dataloader_num_workers` was 0, is 2"):  # its order depends on them
        train("refused", stopped=2, workers=2)


def test_predictions_are_those_of_the_largest_budget_too(trainer):
    run = trainer(**ALL)
    batches = list(run.get_test_dataloader(run.train_dataset))
    assert not any("image_tokens" in batch for batch in batches)
    assert sum(len(batch["input_ids"]) for batch in batches) == 9
    assert run.data_collator.budgets is run.budgets
