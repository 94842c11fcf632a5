"""The harness of the ablation, on a tiny model: it resumes, and all systems see the same rows in the same order."""

import copy
import dataclasses
import json
from contextlib import contextmanager, nullcontext

import pytest
import torch
from commands import start_here
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from examples.shapes import ablation, recipe
from examples.shapes.ablation import Examiner, Run, ablate, build, encoding_first, system_of
from examples.shapes.clip import PATCH
from examples.shapes.connectors import SYSTEMS, vq_token
from examples.shapes.generate import generate, read_scenes
from examples.shapes.ideal import answer_loss, encoded
from examples.shapes.recipe import LAYERS
from examples.shapes.scenes import SIDE
from examples.shapes.text import CHAT_TEMPLATE, messages_of, read_rows, train_tokenizer
from examples.shapes.training import DEVICE, MuonAndAdamW, optimizer_of
from examples.shapes.warm_up import imitate, read_features, read_targets, shorten, warm_up
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFImageProcessor, LlavaSTFProcessor
from training import LlavaSTFTrainer

AMOUNTS = {"captions": 32, "rows": 64, "questions": 9}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder of `make`, with a tower and a language model of a few thousand weights."""
    work = tmp_path_factory.mktemp("work")
    data = generate(work / "data", 20, 3, seed=5)
    tokenizer = LlamaTokenizer.from_pretrained(train_tokenizer(data, work / "tokenizer"))
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision = {**small, "num_hidden_layers": LAYERS, "image_size": SIDE, "patch_size": PATCH}
    CLIPModel(CLIPConfig(text_config=small, vision_config=vision)).save_pretrained(work / "clip")
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    LlavaSTFImageProcessor(**size).save_pretrained(work / "clip")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    llama = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=512, **small, **ids)
    LlamaForCausalLM(llama).save_pretrained(work / "language-model")
    tokenizer.save_pretrained(work / "language-model")
    return work


@pytest.fixture
def started(monkeypatch):
    """Runs the commands of the harness in this process, and notes those of the runs."""
    runs = []

    def start_module(module, *words, **options):
        if words[0] == "ablation-run":
            runs.append(words[3:5])
        return start_here(module, *words)

    for module in (ablation, recipe):
        monkeypatch.setattr(module, "start_module", start_module)
    return runs


@pytest.fixture(scope="module")
def out(work, tmp_path_factory):
    """A folder for results; the start of all systems is made."""
    with pytest.MonkeyPatch.context() as patch:
        started.__wrapped__(patch)
        recipe.begin(work, recipe.Timer(work / "seconds.json"), seed=0)
    return tmp_path_factory.mktemp("out")


def compare(work, out, **changes):
    # All runs are in this process, so that one at a time may run.
    return ablate(work, out, workers=1, **({"systems": ["LLaVA-1.5", "DiVT"], **AMOUNTS} | changes))


def result_of(out, system, **changes):
    return json.loads((out / "runs" / Run(system, 0, **AMOUNTS | changes).file).read_text())


def test_a_comparison_continues_where_it_stopped(work, out, started):
    compare(work, out, seeds=1)
    assert started == [("LLaVA-1.5", 0), ("DiVT", 0)]
    found = result_of(out, "DiVT")
    assert (found["captions"], found["rows"], found["seed"]) == (32, 64, 0)
    questions = [row for row in read_rows(work / "data" / "truth.jsonl") if row["kind"] != "caption"]
    assert {len(way["right"]) for way in found["asked"].values()} == {len(questions)}
    assert found["asked"]["DiVT"]["tokens"] < 64
    assert [point["share"] for point in found["curve"]] == [0.5]  # of two steps
    assert min(found["seconds"].values()) > 0
    assert [*found_of_search(out)] == ["0.5"]  # a cut, between two layers
    table, _ = (out / "results.md").read_text().split("\n\n")
    assert len(table.splitlines()) == 2 + len(system_of("LLaVA-1.5").asked) + 1

    (out / "runs" / Run("DiVT", 0, **AMOUNTS).file).unlink()
    compare(work, out, seeds=1)
    assert started[2:] == [("DiVT", 0)]
    assert result_of(out, "DiVT")["asked"]["DiVT"]["right"] == found["asked"]["DiVT"]["right"]

    compare(work, out, seeds=1)
    assert len(started) == 3
    with pytest.raises(ValueError, match="has rows 64, expected 96: name another folder, or remove it"):
        compare(work, out, seeds=1, rows=96)
    with pytest.raises(ValueError, match="has questions 9, expected 8: name another folder, or remove it"):
        compare(work, out, seeds=1, questions=8)
    start = (work / "start" / "model.safetensors").read_bytes()
    (work / "start" / "model.safetensors").write_bytes(b"another")
    with pytest.raises(ValueError, match="has start .* expected"):
        compare(work, out, seeds=1)
    (work / "start" / "model.safetensors").write_bytes(start)
    with pytest.raises(ValueError, match="There is no .*start: run .*make"):
        compare(work / "data", out, seeds=1)


def test_for_equal_time_a_faster_system_has_more_rows(tmp_path):
    (tmp_path / "runs").mkdir()
    for system, seed, seconds in [("LLaVA-1.5", 0, 90), ("LLaVA-1.5", 1, 110), ("STF", 0, 50), ("STF", 1, 30)]:
        file = tmp_path / "runs" / Run(system, seed, 0, 0, 0).file
        file.write_text(json.dumps({"seconds": {"stage1": 10, "stage2": seconds - 10}}))
    assert ablation._amounts(tmp_path, "STF", 3200, 6400, "rows") == (3200, 6400)
    assert ablation._amounts(tmp_path, "STF", 3200, 6400, "time") == (8000, 16000)  # medians of 100 s and 40 s
    with pytest.raises(ValueError, match="There is no result of MBTF for equal rows: run it first"):
        ablation._amounts(tmp_path, "MBTF", 3200, 6400, "time")


def test_an_unknown_system_is_named_with_those_that_exist(work, tmp_path):
    with pytest.raises(ValueError, match="There is no system 'SFT', expected some of: LLaVA-1.5, average pooling"):
        ablate(work, tmp_path, systems=["SFT"])
    with pytest.raises(ValueError, match="`questions` is 0, expected 1 or more"):
        ablate(work, tmp_path, questions=0)


def test_every_system_has_its_own_file_and_row():
    assert len({Run(system.name, 0, 1, 1, 1).file for system in SYSTEMS}) == len(SYSTEMS)
    rows = [way.name for system in SYSTEMS for way in system.asked]
    assert len({*rows}) == len(rows)


@pytest.fixture
def batches(monkeypatch):
    """Notes the answers of each batch, which do not depend on the connector."""
    seen = []
    stock = LlavaSTFTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append([row[row != -100].tolist() for row in inputs["labels"]])
        return stock(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LlavaSTFTrainer, "compute_loss", compute_loss)
    return seen


def changes_of(work, name, seed, stage, rows):
    """Trains on some rows of a stage; returns the model and how its weights changed."""
    system, data = system_of(name), work / "data"
    model, processor = build(system, work / "start", seed, data)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    with encoding_first(model, system), system.inside(model):
        ablation.train(model, processor, system, stage, data / stage.rows, rows, seed, None)
    return model, {key: weight.cpu() - before[key] for key, weight in model.state_dict().items()}


def train_a_moment(work, out, batches, name, seed):
    """Trains 64 rows of stage 2; returns the answers in their order, and which weights changed."""
    batches.clear()
    _, changes = changes_of(work, name, seed, recipe.STAGES[1], 64)
    return list(batches), {key for key, change in changes.items() if change.any()}


def test_all_systems_see_the_same_rows_in_the_same_order(work, out, batches):
    expected, _ = train_a_moment(work, out, batches, "LLaVA-1.5", 0)
    assert len(expected) == 2 and all(expected[0])
    # These have other passes, noise, a budget for each row, and masks with routers.
    others = ("QueCC", "DiVT", "VisToG", "elastic MBTF + STF", "VideoLLM-MoD (simulated)", "VoCo-LLaMA (simulated)")
    for name in others:
        seen, changed = train_a_moment(work, out, batches, name, 0)
        assert seen == expected, name
        assert any("multi_modal_projector" in key for key in changed)
        assert any("language_model" in key for key in changed)
        assert any("routers" in key for key in changed) == ("MoD" in name)
        assert not any("vision_tower" in key for key in changed)
    assert train_a_moment(work, out, batches, "LLaVA-1.5", 1)[0] != expected


# The optimiser


def matrices_of(model):
    """Returns the weights of linear layers in the connector and in the language model's layers, by their modules."""
    found = set()
    for part in (model.model.multi_modal_projector, model.model.language_model.layers):
        for module in part.modules():
            found |= {module.weight} if isinstance(module, nn.Linear) else set()
            found |= {module.in_proj_weight} if isinstance(module, nn.MultiheadAttention) else set()
    return {name for name, weight in model.named_parameters() if weight in found}


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_muon_has_the_matrices_and_adamw_all_else(work, out, system):
    model, _ = build(system, work / "start", 0)
    model.model.vision_tower.requires_grad_(False)
    muon, adam = optimizer_of(model, {"multi_modal_projector": 2.0, ".language_model.layers.": 3.0}, 1.0).parts
    names = {weight: name for name, weight in model.named_parameters()}
    rates = {names[weight]: group["lr"] for group in muon.param_groups for weight in group["params"]}
    assert rates == {name: 2.0 if "multi_modal" in name else 3.0 for name in matrices_of(model)}
    rest = {names[weight] for group in adam.param_groups for weight in group["params"]}
    trained = {name for name in names.values() if "vision_tower" not in name}
    assert rest == trained - rates.keys() and {"lm_head.weight"} < rest
    assert {group["weight_decay"] for group in muon.param_groups} == {0.05}


