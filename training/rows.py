# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Reads training data, LLaVA's JSON or datasets of `messages` and `images`, as rows of one kind.

A row has these columns, whatever it was read from:

    id        its name in messages
    messages  [{"role", "content": [{"type": "image" | "video" | "text", "text"}]}]
    images    [{"path", "bytes"}], one for each image of the messages, decoded when its batch is made
    videos    [[path of a file] or [paths of the frames]], one for each video of the messages
    notes     what differs from what was written, as it does in the original, and keys that nothing reads
    length    tokens of the row, those of its images included
    vision    images and frames
    targets   tokens that are trained
    problem   what makes the row useless, or ""
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.packaged_modules.json.json import Json as JsonBuilder

from modeling_llava_stf.processing_llava_stf import is_animated_file, is_picture

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Kinds of problems. Only those of the first kind are cured by `--on_bad_image skip`.
BAD_IMAGE, PLACEHOLDER, TOO_LONG, NO_TARGET, CONVERSATION = (
    "bad image",
    "placeholder mismatch",
    "too long",
    "no trainable token",
    "bad conversation",
)
LONGEST_PATH = 4096  # characters; a longer one is a picture in base64
# What becomes of a row beside what its author wrote.
FRONT = "`<image>` comes first in its message, then the text without the blanks around it, as in the original"
ONE_KEPT = "several `<image>` in a message stand for one picture and one is kept, as in the original"
IMAGES_FIRST = "a text has `<video>` before `<image>`, but its images come first: give each a part of its own"
DIVIDED = "texts of one message that no blank divides are divided by a line break, as in the chat template"
# Keys that are read, and keys with a meaning that would be lost: these are refused if they have a value. Any other key
# is named once.
READ = {
    "a row": {"id", "conversations", "messages", "image", "images", "video", "videos"},
    "a turn": {"from", "role", "value", "content"},
    "a part": {"type", "text", "index"},
}
MEDIA = {"audio", "audios", "image", "images", "image_url", "video", "videos", "video_url"}
REFUSED = {
    "a row": {
        "audio",
        "audios",
        "chat_template",
        "chat_template_kwargs",
        "functions",
        "system",
        "system_prompt",
        "tools",
    },
    "a turn": {
        *MEDIA,
        *("chat_template", "function_call", "name", "reasoning", "reasoning_content", "system", "thinking"),
        *("tool_call_id", "tool_calls", "tools"),
    },
    "a part": {*MEDIA, "base64", "bytes", "content", "path", "url", "value"},
}
# Keys with which other trainers choose what is trained: here, every answer is, and nothing else.
TRAINS = {"loss", "loss_mask", "loss_scale", "loss_weight", "train", "trainable", "training", "weight"}
MASKS = {"mask", "masked"}
WANTED = "expected `messages` and `images` (or `conversations` and `image`)"
# Columns of other formats, each of a question and its answer.
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
)
CONTENT = List({"type": Value("string"), "text": Value("string")})
FEATURES = Features(
    {
        "id": Value("string"),
        "messages": List({"role": Value("string"), "content": CONTENT}),
        "images": List(datasets.Image(decode=False)),
        "videos": List(List(Value("string"))),
        "notes": List(Value("string")),
        "problem": Value("string"),
    }
)
# What `datasets` raises for data that it cannot read.
UNREADABLE_DATA = (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError)


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
        return _json_dataset([(data_path, data_path)], root)
    splits = _json_files(path, data_path, config, split, streaming)
    if splits:
        return _split({name: _json_dataset(files, root, streaming) for name, files in splits.items()}, split)
    # A format of NumPy or pandas, which `save_to_disk` keeps, makes arrays of the turns.
    source = _load_source(path, data_path, config, split, streaming).with_format(None)
    columns = source.column_names
    if columns is None or not {"messages", "conversations"} & set(columns):
        raise DataError(f"{data_path} has the columns {columns}, {WANTED}. {_conversion_hint(columns or [])}")
    source = undecoded(source)
    settings: dict[str, Any] = {"remove_columns": columns, "features": FEATURES}
    if streaming and source.num_shards > 1:
        return source.map(partial(_streamed_row, root=str(root)), **settings)
    settings |= {} if streaming else {"load_from_cache_file": False}
    return source.map(partial(to_row, root=str(root)), with_indices=True, **settings)


