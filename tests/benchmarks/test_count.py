"""The count of FLOPs, weights and cache is that of PyTorch, for small and for full-width models."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from benchmarks import count, training_needs
from benchmarks.__main__ import main as benchmarks_main
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration
from modeling_llava_stf.modeling_llava_stf import CACHE

ROOT = Path(__file__).resolve().parents[2]
TEXT = 50


@pytest.fixture(params=["golden", *count.NAMED])
def config(request, model):
    if request.param == "golden":
        return model.config
    config = count.NAMED[request.param]()
    config.text_config.num_hidden_layers = 2
    return config


def on_meta(config):
    """A model without numbers: shapes are enough to count."""
    kind = LlavaSTFForConditionalGeneration if isinstance(config, LlavaSTFConfig) else LlavaForConditionalGeneration
    with torch.device("meta"):
        return kind(config).eval()


def counted(module, *args, **kwargs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*args, **kwargs)
    return counter.get_total_flops()


def test_vision_side(config):
    parts = {part.name: part for part in count.vision_parts(config)}
    model = on_meta(config).model
    size = config.vision_config.image_size
    pixels = torch.empty(1, 3, size, size, device="meta")
    assert counted(model.vision_tower, pixels) == parts["vision tower"].flops
    patches = (size // config.vision_config.patch_size) ** 2
    layers = len(config.taps) if isinstance(config, LlavaSTFConfig) else 1
    features = torch.empty(1, patches, layers * config.vision_config.hidden_size, device="meta")
    connector = sum(part.flops for name, part in parts.items() if name != "vision tower")
    assert counted(model.multi_modal_projector, features) == connector


@pytest.mark.parametrize("tokens", [144, 36, 9, 1])
def test_vision_side_of_a_budget(tokens):
    config = count.with_budget(count.NAMED["stf-7b"](), tokens)
    projector = on_meta(config).model.multi_modal_projector
    features = torch.empty(1, 576, 8 * 1024, device="meta")
    assert counted(projector, features, [tokens]) == sum(part.flops for part in count.vision_parts(config)[1:])
    assert count.image_tokens(config) == tokens and count.image_tokens(count.NAMED["stf-7b"]()) == 144


def test_language_model(config):
    network = on_meta(config)
    settings = config.text_config
    length = count.image_tokens(config) + TEXT
    embeddings = torch.empty(1, length, settings.hidden_size, device="meta")
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")  # one that is not looked into
    found = counted(network.model.language_model, inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
    found += counted(network.lm_head, embeddings[:, -1:])
    # PyTorch counts the whole square of attention scores, of which a causal model needs half.
    half_square = 2 * length**2 * settings.hidden_size * settings.num_hidden_layers
    # Before transformers 5.23 the angles of the positions are a small matrix product, too.
    assert found == pytest.approx(count.prefill(config, TEXT).flops + half_square, rel=1e-4)


def test_weights(config):
    network = on_meta(config)
    matrices = sum(
        weight.numel() for name, weight in network.named_parameters() if weight.ndim > 1 and "position" not in name
    )
    assert count.weight_bytes(config) == count.BYTES * matrices


def test_cache(model, processor, picture):
    inputs = processor(images=picture("wide.png"), text="<image> What is it?", return_tensors="pt")
    cache = model(**inputs, use_cache=True)[CACHE]
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    text = inputs["input_ids"].shape[1] - model.config.tokens_per_image
    assert count.cache_bytes(model.config, text) == count.BYTES * numbers


def test_published_counts_of_the_7b():
    """The GFLOP of the method's description: 8617 against 2971 to the first token, a cache 3.06 times smaller."""
    stock, stf = count.NAMED["llava-1.5-7b"](), count.NAMED["stf-7b"]()
    total = [round(sum(part.flops for part in count.first_token(config, 50)) / 1e9) for config in (stock, stf)]
    assert total == [8617, 2971]
    assert round(count.cache_bytes(stock, 66) / count.cache_bytes(stf, 66), 2) == 3.06


def test_command(checkpoint):
    command = [sys.executable, "-m", "benchmarks", "count", "stf-7b", str(checkpoint)]
    printed = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    lines = printed.stdout.splitlines()
    assert lines[2] == "| tokens of an image | 144 | 4 |"
    assert len({line.count("|") for line in lines}) == 1


