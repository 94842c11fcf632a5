# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Training data: LLaVA's JSON and datasets of `messages` and `images`, as rows that are checked before they cost time.

A row has these columns, whatever it was read from:

    id        its name in messages
    messages  [{"role", "content": [{"type": "image" | "video" | "text", "text"}]}]
    images    [{"path", "bytes"}], one for each image of the messages, decoded when its batch is made
    videos    [[path of a file] or [paths of the frames]], one for each video of the messages
    length    tokens of the row, those of its images included
    vision    images and frames
    targets   tokens that are trained
    problem   what makes the row useless, or ""
"""

import hashlib
import io
import json
import mimetypes
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
from datasets import Dataset, Features, IterableDataset, List, Value
from jinja2 import TemplateError
from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_llava_stf.processing_llava_stf import VIDEO_FPS, LlavaSTFProcessor

logger = logging.get_logger(__name__)

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Kinds of problems. Only those of the first kind are cured by `--on-bad-image skip`.
BAD_IMAGE, PLACEHOLDER, TOO_LONG, NO_TARGET, CONVERSATION = (
    "bad image",
    "placeholder mismatch",
    "too long",
    "no trainable token",
    "bad conversation",
)
NAMED = 20  # rows of each kind that a report names

CONTENT = List({"type": Value("string"), "text": Value("string")})
FEATURES = Features(
    {
        "id": Value("string"),
        "messages": List({"role": Value("string"), "content": CONTENT}),
        "images": List(datasets.Image(decode=False)),
        "videos": List(List(Value("string"))),
        "problem": Value("string"),
    }
)
CHECKED = Features(
    {**FEATURES, "length": Value("int32"), "vision": Value("int32"), "targets": Value("int32")},
)


class DataError(ValueError):
    """The data cannot be trained on as it is; the message says which rows and why."""


# Reading


def load_rows(
    data_path: str,
    image_folder: str | None = None,
    *,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Reads training data of any kind as rows (see the module), without opening an image.

    Args:
        data_path: a LLaVA `.json` or `.jsonl`, a `.parquet`, a folder (of `save_to_disk`, parquet or images), or the
            Hub id of a dataset with `messages` and `images`, or `conversations` and `image`.
        image_folder: where relative paths of images and videos begin; by default the folder of `data_path`.
        config: configuration of a Hub dataset.
        split: of a folder or a Hub dataset.
        streaming: read a Hub dataset while it trains.

    Raises:
        DataError: if there is no such data, or its columns are of no known kind.
    """
    path = Path(data_path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{data_path} is neither a file nor a folder.")
    if path.suffix in (".json", ".jsonl", ".parquet") and (config is not None or split != "train"):
        raise DataError(f"{data_path} is a file, which has no configuration and no split: leave these out.")
    root = Path(image_folder) if image_folder is not None else path.parent if path.is_file() else path
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise DataError(f"There is no file {data_path}.")
        if streaming:
            raise DataError(
                f"{data_path} cannot be streamed: leave out `--streaming`, its images are opened late anyway."
            )
        return _json_dataset(path, root)
    source = _load_source(path, data_path, config, split, streaming)
    columns = source.column_names
    if columns is None or not {"messages", "conversations"} & set(columns):
        raise DataError(
            f"{data_path} has the columns {columns}, expected `messages` and `images` (or `conversations` and `image`)."
        )
    for name, feature in (source.features or {}).items():
        if isinstance(feature, datasets.Image):
            source = source.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, datasets.Image):
            source = source.cast_column(name, List(datasets.Image(decode=False)))
    settings: dict[str, Any] = {} if streaming else {"load_from_cache_file": False}
    return source.map(
        partial(to_row, root=str(root)), with_indices=True, remove_columns=columns, features=FEATURES, **settings
    )