def undecoded(rows: Any) -> Any:
    """Returns a dataset whose pictures are read as bytes or paths: `datasets` turns photos upright where it decodes."""
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
            rows = rows.cast_column(name, type(feature)(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(name, List(datasets.Image(decode=False)))
    return rows


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _json_files(
    path: Path, data_path: str, config: str | None, split: str, streaming: bool
) -> dict[str, list[tuple[str, str]]]:
    """Finds name and place of each JSON file of a folder or a Hub dataset that is made of them, by split.

    `datasets` would read them with types that it guesses: where they differ from row to row, it writes texts as JSON,
    in which the text `4` and the number 4 are the same (seen in 5.2.0).
    """
    if path.suffix == ".parquet" or _is_saved(path):
        return {}
    try:
        builder = datasets.load_dataset_builder(data_path, config)
        if not isinstance(builder, JsonBuilder):
            return {}
        # Not of a stream: it has no parts, such as `train[:1%]`, or sums of splits.
        wanted = [split] if streaming else [part.partition("[")[0].strip() for part in split.split("+")]
        files = {}
        for name in wanted:
            if name not in builder.config.data_files:
                known = ", ".join(map(str, builder.config.data_files))
                raise DataError(f"{data_path} has no split {name!r}, only {known}.")
            names = list(builder.config.data_files[name])
            files[name] = list(zip(names, datasets.DownloadManager().download_and_extract(names), strict=True))
        return files
    except UNREADABLE_DATA as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"Cannot read {data_path!r}: {error}") from error


def _split(splits: dict[str, Any], wanted: str) -> Dataset | IterableDataset:
    """Returns the rows that `wanted` names, in the notation of `datasets`, such as `train[:10%]+test`."""
    if wanted in splits:
        return splits[wanted]
    try:
        parts = datasets.ReadInstruction.from_spec(wanted).to_absolute(
            {name: len(rows) for name, rows in splits.items()}
        )
    except (ValueError, AssertionError) as error:
        raise DataError(f"The split {wanted!r}: {error}") from error
    return datasets.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _json_dataset(files: list[tuple[str, str]], root: Path, streaming: bool = False) -> Dataset | IterableDataset:
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in (Path(place) for _, place in files)]
    # Part of the cached copy's name: a changed file, or changed code, must not get the rows of an older one.
    version = f"{stamps} {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
    settings = {"files": files, "root": str(root), "several": len(files) > 1, "version": version}
    if streaming:
        return IterableDataset.from_generator(_json_rows, features=FEATURES, gen_kwargs=settings)
    try:
        return Dataset.from_generator(_json_rows, features=FEATURES, gen_kwargs=settings)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        cause = error.__cause__ or error
        raise DataError(str(cause) if isinstance(cause, DataError) else f"{files[0][0]}: {cause}") from error


def _load_source(
    path: Path, data_path: str, config: str | None, split: str, streaming: bool
) -> Dataset | IterableDataset:
    try:
        if path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=data_path, split="train", streaming=streaming)
        if _is_saved(path):
            saved = datasets.load_from_disk(data_path)
            return _split(saved, split) if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(data_path, config, split=split, streaming=streaming)
    except UNREADABLE_DATA as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"Cannot read {data_path!r}, split {split!r}: {error.__cause__ or error}") from error


