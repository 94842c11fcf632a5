"""Ideal tokens: what they say of a scene, and how a language model learns from them."""

import json
from random import Random

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from examples.shapes.generate import generate
from examples.shapes.ideal import IdealTokens, answer_loss, encoded, said_of
from examples.shapes.language_model import build_language_model, train_language_model
from examples.shapes.scenes import PLACES, Print, Scene, Thing
from examples.shapes.text import CHAT_TEMPLATE, PLAIN_TEMPLATE, read_rows, read_tokenizer, train_tokenizer

FOX = Thing("fox", "animal", "orange", "noto", "large", 20.0, 100.0, 22.0)
STAR = Thing("star", "", None, "twemoji", "small", 100.0, 20.0, 15.0)
SEVEN = Print("7", (60.0, 60.0, 70.0, 72.0))
SCENES = {"a": Scene((FOX, STAR), SEVEN), "b": Scene((STAR,), None)}
WIDTH = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("ideal") / "data", 20, 3, seed=5)


@pytest.fixture(scope="module")
def tokenizer(data):
    return train_tokenizer(data, data.parent / "tokenizer")


@pytest.fixture(scope="module")
def ideal(tokenizer):
    return IdealTokens(SCENES, read_tokenizer(tokenizer))


@pytest.fixture(scope="module")
def embeddings(ideal):
    torch.manual_seed(0)
    return nn.Embedding(len(ideal.tokenizer), WIDTH)


def summed(ideal, embeddings, words):
    return embeddings.weight[ideal.tokenizer(words, add_special_tokens=False).input_ids].sum(0)


def test_a_token_says_what_is_true_of_an_object_and_nothing_else():
    assert [*said_of(SCENES["a"])] == [
        (20.0, 100.0, "large orange fox animal bottom left"),
        (100.0, 20.0, "small star top right"),
        (65.0, 66.0, "number 7"),
    ]
    said = set()
    for row, places in enumerate(PLACES):
        for column, place in enumerate(places):
            thing = Thing("star", "", None, "noto", "small", 21.0 + 43 * column, 21.0 + 43 * row, 15.0)
            ((_, _, words),) = said_of(Scene((thing,), None))
            assert place.endswith(words.removeprefix("small star "))
            said.add(words)
    assert len(said) == 9


def test_tokens_are_sums_of_words_in_random_order(ideal, embeddings):
    found = ideal.shuffled("a", 6, embeddings, Random(0))
    said = [words for _, _, words in said_of(SCENES["a"])]
    for words, times in ((said[0], 1), (said[1], 1), (said[2], 1), ("nothing", 3)):
        expected = summed(ideal, embeddings, words)
        assert sum(torch.allclose(token, expected, atol=1e-5) for token in found) == times
    assert len({tuple(ideal.shuffled("a", 6, embeddings, Random(seed))[:, 0].tolist()) for seed in range(9)}) > 3


def test_a_window_says_what_has_its_centre_there(ideal, embeddings):
    found = ideal.windows("a", 4, embeddings)
    empty = summed(ideal, embeddings, "nothing")
    at = {3 * 4 + 0: "large orange fox animal bottom left", 3: "small star top right", 2 * 4 + 2: "number 7"}
    for place, token in enumerate(found):
        expected = summed(ideal, embeddings, at[place]) if place in at else empty
        torch.testing.assert_close(token, expected)
    (alone,) = ideal.windows("a", 1, embeddings)
    torch.testing.assert_close(alone, sum(summed(ideal, embeddings, words) for words in at.values()))


def small_llama(tokenizer):
    words = LlamaTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    small = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=512, **small))


def test_the_loss_is_that_of_the_answers(data, tokenizer):
    model, words = small_llama(tokenizer), read_tokenizer(tokenizer)
    forms = {"captions": PLAIN_TEMPLATE, "dialogues": CHAT_TEMPLATE}
    rows = [encoded(read_rows(data / f"{name}.json")[1], words, form) for name, form in forms.items()]
    pictures = [torch.randn(3, WIDTH) for _ in rows]
    image_token = model.config.vocab_size
    ours = answer_loss(model, image_token, rows, pictures)
    losses = []
    for (_, ids, labels), tokens in zip(rows, pictures, strict=True):
        words_of_row = model.get_input_embeddings()(torch.tensor([min(word, image_token - 1) for word in ids]))
        place = ids.index(image_token)
        words_of_row = torch.cat([words_of_row[:place], tokens, words_of_row[place + 1 :]])
        labels = labels[:place] + [-100] * 3 + labels[place + 1 :]
        logits = model(inputs_embeds=words_of_row[None]).logits[0].log_softmax(-1)
        losses += [-logits[at - 1, label] for at, label in enumerate(labels) if label != -100]
    torch.testing.assert_close(ours, torch.stack(losses).mean())


def test_a_new_language_model_attends_to_what_is_alike(tokenizer):
    model = build_language_model(LlamaTokenizer.from_pretrained(tokenizer))
    for layer in model.model.layers:
        assert torch.equal(layer.self_attn.k_proj.weight, layer.self_attn.q_proj.weight)
        assert layer.self_attn.k_proj.weight.data_ptr() != layer.self_attn.q_proj.weight.data_ptr()


def test_the_language_model_learns_from_all_kinds_of_rows(data, tokenizer, tmp_path):
    folder = train_language_model(data, tokenizer, tmp_path / "llama", steps=40, batch_size=8)
    losses = [entry["loss"] for entry in json.loads((folder / "training_log.json").read_text())["log"]]
    assert losses[-1] < losses[0]
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(LlamaTokenizer.from_pretrained(folder))
