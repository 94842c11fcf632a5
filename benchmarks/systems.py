# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Builds the five systems that `benchmarks run` compares, from one set of random weights.

They are the stock LLaVA (576 tokens per picture), the reference port of the method, the package's model, and the
compiled stock and package's models. All share the weights of tower and language model.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    Cache,
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    StaticCache,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks import count
from benchmarks.reference import ReferenceVision, share
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration, reduce_image_tokens
from modeling_llava_stf.modeling_llava_stf import CACHE

QUESTION = 50  # text tokens
ANSWER = 16  # tokens
ANSWER_ROOM = 32  # capacity of a cache of fixed length, in tokens
STOCK, REFERENCE, OURS = "stock", "reference", "ours"
STOCK_COMPILED, OURS_COMPILED = "stock compiled", "ours compiled"
EAGER = {STOCK_COMPILED: STOCK, OURS_COMPILED: OURS}  # eager system of each compiled one
# The same systems with some of a picture's tokens only (`reduce_image_tokens`), and the whole system of each.
WHOLE = {f"{name}, reduced": name for name in (STOCK, OURS, STOCK_COMPILED, OURS_COMPILED)}


@dataclass
class System:
    """Runs the method or the stock model. `model` holds the language model; `vision` returns B x (T, D).

    `budget` is the number of tokens of a picture if it is not all of them.
    """

    name: str
    model: Any
    vision: Callable[[torch.Tensor], list[torch.Tensor]]
    budget: int | None = None

    @property
    def compiled(self) -> bool:
        return self.name in EAGER

    @property
    def tower(self) -> torch.nn.Module:
        return self.vision.tower if isinstance(self.vision, ReferenceVision) else self.model.model.vision_tower

    @property
    def config(self) -> count.Config:
        return self.model.config if self.budget is None else count.with_budget(self.model.config, self.budget)

    @property
    def image_tokens(self) -> int:
        return count.image_tokens(self.config)

    def with_budget(self, tokens: int) -> "System":
        """Returns the same system with `tokens` tokens a picture; the stock model has no budgets."""
        if not isinstance(self.model.config, LlavaSTFConfig):
            return self
        return replace(self, vision=_features(self.model, tokens), budget=tokens)

    def prompt(self, batch: int, text: int) -> torch.Tensor:
        """Returns token ids of a picture and `text` tokens, (batch, T + text)."""
        generator = torch.Generator().manual_seed(text)
        words = torch.randint(3, self.model.config.image_token_id, (batch, text), generator=generator)
        image = torch.full((batch, self.image_tokens), self.model.config.image_token_id)
        return torch.cat([words[:, :1], image, words[:, 1:]], dim=1).to(self.model.device)

    def pictures(self, batch: int) -> torch.Tensor:
        """Returns random pixels, (batch, 3, H, W)."""
        vision = self.model.config.vision_config
        generator = torch.Generator().manual_seed(batch)
        pixels = torch.randn(batch, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
        return pixels.to(self.model.device, self.model.dtype)

    def embed(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Returns embeddings of text and pictures, (batch, sequence, D)."""
        return self._placed(ids, self.vision(pixels))

    def _placed(self, ids: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        embeddings = self.model.get_input_embeddings()(ids)
        places = (ids == self.model.config.image_token_id).unsqueeze(-1)
        return embeddings.masked_scatter(places, torch.cat(features).to(embeddings.dtype))

    def reduced(self, ids: torch.Tensor, pixels: torch.Tensor, kept: int, score: str) -> dict[str, torch.Tensor]:
        """Returns embeddings, (1, sequence, D), and positions of a prompt whose picture keeps `kept` tokens."""
        inputs = reduce_image_tokens(self.model, {"input_ids": ids, "pixel_values": pixels}, keep=kept, score=score)
        embeddings = inputs.get("inputs_embeds")  # before transformers 5.18
        if embeddings is None:
            embeddings = self._placed(inputs["input_ids"], inputs["mm_encoder_outputs"]["image"].pooler_output)
        return {"inputs_embeds": embeddings, "position_ids": inputs["position_ids"]}

    def forward(self, cache: Cache, **inputs: torch.Tensor) -> torch.Tensor:
        """Returns the logits of the last token, (batch, vocabulary)."""
        return self.model(**{CACHE: cache}, use_cache=True, logits_to_keep=1, **inputs).logits[:, -1]

    def generate(self, cache: Cache, ids: torch.Tensor, tokens: int, **inputs: torch.Tensor) -> Any:
        """Returns the greedy answer of `tokens` tokens; the part of the prompt in the cache is not computed again."""
        return self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE: cache},
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            disable_compile=True,  # compiled systems need no further compilation
            return_dict_in_generate=True,
            output_logits=True,
            **inputs,
        )

    def new_cache(self, batch: int, text: int) -> Cache:
        """Returns an empty cache for a picture, `text` tokens and an answer; compiled models get a fixed length."""
        settings = self.model.config.text_config
        if not self.compiled:
            return DynamicCache(config=settings)
        cache = StaticCache(config=settings, max_cache_len=self.image_tokens + text + ANSWER_ROOM)
        cache.early_initialization(batch, *_heads(settings), self.model.dtype, self.model.device)
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values, layer.cumulative_length):
                torch._dynamo.mark_static_address(tensor, guard=False)  # a new cache needs no new compilation
        return cache

    def emptied(self, cache: Cache) -> Cache:
        """Empties a cache for the next prompt; one of fixed length keeps its memory."""
        return cropped(cache, 0) if self.compiled else DynamicCache(config=self.model.config.text_config)


def fill(cache: Cache, system: System, batch: int, tokens: int) -> Cache:
    """Fills a cache with `tokens` tokens of noise; the cost of a step does not depend on the values."""
    text, model = system.model.config.text_config, system.model
    heads, width = _heads(text)
    noise = torch.randn(batch, heads, tokens, width, dtype=model.dtype, device=model.device)
    for layer in range(text.num_hidden_layers):
        cache.update(noise, noise, layer)
    return cache


def cropped(cache: Cache, tokens: int) -> Cache:
    """Returns a cache with its first `tokens` tokens; one of fixed length keeps its memory and resets its count."""
    if not isinstance(cache, StaticCache):
        cache.crop(tokens - cache.get_seq_length())
        return cache
    lengths = [layer.cumulative_length for layer in cache.layers]
    torch._foreach_zero_(lengths)  # few kernels for any number of layers, because this is timed
    torch._foreach_add_(lengths, tokens)
    return cache


def _heads(text: Any) -> tuple[int, int]:
    return text.num_key_value_heads, text.hidden_size // text.num_attention_heads


def configs(size: str) -> tuple[LlavaConfig, LlavaSTFConfig]:
    """Returns the configs of stock and ours: `7b`, `slice` (two language layers) or `tiny`, with 24 tower layers."""
    stock, ours = count.NAMED["llava-1.5-7b"](), count.NAMED["stf-7b"]()
    ours.vision_config.num_hidden_layers = stock.vision_config.num_hidden_layers
    for config in (stock, ours):
        text = config.text_config
        if size != "7b":
            text.num_hidden_layers = 2
        if size == "tiny":
            text.update({"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": 301})
            text.num_key_value_heads, text.head_dim = 2, 32
            config.vision_config = CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=24,
                num_attention_heads=2,
                image_size=56,
                patch_size=14,
            )
        config.image_token_id = text.vocab_size - 1
    ours.image_seq_length = ours.tokens_per_image
    ours.token_budgets = ours.allowed_token_budgets  # random weights were trained for none
    return stock, ours


def eager_systems(size: str, device: str) -> dict[str, System]:
    """Builds the eager systems with random weights in float32."""
    stock_config, our_config = configs(size)
    torch.manual_seed(0)
    ours = _build(LlavaSTFForConditionalGeneration, our_config, device)
    stock = _build(LlavaForConditionalGeneration, stock_config, device)
    for part in ("model.vision_tower", "model.language_model", "lm_head"):
        share(ours.get_submodule(part), stock.get_submodule(part))
    return {
        STOCK: System(STOCK, stock, _features(stock)),
        REFERENCE: System(REFERENCE, ours, ReferenceVision(ours)),
        OURS: System(OURS, ours, _features(ours)),
    }


def cast(systems: Iterable[System], dtype: torch.dtype) -> None:
    """Casts the weights; rotary angles stay in float32, as in a model that is loaded in `dtype`."""
    for system in systems:
        for weight in (*system.model.parameters(), *system.tower.parameters()):
            weight.data = weight.data.to(dtype)


def _build(kind: type, config: Any, device: str) -> Any:
    with torch.device(device):
        model = kind(config)
    model.generation_config.pad_token_id = 0
    return model.eval()


def _features(model: Any, budget: int | None = None) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    def features(pixels: torch.Tensor) -> list[torch.Tensor]:
        budgets = {} if budget is None else {"image_tokens": [budget] * len(pixels)}
        return model.model.get_image_features(pixels, return_dict=True, **budgets).pooler_output

    return features


def compile_system(system: System, name: str, **options: Any) -> System:
    """Compiles tower and connector to one graph, and the language model to one per shape; shares the weights."""
    # transformers installs hooks in the first pass, which a graph cannot contain.
    system.forward(system.new_cache(1, 1), inputs_embeds=system.embed(system.prompt(1, 1), system.pictures(1)))
    torch._dynamo.config.recompile_limit = 64  # each shape has its own graph, and the default limit is eight
    model = copy.deepcopy(system.model, {id(weight): weight for weight in system.model.parameters()})
    options = {"fullgraph": True, "dynamic": False, **options}
    ours = isinstance(model, LlavaSTFForConditionalGeneration)
    features = model.model.get_image_features if ours else _traceable_features(model.model)
    model.model.get_image_features = _copied(torch.compile(features, **options))
    model.forward = torch.compile(model.forward, **options)
    return System(name, model, _features(model))


def _copied(features: Callable[..., BaseModelOutputWithPooling]) -> Callable[..., BaseModelOutputWithPooling]:
    """Copies the tokens: the next CUDA graph overwrites the output of the last one, and `generate` runs one on them."""

    # `generate` looks for `pixel_values` in the signature.
    def get_image_features(pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        tokens = features(pixel_values, *args, **kwargs).pooler_output
        return BaseModelOutputWithPooling(pooler_output=list(torch.stack(tokens)))

    return get_image_features


def _traceable_features(stock: LlavaModel) -> Callable[..., BaseModelOutputWithPooling]:
    """Returns the stock `get_image_features` without its decorators, which cannot be traced into one graph."""

    def get_image_features(pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        outputs = stock.vision_tower(pixel_values, output_hidden_states=True)
        features = stock.multi_modal_projector(outputs.hidden_states[stock.config.vision_feature_layer][:, 1:])
        # The stock model returns it, too; without it the compiler would drop the last layer.
        return BaseModelOutputWithPooling(last_hidden_state=outputs.last_hidden_state, pooler_output=list(features))

    return get_image_features
