# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Many questions about one picture: the model reads the picture once, and only the question is new.

pictures = PictureCache(model, processor, image)
pictures.ask("What is it?")
pictures.ask(["What colour is it?", "Is it large?"])
ask_many([PictureCache(model, processor, one), PictureCache(model, processor, other)], ["What is it?", "Where is it?"])
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, StaticCache

from .modeling_llava_stf import CACHE, LlavaSTFForConditionalGeneration
from .processing_llava_stf import LlavaSTFProcessor, _OneAtATime


class PictureCache:
    """The beginning of a conversation as the model has read it: the pictures, and the turns that [`after`] adds.

    It never changes, so that it may be asked in any order and from several threads. An answer has the token ids that
    `model.generate` gives for the whole conversation in the chat template.

    Args:
        model: reads the pictures at once. Whoever changes its weights later makes a new cache.
        processor: of the same checkpoint.
        images: a picture, or a list of pictures that the conversation shows together; whatever the processor takes.
        system (`str`, *optional*): the system message, instead of that of the chat template.
        max_soft_tokens (`int` or `list[int]`, *optional*): the number of tokens of each picture, as the processor takes
            it.

    Raises:
        ValueError: if there is no picture, or one that cannot be read, the number of tokens is not allowed, the system
            message has a placeholder of a picture, or the language model attends to a sliding window.
    """

    def __init__(
        self,
        model: LlavaSTFForConditionalGeneration,
        processor: LlavaSTFProcessor,
        images: Any,
        system: str | None = None,
        max_soft_tokens: int | Sequence[int] | None = None,
    ):
        if images is None or (isinstance(images, (list, tuple)) and not images):
            raise ValueError("There is no picture to be asked about. For text alone use `model.generate`.")
        pixels, self._image_tokens = picture_inputs(processor, images, max_soft_tokens=max_soft_tokens)
        self.model, self.processor = model, processor
        _refuse_windows(model)
        _check_texts(processor, [] if system is None else [system])
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._next_content = [{"type": "image"}] * len(pixels)
        self._ids: list[int] = []
        self._states: list[tuple[torch.Tensor, torch.Tensor]] = []
        pixels = pixels.to(model.device, model.dtype)
        self._read(self._conversation(""), pixel_values=pixels, image_tokens=self._image_tokens)

    @property
    def num_tokens(self) -> int:
        """How many tokens were read, those of the pictures included: the memory that is taken grows with them."""
        return len(self._ids)

    def after(self, question: str, answer: str) -> "PictureCache":
        """The conversation with one more turn, which is read once, too; this one stays as it is.

        Raises:
            ValueError: if an argument is not a string, or has a placeholder of a picture.
        """
        _check_texts(self.processor, [question, answer])
        longer = copy.copy(self)
        longer._messages = [*self._conversation(question), {"role": "assistant", "content": answer}]
        longer._next_content = []
        longer._read(longer._messages)
        return longer

    def ask(self, questions: str | Sequence[str], **kwargs: Any) -> str | list[str]:
        """The answer to a question, or the answers to several, which make one batch.

        Args:
            questions: a question, or several.
            kwargs: of [`generate_many`], such as `max_new_tokens`, `streamer` (for one question), `cache`. With
                `num_return_sequences` one question has a list of answers, too.
        """
        if isinstance(questions, str):
            answers = ask_many([self], [questions], **kwargs)
            return answers[0] if len(answers) == 1 else answers
        return ask_many([self] * len(questions), questions, **kwargs)

    def prompt(self, question: str) -> list[int]:
        """Token ids of the conversation with this question, as the chat template has them.

        Raises:
            ValueError: if they do not begin with what was read, or do not fit the context.
        """
        ids = prompt_ids(self.processor, [self._conversation(question)], self._image_tokens)[0]
        if ids[: len(self._ids)] != self._ids:
            raise ValueError(
                "With this question the chat template begins the conversation in another way than it was read. A "
                "template that puts the question before the pictures, or changes earlier turns, cannot be used here."
            )
        return ids

    def _conversation(self, question: str) -> list[dict[str, Any]]:
        content = [*self._next_content, {"type": "text", "text": question}]
        return [*self._messages, {"role": "user", "content": content}]

    @torch.no_grad()
    def _read(self, messages: list[dict[str, Any]], **images: Any) -> None:
        """Adds the states of all tokens up to the last special one: no later text changes how these are tokenized."""
        ids = prompt_ids(self.processor, [messages], self._image_tokens, add_generation_prompt=False)[0]
        special = {*self.processor.tokenizer.all_special_ids, self.processor.image_token_id}
        ids = ids[: 1 + max(index for index, token in enumerate(ids) if token in special)]
        if ids[: len(self._ids)] != self._ids:
            raise ValueError(
                "With this turn the chat template begins the conversation in another way than it was read."
            )
        new = torch.tensor([ids[len(self._ids) :]], device=self.model.device)
        cache = _filled(DynamicCache(config=self.model.config.text_config), self._states)
        self.model(
            input_ids=new, attention_mask=new.new_ones(1, len(ids)), logits_to_keep=1, **{CACHE: cache}, **images
        )
        self._ids, self._states = ids, [(layer.keys, layer.values) for layer in cache.layers]


