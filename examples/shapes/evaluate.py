# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Asks a checkpoint the test's questions and counts the right answers of each kind."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from conversion.checkpoints.folders import complete_or_absent
from modeling_llava_stf._folder import load_checkpoint

from .scenes import GROUPS
from .text import messages_of, read_test
from .training import DEVICE

LONGEST_ANSWER = 80  # tokens; the longest caption has about 60


def evaluate(
    model: str | Path,
    data: str | Path,
    output: str | Path | None = None,
    new: bool = False,
    batch_size: int = 100,
    name: str | None = None,
) -> dict:
    """Answers every question of `data`/test.json greedily, each in a new conversation, and scores the answers.

    Args:
        model: folder or Hub id of a LLaVA-STF checkpoint.
        data: folder that `generate` made.
        output: file for the result as JSON; must not exist.
        new: ask the questions of the new kind instead (`data`/new-test.json).
        batch_size: number of questions that are answered together.
        name: name of the model in the result, such as its id on the Hub; by default `model`.

    Returns:
        What [`score`] returns, and the same for a model card (`python -m hub_card render --results FILE`).

    Raises:
        ValueError: if files are missing or do not belong together, or if `output` exists or cannot be written.
    """
    if output is not None:
        require_new(output)
    rows, truth = read_test(Path(data), "new-" if new else "")
    processor, network = load_checkpoint(str(model), None, dtype="auto", device_map=DEVICE)
    scores = score(ask(network, processor, Path(data), rows, batch_size), rows, truth)
    print(accuracy_table(scores["kinds"]))
    result = card_results(scores["kinds"], name or str(model)) | scores
    if output is not None:
        write_json(output, result)
    return result


def require_new(output: str | Path) -> None:
    """Raises a `ValueError` if a file of results exists, or if there is no folder for it."""
    if Path(output).exists():
        raise ValueError(f"{output} exists. Choose another file; nothing was asked.")
    if not Path(output).absolute().parent.is_dir():
        raise ValueError(f"There is no folder for {output}. Make it, or choose another file; nothing was asked.")


def write_json(file: str | Path, value: dict) -> None:
    """Writes a JSON file, which appears complete or not at all."""
    with complete_or_absent(Path(file), file=True) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def ask(
    network: PreTrainedModel,
    processor: ProcessorMixin,
    folder: Path,
    rows: list[dict],
    batch_size: int = 100,
    inputs_of: Callable[[list[list[dict]]], BatchFeature] | None = None,
) -> dict[str, str]:
    """Returns the greedy answer to the first question of each row, by the row's id; `folder` has the pictures.

    `inputs_of` makes the inputs of `generate` from conversations; by default [`prompts`] does.
    """
    inputs_of = inputs_of or partial(prompts, network, processor)
    # Batches have answers of similar length, because the longest answer ends a batch.
    rows = sorted(rows, key=lambda row: len(row["conversations"][1]["value"]))
    answers: dict[str, str] = {}
    for start in tqdm(range(0, len(rows), batch_size), desc="questions", unit="batch"):
        batch = rows[start : start + batch_size]
        inputs = inputs_of([messages_of(row, folder)[:1] for row in batch])
        outputs = network.generate(**inputs, do_sample=False, max_new_tokens=LONGEST_ANSWER)
        texts = processor.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers |= {row["id"]: text.strip() for row, text in zip(batch, texts, strict=True)}
    return answers


def prompts(
    network: PreTrainedModel, processor: ProcessorMixin, conversations: list[list[dict]], **kwargs: Any
) -> BatchFeature:
    """Returns the inputs of `generate` for conversations in the chat template; `kwargs` are the processor's."""
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, **kwargs},
    ).to(network.device, network.dtype)


def score(answers: dict[str, str], rows: list[dict], truth: list[dict]) -> dict:
    """Counts right answers and questions of each kind and group.

    An answer is right if it equals the true sentence; a caption may name the objects in another order.

    Returns:
        `kinds`: for each kind the groups, each with `right`, `questions` and, if there are any, `accuracy`;
        `mistakes`: id, expected and given answer.

    Raises:
        ValueError: if the ids differ.
    """
    expected = {row["id"]: row["conversations"][1]["value"] for row in rows}
    ids = {row["id"] for row in truth}
    if not answers.keys() == expected.keys() == ids:
        raise ValueError(
            f"There are {len(answers)} answers, {len(expected)} test questions and {len(ids)} rows of truth, or their "
            "ids differ: test.json and truth.jsonl must come from one run of `generate`."
        )
    right = {name: is_right(answers[name], sentence) for name, sentence in expected.items()}
    kinds = {}
    for kind in dict.fromkeys(row["kind"] for row in truth):
        marks = {
            group: [right[row["id"]] for row in truth if row["kind"] == kind and row["group"] == group]
            for group in GROUPS
        }
        kinds[kind] = {group: _counts(of_group) for group, of_group in marks.items()}
    mistakes = [
        {"id": name, "expected": expected[name], "answer": answers[name]} for name in expected if not right[name]
    ]
    return {"kinds": kinds, "mistakes": mistakes}


def card_results(kinds: dict, model: str) -> dict:
    """Returns the accuracies in the form that `hub_card` reads: a benchmark per kind and group."""
    return {
        "source": {"name": "examples/shapes", "url": ""},
        "measured_by": "",
        "evaluated": model,
        "model": model,
        "conditions": "`python -m examples.shapes evaluate`, greedy, on drawings that `generate` made for testing. An "
        "answer is right if it is the true sentence, word for word; a caption may name the objects in another order. "
        "No picture of the training has the two objects of an unseen pair together, or an object as the unseen artist "
        "draws it",
        "results": [
            _card_result(kind, group, part)
            for kind, parts in kinds.items()
            for group, part in parts.items()
            if part["questions"]
        ],
    }


def _card_result(kind: str, group: str, part: dict) -> dict:
    return {
        "benchmark": f"pictograms: {kind}, {group}",
        "dataset": "pictograms",
        "dataset_config": kind,
        "split": f"test, {group}",
        "metric": f"{kind} accuracy ({group})",
        "metric_type": "accuracy",
        "value": part["accuracy"],
        "samples": str(part["questions"]),
    }


def is_right(answer: str, sentence: str) -> bool:
    """Returns whether it is the true sentence, word for word; a caption may name the objects in another order."""
    return _parts(answer) == _parts(sentence)


def _parts(sentence: str) -> list[str]:
    return sorted(re.split(r": |, | and ", sentence.strip().rstrip(".")))


def _counts(marks: list[bool]) -> dict:
    counts = {"right": sum(marks), "questions": len(marks)}
    return counts | ({"accuracy": round(sum(marks) / len(marks), 4)} if marks else {})


def accuracy_table(kinds: dict) -> str:
    """Returns a Markdown table: a row for each kind, with the groups side by side."""
    heads = " | ".join(f"{group}, right, % | of" for group in GROUPS)
    lines = [f"| kind of question | {heads} |", "| --- |" + " --: |" * (2 * len(GROUPS))]
    for kind, parts in kinds.items():
        cells = [
            f"{100 * part['accuracy']:.1f} | {part['questions']}" if part["questions"] else " | 0"
            for part in parts.values()
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)
