"""One step at a time: what trains, the original's loss and gradients, groups, order, errors, and what is saved."""

import json
import math
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from conftest import GOLDENS
from datasets import Dataset, Image, List
from photos import save_photos
from torch.utils.flop_counter import FlopCounterMode
from training_runs import CAPTIONS, CONVERSATIONS, IMAGES, eight_rows, trainer_of, weights_of
from trl import ModelConfig

from conversion import convert, to_original
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from training import DataError, LlavaSTFTrainer, LlavaSTFTrainingArguments
from training.arguments import accumulation_steps
from training.run import load_model
from training.sampler import ModalityLengthSampler, modality_length_order
from training.throughput import training_flops
from training.trainer import PLAIN, template_text

CONNECTOR = "multi_modal_projector"
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}


@pytest.fixture
def trainer(checkpoint, tmp_path):
    """Makes the trainer of a recipe, on the golden conversations or captions."""

    def make(recipe="finetune", **changes):
        data = changes.pop("data", CAPTIONS if recipe == "pretrain" else CONVERSATIONS)
        return trainer_of(recipe, changes.pop("model", checkpoint), data, tmp_path / "out", **changes)

    return make


def batch_of(trainer, rows=None):
    dataset = trainer.train_dataset
    return trainer.data_collator([dataset[row] for row in (range(len(dataset)) if rows is None else rows)])


# The original's numbers


@pytest.mark.parametrize("name", ["sft_v1", "plain"])
def test_loss_and_connector_gradients_are_the_original_s(name, goldens, golden_tensors, checkpoints, trainer):
    golden = next(case for case in goldens["loss"] if case["name"] == name)
    recipe = trainer(
        "pretrain",
        model=checkpoints(golden["checkpoint"]),
        data=CONVERSATIONS if name == "sft_v1" else CAPTIONS,
        chat_template_name="default" if name == "sft_v1" else "plain",
        image_aspect_ratio="pad",
    )
    loss = recipe.compute_loss(recipe.model.train(), batch_of(recipe, golden["rows"]))
    assert abs(loss.item() - golden["loss"]) < 1e-5
    loss.backward()
    gradients = to_original({key: p.grad for key, p in recipe.model.named_parameters() if p.grad is not None})
    assert gradients.keys() == golden["grad_norms"].keys()
    for key, norm in golden["grad_norms"].items():
        assert gradients[key].norm().item() == pytest.approx(norm, rel=1e-4)
        if f"loss.{name}.grad.{key}" in golden_tensors:
            expected = golden_tensors[f"loss.{name}.grad.{key}"]
            torch.testing.assert_close(gradients[key], expected, atol=1e-5, rtol=1e-3)


def test_the_image_token_has_no_part_in_the_loss(trainer):
    """TRL's head would give it some: the row of `<image>` must not matter."""
    recipe = trainer()
    batch = batch_of(recipe)
    model = recipe.model.eval()
    losses = []
    for scale in (1.0, 100.0):
        with torch.no_grad():
            model.lm_head.weight[model.config.image_token_id] *= scale
            losses.append(recipe.compute_loss(model, dict(batch)).item())
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    assert model.get_output_embeddings() is model.lm_head


@pytest.mark.parametrize("reduction", ["token", "microbatch"])
def test_loss_and_gradient_norm_of_each_reduction(reduction, trainer, checkpoint):
    """Rows of one to eighteen trained tokens, one a micro-batch: the two means differ."""
    recipe = trainer(
        per_device_train_batch_size=1, max_steps=1, loss_reduction=reduction, max_grad_norm=1e9, learning_rate=0.0
    )
    seen = []
    collate = recipe.data_collator
    recipe.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    recipe.train()
    model = LlavaSTFForConditionalGeneration.from_pretrained(checkpoint).train()
    model.model.vision_tower.requires_grad_(False)
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in seen[:4]]
    assert len(set(tokens)) > 1
    losses = [model(**batch).loss for batch in seen[:4]]
    weights = [number / sum(tokens) if reduction == "token" else 1 / 4 for number in tokens]
    expected = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    expected.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    logged = recipe.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


# What trains


