"""The connectors of the comparison: sizes, gradients, and each definition against a computation by hand."""

import math
from functools import partial
from itertools import product

import pytest
import torch
import transformers
from packaging import version
from PIL import Image
from torch import nn
from transformers import BatchFeature, CLIPVisionConfig, LlamaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from examples.shapes.connectors import SYSTEMS, divt, downsampling, quecc, vq_token
from examples.shapes.connectors.divt import DiVT, cover
from examples.shapes.connectors.encode_first import encode_first, tower_features
from examples.shapes.connectors.g_search import search
from examples.shapes.connectors.grouping import Grouping
from examples.shapes.connectors.inside import FAST_V, PYRAMID_DROP, Schedule, dropping
from examples.shapes.connectors.m3 import M3Projector
from examples.shapes.connectors.mqt import MatryoshkaQueries
from examples.shapes.connectors.one_token import OneToken, one_token
from examples.shapes.connectors.parts import HEADS
from examples.shapes.connectors.pooling import PooledProjector
from examples.shapes.connectors.quecc import QueCC, question_vectors
from examples.shapes.connectors.skipping import KEPT, RoutedProjector, skipping
from examples.shapes.connectors.token_packer import TokenPacker
from examples.shapes.scenes import MARGIN
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration

C, D, GRID, LAYERS = 16, 24, 4, 4
N, IMAGE = GRID**2, 50


def config_of(taps=(3, 2, 1), window=2):
    vision = CLIPVisionConfig(
        hidden_size=C,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=8 * GRID,
        patch_size=8,
        projection_dim=C,
    )
    text = LlamaConfig(
        vocab_size=IMAGE + 1,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        max_position_embeddings=64,
    )
    return LlavaSTFConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=list(taps),
        fusion_window=window,
    )


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def config_of_system(system):
    return config_of((3, 2, 1)[: len(system.taps)], system.window)


