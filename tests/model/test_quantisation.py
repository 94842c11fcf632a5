"""Quantising the language model alone, by every config of transformers, unless the user names modules himself."""

import copy
import re

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    FPQuantConfig,
    QuantoConfig,
    TorchAoConfig,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from conversion.checkpoints.folders import save_checkpoint
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration
from modeling_llava_stf.__main__ import _load
from modeling_llava_stf.modeling_llava_stf import (
    FP_QUANT_DEFAULT,
    NOT_QUANTISED,
    NOT_QUANTISED_PATTERNS,
    SKIP_FIELDS,
    _language_model_only,
)


def torchao(name):
    """Imported late: to import torchao takes seconds and prints warnings."""
    import torchao.quantization

    return TorchAoConfig(getattr(torchao.quantization, name)())


DOORS = {
    "bitsandbytes": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes, as a dictionary": lambda: {"load_in_8bit": True, "quant_method": "bitsandbytes"},
    "bitsandbytes, 4 bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao, int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao, int8 dynamic": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao, fp8": lambda: torchao("Float8WeightOnlyConfig"),
}


@pytest.fixture(params=DOORS)
def door(request):
    available = is_torchao_available() if request.param.startswith("torchao") else is_bitsandbytes_available()
    if not available:
        pytest.skip("not installed")
    return DOORS[request.param]()


def quantised(model):
    """Names of the linear layers whose weight is of another class, or of whole numbers."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (type(module.weight.data) is not torch.Tensor or not module.weight.dtype.is_floating_point)
    }


def language_layers(model):
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name and "language_model" in name
    }


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModel])
def test_by_default_only_the_language_model_is_quantised(door, auto_class, checkpoint):
    before = copy.deepcopy(door)
    model = auto_class.from_pretrained(checkpoint, dtype=torch.float16, quantization_config=door)
    assert quantised(model) == language_layers(model) != set()
    assert {w.dtype for n, w in model.named_parameters() if "vision_tower" in n or "projector" in n} == {torch.float16}
    assert vars_of(door) == vars_of(before)  # the user's object is his


def vars_of(config):
    return config if isinstance(config, dict) else config.to_dict()


def test_saved_and_loaded_again_it_gives_the_same_logits(door, checkpoint, processor, picture, tmp_path):
    inputs = processor(images=picture("wide.png"), text="<image> What?", return_tensors="pt").to(torch.bfloat16)
    model = LlavaSTFForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=door
    ).eval()
    inputs = inputs.to(model.device)  # bitsandbytes puts it on a GPU where there is one
    model.save_pretrained(tmp_path)
    again = LlavaSTFForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert quantised(again) == quantised(model) == language_layers(model)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_user_who_names_modules_gets_exactly_those(checkpoint):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    model = LlavaSTFForConditionalGeneration.from_pretrained(checkpoint, quantization_config=config)
    assert any("vision_tower" in name for name in quantised(model))
    assert any("multi_modal_projector" in name for name in quantised(model))


@pytest.mark.parametrize("kind", sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
def test_every_config_with_a_field_for_it(kind):
    try:
        config = AUTO_QUANTIZATION_CONFIG_MAPPING[kind]()
    except (TypeError, ValueError, ImportError):
        pytest.skip("cannot be made without arguments, or without its library")
    for name in [name for name in SKIP_FIELDS if hasattr(config, name)]:
        before = getattr(config, name)
        assert set(NOT_QUANTISED) <= set(getattr(_language_model_only(config), name))
        assert getattr(config, name) == before
        setattr(config, name, ["mine"])
        assert getattr(_language_model_only(config), name) == ["mine"]


def test_fields_of_the_three_front_doors():
    assert _language_model_only(QuantoConfig(weights="int8")).modules_to_not_convert[:3] == NOT_QUANTISED


def test_fp_quant_writes_a_list_where_its_user_gave_none():
    """transformers 5.24. When this fails, `FP_QUANT_DEFAULT` can go."""
    assert FPQuantConfig().modules_to_not_convert == FP_QUANT_DEFAULT


def test_the_names_as_regular_expressions(model):
    """compressed-tensors matches from the beginning of a name, in transformers and in vLLM's own names."""
    patterns = [pattern.removeprefix("re:") for pattern in NOT_QUANTISED_PATTERNS]
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for prefix in ("", "model.", "language_model."):
        matched = {name for name in linear if any(re.match(pattern, prefix + name) for pattern in patterns)}
        assert matched == set(linear) - language_layers(model) != set()


def test_a_quantised_model_is_not_moved(checkpoint, tmp_path, monkeypatch):
    """Libraries refuse that, depending on version; `ask` and `caption` name the device when they load the model."""
    pytest.importorskip("bitsandbytes")
    model = LlavaSTFForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    save_checkpoint(tmp_path, model, checkpoint)
    monkeypatch.setattr(LlavaSTFForConditionalGeneration, "to", lambda *_, **__: pytest.fail("it was moved"))
    assert quantised(_load(str(tmp_path), None)[1]) == language_layers(model)


