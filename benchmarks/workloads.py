# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Defines what `benchmarks run` times: the work of each row, its repetitions, its FLOPs and its bytes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import Cache

from benchmarks import count
from benchmarks.systems import (
    ANSWER,
    OURS,
    OURS_COMPILED,
    QUESTION,
    REFERENCE,
    STOCK,
    STOCK_COMPILED,
    WHOLE,
    System,
    cropped,
    fill,
)

METRICS = ("encode", "prefill", "first token", "decode", "answer", "second question", "second answer")
METRICS += ("prefill by budget", "first token by budget")
SCORES = ("salience", "diverse", "merging", "question")  # of `reduce_image_tokens`
METRICS += ("prefill, reduced", *(f"first token, {score}" for score in SCORES))
SIZES = {"cpu": "slice", "cuda": "7b"}  # by device
Work = Callable[[], object]


@dataclass(frozen=True)
class Plan:
    """Says what is measured, and how often; compiled systems skip rows that would take too long to compile."""

    dtype: torch.dtype
    product: int  # side of the matrices that measure the peak
    rounds: int
    warm_up: int  # uncounted calls at the start of a turn
    repeats: int  # minimum of counted calls of a turn
    turn_seconds: float  # a turn lasts at least so long, unless it reaches as many calls as an answer has tokens
    images: tuple[int, ...]
    texts: tuple[int, ...]
    batches: tuple[int, ...]
    decode_batches: tuple[int, ...]
    compiled_batches: tuple[int, ...]
    budgets: tuple[int, ...]  # tokens of a picture, beside all of them
    kept: tuple[int, ...]  # tokens of a picture that a reducer keeps
    backend: str = "inductor"

    def compile_options(self, device: str) -> dict[str, str]:
        """Returns the options of `torch.compile`: CUDA graphs where there are any."""
        graphs = device == "cuda" and self.backend == "inductor"
        return {"backend": self.backend, **({"mode": "reduce-overhead"} if graphs else {})}

    def compiled(self, batch: int, text: int = QUESTION) -> bool:
        return batch in self.compiled_batches and text == QUESTION


PLANS = {
    "tiny": Plan(
        dtype=torch.float32,
        product=512,
        rounds=2,
        warm_up=0,
        repeats=1,
        turn_seconds=0,
        images=(1, 2),
        texts=(10, QUESTION),
        batches=(1, 2),
        decode_batches=(1, 2),
        compiled_batches=(1,),
        budgets=(1,),
        kept=(1,),
        backend="eager",
    ),
    "slice": Plan(
        dtype=torch.bfloat16,
        product=4096,
        rounds=4,
        warm_up=0,
        repeats=1,
        turn_seconds=1,
        images=(1, 8),
        texts=(10, QUESTION, 200, 1000),
        batches=(1, 4),
        decode_batches=(1, 8, 32, 128),
        compiled_batches=(1,),
        budgets=(36, 9, 1),
        kept=(144, 36, 9, 1),
    ),
    "7b": Plan(
        dtype=torch.bfloat16,
        product=8192,
        rounds=5,
        warm_up=1,
        repeats=3,
        turn_seconds=0.1,
        images=(1, 8, 32),
        texts=(10, QUESTION, 200, 1000),
        batches=(1, 8, 32),
        decode_batches=(1, 8, 32, 128),
        compiled_batches=(1, 8, 32, 128),
        budgets=(36, 9, 1),
        kept=(144, 36, 9, 1),
    ),
}


