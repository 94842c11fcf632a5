# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a small Llama that reads and answers; a caption replaces the picture."""

from pathlib import Path
from random import Random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from conversion.checkpoints.folders import complete_or_absent, require_empty

from .text import CHAT_TEMPLATE, CONTEXT, messages_of, read_rows, read_tokenizer
from .training import DEVICE, save_log, train

WIDTH, LAYERS, HEADS, FEED_FORWARD = 128, 4, 4, 384
# The base of the rotary waves is larger than Llama's: heads are narrow, and questions attend over any distance.
ROPE_THETA = 1e6


def train_language_model(
    data: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    steps: int,
    batch_size: int = 32,
    muon_rate: float = 2e-2,
    adam_rate: float = 2e-3,
    seed: int = 0,
) -> Path:
    """Trains a Llama on every token of `data`/text.json and writes it into `out`, which must not exist or be empty.

    `out` is a Llama folder of transformers (model and tokenizer) with the log of the training.
    """
    out = require_empty(out)
    rng = Random(seed)
    torch.manual_seed(seed)
    words = read_tokenizer(Path(tokenizer))
    conversations = [messages_of(row) for row in read_rows(Path(data) / "text.json")]
    texts = words.apply_chat_template(conversations, chat_template=CHAT_TEMPLATE, tokenize=False)
    rows = words(texts, add_special_tokens=False)["input_ids"]
    model = build_language_model(LlamaTokenizer.from_pretrained(tokenizer)).to(DEVICE)

    def loss() -> torch.Tensor:
        batch = words.pad({"input_ids": rng.sample(rows, batch_size)}, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return model(**batch.to(DEVICE), labels=labels.to(DEVICE)).loss

    log = train(model, loss, steps, {".layers.": muon_rate}, adam_rate, "language model")
    with complete_or_absent(out) as folder:
        model.save_pretrained(folder)
        LlamaTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        settings = {"steps": steps, "batch_size": batch_size, "muon_rate": muon_rate, "adam_rate": adam_rate}
        save_log(folder, settings | {"seed": seed}, log)
    return out


def build_language_model(tokenizer: LlamaTokenizer) -> LlamaForCausalLM:
    """Builds an untrained Llama; its vocabulary has no `<image>`, which the conversion adds."""
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
    return LlamaForCausalLM(config)
