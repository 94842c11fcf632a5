# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Answers about very many pictures, in parts that are complete or absent: `python -m modeling_llava_stf caption`."""

import argparse
import base64
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageColor
import torch
from tqdm.auto import tqdm

from ._ask_many import picture_inputs, prompt_ids
from .modeling_llava_stf import LlavaSTFForConditionalGeneration
from .processing_llava_stf import LlavaSTFProcessor, load_picture, orientation_of, to_rgb

PROMPT = "Describe the picture."
PLACEHOLDER = "<image>"  # of the picture in LLaVA's files
PREPARED_BATCHES = 4  # that the workers may be ahead of the model
RETRIES = 5
REPLY_SECONDS = 600
# What says that the server is busy or gone, whatever the picture is; what it would say to any picture.
BUSY, REFUSING = (408, 425, 429, 502, 503, 504), (401, 403, 404, 405)
# Sent as they are if they are upright and have no transparency: all servers decode them alike.
SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png"}


@dataclass(frozen=True)
class Row:
    """A question about a picture: a path, a URL, the bytes of a file (none, if it is missing), or None without one."""

    path: str
    prompt: str
    picture: Any
    question_id: Any = None

    def content(self, picture: dict[str, Any]) -> list[dict[str, Any]]:
        """The parts of the message: the picture, if there is one, and the question.

        Raises:
            ValueError: if the question has the placeholder of a picture, but there is none, or half of a character.
        """
        text = self.prompt
        text.encode()
        if PLACEHOLDER in text:
            if self.picture is None:
                raise ValueError(f"The question has {PLACEHOLDER}, but its row names no picture.")
            text = text.replace(PLACEHOLDER, "").strip()
        return [*([] if self.picture is None else [picture]), {"type": "text", "text": text}]


@dataclass
class Answer:
    """A row of the output: the answer, or else why there is none."""

    path: str
    prompt: str
    answer: str | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    question_id: Any = None
    refused: bool = False  # by the server, which was asked

    def llava(self, model: str) -> dict[str, Any]:
        """A line of LLaVA's answer files."""
        name = f"{model}/{self.question_id}/{self.prompt}"
        return {
            "question_id": self.question_id,
            "prompt": self.prompt,
            "text": self.answer or "",
            "answer_id": hashlib.sha256(name.encode()).hexdigest()[:22],
            "model_id": model,
            "metadata": {} if self.error is None else {"error": self.error},
        }


