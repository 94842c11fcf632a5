# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""A miniature CLIP, trained by contrast between pictures and short captions.

Two things differ from CLIP, because there are minutes instead of GPU years. A caption is matched with every picture of
the batch that it is true of, by a sigmoid loss (SigLIP, arXiv 2303.15343); and with the best token of a picture instead
of the class token alone (FILIP, arXiv 2111.07783), so that each patch learns what it shows. The model is CLIP's own.
"""

import math
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from conversion.convert import complete_or_absent, require_empty
from modeling_llava_stf import LlavaSTFImageProcessor

from .generate import read_scenes
from .phrases import Phrase, altered, true_phrase
from .scenes import SIDE, Scene
from .text import read_tokenizer
from .training import DEVICE, save_log, train

PATCH = 8  # pixels: a grid of 12 x 12, which windows of 2, 3 and 4 divide
WIDTH, LAYERS, TEXT_LAYERS, HEADS, SHARED_WIDTH = 64, 5, 2, 4, 128
# As long as those of the patch embeddings: at the 0.02 of CLIP's own initialisation a place takes far longer to learn.
POSITION_SCALE = 2.0
SCALE, BIAS = 10.0, -5.0  # of the sigmoid, at the start
TRUE, ALTERED = 4, 2  # phrases that a picture brings into its batch


def train_clip(
    data: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> Path:
    """Trains a CLIP on the training pictures of `data` and writes it into `out`, which must not exist or be empty.

    `out` is a CLIP folder of transformers (model and preprocessing) with the log of the training.
    """
    out = require_empty(out)
    data, rng = Path(data), Random(seed)
    torch.manual_seed(seed)
    scenes = list(read_scenes(data, "train").items())
    words = read_tokenizer(Path(tokenizer))
    image_processor = LlavaSTFImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    model = build_clip(words).to(DEVICE)
    bias = nn.Parameter(torch.tensor(BIAS, device=DEVICE))

    def loss() -> torch.Tensor:
        batch = rng.sample(scenes, batch_size)
        pictures = [Image.open(data / "images" / f"{name}.png") for name, _ in batch]
        pixels = image_processor(pictures, return_tensors="pt")["pixel_values"].to(DEVICE)
        phrases = draw_phrases([scene for _, scene in batch], rng)
        truth = torch.tensor([[phrase.holds(scene) for phrase in phrases] for _, scene in batch], device=DEVICE)
        logits = model.logit_scale.exp() * similarity(model, pixels, encode(words, phrases)) + bias
        return -nn.functional.logsigmoid(torch.where(truth, logits, -logits)).sum() / batch_size

    log = train([*model.parameters(), bias], loss, steps, learning_rate, "CLIP")
    with complete_or_absent(out) as folder:
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
        save_log(folder, settings, log)
    return out


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """An untrained CLIP; its texts end in a token behind the vocabulary, for `</s>` has the id 2, special to CLIP."""
    common = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS}
    text = {
        "vocab_size": len(tokenizer) + 1,
        "num_hidden_layers": TEXT_LAYERS,
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": LAYERS, "image_size": SIDE, "patch_size": PATCH}
    config = CLIPConfig(text_config=common | text, vision_config=common | vision, projection_dim=SHARED_WIDTH)
    model = CLIPModel(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    patches, positions = model.vision_model.embeddings.patch_embedding, model.vision_model.embeddings.position_embedding
    nn.init.xavier_uniform_(patches.weight.data.view(WIDTH, -1))
    positions.weight.data[1:] = POSITION_SCALE * waves(SIDE // PATCH, WIDTH)
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.5)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.1)
    model.logit_scale.data.fill_(math.log(SCALE))
    return model


def waves(grid: int, width: int) -> torch.Tensor:
    """Sines and cosines of a patch's row and column at several rates, (grid * grid, width)."""
    rates = torch.pi / 2 * grid ** -torch.linspace(0, 1, width // 4)
    places = torch.cartesian_prod(*[torch.arange(grid) + 0.5] * 2)  # (grid * grid, 2)
    angles = (places.unsqueeze(-1) * rates).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def draw_phrases(scenes: list[Scene], rng: Random) -> list[Phrase]:
    """What is true of one of the scenes at least, and the same slightly altered; each once."""
    phrases: dict[Phrase, None] = {}
    for scene in scenes:
        phrases |= dict.fromkeys(true_phrase(scene, rng) for _ in range(TRUE))
        phrases |= dict.fromkeys(altered(true_phrase(scene, rng), rng) for _ in range(ALTERED))
    return list(phrases)


def encode(tokenizer: PreTrainedTokenizerFast, phrases: list[Phrase]) -> dict[str, torch.Tensor]:
    end = len(tokenizer)
    rows = [[*tokenizer(phrase.text).input_ids, end] for phrase in phrases]
    return tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(DEVICE)


def similarity(model: CLIPModel, pixels: torch.Tensor, texts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cosine between each text and the token of each picture that suits it best: (pictures, texts)."""
    tokens = model.vision_model.post_layernorm(model.vision_model(pixels).last_hidden_state)  # (B, 1 + N, C)
    tokens = nn.functional.normalize(model.visual_projection(tokens), dim=-1)
    meanings = nn.functional.normalize(model.text_projection(model.text_model(**texts).pooler_output), dim=-1)
    return torch.einsum("bnd,pd->bnp", tokens, meanings).amax(1)