def _json_dataset(path: Path, root: Path) -> Dataset:
    stamp = path.stat()
    # Part of the cached copy's name: a changed file, or changed code, must not get the rows of an older one.
    version = f"{stamp.st_size} {stamp.st_mtime_ns} {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
    settings = {"path": str(path), "root": str(root), "version": version}
    try:
        return Dataset.from_generator(_json_rows, features=FEATURES, gen_kwargs=settings)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise DataError(f"{path}: {error.__cause__ or error}") from error


def _load_source(
    path: Path, data_path: str, config: str | None, split: str, streaming: bool
) -> Dataset | IterableDataset:
    try:
        if path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=data_path, split="train", streaming=streaming)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(data_path)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(data_path, config, split=split, streaming=streaming)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"Cannot read {data_path!r}, split {split!r}: {error}") from error


def _json_rows(path: str, root: str, version: str) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        try:
            rows: Any = (json.loads(line) for line in file if line.strip())
            if not path.endswith(".jsonl"):
                rows = json.load(file)
                if not isinstance(rows, list) or not rows:
                    raise DataError(f"{path} is not a list of rows, or an empty one.")
            for index, row in enumerate(rows):
                if not isinstance(row, dict):
                    raise DataError(f"Row {index} of {path} is a {type(row).__name__}, expected an object.")
                yield to_row(row, index, root)
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is not valid JSON: {error}") from error


def to_row(example: dict[str, Any], index: int, root: str) -> dict[str, Any]:
    """A row of LLaVA (`conversations`) or of TRL (`messages`) with its images and videos, which are not opened."""
    name = index if example.get("id") is None else example["id"]
    row: dict[str, Any] = {"id": str(name), "messages": [], "images": [], "videos": [], "problem": ""}
    turns = example.get("conversations") or example.get("messages")
    try:
        row["images"] = [_reference(image, root) for image in _listed(example, "image", "images")]
        row["videos"] = [_frame_paths(video, root) for video in _videos(example)]
        if not turns or not isinstance(turns, list):
            raise DataError(f"{CONVERSATION}: it has the turns {turns!r:.100}, expected a list of them")
        messages = [_turn(turn) for turn in turns]
        row["messages"] = place_media(messages, len(row["images"]), len(row["videos"]), "messages" in example)
    except DataError as error:
        row["problem"] = str(error)
    return row


def _listed(example: dict[str, Any], one: str, many: str) -> list:
    value = example.get(many) or example.get(one) or []
    return value if isinstance(value, list) else [value]


def _videos(example: dict[str, Any]) -> list:
    videos = _listed(example, "video", "videos")
    return [videos] if videos and all(is_picture(item) for item in videos) else videos  # the frames of one video


def is_picture(path: Any) -> bool:
    """Whether this is the path of a picture, by its ending: a frame, and not a video."""
    return isinstance(path, str) and (mimetypes.guess_type(path)[0] or "").startswith("image/")


def _reference(image: Any, root: str) -> Any:
    if isinstance(image, PIL.Image.Image):  # a decoded dataset, used from Python
        return image
    if isinstance(image, dict) and (image.get("bytes") or image.get("path")):
        image = {"bytes": image.get("bytes"), "path": image.get("path")}
    elif isinstance(image, str):
        image = {"bytes": None, "path": image}
    else:
        raise DataError(f"{BAD_IMAGE}: {image!r:.100}, expected a path, or a dictionary with `path` or `bytes`")
    return image if image["bytes"] is not None else {**image, "path": os.path.join(root, image["path"])}


def _frame_paths(video: Any, root: str) -> list[str]:
    paths = video if isinstance(video, list) else [video]
    if not paths or not all(isinstance(path, str) for path in paths):
        raise DataError(f"{BAD_IMAGE}: the video {video!r:.100}, expected the path of a file or those of its frames")
    return [os.path.join(root, path) for path in paths]