def ask_many(pictures: Sequence[PictureCache], questions: Sequence[str], **kwargs: Any) -> list[str]:
    """Answers as [`generate_many`] does, and returns the answers as text."""
    if not questions:
        return []
    tokens = generate_many(pictures, questions, **kwargs)
    return [answer.strip() for answer in pictures[0].processor.batch_decode(tokens, skip_special_tokens=True)]


def generate_many(
    pictures: Sequence[PictureCache], questions: Sequence[str], cache: StaticCache | None = None, **kwargs: Any
) -> torch.Tensor:
    """Answers to one question about each of several pictures, in one batch.

    Args:
        pictures: one for each question; the same may come several times, and they may differ in length.
        questions: the next message of each conversation.
        cache ([`StaticCache`], *optional*): is overwritten and used, for a compiled model; its batch is that of the
            questions, its length that of the longest conversation with its answer.
        kwargs: of `model.generate`, such as `max_new_tokens`, `do_sample`, `num_beams`, `streamer`; those that draft
            tokens, such as `prompt_lookup_num_tokens`, are refused.

    Returns:
        `torch.Tensor` of shape `(questions, longest answer)`: the answers' token ids, padded at the end. With
        `num_return_sequences` there are as many rows for each question.

    Raises:
        ValueError: if pictures and questions differ in number, belong to several models, or to one that was moved; if
            a question has a placeholder of a picture; if a conversation does not fit the context, or the batch the
            static cache.
    """
    model = _model_of(pictures, questions)
    _check_texts(pictures[0].processor, questions)
    prompts = [picture.prompt(question) for picture, question in zip(pictures, questions, strict=True)]
    seen = max(len(picture._ids) for picture in pictures)
    width = seen + max(len(ids) - len(picture._ids) for picture, ids in zip(pictures, prompts, strict=True))
    # In a row stand: padding, what was read, padding, what is new. So the cache is in front, and each row ends in text.
    input_ids = torch.full((len(prompts), width), pictures[0].processor.tokenizer.pad_token_id or 0)
    attention_mask = torch.zeros_like(input_ids)
    for row, (picture, ids) in enumerate(zip(pictures, prompts, strict=True)):
        known = len(picture._ids)
        for place, part in (
            (slice(seen - known, seen), ids[:known]),
            (slice(width - len(ids) + known, width), ids[known:]),
        ):
            input_ids[row, place], attention_mask[row, place] = torch.tensor(part), 1
    copies = _copies(model, kwargs)
    states = [_batch(layers, seen, copies) for layers in zip(*(picture._states for picture in pictures), strict=True)]
    if cache is None:
        cache = DynamicCache(config=model.config.text_config)
    else:
        _check_static(cache, len(prompts) * copies, width, model, kwargs)
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        **{CACHE: _filled(cache, states)},
        **kwargs,
    )
    return output[:, width:]


def picture_inputs(processor: LlavaSTFProcessor, images: Any, **options: Any) -> tuple[torch.Tensor, list[int]]:
    """Pixels (images, 3, height, width) of pictures, and the number of tokens of each."""
    inputs = processor(images=images, return_tensors="pt", **options)
    pixels = inputs["pixel_values"]
    return pixels, inputs.get("image_tokens") or processor._full_tokens(pixels)