def test_command_of_budgets(monkeypatch, capsys):
    command = ["count", "llava-1.5-7b", "stf-7b", "--max-soft-tokens"]
    monkeypatch.setattr(sys, "argv", [*command, "36", "1"])
    count.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | llava-1.5-7b | stf-7b, 36 tokens | stf-7b, 1 tokens |"
    assert lines[2] == "| tokens of an image | 576 | 36 | 1 |"
    monkeypatch.setattr(sys, "argv", [*command, "35"])
    with pytest.raises(SystemExit, match=r"35 tokens, expected one of \[144, 36, 16, 9, 4, 1\]"):
        count.main()


def matrices(network, pattern=""):
    return sum(w.numel() for name, w in network.named_parameters() if w.ndim > 1 and re.search(pattern, name))


def test_weights_that_each_recipe_trains():
    config = count.NAMED["stf-7b"]()
    config.text_config.num_hidden_layers = 2
    network = on_meta(config)
    everything = matrices(network) - matrices(network, "position_embedding")
    for name in ("pretrain", "finetune"):
        settings = training_needs.recipe(name)
        trained, frozen, quantised = training_needs.weights(config, settings)
        assert trained == matrices(network, settings["trainable"])
        assert trained + frozen == everything and quantised == 0
    for name in ("finetune_lora", "finetune_qlora"):
        settings = training_needs.recipe(name)
        config_of = LoraConfig(
            r=settings["lora_r"],
            target_modules=settings["lora_target_modules"],
            modules_to_save=settings["lora_modules_to_save"],
        )
        adapted = get_peft_model(on_meta(config), config_of)
        trained, frozen, quantised = training_needs.weights(config, settings)
        assert trained == sum(w.numel() for w in adapted.parameters() if w.requires_grad and w.ndim > 1)
        assert frozen + quantised == everything
        assert quantised == (count.decoder_weights(config) if "qlora" in name else 0)


def test_more_devices_need_less_memory_where_they_share():
    config = count.NAMED["stf-7b"]()
    for way in training_needs.WAYS:
        one, eight = (training_needs.memory(config, way, devices, text=200) for devices in (1, 8))
        assert (eight < one) == bool(way.trained_shared), way.name
    assert training_needs.memory(config, training_needs.WAYS[2], 1, 200) < 24e9  # QLoRA on a card of 24 GB
    assert training_needs.memory(config, training_needs.WAYS[3], 8, 200) > 80e9  # the full model, not shared


def test_budgets_of_models_that_have_none_are_refused():
    named = count.read_all(["llava-1.5-7b", "stf-7b"], [36, 1])
    assert [*named] == ["llava-1.5-7b", "stf-7b, 36 tokens", "stf-7b, 1 tokens"]
    with pytest.raises(SystemExit, match="--max-soft-tokens is for LLaVA-STF, found only llava-1.5-7b, llava-1.5-13b"):
        count.read_all(["llava-1.5-7b", "llava-1.5-13b"], [36])


def test_what_token_budgets_cost():
    config = count.NAMED["stf-7b"]()
    lines = [line.split("|") for line in training_needs.lines(config, 0.4) if line.startswith(("| 144 only", "| `"))]
    tokens, time, memory = ([float(line[column]) for line in lines] for column in (2, 3, 4))
    assert tokens == [144 + 200, round(190 / 4 + 200), 190 + 4 * 200]
    each = [count.training_flops(count.with_budget(config, size), 200, True) for size in (144, 36, 9, 1)]
    assert time == [1.0, round(sum(each) / 4 / each[0], 2), round(sum(each) / each[0], 2)]
    assert memory[0] == memory[1] < memory[2]
    assert not [
        line for line in training_needs.lines(count.NAMED["llava-1.5-7b"](), 0.4) if "tokens of a picture" in line
    ]


# Models that are less usual: other heads, tables, taps and towers

LLAMA = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
CLIP |= {"image_size": 56, "patch_size": 14}


def stf(text=LlamaConfig, window=2, **changes):
    tower = CLIPVisionConfig(**CLIP)
    text_config = text(**LLAMA, **changes)
    return LlavaSTFConfig(
        vision_config=tower, text_config=text_config, vision_feature_layer=[3, 1], fusion_window=window
    )