RUNS = {
    "pretrain": (CONNECTOR,),
    "finetune": (CONNECTOR, "language_model", "lm_head"),
    "finetune_lora": ("lora_", "modules_to_save"),
}


@pytest.mark.parametrize("recipe", RUNS)
def test_what_must_change_does_and_the_rest_is_bit_equal(recipe, trainer):
    run = trainer(recipe, learning_rate=1e-2, **({"lora_r": 4} if "lora" in recipe else {}))
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    run.train()
    image_row = run.model.config.image_token_id
    for name, weight in run.model.named_parameters():
        expected = any(part in name for part in RUNS[recipe])
        assert weight.requires_grad == expected, name
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):  # an unused row gets no gradient
            assert torch.equal(weight[image_row], before[name][image_row])
        assert torch.equal(weight, before[name]) != expected, name


def test_a_pattern_that_matches_nothing_is_refused(trainer):
    with pytest.raises(ValueError, match="'projector_typo' matches no parameter of lm_head.weight, model.language"):
        trainer(trainable="projector_typo")


def test_adapters_in_the_tower_are_refused(trainer):
    with pytest.raises(ValueError, match="would change the frozen vision tower"):
        trainer("finetune_lora", lora_target_modules=".*q_proj")


@pytest.mark.parametrize(
    "module, message", [("vision_tower", "would change the frozen vision tower"), ("typo", "'typo' matches no module")]
)
def test_only_the_connector_is_trained_in_full_beside_an_adapter(module, message, trainer):
    with pytest.raises(ValueError, match=message):
        trainer("finetune_lora", lora_modules_to_save=module)


def test_an_adapter_is_no_base(trainer, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter. Merge it first: python -m training merge"):
        load_model(ModelConfig(str(tmp_path)))


def test_trainable_is_not_for_adapters(trainer):
    with pytest.raises(ValueError, match="`trainable` is not for LoRA"):
        trainer("finetune_lora", trainable="lm_head")


def test_the_lora_recipe_adapts_all_linear_layers_of_the_language_model_only(trainer):
    model = trainer("finetune_lora").model
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    layers = {
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), torch.nn.Linear)
    }
    assert adapted == layers and len(adapted) == 7 * 2
    assert all("language_model.layers" in name for name in adapted)


@pytest.mark.parametrize("recipe", ["pretrain", "finetune_lora"])
def test_what_trains_is_float32_and_what_is_frozen_stays_bfloat16(recipe, trainer):
    run = trainer(recipe, dtype="bfloat16")
    for name, weight in run.model.named_parameters():
        assert weight.dtype == (torch.float32 if weight.requires_grad else torch.bfloat16), name


def test_small_steps_reach_every_weight_of_a_bfloat16_checkpoint(trainer):
    """In bfloat16 most of them would be lost in rounding."""
    run = trainer("finetune_lora", dtype="bfloat16", bf16=True, warmup_steps=0, lora_r=4)
    weight = (
        run.model.base_model.model.model.multi_modal_projector.modules_to_save.default.spatial_fusion.linear_2.weight
    )
    before = weight.detach().clone()
    run.train()
    assert (weight != before).float().mean() > 0.99


def test_groups_have_their_rates(trainer):
    run = trainer(learning_rate=1e-3, projector_learning_rate=1e-4, weight_decay=0.1)
    run.create_optimizer()
    names = {id(weight): name for name, weight in run.model.named_parameters()}
    seen = {names[id(weight)]: group for group in run.optimizer.param_groups for weight in group["params"]}
    assert seen.keys() == {name for name, weight in run.model.named_parameters() if weight.requires_grad}
    for name, group in seen.items():
        assert group["lr"] == (1e-4 if CONNECTOR in name else 1e-3), name
        assert group["weight_decay"] == (0 if name.endswith("bias") or "norm" in name else 0.1), name


def test_a_rate_for_a_frozen_connector_is_refused(trainer):
    with pytest.raises(ValueError, match="no parameter of multi_modal_projector is trained"):
        trainer(trainable="lm_head", projector_learning_rate=1e-4).create_optimizer()


