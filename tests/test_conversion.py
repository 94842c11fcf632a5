"""The key map, both ways, and the refusals of the converter."""

import json
import re
import shutil

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file

from conversion import ConversionError, convert, to_hub, to_original
from conversion.keys import KEY_MAP
from conversion.source import read_folder


def hub_weights(folder):
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def test_there_and_back_is_bit_identical():
    original = read_folder(GOLDENS / "original")
    back = to_original(to_hub(original))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], original[key]) for key in original)


def test_dropped_keys_are_dropped_and_unknown_keys_are_named():
    inv_freq = "model.layers.3.self_attn.rotary_emb.inv_freq"
    position_ids = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
    assert to_hub({inv_freq: 1, position_ids: 2, "lm_head.weight": 3}) == {"lm_head.weight": 3}
    for key in ("model.layer.0.weight", "xmodel.norm.weight", "model.mm_projector.1.weight"):
        with pytest.raises(ConversionError, match=re.escape(repr(key))):
            to_hub({key: 1})


def test_the_table_has_one_way_back():
    targets = [target for target in KEY_MAP.values() if target is not None]
    assert len(set(targets)) == len(targets)


def test_every_tensor_arrives(checkpoint):
    """By value, under its new name; the vocabulary tables have one more row, the tower one layer less."""
    weights = hub_weights(checkpoint)
    expected = {key: value for key, value in to_hub(read_folder(GOLDENS / "original")).items()}
    dropped = {key for key in expected if key.startswith("model.vision_tower.encoder.layers.23.")}
    assert dropped and weights.keys() == expected.keys() - dropped
    for name, tensor in weights.items():
        rows = len(expected[name]) if tensor.ndim else None
        assert torch.equal(tensor[:rows], expected[name]), name
        assert len(tensor) - rows == (
            1 if name in ("lm_head.weight", "model.language_model.embed_tokens.weight") else 0
        )


def test_placeholder_row_is_the_mean(checkpoint):
    weights = hub_weights(checkpoint)
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        torch.testing.assert_close(weights[name][-1], weights[name][:-1].mean(0))


def test_full_tower_is_kept_on_request(tmp_path, checkpoint):
    full = convert(GOLDENS / "original", tmp_path / "full", keep_full_tower=True)
    config = json.loads((full / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 24
    extra = hub_weights(full).keys() - hub_weights(checkpoint).keys()
    assert extra and all(name.startswith("model.vision_tower.encoder.layers.23.") for name in extra)


def test_a_checkpoint_without_tower_takes_it_from_clip(checkpoints):
    with_tower, without = hub_weights(checkpoints("original")), hub_weights(checkpoints("original_no_tower"))
    assert with_tower.keys() == without.keys()
    assert all(torch.equal(with_tower[name], without[name]) for name in with_tower)


def test_derived_settings(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["vision_feature_layer"] == [23, 21, 18, 15, 12, 9, 6, 3]
    assert config["block_fusion_hidden_size"] is None and config["spatial_fusion_hidden_size"] is None
    assert config["text_config"]["vocab_size"] == config["image_token_index"] + 1 == 421
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [config["image_token_index"]]


def edited(tmp_path, edit, name="original"):
    """A copy of a golden run, single-file, with its state dict edited."""
    folder = tmp_path / name
    shutil.copytree(GOLDENS / name, folder)
    state = dict(read_folder(folder))
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    edit(state)
    torch.save({key: value.clone() for key, value in state.items()}, folder / "pytorch_model.bin")
    return folder


def four_taps(state):
    weight = state["model.mm_projector_crosslayer.0.weight"]
    state["model.mm_projector_crosslayer.0.weight"] = weight[:, : weight.shape[1] // 2]


def other_widths(state):
    for name, rows in (("model.mm_projector_crosslayer", 20), ("model.mm_projector", 33)):
        state[f"{name}.0.weight"], state[f"{name}.0.bias"] = (
            state[f"{name}.0.weight"][:rows],
            state[f"{name}.0.bias"][:rows],
        )
        state[f"{name}.2.weight"] = state[f"{name}.2.weight"][:, :rows]


def test_variants_are_read_off_the_shapes(tmp_path):
    for index, (edit, fields) in enumerate(
        [
            (four_taps, {"vision_feature_layer": [23, 18, 12, 6]}),
            (other_widths, {"block_fusion_hidden_size": 20, "spatial_fusion_hidden_size": 33}),
        ]
    ):
        source = edited(tmp_path / str(index), edit)
        target = convert(source, tmp_path / f"out{index}", vision_tower=GOLDENS / "clip")
        config = json.loads((target / "config.json").read_text())
        assert {name: config[name] for name in fields} == fields


def rename(old, new):
    def edit(state):
        state[new] = state.pop(old)

    return edit


def baseline_llava(state):
    for key in [key for key in state if "crosslayer" in key]:
        del state[key]


def with_nan(state):
    state["model.norm.weight"] = torch.full_like(state["model.norm.weight"], torch.nan)


def wrong_shape(state):
    state["model.norm.weight"] = state["model.norm.weight"][:-1]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename("model.norm.weight", "model.norms.weight"), "Unknown weight 'model.norms.weight'"),
        (lambda state: state.pop("model.norm.weight"), "no weight for 'model.language_model.norm.weight'"),
        (baseline_llava, "not a LLaVA-STF checkpoint"),
        (with_nan, "'model.language_model.norm.weight' has NaN"),
        (wrong_shape, r"has the shape \(63,\), expected \(64,\)"),
    ],
)
def test_bad_sources_are_refused_and_nothing_is_written(edit, message, tmp_path):
    source = edited(tmp_path, edit)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out", vision_tower=GOLDENS / "clip")
    assert sorted(tmp_path.iterdir()) == before


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(ConversionError, match="--base"):
        convert(GOLDENS / "pretrain", tmp_path / "out")
    with pytest.raises(ConversionError, match="'nowhere' is not a folder.*--vision-tower"):
        convert(GOLDENS / "original", tmp_path / "out", vision_tower="nowhere")
    source = tmp_path / "sharded"
    shutil.copytree(GOLDENS / "original", source)
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(ConversionError, match="pytorch_model-00002-of-00003.bin"):
        convert(source, tmp_path / "out", vision_tower=GOLDENS / "clip")
    (source / "pytorch_model-00002-of-00003.bin").write_bytes(b"cut")
    with pytest.raises(ConversionError, match="pytorch_model-00002-of-00003.bin"):
        convert(source, tmp_path / "out", vision_tower=GOLDENS / "clip")
    assert not (tmp_path / "out").exists()


def test_a_full_destination_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConversionError, match="not empty"):
        convert(GOLDENS / "original", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
