# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Fewer vision tokens without training: encodes the pictures first, then keeps or merges some of their tokens.

inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", ...)
model.generate(**reduce_image_tokens(model, inputs, keep=72))
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import BatchFeature, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import is_flash_attention_requested

from .modeling_llava_stf import TAKES_ENCODED_PICTURES, LlavaSTFForConditionalGeneration
from .processing_llava_stf import _python_numbers

# The encoder takes these of the processor's outputs.
ENCODER_INPUTS = ("pixel_values", "image_tokens", "vision_feature_layer", "vision_feature_select_strategy")
POSITIONS = ("original", "compact")
# The smallest relevance of a token, and the smallest gain of a further one, in the determinant of `question`.
RIDGE = 1e-6

# Tokens (T, D) in float32, a count b, the words' embeddings (W, D), a seed -> indices of b tokens.
Select = Callable[[torch.Tensor, int, torch.Tensor, int], torch.Tensor]
# Tokens (T, D) in float32, a count b -> b tokens (b, D), and the indices whose places in the text they take.
Merge = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
Score = Callable[[torch.Tensor, int], torch.Tensor]


class _Reduced(BatchFeature):
    """Hands out a copy of the encoded pictures each time.

    transformers 5.18 to 5.24 repeats their list for beams in the caller's own object (`_expand_multimodal_outputs`); in
    a second call with it the rows of a batch would see each other's pictures. Remove this when it makes a new object.
    """

    def __getitem__(self, item: Any) -> Any:
        value = super().__getitem__(item)
        return {"image": copy.copy(value["image"])} if item == "mm_encoder_outputs" else value


@torch.no_grad()
def reduce_image_tokens(
    model: LlavaForConditionalGeneration,
    inputs: Mapping[str, Any],
    keep: int | float | Sequence[int | float] | str,
    score: str | Score = "salience",
    positions: str = "original",
    min_tokens: int = 1,
    seed: int = 0,
) -> BatchFeature:
    """Encodes the pictures, keeps some tokens of each, and shortens the prompt to fit.

    `model` is a LLaVA-STF or a stock LLaVA-1.5 of transformers, with any weights. The result is for one call of
    `model.generate(**result)` on a new conversation. Later turns on the same cache must pass `position_ids` (see
    `docs/reduce.md`), because transformers would count the tokens of the cache, not their positions.

    Args:
        inputs: what the processor returned, with tensors. It stays as it is.
        keep: how many tokens of a picture, or of a video frame, are kept. An `int` is a number, a `float` a share, and
            a list has one of them for each picture in reading order. "adaptive" counts the tokens that stand out of the
            picture, whose salience is above the upper quartile by 1.5 interquartile ranges, and keeps four times as
            many (LLaVA-PruMerge+, 2403.15388, does so with attention: the outliers, and three more for each).
        score: which tokens are kept.

            - "salience": those farthest from the mean of the picture's tokens.
            - "diverse": each is the farthest, by cosine, from those that are kept already (DivPrune, 2503.02175).
            - "merging": none is dropped, the most similar pairs become their mean (the form of ToMe, 2210.09461).
            - "question": experimental. Different tokens that resemble the words behind the picture, in the language
              model's own embeddings (the determinant of CDPruner, 2506.10967). The choice fits this question only.
            - "even", "random", "pool": evenly spaced tokens, those that `seed` draws, means of square windows.
            - a function: `(tokens (T, D) in float32, count) -> count different indices`.
        positions: "original" leaves each token at its position in the whole prompt; "compact" closes the gaps.
        min_tokens: a share, or "adaptive", keeps at least so many.
        seed: of the score "random".

    Returns:
        [`BatchFeature`] with `input_ids`, `attention_mask` and `position_ids`, each `(batch, sequence)` and padded on
        the left, and `mm_encoder_outputs` with the kept tokens (before transformers 5.18: `inputs_embeds`).

    Raises:
        ValueError: if the inputs have labels, are no tensors, or their placeholders do not fit the pictures; if a
            count is not between 1 and the picture's tokens, or not that of square windows; if an argument is unknown;
            if `score` returns anything but such indices, or is "question" and there are no words; if the features of a
            picture are not finite; if flash attention, or a generation config without a cache, would take the gaps of
            original positions for the borders of packed sequences.
    """
    _check(model, inputs, score, positions, seed)
    ids = inputs["input_ids"]
    mask = _mask(model, inputs)
    pictures = _encoded(model, inputs)  # one (T, D) for each picture or frame
    places = _places(ids, mask, model.config.image_token_id, pictures)  # one (T, 2) for each: row and column
    counts = _counts(keep, pictures, min_tokens)

    kept, left = [], mask & (ids != model.config.image_token_id)
    for tokens, place, count in zip(pictures, places, counts, strict=True):
        words = _words(model, ids, left, place) if score == "question" else tokens[:0]
        with _all_digits(tokens):
            fewer, chosen = _fewer(tokens, count, score, words, seed)
        kept.append(fewer)
        left[tuple(place[chosen.to(place.device)].T)] = True
    if positions == "original" and not torch.equal(left, mask):
        _refuse_packing(model, left)
    return _shortened(model, inputs, mask, left, positions, kept)


