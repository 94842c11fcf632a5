# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a miniature of CLIP's vision tower.

CLIP learns by contrast between pictures and texts, which takes GPU years. Here it is known what each patch of a picture
shows, so the tower learns to name it (as in RegionCLIP, arXiv 2112.09106, patches are compared with phrases): in place
of an encoded text, each phrase has a learned vector, and the true phrase is compared with all others of its kind.
"""

from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from conversion.checkpoints.folders import complete_or_absent, require_empty
from modeling_llava_stf import LlavaSTFImageProcessor

from .crowds import Crowds
from .generate import read_scenes
from .phrases import NOTHING, NUMBERED, PRINTS, UNKNOWN, VALUES, known_of, numbers_of, shown_at
from .pictograms import HELD_OUT_FAMILY, SAMPLE, read_pictograms
from .scenes import GROUPS, SIDE
from .training import DEVICE, save_log, train

PATCH = 16  # pixels; they give a grid of 8 x 8, which windows of 2 and 4 divide
WIDTH, LAYERS, HEADS = 128, 5, 4
CROWDED = 0.625  # share of the pictures that are full of objects; the others are scenes
NOTHING_SHARE = 0.1  # so many of the patches that show nothing take part in the loss
WEIGHTS = {"name": 1.0, "category": 0.25, "colour": 0.25, "size": 0.25, "place": 0.25}  # of the kinds' losses
# Position embeddings are as long as patch embeddings: with CLIP's own 0.02 they take far longer to learn.
POSITION_SCALE = 2.0
READ_AT_ONCE = 500  # pictures of a batch


def train_clip(
    data: str | Path,
    out: str | Path,
    steps: int,
    batch_size: int = 32,
    muon_rate: float = 2e-2,
    adam_rate: float = 2e-3,
    seed: int = 0,
    pictograms: str | Path = SAMPLE,
) -> Path:
    """Trains a tower on the training pictures of `data`, and on crowds of the pictograms that it was drawn with.

    `out` is a folder of transformers (model and preprocessing); it must not exist or be empty. The log of the training
    also has, by group of the test and kind, the share of patches whose true phrase scores highest.
    """
    out = require_empty(out)
    torch.manual_seed(seed)
    image_processor = LlavaSTFImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    families = read_pictograms(pictograms)
    drawn = [one for family in families if family != HELD_OUT_FAMILY for one in families[family]]
    crowds = Crowds(drawn)
    known = [numbers_of(known_of(one.object, one.colour)) for one in drawn]
    of_crowd = torch.tensor([*known, numbers_of({"name": NOTHING})])
    scenes, of_scene = read_pictures(Path(data), "train")
    model = build_clip().to(DEVICE)
    crowded = round(CROWDED * batch_size)

    def loss() -> torch.Tensor:
        crowd, shown = crowds.draw(crowded, PATCH)
        batch = torch.randint(len(scenes), (batch_size - crowded,))
        pixels = torch.cat([crowd, scaled(scenes[batch])])
        truth = torch.cat([of_crowd[shown], of_scene[batch].long()]).flatten(0, 1)
        unused = (truth[:, 0] == NUMBERED["name"][NOTHING]) & (torch.rand(len(truth)) > NOTHING_SHARE)
        truth[unused] = UNKNOWN
        return naming_loss(name_patches(model, normalised(pixels, image_processor)).flatten(0, 1), truth.to(DEVICE))

    log = train(model, loss, steps, {".layers.": muon_rate}, adam_rate, "CLIP")
    with complete_or_absent(out) as folder:
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        settings = {"steps": steps, "batch_size": batch_size, "muon_rate": muon_rate, "adam_rate": adam_rate}
        save_log(folder, settings | {"seed": seed}, log, told=measure(model, Path(data), image_processor))
    return out


def scaled(pixels: torch.Tensor) -> torch.Tensor:
    """Converts pictures in uint8, (P, S, S, 3), to numbers from 0 to 1, (P, 3, S, S)."""
    return pixels.permute(0, 3, 1, 2) / 255


def normalised(pixels: torch.Tensor, image_processor: LlavaSTFImageProcessor) -> torch.Tensor:
    """Does what the image processor does with pictures of the right size after it scaled them; (P, 3, S, S)."""
    mean, deviation = (
        torch.tensor(part).view(3, 1, 1) for part in (image_processor.image_mean, image_processor.image_std)
    )
    return ((pixels - mean) / deviation).to(DEVICE)


def read_pictures(data: Path, split: str, number: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the pictures of a split, (P, SIDE, SIDE, 3) in uint8, and the numbers of what their patches show.

    The second is (P, N, kinds). With `number`, only the first ones are read.
    """
    scenes = dict(islice(read_scenes(data, split).items(), number))
    pixels = torch.empty(len(scenes), SIDE, SIDE, 3, dtype=torch.uint8)
    truth = torch.empty(len(scenes), (SIDE // PATCH) ** 2, len(VALUES), dtype=torch.int16)
    for index, (name, scene) in enumerate(tqdm(scenes.items(), desc=f"{split} pictures")):
        with Image.open(data / "images" / f"{name}.png") as picture:
            pixels[index] = torch.from_numpy(np.array(picture))
        centres = product((torch.arange(SIDE // PATCH) + 0.5).mul(PATCH).tolist(), repeat=2)
        truth[index] = torch.tensor([numbers_of(shown_at(scene, x, y)) for y, x in centres])
    return pixels, truth


def build_clip() -> CLIPVisionModelWithProjection:
    """Builds an untrained tower; its projection has a vector for each phrase."""
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=sum(map(len, VALUES.values())),
    )
    model = CLIPVisionModelWithProjection(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    patches, positions = model.vision_model.embeddings.patch_embedding, model.vision_model.embeddings.position_embedding
    nn.init.xavier_uniform_(patches.weight.data.view(WIDTH, -1))
    positions.weight.data[1:] = POSITION_SCALE * waves(SIDE // PATCH, WIDTH)
    return model


def waves(grid: int, width: int) -> torch.Tensor:
    """Returns sines and cosines of a patch's row and column at several rates, (grid * grid, width)."""
    rates = torch.pi / 2 * grid ** -torch.linspace(0, 1, width // 4)
    places = torch.cartesian_prod(*[torch.arange(grid) + 0.5] * 2)  # (grid * grid, 2)
    angles = (places.unsqueeze(-1) * rates).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def name_patches(model: CLIPVisionModelWithProjection, pixels: torch.Tensor) -> torch.Tensor:
    """Returns the score of each phrase for each patch of each picture, (P, N, phrases) in float32."""
    tokens = model.vision_model(pixels).last_hidden_state[:, 1:]
    return model.visual_projection(model.vision_model.post_layernorm(tokens)).float()


def naming_loss(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Compares the true phrases of patches, (P, kinds), with all phrases of their kind; `scores` is (P, phrases)."""
    by_kind = scores.split([len(values) for values in VALUES.values()], dim=-1)
    losses = []
    for weight, of_kind, true in zip(WEIGHTS.values(), by_kind, truth.T, strict=True):
        total = nn.functional.cross_entropy(of_kind, true, ignore_index=UNKNOWN, reduction="sum")
        losses.append(weight * total / max(1, int((true != UNKNOWN).sum())))
    return torch.stack(losses).sum()


@torch.inference_mode()
def measure(
    model: CLIPVisionModelWithProjection, data: Path, image_processor: LlavaSTFImageProcessor
) -> dict[str, dict[str, float]]:
    """Returns, by group and kind, the share of patches whose true phrase scores highest of its kind.

    Patches that show nothing are left out, and those that show print have a kind of their own.
    """
    pixels, truth = read_pictures(data, "test")
    batches = [normalised(scaled(batch), image_processor) for batch in pixels.split(READ_AT_ONCE)]
    scores = torch.cat([name_patches(model, batch).cpu() for batch in batches])
    by_kind = scores.split([len(values) for values in VALUES.values()], dim=-1)
    right = torch.stack([of_kind.argmax(-1) for of_kind in by_kind], dim=-1) == truth
    prints = torch.isin(truth[..., 0], torch.tensor([NUMBERED["name"][text] for text in PRINTS.values()]))
    asked = {kind: truth[..., index] != UNKNOWN for index, kind in enumerate(VALUES)}
    asked["name"] &= ~prints & (truth[..., 0] != NUMBERED["name"][NOTHING])
    columns = {kind: right[..., index] for index, kind in enumerate(VALUES)} | {"print": right[..., 0]}
    groups = np.array([scene.group for scene in read_scenes(data, "test").values()])
    result = {}
    for group in (group for group in GROUPS if group in groups):
        of_group = torch.from_numpy(groups == group)
        shares = {kind: columns[kind][of_group][used[of_group]] for kind, used in (asked | {"print": prints}).items()}
        result[group] = {kind: round(hits.float().mean().item(), 4) for kind, hits in shares.items() if len(hits)}
    return result