def output_of(connector, features):
    questions = (torch.randn(len(features), D),) if isinstance(connector, QueCC) else ()
    return connector(features, *questions)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_every_connector_gives_its_tokens_and_learns_with_every_parameter(system):
    config = config_of_system(system)
    connector = system.projector(config).train()
    if isinstance(connector, RoutedProjector):
        connector.routers = nn.Identity()  # these learn in the language model, see the test of their gradient
    tokens = output_of(connector, torch.randn(2, N, len(config.taps) * C))
    if not isinstance(connector, DiVT):
        assert tokens.shape == (2, (GRID // system.window) ** 2, D)
    assert all(of_picture.shape[1] == D and of_picture.isfinite().all() for of_picture in tokens)
    sum(of_picture.square().sum() for of_picture in tokens).backward()
    without = [name for name, weight in connector.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []


def linear(inputs, outputs, bias=True):
    return inputs * outputs + bias * outputs


ATTENTION, TWO, NORM = 4 * linear(C, C), linear(C, D) + linear(D, D), 2 * C
SIZES = {
    "LLaVA-1.5": TWO,
    "average pooling": TWO,
    "STF": linear(4 * C, 16 * C) + linear(16 * C, D),
    "MBTF": linear(3 * C, 4 * C) + linear(4 * C, C) + TWO,
    "MBTF + STF": linear(3 * C, 4 * C) + linear(4 * C, C) + linear(4 * C, 16 * C) + linear(16 * C, D),
    "M3, all counts": TWO,
    "TokenPacker": linear(C, C, False) + NORM + 2 * (linear(3 * C, C) + linear(C, C) + NORM) + ATTENTION + TWO,
    "QueCC": linear(D, C) + 3 * NORM + 2 * linear(C, C) + 5 * C + linear(3 * C, C) + linear(C, C) + ATTENTION + TWO,
    "MQT": 4 * C + 3 * NORM + ATTENTION + C * D,
    "DiVT": N * C + linear(C, C, False) + 4 * linear(C, C) + 3 * NORM + ATTENTION + TWO,
    "VideoLLM-MoD (simulated)": TWO + linear(D, 1),  # one of the two layers is skipped
    "VisToG": 4 * C + NORM + ATTENTION + 3 * linear(C, C) + TWO,
}


@pytest.mark.parametrize("name", SIZES)
def test_every_connector_has_as_many_parameters_as_its_layers(name):
    (system,) = (system for system in SYSTEMS if system.name == name)
    connector = system.projector(config_of_system(system))
    assert sum(weight.numel() for weight in connector.parameters()) == SIZES[name]


# Definitions. A reference attends head by head, and sees only what it is given.


def attend(layer, query, keys, values):
    """One query (C,), keys and values (S, C), by the formula."""
    q_rows, k_rows, v_rows = layer.in_proj_weight.split(C)
    q_bias, k_bias, v_bias = layer.in_proj_bias.split(C)
    q, k, v = q_rows @ query + q_bias, keys @ k_rows.T + k_bias, values @ v_rows.T + v_bias
    size, heads = C // HEADS, []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        shares = (k[:, part] @ q[part] / size**0.5).softmax(0)
        heads.append(shares @ v[:, part])
    return layer.out_proj(torch.cat(heads))


def window_of(row, column, side=GRID // 2):
    return [(2 * row + y) * GRID + 2 * column + x for y in (0, 1) for x in (0, 1)]


def wrong_window_of(row, column):
    return [row * 8 + column * 4 + index for index in range(4)]  # four neighbours in raster order


def agrees(ours, theirs):
    return torch.allclose(ours, theirs, atol=1e-5)


@torch.no_grad()
def test_pooling_projects_the_mean_of_each_window():
    connector, features = PooledProjector(config_of((3,))), torch.randn(1, N, C)

    def by_hand(window):
        means = [features[0, window(*place)].mean(0) for place in product(range(2), repeat=2)]
        return connector.linear_2(connector.act(connector.linear_1(torch.stack(means))))

    assert agrees(connector(features)[0], by_hand(window_of))
    assert not agrees(connector(features)[0], by_hand(wrong_window_of))


@torch.no_grad()
def test_m3_averages_windows_of_the_projected_tokens():
    connector, features = M3Projector(config_of((3,), 1)), torch.randn(3, N, C)
    full = connector(features)
    one, four, all_of_them = connector(features, [1, 4, 16])
    assert agrees(one[0], full[0].mean(0)) and agrees(all_of_them, full[2])

    def by_hand(window):
        return torch.stack([full[1, window(*place)].mean(0) for place in product(range(2), repeat=2)])

    assert agrees(four, by_hand(window_of)) and not agrees(four, by_hand(wrong_window_of))


@torch.no_grad()
def test_token_packer_asks_the_patches_of_each_window():
    connector, features = TokenPacker(config_of()), torch.randn(1, N, 3 * C)

    def by_hand(window, tap=0):
        keys, values = connector.key(features[0]), connector.value(features[0])
        tokens = []
        for place in product(range(2), repeat=2):
            own = window(*place)
            coarse = features[0, own, tap * C : (tap + 1) * C].mean(0)  # bilinear at half the size
            tokens.append(attend(connector.attention.attention, connector.query(coarse), keys[own], values[own]))
        return connector.out(torch.stack(tokens))

    assert agrees(connector(features)[0], by_hand(window_of))
    assert not agrees(connector(features)[0], by_hand(wrong_window_of))
    assert not agrees(connector(features)[0], by_hand(window_of, tap=1))


@torch.no_grad()
def test_quecc_adds_the_question_to_the_query_only():
    connector, features, question = QueCC(config_of()), torch.randn(1, N, 3 * C), torch.randn(1, D)

    def by_hand(window, in_keys=0.0):
        asked = connector.question(question)
        mixed = connector.mixed(features[0, :, :C] + asked)
        both = connector.key_value(features[0]) + in_keys * asked
        tokens = []
        for place in product(range(2), repeat=2):
            own = window(*place)
            kernel = connector.reduce.weight.flatten(1)  # (C, 4), in the order of the window
            query = (kernel * mixed[own].T).sum(1) + connector.reduce.bias
            tokens.append(attend(connector.attention.attention, query, both[own], both[own]))
        return connector.out(torch.stack(tokens))

    ours = connector(features, question)[0]
    assert agrees(ours, by_hand(window_of))
    assert not agrees(ours, by_hand(wrong_window_of)) and not agrees(ours, by_hand(window_of, in_keys=1.0))
    assert not agrees(ours, connector(features, torch.randn(1, D))[0])


@torch.no_grad()
def test_mqt_has_the_content_in_its_keys_and_a_prefix_is_a_budget():
    connector, features = MatryoshkaQueries(config_of((3,))), torch.randn(2, N, C)

    def by_hand(content):
        queries = connector.query_norm(connector.queries + connector.query_positions)
        keys, values = connector.key_norm(content * features[0] + connector.key_positions), features[0]
        tokens = [attend(connector.attention, query, keys, connector.value_norm(values)) for query in queries]
        return connector.out(torch.stack(tokens))

    full = connector(features)
    assert agrees(full[0], by_hand(1.0))
    assert not agrees(full[0], by_hand(0.0))  # the original's keys
    one, four = connector(features, [1, 4])
    assert agrees(one, full[0, :1]) and agrees(four, full[1])


@torch.no_grad()
def test_visto_g_s_token_is_the_mean_of_the_patches_that_chose_it():
    connector, features = Grouping(config_of((3,))).eval(), torch.randn(1, N, C)

    def by_hand(share):
        patches = connector.norm(features[0])
        tokens = torch.stack([token + attend(connector.look, token, patches, patches) for token in connector.tokens])
        logits = connector.query(tokens) @ connector.key(patches).T / C**0.5
        values = connector.value(patches)
        return connector.out(tokens + share(logits, values))

    def hard(logits, values):
        own = [(logits.argmax(0) == token).nonzero().flatten() for token in range(len(logits))]
        return torch.stack([values[patches].mean(0) if len(patches) else torch.zeros(C) for patches in own])

    ours = connector(features)[0]
    assert agrees(ours, by_hand(hard))
    assert not agrees(ours, by_hand(lambda logits, values: logits.softmax(0) @ values))
    assert agrees(ours, connector(features)[0])  # no noise
    connector.train()
    assert not agrees(connector(features)[0], connector(features)[0])
    shares = connector.assignment(torch.randn(1, 4, C), features)
    assert torch.equal(shares.sum(1), torch.ones(1, N)) and set(shares.unique().tolist()) == {0.0, 1.0}


def slow_cover(similar, recount=False):
    left, seeds = set(range(len(similar))), []
    while left:
        counted = left if recount else range(len(similar))
        neighbours = {i: sum(bool(similar[i][j]) for j in counted) for i in left}
        best = max(sorted(left), key=lambda i: neighbours[i])
        seeds.append(best)
        left -= {j for j in left if similar[best][j]} | {best}
    return sorted(seeds)


def random_similar(number=20):
    features = nn.functional.normalize(torch.randn(number, N, 4), dim=-1)
    return features @ features.transpose(1, 2) > 0.6


def test_divt_covers_a_picture_greedily_with_counts_from_the_start():
    similar = random_similar()
    ours = [picture.nonzero().flatten().tolist() for picture in cover(similar)]
    assert ours == [slow_cover(picture) for picture in similar]
    assert ours != [slow_cover(picture, recount=True) for picture in similar]
    assert len({len(seeds) for seeds in ours}) > 1


@torch.no_grad()
def test_divt_s_seed_asks_the_patches_that_are_most_like_it():
    connector, features = DiVT(config_of((3,), 1)), torch.randn(1, N, C)
    connector.fit(features, 6)

    def by_hand(own):
        directions = nn.functional.normalize(features[0], dim=-1)
        cosines = directions @ directions.T
        seeds = slow_cover(cosines > connector.threshold)
        seed_of = [max(seeds, key=lambda seed, patch=patch: float(cosines[patch, seed])) for patch in range(N)]
        keys, values = connector.key(features[0]), connector.value(features[0] + connector.positions)
        tokens = []
        for seed in seeds:
            patches = [patch for patch in range(N) if not own or seed_of[patch] == seed]
            query = connector.query(features[0, seed])
            tokens.append(attend(connector.attention, query, keys[patches], values[patches]))
        return connector.out(torch.stack(tokens))

    (ours,) = connector(features)
    assert agrees(ours, by_hand(own=True)) and not agrees(ours, by_hand(own=False))


def test_divt_s_threshold_gives_the_wanted_mean():
    connector, features = DiVT(config_of((3,), 1)), torch.randn(200, N, 4)
    connector.fit(features, 6)
    mean = cover(divt.similarities(features) > connector.threshold).sum(1).float().mean()
    assert abs(mean - 6) < 0.2


@torch.no_grad()
def test_divt_on_a_plain_picture_has_one_token():
    connector = DiVT(config_of((3,), 1))
    (tokens,) = connector(torch.ones(1, N, C))
    assert tokens.shape == (1, D) and tokens.isfinite().all()


# What is encoded before the prompt has its final length.


@pytest.fixture
def model():
    model = LlavaSTFForConditionalGeneration(config_of((3,), 1)).eval()
    return model.requires_grad_(False)


def inputs_of(placeholders=N, labels=False):
    rows = [[0, 0, 1, *[IMAGE] * placeholders, 7, 8, 9], [1, *[IMAGE] * placeholders, 5, 6, 7, 8, 9]]
    ids = torch.tensor(rows)
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(2, 3, 8 * GRID, 8 * GRID),
    }
    return inputs | ({"labels": ids.masked_fill(ids < 8, -100).masked_fill(ids == IMAGE, -100)} if labels else {})


def test_the_tower_s_features_are_those_that_the_model_uses(model):
    pixels = inputs_of()["pixel_values"]
    expected = model.model.get_image_features(pixels).pooler_output
    ours = model.model.multi_modal_projector.spatial_fusion(
        model.model.multi_modal_projector.block_fusion(tower_features(model, pixels))
    )
    torch.testing.assert_close(ours, torch.stack(expected))


old = version.parse(transformers.__version__).release < (5, 18)
encodes_first = pytest.mark.skipif(old, reason="transformers 5.18 is the first that takes encoded pictures")


@pytest.mark.skipif(not old, reason="transformers 5.18 takes encoded pictures")
def test_an_older_transformers_is_refused(model):
    with pytest.raises(ValueError, match="encoded pictures need 5.18 or later"):
        encode_first(model, inputs_of(), downsampling.encode)


@encodes_first
@pytest.mark.parametrize("trained", [False, True])
def test_placeholders_without_a_token_are_cut_out_and_nothing_else(trained, model):
    inputs = inputs_of(labels=trained)
    tokens = [torch.randn(3, D), torch.randn(5, D)]
    shorter = encode_first(model, inputs, lambda model, inputs: tokens)
    first, padding = [1, *[IMAGE] * 3, 7, 8, 9], [0] * 4
    expected = [first + padding if trained else padding + first, [1, *[IMAGE] * 5, 5, 6, 7, 8, 9]]
    assert shorter["input_ids"].tolist() == expected
    assert shorter["attention_mask"].tolist() == [[int(token != 0) for token in row] for row in expected]
    labels = [[token if token in (8, 9) else -100 for token in row] for row in expected]
    assert shorter["labels"].tolist() == labels if trained else "labels" not in shorter
    assert "pixel_values" not in shorter
    assert shorter["mm_encoder_outputs"]["image"].pooler_output is tokens
    with pytest.raises(ValueError, match=r"\[16, 16\] placeholders for \[3, 20\] tokens"):
        encode_first(model, inputs, lambda model, inputs: [tokens[0], torch.randn(20, D)])


@encodes_first
def test_all_tokens_give_the_same_answer_as_the_model_itself(model):
    inputs = inputs_of()
    whole = encode_first(
        model, inputs, lambda model, inputs: model.get_image_features(inputs["pixel_values"]).pooler_output
    )
    ours, theirs = model(**whole).logits, model(**inputs).logits
    torch.testing.assert_close(ours[:, -3:], theirs[:, -3:])


@encodes_first
def test_in_a_training_every_token_attends_to_one(model):
    """Elsewhere than on a CPU a token that attends to none may have no gradient but NaN."""
    masks = []
    layer = model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    model(**encode_first(model, inputs_of(labels=True), lambda *_: [torch.randn(3, D), torch.randn(5, D)]))
    assert masks[0].dtype == torch.bool and masks[0].any(-1).all()


@encodes_first
def test_a_halved_picture_has_a_quarter_of_the_tokens(model):
    model.model.multi_modal_projector = LlavaMultiModalProjector(model.config)
    shorter = encode_first(model, inputs_of(), downsampling.encode)
    assert (shorter["input_ids"] == IMAGE).sum(1).tolist() == [N // 4] * 2
    assert model(**shorter).logits.isfinite().all()


def test_the_question_s_vector_depends_on_the_first_question_and_not_on_the_answer_or_the_padding(model):
    row = [1, *[IMAGE] * 4, 5, 6, 7, 8, 9, 10, 11]
    labels = [-100] * 8 + [8, 9, -100, 11]

    def vector(ids, labels=None):
        ids = torch.tensor([ids])
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        return question_vectors(model, inputs | ({} if labels is None else {"labels": torch.tensor([labels])}))

    alone = vector(row[:8])  # as the model is asked
    torch.testing.assert_close(vector(row, labels), alone)
    torch.testing.assert_close(vector([0, 0, *row[:8]]), alone)
    torch.testing.assert_close(vector([*row, 0, 0], [*labels, -100, -100]), alone)
    assert not torch.allclose(vector([*row[:7], 12]), alone)
    assert not torch.allclose(vector(row, [-100] * 12), alone)  # the whole conversation would give answers away


@encodes_first
def test_quecc_encodes_a_picture_for_its_question(model):
    config = config_of()
    model = LlavaSTFForConditionalGeneration(config).eval()
    model.model.multi_modal_projector = QueCC(config)
    inputs = inputs_of(placeholders=4)
    both = encode_first(model, inputs, quecc.encode)["mm_encoder_outputs"]["image"].pooler_output
    same = BatchFeature(inputs | {"pixel_values": inputs["pixel_values"][:1].repeat(2, 1, 1, 1)})
    first, second = quecc.encode(model, same)
    assert torch.allclose(first, both[0], atol=1e-6) and not torch.allclose(first, second, atol=1e-3)


# What acts inside the language model.

TWICE = Schedule({1 / 4: 0.5, 3 / 4: 0.25}, ranked_before=True)


@pytest.fixture
def deep():
    """A model of four layers with attention that is far from even."""
    config = config_of((3,), 2)
    config.text_config.num_hidden_layers = 4
    model = LlavaSTFForConditionalGeneration(config).eval().requires_grad_(False)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.mul_(60)
    return model


def by_hand(model, inputs, cuts, ranked_before=True):
    """Runs one prompt layer by layer; returns the last logits, and which pictures' tokens are left behind each cut."""
    ids = inputs["input_ids"]
    picture = (ids[0] == IMAGE).nonzero().flatten().tolist()
    hidden = model.get_input_embeddings()(ids).clone()
    hidden[0, picture] = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    language, gone, left, rows = model.model.language_model, set(), [], {}
    angles = language.rotary_emb(hidden, position_ids=torch.arange(ids.shape[1])[None])
    for number, layer in enumerate(language.layers):
        for turn in (0, 1):  # a ranking by the layer behind a cut needs this layer's attention first
            mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            mask[:, sorted(gone)] = False
            rows[number] = row_of(layer, hidden, angles, mask)
            if turn == 0 and number in cuts:
                ranks = rows[number - 1] if ranked_before else rows[number]
                alive = [place for place in picture if place not in gone]
                keep = max(1, round(cuts[number] * len(picture)))
                gone |= set(sorted(alive, key=lambda place, ranks=ranks: -float(ranks[place]))[keep:])
                left.append(sorted(set(picture) - gone))
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=angles)
    return model.lm_head(language.norm(hidden))[0, -1], left


def row_of(layer, hidden, angles, mask):
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    cos, sin = angles
    shares = []
    for head in range(2):
        part = slice(head * D // 2, (head + 1) * D // 2)
        q, k = attention.q_proj(normed)[0, :, part], attention.k_proj(normed)[0, :, part]
        turned = [x * cos[0] + torch.cat([-x[:, D // 4 :], x[:, : D // 4]], 1) * sin[0] for x in (q, k)]
        scores = (turned[0][-1] @ turned[1].T) / (D // 2) ** 0.5
        shares.append(scores.masked_fill(~mask[-1], -torch.inf).softmax(0))
    return torch.stack(shares).mean(0)


def logits_of(model, inputs, schedule):
    with dropping(model, schedule):
        return model(**inputs).logits[:, -1]


def single(deep):
    inputs = inputs_of(placeholders=4)
    return {name: value[1:] for name, value in inputs.items()}


def test_tokens_that_are_dropped_inside_are_those_of_the_schedule(deep):
    inputs = single(deep)
    expected, left = by_hand(deep, inputs, {1: 0.5, 3: 0.25})
    assert [len(places) for places in left] == [2, 1]
    torch.testing.assert_close(logits_of(deep, inputs, TWICE)[0], expected)
    behind, other = by_hand(deep, inputs, {1: 0.5, 3: 0.25}, ranked_before=False)
    torch.testing.assert_close(logits_of(deep, inputs, Schedule(TWICE.kept, ranked_before=False))[0], behind)
    assert left != other and not torch.allclose(expected, behind, atol=1e-4)  # each is a wrong port of the other
    whole = deep(**inputs).logits[:, -1]
    assert not torch.allclose(expected, whole[0], atol=1e-4)
    torch.testing.assert_close(logits_of(deep, inputs, Schedule({1 / 4: 1.0}, True)), whole)
    torch.testing.assert_close(deep(**inputs).logits[:, -1], whole)  # no hook is left


@pytest.fixture
def routed(deep):
    """The same model with routers; its layers and its pictures matter."""
    for layer in deep.model.language_model.layers:
        for linear in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.mul_(10)
    fused, deep.model.multi_modal_projector = deep.model.multi_modal_projector, RoutedProjector(deep.config)
    deep.model.multi_modal_projector.forward = lambda features: 5 * fused(features)
    for router in deep.model.multi_modal_projector.routers.values():
        nn.init.normal_(router.weight)
    return deep.requires_grad_(False)


ACTING = {
    "FastV": partial(dropping, schedule=FAST_V),
    "PyramidDrop": partial(dropping, schedule=PYRAMID_DROP),
    "twice": partial(dropping, schedule=TWICE),
    "VideoLLM-MoD": skipping,
    "VoCo-LLaMA": one_token,
}


@pytest.mark.parametrize("acting", ACTING.values(), ids=ACTING)
def test_answers_of_a_batch_are_those_of_single_prompts(routed, acting):
    inputs = inputs_of(placeholders=4)
    with acting(routed):
        both = routed.generate(**inputs, do_sample=False, max_new_tokens=5)[:, -5:]
        last = routed.generate(
            **single(routed) | {"pixel_values": inputs["pixel_values"][1:]}, do_sample=False, max_new_tokens=5
        )
    assert both[1].tolist() == last[0, -5:].tolist()


@pytest.mark.parametrize("acting", [skipping, one_token])
def test_what_is_trained_inside_acts_in_training_as_in_answering(routed, acting):
    inputs, steps = inputs_of(placeholders=4), {"output_logits": True, "return_dict_in_generate": True}
    with acting(routed):
        answered = routed.generate(**inputs, do_sample=False, max_new_tokens=6, **steps)
        mask = nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
        whole = inputs | {"input_ids": answered.sequences, "attention_mask": mask}
        trained = routed(**whole, use_cache=False).logits[:, -7:-1]
    torch.testing.assert_close(trained, torch.stack(answered.logits, 1))
    assert not torch.allclose(trained, routed(**whole, use_cache=False).logits[:, -7:-1], atol=1e-3)


def layer_by_layer(model, inputs, of_layer):
    """Runs one prompt; `of_layer` gets number, input, and a function that runs the layer on some of the places."""
    ids = inputs["input_ids"]
    picture = (ids[0] == IMAGE).nonzero().flatten().tolist()
    hidden = model.get_input_embeddings()(ids).clone()
    hidden[0, picture] = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    language = model.model.language_model
    angles = language.rotary_emb(hidden, position_ids=torch.arange(ids.shape[1])[None])
    for number, layer in enumerate(language.layers):

        def run(places, hidden=hidden, layer=layer):
            mask = torch.ones(1, 1, len(places), len(places), dtype=torch.bool).tril()
            there = [angle[:, places] for angle in angles]
            return layer(hidden[:, places], attention_mask=mask, position_embeddings=there)

        hidden = of_layer(number, hidden.clone(), run, picture)
    return model.lm_head(language.norm(hidden))[0, -1]


def test_a_token_that_skips_a_layer_is_not_there_and_leaves_it_as_it_came(routed):
    inputs, routers = single(routed), routed.model.multi_modal_projector.routers

    def by_hand(skipped_layers=(0, 2), weighted=True):
        def of_layer(number, hidden, run, picture):
            everywhere = range(hidden.shape[1])
            if number not in skipped_layers:
                return run([*everywhere])
            router = routers[str(number)] if str(number) in routers else routers["0"]
            scores = {place: float(router(hidden[0, place])) for place in picture}
            chosen = sorted(picture, key=scores.get)[-round(KEPT * len(picture)) :]
            places = [place for place in everywhere if place not in picture or place in chosen]
            added = run(places) - hidden[:, places]
            for place, change in zip(places, added[0], strict=True):
                factor = 2 / (1 + math.exp(-scores[place])) if weighted and place in picture else 1
                hidden[0, place] += factor * change
            return hidden

        return layer_by_layer(routed, inputs, of_layer)

    with skipping(routed):
        ours = routed(**inputs).logits[0, -1]
    assert agrees(ours, by_hand())
    for wrong in (by_hand(skipped_layers=(1, 3)), by_hand(weighted=False), routed(**inputs).logits[0, -1]):
        assert not torch.allclose(ours, wrong, atol=1e-3)


def test_routers_learn_by_what_the_chosen_tokens_add(routed):
    routed.requires_grad_(True).train()
    with skipping(routed):
        routed(**single(routed)).logits[0, -1].sum().backward()
    assert all(weight.grad.any() for weight in routed.model.multi_modal_projector.routers.parameters())


def test_text_behind_the_picture_sees_the_one_token_that_sees_it(deep):
    inputs = single(deep)

    def by_hand(of_the_token=True, shift=0):
        def of_layer(number, hidden, run, picture):
            first, end = picture[0], picture[-1] + 1 + shift  # the place of the token
            until = run([*range(end + 1)])
            behind = run([*range(first), *([end] if of_the_token else []), *range(end + 1, hidden.shape[1])])
            return torch.cat([until, behind[:, first + of_the_token :]], 1)

        return layer_by_layer(deep, inputs, of_layer)

    with one_token(deep):
        ours = deep(**inputs).logits[0, -1]
    assert agrees(ours, by_hand())
    for wrong in (by_hand(of_the_token=False), by_hand(shift=1), deep(**inputs).logits[0, -1]):
        assert not torch.allclose(ours, wrong, atol=1e-3)


def test_each_picture_has_its_own_token(deep):
    acting = OneToken(deep)
    acting.begin(deep, (), {"input_ids": torch.tensor([[1, IMAGE, IMAGE, 5, 6, IMAGE, 7, 8]])})
    seen = (~acting.unseen(in_prompt=True)[0]).long().tril()
    assert seen[:, [1, 2, 5]].tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 0],  # the first picture's token
        [0, 0, 0],
        [0, 0, 1],
        [0, 0, 1],  # the second's
        [0, 0, 0],
    ]
    assert acting.unseen(in_prompt=False)[0, 0].nonzero().flatten().tolist() == [1, 2, 5]


def test_g_search_finds_the_smallest_number_of_each_layer_from_the_first(deep):
    needed, asked = {1 / 4: 3, 2 / 4: 3, 3 / 4: 1}, []

    def right(schedule):
        asked.append(schedule.kept)
        return sum(round(4 * share) >= needed[cut] for cut, share in schedule.kept.items()) + 3 - len(schedule.kept)

    found = search(deep, right)
    assert found == Schedule({1 / 4: 3 / 4, 2 / 4: 3 / 4, 3 / 4: 1 / 4}, ranked_before=True)
    assert asked[0] == {} and len(asked) < 8  # and not each number
    needed[2 / 4] = 4  # with the tokens that the first layer keeps there is no way back
    assert search(deep, right).kept[2 / 4] == 3 / 4


# Films


def test_clusters_are_those_of_k_means_in_the_order_of_their_first_tokens():
    kinds = nn.functional.normalize(torch.randn(3, D), dim=-1)
    own = torch.tensor([2, 0, 0, 1, 2, 2, 1, 0, 2, 1])
    tokens = kinds[own] * torch.rand(10, 1) + 0.01 * torch.randn(10, D)  # of any length
    means = torch.stack([tokens[own == kind].mean(0) for kind in (2, 0, 1)])
    torch.testing.assert_close(vq_token.clusters(tokens, 3), means)
    torch.testing.assert_close(vq_token.clusters(tokens, 10), tokens)
    same = kinds[own]
    torch.testing.assert_close(vq_token.clusters(same, 8), kinds[[2, 0, 1]])  # there are no more


def test_clusters_move_to_where_their_tokens_are():
    # The centres begin at 0.0 and 2.2; 1.05 is nearer to the first, and later to the second.
    angles = torch.tensor([0.0, 0.0, 0.0, 1.05, 1.15, 1.2, 2.2])
    tokens = torch.stack([angles.cos(), angles.sin()], 1)
    torch.testing.assert_close(vq_token.clusters(tokens, 2), torch.stack([tokens[:3].mean(0), tokens[3:].mean(0)]))


@encodes_first
def test_a_film_s_clusters_are_of_all_its_frames(model):
    pixels = torch.randn(2 * len(vq_token.MOVES), 3, 8 * GRID, 8 * GRID)
    frames = model.get_image_features(pixels).pooler_output
    first, second = vq_token.encode(model, {"pixel_values": pixels}, 5)
    half = len(vq_token.MOVES)
    torch.testing.assert_close(first, vq_token.clusters(torch.cat(frames[:half]), 5))
    torch.testing.assert_close(second, vq_token.clusters(torch.cat(frames[half:]), 5))


def test_a_film_is_the_picture_moved_by_less_than_objects_are_from_another_place(tmp_path):
    assert max(abs(step) for move in vq_token.MOVES for step in move) < MARGIN
    picture = Image.effect_noise((32, 32), 50).convert("RGB")
    picture.save(tmp_path / "a.png")
    content = [{"type": "image", "image": str(tmp_path / "a.png")}, {"type": "text", "text": "What is it?"}]
    (message,) = vq_token.filmed([{"role": "user", "content": content}])
    film, text = message["content"]
    assert text == content[1] and film["type"] == "video"
    for frame, (right, down) in zip(film["video"], vq_token.MOVES, strict=True):
        assert frame.getpixel((16 + right, 16 + down)) == picture.getpixel((16, 16))
