# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Makes ideal tokens of a scene: each says what is true of one object, in words that the language model knows.

An ideal token is the sum of the embeddings of these words. It belongs to no connector. The language model learns from
ideal tokens how to look things up, and the fusion modules of a small model begin with learning to make them.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .questions import kind_of_print
from .scenes import SIDE, Scene, Thing
from .text import messages_of

NOTHING = "nothing"  # an empty token says it
Answers = tuple[str, list[int], list[int]]  # a row: its picture, ids with one `<image>`, and labels


class IdealTokens:
    """Makes the ideal tokens of scenes."""

    def __init__(self, scenes: dict[str, Scene], tokenizer: PreTrainedTokenizerFast):
        self.scenes, self.tokenizer = scenes, tokenizer
        self.empty = self._ids(NOTHING)
        self.said = {name: [self._ids(words) for _, _, words in said_of(scene)] for name, scene in scenes.items()}
        self.most = max(map(len, self.said.values()))  # objects and print of a scene

    def _ids(self, words: str) -> list[int]:
        return self.tokenizer(words, add_special_tokens=False).input_ids

    def shuffled(self, name: str, number: int, embeddings: nn.Embedding, rng: Random) -> torch.Tensor:
        """Returns `number` tokens of a scene in random order, (number, D); most are empty."""
        tokens = self.said[name] + [self.empty] * (number - len(self.said[name]))
        rng.shuffle(tokens)
        return summed(tokens, embeddings)

    def windows(self, name: str, side: int, embeddings: nn.Embedding) -> torch.Tensor:
        """Returns the tokens of a scene's windows, (side * side, D): each says what has its centre there."""
        places = (int(y * side / SIDE) * side + int(x * side / SIDE) for x, y, _ in said_of(self.scenes[name]))
        tokens: list[list[int]] = [[] for _ in range(side * side)]
        for place, ids in zip(places, self.said[name], strict=True):
            tokens[place] += ids
        return summed([ids or self.empty for ids in tokens], embeddings)


def summed(tokens: list[list[int]], embeddings: nn.Embedding) -> torch.Tensor:
    """Returns for each token the sum of its words' embeddings, (len(tokens), D)."""
    starts = torch.tensor([0, *map(len, tokens[:-1])]).cumsum(0)
    words, weight = torch.tensor([word for ids in tokens for word in ids]), embeddings.weight
    return nn.functional.embedding_bag(words.to(weight.device), weight, starts.to(weight.device), mode="sum")


def said_of(scene: Scene) -> Iterator[tuple[float, float, str]]:
    """Yields the centre, in pixels, of each object and of the print, and the words that are true of it."""
    for thing in scene.things:
        yield thing.x, thing.y, words_of(thing)
    if scene.print is not None:
        left, top, right, bottom = scene.print.box
        yield (left + right) / 2, (top + bottom) / 2, f"{kind_of_print(scene.print.text)} {scene.print.text}"


def words_of(thing: Thing) -> str:
    """Returns all that a question can ask about an object, without the little words of its place."""
    place = thing.place.removeprefix("at the ").removeprefix("on the ").removeprefix("in the ")
    return " ".join(word for word in (thing.size, thing.colour, thing.name, thing.category, place) if word)


def encoded(row: dict, words: PreTrainedTokenizerFast, template: str) -> Answers:
    """Returns picture, ids with one `<image>`, and labels of the answers."""
    chat = words.apply_chat_template(
        messages_of(row, Path()),
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, answers = chat["input_ids"], chat["assistant_masks"]
    return row["id"], ids, [token if answer else -100 for token, answer in zip(ids, answers, strict=True)]


def answer_loss(
    model: PreTrainedModel, image_token: int, rows: list[Answers], pictures: list[torch.Tensor]
) -> torch.Tensor:
    """Returns the loss of the answers; the tokens of a row's picture, (number, D), take the place of `image_token`."""
    embed = model.get_input_embeddings()
    embedded, labels = [], []
    for (_, ids, targets), tokens in zip(rows, pictures, strict=True):
        place = ids.index(image_token)
        before, after = (embed(torch.tensor(part, device=model.device)) for part in (ids[:place], ids[place + 1 :]))
        embedded.append(torch.cat([before, tokens, after]))
        labels.append(torch.tensor(targets[:place] + [-100] * len(tokens) + targets[place + 1 :]))
    # Padding comes last, where no answer attends to it.
    padded = nn.utils.rnn.pad_sequence(embedded, batch_first=True)
    targets = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).to(model.device)
    return model(inputs_embeds=padded, labels=targets).loss