def llava(tower=None, **changes):
    vision_config = tower or CLIPVisionConfig(**CLIP)
    return LlavaConfig(vision_config=vision_config, text_config=LlamaConfig(**LLAMA), **changes)


ODD = {
    "wide heads": lambda: stf(head_dim=32),
    "norms of heads": lambda: stf(Qwen3Config, head_dim=32),
    "biases": lambda: stf(Qwen2Config),
    "tied": lambda: stf(tie_word_embeddings=True),
    "no window": lambda: stf(window=1),
    "class token": lambda: llava(vision_feature_select_strategy="full"),
    "two layers": lambda: llava(vision_feature_layer=[-2, -3]),
}


@pytest.mark.parametrize("name", ODD)
def test_unusual_models(name):
    config = ODD[name]()
    count.refuse_uncounted(config)
    network, text = on_meta(config), config.text_config
    size = config.vision_config.image_size
    pixels = torch.empty(1, 3, size, size, device="meta")
    assert counted(network.model.get_image_features, pixels) == sum(part.flops for part in count.vision_parts(config))
    length = count.image_tokens(config) + TEXT
    embeddings = torch.empty(1, length, text.hidden_size, device="meta")
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
    found = counted(network.model.language_model, inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
    found += counted(network.lm_head, embeddings[:, -1:])
    head = getattr(text, "head_dim", 16)
    half_square = 2 * length**2 * head * text.num_attention_heads * text.num_hidden_layers
    # Before transformers 5.23 the angles of the positions are counted, too; beside so small a model they are not tiny.
    assert found == pytest.approx(count.prefill(config, TEXT).flops + half_square, rel=1e-3)
    kept = 2 * text.num_hidden_layers * text.num_key_value_heads * head
    assert count.cache_bytes(config, 1) - count.cache_bytes(config, 0) == count.BYTES * kept
    linear = r"language_model.*(q|k|v|o|gate|up|down)_proj"
    ends = [sum(w.shape) for name, w in network.named_parameters() if re.search(linear, name) and w.ndim > 1]
    assert training_needs.lora_weights(config, 8) == 8 * sum(ends)


UNCOUNTED = {
    "no gate": (lambda: stf(PhiConfig), "722,688 weights, and 734,976 would be counted: .* a phi, are not"),
    "experts": (lambda: stf(MixtralConfig, num_local_experts=4), "a mixtral, are not those of Llama"),
    "another tower": (
        lambda: llava(SiglipVisionConfig(**CLIP), vision_feature_select_strategy="full"),
        "its vision tower is a siglip_vision_model",
    ),
}


@pytest.mark.parametrize("name", UNCOUNTED)
def test_models_that_are_not_counted_are_refused(name, tmp_path):
    make, reason = UNCOUNTED[name]
    make().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: {re.escape(str(tmp_path))}: .*{reason}"):
        count.read(str(tmp_path))


def test_a_damaged_config_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "count", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        benchmarks_main()
    assert end.value.code == 2 and re.fullmatch("error: [^\n]*not a valid JSON file[^\n]*\n", capsys.readouterr().err)


def test_a_quantised_model_says_how_it_is_counted(tmp_path, capsys):
    config = stf()
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    count.read(str(tmp_path))
    assert "is quantised, and is counted as the 16-bit model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--answer", "0"], ["--text", "-1"], ["--batch", "0"], ["--tflops", "0"], ["--bandwidth", "nan"], ["--mfu", "-1"]],
    ids=" ".join,
)
def test_wrong_numbers_are_refused(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["count", *options])
    with pytest.raises(SystemExit) as end:
        count.main()
    assert end.value.code == 2 and "expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--training", "--text", "500"], "--text does not act with --training"),
        (["--training", "--tflops", "300"], "--tflops does not act with --training"),
        (["--mfu", "0.5"], "--mfu does not act without --training"),
    ],
    ids=str,
)
def test_options_that_do_not_act_are_refused(options, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["count", "stf-7b", *options])
    with pytest.raises(SystemExit) as end:
        count.main()
    assert end.value.code == 2 and reason in capsys.readouterr().err


def test_small_numbers_keep_their_digits(monkeypatch, capsys, tmp_path):
    stf().save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["count", str(tmp_path), "--batch", "1"])
    count.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| GB of weights | 0.0015 |" in lines and not [line for line in lines if line.endswith("| 0.00 |")]
