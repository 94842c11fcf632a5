"""The converter: the key map, every kind of source, the way back, and refusals that leave nothing behind."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import elsewhere, here
from conftest import GOLDENS
from hub_server import Hub
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conversion import ConversionError, convert, convert_back, to_hub, to_original
from conversion.__main__ import main
from conversion.checkpoints.weights import Weight, read_folder, write_folder
from conversion.keys import KEY_MAP
from conversion.quantise import read_whole
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration

TABLES = ("lm_head.weight", "model.language_model.embed_tokens.weight")


def tensors(folder):
    """All tensors of a checkpoint folder, read independently of the format."""
    return {key: weight.load() for key, weight in read_folder(folder).items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]), key


def test_names_there_and_back():
    original = tensors(GOLDENS / "original")
    assert_same(to_original(to_hub(original)), original)


def test_every_key_of_the_real_7b_is_mapped():
    keys = json.loads((GOLDENS / "keys_7b.json").read_text())
    names = to_hub(dict.fromkeys(keys))
    assert len(names) == len(keys) == 690 and to_original(names).keys() == keys.keys()


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
    weights = tensors(checkpoint)
    expected = to_hub(tensors(GOLDENS / "original"))
    dropped = {key for key in expected if key.startswith("model.vision_tower.encoder.layers.23.")}
    assert dropped and weights.keys() == expected.keys() - dropped
    for name, tensor in weights.items():
        rows = len(expected[name]) if tensor.ndim else None
        assert torch.equal(tensor[:rows], expected[name]), name
        assert len(tensor) - rows == (
            1 if name in ("lm_head.weight", "model.language_model.embed_tokens.weight") else 0
        )


def test_placeholder_row_is_the_mean(checkpoint):
    weights = tensors(checkpoint)
    for name in TABLES:
        torch.testing.assert_close(weights[name][-1], weights[name][:-1].mean(0))


def test_full_tower_is_kept_on_request(tmp_path, checkpoint):
    full = convert(GOLDENS / "original", tmp_path / "full", keep_full_tower=True)
    config = json.loads((full / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 24
    extra = tensors(full).keys() - tensors(checkpoint).keys()
    assert extra and all(name.startswith("model.vision_tower.encoder.layers.23.") for name in extra)


def test_a_checkpoint_without_tower_takes_it_from_clip(checkpoints):
    assert_same(tensors(checkpoints("original")), tensors(checkpoints("original_no_tower")))


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
    state = {key: tensor.clone() for key, tensor in tensors(folder).items()}
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
    with pytest.raises(ConversionError, match="'nowhere' is neither a folder here nor the id"):
        convert(GOLDENS / "original", tmp_path / "out", vision_tower="nowhere")
    assert not (tmp_path / "out").exists()


def sharded(tmp_path):
    folder = tmp_path / "original"
    shutil.copytree(GOLDENS / "original", folder)
    return folder


def cut(folder):
    file = folder / "pytorch_model-00002-of-00003.bin"
    file.write_bytes(file.read_bytes()[:-1000])


def garbage(folder):
    (folder / "pytorch_model-00002-of-00003.bin").write_bytes(b"not a checkpoint")


def pickled_code(folder):
    torch.save({"model.norm.weight": Path("/")}, folder / "pytorch_model-00002-of-00003.bin")


def without_shard(folder):
    (folder / "pytorch_model-00002-of-00003.bin").unlink()


def index_lists_more(folder):
    edit_index(folder, lambda weight_map: weight_map.update({"model.extra.weight": "pytorch_model-00001-of-00003.bin"}))


def edit_index(folder, edit):
    file = folder / "pytorch_model.bin.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


def broken_index(folder):
    (folder / "pytorch_model.bin.index.json").write_text("{")


def same_key_in_two_shards(folder):
    files = [folder / f"pytorch_model-0000{index}-of-00003.bin" for index in (1, 2)]
    states = [torch.load(file, weights_only=True) for file in files]
    key = next(iter(states[0]))
    torch.save({**states[1], key: states[0][key]}, files[1])


def tied(folder):
    file = folder / "pytorch_model-00003-of-00003.bin"
    state = torch.load(file, weights_only=True)
    state["model.norm.weight"] = state["model.norm.bias"] = torch.ones(64)
    torch.save(state, file)


def tied_config(folder):
    edit_config(folder, tie_word_embeddings=True)


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def no_config(folder):
    (folder / "config.json").unlink()


def config_is_a_list(folder):
    (folder / "config.json").write_text("[]")


def no_tokenizer_model(folder):
    (folder / "tokenizer.model").unlink()


def damaged_tokenizer(folder):
    (folder / "tokenizer.model").write_bytes(b"damaged")


def broken_tokenizer_config(folder):
    (folder / "tokenizer_config.json").write_text("{")


def gap_in_the_added_tokens(folder):
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["added_tokens_decoder"]["425"] = {**settings["added_tokens_decoder"]["0"], "content": "<pad>"}
    file.write_text(json.dumps(settings))


def other_vocabulary(folder):
    edit_config(folder, vocab_size=419)


def odd_heads(folder):
    edit_config(folder, num_attention_heads=7)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (cut, "pytorch_model-00002-of-00003.bin"),
        (garbage, "pytorch_model-00002-of-00003.bin"),
        (pickled_code, "pytorch_model-00002-of-00003.bin"),
        (without_shard, "pytorch_model-00002-of-00003.bin, which is missing"),
        (index_lists_more, "'model.extra.weight' in pytorch_model-00001-of-00003.bin, which lacks it"),
        (broken_index, "pytorch_model.bin.index.json"),
        (same_key_in_two_shards, "and again in pytorch_model-00002-of-00003.bin"),
        (tied, "'model.norm.bias' and 'model.norm.weight' are one tensor"),
        (tied_config, "tie_word_embeddings"),
        (no_config, "holds no run"),
        (config_is_a_list, "config.json holds a list"),
        (no_tokenizer_model, "neither tokenizer.model nor tokenizer.json"),
        (damaged_tokenizer, "tokenizer"),
        (broken_tokenizer_config, "tokenizer_config.json"),
        (gap_in_the_added_tokens, "'<pad>' has the id 425"),
        (other_vocabulary, "420 rows, but config.json says `vocab_size` 419"),
        (odd_heads, "7"),
    ],
)
def test_damaged_files_end_in_one_line_and_exit_code_2(damage, word, tmp_path, monkeypatch, capsys):
    source = sharded(tmp_path)
    damage(source)
    before = sorted(tmp_path.iterdir())
    command = ["conversion", str(source), str(tmp_path / "out"), "--vision-tower", str(GOLDENS / "clip")]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and word in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_destination_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConversionError, match="not empty"):
        convert(GOLDENS / "original", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_destination_is_filled(tmp_path, checkpoint):
    (tmp_path / "out").mkdir()
    assert_same(tensors(convert(GOLDENS / "original", tmp_path / "out")), tensors(checkpoint))


def edited_adapter(tmp_path, edit, **settings):
    folder = tmp_path / "lora"
    shutil.copytree(GOLDENS / "lora", folder)
    state = {key: tensor.clone() for key, tensor in torch.load(folder / "adapter_model.bin", weights_only=True).items()}
    edit(state)
    torch.save(state, folder / "adapter_model.bin")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def one_matrix_less(state):
    del state[next(key for key in state if ".lora_B." in key)]


def other_rank(state):
    key = next(key for key in state if ".lora_A." in key)
    state[key] = state[key][:-1]


def foreign_target(state):
    key = next(key for key in state if ".lora_A." in key)
    state[key.replace("layers.0", "layers.9")] = state[key].clone()


@pytest.mark.parametrize("keep_adapter", [False, True])
@pytest.mark.parametrize(
    ("edit", "settings", "message"),
    [
        (one_matrix_less, {}, "only the matrix A"),
        (other_rank, {}, r"have the shapes \(3, .*expected \(4, "),
        (foreign_target, {}, "no counterpart in the base"),
        (lambda state: None, {"alpha_pattern": {"q_proj": 8}}, "found alpha_pattern"),
        (lambda state: None, {"use_dora": True}, "found use_dora"),
    ],
)
def test_adapters_that_would_be_misread_are_refused(edit, settings, message, keep_adapter, tmp_path):
    source = edited_adapter(tmp_path, edit, **settings)
    options = {"base": GOLDENS / "base", "vision_tower": GOLDENS / "clip", "keep_adapter": keep_adapter}
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("original", ["--base", GOLDENS / "base"], "leave out --base"),
        ("original", ["--keep-adapter"], "leave out --keep-adapter"),
        ("original", ["--init-fusion"], "--init-fusion would throw them away"),
        ("original", ["--max-shard-size", "much"], "'much' is no size"),
        ("original", ["--pad-vocabulary", "0"], "expected a number from 1 to 65536"),
        ("original", ["--outputs", "nowhere"], "nowhere is not a file"),
        ("original", ["--to-original", "--dtype", "float16"], "does not go with --dtype"),
    ],
)
def test_flags_that_do_not_fit_are_refused(source, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["conversion", *map(str, [GOLDENS / source, tmp_path / "out", *flags])])
    try:
        assert main() == 2
    except SystemExit as exit:
        assert exit.code == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


# Sources


def test_safetensors_and_bin_whole_and_sharded_are_equal(tmp_path, checkpoint):
    expected = tensors(checkpoint)
    whole = edited(tmp_path, lambda state: None)
    clip = {"vision_tower": GOLDENS / "clip"}
    assert_same(tensors(convert(whole, tmp_path / "bin", **clip)), expected)
    save_file(tensors(whole), whole / "model.safetensors")
    (whole / "pytorch_model.bin").unlink()
    assert_same(tensors(convert(whole, tmp_path / "safetensors", max_shard_size="200KB", **clip)), expected)
    assert len(list((tmp_path / "safetensors").glob("model-*.safetensors"))) > 3


def test_nested_layout(tmp_path, checkpoint):
    repository = tmp_path / "repository"
    shutil.copytree(GOLDENS / "original", repository / "full-parameter-finetune")
    shutil.copytree(GOLDENS / "pretrain", repository / "pretrain" / "any-name")
    converted = convert(repository, tmp_path / "out", vision_tower=GOLDENS / "clip")
    assert_same(tensors(converted), tensors(checkpoint))
    shutil.copytree(GOLDENS / "original", repository / "another")
    with pytest.raises(ConversionError, match="several runs .*another, full-parameter-finetune"):
        convert(repository, tmp_path / "out2", vision_tower=GOLDENS / "clip")


def test_hub_ids(tmp_path, checkpoint):
    """The nested repository of the authors, its vision tower and a revision, from a stand-in for the Hub."""
    repository = tmp_path / "repository"
    shutil.copytree(GOLDENS / "original_no_tower", repository / "full-parameter-finetune")
    shutil.copytree(GOLDENS / "pretrain", repository / "pretrain" / "any-name")
    edit_config(repository / "full-parameter-finetune", mm_vision_tower="some/clip")
    clip = GOLDENS / "clip"
    with Hub() as hub:
        commit = hub.add("some/model", repository)
        hub.add("some/clip", clip)
        out, other = tmp_path / "out", tmp_path / "out2"
        commands = (
            ["some/model", out, "--revision", commit],
            ["some/model", other, "--subfolder", "pretrain"],
            ["some/nothing", other],
            ["some/model", other, "--revision", "no-such"],
        )
        whole, *refused = elsewhere("conversion", commands, hub.environment(tmp_path / "cache", token=""))
    assert whole.returncode == 0, whole.stderr
    assert_same(tensors(out), tensors(checkpoint))
    for result, found in zip(refused, ("--base", "some/nothing", "some/model"), strict=True):
        error = result.stderr.strip().splitlines()[-1]
        assert result.returncode == 2 and error.startswith("error: ") and found in error
    assert not other.exists()


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_old_buffers_are_tolerated(form, tmp_path, checkpoint):
    def edit(state):
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        state["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]

    source = edited(tmp_path, edit)
    if form == "safetensors":
        save_file(tensors(source), source / "model.safetensors")
        (source / "pytorch_model.bin").unlink()
    converted = convert(source, tmp_path / "out", vision_tower=GOLDENS / "clip")
    assert_same(tensors(converted), tensors(checkpoint))


def test_of_several_forms_the_one_is_read_that_transformers_reads(tmp_path, checkpoint):
    """A model that is saved again beside the shards that were there leaves their index."""
    source = edited(tmp_path, lambda state: None)
    others = {key: tensor + 1 for key, tensor in tensors(source).items()}
    save_file(tensors(source), source / "model.safetensors")
    torch.save(others, source / "pytorch_model.bin")
    save_file(others, source / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(others, "model-00001-of-00001.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    converted = convert(source, tmp_path / "out", vision_tower=GOLDENS / "clip")
    assert_same(tensors(converted), tensors(checkpoint))
    (source / "model-00001-of-00001.safetensors").unlink()
    assert_same(tensors(convert(source, tmp_path / "out2", vision_tower=GOLDENS / "clip")), tensors(checkpoint))


def test_a_projector_beside_a_whole_model_is_not_read(tmp_path, checkpoint, capsys):
    """The released LLaVA-1.5 has one, too."""
    source = edited(tmp_path, lambda state: None)
    state = {key: tensor for key, tensor in tensors(source).items() if "mm_projector" in key}
    torch.save({key: tensor + 1 for key, tensor in state.items()}, source / "mm_projector.bin")
    converted = convert(source, tmp_path / "out", vision_tower=GOLDENS / "clip")
    assert_same(tensors(converted), tensors(checkpoint))
    assert "mm_projector.bin is not read: the whole model beside it" in capsys.readouterr().out
    with pytest.raises(ConversionError, match="is a whole model, neither .* leave out --base"):
        convert(source, tmp_path / "none", base=GOLDENS / "base", vision_tower=GOLDENS / "clip")
    plain = {key: tensor.clone() for key, tensor in tensors(source).items() if "crosslayer" not in key}
    torch.save(plain, source / "pytorch_model.bin")
    begun = convert(source, tmp_path / "begun", init_fusion=True, vision_tower=GOLDENS / "clip")
    assert "with new fusion modules: they are not trained yet.\n" in (begun / "README.md").read_text()


def test_an_adapter_beside_a_whole_model_is_refused(tmp_path):
    shutil.copytree(GOLDENS / "lora", tmp_path / "lora")
    shutil.copy(GOLDENS / "base" / "model.safetensors", tmp_path / "lora")
    with pytest.raises(ConversionError, match="has both adapter_config.json and the weights of a whole model"):
        convert(tmp_path / "lora", tmp_path / "out", base=GOLDENS / "base", vision_tower=GOLDENS / "clip")
    assert not (tmp_path / "out").exists()


def test_adapters_in_other_forms(tmp_path, checkpoints):
    """safetensors, the names of a running PEFT model, a base in shards: the same merged model."""
    folder = tmp_path / "lora"
    shutil.copytree(GOLDENS / "lora", folder)
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    names = {re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", key): tensor for key, tensor in state.items()}
    save_file({key: tensor.contiguous() for key, tensor in names.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_model.bin").unlink()
    base = tmp_path / "base"
    shutil.copytree(GOLDENS / "base", base)
    state = list(tensors(base).items())
    (base / "model.safetensors").unlink()
    shards = {f"model-0000{index + 1}-of-00002.safetensors": dict(state[index::2]) for index in range(2)}
    for name, shard in shards.items():
        save_file(shard, base / name)
    weight_map = {key: name for name, shard in shards.items() for key in shard}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    merged = convert(folder, tmp_path / "out", base=base, vision_tower=GOLDENS / "clip")
    assert_same(tensors(merged), tensors(checkpoints("lora")))


def test_half_precision_there_and_back(tmp_path):
    def edit(state):
        for key in state:
            state[key] = state[key].to(torch.bfloat16)

    source = edited(tmp_path, edit)
    converted = convert(source, tmp_path / "out", vision_tower=GOLDENS / "clip")
    back = convert_back(converted, tmp_path / "back", vision_tower=GOLDENS / "clip")
    assert_same(tensors(back), tensors(source))


def test_tokenizer_shorter_than_the_tables(tmp_path, load_model, processor, picture):
    """`<image>` takes a row that is there and has no token yet; nothing is added, nothing changes, there and back."""

    def edit(state):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = torch.cat([state[name], torch.ones(8, 64)])

    source = edited(tmp_path, edit)
    edit_config(source, vocab_size=428)
    converted = convert(source, tmp_path / "out", vision_tower=GOLDENS / "clip")
    inputs = processor(images=picture("wide.png"), text="<image> What?", return_tensors="pt")
    with torch.no_grad():
        logits = LlavaSTFForConditionalGeneration.from_pretrained(converted).eval()(**inputs).logits
        assert logits.shape[-1] == 428
        assert torch.equal(logits[..., :420], load_model()(**inputs).logits[..., :420])
    assert_same(tensors(convert_back(converted, tmp_path / "back", vision_tower=GOLDENS / "clip")), tensors(source))


def test_adapter_is_kept_on_a_converted_base(tmp_path, checkpoints, processor, picture):
    from peft import PeftModel

    kept = convert(GOLDENS / "lora", tmp_path / "kept", base=GOLDENS / "base", keep_adapter=True)
    base = json.loads((kept / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(LlavaSTFForConditionalGeneration.from_pretrained(base), kept).eval()
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 14 and all(".language_model." in name for name in adapted)
    merged = LlavaSTFForConditionalGeneration.from_pretrained(checkpoints("lora")).eval()
    inputs = processor(images=picture("wide.png"), text="<image> What?", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, merged(**inputs).logits, rtol=0, atol=1e-5)
        with model.disable_adapter():
            assert (model(**inputs).logits - merged(**inputs).logits).abs().max() > 0.1


def test_initialisation_takes_tower_and_language_model(tmp_path, checkpoints):
    """From a language model, and from a plain LLaVA in the original's and in llava-hf's names; seeded."""
    base = tensors(GOLDENS / "base")
    tower = {f"model.vision_tower.vision_tower.{key}": value for key, value in tensors(GOLDENS / "clip").items()}
    projector = {"model.mm_projector.0.weight": torch.ones(64, 32), "model.mm_projector.0.bias": torch.ones(64)}
    plain = tmp_path / "plain"
    shutil.copytree(GOLDENS / "base", plain)
    (plain / "model.safetensors").unlink()
    save_file({**base, **tower, **projector}, plain / "model.safetensors")
    with pytest.raises(ConversionError, match="not a LLaVA-STF checkpoint.*--init-fusion"):
        convert(plain, tmp_path / "refused", vision_tower=GOLDENS / "clip")
    llava_hf = tmp_path / "llava_hf"
    shutil.copytree(plain, llava_hf)
    renamed = {
        re.sub("^model", "language_model.model", re.sub("^lm_head", "language_model.lm_head", key)): value
        for key, value in base.items()
    }
    renamed |= {f"vision_tower.{key}": value for key, value in tensors(GOLDENS / "clip").items()}
    save_file({**renamed, "multi_modal_projector.linear_1.weight": torch.ones(64, 32)}, llava_hf / "model.safetensors")

    options = {"vision_tower": GOLDENS / "clip", "init_fusion": True}
    results = [
        tensors(convert(source, tmp_path / f"out{index}", **options))
        for index, source in enumerate((GOLDENS / "base", plain, llava_hf))
    ]
    for result in results[1:]:
        assert_same(result, results[0])
    trained = tensors(checkpoints("pretrain"))
    for name, tensor in results[0].items():
        assert torch.equal(tensor, trained[name]) == (".multi_modal_projector." not in name), name
    other = tensors(convert(plain, tmp_path / "seed", seed=1, **options))
    fusion = "model.multi_modal_projector.spatial_fusion.linear_1.weight"
    assert not torch.equal(other[fusion], results[0][fusion])
    assert 0 < results[0][fusion].std() < 0.1


def test_new_fusion_weights_for_the_taps_that_are_asked_for(tmp_path, checkpoint):
    start = tmp_path / "start"
    arguments = (GOLDENS / "base", start, "--vision-tower", GOLDENS / "clip", "--init-fusion")
    assert here("conversion", *arguments, "--taps", 5, 2, 1).returncode == 0
    config = LlavaSTFConfig.from_pretrained(start)
    assert (config.taps, config.vision_config.num_hidden_layers) == ([5, 2, 1], 5)
    model = LlavaSTFForConditionalGeneration.from_pretrained(start)
    assert model.model.multi_modal_projector.block_fusion.linear_1.in_features == 3 * config.vision_config.hidden_size
    with pytest.raises(ConversionError, match="leave out --taps"):
        convert(GOLDENS / "original", tmp_path / "trained", taps=[5, 2, 1])


# Target


def test_the_folder_is_complete(checkpoint):
    assert {file.name for file in checkpoint.iterdir()} == {
        "LICENSE",
        "NOTICE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "configuration_llava_stf.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_llava_stf.py",
        "original_config.json",
        "processing_llava_stf.py",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_dtype(tmp_path, checkpoint):
    half = convert(GOLDENS / "original", tmp_path / "half", dtype=torch.bfloat16)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in tensors(checkpoint).items()}
    assert_same(
        {n: t for n, t in tensors(half).items() if n not in TABLES},
        {n: t for n, t in expected.items() if n not in TABLES},
    )
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


def test_vocabulary_is_padded_only_when_asked(tmp_path, checkpoint, load_model, processor, picture):
    padded = convert(GOLDENS / "original", tmp_path / "padded", pad_vocabulary=64)
    config = json.loads((padded / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 448 and config["image_token_index"] == 420
    inputs = processor(images=picture("wide.png"), text="<image> What?", return_tensors="pt")
    with torch.no_grad():
        logits = LlavaSTFForConditionalGeneration.from_pretrained(padded).eval()(**inputs).logits
        assert torch.equal(logits[..., :420], load_model()(**inputs).logits[..., :420])


def test_reading_by_transformers_is_strict(checkpoint):
    _, info = LlavaSTFForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_files_are_plain_safetensors(checkpoint):
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert_same(load_file(checkpoint / "model.safetensors"), tensors(checkpoint))


def test_few_tensors_are_in_memory_however_many_there_are(tmp_path):
    """What is made on the way (merged, cast, new rows) is let go as soon as it is written."""
    alive, peak = set(), 0

    def load(index):
        nonlocal peak
        tensor = torch.full((8, 8), float(index))
        weakref.finalize(tensor, alive.discard, index)
        alive.add(index)
        peak = max(peak, len(alive))
        return tensor

    weights = {f"w{i}": Weight((8, 8), torch.float32, partial(load, i), "made") for i in range(40)}
    write_folder(tmp_path, weights, max_shard_size=1 << 30)
    assert peak <= 3
    assert all((tensor == int(name[1:])).all() for name, tensor in tensors(tmp_path).items())


# Checks


@pytest.mark.parametrize("source", ["original", "original_no_tower", "pretrain", "lora", "lora --keep-adapter"])
def test_verify_compares_checksums_and_logits(source, tmp_path):
    name, *flags = source.split()
    base = ["--base", GOLDENS / "base"] if name in ("pretrain", "lora") else []
    outputs = GOLDENS / "goldens.safetensors"
    result = here("conversion", GOLDENS / name, tmp_path / "out", *base, *flags, "--verify", "--outputs", outputs)
    assert result.returncode == 0, result.stderr
    count = 404 + (36 if flags else 0)  # 28 LoRA matrices and the 8 fusion weights
    assert f"{count} tensors have the checksums of their sources" in result.stdout
    assert re.search(r"logits equal those of '(original|pretrain|lora)'", result.stdout)


def test_verify_tells_a_wrong_mapping(tmp_path, monkeypatch):
    """The control: two patterns of the table with their targets swapped; every shape fits, only the logits can tell."""
    from conversion import keys

    query, key = (f"layers.{{}}.self_attn.{name}_proj.weight" for name in "qk")
    wrong = {f"model.{query}": f"model.language_model.{key}", f"model.{key}": f"model.language_model.{query}"}
    monkeypatch.setattr(keys, "KEY_MAP", {**wrong, **keys.KEY_MAP})
    outputs = GOLDENS / "goldens.safetensors"
    with pytest.raises(ConversionError, match="logits differ"):
        convert(GOLDENS / "original", tmp_path / "out", outputs=outputs)
    assert not list(tmp_path.iterdir())


def test_recorded_outputs(tmp_path, model, processor, picture, checkpoint):
    inputs = processor(images=picture("text.png"), text="<image> Read it.", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    record = {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"], "logits": logits}
    save_file(record, tmp_path / "recorded.safetensors")
    convert(GOLDENS / "original", tmp_path / "out", outputs=tmp_path / "recorded.safetensors")
    save_file({**record, "logits": logits + 0.01}, tmp_path / "other.safetensors")
    with pytest.raises(ConversionError, match="differ"):
        convert(GOLDENS / "original", tmp_path / "out2", outputs=tmp_path / "other.safetensors")
    assert not (tmp_path / "out2").exists()


def test_dry_run_prints_the_table_and_writes_nothing(tmp_path):
    result = here("conversion", GOLDENS / "original", tmp_path / "out", "--dry-run", "--max-shard-size", "500KB")
    assert result.returncode == 0
    line = "model.mm_projector.0.weight -> model.multi_modal_projector.spatial_fusion.linear_1.weight  512x128 float32"
    assert line in result.stdout and "would write model-00001-of-0000" in result.stdout
    assert not list(tmp_path.iterdir())


# The way back


def test_there_and_back_is_bit_identical(tmp_path, checkpoint):
    back = convert_back(checkpoint, tmp_path / "back", vision_tower=GOLDENS / "clip", tokenizer=GOLDENS / "original")
    assert_same(tensors(back), tensors(GOLDENS / "original"))
    for name in ("config.json", "tokenizer.model"):
        assert json_or_bytes(back / name) == json_or_bytes(GOLDENS / "original" / name)
    full = convert(GOLDENS / "original", tmp_path / "full", keep_full_tower=True)
    assert_same(tensors(convert_back(full, tmp_path / "back2")), tensors(GOLDENS / "original"))
    again = convert(back, tmp_path / "again", vision_tower=GOLDENS / "clip")
    assert_same(tensors(again), tensors(checkpoint))


def json_or_bytes(path):
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def test_way_back_after_training(tmp_path, model, checkpoint):
    """A checkpoint saved by transformers has no original_config.json: the config is made from ours."""
    model.save_pretrained(tmp_path / "trained")
    back = convert_back(tmp_path / "trained", tmp_path / "back", vision_tower=GOLDENS / "clip")
    assert_same(tensors(back), tensors(GOLDENS / "original"))
    made, real = (json_or_bytes(folder / "config.json") for folder in (back, GOLDENS / "original"))
    ignored = {
        "transformers_version",
        "_name_or_path",
        "freeze_mm_mlp_adapter",
        "tune_mm_mlp_adapter",
        "mm_vision_tower",
    }
    different = {name for name in real.keys() - ignored if made.get(name) != real[name]}
    assert different <= {"mm_projector_lr", "tokenizer_model_max_length"}


def test_older_names_are_read(tmp_path, model, checkpoint):
    """As ZeRO-3 of transformers 5.24 saves them behind other trainers than ours."""
    parts = {
        "model.language_model.": "model.language_model.model.",
        "model.vision_tower.": "model.vision_tower.vision_model.",
    }
    older = {}
    for name, weight in model.state_dict().items():
        part = next((part for part in parts if name.startswith(part)), "")
        older[parts.get(part, "") + name.removeprefix(part)] = weight
    folder = tmp_path / "older"
    model.config.save_pretrained(folder)
    save_file(older, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(
        tensors(convert_back(folder, tmp_path / "back", vision_tower=GOLDENS / "clip")), tensors(GOLDENS / "original")
    )
    assert_same({name: weight.load() for name, weight in read_whole(folder, model.config).items()}, model.state_dict())
    twice = older | {name: weight.clone() for name, weight in model.state_dict().items()}
    save_file(twice, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="and another weight both become"):
        convert_back(folder, tmp_path / "again", vision_tower=GOLDENS / "clip")


@pytest.mark.parametrize("with_original_config", [True, False])
def test_other_taps_go_there_and_back(tmp_path, checkpoint, with_original_config):
    """The original's config has no word for them: they are written so that its code fails, and ours reads them."""
    folder = shutil.copytree(checkpoint, tmp_path / "ours")
    if not with_original_config:
        (folder / "original_config.json").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["vision_feature_layer"] = taps = [20, 17, 15, 12, 9, 6, 3, 1]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    back = convert_back(folder, tmp_path / "back", vision_tower=GOLDENS / "clip", tokenizer=GOLDENS / "original")
    assert json_or_bytes(back / "config.json")["mm_vision_select_layer"] == taps
    again = convert(back, tmp_path / "again", vision_tower=GOLDENS / "clip", keep_full_tower=True)
    assert LlavaSTFConfig.from_pretrained(again).taps == taps
    there = tensors(again)
    assert_same({name: there[name] for name in tensors(checkpoint)}, tensors(checkpoint))

    settings = json_or_bytes(back / "config.json") | {"mm_vision_select_layer": taps[:5]}
    (back / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ConversionError, match=r"names the taps \[20, 17, 15, 12, 9\], but .* takes 8 blocks"):
        convert(back, tmp_path / "wrong", vision_tower=GOLDENS / "clip")


