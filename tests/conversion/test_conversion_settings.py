"""Settings of the original's files: each is carried over, computed, refused by its name, or named in the notes."""

import json
import math
import re
import shutil

import pytest
import torch
from commands import elsewhere, here
from conftest import GOLDENS
from hub_server import Hub
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from test_conversion import assert_same, edit_config, edited, edited_adapter, tensors
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from conversion import ConversionError, convert, convert_back, settings
from modeling_llava_stf import (
    LlavaSTFConfig,
    LlavaSTFForConditionalGeneration,
    LlavaSTFImageProcessor,
    LlavaSTFProcessor,
)

CLIP, BASE = GOLDENS / "clip", GOLDENS / "base"


def with_settings(tmp_path, name="original", file="config.json", **fields):
    """A copy of a golden folder with other settings; a value of ... removes one."""
    folder = shutil.copytree(GOLDENS / name, tmp_path / name)
    found = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))
    return folder


def refused(message, tmp_path, source, **options):
    """The source is refused with this message, and nothing is left behind."""
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "refused", **{"vision_tower": CLIP, **options})
    assert not list(tmp_path.glob("*refused*"))


# What this model cannot compute


FOREIGN = [
    # The original's prompt and pixels.
    {"mm_use_im_start_end": True},
    {"mm_use_im_patch_token": True},
    {"image_aspect_ratio": "anyres"},
    {"image_aspect_ratio": "anyres_max_9"},
    {"mm_vision_select_feature": "cls_patch"},
    {"mm_patch_merge_type": "spatial_unpad"},
    {"mm_projector_type": "linear"},
    {"mm_projector_type": "mlp3x_gelu"},
    {"mm_resampler_type": "perceiver"},
    {"s2": True},
    # Other language models, by their name ...
    {"model_type": "mistral", "sliding_window": 4096},
    {"model_type": ["llama"]},
    {"model_type": "llava_mistral"},
    {"model_type": "granite"},
    {"model_type": "stablelm"},
    {"model_type": "llava_qwen2"},
    {"model_type": "gemma"},
    {"model_type": "llava_mpt"},
    # ... and by what they compute, under Llama's.
    {"sliding_window": 2},
    {"embedding_multiplier": 12.0},
    {"attention_multiplier": 0.0078125},
    {"logits_scaling": 8.0},
    {"residual_multiplier": 0.22},
    {"partial_rotary_factor": 0.25},
    {"use_parallel_residual": True},
    {"final_logit_softcapping": 30.0},
    {"layer_types": ["sliding_attention", "full_attention"]},
    {"num_local_experts": 8},
    {"tie_word_embeddings": True},
    {"quantization_config": {"quant_method": "gptq"}},
    {"hidden_act": "swishy"},
    {"num_key_value_heads": 3},
]


@pytest.mark.parametrize("fields", FOREIGN, ids=str)
def test_what_this_model_does_not_compute_is_refused_by_its_name(fields, tmp_path):
    refused(f"`{list(fields)[0]}` is ", tmp_path, with_settings(tmp_path, **fields))


@pytest.mark.parametrize("name", ["pretrain", "lora"])
@pytest.mark.parametrize("door", ["the run", "the base"])
def test_runs_on_a_base_are_checked_as_whole_models_are(name, door, tmp_path):
    foreign = {"model_type": "mistral", "sliding_window": 4096}
    run_folder = with_settings(tmp_path, name, **(foreign if door == "the run" else {}))
    base = with_settings(tmp_path, "base", **(foreign if door == "the base" else {}))
    refused("`model_type` is 'mistral'", tmp_path, run_folder, base=base)


@pytest.mark.parametrize(
    "fields", [{"rms_norm_eps": 1e-6}, {"rope_theta": 5e5}, {"hidden_act": "gelu"}, {"num_attention_heads": 2}], ids=str
)
def test_another_base_than_that_of_the_run_is_refused(fields, tmp_path):
    base = with_settings(tmp_path, "base", **fields)
    refused(f"another language model than .*`{list(fields)[0]}`", tmp_path, GOLDENS / "lora", base=base)


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0, 0.0, -1e-5, True, "1e-5"], ids=str)
def test_numbers_of_the_language_model_must_make_sense(name, value, tmp_path):
    refused(f"`{name}` is ", tmp_path, with_settings(tmp_path, **{name: value}))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "linear", "factor": math.nan}, "`factor` is nan"),
        ({"type": "linear", "factor": 0}, "`factor` is 0"),
        ({"type": "linear", "factor": -2.0}, "`factor` is -2.0"),
        ({"type": "linear", "factor": 0.5}, "`factor` is 0.5"),
        ({"type": "linear"}, "needs factor"),
        ({"rope_type": "dynamic", "factor": math.inf}, "`factor` is inf"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 0}, "`beta_fast` is 0"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high_freq_factor"),
        ({"type": "su", "long_factor": [1.0], "short_factor": [1.0]}, "the type is 'su'"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0, 0] * 4}, r"`long_factor\[1\]` is 0"),
        ({"rope_type": "default", "mrope_section": [2, 3, 3]}, "`mrope_section`"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "`partial_rotary_factor`"),
        ("linear", "expected an object"),
    ],
    ids=str,
)
def test_rotary_positions_must_make_sense(scaling, message, tmp_path):
    refused(message, tmp_path, with_settings(tmp_path, rope_scaling=scaling))


def test_rotary_positions_are_said_once(tmp_path):
    new = {"rope_type": "default", "rope_theta": 100.0}
    scaling = {"type": "linear", "factor": 2.0}
    refused(
        "says two things: `rope_scaling`",
        tmp_path,
        with_settings(tmp_path / "a", rope_scaling=scaling, rope_parameters=new),
    )
    refused("says two things: `rope_theta`", tmp_path, with_settings(tmp_path / "b", rope_parameters=new))


@pytest.mark.parametrize("select", [-26, 25, 100, True, "-2", 2.0], ids=str)
def test_a_tap_outside_the_tower_is_refused(select, tmp_path):
    source = with_settings(tmp_path, mm_vision_select_layer=select)
    refused("`mm_vision_select_layer`.*states 0 to 24", tmp_path, source)