@dataclass(frozen=True)
class Case:
    """Describes a row of the table: `prepare` returns the work to time; `flops` and `bytes` count it."""

    metric: str
    batch: int
    text: int | None
    systems: tuple[str, ...]
    prepare: Callable[[System], Work]
    flops: Callable[[System], float] | None = None
    bytes: Callable[[System], float] | None = None
    budget: int | None = None  # tokens of a picture in our systems, if not all
    kept: int | None = None  # tokens of a picture in reduced systems
    reduced: Callable[[System], Work] | None = None  # the work of a reduced system

    @property
    def key(self) -> tuple:
        return self.metric, self.batch, self.text, self.budget or self.kept

    @property
    def row(self) -> dict[str, Any]:
        """Returns what a result says of the row, beside its numbers."""
        tokens = {"budget": self.budget, "kept": self.kept}
        found = {name: number for name, number in tokens.items() if number is not None}
        return {"metric": self.metric, "batch": self.batch, "text": self.text} | found

    def work(self, name: str, systems: dict[str, System]) -> Work:
        """Prepares the work of a system; a reduced one is the whole one at other work."""
        prepare = self.reduced if name in WHOLE else self.prepare
        assert prepare is not None
        return prepare(systems[WHOLE.get(name, name)])

    @property
    def wanted_first(self) -> bool:
        """Returns whether most readers look for this row."""
        return self.metric in ("first token", "prefill", "decode") and self.batch <= 8 and self.text == QUESTION


def cases(plan: Plan, eager: bool = False) -> Iterator[Case]:
    """Yields all rows in the order of the table; with `eager` the rows have no compiled systems."""
    both, three, compiled = (STOCK, OURS), (STOCK, REFERENCE, OURS), (STOCK_COMPILED, OURS_COMPILED)

    def systems(names: tuple[str, ...], batch: int, text: int = QUESTION) -> tuple[str, ...]:
        return names + compiled if plan.compiled(batch, text) and not eager else names

    for batch in plan.images:
        yield Case("encode", batch, None, systems(three, batch), partial(encode, batch=batch), vision_flops(batch))
    for text in plan.texts:
        case = partial(prefill, batch=1, text=text)
        yield Case("prefill", 1, text, systems(both, 1, text), case, prefill_flops(1, text))
    for batch, text in [(1, text) for text in plan.texts] + [(batch, QUESTION) for batch in plan.batches[1:]]:
        case = partial(first_token, batch=batch, text=text)
        yield Case("first token", batch, text, systems(three, batch, text), case, first_token_flops(batch, text))
    for batch in plan.decode_batches:
        case = partial(decode, batch=batch)
        yield Case("decode", batch, QUESTION, systems(both, batch), case, bytes=step_bytes(batch))
    for batch in plan.batches:
        yield Case("answer", batch, QUESTION, systems(both, batch), partial(answer, batch=batch))
    for batch in plan.batches:
        yield Case("second question", batch, QUESTION, systems(both, batch), partial(second_question, batch=batch))
    for batch in plan.batches:
        yield Case("second answer", batch, QUESTION, systems(both, batch), partial(second_answer, batch=batch))
    for budget in plan.budgets:
        work, flops = partial(prefill, batch=1, text=QUESTION), prefill_flops(1, QUESTION)
        yield by_budget(Case("prefill by budget", 1, QUESTION, systems(both, 1), work, flops), budget)
    for budget in plan.budgets:
        work, flops = partial(first_token, batch=1, text=QUESTION), first_token_flops(1, QUESTION)
        yield by_budget(Case("first token by budget", 1, QUESTION, systems(both, 1), work, flops), budget)
    for kept in plan.kept:
        yield by_reducer("prefill, reduced", prefill, reduced_prefill, systems(both, 1), kept)
    for score in SCORES:
        reduced = partial(reduced_first_token, score=score)
        for kept in plan.kept:
            yield by_reducer(f"first token, {score}", first_token, reduced, systems(both, 1), kept)


def by_budget(case: Case, tokens: int) -> Case:
    """Returns the case with pictures of `tokens` tokens in our systems."""
    prepare, flops = case.prepare, case.flops
    return replace(
        case,
        prepare=lambda system: prepare(system.with_budget(tokens)),
        flops=flops and (lambda system: flops(system.with_budget(tokens))),
        budget=tokens,
    )


def by_reducer(
    metric: str, whole: Callable[..., Work], reduced: Callable[..., Work], systems: tuple[str, ...], kept: int
) -> Case:
    """Returns a row of whole systems, and of the same systems that keep `kept` tokens of a picture."""
    names = (*systems, *(name for name, of in WHOLE.items() if of in systems))
    work = partial(whole, batch=1, text=QUESTION)
    return Case(metric, 1, QUESTION, names, work, kept=kept, reduced=partial(reduced, kept=kept))


