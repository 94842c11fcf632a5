"""A token budget for each request: vLLM counts, caches and answers as `generate` does with that budget."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from prompts import drawing, encoded, generated, message

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf.__main__ import DEFAULT_MODEL as MODEL

pytestmark = pytest.mark.serving

BUDGETS = (4, 16, 1, None)


@pytest.fixture(scope="module")
def answer_of():
    """The answer of `generate` to a conversation whose pictures have so many tokens; None is all of them."""
    model = LlavaSTFForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    processor = LlavaSTFProcessor.from_pretrained(MODEL)

    def answer(messages, budget, **image_options):
        processor.image_processor.max_soft_tokens = budget
        return generated(processor, model, messages, **image_options)

    return answer


def ask(server, messages, budget):
    options = {} if budget is None else {"mm_processor_kwargs": {"max_soft_tokens": budget}}
    return server.ask(messages, **options)


def ids(answer):
    return answer["prompt_ids"], answer["token_ids"]


@pytest.fixture(scope="module")
def trusting(serve):
    """A server that lets a request choose, which vLLM 0.32 does not do unasked."""
    options = ("--enforce-eager", "--block-size", "32", "--trust-request-mm-kwargs")
    with serve("budgets", MODEL, *options) as server:
        yield server


def test_every_budget_at_once(trusting, conversations, answer_of, figures):
    """The same pictures in requests of several budgets: none gets the tokens that are cached for another."""
    requests = [(messages, budget) for messages in conversations for budget in BUDGETS]
    with ThreadPoolExecutor(len(requests)) as threads:
        served = list(threads.map(lambda request: ask(trusting, *request), requests))
    expected = [answer_of(*request) for request in requests]
    equal = [ids(answer) == ids(other) for answer, other in zip(served, expected, strict=True)]
    figures["budgets: of 96 answers equal"] = sum(equal)
    assert all(equal)
    lengths = [len(answer["prompt_ids"]) for answer in served[:4]]
    assert lengths[0] + 12 == lengths[1] == lengths[2] + 15 == lengths[3]
    texts = {(index // 4, answer["text"]) for index, answer in enumerate(served)}
    assert len(texts) > len(conversations)  # a budget changes answers, so that equality means something


def test_one_after_the_other(trusting, conversations, answer_of):
    for budget in (*BUDGETS, *BUDGETS):
        assert ids(ask(trusting, conversations[0], budget)) == ids(answer_of(conversations[0], budget))


@pytest.mark.parametrize("budget", [5, 0, "4", True, [4], [16, 4], {"image": 4}], ids=str)
def test_other_budgets_are_refused(budget, trusting, conversations, answer_of):
    """So are lists: vLLM caches pictures one by one, and would not know which number is whose."""
    for messages in (conversations[0], conversations[12]):
        response = trusting.post({"messages": messages, "mm_processor_kwargs": {"max_soft_tokens": budget}})
        assert response.status_code == 400, response.text
    assert ids(ask(trusting, conversations[0], None)) == ids(answer_of(conversations[0], None))


def test_exif_is_not_the_processor_s_affair(trusting, answer_of):
    """vLLM has turned a photo before the processor sees it: docs/serve.md says so. `do_pad` acts."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(drawing(11, (96, 60))[0], "JPEG", exif=exif, quality=95)
    question = message("Describe the picture.", turned)
    plain, unpadded = answer_of(question, None), answer_of(question, None, do_pad=False)
    assert ids(trusting.ask(question, mm_processor_kwargs={"do_exif_transpose": False})) == ids(plain)
    assert ids(trusting.ask(question, mm_processor_kwargs={"do_pad": False})) == ids(unpadded) != ids(plain)


def test_the_server_s_own_budget(serve, conversations, answer_of):
    """It is that of requests that name none; vLLM measures its memory with it, but serves larger ones, too."""
    own = ("--mm-processor-kwargs", '{"max_soft_tokens": 4}')
    with serve(
        "four tokens", MODEL, "--enforce-eager", "--block-size", "32", "--trust-request-mm-kwargs", *own
    ) as four:
        for messages in conversations[::5]:
            assert ids(four.ask(messages)) == ids(answer_of(messages, 4))
            assert ids(ask(four, messages, 16)) == ids(answer_of(messages, 16))
