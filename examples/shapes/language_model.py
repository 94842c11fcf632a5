# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a small Llama that answers questions about ideal tokens.

LLaVA begins with a language model that can look things up in what it reads. A small one must learn that first; here it
does so without a tower. Number and order of the ideal tokens are random, so that no connector is preferred.
"""

from collections.abc import Container
from pathlib import Path
from random import Random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast

from conversion.checkpoints.folders import complete_or_absent, require_empty

from .generate import read_scenes
from .ideal import Answers, IdealTokens, answer_loss, encoded
from .text import CHAT_TEMPLATE, CONTEXT, PLAIN_TEMPLATE, read_rows, read_tokenizer
from .training import DEVICE, save_log, train

WIDTH, LAYERS, HEADS, FEED_FORWARD = 128, 4, 4, 384
# The base of the rotary waves is larger than Llama's: heads are narrow, and questions attend over any distance.
ROPE_THETA = 1e6
MOST_TOKENS = 24  # of a picture
# Captions have the form of stage 1, and, as dialogues, that of stage 2.
ROWS = (("captions.json", PLAIN_TEMPLATE), ("captions.json", CHAT_TEMPLATE), ("dialogues.json", CHAT_TEMPLATE))
SHARES = (1, 1, 2)  # of these rows in the batches


def train_language_model(
    data: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    steps: int,
    batch_size: int = 32,
    muon_rate: float = 1e-2,
    adam_rate: float = 2e-3,
    seed: int = 0,
) -> Path:
    """Trains a Llama and writes it into `out`, which must not exist or be empty.

    Args:
        data: folder that `generate` wrote.
        tokenizer: folder that `tokenizer` wrote.
        out: a Llama folder of transformers (model and tokenizer) with the log of the training.
        steps: batches of `batch_size` rows.
    """
    out = require_empty(out)
    rng = Random(seed)
    torch.manual_seed(seed)
    words = read_tokenizer(Path(tokenizer))
    tokens = IdealTokens(read_scenes(data, "train"), words)
    model = build_language_model(LlamaTokenizer.from_pretrained(tokenizer)).to(DEVICE)
    rows = read_answers(Path(data), words, tokens.scenes)
    embeddings, image_token = model.get_input_embeddings(), model.config.vocab_size

    def loss() -> torch.Tensor:
        number = rng.randint(tokens.most, max(tokens.most, MOST_TOKENS))
        drawn = rng.choices(rng.choices(rows, SHARES)[0], k=batch_size)
        pictures = [tokens.shuffled(name, number, embeddings, rng) for name, *_ in drawn]
        return answer_loss(model, image_token, drawn, pictures)

    log = train(model, loss, steps, {".layers.": muon_rate}, adam_rate, "language model")
    with complete_or_absent(out) as folder:
        model.save_pretrained(folder)
        LlamaTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        settings = {"steps": steps, "batch_size": batch_size, "muon_rate": muon_rate, "adam_rate": adam_rate}
        save_log(folder, settings | {"seed": seed}, log)
    return out


def read_answers(data: Path, words: PreTrainedTokenizerFast, pictures: Container[str]) -> list[list[Answers]]:
    """Returns the rows of each part of ROWS that are about some pictures, encoded."""
    return [
        [encoded(row, words, form) for row in read_rows(data / name) if row["id"] in pictures] for name, form in ROWS
    ]


def build_language_model(tokenizer: LlamaTokenizer) -> LlamaForCausalLM:
    """Builds an untrained Llama; its vocabulary has no `<image>`, which the conversion adds.

    Its keys begin as its queries, so that a token attends to what is like it ("Mimetic Initialization of Self-Attention
    Layers", arXiv 2305.09828): from there it learns sooner to look things up.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=WIDTH**-0.5,  # Llama's 0.02 suits widths of thousands; this model would learn more slowly
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.k_proj.load_state_dict(layer.self_attn.q_proj.state_dict())
    return model
