# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Weights that stay on disk until they are written: reading folders and writing shards, one tensor at a time."""

import ctypes
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from ..keys import ConversionError

LIBC, PAGE, MADV_WILLNEED = ctypes.CDLL(None), 4096, 3
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# What has the weights of a whole model, in the order in which transformers looks for it.
WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Weight:
    """A tensor that is not in memory: its shape and dtype, and how to get it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    origin: str  # the file it comes from, or how it is made

    @classmethod
    def of(cls, tensor: torch.Tensor, origin: str) -> "Weight":
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor, origin)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "Weight":
        if dtype == self.dtype:
            return self
        return Weight(self.shape, dtype, lambda: self.load().to(dtype), f"{self.origin}, as {dtype}")


Weights = dict[str, Weight]


def matrix(weights: Weights, name: str) -> Weight:
    """A weight of two dimensions.

    Raises:
        ConversionError: if there is none of this name, or if it has another number of dimensions.
    """
    if name not in weights:
        raise ConversionError(f"The source has no weight for {name!r}.")
    if len(weights[name].shape) != 2:
        raise ConversionError(f"{name!r} has the shape {weights[name].shape}, expected two dimensions.")
    return weights[name]


def require_file(path: Path) -> None:
    """Raises a [`ConversionError`] for a pipe, a folder or a device, which would be read without end or not at all.

    So it does for the pointer that a clone without Git LFS has in a file's place.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise ConversionError(f"{path} is not a file, but a folder, a pipe or a device.")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ConversionError(f"{path} is a pointer of Git LFS, not the file itself: fetch it (git lfs pull).")


def read_json(path: Path) -> dict[str, Any]:
    require_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"Cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, expected an object with named fields.")
    return content


def section(config: dict[str, Any], name: str, place: Path) -> dict[str, Any]:
    """The object `name` of a config, or the config itself if it has none."""
    found = config.get(name, config)
    if not isinstance(found, dict):
        raise ConversionError(f"{place}: `{name}` is {found!r}, expected an object with named fields.")
    return found


def read_file(path: Path) -> Weights:
    """The weights of one .safetensors or .bin file, memory-mapped; nothing in a .bin is executed."""
    require_file(path)
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # each format has its own exceptions for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(
            f"Cannot read {path}: {reason} (damaged, incomplete, or not a file of tensors)"
        ) from error
    if not isinstance(state, Mapping) or not all(map(_is_named_tensor, state.items())):
        raise ConversionError(f"{path} holds something else than named tensors (dense ones).")
    _refuse_shared(state, path)
    return {key: Weight.of(tensor.contiguous(), path.name) for key, tensor in state.items()}


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    name, tensor = item
    dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    return isinstance(name, str) and dense and not tensor.is_meta


def _read_safetensors(path: Path) -> Weights:
    file = safe_open(path, framework="pt")
    names = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
    weights = {}
    for key in file.keys():  # noqa: SIM118 (not a dict)
        view = file.get_slice(key)
        # Other dtypes are those of buffers, which are dropped; see `check_dtypes`.
        dtype = names.get(view.get_dtype()) or file.get_tensor(key).dtype
        weights[key] = Weight(tuple(view.get_shape()), dtype, partial(file.get_tensor, key), path.name)
    return weights


def _refuse_shared(state: Mapping[str, torch.Tensor], path: Path) -> None:
    seen: dict[tuple, str] = {}
    for key, tensor in state.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        if tensor.numel() and place in seen:
            raise ConversionError(f"{path}: {key!r} and {seen[place]!r} are one tensor (tied); untie them first.")
        seen[place] = key


def read_folder(folder: Path) -> Weights:
    """All weights of a checkpoint folder, single or sharded, .safetensors or .bin; of several, transformers' choice."""
    for name in WHOLE:
        if (folder / name).exists():
            return _read_shards(folder / name) if name.endswith(".json") else read_file(folder / name)
    raise ConversionError(
        f"{folder} has no weights: expected model.safetensors or pytorch_model.bin, whole or with an index of shards."
    )


def is_whole(folder: Path) -> bool:
    """Returns whether a folder holds all weights of a model."""
    return any((folder / name).exists() for name in WHOLE)


