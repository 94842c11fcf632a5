# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The original's tokenizer as one fast tokenizer that knows `<image>`."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .checkpoints.weights import read_json, require_file
from .keys import ConversionError

IMAGE_TOKEN = "<image>"
# In the order in which transformers 4.37 gives new ids to those that the vocabulary lacks.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# What a converted tokenizer does, with the only values of the settings for it; a missing one is the same.
REQUIRED = {
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": True,
    "split_special_tokens": False,
    "sp_model_kwargs": {},
}
# Those that read a tokenizer.model as Llama's; CodeLlama's, for one, reads the same file in another way.
LLAMA_CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast")
PROBES = 5000
# A token's content and flags.
Flags = dict[str, Any]
# Flags of added tokens, by their ids.
Added = dict[int, Flags]


def load_tokenizer(folder: Path, model_max_length: int, original: bool = False) -> PreTrainedTokenizerFast:
    """Reads a Llama tokenizer and adds `<image>` as one special token.

    A tokenizer.json has its merges, which are used as they are; those of a tokenizer.model are in its scores.

    The original cuts the text at `<image>` and tokenizes each piece alone, so the text after an image begins with the
    dummy prefix `▁`, as at the start of a text. With `legacy=False` the text after other special tokens has none. Both
    rules are in the normalizer, which `LlamaTokenizer` would replace on loading: hence a plain
    [`PreTrainedTokenizerFast`].

    Args:
        folder: has tokenizer.model (or tokenizer.json) and tokenizer_config.json.
        model_max_length: the model's context, in tokens.
        original: read what the original reads, the tokenizer.model, also where a tokenizer.json lies beside it.

    Raises:
        ConversionError: if a file is missing or damaged, or if a fast tokenizer would read texts in another way than
            the original.
    """
    settings = read_json(folder / "tokenizer_config.json")
    _require_settings(settings, folder)
    named, special = _special_tokens(folder, settings)
    added = _added_tokens(folder, settings)
    # transformers 4.37, which wrote the original's files, takes a missing flag as True; its fast classes have none.
    said = None if str(settings.get("tokenizer_class")).endswith("Fast") else settings.get("legacy")
    source = None
    if (folder / "tokenizer.json").exists() and not original:
        source = _read_tokenizer_json(folder / "tokenizer.json")
        model, legacy = source.model, _prefixes_after(source, named["eos_token"]) if said is None else said
        in_file = json.loads(source.to_str())["added_tokens"]
        added = {token["id"]: _flags(token, folder) for token in in_file} | added
    elif (folder / "tokenizer.model").exists():
        _require_class(settings.get("tokenizer_class"), folder)
        cut = {*special, *(token["content"] for token in added.values()), IMAGE_TOKEN}
        model, legacy = _read_tokenizer_model(folder / "tokenizer.model", cut), said is not False
    else:
        raise ConversionError(f"{folder} has neither tokenizer.model nor tokenizer.json.")

    _require_pieces(named, model, added, folder)
    backend = _assemble(model, added, special, legacy, folder)
    if source is not None:
        _require_same(source, backend, folder / "tokenizer.json")
    bos = named["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"pad_token": named["unk_token"], **named},
        model_specific_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _require_settings(settings: dict[str, Any], folder: Path) -> None:
    if not isinstance(settings.get("legacy"), (bool, type(None))):
        raise ConversionError(f"{folder}: `legacy` of the tokenizer is {settings['legacy']!r}, expected true or false.")
    for name, expected in REQUIRED.items():
        if settings.get(name) not in (None, expected):
            raise ConversionError(
                f"{folder}: `{name}` of the tokenizer is {settings[name]!r}, expected {expected!r}: a converted one "
                "does nothing else."
            )


def _require_class(name: str | None, folder: Path) -> None:
    if name not in LLAMA_CLASSES:
        raise ConversionError(
            f"{folder}: `tokenizer_class` is {name!r}, expected 'LlamaTokenizer': another class reads the file "
            "tokenizer.model in another way."
        )


def _require_pieces(named: dict[str, str], model: Any, added: Added, folder: Path) -> None:
    """Raises a [`ConversionError`] for a BOS, EOS or unknown token that the model has never seen."""
    known = {token["content"] for token in added.values()}
    for name in LLAMA_TOKENS:
        if named[name] not in known and model.token_to_id(named[name]) is None:
            raise ConversionError(f"{folder}: the {name} {named[name]!r} is no token of the vocabulary.")


def _special_tokens(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, str], dict[str, Flags]]:
    """The named special tokens, and the flags of all in the order of their new ids, as transformers 4.37 reads them."""
    file = folder / "special_tokens_map.json"
    overriding = read_json(file) if file.exists() and "added_tokens_decoder" not in settings else {}
    values = {**LLAMA_TOKENS, **settings, **overriding}
    named = {name: _flags(values[name], folder) for name in NAMED_TOKENS if values.get(name) is not None}
    if not named.keys() >= LLAMA_TOKENS.keys():
        raise ConversionError(f"{folder}: tokenizer_config.json names no {min(LLAMA_TOKENS.keys() - named.keys())}.")
    others = [_flags(token, folder) for part in (settings, overriding) for token in _listed(part, folder)]
    special: dict[str, Flags] = {}
    for token in (*named.values(), *others):
        special.setdefault(token["content"], token)
    return {name: token["content"] for name, token in named.items()}, special


