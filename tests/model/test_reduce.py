"""Fewer image tokens without training: the shorter prompt means what it should, alone and in a batch."""

import importlib

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_llava_stf import _reduce, reduce_image_tokens, suggest_budgets
from modeling_llava_stf.modeling_llava_stf import CACHE

SCORES = ["salience", "diverse", "merging", "question", "even", "random", "pool"]
NESTED = ["salience", "diverse", "question", "random"]
EIGHT = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 5},
}
IMAGE = 60  # the image token of the stock model below
needs_encoded_pictures = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="`generate` takes no encoded pictures before 5.18"
)


@pytest.fixture(scope="module")
def stock():
    """A stock LLaVA of transformers with 16 tokens for a picture and random weights."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))  # so that attention looks somewhere
    return model


def prompt(*rows):
    """Rows of token ids with 16 placeholders for each 0, padded on the left, and one picture for each."""
    rows = [[i for token in row for i in ([IMAGE] * 16 if token == 0 else [token])] for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    pictures = int((ids == IMAGE).sum()) // 16
    pixels = torch.randn(pictures, 3, 16, 16, generator=torch.Generator().manual_seed(pictures))
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


ROWS = ([1, 5, 0, 7, 8, 9], [1, 0, 0, 11, 12], [1, 20, 21, 22], [1, 30, 0, 31, 32, 33, 34, 35])
KEEP = [5, 16, 3, 8]


def rows_alone(batch, keep):
    """Each row of the batch without padding, with its pictures and their counts."""
    done = 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[mask.bool()][None]
        pictures = int((ids == IMAGE).sum()) // 16
        own = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pictures:
            own["pixel_values"] = batch["pixel_values"][done : done + pictures]
        yield own, keep[done : done + pictures]
        done += pictures


def new_tokens(model, inputs, **kwargs):
    return model.generate(**inputs, **EIGHT, **kwargs)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("size, width", [(16, 8), (36, 4), (144, 3)])
@pytest.mark.parametrize("kind", ["random", "blank", "two colours", "one outlier"])
def test_a_choice_has_the_count_ascends_and_has_no_token_twice(score, size, width, kind):
    tokens = torch.randn(size, width, generator=torch.Generator().manual_seed(size))
    if kind == "blank":
        tokens = torch.ones(size, width)
    elif kind == "two colours":
        tokens[: size // 3], tokens[size // 3 :] = tokens[0].clone(), tokens[1].clone()
    elif kind == "one outlier":
        tokens[1:] = 1.0
    words = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    before = tokens.clone()
    smaller = set()
    counts = [(round(size**0.5) // w) ** 2 for w in (6, 4, 3, 2) if size**0.5 % w == 0] if score == "pool" else ()
    for count in counts or range(1, size, 5):
        kept, chosen = _reduce._fewer(tokens, count, score, words, seed=3)
        assert kept.shape == (count, width) and kept.isfinite().all()
        assert chosen.shape == (count,) and (chosen.diff() > 0).all() and 0 <= chosen[0] and chosen[-1] < size
        assert torch.equal(_reduce._fewer(tokens, count, score, words, seed=3)[1], chosen)
        if score not in ("merging", "pool"):
            assert torch.equal(kept, tokens[chosen])
        if score in NESTED:
            assert smaller <= set(chosen.tolist())
            smaller = set(chosen.tolist())
    kept, chosen = _reduce._fewer(tokens, size, score, words, seed=3)
    assert torch.equal(kept, tokens) and chosen.tolist() == list(range(size))
    assert torch.equal(tokens, before)


def test_scores_choose_what_their_definitions_say():
    tokens = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [3, 3], [1, -0.1]])
    words = torch.tensor([[0.0, 1]])

    def chosen(score, count):
        return _reduce._fewer(tokens, count, score, words, seed=0)[1].tolist()

    assert chosen("salience", 1) == [3]  # farthest from the mean (1.2, 0.8)
    assert chosen("salience", 2) == [2, 3]
    assert chosen("diverse", 1) == [2] or chosen("diverse", 1) == [3]  # the two with the farthest neighbour
    assert set(chosen("diverse", 3)) & {0, 1, 4} and {2, 3} <= set(chosen("diverse", 3))
    assert chosen("question", 1) == [3]  # farthest in the direction of the word
    assert chosen("even", 2) == [1, 3]
    square = torch.arange(16.0)[:, None]
    means, centres = _reduce._pooled(square, 4)
    assert means.flatten().tolist() == [2.5, 4.5, 10.5, 12.5] and centres.tolist() == [5, 7, 13, 15]
    merged, places = _reduce._merged(torch.tensor([[1.0, 0], [1, 0], [0, 2], [0, 4.0]]), 2)
    assert merged.tolist() == [[1, 0], [0, 3]] and places.tolist() == [1, 3]
    whole, _ = _reduce._merged(tokens, 1)
    torch.testing.assert_close(whole, tokens.mean(0, keepdim=True))  # groups weigh as much as they have members


def test_the_count_may_come_from_the_picture():
    flat, busy = torch.zeros(100, 2), torch.zeros(100, 2)
    busy[[7, 50, 80]] = torch.tensor([[9.0, 0], [0, 9], [-9, 0]])
    assert _reduce._counts("adaptive", [flat, busy], 1) == [1, 12]  # four for each outlier
    assert _reduce._counts("adaptive", [flat, busy], 20) == [20, 20]
    assert _reduce._counts("adaptive", [busy[:10]], 1) == [4] and _reduce._counts("adaptive", [busy[5:9]], 1) == [4]
    assert _reduce._counts(0.25, [flat, busy], 1) == [25, 25]
    assert _reduce._counts([0.01, "adaptive"], [flat, busy], 1) == [1, 12]
    assert _reduce._counts(torch.tensor([3, 4]), [flat, busy], 1) == [3, 4]
    assert _reduce._counts(1.0, [flat], 1) == [100] and _reduce._counts(1, [flat], 1) == [1]


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("way", WAYS)
def test_mixed_counts_in_a_batch_give_the_answers_of_single_prompts(stock, way, positions):
    if way == "chunks" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("before 5.18 a chunked prefill drops embeddings")
    if way == "no cache" and positions == "original":
        pytest.skip("see the test of packed sequences")
    batch = prompt(*ROWS)
    reduced = reduce_image_tokens(stock, batch, keep=KEEP, positions=positions)
    assert (reduced["input_ids"] == IMAGE).sum(1).tolist() == [5, 19, 0, 8]
    together = new_tokens(stock, reduced, **WAYS[way])
    for row, (own, keep) in zip(together, rows_alone(batch, KEEP), strict=True):
        alone = reduce_image_tokens(stock, own, keep=keep, positions=positions)
        assert torch.equal(row, new_tokens(stock, alone, **WAYS[way])[0])


def test_all_tokens_are_today_s_answer(stock):
    batch = prompt(*ROWS)
    for keep in (16, 1.0, [16] * 4):
        reduced = reduce_image_tokens(stock, batch, keep=keep)
        assert torch.equal(reduced["input_ids"], batch["input_ids"])
        assert torch.equal(new_tokens(stock, reduced), new_tokens(stock, batch))


def by_hand(model, inputs, keep, steps, wrong=False):
    """Logits of each step: the chosen features between the text's embeddings, at their old positions, uncached."""
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    distance = (features - features.mean(0)).norm(dim=-1)
    chosen = distance.topk(keep).indices.sort().values
    ids = inputs["input_ids"][0]
    embeddings = model.get_input_embeddings()(ids)
    at = (ids == model.config.image_token_id).nonzero()[:, 0]
    embeddings[at] = features
    left = torch.tensor(
        [place for place in range(len(ids)) if place not in set(at.tolist()) - set(at[chosen].tolist())]
    )
    embeddings, positions, logits = embeddings[left], left, []
    for _ in range(steps):
        length = len(embeddings)
        causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        out = model.model.language_model(
            inputs_embeds=embeddings[None], position_ids=positions[None], attention_mask=causal, use_cache=False
        )
        logits.append(model.lm_head(out.last_hidden_state[:, -1])[0])
        new = model.get_input_embeddings()(logits[-1].argmax()[None])
        embeddings = torch.cat([embeddings, new])
        positions = torch.cat([positions, torch.tensor([length if wrong else int(positions[-1]) + 1])])
    return torch.stack(logits)


