"""The adapter of lmms-eval without lmms-eval: batches, ends of answers, refusals. `make test-eval` runs it with it."""

import json
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace

import pytest
import torch
from drawings import drawn
from transformers import BitsAndBytesConfig

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf.__main__ import DEFAULT_MODEL

ROOT = Path(__file__).parents[2]
QUESTIONS = ("What does the picture show?", "How many objects are there?", "Is there a red circle?")


class StandIn:
    """What the adapter takes from lmms-eval: a base class, and a class that passes messages on."""

    def __init__(self, **given):
        self.given, self._rank, self.task_dict = given, 0, {}

    rank = property(lambda self: self._rank)

    def to_hf_messages(self):
        return self.given["messages"]


@pytest.fixture
def adapter(monkeypatch):
    names = {"api.model": "lmms", "models.registry_v2": "ModelManifest", "protocol": "ChatMessages"}
    for name in ("", ".api", ".models", *(f".{name}" for name in names)):
        module = ModuleType(f"lmms_eval{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if name[1:] in names:
            setattr(module, names[name[1:]], StandIn)
    yield import_module("modeling_llava_stf._lmms_eval")
    sys.modules.pop("modeling_llava_stf._lmms_eval")


def picture(number):
    return drawn(Random(number))[1]


def chat(*parts):
    return [{"role": "user", "content": [part if isinstance(part, dict) else text(part) for part in parts]}]


def text(words):
    return {"type": "text", "text": words}


def image(number):
    return {"type": "image", "image": picture(number)}


def ask(model, chats, settings):
    """Requests of a task `t`, as lmms-eval makes them: text, messages, settings, document, task, split."""
    model.task_dict = {"t": {"test": chats}}
    requests = [("", lambda chat: chat, setting, number, "t", "test") for number, setting in enumerate(settings)]
    return model.generate_until([SimpleNamespace(args=request) for request in requests])


@pytest.fixture
def model(adapter):
    return adapter.LlavaSTF(pretrained=str(DEFAULT_MODEL), dtype="float32", device="cpu", batch_size=4)


def generated(chats, longest=40, **kwargs):
    """Answers of `generate` to each chat alone."""
    network = LlavaSTFForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype=torch.float32).eval()
    processor = LlavaSTFProcessor.from_pretrained(DEFAULT_MODEL)
    answers = []
    for one in chats:
        inputs = processor.apply_chat_template(
            one, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
        )
        output = network.generate(**inputs, do_sample=False, max_new_tokens=longest)
        answers.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def test_the_entry_point_leads_to_the_adapter(adapter):
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert (
        '[project.entry-points."lmms_eval.models"]\nllava_stf = "modeling_llava_stf._lmms_eval:manifest"' in pyproject
    )
    manifest = adapter.manifest().given
    module, _, name = manifest["chat_class_path"].rpartition(".")
    assert manifest["model_id"] == "llava_stf" and getattr(import_module(module), name) is adapter.LlavaSTF
    assert adapter.LlavaSTF.is_simple is False
    assert all(point.name == "llava_stf" for point in entry_points(group="lmms_eval.models"))


def test_mixed_requests_get_the_answers_of_generate_in_their_order(model):
    """Chats with no, one, two pictures, a system message and turns; three settings, in batches of four."""
    chats = [chat(image(number), QUESTIONS[number % 3]) for number in range(5)]
    chats += [chat(image(5), image(6), "Which shapes are in the pictures?"), chat(QUESTIONS[1])]
    chats += [[{"role": "system", "content": [text("Be brief.")]}, *chats[0]]]
    chats += [[*chats[1], {"role": "assistant", "content": [text("Two.")]}, *chat("Is there a red circle?")]]
    settings = [
        {"max_new_tokens": 40},
        {"max_new_tokens": 3, "do_sample": False},
        {"max_new_tokens": 40, "until": ["is"]},
    ]
    given = [settings[number % 3] for number in range(len(chats))]
    long, short = generated(chats), generated(chats, 3)
    expected = [
        (answer, brief, answer.split("is")[0].strip())[number % 3]
        for number, (answer, brief) in enumerate(zip(long, short, strict=True))
    ]
    assert ask(model, chats, given) == expected
    assert len({*expected}) > 4 and any("is" in answer for answer in long[2::3])