def _read_shards(index: Path) -> Weights:
    weight_map = section(read_json(index), "weight_map", index)
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(f"{index}: `weight_map` is expected to name the file of each weight.")
    weights: Weights = {}
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).exists():
            raise ConversionError(f"{index} names {name}, which is missing.")
        shard = read_file(index.parent / name)
        twice = weights.keys() & shard.keys()
        if twice:
            key = min(twice)
            raise ConversionError(f"{index.parent}: {key!r} stands in {weights[key].origin} and again in {name}.")
        weights |= shard
    for key, name in weight_map.items():
        if key not in weights or weights[key].origin != name:
            raise ConversionError(f"{index} lists {key!r} in {name}, which lacks it.")
    return weights


def check_dtypes(weights: Weights) -> None:
    """Raises a [`ConversionError`] for a weight of another dtype than those of models."""
    for name, weight in weights.items():
        if weight.dtype not in SAFETENSORS_DTYPES:
            expected = ", ".join(str(dtype) for dtype in SAFETENSORS_DTYPES)
            raise ConversionError(f"{name!r} ({weight.origin}) is {weight.dtype}, expected one of {expected}.")


def check_castable(weights: Weights) -> None:
    """Raises a [`ConversionError`] for a weight of 8 bits or of whole numbers: without its scale a cast is wrong."""
    for name, weight in weights.items():
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            raise ConversionError(
                f"{name!r} ({weight.origin}) is {weight.dtype}: it is quantised, expected whole weights."
            )


def parse_size(text: str) -> int:
    """`5GB`, `2.5GB`, `500MiB` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConversionError(f"{text!r} is no size: expected a number of bytes, or one with KB, MB, GB or GiB.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMG".index(match[2].upper() or " "))


def plan_shards(weights: Weights, max_shard_size: int) -> list[list[str]]:
    """The names of each shard's weights, in order; a shard is larger than the limit only for one larger tensor."""
    shards: list[list[str]] = []
    size = 0
    for name, weight in weights.items():
        if not shards or size + weight.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weight.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def write_folder(folder: Path, weights: Weights, max_shard_size: int) -> None:
    """Writes safetensors shards and their index, two tensors in memory at most, with a progress bar.

    Raises:
        ConversionError: for a tensor with NaN or infinite values.
    """
    shards = plan_shards(weights, max_shard_size)
    files = dict(zip(shard_names(len(shards)), shards, strict=True))
    total = sum(weight.nbytes for weight in weights.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing") as progress:
        for file, names in files.items():
            _write_shard(folder / file, {name: weights[name] for name in names}, progress)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, weights: Weights, progress: tqdm) -> None:
    """The safetensors layout: length of the header, header, then the bytes of the tensors, one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        start, end = end, end + weight.nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[weight.dtype],
            "shape": weight.shape,
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in _read_ahead(weights):
            file.write(tensor_bytes(tensor))
            progress.update(tensor.nbytes)


def _read_ahead(weights: Weights) -> Iterator[torch.Tensor]:
    """The finite tensors in order; while one is written, the next is read and checked."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        waiting = None
        for name, weight in weights.items():
            following = reader.submit(_read, name, weight)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def _read(name: str, weight: Weight) -> torch.Tensor:
    tensor = weight.load()
    # Fetches a memory-mapped tensor in one go, as a copy would; page faults alone would fetch a few pages at a time.
    start = tensor.data_ptr() // PAGE * PAGE
    LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - start), MADV_WILLNEED)
    check_finite(name, tensor)
    return tensor


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    array = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return array.data


def check_finite(name: str, tensor: torch.Tensor) -> None:
    # Both ends of the range in one pass; a NaN anywhere is both ends.
    if not all(math.isfinite(end) for end in torch.aminmax(tensor)):
        raise ConversionError(f"{name!r} has NaN or infinite values.")


def compare(written: Weights, weights: Weights, checksum: Callable[[memoryview], int]) -> None:
    """Compares each written tensor's checksum with that of its source.

    Raises:
        ConversionError: naming the first difference.
    """
    if written.keys() != weights.keys():
        raise ConversionError(f"The result differs in {min(written.keys() ^ weights.keys())!r}: one side lacks it.")
    with tqdm(total=sum(w.nbytes for w in weights.values()), unit="B", unit_scale=True, desc="verifying") as progress:
        for name, weight in weights.items():
            copy = written[name]
            same = (copy.shape, copy.dtype) == (weight.shape, weight.dtype)
            if not same or checksum(tensor_bytes(copy.load())) != checksum(tensor_bytes(weight.load())):
                raise ConversionError(f"{name!r} in {copy.origin} differs from its source ({weight.origin}).")
            progress.update(weight.nbytes)