@pytest.mark.parametrize(("select", "tap"), [(-1, 24), (-2, 23), (22, 22), (-25, 0)])
def test_a_tap_in_the_tower_is_taken(select, tap, tmp_path):
    out = convert(with_settings(tmp_path, mm_vision_select_layer=select), tmp_path / "out", vision_tower=CLIP)
    assert LlavaSTFConfig.from_pretrained(out).taps[0] == tap


def test_inner_taps_outside_a_short_tower_are_refused(tmp_path):
    clip = with_settings(tmp_path, "clip", num_hidden_layers=12)
    kept = {key: value for key, value in tensors(clip).items() if not re.search(r"layers\.(1[2-9]|2\d)\.", key)}
    save_file(kept, clip / "model.safetensors")
    refused("a vision tower of 12 layers", tmp_path, GOLDENS / "original_no_tower", vision_tower=clip)


@pytest.mark.parametrize("table", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("rows", [400, 430])
def test_tables_of_different_length_are_refused(table, rows, tmp_path):
    def edit(state):
        state[table] = torch.ones(rows, 64)

    refused(f"has {rows} rows, but config.json says `vocab_size` 420", tmp_path, edited(tmp_path, edit))


# What is carried over and computed


def logits_of(folder, images):
    model = LlavaSTFForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = LlavaSTFProcessor.from_pretrained(folder)
    inputs = processor(images=images, text="<image> What is it?", return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 1e-2},
        {"rope_theta": 100.0},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ],
    ids=str,
)
def test_settings_of_the_language_model_act(fields, tmp_path, checkpoint, picture):
    out = convert(with_settings(tmp_path, **fields), tmp_path / "out", vision_tower=CLIP)
    difference = logits_of(out, picture("wide.png")) - logits_of(checkpoint, picture("wide.png"))
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({}, 4096),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, 8192),
        ({"rope_scaling": {"type": "linear", "factor": 1.5}, "max_position_embeddings": 2048}, 3072),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
        ({"rope_scaling": ..., "rope_theta": ..., "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 8192),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, 4096),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}, 16384),
    ],
    ids=str,
)
def test_the_context_is_that_of_the_rotary_positions(fields, context, tmp_path):
    out = convert(with_settings(tmp_path, **fields), tmp_path / "out", vision_tower=CLIP)
    assert LlavaSTFProcessor.from_pretrained(out).tokenizer.model_max_length == context
    length = fields.get("max_position_embeddings", 4096)
    assert LlavaSTFConfig.from_pretrained(out).text_config.max_position_embeddings == length


@pytest.mark.parametrize(("ratio", "padded"), [("pad", True), ("square", False), (None, False), (..., False)], ids=str)
def test_padding_is_that_of_the_original(ratio, padded, tmp_path):
    """Its code pads for `pad` only; a missing setting means resize and crop there."""
    out = convert(with_settings(tmp_path, image_aspect_ratio=ratio), tmp_path / "out", vision_tower=CLIP)
    assert LlavaSTFProcessor.from_pretrained(out).image_processor.do_pad is padded


PICTURE_SETTINGS = [
    {"do_normalize": False},
    {"do_rescale": False},
    {"do_normalize": False, "do_rescale": False},
    {"rescale_factor": 1 / 127.5},
    {"resample": 2},
    {"size": {"shortest_edge": 64}},
    {"size": 64, "crop_size": 56},
    {"size": ...},
    {"do_center_crop": False, "size": {"height": 56, "width": 56}},
    {"image_mean": [0.0, 0.5, 0.5], "image_std": [0.5, 0.25, 1.0]},
    {"do_resize": False},
    {"image_mean": ..., "image_std": ...},
]


@pytest.mark.parametrize("fields", PICTURE_SETTINGS, ids=str)
def test_pixels_are_those_of_the_clip_preprocessor(fields, tmp_path, picture):
    """Compared with CLIP's own processor of the same file, which the original uses."""
    clip = with_settings(tmp_path, "clip", "preprocessor_config.json", **fields)
    source = with_settings(tmp_path, image_aspect_ratio="square")
    ours = LlavaSTFProcessor.from_pretrained(convert(source, tmp_path / "out", vision_tower=clip)).image_processor
    theirs = CLIPImageProcessorPil.from_pretrained(clip)
    pictures = [picture("wide.png"), picture("shapes.png"), Image.new("RGB", (70, 190), (200, 3, 90))]
    pixels = [processor(pictures, return_tensors="pt")["pixel_values"] for processor in (ours, theirs)]
    assert torch.equal(*pixels)
    unchanged = CLIPImageProcessorPil.from_pretrained(CLIP)(pictures, return_tensors="pt")["pixel_values"]
    assert fields == PICTURE_SETTINGS[-1] or not torch.equal(pixels[0], unchanged)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"image_std": [0.0, 0.2, 0.2]}, "`image_std.0.` is 0.0"),
        ({"image_std": [0.2, math.nan, 0.2]}, "`image_std.1.` is nan"),
        ({"image_std": [0.2, 0.2, -0.2]}, "`image_std.2.` is -0.2"),
        ({"image_std": 0.5}, "`image_std` is 0.5"),
        ({"image_mean": [0.2, 0.2, math.inf]}, "`image_mean.2.` is inf"),
        ({"image_mean": [0.5, 0.5]}, "`image_mean` is"),
        ({"rescale_factor": 0}, "`rescale_factor` is 0"),
        ({"rescale_factor": math.nan}, "`rescale_factor` is nan"),
        ({"resample": 9}, "`resample` is 9"),
        ({"do_normalize": "no"}, "`do_normalize` is 'no'"),
        ({"do_rescale": None}, "`do_rescale` is null"),
        ({"resample": None}, "`resample` is null"),
        ({"size": {"shortest_edge": 0}}, "`shortest_edge` is 0"),
        ({"crop_size": {"height": 28, "width": 28}}, "56 x 56 pixels"),
        ({"crop_size": {"height": 56, "width": 28}}, "56 x 56 pixels"),
        ({"crop_size": 336, "size": 336}, "56 x 56 pixels"),
        ({"crop_size": ..., "size": ...}, "56 x 56 pixels"),
        ({"size": {"longest_edge": 56}}, "56 x 56 pixels"),
        ({"size": {"edge": 56}}, "size must have"),
        ({"do_center_crop": False, "do_resize": False}, "56 x 56 pixels"),
        ({"do_center_crop": False, "size": {"height": 28, "width": 56}}, "56 x 56 pixels"),
        ({"image_processor_type": "SiglipImageProcessor"}, "`image_processor_type` is 'SiglipImageProcessor'"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "`image_processor_type` is"),
        # Options of our own image processor
        ({"do_exif_transpose": "no"}, "`do_exif_transpose` is 'no'"),
        ({"alpha_background": "no such colour"}, "`alpha_background`: unknown color specifier: 'no such colour'"),
        ({"alpha_background": [1, 2, 3]}, r"`alpha_background` is \[1, 2, 3\], expected a colour"),
        ({"max_soft_tokens": 3}, r"`max_soft_tokens` is 3, expected one of \[4, 1\]"),
        ({"max_soft_tokens": True}, "`max_soft_tokens` is True"),
        ({"max_soft_tokens": [4]}, r"`max_soft_tokens` is \[4\]"),
    ],
    ids=str,
)
def test_preprocessors_that_do_not_fit_are_refused(fields, word, tmp_path):
    clip = with_settings(tmp_path, "clip", "preprocessor_config.json", **fields)
    refused(word, tmp_path, GOLDENS / "original", vision_tower=clip)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"layer_norm_eps": 0.0}, "`layer_norm_eps` is 0.0"),
        ({"layer_norm_eps": math.nan}, "`layer_norm_eps` is nan"),
        ({"hidden_act": "nogelu"}, "`hidden_act` is 'nogelu'"),
        ({"model_type": "siglip_vision_model"}, "`model_type` is 'siglip_vision_model'"),
        ({"num_channels": 1}, "`num_channels` is 1"),
        ({"image_size": 0}, "`image_size` is 0"),
        ({"patch_size": [14, 14]}, "`patch_size` is"),
        ({"num_hidden_layers": -1}, "`num_hidden_layers` is -1"),
        ({"vision_config": [1]}, "`vision_config` is"),
    ],
    ids=str,
)
def test_towers_that_do_not_fit_are_refused(fields, word, tmp_path):
    refused(word, tmp_path, GOLDENS / "original", vision_tower=with_settings(tmp_path, "clip", **fields))


