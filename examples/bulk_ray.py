# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Answers about very many pictures on a cluster, with Ray Data: a folder or bucket in, parquet files out.

pip install 'ray[data]'
python examples/bulk_ray.py INPUT OUTPUT --model DIR_OR_HUB_ID [--prompt QUESTION] [--actors N] [--gpus-per-actor 1]

Each actor holds the model. Without a number there is one for each GPU, or without GPUs one fewer than there are cores:
actors on all cores would leave none to the tasks that read pictures, and wait for them for ever.
"""

import argparse
import os
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
import torch

from modeling_llava_stf.__main__ import _check_numbers
from modeling_llava_stf._bulk import PROMPT, Captioner, Row, picture_endings
from modeling_llava_stf._folder import load_checkpoint

COLUMNS = ("path", "prompt", "answer", "error", "prompt_tokens", "answer_tokens")


class RayCaptioner:
    """An actor: files as Ray reads them in, answers out; a broken picture is a row with an error."""

    def __init__(self, model: str, prompt: str, max_new_tokens: int):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        processor, network = load_checkpoint(model, None, dtype="auto", device_map=device)
        _check_numbers(network.config, max_new_tokens, None)
        self.prompt, self.captioner = prompt, Captioner(processor, network, max_new_tokens)

    def __call__(self, files: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        rows = [
            Row(str(path), self.prompt, bytes(content))
            for path, content in zip(files["path"], files["bytes"], strict=True)
        ]
        answers = self.captioner.answer([self.captioner.prepare(row) for row in rows])
        return {name: [asdict(answer)[name] for answer in answers] for name in COLUMNS}


def left_out(folder: str) -> list[str]:
    """Pictures and folders that Ray 2.60 leaves out of a folder without a word: their names begin with `_`."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    endings = {"", *picture_endings()}
    return [name for name in names if name.startswith("_") and os.path.splitext(name)[1].lower() in endings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("input", help="folder or bucket of pictures")
    parser.add_argument("output", help="folder or bucket for the parquet files")
    parser.add_argument("--model", required=True, help="folder or Hub id, which every machine can read")
    parser.add_argument("--prompt", default=PROMPT, help=f"question (default: {PROMPT!r})")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer in tokens (default: 128)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures that the model sees at once (default: 8)")
    parser.add_argument("--actors", type=int, help="default: one for each GPU, else one fewer than there are cores")
    parser.add_argument("--gpus-per-actor", type=float, help="default: 1 if there are GPUs, else 0")
    arguments = parser.parse_args()
    for name in ("max_new_tokens", "batch_size", "actors"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected at least 1")
    if not arguments.prompt.strip():
        parser.error("--prompt is empty")
    for name in left_out(arguments.input)[:1]:
        parser.error(
            f"Ray leaves out what begins with _, such as {name} in {arguments.input}: rename it, or use "
            "`python -m modeling_llava_stf caption`"
        )
    ray.init()
    cores, gpus = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU"))
    actors = arguments.actors or gpus or max(1, cores - 1)
    gpus_per_actor = arguments.gpus_per_actor if arguments.gpus_per_actor is not None else min(gpus, 1)
    if not gpus and actors >= cores:
        parser.error(f"{actors} actors on {cores} cores leave none to read pictures: give fewer --actors")
    endings = [ending.removeprefix(".") for ending in picture_endings()]
    files = ray.data.read_binary_files(arguments.input, include_paths=True, file_extensions=endings)
    answers = files.map_batches(
        RayCaptioner,
        fn_constructor_args=(arguments.model, arguments.prompt, arguments.max_new_tokens),
        batch_size=arguments.batch_size,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0 if gpus_per_actor else 1,
        num_gpus=gpus_per_actor,
    )
    answers.write_parquet(arguments.output, mode=ray.data.SaveMode.ERROR)  # which refuses a folder that is there
    print(f"answers in {arguments.output}, from {actors} actors on {cores} cores and {gpus} GPUs")


if __name__ == "__main__":
    main()
