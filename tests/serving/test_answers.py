"""vLLM answers as `generate` does, token for token: many at once, streamed, with log-probabilities."""

import json

import pytest
from prompts import difference, message
from vllm_server import CHAT, request

pytestmark = pytest.mark.serving


def ids(answers):
    return [(answer["prompt_ids"], answer["token_ids"]) for answer in answers]


def test_24_at_once(eager, conversations, answers, figures):
    served = eager.ask_all(conversations)
    figures["eager: of 24 answers equal"] = sum(map(same, served, answers))
    assert ids(served) == ids(answers)


def same(answer, expected):
    return answer["token_ids"] == expected["token_ids"]


def test_equality_means_something(eager, conversations, answers):
    """A server that mixed up pictures would be noticed: most answers change with the picture."""
    assert len({answer["text"] for answer in answers}) > 12
    pictures = [messages[0]["content"][0] for messages in conversations[:12]]
    questions = [messages[0]["content"][-1]["text"] for messages in conversations[:12]]
    mixed = [
        [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]
        for picture, question in zip(pictures[1:] + pictures[:1], questions, strict=True)
    ]
    assert sum(map(same, eager.ask_all(mixed), answers)) < 6


def test_64_at_once(eager, conversations, answers, figures):
    order = [index % 24 for index in range(64)]
    served = eager.ask_all([conversations[index] for index in order])
    figures["eager: of 64 answers equal"] = sum(map(same, served, [answers[index] for index in order]))
    assert ids(served) == ids(answers[index] for index in order)


def test_streaming(eager, conversations, answers, figures):
    """The chunks of an answer are the whole answer; a long one comes in several, however slow the reader is."""
    chunks = [stream(eager, messages) for messages in conversations]
    whole = [answer["text"] for answer in eager.ask_all(conversations)]
    assert ["".join(text for text, _ in parts) for parts in chunks] == whole
    assert [sum((ids for _, ids in parts), []) for parts in chunks] == [answer["token_ids"] for answer in answers]
    long = stream(eager, conversations[0], max_tokens=400, ignore_eos=True)
    figures["eager: chunks of a streamed answer of 400 tokens"] = len(long)
    assert len(long) > 1 and sum(len(ids) for _, ids in long) == 400


def stream(server, messages, **settings):
    """The text and the token ids of each chunk that has any."""
    chunks = []
    with server.client.stream("POST", CHAT, json=request(messages=messages, stream=True, **settings)) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                chunks.append((choice["delta"].get("content") or "", choice.get("token_ids") or []))
    return [chunk for chunk in chunks if chunk[1]]


def test_log_probabilities(eager, conversations, answers, figures):
    """Those of the answer's tokens are those of the model's logits, and as many alternatives come as were asked for."""
    served = eager.ask_all(conversations, logprobs=True, top_logprobs=5)
    assert {len(token["top_logprobs"]) for answer in served for token in answer["logprobs"]["content"]} == {5}
    worst = max(map(difference, served, answers))
    figures["eager: largest difference of a log-probability"] = f"{worst:.1e}"
    assert worst < 1e-4


def test_several_turns(eager, reference, conversations):
    """A second question in the same conversation is answered as `generate` answers it."""
    first = eager.ask(conversations[0])
    follow_up = [
        *conversations[0],
        {"role": "assistant", "content": first["text"].strip()},
        *message("How many objects are there?"),
    ]
    assert ids([eager.ask(follow_up)]) == ids([reference()(follow_up)])


def test_the_openai_client(eager, conversations, answers):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{eager.url}/v1", api_key="none")
    completion = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=conversations[0], temperature=0, max_tokens=64
    )
    assert completion.choices[0].message.content.strip() == answers[0]["text"].strip()