def _json_rows(files: list[tuple[str, str]], root: str, several: bool, version: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of these files; one without an id is named by its number, and its file if there are `several`."""
    # A loader's worker, or a process, gets a part of the files.
    for name, place in files:
        for index, row in enumerate(_read_json(name, place)):
            yield to_row(row, f"{Path(name).name}:{index}" if several else index, root)


class Repeated(dict):
    """Marks an object of a JSON file that has one of its keys twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else Repeated(found)


def _read_json(name: str, place: str) -> Iterator[Any]:
    """Yields the rows of a list, or of lines; a line that is no JSON is a [`DataError`] in place of its row."""
    # Bytes that are no UTF-8 become surrogates, for which their row is refused.
    with open(place, encoding="utf-8-sig", errors="surrogateescape") as file:
        begin = file.read(1000).lstrip()[:1]
        file.seek(0)
        read = partial(json.loads, object_pairs_hook=_object)
        if begin == "[" and ".jsonl" not in Path(name).suffixes:
            try:
                rows = read(file.read())
            except (ValueError, RecursionError) as error:
                raise DataError(f"{name} is not valid JSON: {error}") from error
            if not rows:
                raise DataError(f"{name} is not a list of rows, or an empty one.")
        else:
            rows = (_line(read, number, line) for number, line in enumerate(file, 1) if line.strip())
        row, usable = None, False
        for row in rows:
            usable = usable or isinstance(row, dict)
            yield row
    if not usable:
        raise DataError(f"{name} has no row, expected an object for each, in a list or one a line; found {row!s:.200}")


def _line(read: Any, number: int, line: str) -> Any:
    try:
        return read(line)
    except (ValueError, RecursionError) as error:
        return DataError(f"{CONVERSATION}: line {number} is not valid JSON: {error}")


# One row


def is_row(names: Iterable[str]) -> bool:
    """Tells whether these keys or columns are those of a row of this module; others may have one of them, too."""
    return FEATURES.keys() <= set(names)


def to_row(example: Any, index: int | str, root: str) -> dict[str, Any]:
    """Reads a row of LLaVA (`conversations`) or of TRL (`messages`); its images and videos are not opened."""
    row: dict[str, Any] = {"id": str(index), "messages": [], "images": [], "videos": [], "notes": [], "problem": ""}
    try:
        if isinstance(example, DataError):
            raise example
        if not isinstance(example, Mapping):
            raise DataError(f"{CONVERSATION}: it is {example!r:.100}, expected an object with `messages`")
        example = example if isinstance(example, dict) else dict(example)
        row["id"] = _name(example.get("id"), index)
        notes = _unread(example, "a row")
        key, given = _turns(example)
        _check_trained(example, "a row")
        images = [_reference(image, root) for image in _listed(example, "image", "images")]
        videos = [_frame_paths(video, root) for video in _videos(example, root)]
        turns = [_turn(turn, notes) for turn in given]
        _check_order(turns)
        messages = place_media(turns, len(images), len(videos), at_front=key == "messages")
        notes += _changes(turns, messages)
    except DataError as error:
        return {**row, "problem": _printable(str(error))}
    return {**row, "messages": messages, "images": images, "videos": videos, "notes": list(dict.fromkeys(notes))}


def _streamed_row(example: dict[str, Any], root: str) -> dict[str, Any]:
    """Reads a row of several files, which has a digest as its name if it has none: workers and ranks number it anew."""
    digest = "" if _name(example.get("id"), "") else hashlib.blake2b(repr(example).encode(), digest_size=6).hexdigest()
    return to_row(example, digest, root)


def _name(name: Any, index: int | str) -> str:
    known = isinstance(name, str | int | float) and name == name and name != ""  # NaN is no name
    return _printable(str(name)) if known else str(index)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _empty(value: Any) -> bool:
    """Tells whether a key is as good as absent. A dataset gives each row all keys that any of its rows has."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def _unread(found: dict[str, Any], where: str) -> list[str]:
    """Notes the keys that nothing reads; raises a [`DataError`] for one whose meaning would be lost."""
    if isinstance(found, Repeated):
        raise DataError(f"{CONVERSATION}: {where} has one of the keys {', '.join(found)} twice, expected it once")
    notes = []
    for key, value in found.items():
        if value is None or key in READ[where] or (where != "a part" and key in TRAINS | MASKS):
            continue
        if key not in REFUSED[where]:
            notes.append(_printable(f"nothing reads the key {key!r} of {where}"))
        elif not _empty(value):
            raise DataError(
                f"{CONVERSATION}: {where} has {key!r}: {value!r:.100}, which has no place in a conversation of this "
                "model. Write it into `messages` (a system text as a first turn of the role system, pictures into "
                "`images`), or take it out"
            )
    return notes


def _check_trained(found: dict[str, Any], where: str, answers: bool = True) -> None:
    """Raises a [`DataError`] if a key wants an answer not to be trained, or something else to be."""
    for key in sorted((TRAINS | MASKS) & found.keys()):
        value = found[key]
        if _empty(value):
            continue
        known = isinstance(value, int | float) and value in (0, 1)
        # `weight` and `mask` of a question say nothing: other trainers read them of answers only.
        if (
            not known
            or (answers and value != (key in TRAINS))
            or (not answers and value and key in TRAINS - {"weight"})
        ):
            raise DataError(
                f"{CONVERSATION}: {where} has {key!r}: {value!r:.100}, but all answers are trained, each as much as "
                "another, and nothing else: take out the key, or what it is about"
            )


def _turns(example: dict[str, Any]) -> tuple[str, list]:
    given = [key for key in ("conversations", "messages") if not _empty(example.get(key))]
    if not given:
        columns = [key for key, value in example.items() if value is not None]
        raise DataError(
            f"{CONVERSATION}: it has the columns {', '.join(columns)}, but no turns, {WANTED}. "
            f"{_conversion_hint(columns)}"
        )
    if len(given) == 2:
        raise DataError(f"{CONVERSATION}: it has both `conversations` and `messages`, expected one of them")
    turns = example[given[0]]
    if not isinstance(turns, list):
        raise DataError(f"{CONVERSATION}: it has the turns {turns!r:.100}, expected a list of them")
    return given[0], turns


def _conversion_hint(columns: list[str]) -> str:
    question, answer = next((pair for pair in PAIRS if {*pair} <= {*columns}), ("QUESTION", "ANSWER"))
    turns = f'{{"role": "user", "content": {question}}}, {{"role": "assistant", "content": {answer}}}'
    hint = f'Write each row as {{"messages": [{turns}]}}'
    if {"chosen", "rejected"} <= {*columns}:
        return f"Preferences are for `examples/dpo.py`. To train on the answers that were chosen: {hint}"
    return hint


def _listed(example: dict[str, Any], one: str, many: str) -> list:
    given = [key for key in (one, many) if not _empty(example.get(key))]
    if len(given) == 2:
        raise DataError(f"{CONVERSATION}: it has both `{one}` and `{many}`, expected one of them")
    value = example[given[0]] if given else []
    return value if isinstance(value, list) else [value]


def _videos(example: dict[str, Any], root: str) -> list:
    """Returns files, or lists of frames: pictures are the frames of one video, unless all of them are animations."""
    videos = _listed(example, "video", "videos")
    frames = videos and all(is_picture(item) for item in videos)
    return [videos] if frames and not all(is_animated_file(os.path.join(root, item)) for item in videos) else videos


def _reference(image: Any, root: str) -> Any:
    if isinstance(image, PIL.Image.Image):  # a decoded dataset, used from Python
        return image
    path, data = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (image, None)
    if data and isinstance(data, bytes):
        return {"bytes": data, "path": path if isinstance(path, str) else None}
    if data or not isinstance(path, str) or not path:
        raise DataError(f"{BAD_IMAGE}: {image!r:.100}, expected a path, or a dictionary with `path` or `bytes`")
    if path.startswith(("http:", "https:", "data:")) or len(path) > LONGEST_PATH:
        raise DataError(f"{BAD_IMAGE}: {path!r:.100} is no path, expected a file: write the picture into one")
    return {"bytes": None, "path": os.path.join(root, _written(path, "a path", BAD_IMAGE))}


def _frame_paths(video: Any, root: str) -> list[str]:
    paths = video if isinstance(video, list) else [video]
    if not paths or not all(isinstance(path, str) for path in paths):
        raise DataError(f"{BAD_IMAGE}: the video {video!r:.100}, expected the path of a file or those of its frames")
    if len(paths) > 1 and not all(is_picture(path) for path in paths):
        raise DataError(
            f"{BAD_IMAGE}: the video {video!r:.100} is a list in which not all are pictures, expected the path of one "
            "file, or those of its frames, whose names end as those of pictures do"
        )
    return [os.path.join(root, _written(path, "a path", BAD_IMAGE)) for path in paths]


def _written(text: Any, what: str, kind: str = CONVERSATION) -> str:
    """Returns a text as it is; raises a [`DataError`] if it is none, since `datasets` would change other rows.

    A column of texts and numbers becomes JSON there, and all its texts get quotation marks (seen in 5.2.0).
    """
    if not isinstance(text, str):
        raise DataError(f"{kind}: {what} is {text!r:.100}, expected a text (a string)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{kind}: {what} has {text[error.start]!r} at character {error.start}, half of a pair of "
            "surrogates or a byte that is no UTF-8, expected Unicode text"
        ) from None
    return text


def _turn(turn: Any, notes: list[str]) -> tuple[str, Any]:
    """Returns role and content of a turn, and checks it; `notes` get its keys that nothing reads."""
    if not isinstance(turn, dict):
        raise DataError(f"{CONVERSATION}: a turn is {turn!r:.100}, expected a role and what it says")
    notes += _unread(turn, "a turn")
    role, content = _either(turn, "from", "role"), _either(turn, "value", "content")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{CONVERSATION}: the role {role!r:.100}, expected one of {', '.join(ROLES)}")
    role = ROLES[role]
    _check_trained(turn, f"a turn of {role}", role == "assistant")
    if isinstance(content, list):
        content = [_part(part, role, notes) for part in content]
        texts = [part["text"] or "" for part in content]
    else:
        texts = [_written(content, f"what a turn of {role} says")]
    if role == "assistant" and not "".join(texts).strip():
        raise DataError(
            f"{CONVERSATION}: an answer is empty or blank, which would train to stop at once: write it or leave it out"
        )
    return role, content


def _either(turn: dict[str, Any], one: str, other: str) -> Any:
    given = [turn[key] for key in (one, other) if turn.get(key) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise DataError(
            f"{CONVERSATION}: a turn has both {one!r} ({given[0]!r:.100}) and {other!r} ({given[1]!r:.100}), expected "
            "one of them"
        )
    return given[0] if given else None


def _part(part: Any, role: str, notes: list[str]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in ("text", *PLACEHOLDERS):
        raise DataError(
            f"{CONVERSATION}: a turn of {role} has the part {part!r:.100}, expected an object of the type text, image "
            "or video"
        )
    notes += _unread(part, "a part")
    if kind == "text":
        text = _written(part.get("text"), f"the text of a part of {role}")
    elif _empty(part.get("text")):
        text = None
    else:
        raise DataError(f"{CONVERSATION}: a part of the type {kind} has a text: {part['text']!r:.100}, expected none")
    return {"type": kind, "text": text, "index": part.get("index")}


def _check_order(turns: list[tuple[str, Any]]) -> None:
    """Raises a [`DataError`] if a part names another image (`index`) than the one whose turn it is."""
    for kind in PLACEHOLDERS:
        parts = [part for _, content in turns if isinstance(content, list) for part in content if part["type"] == kind]
        for place, part in enumerate(parts):
            if part["index"] is not None and part["index"] != place:
                raise DataError(
                    f"{CONVERSATION}: part {place} of the type {kind} has the index {part['index']!r:.100}, expected "
                    f"{place}: they come in the order of their parts"
                )


def place_media(turns: list[tuple[str, Any]], images: int, videos: int, at_front: bool = False) -> list[dict[str, Any]]:
    """Makes structured messages of turns; placeholders in a text are moved to its front, as in the original.

    Several placeholders in one text stand for as many images if there are so many, else for one (the original
    keeps one). A video may be marked by `<image>`, as the original does. `at_front`: images that no text mentions
    belong to the first user turn (TRL's convention).

    Raises:
        DataError: if the messages do not have a place for every image and every video.
    """
    given = {"image": images, "video": videos}
    structured = [(role, _as_parts(content)) for role, content in turns]
    if videos and not images and not _count(structured, "video"):
        structured = [(role, [_marked_as_video(part) for part in parts]) for role, parts in structured]
    whole = {kind for kind, number in given.items() if _count(structured, kind) == number}
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [placed for part in parts for placed in _placed_parts(part, whole)]}
        for role, parts in structured
    ]
    if at_front and not any(_placed(messages, kind) for kind in given):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None:
            media = [kind for kind, number in given.items() for _ in range(number)]
            first["content"] = [*({"type": kind, "text": None} for kind in media), *first["content"]]
    for kind, number in given.items():
        if _placed(messages, kind) != number:
            raise DataError(
                f"{PLACEHOLDER}: {_placed(messages, kind)} {PLACEHOLDERS[kind]} for {number} {kind}s, expected one for "
                "each"
            )
        if _placed([message for message in messages if message["role"] != "user"], kind):
            raise DataError(
                f"{PLACEHOLDER}: {PLACEHOLDERS[kind]} outside of the turns of the user, expected it in them"
            )
    return messages


def _as_parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _marked_as_video(part: dict[str, Any]) -> dict[str, Any]:
    return {**part, "text": part["text"].replace("<image>", "<video>")} if part["type"] == "text" else part


def _placed_parts(part: dict[str, Any], whole: set[str]) -> list[dict[str, Any]]:
    """Puts the placeholders of a text in front of it: all of those of `whole` kinds, one of the others."""
    if part["type"] != "text":
        return [{"type": part["type"], "text": None}]
    text, media = part["text"], []
    for kind, placeholder in PLACEHOLDERS.items():
        found = text.count(placeholder)
        media += [kind] * (found if kind in whole else min(found, 1))
        text = text.replace(placeholder, "")
    return [
        *({"type": kind, "text": None} for kind in media),
        {"type": "text", "text": text.strip() if media else text},
    ]


def _count(turns: list[tuple[str, list]], kind: str) -> int:
    texts = (part["text"] for _, parts in turns for part in parts if part["type"] == "text")
    return sum(text.count(PLACEHOLDERS[kind]) for text in texts)


def _placed(messages: list[dict[str, Any]], kind: str) -> int:
    return sum(part["type"] == kind for message in messages for part in message["content"])


def _changes(turns: list[tuple[str, Any]], messages: list[dict[str, Any]]) -> list[str]:
    """Notes what the messages have otherwise than it was written."""
    notes = []
    for (_, content), message in zip(turns, messages, strict=True):
        parts = _as_parts(content)
        texts = [part["text"] for part in message["content"] if part["text"]]
        if any(len((one[-1] + other[0]).strip()) == 2 for one, other in itertools.pairwise(texts)):
            notes.append(DIVIDED)
        kinds = [re.findall("<(image|video)>", part["text"]) for part in parts if part["type"] == "text"]
        if any(found != sorted(found) for found in kinds):
            notes.append(IMAGES_FIRST)
        written = "".join(part["text"] if part["type"] == "text" else "<image>\n" for part in parts)
        written = written.replace("<video>", "<image>")
        images = sum(part["type"] != "text" for part in message["content"])
        if written.count("<image>") > images:
            notes.append(ONE_KEPT)
        front, text = "<image>\n" * images, "".join(texts).strip()
        if "<image>" in written and written not in (front + text, (front + text).rstrip("\n")):
            notes.append(FRONT)
    return notes
