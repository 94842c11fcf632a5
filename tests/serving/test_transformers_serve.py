"""`python -m modeling_llava_stf serve` answers an OpenAI client as `generate` does."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prompts import message
from vllm_server import CHAT, Server

pytestmark = pytest.mark.serving
openai = pytest.importorskip("openai")
ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "shapes" / "model"
BATCHING = ("--continuous-batching", "--cb-num-blocks", "64", "--cb-block-size", "32")


class OurServer(Server):
    """The server of this package; without `--trust-remote-code`: the code is that of the package."""

    def __init__(self, folder: Path, *options: str):
        super().__init__(MODEL, folder, PYTHONPATH=str(ROOT))
        host, port = self.url.removeprefix("http://").split(":")
        self.command = [sys.executable, "-m", "modeling_llava_stf", "serve", str(MODEL), "--device", "cpu"]
        self.command += ["--dtype", "float32", "--host", host, "--port", port, *options]

    def __enter__(self) -> "OurServer":
        super().__enter__()
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        return self

    def completion(self, messages: list[dict], **settings):
        return self.openai.chat.completions.create(
            model=str(MODEL), messages=messages, temperature=0, max_tokens=64, **settings
        )

    def answer(self, messages: list[dict]) -> str:
        return self.completion(messages).choices[0].message.content

    def answers(self, conversations: list[list[dict]]) -> list[str]:
        """Asks all at once, each from its own thread."""
        with ThreadPoolExecutor(len(conversations)) as threads:
            return list(threads.map(self.answer, conversations))

    def chunks(self, messages: list[dict]) -> list[str]:
        return [
            piece.choices[0].delta.content
            for piece in self.completion(messages, stream=True)
            if piece.choices and piece.choices[0].delta.content
        ]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with OurServer(tmp_path_factory.mktemp("transformers")) as server:
        yield server


def texts(answers):
    return [answer["text"] for answer in answers]


def test_one_by_one(server, conversations, answers):
    """One picture, two pictures, text."""
    places = [0, 1, 12, 13, 18, 19]
    assert [server.answer(conversations[place]) for place in places] == [texts(answers)[place] for place in places]


def test_24_at_once(server, conversations, answers):
    assert server.answers(conversations) == texts(answers)


def test_streaming(server, conversations, answers):
    for place in (0, 12, 18):
        chunks = server.chunks(conversations[place])
        assert "".join(chunks) == texts(answers)[place] and len(chunks) > 2


def test_a_second_question(server, reference, conversations, answers):
    conversation = [*conversations[0], {"role": "assistant", "content": texts(answers)[0].strip()}]
    conversation += message("How many objects are there?")
    assert server.answer(conversation) == reference()(conversation)["text"]


def test_sampling_needs_a_generation_config(server, conversations, answers):
    """A temperature alone changes nothing in transformers 5.16 to 5.24: docs/serve.md says so."""
    messages, body = conversations[0], {"model": str(MODEL), "messages": conversations[0], "max_tokens": 64}

    def asked(**settings):
        found = [server.client.post(CHAT, json={**body, **settings, "seed": seed}).json() for seed in range(4)]
        return {answer["choices"][0]["message"]["content"] for answer in found}

    assert asked(temperature=2, top_p=0.9) == {server.answer(messages)} == {texts(answers)[0]}
    assert len(asked(generation_config='{"do_sample": true, "temperature": 2.0, "max_new_tokens": 64}')) > 1


BAD = {
    "a placeholder without a picture": message("What is <image>?"),
    "a broken picture": message("What is this?", b"not a picture"),
    "another role": [{"role": "tool", "content": "Hi"}],
    "two questions in a row": [*message("Hi"), *message("Hi")],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_an_error_and_the_next_is_answered(name, server, conversations, answers):
    """The status is 500 in transformers 5.19 to 5.24, whose fault it is that these are not 400."""
    response = server.client.post(CHAT, json={"model": str(MODEL), "messages": BAD[name], "max_tokens": 8})
    assert response.status_code == 500
    assert server.answer(conversations[0]) == texts(answers)[0]


def test_continuous_batching_is_for_models_of_text_only(tmp_path, conversations, answers):
    """What transformers 5.16 to 5.24 do with the option: change docs/serve.md when they batch pictures."""
    with OurServer(tmp_path, *BATCHING) as server:
        assert server.answer(conversations[12]) == texts(answers)[12]
        assert "LlavaSTFForConditionalGeneration does not support continuous batching" in server.printed()


def test_another_model_is_refused(server):
    body = {"model": "other/model", "messages": message("Hi")}
    assert server.client.post(CHAT, json=body).status_code == 400