@pytest.mark.parametrize("stage", recipe.STAGES[:2], ids=lambda stage: stage.name)
def test_a_training_steps_by_muon_and_adamw(work, out, stage):
    # The first of two steps has the rate zero. A step of Muon is about as long in every direction, and one of AdamW in
    # every number.
    model, changes = changes_of(work, "QueCC", 0, stage, 64)
    weights, matrices = dict(model.named_parameters()), matrices_of(model)
    trained = {name for name in weights if "multi_modal_projector" in name}
    trained |= {name for name in weights if "vision_tower" not in name} if stage.name == "stage2" else set()
    assert {name for name, change in changes.items() if change.any()} == trained
    for name in trained:
        if name in matrices:
            rate = ablation.CONNECTOR_RATES[stage.name] if "projector" in name else ablation.LANGUAGE_RATE
            high, wide = weights[name].shape
            longest = torch.linalg.matrix_norm(changes[name], 2) / rate / max(1, high / wide) ** 0.5
            assert 0.6 < longest < 1.3, name
        else:
            assert 0.7 < changes[name].abs().max() / ablation.ADAM_RATE < 1.02, name


def test_one_schedule_acts_on_all_rates(work, out, monkeypatch):
    rates, stock = [], MuonAndAdamW.step

    def step(self, closure=None):
        stock(self, closure)
        rates.append([group["lr"] for part in self.parts for group in part.param_groups])

    monkeypatch.setattr(MuonAndAdamW, "step", step)
    changes_of(work, "STF", 0, recipe.STAGES[1], 96)
    highest = [ablation.CONNECTOR_RATES["stage2"], ablation.LANGUAGE_RATE, ablation.ADAM_RATE]
    assert rates == [pytest.approx([factor * rate for rate in highest]) for factor in (0, 1, 0.5)]


