# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Checks that a file is of the kind that its name says, and of no other kind, too."""

import io
import json
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from PIL import Image

from conversion.checkpoints.weights import LFS_POINTER

# Limits: bytes of each kind, pixels of a picture, levels of nested JSON. Weights have no limit.
MOST_BYTES = {"text": 2**20, "code": 2**20, "JSON": 2**26, "sentencepiece": 2**24, "PNG": 2**24}
MOST_PIXELS = 2**24
MOST_LEVELS = 100
ZIP, PICKLE = b"PK\x03\x04", re.compile(rb"\x80[\x02-\x05]")
MANY_OPCODES = 1000
PNG_START = b"\x89PNG\r\n\x1a\n"
# These are the chunks of the PNG standard; others may contain anything.
PNG_CHUNKS = set(
    b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB sBIT bKGD pHYs hIST sPLT tIME tEXt zTXt iTXt eXIf iCCP".split()
)
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error, Image.DecompressionBombError)


def check_kind(content: bytes, kind: str) -> None:
    """Raises a `ValueError` that continues the file's name, such as "is not JSON: ..."."""
    if kind != "safetensors":  # safetensors checks that its tensors cover the whole file (see `check_weights`)
        CHECKS[kind](content)
        refuse_archive(io.BytesIO(content))


def is_pickle(content: bytes) -> bool:
    """Returns whether pickle or torch.load would accept the content or its beginning: any protocol, or a zip."""
    if content.startswith(ZIP) or PICKLE.match(content):
        return True
    count = 0
    try:
        for count, _ in enumerate(pickletools.genops(content), start=1):
            if count > MANY_OPCODES:
                return True
    except (ValueError, OverflowError, struct.error):
        return False
    return count > 1


def refuse_archive(file: BinaryIO) -> None:
    """Raises a `ValueError` if a file hides a zip after other content."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error):
        return
    if names:
        raise ValueError("has an archive in it")


def check_text(content: bytes) -> None:
    if content.startswith(LFS_POINTER):
        raise ValueError("is a pointer of Git LFS, not the file itself: fetch it (git lfs pull)")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: {error.reason} at byte {error.start}") from error
    control = re.search(r"[\0-\x08\x0b\x0e-\x1f]", text)
    if control:
        raise ValueError(f"is no plain text: it has the control character {control[0]!r}")


def check_json(content: bytes) -> None:
    check_text(content)
    try:
        value = json.loads(content, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"is nested more than {MOST_LEVELS} deep") from error
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    for levels, _ in enumerate(levels_of(value)):
        if levels > MOST_LEVELS:
            raise ValueError(f"is nested more than {MOST_LEVELS} deep")


def _refuse_constant(name: str) -> None:
    """Refuses NaN and Infinity, which Python reads and the Hub does not."""
    raise ValueError(f"{name} is no number of JSON")


def levels_of(value: Any) -> Iterator[list[tuple[str, Any]]]:
    """Yields all values of JSON with their names, level by level; names in lists and at the top are empty."""
    level = [("", value)]
    while level:
        yield level
        level = [pair for _, outer in level for pair in _inner(outer)]


def _inner(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return [("", item) for item in value] if isinstance(value, list) else []


def check_png(content: bytes) -> None:
    chunks = [name for name, _ in png_chunks(content)]
    unknown = sorted(set(chunks) - PNG_CHUNKS)
    if unknown or chunks[:1] != [b"IHDR"]:
        raise ValueError(f"is no plain PNG: it has the chunks {', '.join(map(repr, unknown or chunks[:1]))}")
    picture_texts(content)


def png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields name and data of each chunk; the last one must end the file."""
    if not content.startswith(PNG_START):
        raise ValueError("is not a PNG")
    position, name = len(PNG_START), b""
    while name != b"IEND":
        if position + 12 > len(content):
            raise ValueError("is a PNG that is cut off")
        (length,), name = struct.unpack_from(">I", content, position), content[position + 4 : position + 8]
        yield name, content[position + 8 : position + 8 + length]
        position += 12 + length
    if position != len(content):
        raise ValueError(f"is a PNG with {len(content) - position} bytes behind its end")


def picture_texts(content: bytes) -> list[str]:
    """Returns the texts in a PNG: comments and EXIF, decompressed."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels, the most is {MOST_PIXELS}")
            picture.load()
            values = [*picture.info.values(), *picture.info.keys(), *picture.getexif().values()]
    except PILLOW_ERRORS as error:
        raise ValueError(f"is not a PNG that can be read: {error}") from error
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values]


def check_sentencepiece(content: bytes) -> None:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ValueError("cannot be checked without sentencepiece: pip install sentencepiece") from error
    try:
        model = SentencePieceProcessor(model_proto=content)
    except (RuntimeError, OSError) as error:
        raise ValueError("is no model of sentencepiece") from error
    if model.serialized_model_proto() != content:
        raise ValueError("is a model of sentencepiece with something else in it")


CHECKS: dict[str, Callable[[bytes], None]] = {
    "text": check_text,
    "code": check_text,
    "JSON": check_json,
    "PNG": check_png,
    "sentencepiece": check_sentencepiece,
}
