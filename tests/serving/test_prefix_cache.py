"""The prefix cache: a second question about a picture finds the picture's tokens, another picture does not."""

import pytest
from prompts import drawing, message

pytestmark = pytest.mark.serving

QUESTIONS = ["How many objects are there?", "Describe the picture."]


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_picture_is_found_again(eager, answers, reference, figures):
    """Blocks of 32 tokens: 32 of text and pictures of 16 tokens each fill the first three with four pictures."""
    pictures, others = ([drawing(seed + index)[0] for index in range(4)] for seed in (1000, 2000))
    first, again = (message(question, *pictures) for question in QUESTIONS)
    other = message(QUESTIONS[0], *others)
    eager.ask(first)
    hit, miss = eager.ask(again), eager.ask(other)
    figures["prefix cache, blocks of 32: of prompt tokens"] = len(hit["prompt_ids"])
    figures["prefix cache, blocks of 32: cached, same pictures"] = cached(hit)
    figures["prefix cache, blocks of 32: cached, other pictures"] = cached(miss)
    assert hit["token_ids"] == reference()(again)["token_ids"]
    assert miss["token_ids"] == reference()(other)["token_ids"]
    assert cached(hit) >= 96 and cached(miss) == 32


def test_the_order_of_pictures_matters(eager):
    pictures = [drawing(3000 + index)[0] for index in range(4)]
    eager.ask(message(QUESTIONS[0], *pictures))
    assert cached(eager.ask(message(QUESTIONS[1], *pictures[::-1]))) == 32
