# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Finds what is wrong with rows before they cost time, and refuses them or leaves them out."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
from datasets import Dataset, Features, IterableDataset, Value
from jinja2 import TemplateError
from transformers.utils import logging

from modeling_llava_stf.processing_llava_stf import (
    UNREADABLE,
    VIDEO_FPS,
    LlavaSTFImageProcessor,
    LlavaSTFProcessor,
    is_animated_file,
    is_picture,
    load_picture,
    number_of_samples,
    shown_frames,
    to_rgb,
)

from .budgets import TokenBudgets
from .rows import (
    BAD_IMAGE,
    CONVERSATION,
    FEATURES,
    NO_TARGET,
    PLACEHOLDER,
    TOO_LONG,
    DataError,
)

logger = logging.get_logger(__name__)
NAMED = 20  # rows of each kind that a report names
LEFT_OUT = (
    "the chat template leaves out a text, as the original does with an answer before the first question and, in stage "
    "1, with the question"
)
CHECKED = Features(
    {**FEATURES, "length": Value("int32"), "vision": Value("int32"), "targets": Value("int32")},
)


# Checking
@dataclass
class Checker:
    """Measures rows, and finds what is wrong with them.

    Args:
        processor: of the checkpoint to be trained.
        template: text of the chat template that the training uses.
        max_length: longest row, in tokens; by default the model's context, which is the longest in any case.
        decode: open every image in full; otherwise only see whether its file is there.
        budgets: of the training; the longest that they make a row is compared with `max_length`.
    """

    processor: LlavaSTFProcessor
    template: str
    max_length: int | None
    decode: bool
    budgets: TokenBudgets | None = None

    def __post_init__(self) -> None:
        self.allowed = longest_row(self.max_length, self.processor)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        found = {"length": 0, "vision": 0, "targets": 0, "notes": row["notes"], "problem": row["problem"]}
        try:
            vision = self._count_vision(row)
            return found if row["problem"] else {**found, **self._measure(row, vision)}
        except DataError as error:
            return {**found, "problem": row["problem"] or str(error)}
        except TemplateError as error:
            return {**found, "problem": f"{CONVERSATION}: {error}"}

    def _count_vision(self, row: dict[str, Any]) -> int:
        """Counts images and frames, and checks them."""
        for image in row["images"]:
            check_image(image, self.decode, self.processor.image_processor)
        frames = (count_frames(video, self.decode, self.processor.image_processor) for video in row["videos"])
        return len(row["images"]) + sum(frames)

    def _measure(self, row: dict[str, Any], vision: int) -> dict[str, Any]:
        messages = [{**message, "content": list(map(_as_image, message["content"]))} for message in row["messages"]]
        check_tokens(messages, self.processor.tokenizer.all_special_tokens)
        left_out = self._leaves_out(messages)
        encoded = self.processor.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        media = len(row["images"]) + len(row["videos"])
        rendered = sum(token == self.processor.image_token_id for token in encoded["input_ids"])
        per_picture = self.budgets.full if self.budgets else self.processor.tokens_per_image
        length = len(encoded["input_ids"]) - media + vision * per_picture
        longest = self.budgets.length(length, vision, self.budgets.sizes[0]) if self.budgets else length
        targets = sum(encoded["assistant_masks"])
        problem = ""
        if rendered != media:
            problem = f"{PLACEHOLDER}: the template writes {rendered} <image> for {media} images or videos"
        elif targets == 0:
            problem = NO_TARGET
        elif longest > self.allowed:
            problem = f"{TOO_LONG}: {longest} tokens, {self.allowed} are allowed"
        notes = [*row["notes"], LEFT_OUT] if left_out else row["notes"]
        return {"length": length, "vision": vision, "targets": targets, "notes": notes, "problem": problem}

    def _leaves_out(self, messages: list[dict[str, Any]]) -> bool:
        """Tells whether the template leaves out a text: a mark for each text must be in the prompt."""
        marks = (f"\ue000{number}\ue001" for number in itertools.count())
        marked = [
            {**message, "content": [{**part, "text": part["text"] and next(marks)} for part in message["content"]]}
            for message in messages
        ]
        rendered = self.processor.tokenizer.apply_chat_template(marked, chat_template=self.template, tokenize=False)
        return any(text not in rendered for text in _texts(marked))


def longest_row(max_length: int | None, processor: Any) -> int:
    """Returns how many tokens a row may have: `max_length`, but no more than the model's context."""
    context = processor.tokenizer.model_max_length
    return context if max_length is None else min(max_length, context)


def _as_image(part: dict[str, Any]) -> dict[str, Any]:
    """Makes an image of a video, which counts as its frames: where it is does not matter for the number of tokens."""
    return {**part, "type": "text" if part["type"] == "text" else "image"}