# The work


def encode(system: System, batch: int) -> Work:
    """Prepares vision tower and connector."""
    return partial(system.vision, system.pictures(batch))


def prefill(system: System, batch: int, text: int) -> Work:
    """Prepares the language model on pictures that are already encoded."""
    ids = system.prompt(batch, text)
    embeddings = system.model.get_input_embeddings()(ids)
    cache = system.new_cache(batch, text)
    return lambda: system.forward(system.emptied(cache), inputs_embeds=embeddings)


def first_token(system: System, batch: int, text: int) -> Work:
    """Prepares the path from pixels and ids to the logits of the first token."""
    ids, pixels = system.prompt(batch, text), system.pictures(batch)
    cache = system.new_cache(batch, text)
    return lambda: system.forward(system.emptied(cache), inputs_embeds=system.embed(ids, pixels))


def reduced_prefill(system: System, kept: int) -> Work:
    """Prepares the language model on a picture that is already encoded, with the tokens that are kept."""
    inputs = system.reduced(system.prompt(1, QUESTION), system.pictures(1), kept, "salience")  # all take as long
    cache = reduced_cache(system, kept)
    return lambda: system.forward(system.emptied(cache), **inputs)


def reduced_first_token(system: System, kept: int, score: str) -> Work:
    """Prepares the path from pixels and ids to the logits of the first token: encodes, chooses and reads."""
    ids, pixels = system.prompt(1, QUESTION), system.pictures(1)
    cache = reduced_cache(system, kept)
    return lambda: system.forward(system.emptied(cache), **system.reduced(ids, pixels, kept, score))


def reduced_cache(system: System, kept: int) -> Cache:
    """Returns an empty cache for the tokens that are kept, the text and an answer."""
    return system.new_cache(1, kept + QUESTION - system.image_tokens)


def decode(system: System, batch: int) -> Work:
    """Prepares a decoding step: one more token for each sequence."""
    length = system.image_tokens + QUESTION + ANSWER // 2
    cache = fill(system.new_cache(batch, QUESTION), system, batch, length)
    token = torch.full((batch, 1), 5, device=system.model.device)
    return lambda: system.forward(cache, input_ids=token)


def answer(system: System, batch: int) -> Work:
    """Prepares `generate`, from pixels and ids to an answer of 16 tokens."""
    ids, pixels = system.prompt(batch, QUESTION), system.pictures(batch)
    cache = system.new_cache(batch, QUESTION)
    return lambda: system.generate(system.emptied(cache), ids, ANSWER, pixel_values=pixels).sequences


def second_question(system: System, batch: int) -> Work:
    """Prepares another question about a picture in the cache, up to the logits of the first token."""
    seen = 1 + system.image_tokens
    ids = system.prompt(batch, QUESTION)[:, seen:]
    cache = fill(system.new_cache(batch, QUESTION), system, batch, seen)
    return lambda: system.forward(cropped(cache, seen), input_ids=ids)


def second_answer(system: System, batch: int) -> Work:
    """Prepares `generate` for another question about a picture in the cache, with an answer of 16 tokens."""
    seen = 1 + system.image_tokens
    ids = system.prompt(batch, QUESTION)
    cache = fill(system.new_cache(batch, QUESTION), system, batch, seen)
    return lambda: system.generate(cropped(cache, seen), ids, ANSWER).sequences


# FLOPs and bytes of the work


def vision_flops(batch: int) -> Callable[[System], float]:
    return lambda system: batch * sum(part.flops for part in count.vision_parts(system.config))


def prefill_flops(batch: int, text: int) -> Callable[[System], float]:
    return lambda system: batch * count.prefill(system.config, text).flops


def first_token_flops(batch: int, text: int) -> Callable[[System], float]:
    return lambda system: batch * sum(part.flops for part in count.first_token(system.config, text))


def step_bytes(batch: int) -> Callable[[System], float]:
    def of(system: System) -> float:
        config = system.config
        weights = count.decoder_weights(config) + count.head_weights(config)
        return weights * count.BYTES + batch * count.cache_bytes(config, QUESTION + ANSWER // 2)

    return of
