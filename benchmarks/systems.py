# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The systems that `benchmarks/run.py` compares: one set of random weights, used in five ways.

A stock LLaVA (576 tokens for a picture), the reference port of the method, the package's model, and the stock and the
package's model compiled. All share the weights of tower and language model.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration
from modeling_llava_stf.modeling_llava_stf import CACHE

QUESTION = 50  # tokens of text beside a picture's
ANSWER = 16  # tokens
ANSWER_ROOM = 32  # tokens that a cache of fixed length has place for
STOCK, REFERENCE, OURS = "stock", "reference", "ours"
STOCK_COMPILED, OURS_COMPILED = "stock compiled", "ours compiled"
EAGER = {STOCK_COMPILED: STOCK, OURS_COMPILED: OURS}  # what a compiled system was before


@dataclass
class System:
    """A way to run the method or the stock model. `model` holds the language model; `vision` gives B x (T, D)."""

    name: str
    model: Any
    vision: Callable[[torch.Tensor], list[torch.Tensor]]

    @property
    def compiled(self) -> bool:
        return self.name in EAGER

    @property
    def tower(self) -> torch.nn.Module:
        return self.vision.tower if isinstance(self.vision, ReferenceVision) else self.model.model.vision_tower

    @property
    def image_tokens(self) -> int:
        return count.image_tokens(self.model.config)

    def prompt(self, batch: int, text: int) -> torch.Tensor:
        """Token ids of a picture and `text` tokens, (batch, T + text)."""
        generator = torch.Generator().manual_seed(text)
        words = torch.randint(3, self.model.config.image_token_id, (batch, text), generator=generator)
        image = torch.full((batch, self.image_tokens), self.model.config.image_token_id)
        return torch.cat([words[:, :1], image, words[:, 1:]], dim=1).to(self.model.device)

    def pictures(self, batch: int) -> torch.Tensor:
        """Pixels, (batch, 3, H, W)."""
        vision = self.model.config.vision_config
        generator = torch.Generator().manual_seed(batch)
        pixels = torch.randn(batch, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
        return pixels.to(self.model.device, self.model.dtype)

    def embed(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings with the pictures in their places, (batch, sequence, D)."""
        embeddings = self.model.get_input_embeddings()(ids)
        places = (ids == self.model.config.image_token_id).unsqueeze(-1)
        return embeddings.masked_scatter(places, torch.cat(self.vision(pixels)).to(embeddings.dtype))

    def forward(self, cache: Cache, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits of the last token, (batch, vocabulary)."""
        return self.model(**{CACHE: cache}, use_cache=True, logits_to_keep=1, **inputs).logits[:, -1]

    def generate(self, cache: Cache, ids: torch.Tensor, tokens: int, **inputs: torch.Tensor) -> Any:
        """The greedy answer of `tokens` tokens to a prompt; what the cache holds of it is not read again."""
        return self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE: cache},
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            disable_compile=True,  # compiled systems are compiled already
            return_dict_in_generate=True,
            output_logits=True,
            **inputs,
        )

    def new_cache(self, batch: int, text: int) -> Cache:
        """An empty cache for a picture, `text` tokens and an answer; it grows, but that of a compiled model."""
        settings = self.model.config.text_config
        if not self.compiled:
            return DynamicCache(config=settings)
        cache = StaticCache(config=settings, max_cache_len=self.image_tokens + text + ANSWER_ROOM)
        cache.early_initialization(batch, *_heads(settings), self.model.dtype, self.model.device)
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values, layer.cumulative_length):
                torch._dynamo.mark_static_address(tensor, guard=False)  # another cache is no reason to compile again
        return cache

    def emptied(self, cache: Cache) -> Cache:
        """For the next prompt; a cache of fixed length stays where it is in memory."""
        return cropped(cache, 0) if self.compiled else DynamicCache(config=self.model.config.text_config)


def fill(cache: Cache, system: System, batch: int, tokens: int) -> Cache:
    """Puts `tokens` tokens of noise into a cache: what a step costs does not depend on the numbers."""
    text, model = system.model.config.text_config, system.model
    heads, width = _heads(text)
    noise = torch.randn(batch, heads, tokens, width, dtype=model.dtype, device=model.device)
    for layer in range(text.num_hidden_layers):
        cache.update(noise, noise, layer)
    return cache


def cropped(cache: Cache, tokens: int) -> Cache:
    """A cache with its first `tokens` tokens; one of fixed length stays where it is in memory, and counts anew."""
    if not isinstance(cache, StaticCache):
        cache.crop(tokens - cache.get_seq_length())
        return cache
    lengths = [layer.cumulative_length for layer in cache.layers]
    torch._foreach_zero_(lengths)  # few kernels, whatever the number of layers: it is within the time
    torch._foreach_add_(lengths, tokens)
    return cache


def _heads(text: Any) -> tuple[int, int]:
    return text.num_key_value_heads, text.hidden_size // text.num_attention_heads


def configs(size: str) -> tuple[LlavaConfig, LlavaSTFConfig]:
    """Stock and ours: `7b`, `slice` (two layers of its language model), or `tiny`. The towers hold all 24 layers."""
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
    return stock, ours


def eager_systems(size: str, device: str) -> dict[str, System]:
    """The systems that are not compiled, with random weights in float32."""
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
    """Weights only: the angles of the positions stay in float32, as in a model that was loaded so."""
    for system in systems:
        for weight in (*system.model.parameters(), *system.tower.parameters()):
            weight.data = weight.data.to(dtype)


def _build(kind: type, config: Any, device: str) -> Any:
    with torch.device(device):
        model = kind(config)
    model.generation_config.pad_token_id = 0
    return model.eval()


def _features(model: Any) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    return lambda pixels: model.model.get_image_features(pixels, return_dict=True).pooler_output


def compile_system(system: System, name: str, **options: Any) -> System:
    """The same weights, with tower and connector as one graph, and one graph for each shape of the language model."""
    # transformers installs hooks in the first pass, which a graph cannot hold.
    system.forward(system.new_cache(1, 1), inputs_embeds=system.embed(system.prompt(1, 1), system.pictures(1)))
    torch._dynamo.config.recompile_limit = 64  # a graph for each shape: they are more than the usual eight
    model = copy.deepcopy(system.model, {id(weight): weight for weight in system.model.parameters()})
    options = {"fullgraph": True, "dynamic": False, **options}
    ours = isinstance(model, LlavaSTFForConditionalGeneration)
    features = model.model.get_image_features if ours else _traceable_features(model.model)
    model.model.get_image_features = _copied(torch.compile(features, **options))
    model.forward = torch.compile(model.forward, **options)
    return System(name, model, _features(model))


def _copied(features: Callable[..., BaseModelOutputWithPooling]) -> Callable[..., BaseModelOutputWithPooling]:
    """Copies the tokens: what a CUDA graph gives is gone when the next one runs, and `generate` runs one on them."""

    def get_image_features(pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(
            pooler_output=list(torch.stack(features(pixel_values, **kwargs).pooler_output))
        )

    return get_image_features


def _traceable_features(stock: LlavaModel) -> Callable[..., BaseModelOutputWithPooling]:
    """The stock `get_image_features`, whose decorators cannot be traced into one graph, without them."""

    def get_image_features(pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        outputs = stock.vision_tower(pixel_values, output_hidden_states=True)
        features = stock.multi_modal_projector(outputs.hidden_states[stock.config.vision_feature_layer][:, 1:])
        # Given back as by the stock model: else the compiler would leave out the last layer.
        return BaseModelOutputWithPooling(last_hidden_state=outputs.last_hidden_state, pooler_output=list(features))

    return get_image_features