def _check(
    model: LlavaForConditionalGeneration, inputs: Mapping[str, Any], score: str | Score, positions: str, seed: Any
) -> None:
    if _type(model) not in ("llava_stf", "llava"):
        raise ValueError(
            f"The model is a `{_type(model)}`, expected a `llava_stf` or a `llava`: others place their image tokens in "
            "another way. Of a wrapper, such as that of distributed training, pass `model.module`."
        )
    if inputs.get("image_sizes") is not None:
        raise ValueError(
            "The inputs have `image_sizes`: pictures of different sizes, as those of a Pixtral, have no square grid, "
            "and other tokens behind each row of it. Expected the inputs of a LLaVA-STF or a LLaVA-1.5."
        )
    if inputs.get("labels") is not None:
        raise ValueError("The inputs have `labels`, whose places would move. Reduced inputs are for `generate` only.")
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        raise ValueError(
            "`input_ids` must be a tensor of shape (batch, sequence): call the processor with `return_tensors='pt'` "
            "and, for several prompts, `padding=True`."
        )
    if not callable(score) and score not in (*SELECT, *MERGE):
        raise ValueError(f"`score` is {score!r}, expected a function or one of {[*SELECT, *MERGE]}.")
    if positions not in POSITIONS:
        raise ValueError(f"`positions` is {positions!r}, expected one of {list(POSITIONS)}.")
    if not isinstance(seed, Integral):
        raise ValueError(f"`seed` is {seed!r}, expected a whole number.")


