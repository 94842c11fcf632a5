"""A conversion's plan looks at shapes alone and changes nothing; the connector's shapes are those of its modules."""

import dataclasses
import inspect
import os
import socket

import pytest
import torch
from conftest import GOLDENS
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from benchmarks import count
from conversion import ConversionError, convert, convert_back, fusion
from conversion.__main__ import _parser
from conversion.checkpoints.folders import complete_or_absent
from conversion.checkpoints.weights import Weight
from conversion.keys import to_original
from conversion.locate import locate
from conversion.options import Options
from conversion.plan import plan, steps
from conversion.source import read
from hub_card.picture import draw_method
from modeling_llava_stf import LlavaSTFConfig, modeling_llava_stf

ASKED = {
    "plain": ("original", Options(pad_vocabulary=64, dtype=torch.bfloat16)),
    "lora": ("lora", Options(base=GOLDENS / "base")),
    "adapter": ("lora", Options(base=GOLDENS / "base", keep_adapter=True)),
    "new": ("base", Options(init_fusion=True, vision_tower=GOLDENS / "clip", seed=1)),
}


def unread(weights):
    """The weights, of which none can be loaded."""

    def load():
        raise AssertionError("a plan reads no weight")

    return {name: dataclasses.replace(weight, load=load) for name, weight in weights.items()}


@pytest.mark.parametrize("name", ASKED)
def test_a_plan_looks_at_shapes_alone_and_leaves_its_source_as_it_is(name):
    folder, options = ASKED[name]
    source = read(locate(GOLDENS / folder, options), options)
    adapter = None if source.run.adapter is None else unread(source.run.adapter)
    run = dataclasses.replace(source.run, adapter=adapter)
    source = dataclasses.replace(source, run=run, weights=unread(source.weights))
    before, names = source.config.to_dict(), list(source.weights)
    first, second = plan(source, options), plan(source, options)
    assert source.config.to_dict() == before and list(source.weights) == names
    assert first.config.to_dict() == second.config.to_dict() and first.notes == second.notes
    shapes = [{key: weight.shape for key, weight in {**p.weights, **p.adapter}.items()} for p in (first, second)]
    assert shapes[0] == shapes[1]
    assert bool(first.adapter) == (name == "adapter")
    order = ["lora", "fusion", "tower", "names", "vocabulary", "dtype", "complete"]
    assert list(steps(source, options)) == order


def test_the_options_are_those_of_the_command_line():
    fields = {field.name: field.default for field in dataclasses.fields(Options)}
    parsed = vars(_parser().parse_args(["a", "b"]))
    assert parsed == {**fields, "source": "a", "destination": "b", "to_original": False}
    assert inspect.signature(convert_back).parameters.keys() - {"source", "destination"} <= fields.keys()


# The connector's shapes


def small(**fields):
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=9, num_attention_heads=2, image_size=72, patch_size=6
    )
    text = LlamaConfig(vocab_size=16, hidden_size=20, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    return LlavaSTFConfig(vision_config=vision, text_config=text, **{"vision_feature_layer": [3, 9], **fields})


CONFIGS = {
    "7b": lambda: count.NAMED["stf-7b"](),
    "13b": lambda: count.NAMED["stf-13b"](),
    "one tap": lambda: small(vision_feature_layer=[5]),
    "every patch": lambda: small(fusion_window=1),
    "window 3": lambda: small(fusion_window=3, block_fusion_hidden_size=5),
    "window 4": lambda: small(fusion_window=4, spatial_fusion_hidden_size=7),
    "whole picture": lambda: small(fusion_window=12, vision_feature_layer=[1, 2, 3, 3, 3]),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]()


def weights_of(config):
    """The connector's weights under the original's names, without numbers."""
    named = fusion.empty_connector(config).state_dict()
    return to_original({fusion.CONNECTOR + name: Weight.of(tensor, "test") for name, tensor in named.items()})


def test_taps_window_and_widths_are_read_off(config):
    like = LlavaSTFConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        vision_feature_layer=[0],
        fusion_window=1,
    )
    assert fusion.read_off(weights_of(config), like) == {
        "taps": len(config.taps),
        "fusion_window": config.fusion_window,
        "block_fusion_hidden_size": config.block_fusion_hidden_size,
        "spatial_fusion_hidden_size": config.spatial_fusion_hidden_size,
    }


def test_new_weights_are_those_of_the_modules(config):
    made, expected = fusion.new_fusion(config, 0), weights_of(config)
    assert {name: weight.shape for name, weight in made.items()} == {n: w.shape for n, w in expected.items()}


def test_the_tokens_that_the_modules_make_are_those_of_the_config(config):
    assert fusion.token_grid(config) ** 2 == config.tokens_per_image
    rows = {name: layer.rows for name, layer in fusion.counted(config).items()}
    patches, tokens = config.grid_size**2, config.tokens_per_image
    for number in (1, 2):
        assert rows[f"block_fusion.linear_{number}"] == patches
        assert rows[f"spatial_fusion.linear_{number}"] == tokens


class PooledSpatialFusion(modeling_llava_stf.SpatialTokenFusion):
    """A trial: the mean of each window in place of its patches side by side."""

    def __init__(self, config):
        super().__init__(config)
        inner = self.linear_1.out_features
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, inner)

    def windows(self, features):
        return super().windows(features).unflatten(2, (-1, self.window**2)).mean(-1)


def test_another_connector_is_counted_right_and_its_window_is_not_guessed(monkeypatch):
    config = small(fusion_window=2)
    before = {part.name: part for part in count.vision_parts(config)}
    monkeypatch.setattr(modeling_llava_stf, "SpatialTokenFusion", PooledSpatialFusion)
    assert fusion.token_grid(config) == 6
    after = {part.name: part for part in count.vision_parts(config)}
    inner = config.fusion_widths[1]
    assert before["STF"].weights - after["STF"].weights == 3 * 8 * inner
    assert before["STF"].flops - after["STF"].flops == 2 * 36 * 3 * 8 * inner
    assert before["MBTF"] == after["MBTF"]
    with pytest.raises(ConversionError, match="expected a multiple of that"):
        fusion.read_off(weights_of(config), small(vision_feature_layer=[0], fusion_window=1))


def test_a_card_draws_the_tokens_that_the_modules_make(monkeypatch):
    config = small(fusion_window=2)
    drawn = []
    monkeypatch.setattr("hub_card.picture._Pen.grid", lambda pen, corner, cells, fill: drawn.append(cells))
    draw_method(config)
    assert drawn == [12, 12, fusion.token_grid(config)]


# Complete or absent


def test_a_file_appears_complete_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "result.json"
    with pytest.raises(ZeroDivisionError), complete_or_absent(file, file=True) as unfinished:
        unfinished.write_text("half")
        assert not file.exists()
        raise ZeroDivisionError
    assert not list(file.parent.iterdir())
    with complete_or_absent(file, file=True) as unfinished:
        unfinished.write_text("whole")
    assert [path.name for path in file.parent.iterdir()] == ["result.json"] and file.read_text() == "whole"


def test_what_this_process_left_of_a_file_is_removed(tmp_path):
    left = tmp_path / f".result.json@{socket.gethostname()}@{os.getpid()}.partial"
    left.write_text("half")
    with complete_or_absent(tmp_path / "result.json", file=True) as unfinished:
        assert not unfinished.exists()
        unfinished.write_text("whole")
    assert not left.exists() and (tmp_path / "result.json").read_text() == "whole"


def test_an_option_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(TypeError, match="keep_adaptor"):
        convert(GOLDENS / "original", tmp_path / "out", keep_adaptor=True)
