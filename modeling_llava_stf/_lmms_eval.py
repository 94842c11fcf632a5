# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Makes the model known to lmms-eval, which finds it by the entry point in pyproject.toml (seen with 0.7.3).

python -m lmms_eval --model llava_stf --model_args pretrained=DIR_OR_HUB_ID --tasks gqa --batch_size 8
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm.auto import tqdm

from ._folder import load_checkpoint

ARGUMENTS = (
    "pretrained, revision, dtype, device, device_map, attn_implementation, batch_size, fps, num_frames, max_soft_tokens"
)
LONGEST_ANSWER = 1024  # tokens, for tasks that do not say; lmms-eval asks servers for as many
GREEDY = ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "repetition_penalty")
SAMPLED = ("temperature", "top_p", "top_k")
# Tasks say these to other models: LLaVA's own code pads or does not; here the processor knows what its model wants.
NOT_OURS = ("image_aspect_ratio",)


def manifest() -> ModelManifest:
    return ModelManifest(model_id="llava_stf", chat_class_path=f"{__name__}.LlavaSTF")


class LlavaSTF(lmms):
    """
    LLaVA-STF for lmms-eval: chats in the checkpoint's own template, in batches, greedy unless a task samples.

    Args:
        pretrained: folder or Hub id of a checkpoint; a quantised one is loaded as it is.
        revision: branch, tag or commit of a Hub id.
        dtype: such as `float32`; `auto` is that of the weights.
        device: such as `cuda:1` or `cpu`; by default a GPU if there is one. Several processes take a GPU each.
        device_map: such as `auto`, which spreads a model over all GPUs; instead of `device`.
        attn_implementation: such as `eager`.
        batch_size: questions of a batch. Only questions with the same generation settings share one.
        fps, num_frames: which frames of a video are read; by default one per second.
        max_soft_tokens: tokens of each picture and each frame; by default as many as the checkpoint's processor gives.

    Raises:
        ValueError: if an argument is unknown or wrong, or the checkpoint is damaged or incomplete.
    """

    is_simple = False  # requests are chats, not a text with pictures beside it

    def __init__(
        self,
        pretrained: str = "",
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        fps: float | None = None,
        num_frames: int | None = None,
        max_soft_tokens: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown or not pretrained:
            found = f"The model_args have {', '.join(unknown)}" if unknown else "The model_args lack `pretrained`"
            raise ValueError(f"{found}; --model llava_stf takes {ARGUMENTS}.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"The batch size is {batch_size!r}, expected a number of at least 1.")
        if device and device_map:
            raise ValueError(f"Give `device` ({device}) or `device_map` ({device_map}), not both.")
        self.sampling = {name: value for name, value in (("fps", fps), ("num_frames", num_frames)) if value is not None}
        for name, value in self.sampling.items():
            if not (isinstance(value, (int, float)) and value > 0):
                raise ValueError(f"`{name}` is {value!r}, expected a positive number.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator(cpu=device == "cpu")
        several = self.accelerator.num_processes > 1
        self.device = torch.device(self.accelerator.device if several or not device else device)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        # A quantised model cannot be moved, so all are loaded where they stay.
        self.processor, self.network = load_checkpoint(
            pretrained,
            revision,
            dtype=dtype,
            device_map=device_map or {"": self.device},
            **({"attn_implementation": attn_implementation} if attn_implementation else {}),
        )
        self.network.eval()
        if max_soft_tokens is not None:
            self.processor.image_processor.max_soft_tokens = max_soft_tokens
            self.processor.check_settings()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Returns the answer to each request; its arguments are those of lmms-eval's chat models.

        Raises:
            ValueError: if a task has a generation setting that is unknown here, or a chat does not fit the model.
        """
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="llava_stf", unit="question", disable=self.rank != 0) as bar:
            for places in batches([request.args[2] for request in requests], self.batch_size):
                found = self._answer([requests[place] for place in places])
                for place, answer in zip(places, found, strict=True):
                    answers[place] = answer
                bar.update(len(places))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "llava_stf answers in words and gives no log-likelihoods: use a task with `output_type: generate_until`."
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError(
            "llava_stf does not play tasks of several rounds: use a task with `output_type: generate_until`."
        )

    @torch.no_grad()
    def _answer(self, requests: list[Any]) -> list[str]:
        """Answers to requests with the same generation settings, in one batch."""
        until, settings = generation(requests[0].args[2])
        inputs = self._inputs(requests).to(self.network.device, self.network.dtype)
        width = inputs["input_ids"].shape[1]
        room = self.network.config.text_config.max_position_embeddings - width
        settings["max_new_tokens"] = min(settings["max_new_tokens"], room)
        output = self.network.generate(
            **inputs, **settings, stop_strings=until or None, tokenizer=self.processor.tokenizer
        )
        texts = self.processor.batch_decode(output[:, width:], skip_special_tokens=True)
        return [cut(text, until) for text in texts]

    def _inputs(self, requests: list[Any]) -> Any:
        chats, documents = [], []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            chats.append(messages(doc_to_messages(self.task_dict[task][split][doc_id])))
            documents.append(f"{task} {doc_id}")
        try:
            return self.processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "videos_kwargs": self.sampling},
            )
        except ValueError as error:
            raise ValueError(f"Among the documents {', '.join(documents)}: {error}") from error


def messages(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of lmms-eval as those of our chat template.

    Raises:
        ValueError: if they have sound, or ask about a part of a video.
    """
    found = ChatMessages(messages=chat).to_hf_messages()
    for part in (part for message in found for part in message["content"]):
        if part["type"] == "video" and isinstance(part["video"], str) and Path(part["video"]).is_dir():
            part["video"] = sorted(map(str, Path(part["video"]).iterdir()))  # MVBench has folders of frames
        if part["type"] == "audio" or {"video_start", "video_end"} & part.keys():
            raise ValueError(
                "LLaVA-STF sees pictures and whole videos, but the task has "
                f"{'sound' if part['type'] == 'audio' else 'a part of a video'}."
            )
    return found


def batches(settings: Sequence[dict[str, Any]], size: int) -> Iterator[list[int]]:
    """Places of at most `size` requests each, all with the same generation settings."""
    groups = defaultdict(list)
    for place, setting in enumerate(settings):
        groups[json.dumps(setting, sort_keys=True, default=str)].append(place)
    for places in groups.values():
        yield from (places[start : start + size] for start in range(0, len(places), size))


def generation(settings: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """What ends an answer, and the arguments of `generate`. A temperature of 0 is greedy, as is none at all.

    Raises:
        ValueError: if a setting is unknown.
    """
    given = {name: value for name, value in settings.items() if value is not None and name not in NOT_OURS}
    until = given.pop("until", [])
    do_sample = given.pop("do_sample", given.get("temperature", 0) > 0) and given.get("temperature", 1) > 0
    unknown = given.keys() - {*GREEDY, *SAMPLED}
    if unknown:
        raise ValueError(
            f"The task or --gen_kwargs sets {', '.join(sorted(unknown))}, which llava_stf does not know: it takes "
            f"until, do_sample, {', '.join((*GREEDY, *SAMPLED))}."
        )
    kept = {name: given[name] for name in given if do_sample or name in GREEDY}
    texts = [text for text in ([until] if isinstance(until, str) else until) if text]
    return texts, {"max_new_tokens": LONGEST_ANSWER, "do_sample": bool(do_sample), **kept}


def cut(text: str, until: list[str]) -> str:
    """The text before the first of some texts."""
    for end in until:
        text = text.split(end)[0]
    return text.strip()
