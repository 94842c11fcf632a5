"""vLLM answers as `generate` does, token for token: many at once, streamed, with log-probabilities."""

import pytest

pytestmark = pytest.mark.serving


def test_24_at_once(eager, conversations, answers):
    served = eager.ask_all(conversations)
    assert [answer["prompt_ids"] for answer in served] == [answer["prompt_ids"] for answer in answers]
    assert [answer["token_ids"] for answer in served] == [answer["token_ids"] for answer in answers]
    assert len({answer["text"] for answer in answers}) > 12  # else equality would mean little