def _listed(settings: dict[str, Any], folder: Path) -> list[Any]:
    """The special tokens without a name of their own."""
    others = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    others = list(others.values()) if isinstance(others, dict) else others
    if not isinstance(others, list):
        raise ConversionError(f"{folder}: `additional_special_tokens` is {others!r:.100}, expected a list of tokens.")
    return others


def _content(token: Any, folder: Path) -> str:
    """A token's text; it is written as that, or as an object with its flags (with a `__type` before 4.35)."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise ConversionError(f"{folder}: a special token of the tokenizer is {token!r:.100}, expected its text.")
    return content


def _added_tokens(folder: Path, settings: dict[str, Any]) -> Added:
    """The added tokens of a slow tokenizer: in its settings, or in a file of their own before transformers 4.34."""
    tokens = settings.get("added_tokens_decoder")
    if tokens is None and (folder / "added_tokens.json").exists():
        tokens = {token_id: token for token, token_id in read_json(folder / "added_tokens.json").items()}
    try:
        return {int(token_id): _flags(token, folder) for token_id, token in (tokens or {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{folder}: the added tokens are {tokens!r:.100}, expected tokens by their ids."
        ) from error


def _flags(token: Any, folder: Path) -> Flags:
    """A token with its flags; `<image>` has none, for the original cuts the text there before its tokenizer sees it."""
    content = _content(token, folder)
    if not isinstance(token, dict) or content == IMAGE_TOKEN:
        return {"content": content}
    return {"content": content, **{flag: bool(token.get(flag)) for flag in ("lstrip", "rstrip", "single_word")}}


def read_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json, without what it says about the length of texts."""
    require_file(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other class
        raise ConversionError(f"Cannot read the tokenizer {file}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def different_parts(*tokenizers: Tokenizer) -> list[str]:
    """The parts that say which ids a text has, and are not the same in two tokenizers."""
    here, there = (json.loads(tokenizer.to_str()) for tokenizer in tokenizers)
    return [name for name in ("added_tokens", "model", "normalizer") if here[name] != there[name]]


def _read_tokenizer_json(file: Path) -> Tokenizer:
    tokenizer = read_tokenizer(file)
    parts = json.loads(tokenizer.to_str())
    steps = (parts["normalizer"] or {}).get("normalizers", [parts["normalizer"]])
    pre_tokenizer = parts["pre_tokenizer"] or {"type": "Metaspace"}
    odd = [step["type"] for step in steps if step and step["type"] not in ("Prepend", "Replace")]
    if not parts["model"].get("byte_fallback"):
        odd.append(f"{parts['model']['type']} without byte fallback")
    if pre_tokenizer["type"] != "Metaspace" or pre_tokenizer.get("split"):
        odd.append(f"the pre-tokenizer {pre_tokenizer['type']}, which splits words")
    if odd:
        raise ConversionError(f"{file} has {', '.join(odd)}: this is not a Llama tokenizer (sentencepiece BPE).")
    return tokenizer


def _prefixes_after(tokenizer: Tokenizer, special: str) -> bool:
    """Whether the text after a special token begins with the dummy prefix: what `legacy` says, where it is not said."""
    tokens = tokenizer.encode(f"{special}a", add_special_tokens=False).tokens
    return len(tokens) < 2 or tokens[1].startswith("▁")


def _read_tokenizer_model(file: Path, cut: set[str]) -> BPE:
    """A sentencepiece model as the BPE of `tokenizers`, which reads all texts alike, or else is refused.

    Args:
        file: the tokenizer.model.
        cut: the tokens at which a text is cut before sentencepiece sees it.
    """
    sentencepiece, proto = _read_sentencepiece(file, cut)
    model = BPE(
        vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
        merges=merges_of(_scores(proto)),
        unk_token=proto.pieces[sentencepiece.unk_id()].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    difference = _compare(model, sentencepiece, proto)
    if difference:
        raise ConversionError(
            f"{file}: {difference}. Usual causes: pieces with equal scores, or a piece with a character that is no "
            "piece itself; Llama's vocabulary has neither."
        )
    return model


def _read_sentencepiece(file: Path, cut: set[str]) -> tuple[Any, Any]:
    """The processor of a tokenizer.model and its proto, with Llama's settings."""
    require_file(file)
    try:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    except ImportError as error:
        raise ConversionError(f"To read {file}, install sentencepiece and protobuf: {error}") from error
    sentencepiece = SentencePieceProcessor()
    try:
        sentencepiece.LoadFromSerializedProto(file.read_bytes())
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"Cannot read the tokenizer {file}: {error} (damaged, or not sentencepiece's)") from error
    proto = ModelProto.FromString(sentencepiece.serialized_model_proto())
    for piece in proto.pieces:
        if piece.type == piece.USER_DEFINED and piece.piece in cut:
            piece.type = piece.CONTROL
    sentencepiece.LoadFromSerializedProto(proto.SerializeToString())
    _require_llama(file, proto)
    if not _scores(proto):
        raise ConversionError(f"The tokenizer {file} has no words: it is damaged or not Llama's.")
    return sentencepiece, proto


def _scores(proto: Any) -> dict[str, float]:
    return {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}


def tokenizer_notes(folder: Path) -> list[str]:
    """What a folder's tokenizer does in the original, but not here."""
    notes = _two_tokenizers(folder)
    settings = read_json(folder / "tokenizer_config.json")
    _, special = _special_tokens(folder, settings)
    added = {token["content"] for token in _added_tokens(folder, settings).values()}
    plain = sorted(added - special.keys() - {IMAGE_TOKEN})
    if plain:
        notes.append(
            f"{folder}: the original writes spaces around added tokens when it decodes ({', '.join(plain)}, which are "
            "not special); here an answer is as its tokens spell it"
        )
    if settings.get("clean_up_tokenization_spaces"):
        notes.append(
            f"{folder}: the original drops spaces before signs when it decodes (clean_up_tokenization_spaces); here an "
            "answer is as its tokens spell it"
        )
    return notes


def _two_tokenizers(folder: Path) -> list[str]:
    """A note where a folder's tokenizer.json, which is used, is not that of the tokenizer.model, the original's."""
    file, original = folder / "tokenizer.json", folder / "tokenizer.model"
    if not (file.exists() and original.exists()):
        return []
    source = _read_tokenizer_json(file)
    cut = {token["content"] for token in json.loads(source.to_str())["added_tokens"]}
    try:
        sentencepiece, proto = _read_sentencepiece(original, cut)
        difference = _compare(source.model, sentencepiece, proto) or _other_tokens(folder)
    except ConversionError as error:
        difference = str(error)
    if difference is None:
        return []
    return [
        f"{file} is used, but the original reads the {original.name} beside it, which says otherwise: {difference}. "
        f"If the model was trained with {original.name}, convert without {file.name}"
    ]


def _other_tokens(folder: Path) -> str | None:
    """In what the added tokens of a tokenizer.json are others than those of the files for a slow tokenizer."""
    fast, slow = (load_tokenizer(folder, 1, original).backend_tokenizer for original in (False, True))
    parts = [part for part in different_parts(fast, slow) if part != "model"]
    return f"their {' and '.join(parts)} differ" if parts else None


def _require_llama(file: Path, proto: Any) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    expected = {
        "model_type": (trainer.ModelType.Name(trainer.model_type), "BPE"),
        "treat_whitespace_as_suffix": (trainer.treat_whitespace_as_suffix, False),
        "add_dummy_prefix": (normalizer.add_dummy_prefix, True),
        "remove_extra_whitespaces": (normalizer.remove_extra_whitespaces, False),
        "escape_whitespaces": (normalizer.escape_whitespaces, True),
        "normalizer": (normalizer.name if normalizer.precompiled_charsmap else "identity", "identity"),
        "precompiled_charsmap": (bool(normalizer.precompiled_charsmap), False),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise ConversionError(f"{file}: `{name}` is {found!r}, expected {wanted!r} as in Llama's tokenizer.")
    for piece in proto.pieces:
        if piece.type == piece.UNUSED or (piece.type == piece.USER_DEFINED and len(piece.piece) > 1):
            kind = "unused" if piece.type == piece.UNUSED else "user-defined"
            raise ConversionError(
                f"{file}: {piece.piece!r} is a piece of the type `{kind}`, which Llama's tokenizer does not have and a "
                "fast tokenizer cannot follow. Make it an added token (tokenizer_config.json), or a normal piece."
            )


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece out of two others, in sentencepiece's order: the piece with the best score first.

    Among equal scores sentencepiece takes what stands leftmost. A run of spaces, whose pieces are all equal, then grows
    from its left end: hence the longest left part first.
    """
    pairs = [
        (-score, -end, piece)
        for piece, score in scores.items()
        for end in range(1, len(piece))
        if piece[:end] in scores and piece[end:] in scores
    ]
    return [(piece[:-end], piece[-end:]) for _, end, piece in sorted(pairs)]


def _rows(*pools: list[str]) -> list[str]:
    """Random rows of pieces, of each pool alone."""
    generator = random.Random(0)
    return ["".join(generator.choices(pool, k=6)) for pool in pools if pool for _ in range(PROBES)]


def _compare(model: BPE, sentencepiece: Any, proto: Any) -> str | None:
    """Compares ids on the pieces and on random rows of words, of all and of those whose score others share."""
    scores = _scores(proto)
    alike = Counter(scores.values())
    rows = _rows([*scores], [piece for piece, score in scores.items() if alike[score] > 1])
    texts = [*(piece.piece for piece in proto.pieces), *rows]
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer([], [], legacy=True)
    for text, expected, fast in zip(texts, sentencepiece.encode(texts), tokenizer.encode_batch(texts), strict=True):
        if fast.ids != expected:
            pieces = sentencepiece.id_to_piece(expected)
            return f"a fast tokenizer reads {text!r} as {fast.tokens}, sentencepiece as {pieces}"
    return None


def _assemble(model: Any, added: Added, special: dict[str, Flags], legacy: bool, folder: Path) -> Tokenizer:
    backend = Tokenizer(model)
    tokens = {token["content"]: token for _, token in sorted(added.items())}
    # Flags in the list of added tokens count; an added_tokens.json has none.
    tokens |= {name: {**flags, **tokens.get(name, {})} for name, flags in special.items()}
    tokens.setdefault(IMAGE_TOKEN, {"content": IMAGE_TOKEN})
    for token in tokens.values():
        _refuse_flags(token, legacy, folder)
    plain = [name for name in tokens if name not in special and name != IMAGE_TOKEN]
    backend.normalizer = _normalizer([name for name in special if name != IMAGE_TOKEN], plain, legacy)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for name, flags in tokens.items():
        # A token that is matched before normalization ends the text before it; one that is matched after does not.
        normalized = not legacy and name != IMAGE_TOKEN
        backend.add_tokens([AddedToken(**flags, normalized=normalized, special=name not in plain)])
    for token_id, token in added.items():
        if backend.token_to_id(token["content"]) != token_id:
            raise ConversionError(
                f"{folder}: the added token {token['content']!r} has the id {token_id}, but the ids before have a gap, "
                f"or the vocabulary is another's: here it is {backend.token_to_id(token['content'])}."
            )
    return backend


def _refuse_flags(token: Flags, legacy: bool, folder: Path) -> None:
    """Raises a [`ConversionError`] for a token that a fast tokenizer finds at other places than the original's."""
    content = token["content"]
    if token.get("single_word"):
        raise ConversionError(
            f"{folder}: the added token {content!r} is one between spaces only (single_word), but in a fast tokenizer "
            "also between other signs. Set it to false, if the model was trained without."
        )
    if not legacy and (token.get("lstrip") or token.get("rstrip")):
        raise ConversionError(
            f"{folder}: the added token {content!r} takes the spaces beside it (lstrip, rstrip), which a fast "
            "tokenizer cannot do with `legacy: false`. Set both to false, if the model was trained without."
        )
    if not legacy and ("▁" in content or content.startswith(" ")):
        raise ConversionError(
            f"{folder}: the added token {content!r} begins with a space or has a ▁, which a fast tokenizer does not "
            "tell from the space before a word with `legacy: false`."
        )


def _require_same(source: Tokenizer, backend: Tokenizer, file: Path) -> None:
    """Raises a [`ConversionError`] if a tokenizer.json has rules of its own, for texts without an added token.

    A text that begins with a space is not compared: files of transformers 5 leave out the prefix there, which
    sentencepiece does not.
    """
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    words = [word for word in sorted(source.get_vocab()) if word not in added and not word.startswith("<0x")]
    rows = (text.lstrip(" ▁") for text in _rows(words))
    texts = [text for text in rows if not any(token in text for token in added)]
    read = [tokenizer.encode_batch(texts, add_special_tokens=False) for tokenizer in (source, backend)]
    for text, expected, found in zip(texts, *read, strict=True):
        if found.ids != expected.ids:
            raise ConversionError(
                f"{file} has other rules than Llama's tokenizer: it reads {text!r} as {expected.tokens}, which would "
                f"become {found.tokens}."
            )


def _normalizer(special: list[str], plain: list[str], legacy: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    if not legacy:
        any_special, any_plain = (
            "|".join(re.escape(token.replace(" ", "▁")) for token in tokens) for tokens in (special, plain)
        )
        bos = special[0].replace(" ", "▁")
        steps += [
            # No prefix in front of a special token ...
            normalizers.Replace(Regex(rf"\A▁(?={any_special})"), ""),
            # ... but one behind the BOS with which a chat template begins.
            normalizers.Replace(Regex(rf"\A{re.escape(bos)}(?!{any_special}|\z)"), f"{bos}▁"),
        ]
        if plain:
            # The library looks for a token in its normalized form, so a token alone must stay as it is.
            steps.append(normalizers.Replace(Regex(rf"\A▁(?=(?:{any_plain})\z)"), ""))
    return normalizers.Sequence(steps)