@dataclass
class Outcome:
    """What became of the rows that a run asked about."""

    summary: str = ""
    answered: int = 0
    refused: int = 0
    reason: str = ""  # of the first refusal

    def add(self, answers: Sequence[Answer]) -> None:
        refusals = [answer.error or "" for answer in answers if answer.refused]
        self.answered += sum(answer.error is None for answer in answers)
        self.refused += len(refusals)
        self.reason = self.reason or " ".join("".join(refusals[:1]).split())


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "caption",
        help="answer a question about each of very many pictures",
        description="Asks about every picture of INPUT. The same command continues a stopped run.",
    )
    parser.add_argument(
        "input", metavar="INPUT", help="folder of pictures or of parquet files, parquet file, or JSONL file"
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder for the answers")
    parser.add_argument("--model", help="folder or Hub id of a checkpoint; with --server the name of its model")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--prompt", default=PROMPT, help=f"question of rows without a prompt (default: {PROMPT!r})")
    parser.add_argument("--images", help="folder where relative paths begin (default: that of INPUT)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer, in tokens (default: 128)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures that the model sees at once (default: 8)")
    parser.add_argument("--part-size", type=int, default=512, help="answers in a file, called a part (default: 512)")
    parser.add_argument("--shard", help="I/N: every N-th part, beginning with I (default: RANK/WORLD_SIZE, else 0/1)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="threads that read pictures (default: one per core)"
    )
    parser.add_argument("--server", help="address of an OpenAI-compatible server that answers instead of --model")
    parser.add_argument("--concurrency", type=int, default=16, help="requests to the server at once (default: 16)")
    return parser


Load = Callable[[], tuple[LlavaSTFProcessor, LlavaSTFForConditionalGeneration]]


def caption(arguments: argparse.Namespace, load: Load, image_options: dict[str, Any] | None = None) -> Outcome:
    """Writes the parts of a shard that are not there yet; returns what was done.

    Args:
        arguments: what the parser of [`add_parser`] gives.
        load: loads processor and model; is called if there is something for them to do.
        image_options: options of the processor for the pictures, where they are not its defaults.

    Raises:
        ValueError: if an argument is wrong, the input cannot be read, the output holds something else, or the server
            refuses or is gone. Parts that are complete stay.
    """
    image_options = image_options or {}
    shard, shards = _shard(arguments.shard)
    _check(arguments, image_options)
    rows = read_input(Path(arguments.input), arguments.prompt, arguments.images)
    limit = arguments.max_new_tokens
    server = Server(arguments.server, arguments.model, limit, image_options) if arguments.server else None
    model_name = server.model if server else str(arguments.model)
    settings = {"model": model_name, "revision": arguments.revision, "max_new_tokens": limit}
    # Pictures of other folders may have the same names.
    settings |= {"input": str(Path(arguments.input)), "images": arguments.images and str(Path(arguments.images))}
    output = Output(Path(arguments.output), rows, arguments.part_size, settings | image_options)
    parts = range(shard, output.parts, shards)
    todo = [part for part in parts if not output.file(part).exists()]
    total, left = (sum(len(output.range(part)) for part in chosen) for chosen in (parts, todo))
    answerer = server or (_captioner(load, limit, image_options) if todo else None)
    output.claim()
    outcome, threads = Outcome(), arguments.concurrency if server else arguments.workers
    with ThreadPoolExecutor(threads) as pool, tqdm(total=total, initial=total - left, unit=" pictures") as bar:
        try:
            answers = _answers(pool, answerer, arguments, rows, [output.range(part) for part in todo])
            for part in todo:
                answered = []
                for answer in islice(answers, len(output.range(part))):
                    answered.append(answer)
                    bar.update()
                output.write(part, answered)
                outcome.add(answered)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    outcome.summary = (
        f"{left} of {total} pictures asked about, {left - outcome.answered} of them with an error; {total - left} were "
        f"there. {len(parts)} of {output.parts} parts are in {arguments.output}"
    )
    return outcome


def _captioner(load: Load, max_new_tokens: int, image_options: dict[str, Any]) -> "Captioner":
    if torch.cuda.is_available():  # processes that a launcher starts on one machine take a GPU each
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return Captioner(*load(), max_new_tokens, image_options)


def _check(arguments: argparse.Namespace, image_options: dict[str, Any]) -> None:
    for name in ("max_new_tokens", "batch_size", "part_size", "workers", "concurrency"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected at least 1.")
    if not arguments.prompt.strip():
        raise ValueError("--prompt is empty.")
    if arguments.server and arguments.revision is not None:
        raise ValueError("--revision is for the checkpoint that --model loads here: the server has chosen its own.")
    PIL.ImageColor.getrgb(image_options.get("alpha_background", "white"))  # raises a ValueError that names the colour


def _shard(text: str | None) -> tuple[int, int]:
    text = text or f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--shard is {text!r}, expected I/N with I from 0 to N-1, such as 0/2 and 1/2.")
    return int(found[1]), int(found[2])


def _ahead(pool: ThreadPoolExecutor, function: Callable, rows: Iterable[Row], window: int) -> Iterator[Any]:
    """`function` of all rows, in their order; at most `window` of them are begun and not yet taken."""
    waiting: deque = deque()
    for row in rows:
        waiting.append(pool.submit(function, row))
        if len(waiting) == window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# The model here


@dataclass
class Prepared:
    """A row with the model's inputs, or the reason why it has none."""

    row: Row
    ids: list[int]
    pixels: torch.Tensor | None  # (1, 3, height, width)
    image_tokens: list[int]
    error: str | None = None


class Captioner:
    """Answers rows with a model in this process, greedily: what [`LlavaSTFForConditionalGeneration.generate`] gives."""

    def __init__(
        self,
        processor: LlavaSTFProcessor,
        network: LlavaSTFForConditionalGeneration,
        max_new_tokens: int = 128,
        image_options: dict[str, Any] | None = None,
    ):
        self.processor, self.network = processor, network.eval()
        self.max_new_tokens, self.image_options = max_new_tokens, image_options or {}

    def prepare(self, row: Row) -> Prepared:
        """Decodes a picture, in a thread; whatever is wrong with it is the row's error."""
        pixels, tokens = None, list[int]()
        try:
            if row.picture is not None:
                pixels, tokens = picture_inputs(self.processor, load_picture(row.picture), **self.image_options)
            message = {"role": "user", "content": row.content({"type": "image"})}
            ids = prompt_ids(self.processor, [[message]], tokens)[0]
        except Exception as error:  # damaged files make PIL raise errors of every kind
            return Prepared(row, [], None, [], error=_reason(error))
        return Prepared(row, ids, pixels, tokens)

    def answer(self, prepared: Sequence[Prepared]) -> list[Answer]:
        """The answers of one batch."""
        good = [one for one in prepared if one.error is None]
        answers = iter(self._generate(good) if good else [])
        return [
            _answer(one.row, **next(answers)) if one.error is None else _answer(one.row, error=one.error)
            for one in prepared
        ]

    def _generate(self, prepared: list[Prepared]) -> list[dict[str, Any]]:
        device, width = self.network.device, max(len(one.ids) for one in prepared)
        padding = self.processor.tokenizer.pad_token_id or 0
        ids = torch.tensor([[padding] * (width - len(one.ids)) + one.ids for one in prepared])
        mask = torch.tensor([[0] * (width - len(one.ids)) + [1] * len(one.ids) for one in prepared])
        tokens = [number for one in prepared for number in one.image_tokens]
        pixels = [one.pixels.to(device, self.network.dtype) for one in prepared if one.pixels is not None]
        output = self.network.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            **({"pixel_values": torch.cat(pixels), "image_tokens": tokens} if pixels else {}),
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
        )
        answers = [self._to_the_end(row) for row in output[:, width:].tolist()]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        return [
            {"answer": text.strip(), "prompt_tokens": len(one.ids), "answer_tokens": len(row)}
            for one, row, text in zip(prepared, answers, texts, strict=True)
        ]

    def _to_the_end(self, tokens: list[int]) -> list[int]:
        """The tokens up to the one that ends the answer, which counts."""
        ends = self.network.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _answers(
    pool: ThreadPoolExecutor,
    answerer: "Server | Captioner | None",
    arguments: argparse.Namespace,
    rows: Sequence[Row],
    parts: list[range],
) -> Iterator[Answer]:
    """The answers of all rows of some parts, in their order; `answerer` is None if there are no parts."""
    source = chain.from_iterable(rows[part.start : part.stop] for part in parts)
    if isinstance(answerer, Server):
        yield from _ahead(pool, answerer.answer, source, PREPARED_BATCHES * arguments.concurrency)
    elif answerer:
        size = arguments.batch_size
        prepared = _ahead(pool, answerer.prepare, source, PREPARED_BATCHES * size)
        for part in parts:
            # Batches end where parts do, so that a part is the same in every run.
            for start in range(0, len(part), size):
                yield from answerer.answer(list(islice(prepared, min(size, len(part) - start))))


def _answer(row: Row, **outcome: Any) -> Answer:
    return Answer(row.path, row.prompt, question_id=row.question_id, **outcome)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# A model elsewhere


class Server:
    """Answers rows through an OpenAI-compatible server, greedily. `OPENAI_API_KEY` is sent if it is set.

    `max_soft_tokens` is sent as vLLM takes it; a server that does not know it must refuse it.

    Raises:
        ValueError: if there is no server, or it refuses.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        max_new_tokens: int = 128,
        image_options: dict[str, Any] | None = None,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--server is {url!r}, expected an address such as http://127.0.0.1:8000.")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.image_options = dict(image_options or {})
        self.limits: dict[str, Any] = {"max_tokens": max_new_tokens}
        if "max_soft_tokens" in self.image_options:
            self.limits["mm_processor_kwargs"] = {"max_soft_tokens": self.image_options.pop("max_soft_tokens")}
        self.model: str = model or self._first_model()

    def _first_model(self) -> str:
        try:
            return str(self._request("/models")["data"][0]["id"])
        except (RefusedError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"The server {self.url} does not say what models it has: name one with --model."
            ) from error

    def answer(self, row: Row) -> Answer:
        """The answer; a picture that cannot be read, or that the server refuses, is an error of the row."""
        try:
            url = {} if row.picture is None else {"url": _data_url(row.picture, **self.image_options)}
            content = row.content({"type": "image_url", "image_url": url})
        except Exception as error:  # as in `Captioner.prepare`
            return _answer(row, error=_reason(error))
        request = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        try:
            reply = self._request("/chat/completions", request | self.limits)
        except RefusedError as error:
            return _answer(row, error=str(error), refused=True)
        try:
            text, usage = reply["choices"][0]["message"]["content"], reply.get("usage") or {}
        except (KeyError, IndexError, TypeError):
            return _answer(row, error=f"The server's reply has no answer: {json.dumps(reply):.200}", refused=True)
        counts = {"prompt_tokens": usage.get("prompt_tokens"), "answer_tokens": usage.get("completion_tokens")}
        return _answer(row, answer=(text or "").strip(), **counts)

    def _request(self, path: str, content: dict[str, Any] | None = None) -> Any:
        """The server's reply, asked for again while it is busy or away."""
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        body = None if content is None else json.dumps(content).encode()
        for attempt in range(RETRIES + 1):
            if attempt:
                time.sleep(2.0 ** (attempt - 2))
            try:
                request = urllib.request.Request(self.url + path, body, headers)
                with urllib.request.urlopen(request, timeout=REPLY_SECONDS) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                status, reason = error.code, f"{error.code} {error.read(1000).decode(errors='replace')}".strip()
                if status in REFUSING:
                    raise ValueError(f"The server {self.url} refuses: {reason}") from error
                if status < 500 and status not in BUSY:
                    raise RefusedError(f"The server refuses: {reason}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                status, reason = None, str(error) or type(error).__name__
        if status is None or status in BUSY:
            raise ValueError(
                f"The server {self.url} is away or busy after {RETRIES + 1} attempts: {reason}. Complete parts stay: "
                "run the command again to go on."
            )
        raise RefusedError(f"The server fails: {reason}")


class RefusedError(Exception):
    """The server takes other requests, but not this one."""


def _data_url(picture: bytes | str | Path, **image_options: Any) -> str:
    """The file as it is, if all decode it alike; else the pixels that the processor here would see, as PNG."""
    opened = load_picture(picture)
    content = picture.read_bytes() if isinstance(picture, Path) else picture
    kind = SENT_AS_THEY_ARE.get(opened.format or "")
    upright = orientation_of(opened) == 1
    opaque = opened.mode in ("L", "RGB") and "transparency" not in opened.info
    if not (isinstance(content, bytes) and kind and upright and opaque):
        kind, stream = "image/png", BytesIO()
        to_rgb(opened, **image_options).save(stream, "png")
        content = stream.getvalue()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# Input


def read_input(source: Path, prompt: str, images: str | None = None) -> Sequence[Row]:
    """The rows of a folder of pictures, of parquet files or of a JSONL file.

    Raises:
        ValueError: if there is nothing to read, or a line of a JSONL file is none of ours.
    """
    if not source.exists():
        raise ValueError(f"There is no {source}: expected a folder of pictures, a parquet file or a JSONL file.")
    if source.is_dir() and not any(source.glob("*.parquet")):
        rows: Sequence[Row] = _folder_rows(source, prompt)
    elif source.is_dir() or source.suffix == ".parquet":
        files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
        rows = ParquetRows(files, prompt, Path(images or files[0].parent))
    elif source.suffix in (".jsonl", ".json"):
        rows = _json_rows(source, prompt, Path(images or source.parent))
    else:
        raise ValueError(f"{source} is neither a folder, nor a .parquet file, nor a .jsonl file.")
    if not len(rows):
        raise ValueError(f"There are no pictures in {source}.")
    return rows


def picture_endings() -> set[str]:
    """The ends of the names of files that Pillow reads, such as `.jpg`."""
    PIL.Image.init()
    # PIL opens an MPO, a JPEG of several pictures, as a JPEG.
    return {ending for ending, name in PIL.Image.EXTENSION.items() if name in PIL.Image.OPEN or name == "MPO"}


def _folder_rows(folder: Path, prompt: str) -> list[Row]:
    endings = picture_endings()
    names = sorted(
        os.path.relpath(entry.path, folder)
        for entry in _files(folder)
        if os.path.splitext(entry.name)[1].lower() in endings and not entry.name.startswith(".")
    )
    return [Row(os.fsencode(name).decode(errors="replace"), prompt, folder / name) for name in names]


def _files(folder: str | Path, above: tuple[str, ...] = ()) -> Iterator[os.DirEntry]:
    """All files in a folder and its subfolders, also behind links, but for a link to one of the folders above it."""
    place = os.path.realpath(folder)
    if place in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(entry.path, (*above, place))
            else:
                yield entry


def _json_rows(file: Path, prompt: str, root: Path) -> list[Row]:
    return [_json_row(found, place, prompt, root) for place, found in _json_objects(file)]


def _json_objects(file: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a JSONL file, or of a JSON list, which may hold conversations; and where they stand."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json" and text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        for number, one in enumerate(found, start=1):
            place = f"Item {number} of {file}"
            yield place, _conversation(one, place) if isinstance(one, dict) and "conversations" in one else one
        return
    for number, line in enumerate(text.split("\n"), start=1):  # `splitlines` would divide texts with other breaks
        if line.strip():
            try:
                yield f"Line {number} of {file}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"Line {number} of {file} is not JSON: {error}") from error


def _json_row(found: Any, place: str, prompt: str, root: Path) -> Row:
    """A row of ours, or a question of LLaVA, which may have no picture."""
    if not isinstance(found, dict):
        raise ValueError(f"{place} is a {type(found).__name__}, expected an object.")
    name = found.get("image", found.get("path"))
    if name in (None, "") and found.get("question_id") is not None:
        if not isinstance(found.get("text"), str):
            raise ValueError(f"{place} has neither an `image` nor a `text`.")
        return Row("", found["text"], None, found["question_id"])
    if not isinstance(name, str):
        raise ValueError(f"{place} has no `image` (or `path`) that names a picture.")
    return _row(found, name, name, prompt, root)


def _conversation(found: dict[str, Any], place: str) -> dict[str, Any]:
    """The first turn as a question, as LLaVA's code asks ScienceQA; its scorer looks for the placeholder.

    Source: `llava/eval/model_vqa_science.py` and `eval_science_qa.py` of LLaVA.
    """
    try:
        question = found["conversations"][0]["value"].replace(PLACEHOLDER, "").strip()
        name = found["id"]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{place} has `conversations`, but no `id` or no first turn with a `value`.") from error
    front = f"{PLACEHOLDER}\n" if found.get("image") else ""
    return {"question_id": name, "image": found.get("image"), "text": front + question}


class ParquetRows(Sequence):
    """Rows of parquet files; pictures are read when a slice is taken.

    The picture is the column `image` (bytes, a path, or a struct with `bytes` and `path`, as `datasets` writes it), or
    else the path in the column `path`.
    """

    def __init__(self, files: list[Path], prompt: str, root: Path):
        self.prompt, self.root = prompt, root
        pyarrow = _pyarrow()
        try:
            self.files = [(file, pyarrow.parquet.ParquetFile(file)) for file in files]
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"Cannot read the parquet files of {files[0].parent}: {error}") from error
        for file, table in self.files:
            if not {"image", "path"} & {*table.schema_arrow.names}:
                raise ValueError(f"{file} has no column `image` or `path`, but {table.schema_arrow.names}.")

    def __len__(self) -> int:
        return sum(table.metadata.num_rows for _, table in self.files)

    def __getitem__(self, places: Any) -> list[Row]:
        """The rows from `places.start` to `places.stop`, with their pictures."""
        return list(self._rows(places.start, places.stop))

    def __iter__(self) -> Iterator[Row]:
        """All rows, without bytes of pictures."""
        return self._rows(0, len(self), with_bytes=False)

    def _rows(self, start: int, stop: int, with_bytes: bool = True) -> Iterator[Row]:
        first = 0
        for file, table in self.files:
            number = 0
            image = [name for name, kind in _leaves(table.schema_arrow) if with_bytes or kind != "bytes"]
            for group in range(table.num_row_groups):
                length = table.metadata.row_group(group).num_rows
                low, high = max(start - first, 0), min(stop - first, length)
                if low < high:
                    found = table.read_row_group(group, ["path", "prompt", "text", "question_id", *image])
                    for index, values in enumerate(found.slice(low, high - low).to_pylist(), start=number + low):
                        yield self._row(values, f"{file.name}:{index}")
                first, number = first + length, number + length

    def _row(self, found: dict[str, Any], place: str) -> Row:
        picture = found.get("image", found.get("path"))
        inside = picture.get("path") if isinstance(picture, dict) else picture if isinstance(picture, str) else None
        if isinstance(picture, dict):
            picture = picture.get("bytes") or picture.get("path")
        return _row(found, str(found.get("path") or inside or place), picture or b"", self.prompt, self.root)


def _leaves(schema: Any) -> list[tuple[str, str]]:
    """The columns of the picture in a parquet file, and whether they hold bytes or text."""
    if "image" not in schema.names:
        return []
    kind = schema.field("image").type
    fields = [(f"image.{name}", kind.field(name).type) for name in ("bytes", "path")] if hasattr(kind, "fields") else []
    return [(name, "bytes" if "binary" in str(field) else "text") for name, field in fields or [("image", kind)]]


def _row(found: dict[str, Any], path: str, picture: Any, prompt: str, root: Path) -> Row:
    question_id = found.get("question_id")
    own = found.get("prompt")
    if own in (None, ""):
        own = found.get("text") if question_id is not None else None
    own = prompt if own is None else own
    if not isinstance(own, str):
        raise ValueError(f"The question about {path} is {own!r:.100}, expected a string.")
    if isinstance(picture, str) and not picture.startswith(("http://", "https://", "data:image/")):
        picture = root / picture
    return Row(path, own, picture, question_id)


# Output


class Output:
    """A folder of parts, each complete or absent, and `run.json`, which says what they are parts of.

    Which rows a part has does not depend on the shards: a run may go on with another number of them.

    Raises:
        ValueError: if the folder holds something else, or parts of another run.
    """

    def __init__(self, folder: Path, rows: Sequence[Row], part_size: int, settings: dict[str, Any]):
        self.folder, self.size, self.rows, self.model = folder, part_size, len(rows), settings["model"]
        self.parts = -(-self.rows // part_size)
        listing, kinds = hashlib.sha256(), set()
        for row in rows:
            listing.update(json.dumps([row.path, row.prompt, row.question_id]).encode())
            kinds.add(row.question_id is not None)
        if len(kinds) > 1:
            raise ValueError(f"Some rows of {settings['input']} have a `question_id`, some not: expected all or none.")
        self.llava = True in kinds
        if not self.llava:
            _pyarrow()
        settings = settings | {"rows": self.rows, "part_size": part_size, "listing": listing.hexdigest()}
        self.run, self.settings = folder / "run.json", settings
        if self.run.exists():
            self._check_run()
        elif any(folder.glob("[!.]*")):
            raise ValueError(f"{folder} is not empty, and no run began there: name a new folder.")

    def claim(self) -> None:
        """Writes `run.json`, or checks that of another shard."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.run.exists():
            _write(self.run, json.dumps(self.settings, indent=2).encode())
        self._check_run()

    def _check_run(self) -> None:
        found = json.loads(self.run.read_text(encoding="utf-8"))
        other = [
            f"{name} was {found.get(name)!r}, is {self.settings.get(name)!r}"
            for name in self.settings | found
            if found.get(name) != self.settings.get(name)
        ]
        if other:
            raise ValueError(
                f"{self.folder} holds another run: {'; '.join(other)}. Name a new folder, or run as before."
            )

    def range(self, part: int) -> range:
        return range(part * self.size, min((part + 1) * self.size, self.rows))

    def file(self, part: int) -> Path:
        return self.folder / f"part-{part:05}.{'jsonl' if self.llava else 'parquet'}"

    def write(self, part: int, answers: list[Answer]) -> None:
        """Writes a part, complete or not at all."""
        content = BytesIO()
        if self.llava:
            for answer in answers:
                content.write((json.dumps(answer.llava(self.model)) + "\n").encode())
        else:
            pyarrow = _pyarrow()
            text, count = pyarrow.string(), pyarrow.int32()
            columns = {"path": text, "prompt": text, "answer": text, "error": text}
            schema = pyarrow.schema(columns | {"prompt_tokens": count, "answer_tokens": count})
            rows = [{name: _unicode(value) for name, value in asdict(answer).items()} for answer in answers]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), content)
        _write(self.file(part), content.getvalue())


def _unicode(value: Any) -> Any:
    """A text without the halves of characters that JSON may have, and parquet may not."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _write(file: Path, content: bytes) -> None:
    unfinished = file.with_name(f".{file.name}.tmp")
    with unfinished.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Parquet files need pyarrow: pip install 'llava-stf[bulk]'") from error
    return pyarrow
