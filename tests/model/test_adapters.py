"""PEFT adapters on the model: by PEFT and by transformers alone, the same weights or an error."""

import json

import pytest
import torch
import transformers
from conftest import GOLDENS
from packaging import version
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file as safetensors_of
from safetensors.torch import save_file

from conversion import convert
from modeling_llava_stf import LlavaSTFForConditionalGeneration

LANGUAGE_MODEL = r".*language_model.*\.(q|v|down)_proj"
LOADS_MODULES = version.parse(transformers.__version__) >= version.parse("5.23")


@pytest.fixture
def save_adapter(checkpoint, tmp_path):
    """Makes an adapter that changes much, and saves it; gives its folder and its logits."""

    def save(inputs, **settings):
        torch.manual_seed(0)
        base = LlavaSTFForConditionalGeneration.from_pretrained(checkpoint)
        config = LoraConfig(r=4, target_modules=LANGUAGE_MODEL, init_lora_weights=False, **settings)
        adapted = get_peft_model(base, config).eval()
        for name, weight in adapted.named_parameters():
            if "magnitude" in name or "modules_to_save" in name:
                weight.data *= 1.5
        adapted.save_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            return tmp_path / "adapter", adapted(**inputs).logits

    return save


@pytest.fixture
def inputs(processor, picture):
    return processor(images=picture("wide.png"), text="<image> What?", return_tensors="pt")


@pytest.mark.parametrize(
    "settings, loads",
    [
        ({}, True),
        ({"use_rslora": True}, True),
        ({"modules_to_save": ["multi_modal_projector"]}, LOADS_MODULES),
        ({"use_dora": True}, False),
        ({"use_dora": True, "modules_to_save": ["multi_modal_projector"]}, False),
    ],
)
def test_transformers_loads_an_adapter_whole_or_refuses_it(settings, loads, save_adapter, inputs, checkpoint):
    """The rows without a True are faults of transformers: where one passes, `load_adapter` may lose its check."""
    folder, expected = save_adapter(inputs, **settings)
    base = LlavaSTFForConditionalGeneration.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, folder).eval()(**inputs).logits, expected)
        for load in (
            lambda: LlavaSTFForConditionalGeneration.from_pretrained(folder),
            lambda: onto(LlavaSTFForConditionalGeneration.from_pretrained(checkpoint), folder),
        ):
            if loads:
                torch.testing.assert_close(load().eval()(**inputs).logits, expected, rtol=0, atol=1e-5)
            else:
                with pytest.raises(ValueError, match=r"weights would be lost.*Load it with PEFT"):
                    load()


def onto(model, adapter):
    model.load_adapter(adapter, adapter_name="mine")
    return model


def test_an_adapter_that_lacks_weights_is_refused(save_adapter, inputs, checkpoint):
    folder, _ = save_adapter(inputs)
    file = folder / "adapter_model.safetensors"
    weights = safetensors_of(file)
    save_file(dict(list(weights.items())[1:]), file)
    with pytest.raises(ValueError, match="1 weights would be lost"):
        LlavaSTFForConditionalGeneration.from_pretrained(folder)


def test_a_converted_adapter_loads_with_auto_peft_model(tmp_path, inputs):
    kept = convert(GOLDENS / "lora", tmp_path / "kept", base=GOLDENS / "base", keep_adapter=True)
    model = AutoPeftModel.from_pretrained(kept).eval()
    expected = PeftModel.from_pretrained(LlavaSTFForConditionalGeneration.from_pretrained(kept / "base"), kept).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    assert json.loads((kept / "adapter_config.json").read_text())["auto_mapping"]["parent_library"] == "transformers"