@torch.no_grad()
def test_positions_stay_and_new_tokens_follow_the_last_position(stock):
    inputs = prompt([1, 5, 0, 7, 8, 9])
    reduced = reduce_image_tokens(stock, inputs, keep=5)
    assert reduced["position_ids"][0, -3:].tolist() == [18, 19, 20] and reduced["position_ids"][0, :2].tolist() == [
        0,
        1,
    ]
    out = stock.generate(
        **reduced, do_sample=False, max_new_tokens=4, return_dict_in_generate=True, output_logits=True, eos_token_id=-1
    )
    logits = torch.cat(out.logits)
    torch.testing.assert_close(logits, by_hand(stock, inputs, 5, 4), atol=1e-5, rtol=1e-5)
    counted = by_hand(stock, inputs, 5, 4, wrong=True)  # as if the cached tokens were counted
    assert (counted[1:] - logits[1:]).abs().max() > 1e-3
    compact = reduce_image_tokens(stock, inputs, keep=5, positions="compact")
    assert compact["position_ids"][0].tolist() == list(range(10))


@needs_encoded_pictures
def test_drafts_from_the_prompt_continue_the_positions(stock):
    reduced = reduce_image_tokens(stock, prompt([1, 5, 0, 7, 8, 9, 7, 8, 9, 7, 8]), keep=5)
    assert torch.equal(new_tokens(stock, reduced, prompt_lookup_num_tokens=2), new_tokens(stock, reduced))


