# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Lists the systems of the comparison: a training each, and the ways in which the trained model is asked.

All systems have the same tower, language model and rows. One file has one method; its first lines name the paper, and
what differs from the original.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration
from modeling_llava_stf.modeling_llava_stf import LlavaSTFMultiModalProjector, SpatialTokenFusion

from ..recipe import TAPS
from . import divt, downsampling, g_search, quecc, vq_token
from .encode_first import Encode
from .grouping import Grouping
from .inside import FAST_V, PYRAMID_DROP, Schedule
from .m3 import M3Projector
from .mbtf import MixedProjector
from .mqt import MatryoshkaQueries
from .one_token import one_token
from .pooling import PooledProjector
from .skipping import RoutedProjector, skipping
from .token_packer import TokenPacker


@dataclass(frozen=True)
class Asked:
    """Describes a row of the table: one way of asking a trained model."""

    name: str
    budget: int | None = None  # `max_soft_tokens` of the processor
    keep: int | str | None = None  # of `reduce_image_tokens`, as `score`
    score: str = ""
    encode: Encode | None = None  # a way from pixels to tokens that the model does not know
    film: bool = False  # by a shaking camera, in place of the picture; the budget is that of a frame
    # Tokens that are dropped in the language model; a simulation. A search makes it of the trained model, and of what
    # counts right answers to training questions.
    inside: Schedule | Callable[[LlavaSTFForConditionalGeneration, Callable[[Schedule], int]], Schedule] | None = None

    @property
    def changed(self) -> bool:
        """Returns whether the model was not trained to be asked in this way; a system is trained for its budgets."""
        return self.keep is not None or self.encode is not None or self.inside is not None


@dataclass(frozen=True)
class System:
    """Describes a connector between tower and language model, and how it is trained and asked."""

    name: str
    taps: tuple[int, ...]
    window: int
    projector: Callable[[LlavaSTFConfig], nn.Module]
    settings: dict[str, Any] = field(default_factory=dict)  # of the training, besides the recipe
    others: tuple[Asked, ...] = ()  # other ways of asking the same model
    budget: int | None = None  # of the system itself
    encode: Encode | None = None
    # What acts inside the language model in stage 2 and in every answer; a simulation. Stage 1 is LLaVA's.
    inside: Callable[[LlavaSTFForConditionalGeneration], AbstractContextManager[None]] = nullcontext

    @property
    def asked(self) -> tuple[Asked, ...]:
        return Asked(self.name, self.budget, encode=self.encode), *self.others


def _budgets(name: str, *budgets: int) -> tuple[Asked, ...]:
    return tuple(Asked(f"{name} at {budget}", budget) for budget in budgets)


def _reduced(name: str, *counts: int) -> tuple[Asked, ...]:
    scores = ("salience", "diverse", "merging", "pool")
    by_count = (Asked(f"{name}, {score} {count}", None, count, score) for count in counts for score in scores)
    return *by_count, Asked(f"{name}, adaptive", None, "adaptive", "salience")


def _films(name: str, *budgets: int) -> tuple[Asked, ...]:
    """Returns elastic tokens for each frame against as many clusters of the whole film."""
    numbers = [budget * len(vq_token.MOVES) for budget in budgets]
    by_frame = (Asked(f"{name}, film at {budget} a frame", budget, film=True) for budget in budgets)
    clustered = (
        Asked(f"{name}, film in {number} clusters", encode=partial(vq_token.encode, number=number), film=True)
        for number in numbers
    )
    return *by_frame, *clustered


def _elastic(mode: str, *budgets: int) -> dict[str, Any]:
    return {"token_budgets": list(budgets), "token_budget_mode": mode}


REFERENCE, ELASTIC = "LLaVA-1.5", "elastic MBTF + STF"
ONE, HALVED = TAPS[:1], Asked(f"{REFERENCE}, picture halved", encode=downsampling.encode)
INSIDE = (
    Asked(f"{REFERENCE}, FastV (simulated)", inside=FAST_V),
    Asked(f"{REFERENCE}, PyramidDrop (simulated)", inside=PYRAMID_DROP),
    Asked(f"{REFERENCE}, G-Search (simulated)", inside=g_search.search),
)
SYSTEMS = (
    System(REFERENCE, ONE, 1, LlavaMultiModalProjector, others=(*_reduced(REFERENCE, 16, 4), HALVED, *INSIDE)),
    System("average pooling", ONE, 2, PooledProjector),
    System("STF", ONE, 2, SpatialTokenFusion, others=_reduced("STF", 4)),
    System("MBTF", TAPS, 1, MixedProjector),
    System("MBTF + STF", TAPS, 2, LlavaSTFMultiModalProjector, others=_reduced("MBTF + STF", 4)),
    System(
        ELASTIC,
        TAPS,
        2,
        LlavaSTFMultiModalProjector,
        _elastic("sample", 16, 4, 1),
        (*_budgets(ELASTIC, 4, 1), *_films(ELASTIC, 4, 1)),
    ),
    System("MBTF + STF for 4", TAPS, 2, LlavaSTFMultiModalProjector, _elastic("sample", 4), budget=4),
    System("MBTF + STF for 1", TAPS, 2, LlavaSTFMultiModalProjector, _elastic("sample", 1), budget=1),
    System("M3, one count a row", ONE, 1, M3Projector, _elastic("sample", 64, 16, 4, 1), _budgets("M3", 16, 4, 1)),
    System(
        "M3, all counts",
        ONE,
        1,
        M3Projector,
        _elastic("all", 64, 16, 4, 1),
        _budgets("M3, all counts,", 16, 4, 1),
    ),
    System("TokenPacker", TAPS, 2, TokenPacker),
    System("QueCC", TAPS, 2, quecc.QueCC, encode=quecc.encode),
    System("MQT", ONE, 2, MatryoshkaQueries, _elastic("sample", 16, 4, 1), _budgets("MQT", 4, 1)),
    System("DiVT", ONE, 1, divt.DiVT, encode=divt.encode),
    System("VisToG", ONE, 2, Grouping),
    System("VideoLLM-MoD (simulated)", ONE, 1, RoutedProjector, inside=skipping),
    System("VoCo-LLaMA (simulated)", ONE, 1, LlavaMultiModalProjector, inside=one_token),
)