def test_the_frozen_tower_needs_no_backward_under_checkpointing(trainer):
    run = trainer("pretrain")
    assert run.args.gradient_checkpointing
    wanted = []
    tower = run.model.model.vision_tower
    tower.register_forward_hook(lambda module, args, output: wanted.append(output.last_hidden_state.requires_grad))
    run.train()
    assert wanted and not any(wanted)


def test_checkpointing_changes_no_gradient(trainer):
    norms = []
    for checkpointing in (True, False):
        run = trainer(gradient_checkpointing=checkpointing, max_steps=2)
        run.train()
        norms.append([row["grad_norm"] for row in run.state.log_history if "grad_norm" in row])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


# Batches


def test_the_global_batch_is_the_recipe_s(trainer):
    assert trainer(global_batch_size=6, per_device_train_batch_size=2).args.gradient_accumulation_steps == 3
    assert accumulation_steps(128, per_device=4, devices=8) == 4
    with pytest.raises(ValueError, match="8 device.s. with 3 rows each take 24 rows at a time, which does not divide"):
        accumulation_steps(128, per_device=3, devices=8)


def test_square_images_are_cut_in_training_only(trainer, golden_tensors, processor):
    run = trainer("pretrain")
    pixels = batch_of(run)["pixel_values"]
    torch.testing.assert_close(pixels, golden_tensors["pixel_values.none"][:3], rtol=0, atol=1e-6)
    assert run.processing_class.image_processor.do_pad


def test_stage_2_pads_behind_a_stage_1_that_did_not(tmp_path, trainer):
    """The original's stage 1 cut its pictures (`square`), and so does its conversion."""
    source = shutil.copytree(GOLDENS / "pretrain", tmp_path / "pretrain")
    config = json.loads((source / "config.json").read_text()) | {"image_aspect_ratio": "square"}
    (source / "config.json").write_text(json.dumps(config))
    stage_1 = convert(source, tmp_path / "stage_1", base=GOLDENS / "base", vision_tower=GOLDENS / "clip")
    assert not LlavaSTFProcessor.from_pretrained(stage_1).image_processor.do_pad
    run = trainer("finetune", model=stage_1)
    assert torch.equal(batch_of(run)["pixel_values"], batch_of(trainer("finetune"))["pixel_values"])
    assert run.processing_class.image_processor.do_pad


def test_the_sampler_s_order_is_the_original_s(goldens):
    for case in goldens["sampler"]:
        order = modality_length_order(
            [abs(length) for length in case["lengths"]],
            [length > 0 for length in case["lengths"]],
            case["batch_size"],
            case["world_size"],
            torch.manual_seed(case["torch_seed"]),
        )
        assert order == case["indices"]


def test_the_sampler_makes_batches_of_one_modality():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 900, (203,), generator=generator).tolist()
    images = (torch.rand(203, generator=generator) < 0.6).tolist()
    sampler = ModalityLengthSampler(lengths, images, batch_size=4, batches=6, seed=1)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(203)) and len(sampler) == 203
    windows = [epochs[0][start : start + 24] for start in range(0, 203, 24)]
    mixed = [len({images[row] for row in window}) > 1 for window in windows]
    assert sum(mixed) <= 2 and not any(mixed[:-2])
    # Dealt out evenly: the batches of a window have about the same number of tokens.
    totals = [sum(lengths[row] for row in windows[0][start : start + 4]) for start in range(0, 24, 4)]
    assert max(totals) - min(totals) < max(lengths)


def test_grouping_needs_lengths(trainer):
    run = trainer(group_by_modality_length=True)
    assert isinstance(run._get_train_sampler(), ModalityLengthSampler)
    with pytest.raises(ValueError, match="needs the columns `length` and `vision`"):
        run._get_train_sampler(run.train_dataset.remove_columns("length"))


def test_stage_1_brings_its_template(processor):
    """A folder need not have it; where an older one does, that is used."""
    plain = PLAIN.read_text(encoding="utf-8")
    default = processor.chat_template
    assert (template_text(processor, "plain"), template_text(processor, "default")) == (plain, default)
    processor.chat_template = {"default": default, "plain": "older"}
    assert (template_text(processor, "plain"), template_text(processor, "default")) == ("older", default)