def check_tokens(messages: list[dict[str, Any]], special: list[str]) -> None:
    """Raises a [`DataError`] if a text has one of the `special` tokens, which the tokenizer would not read as text."""
    for token in special:
        if any(token in text for text in _texts(messages)):
            raise DataError(
                f"{CONVERSATION}: a text has {token!r}, which the tokenizer reads as a token of its own and not as "
                "text, expected it in no text"
            )


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    return [part["text"] for message in messages for part in message["content"] if part["text"]]


def check_image(image: dict[str, Any], decode: bool, image_processor: Any) -> None:
    """Raises a [`DataError`] that names the image, if it is missing or, with `decode`, cannot be trained on."""
    if decode:
        open_image(image, image_processor)
    elif image["bytes"] is None and not os.path.isfile(image["path"]):
        raise DataError(f"{BAD_IMAGE}: {image['path']}: no such file")


def open_image(image: Any, image_processor: Any = None) -> PIL.Image.Image:
    """Opens a picture in RGB as [`LlavaSTFImageProcessor`] does, also for the stock image processor of LLaVA.

    Args:
        image: `{"path", "bytes"}`, or a picture that is decoded already.
        image_processor: has the options; by default those of the class.

    Raises:
        DataError: names the image that is missing, cannot be read, or is too long and thin.
    """
    options = {
        name: getattr(image_processor, name, getattr(LlavaSTFImageProcessor, name))
        for name in ("do_exif_transpose", "alpha_background")
    }
    try:
        picture = to_rgb(image if isinstance(image, PIL.Image.Image) else load_picture(image), **options)
        if isinstance(image_processor, LlavaSTFImageProcessor):
            image_processor.check_size(picture)
    except ValueError as error:
        name = (isinstance(image, dict) and image["path"]) or "an image in the dataset"
        raise DataError(f"{BAD_IMAGE}: {name}: {error.__cause__ or error}") from error
    return picture


def count_frames(video: list[str], decode: bool, image_processor: Any) -> int:
    """Frames that the processor will read: those that are listed, or one for each second of a file."""
    if len(video) == 1 and is_animated_file(video[0]):
        try:
            return len(shown_frames(load_picture(video[0])))
        except UNREADABLE as error:
            raise DataError(f"{BAD_IMAGE}: {video[0]}: {error}") from error
    if is_picture(video[0]):
        for frame in video:
            if is_animated_file(frame):
                raise DataError(f"{BAD_IMAGE}: {frame}: an animation among frames; it is a video of its own")
            check_image({"path": frame, "bytes": None}, decode, image_processor)
        return len(video)
    if not os.path.isfile(video[0]):
        raise DataError(f"{BAD_IMAGE}: {video[0]}: no such file")
    import av

    try:
        with av.open(video[0]) as container:
            rate, named = container.streams.video[0].average_rate, container.streams.video[0].frames
        if rate and named:
            return number_of_samples(video[0], None, VIDEO_FPS, None if decode else named)[0]
    except (*UNREADABLE, av.FFmpegError) as error:
        raise DataError(f"{BAD_IMAGE}: {video[0]}: {error}") from error
    raise DataError(f"{BAD_IMAGE}: {video[0]}: it does not say how many frames it has; make it an .mp4")


