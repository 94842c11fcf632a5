"""Speed by counters, not by the clock: graphs, passes, tokens, kept states, waits for the device."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from benchmarks.systems import OURS, OURS_COMPILED, STOCK, System, eager_systems
from modeling_llava_stf import modeling_llava_stf as code
from modeling_llava_stf.modeling_llava_stf import CACHE

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
COMPILED, ASK_MANY = re.findall(r"```python\n(.*?)```", PAGE, re.S)
BUCKET = 64
QUESTIONS = ("Why?", "What is it?", "Name every colour that you can see in it, please. " + "a " * 60)
GREEDY = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}


@pytest.fixture
def no_inductor(monkeypatch):
    """`torch.compile` as it is, but for the making of kernels, which takes longest."""
    compile_function = torch.compile

    def compile_only(function, mode=None, **kwargs):
        return compile_function(function, backend="eager", **kwargs)

    monkeypatch.setattr(torch, "compile", compile_only)


@pytest.fixture
def own_graph_limit():
    """The page raises it: for one test only."""
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


@pytest.fixture
def inputs_of(processor, picture):
    def inputs(name, question, **padding):
        return processor(images=picture(name), text=prompt(question), return_tensors="pt", **padding)

    return inputs


def prompt(question):
    return f"USER: <image>\n{question} ASSISTANT:"


# Compiled


def test_the_page_compiles_nothing_again(model, processor, picture, inputs_of, counters, no_inductor, own_graph_limit):
    """No graph breaks, and none is added by other pictures and other lengths; the answers are those of eager passes."""
    inputs = inputs_of("wide.png", QUESTIONS[0])
    exact = next(
        question
        for question in (" ".join(["a"] * words) for words in range(BUCKET))
        if inputs_of("wide.png", question)["input_ids"].shape[1] == BUCKET
    )
    lengths = {inputs_of("wide.png", question)["input_ids"].shape[1] for question in (*QUESTIONS, exact)}
    assert len(lengths) == 4 and len({-(-length // BUCKET) for length in lengths}) == 2
    names = {"model": model, "processor": processor, "inputs": inputs}
    padded = {"padding": True, "pad_to_multiple_of": BUCKET}
    expected = {
        (name, question): model.generate(**inputs_of(name, question, **padded), max_new_tokens=64)
        for name in ("wide.png", "shapes.png")
        for question in (*QUESTIONS, exact)
    }
    exec(COMPILED, names)
    for question in (QUESTIONS[0], QUESTIONS[-1], exact):
        names["answer"](picture("wide.png"), prompt(question))
    graphs = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for (name, question), tokens in expected.items():
            assert torch.equal(names["answer"](picture(name), prompt(question)), tokens)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@torch.no_grad()
def test_tower_and_fusion_are_one_graph(model, inputs_of, counters, no_inductor):
    pictures = [inputs_of(name, QUESTIONS[0])["pixel_values"] for name in ("wide.png", "shapes.png")]
    expected = [model.get_image_features(pixels).pooler_output[0] for pixels in pictures]
    encode = torch.compile(model.model.get_image_features, fullgraph=True, dynamic=False)
    for pixels, tokens in zip(pictures, expected, strict=True):
        assert torch.equal(encode(pixels).pooler_output[0], tokens)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_generate_compiles_its_steps_once(model, inputs_of, counters):
    """What `cache_implementation="static"` compiles by itself on a GPU."""
    compiling = CompileConfig(backend="eager", mode=None, fullgraph=True, dynamic=False)
    compiling._compile_all_devices = True  # on a CPU, too
    for name, question in (("wide.png", QUESTIONS[-1]), ("shapes.png", QUESTIONS[0]), ("text.png", QUESTIONS[1])):
        inputs = inputs_of(name, question)
        expected = model.generate(**inputs, **GREEDY)
        tokens = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=compiling)
        assert torch.equal(tokens, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


class Waits(TorchDispatchMode):
    """Counts what waits for a GPU: a number that is taken out of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_steps_wait_for_the_device_no_more_than_the_stock_models():
    systems = eager_systems("tiny", "cpu")

    def waits(system, tokens):
        ids, pixels = system.prompt(1, 10), torch.zeros(1, 3, 56, 56)
        cache = System(OURS_COMPILED, system.model, system.vision).new_cache(1, 10)
        inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
        with Waits() as mode:
            system.model.generate(
                **inputs, **{CACHE: cache}, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False
            )
        return mode.count

    ours, stock = (waits(systems[name], 12) - waits(systems[name], 4) for name in (OURS, STOCK))
    assert ours == stock


# Less work


def test_head_sees_the_last_token_only(model, inputs_of):
    lengths = []
    model.lm_head.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    model.generate(**inputs_of("wide.png", QUESTIONS[0]), **GREEDY)
    assert lengths == [1] * GREEDY["max_new_tokens"]


@torch.no_grad()
def test_tower_keeps_the_tapped_states_only(model, inputs_of):
    kept = []
    model.model.vision_tower.register_forward_hook(lambda _, args, out: kept.append(out.hidden_states))
    outputs = model.get_image_features(inputs_of("wide.png", QUESTIONS[0])["pixel_values"])
    taps = model.config.taps
    expected = set(taps) if code.SELECTS_HIDDEN_STATES else set(range(max(taps) + 1))
    assert {index for index, state in enumerate(kept[0]) if state is not None} == expected
    assert outputs.hidden_states is None


def test_the_page_asks_many_questions_at_the_price_of_one_picture(model, processor, picture):
    """One pass through the tower and one over the picture's tokens; later ones read what is new."""
    encoded, read = [], []
    model.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    model.model.language_model.register_forward_hook(lambda _, args, out: read.append(tuple(out[0].shape[:2])))
    names = {"model": model, "processor": processor, "image": picture("wide.png")}
    exec(ASK_MANY, names)
    assert len(encoded) == 1
    seen, passes = len(names["pictures"]._ids), [shape for shape in read if shape[1] > 1]

    def new(*questions):
        return len(questions), max(len(names["pictures"].prompt(question)) for question in questions) - seen

    longer = names["pictures"].after("What is it?", names["answer"])
    assert passes == [
        (1, seen),
        new("What is it?"),
        new("Where is it?", "Is it large?"),
        (1, len(longer._ids) - seen),
        (1, len(longer.prompt("Why?")) - len(longer._ids)),
    ]