@pytest.mark.parametrize("depth", [23, 25])
def test_a_tower_of_another_depth_than_its_config_says_is_refused(depth, tmp_path):
    """The first tap is counted from the tower's end."""
    clip = with_settings(tmp_path, "clip", num_hidden_layers=depth)
    for source in ("original", "original_no_tower"):
        refused(f"`num_hidden_layers` is {depth}, .* have 24", tmp_path, GOLDENS / source, vision_tower=clip)


@pytest.mark.parametrize("fields", [{"hidden_act": "gelu"}, {"layer_norm_eps": 0.1}], ids=str)
def test_settings_of_the_tower_act(fields, tmp_path, checkpoint, picture):
    clip = with_settings(tmp_path, "clip", **fields)
    out = convert(GOLDENS / "original", tmp_path / "out", vision_tower=clip)
    difference = logits_of(out, picture("wide.png")) - logits_of(checkpoint, picture("wide.png"))
    assert difference.abs().max() > 1e-3


def test_a_trained_tower_that_is_not_there_is_refused(tmp_path):
    source = with_settings(tmp_path, "original_no_tower", unfreeze_mm_vision_tower=True)
    refused("unfreeze_mm_vision_tower", tmp_path, source)


# What is dropped


def test_unknown_settings_are_named_in_the_notes(tmp_path, capsys):
    source = with_settings(tmp_path, my_setting=1, other={"a": 2})
    clip = with_settings(tmp_path, "clip", "preprocessor_config.json", sharpen=True)
    edit_config(clip, gate=False)
    convert(source, tmp_path / "out", vision_tower=clip)
    notes = capsys.readouterr().out
    for names in ("my_setting, other", "sharpen", "gate"):
        assert f"not carried over, for this package does not know them: {names}\n" in notes
    assert "cuts a prompt at 2048 tokens (tokenizer_model_max_length); here it may have 4096" in notes


def test_it_is_said_whose_tower_is_taken(tmp_path, capsys):
    """The weights of --vision-tower were left without a word, if the source has a tower of its own."""
    for name, note in (("original", "the source's own weights; "), ("original_no_tower", "")):
        convert(GOLDENS / name, tmp_path / "out", vision_tower=CLIP, dry_run=True)
        assert f"- vision tower: {note}{CLIP}" in capsys.readouterr().out


def test_settings_of_the_trainer_make_no_noise(tmp_path, capsys):
    for name in ("original", "original_no_tower"):
        convert(GOLDENS / name, tmp_path / name, vision_tower=CLIP)
    for name in ("pretrain", "lora"):
        convert(GOLDENS / name, tmp_path / name, vision_tower=CLIP, base=BASE)
    assert "not carried over" not in capsys.readouterr().out


def test_a_plain_adapter_of_the_installed_peft_is_known():
    plain = {**LoraConfig().to_dict(), "peft_type": "LORA"}
    assert not [name for name in settings.unknown_settings(plain, settings.ADAPTER) if plain[name]]
    assert not settings.foreign_settings(plain, settings.ADAPTER)


# Plain LLaVAs


def plain_llava(tmp_path, **fields):
    folder = with_settings(tmp_path, "base", **{"model_type": "llava", "mm_vision_tower": str(CLIP), **fields})
    state = load_file(folder / "model.safetensors")
    state |= {"model.mm_projector.0.weight": torch.ones(64, 32), "model.mm_projector.0.bias": torch.ones(64)}
    save_file(state, folder / "model.safetensors")
    return folder


def test_an_initialisation_names_what_it_leaves(tmp_path, capsys):
    source = plain_llava(tmp_path, image_aspect_ratio="anyres", mm_projector_type="linear", mm_vision_select_layer=-3)
    out = convert(source, tmp_path / "out", init_fusion=True)
    notes = capsys.readouterr().out
    for name in ("image_aspect_ratio", "mm_projector_type", "mm_vision_select_layer"):
        assert name in notes
    config = LlavaSTFConfig.from_pretrained(out)
    assert config.taps[0] == 23 and LlavaSTFProcessor.from_pretrained(out).image_processor.do_pad
    edit_config(source, sliding_window=4096)
    refused("`sliding_window` is 4096", tmp_path, source, init_fusion=True)