def _turn(turn: Any) -> tuple[str, Any]:
    if not isinstance(turn, dict):
        raise DataError(f"{CONVERSATION}: a turn is {turn!r:.100}, expected a role and what it says")
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role not in ROLES:
        raise DataError(f"{CONVERSATION}: the role {role!r}, expected one of {', '.join(ROLES)}")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str | list) or not all(
        isinstance(part, dict) and part.get("type") in ("text", *PLACEHOLDERS) for part in parts
    ):
        raise DataError(f"{CONVERSATION}: a turn of {role} has the content {content!r:.100}, expected text or parts")
    return ROLES[role], content


def place_media(turns: list[tuple[str, Any]], images: int, videos: int, at_front: bool = False) -> list[dict[str, Any]]:
    """Turns as structured messages; placeholders in a text go to its front, as in the original.

    Several placeholders in one message stand for as many images if there are so many, else for one (the original
    keeps one). A video may be marked by `<image>`, as the original does. `at_front`: images that no text mentions
    belong to the first user turn (TRL's convention).

    Raises:
        DataError: if the messages do not have a place for every image and every video.
    """
    given = {"image": images, "video": videos}
    if videos and not images and not _count(turns, "video"):
        turns = [
            (role, content.replace("<image>", "<video>") if isinstance(content, str) else content)
            for role, content in turns
        ]
    mentioned = {kind: _count(turns, kind) for kind in given}
    messages = []
    for role, content in turns:
        if isinstance(content, str):
            media = []
            for kind, placeholder in PLACEHOLDERS.items():
                found = content.count(placeholder)
                media += [kind] * (found if mentioned[kind] == given[kind] else min(found, 1))
                content = content.replace(placeholder, "")
            text = content.strip() if media else content
            content = [*({"type": kind, "text": None} for kind in media), {"type": "text", "text": text}]
        messages.append(
            {"role": role, "content": [{"type": part["type"], "text": part.get("text")} for part in content]}
        )
    if at_front and not any(mentioned.values()) and not any(_placed(messages, kind) for kind in given):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None:
            media = [kind for kind, number in given.items() for _ in range(number)]
            first["content"] = [*({"type": kind, "text": None} for kind in media), *first["content"]]
    for kind, number in given.items():
        if _placed(messages, kind) != number:
            raise DataError(f"{PLACEHOLDER}: {_placed(messages, kind)} {PLACEHOLDERS[kind]} for {number} {kind}s")
    return messages


def _count(turns: list[tuple[str, Any]], kind: str) -> int:
    return sum(content.count(PLACEHOLDERS[kind]) for _, content in turns if isinstance(content, str))


def _placed(messages: list[dict[str, Any]], kind: str) -> int:
    return sum(part["type"] == kind for message in messages for part in message["content"])


# Checking


@dataclass
class Checker:
    """Measures rows, and finds what is wrong with them.

    Args:
        processor: of the checkpoint to be trained.
        template: text of the chat template that the training uses.
        max_length: longest row, in tokens.
        decode: open every image in full; otherwise only see whether its file is there.
    """

    processor: LlavaSTFProcessor
    template: str
    max_length: int
    decode: bool

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        frames, found = 0, {"length": 0, "vision": 0, "targets": 0, "problem": row["problem"]}
        try:
            for image in row["images"]:
                check_image(image, self.decode)
            frames = sum(count_frames(video, self.decode) for video in row["videos"])
        except DataError as error:
            found["problem"] = found["problem"] or str(error)
        if found["problem"]:
            return found
        # A video counts as its frames, and where it stands does not matter for the number of tokens.
        messages = [
            {
                **message,
                "content": [
                    {**part, "type": "text" if part["type"] == "text" else "image"} for part in message["content"]
                ],
            }
            for message in row["messages"]
        ]
        try:
            encoded = self.processor.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except TemplateError as error:
            return {**found, "problem": f"{CONVERSATION}: {error}"}
        media = len(row["images"]) + len(row["videos"])
        rendered = sum(token == self.processor.image_token_id for token in encoded["input_ids"])
        crop = self.processor.image_processor.crop_size
        per_image = self.processor.num_image_tokens(crop["height"], crop["width"])
        found["vision"] = len(row["images"]) + frames
        found["length"] = len(encoded["input_ids"]) - media + found["vision"] * per_image
        found["targets"] = sum(encoded["assistant_masks"])
        if rendered != media:
            found["problem"] = f"{PLACEHOLDER}: the template writes {rendered} <image> for {media} images or videos"
        elif found["targets"] == 0:
            found["problem"] = NO_TARGET
        elif found["length"] > self.max_length:
            found["problem"] = f"{TOO_LONG}: {found['length']} tokens, {self.max_length} are allowed"
        return found


