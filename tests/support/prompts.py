"""Prompts for serving tests, as an OpenAI client sends them, and the answers of `generate` to them."""

import base64
import io
import math
from random import Random
from typing import Any

import torch
from drawings import drawn
from PIL import Image

from examples.shapes.questions import conversation, describe
from examples.shapes.scenes import SIDE

SIZES = [(SIDE, SIDE), (300, 200), (40, 96), (64, 64), (1000, 333), (17, 51)]


def encoded(picture: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def message(text: str, *pictures: bytes | Image.Image) -> list[dict]:
    """Returns a conversation of one question about pictures: files, or what is sent as PNG."""
    files = [picture if isinstance(picture, bytes) else encoded(picture) for picture in pictures]
    urls = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in files]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def drawing(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> tuple[Image.Image, str]:
    """Returns a picture of the small model's test set, resized, and a question about it."""
    rng = Random(seed)
    scene, picture = drawn(rng)
    return picture.resize(size), conversation(scene, 1, rng)[0].text


def prompts() -> list[list[dict]]:
    """Returns 24 conversations: 12 with a picture of one of six sizes, 6 with two pictures, 6 with text alone."""
    found = []
    for index in range(12):
        picture, question = drawing(index, SIZES[index % len(SIZES)])
        found.append(message(question, picture))
    for index in range(6):
        (first, question), (second, _) = drawing(100 + index), drawing(200 + index, SIZES[index])
        found.append(message(question, first, second))
    for index in range(6):
        scene, _ = drawn(Random(300 + index))
        found.append(message(f"{describe(scene)}\n{conversation(scene, 1, Random(index))[0].text}"))
    return found


def for_transformers(message: dict) -> dict:
    """Returns a message with the same bytes, in the form of transformers."""
    if isinstance(message["content"], str):
        return message
    parts = [
        {"type": "image", "url": part["image_url"]["url"]} if part["type"] == "image_url" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def generated(processor: Any, model: Any, messages: list[dict], **image_options: Any) -> dict[str, Any]:
    """Returns the greedy answer of `generate` to the same conversation.

    `prompt_ids`, `token_ids`, `text`, and `logprobs`: those of the answer's tokens, as the logits give them.
    `image_options` are those of the image processor.
    """
    inputs = processor.apply_chat_template(
        [for_transformers(message) for message in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=image_options,
    ).to(model.dtype)
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=64, return_dict_in_generate=True, output_logits=True
    )
    ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    chosen = torch.stack(output.logits)[:, 0].log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return {
        "prompt_ids": inputs["input_ids"][0].tolist(),
        "token_ids": ids.tolist(),
        "text": processor.decode(ids, skip_special_tokens=True),
        "logprobs": chosen.tolist(),
    }


def difference(served: dict, expected: dict) -> float:
    """Returns the largest difference of a log-probability of two equal answers; infinity if a token differs."""
    if served["token_ids"] != expected["token_ids"]:
        return math.inf
    tokens = served["logprobs"]["content"]
    return max(abs(token["logprob"] - own) for token, own in zip(tokens, expected["logprobs"], strict=True))