def test_an_optimizer_goes_on_from_its_state():
    def trained(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (model(torch.eye(4)) - torch.arange(4.0)).square().sum().backward()
            optimizer.step()
        return model.state_dict()

    torch.manual_seed(0)
    models = [nn.Linear(4, 4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [optimizer_of(model, {"weight": 0.1}, 0.1) for model in models]
    trained(models[0], optimizers[0], 3)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    expected, found = (trained(*both, 2) for both in zip(models, optimizers, strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_new_tokens_are_as_long_as_words(work, out, system):
    data, tokens = work / "data", []
    model, processor = build(system, work / "start", 0, data)
    model.eval().model.multi_modal_projector.register_forward_hook(lambda module, args, made: tokens.extend(made))
    examiner = Examiner(system, processor, data, 9)
    conversations = [messages_of(row, data)[:1] for row in read_rows(data / "captions.json")]
    with torch.no_grad():
        model(**examiner.inputs(model, system.asked[0], conversations))
    words = model.get_input_embeddings().weight.std()
    torch.testing.assert_close(torch.cat(tokens).std(), words, rtol=1e-4, atol=0)


# What is shared


def test_what_is_shared_is_equal_and_the_connector_depends_on_the_seed(work, out):
    ours, theirs, other = (build(system_of(*one), work / "start", seed)[0] for *one, seed in WAYS)
    shared = [key for key in ours.state_dict() if "multi_modal_projector" not in key]
    assert all(torch.equal(ours.state_dict()[key], theirs.state_dict()[key]) for key in shared)
    again = build(system_of("TokenPacker"), work / "start", 0)[0]
    torch.testing.assert_close(again.state_dict(), ours.state_dict(), rtol=0, atol=0)
    assert not torch.equal(
        ours.model.multi_modal_projector.out[0].weight, other.model.multi_modal_projector.out[0].weight
    )


WAYS = (("TokenPacker", 0), ("STF", 0), ("TokenPacker", 1))


@pytest.mark.parametrize("name", ["LLaVA-1.5", "DiVT", "QueCC", "MQT", "elastic MBTF + STF"])
def test_every_way_of_asking_has_its_number_of_tokens(work, out, name):
    system, data = system_of(name), work / "data"
    model, processor = build(system, work / "start", 0, data)
    examiner = Examiner(system, processor, data, 9)
    conversations = [messages_of(row, data)[:1] for row in examiner.rows[:2]]
    for way in system.asked:
        inputs = examiner.inputs(model.eval(), way, conversations)
        numbers = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
        expected = way.budget or (way.keep if isinstance(way.keep, int) else None)
        if way.film:
            frames = len(vq_token.MOVES)
            expected = way.budget * frames if way.budget else way.encode.keywords["number"]
        if expected is not None:
            assert numbers == [expected] * 2, way.name
        with torch.inference_mode():
            assert model.generate(**inputs, do_sample=False, max_new_tokens=2).shape[0] == 2


# The warm-up of the small model


def test_the_warm_up_trains_all_but_the_tower(work, out, tmp_path):
    folder = warm_up(
        work / "data", work / "start", tmp_path / "warm", steps=3, imitation_steps=2, pictures=8, batch_size=4
    )
    before, after = (load_file(one / "model.safetensors") for one in (work / "start", folder))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same and all(".vision_tower." in name for name in same)
    assert {name for name in before if ".vision_tower." in name} == same
    record = json.loads((folder / "training_log.json").read_text())
    assert record["settings"]["pictures"] == 8
    assert record["log"][-1]["step"] == 3 and record["imitation"][-1]["step"] == 2


def test_fusion_modules_learn_to_make_the_ideal_tokens_of_windows(work, out):
    model = LlavaSTFForConditionalGeneration.from_pretrained(work / "start", dtype=torch.float32).to(DEVICE)
    processor = LlavaSTFProcessor.from_pretrained(work / "start")
    features = read_features(model, processor, work / "data", 8)
    scenes = dict([*read_scenes(work / "data", "train").items()][:8])
    targets = read_targets(model, processor, scenes)
    assert targets.shape == (8, 16, model.config.text_config.hidden_size)
    log = imitate(model.model.multi_modal_projector, features, targets, 100, 8, 2e-2, 1e-3)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    made = model.model.multi_modal_projector(features.float().to(DEVICE)).cpu()
    distances = torch.cdist(made[0], targets[0])
    shows = [place for place, token in enumerate(targets[0]) if (targets[0] == token).all(1).sum() == 1]
    assert shows and all(distances[place].argmin() == place for place in shows)


def test_the_warm_up_s_loss_is_that_of_the_pictures(work, out):
    """What it computes from the tower's kept output is what the model computes from pixels."""
    model = LlavaSTFForConditionalGeneration.from_pretrained(work / "start", dtype=torch.float32).to(DEVICE)
    processor = LlavaSTFProcessor.from_pretrained(work / "start")
    features = read_features(model, processor, work / "data", 2).float().to(DEVICE)
    shorten(model, model.model.multi_modal_projector(features))
    rows = read_rows(work / "data" / "train.json")[:2]
    answers = [encoded(row, processor.tokenizer, CHAT_TEMPLATE) for row in rows]
    ours = answer_loss(model, model.config.image_token_id, answers, [*model.model.multi_modal_projector(features)])
    batch = processor.apply_chat_template(
        [messages_of(row, work / "data") for row in rows],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right"},
        return_assistant_tokens_mask=True,
    )
    marks = torch.as_tensor(batch.pop("assistant_masks")).bool()
    batch["labels"] = batch["input_ids"].masked_fill(~marks, -100)
    theirs = model(**batch.to(DEVICE)).loss
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=0)  # the features are kept in float16


def test_new_tokens_become_as_long_as_words(work, out):
    model = LlavaSTFForConditionalGeneration.from_pretrained(work / "start", dtype=torch.float32)
    features = torch.randn(4, 64, 64)
    shorten(model, model.model.multi_modal_projector(features.float()))
    tokens = model.model.multi_modal_projector(features)
    torch.testing.assert_close(tokens.std(), model.get_input_embeddings().weight.std())


# What acts inside the language model


def found_of_search(out):
    return result_of(out, "LLaVA-1.5")["asked"]["LLaVA-1.5, G-Search (simulated)"]["kept"]


def test_a_search_asks_training_questions_and_the_test_has_what_it_found(work, out, monkeypatch):
    system, asked, dropped = system_of("LLaVA-1.5"), [], []
    model, processor = build(system, work / "start", 0)

    def answer(network, processor, folder, rows, size, inputs_of):
        asked.append([row["id"] for row in rows])
        inputs_of([messages_of(rows[0], folder)[:1]])
        few = min(dropped[-1].values(), default=1) < 0.5  # then nothing is right
        return {row["id"]: "" if few else row["conversations"][1]["value"] for row in rows}

    def dropping(model, schedule):
        dropped.append(schedule.kept)
        return nullcontext()

    monkeypatch.setattr(ablation, "ask", answer)
    monkeypatch.setattr(ablation, "dropping", dropping)
    examiner = Examiner(system, processor, work / "data", 9)
    (way,) = (way for way in system.asked if "G-Search" in way.name)
    assert examiner.ask(model, way)["kept"] == dropped[-1] == {0.5: 0.5}
    assert asked[-1] == [row["id"] for row in examiner.rows]
    assert not any("test" in name for names in asked[:-1] for name in names) and len(asked) > 4


def test_what_acts_inside_does_so_from_stage_2_to_the_last_answer(work, out, monkeypatch):
    acts = []

    @contextmanager
    def inside(model):
        acts.append("begin")
        yield
        acts.append("end")

    system = dataclasses.replace(system_of("VoCo-LLaMA (simulated)"), inside=inside)
    monkeypatch.setattr(ablation, "system_of", lambda name: system)
    monkeypatch.setattr(ablation, "train", lambda model, processor, system, stage, *rest: acts.append(stage.name))
    monkeypatch.setattr(Examiner, "ask", lambda self, model, way: acts.append(way.name))
    ablation.run_one(work, out, system=system.name, seed=0, **AMOUNTS, equal="other")
    assert acts == ["stage1", "begin", "stage2", system.name, "end"]


def test_the_token_behind_the_picture_is_the_same_in_every_prompt(work, out):
    data, system = work / "data", system_of("VoCo-LLaMA (simulated)")
    model, processor = build(system, work / "start", 0)
    rows = [*read_rows(data / "test.json")[:20], *read_rows(data / "dialogues.json")[:20]]
    conversations = [messages_of(row, data)[:1] for row in rows]
    ids = Examiner(system, processor, data, 9).inputs(model, system.asked[0], conversations)["input_ids"]
    ends = (ids == model.config.image_token_id).long().cumsum(1).argmax(1)  # the first place with the highest number
    assert len({*ids[range(len(rows)), ends + 1].tolist()}) == 1
    assert len({*ids[range(len(rows)), ends + 3].tolist()}) > 1  # the question is not