@dataclass
class Report:
    """Sums up a check: `kept` rows are fit to train on, and counted; `lengths` and `vision` are those of all rows.

    The lengths are those without budgets. The numbers of an epoch count the copies that a row has with its budgets.
    """

    rows: int = 0
    kept: int = 0
    text_only: int = 0
    images: int = 0
    several_images: int = 0
    targets: int = 0
    epoch_images: int = 0
    epoch_targets: int = 0
    epoch_tokens: float = 0
    lengths: list[int] = field(default_factory=list)
    vision: list[int] = field(default_factory=list)
    budgets: TokenBudgets | None = None
    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)  # names of the rows that are kept, by what is noted

    @classmethod
    def of(cls, checked: Dataset, budgets: TokenBudgets | None = None) -> "Report":
        report = cls(rows=len(checked), budgets=budgets)
        columns = checked.select_columns(["id", "length", "vision", "targets", "notes", "problem"])
        for batch in columns.iter(1000):
            for name, length, vision, targets, notes, problem in zip(*batch.values(), strict=True):
                if length:
                    report.lengths.append(length)
                    report.vision.append(vision)
                if problem:
                    report.problems.setdefault(problem.split(":")[0], []).append(f"{name}: {problem}")
                    continue
                for note in notes:
                    report.notes.setdefault(note, []).append(name)
                report.kept += 1
                report.text_only += vision == 0
                report.images += vision
                report.several_images += vision > 1
                report.targets += targets
                copies = budgets.copies(vision) if budgets else 1
                report.epoch_images += copies * vision
                report.epoch_targets += copies * targets
                report.epoch_tokens += budgets.expected(length, vision) if budgets else length
        return report

    def lines(self, max_length: int) -> Iterator[str]:
        yield f"{self.rows} rows, {self.kept} of them fit to train on, with {self.targets} trained tokens"
        yield (
            f"with images: {self.kept - self.text_only} ({self.several_images} with several images or a video, "
            f"{self.images} images and frames in all); text only: {self.text_only}"
        )
        yield from self.noted()
        for kind, rows in sorted(self.problems.items()):
            yield f"{kind}: {len(rows)} row(s)"
            yield from (f"  {row}" for row in rows[:NAMED])
            if len(rows) > NAMED:
                yield f"  and {len(rows) - NAMED} more"
        yield from self.histogram(max_length)
        yield from self.by_budget()

    def noted(self) -> Iterator[str]:
        """Yields each note once: what kept rows have otherwise than it was written, and keys that nothing reads."""
        for note, rows in sorted(self.notes.items()):
            yield f"note: {note}: {len(rows)} row(s), the first is {rows[0]}"

    def lengths_at(self, budget: int) -> list[int]:
        """Returns the lengths of all rows that could be measured, with `budget` tokens for each picture."""
        assert self.budgets is not None
        pairs = zip(self.lengths, self.vision, strict=True)
        return [self.budgets.length(length, vision, budget) for length, vision in pairs]

    def longest(self) -> list[int]:
        """Returns the lengths with the largest budget."""
        return self.lengths_at(self.budgets.sizes[0]) if self.budgets else self.lengths

    def by_budget(self) -> Iterator[str]:
        """Says how long rows are with each budget, and what an epoch takes."""
        if not self.budgets or not self.lengths:
            return
        for budget in self.budgets.sizes:
            lengths = self.lengths_at(budget)
            mean = sum(lengths) / len(lengths)
            yield f"  with {budget} tokens for each picture: {min(lengths)} to {max(lengths)}, {mean:.1f} on average"
        yield f"an epoch by `{self.budgets.mode}`: about {self.epoch_tokens:,.0f} tokens"

    def histogram(self, max_length: int, bins: int = 16, width: int = 50) -> Iterator[str]:
        """Draws the lengths of all rows that could be measured; a bin is a share of `max_length`."""
        lengths = self.longest()
        if not lengths:
            return
        step = -(-max_length // bins)
        counts = Counter(length // step for length in lengths)
        yield f"length in tokens: {min(lengths)} to {max(lengths)}, {max_length} allowed"
        for index in range(min(counts), max(counts) + 1):
            bar = "#" * round(width * counts[index] / max(counts.values()))
            yield f"  {index * step:6d}-{(index + 1) * step - 1:<6d} {counts[index]:8d} {bar}"


def check_rows(rows: Dataset, checker: Checker, num_proc: int | None = None, reuse: bool = False) -> Dataset:
    """Adds measures and problems to rows, and shows progress; with `reuse`, those that another process found."""
    # Never from an older run's cache: images may have come or gone since.
    return rows.map(checker, features=CHECKED, num_proc=num_proc, load_from_cache_file=reuse, desc="Checking the data")


def fit_rows(checked: Dataset, report: Report, on_bad_image: str, on_bad_row: str) -> Dataset:
    """Returns the rows without problems; counts and names in the log what it leaves out.

    Args:
        checked: what [`check_rows`] returns.
        report: sums up these rows.
        on_bad_image: `"error"` or `"skip"`: rows whose image or video is missing or broken.
        on_bad_row: `"error"` or `"skip"`: rows that are too long, or cannot be trained exactly as they are written.

    Raises:
        DataError: if there are such rows and they are not to be skipped, or if no row is left.
    """
    for note in report.noted():
        logger.warning(note)
    for kind, rows in report.problems.items():
        option, choice = ("--on_bad_image", on_bad_image) if kind == BAD_IMAGE else ("--on_bad_row", on_bad_row)
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
    """Does what [`fit_rows`] does row by row, while it trains."""
    noted: set[str] = set()

    def fits(row: dict[str, Any]) -> bool:
        if not row["problem"]:
            for note in set(row["notes"]) - noted:
                logger.warning(f"note: {note}; the first row is {row['id']}")
            noted.update(row["notes"])
            return True
        if "error" == (on_bad_image if row["problem"].startswith(BAD_IMAGE) else on_bad_row):
            raise DataError(f"Row {row['id']} cannot be trained on: {row['problem']}.")
        logger.warning(f"Row {row['id']} is left out: {row['problem']}")
        return False

    return rows.map(checker, features=CHECKED).filter(fits)
