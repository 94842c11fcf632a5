# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a miniature CLIP by contrast between pictures and short captions.

The architecture is that of CLIP. Two things of the training differ, because it takes minutes instead of GPU years. The
contrast is between texts and patches instead of whole pictures (as in RegionCLIP, arXiv 2112.09106): what each patch
shows is known. And a patch has several true texts, which are compared with all false ones.
"""

import math
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from conversion.checkpoints.folders import complete_or_absent, require_empty
from modeling_llava_stf import LlavaSTFImageProcessor

from .generate import read_scenes
from .phrases import NOTHING, Phrase, all_phrases, shown_at, true_phrases
from .scenes import GROUPS, SIDE
from .text import read_tokenizer
from .training import DEVICE, save_log, train

PATCH = 16  # pixels; they give a grid of 8 x 8, which windows of 2 and 4 divide
WIDTH, LAYERS, TEXT_LAYERS, HEADS, SHARED_WIDTH = 128, 5, 2, 4, 128
MOST = 5  # true phrases of a patch
NOTHING_SHARE = 0.1  # of the patches that show nothing, so many take part in the contrast
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

    `out` is a CLIP folder of transformers (model and preprocessing). The log of the training also has, by group of the
    test and kind of phrase, the share of patches for which a true phrase of that kind scores highest.
    """
    out = require_empty(out)
    torch.manual_seed(seed)
    phrases, words = all_phrases(), read_tokenizer(Path(tokenizer))
    texts = encode(words, phrases)
    image_processor = LlavaSTFImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels, truth = read_pictures(Path(data), "train", phrases)
    model = build_clip(words).to(DEVICE)
    nothing = phrases.index(Phrase("print", NOTHING))

    def loss() -> torch.Tensor:
        batch = torch.randint(len(pixels), (batch_size,))
        cosines = similarity(model, normalised(pixels[batch], image_processor), texts).flatten(0, 1)
        shown = truth[batch].flatten(0, 1)
        used = (shown[:, 0] != nothing) | (torch.rand(len(shown)) < NOTHING_SHARE)
        return contrast(model.logit_scale.exp() * cosines[used], marks(shown[used], len(phrases)).to(DEVICE))

    log = train(model, loss, steps, muon_rate, adam_rate, "CLIP")
    with complete_or_absent(out) as folder:
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        settings = {"steps": steps, "batch_size": batch_size, "muon_rate": muon_rate, "adam_rate": adam_rate}
        save_log(folder, settings | {"seed": seed}, log, told=measure(model, Path(data), image_processor, texts))
    return out


def normalised(pixels: torch.Tensor, image_processor: LlavaSTFImageProcessor) -> torch.Tensor:
    """Does what the image processor does with pictures of the right size: (P, S, S, 3) to (P, 3, S, S)."""
    mean, deviation = (
        torch.tensor(part).view(3, 1, 1) for part in (image_processor.image_mean, image_processor.image_std)
    )
    return ((pixels.permute(0, 3, 1, 2) * image_processor.rescale_factor - mean) / deviation).to(DEVICE)


def read_pictures(data: Path, split: str, phrases: list[Phrase]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the pictures of a split, (P, SIDE, SIDE, 3) in uint8, and what their patches show.

    The second is (P, N, MOST): the numbers of the true phrases of each patch, and `len(phrases)` where there are fewer.
    """
    number = {phrase: index for index, phrase in enumerate(phrases)}
    scenes = read_scenes(data, split)
    pixels = torch.empty(len(scenes), SIDE, SIDE, 3, dtype=torch.uint8)
    truth = torch.full((len(scenes), (SIDE // PATCH) ** 2, MOST), len(phrases), dtype=torch.int16)
    for index, (name, scene) in enumerate(tqdm(scenes.items(), desc=f"{split} pictures")):
        with Image.open(data / "images" / f"{name}.png") as picture:
            pixels[index] = torch.from_numpy(np.array(picture))
        for patch, (y, x) in enumerate(product(range(SIDE // PATCH), repeat=2)):
            true = true_phrases(shown_at(scene, (x + 0.5) * PATCH, (y + 0.5) * PATCH))
            truth[index, patch, : len(true)] = torch.tensor([number[phrase] for phrase in true])
    return pixels, truth


def marks(truth: torch.Tensor, phrases: int) -> torch.Tensor:
    """Converts the numbers of true phrases, (P, MOST), to marks, (P, phrases)."""
    filled = torch.zeros(len(truth), phrases + 1, dtype=torch.bool)
    return filled.scatter_(1, truth.long(), True)[:, :-1]


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
    """Returns the cosine between each patch of each picture and each text, (P, N, texts)."""
    tokens = model.vision_model.post_layernorm(model.vision_model(pixels).last_hidden_state[:, 1:])  # (P, N, C)
    tokens = nn.functional.normalize(model.visual_projection(tokens), dim=-1)
    meanings = nn.functional.normalize(model.text_projection(model.text_model(**texts).pooler_output), dim=-1)
    return tokens @ meanings.T


def contrast(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Computes CLIP's loss for many true captions: against the false ones, and against other pictures."""
    false = logits.masked_fill(truth, -torch.inf)
    return sum(nn.functional.softplus(false.logsumexp(dim, keepdim=True) - logits)[truth].mean() for dim in (0, 1))


@torch.inference_mode()
def measure(
    model: CLIPModel, data: Path, image_processor: LlavaSTFImageProcessor, texts: dict[str, torch.Tensor]
) -> dict[str, dict[str, float]]:
    """Returns, by group and kind of phrase, the share of patches for which a true phrase of the kind scores highest.

    Patches that show nothing are left out.
    """
    phrases, groups = all_phrases(), [scene.group for scene in read_scenes(data, "test").values()]
    pixels, truth = read_pictures(data, "test", phrases)
    batches = pixels.split(READ_AT_ONCE)
    cosines = torch.cat([similarity(model, normalised(batch, image_processor), texts).cpu() for batch in batches])
    result = {}
    for group in (group for group in GROUPS if group in groups):
        of_group = torch.tensor([one == group for one in groups])
        found = cosines[of_group].flatten(0, 1)
        true = marks(truth[of_group].flatten(0, 1), len(phrases))
        true[:, phrases.index(Phrase("print", NOTHING))] = False
        asked = dict.fromkeys(phrase.kind for phrase, shown in zip(phrases, true.any(0), strict=True) if shown)
        result[group] = {kind: _share_told(found, true, [phrase.kind == kind for phrase in phrases]) for kind in asked}
    return result


def _share_told(cosines: torch.Tensor, true: torch.Tensor, of_kind: list[bool]) -> float:
    cosines, true = cosines[:, of_kind], true[:, of_kind]
    asked = true.any(1)
    right = true[asked].gather(1, cosines[asked].argmax(1, keepdim=True))
    return round(right.float().mean().item(), 4)