def test_a_later_turn_on_the_same_cache_continues_from_the_last_position(stock):
    reduced = reduce_image_tokens(stock, prompt([1, 5, 0, 7, 8, 9]), keep=5)
    first = stock.generate(**reduced, **EIGHT, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[40, 41, 42]])], dim=1)
    more = longer.shape[1] - reduced["position_ids"].shape[1]
    positions = torch.cat([reduced["position_ids"], reduced["position_ids"][:, -1:] + torch.arange(1, more + 1)], dim=1)
    cache = first[CACHE]
    second = stock.generate(
        longer, attention_mask=torch.ones_like(longer), position_ids=positions, **{CACHE: cache}, **EIGHT
    )
    told = [int(token) for token in first.sequences[0, reduced["input_ids"].shape[1] :]]
    whole = reduce_image_tokens(stock, prompt([1, 5, 0, 7, 8, 9, *told, 40, 41, 42]), keep=5)
    assert torch.equal(second[:, longer.shape[1] :], new_tokens(stock, whole))


@needs_encoded_pictures
@torch.no_grad()
def test_a_forward_pass_gives_the_logits_of_generate(stock):
    reduced = reduce_image_tokens(stock, prompt(*ROWS), keep=KEEP)
    out = stock.generate(**reduced, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(stock(**reduced).logits[:, -1], out.logits[0], atol=1e-5, rtol=1e-5)


def test_inputs_and_result_stay_as_they_are(stock):
    batch = prompt(*ROWS)
    before = {name: value.clone() for name, value in batch.items()}
    reduced = reduce_image_tokens(stock, batch, keep=5)
    assert all(torch.equal(batch[name], before[name]) for name in before)
    beams = new_tokens(stock, reduced, num_beams=2)
    assert torch.equal(new_tokens(stock, reduced, num_beams=2), beams)
    assert torch.equal(new_tokens(stock, reduced), new_tokens(stock, reduce_image_tokens(stock, batch, keep=5)))


@needs_encoded_pictures
def test_transformers_changes_the_caller_s_encoded_pictures(stock):
    """When this fails, `_Reduced` can go."""
    reduced = reduce_image_tokens(stock, prompt(*ROWS), keep=5)
    plain = dict(reduced)
    new_tokens(stock, plain, num_beams=2)
    assert len(plain["mm_encoder_outputs"]["image"].pooler_output) == 8


def test_transformers_takes_gaps_for_the_borders_of_packed_sequences():
    """When the second part fails, flash attention need not be refused."""
    gap = torch.tensor([[0, 1, 4, 5]])
    assert find_packed_sequence_indices(gap).tolist() == [[0, 0, 1, 1]]
    assert bool(_is_packed_sequence(gap, batch_size=1))


@torch.no_grad()
def test_an_engine_s_attention_may_send_several_requests_as_one_row(model, monkeypatch):
    def engine(module, query, key, value, mask, **kwargs):
        assert mask is None
        return query.transpose(1, 2), None

    AttentionInterface.register("engine", engine)
    monkeypatch.setattr(model.config.text_config, "_attn_implementation", "engine")
    model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), position_ids=torch.tensor([[0, 1, 2, 9, 0]]), use_cache=False)