def test_a_setting_in_both_places_is_the_language_model_s(tmp_path, capsys):
    """Files of transformers 4.37 have a `vocab_size` beside that of the language model, too: both were left."""
    source = plain_llava(tmp_path, vision_config=json.loads((CLIP / "config.json").read_text()))
    text = json.loads((source / "config.json").read_text())
    nested = {"model_type": "llava", "vision_config": text.pop("vision_config"), "rms_norm_eps": 1.0}
    nested |= {"text_config": {**text, "rms_norm_eps": 1e-3}, "vocab_size": 420}
    (source / "config.json").write_text(json.dumps(nested))
    out = convert(source, tmp_path / "out", init_fusion=True, vision_tower=CLIP)
    assert LlavaSTFConfig.from_pretrained(out).text_config.rms_norm_eps == 1e-3
    assert "not taken, with the projector: rms_norm_eps, vision_config, vocab_size" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["model.image_newline", "image_newline"])
@pytest.mark.parametrize("init_fusion", [True, False])
def test_a_llava_1_6_is_called_by_its_name(key, init_fusion, tmp_path):
    source = plain_llava(tmp_path)
    state = load_file(source / "model.safetensors")
    save_file(state | {key: torch.ones(64)}, source / "model.safetensors")
    refused(f"is a LLaVA-1.6 .*{key}.*anyres", tmp_path, source, init_fusion=init_fusion)


def test_llava_next_of_transformers_is_called_by_its_name(tmp_path):
    source = with_settings(tmp_path, "base", model_type="llava_next", text_config={})
    refused("`model_type` is 'llava_next'", tmp_path, source, init_fusion=True)


# Towers


@pytest.mark.parametrize("form", ["tower", "whole"])
def test_towers_that_todays_transformers_saved(form, tmp_path, checkpoint):
    """Alone they have no `vision_model.` in their names; the pixels and the model are the same."""
    vision = CLIPVisionConfig.from_pretrained(CLIP)
    folder = tmp_path / "saved"
    if form == "tower":
        tower = CLIPVisionModel(vision)
        tower.load_state_dict(CLIPVisionModel.from_pretrained(CLIP).state_dict())
        tower.save_pretrained(folder)
    else:
        text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        whole = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text))
        whole.vision_model.load_state_dict(CLIPVisionModel.from_pretrained(CLIP).state_dict())
        whole.save_pretrained(folder)
    CLIPImageProcessorPil.from_pretrained(CLIP).save_pretrained(folder)
    assert form == "whole" or "embeddings.class_embedding" in tensors(folder)
    out = convert(GOLDENS / "original_no_tower", tmp_path / "out", vision_tower=folder)
    assert_same(tensors(out), tensors(checkpoint))
    back = convert_back(out, tmp_path / "back", vision_tower=folder)
    assert_same(tensors(back), tensors(GOLDENS / "original"))


def test_a_folder_without_a_tower_is_refused(tmp_path):
    clip = with_settings(tmp_path, "clip")
    save_file({"text_model.x": torch.ones(1)}, clip / "model.safetensors")
    refused("holds no CLIP vision tower", tmp_path, GOLDENS / "original_no_tower", vision_tower=clip)


# Adapters


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"fan_in_fan_out": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"modules_to_save": ["embed_tokens"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"layer_replication": [[0, 1]]},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["x"]},
        {"peft_type": "IA3"},
        {"use_of_a_newer_kind": True},
    ],
    ids=str,
)
def test_adapters_of_another_kind_are_refused(fields, tmp_path):
    source = with_settings(tmp_path, "lora", "adapter_config.json", **fields)
    for keep_adapter in (False, True):
        refused(f"found {list(fields)[0]} ", tmp_path, source, base=BASE, keep_adapter=keep_adapter)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"r": 0}, "`r` is 0"),
        ({"r": 4.5}, "`r` is 4.5"),
        ({"lora_alpha": math.nan}, "`lora_alpha` is nan"),
        ({"lora_alpha": 0}, "`lora_alpha` is 0"),
        ({"r": ...}, "found no r"),
        ({"r": 8}, "expected .8, 64."),
    ],
    ids=str,
)
def test_numbers_of_an_adapter_must_make_sense(fields, word, tmp_path):
    refused(word, tmp_path, with_settings(tmp_path, "lora", "adapter_config.json", **fields), base=BASE)


def empty(state):
    state.clear()


def one_layer_less(state):
    for key in [key for key in state if ".layers.1." in key]:
        del state[key]


def two_names(state):
    key = next(key for key in state if ".lora_A." in key)
    state[key.replace("lora_A", "lora_A.default")] = state[key] + 1


def of_a_norm(state):
    name = "base_model.model.model.norm.lora_{}.weight"
    state |= {name.format("A"): torch.ones(4, 64), name.format("B"): torch.ones(64, 4)}


@pytest.mark.parametrize("keep_adapter", [False, True])
@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (empty, "holds no LoRA matrices"),
        (one_layer_less, r"has no LoRA matrices for 'model.layers.1\."),
        (two_names, "two matrices A"),
        (of_a_norm, "'model.norm.weight' have the shapes"),
    ],
)
def test_adapters_with_other_weights_than_they_name_are_refused(edit, word, keep_adapter, tmp_path):
    refused(word, tmp_path, edited_adapter(tmp_path, edit), base=BASE, keep_adapter=keep_adapter)


def test_an_adapter_of_some_layers_is_merged_and_kept(tmp_path, picture):
    from peft import PeftModel

    source = edited_adapter(tmp_path, one_layer_less, layers_to_transform=[0])
    merged = convert(source, tmp_path / "merged", base=BASE, vision_tower=CLIP)
    kept = convert(source, tmp_path / "kept", base=BASE, vision_tower=CLIP, keep_adapter=True)
    model = LlavaSTFForConditionalGeneration.from_pretrained(kept / "base")
    adapted = PeftModel.from_pretrained(model, kept)
    assert len([name for name, _ in adapted.named_parameters() if ".lora_A" in name]) == 7
    result = adapted.merge_and_unload().state_dict()
    for name, tensor in tensors(merged).items():
        torch.testing.assert_close(result[name], tensor, rtol=0, atol=1e-5)


