# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Draws pictures full of pictograms, for the training of the tower: no picture is ever repeated."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .pictograms import Pictogram
from .scenes import SIDE

CELLS = (28, 124)  # least and greatest side of the square around a pictogram, in pixels; most are small
EMPTY = 0.1  # share of the squares without a pictogram
BLOTCHES = 6  # a background has so many blotches a side


@dataclass
class Crowds:
    """Draws crowded pictures with `pictograms`; the squares of a picture are of one size, and continue at its edges."""

    pictograms: list[Pictogram]

    def __post_init__(self) -> None:
        pictures = np.stack([np.asarray(one.picture) for one in self.pictograms])
        self.pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255  # (K, 4, R, R)
        self.pictures[:, :3] *= self.pictures[:, 3:]  # so that the average of two pixels has the right colour

    def draw(self, number: int, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns pictures, (number, 3, SIDE, SIDE) from 0 to 1, and what the centres of their patches show.

        The second is (number, N): numbers of pictograms, and `len(pictograms)` where there is none.
        """
        cell = round(CELLS[0] * (CELLS[1] / CELLS[0]) ** torch.rand(()).square().item())
        rows = math.ceil(SIDE / cell) + 1  # squares a side
        shown = torch.randint(len(self.pictograms), (number, rows, rows))
        squares = _varied(self.pictures[shown.flatten()], cell)
        empty = torch.rand(shown.shape) < EMPTY
        squares[empty.flatten()] = 0
        shown[empty] = len(self.pictograms)
        tiles = squares.view(number, rows, rows, 4, cell, cell).permute(0, 3, 1, 4, 2, 5)
        top, left = torch.randint(rows * cell - SIDE + 1, (2,)).tolist()
        seen = tiles.reshape(number, 4, rows * cell, rows * cell)[..., top : top + SIDE, left : left + SIDE]
        pictures = seen[:, :3] + (1 - seen[:, 3:]) * _backgrounds(number)
        centres = torch.arange(patch // 2, SIDE, patch)
        at = ((centres + top) // cell)[:, None], ((centres + left) // cell)[None, :]
        return pictures.clamp_(0, 1), shown[:, at[0], at[1]].flatten(1)


def _varied(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """Returns pictograms in squares of `side` pixels: mirrored, turned, squeezed, moved and coloured at random."""
    number = len(pictures)
    angle = torch.randn(number) * math.radians(10)
    scale = 1 / _between(0.75, 1.0, 2, number)
    scale[0] *= torch.randint(2, (number,)) * 2 - 1
    x, y = scale
    places = torch.stack([x * angle.cos(), -y * angle.sin(), _between(-1, 1, number) * (x.abs() - 1)], 1)
    places = torch.stack(
        [places, torch.stack([x * angle.sin(), y * angle.cos(), _between(-1, 1, number) * (y - 1)], 1)], 1
    )
    grid = nn.functional.affine_grid(places, [number, 4, side, side], align_corners=False)
    moved = nn.functional.grid_sample(pictures, grid, align_corners=False)
    return (_colouring(number) @ moved.flatten(2)).view_as(moved)


def _colouring(number: int) -> torch.Tensor:
    """Returns matrices, (number, 4, 4), that change saturation, tint and brightness; they keep what is transparent."""
    keep = _between(0.5, 1.4, number, 1, 1)
    matrices = keep * torch.eye(4) + (1 - keep) / 3
    matrices[:, :3] *= _between(0.85, 1.15, number, 3, 1)
    matrices[:, :3, 3] = _between(-0.08, 0.08, number, 1)
    matrices[:, 3] = torch.eye(4)[3]
    return matrices


def _backgrounds(number: int) -> torch.Tensor:
    """Returns pale and dark backgrounds with blotches, (number, 3, SIDE, SIDE)."""
    one = (number, 1, 1, 1)
    tone = torch.where(torch.rand(one) < 0.7, _between(0.72, 0.96, *one), _between(0.06, 0.24, *one))
    blotches = torch.randn(number, 3, BLOTCHES, BLOTCHES) * _between(0, 0.04, *one)
    return nn.functional.interpolate(tone + _between(-0.04, 0.04, number, 3, 1, 1) + blotches, SIDE, mode="bilinear")


def _between(low: float, high: float, *shape: int) -> torch.Tensor:
    return torch.rand(shape) * (high - low) + low
