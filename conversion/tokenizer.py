# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The original's tokenizer as one fast tokenizer that knows `<image>`."""

import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from .keys import ConversionError
from .weights import read_json

IMAGE_TOKEN = "<image>"


def load_tokenizer(folder: Path, model_max_length: int) -> PreTrainedTokenizerFast:
    """Reads a Llama tokenizer and adds `<image>` as one special token.

    The original cuts the text at `<image>` and tokenizes each piece alone, so the text after an image begins with the
    dummy prefix `▁`, as at the start of a text. With `legacy=False` the text after `</s>` has none. Both rules are in
    the normalizer, which [`LlamaTokenizer`] would replace on loading: hence a plain [`PreTrainedTokenizerFast`].

    Args:
        folder: has tokenizer.model (or tokenizer.json) and tokenizer_config.json.
        model_max_length: the model's context, in tokens.
    """
    settings = read_json(folder / "tokenizer_config.json")
    source = _read(folder)
    unk, bos, eos = source.unk_token, source.bos_token, source.eos_token
    # transformers 4.37, which wrote these files, takes a missing flag as True.
    legacy = settings.get("legacy") in (None, True)

    backend = Tokenizer(source.backend_tokenizer.model)
    backend.normalizer = _normalizer(unk, bos, eos, legacy)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # A token that is matched before normalization ends the text before it; one that is matched after does not.
    backend.add_special_tokens([AddedToken(token, normalized=not legacy, special=True) for token in (unk, bos, eos)])
    extra = sorted(source.added_tokens_decoder.items())
    backend.add_tokens([token for _, token in extra if str(token) not in (unk, bos, eos)])
    for token_id, token in settings.get("added_tokens_decoder", {}).items():
        if backend.token_to_id(token["content"]) != int(token_id):
            raise ConversionError(
                f"{folder}: the added token {token['content']!r} has the id {token_id}, but the ids before have a gap."
            )
    backend.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    bos_id = backend.token_to_id(bos)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=source.pad_token or unk,
        model_specific_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _read(folder: Path) -> LlamaTokenizer:
    if not any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        raise ConversionError(f"{folder} has neither tokenizer.model nor tokenizer.json.")
    try:
        source = LlamaTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged file, or sentencepiece and protobuf are not installed
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(
            f"Cannot read the tokenizer in {folder} (tokenizer.model needs sentencepiece and protobuf): {reason}"
        ) from error
    if source.backend_tokenizer.get_vocab_size(with_added_tokens=False) <= len(source.all_special_tokens):
        raise ConversionError(f"The tokenizer in {folder} has no words: tokenizer.model is damaged or not Llama's.")
    return source


def _normalizer(unk: str, bos: str, eos: str, legacy: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    if not legacy:
        special = "|".join(re.escape(token) for token in (unk, bos, eos))
        steps += [
            # No prefix in front of a special token ...
            normalizers.Replace(Regex(rf"\A▁(?={special})"), ""),
            # ... but one behind the BOS with which a chat template begins.
            normalizers.Replace(Regex(rf"\A{re.escape(bos)}(?!{special}|\z)"), f"{bos}▁"),
        ]
    return normalizers.Sequence(steps)
