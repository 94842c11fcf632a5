"""The configuration: defaults of the released model, derived numbers, refusals."""

import pytest
from transformers import CLIPVisionConfig, LlavaConfig

from modeling_llava_stf import LlavaSTFConfig


def test_defaults_are_the_released_model():
    config = LlavaSTFConfig()
    assert config.vision_feature_layer == [23, 21, 18, 15, 12, 9, 6, 3]
    assert (config.grid_size, config.fusion_window, config.tokens_per_image) == (24, 2, 144)
    assert config.image_token_id == config.image_token_index == 32000


@pytest.mark.parametrize(
    ("image_size", "patch_size", "window", "tokens"),
    [(336, 14, 2, 144), (336, 14, 3, 64), (84, 14, 3, 4), (224, 16, 1, 196)],
)
def test_tokens_per_image_are_derived(image_size, patch_size, window, tokens):
    vision = CLIPVisionConfig(image_size=image_size, patch_size=patch_size, num_hidden_layers=24)
    config = LlavaSTFConfig(vision_config=vision, fusion_window=window, image_seq_length=576)
    assert config.tokens_per_image == config.image_seq_length == tokens


def test_negative_taps_become_absolute():
    config = LlavaSTFConfig(vision_feature_layer=[-2, 18, -1, 0])
    assert config.vision_feature_layer == [23, 18, 24, 0]
    assert LlavaSTFConfig(vision_feature_layer=-2).vision_feature_layer == [23]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion_window": 5}, "`fusion_window` is 5.*24 x 24.*divides 24"),
        ({"fusion_window": 0}, "`fusion_window` is 0"),
        ({"vision_feature_layer": [25, 3]}, r"\[25, 3\].*24 layers.*out of range: \[25\]"),
        ({"vision_feature_layer": [-26]}, r"out of range: \[-26\]"),
        ({"vision_feature_layer": []}, "at least one tap"),
        ({"vision_feature_select_strategy": "full"}, "'full', expected 'default'"),
    ],
)
def test_refuses_what_does_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        LlavaSTFConfig(**fields)


def test_odd_grid_is_refused_not_cut():
    vision = CLIPVisionConfig(image_size=70, patch_size=14, num_hidden_layers=24)
    with pytest.raises(ValueError, match="5 x 5 patches"):
        LlavaSTFConfig(vision_config=vision)


def test_refuses_a_plain_llava(tmp_path):
    LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`llava` model, expected `llava_stf`.*python -m conversion"):
        LlavaSTFConfig.from_pretrained(tmp_path)


def test_overrides_at_loading_are_checked(tmp_path):
    LlavaSTFConfig().save_pretrained(tmp_path)
    config = LlavaSTFConfig.from_pretrained(tmp_path, fusion_window=3)
    assert config.tokens_per_image == config.image_seq_length == 64
    with pytest.raises(ValueError, match="`fusion_window` is 5"):
        LlavaSTFConfig.from_pretrained(tmp_path, fusion_window=5)
    config = LlavaSTFConfig.from_pretrained(tmp_path, vision_config={"image_size": 224}, image_seq_length=7)
    assert config.tokens_per_image == config.image_seq_length == 64
    with pytest.raises(ValueError, match="grid of 15 x 15 patches"):
        LlavaSTFConfig.from_pretrained(tmp_path, vision_config={"image_size": 210})


def test_round_trip(tmp_path):
    config = LlavaSTFConfig(fusion_window=3, block_fusion_hidden_size=100, vision_feature_layer=[4, 2])
    config.save_pretrained(tmp_path)
    assert LlavaSTFConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