def test_rank_stabilised_scale(tmp_path):
    """alpha / sqrt(r): with r = 4 that is twice the plain scale."""
    plain = with_settings(tmp_path / "a", "lora", "adapter_config.json", lora_alpha=64)
    stabilised = with_settings(tmp_path / "b", "lora", "adapter_config.json", use_rslora=True)
    results = [
        tensors(convert(source, tmp_path / f"out{index}", base=BASE, vision_tower=CLIP))
        for index, source in enumerate((plain, stabilised))
    ]
    assert_same(*results)


# Revisions


def test_revisions_of_base_and_tower(tmp_path, checkpoints):
    """The commit that is asked for is taken, recorded and printed; a later one has other weights."""
    with Hub() as hub:
        commits = {}
        for name in ("base", "clip"):
            commits[name] = hub.add(f"some/{name}", GOLDENS / name)
            later = with_settings(tmp_path, name)
            save_file({key: value + 1 for key, value in tensors(later).items()}, later / "model.safetensors")
            hub.add("some/later", later)
            files = hub.repositories["some/later"].find("main").files
            hub.repositories[f"some/{name}"].commit("refs/heads/main", "later", files)
        names = ["--base", "some/base", "--vision-tower", "some/clip"]
        pins = ["--base-revision", commits["base"], "--vision-tower-revision", commits["clip"]]
        recorded = {"base_model_name_or_path": "some/base", "revision": commits["base"]}
        source = with_settings(tmp_path, "lora", "adapter_config.json", **recorded)
        commands = (
            [GOLDENS / "lora", tmp_path / "out", *names, *pins],
            [GOLDENS / "lora", tmp_path / "later", *names],
            [source, tmp_path / "kept", *names, *pins[2:], "--keep-adapter"],
        )
        results = elsewhere("conversion", commands, hub.environment(tmp_path / "cache", token=""))
    for result in results:
        assert result.returncode == 0, result.stderr
    assert f"base: commit {commits['base']}\n" in results[0].stdout
    assert f"vision tower: commit {commits['clip']}\n" in results[0].stdout
    assert_same(tensors(tmp_path / "out"), tensors(checkpoints("lora")))
    key = "model.language_model.norm.weight"
    assert torch.equal(tensors(tmp_path / "later")[key], tensors(tmp_path / "out")[key] + 1)

    # An adapter that records the revision of its base is put on that one.
    assert torch.equal(tensors(tmp_path / "kept" / "base")[key], tensors(tmp_path / "out")[key])
    assert json.loads((tmp_path / "kept" / "adapter_config.json").read_text())["revision"] == commits["base"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"revision": "v1"}, "has no revision 'v1'"),
        ({"vision_tower_revision": "v1"}, "has no revision 'v1'"),
        ({"tokenizer": GOLDENS / "original", "tokenizer_revision": "v1"}, "has no revision 'v1'"),
        ({"base_revision": "v1"}, "without --base"),
        ({"tokenizer_revision": "v1"}, "without --tokenizer"),
    ],
    ids=str,
)
def test_a_revision_that_cannot_act_is_refused(options, word, tmp_path):
    refused(word, tmp_path, GOLDENS / "original", **options)


# The way back


def ours(tmp_path, checkpoint, **fields):
    folder = shutil.copytree(checkpoint, tmp_path / "ours")
    edit_config(folder, **fields)
    return folder


def back_refused(message, tmp_path, folder, **options):
    for dry_run in (True, False):
        with pytest.raises(ConversionError, match=message):
            convert_back(folder, tmp_path / "back", **{"vision_tower": CLIP, "dry_run": dry_run, **options})
    assert not [path for path in tmp_path.iterdir() if "back" in path.name]


@pytest.mark.parametrize("name", ["original", "original_no_tower", "pretrain", "lora"])
def test_every_run_goes_there_and_back_and_there(name, tmp_path, checkpoints):
    folder = checkpoints(name)
    back = convert_back(folder, tmp_path / "back", vision_tower=CLIP, tokenizer=BASE, verify=True)
    assert json.loads((back / "config.json").read_text()) == json.loads((GOLDENS / name / "config.json").read_text())
    assert_same(tensors(convert(back, tmp_path / "again", vision_tower=CLIP)), tensors(folder))
    if name.startswith("original"):
        assert_same(tensors(back), tensors(GOLDENS / "original"))


def edit_weights(folder, edit):
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop(NORM), f"no weight for '{NORM}'"),
        (lambda state: state.update({NORM: torch.ones(63)}), r"shape \(63,\), expected \(64,\)"),
        (lambda state: state.update({"model.extra": torch.ones(1)}), "'model.extra', for which"),
        (lambda state: state.update({NORM: torch.ones(64, dtype=torch.int8)}), "is torch.int8"),
        (lambda state: state.update({"lm_head.weight": torch.ones(400, 64)}), "'lm_head.weight' has the shape"),
        (lambda state: state.pop("lm_head.weight"), "no weight for 'lm_head.weight'"),
    ],
)
def test_way_back_checks_the_weights(edit, message, tmp_path, checkpoint):
    folder = ours(tmp_path, checkpoint)
    edit_weights(folder, edit)
    back_refused(message, tmp_path, folder)


def test_way_back_refuses_nan(tmp_path, checkpoint):
    folder = ours(tmp_path, checkpoint)
    edit_weights(folder, lambda state: state.update({NORM: torch.full((64,), torch.nan)}))
    with pytest.raises(ConversionError, match="'model.norm.weight' has NaN"):
        convert_back(folder, tmp_path / "back", vision_tower=CLIP)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 432}, "says `vocab_size` 432, but .* has 421 rows"),
        ({"vocab_size": -1}, "`vocab_size` is -1"),
        ({"vocab_size": "420"}, "`vocab_size` is '420'"),
        ({"model_type": "llava_mpt"}, "`model_type` is 'llava_mpt'"),
    ],
    ids=str,
)
def test_way_back_checks_the_kept_config(fields, message, tmp_path, checkpoint):
    folder = ours(tmp_path, checkpoint)
    file = folder / "original_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    back_refused(message, tmp_path, folder)


