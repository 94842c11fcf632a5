"""Requests that are wrong, huge or broken off: each has its status, and the server goes on as before.

`HOSTILE` is the table. A status 4xx says that the request is wrong; 200 says that it is answered, and right. `engine`
marks what vLLM 0.32 gets wrong before our code sees the request: we can only show that the server survives.
"""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from PIL import Image
from prompts import drawing, encoded, message
from vllm_server import CHAT, request, wait

pytestmark = pytest.mark.serving

TEXT = "How many objects are there?"


@cache
def picture():
    return drawing(7)[0]


def with_url(url):
    (turn,) = message(TEXT, picture())
    turn["content"][0]["image_url"]["url"] = url
    return {"messages": [turn]}


def with_file(*files, text=TEXT, **settings):
    return {"messages": message(text, *files), **settings}


def animated():
    frames = [drawing(seed)[0].convert("P") for seed in (7, 8, 9)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)


def sixteen_bits():
    grey = np.asarray(picture().convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey))


def blank(side):
    """A PNG of side^2 pixels that is small as a file."""
    return encoded(Image.new("1", (side, side), 1))


def video():
    (turn,) = message(TEXT)
    turn["content"].insert(0, {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}})
    return {"messages": [turn]}


# name: request, status, and who is at fault if that is not what it should be
HOSTILE = {
    "the placeholder <image> without a picture": (lambda: with_file(text=f"<image>\n{TEXT}"), 400, ""),
    "the placeholder <image> in a string": (
        lambda: {"messages": [{"role": "user", "content": f"<image>\n{TEXT}"}]},
        400,
        "",
    ),
    "the placeholder <video>": (lambda: with_file(text=f"<video>\n{TEXT}"), 400, ""),
    "the placeholder beside a picture": (lambda: with_file(picture(), text=f"<image>\n{TEXT}"), 400, ""),
    "five pictures, four allowed": (lambda: with_file(*[picture()] * 5), 400, ""),
    "a video": (video, 400, ""),
    "broken base64": (lambda: with_url("data:image/png;base64,!!!not base64!!!"), 400, ""),
    "a truncated picture": (lambda: with_file(encoded(picture())[:200]), 400, ""),
    "not a picture": (lambda: with_file(b"This is a text."), 400, ""),
    "an empty picture": (lambda: with_file(b""), 400, ""),
    "400 megapixels": (lambda: with_file(blank(20_000)), 500, "engine"),
    "an address that is not there": (lambda: with_url("http://127.0.0.1:9/picture.png"), 500, "engine"),
    "a file of the server": (lambda: with_url("file:///etc/hostname"), 500, "engine"),
    "100 megapixels": (lambda: with_file(blank(10_000)), 200, ""),
    "1 x 1 pixel": (lambda: with_file(picture().resize((1, 1))), 200, ""),
    "5000 x 1 pixels": (lambda: with_file(picture().resize((5000, 1))), 200, ""),
    "CMYK": (lambda: with_file(encoded(picture().convert("CMYK"), "JPEG")), 200, ""),
    "a palette": (lambda: with_file(encoded(picture().convert("P"))), 200, ""),
    "16 bits": (lambda: with_file(sixteen_bits()), 200, "engine"),  # clipped, see test_formats.py
    "an animation": (lambda: with_file(animated()), 200, ""),
    "an over-long prompt": (lambda: with_file(picture(), text="How many objects are there? " * 200), 400, ""),
    "a megabyte of text": (lambda: with_file(text="x" * 2**20), 400, ""),
    "too many new tokens": (lambda: with_file(picture(), max_tokens=100_000), 400, ""),
    "less than no new tokens": (lambda: with_file(picture(), max_tokens=-1), 400, ""),
    "another model's name": (lambda: with_file(picture(), model="gpt-4"), 404, ""),
    "the role tool": (lambda: {"messages": [{"role": "tool", "tool_call_id": "1", "content": "8"}]}, 400, ""),
    "two questions in a row": (lambda: {"messages": message(TEXT) * 2}, 400, ""),
    "no messages": (lambda: {"messages": []}, 400, ""),
    "a chat template of the user's": (lambda: with_file(picture(), chat_template="{{ 'Hi' }}"), 400, ""),
}


@pytest.fixture(scope="module")
def still_right(eager, conversations, answers):
    """Checks that nothing runs or waits, and that the next good requests are answered right."""

    def still_right():
        wait(lambda: eager.busy() == 0)
        for index in (0, 12, 18):  # one picture, two pictures, text
            assert eager.ask(conversations[index])["token_ids"] == answers[index]["token_ids"]

    return still_right


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests(eager, name, still_right, reference, figures):
    make, status, fault = HOSTILE[name]
    body = make()
    response = eager.post(body)
    figures[f"status: {name}"] = " ".join(filter(None, [str(response.status_code), fault and f"({fault}'s fault)"]))
    assert response.status_code == status, response.text[:1000]
    if status == 200 and not fault:
        answer = response.json()["choices"][0]["token_ids"]
        assert answer == reference()(body["messages"])["token_ids"]
    still_right()


def test_memory_is_bounded(eager, still_right, figures):
    """The same requests again need no memory beyond that of the first time."""
    bodies = [make() for make, _, _ in HOSTILE.values()]

    def all_at_once():
        with ThreadPoolExecutor(len(bodies)) as threads:
            list(threads.map(eager.post, bodies))
        still_right()
        return eager.memory()

    before = eager.memory()
    seen = [all_at_once() for _ in range(3)]
    figures["hostile requests: MiB before, and after each of three rounds at once"] = [
        round(mebibytes) for mebibytes in (before, *seen)
    ]
    assert seen[2] < seen[0] + 256


def send(server, body):
    """Sends a request over a connection of its own."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(request(**body)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


LONG = {"max_tokens": 400, "ignore_eos": True}


@pytest.fixture
def unfinished(eager, still_right):
    """Returns how many of 30 requests the server did not answer to their end."""
    before = eager.metrics()["request_success_total"]

    def unfinished():
        wait(lambda: eager.busy() == 0)
        finished = eager.metrics()["request_success_total"] - before
        still_right()
        return 30 - round(finished)

    return unfinished


def test_30_hang_ups_in_mid_stream(eager, conversations, unfinished, figures):
    """A request whose client is gone is not answered to its end."""
    connections = [send(eager, {"messages": conversations[index % 24], "stream": True, **LONG}) for index in range(30)]
    for connection in connections:
        received = b""
        while b"data: " not in received:
            piece = connection.recv(4096)
            assert piece, received
            received += piece
        connection.close()
    figures["hang-ups in mid-stream: broken off of 30"] = unfinished()
    assert figures["hang-ups in mid-stream: broken off of 30"] > 0


def test_30_hang_ups_before_the_answer(eager, conversations, unfinished, figures):
    for index in range(30):
        send(eager, {"messages": conversations[index % 24], **LONG}).close()
    figures["hang-ups before the answer: broken off of 30"] = unfinished()
    assert figures["hang-ups before the answer: broken off of 30"] > 0