@torch.no_grad()
def test_gaps_without_mask_and_cache_are_refused(model, inputs_of):
    inputs = inputs_of("USER: <image>\nWhat is this? ASSISTANT:")
    reduced = reduce_image_tokens(model, inputs, keep=0.25)
    answer = new_tokens(model, reduced)
    bare = {name: value for name, value in reduced.items() if name != "attention_mask"}
    if "inputs_embeds" in bare:  # before transformers 5.18; a forward pass takes one of the two
        del bare["input_ids"]
        assert torch.equal(new_tokens(model, reduced, use_cache=False), answer)  # it uses a cache all the same
    else:
        with pytest.raises(ValueError, match="has gaps"):
            new_tokens(model, reduced, use_cache=False)  # it drops a mask of ones
    with pytest.raises(ValueError, match="has gaps"):
        model(**bare, use_cache=False)
    mask = {"attention_mask": reduced["attention_mask"]}
    right = [model(**bare, **given).logits for given in (mask, mask | {"use_cache": False}, {})]
    torch.testing.assert_close(right[1], right[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right[2], right[0], atol=1e-5, rtol=1e-5)
    compact = reduce_image_tokens(model, inputs, keep=0.25, positions="compact")
    assert torch.equal(new_tokens(model, compact, use_cache=False), new_tokens(model, compact))
    assert torch.equal(new_tokens(model, reduced), answer)


MEDIA = {
    "USER: <image>\nWhat is this? ASSISTANT:": (["gradient.png"], []),
    "USER: <image><image>\nWhat differs? ASSISTANT:": (["shapes.png", "text.png"], []),
    "USER: <video>\nWhat happens? ASSISTANT:": ([], [["frame_0.png", "frame_1.png", "frame_2.png"]]),
    "USER: Name a city. ASSISTANT:": ([], []),
}


@pytest.fixture
def inputs_of(processor, picture):
    def prepare(*prompts):
        images = [picture(name) for text in prompts for name in MEDIA[text][0]]
        videos = [[picture(name) for name in video] for text in prompts for video in MEDIA[text][1]]
        return processor(
            images=images or None, videos=videos or None, text=list(prompts), padding=True, return_tensors="pt"
        )

    return prepare


@pytest.mark.parametrize("score", SCORES)
def test_stf_with_pictures_side_by_side_and_videos(model, inputs_of, score):
    every = model.config.tokens_per_image
    keep = [every // 4] * 6
    batch = inputs_of(*MEDIA)
    reduced = reduce_image_tokens(model, batch, keep=keep, score=score)
    counts = (reduced["input_ids"] == model.config.image_token_id).sum(1).tolist()
    assert counts == [every // 4 * pictures for pictures in (1, 2, 3, 0)]
    together = new_tokens(model, reduced)
    for row, text in zip(together, MEDIA, strict=True):
        alone = inputs_of(text)
        assert torch.equal(row, new_tokens(model, reduce_image_tokens(model, alone, keep=every // 4, score=score))[0])


def test_question_follows_the_words_behind_the_picture_or_all_of_them(stock):
    def places(*row):
        return tuple(reduce_image_tokens(stock, prompt(row), keep=3, score="question")["position_ids"][0].tolist())

    assert len({places(1, 0, word) for word in range(5, 30)}) > 3
    assert len({places(1, word, 0, 7) for word in range(5, 30)}) == 1
    assert len({places(1, word, 0) for word in range(5, 30)}) > 3


def test_a_score_of_one_s_own(stock):
    inputs = prompt([1, 0, 7])
    reduced = reduce_image_tokens(stock, inputs, keep=2, score=lambda tokens, count: [15, 3])
    assert reduced["position_ids"].tolist() == [[0, 4, 16, 17]]
    for wrong in ([3, 3], [0, 16], [1]):
        with pytest.raises(ValueError, match="expected 2 different indices below 16"):
            reduce_image_tokens(stock, inputs, keep=2, score=lambda tokens, count, wrong=wrong: wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        [0.5, 3],
        torch.tensor([float("nan"), 3]),
        [-1, 3],
        None,
        "03",
        {0, 3},
        torch.zeros(16),
        torch.ones(2, device="meta"),
    ],
    ids=str,
)
def test_a_score_that_returns_no_indices(stock, wrong):
    with pytest.raises(ValueError, match="(?s)`score` returned .*expected 2 different indices below 16"):
        reduce_image_tokens(stock, prompt([1, 0, 7]), keep=2, score=lambda tokens, count: wrong)


def test_a_score_may_change_the_tokens_that_it_gets(stock):
    def centred(tokens, count):
        tokens -= tokens.mean(0)
        return tokens.norm(dim=-1).argsort(descending=True)[:count]

    def kept(score):
        reduced = reduce_image_tokens(stock, prompt([1, 0, 7]), keep=2, score=score)
        encoded = reduced.get("mm_encoder_outputs")
        return encoded["image"].pooler_output[0] if encoded else reduced["inputs_embeds"]

    assert torch.equal(kept(centred), kept("salience"))


def test_right_padding_position_ids_and_types_of_the_caller(stock):
    left = prompt([1, 0, 7, 8], [1, 0, 7, 8, 9, 10])
    right = dict(left)
    for name in ("input_ids", "attention_mask"):
        right[name] = left[name].clone()
        right[name][0] = left[name][0].roll(-2)
    token_types = (left["input_ids"] == IMAGE).long()
    types = reduce_image_tokens(stock, left | {"mm_token_type_ids": token_types}, keep=4)["mm_token_type_ids"]
    ours, theirs = (reduce_image_tokens(stock, inputs, keep=4) for inputs in (left, right))
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["position_ids"], theirs["position_ids"])
    assert torch.equal(types, (ours["input_ids"] == IMAGE).long())
    given = torch.arange(100, 100 + left["input_ids"].shape[1])[None]
    assert int(reduce_image_tokens(stock, left | {"position_ids": given}, keep=4)["position_ids"][1, 0]) == 100
    reduce_image_tokens(stock, left | {"labels": None, "position_ids": None}, keep=4)
    without = {name: value for name, value in prompt([1, 0, 7]).items() if name != "attention_mask"}
    assert reduce_image_tokens(stock, without, keep=4)["attention_mask"].tolist() == [[1] * 6]


@pytest.mark.parametrize("keep", [0, -1, 17, 0.0, 1.5, True, "all", None, [4], [4, 4, 4], [4, 99], float("nan")])
def test_counts_that_are_refused(stock, keep):
    with pytest.raises(ValueError, match="`keep`"):
        reduce_image_tokens(stock, prompt([1, 0, 0, 7]), keep=keep)


def test_numbers_of_numpy_and_torch(stock):
    inputs = prompt([1, 0, 0, 7])
    for keep in ([np.int64(8), torch.tensor(4)], np.array([8, 4]), torch.tensor([8, 4]), [np.float64(0.5), 0.25]):
        assert int((reduce_image_tokens(stock, inputs, keep=keep)["input_ids"] == IMAGE).sum()) == 12
    few = {"keep": 0.1, "min_tokens": np.int64(3), "score": "random", "seed": np.int64(1)}
    assert int((reduce_image_tokens(stock, inputs, **few)["input_ids"] == IMAGE).sum()) == 6


def test_mistakes(stock, model, inputs_of):
    inputs = prompt([1, 0, 7])
    for changed, message in (
        ({"labels": inputs["input_ids"]}, "labels"),
        ({"input_ids": [[1, 2]]}, "must be a tensor"),
        ({"input_ids": inputs["input_ids"][:, :-3], "attention_mask": None}, "do not match.*text has 14"),
        ({"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}, "2 pictures or frames give 32"),
        ({"pixel_values": None}, "do not match.*text has 16"),
        ({"unknown": torch.ones(3)}, "`unknown`"),
        ({"attention_mask": torch.ones(1, 3)}, "`attention_mask`"),
        ({"position_ids": torch.arange(5)[None]}, "`position_ids`"),
        ({"position_ids": [*range(18)]}, "`position_ids`"),
        ({"position_ids": torch.zeros(3, 1, 18)}, "`position_ids`"),
    ):
        with pytest.raises(ValueError, match=message):
            reduce_image_tokens(stock, inputs | changed, keep=4)
    for value in (float("nan"), float("inf")):
        for score in SCORES:
            with pytest.raises(ValueError, match="not finite in torch.float32"):
                reduce_image_tokens(
                    stock,
                    inputs | {"pixel_values": torch.full_like(inputs["pixel_values"], value)},
                    keep=4,
                    score=score,
                )
    with pytest.raises(ValueError, match="prompt 1 has no words"):
        reduce_image_tokens(stock, prompt([1, 0, 7], [0]), keep=4, score="question")
    for wrong, message in (
        ({"score": "best"}, "'salience'"),
        ({"positions": "gaps"}, "'compact'"),
        ({"score": "pool", "keep": 5}, r"it can make \[16, 4, 1\]"),
        ({"min_tokens": 0}, "min_tokens"),
        ({"min_tokens": 2.5, "keep": 0.1}, "`min_tokens` is 2.5, expected 1 to 16"),
        ({"min_tokens": "4"}, "`min_tokens` is '4', expected 1 to 16"),
        ({"seed": 1.5, "score": "random"}, "`seed` is 1.5"),
        ({"seed": None}, "`seed` is None"),
        ({"keep": {4}}, r"`keep` is \{4\}"),
    ):
        with pytest.raises(ValueError, match=message):
            reduce_image_tokens(stock, inputs, **{"keep": 4} | wrong)
    with pytest.raises(ValueError, match="not yet reduced"):  # twice
        reduce_image_tokens(stock, reduce_image_tokens(stock, inputs, keep=4), keep=2)
    # The first row has a placeholder too few, the second one too many.
    two = prompt([1, 0, 7], [1, 0, 7])
    two["input_ids"][0, 1], two["input_ids"][1, -1] = 7, IMAGE
    with pytest.raises(ValueError, match=r"its rows \[15, 17\]"):
        reduce_image_tokens(stock, two, keep=4)


def test_flash_attention_is_refused_where_it_would_see_packed_sequences(stock, monkeypatch):
    monkeypatch.setattr(stock.config.text_config, "_attn_implementation_internal", "flash_attention_2")
    inputs = prompt([1, 0, 7])
    with pytest.raises(ValueError, match="flash attention"):
        reduce_image_tokens(stock, inputs, keep=4)
    reduce_image_tokens(stock, inputs, keep=16)
    reduce_image_tokens(stock, inputs, keep=4, positions="compact")


def test_suggested_budgets_grow_with_the_picture_and_its_threshold(model, processor, picture, inputs_of):
    grey, drawing, noise = (torch.zeros(1, 3, *[model.config.vision_config.image_size] * 2) for _ in range(3))
    drawing = processor(images=picture("shapes.png"), return_tensors="pt")["pixel_values"]
    noise = torch.randn(grey.shape, generator=torch.Generator().manual_seed(0))
    pixels = torch.cat([grey, drawing, noise])
    allowed = model.config.allowed_token_budgets
    suggested = suggest_budgets(model, pixels, budgets=allowed)
    assert set(suggested) <= set(allowed) and suggested == suggest_budgets(model, {"pixel_values": pixels})
    assert suggested == [suggest_budgets(model, image[None])[0] for image in pixels]
    by_threshold = [suggest_budgets(model, pixels, threshold) for threshold in (-1, 0.5, 0.9, 1.0)]
    assert by_threshold[0] == [min(allowed)] * 3 and by_threshold[-1] == [max(allowed)] * 3
    for lower, higher in zip(by_threshold, by_threshold[1:], strict=False):
        assert all(few <= many for few, many in zip(lower, higher, strict=True))
    assert suggest_budgets(model, pixels, 1.0, budgets=[1]) == [1] * 3  # the largest there is
    for budgets in (np.array(allowed), torch.tensor(allowed), tuple(allowed)):
        assert suggest_budgets(model, pixels, np.float64(0.65), budgets) == suggested
    model.config.token_budgets = [max(allowed)]
    assert suggest_budgets(model, pixels) == [max(allowed)] * 3
    text = "USER: <image>\nWhat is this? ASSISTANT:"
    inputs = processor(images=picture("shapes.png"), text=text, return_tensors="pt")
    inputs = processor(
        images=picture("shapes.png"), text=text, max_soft_tokens=suggest_budgets(model, inputs), return_tensors="pt"
    )
    assert new_tokens(model, inputs).shape == (1, 8)
    assert len(suggest_budgets(model, inputs_of(*MEDIA))) == 6


def test_groups_are_those_of_the_greedy_cover():
    angles = torch.tensor([0.0, 10, 20, 30, 90, 95, 180]).deg2rad()
    patches = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1.0, 8)[:, None]
    # 10 covers 0, 10, 20; then 30 alone, though 20 is near it; 90 covers 95; 180.
    assert _reduce._groups(patches, 0.98) == 4
    assert _reduce._groups(patches, 0.9999) == 7 and _reduce._groups(patches, -1.1) == 1
    assert _reduce._groups(torch.ones(5, 3), 0.99) == 1


def test_suggestions_ask_for_no_untrained_number(model, picture, processor, caplog):
    pixels = processor(images=[picture("shapes.png")] * 2, return_tensors="pt")["pixel_values"]
    allowed = model.config.allowed_token_budgets
    expected = suggest_budgets(model, pixels, budgets=allowed[1:])
    module = importlib.import_module(type(model).__module__)
    type(module.logger).warning_once.cache_clear()
    caplog.clear()
    model.config.token_budgets = allowed[1:]
    assert suggest_budgets(model, pixels) == suggest_budgets(model, pixels[None]) == expected
    assert "expect worse answers" not in caplog.text
    model.get_image_features(pixels)
    assert "expect worse answers" in caplog.text


def test_suggestions_that_are_refused(stock, model):
    pixels = torch.zeros(1, 3, *[model.config.vision_config.image_size] * 2)
    for arguments, message in (
        ((stock, pixels), "has no token budgets"),
        ((model, {"input_ids": pixels}), "no `pixel_values`"),
        ((model, pixels, 1.5), "`threshold` is 1.5"),
        ((model, pixels, 0.5, [7]), r"`budgets` is \[7\], expected numbers from"),
        ((model, pixels, 0.5, []), r"`budgets` is \[\], expected numbers from"),
        ((model, pixels, 0.5, 1), "`budgets` is 1, expected numbers from"),
        ((model, pixels, 0.5, [1.0]), r"`budgets` is \[1.0\], expected numbers from"),
        ((model, pixels, 0.5, [True]), r"`budgets` is \[True\], expected numbers from"),
        ((model, pixels, "0.5"), "`threshold` is '0.5'"),
        ((model, pixels, None), "`threshold` is None"),
    ):
        with pytest.raises(ValueError, match=message):
            suggest_budgets(*arguments)


def test_a_budget_and_a_reducer_together(model, processor, picture):
    smaller = sorted(model.config.allowed_token_budgets)[-2]
    text = ["USER: <image>\nWhat is this? ASSISTANT:"] * 2
    images = [picture("shapes.png"), picture("text.png")]
    every = model.config.tokens_per_image
    inputs = processor(images=images, text=text, max_soft_tokens=[smaller, every], return_tensors="pt", padding=True)
    reduced = reduce_image_tokens(model, inputs, keep=0.5)
    assert (reduced["input_ids"] == model.config.image_token_id).sum(1).tolist() == [max(1, smaller // 2), every // 2]
    alone = processor(images=images[0], text=text[0], max_soft_tokens=smaller, return_tensors="pt")
    alone = reduce_image_tokens(model, alone, keep=0.5)
    assert torch.equal(new_tokens(model, reduced)[0], new_tokens(model, alone)[0])


@pytest.mark.parametrize("rows", [1, 2])
def test_budgets_in_another_order_are_refused(rows, model, processor, picture):
    every, smaller = sorted(model.config.allowed_token_budgets, reverse=True)[:2]
    text = ["USER: <image> <image> ASSISTANT:"] if rows == 1 else ["USER: <image> ASSISTANT:"] * 2
    images = [picture("shapes.png"), picture("text.png")]
    inputs = processor(images=images, text=text, max_soft_tokens=[smaller, every], return_tensors="pt", padding=True)
    assert reduce_image_tokens(model, inputs, keep=1)["input_ids"].shape[0] == rows
    inputs["image_tokens"] = [every, smaller]
    with pytest.raises(ValueError, match="do not match.*in its order"):
        reduce_image_tokens(model, inputs, keep=1)


def test_padding_without_a_mask_is_found_as_generate_finds_it(stock, monkeypatch):
    batch = prompt(*ROWS)
    bare = {name: value for name, value in batch.items() if name != "attention_mask"}
    for keep in (KEEP, 16):
        found, told = reduce_image_tokens(stock, bare, keep=keep), reduce_image_tokens(stock, batch, keep=keep)
        assert all(torch.equal(found[name], told[name]) for name in ("input_ids", "attention_mask", "position_ids"))
    first = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    assert torch.equal(stock.generate(**found, **first).logits[0], stock.generate(**bare, **first).logits[0])
    monkeypatch.setattr(stock.generation_config, "eos_token_id", [2, 0])  # then `generate` masks nothing
    assert bool(reduce_image_tokens(stock, bare, keep=16)["attention_mask"].all())


@pytest.mark.parametrize("score", ["diverse", "merging", "question"])
def test_autocast_does_not_change_the_choice(stock, score, monkeypatch):
    tokens = 9 + torch.randn(16, 32, generator=torch.Generator().manual_seed(0))  # cosines next to 1
    encoded = BaseModelOutputWithPooling(pooler_output=[tokens])
    monkeypatch.setattr(stock, "get_image_features", lambda **_: encoded)
    inputs = prompt([1, 0, 7, 8])
    told = reduce_image_tokens(stock, inputs, keep=6, score=score)["position_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reduce_image_tokens(stock, inputs, keep=6, score=score)["position_ids"], told)


def test_autocast_does_not_change_suggestions(model, monkeypatch):
    angles = torch.tensor([0.0, 2.5]).deg2rad()  # the cosine, 0.99905, is 1 in bfloat16, and so is 0.9985
    states = torch.stack([angles.cos(), angles.sin()], dim=1)[[0, 0, 1]][None]  # a class token and two patches
    encoded = BaseModelOutputWithPooling(last_hidden_state=states)
    monkeypatch.setattr(model, "get_image_features", lambda *_, **__: encoded)
    pixels = torch.zeros(1, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert suggest_budgets(model, pixels, 0.9985, [4, 1]) == [1]
        assert suggest_budgets(model, pixels, 0.9995, [4, 1]) == [4]


def test_no_budget_is_suggested_for_features_that_are_not_finite(model, picture, processor):
    pixels = processor(images=[picture("shapes.png")] * 2, return_tensors="pt")["pixel_values"]
    for value in (float("nan"), float("inf")):
        broken = pixels.clone()
        broken[1, 0, 0, 0] = value
        with pytest.raises(ValueError, match="not finite in torch.float32"):
            suggest_budgets(model, broken)


def test_the_default_device_does_not_matter():
    tokens = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    drawn, groups = _reduce._random(tokens, 5, tokens[:0], seed=3), _reduce._groups(tokens, 0.5)
    with torch.device("meta"):
        assert torch.equal(_reduce._random(tokens, 5, tokens[:0], seed=3), drawn)
        assert _reduce._groups(tokens, 0.5) == groups


def test_a_wrapped_model_is_refused_in_one_line(stock, model):
    with pytest.raises(ValueError, match="is a `DataParallel`.*pass `model.module`"):
        reduce_image_tokens(torch.nn.DataParallel(stock), prompt([1, 0, 7]), keep=4)
    with pytest.raises(ValueError, match="A `DataParallel` has no token budgets"):
        suggest_budgets(torch.nn.DataParallel(model), torch.zeros(1, 3, 4, 4))


def test_compact_positions_begin_where_the_caller_s_begin(stock):
    batch = prompt([1, 0, 7], [1, 0, 7, 8])
    given = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) + torch.tensor([[100], [200]])}
    reduced = reduce_image_tokens(stock, batch | given, keep=2, positions="compact")
    assert reduced["position_ids"].tolist() == [[0, 100, 101, 102, 103], [200, 201, 202, 203, 204]]
    with pytest.raises(ValueError, match="`position_ids`"):
        reduce_image_tokens(stock, batch | {"position_ids": torch.arange(5)}, keep=2, positions="compact")


def test_pictures_of_different_sizes_are_refused(stock):
    """A Pixtral (`llava`, too) has a token behind each row of patches, and grids that are not square."""
    with pytest.raises(ValueError, match="`image_sizes`.*no square grid"):
        reduce_image_tokens(stock, prompt([1, 0, 7]) | {"image_sizes": torch.tensor([[8, 32]])}, keep=4, score="pool")


def test_suggestions_need_a_tensor(model, picture, processor):
    for kind in (None, "np"):
        with pytest.raises(ValueError, match="return_tensors='pt'"):
            suggest_budgets(model, processor(images=picture("shapes.png"), return_tensors=kind))


def test_a_checkpoint_without_a_cache_is_refused_where_it_would_see_packed_sequences(stock, monkeypatch):
    """Training with gradient checkpointing leaves such checkpoints behind."""
    one, equal, padded = prompt([1, 0, 7]), prompt([1, 0, 7], [1, 0, 8]), prompt([1, 0, 7], [1, 0, 8, 9])
    no_image = {"suppress_tokens": [IMAGE]}
    with_cache = new_tokens(stock, reduce_image_tokens(stock, padded, keep=4), **no_image)
    monkeypatch.setattr(stock.generation_config, "use_cache", False)
    for inputs in (one, equal):
        with pytest.raises(ValueError, match="`model.generation_config.use_cache` is False.*'compact'"):
            reduce_image_tokens(stock, inputs, keep=4)
        reduce_image_tokens(stock, inputs, keep=16)
        reduce_image_tokens(stock, inputs, keep=4, positions="compact")
    assert torch.equal(new_tokens(stock, reduce_image_tokens(stock, padded, keep=4), **no_image), with_cache)