@pytest.mark.parametrize("resize", [424, 422])
def test_way_back_refuses_a_grown_vocabulary(resize, tmp_path, checkpoint, model):
    folder = ours(tmp_path, checkpoint)
    model.resize_token_embeddings(resize)
    model.save_pretrained(folder)
    back_refused(f"tables have {resize} rows, the original's 420, .*nothing was cut", tmp_path, folder)


def test_way_back_refuses_tokens_in_padded_rows(tmp_path):
    padded = convert(GOLDENS / "original", tmp_path / "padded", pad_vocabulary=64)
    assert_same(tensors(convert_back(padded, tmp_path / "good", vision_tower=CLIP)), tensors(GOLDENS / "original"))
    processor = LlavaSTFProcessor.from_pretrained(padded)
    processor.tokenizer.add_tokens(["<mine>", "<yours>"])
    processor.save_pretrained(padded)
    back_refused("more than <image> and padding: <mine>, <yours>", tmp_path, padded)


def test_way_back_carries_what_changed_since(tmp_path, checkpoint):
    folder = ours(tmp_path, checkpoint)
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    config["text_config"] |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(config | {"vision_feature_layer": [22, 21, 18, 15, 12, 9, 6, 3]}))
    processor = LlavaSTFProcessor.from_pretrained(folder)
    processor.image_processor.do_pad = False
    processor.save_pretrained(folder)
    back = convert_back(folder, tmp_path / "back", vision_tower=CLIP, tokenizer=BASE)
    found = json.loads((back / "config.json").read_text())
    kept = json.loads((GOLDENS / "original" / "config.json").read_text())
    changed = {name: found[name] for name in found if found[name] != kept.get(name)}
    assert changed == {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "mm_vision_select_layer": -3,
        "image_aspect_ratio": "square",
    }
    again = LlavaSTFConfig.from_pretrained(convert(back, tmp_path / "again", vision_tower=CLIP))
    assert again.taps[0] == 22 and again.text_config.rope_parameters["factor"] == 2.0


def test_way_back_says_the_dtype_of_the_weights(tmp_path, checkpoint):
    half = convert(GOLDENS / "original", tmp_path / "half", dtype=torch.bfloat16)
    back = convert_back(half, tmp_path / "back", vision_tower=CLIP)
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_way_back_of_a_trained_model_with_scaled_positions(tmp_path, model):
    """Without a kept config: the words of transformers 4, which takes `type` and `factor` and nothing else."""
    model.config.text_config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    model.save_pretrained(tmp_path / "trained")
    back = convert_back(tmp_path / "trained", tmp_path / "back", vision_tower=CLIP)
    found = json.loads((back / "config.json").read_text())
    assert found["rope_scaling"] == {"type": "linear", "factor": 2.0} and found["rope_theta"] == 10000.0
    assert found["tokenizer_model_max_length"] == 8192 and "rope_parameters" not in found
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 4096}
    edit = json.loads((tmp_path / "trained" / "config.json").read_text())
    edit["text_config"]["rope_parameters"] = rope
    (tmp_path / "trained" / "config.json").write_text(json.dumps(edit))
    with pytest.raises(ConversionError, match="no rotary positions of the type 'yarn'"):
        convert_back(tmp_path / "trained", tmp_path / "yarn", vision_tower=CLIP)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"hidden_act": "gelu"}, "another tower: `hidden_act` is gelu there"),
        ("config.json", {"layer_norm_eps": 1e-6}, "another tower: `layer_norm_eps`"),
        ("config.json", {"num_hidden_layers": 25}, "for 'model.vision_tower.*layers.24.* the shape none"),
        ("preprocessor_config.json", {"do_normalize": False}, "The pictures' `do_normalize` is True"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0.5]}, "The pictures' `image_std`"),
    ],
    ids=str,
)
def test_way_back_refuses_a_tower_that_computes_something_else(file, fields, message, tmp_path, checkpoint):
    clip = with_settings(tmp_path, "clip", file, **fields)
    back_refused(message, tmp_path, checkpoint, vision_tower=clip)


def test_way_back_refuses_a_tower_without_its_last_weight(tmp_path, checkpoint):
    clip = with_settings(tmp_path, "clip")
    edit_weights(clip, lambda state: state.pop("vision_model.encoder.layers.23.mlp.fc2.weight"))
    back_refused("layers.23.mlp.fc2.weight' the shape none", tmp_path, checkpoint, vision_tower=clip)


def test_way_back_of_other_kinds_is_refused(tmp_path, checkpoint):
    folder = ours(tmp_path, checkpoint, quantization_config={"quant_method": "bitsandbytes"})
    back_refused("the weights are quantised", tmp_path, folder)
    (folder / "adapter_config.json").write_text("{}")
    back_refused("is an adapter: merge it", tmp_path, folder)
    (tmp_path / "words").mkdir()
    back_refused("has no tokenizer.model", tmp_path, checkpoint, tokenizer=tmp_path / "words")
    back_refused("without --tokenizer", tmp_path, checkpoint, tokenizer_revision="v1")


def test_way_back_dry_run_shows_what_would_be_written(tmp_path, checkpoint):
    named = ("--vision-tower", CLIP, "--tokenizer", BASE)
    result = here("conversion", checkpoint, tmp_path / "back", "--to-original", *named, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "would write config.json, tokenizer.model, tokenizer_config.json, special_tokens_map.json\n" in result.stdout
    assert "would write model.safetensors: " in result.stdout and "420 tensors" in result.stdout
    assert not list(tmp_path.iterdir())


# Files of released models


def test_settings_of_released_models_make_no_noise(tmp_path, capsys):
    """Keys of the configs of LLaVA-1.5 (7B and 13B) that no golden has, and an old CLIP preprocessor."""
    trainer = {"freeze_mm_vision_resampler": False, "tune_mm_vision_resampler": False, "mm_resampler_type": None}
    extra = {"image_grid_pinpoints": None, "pretrain_mm_mlp_adapter": "mm_projector.bin", "max_length": 4096}
    source = with_settings(tmp_path, rope_theta=..., unfreeze_mm_vision_tower=False, **trainer, **extra)
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "image_processor_type": "CLIPFeatureExtractor"}
    clip = with_settings(tmp_path, "clip", "preprocessor_config.json", size=56, crop_size=56, **old)
    convert(source, tmp_path / "out", vision_tower=clip)
    assert "not carried over" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", [{"seed": -1}, {"seed": 2**64}, {"pad_vocabulary": 0}, {"pad_vocabulary": 10**12}], ids=str
)
def test_numbers_of_the_command_are_bounded(option, tmp_path):
    name = list(option)[0].replace("_", "-")
    refused(f"--{name} is .*, expected a number from", tmp_path, BASE, init_fusion=True, **option)