def _type(model: Any) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def _mask(model: LlavaForConditionalGeneration, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Returns the places without padding, (batch, sequence); without a mask `generate` finds them in the same way."""
    ids, given = inputs["input_ids"], inputs.get("attention_mask")
    if given is not None:
        return _along("attention_mask", given, ids).bool()
    padding, ends = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    known = padding is not None and padding not in (ends if isinstance(ends, list) else [ends])
    return ids != padding if known else torch.ones_like(ids).bool()


def _all_digits(tokens: torch.Tensor) -> torch.autocast:
    """Switches a caller's autocast off, which would round the similarities of tokens to 16 bit."""
    return torch.autocast(tokens.device.type, enabled=False)


def _refuse_packing(model: LlavaForConditionalGeneration, left: torch.Tensor) -> None:
    # transformers 5.16 to 5.24 (`_is_packed_sequence`, `find_packed_sequence_indices`): without a mask a gap begins a
    # new sequence, and `generate` drops a mask without zeros. Remove this when both look for falling positions only.
    if is_flash_attention_requested(model.config.get_text_config()):
        raise ValueError(
            "The language model runs with flash attention, which takes gaps in the positions for the borders of packed "
            "sequences. Load the model with `attn_implementation='sdpa'`, or choose `positions='compact'`."
        )
    lengths = left.sum(1)
    if getattr(model.generation_config, "use_cache", None) is False and bool((lengths == lengths[0]).all()):
        raise ValueError(
            "`model.generation_config.use_cache` is False. Without a cache, gaps in the positions are taken for the "
            "borders of packed sequences. Set it to True, or choose `positions='compact'`."
        )


def _encoded(model: LlavaForConditionalGeneration, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Returns the language model's tokens of each picture or frame, (T, D) each."""
    if inputs.get("pixel_values") is None:
        return []
    taken = {name: inputs[name] for name in ENCODER_INPUTS if inputs.get(name) is not None}
    pictures = list(model.get_image_features(**taken, return_dict=True).pooler_output)
    _check_finite(pictures)
    return pictures


def _check_finite(features: Iterable[torch.Tensor]) -> None:
    for picture in features:
        if not picture.isfinite().all():
            raise ValueError(
                f"The features of a picture are not finite in {picture.dtype}: nothing can be chosen among them. Check "
                "its pixels; if they are right, load the model with `dtype=torch.bfloat16` or `torch.float32`."
            )


def _places(
    ids: torch.Tensor, mask: torch.Tensor, image_token: int, pictures: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Returns row and column of each picture's placeholders, (T, 2) each, which are next to each other."""
    in_text = (ids == image_token) & mask
    sizes = [len(tokens) for tokens in pictures]
    found = in_text.nonzero()  # in reading order
    places = list(found.split(sizes)) if sizes and sum(sizes) == len(found) else []
    side_by_side = torch.tensor([0, 1], device=ids.device)
    if sum(sizes) != len(found) or any((place.diff(dim=0) != side_by_side).any() for place in places):
        raise ValueError(
            f"Image tokens and image features do not match: the text has {len(found)} image tokens, its rows "
            f"{in_text.sum(1).tolist()}; the {len(sizes)} pictures or frames give {sum(sizes)}: {sizes}. Pass what the "
            "processor of this model returned, in its order, not truncated and not yet reduced."
        )
    return places


def _words(
    model: LlavaForConditionalGeneration, ids: torch.Tensor, text: torch.Tensor, place: torch.Tensor
) -> torch.Tensor:
    """Returns the embeddings of the row's words behind a picture or, if there are none, of all its words: (W, D)."""
    row, last = place[-1].tolist()
    behind = ids[row, last:][text[row, last:]]
    behind = behind[behind != model.config.image_token_id]
    words = behind if len(behind) else ids[row][text[row] & (ids[row] != model.config.image_token_id)]
    if not len(words):
        raise ValueError(f"`score` is 'question', but prompt {row} has no words: choose another score.")
    return model.get_input_embeddings()(words).float()


def _counts(keep: Any, pictures: list[torch.Tensor], min_tokens: int) -> list[int]:
    keep, min_tokens = _python_numbers(keep), _python_numbers(min_tokens)
    wishes = list(keep) if isinstance(keep, (list, tuple, range)) else [keep] * len(pictures)
    if len(wishes) != len(pictures):
        raise ValueError(f"`keep` has {len(wishes)} entries, but there are {len(pictures)} pictures or frames.")
    return [_count(wish, tokens, min_tokens) for wish, tokens in zip(wishes, pictures, strict=True)]


def _count(wish: Any, tokens: torch.Tensor, min_tokens: int) -> int:
    size = len(tokens)
    if not (type(min_tokens) is int and 1 <= min_tokens <= size):
        raise ValueError(f"`min_tokens` is {min_tokens!r}, expected 1 to {size}, the tokens of a picture.")
    if wish == "adaptive":
        return max(min_tokens, min(size, 4 * _outliers(_salience(tokens.float()))))
    if isinstance(wish, float) and 0 < wish <= 1:
        return max(min_tokens, round(wish * size))
    if isinstance(wish, int) and not isinstance(wish, bool) and 1 <= wish <= size:
        return wish
    raise ValueError(
        f"`keep` is {wish!r}, but a picture has {size} tokens. Expected a number from 1 to {size}, a share such as "
        "0.5, 'adaptive', or a list with a number or share for each picture."
    )


def _outliers(scores: torch.Tensor) -> int:
    lower, upper = torch.quantile(scores, torch.tensor([0.25, 0.75], device=scores.device)).tolist()
    return int((scores > upper + 1.5 * (upper - lower)).sum())


def _fewer(
    tokens: torch.Tensor, count: int, score: str | Score, words: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `count` tokens of a picture and the indices whose places they take, in ascending order."""
    if count == len(tokens):
        return tokens, torch.arange(count, device=tokens.device)
    if isinstance(score, str) and score in MERGE:
        merged, chosen = MERGE[score](tokens.float(), count)
        return merged.to(tokens.dtype), chosen
    if isinstance(score, str):
        chosen = SELECT[score](tokens.float(), count, words, seed)
    else:
        # A copy: the function may change it.
        chosen = _checked(score(tokens.to(torch.float32, copy=True), count), count, len(tokens))
    chosen = chosen.to(tokens.device).sort().values
    return tokens[chosen], chosen


def _checked(chosen: Any, count: int, size: int) -> torch.Tensor:
    try:
        indices = torch.as_tensor(chosen).long()
        whole = torch.equal(indices.double(), torch.as_tensor(chosen).double())  # not if one is NaN
        right = whole and indices.shape == (count,) and {*indices.tolist()} <= {*range(size)}
    except (RuntimeError, TypeError, ValueError):  # torch makes no tensor of it
        right = False
    if not right or len(indices.unique()) != count:
        raise ValueError(f"`score` returned {chosen!r:.200}, expected {count} different indices below {size}.")
    return indices


def _salience(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens - tokens.mean(0)).norm(dim=-1)


def _cosines(tokens: torch.Tensor) -> torch.Tensor:
    tokens = normalize(tokens, dim=-1)
    return tokens @ tokens.T


def _most_salient(tokens: torch.Tensor, count: int, words: torch.Tensor, seed: int) -> torch.Tensor:
    return _salience(tokens).argsort(descending=True, stable=True)[:count]


def _diverse(tokens: torch.Tensor, count: int, words: torch.Tensor, seed: int) -> torch.Tensor:
    """DivPrune (2503.02175): the first is farthest from its nearest neighbour, each other from those chosen."""
    distance = 1 - _cosines(tokens)
    chosen = [int(distance.clone().fill_diagonal_(torch.inf).amin(1).argmax())]
    nearest = distance[chosen[0]].clone()  # distance of each token to those that are chosen
    while len(chosen) < count:
        nearest[chosen[-1]] = -torch.inf
        chosen.append(int(nearest.argmax()))
        nearest = nearest.minimum(distance[chosen[-1]])
    return torch.tensor(chosen)


def _for_question(tokens: torch.Tensor, count: int, words: torch.Tensor, seed: int) -> torch.Tensor:
    """CDPruner (2506.10967): chooses greedily for the largest determinant of relevance x similarity x relevance.

    There is no text tower of CLIP, so relevance is how far a token lies from the mean in the direction of a word, in
    the language model's embeddings. The largest over the words counts: cosines, or their mean, were worse on shapes.

    Where the rank of the kernel is smaller than the count, its update divides by zero and repeats tokens. Here a gain
    has a lower bound, and a chosen token is never chosen again: the rest then follows relevance.
    """
    relevance = ((tokens - tokens.mean(0)) @ normalize(words.to(tokens.device), dim=-1).T).amax(1)
    relevance = relevance - relevance.min()
    relevance = relevance / relevance.max().clamp(min=RIDGE) + RIDGE
    kernel = relevance[:, None] * _cosines(tokens) * relevance
    gain, rows = kernel.diagonal().clone(), tokens.new_zeros(0, len(tokens))
    chosen: list[int] = []
    for _ in range(count):
        # Gains below the bound are rounding; these tokens are ranked by relevance, behind all others.
        rank = torch.where(gain > RIDGE, gain, RIDGE * relevance / 2)
        rank = rank.index_fill(0, torch.tensor(chosen, dtype=torch.long, device=rank.device), -torch.inf)
        best = int(rank.argmax())
        chosen.append(best)
        row = (kernel[best] - rows[:, best] @ rows) / gain[best].clamp(min=RIDGE).sqrt()
        rows, gain = torch.cat([rows, row[None]]), gain - row**2
    return torch.tensor(chosen)


def _even(tokens: torch.Tensor, count: int, words: torch.Tensor, seed: int) -> torch.Tensor:
    return (2 * torch.arange(count) + 1) * len(tokens) // (2 * count)


def _random(tokens: torch.Tensor, count: int, words: torch.Tensor, seed: int) -> torch.Tensor:
    # On the CPU, whatever the default device is, so that a seed draws the same tokens everywhere.
    generator = torch.Generator().manual_seed(int(seed))
    return torch.randperm(len(tokens), generator=generator, device=generator.device)[:count]


def _pooled(tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of w x w windows; each takes the place at the centre of its window, for an even w the one behind it."""
    side, rows = math.isqrt(len(tokens)), math.isqrt(count)
    if side**2 != len(tokens) or rows**2 != count or side % rows:
        allowed = [(side // w) ** 2 for w in range(1, side + 1) if side % w == 0]
        raise ValueError(
            f"The score 'pool' cannot make {count} tokens of {len(tokens)}; "
            + (f"it can make {allowed}." if side**2 == len(tokens) else "it needs a square grid.")
        )
    w = side // rows
    means = tokens.unflatten(0, (rows, w, rows, w)).mean((1, 3)).flatten(0, 1)
    centres = torch.arange(rows, device=tokens.device) * w + w // 2
    return means, (centres[:, None] * side + centres).flatten()


def _merged(tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The form of ToMe (2210.09461): every other token may join the most similar of the rest, the best pairs first.

    Rounds follow until `count` are left. A group is the mean of its members, at the place of the one that they joined.
    """
    sizes, places = tokens.new_ones(len(tokens), 1), torch.arange(len(tokens), device=tokens.device)
    while len(tokens) > count:
        similar, target = _cosines(tokens)[::2, 1::2].max(1)
        joining = similar.argsort(descending=True, stable=True)[: len(tokens) - count]
        sums = tokens * sizes
        source, target = 2 * joining, 2 * target[joining] + 1
        sums = sums.index_add(0, target, sums[source])
        sizes = sizes.index_add(0, target, sizes[source])
        stays = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device).index_fill(0, source, False)
        tokens, sizes, places = (sums / sizes)[stays], sizes[stays], places[stays]
    return tokens, places


SELECT: dict[str, Select] = {
    "salience": _most_salient,
    "diverse": _diverse,
    "question": _for_question,
    "even": _even,
    "random": _random,
}
MERGE: dict[str, Merge] = {"merging": _merged, "pool": _pooled}


def _shortened(
    model: LlavaForConditionalGeneration,
    inputs: Mapping[str, Any],
    mask: torch.Tensor,
    left: torch.Tensor,
    positions: str,
    kept: list[torch.Tensor],
) -> BatchFeature:
    """Returns the inputs with the places that are `left`, (batch, sequence), and the kept tokens."""
    ids = inputs["input_ids"]
    # A stable sort puts the places that go to the front of a row, where the padding is.
    columns = left.long().argsort(dim=1, stable=True)[:, -int(left.sum(1).max()) :]
    left = left.gather(1, columns)
    given = inputs.get("position_ids")
    whole = mask.cumsum(1) - 1 if given is None else _positions(given, ids)
    if positions == "compact":
        first = whole.gather(1, mask.long().argmax(1, keepdim=True))  # a row's first place without padding
        position_ids = first + left.cumsum(1) - 1
    else:
        position_ids = whole.gather(1, columns)
    padding = model.config.get_text_config().pad_token_id
    data = {
        "input_ids": ids.gather(1, columns).masked_fill(~left, 0 if padding is None else padding),
        "attention_mask": left.long(),
        "position_ids": position_ids.masked_fill(~left, 0),
    }
    for name, values in inputs.items():
        if values is not None and name not in (*data, *ENCODER_INPUTS):
            data[name] = _along(name, values, ids).gather(1, columns).masked_fill(~left, 0)
    return _Reduced(data | _pictures(model, data["input_ids"], kept))


def _positions(given: Any, ids: torch.Tensor) -> torch.Tensor:
    """Returns the caller's positions as (batch, sequence); one row of them may be given for all prompts."""
    one_row = isinstance(given, torch.Tensor) and given.shape in (ids.shape[1:], (1, *ids.shape[1:]))
    return _along("position_ids", given.expand_as(ids) if one_row else given, ids)


def _along(name: str, values: Any, ids: torch.Tensor) -> torch.Tensor:
    if not isinstance(values, torch.Tensor) or values.shape != ids.shape:
        raise ValueError(f"The inputs have `{name}`, which is not of the shape of `input_ids`. Leave it out.")
    return values


def _pictures(model: LlavaForConditionalGeneration, ids: torch.Tensor, kept: list[torch.Tensor]) -> dict[str, Any]:
    if not kept:
        return {}
    if TAKES_ENCODED_PICTURES:
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=kept)}}
    embeddings = model.get_input_embeddings()(ids)
    placeholders = (ids == model.config.image_token_id)[..., None].to(embeddings.device)
    features = torch.cat(kept).to(embeddings.device, embeddings.dtype)
    return {"inputs_embeds": embeddings.masked_scatter(placeholders, features)}


@torch.no_grad()
def suggest_budgets(
    model: LlavaSTFForConditionalGeneration,
    inputs: Mapping[str, Any] | torch.Tensor,
    threshold: float = 0.65,
    budgets: Sequence[int] | None = None,
) -> list[int]:
    """Suggests a budget for each picture: simple pictures get fewer tokens.

    The patches that are more similar than `threshold` to one of their kind count as one: a greedy cover begins with the
    patch that has most neighbours (DiVT, 2605.17954). The number of such groups is rounded up to the next budget. The
    pictures are encoded for it, and once more by the call that uses the budgets:

    inputs = processor(images=pictures, text=prompts, max_soft_tokens=suggest_budgets(model, pixels), ...)

    Args:
        inputs: the processor's output for the pictures, or its `pixel_values`.
        threshold: cosine of two patches, features of the last tap. A higher one gives more tokens. The default is
            DiVT's for CLIP ViT-L/14-336; measure it for other towers and your own pictures.
        budgets: the numbers to choose from; by default those that the model was trained for (`token_budgets`), or all
            that the processor allows if the config names none.

    Returns:
        `list[int]`, one for each picture or frame in reading order. [`reduce_image_tokens`] takes it as `keep`, too.

    Raises:
        ValueError: if the model is not a LLaVA-STF, the inputs have no pictures, an argument is out of range, or the
            features of a picture are not finite.
    """
    if _type(model) != "llava_stf":
        raise ValueError(f"A `{_type(model)}` has no token budgets, expected a `llava_stf`.")
    pixel_values = inputs.get("pixel_values") if isinstance(inputs, Mapping) else inputs
    if not isinstance(pixel_values, torch.Tensor):
        raise ValueError(
            "The inputs have no `pixel_values` as a tensor: pass what the processor returned for the pictures "
            "with `return_tensors='pt'`."
        )
    threshold, budgets = _python_numbers(threshold), _python_numbers(budgets)
    if not (isinstance(threshold, (int, float)) and -1 <= threshold <= 1):
        raise ValueError(f"`threshold` is {threshold!r}, expected a cosine, from -1 to 1.")
    allowed = model.config.allowed_token_budgets
    choice = model.config.token_budgets or allowed if budgets is None else budgets
    right = isinstance(choice, (list, tuple)) and all(type(number) is int and number in allowed for number in choice)
    if not choice or not right:
        raise ValueError(f"`budgets` is {choice!r}, expected numbers from {allowed}, in a list.")
    choice = sorted(choice)
    largest = choice[-1:] * pixel_values.shape[:-3].numel()  # no state depends on it; all tokens may be untrained
    encoded: Any = model.get_image_features(pixel_values, largest, return_dict=True)
    states = encoded.last_hidden_state[:, 1:]  # without the class token
    _check_finite(states)
    with _all_digits(states):
        groups = [_groups(patches.float(), threshold) for patches in states]
    return [next((budget for budget in choice if budget >= count), choice[-1]) for count in groups]


def _groups(patches: torch.Tensor, threshold: float) -> int:
    """Counts the patches, (N, C), whose neighbours cover all others; those with most neighbours come first."""
    near = (_cosines(patches) > threshold).cpu()
    covered, count = torch.zeros_like(near[0]), 0
    for patch in near.sum(1).argsort(descending=True, stable=True).tolist():
        if not covered[patch]:
            covered, count = covered | near[patch], count + 1
    return count


__all__ = ["reduce_image_tokens", "suggest_budgets"]
