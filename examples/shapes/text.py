# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains the tokenizer, and converts rows to conversations and text."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from conversion.checkpoints.folders import ROOT, TEMPLATES, complete_or_absent, require_empty
from conversion.tokenizer import load_tokenizer

CHAT_TEMPLATE = (TEMPLATES / "vicuna_v1.jinja").read_text(encoding="utf-8")
PLAIN_TEMPLATE = (ROOT / "modeling_llava_stf" / "plain.jinja").read_text(encoding="utf-8")  # of stage 1
ROLES = {"human": "user", "gpt": "assistant"}
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PLACEHOLDER = "<image>\n"  # position of the picture in LLaVA's JSON
CONTEXT = 512  # tokens; the longest conversation of the data has about 300


def read_rows(file: Path) -> list[dict]:
    """Returns the rows of a JSON list or of JSON lines.

    Raises:
        ValueError: if there is no such file, or it is damaged.
    """
    if not file.is_file():
        raise ValueError(f"There is no {file}: make the data first (python -m examples.shapes generate OUT).")
    text = file.read_text(encoding="utf-8")
    try:
        return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): make the data again.") from error


def read_test(data: Path, prefix: str = "") -> tuple[list[dict], list[dict]]:
    """Returns the questions of the test, and kind and group of each.

    Raises:
        ValueError: if there are none, or the two files do not belong together.
    """
    rows, truth = read_rows(data / f"{prefix}test.json"), read_rows(data / f"{prefix}truth.jsonl")
    if not rows:
        raise ValueError(f"{data / f'{prefix}test.json'} has no question: make the data with more test scenes.")
    asked, known = (Counter(row["id"] for row in part) for part in (rows, truth))
    if asked != known or max(asked.values()) > 1:
        raise ValueError(
            f"{data} has {len(rows)} test questions and {len(truth)} rows of truth, or their ids differ or repeat: "
            f"{prefix}test.json and {prefix}truth.jsonl must come from one run of `generate`."
        )
    return rows, truth


def messages_of(row: dict, folder: Path | None = None) -> list[dict]:
    """Converts a row of LLaVA's JSON to the messages of a chat template; `folder` has its picture."""
    messages = []
    for turn in row["conversations"]:
        content = [{"type": "text", "text": turn["value"].removeprefix(PLACEHOLDER)}]
        if folder is not None and turn["value"].startswith(PLACEHOLDER):
            content.insert(0, {"type": "image", "image": str(folder / row["image"])})
        messages.append({"role": ROLES[turn["from"]], "content": content})
    return messages


def train_tokenizer(data: str | Path, out: str | Path, vocabulary: int = 1536) -> Path:
    """Trains a tokenizer of Llama's kind (BPE, bytes for unknown characters) on the conversations of a data set.

    It writes the files that `LlamaTokenizer` and our conversion read into `out`, which must not exist or be empty. The
    conversion adds `<image>`. The vocabulary is smaller than `vocabulary` if the texts have no more pairs to merge.
    """
    out = require_empty(out)
    model = models.BPE(unk_token=SPECIAL_TOKENS["unk_token"], byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # No token spans two words, and each digit is a token.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\p{L}+|▁?\p{N}|[^\p{L}\p{N}]"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True) for token in (*SPECIAL_TOKENS.values(), *BYTES)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(Path(data)), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    llama = LlamaTokenizer(vocab=learned["vocab"], merges=merges, pad_token="<unk>", legacy=True, **SPECIAL_TOKENS)
    with complete_or_absent(out) as folder:
        llama.save_pretrained(folder)
    return out


def _texts(data: Path) -> Iterator[str]:
    conversations = [messages_of(row) for name in ("train", "text") for row in read_rows(data / f"{name}.json")]
    yield from render_jinja_template(conversations, chat_template=CHAT_TEMPLATE, bos_token="", eos_token="")[0]


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Loads the trained tokenizer with `<image>`, as in every checkpoint that is made from it."""
    return load_tokenizer(folder, CONTEXT)