def test_a_wrong_port_would_be_seen(model):
    """Padding on the right, and no system text, each change answers of one batch."""
    chats = [chat(image(number), question) for number, question in enumerate(QUESTIONS * 2)]
    settings = [{"max_new_tokens": 40}] * len(chats)
    right = ask(model, chats, settings)
    model.processor.tokenizer.padding_side = "right"
    assert ask(model, chats, settings) != right
    model.processor.tokenizer.padding_side = "left"
    assert ask(model, chats, settings) == right == generated(chats)
    system = {"role": "system", "content": [text("")]}
    assert ask(model, [[system, *one] for one in chats], settings) != right


def test_a_batch_has_one_kind_of_settings(adapter):
    long, short = {"max_new_tokens": 9, "until": ["a"]}, {"max_new_tokens": 9, "until": ["b"]}
    settings = [long, short, {**long}, dict(reversed(long.items())), long, short]
    assert list(adapter.batches(settings, 2)) == [[0, 2], [3, 4], [1, 5]]
    assert list(adapter.batches([], 2)) == []


@pytest.mark.parametrize(
    ("given", "until", "expected"),
    [
        ({}, [], {"max_new_tokens": 1024, "do_sample": False}),
        ({"until": None, "max_new_tokens": 16}, [], {"max_new_tokens": 16, "do_sample": False}),
        ({"until": "\n\n"}, ["\n\n"], {"max_new_tokens": 1024, "do_sample": False}),
        ({"until": ["", "</s>", "Q:"]}, ["</s>", "Q:"], {"max_new_tokens": 1024, "do_sample": False}),
        # Greedy: what samples has no place.
        ({"temperature": 0.0, "top_p": 1.0}, [], {"max_new_tokens": 1024, "do_sample": False}),
        ({"num_beams": 2}, [], {"max_new_tokens": 1024, "do_sample": False, "num_beams": 2}),
        ({"temperature": 0, "do_sample": True}, [], {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0.7, "do_sample": False}, [], {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0.7}, [], {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.7}),
        ({"do_sample": True, "top_k": 5}, [], {"max_new_tokens": 1024, "do_sample": True, "top_k": 5}),
        ({"image_aspect_ratio": "original"}, [], {"max_new_tokens": 1024, "do_sample": False}),
    ],
)  # fmt: skip
def test_settings_of_a_task(adapter, given, until, expected):
    before = json.dumps(given)
    assert adapter.generation(given) == (until, expected)
    assert json.dumps(given) == before  # the requests of a task share them


@pytest.mark.parametrize("name", ["num_return_sequences", "seed", "max_length", "stop_sequences"])
def test_unknown_settings_are_refused(adapter, name):
    with pytest.raises(ValueError, match=f"sets {name}, which llava_stf does not know: it takes until, do_sample"):
        adapter.generation({name: 2})


@pytest.mark.parametrize(
    ("answer", "until", "left"),
    [
        (" Two objects. ", [], "Two objects."),
        ("A red ring\n\nQ: Why?", ["\n\n"], "A red ring"),
        ("a b c", ["c", "b"], "a"),
        ("\n\nToo late", ["\n\n"], ""),
        ("whole", ["x"], "whole"),
    ],
)
def test_an_answer_ends_where_the_first_end_is(adapter, answer, until, left):
    assert adapter.cut(answer, until) == left


def test_a_video_is_read_frame_after_frame(adapter, tmp_path):
    frames = [picture(number) for number in range(4)]
    frames[0].save(tmp_path / "four.gif", save_all=True, append_images=frames[1:], duration=500, loop=0)
    video = chat({"type": "video", "video": str(tmp_path / "four.gif")}, QUESTIONS[0])
    answers = {}
    for frames in (None, 1, 4):
        model = adapter.LlavaSTF(pretrained=str(DEFAULT_MODEL), dtype="float32", num_frames=frames)
        answers[frames] = ask(model, [video], [{"max_new_tokens": 40}])
        options = {"processor_kwargs": {"videos_kwargs": {"num_frames": frames} if frames else {}}}
        assert answers[frames] == generated([video], **options)
    assert len({*map(tuple, answers.values())}) > 1


