# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The original's tokenizer as one fast tokenizer that knows `<image>`."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

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
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    source = LlamaTokenizer.from_pretrained(folder)
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
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _normalizer(unk: str, bos: str, eos: str, legacy: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    if not legacy:
        special = "|".join(token.replace("|", r"\|") for token in (unk, bos, eos))
        steps += [
            # No prefix in front of a special token ...
            normalizers.Replace(Regex(rf"\A▁(?={special})"), ""),
            # ... but one behind the BOS with which a chat template begins.
            normalizers.Replace(Regex(rf"\A{bos}(?!{special}|\z)"), f"{bos}▁"),
        ]
    return normalizers.Sequence(steps)
