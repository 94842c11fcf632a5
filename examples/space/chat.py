# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Answers questions about pictures for a page: streamed, stoppable, and with a picture that is read only once."""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, RLock
from typing import Any

import PIL.Image
import PIL.ImageDraw
import torch
from jinja2 import TemplateError
from transformers import StoppingCriteriaList, TextIteratorStreamer

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor, PictureCache
from modeling_llava_stf.processing_llava_stf import load_picture

Turn = tuple[str, str]  # question and answer
OVERLAY_SIDE = 576  # pixels; the side of the overlay is the next multiple of the patch grid
PATCH_LINE, TOKEN_LINE = (60, 110, 255, 150), (255, 190, 0, 255)  # seen on light and on dark pictures


@dataclass
class Answer:
    """An answer, as far as it has come.

    Args:
        text: the words so far.
        seconds: since the question was asked, the picture's reading included.
        first_word: seconds until the first word.
        prompt_tokens: of the whole conversation with the question.
        new_tokens: those of them that the model had not read for an earlier question.
    """

    text: str
    seconds: float
    first_word: float
    prompt_tokens: int
    new_tokens: int


class Chat:
    """Answers questions about pictures, and keeps the conversations that were read last.

    Args:
        processor, network: of the same checkpoint.
        max_new_tokens: longest answer, in tokens.
        kept_tokens: how many tokens the kept conversations have in all; those that were used longest ago are
            forgotten first, and read again when they go on. The newest one is kept, however long it is.
    """

    def __init__(
        self,
        processor: LlavaSTFProcessor,
        network: LlavaSTFForConditionalGeneration,
        max_new_tokens: int = 512,
        kept_tokens: int = 8192,
    ):
        self.processor, self.network = processor, network.eval()
        self.max_new_tokens, self.kept_tokens = max_new_tokens, kept_tokens
        self._kept: dict[tuple[str, tuple[Turn, ...]], PictureCache] = {}  # in the order of their last use
        self._lock = RLock()

    def answer(self, picture: str | Path, turns: Sequence[Turn], question: str) -> Iterator[Answer]:
        """Yields the answer as it grows. Closing the iterator ends the generation and its thread.

        Raises:
            ValueError: says in words why there is no answer.
        """
        if not question.strip():
            raise ValueError("The question is empty.")
        started, known = time.perf_counter(), self._known_tokens(picture, tuple(turns))
        try:
            conversation = self._read(picture, tuple(turns))
            length = len(conversation.prompt(question))
        except TemplateError as error:
            raise ValueError(f"The model's chat template refuses the question: {error}") from error
        context = self.network.config.text_config.max_position_embeddings
        if length >= context:
            raise ValueError(
                f"The conversation has {length} tokens, but the model's context holds {context}, those of the answer "
                "included. Begin a new conversation, or ask a shorter question."
            )
        limit, first_word = min(self.max_new_tokens, context - length), 0.0
        for text in stream(conversation, question, limit):
            seconds = time.perf_counter() - started
            first_word = first_word or seconds
            yield Answer(text, seconds, first_word, length, length - known)

    def overlay(self, picture: str | Path) -> PIL.Image.Image:
        """The square picture that the model sees, with the patches of its vision tower and its vision tokens.

        Raises:
            ValueError: if the picture cannot be read.
        """
        seen = self.processor.image_processor(_opened(picture), do_normalize=False, do_rescale=False)["pixel_values"][0]
        patches, tokens = self.grids
        square = PIL.Image.fromarray(torch.as_tensor(seen).permute(1, 2, 0).byte().numpy())
        return draw_grid(square, patches, patches // tokens)

    @property
    def grids(self) -> tuple[int, int]:
        """Sides of the grid of patches and of that of tokens: 24 and 12, if the processor asks for no fewer tokens."""
        return self.network.config.grid_size, math.isqrt(self.processor.tokens_per_image)

    def _known_tokens(self, picture: str | Path, turns: tuple[Turn, ...]) -> int:
        """How many tokens of a conversation are kept: of all its turns, or of the first of them."""
        beginnings = [(_digest(picture), turns[:count]) for count in range(len(turns) + 1)]
        with self._lock:
            return max((self._kept[key].num_tokens for key in beginnings if key in self._kept), default=0)

    def _read(self, picture: str | Path, turns: tuple[Turn, ...]) -> PictureCache:
        """The conversation so far, as the model has read it: what is not kept is read again, turn by turn."""
        key = (_digest(picture), turns)
        with self._lock:
            conversation = self._kept.pop(key, None)
            if conversation is None and turns:
                conversation = self._read(picture, turns[:-1]).after(*turns[-1])
            elif conversation is None:
                conversation = PictureCache(self.network, self.processor, _opened(picture))
            self._kept[key] = conversation
            while len(self._kept) > 1 and sum(kept.num_tokens for kept in self._kept.values()) > self.kept_tokens:
                self._kept.pop(next(iter(self._kept)))
        return conversation


def stream(conversation: PictureCache, question: str, max_new_tokens: int) -> Iterator[str]:
    """Yields the greedy answer, each time with what came before. Its thread has ended when the iterator has."""
    tokenizer = conversation.processor.tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped = Event()

    def is_stopped(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), stopped.is_set(), device=input_ids.device)

    with ThreadPoolExecutor(1, thread_name_prefix="answer") as pool:
        answering = pool.submit(
            conversation.ask,
            question,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([is_stopped]),
        )
        answering.add_done_callback(lambda _: streamer.end())  # a failure gives no end of its own
        text = ""
        try:
            for piece in streamer:
                text = (text + piece).lstrip()
                if text:
                    yield text
        finally:
            stopped.set()
        yield answering.result()


def draw_grid(square: PIL.Image.Image, grid: int, window: int) -> PIL.Image.Image:
    """Draws thin lines between `grid` x `grid` patches, and thick ones between windows: each becomes one token."""
    patch = -(-OVERLAY_SIDE // grid)
    side = grid * patch
    shown = square.resize((side, side), PIL.Image.Resampling.BICUBIC)
    draw = PIL.ImageDraw.Draw(shown, "RGBA")
    for colour, width, step in ((PATCH_LINE, 1, 1), (TOKEN_LINE, 3, window)):
        for place in range(0, grid + 1, step):
            at = min(place * patch, side - 1)
            draw.line([(at, 0), (at, side)], colour, width)
            draw.line([(0, at), (side, at)], colour, width)
    return shown


def _opened(picture: str | Path) -> PIL.Image.Image:
    try:
        return load_picture(Path(picture))
    except ValueError as error:
        raise ValueError(str(error).replace(str(picture), Path(picture).name)) from error


def _digest(picture: str | Path) -> str:
    return hashlib.sha256(Path(picture).read_bytes()).hexdigest()