def test_an_adapter_that_leaves_modules_out_is_plain(tmp_path):
    """PEFT 0.14 and newer can keep LoRA out of the vision tower by this setting; the matrices say what was adapted."""
    lora = with_settings(tmp_path, "lora", "adapter_config.json", exclude_modules=["vision_tower"])
    merged = convert(lora, tmp_path / "merged", base=BASE, vision_tower=CLIP)
    assert_same(tensors(merged), tensors(convert(GOLDENS / "lora", tmp_path / "plain", base=BASE, vision_tower=CLIP)))
    kept = convert(lora, tmp_path / "kept", base=BASE, vision_tower=CLIP, keep_adapter=True)
    assert json.loads((kept / "adapter_config.json").read_text())["exclude_modules"] is None


def test_way_back_refuses_another_activation(tmp_path, checkpoint):
    folder = ours(tmp_path, checkpoint)
    edit_config(folder, projector_hidden_act="relu")
    back_refused("`projector_hidden_act` is 'relu', expected 'gelu'", tmp_path, folder)


def test_way_back_drops_a_padding_token_that_the_conversion_added(tmp_path):
    """As with the tokenizer of llava-hf, whose `<pad>` is behind the tables of the original."""
    source = with_settings(tmp_path, file="tokenizer_config.json", pad_token="<pad>")
    out = convert(source, tmp_path / "out", vision_tower=CLIP)
    assert LlavaSTFConfig.from_pretrained(out).pad_token_id == 420
    assert_same(tensors(convert_back(out, tmp_path / "back", vision_tower=CLIP)), tensors(GOLDENS / "original"))


# What our own image processor saves


OUR_OPTIONS = {"alpha_background": "#7a7468", "do_exif_transpose": False, "max_soft_tokens": 1}


@pytest.fixture
def clip_of_ours(tmp_path):
    """A CLIP folder whose preprocessor is our own image processor's, or a part of our processor's file."""

    def make(whole_processor=False, **options):
        clip = shutil.copytree(CLIP, tmp_path / "clip")
        processor = LlavaSTFImageProcessor.from_pretrained(CLIP, **options)
        processor.save_pretrained(clip)
        if whole_processor:
            part = json.loads((clip / "preprocessor_config.json").read_text())
            (clip / "preprocessor_config.json").unlink()
            (clip / "processor_config.json").write_text(json.dumps({"fusion_window": 2, "image_processor": part}))
        return clip

    return make


@pytest.mark.parametrize("whole_processor", [False, True])
@pytest.mark.parametrize("options", [{}, OUR_OPTIONS], ids=["defaults", "set"])
def test_options_of_our_image_processor_are_carried(options, whole_processor, clip_of_ours, tmp_path, capsys):
    out = convert(GOLDENS / "original", tmp_path / "out", vision_tower=clip_of_ours(whole_processor, **options))
    assert "not carried over" not in capsys.readouterr().out
    found = LlavaSTFProcessor.from_pretrained(out).image_processor
    assert found.do_exif_transpose is options.get("do_exif_transpose", True)
    assert (found.alpha_background, found.max_soft_tokens) == (
        options.get("alpha_background"),
        options.get("max_soft_tokens"),
    )


def test_every_option_of_our_image_processor_is_known():
    assert settings.OUR_OPTIONS == OUR_OPTIONS.keys()
    every = LlavaSTFImageProcessor().to_dict() | dict.fromkeys(LlavaSTFImageProcessor.valid_kwargs.__annotations__, 1)
    assert not settings.unknown_settings(every, settings.PREPROCESSOR)


@pytest.mark.parametrize(
    ("options", "lost"),
    [
        ({}, "do_exif_transpose True"),
        ({"do_exif_transpose": False}, None),
        (OUR_OPTIONS, "alpha_background #7a7468, max_soft_tokens 1"),
    ],
    ids=str,
)
def test_way_back_names_the_options_that_the_original_lacks(options, lost, tmp_path, checkpoint, capsys):
    folder = ours(tmp_path, checkpoint)
    LlavaSTFProcessor.from_pretrained(folder, **options).save_pretrained(folder)
    convert_back(folder, tmp_path / "back", vision_tower=CLIP, tokenizer=BASE)
    note = "- not carried over, for the original's code has no such options: "
    assert [line.removeprefix(note) for line in capsys.readouterr().out.splitlines() if line.startswith(note)] == (
        [lost] if lost else []
    )


# What differs in silence


def test_a_rope_that_says_two_things_is_refused(tmp_path):
    scaling = {"type": "linear", "rope_type": "dynamic", "factor": 2.0}
    refused("says two things: the rope's `type`", tmp_path, with_settings(tmp_path, rope_scaling=scaling))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling"),
        ({"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
    ],
    ids=["extended", "in the words of transformers 5"],
)
def test_a_base_with_other_positions_is_refused(fields, word, tmp_path):
    base = with_settings(tmp_path, "base", **fields)
    refused(f"another language model than .*`{word}`", tmp_path, GOLDENS / "pretrain", base=base)