def test_way_back_refuses_another_tower(tmp_path, checkpoint):
    clip = tmp_path / "clip"
    shutil.copytree(GOLDENS / "clip", clip)
    save_file({key: tensor + 0.1 for key, tensor in tensors(GOLDENS / "clip").items()}, clip / "model.safetensors")
    with pytest.raises(ConversionError, match="another tower"):
        convert_back(checkpoint, tmp_path / "back", vision_tower=clip)
    arguments = (checkpoint, tmp_path / "back", "--to-original", "--vision-tower", GOLDENS / "clip", "--dry-run")
    result = here("conversion", *arguments)
    assert result.returncode == 0 and "model.mm_projector.0.weight  512x128" in result.stdout
    assert not (tmp_path / "back").exists()


def test_way_back_is_refused_without_the_tower_s_last_layer(tmp_path, checkpoint):
    with pytest.raises(ConversionError, match=r"without its layers behind the last tap \(23\).*--vision-tower"):
        convert_back(checkpoint, tmp_path / "back")
    with pytest.raises(ConversionError, match="expected a converted LLaVA-STF"):
        convert_back(GOLDENS / "original", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_way_back_says_that_budgets_are_lost(tmp_path, checkpoint, capsys):
    elastic = tmp_path / "elastic"
    shutil.copytree(checkpoint, elastic)
    config = json.loads((elastic / "config.json").read_text(encoding="utf-8"))
    for budgets in (None, [4, 1]):
        (elastic / "config.json").write_text(json.dumps(config | {"token_budgets": budgets}), encoding="utf-8")
        back = convert_back(elastic, tmp_path / f"back{budgets}", vision_tower=GOLDENS / "clip")
        assert ("token_budgets [4, 1] are not written" in capsys.readouterr().out) == (budgets is not None)
        assert "token_budgets" not in (back / "config.json").read_text(encoding="utf-8")


# Killed


def test_killed_at_any_moment_nothing_is_half_written(tmp_path, checkpoint):
    """SIGKILL at random moments: the destination is absent or whole; what is left over goes with the next run."""
    target = tmp_path / "out"
    expected = {file.name for file in checkpoint.iterdir()}
    generator, killed = random.Random(0), 0
    command = [sys.executable, "-c", FORKING_WORKER, str(GOLDENS / "original"), str(target)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=GOLDENS.parents[1]
    )
    while killed < 20:
        process.stdin.write("go\n")
        process.stdin.flush()
        child = int(process.stdout.readline())
        time.sleep(generator.uniform(0, 1.2))
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        killed += int(process.stdout.readline()) == signal.SIGKILL
        if target.exists():
            assert {file.name for file in target.iterdir()} == expected
            assert_same(tensors(target), tensors(checkpoint))
            shutil.rmtree(target)
    process.stdin.close()
    process.wait()
    convert(GOLDENS / "original", target)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


FORKING_WORKER = """
import os, sys, time
from conversion import convert
from conversion.checkpoints import weights

whole = weights.tensor_bytes
weights.tensor_bytes = lambda tensor: (time.sleep(0.001), whole(tensor))[1]
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.close(1)
        os.open(os.devnull, os.O_WRONLY)
        convert(sys.argv[1], sys.argv[2])
        os._exit(0)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, flush=True)
"""
