# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Answers about very many pictures on a cluster, with Ray Data: a folder or bucket in, parquet files out.

pip install 'ray[data]'
python examples/bulk_ray.py INPUT OUTPUT --model DIR_OR_HUB_ID [--prompt QUESTION] [--actors N] [--gpus-per-actor 1]

Each actor holds the model. Without a number there is one for each GPU, or without GPUs one fewer than there are cores:
actors on all cores would leave none to the tasks that read pictures, and wait for them for ever.
"""

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
import torch

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf._bulk import PROMPT, Captioner, Row, picture_endings

COLUMNS = ("path", "prompt", "answer", "error", "prompt_tokens", "answer_tokens")


class RayCaptioner:
    """An actor: files as Ray reads them in, answers out; a broken picture is a row with an error."""

    def __init__(self, model: str, prompt: str, max_new_tokens: int):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = LlavaSTFForConditionalGeneration.from_pretrained(model, dtype="auto", device_map=device)
        self.prompt = prompt
        self.captioner = Captioner(LlavaSTFProcessor.from_pretrained(model), network, max_new_tokens)

    def __call__(self, files: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        rows = [
            Row(str(path), self.prompt, bytes(content))
            for path, content in zip(files["path"], files["bytes"], strict=True)
        ]
        answers = self.captioner.answer([self.captioner.prepare(row) for row in rows])
        return {name: [asdict(answer)[name] for answer in answers] for name in COLUMNS}


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
