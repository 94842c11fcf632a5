# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Loads a repository as a stranger would, and runs its card's snippet; started by `check` in a process of its own.

It imports nothing of this package, which may not be importable there: the repository has to bring its code. Reads a
request from the first line of standard input and writes what it found as the last line of standard output. It ends when
standard input does, because `check` has ended then; Python code in it cannot connect to another machine.
"""

import contextlib
import io
import json
import os
import signal
import sys
import threading
import warnings

# Importing them fails from here on, whether or not they are installed.
for name in ("modeling_llava_stf", "conversion", "hub_card"):
    sys.modules[name] = None  # type: ignore[assignment]


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.addaudithook(refuse_network)
    found = {**load(**asked["load"]), "printed": run(asked["snippet"])}
    print(json.dumps(found))


def end_with_parent() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)  # with all that this process has started


def refuse_network(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise OSError("the check of a model runs offline")


def load(repository: str, revision: str, base: str, base_revision: str) -> dict:
    """Names of weights that are missing or have no place, the tokens of an image, device and precision.

    `base` is the repository of an adapter's model, empty for a whole model.
    """
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    pin = {"revision": base_revision if base else revision, "trust_remote_code": True}
    model, info = AutoModelForImageTextToText.from_pretrained(
        base or repository, dtype="auto", output_loading_info=True, **pin
    )
    wrong = [
        f"{kind.replace('_keys', '')} weight: {name}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in sorted(map(str, info[kind]))
    ]
    if base:
        from peft import PeftModel

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, repository, revision=revision)
        wrong += [str(warning.message) for warning in said if "adapter keys" in str(warning.message)]
        surplus = model.load_adapter(repository, "default", revision=revision).unexpected_keys  # PEFT is silent on them
        wrong += [f"unexpected weight: {name}" for name in sorted(surplus)]
    processor = AutoProcessor.from_pretrained(repository, revision=revision, trust_remote_code=True)
    ids = processor(images=Image.new("RGB", (64, 48)), text=processor.image_token)["input_ids"]
    tokens = sum(token == processor.image_token_id for token in (ids[0] if isinstance(ids[0], list) else ids))
    return {
        "wrong": wrong,
        "tokens_per_image": tokens,
        "on": f"{model.device.type}, {str(model.dtype).removeprefix('torch.')}",
    }


def run(snippet: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(snippet, "the snippet of the card", "exec"), {"__name__": "__main__"})
    return output.getvalue().rstrip("\n")


if __name__ == "__main__":
    main()