@pytest.mark.parametrize(
    "part", ["vision_tower.encoder.layers.0.mlp.fc2", "multi_modal_projector.spatial_fusion.linear_2"]
)
def test_features_that_overflow_float16_are_refused(part, model, processor, picture):
    """Weights that float16 can hold, whose results it cannot."""
    inputs = processor(images=picture("wide.png"), text="<image> What?", return_tensors="pt")
    with torch.no_grad():
        model.model.get_submodule(part).weight.fill_(6e4)
        assert model(**inputs).logits.isfinite().all()
        model = model.half()
        inputs = inputs.to(torch.float16)
        with pytest.raises(
            ValueError, match="not finite in float16, whose largest number is 65504. Load the model with"
        ):
            model(**inputs)
        with pytest.raises(ValueError, match="not finite in float16"):
            model.generate(**inputs, max_new_tokens=2)
        model.to(torch.bfloat16)(**inputs.to(torch.bfloat16))


QUANTISED_IN_4_BIT = {
    "one scale a block": {"bnb_4bit_use_double_quant": False},
    "scales quantised, too": {"bnb_4bit_use_double_quant": True},
}


@pytest.fixture(scope="module")
def wide(checkpoint, tmp_path_factory):
    """A checkpoint with widths that bitsandbytes' CPU kernel takes: inputs in multiples of 64, outputs of 32."""
    config = LlavaSTFConfig.from_pretrained(checkpoint)
    config.text_config.update({"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4})
    config.text_config.update({"num_key_value_heads": 4, "head_dim": 32})
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide")
    save_checkpoint(folder, LlavaSTFForConditionalGeneration(config).to(torch.bfloat16), checkpoint)
    return folder


@torch.no_grad()
def logits(model, processor, picture):
    inputs = processor(images=picture("wide.png"), text="<image> What?", return_tensors="pt")
    return model.eval()(**inputs.to(model.device, model.dtype)).logits


@pytest.mark.parametrize("scales", QUANTISED_IN_4_BIT)
def test_saving_after_the_first_answer(scales, wide, processor, picture, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **QUANTISED_IN_4_BIT[scales])
    model = LlavaSTFForConditionalGeneration.from_pretrained(wide, dtype=torch.bfloat16, quantization_config=config)
    before = logits(model, processor, picture)
    model.save_pretrained(tmp_path)
    again = LlavaSTFForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    for found in (model, again):
        torch.testing.assert_close(logits(found, processor, picture), before, rtol=0, atol=0.02)


def test_bitsandbytes_does_not_restore_the_scales():
    """bitsandbytes 0.50.2. When this fails, `_unpack_4_bit` need not transpose them."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.LinearNF4(128, 256, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False)
    layer = layer.to(torch.bfloat16).to("cpu").eval()
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16: nothing is packed")
    given = torch.randn(1, 5, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        before = layer(given)
        layer.state_dict()
        assert not torch.allclose(layer(given), before, atol=0.02)


def test_lora_trains_after_an_answer(wide, processor, picture):
    """On such a CPU the gradients ended at the first layer in 4 bit."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = LlavaSTFForConditionalGeneration.from_pretrained(wide, dtype=torch.bfloat16, quantization_config=config)
    lora = peft.LoraConfig(target_modules=r".*language_model.*\.(q_proj|down_proj)", init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    inputs = processor(images=picture("wide.png"), text="<image> What?", return_tensors="pt")
    inputs = inputs.to(model.device, torch.bfloat16)
    gradients = []
    for answers_first in (False, True):
        if answers_first:
            logits(adapted, processor, picture)
        adapted.train().zero_grad()
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: w.grad for name, w in adapted.named_parameters() if w.requires_grad})
    assert all(gradient is not None for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_folder_is_saved_again(bits, wide, processor, picture, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = LlavaSTFForConditionalGeneration.from_pretrained(wide, dtype=torch.bfloat16, quantization_config=config)
    before = logits(model, processor, picture)
    for number in range(3):
        model.save_pretrained(tmp_path / str(number))
        model = LlavaSTFForConditionalGeneration.from_pretrained(tmp_path / str(number), dtype="auto")
        assert quantised(model) == language_layers(model)
        assert torch.equal(logits(model, processor, picture), before)


def test_transformers_does_not_save_a_quantised_folder_again(wide, tmp_path):
    """transformers 5.24. When this fails, `LlavaSTFPreTrainedModel.save_pretrained` can go."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = LlavaSTFForConditionalGeneration.from_pretrained(wide, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(tmp_path / "once")
    model = LlavaSTFForConditionalGeneration.from_pretrained(tmp_path / "once", dtype="auto")
    with pytest.raises(NotImplementedError):
        model.save_pretrained(tmp_path / "twice", save_original_format=True)