def check_image(image: dict[str, Any], decode: bool) -> None:
    """Raises a [`DataError`] that names the image, if it is missing or, with `decode`, cannot be read to its end."""
    if decode:
        open_image(image)
    elif image["bytes"] is None and not os.path.isfile(image["path"]):
        raise DataError(f"{BAD_IMAGE}: {image['path']}: no such file")


def open_image(image: dict[str, Any] | PIL.Image.Image) -> PIL.Image.Image:
    """The picture in RGB, as PIL converts it (the original drops transparency and does not rotate)."""
    if isinstance(image, PIL.Image.Image):
        return image.convert("RGB")
    name = image["path"] or "an image in the dataset"
    try:
        with PIL.Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{BAD_IMAGE}: {name}: no such file") from None
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{BAD_IMAGE}: {name}: {error}") from error


def count_frames(video: list[str], decode: bool) -> int:
    """Frames that the processor will read: those that are listed, or one for each second of a file."""
    if is_picture(video[0]):
        for frame in video:
            check_image({"path": frame, "bytes": None}, decode)
        return len(video)
    import av

    try:
        with av.open(video[0]) as container:
            stream = container.streams.video[0]
            if not stream.average_rate or not stream.frames:
                raise DataError(f"{BAD_IMAGE}: {video[0]}: it does not say how many frames it has; make it an .mp4")
            return max(1, int(stream.frames / stream.average_rate * VIDEO_FPS))
    except (OSError, IndexError, av.FFmpegError) as error:
        raise DataError(f"{BAD_IMAGE}: {video[0]}: {error}") from error