@pytest.mark.parametrize("part", ["fusion modules", "tower", "language model"])
def test_two_weights_of_one_name_are_refused(part, tmp_path):
    """The last one was taken."""
    name = {"fusion modules": "lora", "tower": "clip", "language model": "base"}[part]
    folder = shutil.copytree(GOLDENS / name, tmp_path / name)
    if part == "fusion modules":
        file = folder / "non_lora_trainables.bin"
        state = torch.load(file, weights_only=True)
        torch.save(state | {key.removeprefix("base_model.model."): value + 1 for key, value in state.items()}, file)
        refused("both become 'model.mm_projector", tmp_path, folder, base=BASE)
    elif part == "tower":
        older = {key.removeprefix("vision_model."): value + 1 for key, value in tensors(folder).items()}
        edit_weights(folder, lambda state: state.update(older))
        refused("both become 'vision_model.", tmp_path, GOLDENS / "original_no_tower", vision_tower=folder)
    else:
        norm = {"model.language_model.norm.weight": torch.ones(64)}
        edit_weights(folder, lambda state: state.update(norm))
        refused("both become 'model.norm.weight'", tmp_path, folder, init_fusion=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_not_cast(dtype, tmp_path):
    """Their scales are not in them."""
    source = edited(tmp_path, lambda state: state.update({"model.norm.weight": torch.ones(64).to(dtype)}))
    refused(f"is {dtype}: it is quantised", tmp_path, source, dtype=torch.float16)


def test_weights_without_numbers_are_refused(tmp_path):
    source = edited(tmp_path, lambda state: state.update({"model.norm.weight": torch.ones(64, device="meta")}))
    refused("holds something else than named tensors", tmp_path, source)


def ended(folder):
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_answers_end_as_in_the_original(tmp_path, capsys):
    """In transformers 4.37 generation_config.json counts, config.json where that does not exist."""
    source = with_settings(tmp_path, file="generation_config.json", eos_token_id=[2, 9], repetition_penalty=1.2)
    out = convert(source, tmp_path / "out", vision_tower=CLIP)
    notes = capsys.readouterr().out
    assert "settings of `generate` that are not carried over: repetition_penalty 1.2" in notes
    assert "an answer ends with [2, 9], as" in notes
    assert ended(out) == [2, 9] and LlavaSTFConfig.from_pretrained(out).text_config.eos_token_id == 2
    back = convert_back(out, tmp_path / "back", vision_tower=CLIP)
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == [2, 9]
    edit_config(source, eos_token_id=7, no_repeat_ngram_size=3)
    (source / "generation_config.json").unlink()
    assert ended(convert(source, tmp_path / "without", vision_tower=CLIP)) == 7
    assert "not carried over: no_repeat_ngram_size 3" in capsys.readouterr().out
    (source / "generation_config.json").write_text('{"eos_token_id": 420}')
    refused("generation_config.json: `eos_token_id` is 420", tmp_path, source)


@pytest.mark.parametrize("key", ["encoder.layers.3.mlp.fc1.weight", "pre_layrnorm.bias"])
def test_way_back_compares_the_whole_tower(key, tmp_path, checkpoint):
    """The original's code takes the tower from CLIP, whatever the checkpoint holds."""
    clip = with_settings(tmp_path, "clip")
    edit_weights(clip, lambda state: state[f"vision_model.{key}"].view(-1)[5].add_(1e-3))
    back_refused(f"another tower: its weights are not those of .*{key}", tmp_path, checkpoint, vision_tower=clip)


def test_way_back_says_that_a_tower_was_not_compared(tmp_path, capsys):
    whole = convert(GOLDENS / "original", tmp_path / "whole", keep_full_tower=True)
    convert_back(whole, tmp_path / "back")
    assert "takes tower and preprocessor from clip, whatever is written here" in capsys.readouterr().out
    convert_back(whole, tmp_path / "compared", vision_tower=CLIP)
    assert "takes tower" not in capsys.readouterr().out


def test_a_seed_that_cannot_act_is_refused(tmp_path):
    refused("leave out --seed", tmp_path, GOLDENS / "original", seed=3)


def test_way_back_of_a_tower_that_was_rounded_twice(tmp_path):
    """Once in training, and by --dtype."""
    source = edited(tmp_path, lambda state: state.update({key: value.bfloat16() for key, value in state.items()}))
    half = convert(source, tmp_path / "half", vision_tower=CLIP, dtype=torch.float16)
    assert convert_back(half, tmp_path / "back", vision_tower=CLIP).exists()


@pytest.mark.parametrize("change", ["vocabulary", "legacy"])
def test_way_back_refuses_another_tokenizer(change, tmp_path, checkpoint):
    words = shutil.copytree(GOLDENS / "base", tmp_path / "words", ignore=shutil.ignore_patterns("model*"))
    if change == "vocabulary":
        shutil.copyfile(GOLDENS.parent / "tokenizers" / "space_runs" / "tokenizer.model", words / "tokenizer.model")
    else:
        (words / "tokenizer_config.json").write_text(
            (GOLDENS / "tokenizer_legacy_false" / "tokenizer_config.json").read_text()
        )
    # The original does not read it.
    shutil.copyfile(checkpoint / "tokenizer.json", words / "tokenizer.json")
    part = {"vocabulary": "model", "legacy": "normalizer"}[change]
    back_refused(f"holds another tokenizer than .*{part} differ", tmp_path, checkpoint, tokenizer=words)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.q_proj"},
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("keep_adapter", [False, True])
def test_matrices_that_the_config_does_not_name_are_refused(keep_adapter, fields, tmp_path):
    """PEFT makes no place for them; they were merged."""
    source = with_settings(tmp_path, "lora", "adapter_config.json", **fields)
    refused("adapter has matrices of .* does not name", tmp_path, source, base=BASE, keep_adapter=keep_adapter)


def test_a_pattern_names_matrices(tmp_path, checkpoints):
    pattern = r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj"
    source = with_settings(tmp_path, "lora", "adapter_config.json", target_modules=pattern)
    out = convert(source, tmp_path / "out", base=BASE, vision_tower=CLIP)
    assert_same(tensors(out), tensors(checkpoints("lora")))
    edit = with_settings(tmp_path / "broken", "lora", "adapter_config.json", target_modules="(")
    refused("'\\(' is no pattern of modules", tmp_path, edit, base=BASE)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("original", "adapter_model.bin"),
        ("original", "non_lora_trainables.bin"),
        ("pretrain", "adapter_model.safetensors"),
        ("lora", "mm_projector.bin"),
    ],
)
def test_files_of_another_kind_of_run_are_named(name, left, tmp_path, capsys):
    source = with_settings(tmp_path, name)
    (source / left).write_bytes(b"")
    convert(source, tmp_path / "out", base=None if name == "original" else BASE, vision_tower=CLIP)
    assert f"{left} is not read (" in capsys.readouterr().out
