# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a miniature CLIP by contrast between pictures and short captions.

The architecture is that of CLIP. Two things of the training differ, because it takes minutes instead of GPU years. A
picture has many true captions, and the contrast is with all false ones, including those that differ in one word
(NegCLIP, arXiv 2210.01936). A caption is compared with the best token of a picture instead of the class token (FILIP,
arXiv 2111.07783), so that each patch learns what it shows.
"""

import math
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from conversion.checkpoints.folders import complete_or_absent, require_empty
from modeling_llava_stf import LlavaSTFImageProcessor

from .generate import read_scenes
from .phrases import Phrase, all_phrases
from .scenes import SIDE, Scene
from .text import read_tokenizer
from .training import DEVICE, save_log, train

PATCH = 12  # pixels; they give a grid of 8 x 8, which windows of 2 and 4 divide
WIDTH, LAYERS, TEXT_LAYERS, HEADS, SHARED_WIDTH = 64, 5, 2, 4, 128
# Position embeddings are as long as patch embeddings: with CLIP's own 0.02 they take far longer to learn.
POSITION_SCALE = 2.0
SCALE = 10.0  # initial scale of the cosines
READ_AT_ONCE = 500  # pictures of a batch


def train_clip(
    data: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    steps: int,
    batch_size: int = 64,
    muon_rate: float = 2e-2,
    adam_rate: float = 2e-3,
    seed: int = 0,
) -> Path:
    """Trains a CLIP on the training pictures of `data` and writes it into `out`, which must not exist or be empty.

    `out` is a CLIP folder of transformers (model and preprocessing). The log of the training also has, by kind of
    caption, the share of test pictures for which all true captions score higher than all false ones.
    """
    out = require_empty(out)
    torch.manual_seed(seed)
    phrases, words = all_phrases(), read_tokenizer(Path(tokenizer))
    texts = encode(words, phrases)
    image_processor = LlavaSTFImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels, truth = read_pictures(Path(data), "train", image_processor, phrases)
    model = build_clip(words).to(DEVICE)

    def loss() -> torch.Tensor:
        batch = torch.randint(len(pixels), (batch_size,))
        cosines = similarity(model, pixels[batch].float().to(DEVICE), texts)
        return contrast(model.logit_scale.exp() * cosines, truth[batch].to(DEVICE))

    log = train(model, loss, steps, muon_rate, adam_rate, "CLIP")
    told_apart = measure(model, *read_pictures(Path(data), "test", image_processor, phrases), texts, phrases)
    with complete_or_absent(out) as folder:
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        settings = {"steps": steps, "batch_size": batch_size, "muon_rate": muon_rate, "adam_rate": adam_rate}
        save_log(folder, settings | {"seed": seed}, log, told_apart=told_apart)
    return out


def read_pictures(
    data: Path, split: str, image_processor: LlavaSTFImageProcessor, phrases: list[Phrase]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the pictures of a split, (P, 3, SIDE, SIDE) in float16, and which phrases are true, (P, phrases)."""
    scenes = read_scenes(data, split)
    names = list(scenes)
    pixels = []
    for start in tqdm(range(0, len(names), READ_AT_ONCE), desc=f"{split} pictures", unit=f"{READ_AT_ONCE} pictures"):
        pictures = [Image.open(data / "images" / f"{name}.png") for name in names[start : start + READ_AT_ONCE]]
        pixels.append(image_processor(pictures, return_tensors="pt")["pixel_values"].half())
    return torch.cat(pixels), torch.tensor([_truths(scene, phrases) for scene in scenes.values()])


def _truths(scene: Scene, phrases: list[Phrase]) -> list[bool]:
    return [phrase.holds(scene) for phrase in phrases]


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """Builds an untrained CLIP; texts end in a new token, because CLIP treats the id 2 of `</s>` specially."""
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
    """Returns sines and cosines of a patch's row and column at several rates, (grid * grid, width)."""
    rates = torch.pi / 2 * grid ** -torch.linspace(0, 1, width // 4)
    places = torch.cartesian_prod(*[torch.arange(grid) + 0.5] * 2)  # (grid * grid, 2)
    angles = (places.unsqueeze(-1) * rates).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def encode(tokenizer: PreTrainedTokenizerFast, phrases: list[Phrase]) -> dict[str, torch.Tensor]:
    end = len(tokenizer)
    rows = [[*tokenizer(phrase.text).input_ids, end] for phrase in phrases]
    return tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(DEVICE)


def similarity(model: CLIPModel, pixels: torch.Tensor, texts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the cosine between each text and the best token of each picture, (pictures, texts)."""
    tokens = model.vision_model.post_layernorm(model.vision_model(pixels).last_hidden_state)  # (B, 1 + N, C)
    tokens = nn.functional.normalize(model.visual_projection(tokens), dim=-1)
    meanings = nn.functional.normalize(model.text_projection(model.text_model(**texts).pooler_output), dim=-1)
    return torch.einsum("bnd,pd->bnp", tokens, meanings).amax(1)


def contrast(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Computes CLIP's loss for many true captions: against the false ones, and against other pictures."""
    false = logits.masked_fill(truth, -torch.inf)
    return sum(nn.functional.softplus(false.logsumexp(dim, keepdim=True) - logits)[truth].mean() for dim in (0, 1))


@torch.inference_mode()
def measure(
    model: CLIPModel, pixels: torch.Tensor, truth: torch.Tensor, texts: dict[str, torch.Tensor], phrases: list[Phrase]
) -> dict[str, float]:
    """Returns, by kind of phrase, the share of pictures for which all true ones score higher than all false ones."""
    batches = pixels.split(READ_AT_ONCE)
    cosines = torch.cat([similarity(model, batch.float().to(DEVICE), texts).cpu() for batch in batches])
    columns: dict[str, list[int]] = defaultdict(list)
    for column, phrase in enumerate(phrases):
        columns[phrase.kind].append(column)
    shares = {}
    for kind, of_kind in columns.items():
        true, found = truth[:, of_kind], cosines[:, of_kind]
        worst = found.masked_fill(~true, torch.inf).amin(1)
        right = worst > found.masked_fill(true, -torch.inf).amax(1)
        shares[kind] = round(right[true.any(1)].float().mean().item(), 4)
    return shares