@dataclass
class Report:
    """What a check found: `kept` rows are fit to train on, and counted; `lengths` are those of the others, too."""

    rows: int = 0
    kept: int = 0
    text_only: int = 0
    images: int = 0
    several_images: int = 0
    targets: int = 0
    tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, checked: Dataset) -> "Report":
        report = cls(rows=len(checked))
        columns = checked.select_columns(["id", "length", "vision", "targets", "problem"])
        for batch in columns.iter(1000):
            for name, length, vision, targets, problem in zip(*batch.values(), strict=True):
                if length:
                    report.lengths.append(length)
                if problem:
                    report.problems.setdefault(problem.split(":")[0], []).append(f"{name}: {problem}")
                    continue
                report.kept += 1
                report.text_only += vision == 0
                report.images += vision
                report.several_images += vision > 1
                report.targets += targets
                report.tokens += length
        return report

    def lines(self, max_length: int) -> Iterator[str]:
        yield f"{self.rows} rows, {self.kept} of them fit to train on, with {self.targets} trained tokens"
        yield (
            f"with images: {self.kept - self.text_only} ({self.several_images} with several images or a video, "
            f"{self.images} images and frames in all); text only: {self.text_only}"
        )
        for kind, rows in sorted(self.problems.items()):
            yield f"{kind}: {len(rows)} row(s)"
            yield from (f"  {row}" for row in rows[:NAMED])
            if len(rows) > NAMED:
                yield f"  and {len(rows) - NAMED} more"
        yield from self.histogram(max_length)

    def histogram(self, max_length: int, bins: int = 16, width: int = 50) -> Iterator[str]:
        """Lengths of all rows that could be measured; a bin is a share of `max_length`."""
        if not self.lengths:
            return
        step = -(-max_length // bins)
        counts = Counter(length // step for length in self.lengths)
        yield f"length in tokens: {min(self.lengths)} to {max(self.lengths)}, {max_length} allowed"
        for index in range(min(counts), max(counts) + 1):
            bar = "#" * round(width * counts[index] / max(counts.values()))
            yield f"  {index * step:6d}-{(index + 1) * step - 1:<6d} {counts[index]:8d} {bar}"


def check_rows(rows: Dataset, checker: Checker, num_proc: int | None = None, reuse: bool = False) -> Dataset:
    """Rows with their measures and problems; with progress. `reuse`: what another process of this run found."""
    # Never from an older run's cache: images may have come or gone since.
    return rows.map(checker, features=CHECKED, num_proc=num_proc, load_from_cache_file=reuse, desc="Checking the data")


def fit_rows(checked: Dataset, report: Report, on_bad_image: str, on_bad_row: str) -> Dataset:
    """The rows without problems; what is left out is counted and named in the log.

    Args:
        checked: of [`check_rows`].
        report: of these rows.
        on_bad_image: `"error"` or `"skip"`: rows whose image or video is missing or broken.
        on_bad_row: `"error"` or `"skip"`: rows that are too long, have no target, or whose placeholders do not fit.

    Raises:
        DataError: if there are such rows and they are not to be skipped, or if no row is left.
    """
    for kind, rows in report.problems.items():
        option, choice = ("--on-bad-image", on_bad_image) if kind == BAD_IMAGE else ("--on-bad-row", on_bad_row)
        listing = "; ".join(rows[:NAMED]) + (f"; and {len(rows) - NAMED} more" if len(rows) > NAMED else "")
        if choice == "error":
            raise DataError(
                f"{len(rows)} of {report.rows} rows cannot be trained on: {listing}. Mend them, or leave them out with "
                f"{option} skip. `python -m training check` shows all problems at once."
            )
        logger.warning(f"{len(rows)} of {report.rows} rows are left out ({kind}): {listing}")
    if report.kept == 0:
        raise DataError(f"None of the {report.rows} rows can be trained on.")
    return checked.filter(lambda problem: not problem, input_columns="problem")


def fit_stream(rows: IterableDataset, checker: Checker, on_bad_image: str, on_bad_row: str) -> IterableDataset:
    """As [`fit_rows`], row by row while it trains."""

    def fits(row: dict[str, Any]) -> bool:
        if not row["problem"]:
            return True
        if "error" == (on_bad_image if row["problem"].startswith(BAD_IMAGE) else on_bad_row):
            raise DataError(f"Row {row['id']} cannot be trained on: {row['problem']}.")
        logger.warning(f"Row {row['id']} is left out: {row['problem']}")
        return False

    return rows.map(checker, features=CHECKED).filter(fits)


# Batches


@dataclass
class Collator(DataCollatorForVisionLanguageModeling):
    """TRL's collator for rows of this module: opens the images, in the worker that makes the batch.

    Raises:
        DataError: names the image that cannot be read.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call([self._with_media(example) for example in examples])
        batch["labels"][batch["input_ids"] == self.processor.image_token_id] = -100  # `<image>` is no answer
        return batch

    def _with_media(self, example: dict[str, Any]) -> dict[str, Any]:
        row = example if "problem" in example else to_row(example, 0, "")  # or a row of TRL, as it is
        if row["problem"]:
            raise DataError(f"Row {row['id']} cannot be trained on: {row['problem']}.")
        videos = iter(row["videos"])
        messages = [
            {
                **message,
                "content": [
                    {**part, "video": _frames_or_file(next(videos))} if part["type"] == "video" else part
                    for part in message["content"]
                ],
            }
            for message in row["messages"]
        ]
        return {"messages": messages, "images": [open_image(image) for image in row["images"]]}


def _frames_or_file(video: list[str]) -> Any:
    if not is_picture(video[0]):
        return video[0]
    return [open_image({"path": frame, "bytes": None}) for frame in video]