def test_an_unknown_template_is_refused(trainer):
    with pytest.raises(ValueError, match="no chat template 'palin'; it has .*plain"):
        trainer(chat_template_name="palin")


# Logs


def test_throughput_is_logged(trainer, monkeypatch):
    run = trainer(max_steps=2, group_by_modality_length=False)
    seen = []
    collate = run.data_collator
    run.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("training.throughput.now", lambda: next(clock))
    run.train()
    first = next(row for row in run.state.log_history if "loss" in row)
    images = sum(len(batch.get("pixel_values", [])) for batch in seen[:2])
    tokens = sum(int(batch["attention_mask"].sum()) for batch in seen[:2])
    assert (first["images_per_second"], first["tokens_per_second"]) == (images / 2, tokens / 2)
    assert first["mfu"] == pytest.approx(training_flops(run.model, images, tokens) / 2 / 1e12)


@pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
def test_the_count_of_flops_is_that_of_pytorch(recipe, trainer):
    """But for attention scores and the first layer of the connector, whose inputs need no gradient."""
    run = trainer(recipe, gradient_checkpointing=False)
    batch = batch_of(run, [0])
    counter = FlopCounterMode(display=False)
    with counter:
        run.model.train()(**batch).loss.backward()
    counted = training_flops(run.model, 1, batch["input_ids"].shape[1])
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)


# Saving


def test_every_checkpoint_loads_by_itself(trainer, tmp_path):
    run = trainer(save_steps=2, save_total_limit=1)
    run.train()
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert folders == ["checkpoint-4"]
    folder = tmp_path / "out" / "checkpoint-4"
    assert {
        "LICENSE",
        "chat_template.jinja",
        "configuration_llava_stf.py",
        "modeling_llava_stf.py",
        "processing_llava_stf.py",
    } <= {path.name for path in folder.iterdir()}
    loaded = LlavaSTFForConditionalGeneration.from_pretrained(folder)
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, run.model.get_parameter(name)), name


class DiskFull(OSError):
    pass


@pytest.mark.parametrize("step", ["weights", "optimizer", "final"])
def test_a_full_disk_leaves_the_last_checkpoint(step, trainer, tmp_path, monkeypatch):
    run = trainer(save_steps=2)
    out = tmp_path / "out"
    calls = {"weights": "save_pretrained", "final": "save_pretrained", "optimizer": "_save_optimizer_and_scheduler"}
    owner = run if step == "optimizer" else run.model
    save = getattr(owner, calls[step])

    def fail_later(folder, *args, **kwargs):
        final = "checkpoint" not in str(folder)
        if (final and step == "final") or (step != "final" and run.state.global_step > 2):
            (Path(folder) / "half").mkdir(parents=True)
            raise DiskFull("No space left on device")
        return save(folder, *args, **kwargs)

    monkeypatch.setattr(owner, calls[step], fail_later)
    with pytest.raises(RuntimeError, match="Could not save .*No space left on device.*go on from it with") as caught:
        run.train()
        run.save_model()
    last = "checkpoint-4" if step == "final" else "checkpoint-2"
    assert last in str(caught.value)
    assert max(path.name for path in out.iterdir() if path.is_dir()) == last
    assert not (out / "config.json").exists()
    LlavaSTFForConditionalGeneration.from_pretrained(out / last)


def test_a_loss_that_is_not_finite_stops_the_run(trainer, tmp_path, monkeypatch):
    run = trainer(save_steps=2)
    compute = run.compute_loss

    def lost(*args, **kwargs):
        loss = compute(*args, **kwargs)
        return loss * math.nan if run.state.global_step == 3 else loss

    monkeypatch.setattr(run, "compute_loss", lost)
    with pytest.raises(FloatingPointError, match="The loss is nan in step 4.*checkpoint-2.*Usual causes"):
        run.train()
    before = weights_of(tmp_path / "out" / "checkpoint-2")
    assert all(torch.isfinite(weight).all() for weight in before.values())


def test_weights_that_are_not_finite_are_not_saved(trainer, tmp_path):
    run = trainer(save_steps=2, max_grad_norm=0)
    run.model.lm_head.weight.register_hook(
        lambda gradient: gradient * math.inf if run.state.global_step == 3 else gradient
    )
    with pytest.raises(FloatingPointError, match="is not finite after step 4; it was not saved"):
        run.train()
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2"]


