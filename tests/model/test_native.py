"""One model, several ways, one answer; and what transformers, accelerate and PEFT expect of a model holds."""

import copy
import math
import re
import sys
from contextlib import nullcontext

import pytest
import torch
import transformers
from accelerate import cpu_offload
from conftest import GOLDENS
from packaging import version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaModel

from conversion import convert
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration, LlavaSTFModel
from modeling_llava_stf.modeling_llava_stf import CACHE

SAME = {"rtol": 0, "atol": 2e-5}
LANGUAGE_LINEARS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def second_config(**changes):
    """Nothing that the goldens use: 6 x 6 patches, 4 taps out of order, all widths, grouped heads."""
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=84,
        patch_size=14,
        projection_dim=48,
    )
    text = LlamaConfig(
        vocab_size=97,
        hidden_size=96,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    settings = {
        "image_token_index": 95,
        "vision_feature_layer": [4, 1, 3, 2],
        "fusion_window": 2,
        "block_fusion_hidden_size": 56,
        "spatial_fusion_hidden_size": 72,
    }
    return LlavaSTFConfig(vision_config=vision, text_config=text, **settings | changes)


def second_model(**changes):
    """Weights large enough that every part has a say in the logits."""
    torch.manual_seed(0)
    model = LlavaSTFForConditionalGeneration(second_config(**changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 / weight[0].numel() ** 0.5)
    return model


def second_inputs(config):
    """Two prompts with one image and two, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    side = config.vision_config.image_size
    image = [config.image_token_id] * config.tokens_per_image
    rows = [[1, 5, *image, 7, 8], [1, *image, 9, *image, 11, 12, 13]]
    width = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.randn(3, 3, side, side, generator=generator),
    }


@pytest.fixture
def inputs(processor, picture):
    """Two prompts with one image and two, padded on the left."""
    prompts = ["USER: <image>\nWhat is this? ASSISTANT:", "USER: <image> and <image>\nWhat differs? ASSISTANT:"]
    images = [[picture("gradient.png")], [picture("shapes.png"), picture("text.png")]]
    return dict(processor(images=images, text=prompts, padding=True, return_tensors="pt"))


@pytest.fixture
def text_inputs(processor):
    return dict(processor(text=["USER: Name a city. ASSISTANT: Paris", "USER: Hi"], padding=True, return_tensors="pt"))


@pytest.fixture(params=["golden", "second"])
def model_and_inputs(request):
    if request.param == "golden":
        return request.getfixturevalue("model"), request.getfixturevalue("inputs")
    model = second_model()
    return model, second_inputs(model.config)


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def labels_of(inputs, config):
    ignored = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == config.image_token_id)
    return inputs["input_ids"].masked_fill(ignored, -100)


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs, labels=labels_of(inputs, model.config)).loss
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def fusion_weights(model):
    return dict(model.model.multi_modal_projector.named_parameters())


# Attention, cache


IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]


@pytest.mark.parametrize("submodel", ["text_config", "vision_config"])
def test_attention_implementations_give_the_same_logits(submodel, tmp_path):
    model = second_model()
    inputs = second_inputs(model.config)
    model.save_pretrained(tmp_path)
    for implementation in IMPLEMENTATIONS:
        choice = {"text_config": "eager", "vision_config": "eager", submodel: implementation}
        loaded = LlavaSTFForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=choice).eval()
        assert getattr(loaded.config, submodel)._attn_implementation == implementation
        torch.testing.assert_close(logits_of(loaded, inputs), logits_of(model, inputs), **SAME)


def test_eager_equals_sdpa_on_a_converted_checkpoint(load_model, inputs):
    eager, sdpa = (logits_of(load_model(attn_implementation=name), inputs) for name in ("eager", "sdpa"))
    torch.testing.assert_close(eager, sdpa, **SAME)


@torch.no_grad()
def test_cached_equals_uncached(model_and_inputs):
    model, inputs = model_and_inputs
    prompt, tokens = inputs["input_ids"], torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    full = model(torch.cat([prompt, tokens], dim=1), inputs["pixel_values"], mask).logits
    outputs = model(**inputs, use_cache=True)
    steps = [outputs.logits[:, -1:]]
    for step in range(tokens.shape[1]):
        seen = mask[:, : prompt.shape[1] + step + 1]
        token = tokens[:, step : step + 1]
        outputs = model(token, attention_mask=seen, **{CACHE: outputs[CACHE]})
        steps.append(outputs.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full[:, -tokens.shape[1] - 1 :], **SAME)


# Compile, export


def assert_one_graph(counters):
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("device", [nullcontext(), torch.device("cpu")], ids=["", "default device"])
def test_forward_with_images_compiles_to_one_graph(device, model, inputs, counters):
    expected = logits_of(model, inputs)  # transformers installs its output hooks in the first, eager, forward
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with device:
        torch.testing.assert_close(logits_of(compiled, inputs), expected, **SAME)
    assert_one_graph(counters)


def test_inductor_equals_eager(counters):
    model = second_model(vision_feature_layer=[1, 2])  # two blocks of the tower run: less to compile
    inputs = second_inputs(model.config)
    expected = logits_of(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    torch.testing.assert_close(logits_of(compiled, inputs), expected, rtol=0, atol=1e-4)
    assert_one_graph(counters)


@pytest.mark.parametrize("images", [True, False], ids=["images", "text only"])
def test_training_step_compiles_to_one_graph(images, counters):
    model = second_model(vision_feature_layer=[1, 2]).train()
    inputs = second_inputs(model.config)
    if not images:
        inputs.pop("pixel_values")
        inputs["input_ids"] = inputs["input_ids"].where(inputs["input_ids"] != model.config.image_token_id, 20)
    loss, gradients = loss_and_gradients(model, inputs)
    counters.clear()
    compiled_loss, compiled_gradients = loss_and_gradients(
        torch.compile(model, fullgraph=True, backend="aot_eager"), inputs
    )
    assert_one_graph(counters)
    torch.testing.assert_close(compiled_loss, loss, **SAME)
    for name, gradient in compiled_gradients.items():
        torch.testing.assert_close(gradient, gradients[name.removeprefix("_orig_mod.")], **SAME)


def test_export(model_and_inputs):
    model, inputs = model_and_inputs
    logits_of(model, inputs)
    exported = torch.export.export(model, (), kwargs=inputs | {"use_cache": False}, strict=False).module()
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    for example in (inputs, other):
        with torch.no_grad():
            logits = exported(**example, use_cache=False).logits[example["attention_mask"].bool()]
        torch.testing.assert_close(logits, logits_of(model, example), **SAME)
    assert not torch.equal(logits_of(model, other), logits_of(model, inputs))


# Training


def enable_checkpointing(model, use_reentrant):
    """By the name of the installed transformers: the older one is deprecated since 5.23."""
    if version.parse(transformers.__version__).release >= (5, 23):
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_changes_nothing(use_reentrant, model_and_inputs):
    model, inputs = model_and_inputs
    loss, gradients = loss_and_gradients(model.train(), inputs)
    enable_checkpointing(model, use_reentrant)
    runs = {"language": 0, "vision": 0}

    def count(name):
        def hook(*_):
            runs[name] += 1

        return hook

    model.model.language_model.layers[0].self_attn.register_forward_pre_hook(count("language"))
    model.model.vision_tower.encoder.layers[0].self_attn.register_forward_pre_hook(count("vision"))
    checkpointed_loss, checkpointed_gradients = loss_and_gradients(model, inputs)
    assert runs == {"language": 2, "vision": 2}
    torch.testing.assert_close(checkpointed_loss, loss, **SAME)
    torch.testing.assert_close(checkpointed_gradients, gradients, **SAME)


def test_every_used_weight_gets_a_gradient(model_and_inputs):
    model, inputs = model_and_inputs
    _, gradients = loss_and_gradients(model, inputs)
    zero = {name for name, gradient in gradients.items() if gradient is None or not gradient.any()}
    # A bias of the keys moves all scores of a softmax alike; `post_layernorm` is behind the last tap.
    unused = {name for name in gradients if re.search(r"k_proj\.bias|post_layernorm|layers\.4\.", name)}
    assert {name for name in zero if "multi_modal_projector" in name} == set()
    assert zero <= unused


def test_connector_stage_trains_the_connector_only(model, inputs):
    model.train().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    loss_and_gradients(model, inputs)
    optimizer.step()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"model.multi_modal_projector.{name}" for name in fusion_weights(model)}
    assert len(changed) == 8


@pytest.mark.parametrize("use_reentrant", [True, False, None], ids=["reentrant", "not reentrant", "no checkpointing"])
def test_frozen_tower_never_runs_backward(use_reentrant, model, inputs):
    model.train()
    tower = model.model.vision_tower.requires_grad_(False)
    if use_reentrant is not None:
        enable_checkpointing(model, use_reentrant)
        model.enable_input_require_grads()
    seen = []

    def activation(module, arguments, output):
        tensors = [t for t in (*arguments, output) if isinstance(t, torch.Tensor)]
        seen.extend(tensor.requires_grad for tensor in tensors)

    for block in tower.encoder.layers:
        block.mlp.register_forward_hook(activation)
    loss_and_gradients(model, inputs)
    assert len(seen) == 2 * 23  # one run of each block: nothing is recomputed
    assert not any(seen)
    assert all(weight.grad.any() for weight in fusion_weights(model).values())


def test_loss_is_averaged_over_the_tokens_that_the_trainer_counts(model, inputs):
    labels = labels_of(inputs, model.config)
    targets = (labels[:, 1:] != -100).sum()
    loss = model(**inputs, labels=labels).loss
    accumulated = model(**inputs, labels=labels, num_items_in_batch=4 * targets).loss
    torch.testing.assert_close(accumulated * 4, loss, **SAME)


def test_loss_ignores_what_a_call_names(model, inputs):
    labels = inputs["input_ids"].clone()  # image tokens among them
    labels[:, :3] = -100
    other = labels.masked_fill(labels == -100, -7)
    torch.testing.assert_close(
        model(**inputs, labels=other, ignore_index=-7).loss, model(**inputs, labels=labels).loss, **SAME
    )


def test_text_only_training_touches_vision_weights_with_zero(model, text_inputs):
    labels = labels_of(text_inputs, model.config)
    expected = model(**text_inputs, labels=labels).loss
    loss, gradients = loss_and_gradients(model.train(), text_inputs)
    assert loss == expected
    vision = {name: g for name, g in gradients.items() if "language_model" not in name and "lm_head" not in name}
    missing = {name for name, gradient in vision.items() if gradient is None}
    assert all("post_layernorm" in name for name in missing)
    assert not any(gradient.any() for gradient in vision.values() if gradient is not None)
    assert any(gradient.any() for name, gradient in gradients.items() if "language_model" in name)


# PEFT


def test_adapters_of_the_language_model_only(model, inputs):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE_LINEARS))
    adapters = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 7 * 2  # A and B of seven matrices in two layers
    assert all("language_model" in name for name in adapters)
    assert {name for name, weight in adapted.named_parameters() if weight.requires_grad} == adapters

    before = {name: weight.detach().clone() for name, weight in adapted.named_parameters()}
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    untrained = logits_of(adapted.eval(), inputs)
    for _ in range(2):  # B starts at zero: A moves in the second step
        loss_and_gradients(adapted.train(), inputs)
        optimizer.step()
    changed = {name for name, weight in adapted.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == adapters
    trained = logits_of(adapted.eval(), inputs)
    assert (trained - untrained).abs().max() > 0.01
    torch.testing.assert_close(logits_of(adapted.merge_and_unload(), inputs), trained, rtol=0, atol=1e-4)


def test_adapters_of_all_linear_layers(model, inputs):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    enable_checkpointing(adapted, True)
    adapted.enable_input_require_grads()
    _, gradients = loss_and_gradients(adapted.train(), inputs)
    trained = {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    for part in ("vision_tower", "block_fusion", "spatial_fusion", "language_model"):
        assert any(part in name for name in trained)
    assert not any("lm_head" in name for name in gradients if "lora_" in name)


# Loading and saving


def test_device_map_auto(load_model, model, inputs):
    torch.testing.assert_close(logits_of(load_model(device_map="auto"), inputs), logits_of(model, inputs), **SAME)


PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")


@pytest.mark.parametrize("offloaded", [*((part,) for part in PARTS), PARTS], ids=[*PARTS, "all"])
def test_disk_offload(offloaded, load_model, model, inputs, tmp_path):
    device_map = {part: "disk" if part in offloaded else "cpu" for part in PARTS}
    loaded = load_model(device_map=device_map, offload_folder=tmp_path)
    on_disk = {name for name, weight in loaded.named_parameters() if weight.is_meta}
    assert on_disk == {name for name, _ in loaded.named_parameters() if name.startswith(offloaded)}
    torch.testing.assert_close(logits_of(loaded, inputs), logits_of(model, inputs), **SAME)


def test_automatic_device_map_offloads_what_does_not_fit(load_model, model, inputs, tmp_path):
    size = sum(weight.nbytes for weight in model.parameters())
    loaded = load_model(device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path)
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    whole = (r".*encoder\.layers\.\d+", r".*language_model\.layers\.\d+", r"model\.multi_modal_projector")
    split = [name for name in loaded.hf_device_map if any(re.match(rf"{unit}\.", name) for unit in whole)]
    assert split == []
    torch.testing.assert_close(logits_of(loaded, inputs), logits_of(model, inputs), **SAME)


def test_cpu_offload(model, inputs):
    expected = logits_of(model, inputs)
    cpu_offload(model, execution_device="cpu")
    assert all(weight.device.type == "meta" for weight in model.parameters())
    torch.testing.assert_close(logits_of(model, inputs), expected, **SAME)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, load_model, model, inputs):
    half = load_model(dtype=dtype, device_map="auto")
    assert {weight.dtype for weight in half.parameters()} == {dtype}
    for pixels in (inputs["pixel_values"], inputs["pixel_values"].to(dtype)):
        logits = logits_of(half, inputs | {"pixel_values": pixels})
        assert logits.dtype == dtype
        # 23 layers of the tiny tower amplify rounding; a wrong dtype anywhere would raise or give NaN.
        torch.testing.assert_close(logits.float(), logits_of(model, inputs), rtol=0, atol=1.0)


def test_sharded_save_and_load(model, inputs, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded, report = LlavaSTFForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_weights_that_a_checkpoint_lacks_are_named_and_initialised(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    absent = {
        name for name in state if re.search(r"projector|encoder\.layers\.3\.|embeddings|language_model\.norm", name)
    }
    save_file({n: t for n, t in state.items() if n not in absent}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, report = LlavaSTFForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == absent
    fresh = LlavaSTFForConditionalGeneration(model.config).state_dict()
    for name, tensor in loaded.state_dict().items():
        if name not in absent:
            assert torch.equal(tensor, state[name]), name
        elif fresh[name].std() == 0:  # ones of a norm, zeros of a bias
            assert torch.equal(tensor, fresh[name]), name
        else:
            assert tensor.std() / fresh[name].std() == pytest.approx(1, abs=0.5), name


def test_tied_embeddings_survive_saving(tmp_path):
    config = second_config(tie_word_embeddings=True)
    config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = LlavaSTFForConditionalGeneration(config).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert len({"lm_head.weight", "model.language_model.embed_tokens.weight"} & saved.keys()) == 1
    loaded, report = LlavaSTFForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    inputs = second_inputs(config)
    torch.testing.assert_close(logits_of(loaded, inputs), logits_of(model, inputs), rtol=0, atol=0)


def test_meta_model_takes_assigned_weights(model, inputs):
    with torch.device("meta"):
        empty = LlavaSTFForConditionalGeneration(model.config).eval()
    assert all(weight.is_meta for weight in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    # What no checkpoint stores is stock: positions of the tower, rotary frequencies of the language model.
    left = {name: buffer for name, buffer in empty.named_buffers() if buffer.is_meta}
    assert {name.rsplit(".", 1)[-1] for name in left} == {"position_ids", "inv_freq", "original_inv_freq"}
    for name in left:
        parent, _, leaf = name.rpartition(".")
        empty.get_submodule(parent).register_buffer(leaf, model.get_buffer(name), persistent=False)
    torch.testing.assert_close(logits_of(empty, inputs), logits_of(model, inputs), rtol=0, atol=0)


# Embeddings


def test_embeddings_get_and_set(model, inputs):
    table = model.get_input_embeddings()
    assert table is model.model.language_model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    expected = logits_of(model, inputs)
    model.set_input_embeddings(nn.Embedding.from_pretrained(table.weight.detach() * 2))
    assert model.model.language_model.embed_tokens is model.get_input_embeddings()
    assert (logits_of(model, inputs) - expected).abs().max() > 0.01
    model.set_input_embeddings(table)
    model.set_output_embeddings(nn.Linear(64, 421, bias=False))
    assert (logits_of(model, inputs) - expected).abs().max() > 0.01


def test_embeddings_resize(model, inputs):
    expected, rows = logits_of(model, inputs), model.config.text_config.vocab_size
    for size in (rows + 8, rows + 3, rows):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.config.text_config.vocab_size == model.lm_head.out_features == size
        logits = logits_of(model, inputs)
        assert logits.shape[-1] == size
        torch.testing.assert_close(logits[:, :rows], expected, rtol=0, atol=0)
        loss, gradients = loss_and_gradients(model, inputs)
        assert loss.isfinite()
        assert all(gradients[f"model.multi_modal_projector.{name}"].any() for name in fusion_weights(model))


# The class and its names


def test_class_flags_are_those_of_stock_llava():
    names = {name for name in dir(LlavaForConditionalGeneration) if name.startswith("_supports_")}
    names |= {"_can_compile_fullgraph", "supports_gradient_checkpointing", "_tied_weights_keys", "_tp_plan"}
    names |= {"_pp_plan", "input_modalities", "_skip_keys_device_placement", "base_model_prefix", "main_input_name"}
    assert {"_supports_sdpa", "_supports_flex_attn", "_supports_flash_attn", "_supports_attention_backend"} <= names
    for ours, stock in (
        (LlavaSTFForConditionalGeneration, LlavaForConditionalGeneration),
        (LlavaSTFModel, LlavaModel),
    ):
        differing = {name for name in names if not callable(getattr(stock, name, None))}
        differing = {name for name in differing if getattr(ours, name, None) != getattr(stock, name, None)}
        assert differing == set()
    assert LlavaSTFForConditionalGeneration._tied_weights_keys


def test_instance_plans_are_those_of_stock_llava(model):
    stock = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=model.config.vision_config,
            text_config=model.config.text_config,
            image_token_index=model.config.image_token_id,
        )
    )
    for plan in ("_tp_plan", "_pp_plan"):
        assert getattr(model, plan) == getattr(stock, plan)
    assert model._no_split_modules - stock._no_split_modules == {"LlavaSTFMultiModalProjector"}
    assert {"LlamaDecoderLayer", "CLIPEncoderLayer"} <= model._no_split_modules


PARAMETERS = """
lm_head.weight
model.language_model.embed_tokens.weight
model.language_model.layers.*.input_layernorm.weight
model.language_model.layers.*.mlp.down_proj.weight
model.language_model.layers.*.mlp.gate_proj.weight
model.language_model.layers.*.mlp.up_proj.weight
model.language_model.layers.*.post_attention_layernorm.weight
model.language_model.layers.*.self_attn.k_proj.weight
model.language_model.layers.*.self_attn.o_proj.weight
model.language_model.layers.*.self_attn.q_proj.weight
model.language_model.layers.*.self_attn.v_proj.weight
model.language_model.norm.weight
model.multi_modal_projector.block_fusion.linear_1.bias
model.multi_modal_projector.block_fusion.linear_1.weight
model.multi_modal_projector.block_fusion.linear_2.bias
model.multi_modal_projector.block_fusion.linear_2.weight
model.multi_modal_projector.spatial_fusion.linear_1.bias
model.multi_modal_projector.spatial_fusion.linear_1.weight
model.multi_modal_projector.spatial_fusion.linear_2.bias
model.multi_modal_projector.spatial_fusion.linear_2.weight
model.vision_tower.embeddings.class_embedding
model.vision_tower.embeddings.patch_embedding.weight
model.vision_tower.embeddings.position_embedding.weight
model.vision_tower.encoder.layers.*.layer_norm1.bias
model.vision_tower.encoder.layers.*.layer_norm1.weight
model.vision_tower.encoder.layers.*.layer_norm2.bias
model.vision_tower.encoder.layers.*.layer_norm2.weight
model.vision_tower.encoder.layers.*.mlp.fc1.bias
model.vision_tower.encoder.layers.*.mlp.fc1.weight
model.vision_tower.encoder.layers.*.mlp.fc2.bias
model.vision_tower.encoder.layers.*.mlp.fc2.weight
model.vision_tower.encoder.layers.*.self_attn.k_proj.bias
model.vision_tower.encoder.layers.*.self_attn.k_proj.weight
model.vision_tower.encoder.layers.*.self_attn.out_proj.bias
model.vision_tower.encoder.layers.*.self_attn.out_proj.weight
model.vision_tower.encoder.layers.*.self_attn.q_proj.bias
model.vision_tower.encoder.layers.*.self_attn.q_proj.weight
model.vision_tower.encoder.layers.*.self_attn.v_proj.bias
model.vision_tower.encoder.layers.*.self_attn.v_proj.weight
model.vision_tower.post_layernorm.bias
model.vision_tower.post_layernorm.weight
model.vision_tower.pre_layrnorm.bias
model.vision_tower.pre_layrnorm.weight
""".split()


def test_parameter_names_are_an_interface(model, tmp_path):
    assert sorted({re.sub(r"\.\d+\.", ".*.", name) for name in model.state_dict()}) == PARAMETERS
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    # The prefix of a tower in files is transformers' affair (a conversion mapping); ours are written as they are.
    ours = {name for name in model.state_dict() if "vision_tower" not in name}
    assert ours <= saved.keys()
    assert len(saved) == len(model.state_dict())


# The vision side


@torch.no_grad()
def features_of(model, pixel_values):
    return torch.stack(model.get_image_features(pixel_values).pooler_output)


def test_layers_behind_the_last_tap_are_kept_and_never_run(model, inputs, tmp_path):
    folder = convert(GOLDENS / "original", tmp_path / "full", keep_full_tower=True)
    full = LlavaSTFForConditionalGeneration.from_pretrained(folder).eval()
    layers = full.model.vision_tower.encoder.layers
    assert (len(layers), len(model.model.vision_tower.encoder.layers)) == (24, 23)
    layers[-1].register_forward_hook(lambda *_: pytest.fail("the last layer ran"))
    pixels = inputs["pixel_values"]
    assert torch.equal(features_of(full, pixels), features_of(model, pixels))
    assert torch.equal(logits_of(full, inputs), logits_of(model, inputs))
    full.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    last_layer = [name for name in saved if "encoder.layers.23." in name]
    assert len(last_layer) == 16
    assert len(saved) == len(model.state_dict()) + 16


def test_tower_blocks_are_a_module_list(model):
    layers = model.model.vision_tower.encoder.layers
    assert isinstance(layers, nn.ModuleList)
    assert [id(layer) for layer in layers[1:3]] == [id(layers[1]), id(layers[2])]
    assert copy.deepcopy(layers).state_dict().keys() == layers.state_dict().keys()


def test_frames_go_through_the_tower_in_chunks(monkeypatch, model, golden_tensors):
    pixels = golden_tensors["pixel_values.pad"]
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))

    def run():
        model.zero_grad()
        calls.clear()
        tokens = torch.stack(model.get_image_features(pixels).pooler_output)
        tokens.square().sum().backward()
        return tokens.detach(), [weight.grad.clone() for weight in fusion_weights(model).values()], len(calls)

    features, gradients, passes = run()
    assert (len(pixels), passes) == (5, 1)
    vision = model.config.vision_config
    widest = 4 * model.config.grid_size**2 * vision.intermediate_size
    for name, value, expected in (
        ("IMAGES_PER_PASS", 2, 3),
        ("CPU_BYTES_PER_PASS", 3 * widest - 1, 3),
        ("CPU_BYTES_PER_PASS", 1, 5),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[LlavaSTFModel.__module__], name, value)
            chunked_features, chunked_gradients, passes = run()
            assert passes == expected
            torch.testing.assert_close(chunked_features, features, **SAME)
            outputs = model.get_image_features(pixels, output_hidden_states=True)
            assert {len(state) for state in outputs.hidden_states} == {len(outputs.last_hidden_state)} == {5}
            torch.testing.assert_close(chunked_gradients, gradients, rtol=1e-4, atol=1e-3)


def test_videos_of_frames_are_images_in_a_row(model, inputs):
    frames = inputs["pixel_values"]
    assert torch.equal(logits_of(model, inputs | {"pixel_values": frames[None]}), logits_of(model, inputs))
    frames = torch.cat([frames, -frames])
    for videos in (2, 3):
        assert torch.equal(features_of(model, frames.unflatten(0, (videos, -1))), features_of(model, frames))


# A reference written from the paper alone


def naive_linear(layer, vector):
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [
        sum(w * x for w, x in zip(row, vector, strict=True)) + offset for row, offset in zip(weight, bias, strict=True)
    ]


def naive_mlp(module, vector):
    hidden = [x * 0.5 * (1 + math.erf(x / 2**0.5)) for x in naive_linear(module.linear_1, vector)]
    return naive_linear(module.linear_2, hidden)


def naive_concatenation(hidden_states, taps, image):
    """Per patch the channels of all taps, in their order, without the class token."""
    patches = []
    for patch in range(1, hidden_states[0].shape[1]):
        vector = []
        for tap in taps:
            vector += hidden_states[tap][image, patch].tolist()
        patches.append(vector)
    return patches


def naive_windows(patches, side, window):
    """Windows in raster order; in a window, per channel, its rows and columns."""
    tokens = []
    for top in range(0, side, window):
        for left in range(0, side, window):
            token = []
            for channel in range(len(patches[0])):
                for dy in range(window):
                    for dx in range(window):
                        token.append(patches[(top + dy) * side + left + dx][channel])
            tokens.append(token)
    return tokens


def naive_features(projector, hidden_states, taps, side, window, image):
    patches = [naive_mlp(projector.block_fusion, patch) for patch in naive_concatenation(hidden_states, taps, image)]
    return [naive_mlp(projector.spatial_fusion, token) for token in naive_windows(patches, side, window)]


def test_naive_reference_is_the_originals(model, golden_tensors):
    for patches, split in zip(golden_tensors["vision.crosslayer"], golden_tensors["vision.split"], strict=True):
        assert torch.equal(torch.tensor(naive_windows(patches.tolist(), side=4, window=2)), split)
    pixels = golden_tensors["pixel_values.pad"]
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    taps = [23, 21, 18, 15, 12, 9, 6, 3]
    concatenated = torch.tensor(naive_concatenation(states, taps, image=0))
    torch.testing.assert_close(concatenated, golden_tensors["vision.concat8"][0], rtol=0, atol=1e-4)
    features = torch.tensor(naive_features(model.model.multi_modal_projector, states, taps, side=4, window=2, image=0))
    torch.testing.assert_close(features, golden_tensors["vision.image_features"][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("window", "tokens"), [(1, 36), (2, 9), (3, 4), (6, 1)])
def test_fusion_equals_the_naive_reference(window, tokens):
    model = second_model(fusion_window=window).double()
    assert model.config.tokens_per_image == model.config.image_seq_length == tokens
    pixels = second_inputs(model.config)["pixel_values"][:2].double()
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    for image, features in enumerate(features_of(model, pixels)):
        naive = naive_features(model.model.multi_modal_projector, states, [4, 1, 3, 2], 6, window, image)
        expected = torch.tensor(naive, dtype=torch.double)
        assert expected.std() > 0.1  # large enough for the tolerance to mean something
        assert features.shape == expected.shape == (tokens, 96)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-9)
