# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Lets fusion modules and language model find a common language for what the tower sees, before the paper's stages.

A large language model has read enough to understand new tokens in stage 1. With a small one and hundreds of names,
AdamW takes hours to get there, and Muon minutes. The frozen tower sees each picture once; its output is kept.
"""

from pathlib import Path
from random import Random

import torch
from torch import nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from conversion.checkpoints.folders import complete_or_absent, require_empty, save_checkpoint
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor

from .clip import normalised, read_pictures, scaled
from .connectors.encode_first import tower_features
from .generate import read_scenes
from .ideal import Answers, encoded
from .text import CHAT_TEMPLATE, PLAIN_TEMPLATE, read_rows
from .training import DEVICE, save_log, train

# Captions have the form of stage 1, the other rows that of stage 2.
ROWS = {"captions.json": PLAIN_TEMPLATE, "train.json": CHAT_TEMPLATE, "dialogues.json": CHAT_TEMPLATE}
ENCODED_AT_ONCE = 100  # pictures


def warm_up(
    data: str | Path,
    start: str | Path,
    out: str | Path,
    steps: int,
    pictures: int = 24000,
    batch_size: int = 32,
    connector_rate: float = 2e-2,
    language_rate: float = 5e-3,
    adam_rate: float = 1e-3,
    seed: int = 0,
) -> Path:
    """Trains all but the tower on captions, questions and dialogues, and writes the checkpoint into `out`.

    Args:
        data: folder that `generate` wrote.
        start: checkpoint with the tower, a language model and new fusion modules.
        out: folder of the same kind, which must not exist or be empty.
        steps: batches of `batch_size` rows, a third of them of each kind.
        pictures: number of training pictures; the tower's output for one takes 64 KiB of memory.
    """
    out = require_empty(out)
    rng = Random(seed)
    torch.manual_seed(seed)
    model = LlavaSTFForConditionalGeneration.from_pretrained(start, dtype=torch.float32).to(DEVICE)
    processor = LlavaSTFProcessor.from_pretrained(start)
    model.model.vision_tower.requires_grad_(False)
    number = {name: index for index, name in enumerate([*read_scenes(data, "train")][:pictures])}
    features = read_features(model, processor, Path(data), len(number))
    rows = [
        [encoded(row, processor.tokenizer, template) for row in read_rows(Path(data) / name) if row["id"] in number]
        for name, template in ROWS.items()
    ]
    shorten(model, features[:ENCODED_AT_ONCE])

    def loss() -> torch.Tensor:
        drawn = [rng.choice(rng.choice(rows)) for _ in range(batch_size)]
        seen = features[[number[name] for name, *_ in drawn]].float().to(DEVICE)
        return answer_loss(model, drawn, model.model.multi_modal_projector(seen))

    rates = {"multi_modal_projector": connector_rate, ".language_model.layers.": language_rate}
    log = train(model, loss, steps, rates, adam_rate, "warm-up")
    with complete_or_absent(out) as folder:
        save_checkpoint(folder, model, start)
        settings = {"steps": steps, "pictures": len(number), "batch_size": batch_size, "adam_rate": adam_rate}
        settings |= {"connector_rate": connector_rate, "language_rate": language_rate, "seed": seed}
        save_log(folder, settings, log)
    return out


def read_features(
    model: LlavaSTFForConditionalGeneration, processor: LlavaSTFProcessor, data: Path, number: int
) -> torch.Tensor:
    """Returns what the tower gives the fusion modules for the first training pictures, (number, N, L*C) in float16."""
    batches = read_pictures(data, "train", number)[0].split(ENCODED_AT_ONCE)
    seen = (
        tower_features(model, normalised(scaled(batch), processor.image_processor)).half().cpu()
        for batch in tqdm(batches, desc="tower", unit="batch")
    )
    return torch.cat([*seen])


@torch.no_grad()
def shorten(model: LlavaSTFForConditionalGeneration, features: torch.Tensor) -> None:
    """Makes new vision tokens as long as words, as the mean over some pictures.

    Far longer ones hide what the layers add to them, and their gradients vanish.
    """
    connector = model.model.multi_modal_projector
    tokens = connector(features.float().to(model.device))
    factor = model.get_input_embeddings().weight.std() / tokens.std()
    for weight in [module for module in connector.modules() if isinstance(module, nn.Linear)][-1].parameters():
        weight.mul_(factor)


def answer_loss(model: LlavaSTFForConditionalGeneration, rows: list[Answers], tokens: torch.Tensor) -> torch.Tensor:
    """Returns the loss of the answers, with `tokens`, (B, T, D), as the pictures."""
    image_token, several = model.config.image_token_id, tokens.shape[1]
    ids, labels = [], []
    for _, of_row, targets in rows:
        place = of_row.index(image_token)
        ids.append(torch.tensor(of_row[:place] + [image_token] * several + of_row[place + 1 :]))
        labels.append(torch.tensor(targets[:place] + [-100] * several + targets[place + 1 :]))
    pad = nn.utils.rnn.pad_sequence
    # Padding comes last, where no answer attends to it.
    return model(
        input_ids=pad(ids, batch_first=True, padding_value=0).to(DEVICE),
        labels=pad(labels, batch_first=True, padding_value=-100).to(DEVICE),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=[*tokens])},
    ).loss
