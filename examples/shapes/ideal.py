# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Teaches a language model to look things up in vision tokens that belong to no connector.

A picture becomes a token for each of its objects and its print, which sums learned vectors of what is true of it, and
empty tokens. Their number and order are random, so that no grid and no count is preferred. A large language model can
look things up; a small one needs this, and would take the form of the tokens that taught it.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast

from conversion.checkpoints.folders import complete_or_absent, require_empty

from .generate import read_scenes
from .scenes import Scene
from .text import CHAT_TEMPLATE, messages_of, read_rows, read_tokenizer
from .training import DEVICE, save_log, train

MOST_TOKENS = 64  # as many as LLaVA's of a picture
EMPTY: list[str] = ["nothing"]
ROWS = ("captions.json", "train.json")  # stage 2 has other questions, those of dialogues.json
Answers = tuple[str, list[int], list[int]]  # a row: its picture, ids with one `<image>`, and labels


def learn(
    data: str | Path,
    language_model: str | Path,
    out: str | Path,
    steps: int,
    batch_size: int = 32,
    muon_rate: float = 1e-2,
    adam_rate: float = 2e-3,
    seed: int = 0,
) -> Path:
    """Trains the language model on questions about ideal tokens and writes it into `out`.

    Args:
        data: folder that `generate` wrote.
        language_model: folder that `language-model` wrote.
        out: a folder of the same kind, which must not exist or be empty; the ideal tokens are not kept.
        steps: batches of `batch_size` rows, half of them captions.
    """
    out = require_empty(out)
    rng = Random(seed)
    torch.manual_seed(seed)
    scenes = read_scenes(data, "train")
    model = LlamaForCausalLM.from_pretrained(language_model, dtype=torch.float32).to(DEVICE)
    tokens = IdealTokens(scenes, model.config.hidden_size)
    tokens.begin_as_words(read_tokenizer(Path(language_model)), model.get_input_embeddings().weight.cpu())
    tokens.to(DEVICE)
    rows = read_answers(Path(data), Path(language_model))
    both = nn.ModuleDict({"language_model": model, "tokens": tokens})

    def loss() -> torch.Tensor:
        number = rng.randint(max(len(facts) for facts in tokens.facts.values()), MOST_TOKENS)
        drawn = [rng.choice(rng.choice(rows)) for _ in range(batch_size)]
        return answer_loss(model, drawn, [tokens(name, number, rng) for name, *_ in drawn])

    log = train(both, loss, steps, {".layers.": muon_rate}, adam_rate, "ideal tokens")
    with complete_or_absent(out) as folder:
        model.save_pretrained(folder)
        LlamaTokenizer.from_pretrained(language_model).save_pretrained(folder)
        settings = {"steps": steps, "batch_size": batch_size, "muon_rate": muon_rate, "adam_rate": adam_rate}
        save_log(folder, settings | {"seed": seed}, log)
    return out


class IdealTokens(nn.Module):
    """Makes tokens of what is true of a scene's objects; a token sums a learned vector for each fact."""

    def __init__(self, scenes: dict[str, Scene], width: int):
        super().__init__()
        self.facts = {name: list(facts_of(scene)) for name, scene in scenes.items()}
        known = sorted({fact for facts in self.facts.values() for several in facts for fact in several})
        self.number = {fact: index for index, fact in enumerate([*EMPTY, *known])}
        self.vectors = nn.EmbeddingBag(len(self.number), width, mode="sum")
        nn.init.normal_(self.vectors.weight, std=width**-0.5)  # as the embeddings of words

    @torch.no_grad()
    def begin_as_words(self, tokenizer: PreTrainedTokenizerFast, embeddings: torch.Tensor) -> None:
        """Lets the vector of each fact begin as the mean of its words' embeddings, which is learned faster."""
        for fact, index in self.number.items():
            if ids := tokenizer(fact.partition(" ")[2], add_special_tokens=False).input_ids:
                self.vectors.weight[index] = embeddings[ids].mean(0)

    def forward(self, name: str, number: int, rng: Random) -> torch.Tensor:
        """Returns `number` tokens of a scene in random order, (number, D); most are empty."""
        facts = self.facts[name] + [EMPTY] * (number - len(self.facts[name]))
        rng.shuffle(facts)
        indices = [torch.tensor([self.number[fact] for fact in several]) for several in facts]
        starts = torch.tensor([0, *map(len, indices[:-1])]).cumsum(0)
        return self.vectors(torch.cat(indices).to(DEVICE), starts.to(DEVICE))


def facts_of(scene: Scene) -> Iterator[list[str]]:
    """Yields the facts of each object, and of the print, that a question can ask."""
    for thing in scene.things:
        said = {key: value for key, value in asdict(thing).items() if not isinstance(value, float) and value}
        said.pop("family")  # no question asks who drew it
        yield [f"{key} {value}" for key, value in said.items()] + [f"place {thing.place}"]
    if scene.print is not None:
        yield [f"print {scene.print.text}"]


def read_answers(data: Path, tokenizer: Path) -> list[list[Answers]]:
    """Returns the rows of each file of ROWS."""
    words = read_tokenizer(tokenizer)
    return [[encoded(row, words, CHAT_TEMPLATE) for row in read_rows(data / name)] for name in ROWS]


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


def answer_loss(model: LlamaForCausalLM, rows: list[Answers], pictures: list[torch.Tensor]) -> torch.Tensor:
    """Returns the loss of the answers; the tokens of a picture, (number, D), take the place of `<image>`."""
    image_token, embed = model.config.vocab_size, model.get_input_embeddings()
    embedded, labels = [], []
    for (_, ids, targets), tokens in zip(rows, pictures, strict=True):
        place = ids.index(image_token)
        before, after = (embed(torch.tensor(part, device=DEVICE)) for part in (ids[:place], ids[place + 1 :]))
        embedded.append(torch.cat([before, tokens, after]))
        labels.append(torch.tensor(targets[:place] + [-100] * len(tokens) + targets[place + 1 :]))
    # Padding comes last, where no answer attends to it.
    padded = nn.utils.rnn.pad_sequence(embedded, batch_first=True)
    targets = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).to(DEVICE)
    return model(inputs_embeds=padded, labels=targets).loss