def test_a_budget_is_that_of_pictures_and_frames(adapter):
    """The answers differ from those of all tokens; 16 is all of them."""
    chats = [
        chat(image(0), image(1), QUESTIONS[0]),
        chat({"type": "video", "video": [picture(0), picture(3)]}, "What?"),
    ]
    found = {}
    for budget in (16, 1):
        model = adapter.LlavaSTF(pretrained=str(DEFAULT_MODEL), dtype="float32", batch_size=2, max_soft_tokens=budget)
        found[budget] = ask(model, chats, [{"max_new_tokens": 8}] * 2)
    assert found[1] == generated(chats, 8, processor_kwargs={"max_soft_tokens": 1})
    assert found[16] == generated(chats, 8) and found[1] != found[16]


def test_a_folder_of_frames_is_a_video(adapter, tmp_path):
    """MVBench's episodic reasoning has such."""
    for number in range(4):
        picture(number).save(tmp_path / f"{number:05d}.png")
    model = adapter.LlavaSTF(pretrained=str(DEFAULT_MODEL), dtype="float32", num_frames=2)
    folder = chat({"type": "video", "video": str(tmp_path)}, QUESTIONS[0])
    frames = chat({"type": "video", "video": [picture(0), picture(3)]}, QUESTIONS[0])
    assert ask(model, [folder], [{"max_new_tokens": 40}]) == generated([frames])


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "audio", "audio": "a.wav"}, "the task has sound"),
        ({"type": "video", "video": "a.mp4", "video_start": 1.0, "video_end": 2.0}, "a part of a video"),
    ],
)
def test_what_the_model_cannot_see_is_refused(adapter, model, part, reason):
    with pytest.raises(ValueError, match=reason):
        ask(model, [chat(part, "What?")], [{}])


def test_a_document_that_does_not_fit_is_named(model):
    with pytest.raises(ValueError, match="Among the documents t 0, t 1: .*512"):
        ask(model, [chat(image(1), "Why?"), chat(image(2), "word " * 600)], [{}, {}])


def test_an_answer_never_leaves_the_context(model):
    """1024 tokens, which tasks without a limit get, are more than the small model's context."""
    assert ask(model, [chat(image(1), QUESTIONS[0])], [{}]) == generated([chat(image(1), QUESTIONS[0])], 80)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "lack `pretrained`"),
        (
            {"pretrained": "x", "trust_remote_code": True},
            "have trust_remote_code; --model llava_stf takes pretrained, ",
        ),
        ({"pretrained": "x", "batch_size": "auto"}, "batch size is 'auto'"),
        ({"pretrained": "x", "batch_size": 0}, "batch size is 0"),
        ({"pretrained": "x", "device": "cpu", "device_map": "auto"}, "not both"),
        ({"pretrained": "x", "num_frames": 0}, "`num_frames` is 0, expected a positive number"),
        ({"pretrained": "x", "fps": "fast"}, "`fps` is 'fast', expected a positive number"),
        ({"pretrained": "./no/such"}, "There is no folder"),
        *(
            ({"pretrained": str(DEFAULT_MODEL), "max_soft_tokens": wrong}, r"^`max_soft_tokens` is .*\[16, 4, 1\]\.$")
            for wrong in (5, 0, -4, True, 4.0, "4", "", [4])
        ),
    ],
)
def test_wrong_arguments_are_refused(adapter, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        adapter.LlavaSTF(**arguments)


def test_log_likelihoods_and_rounds_are_refused(model):
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="use a task with `output_type: generate_until`"):
            method([])


def test_a_quantised_checkpoint_answers(adapter, tmp_path):
    """It is loaded where it stays, because it cannot be moved."""
    pytest.importorskip("bitsandbytes")
    quantised = LlavaSTFForConditionalGeneration.from_pretrained(
        DEFAULT_MODEL, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    quantised.save_pretrained(tmp_path)
    LlavaSTFProcessor.from_pretrained(DEFAULT_MODEL).save_pretrained(tmp_path)
    model = adapter.LlavaSTF(pretrained=str(tmp_path), device="cpu", batch_size=2)
    chats = [chat(image(number), QUESTIONS[2]) for number in range(3)]
    assert all(answer.startswith(("Yes", "No")) for answer in ask(model, chats, [{"max_new_tokens": 20}] * 3))