def test_a_model_that_is_not_finite_is_not_saved_at_the_end(trainer, tmp_path):
    run = trainer(save_strategy="no")
    run.model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="lm_head.weight is not finite"):
        run.save_model()
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_ends_the_run_with_its_path(workers, trainer, tmp_path, checkpoint):
    rows = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))[:1] * 8
    (tmp_path / "cut.png").write_bytes((IMAGES / "shapes.png").read_bytes()[:-200])
    rows[-1] = {**rows[-1], "image": str(tmp_path / "cut.png")}
    data = tmp_path / "broken.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    run = trainer(data=data, save_steps=1, max_steps=50, dataloader_num_workers=workers, save_total_limit=2)
    with pytest.raises(DataError, match=r"^bad image: \S+cut.png: [^\n]+$"):
        run.train()


def test_a_stream_with_too_few_rows_ends(trainer, tmp_path):
    rows = trainer().train_dataset.select([0])
    run = trainer(group_by_modality_length=False, max_steps=1)
    run.train_dataset = rows.to_iterable_dataset()
    with pytest.raises(DataError, match="nothing was trained in a whole epoch"):
        run.train()


def test_rows_of_trl_train_as_they_are(checkpoint, tmp_path, processor, picture):
    """From Python, with decoded pictures and plain strings."""
    rows = {
        "messages": [[{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A shape."}]] * 2,
        "images": [[picture("wide.png")], [picture("shapes.png")]],
    }
    data = Dataset.from_dict(rows).cast_column("images", List(Image()))
    settings = {"use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none", "peak_tflops": 1.0}
    run = LlavaSTFTrainer(
        LlavaSTFForConditionalGeneration.from_pretrained(checkpoint),
        LlavaSTFTrainingArguments(tmp_path / "out", **settings),
        train_dataset=data,
        processing_class=processor,
    )
    batch = run.data_collator(list(data))
    assert batch["pixel_values"].shape[0] == 2
    assert (batch["input_ids"] == processor.image_token_id).sum() == 2 * run.model.config.tokens_per_image
    run.train()


def rows_of_trl(pictures, answer="A shape."):
    """Two rows as a user of TRL has them, with a column that `training.rows` has with another meaning."""
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": answer}]
    rows = {"messages": [turns] * 2, "problem": ["1 + 1?"] * 2}
    if pictures is None:
        return Dataset.from_dict(rows)
    return Dataset.from_dict({**rows, "images": [pictures] * 2}).cast_column("images", List(Image()))


def trainer_from_python(checkpoint, processor, output, rows, **settings):
    settings = {"use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none", "peak_tflops": 1.0, **settings}
    own = {name: settings.pop(name) for name in ("optimizers",) if name in settings}
    model = LlavaSTFForConditionalGeneration.from_pretrained(checkpoint)
    args = LlavaSTFTrainingArguments(output, save_strategy="no", **settings)
    return LlavaSTFTrainer(model, args, train_dataset=rows, processing_class=processor, **own)


@pytest.mark.parametrize("kind", ["pictures", "texts"])
def test_rows_from_python_are_trained_whole_or_refused(kind, checkpoint, tmp_path, processor, picture):
    """Longer ones were trained without a word; TRL cut those without pictures, and left some of them out."""
    pictures = [picture("wide.png")] if kind == "pictures" else None
    run = trainer_from_python(checkpoint, processor, tmp_path / "out", rows_of_trl(pictures))
    assert run.train_dataset.column_names == rows_of_trl(pictures).column_names
    run.train()
    long = rows_of_trl(pictures, "very " * 100 + "long")
    run = trainer_from_python(checkpoint, processor, tmp_path / "out", long, max_length=100)
    with pytest.raises(DataError, match=r"too long: \d+ tokens, 100 are allowed"):
        run.train()


@pytest.mark.parametrize("turn", [True, False])
def test_a_decoded_photo_is_turned_only_if_the_processor_turns_it(turn, checkpoint, tmp_path, processor, picture):
    """`datasets` turns it when it decodes."""
    save_photos(picture("wide.png").resize((40, 40)), tmp_path)
    processor.image_processor.do_exif_transpose = turn
    rows = rows_of_trl([str(tmp_path / "lying.png")])
    run = trainer_from_python(checkpoint, processor, tmp_path / "out", rows, do_exif_transpose=turn)
    wanted = "upright.png" if turn else "as_it_lies.png"
    expected = processor.image_processor(PIL.Image.open(tmp_path / wanted), return_tensors="pt")["pixel_values"][0]
    for loader in (run.get_train_dataloader(), run.get_eval_dataloader(rows)):
        assert torch.equal(next(iter(loader))["pixel_values"][0], expected)


def test_a_rate_beside_an_optimizer_of_one_s_own_is_refused(checkpoint, tmp_path, processor):
    own = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    settings = {"optimizers": (own, None), "projector_learning_rate": 1e-3}
    with pytest.raises(ValueError, match="`projector_learning_rate` does not act on an optimizer of your own"):
        trainer_from_python(checkpoint, processor, tmp_path / "out", rows_of_trl(None), **settings)


def test_the_best_checkpoint_is_named_where_it_is(trainer, tmp_path):
    run = trainer(
        data=eight_rows(tmp_path),
        eval_data_path=eight_rows(tmp_path),
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert Path(best).is_dir() and Path(best).parent == tmp_path / "out"
    states = [json.loads((path / "trainer_state.json").read_text()) for path in (tmp_path / "out").glob("checkpoint-*")]
    assert all(Path(state["best_model_checkpoint"]).is_dir() for state in states)


def test_processes_that_would_each_train_by_themselves_are_refused(trainer, monkeypatch):
    """What a launcher starts on a machine without GPUs is not connected, unless `use_cpu` says that it should be."""
    run = trainer()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched.*--use_cpu true"):
        LlavaSTFTrainer(run.model, run.args, train_dataset=run.train_dataset, processing_class=run.processing_class)


def test_pictures_are_saved_as_they_are_trained(trainer, tmp_path):
    run = trainer(do_exif_transpose=False, alpha_background="white")
    run.save_model(str(tmp_path / "saved"))
    for processor in (run.data_collator.processor, LlavaSTFProcessor.from_pretrained(tmp_path / "saved")):
        assert processor.image_processor.do_exif_transpose is False
        assert processor.image_processor.alpha_background == "white"
    assert trainer().processing_class.image_processor.do_exif_transpose is True


def test_throughput_leaves_out_evaluations_and_checkpoints(trainer, monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr("training.throughput.now", lambda: clock[0])
    data = eight_rows(tmp_path)
    run = trainer(data=data, eval_data_path=CONVERSATIONS, eval_strategy="steps", eval_steps=1, save_steps=1)

    def takes(seconds, name):
        work = getattr(run, name)

        def timed(*args, **kwargs):
            clock[0] += seconds
            return work(*args, **kwargs)

        monkeypatch.setattr(run, name, timed)

    takes(2, "training_step")
    takes(100, "evaluation_loop")
    takes(1000, "_get_output_dir")
    seen = []
    count = run._meter.count
    monkeypatch.setattr(
        run._meter, "count", lambda *args: seen.append(int(args[0]["attention_mask"].sum())) or count(*args)
    )
    run.train()
    speeds = [row["tokens_per_second"] for row in run.state.log_history if "loss" in row]
    assert speeds == [sum(seen[step : step + 2]) / 4 for step in range(0, 8, 2)]


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_adapter_does_not_part_tied_weights(module, trainer, model, processor, tmp_path):
    """Trained, it could not be merged."""
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match=f"would train .*{module}.* alone, but embeddings and `lm_head` of this model"):
        trainer("finetune_lora", model=tmp_path / "tied", lora_modules_to_save=module)


def test_a_function_that_writes_rows_is_refused(trainer):
    """It was not called."""
    made = trainer()
    rows, processor = made.train_dataset, made.processing_class
    with pytest.raises(ValueError, match="`formatting_func` does not act"):
        LlavaSTFTrainer(made.model, made.args, train_dataset=rows, processing_class=processor, formatting_func=str)
