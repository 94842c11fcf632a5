"""A server with other settings: compiled, blocks of the default size, a limit of pixels."""

import pytest
from prompts import drawing, message

from .conftest import MODEL
from .test_hostile import HOSTILE

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def compiled(serve):
    options = ["-cc.mode=3", "--enable-prompt-tokens-details"]
    with serve("compiled", MODEL, *options, VLLM_MAX_IMAGE_PIXELS=str(50_000_000)) as server:
        yield server


def test_24_at_once_compiled(compiled, conversations, answers, figures):
    """The answers are those of `generate`, and the log says that vLLM compiled."""
    served = compiled.ask_all(conversations)
    equal = [answer["token_ids"] == expected["token_ids"] for answer, expected in zip(served, answers, strict=True)]
    figures["compiled: of 24 answers equal"] = sum(equal)
    assert all(equal)
    log = compiled.printed()
    assert "CompilationMode.VLLM_COMPILE" in log
    assert "[backbone]" in log  # the compiled part, whose warm-up is logged


def test_the_default_block_is_too_large_for_a_question(compiled, figures):
    """On a CPU a block has 128 tokens, and only whole blocks are found again: a prompt of 59 tokens never is."""
    picture = drawing(1000)[0]
    first, second = (
        compiled.ask(message(question, picture))["usage"]["prompt_tokens_details"]
        for question in ("How many objects are there?", "Describe the picture.")
    )
    figures["prefix cache, default blocks of 128: cached"] = second["cached_tokens"]
    assert first["cached_tokens"] == second["cached_tokens"] == 0


@pytest.mark.parametrize(("name", "status"), [("100 megapixels", 400), ("400 megapixels", 500)])
def test_a_limit_of_pixels(compiled, name, status, conversations, answers):
    """VLLM_MAX_IMAGE_PIXELS makes large pictures a refusal, but PIL's own limit comes first and is still a 500."""
    assert compiled.post(HOSTILE[name][0]()).status_code == status
    assert compiled.ask(conversations[0])["token_ids"] == answers[0]["token_ids"]