def prompt_ids(
    processor: LlavaSTFProcessor,
    conversations: list[list[dict[str, Any]]],
    image_tokens: list[int],
    add_generation_prompt: bool = True,
) -> list[list[int]]:
    """Token ids of conversations, as `apply_chat_template` gives them, but with no need of the pictures themselves.

    `image_tokens` has the number of tokens of each picture, in reading order. A placeholder too many stays one token.

    Raises:
        ValueError: if one with pictures is longer than the model's context.
    """
    texts = processor.apply_chat_template(conversations, add_generation_prompt=add_generation_prompt, tokenize=False)
    token, numbers = processor.image_token, iter(image_tokens)
    texts = [re.sub(re.escape(token), lambda _: token * next(numbers, 1), text) for text in texts]
    tokenizer = _OneAtATime(processor.tokenizer)
    ids = tokenizer(texts, add_special_tokens=not processor.begin_with_bos(texts))["input_ids"]
    processor._check_context(ids)
    return ids


def _refuse_windows(model: LlavaSTFForConditionalGeneration) -> None:
    # A row has padding between what was read and what is new, and a window would count it.
    config = model.config.text_config
    context = config.max_position_embeddings
    windows = [getattr(layer, "sliding_window", context) for layer in DynamicCache(config=config).layers]
    if min(windows, default=context) < context:
        raise ValueError(
            f"The language model attends to a sliding window of {min(windows)} tokens, which a PictureCache cannot "
            "continue. Use `model.generate` with the whole conversation."
        )


def _filled(cache: Any, states: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    cache.reset()
    for layer, (keys, values) in enumerate(states):
        cache.update(keys, values, layer)
    return cache


def _batch(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]], seen: int, copies: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's states of several pictures, (1, heads, own length, width) each, as (rows, heads, seen, width)."""
    rows = zip(*([pad(states, (0, 0, seen - states.shape[2], 0)) for states in pair] for pair in layers), strict=True)
    keys, values = (torch.cat(states).repeat_interleave(copies, 0) for states in rows)
    return keys, values


def _copies(model: LlavaSTFForConditionalGeneration, kwargs: dict[str, Any]) -> int:
    """Rows that `generate` makes of one: beams, or answers."""
    return max(_setting(model, kwargs, name) or 1 for name in ("num_beams", "num_return_sequences"))


def _setting(model: LlavaSTFForConditionalGeneration, kwargs: dict[str, Any], name: str) -> int | None:
    configs = (kwargs.get("generation_config"), model.generation_config)  # `generate` fills the first from the second
    return kwargs.get(name) or next((found for config in configs if (found := getattr(config, name, None))), None)


def _check_texts(processor: LlavaSTFProcessor, texts: Sequence[str]) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"A question is a string, got {type(text).__name__}. Pictures are given to PictureCache.")
        for placeholder in (processor.image_token, processor.video_token):
            if placeholder in text:
                raise ValueError(
                    f"The text has the placeholder {placeholder}, but a conversation has only the pictures that it "
                    "began with. Leave the placeholder out."
                )


def _model_of(pictures: Sequence[PictureCache], questions: Sequence[str]) -> LlavaSTFForConditionalGeneration:
    if len(pictures) != len(questions) or not questions:
        raise ValueError(f"There are {len(questions)} questions about {len(pictures)} pictures, expected one for each.")
    model = pictures[0].model
    if any(picture.model is not model for picture in pictures):
        raise ValueError("The pictures were read by several models: ask those of each model in a call of their own.")
    for picture in pictures:
        keys = picture._states[0][0]
        if (keys.device, keys.dtype) != (model.device, model.dtype):
            raise ValueError(
                f"The picture was read in {keys.dtype} on {keys.device}, but the model has become {model.dtype} on "
                f"{model.device}. Make a new PictureCache."
            )
    return model


def _check_static(
    cache: StaticCache, rows: int, width: int, model: LlavaSTFForConditionalGeneration, kwargs: dict[str, Any]
) -> None:
    if not isinstance(cache, StaticCache):
        raise ValueError(f"`cache` is a {type(cache).__name__}, expected a StaticCache. Without one the cache grows.")
    layer = cache.layers[0]
    if layer.is_initialized and layer.keys.shape[0] != rows:
        raise ValueError(f"The static cache has {layer.keys.shape[0]} rows, but {rows} are asked for.")
    needed = width + (_setting(model, kwargs, "max_new_tokens") or 1)
    if layer.max_cache_len < needed:
        raise ValueError(
            f"The static cache holds {layer.max_cache_len} tokens, but conversation and answer take up to {needed}. "
            "Make a longer one, or lower `max_new_tokens`."
        )


__all__ = ["PictureCache", "ask_many", "generate_many"]
