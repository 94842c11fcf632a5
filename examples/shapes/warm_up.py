# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Lets fusion modules and language model find a common language for what the tower sees, before the paper's stages.

A large language model has read enough to understand new tokens in stage 1. With a small one and hundreds of names,
AdamW did not get there. Here the fusion modules first learn to make the ideal tokens that the language model
knows (`ideal.py`), one for each window; then both learn from rows. The optimiser is Muon. The frozen tower sees each
picture once; its output is kept.
"""

from pathlib import Path
from random import Random

import torch
from torch import nn
from tqdm import tqdm

from conversion.checkpoints.folders import complete_or_absent, require_empty, save_checkpoint
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf._folder import checked_config

from .clip import normalised, read_pictures, scaled
from .connectors.encode_first import tower_features
from .generate import read_scenes
from .ideal import IdealTokens, answer_loss
from .language_model import SHARES, read_answers
from .scenes import Scene
from .training import DEVICE, save_log, train

ENCODED_AT_ONCE = 100  # pictures
# Muon's rates for a new connector, for one that knows something, and for the language model; AdamW's for what is no
# matrix.
NEW_RATE, WARM_RATE, LANGUAGE_RATE, ADAM_RATE = 2e-2, 5e-3, 5e-3, 1e-3


def warm_up(
    data: str | Path,
    start: str | Path,
    out: str | Path,
    steps: int,
    imitation_steps: int = 8000,
    pictures: int = 24000,
    batch_size: int = 32,
    imitation_rate: float = NEW_RATE,
    connector_rate: float = WARM_RATE,
    language_rate: float = LANGUAGE_RATE,
    adam_rate: float = ADAM_RATE,
    seed: int = 0,
) -> Path:
    """Trains all but the tower, and writes the checkpoint into `out`.

    Args:
        data: folder that `generate` wrote.
        start: checkpoint with the tower, a language model and new fusion modules.
        out: folder of the same kind, which must not exist or be empty.
        steps: batches of `batch_size` rows, captions or dialogues.
        imitation_steps: batches of twice as many pictures, before the rows: the fusion modules learn ideal tokens.
        pictures: number of training pictures; the tower's output for one takes 64 KiB of memory.
    """
    out = require_empty(out)
    checked_config(str(start), None)
    rng = Random(seed)
    torch.manual_seed(seed)
    model = LlavaSTFForConditionalGeneration.from_pretrained(start, dtype=torch.float32).to(DEVICE)
    processor = LlavaSTFProcessor.from_pretrained(start)
    scenes = read_scenes(data, "train")
    number = {name: index for index, name in enumerate([*scenes][:pictures])}
    features = read_features(model, processor, Path(data), len(number))
    targets = read_targets(model, processor, {name: scenes[name] for name in number})
    connector = model.model.multi_modal_projector
    with torch.no_grad():
        shorten(model, connector(features[:ENCODED_AT_ONCE].float().to(DEVICE)))
    imitation = imitate(connector, features, targets, imitation_steps, 2 * batch_size, imitation_rate, adam_rate)
    rows = read_answers(Path(data), processor.tokenizer, number)

    def loss() -> torch.Tensor:
        drawn = rng.choices(rng.choices(rows, SHARES)[0], k=batch_size)
        seen = features[[number[name] for name, *_ in drawn]].float().to(DEVICE)
        return answer_loss(model, model.config.image_token_id, drawn, [*connector(seen)])

    model.model.vision_tower.requires_grad_(False)
    rates = {"multi_modal_projector": connector_rate, ".language_model.layers.": language_rate}
    log = train(model, loss, steps, rates, adam_rate, "warm-up")
    with complete_or_absent(out) as folder:
        save_checkpoint(folder, model, start)
        settings = {"steps": steps, "pictures": len(number), "batch_size": batch_size, "adam_rate": adam_rate}
        settings |= {"imitation_steps": imitation_steps, "imitation_rate": imitation_rate}
        settings |= {"connector_rate": connector_rate, "language_rate": language_rate, "seed": seed}
        save_log(folder, settings, log, imitation=imitation)
    return out


def imitate(
    connector: nn.Module,
    features: torch.Tensor,
    targets: torch.Tensor,
    steps: int,
    batch_size: int,
    rate: float,
    adam_rate: float,
) -> list[dict]:
    """Teaches the connector to make `targets`, (number, T, D), of the tower's `features`; returns the log.

    The loss is the mean squared error, as a share of the targets' variance.
    """
    scale = targets.var()

    def loss() -> torch.Tensor:
        drawn = torch.randint(len(features), (batch_size,))
        made = connector(features[drawn].float().to(DEVICE))
        return nn.functional.mse_loss(made.float(), targets[drawn].to(DEVICE)) / scale

    return train(connector, loss, steps, {"": rate}, adam_rate, "imitation")


@torch.no_grad()
def read_targets(
    model: LlavaSTFForConditionalGeneration, processor: LlavaSTFProcessor, scenes: dict[str, Scene]
) -> torch.Tensor:
    """Returns the ideal tokens of the scenes' windows, (number of scenes, T, D)."""
    ideal, side = IdealTokens(scenes, processor.tokenizer), model.config.grid_size // model.config.fusion_window
    return torch.stack([ideal.windows(name, side, model.get_input_embeddings()).cpu() for name in scenes])


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
def shorten(model: LlavaSTFForConditionalGeneration, tokens: torch.Tensor) -> None:
    """Makes new vision tokens as long as words; `tokens`, (..., D), are what the connector makes of some pictures.

    Far longer ones hide what the layers add to them, and their gradients vanish. The last linear layer of the language
    model's width is scaled: every connector ends with one, behind which tokens are at most averaged.
    """
    factor, width = model.get_input_embeddings().weight.std() / tokens.std(), tokens.shape[-1]
    linear = [module for module in model.model.multi_modal_projector.modules() if isinstance(module, nn.Linear)]
    for weight in [layer for layer in linear if layer.out_features == width][-1].parameters():
        weight.mul_(factor)
